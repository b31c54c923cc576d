"""Tars of others, adopted in place: an index is written, no image is read or copied, and the tars stay as they are."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ingest.stage import IngestStage
from ingest.takedown import requested
from latents.config import LatentsConfig
from latents.stage import LatentsStage
from shards import storage
from shards.dataset import Dataset
from shards.images import ImageShard
from shards.layout import RunPaths
from shards.settings import ConfigError
from shards.stage import begin
from shards.verify import verify_shard
from tests.ingest.conftest import make_config, run
from tests.ingest.test_own_images import ends, files
from tests.ingest.test_sources import make_tar
from tests.latents import world
from tests.objects import bucket
from train import segments
from train.encoder_config import AutoencoderConfig
from train.image_samples import ImageSamples

SIDE = 96


def photo(number: int, form: str = "JPEG") -> bytes:
    rng = np.random.default_rng(number)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + number, 3), dtype=np.uint8)).save(sink, form)
    return sink.getvalue()


def make_tars(folder: Path, first: int = 0, tars: int = 2, each: int = 10) -> dict[str, bytes]:
    """Tars as img2dataset makes them; returns the images by their captions."""
    folder.mkdir(exist_ok=True)
    images = {}
    for tar in range(tars):
        members = []
        for n in range(first + tar * each, first + (tar + 1) * each):
            data, key = photo(n), f"{n:09d}"
            meta = {
                "url": f"http://photos.example/{n}.jpg",
                "caption": f"photo {n}",
                "width": SIDE + n,
                "height": SIDE,
                "original_width": 2 * SIDE + 2 * n,
                "original_height": 2 * SIDE,
                "sha256": hashlib.sha256(b"as fetched" + data).hexdigest(),
            }
            members += [(f"{key}.jpg", data), (f"{key}.json", json.dumps(meta).encode()), (f"{key}.txt", b"photo")]
            images[f"photo {n}"] = data
        make_tar(folder / f"{first + tar:05d}.tar", members)
    return images


def stage_of(table: object, root: str, **more: Any) -> IngestStage:
    return IngestStage(make_config(table, source={"adopt": True}, encode_format="jpg", **more), root)


def stored(root: str) -> dict[str, bytes]:
    dataset = Dataset.open(root)
    found: dict[str, bytes] = {}
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        some = shard.encoded_images(np.arange(len(shard)))
        assert some == [shard.image_bytes(i) for i in range(len(shard))]
        shard.fetch()
        assert some == [shard.image_bytes(i) for i in range(len(shard))]
        found |= dict(zip(shard.captions, some, strict=True))
    return found


def test_the_images_are_those_of_the_tars_and_nothing_is_copied(tmp_path: Path) -> None:
    images = make_tars(tmp_path / "theirs")
    make_tar(
        tmp_path / "theirs" / "00009.tar",
        [("x.gif", photo(50, "GIF")), ("x.txt", b"moves"), ("y.txt", b"none"), ("z.jpg", b""), ("z.txt", b"empty")],
    )
    for path in (tmp_path / "theirs").iterdir():
        path.chmod(0o444)
    (tmp_path / "theirs").chmod(0o555)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "theirs").iterdir()}
    stage = stage_of(tmp_path / "theirs", str(tmp_path / "run" / "images"))
    manifest = run(stage)
    assert ends(manifest) == {"rows": 23, "success": 20, "failed_to_download": 2, "failed_to_resize": 1}
    assert manifest["errors"] == {"body_empty": 1, "image_unsupported": 1, "source_missing": 1}
    assert stage.is_current()
    assert stored(stage.root) == images
    written = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*.tar"))
    assert written <= 10240 * len(manifest["shards"])  # tars of nothing
    sidecar = Dataset.open(stage.root).sidecar(0)
    assert sidecar["width"].to_pylist() == [SIDE + n for n in range(8)]
    assert sidecar["original_height"].to_pylist() == [2 * SIDE] * 8
    assert sidecar["sha256"][0].as_py() == hashlib.sha256(b"as fetched" + photo(0)).hexdigest()
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "theirs").iterdir()} == before


def test_growth_takedowns_and_duplicates_as_of_any_images(tmp_path: Path) -> None:
    images = make_tars(tmp_path / "theirs")
    stage = stage_of(tmp_path / "theirs", str(tmp_path / "run" / "images"))
    run(stage)
    before = files(stage.root)
    tars = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    make_tars(tmp_path / "theirs", first=100, tars=1)
    said = {"url": "http://photos.example/3.jpg", "caption": "photo 3"}
    again = [("0.jpg", photo(3)), ("0.json", json.dumps(said).encode())]
    make_tar(tmp_path / "theirs" / "00200.tar", again)
    manifest = run(stage)
    assert ends(manifest) == {"rows": 31, "success": 30, "duplicate": 1}
    assert {n: d for n, d in files(stage.root).items() if n in before} == before
    (tmp_path / "list").write_text("http://photos.example/4.jpg\n")
    requested(str(tmp_path / "list"), None, None).listed.create(stage.run)
    manifest = run(stage)
    assert ends(manifest) == {"rows": 31, "success": 29, "opted_out": 1, "duplicate": 1}
    assert stored(stage.root).keys() >= images.keys() - {"photo 4"}
    assert "photo 4" not in stored(stage.root)
    table = Dataset.open(stage.root).sidecar(0)
    assert [table[n][4].as_py() for n in ("status", "image_file", "image_offset")] == ["opted_out", None, None]
    assert not any(verify_shard(stage.root, s["index"]) for s in manifest["shards"])
    assert {n: (tmp_path / "theirs" / n).read_bytes() for n in tars} == tars


def test_latents_and_the_fits_read_them_where_they_lie(tmp_path: Path) -> None:
    images = make_tars(tmp_path / "theirs", tars=1)
    paths = RunPaths(str(tmp_path / "run"))
    run(stage_of(tmp_path / "theirs", paths.images))
    vae, clip = str(world.save_vae(tmp_path / "vae")), str(world.save_clip(tmp_path / "clip"))
    stage = LatentsStage(LatentsConfig(resolution=32, batch_size=4, device="cpu"), paths, vae, clip)
    begin(stage)
    work = stage.worker()
    manifest = stage.finish([work(t) for t in stage.tasks()])
    assert manifest["status"] == {"success": 10}
    dataset = Dataset.open(paths.latents)
    assert not {"place", "image_file"} & set(dataset.sidecar(0).column_names)
    kinds = Dataset.open(paths.images)
    config = AutoencoderConfig(images=100, batch_size=2, streams=2, window=4)
    samples = ImageSamples(kinds, segments.placement_of(config, [kinds], 0), lambda p: p[:32, :32], 0)
    positions = np.arange(10)
    assert set(samples.captions(positions)) == images.keys()
    first = np.asarray(Image.open(io.BytesIO(images[samples.captions(positions)[0]])).convert("RGB"))
    assert (samples.pixels(positions)[0] == first[:32, :32]).all()


def test_over_a_store_headers_and_sidecars_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    big = [(f"{n:03d}.jpg", os.urandom(6_000_000)) for n in range(4)]
    with bucket() as url:
        members = [m for name, data in big for m in ((name, data), (name[:-3] + "txt", b"a photo"))]
        storage.write_atomic(f"{url}/theirs/0.tar", make_tar(tmp_path / "0.tar", members).read_bytes())
        read, lock = [0], threading.Lock()
        fetch = s3fs.S3File._fetch_range

        def counted(self: Any, begin: int, end: int) -> bytes:
            data: bytes = fetch(self, begin, end)
            with lock:
                read[0] += len(data)
            return data

        monkeypatch.setattr(s3fs.S3File, "_fetch_range", counted)
        stage = stage_of(f"{url}/theirs", f"{url}/run/images")
        assert ends(run(stage)) == {"rows": 4, "success": 4}
        assert read[0] < 300_000  # of 24 MB
        monkeypatch.undo()
        shard = ImageShard(Dataset.open(stage.root), 0)
        assert shard.encoded_images(np.arange(4)) == [data for _, data in big]


def test_every_tar_is_looked_at_for_where_it_lies(tmp_path: Path) -> None:
    make_tars(tmp_path / "theirs", tars=2, each=3)
    make_tars(tmp_path / "outside", first=90, tars=1, each=3)
    (tmp_path / "theirs" / "00000z.tar").symlink_to(tmp_path / "outside" / "00090.tar")
    manifest = run(stage_of(tmp_path / "theirs", str(tmp_path / "run" / "images"), samples_per_shard=100))
    assert manifest["errors"] == {"place_refused": 3}
    assert manifest["counts"]["success"] == 6


def test_what_cannot_be_adopted_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(1))
    with pytest.raises(ConfigError, match="is no WebDataset tar, nor a folder of them"):
        stage_of(tmp_path, str(tmp_path / "run" / "images")).check()
    with pytest.raises(ValueError, match="leaves images as they are"):
        stage_of(tmp_path, "x", resize_mode="border")
