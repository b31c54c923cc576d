"""Paired differences and alarms: against the t test, by simulation, and on a run in which one checkpoint is worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import eval as simulation
from eval import compare, measure
from eval.metrics import frechet, moments
from eval.metrics.estimate import Estimate, jackknife, mean_by_cluster, with_groups
from eval.report import history
from orchestration import evaluation as commands
from shards.layout import RunPaths
from shards.settings import StageError
from tests.eval.test_protocol import made

HIGHER = ("clip_score", "vqa_score", "soft_tifa_gm")  # is better


def result(
    name: str, images: int, found: dict[str, Estimate], counts: dict[str, int] | None = None, **protocol: Any
) -> dict[str, Any]:
    better = dict.fromkeys(HIGHER, "higher")
    return {
        "checkpoint": name,
        "images_seen": images,
        "cell": "ddim-25-3",
        "protocol": made(**protocol),
        "model": {"weights": "ema"},
        "missing": {"images": 0, "shards": []},
        "counts": {"images": 1000, "failed": 0, "blank": 0, "repeated": 0, **(counts or {})},
        "metrics": {
            n: {**e.to_json(), "better": better.get(n, "lower"), "label": n, "definition": ""} for n, e in found.items()
        },
        "jackknife": {
            n: {"groups": list(e.groups or ()), "sizes": list(e.sizes or ()), "left_out": list(e.left_out or ())}
            for n, e in found.items()
        },
        "by_tag": {},
        "tag_jackknife": {},
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
    return frechet.estimate(ref, {i: moments.of(g + shift) for i, g in enumerate(rng.standard_normal((10, 40, 6)))})


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
    assert not compare.alarms(same, "b")


def test_unlike_protocols_are_never_compared() -> None:
    x = score(np.arange(9.0))
    a, b = result("a", 1, {"clip_score": x}), result("b", 2, {"clip_score": x}, steps=50, inception="f" * 64)
    with pytest.raises(StageError, match=r"steps: 25 and 50; inception: None and ffffffffffff"):
        compare.differences(a, b)
    assert compare.differences(a, b, ("steps", "inception"))


def plateau(rng: np.random.Generator, name: str, images: int, worse: float = 0.0, groups: int = 20) -> dict[str, Any]:
    """An equally good checkpoint: every metric is noise about one value; `worse` of them in errors' units."""
    found = {}
    for metric in compare.WATCHED:
        sign = -1 if metric in HIGHER else 1
        x = 10 + rng.standard_normal(groups * 20) + sign * worse * 0.05
        found[metric] = with_groups(mean_by_cluster(x, range(len(x))), x, np.arange(len(x)) % groups)
    return result(name, images, found)


def test_a_checkpoint_that_is_worse_than_a_plateau_is_seen() -> None:
    rng, seen = np.random.default_rng(0), 0
    for _ in range(3):
        results = [plateau(rng, f"s{k:02d}", k + 1, worse=20 if k == 19 else 0) for k in range(20)]
        seen += bool(compare.alarms(results, "s19"))
    assert seen == 3
    small = [plateau(rng, f"s{k:02d}", k + 1, worse=20 if k == 19 else 0) for k in range(20)]
    assert not compare.alarms(small, "s19", min_change=0.5)  # sure, and yet not worth an alarm


@pytest.mark.parametrize("kind", simulation.KINDS)
def test_equally_good_checkpoints_raise_an_alarm_in_one_run_of_fifty_at_most(kind: str) -> None:
    """The rule worked out in arrays for a thousand runs of 30, and by compare.alarms in those nearest to its threshold:
    both say the same of those. At most 2 % may alarm; 33 in a thousand would be three errors above it."""
    runs = 1000 if kind != "distances" else 100
    for groups in (4, 20):
        left_out = np.concatenate([simulation.equals(kind, runs // 4, groups, seed) for seed in range(4)])
        excess = simulation.excess(left_out, 0.02)
        assert (excess > 0).sum() <= (0.02 + 3 * (0.02 * 0.98 / runs) ** 0.5) * runs
    order = np.argsort(excess)
    highest = order[(excess <= 0).sum() - 1]  # without an alarm
    for run, rate in ((highest, 0.02), (highest, 0.5), (order[-1], 0.02)):
        found = [checkpoint(f"s{k:02d}", k + 1, of) for k, of in enumerate(left_out[run])]
        alarmed = any(compare._against(found[k], found[:k], rate, 0.0, 0.01) for k in range(30))
        assert alarmed == (simulation.excess(left_out[run : run + 1], rate)[0] > 0)


def checkpoint(name: str, images: int, left_out: np.ndarray) -> dict[str, Any]:
    """A result with these values without each group, [metrics, groups]; the less the better, whatever the metric."""
    found = {}
    for metric, less in zip(compare.WATCHED, left_out, strict=False):
        values = -less if metric in HIGHER else less
        found[metric] = jackknife(float(values.mean()), values.tolist(), [20] * len(values))
    return result(name, images, found)


def test_bad_images_alarm_whatever_the_metrics_say() -> None:
    rng = np.random.default_rng(1)
    for name in ("failed", "blank", "repeated"):
        results = [plateau(rng, f"s{k}", k + 1) for k in range(4)]
        results[3]["counts"][name] = 480
        [alarm] = compare.alarms(results, "s3")
        assert (alarm.metric, alarm.value) == (name, 480)
        results[3]["counts"][name] = 5  # one in two hundred is less than the limit
        assert not compare.alarms(results, "s3")
    first = plateau(rng, "s0", 1)
    first["counts"]["failed"] = 500
    assert [a.metric for a in compare.alarms([first], "s0")] == ["failed"]
    first["counts"] |= {"images": 100, "failed": 0, "blank": 2}  # so many come to one run in eleven of 0.5 %
    assert not compare.alarms([first], "s0")
    assert simulation.spoilt(0.01, 256, 50, 0) <= 3


def test_scores_of_ones_own_alarm_and_are_in_the_verdict() -> None:
    rng = np.random.default_rng(4)
    luck = rng.standard_normal(200)
    levels = {"step-1": 4.0, "step-2": 4.1, "step-3": 1.0}
    run = [
        result(
            n, i + 1, {"my_score": score(-v + luck + 0.1 * rng.standard_normal(200)), "kid_tf": score(luck * (1 + i))}
        )
        for i, (n, v) in enumerate(levels.items())
    ]
    assert not compare.alarms(run, "step-2")
    [alarm] = compare.alarms(run, "step-3")
    assert alarm.metric == "my_score"
    way, words = compare.verdict(compare.differences(run[1], run[2]), "step-2", "step-3")
    assert (way, words) == ("worse", "step-3 is worse than step-2 in my_score.")


def test_groups_are_matched_by_name() -> None:
    """One result lost a group of images: the others' differences are paired as before, not by place."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal(200)
    groups = np.arange(200) % 10
    keep = groups != 3
    a = result("a", 1, {"clip_score": with_groups(mean_by_cluster(x, range(200)), x, groups)})
    y = (x + 0.5)[keep]
    b = result("b", 2, {"clip_score": with_groups(mean_by_cluster(y, range(len(y))), y, groups[keep])})
    [d] = compare.differences(a, b)
    assert d.groups == 9
    assert d.se < 0.05  # by place it would be the noise of two results apart, 0.1


def test_a_verdict_is_one_sentence() -> None:
    rng = np.random.default_rng(3)
    a, same, worse = plateau(rng, "a", 1), plateau(rng, "b", 2), plateau(rng, "c", 3, worse=20)
    assert compare.verdict(compare.differences(a, same), "a", "b")[0] == "same"
    way, words = compare.verdict(compare.differences(a, worse), "a", "c")
    assert way == "worse"
    assert words.startswith("c is worse than a in fid_clean") or words.startswith("c is worse than a in ")


def test_a_worse_checkpoint_is_an_alarm_against_one_before_it() -> None:
    rng = np.random.default_rng(5)
    luck = rng.standard_normal(200)
    levels = {"step-1": 20.0, "step-2": 24.0, "step-3": 23.9, "step-4": 21.0}
    run = [
        result(n, i + 1, {"clip_score": score(v + luck + 0.5 * rng.standard_normal(200))})
        for i, (n, v) in enumerate(levels.items())
    ]
    assert [compare.alarms(run, n) == [] for n in levels] == [True, True, True, False]
    [alarm] = compare.alarms(run, "step-4")
    assert (alarm.best in ("step-2", "step-3"), alarm.metric) == (True, "clip_score")
    assert str(alarm).startswith(f"step-4 is worse than {alarm.best} in clip_score: 2")
    # Neither other weights, nor other protocols, nor partial results are held against it.
    for change in (
        {"model": {"weights": "raw"}},
        {"protocol": {**run[0]["protocol"], "id": "x"}},
        {"missing": {"images": 3}},
    ):
        assert not compare.alarms([{**run[1], **change}, run[3]], "step-4")


def test_one_that_was_alarming_is_nobodys_best() -> None:
    """The second collapsed: far from the real images, and by chance with a fine CLIP score."""
    rng = np.random.default_rng(7)
    luck = rng.standard_normal(200)
    levels = {"step-1": (0.2, 20.0), "step-2": (0.9, 26.0), "step-3": (0.19, 21.0), "step-4": (0.3, 21.0)}
    run = []
    for i, (name, (far, points)) in enumerate(levels.items()):
        values = [v + luck * s + 0.01 * rng.standard_normal(200) for v, s in ((far, 0.01), (points, 1.0))]
        run.append(result(name, i + 1, dict(zip(("fd_clip_unit", "clip_score"), map(score, values), strict=True))))
    alarmed = [[a.metric for a in compare.alarms(run, name)] for name in levels]
    assert alarmed == [[], ["fd_clip_unit"], [], ["fd_clip_unit"]]
    assert all(a.best != "step-2" for a in compare.alarms(run, "step-4"))
    assert alarmed == [[a.metric for a in compare.alarms(run[::-1], n)] for n in levels]


def test_groups_of_a_mean_are_means_without_them() -> None:
    x = np.random.default_rng(6).standard_normal(17)
    groups = np.array([0, 3, 3, 5] * 4 + [5])
    e = with_groups(mean_by_cluster(x, range(17)), x, groups)
    assert e.left_out == pytest.approx([x[groups != g].mean() for g in (0, 3, 5)])
    assert (e.groups, e.sizes) == ((0, 3, 5), (4, 8, 5))
    assert jackknife(e.value, e.left_out or (), e.sizes or ()).bias_corrected == pytest.approx(e.value)


def test_results_are_found_whatever_a_model_is_called_and_by_url(tmp_path: Path) -> None:
    run, values = RunPaths(str(tmp_path)), np.random.default_rng(0).standard_normal(24)
    names = ("real-vision-xl-1a2b3c4d", "train-tickets-1a2b3c4d", "step-00000004")
    for name in names:
        content = {"format": measure.FORMAT, **result(name, 1, {"clip_score": score(values)})}
        measure.write(f"{run.eval}/{name}/0123456789/metrics.json", content)
    assert sorted(r["checkpoint"] for r in history.read_all(run)) == sorted(names)
    folder, found = commands.result_of(f"file://{run.eval}/step-00000004/0123456789")
    assert folder == f"file://{run.eval}/step-00000004"
    assert (found["checkpoint"], found["folder"]) == ("step-00000004", "0123456789")


def test_what_only_one_result_has_is_named(tmp_path: Path) -> None:
    """A scorer's names changed between two runs, say."""
    x = score(np.random.default_rng(0).standard_normal(24))
    for name, metrics in (("a", ["clip_score", "shows_place"]), ("b", ["clip_score", "shows_position"])):
        content = {"format": measure.FORMAT, **result(name, 1, dict.fromkeys(metrics, x))}
        measure.write(f"{tmp_path}/{name}/0123456789/metrics.json", content)
    a, b = (f"{tmp_path}/{name}/0123456789" for name in "ab")
    assert commands.compare(a, b).splitlines()[-2:] == [
        f"not compared, since only {a} has it: shows_place",
        f"not compared, since only {b} has it: shows_position",
    ]
    assert "not compared" not in commands.compare(a, a)
