"""`carrara grid`: every cell of a model's grid, on Ray or in this process; what is beaten early is given up."""

from __future__ import annotations

import logging
from typing import Any

from eval import grid
from eval.evaluation import Evaluation
from eval.report import page
from orchestration import engine, notify, parts
from orchestration.config import RunConfig
from orchestration.connection import connected
from shards.layout import RunPaths

log = logging.getLogger("carrara.grid")


def run(config: RunConfig, local: bool = False, redo: bool = False) -> str:
    """Draw and measure the cells that eval.grid names; returns the report's path.

    First the first part of each cell is drawn and judged in pairs, then the rest of those that were not beaten.
    """
    parts.check_inputs("eval", config)
    paths, vae, clip = RunPaths(config.run), parts.vae_ref(config), parts.text_ref(config)
    cells = [Evaluation(c, paths, vae, clip, config.seed) for c in grid.cells(config.eval)]
    log.info("grid: %d cells of %s: %s", len(cells), cells[0].model.name, ", ".join(c.config.cell for c in cells))
    with connected(config.ray, local):

        def drive(stage: Any) -> None:
            engine.run(stage, paths.status, config.ray, config.ray.eval, local, redo)

        for real in cells[0].real():
            drive(real)
        given_up, first = _first_parts(config, cells, drive)
        gone = {g.cell for g in given_up}
        kept = [cell for cell in cells if cell.config.cell not in gone]
        for cell in kept:
            for stage in cell.stages():
                drive(stage)
            cell.measure()
    outcome = grid.record(paths, kept, given_up, first)
    for point in outcome["points"]:
        mark = " (knee)" if point["knee"] else " (frontier)" if point["frontier"] else ""
        log.info(
            "grid: %s: %s %.4g, clip_score %.4g, %.3g s an image%s",
            point["cell"],
            outcome["distance"],
            point["distance"][0],
            point["score"][0],
            point["seconds"],
            mark,
        )
    report = page.render(paths, cells[0].model.name, watch=config.eval.watch)
    sentence = f"grid: the report of {cells[0].model.name} is there"
    notify.send(config.notify, "report", config.run, "grid", sentence, report=report)
    return report


def _first_parts(config: RunConfig, cells: list[Evaluation], drive: Any) -> tuple[list[grid.GivenUp], dict[str, int]]:
    """What is given up after the first part of every cell, and how many images each had by then."""
    sizes = [len(task.payload) for task in cells[0].generate.tasks()]
    shards = grid.first_shards(config.eval, len(sizes))
    first = {cell.config.cell: sum(sizes[:shards]) for cell in cells}
    if shards == len(sizes) or len(cells) == 1:
        return [], first
    parts = [grid.FirstPart(cell, shards) for cell in cells]
    for part in parts:
        if not part.complete:
            drive(part)
    given_up = grid.dominated([(part.evaluation.config, part.measure()) for part in parts])
    for g in given_up:
        log.info("grid: %s is given up after %d images; %s beats it: %s", g.cell, first[g.cell], g.by, g.words)
    return given_up, first
