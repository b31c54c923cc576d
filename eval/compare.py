"""Is one result better than another? Paired differences of results under one protocol, and the alarm built on them.

Two checkpoints are drawn with the same prompts and the same noise, and most of the luck is shared. So the difference
is jackknifed by group, rather than the two values apart: its error is far smaller than the two errors together.
metrics.json holds what is needed, the values without each group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

from eval.estimate import jackknife
from eval.protocol import Protocol, require_comparable

# What an alarm looks at, where measured: how far from the real pictures, and whether pictures fit their prompts.
WATCHED = ("fid_clean", "fid_tf", "fd_dinov2_pil", "fd_clip_unit", "clip_score")


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


def differences(a: dict[str, Any], b: dict[str, Any], vary: Collection[str] = ()) -> list[Difference]:
    """Every metric that both results (contents of metrics.json) can be compared in, by name.

    StageError naming the fields where they were measured differently, other than in `vary`.
    """
    from scipy.stats import t as student

    require_comparable(Protocol.from_json(a["protocol"]), Protocol.from_json(b["protocol"]), vary)
    found = []
    for name in sorted(a.get("jackknife", {}).keys() & b.get("jackknife", {}).keys()):
        before, after = a["jackknife"][name], b["jackknife"][name]
        if len(before["left_out"]) != len(after["left_out"]):
            continue  # other groups, or one of them lost all its pictures
        better = a["metrics"][name]["better"]
        value = b["metrics"][name]["value"] - a["metrics"][name]["value"]
        left = [y - x for x, y in zip(before["left_out"], after["left_out"], strict=True)]
        e = jackknife(value, left, after["sizes"])
        assert e.se is not None
        assert e.bias_corrected is not None
        freedom = len(left) - 1
        half = float(student.ppf(0.975, freedom)) * e.se
        corrected = e.bias_corrected
        if e.se > 1e-12 * max(1.0, abs(a["metrics"][name]["value"])):
            p = 2 * float(student.sf(abs(corrected) / e.se, freedom))
        else:
            p = 1.0 if abs(corrected) < 1e-9 else 0.0
        x, y = _value(a, name), _value(b, name)
        found.append(Difference(name, better, x, y, corrected, e.se, corrected - half, corrected + half, p))
    return found


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A checkpoint is worse than the best one before it. sigmas: by how many standard errors of the difference."""

    checkpoint: str
    best: str
    difference: Difference
    sigmas: float

    def __str__(self) -> str:
        d = self.difference
        return (
            f"{self.checkpoint} is worse than {self.best} in {d.metric}: {d.b:.4g} against {d.a:.4g}, "
            f"a difference of {self.sigmas:.1f} standard errors ({d.value:+.3g}, 95 % interval {d.low:+.3g} to "
            f"{d.high:+.3g}, p {d.p:.2g})"
        )


def alarms(results: Sequence[dict[str, Any]], checkpoint: str, sigmas: float) -> list[Alarm]:
    """Where the named checkpoint is worse than the best comparable one before it by more than `sigmas` errors.

    results: contents of metrics.json of one run; only complete ones of the checkpoint's own cell and protocol count.
    One that raised an alarm itself is nobody's best: a collapsed model can have a fine CLIP score.
    """
    found: list[Alarm] = []
    for mine in [r for r in results if r["checkpoint"] == checkpoint and _whole(r)]:
        like = [r for r in results if _whole(r) and _kind(r) == _kind(mine)]
        sound: list[dict[str, Any]] = []
        for result in sorted(like, key=_seen):
            if _seen(result) < _seen(mine) and not _against(result, sound, sigmas):
                sound.append(result)
        found += _against(mine, sound, sigmas)
    return found


def _against(result: dict[str, Any], sound: Sequence[dict[str, Any]], sigmas: float) -> list[Alarm]:
    """Alarms of a result beside those of fewer images among `sound`."""
    found = []
    for name in WATCHED:
        rivals = [r for r in sound if _seen(r) < _seen(result) and name in r.get("jackknife", {})]
        if not rivals or name not in result.get("jackknife", {}):
            continue
        best = (max if result["metrics"][name]["better"] == "higher" else min)(rivals, key=lambda r: _value(r, name))
        for d in differences(best, result):
            if d.metric == name and d.worse_by() > sigmas and d.verdict == "worse":
                found.append(Alarm(result["checkpoint"], best["checkpoint"], d, d.worse_by()))
    return found


def _kind(result: dict[str, Any]) -> tuple[str, str]:
    return result["cell"], result["protocol"]["id"]


def _seen(result: dict[str, Any]) -> int:
    return int(result["images_seen"] or 0)


def _value(result: dict[str, Any], name: str) -> float:
    metric = result["metrics"][name]
    return float(metric.get("bias_corrected", metric["value"]))


def _whole(result: dict[str, Any]) -> bool:
    return not result["missing"]["pictures"]
