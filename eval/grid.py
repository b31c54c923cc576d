"""Samplers x steps x guidance x EMA of one checkpoint: which cells to draw, which to give up, what the trade-off is.

    eval.grid: {samplers: [ddim, dpm-solver++], steps: [10, 20, 50], guidance_scales: [1, 3, 7.5], weights: [ema]}

Every cell draws the same prompts from the same noise, so that cells are compared in pairs. A cell's images lie in its
own folder and are never drawn twice. After a first part of its prompts a cell that another one beats in distance, in
CLIP score and in cost, each by more than the errors say, is given up: what is given up, and why, follows from that
first part alone, so a grid that was killed comes to the same decisions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from eval import compare, measure
from eval.config import EvalConfig
from eval.evaluation import METRICS, Evaluation
from eval.generate import evaluations
from eval.metrics.definitions import DISTANCES
from eval.metrics.estimate import undominated
from eval.rows import dataset_of
from eval.shardwork import committed_stats
from eval.stage import GenerateStage
from shards import storage
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths
from shards.settings import ConfigError
from shards.stage import Task, Worker, committed, is_begun

VARY = ("sampler", "steps", "guidance_scale", "guidance_interval", "timestep_spacing")
GIVE_UP_SIGMAS = 3.0


def cells(config: EvalConfig) -> list[EvalConfig]:
    """The cells' own configurations, cheapest first; ConfigError where the grid names none or the same one twice."""
    g = config.grid
    if g is None:
        raise ConfigError("eval.grid is not set; give it samplers, steps and guidance_scales")
    found = [
        config.model_copy(update={"sampler": s, "steps": n, "guidance_scale": w, "weights": weights})
        for s, n, w, weights in itertools.product(g.samplers, g.steps, g.guidance_scales, g.weights)
    ]
    return sorted(found, key=lambda c: (cost(c), c.cell))


def cost(config: EvalConfig) -> int:
    """Evaluations of the denoiser that one image takes."""
    return evaluations(config.sampler, config.steps, config.guidance_scale)


class FirstPart:
    """The first `shards` shards of a cell as a stage of its own, which leaves no manifest: the cell is not finished."""

    unit = "images"
    max_in_flight = GenerateStage.max_in_flight

    def __init__(self, evaluation: Evaluation, shards: int) -> None:
        self.evaluation, self.stage, self.shards = evaluation, evaluation.generate, shards
        self.name, self.root, self.data = self.stage.name, self.stage.root, self.stage.data

    def made_with(self) -> Fingerprint:
        """The cell's own."""
        return self.stage.made_with()

    def begin(self, redo: bool = False, each: Any = map) -> None:
        """As the cell's own."""
        self.stage.begin(redo, each)

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
        """The result of these shards alone, in every distance that the cells are reported in."""
        stats = [s for s in committed_stats(self, self.tasks()) if s is not None]
        return {"protocol": self.evaluation.protocol, **measure.measure(self.evaluation, dataset_of(self.root, stats))}


def first_shards(config: EvalConfig, total: int) -> int:
    """How many of a cell's `total` shards are drawn before it may be given up: the grid's share, rounded up."""
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
            if other.cell == config.cell or cost(other) > cost(config):
                continue
            apart = {d.metric: d for d in compare.differences(rival, result, VARY)}
            distance = next((apart[n] for n in DISTANCES if n in apart), None)
            score = apart.get("clip_score")
            if distance is None or score is None:
                continue
            if min(distance.worse_by(), score.worse_by()) > GIVE_UP_SIGMAS:
                words = (
                    f"{distance.metric} {distance.b:.4g} against {distance.a:.4g} ({distance.worse_by():.0f} standard "
                    f"errors), clip_score {score.b:.4g} against {score.a:.4g} ({score.worse_by():.0f}), "
                    f"{cost(config)} evaluations of the denoiser against {cost(other)}"
                )
                found.append(GivenUp(config.cell, other.cell, words))
                break
    return found


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished cell: distance (lower is better) and CLIP score (higher), each (value, low, high); seconds are an
    image's."""

    cell: str
    distance: tuple[float, float, float]
    score: tuple[float, float, float]
    seconds: float
    evaluations: int
    frontier: bool = False
    knee: bool = False


def points(found: Sequence[tuple[EvalConfig, dict[str, Any], float]]) -> tuple[str, list[Point]]:
    """The distance's name, and a point a cell with its place marked; cells without both metrics are left out.

    found: (configuration, content of metrics.json, measured seconds an image). A cell is on the frontier where no
    other is at least as good in distance, score and evaluations, and better in one. The knee is the cell farthest from
    the straight line between the frontier's ends in distance and score, each scaled to 0..1 (Das 1999).
    """
    name = next((n for n in DISTANCES if all(n in r["metrics"] for _, r, _ in found)), "")
    if not name:
        return "", []
    made = [
        Point(c.cell, _triple(r["metrics"][name]), _triple(r["metrics"]["clip_score"]), seconds, cost(c))
        for c, r, seconds in found
        if "clip_score" in r["metrics"]
    ]
    best = undominated(made, lambda p: (p.distance[0], -p.score[0], p.evaluations))
    marked = knee(best)
    return name, [
        dataclasses.replace(p, frontier=p in best, knee=marked is not None and p.cell == marked.cell) for p in made
    ]


def knee(frontier: Sequence[Point]) -> Point | None:
    """The bend of the trade-off of distance and score; None with fewer than three points on it."""
    flat = undominated(frontier, lambda p: (p.distance[0], -p.score[0]))
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
    value = metric["value"]
    return value, metric.get("low", value), metric.get("high", value)


def seconds_an_image(stage: GenerateStage) -> float:
    """Measured: the shards' seconds over their images."""
    done, _ = stage.committed()
    return sum(s["seconds"] for s in done) / max(1, sum(s["rows"] for s in done))


def record_file(run: RunPaths, model: str) -> str:
    """Where a grid's outcome lies: cells, given-up ones with their reason, the frontier."""
    return storage.join(run.eval, model, "grid.json")


def record(
    run: RunPaths, done: Sequence[Evaluation], given_up: Sequence[GivenUp], first: dict[str, int]
) -> dict[str, Any]:
    """Write grid.json of the finished cells and of those given up; returns it."""
    gone = {g.cell for g in given_up}
    found, ids = [], {}
    for evaluation in done:
        metrics = measure.read(storage.join(evaluation.folder, METRICS))
        if evaluation.config.cell not in gone and metrics is not None:
            found.append((evaluation.config, metrics, seconds_an_image(evaluation.generate)))
            ids[evaluation.config.cell] = evaluation.folder.rsplit("/", 1)[-1]
    name, plotted = points(found)
    outcome = {
        "distance": name,
        "points": [{**dataclasses.asdict(p), "folder": ids[p.cell]} for p in plotted],
        "given_up": [{**dataclasses.asdict(g), "images": first[g.cell]} for g in given_up],
    }
    storage.write_json(record_file(run, done[0].model.name), outcome)
    return outcome
