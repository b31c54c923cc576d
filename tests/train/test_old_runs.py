"""Runs of before: a training of commit c20ac09 goes on, from its checkpoint and its latents."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from latents.config import LatentsConfig
from latents.stage import LatentsStage
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import load_sections
from shards.stage import begin, committed
from tests.train import forked
from tests.train.test_guard import events
from tests.train.tiny import ROOT
from train import folders
from train.config import TrainConfig, TrainingSections
from train.latent_samples import Latents
from train.state import stage_state


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_c20ac09.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    # The encoders lay elsewhere when the latents were made.
    manifest = tmp_path / "run" / "latents" / "dataset.json"
    data = json.loads(manifest.read_text())
    for name, folder in (("vae", "vae"), ("text", "clip")):
        data[name]["ref"] = str(tmp_path / "weights" / folder)
    manifest.write_text(json.dumps(data))
    config: dict[str, Any] = yaml.safe_load((tmp_path / "run.yaml").read_text())
    del config["train"]["shuffle_window"]
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({k: config[k] for k in ("run", "seed", "autoencoder", "clip", "train")})
    )
    return tmp_path


def test_old_latents_are_read_as_they_lie_and_stay_complete(old: Path) -> None:
    dataset = Dataset.open(str(old / "run" / "latents"))
    config = TrainConfig(images=1000, batch_size=8)
    latents = Latents(config, [dataset], 0)
    keys = latents.keys(np.arange(31))
    mean, text = latents.moments(np.arange(31))[0], latents.embeddings(np.arange(31))
    stored = {}
    for position in range(5):
        shard = ColumnShard(dataset, position)
        for n, key in enumerate(shard.keys):
            index = shard.arrays["embedding_index"][n]
            stored[key] = (shard.arrays["mean"][n], shard.arrays["embeddings"][index])
    assert set(keys) == set(stored)
    for i, key in enumerate(keys):
        assert np.array_equal(mean[i], stored[key][0].astype(np.float32))
        assert np.array_equal(text[i], stored[key][1].astype(np.float32))
    settings = yaml.safe_load((old / "run.yaml").read_text())["latents"]
    stage = LatentsStage(LatentsConfig(**settings), RunPaths("run"), "weights/vae", "weights/clip", 3)
    begin(stage)
    assert all(committed(stage, stage.tasks())), "nothing is encoded again"


def test_a_checkpoint_of_before_goes_on_in_an_order_of_its_own_and_the_journal_says_so(old: Path) -> None:
    config = old / "train.yaml"
    sections = load_sections(str(config), (), TrainingSections)
    assert stage_state("train", "run", sections).state == "resumable", "its model was left out"
    longer = load_sections(str(config), ("train.images=88",), TrainingSections)
    assert stage_state("train", "run", longer).state == "changed"
    forked.fit(config, 1, "train.images=88", adopt=True)
    newest = folders.latest_complete(str(old / "run" / "checkpoints"), contents=False)
    assert newest is not None
    manifest = folders.read_manifest(newest)
    assert manifest["images"] == 88
    (segment,) = manifest["order"]["segments"]
    assert (segment["images"], segment["step"], segment["changes"]) == (40, 5, ["train.images: 40 -> 88"])
    (event,) = events(old / "run", "order")
    assert "a new order of samples begins at 40 images" in event["note"]
