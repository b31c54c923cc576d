"""Draws by position: the same for any ranks and batches, and distributed as they should be."""

from __future__ import annotations

import numpy as np
from scipy import stats

from train.order import derive_key
from train.randomness import Randomness


def test_draws_do_not_depend_on_how_samples_are_grouped() -> None:
    positions = np.arange(100, 132)
    whole = Randomness(3)
    normal, integers, uniform = (
        whole.normal("noise", positions, (2, 3)),
        whole.integers("t", positions, 1000),
        whole.uniform("caption", positions),
    )
    for part in (positions[::2], positions[1::2], positions[::-1][:5]):
        other = Randomness(3)  # another rank, another process, another order of calls
        where = part - 100
        assert np.array_equal(other.uniform("caption", part), uniform[where])
        assert np.array_equal(other.normal("noise", part, (2, 3)), normal[where])
        assert np.array_equal(other.integers("t", part, 1000), integers[where])


def test_one_sample_can_be_replayed_with_numpy_alone() -> None:
    key = np.array([derive_key("random", 3, "noise", i) for i in range(2)], np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 4_000_000_000, 0])).standard_normal(
        (4, 8, 8), dtype=np.float32
    )
    assert np.array_equal(Randomness(3).normal("noise", np.array([4_000_000_000]), (4, 8, 8))[0], expected)


def test_samples_purposes_and_seeds_are_independent_and_normal() -> None:
    a = Randomness(0).normal("noise", np.arange(64), (256,))
    for other in (
        Randomness(0).normal("posterior", np.arange(64), (256,)),
        Randomness(1).normal("noise", np.arange(64), (256,)),
        Randomness(0).normal("noise", np.arange(64, 128), (256,)),
    ):
        assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(a.size)
    assert stats.kstest(a.ravel(), "norm").pvalue > 1e-4
    t = Randomness(0).integers("timestep", np.arange(20_000), 10)
    assert stats.chisquare(np.bincount(t, minlength=10)).pvalue > 1e-4
