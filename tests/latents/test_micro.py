"""What a UNet is given of a picture's size and crop, over all ways in which ingest stores pictures; what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ingest.pixels import PixelSettings, resize
from latents.config import LatentsConfig
from latents.resize import crop_before, fit_cover
from latents.stage import LatentsStage
from shards.columns import ColumnShard
from shards.dataset import Dataset, commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import pack_tar
from shards.layout import RunPaths
from shards.settings import ConfigError

SIZES = [(160, 90), (90, 160), (64, 64), (40, 30), (300, 70)]  # width and height, as fetched
SIDE = 64


def stored(run: RunPaths, **settings: Any) -> None:
    """An image shard of pictures that ingest's own code scaled and cut."""
    how = {"image_size": SIDE, "resize_mode": "center_crop", "only_if_bigger": False, **settings}
    pixel_settings = PixelSettings(
        how["image_size"], how["resize_mode"], how["only_if_bigger"], "png", 6, (255, 255, 255), 64_000_000
    )
    samples, rows = [], []
    for n, (width, height) in enumerate(SIZES):
        x = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
        x[..., 1] = np.linspace(0, 255, height)[:, None]
        pixels = resize(x.astype(np.uint8), pixel_settings)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        samples.append((f"{n:09d}", {"png": sink.getvalue()}))
        rows.append(
            {
                "key": f"{n:09d}",
                "caption": "a picture",
                "status": "success",
                "error": None,
                "error_message": None,
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "original_width": width,
                "original_height": height,
                "image_ext": "png",
            }
        )
    tar, extents = pack_tar(samples)
    for row, extent in zip(rows, extents, strict=True):
        row["image_offset"], row["image_size"] = extent["png"]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    stats = {"rows": len(rows), "count": len(rows)}
    files = {".tar": tar, ".parquet": sink.getvalue()}
    committed = commit_shard(run.images, 0, files, stats, Fingerprint("ingest", 1, how, input="0"))
    write_manifest(run.images, "images", [committed])


@pytest.mark.parametrize("mode", ["center_crop", "border", "keep_ratio", "keep_ratio_largest", "no"])
def test_the_crop_is_that_of_the_whole_picture_whatever_ingest_did(
    tmp_path: Path, vae_folder: Path, clip_folder: Path, mode: str
) -> None:
    run = RunPaths(str(tmp_path))
    stored(run, resize_mode=mode)
    config = LatentsConfig(resolution=32, batch_size=4, device="cpu", text="tokens")
    stage = LatentsStage(config, run, str(vae_folder), str(clip_folder), seed=0)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    shard = ColumnShard(Dataset.open(run.latents), 0)
    for n, (width, height) in enumerate(SIZES):
        top, left = shard.arrays["micro"][n].tolist()[2:4]
        assert shard.arrays["micro"][n].tolist()[:2] == [height, width]
        assert shard.arrays["micro"][n].tolist()[4:] == [32, 32]
        # Of the whole picture scaled until the square fits into it; a border is no crop.
        scale = 32 / min(width, height)
        expected = (0.0, 0.0) if mode == "border" else ((height * scale - 32) / 2, (width * scale - 32) / 2)
        assert (top, left) == pytest.approx(expected, abs=1.01)
    lost = shard.arrays["micro"][0].tolist()
    if mode == "center_crop":
        assert lost[3] == 12, "an image that lost 44 % of its width is not called uncropped"


@pytest.mark.parametrize("original", [(1600, 900), (900, 1600), (512, 512)])
def test_what_was_lost_before_is_in_pixels_of_the_picture_as_it_is_scaled(original: tuple[int, int]) -> None:
    kept = (512, 512)
    for side in (256, 512, 128):
        fit = fit_cover(*kept, side, side)
        left, top = crop_before(original, kept, fit)
        width, height = (round(x * side / min(original)) for x in original)
        assert (left, top) == pytest.approx(((width - side) / 2, (height - side) / 2), abs=1)


@pytest.mark.parametrize("field", ["buckets", "crop"])
@pytest.mark.parametrize("mode", ["center_crop", "border"])
def test_buckets_and_drawn_crops_over_square_pictures_are_refused(
    tmp_path: Path, vae_folder: Path, clip_folder: Path, mode: str, field: str
) -> None:
    run = RunPaths(str(tmp_path))
    stored(run, resize_mode=mode)
    asked: dict[str, Any] = {"buckets": {"buckets": {"step": 8}}, "crop": {"crop": "random"}}[field]
    config = LatentsConfig(resolution=32, device="cpu", **asked)
    stage = LatentsStage(config, run, str(vae_folder), str(clip_folder), seed=0)
    with pytest.raises(ConfigError, match=rf"latents\.{field}: .* are all square, .*resize_mode {mode}; ingest them"):
        list(stage.tasks())


def test_latents_larger_than_the_pictures_are_made_only_where_asked_for_by_name(
    tmp_path: Path, vae_folder: Path, clip_folder: Path
) -> None:
    run = RunPaths(str(tmp_path))
    stored(run)
    further = {"resolution": 32, "more_resolutions": [96]}
    for values, field in (({"resolution": 128}, "resolution"), (further, "more_resolutions")):
        config = LatentsConfig(device="cpu", **values)
        sentence = rf"latents\.{field} is \d+, but .*image_size 64: each would be enlarged.*latents\.enlarge"
        with pytest.raises(ConfigError, match=sentence):
            list(LatentsStage(config, run, str(vae_folder), str(clip_folder), seed=0).tasks())
        asked = config.model_copy(update={"enlarge": True})
        assert len(list(LatentsStage(asked, run, str(vae_folder), str(clip_folder), seed=0).tasks())) == 1
        assert asked.settings() == config.settings(), "consent changes no byte"
