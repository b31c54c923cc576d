"""`carrara grid`: every cell of a checkpoint's grid, on Ray or in this process; what is beaten early is given up."""

from __future__ import annotations

import contextlib
import logging

from eval import grid, report
from eval.features import FeaturesStage
from eval.stage import GenerateStage, conclude
from orchestration import engine, stages
from orchestration.config import RunConfig
from shards.layout import RunPaths

log = logging.getLogger("carrara.grid")


def run(config: RunConfig, local: bool = False, redo: bool = False) -> str:
    """Draw and measure the cells that eval.grid names; returns the report's path.

    First the first part of each cell is drawn and judged in pairs, then the rest of those that were not beaten.
    """
    stages.check_inputs("eval", config)
    paths, vae, text = RunPaths(config.run), stages.vae_ref(config), stages.text_ref(config)
    cells = [GenerateStage(c, paths, vae, text, config.seed) for c in grid.cells(config.eval)]
    log.info("grid: %d cells of %s: %s", len(cells), cells[0].subject.name, ", ".join(c.config.cell for c in cells))
    with contextlib.ExitStack() as stack:
        if not local:
            from orchestration.connection import connected

            stack.enter_context(connected(config.ray))

        def drive(stage: GenerateStage | grid.FirstPart | FeaturesStage) -> None:
            engine.run(stage, paths.status, config.ray, config.ray.eval, local, redo)

        reference = cells[0].reference()
        if reference is not None:
            engine.run(reference, paths.status, config.ray, config.ray.eval, local, redo)
        given_up, first = _first_parts(config, cells, drive)
        gone = {g.cell for g in given_up}
        page = ""
        for cell in cells:
            if cell.config.cell in gone:
                continue
            drive(cell)
            for features in cell.features().values():
                drive(features)
            page = conclude(cell.config, paths, vae, text, config.seed)
    outcome = grid.record(paths, cells, given_up, first)
    for point in outcome["points"]:
        mark = " (knee)" if point["knee"] else " (frontier)" if point["frontier"] else ""
        log.info(
            "grid: %s: %s %.4g, clip_score %.4g, %.3g s a picture%s",
            point["cell"], outcome["distance"], point["distance"][0], point["score"][0], point["seconds"], mark,
        )  # fmt: skip
    return report.render(paths, cells[0].subject.name) if page else page


def _first_parts(config: RunConfig, cells: list[GenerateStage], drive) -> tuple[list[grid.GivenUp], dict[str, int]]:  # type: ignore[no-untyped-def]
    """What is given up after the first part of every cell, and how many pictures each had by then."""
    sizes = [len(task.payload) for task in cells[0].tasks()]
    shards = grid.first_shards(config.eval, len(sizes))
    first = {cell.config.cell: sum(sizes[:shards]) for cell in cells}
    if shards == len(sizes) or len(cells) == 1:
        return [], first
    parts = [grid.FirstPart(cell, shards) for cell in cells]
    for part in parts:
        if not part.complete:
            drive(part)
    given_up = grid.dominated([(part.stage.config, part.measure()) for part in parts])
    for g in given_up:
        log.info("grid: %s is given up after %d pictures; %s beats it: %s", g.cell, first[g.cell], g.by, g.words)
    return given_up, first
