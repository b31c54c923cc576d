"""Samplers x steps x guidance x EMA of one checkpoint: which cells to draw, which to give up, what the trade-off is.

    eval.grid: {samplers: [ddim, dpm-solver++], steps: [10, 20, 50], guidance_scales: [1, 3, 7.5], weights: [ema]}

Every cell draws the same prompts from the same noise, so that cells are compared in pairs. A cell's pictures lie in its
own folder and are never drawn twice. After a first part of its prompts a cell that another one beats in distance, in
CLIP score and in cost, each by more than the errors say, is given up: what is given up, and why, follows from that
first part alone, so a grid that was killed comes to the same decisions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from eval import compare, results
from eval.config import EvalConfig
from eval.stage import GenerateStage
from shards import storage
from shards.dataset import Dataset, read_stats
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths
from shards.settings import ConfigError
from shards.stage import Task, Worker, committed, is_begun

VARY = ("sampler", "steps", "guidance_scale")
SECOND_ORDER = {"heun": 2}  # evaluations of the network a step; one for all others
GIVE_UP_SIGMAS = 3.0
DISTANCES = ("fid_clean", "fid_tf", "fd_dinov2_pil", "fd_clip_unit")  # the first that was measured


def cells(config: EvalConfig) -> list[EvalConfig]:
    """The cells' own configurations, cheapest first; ConfigError where the grid names none or the same one twice."""
    g = config.grid
    if g is None:
        raise ConfigError("eval.grid is not set; give it samplers, steps and guidance_scales")
    found = [
        config.model_copy(update={"sampler": s, "steps": n, "guidance_scale": w, "weights": weights})
        for s, n, w, weights in itertools.product(g.samplers, g.steps, g.guidance_scales, g.weights)
    ]
    return sorted(found, key=lambda c: (evaluations(c), c.cell))


def evaluations(config: EvalConfig) -> int:
    """Evaluations of the UNet that one picture takes: the cost that does not depend on the machine."""
    guided = 2 if config.guidance_scale > 1 else 1
    order = SECOND_ORDER.get(config.sampler, 1)
    return (order * config.steps - (order - 1)) * guided  # Heun's last step has one


class FirstPart:
    """The first `shards` shards of a cell as a stage of its own, which leaves no manifest: the cell is not finished."""

    unit = "images"

    def __init__(self, stage: GenerateStage, shards: int) -> None:
        self.stage, self.shards = stage, shards
        self.name, self.root, self.data = stage.name, stage.root, stage.data

    def made_with(self) -> Fingerprint:
        """The cell's own."""
        return self.stage.made_with()

    def tasks(self) -> Iterator[Task]:
        """The first tasks of the cell."""
        return itertools.islice(self.stage.tasks(), self.shards)

    def worker(self) -> Worker:
        """The cell's own."""
        return self.stage.worker()

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Nothing to write."""
        return {"shards": len(list(stats))}

    @property
    def complete(self) -> bool:
        """Whether these shards are all committed."""
        return is_begun(self) and all(committed(self, self.tasks()))

    def measure(self) -> dict[str, Any]:
        """The result of these shards alone, in the form of metrics.json."""
        stats = [s for t in self.tasks() if (s := read_stats(self.root, t.index)) is not None]
        reference = self.stage.reference()
        real = None if reference is None else Dataset.open(reference.root)
        return {
            "checkpoint": self.stage.subject.name,
            "cell": self.stage.config.cell,
            "protocol": self.stage.protocol().to_json(),
            "missing": {"shards": [], "pictures": 0},
            **results.measure(self.stage.config, results.dataset_of(self.root, stats), real),
        }


def first_shards(config: EvalConfig, total: int) -> int:
    """How many of a cell's `total` shards are drawn before it is judged: the share that the grid names, rounded up."""
    assert config.grid is not None
    return min(total, max(1, -(-total * config.grid.first_percent // 100)))


@dataclasses.dataclass(frozen=True)
class GivenUp:
    """A cell that is not drawn to its end. by: the cell that beats it; words: in what, for people."""

    cell: str
    by: str
    words: str


def dominated(parts: Sequence[tuple[EvalConfig, dict[str, Any]]]) -> list[GivenUp]:
    """The cells that another one beats, at no greater cost, in the distance and in the CLIP score, both by more than
    GIVE_UP_SIGMAS errors of the paired difference.

    parts: (configuration, result of the first part) of each cell.
    """
    found = []
    for config, result in parts:
        for other, rival in parts:
            if other.cell == config.cell or evaluations(other) > evaluations(config):
                continue
            apart = {d.metric: d for d in compare.differences(rival, result, (*VARY, "weights"))}
            distance = next((apart[n] for n in DISTANCES if n in apart), None)
            score = apart.get("clip_score")
            if distance is None or score is None:
                continue
            if min(distance.worse_by(), score.worse_by()) > GIVE_UP_SIGMAS:
                words = (
                    f"{distance.metric} {distance.b:.4g} against {distance.a:.4g} ({distance.worse_by():.0f} standard "
                    f"errors), clip_score {score.b:.4g} against {score.a:.4g} ({score.worse_by():.0f}), "
                    f"{evaluations(config)} evaluations of the network against {evaluations(other)}"
                )
                found.append(GivenUp(config.cell, other.cell, words))
                break
    return found


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished cell: distance (lower is better) and CLIP score (higher), each (value, low, high); seconds are a
    picture's."""

    cell: str
    distance: tuple[float, float, float]
    score: tuple[float, float, float]
    seconds: float
    evaluations: int
    frontier: bool = False
    knee: bool = False


def points(found: Sequence[tuple[EvalConfig, dict[str, Any], float]]) -> tuple[str, list[Point]]:
    """The distance's name, and a point a cell with its place marked; cells without both metrics are left out.

    found: (configuration, content of metrics.json, measured seconds a picture). A cell is on the frontier where no
    other is at least as good in distance, score and evaluations, and better in one. The knee is the cell farthest from
    the straight line between the frontier's ends in distance and score, each scaled to 0..1 (Das 1999).
    """
    name = next((n for n in DISTANCES if all(n in r["metrics"] for _, r, _ in found)), "")
    if not name:
        return "", []
    made = [
        Point(c.cell, _triple(r["metrics"][name]), _triple(r["metrics"]["clip_score"]), seconds, evaluations(c))
        for c, r, seconds in found
        if "clip_score" in r["metrics"]
    ]
    best = [p for p in made if not any(_beats(q, p) for q in made)]
    marked = knee(best)
    return name, [
        dataclasses.replace(p, frontier=p in best, knee=marked is not None and p.cell == marked.cell) for p in made
    ]


def knee(frontier: Sequence[Point]) -> Point | None:
    """The bend of the trade-off of distance and score; None with fewer than three points on it."""
    flat = [p for p in frontier if not any(_better_two(q, p) for q in frontier)]
    if len(flat) < 3:
        return None
    flat = sorted(flat, key=lambda p: (p.distance[0], -p.score[0]))
    wide = flat[-1].distance[0] - flat[0].distance[0]
    high = max(p.score[0] for p in flat) - min(p.score[0] for p in flat)
    if wide <= 0 or high <= 0:
        return None
    low = min(p.score[0] for p in flat)
    x = [(p.distance[0] - flat[0].distance[0]) / wide for p in flat]
    y = [(p.score[0] - low) / high for p in flat]
    above = [b - (y[0] + (y[-1] - y[0]) * a) for a, b in zip(x, y, strict=True)]
    top = max(range(len(flat)), key=lambda i: above[i])
    return flat[top] if above[top] > 0 else None


def _triple(metric: dict[str, Any]) -> tuple[float, float, float]:
    value = metric.get("bias_corrected", metric["value"])
    return value, metric.get("low", value), metric.get("high", value)


def _beats(q: Point, p: Point) -> bool:
    no_worse = q.distance[0] <= p.distance[0] and q.score[0] >= p.score[0] and q.evaluations <= p.evaluations
    better = q.distance[0] < p.distance[0] or q.score[0] > p.score[0] or q.evaluations < p.evaluations
    return no_worse and better


def _better_two(q: Point, p: Point) -> bool:
    no_worse = q.distance[0] <= p.distance[0] and q.score[0] >= p.score[0]
    return no_worse and (q.distance[0] < p.distance[0] or q.score[0] > p.score[0])


def seconds_a_picture(stage: GenerateStage) -> float:
    """Measured: the shards' seconds over their pictures; drawing, features and judging together."""
    stats = [s for t in stage.tasks() if (s := read_stats(stage.root, t.index)) is not None]
    return sum(s["seconds"] for s in stats) / max(1, sum(s["rows"] for s in stats))


def record_file(run: RunPaths, checkpoint: str) -> str:
    """Where a grid's outcome lies: cells, given-up ones with their reason, the frontier."""
    return storage.join(run.eval, checkpoint, "grid.json")


def read_record(run: RunPaths, checkpoint: str) -> dict[str, Any] | None:
    """What `record` wrote; None where there is none, or a torn one."""
    try:
        found = storage.read_json(record_file(run, checkpoint))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("points") else None


def record(
    run: RunPaths, stages: Sequence[GenerateStage], given_up: Sequence[GivenUp], first: dict[str, int]
) -> dict[str, Any]:
    """Write grid.json of the finished cells and of those given up; returns it."""
    gone = {g.cell for g in given_up}
    found = []
    for stage in stages:
        metrics = results.read(storage.join(stage.root, results.METRICS))
        if stage.config.cell not in gone and metrics is not None:
            found.append((stage.config, metrics, seconds_a_picture(stage)))
    name, placed = points(found)
    outcome = {
        "distance": name,
        "points": [dataclasses.asdict(p) for p in placed],
        "given_up": [{**dataclasses.asdict(g), "pictures": first[g.cell]} for g in given_up],
    }
    storage.write_json(record_file(run, stages[0].subject.name), outcome)
    return outcome
