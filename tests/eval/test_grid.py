"""The grid: cells once each, the frontier and its knee, what is given up and why; killed midway, it ends the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval import grid
from eval.config import EvalConfig, GridConfig
from eval.evaluation import Evaluation
from eval.metrics.estimate import Estimate
from eval.stage import GenerateStage
from orchestration import grid as driver
from orchestration.config import RunConfig
from shards.layout import RunPaths
from shards.settings import ConfigError, validate
from shards.stage import open_folder
from tests.eval.conftest import drive, refs
from tests.eval.test_compare import result, score


def test_cells_are_every_combination_cheapest_first(config: EvalConfig) -> None:
    g = GridConfig(samplers=["ddim", "heun"], steps=[10, 5], guidance_scales=[1, 3], weights=["ema", "raw"])
    found = grid.cells(config.model_copy(update={"grid": g}))
    assert len(found) == len({c.cell for c in found}) == 16
    assert [grid.cost(c) for c in found] == sorted(grid.cost(c) for c in found)
    assert found[0].cell == "ddim-5-1"
    assert {"ddim-5-1-raw", "heun-10-3"} <= {c.cell for c in found}
    assert grid.cost(next(c for c in found if c.cell == "heun-10-3")) == 38
    with pytest.raises(ConfigError, match=r"eval\.grid is not set"):
        grid.cells(config)
    for bad, says in (({"steps": [5, 5]}, "twice"), ({"samplers": ["plms"]}, "samplers"), ({"steps": []}, "steps")):
        with pytest.raises(ConfigError, match=says):
            validate(EvalConfig, {"grid": bad}, "run.yaml")


def cell(config: EvalConfig, steps: int, distance: float, points: float) -> tuple[EvalConfig, dict[str, Any]]:
    rng = np.random.default_rng(steps)
    luck = np.random.default_rng(99).standard_normal(200)
    own = config.model_copy(update={"steps": steps})
    found = {
        "fd_clip_unit": score(distance + 0.01 * (luck + 0.1 * rng.standard_normal(200))),
        "clip_score": score(points + luck + 0.1 * rng.standard_normal(200)),
    }
    return own, {**result("c", 1, found, steps=steps), "cell": own.cell}


def test_only_what_is_beaten_in_everything_is_given_up(config: EvalConfig) -> None:
    parts = [
        cell(config, 5, 0.30, 20.0),  # cheap and bad: nothing cheaper beats it
        cell(config, 10, 0.20, 25.0),
        cell(config, 20, 0.25, 24.0),  # worse than 10 steps in both, and dearer
        cell(config, 40, 0.25, 27.0),  # worse in distance, better in score
        cell(config, 80, 0.2001, 24.99),  # beaten, but by less than the errors say
    ]
    [gone] = grid.dominated(parts)
    assert (gone.cell, gone.by) == (parts[2][0].cell, parts[1][0].cell)
    assert "40 evaluations of the denoiser against 20" in gone.words


def placed(*values: tuple[float, float, int]) -> list[grid.Point]:
    base = EvalConfig()
    found = []
    for distance, points, steps in values:
        e = {"fid_tf": Estimate(9, distance), "clip_score": Estimate(9, points)}
        found.append((base.model_copy(update={"steps": steps}), result("c", 1, e), 0.1 * steps))
    name, made = grid.points(found)
    assert name == "fid_tf"
    return made


def test_the_frontier_and_its_knee() -> None:
    made = placed((10, 20, 10), (11, 28, 20), (16, 30, 30), (30, 31, 40), (12, 27, 50), (31, 30.5, 60))
    assert [p.frontier for p in made] == [True, True, True, True, False, False]
    assert [p.knee for p in made] == [False, True, False, False, False, False]
    assert not any(p.knee for p in placed((10, 20, 10), (11, 28, 20)))  # two points have no bend
    assert not any(p.knee for p in placed((10, 20, 10), (20, 25, 20), (30, 30, 30)))  # nor has a line


def digests(root: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(Path(root).rglob("*"))
        if p.suffix in (".tar", ".parquet", ".safetensors") or p.name == "metrics.json"
    }


def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    workplace: tuple[Path, RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own = workplace
    config = validate(RunConfig, yaml.safe_load((folder / "run.yaml").read_text()), "run.yaml")
    kept: dict[str, Any] = {}  # loading the networks is most of the time, and not what is tested

    def worker(stage: GenerateStage) -> Any:
        if stage.config.cell not in kept:
            kept[stage.config.cell] = build(stage)
        found = kept[stage.config.cell]
        found.folder = open_folder(stage)  # of the cell as it is now, which was made anew
        for features in found.features:
            features.folder = open_folder(features.stage)
        return found

    build = GenerateStage.worker
    monkeypatch.setattr(GenerateStage, "worker", worker)
    driver.run(config, local=True)
    expected = digests(own.eval)
    record = json.loads((Path(own.eval) / "step-00000004" / "grid.json").read_text())
    cells = {p["cell"] for p in record["points"]} | {g["cell"] for g in record["given_up"]}
    assert cells == {"ddim-1-2", "ddim-3-2"}
    before = {p: p.stat().st_mtime_ns for p in Path(own.eval).rglob("*.tar")}
    driver.run(config, local=True)
    assert {p: p.stat().st_mtime_ns for p in Path(own.eval).rglob("*.tar")} == before  # cells are kept
    for at in (8, 12):  # among the first parts' shards, and among the rest
        shutil.rmtree(own.eval)
        child = os.fork()
        if child == 0:
            try:
                driver.run(config, local=True)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 120
        while len(list(Path(own.eval).rglob("*_stats.json"))) < at:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert 0 < len(digests(own.eval)) < len(expected)
        driver.run(config, local=True)
        found = digests(own.eval)
        assert found.keys() == expected.keys()
        for name, data in expected.items():
            assert found[name] == data, name


def test_a_first_part_is_measured_alone(workplace: tuple[Path, RunPaths]) -> None:
    folder, own = workplace
    config = validate(RunConfig, yaml.safe_load((folder / "run.yaml").read_text()), "run.yaml")
    evaluation = Evaluation(grid.cells(config.eval)[0], own, *refs(own))
    for real in evaluation.real():
        drive(real)
    assert grid.first_shards(config.eval, 3) == 1
    part = grid.FirstPart(evaluation, 1)
    assert not part.complete
    part.begin()
    work = part.worker()
    for task in evaluation.generate.tasks():
        if task.index < 2:  # one shard more than the part lies there; it does not count
            work(task)
    assert part.complete
    found = part.measure()["metrics"]
    assert found["clip_score"]["n"] == 4
    assert "fd_clip_unit" in found  # in the distance, too, that cells are given up by
