"""The stage under the engine: what changed is made again and nothing else, and what goes wrong is a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from latents.stage import LatentsStage
from orchestration import engine
from orchestration.commands import parser
from orchestration.config import Pool, RayConfig
from shards.columns import ColumnShard
from shards.dataset import Dataset, read_stats, write_manifest
from shards.exclusions import write_exclusions
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.latents import world
from tests.latents.test_buckets import stage_of
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


def test_images_that_were_made_anew_are_refused_as_a_whole_and_redo_makes_the_latents_anew(stage):
    run(stage)
    before = folder_bytes(Path(stage.root))
    for suffix in ("_stats.json", ".tar", ".parquet"):
        Path(stage.run.images, f"00000{suffix}").unlink()
    world.image_shard(stage.run, 0, rows=11)
    finish_images(stage)
    with pytest.raises(StageError, match=r"shard 00000 was made from other data.*--redo"):
        run(stage)
    assert folder_bytes(Path(stage.root)) == before


def test_images_that_grew_are_encoded_and_no_others(stage):
    run(stage)
    before = made(stage)
    world.image_shard(stage.run, SHARDS, rows=11)
    write_manifest(stage.run.images, "images", [read_stats(stage.run.images, i) for i in range(SHARDS + 1)])
    assert run(stage)
    assert made(stage) == before
    assert Dataset.open(stage.root).shards[SHARDS].rows == 11
    assert not run(stage), "nothing is left to do"


def test_an_exclusion_reaches_the_latents_without_encoding_anything(stage):
    run(stage)
    before, key = made(stage), ColumnShard(Dataset.open(stage.root), 1).keys[3]
    row = Dataset.open(stage.run.images).sidecar(1)["key"].to_pylist().index(key)
    line = {"shard": [1], "row": [row], "reason": ["opted_out"], "winner": [-1]}
    name = write_exclusions(stage.run.images, [pa.table(line)])
    stats = [read_stats(stage.run.images, i) for i in range(SHARDS)]
    write_manifest(stage.run.images, "images", stats, None, name)
    run(stage)
    assert made(stage) == before
    assert key not in ColumnShard(Dataset.open(stage.root), 1).keys
    assert not run(stage)


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
    parser.run(["plan", "--config", str(config), "--samples", "8", "--rows", "1000000", "--workers", "16"])
    text = capsys.readouterr().out
    assert "of this run, 0 of 4 shards are made and 4 are left" in text
    assert "16 workers" in text
    assert "online: nothing stored" in text
    run(stage)
    parser.run(["plan", "--config", str(config)])
    assert "4 of 4 shards are made and 0 are left" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="'--workers'"):
        parser.run(["plan", "--config", str(config), "--workers", "0"])


def test_carrara_inspect_writes_its_page_and_fails_on_drift(stage, config, capsys):
    run(stage)
    parser.run(["inspect", "--config", str(config), "--count", "4"])
    assert "PSNR" in capsys.readouterr().out
    assert Path(stage.run.reports, "latents.html").stat().st_size > 1000
    path = Path(stage.root, "00000.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    with pytest.raises(StageError, match="does not have the sha256 that was committed"):
        parser.run(["inspect", "--config", str(config), "--count", "60"])
