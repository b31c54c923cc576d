"""Paired differences and alarms: against the t test, by simulation, and on a run in which one checkpoint is worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval import compare
from eval.metrics import frechet, moments
from eval.metrics.estimate import Estimate, jackknife, mean_by_cluster, with_groups
from shards.settings import StageError
from tests.eval.test_protocol import PROTOCOL


def result(name: str, images: int, found: dict[str, Estimate], **protocol: Any) -> dict[str, Any]:
    import dataclasses

    better = {"clip_score": "higher"}
    return {
        "checkpoint": name,
        "images_seen": images,
        "cell": "ddim-25-3",
        "protocol": dataclasses.replace(PROTOCOL, unet=name, **protocol).to_json(),
        "missing": {"pictures": 0, "shards": []},
        "metrics": {n: {**e.to_json(), "better": better.get(n, "lower"), "definition": ""} for n, e in found.items()},
        "jackknife": {n: {"sizes": list(e.sizes or ()), "left_out": list(e.left_out or ())} for n, e in found.items()},
    }


def score(values: np.ndarray) -> Estimate:
    return with_groups(mean_by_cluster(values, range(len(values))), values, np.arange(len(values)))


def test_with_a_group_a_picture_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    luck = rng.standard_normal(24)
    a, b = luck + 0.1 * rng.standard_normal(24), luck + 0.05 + 0.1 * rng.standard_normal(24)
    [d] = compare.differences(result("a", 1, {"clip_score": score(a)}), result("b", 2, {"clip_score": score(b)}))
    theirs = stats.ttest_rel(b, a)
    assert d.value == pytest.approx((b - a).mean(), rel=1e-9)
    assert d.p == pytest.approx(theirs.pvalue, rel=1e-8)
    assert (d.low, d.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-8)
    # The two errors apart would be several times as large: the luck is shared.
    assert d.se < 0.3 * np.hypot(score(a).se or 0, score(b).se or 0)


def distances(seed: int, shift: float, ref: frechet.Reference) -> Estimate:
    rng = np.random.default_rng(seed)
    return frechet.estimate(ref, [moments.of(g + shift) for g in rng.standard_normal((10, 40, 6))])


def test_differences_of_distances_cover_the_truth() -> None:
    """Two models that share their noise, 0.1 and 0.2 off; squared shifts in 6 dimensions are 0.06 and 0.24."""
    ref = frechet.reference(moments.Moments(10**9, np.zeros(6), np.eye(6) * (10**9 - 1)))
    covered = significant = 0
    for seed in range(100):
        a, b = (result(str(s), 1, {"fd_clip_unit": distances(seed, s, ref)}) for s in (0.1, 0.2))
        [d] = compare.differences(a, b)
        covered += d.low <= 0.18 <= d.high
        significant += d.verdict == "worse"
    assert 88 <= covered <= 100
    assert significant >= 80


def test_equal_results_show_no_difference() -> None:
    ref = frechet.reference(moments.Moments(10**9, np.zeros(6), np.eye(6) * (10**9 - 1)))
    same = [result(n, i, {"fd_clip_unit": distances(3, 0.1, ref)}) for i, n in enumerate("ab")]
    [d] = compare.differences(*same)
    assert (d.value, d.p, d.verdict) == (0, 1, "no difference shown")
    assert not compare.alarms(same, "b", 3.0)


def test_unlike_protocols_are_never_compared() -> None:
    x = score(np.arange(9.0))
    a, b = result("a", 1, {"clip_score": x}), result("b", 2, {"clip_score": x}, steps=50, inception="f" * 64)
    with pytest.raises(StageError, match=r"steps: 25 and 50; inception: +and ffffffffffff"):
        compare.differences(a, b)
    assert compare.differences(a, b, ("steps", "inception"))


def test_a_worse_checkpoint_is_an_alarm_against_the_best_before_it() -> None:
    rng = np.random.default_rng(5)
    luck = rng.standard_normal(200)
    levels = {"step-1": 20.0, "step-2": 24.0, "step-3": 23.9, "step-4": 21.0}
    run = [
        result(n, i + 1, {"clip_score": score(v + luck + 0.5 * rng.standard_normal(200))})
        for i, (n, v) in enumerate(levels.items())
    ]
    assert [compare.alarms(run, n, 3.0) == [] for n in levels] == [True, True, True, False]
    [alarm] = compare.alarms(run, "step-4", 3.0)
    assert (alarm.best, alarm.difference.metric) == ("step-2", "clip_score")
    assert alarm.sigmas > 20
    assert str(alarm).startswith("step-4 is worse than step-2 in clip_score: 2")
    # Neither other cells, nor other protocols, nor partial results are held against it.
    for change in ({"cell": "x"}, {"protocol": {**run[0]["protocol"], "id": "x"}}, {"missing": {"pictures": 3}}):
        assert not compare.alarms([{**run[1], **change}, run[3]], "step-4", 3.0)


def test_one_that_was_alarming_is_nobodys_best() -> None:
    """The second collapsed: far from the real pictures, and by luck with a fine CLIP score."""
    rng = np.random.default_rng(7)
    luck = rng.standard_normal(200)
    levels = {"step-1": (0.2, 20.0), "step-2": (0.9, 26.0), "step-3": (0.19, 21.0), "step-4": (0.3, 21.0)}
    run = []
    for i, (name, (far, points)) in enumerate(levels.items()):
        values = [v + luck * s + 0.01 * rng.standard_normal(200) for v, s in ((far, 0.01), (points, 1.0))]
        run.append(result(name, i + 1, dict(zip(("fd_clip_unit", "clip_score"), map(score, values), strict=True))))
    told = [[(a.best, a.difference.metric) for a in compare.alarms(run, name, 3.0)] for name in levels]
    assert told == [[], [("step-1", "fd_clip_unit")], [], [("step-3", "fd_clip_unit")]]
    assert told == [[(a.best, a.difference.metric) for a in compare.alarms(run[::-1], n, 3.0)] for n in levels]


def test_groups_of_a_mean_are_means_without_them() -> None:
    x = np.random.default_rng(6).standard_normal(17)
    owner = np.array([0, 3, 3, 5] * 4 + [5])
    e = with_groups(mean_by_cluster(x, range(17)), x, owner)
    assert e.left_out == pytest.approx([x[owner != g].mean() for g in (0, 3, 5)])
    assert e.sizes == (4, 8, 5)
    assert jackknife(e.value, e.left_out or (), e.sizes or ()).bias_corrected == pytest.approx(e.value)
