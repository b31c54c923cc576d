"""The stage under the engine: what changed is made again and nothing else, and what goes wrong is a sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from latents.stage import LatentsStage
from latents.weights import find_vae
from orchestration import commands, engine
from orchestration.config import Pool, RayConfig
from shards import storage
from shards.columns import ColumnShard
from shards.dataset import Dataset, read_stats, write_exclusions, write_manifest
from shards.images import ImageShard
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.latents import world
from tests.latents.test_buckets import stage_of
from tests.objects import bucket
from tests.orchestration.head import folder_bytes

SHARDS = 4


@pytest.fixture
def stage(tmp_path, vae_folder, clip_folder) -> LatentsStage:
    world.image_dataset(RunPaths(str(tmp_path / "run")), shards=SHARDS, rows=14)
    return stage_of(tmp_path, vae_folder, clip_folder)


def run(stage: LatentsStage, **options) -> bool:
    return engine.run(stage, stage.run.status, RayConfig(back_off_s=0.0, **options), Pool(), local=True)


def made(stage: LatentsStage) -> dict[int, int]:
    """When each shard was committed."""
    return {i: Path(stage.root, f"{i:05d}_stats.json").stat().st_mtime_ns for i in range(SHARDS)}


def finish_images(stage: LatentsStage) -> None:
    root = stage.run.images
    write_manifest(root, "images", [s for i in range(SHARDS) if (s := read_stats(root, i)) is not None])


def test_a_shard_that_was_ingested_again_is_encoded_again_and_no_other(stage, tmp_path, vae_folder, clip_folder):
    run(stage)
    before = made(stage)
    for suffix in ("_stats.json", ".tar", ".parquet"):
        Path(stage.run.images, f"00002{suffix}").unlink()
    world.image_shard(stage.run, 2, rows=11)
    finish_images(stage)
    assert run(stage)
    after = made(stage)
    assert [i for i in range(SHARDS) if after[i] != before[i]] == [2]
    assert Dataset.open(stage.root).shards[2].rows == 11
    # The same bytes as if it had been so from the start.
    fresh = stage_of(tmp_path, vae_folder, clip_folder)
    fresh.root = str(tmp_path / "fresh")
    run(fresh)
    assert folder_bytes(Path(fresh.root)) == folder_bytes(Path(stage.root))
    assert not run(stage), "nothing is left to do"


def test_a_take_down_reaches_the_latents_of_its_shard_and_no_other(stage):
    run(stage)
    before, key = made(stage), ColumnShard(Dataset.open(stage.root), 1).keys[3]
    row = Dataset.open(stage.run.images).sidecar(1)["key"].to_pylist().index(key)
    line = {"key": key, "shard": 1, "row": row, "reason": "opted_out", "winner": None}
    write_exclusions(stage.run.images, pa.Table.from_pylist([line]))
    finish_images(stage)
    run(stage)
    after = made(stage)
    assert [i for i in range(SHARDS) if after[i] != before[i]] == [1]
    shard = ColumnShard(Dataset.open(stage.root), 1)
    assert key not in shard.keys
    assert dict(zip(shard.table["key"].to_pylist(), shard.table["status"].to_pylist(), strict=True))[key] == "opted_out"


def test_a_full_disk_is_named_and_the_same_command_finishes(stage, monkeypatch):
    real, room = os.fsync, [6]

    def fsync(fd: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((StageError, OSError), match=r"the disk is full|No space left"):
        run(stage, attempts=1)
    monkeypatch.undo()
    committed = list(Path(stage.root).glob("*_stats.json")) if Path(stage.root).exists() else []
    assert len(committed) < SHARDS
    for path in committed:
        assert json.loads(path.read_text())["count"] > 0, "what is there is whole"
    run(stage)
    assert len(Dataset.open(stage.root)) == sum(Dataset.open(stage.run.images).counts)


def test_a_vae_that_is_exchanged_during_the_run_is_noticed(stage, tmp_path):
    """Workers go on with the weights they loaded; the manifest must not name the new ones."""
    ours, first = tmp_path / "vae", Path(stage.vae_ref)
    shutil.copytree(first, ours)

    class Exchanged(LatentsStage):
        def worker(self):
            make = super().worker()

            def one(task):
                stats = make(task)
                if task.index == 1:
                    world.save_vae(ours, seed=9)
                return stats

            return one

    torn = Exchanged(stage.config, stage.run, str(ours), stage.text_ref)
    with pytest.raises(StageError, match=r"shard 00000 is of before a change .*\(weights.vae: \w+\.\.\.\w+ -> "):
        run(torn)
    assert not Path(stage.root, "dataset.json").exists()
    with pytest.raises(StageError, match="was made with other settings"):
        run(LatentsStage(stage.config, stage.run, str(ours), stage.text_ref))
    # With the first one put back, what was made stands.
    before = made(stage)
    run(stage)
    assert made(stage) == before
    assert Dataset.open(stage.root).manifest["vae"]["digest"] == find_vae(str(first)).digest


def test_an_unreadable_tar_sets_its_shard_aside_and_the_rest_is_made(stage):
    tar = Path(stage.run.images, "00001.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match=r"1 of 4 shards failed.*\(00001\).*ends before the picture of sample"):
        run(stage, attempts=2)
    assert sorted(p.name for p in Path(stage.root).glob("*_stats.json")) == [f"0000{i}_stats.json" for i in (0, 2, 3)]
    tar.unlink()
    with pytest.raises(StageError, match=r"image shard 1 lacks .*00001.tar; run ingest again"):
        run(stage, attempts=1)
    tar.write_bytes(whole)
    run(stage)
    assert len(Dataset.open(stage.root).shards) == SHARDS


def test_on_an_object_store_the_bytes_are_the_same_and_a_tar_is_read_once(stage, tmp_path):
    run(stage)
    with bucket() as url:
        remote = LatentsStage(stage.config, RunPaths(f"{url}/run"), stage.vae_ref, stage.text_ref)
        for path in Path(stage.run.images).iterdir():
            storage.write_atomic(storage.join(remote.run.images, path.name), path.read_bytes())
        run(remote)
        for name, data in folder_bytes(Path(stage.root)).items():
            assert storage.read_bytes(storage.join(remote.root, name)) == data, name
        assert not run(remote)
        shard = ImageShard(Dataset.open(remote.run.images), 0)
        shard.fetch()
        storage.remove(shard.url)
        assert [shard.image_bytes(i) for i in (3, 0)] == [
            ImageShard(Dataset.open(stage.run.images), 0).image_bytes(i) for i in (3, 0)
        ]


def test_the_progress_shows_samples_utilisation_and_wait(stage):
    run(stage)
    status = json.loads(Path(stage.run.status, "latents.json").read_text())
    figures = status["figures"]
    assert figures["images/s"] > 0
    assert figures["success"] == "86%"  # two of fourteen rows were never downloaded
    for name in ("busy", "wait"):
        assert 0 <= int(figures[name].removesuffix("%")) <= 100
    stats = [read_stats(stage.root, i) for i in range(SHARDS)]
    assert all(
        s["encode_seconds"] > 0 and s["encode_seconds"] + s["wait_seconds"] <= s["seconds"] + 0.01 for s in stats
    )


@pytest.fixture
def config(stage, tmp_path) -> Path:
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "run": stage.run.run,
                "ingest": {"table": str(tmp_path)},
                "autoencoder": {"pretrained": stage.vae_ref},
                "clip": {"pretrained": stage.text_ref},
                "latents": stage.config.model_dump(),
            }
        )
    )
    return tmp_path / "mine.yaml"


def test_carrara_plan_says_what_is_left(stage, config, capsys):
    commands.run("plan", ["--config", str(config), "--samples", "8", "--rows", "1000000", "--workers", "16"])
    text = capsys.readouterr().out
    assert "of this run, 0 of 4 shards are made and 4 are left" in text
    assert "16 workers" in text
    assert "online: nothing stored" in text
    run(stage)
    commands.run("plan", ["--config", str(config)])
    assert "4 of 4 shards are made and 0 are left" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--workers is 0"):
        commands.run("plan", ["--config", str(config), "--workers", "0"])


def test_carrara_inspect_writes_its_page_and_fails_on_drift(stage, config, capsys):
    run(stage)
    commands.run("inspect", ["--config", str(config), "--count", "4"])
    assert "PSNR" in capsys.readouterr().out
    assert Path(stage.run.reports, "latents.html").stat().st_size > 1000
    path = Path(stage.root, "00000.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    with pytest.raises(StageError, match="does not have the sha256 that was committed"):
        commands.run("inspect", ["--config", str(config), "--count", "60"])
