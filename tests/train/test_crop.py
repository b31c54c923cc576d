"""Images that a UNet is told beside latents of drawn crops: cut as those were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latents.resize import crop_place, resize_crop_to
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import validate
from tests.train import tiny
from tests.train.test_tuning import make_run
from train.config import TrainConfig
from train.objectives import build


@pytest.mark.parametrize("crop", ["random", "center"])
def test_what_lies_beside_a_latent_is_cut_as_it_was(tmp_path: Path, crop: str) -> None:
    run = make_run(tmp_path / "r", crop=crop)
    given = {"images": 8, "batch_size": 8, "unet": tiny.UNET, "streams": 2, "window": 4, "inpaint": {}}
    objective: Any = build("train", validate(TrainConfig, given, "x.yaml"), [Dataset.open(run.latents)], 5)
    batch, keys = objective.batch(np.arange(8)), objective.keys(np.arange(8))
    shard = ImageShard(Dataset.open(run.images), 0)
    images = dict(zip(shard.keys, range(len(shard)), strict=True))
    moved = 0
    for key, found in zip(keys, batch["image"].numpy(), strict=True):
        pixels = decode_rgb(shard.image_bytes(images[key]))
        middle, _ = resize_crop_to(pixels, 32, 32)
        wanted = resize_crop_to(pixels, 32, 32, crop_place(key))[0] if crop == "random" else middle
        assert np.array_equal(found, wanted), key
        moved += not np.array_equal(wanted, middle)
    objective.close()
    assert (moved > 0) == (crop == "random")


@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_mirrored_image_is_given_where_its_crop_lies(tmp_path: Path, crop: str) -> None:
    """SDXL's top and left are of the image that is trained on: what lay at the right lies at the left of the mirror."""
    run = make_run(tmp_path / "r", crop=crop, flip=True, text_layer="penultimate_no_norm", text_pooled=True)
    sized = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = {**tiny.UNET, **sized, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    given = {"images": 32, "batch_size": 8, "unet": unet, "streams": 2, "window": 4, "flip": True}
    dataset = Dataset.open(run.latents)
    objective: Any = build("train", validate(TrainConfig, given, "x.yaml"), [dataset], 5)
    rows = {r["key"]: r for r in dataset.sidecar(0).to_pylist()}
    positions, moved = np.arange(32), 0
    flipped = objective.random.uniform("flip", positions) < 0.5
    sizes = objective.batch(positions)["sizes"].numpy()
    for key, mirrored, found in zip(objective.keys(positions), flipped, sizes, strict=True):
        row = rows[key]
        left, right = row["crop_left"], row["scaled_width"] - 32 - row["crop_left"]
        wanted = right if mirrored and crop == "random" else left
        assert found.tolist() == [row["original_height"], row["original_width"], row["crop_top"], wanted, 32, 32]
        assert crop == "random" or abs(left - right) <= 1
        moved += abs(wanted - left) > 1
    objective.close()
    assert (moved > 2) == (crop == "random")
