"""Is one result better than another? Paired differences of results under one protocol, a verdict, and the alarm.

Two models are drawn with the same prompts and the same noise, and most of the chance is shared. So the difference is
jackknifed by group, rather than the two values apart: its error is far smaller than the two errors together.
metrics.json holds what is needed, the values without each group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

from eval.metrics.definitions import DEFINITIONS
from eval.metrics.estimate import paired, quantile95
from eval.protocol import require_comparable

# What a verdict and an alarm look at, where measured: how far from the real images, and whether images fit prompts; and
# every score of one's own or made elsewhere.
WATCHED = (
    "fid_clean",
    "fid_tf",
    "fd_dinov2_pil",
    "fd_clip_unit",
    "clip_score",
    "vqa_score",
    "soft_tifa_gm",
)
HORIZON = 30  # checkpoints over which the rate of false alarms is held
BAD = ("failed", "blank", "repeated")


def is_watched(metric: str) -> bool:
    """Whether a verdict and an alarm look at it."""
    return metric in WATCHED or metric not in DEFINITIONS


@dataclasses.dataclass(frozen=True)
class Difference:
    """b minus a of one metric: value, standard error, 95 % interval, two-sided p of Student's t on groups - 1."""

    metric: str
    better: str  # higher, lower or ""
    a: float
    b: float
    value: float
    se: float
    low: float
    high: float
    p: float
    groups: int
    label: str = ""
    tag: str = ""
    share: bool = False  # of images, 0 to 1

    @property
    def verdict(self) -> str:
        """`better`, `worse` (b than a, by more than the interval says) or `no difference shown`."""
        if not self.better or self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.value > 0) == (self.better == "higher") else "worse"

    def worse_by(self) -> float:
        """How many standard errors b is worse than a; negative where it is better."""
        sign = -1 if self.better == "higher" else 1
        return sign * self.value / self.se if self.se else math.copysign(math.inf, sign * self.value)

    def p_worse(self) -> float:
        """One-sided p of b being no worse than a."""
        from scipy.special import stdtr

        return float(stdtr(self.groups - 1, -self.worse_by())) if self.value else 1.0


def differences(
    a: dict[str, Any], b: dict[str, Any], vary: Collection[str] = (), tags: bool = False
) -> list[Difference]:
    """Every metric that both results (contents of metrics.json) can be compared in, by name; with `tags` also by tag.

    StageError naming the fields where they were measured differently, other than in `vary`.
    """
    require_comparable(a["protocol"], b["protocol"], vary)
    found = _paired(a["metrics"], b["metrics"], a.get("jackknife", {}), b.get("jackknife", {}))
    if tags:
        for tag in sorted(a["by_tag"].keys() & b["by_tag"].keys()):
            of_tag = _paired(a["by_tag"][tag], b["by_tag"][tag], a["tag_jackknife"][tag], b["tag_jackknife"][tag])
            found += [dataclasses.replace(d, tag=tag) for d in of_tag]
    return found


def _paired(a: dict[str, Any], b: dict[str, Any], left_a: dict[str, Any], left_b: dict[str, Any]) -> list[Difference]:
    from scipy.special import stdtr

    found = []
    for name in sorted(left_a.keys() & left_b.keys() & a.keys() & b.keys()):
        before, after = (dict(zip(s[name]["groups"], s[name]["left_out"], strict=True)) for s in (left_a, left_b))
        sizes = dict(zip(left_b[name]["groups"], left_b[name]["sizes"], strict=True))
        shared = sorted(before.keys() & after.keys())  # matched by name: one of them may have lost a group
        if len(shared) < 2:
            continue
        x, y = a[name]["value"], b[name]["value"]
        value, se = paired([before[g] for g in shared], [after[g] for g in shared], y - x, [sizes[g] for g in shared])
        half = quantile95(len(shared)) * se
        if se > 1e-12 * max(1.0, abs(x)):
            p = 2 * float(stdtr(len(shared) - 1, -abs(value) / se))
        else:
            p = 1.0 if abs(value) < 1e-9 else 0.0
        known = a[name]
        label, share = known.get("label", name), known.get("unit") == "share"
        low, high = value - half, value + half
        found.append(Difference(name, known["better"], x, y, value, se, low, high, p, len(shared), label, share=share))
    return found


def verdict(found: Sequence[Difference], before: str, after: str) -> tuple[str, str]:
    """(better, worse, mixed or same; one sentence) over the watched metrics, each held to 0.05 over their number."""
    watched = [d for d in found if is_watched(d.metric) and not d.tag]
    sure = [d for d in watched if d.p * len(watched) < 0.05]
    better = [d.label or d.metric for d in sure if d.verdict == "better"]
    worse = [d.label or d.metric for d in sure if d.verdict == "worse"]
    if not watched:
        return "same", f"{after} and {before} share no metric that a verdict could rest on."
    if better and worse:
        return "mixed", f"{after} is better than {before} in {_and(better)}, and worse in {_and(worse)}."
    if better or worse:
        way = "better" if better else "worse"
        rest = len(watched) - len(better or worse)
        others = f"; in {rest} other{'s' if rest > 1 else ''} no difference is shown" if rest else ""
        return way, f"{after} is {way} than {before} in {_and(better or worse)}{others}."
    return (
        "same",
        f"No difference between {after} and {before} is shown in {_and([d.label or d.metric for d in watched])}.",
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- alarms ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A checkpoint is worse than one before it, by more than chance and than is worth an alarm."""

    checkpoint: str
    best: str
    metric: str
    value: float
    before: float
    p: float
    words: str

    def __str__(self) -> str:
        return self.words


def alarms(
    results: Sequence[dict[str, Any]],
    checkpoint: str,
    rate: float = 0.02,
    min_change: float = 0.02,
    bad_images: float = 0.01,
) -> list[Alarm]:
    """Where the named checkpoint is worse than a comparable one before it.

    results: contents of metrics.json of one run; only complete ones of the checkpoint's own protocol and weights
    count. The p of each comparison is held to rate / HORIZON over the number of comparisons (candidates times metrics
    and kinds of bad images, Bonferroni), so that over HORIZON equally good checkpoints a false alarm has a chance of at
    most `rate`, although each is held against the best of many; a change below `min_change` of the earlier value is not
    worth one. One that raised an alarm itself is nobody's best. Failed, blank and repeated images alarm as well, also
    where there is no earlier result: a collapsed model can have a fine CLIP score.
    """
    found: list[Alarm] = []
    for mine in [r for r in results if r["checkpoint"] == checkpoint and alike(r, r)]:
        sound: list[dict[str, Any]] = []
        for result in sorted((r for r in results if alike(r, mine)), key=seen):
            if seen(result) < seen(mine) and not _against(result, sound, rate, min_change, bad_images):
                sound.append(result)
        found += _against(mine, sound, rate, min_change, bad_images)
    return found


def _against(
    result: dict[str, Any], sound: Sequence[dict[str, Any]], rate: float, min_change: float, bad_images: float
) -> list[Alarm]:
    """Alarms of a result beside those of fewer images seen among `sound`."""
    rivals = [r for r in sound if seen(r) < seen(result)]
    compared = [(r, [d for d in differences(r, result) if is_watched(d.metric)]) for r in rivals]
    comparisons = sum(len(d) for _, d in compared) + len(BAD) * max(1, len(rivals))
    found = _bad_images(result, rivals, rate / (comparisons * HORIZON), bad_images)
    worst: dict[str, tuple[float, dict[str, Any], Difference]] = {}
    for rival, apart in compared:
        for d in apart:
            p = d.p_worse() * comparisons * HORIZON
            alarming = p < rate and d.worse_by() > 0 and abs(d.value) > min_change * abs(d.a)
            if alarming and (d.metric not in worst or p < worst[d.metric][0]):
                worst[d.metric] = (p, rival, d)
    for name, (p, rival, d) in sorted(worst.items()):
        words = (
            f"{result['checkpoint']} is worse than {rival['checkpoint']} in {name}: {d.b:.4g} against {d.a:.4g}, a "
            f"difference of {d.worse_by():.1f} standard errors ({d.value:+.3g}, 95 % interval {d.low:+.3g} to "
            f"{d.high:+.3g})"
        )
        found.append(Alarm(result["checkpoint"], rival["checkpoint"], name, d.b, d.a, p, words))
    return found


def _bad_images(result: dict[str, Any], rivals: Sequence[dict[str, Any]], p_most: float, limit: float) -> list[Alarm]:
    from scipy.stats import binomtest, fisher_exact

    def shares(r: dict[str, Any]) -> dict[str, tuple[int, int]]:
        total = r["counts"]["images"] + r["counts"]["failed"]
        return {name: (int(r["counts"].get(name, 0)), total) for name in BAD}

    found = []
    for name, (bad, total) in shares(result).items():
        best = min(rivals, key=lambda r: shares(r)[name][0] / max(1, shares(r)[name][1]), default=None)
        bad_before, before = (0, 0) if best is None else shares(best)[name]
        change = bad / max(1, total) - bad_before / max(1, before)
        if change <= limit:
            continue
        if best is None:  # held to the limit itself
            p = float(binomtest(bad, total, limit, "greater").pvalue)
        else:
            p = float(fisher_exact([[bad, total - bad], [bad_before, before - bad_before]])[1])
        if p >= p_most:
            continue
        than = "" if best is None else f", against {bad_before:,} of {before:,} of {best['checkpoint']}"
        words = f"{result['checkpoint']} has {bad:,} {name} images of {total:,}{than}"
        name_before = "" if best is None else best["checkpoint"]
        found.append(Alarm(result["checkpoint"], name_before, name, bad, bad_before, p, words))
    return found


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results are of one protocol and one kind of weights, and the first one whole."""
    same = a["protocol"]["id"] == b["protocol"]["id"] and a["model"]["weights"] == b["model"]["weights"]
    return bool(same and not a["missing"]["images"])


def seen(result: dict[str, Any]) -> int:
    """Images that the model was trained on."""
    return int(result["images_seen"] or 0)
