"""Scores and captions on a real Ray: a worker is killed, then the driver; the same bytes as in one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from shards.layout import RunPaths
from tests.curate.test_captions import completion, endpoint, picture_of, serve  # noqa: F401
from tests.latents.world import image_dataset, save_clip
from tests.orchestration.head import actors, ended, folder_bytes, run_here, run_stage, wait_for

SHARDS = 8
SCORES = ("alike", "clip", "pixels", "text")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image shards and a CLIP."""
    folder = tmp_path_factory.mktemp("world")
    image_dataset(RunPaths(str(folder / "run")), shards=SHARDS, rows=40, corrupt={2: (3,)})
    save_clip(folder / "clip")
    return folder


def prepare(world: Path, run: Path, server: Any) -> Path:
    """A run with the world's image shards in it, and its configuration."""
    run.mkdir()
    (run / "images").symlink_to(world / "run" / "images")
    scores = {
        "clip": {"kind": "clip", "device": "cpu", "batch_size": 8},
        "pixels": {"kind": "pixels"},
        "text": {"kind": "caption"},
        "alike": {"kind": "duplicates", "clusters": 3, "memory_gb": 2e-5},
    }
    config = {
        "run": str(run),
        "ray": {"score": {"workers": 2}, "caption": {"workers": 2}, "back_off_s": 0.05},
        "ingest": {"table": str(world)},
        "clip": {"pretrained": str(world / "clip")},
        "curate": {"scores": scores, "captions": {"seen": {**endpoint(server), "prompts": ["What is it?"]}}},
    }
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def committed(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*_stats.json")}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["score", pytest.param("caption", marks=pytest.mark.nightly)])
def test_a_killed_worker_and_a_killed_driver_cost_time_and_nothing_else(
    stage: str,
    world: Path,
    tmp_path: Path,
    serve: Any,  # noqa: F811
) -> None:
    def answer(number: int, body: Any) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(0.02)
        return 200, completion(f"seen as {np.asarray(picture_of(body)).std():.6f}"), {}

    server = serve(answer)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    names = [f"scores/{n}" for n in SCORES] if stage == "score" else ["captions/seen"]
    run_here(stage, prepare(world, whole, server))
    expected = {n: folder_bytes(whole / n) for n in names}
    assert all(len(files) == 2 * SHARDS + 1 for files in expected.values())

    config = prepare(world, torn, server)
    first = torn / ("scores/clip" if stage == "score" else names[0])
    before = actors("ShardWorker")
    process = run_stage(stage, config)
    wait_for(lambda: len(committed(first)) >= 1, process)
    if workers := actors("ShardWorker") - before:
        os.kill(min(workers), signal.SIGKILL)
    wait_for(lambda: len(committed(first)) >= 3, process)
    process.kill()
    process.communicate()
    done = committed(first)

    ended(run_stage(stage, config))
    assert {n: folder_bytes(torn / n) for n in names} == expected
    assert {n: t for n, t in committed(first).items() if n in done} == done, "nothing was made twice"
