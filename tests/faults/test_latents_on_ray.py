"""The latents stage on a real Ray, killed: its worker, then its driver; the same command ends with the same bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from shards.layout import RunPaths
from tests.latents.world import image_dataset, save_clip, save_vae
from tests.orchestration.head import actors, ended, folder_bytes, run_here, run_stage, wait_for

SHARDS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image shards, a VAE and a CLIP."""
    folder = tmp_path_factory.mktemp("world")
    image_dataset(RunPaths(str(folder / "run")), shards=SHARDS, rows=60, corrupt={2: (3,)})
    save_vae(folder / "vae")
    save_clip(folder / "clip")
    return folder


def prepare(world: Path, run: Path) -> Path:
    """A run with the world's image shards in it, and its configuration."""
    run.mkdir()
    (run / "images").symlink_to(world / "run" / "images")
    config = {
        "run": str(run),
        "ray": {"latents": {"workers": 2}, "back_off_s": 0.05},
        "ingest": {"table": str(world)},
        "autoencoder": {"pretrained": str(world / "vae")},
        "clip": {"pretrained": str(world / "clip")},
        "latents": {"resolution": 32, "batch_size": 8, "text": "embeddings"},
    }
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def committed(run: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (run / "latents").glob("*_stats.json")}


@pytest.mark.timeout(900)
def test_killed_workers_and_drivers_cost_time_and_nothing_else(world: Path, tmp_path: Path) -> None:
    clean, torn = tmp_path / "clean", tmp_path / "torn"
    run_here("latents", prepare(world, clean))
    expected = folder_bytes(clean / "latents")
    assert len(expected) == 2 * SHARDS + 1

    config = prepare(world, torn)
    before = actors("ShardWorker")
    process = run_stage("latents", config)
    wait_for(lambda: len(committed(torn)) >= 1, process)
    victim = min(actors("ShardWorker") - before)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(committed(torn)) >= 3, process)
    process.kill()
    process.communicate()
    done = committed(torn)
    assert 3 <= len(done) < SHARDS
    assert not (torn / "latents/dataset.json").exists()

    ended(run_stage("latents", config))
    assert folder_bytes(torn / "latents") == expected
    after = committed(torn)
    assert len(after) == SHARDS
    assert {name: after[name] for name in done} == done, "nothing was made twice"

    # A run on Ray over what was made in one process finds nothing to do, and changes nothing.
    kept = committed(clean)
    ended(run_stage("latents", clean.parent / "clean.yaml"))
    assert committed(clean) == kept
    assert folder_bytes(clean / "latents") == expected
