"""Crops that are drawn: by the key, the same wherever an image is cut, and given to the UNet as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latents.config import LatentsConfig
from latents.encoders import load_vae
from latents.inspection import inspect
from latents.resize import crop_place, fit_cover, resize_crop_to
from latents.stage import LatentsStage
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.stage import begin
from tests.latents import world

SIDE = 32


@pytest.fixture
def stage_of(tmp_path: Path, vae_folder: Path, clip_folder: Path) -> Any:
    def build(name: str = "run", **changes: Any) -> LatentsStage:
        run = RunPaths(str(tmp_path / name))
        if not Path(run.images).exists():
            world.image_dataset(run)
        config = LatentsConfig(resolution=SIDE, batch_size=4, text="tokens", device="cpu", **changes)
        return LatentsStage(config, run, str(vae_folder), str(clip_folder))

    return build


def finished(stage: LatentsStage) -> LatentsStage:
    begin(stage)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return stage


def test_every_place_is_as_likely_and_a_keys_own() -> None:
    assert crop_place("000000012") == crop_place("000000012") != crop_place("000000013")
    places = [crop_place(f"{n:09d}") for n in range(2000)]
    fits = [fit_cover(36, 32, 32, 32, place) for place in places]
    assert {f.crop_top for f in fits} == {0}
    counts = np.bincount([f.crop_left for f in fits], minlength=5)
    assert len(counts) == 5, "five ways in which 32 pixels fit into 36"
    assert np.abs(counts - 400).max() < 80  # four standard deviations and a half
    down = np.bincount([fit_cover(32, 34, 32, 32, place).crop_top for place in places])
    assert len(down) == 3
    assert abs(np.corrcoef(np.array(places).T)[0, 1]) < 0.1
    assert fit_cover(36, 32, 32, 32).crop_left == 2


def test_an_image_is_cut_where_its_place_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    place = (0.9, 0.2)
    cut, fit = resize_crop_to(pixels, 32, 32, place)
    whole = np.asarray(Image.fromarray(pixels).resize((fit.scaled_width, 32), Image.Resampling.LANCZOS))
    left = int(0.9 * (fit.scaled_width - 32 + 1))
    assert (fit.scaled_width, fit.crop_left, fit.crop_top) == (56, left, 0)
    assert (cut == whole[:, left : left + 32]).all()


def test_latents_of_drawn_crops(stage_of: Any) -> None:
    """They are of the crop that stands in the sidecar and in `micro`, at each resolution the same part."""
    stage, middle = finished(stage_of(crop="random", more_resolutions=[16])), finished(stage_of("middle"))
    vae = load_vae(stage.vae_ref)
    source, dataset = Dataset.open(stage.run.images), Dataset.open(stage.root)
    assert dataset.manifest["settings"]["crop"] == "random"
    assert "crop" not in Dataset.open(middle.root).manifest["settings"], "as before there was a choice"
    moved = 0
    for position in range(2):
        images, columns = ImageShard(source, position), ColumnShard(dataset, position)
        rows = {r["key"]: r for r in dataset.sidecar(dataset.shards[position].index).to_pylist()}
        for i, key in enumerate(images.keys):
            pixels, row = decode_rgb(images.image_bytes(i)), rows[key]
            for b, (side, end) in enumerate(((SIDE, ""), (16, "_16"))):
                cut, fit = resize_crop_to(pixels, side, side, crop_place(key))
                mean = vae.encode(cut[None].copy())[0].numpy()[0]
                np.testing.assert_allclose(columns.arrays[f"mean.{b}"][i], mean, rtol=1e-3, atol=1e-3)
                assert (row["crop_left" + end], row["crop_top" + end]) == (fit.crop_left, fit.crop_top)
                micro = columns.arrays[f"micro.{b}"][i].tolist()
                assert micro == [row["original_height"], row["original_width"], fit.crop_top, fit.crop_left, side, side]
            fit, other = (resize_crop_to(pixels, SIDE, SIDE, p)[1] for p in (crop_place(key), None))
            moved += fit != other
    assert moved > 5
    assert inspect(stage, 8).complaint == "", "what is encoded again is cut alike"
