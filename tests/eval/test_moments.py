"""Moments against numpy's own mean and covariance, and their algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import moments
from tests.eval.conftest import random_features


def close(a: moments.Moments, b: moments.Moments, tolerance: float) -> None:
    assert a.n == b.n
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=tolerance)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=0, atol=tolerance * max(1.0, np.abs(b.scatter).max()))


def test_moments_are_numpys() -> None:
    x = random_features(200, 12, 0) + 3
    m = moments.of(x)
    np.testing.assert_allclose(m.mean, x.mean(0), atol=1e-14)
    np.testing.assert_allclose(m.covariance, np.cov(x, rowvar=False), atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=8), st.randoms(use_true_random=False), st.floats(-1e3, 1e3))
def test_any_partition_in_any_order_of_arrival_gives_the_same_bits(sizes, random, offset) -> None:
    sizes[0] += 2
    x = random_features(sum(sizes), 5, 1) + offset
    parts = [moments.of(p) for p in np.split(x, np.cumsum(sizes)[:-1])]
    arrivals = list(enumerate(parts))
    expected = moments.merge_all(arrivals)
    random.shuffle(arrivals)
    merged = moments.merge_all(arrivals)
    assert merged.n == expected.n
    assert merged.mean.tobytes() == expected.mean.tobytes()
    assert merged.scatter.tobytes() == expected.scatter.tobytes()
    close(merged, moments.of(x), 1e-10)


def test_a_tree_of_merges_equals_a_chain() -> None:
    parts = [moments.of(random_features(40, 6, s) * 3 + 1000) for s in range(16)]
    chain = moments.merge_all(enumerate(parts))
    level = parts
    while len(level) > 1:
        level = [moments.merge(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    close(level[0], chain, 1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(2, 40), st.floats(-100, 100))
def test_unmerge_is_the_inverse_of_merge(part_size: int, rest_size: int, offset: float) -> None:
    part, rest = moments.of(random_features(part_size, 4, 2) - offset), moments.of(random_features(rest_size, 4, 3))
    close(moments.unmerge(moments.merge(rest, part), part), rest, 1e-10)


def test_unmerge_of_features_is_exact_to_twelve_digits() -> None:
    """Features as networks have them: the inverse costs no digit that matters."""
    parts = [moments.of(np.abs(random_features(100, 64, s))) for s in range(20)]
    total = moments.merge_all(enumerate(parts))
    for g in (0, 7, 19):
        direct = moments.merge_all((i, p) for i, p in enumerate(parts) if i != g)
        close(moments.unmerge(total, parts[g]), direct, 1e-12)


def test_float32_features_give_float64_moments() -> None:
    x = random_features(5000, 8, 4)
    close(moments.of(x.astype(np.float32)), moments.of(x), 1e-6)


def test_features_that_are_not_finite_are_named() -> None:
    x = random_features(4, 3, 5)
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"first: row 2\)"):
        moments.of(x)
    accumulator = moments.Accumulator(3, 4)
    with pytest.raises(ValueError, match="not finite"):
        accumulator.add(x)
    with pytest.raises(ValueError, match=r"\[images, 3\]"):
        accumulator.add(x[:, :2])


def test_what_cannot_be_is_refused() -> None:
    one = moments.of(random_features(1, 3, 6))
    with pytest.raises(ValueError, match="at least 2"):
        _ = one.covariance
    with pytest.raises(ValueError, match="3 and of 4"):
        moments.merge(one, moments.of(random_features(2, 4, 6)))
    with pytest.raises(ValueError, match="taken out"):
        moments.unmerge(one, moments.of(random_features(2, 3, 6)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.floats(-1e3, 1e3))
def test_an_accumulator_is_the_moments_of_everything(sizes: list[int], block: int, offset: float) -> None:
    sizes[0] += 2
    x = random_features(sum(sizes), 4, 6) + offset
    parts = np.split(x, np.cumsum(sizes)[:-1])
    rows, asked = moments.Accumulator(4, block), moments.Accumulator(4, block)
    for p in parts:
        rows.add(p)
        asked.add(p)
        asked.result()
    for accumulator in (rows, rows, asked):  # asking changes nothing
        close(accumulator.result(), moments.of(x), 1e-9)


def test_an_accumulator_gives_the_same_bits_in_the_same_order() -> None:
    parts = [random_features(n, 6, n) for n in (5, 700, 3, 64)]
    results = []
    for _ in range(2):
        accumulator = moments.Accumulator(6)
        for p in parts:
            accumulator.add(p)
        results.append(accumulator.result())
    assert results[0].scatter.tobytes() == results[1].scatter.tobytes()
