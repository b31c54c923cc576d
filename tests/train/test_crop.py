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
