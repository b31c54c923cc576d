"""The order of samples: each once an epoch, the same on any number of ranks, in little memory."""

from __future__ import annotations

import itertools
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.order import Order, batch_positions, permute

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation_hits_each_number_once(n: int, key: int) -> None:
    image = permute(np.arange(n, dtype=np.int64), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_is_evaluated_point_by_point() -> None:
    n = 2_000_000_011
    points = np.random.default_rng(0).integers(0, n, 500)
    together = permute(points, n, 7)
    assert together.min() >= 0
    assert together.max() < n
    assert [int(permute(np.array([p]), n, 7)[0]) for p in points[:50]] == together[:50].tolist()


def test_permutation_looks_random() -> None:
    """Where 0 lands is uniform over keys, and neighbours do not stay neighbours (5 sigma bounds)."""
    n, keys = 16, 4000
    first = np.array([permute(np.array([0, 1]), n, k) for k in range(keys)])
    expected = keys / n
    counts = np.bincount(first[:, 0], minlength=n)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    adjacent = (np.abs(first[:, 0] - first[:, 1]) == 1).mean()
    chance = 2 * (n - 1) / (n * (n - 1))
    assert abs(adjacent - chance) < 5 * np.sqrt(chance / keys)


@given(COUNTS, st.integers(0, 2**63 - 1), st.integers(1, 14), st.integers(0, 3))
def test_each_sample_once_an_epoch(counts: list[int], seed: int, window: int, epoch: int) -> None:
    order = Order(np.array(counts), "fp", seed, window)
    shard, row = order.locate(np.arange(epoch * order.size, (epoch + 1) * order.size))
    everything = [(s, r) for s, n in enumerate(counts) for r in range(n)]
    assert sorted(zip(shard.tolist(), row.tolist(), strict=True)) == everything


@given(COUNTS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 500))
def test_global_batch_does_not_depend_on_ranks(
    counts: list[int], micro: int, world: int, accumulation: int, begin: int
) -> None:
    batch = micro * world * accumulation
    parts = [batch_positions(begin, r, world, a, micro) for a in range(accumulation) for r in range(world)]
    assert np.concatenate(parts).tolist() == list(range(begin, begin + batch))
    order = Order(np.array(counts), "fp", 1, 3)
    whole = np.stack(order.locate(np.arange(begin, begin + batch)))
    pieces = np.concatenate([np.stack(order.locate(p)) for p in parts], axis=1)
    assert np.array_equal(whole, pieces)


def test_only_a_window_of_shards_is_open_at_a_time() -> None:
    order = Order(np.full(20, 10), "fp", 0, 4)
    shard, _ = order.locate(np.arange(200))
    for window in range(5):
        assert len(set(shard[window * 40 : (window + 1) * 40].tolist())) == 4
    mixed = sum(a != b for a, b in itertools.pairwise(shard))
    assert mixed > 100  # rows of the window's shards come mixed, not shard by shard


def test_epochs_seeds_and_datasets_have_their_own_orders() -> None:
    counts = np.full(10, 20)
    first = np.stack(Order(counts, "a", 0, 4).locate(np.arange(200)))
    for other in (Order(counts, "a", 1, 4).locate(np.arange(200)), Order(counts, "b", 0, 4).locate(np.arange(200)),
                  Order(counts, "a", 0, 4).locate(np.arange(200, 400))):  # fmt: skip
        assert (np.stack(other) == first).all(axis=0).mean() < 0.1


def test_a_batch_of_a_web_scale_dataset_is_found_in_a_millisecond() -> None:
    order = Order(np.full(200_000, 10_000), "fp", 0, 16)
    order.locate(np.array([0]))
    best = 1.0
    for i in range(5):
        begin = time.perf_counter()
        order.locate(np.arange(1_234_567_000 + i * 256, 1_234_567_256 + i * 256))
        best = min(best, time.perf_counter() - begin)
    assert best < 0.005, best  # generous: the machine may be shared
