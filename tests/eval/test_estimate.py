"""Errors of estimates against textbook formulas, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.metrics.estimate import jackknife, mean_by_cluster, proportion, wilson


def test_jackknife_of_a_mean_is_the_textbook_error() -> None:
    x = np.random.default_rng(0).standard_normal(37)
    e = jackknife(x.mean(), [np.delete(x, i).mean() for i in range(len(x))], [1] * len(x))
    assert e.se == pytest.approx(x.std(ddof=1) / np.sqrt(len(x)), rel=1e-10)
    assert e.bias_corrected == pytest.approx(x.mean(), rel=1e-10)


def test_jackknife_takes_out_a_bias_of_order_one_over_n() -> None:
    """The variance with ddof = 0 is biased by -s^2/n; corrected it is the one with ddof = 1, for equal groups of
    one."""
    x = np.random.default_rng(1).standard_normal(30)
    e = jackknife(x.var(), [np.delete(x, i).var() for i in range(len(x))], [1] * len(x))
    assert e.bias_corrected == pytest.approx(x.var(ddof=1), rel=1e-10)


def test_unequal_groups_cover() -> None:
    rng = np.random.default_rng(2)
    sizes = [5, 9, 12, 4, 20, 7, 11, 6, 16, 10]
    covered = 0
    for _ in range(400):
        parts = [rng.standard_normal(s) for s in sizes]
        x = np.concatenate(parts)
        left = [np.concatenate(parts[:g] + parts[g + 1 :]).mean() for g in range(len(parts))]
        e = jackknife(x.mean(), left, sizes)
        covered += (e.low or 0) <= 0 <= (e.high or 0)
    assert 0.88 * 400 <= covered <= 0.99 * 400


def test_wilson_is_scipys() -> None:
    for hits, n in ((0, 20), (3, 20), (20, 20), (47, 113)):
        ours = wilson(hits / n, n)
        theirs = binomtest(hits, n).proportion_ci(0.95, "wilson")
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        e = proportion([True] * hits + [False] * (n - hits))
        assert (e.low, e.high) == pytest.approx(ours)


def test_repeating_every_picture_does_not_shrink_the_error() -> None:
    x = np.random.default_rng(3).standard_normal(50)
    single, thrice = mean_by_cluster(x, range(50)), mean_by_cluster(np.repeat(x, 3), np.repeat(np.arange(50), 3))
    assert thrice.se == pytest.approx(single.se, rel=1e-10)
    hits = x > 0
    one, three = proportion(hits, range(50)), proportion(np.repeat(hits, 3), np.repeat(np.arange(50), 3))
    assert three.n == 150
    assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=0.01)


def test_a_mean_of_single_clusters_is_the_usual_error() -> None:
    x = np.random.default_rng(4).standard_normal(50)
    assert mean_by_cluster(x, range(50)).se == pytest.approx(x.std(ddof=1) / np.sqrt(50), rel=1e-12)


def test_a_cluster_is_whatever_is_equal_with_an_order_or_without() -> None:
    """As a scorer's meaning of a caption may be: an object that compares with nothing, or a tuple."""
    rng, number = np.random.default_rng(3), [0, 2, 1, 0, 2, 2, 3]
    hits = rng.random(len(number))
    kinds = [frozenset({n}) for n in number], [(n, "a") for n in number], [complex(n) for n in number]
    for of in (mean_by_cluster, proportion):
        expected = of(hits, number)
        for clusters in kinds:
            assert of(hits, clusters) == expected


def test_nothing_and_nonsense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        proportion([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        proportion([1.5])
    with pytest.raises(ValueError, match="at least 2 groups"):
        jackknife(1.0, [1.0], [3])
