"""Pictures taken out of a dataset: where they lie, beside a running ingest, by redirects, and for good."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest import removal
from ingest.config import IngestConfig
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, host_forms, number, url_digest
from shards.dataset import Dataset, read_stats
from shards.images import ImageShard
from shards.stage import open_folder
from shards.verify import discard, verify_shard
from tests.ingest.conftest import PRELOAD, make_config, run
from tests.ingest.site import Site, image_bytes
from tests.ingest.test_retry import shard_bytes


def table_of(site: Site, folder: Path, count: int = 24) -> Path:
    """Three shards of 8; rows 20 to 23 hold the bytes and captions of rows 0 to 3."""
    rows = [(site.add(f"/{i}.png", image_bytes(i % 20)), f"caption {i % 20}") for i in range(count)]
    urls, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"url": urls, "caption": texts}), folder / "table.parquet")
    return folder / "table.parquet"


def stage_of(site: Site, folder: Path, **settings: Any) -> IngestStage:
    return IngestStage(make_config(table_of(site, folder), **settings), str(folder / "run" / "images"))


def pictures(root: str) -> dict[str, bytes]:
    dataset = Dataset.open(root)
    found = {}
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        found |= {key: shard.image_bytes(i) for i, key in enumerate(shard.keys)}
    return found


def test_what_is_taken_down_is_gone_and_stays_away(site: Site, tmp_path: Path) -> None:
    stage = stage_of(site, tmp_path)
    before = run(stage)
    stored, files = pictures(stage.root), shard_bytes(Path(stage.root))
    # Row 2, under another spelling; row 20 is the same picture as row 0, under another URL.
    sha = pq.read_table(tmp_path / "run" / "images" / "00000.parquet")["sha256"][0].as_py()
    listed = TakenDown.of(urls=[url_digest(f" HTTP://127.0.0.1:{site.port}/2.png ")], bytes=[sha])
    listed.create(stage.run)
    assert not stage.is_current()
    site.hits.clear()
    manifest = run(stage)
    assert not site.hits
    assert stage.is_current()
    # 0 and 20 by their bytes, 2 by its URL, 22 as a copy of its bytes.
    assert manifest["counts"]["opted_out"] == 4
    assert manifest["counts"]["rows"] == 24
    assert manifest["counts"]["duplicate"] == 2  # of pictures 1 and 3; 20 and 22 are gone altogether
    left = pictures(stage.root)
    assert left == {k: d for k, d in stored.items() if k not in ("000000", "000002")}
    for key in ("000000", "000002"):
        assert not any(stored[key] in data for data in shard_bytes(Path(stage.root)).values())
    after = shard_bytes(Path(stage.root))
    assert after["00001.tar"] == files["00001.tar"]
    assert {n: len(d) for n, d in after.items() if n.endswith(".tar")} == {
        n: len(d) for n, d in files.items() if n.endswith(".tar")
    }
    assert not any(verify_shard(stage.root, i) for i in range(3))
    assert [s["born"] for s in manifest["shards"]] == [s["born"] for s in before["shards"]]
    # The copies are on the list from now on, so no ingest takes them under another URL.
    assert TakenDown.read(stage.run).has_bytes(sha)
    assert run(stage) == manifest
    fresh = IngestStage(stage.config, str(tmp_path / "fresh" / "images"))
    TakenDown.read(stage.run).create(fresh.run)
    site.hits.clear()
    assert run(fresh)["counts"] == manifest["counts"]
    assert site.hits["/2.png"] == 0


def test_a_look_from_before_the_lease_counts_for_what_it_saw_alone(site: Site, tmp_path: Path) -> None:
    stage = stage_of(site, tmp_path)
    run(stage)
    number_of_parts = TakenDown.of(urls=[url_digest(site.url("/9.png"))]).create(stage.run)  # row 1 of shard 1
    for after, parts, shards in ((0, number_of_parts, {0}), (0, 0, {0, 1, 2}), (1, number_of_parts, {0, 1, 2})):
        looked = removal.Looked(after, parts, frozenset(shards), ())
        assert [(h.shard, h.row) for h in stage.listed_rows(looked)[0]] == [(1, 1)]
    assert stage.listed_rows(removal.Looked(0, number_of_parts, frozenset({0, 1, 2}), ()))[0] == []


def test_a_copy_that_was_excluded_does_not_come_back(site: Site, tmp_path: Path) -> None:
    """Row 20 was left out as a duplicate of row 0; a look-alike of what is taken down stays out."""
    stage = stage_of(site, tmp_path, duplicates={"perceptual": "any_caption", "bytes": False, "url": False})
    before = run(stage)
    assert before["counts"]["duplicate"] >= 4
    out = {s.index: Dataset.open(stage.root).excluded_rows(s.index).tolist() for s in Dataset.open(stage.root).shards}
    site.add("/20.png", image_bytes(20))
    TakenDown.of(urls=[url_digest(site.url("/1.png"))]).create(stage.run)
    manifest = run(stage)
    dataset = Dataset.open(stage.root)
    live = [k for p in range(3) for k in ImageShard(dataset, p).keys]
    assert "000001" not in live
    assert "000025" not in live  # row 21, its copy
    assert manifest["counts"]["opted_out"] == 2
    assert {s: set(rows) - {5} for s, rows in out.items()} == {
        s.index: set(dataset.excluded_rows(s.index).tolist()) - {5} for s in dataset.shards
    }


def test_a_look_alike_stays_out_where_the_shard_is_made_anew(site: Site, tmp_path: Path) -> None:
    """What was taken down is not fetched again, and yet keeps what duplicates are found by."""
    urls = [site.add(f"/{i}.png", image_bytes(i)) for i in range(8)]
    urls += [site.add("/alike.bmp", image_bytes(1, fmt="BMP")), site.add("/other.png", image_bytes(9))]
    pq.write_table(pa.table({"url": urls, "caption": urls}), tmp_path / "t.parquet")
    config = make_config(tmp_path / "t.parquet", duplicates={"perceptual": "any_caption"})
    stage = IngestStage(config, str(tmp_path / "run" / "images"))
    assert run(stage)["counts"]["duplicate"] == 1
    TakenDown.of(urls=[url_digest(urls[1])]).create(stage.run)
    before = run(stage)
    assert (before["counts"]["duplicate"], before["counts"]["opted_out"]) == (1, 1)
    sidecar = pq.read_table(f"{stage.root}/00000.parquet").drop_columns(["image_offset"])
    site.hits.clear()
    for _ in range(2):
        discard(stage.root, 0)
        assert run(stage)["counts"] == before["counts"]
        assert pq.read_table(f"{stage.root}/00000.parquet").drop_columns(["image_offset"]) == sidecar
        assert Dataset.open(stage.root).excluded_rows(1).tolist() == [0]
    assert "/1.png" not in site.hits
    open_folder(stage).sweep()
    assert not any("discarded" in name for _, _, names in os.walk(stage.root) for name in names)


def test_the_list_is_looked_at_before_each_shard(site: Site, tmp_path: Path) -> None:
    stage = stage_of(site, tmp_path)
    stage.begin()
    worker, tasks = stage.worker(), list(stage.tasks())
    worker(tasks[0])
    TakenDown.of(urls=[url_digest(site.url(f"/{i}.png")) for i in (1, 9)]).create(stage.run)
    site.hits.clear()
    for task in tasks[1:]:
        worker(task)
    worker.close()
    assert site.hits["/9.png"] == 0
    assert (read_stats(stage.root, 0) or {})["list"] == 0
    assert (read_stats(stage.root, 1) or {})["list"] == 1
    # What was stored before is taken out by the finish.
    manifest = stage.finish([read_stats(stage.root, t.index) or {} for t in tasks])
    assert manifest["counts"]["opted_out"] == 3  # 1 and 9, and 21 with the bytes of 1
    assert "000001" not in pictures(stage.root)


def test_where_redirects_led_is_matched_too(site: Site, tmp_path: Path) -> None:
    far = f"http://localhost:{site.port}"
    for i in range(3):
        site.add(f"/{i}.png", image_bytes(i))
    site.add("/to-url", b"", 302, Location=site.url("/0.png"))
    site.add("/to-host", b"", 302, Location=f"{far}/1.png")
    rows = {"url": [site.url("/to-url"), site.url("/to-host"), site.url("/2.png")], "caption": ["a", "b", "c"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    config = make_config(tmp_path / "t.parquet", fetch={"allow_addresses": ["127.0.0.1/32", "::1/128"]})
    stage = IngestStage(config, str(tmp_path / "run" / "images"))
    assert run(stage)["counts"]["success"] == 3
    (row,) = pq.read_table(tmp_path / "run" / "images" / "00000.parquet").to_pylist()[1:2]
    assert row["final_origin"] == far
    assert row["final_url_digest"] == number(url_digest(f"{far}/1.png"))
    TakenDown.of(urls=[url_digest(site.url("/0.png"))], hosts=host_forms("localhost")).create(stage.run)
    assert run(stage)["counts"] | {"opted_out": 2, "success": 1} == run(stage)["counts"]
    assert list(pictures(stage.root)) == ["000002"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://img.ex-ample.com/a", "ex-ample.com"),
        ("http://IMG.EX-AMPLE.com:8080/a", "ex-ample.com:8080"),
        ("http://stra\u00dfe.de/a", "stra\u00dfe.de"),
        ("http://STRA\u00dfE.de/a", "xn--strae-oqa.de"),
        ("http://xn--strae-oqa.de/a", "stra\u00dfe.de"),
        ("http://ex%2Dample.com/a", "ex-ample.com"),
        ("http://a.b.c.org./x", "*.c.org"),
        ("http://[::1]:8080/x", "[::1]:8080"),
        ("http://[0:0:0:0:0:0:0:1]/x", "[::1]"),
    ],
)
def test_hosts_are_found_in_the_texts_of_sidecars(tmp_path: Path, url: str, host: str) -> None:
    from ingest.digests import with_digests

    texts = {"status": "success", "error": None, "url": url, "caption": "c", "sha256": "0" * 64, "key": "k"}
    columns = {n: pa.array([v, v], pa.string()) for n, v in texts.items()}
    columns["url"] = pa.array([url, "http://other.net/x"])
    listed = TakenDown.of(hosts=host_forms(host))
    pq.write_table(with_digests(pa.table(columns)), tmp_path / "00000.parquet")
    rows = [h.row for h in removal.find(str(tmp_path), [(0, True)], listed)]
    assert rows == [i for i, u in enumerate(columns["url"].to_pylist()) if listed.has_url(u)]
    if "%" not in url:
        assert rows == [0]


def child(config: str, root: str) -> None:
    stage = IngestStage(IngestConfig.model_validate_json(config), root)
    stage.begin()
    tasks = list(stage.tasks())
    stage.finish([read_stats(root, t.index) or {} for t in tasks])


def test_killed_anywhere_a_take_down_is_finished_by_the_same_command(site: Site, tmp_path: Path) -> None:
    stage = stage_of(site, tmp_path)
    run(stage)
    kept = {k: d for k, d in pictures(stage.root).items() if int(k[-1]) % 2}
    gone = [url_digest(site.url(f"/{i}.png")) for i in range(24) if i % 2 == 0]
    TakenDown.of(urls=gone).create(stage.run)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([*PRELOAD, "tests.ingest.test_removal"])
    rng, kills = random.Random(0), 0
    arguments = (stage.config.model_dump_json(by_alias=True), stage.root)
    for _ in range(8):
        process = processes.Process(target=child, args=arguments)
        process.start()
        process.join(rng.uniform(0.05, 0.5))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join(60)
    process = processes.Process(target=child, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert kills
    left = pictures(stage.root)
    assert {k: left[k] for k in kept if k in left} == {k: d for k, d in kept.items() if k in left}
    manifest = Dataset.open(stage.root).manifest
    assert manifest["counts"]["opted_out"] == 12
    assert manifest["counts"]["success"] == len(left) == 10
    assert not any(verify_shard(stage.root, i) for i in range(3))
