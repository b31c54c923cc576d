"""Inspection finds nothing wrong with good latents, and finds each kind of damage."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latents import inspection
from latents.encoders import load_vae
from shards.columns import ColumnShard, pack_columns
from shards.dataset import Dataset, read_stats
from shards.fingerprint import digest_bytes
from shards.images import ImageShard, decode_rgb
from shards.settings import StageError
from tests.latents import world
from tests.latents.test_buckets import run_stage, stage_of


@pytest.fixture(scope="module")
def made(tmp_path_factory, vae_folder, clip_folder) -> Path:
    """A finished run, to be copied by tests that change it."""
    folder = tmp_path_factory.mktemp("made")
    run_stage(stage_of(folder, vae_folder, clip_folder))
    return folder


@pytest.fixture
def stage(made, tmp_path, vae_folder, clip_folder):
    shutil.copytree(made / "run", tmp_path / "run")
    return stage_of(tmp_path, vae_folder, clip_folder)


def test_good_latents_are_found_good_and_measured(stage):
    found = inspection.inspect(stage, count=9)
    assert found.complaint == ""
    assert len(found.samples) == 9 * 2, "two resolutions"
    assert max(s.drift for s in found.samples) < 1e-3
    vae = load_vae(stage.vae_ref)
    source = {s.info.name: s for s in (ImageShard(Dataset.open(stage.run.images), p) for p in range(2))}
    for s in found.samples[:4]:
        pictures = source[s.shard]
        i = pictures.keys.index(s.key)
        pixels = Image.fromarray(decode_rgb(pictures.image_bytes(i)))
        assert s.caption == pictures.captions[i]
        assert s.original.shape == (s.bucket.height, s.bucket.width, 3)
        # The VAE's own round trip of that cut, measured another way.
        mean = vae.encode(s.original[None])[0].numpy().astype(np.float16).astype(np.float32)
        expected = vae.decode(mean)[0]
        assert np.abs(expected.astype(int) - s.decoded.astype(int)).max() <= 1
        mse = ((s.original / 255.0 - s.decoded / 255.0) ** 2).mean()
        assert s.psnr == pytest.approx(-10 * np.log10(mse), abs=1e-6)
        assert pixels.width / pixels.height == pytest.approx(s.bucket.width / s.bucket.height, rel=0.35)


def test_the_page_holds_pictures_and_escapes_captions(stage, tmp_path):
    found = inspection.inspect(stage, count=5)
    hostile = inspection.dataclasses.replace(found.samples[0], caption='<script>alert(1)</script>"')
    found = inspection.dataclasses.replace(found, samples=[hostile, *found.samples[1:]])
    url = inspection.write(found, str(tmp_path / "reports"), "Latents of <run>")
    text = Path(url).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.count("data:image/png;base64,") == 20
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    sheet = Image.open(tmp_path / "reports" / "latents.png")
    assert sheet.width > sheet.height > 200
    assert "PSNR" in inspection.summary(found)


def edit(stage, change, commit: bool = True) -> str:
    """Change a shard's columns, by a hand that keeps its stats in step or does not; returns its name."""
    dataset = Dataset.open(stage.root)
    shard = ColumnShard(dataset, 0)
    arrays = {k: v.copy() for k, v in shard.arrays.items()}
    change(arrays)
    data = pack_columns(arrays, shard.metadata)
    Path(stage.root, "00000.safetensors").write_bytes(data)
    if commit:
        stats = read_stats(stage.root, 0)
        stats["files"][".safetensors"] = {"size": len(data), "sha256": digest_bytes(data)}
        Path(stage.root, "00000_stats.json").write_text(json.dumps(stats))
    return shard.info.name


def some_tokens(arrays):
    return next(n for n in sorted(arrays) if n.startswith("tokens") and len(arrays[n]))


def all_tokens(arrays):
    for name in arrays:
        if name.startswith("tokens"):
            arrays[name][:, 1] = 7


def test_an_edited_shard_is_named(stage):
    edit(stage, lambda arrays: arrays[some_tokens(arrays)].__setitem__((0, 1), 7), commit=False)
    found = inspection.inspect(stage, count=38)
    assert "00000.safetensors does not have the sha256" in found.complaint


def test_latents_that_are_not_todays_are_drift(stage):
    def shift(arrays):
        for name in arrays:
            if name.startswith("mean."):
                arrays[name] += np.float16(0.5)

    name = edit(stage, shift)
    found = inspection.inspect(stage, count=38)
    assert {s.shard for s in found.drifted} == {name}
    assert "latents are not what the encoders give now" in found.complaint
    assert "\n" not in found.complaint
    assert 'class="bad"' in inspection.page(found, "x")


def test_other_tokens_and_other_embeddings_are_found(stage):
    # The last place is a padding token but for the longest captions.
    edit(stage, all_tokens)
    assert "captions have other tokens now" in inspection.inspect(stage, count=38).complaint


def test_other_weights_are_refused(stage, tmp_path):
    stage.vae_ref = str(world.save_vae(tmp_path / "other", seed=5))
    with pytest.raises(StageError, match="is not the one the latents were made with"):
        inspection.inspect(stage)
