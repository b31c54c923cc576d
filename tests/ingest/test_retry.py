"""Rows fetched again by further shards, and what every end of a row adds up to after several of these."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.errors import RETRYABLE
from ingest.retries import Retry, codes_to_retry
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, url_digest
from shards import plan
from shards.dataset import Dataset, read_stats
from shards.images import ImageShard
from shards.settings import ConfigError
from shards.verify import discard
from tests.ingest.conftest import make_config, run
from tests.ingest.site import Site, image_bytes


def table_of(site: Site, folder: Path, count: int = 24) -> Path:
    """Rows 3, 10 and 20 answer 503 until `mend` is called; row 5 is gone for good. Three shards of 8."""
    rows = [(site.add(f"/{i}.png", image_bytes(i % 20)), f"caption {i % 20}", i) for i in range(count)]
    for i in (3, 10, 20):
        site.add(f"/{i}.png", b"down", 503)
    site.add("/5.png", b"gone", 404)
    urls, texts, numbers = zip(*rows, strict=True)
    path = folder / "table.parquet"
    pq.write_table(pa.table({"url": urls, "caption": texts, "number": numbers}), path)
    return path


def mend(site: Site) -> None:
    for i in (3, 10, 20):
        site.add(f"/{i}.png", image_bytes(i % 20))


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(root.iterdir()) if p.suffix in (".tar", ".parquet")}


def by_key(root: str) -> dict[str, dict[str, Any]]:
    """The fate of each row, as the sidecars have it: a later shard tells what became of a key last."""
    found: dict[str, dict[str, Any]] = {}
    for shard in Dataset.open(root).shards:
        for row in pq.read_table(Path(root) / f"{shard.name}.parquet").to_pylist():
            found[row["key"]] = row
    return found


def again(stage: IngestStage, codes: str = "transient") -> dict[str, Any]:
    return run(dataclasses.replace(stage, retry=codes_to_retry(codes)))


def test_a_retry_is_a_further_shard_that_takes_rows_over(site: Site, tmp_path: Path) -> None:
    config = make_config(table_of(site, tmp_path), keep_columns=["number"], fetch={"retries": 0})
    stage = IngestStage(config, str(tmp_path / "run" / "images"))
    before = run(stage)
    assert before["errors"] == {"http_not_found": 1, "http_server_error": 3}
    stored = shard_bytes(Path(stage.root))
    excluded = {
        s.index: Dataset.open(stage.root).excluded_rows(s.index).tolist() for s in Dataset.open(stage.root).shards
    }
    mend(site)
    site.hits.clear()
    manifest = again(stage)
    assert dict(site.hits) == {"/3.png": 1, "/10.png": 1, "/20.png": 1}  # neither successes nor what is final
    assert {n: d for n, d in shard_bytes(Path(stage.root)).items() if n in stored and n[0] != "e"} == {
        n: d for n, d in stored.items() if n[0] != "e"
    }
    assert manifest["errors"] == {"http_not_found": 1}
    assert manifest["counts"]["rows"] == 24
    assert manifest["counts"]["success"] + manifest["counts"]["duplicate"] == 23
    assert (read_stats(stage.root, 3) or {})["takes_over"] == {"http_server_error": 3}
    rows = pq.read_table(tmp_path / "run" / "images" / "00003.parquet").to_pylist()
    assert [(r["key"], r["number"], r["caption_raw"]) for r in rows] == [
        ("000003", 3, "caption 3"),
        ("000012", 10, "caption 10"),
        ("000024", 20, "caption 0"),
    ]
    dataset = Dataset.open(stage.root)
    for index, out in excluded.items():
        assert dataset.excluded_rows(index).tolist() == out
    live = [k for p in range(4) for k in ImageShard(dataset, p).keys]
    assert live.count("000012") == 1
    assert "000003" not in live  # row 23 has its bytes and caption, and an older place
    # What a run in which nothing failed stores under each key.
    clean = IngestStage(config, str(tmp_path / "clean" / "images"))
    run(clean)
    assert {k: r["sha256"] for k, r in by_key(stage.root).items()} == {
        k: r["sha256"] for k, r in by_key(clean.root).items()
    }
    site.hits.clear()
    assert again(stage) == manifest  # no row is left to be tried
    assert run(stage) == manifest
    assert not site.hits


def test_accounts_hold_after_three_retries_with_growth_between(site: Site, tmp_path: Path) -> None:
    """Each row counts once, where its fate was decided last; from the stats alone, compared with the rows."""
    rng = np.random.default_rng(1)
    table = tmp_path / "table"
    table.mkdir()
    pages: dict[str, int] = {}

    def grow(number: int, rows: int) -> None:
        urls = [site.url(f"/{number}-{i}.png") for i in range(rows)]
        (table / f"part-{number}.csv").write_text("url,caption\n" + "".join(f"{u},c {u}\n" for u in urls))
        pages.update({f"/{number}-{i}.png": number * 100 + i for i in range(rows)})

    def weather() -> None:
        for path, seed in pages.items():
            status = int(rng.choice([200, 503, 429, 404], p=[0.5, 0.25, 0.15, 0.1]))
            site.add(path, image_bytes(seed) if status == 200 else b"", status)

    stage = IngestStage(make_config(table, fetch={"retries": 0}), str(tmp_path / "run" / "images"))
    grow(0, 21)
    weather()
    run(stage)
    for step in ("transient", "grow", "http_rate_limited", "grow", "transient", "transient"):
        weather()
        if step == "grow":
            grow(len(list(table.iterdir())), 13)
            weather()
            manifest = run(stage)
        else:
            manifest = again(stage, step)
        fates = by_key(stage.root)
        assert manifest["counts"]["rows"] == len(fates) == len(pages)
        assert manifest["errors"] == dict(sorted(Counter(r["error"] for r in fates.values() if r["error"]).items()))
        assert sum(n for name, n in manifest["counts"].items() if name != "rows") == len(pages)
        # No key is stored twice.
        stored = Counter(
            r["key"]
            for s in Dataset.open(stage.root).shards
            for r in pq.read_table(Path(stage.root) / f"{s.name}.parquet").to_pylist()
            if r["status"] == "success"
        )
        assert max(stored.values()) == 1
    assert len([t for t in stage.tasks() if isinstance(t.payload, Retry)]) >= 3


def test_a_line_takes_no_row_that_another_took(tmp_path: Path) -> None:
    """By the arithmetic of the plan: codes of a shard belong to the first line that names both."""
    root = str(tmp_path)
    lines = [plan.Line(i, "f", i, i + 1, 8, bytes(16), "s") for i in range(3)]
    lines += [
        plan.Line(3, "", 0, 0, 2, bytes(16), "", (0, 1), ("timeout",)),
        plan.Line(4, "", 0, 0, 2, bytes(16), "", (1, 2, 3), ("http_rate_limited", "timeout")),
    ]
    plan.write_part(root, 0, lines)
    from ingest.retries import Taken

    taken = Taken()
    retries = plan.read(root).retries()
    assert [line.shard for line in retries] == [3, 4]
    assert taken.open_codes(retries[0]) == ((0, ("timeout",)), (1, ("timeout",)))
    both = ("http_rate_limited", "timeout")
    assert taken.open_codes(retries[1]) == ((1, ("http_rate_limited",)), (2, both), (3, both))


@pytest.mark.parametrize("duplicates", [{}, {"url": False, "bytes": False}])
def test_a_damaged_shard_is_made_anew_without_the_rows_that_retries_took(
    site: Site, tmp_path: Path, duplicates: dict[str, bool]
) -> None:
    """Nothing is stored twice then, and the accounts hold: an older shard, a retry, a retry of a retry, and several."""
    pages = [site.add(f"/{i}.png", image_bytes(i), 503 if i in (1, 2, 5, 9) else 200) for i in range(16)]
    site.add("/6.png", b"no picture")
    table = tmp_path / "table.csv"
    table.write_text("url,caption\n" + "".join(f"{url},caption {i}\n" for i, url in enumerate(pages)))
    stage = IngestStage(
        make_config(table, fetch={"retries": 0}, duplicates=duplicates), str(tmp_path / "run" / "images")
    )
    run(stage)
    for i in (1, 9):
        site.add(f"/{i}.png", image_bytes(i))
    again(stage, "http_server_error,not_an_image")  # shard 2: rows 1 and 9 come
    site.add("/2.png", image_bytes(2))
    manifest = again(stage)  # shard 3, of shard 2: row 2 comes, row 5 does not
    assert manifest["counts"] | {"duplicate": 0} == manifest["counts"]
    assert manifest["counts"]["success"] == 14
    ends = {key: (row["status"], row["error"]) for key, row in by_key(stage.root).items()}
    for damaged in ([0], [1], [2], [3], [0, 1], [2, 3], [1, 3], [0, 2]):
        for index in damaged:
            discard(stage.root, index)
        found = run(stage)
        assert found["counts"] == manifest["counts"], damaged
        assert found["errors"] == manifest["errors"], damaged
        assert {key: (row["status"], row["error"]) for key, row in by_key(stage.root).items()} == ends, damaged


def test_a_retry_that_was_killed_goes_on(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = IngestStage(make_config(table_of(site, tmp_path), fetch={"retries": 0}), str(tmp_path / "run" / "images"))
    run(stage)
    mend(site)
    retrying = dataclasses.replace(stage, retry=RETRYABLE)
    retrying.begin()  # and then it is killed
    parts = plan.read(stage.root).parts
    with caplog.at_level(logging.INFO, "carrara"):
        manifest = run(retrying)
    assert "an earlier --retry goes on" in caplog.text
    assert plan.read(stage.root).parts == parts
    assert manifest["errors"] == {"http_not_found": 1}


def test_a_retry_needs_a_finished_ingest_of_the_same_settings(site: Site, tmp_path: Path) -> None:
    table = table_of(site, tmp_path)
    stage = IngestStage(make_config(table, fetch={"retries": 0}), str(tmp_path / "run" / "images"))
    with pytest.raises(ConfigError, match="run ingest without --retry first"):
        dataclasses.replace(stage, retry=RETRYABLE).begin()
    run(stage)
    other = IngestStage(make_config(table, image_size=16), stage.root, retry=RETRYABLE)
    with pytest.raises(ConfigError, match=r"settings.image_size: 32 -> 16"):
        other.begin()
    with pytest.raises(ConfigError, match="'opted_out'"):
        codes_to_retry("http_forbidden,opted_out")
    assert "connect_timeout" in codes_to_retry("transient")
    assert "http_not_found" not in codes_to_retry("transient")


def test_what_is_taken_down_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    stage = IngestStage(make_config(table_of(site, tmp_path), fetch={"retries": 0}), str(tmp_path / "run" / "images"))
    run(stage)
    mend(site)
    TakenDown.of(urls=[url_digest(site.url("/10.png"))]).create(stage.run)
    site.hits.clear()
    manifest = again(stage)
    assert dict(site.hits) == {"/3.png": 1, "/20.png": 1}
    assert manifest["errors"] == {"http_not_found": 1, "taken_down": 1}
    assert manifest["counts"]["rows"] == 24


def test_rows_of_many_shards_fill_one(site: Site, tmp_path: Path) -> None:
    """Ten shards of 8 with two failures each make three of at most 8 rows, and the plan says which."""
    urls = [site.add(f"/{i}.png", image_bytes(i) if i % 4 else b"", 200 if i % 4 else 503) for i in range(80)]
    pq.write_table(pa.table({"url": urls, "caption": urls}), tmp_path / "t.parquet")
    stage = IngestStage(make_config(tmp_path / "t.parquet", fetch={"retries": 0}), str(tmp_path / "run" / "images"))
    run(stage)
    retrying = dataclasses.replace(stage, retry=RETRYABLE)
    retrying.begin()
    lines = plan.read(stage.root).retries()
    assert [(line.shard, line.rows, line.takes_over) for line in lines] == [
        (10, 8, (0, 1, 2, 3)),
        (11, 8, (4, 5, 6, 7)),
        (12, 4, (8, 9)),
    ]
    assert list(itertools.chain(*(line.takes_over for line in lines))) == list(range(10))
