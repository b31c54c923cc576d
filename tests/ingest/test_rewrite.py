"""Shards that are changed later: rows fetched again, samples taken down, and killed at every step of it."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.config import IngestConfig
from ingest.rewrite import RetryStage, codes_to_retry, finish_rewriting, take_down
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, requested, url_digest
from shards.dataset import Dataset, put_in_place, read_stats, shard_state, staging, verify_shard
from shards.images import ImageShard
from shards.settings import ConfigError, StageError
from tests.ingest.conftest import PRELOAD, make_config, run
from tests.ingest.site import Site, picture


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(root.iterdir()) if p.suffix in (".tar", ".parquet")}


def retry(stage: RetryStage) -> dict[str, Any]:
    stage.prepare()
    worker = stage.worker()
    tasks = list(stage.tasks())
    for task in tasks:
        worker(task)
    worker.close()  # type: ignore[attr-defined]
    return stage.finish(read_stats(stage.root, t.index) or {} for t in tasks)


def table_of(site: Site, folder: Path, count: int = 24) -> Path:
    """Rows 3, 10 and 20 answer 503 until `mend` is called; row 5 is gone for good. Three shards of 8."""
    rows = [(site.add(f"/{i}.png", picture(i % 20)), f"caption {i % 20}", i) for i in range(count)]
    for i in (3, 10, 20):
        site.add(f"/{i}.png", b"down", 503)
    site.add("/5.png", b"gone", 404)
    urls, texts, numbers = zip(*rows, strict=True)
    path = folder / "table.parquet"
    pq.write_table(pa.table({"url": urls, "caption": texts, "number": numbers}), path)
    return path


def mend(site: Site) -> None:
    for i in (3, 10, 20):
        site.add(f"/{i}.png", picture(i % 20))


def test_a_retry_gives_the_bytes_of_a_run_in_which_nothing_failed(site: Site, tmp_path: Path) -> None:
    config = make_config(table_of(site, tmp_path), keep_columns=["number"], fetch={"retries": 0})
    stage = IngestStage(config, str(tmp_path / "run" / "images"))
    before = run(stage)
    assert before["errors"] == {"http_not_found": 1, "http_server_error": 3}
    mend(site)
    site.hits.clear()
    manifest = retry(RetryStage(stage))
    assert dict(site.hits) == {"/3.png": 1, "/10.png": 1, "/20.png": 1}  # neither successes nor what is final
    assert manifest["errors"] == {"http_not_found": 1}
    assert manifest["counts"]["success"] + manifest["counts"]["duplicate"] == 23
    clean = IngestStage(config, str(tmp_path / "clean" / "images"))
    run(clean)
    assert shard_bytes(Path(stage.root)) == shard_bytes(Path(clean.root))
    # The shards are the ingest's own again, and nothing waits beside them.
    assert [shard_state(stage.root, t).state for t in stage.tasks()] == ["done"] * 3
    assert not any(verify_shard(stage.root, i) for i in range(3))
    assert not list(Path(staging(stage.root)).iterdir())
    assert (read_stats(stage.root, 0) or {})["rounds"] == 2
    assert list(RetryStage(stage).tasks()) == []
    assert [t.index for t in RetryStage(stage, codes_to_retry("http_not_found")).tasks()] == [0]


def test_a_retry_needs_a_finished_ingest_of_the_same_settings(site: Site, tmp_path: Path) -> None:
    table = table_of(site, tmp_path)
    stage = IngestStage(make_config(table, fetch={"retries": 0}), str(tmp_path / "images"))
    with pytest.raises(ConfigError, match="run ingest without --retry first"):
        RetryStage(stage).prepare()
    run(stage)
    other = IngestStage(make_config(table, image_size=16), stage.root)
    with pytest.raises(StageError, match=r"settings.image_size: 32 -> 16"):
        list(RetryStage(other).tasks())
    with pytest.raises(ConfigError, match="'opted_out'"):
        codes_to_retry("http_forbidden,opted_out")
    assert "connect_timeout" in codes_to_retry("transient")
    assert "http_not_found" not in codes_to_retry("transient")


def test_what_is_taken_down_is_gone_and_stays_away(site: Site, tmp_path: Path) -> None:
    config = make_config(table_of(site, tmp_path), fetch={"retries": 0})
    mend(site)
    site.add("/5.png", picture(5))
    stage = IngestStage(config, str(tmp_path / "run" / "images"))
    before = run(stage)
    assert before["counts"]["duplicate"] == 4  # rows 20 to 23 repeat the first four
    untouched = (tmp_path / "run" / "images" / "00001.tar").stat().st_mtime_ns
    # Row 2, under another spelling; row 20 is the same picture as row 0 under another URL.
    sha = pq.read_table(tmp_path / "run" / "images" / "00000.parquet")["sha256"][0].as_py()
    listed = TakenDown(urls=frozenset({url_digest(f" HTTP://127.0.0.1:{site.port}/2.png ")}), bytes=frozenset({sha}))
    listed.write(stage.run)
    assert TakenDown.read(stage.run) == listed
    stored = ImageShard(Dataset.open(stage.root), 0).image_bytes(0)
    assert sum(stored in data for data in shard_bytes(Path(stage.root)).values()) == 2
    rewritten, keys = take_down(stage, listed)
    assert rewritten == [0, 2]
    assert keys == ["000000", "000002", "000024"]
    assert (tmp_path / "run" / "images" / "00001.tar").stat().st_mtime_ns == untouched
    dataset = Dataset.open(stage.root)
    assert dataset.manifest["counts"]["opted_out"] == 3
    assert dataset.manifest["counts"]["duplicate"] == 2  # the later ones of pictures 1 and 3
    assert dataset.manifest["counts"]["success"] == 19
    assert dataset.fingerprint != before["fingerprint"]
    live = [k for p in range(3) for k in ImageShard(dataset, p).keys]
    assert not set(live) & set(keys)
    assert not any(stored in data for data in shard_bytes(Path(stage.root)).values())
    # The same again finds nothing; an ingest from the start with the list makes the same shards.
    assert take_down(stage, listed) == ([], [])
    fresh = IngestStage(config, str(tmp_path / "fresh" / "images"))
    listed.write(fresh.run)
    site.hits.clear()
    run(fresh)
    assert site.hits["/2.png"] == 0
    assert shard_bytes(Path(fresh.root)) == shard_bytes(Path(stage.root))
    assert [shard_state(stage.root, t).state for t in stage.tasks()] == ["done"] * 3


def test_hosts_cover_what_lies_below_them() -> None:
    listed = requested(None, None, " Example.COM.")
    assert listed.has_url("https://example.com/a.png")
    assert listed.has_url("http://user@img.Example.com:8080/a.png")
    assert not listed.has_url("http://notexample.com/a.png")
    assert not listed.has_url("http://example.com.evil.org/a.png")
    assert not listed.has_url("")
    assert requested(None, None, "bücher.example").has_url("http://bücher.example/x")
    with pytest.raises(ConfigError, match="not the name of a host"):
        requested(None, None, "https://example.com/")


def test_a_request_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --urls"):
        requested(None, None, None)
    with pytest.raises(ConfigError, match="there is no such file"):
        requested(str(tmp_path / "none"), None, None)
    (tmp_path / "list").write_text("abc\n")
    with pytest.raises(ConfigError, match="'abc' is not a sha256"):
        requested(None, str(tmp_path / "list"), None)
    (tmp_path / "list").write_text("\n \n")
    with pytest.raises(ConfigError, match="needs --urls"):
        requested(str(tmp_path / "list"), None, None)


def child(config: str, root: str, fault: str, what: str) -> None:
    import os

    os.environ["CARRARA_FAULT"] = fault
    stage = IngestStage(IngestConfig.model_validate_json(config), root)
    if what == "retry":
        retry(RetryStage(stage))
    else:
        take_down(stage, TakenDown.read(stage.run))


# Every step of the commit beside the old shard, and of the exchange.
FAULTS = ("after.parquet", "before-stats", "after-stats", "exchange-begun", "exchanged.tar", "exchanged")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["retry", "remove"])
def test_killed_at_any_step_the_same_command_finishes(site: Site, tmp_path: Path, what: str) -> None:
    config = make_config(table_of(site, tmp_path), fetch={"retries": 0})
    mend_late = what == "retry"
    if not mend_late:
        mend(site)
    listed = TakenDown(
        hosts=frozenset(), urls=frozenset({url_digest(site.url("/2.png")), url_digest(site.url("/21.png"))})
    )
    roots = [tmp_path / name / "images" for name in ("whole", *FAULTS)]
    for root in roots:
        run(IngestStage(config, str(root)))
        if what == "remove":
            listed.write(str(root.parent))
    mend(site)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)

    def start(root: Path, fault: str) -> int | None:
        arguments = (config.model_dump_json(by_alias=True), str(root), fault, what)
        process = processes.Process(target=child, args=arguments)
        process.start()
        process.join(60)
        return process.exitcode

    assert start(roots[0], "") == 0
    expected = shard_bytes(roots[0])
    manifest = json.loads((roots[0] / "dataset.json").read_text())
    for root, fault in zip(roots[1:], FAULTS, strict=True):
        assert start(root, fault) == -signal.SIGKILL, fault
        if fault in ("exchanged.tar", "exchange-begun"):
            # The plain ingest, too, must take the new shard up rather than fetch it all again.
            site.hits.clear()
            put_in_place(str(root))
            assert read_stats(str(root), 0) is not None
            assert not site.hits
        assert start(root, "") == 0
        assert shard_bytes(root) == expected, fault
        assert json.loads((root / "dataset.json").read_text()) == manifest
        stage = IngestStage(config, str(root))
        assert finish_rewriting(stage) is None
