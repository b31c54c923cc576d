"""`engine: img2dataset`: its pictures byte for byte, our accounting, our guard."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ingest import img2dataset_engine
from ingest.config import IngestConfig
from ingest.img2dataset_engine import Img2datasetPool
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, url_digest
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import ConfigError, StageError, validate
from tests.ingest.conftest import make_config, run
from tests.ingest.site import Site, image_bytes


def test_what_it_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("reencode", "needed"), ("animations", "refuse"), ("background", [0, 0, 0])):
        with pytest.raises(ConfigError, match=f"img2dataset does not know ingest.{name}"):
            validate(IngestConfig, {"table": "t.csv", "engine": "img2dataset", name: value}, "run.yaml")
    for name in ("host_concurrency", "max_redirects", "min_speed", "max_bytes"):
        with pytest.raises(ConfigError, match=f"img2dataset does not know ingest.fetch.{name}"):
            validate(IngestConfig, {"table": "t", "engine": "img2dataset", "fetch": {name: 7}}, "run.yaml")
    monkeypatch.setattr(img2dataset_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'carrara\[img2dataset\]'"):
        img2dataset_engine.require()


def test_a_shard_by_img2dataset_is_committed_like_ours(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("img2dataset")
    rows = [(site.add(f"/{i}.png", image_bytes(i, 50, 40)), f"caption {i}") for i in range(6)]
    rows += [
        (site.url("/gone.png"), "dead"),
        (site.add("/page", b"<html></html>"), "page"),
        (site.add("/no.png", image_bytes(9), X_Robots_Tag="noai"), "opted out"),
        (site.add("/tdm.png", image_bytes(9), TDM_Reservation="1"), "reserved"),
        (site.add("/named.png", image_bytes(9), X_Robots_Tag="img2dataset: noai"), "opted out by name"),
        (site.add("/none.png", image_bytes(9), X_Robots_Tag="max-snippet:20, none"), "opted out by none"),
        ("file:///etc/passwd", "a file"),
        (f"http://127.0.0.2:{site.port}/0.png", "a private address"),
        (site.add("/hop", b"", 302, Location=f"http://127.0.0.2:{site.port}/0.png"), "a redirect to one"),
        ("", "no url"),
        (site.add("/away.png", image_bytes(7)), "taken down"),
    ]
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as f:
        csv.writer(f).writerows([("url", "caption"), *rows])
    config = make_config(table, engine="img2dataset", samples_per_shard=20, encode_format="jpg", fetch={"retries": 0})
    stage = IngestStage(config, str(tmp_path / "run" / "images"))
    TakenDown.of(urls=[url_digest(site.url("/away.png"))]).create(stage.run)
    stage.check()
    manifest = run(stage)
    found = pq.read_table(tmp_path / "run" / "images" / "00000.parquet").to_pylist()
    assert [r["error"] for r in found] == [
        *[None] * 6,
        "img2dataset_download",
        "img2dataset_resize",
        *["x_robots_tag"] * 4,
        "scheme_refused",
        "address_refused",
        "address_refused",
        "url_missing",
        "taken_down",
    ]
    assert manifest["counts"]["success"] == 6
    assert site.hits["/away.png"] == 0
    # The very bytes that img2dataset's own parts give.
    from img2dataset.resizer import Resizer

    shard = ImageShard(Dataset.open(stage.root), 0)
    for i in range(6):
        import io

        expected = Resizer(32, "center_crop", False)(io.BytesIO(image_bytes(i, 50, 40)))[0]
        assert shard.image_bytes(i) == expected
        assert decode_rgb(expected).shape == (32, 32, 3)
    with tarfile.open(tmp_path / "run" / "images" / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["0000000.jpg", "0000000.json", "0000000.txt"]


def test_what_it_lost_is_an_error(tmp_path: Path, site: Site) -> None:
    pool = Img2datasetPool(make_config(tmp_path / "t.csv", engine="img2dataset"))
    with pytest.raises(StageError, match="cannot be read"):
        pool._read(tmp_path, 3)
