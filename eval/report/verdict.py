"""What a page says first: is this checkpoint better, the same or worse than the one before it, and than the best?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from eval import compare
from eval.config import WatchConfig

ARROWS = {"better": "\N{UPWARDS ARROW}", "worse": "\N{DOWNWARDS ARROW}", "same": "\N{RIGHTWARDS ARROW}"}


@dataclasses.dataclass(frozen=True)
class Against:
    """The verdict beside one other result. way: better, worse, mixed or same; words: a sentence."""

    role: str
    other: dict[str, Any]
    way: str
    words: str
    differences: list[compare.Difference]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Beside the checkpoint before and the best before, where there are any, and what is alarming."""

    against: list[Against]
    alarms: list[str]

    @property
    def before(self) -> Against | None:
        """The one beside the checkpoint before."""
        return next((a for a in self.against if a.role == "before"), None)


def of(result: dict[str, Any], every: Sequence[dict[str, Any]], watch: WatchConfig | None = None) -> Verdict:
    """The verdict on a result among all of its run; those of its own protocol and weights count."""
    watch = watch or WatchConfig()
    like = [r for r in every if compare.alike(r, result)]
    earlier = sorted((r for r in like if compare.seen(r) < compare.seen(result)), key=compare.seen)
    found = []
    if earlier:
        before = earlier[-1]
        found.append(_against("before", before, result))
        best = best_of(earlier)
        if best is not None and best["checkpoint"] != before["checkpoint"]:
            found.append(_against("best", best, result))
    limits = (watch.alarm_rate, watch.alarm_min_change, watch.alarm_bad_images)
    return Verdict(found, [str(a) for a in compare.alarms([*earlier, result], result["checkpoint"], *limits)])


def best_of(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best result by the first watched metric that all have; None for none."""
    name = next((n for n in compare.WATCHED if results and all(n in r["metrics"] for r in results)), None)
    if name is None:
        return None
    sign = -1 if results[0]["metrics"][name]["better"] == "higher" else 1
    return min(results, key=lambda r: sign * r["metrics"][name]["value"])


def _against(role: str, other: dict[str, Any], result: dict[str, Any]) -> Against:
    found = compare.differences(other, result, tags=True)
    way, words = compare.verdict(found, other["checkpoint"], result["checkpoint"])
    return Against(role, other, way, words, [d for d in found if d.better])


def arrow(difference: compare.Difference) -> tuple[str, str]:
    """(arrow, class): up for better, down for worse, level where no difference is shown."""
    way = difference.verdict if difference.verdict in ("better", "worse") else "same"
    return ARROWS[way], way
