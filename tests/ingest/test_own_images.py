"""Images of one's own through the whole stage: every source, each row's end, growth, retries, take-downs, kill -9."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.config import IngestConfig
from ingest.errors import Rejected
from ingest.locations import Below, Reader
from ingest.stage import IngestStage
from ingest.takedown import requested
from shards.dataset import Dataset, read_stats
from shards.images import ImageShard, decode_rgb
from tests.ingest.conftest import PRELOAD, make_config, run
from tests.ingest.site import image_bytes
from tests.ingest.test_sources import make_tar

COUNT = 20


def folder(root: Path, first: int, count: int) -> Path:
    (root / "deep").mkdir(parents=True, exist_ok=True)
    for n in range(first, first + count):
        path = root / ("deep" if n % 3 else ".") / f"{n:04d}.png"
        path.write_bytes(image_bytes(n))
        path.with_suffix(".txt").write_text(f"picture {n}")
    return root


def webdataset(root: Path, first: int, count: int) -> Path:
    """As img2dataset lays it: jpg, json and txt of one key, with the URL of then."""
    root.mkdir(exist_ok=True)
    members = []
    for n in range(first, first + count):
        meta = {"url": f"http://photos.example/{n}.png", "caption": f"picture {n}", "key": f"{n:09d}"}
        members += [(f"{n:09d}.png", image_bytes(n)), (f"{n:09d}.txt", f"picture {n}".encode())]
        members.append((f"{n:09d}.json", json.dumps(meta).encode()))
    make_tar(root / f"{first:05d}.tar", members)
    (root / f"{first:05d}_stats.json").write_text("{}")
    pq.write_table(pa.table({"url": [m[0] for m in members]}), root / f"{first:05d}.parquet")
    return root


def parquet(root: Path, first: int, count: int) -> Path:
    root.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": image_bytes(n), "path": f"{n}.png"} for n in numbers], kind)
    table = pa.table({"image": images, "text": [f"picture {n}" for n in numbers]})
    pq.write_table(table, root / f"{first:05d}.parquet", row_group_size=7)
    return root


def arrow(root: Path, first: int, count: int) -> Path:
    root.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    table = pa.table({"image": pa.array([image_bytes(n) for n in numbers]), "text": [f"picture {n}" for n in numbers]})
    with pa.OSFile(str(root / f"{first:05d}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 6)
    return root


def rows_of_files(root: Path, first: int, count: int) -> Path:
    """A table whose rows name files, by URL and by path in turn."""
    (root / "photos").mkdir(parents=True, exist_ok=True)
    urls = []
    for n in range(first, first + count):
        path = root / "photos" / f"{n}.png"
        path.write_bytes(image_bytes(n))
        urls.append(f"file://{path}" if n % 2 else str(path))
    (root / "table").mkdir(exist_ok=True)
    table = pa.table({"url": urls, "caption": [f"picture {n}" for n in range(first, first + count)]})
    pq.write_table(table, root / "table" / f"{first:05d}.parquet")
    return root / "table"


SOURCES = [folder, webdataset, parquet, arrow, rows_of_files]
Make = Callable[[Path, int, int], Path]


def stage_of(make: Make, root: Path, table: Path, run_: Path, **settings: Any) -> IngestStage:
    source = {"files_below": [str(root)]} if make is rows_of_files else {}
    return IngestStage(make_config(table, source=source, **settings), str(run_ / "images"))


def stored(root: str) -> dict[str, bytes]:
    """Pixels by caption."""
    dataset = Dataset.open(root)
    found = {}
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        for i, caption in enumerate(shard.captions):
            assert caption not in found
            found[caption] = decode_rgb(shard.image_bytes(i)).tobytes()
    return found


def files(root: str) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in Path(root).iterdir() if p.suffix in (".tar", ".parquet") and p.name[0] == "0"
    }


def ends(manifest: dict[str, Any]) -> dict[str, int]:
    return {k: n for k, n in manifest["counts"].items() if n}


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_images_grows_and_then_has_nothing_to_do(make: Make, tmp_path: Path) -> None:
    table = make(tmp_path / "own", 0, COUNT)
    stage = stage_of(make, tmp_path / "own", table, tmp_path / "run", encode_format="png")
    manifest = run(stage)
    assert ends(manifest) == {"rows": COUNT, "success": COUNT}
    assert stage.is_current()
    first = stored(stage.root)
    assert first.keys() == {f"picture {n}" for n in range(COUNT)}
    plain = stage_of(folder, tmp_path / "plain", folder(tmp_path / "plain", 0, COUNT), tmp_path / "other")
    run(plain)
    assert first == stored(plain.root)  # whatever they lay in, and read in whatever order
    before = files(stage.root)
    assert run(stage) == manifest
    make(tmp_path / "own", 100, 5)
    assert not stage.is_current()
    grown = run(stage)
    assert ends(grown) == {"rows": COUNT + 5, "success": COUNT + 5}
    after = files(stage.root)
    assert {n: after[n] for n in before} == before  # new files, new shards
    assert len(after) > len(before)
    assert stage.is_current()


def test_damage_and_gaps_end_as_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    own = webdataset(tmp_path / "own", 0, 10)
    data = (own / "00000.tar").read_bytes()
    (own / "00100.tar").write_bytes(data[: data.index(b"000000005.png") + 512 + 40])  # cut within the sixth image
    odd = [
        ("a.txt", b"no image"),
        ("b.png", image_bytes(50)),
        ("b.txt", b"picture b"),
        ("c.png", b"no picture"),
        ("c.txt", b"c"),
        ("b.png", image_bytes(51)),
        ("b.txt", b"b again"),
        ("d.png", image_bytes(52)),
        ("e.png", b""),
        ("e.txt", b"an empty one"),
    ]
    make_tar(own / "00200.tar", odd)
    stage = stage_of(webdataset, own, own, tmp_path / "run")
    manifest = run(stage)
    assert manifest["errors"] == {"body_empty": 1, "key_twice": 1, "not_an_image": 1, "source_missing": 1}
    # Five of the cut tar are whole, and the same as in the tar that it is of.
    assert ends(manifest) == {
        "rows": 10 + 5 + 6,
        "success": 11,
        "failed_to_download": 3,
        "failed_to_resize": 1,
        "filtered": 1,
        "duplicate": 5,
    }
    assert manifest["filtered_by"]["no caption"] == 1
    assert stage.is_current()


def test_rows_that_name_files_elsewhere_are_refused(tmp_path: Path) -> None:
    rows_of_files(tmp_path / "own", 0, 3)
    (tmp_path / "secret.png").write_bytes(image_bytes(9))
    (tmp_path / "own" / "photos" / "link.png").symlink_to(tmp_path / "secret.png")
    below = tmp_path / "own" / "photos"
    urls = [f"file://{below}/0.png", f"{tmp_path}/secret.png", f"{below}/../../secret.png", f"{below}/link.png"]
    pq.write_table(pa.table({"url": [*urls, f"{below}/none.png"], "caption": list("abcde")}), tmp_path / "t.parquet")
    config = make_config(tmp_path / "t.parquet", source={"files_below": [str(below)]})
    manifest = run(IngestStage(config, str(tmp_path / "run" / "images")))
    assert ends(manifest) == {"rows": 5, "success": 1, "failed_to_download": 4}
    assert manifest["errors"] == {"place_refused": 3, "source_missing": 1}
    urls[0] = f"{below}/none.png"
    pq.write_table(pa.table({"url": urls, "caption": list("abcd")}), tmp_path / "u.parquet")
    stage = IngestStage(make_config(tmp_path / "u.parquet"), str(tmp_path / "bare" / "images"))
    with pytest.raises(Exception, match="none of 4 rows gave an image"):  # no folder is named: they are no URLs
        run(stage)


def test_rows_may_name_files_by_urls_with_percent_signs(tmp_path: Path) -> None:
    """As `Path.as_uri` and file managers write them; what they stand for is judged, not how it is written."""
    photos, names = tmp_path / "my photos", ["a b.png", "größe#1.png", "100%25.png"]
    photos.mkdir()
    for n, name in enumerate(names):
        (photos / name).write_bytes(image_bytes(n))
    (tmp_path / "secret.png").write_bytes(image_bytes(9))
    urls = [(photos / n).as_uri() for n in names] + [
        f"file://{photos / names[2]}",
        f"{photos.as_uri()}/%2e%2e/secret.png",
    ]
    reader = Reader(Below([str(photos)]), 1 << 20)
    assert [reader.read(u) for u in urls[:4]] == [image_bytes(n) for n in (0, 1, 2, 2)]
    with pytest.raises(Rejected, match="place_refused"):
        reader.read(urls[4])


def test_duplicates_and_the_held_out_fraction_are_those_of_a_table(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", 0, 30)
    (own / "copy.png").write_bytes(image_bytes(3))
    (own / "copy.txt").write_text("picture 3")
    stage = stage_of(folder, own, own, tmp_path / "run", heldout_fraction=0.3)
    train = run(stage)
    heldout = dataclasses.replace(stage, root=str(tmp_path / "run" / "heldout"), split="heldout")
    other = run(heldout)
    assert train["counts"]["rows"] + other["counts"]["rows"] == 31
    assert 3 <= other["counts"]["success"] <= 15
    assert train["counts"]["duplicate"] + other["counts"]["duplicate"] == 1
    assert not stored(stage.root).keys() & stored(heldout.root).keys()
    assert stage.is_current()
    assert heldout.is_current()


def test_what_could_not_be_read_is_tried_again_from_its_place(tmp_path: Path, monkeypatch: Any) -> None:
    own = webdataset(tmp_path / "own", 0, 10)
    stage = stage_of(webdataset, own, own, tmp_path / "run")
    real = Reader._bytes

    def read(self: Reader, location: Any) -> bytes:
        data = real(self, location)
        if data in (image_bytes(3), image_bytes(7)):
            raise PermissionError
        return data

    monkeypatch.setattr(Reader, "_bytes", read)
    manifest = run(stage)
    assert manifest["errors"] == {"source_unreadable": 2}
    before = files(stage.root)
    monkeypatch.undo()
    manifest = run(dataclasses.replace(stage, retry=frozenset({"source_unreadable"})))
    assert ends(manifest) == {"rows": 10, "success": 10}
    assert stored(stage.root)["picture 3"]
    assert {n: d for n, d in files(stage.root).items() if n in before} == before
    assert stage.is_current()


def test_a_take_down_by_the_url_of_then(tmp_path: Path) -> None:
    own = webdataset(tmp_path / "own", 0, 10)
    stage = stage_of(webdataset, own, own, tmp_path / "run")
    run(stage)
    (tmp_path / "list").write_text("https://photos.example/4.png\n")
    requested(str(tmp_path / "list"), None, None).listed.create(stage.run)
    assert not stage.is_current()
    manifest = run(stage)
    assert ends(manifest) == {"rows": 10, "success": 9, "opted_out": 1}
    assert "picture 4" not in stored(stage.root)
    # The same picture from another tar is known by its bytes, one of the same URL by that.
    webdataset(tmp_path / "own", 4, 1)
    manifest = run(stage)
    assert ends(manifest) == {"rows": 11, "success": 9, "opted_out": 2}


@pytest.mark.parametrize("make", [folder, parquet])
def test_a_take_down_by_the_place_that_the_sidecar_names(make: Make, tmp_path: Path) -> None:
    stage = stage_of(make, tmp_path / "own", make(tmp_path / "own", 0, 4), tmp_path / "run")
    run(stage)
    place = Dataset.open(stage.root).sidecar(0)["place"].to_pylist()[1]
    (tmp_path / "list.txt").write_text(f"{place}\n")
    requested(str(tmp_path / "list.txt"), None, None).listed.create(str(tmp_path / "run"))
    assert not stage.is_current()
    assert ends(run(stage)) == {"rows": 4, "success": 3, "opted_out": 1}


def test_images_of_one_caption_in_one_file_are_no_duplicates(tmp_path: Path) -> None:
    members = [m for n in range(6) for m in ((f"{n}.png", image_bytes(n)), (f"{n}.cls", b"dog"))]
    (tmp_path / "own").mkdir()
    make_tar(tmp_path / "own" / "0.tar", members)
    stage = stage_of(webdataset, tmp_path / "own", tmp_path / "own", tmp_path / "run")
    assert ends(run(stage)) == {"rows": 6, "success": 6}


def test_files_that_are_gone_change_nothing_and_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = folder(tmp_path / "own", 0, 10)
    stage = stage_of(folder, own, own, tmp_path / "run")
    manifest, before = run(stage), {}
    before = files(stage.root)
    (own / "0003.png").unlink()
    assert stage.is_current()
    assert run(stage) == manifest
    assert files(stage.root) == before
    assert "1 images that were listed are gone; those that are stored stay" in caplog.text
    (own / "0006.png").unlink()
    fresh = stage_of(folder, own, own, tmp_path / "fresh")
    assert ends(run(fresh)) == {"rows": 8, "success": 8}


def _child(config: str, root: str, first: Any) -> None:
    stage = IngestStage(IngestConfig.model_validate_json(config), root)
    stage.begin()
    worker = stage.worker()
    tasks = list(stage.tasks())
    worker(tasks[0])
    first.set()
    for task in tasks[1:]:
        worker(task)
    stage.finish([read_stats(root, t.index) or {} for t in tasks])


@pytest.mark.parametrize("make", [webdataset, parquet])
def test_killed_and_run_again_the_bytes_are_the_same(make: Make, tmp_path: Path) -> None:
    table = make(tmp_path / "own", 0, 60)
    clean = stage_of(make, table, table, tmp_path / "clean")
    run(clean)
    stage = stage_of(make, table, table, tmp_path / "killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])
    first = context.Event()
    arguments = (stage.config.model_dump_json(by_alias=True), stage.root, first)
    process = context.Process(target=_child, args=arguments)
    process.start()
    assert first.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    run(stage)
    assert files(stage.root) == files(clean.root)
    assert stage.is_current()


def test_tars_that_img2dataset_itself_made(tmp_path: Path) -> None:
    """By its own writer, with its parquet and stats beside."""
    writer = pytest.importorskip("img2dataset.writer", exc_type=ImportError)
    (tmp_path / "own").mkdir()
    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), ("key", pa.string()), ("status", pa.string())])
    made = writer.WebDatasetSampleWriter(0, str(tmp_path / "own"), True, 5, schema, "png")
    for n in range(8):
        meta = {
            "url": f"http://photos.example/{n}.png",
            "caption": f"picture {n}",
            "key": f"{n:09d}",
            "status": "success",
        }
        failed = {"status": "failed_to_download"} if n == 5 else {}
        made.write(None if failed else image_bytes(n), f"{n:09d}", meta["caption"], meta | failed)
    made.close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    stage = stage_of(webdataset, tmp_path / "own", tmp_path / "own", tmp_path / "run")
    manifest = run(stage)
    assert ends(manifest) == {"rows": 7, "success": 7}
    sidecar = Dataset.open(stage.root).sidecar(0)
    assert sidecar["url"].to_pylist() == [f"http://photos.example/{n}.png" for n in range(8) if n != 5]
    with tarfile.open(fileobj=io.BytesIO(before["00000.tar"])) as tar:
        assert len(tar.getmembers()) == 21
    assert {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()} == before
