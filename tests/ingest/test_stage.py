"""The stage as a whole: the funnel, img2dataset's own output, equal bytes, an edited table, kill -9."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import stat
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml

from demo import corpus as demo_corpus
from demo import scenes as demo_scenes
from demo import server as demo_server
from ingest.config import IngestConfig
from ingest.errors import RETRYABLE
from ingest.stage import IngestStage
from latents.source import texts_in
from shards import storage
from shards.dataset import Dataset, read_stats
from shards.exclusions import shard_row
from shards.images import ImageShard, decode_rgb
from shards.layout import sample_key
from shards.settings import ConfigError, StageError
from tests.ingest.conftest import PRELOAD, make_config, run
from tests.ingest.site import Site, image_bytes
from tests.objects import bucket


def dirty_table(site: Site, folder: Path, good: int = 30) -> Path:
    """`good` plain rows and one of every kind that must not end as a sample."""
    rows: list[tuple[str | None, str | None, float]] = []
    for i in range(good):
        rows.append((site.add(f"/{i}.png", image_bytes(i)), f"picture number {i}", 0.3))
    rows.insert(3, (site.url("/gone.png"), "a dead link", 0.3))
    rows.insert(5, (site.add("/page.html", b"<html>no picture</html>"), "a page", 0.3))
    rows.insert(7, (site.url("/0.png"), "picture number 0", 0.3))
    rows.insert(9, (site.add("/copy.png", image_bytes(1)), "picture number 1", 0.3))
    rows.insert(11, (site.add("/other.png", image_bytes(2)), "another caption of picture 2", 0.3))
    rows.insert(13, (site.add("/no.png", image_bytes(100), X_Robots_Tag="noai"), "opted out", 0.3))
    rows.insert(15, (site.url("/0.png"), "too dissimilar", 0.1))
    rows.insert(17, (site.add("/cut.png", image_bytes(101)[:-200]), "cut off", 0.3))
    rows.insert(19, (None, "no url", 0.3))
    rows.insert(21, (site.url("/1.png"), " \t ", 0.3))
    rows.insert(23, ("file:///etc/passwd", "not http", 0.3))
    urls, texts, similarity = zip(*rows, strict=True)
    table = folder / "table.parquet"
    pq.write_table(pa.table({"URL": urls, "TEXT": texts, "similarity": similarity}), table, row_group_size=11)
    return table


FILTERS = [{"column": "SIMILARITY", "min": 0.28}]


def test_every_row_comes_to_exactly_one_end(site: Site, tmp_path: Path) -> None:
    table = dirty_table(site, tmp_path)
    manifest = run(IngestStage(make_config(table, filters=FILTERS), str(tmp_path / "images")))
    assert manifest["counts"] == {
        "rows": 41,
        "success": 31,  # 30 and the second caption of picture 2
        "failed_to_download": 3,
        "failed_to_resize": 2,
        "filtered": 2,
        "duplicate": 2,
        "opted_out": 1,
    }
    assert manifest["errors"] == {
        "http_not_found": 1,
        "image_truncated": 1,
        "not_an_image": 1,
        "scheme_refused": 1,
        "url_missing": 1,
        "x_robots_tag": 1,
    }
    assert manifest["filtered_by"] == {"no caption": 1, "SIMILARITY >= 0.28": 1}
    assert manifest["duplicates_by"] == {"duplicate_bytes": 1, "duplicate_url": 1}
    assert manifest["count"] == 31
    assert site.hits["/gone.png"] == 1  # not found is final
    assert site.hits["/0.png"] == 2  # for itself and its duplicate; the filtered row was never asked for

    dataset = Dataset.open(str(tmp_path / "images"))
    live = [c for p in range(len(dataset.shards)) for c in ImageShard(dataset, p).captions]
    expected = [f"picture number {i}" for i in range(30)]
    assert sorted(live) == sorted([*expected, "another caption of picture 2"])
    exclusions = pq.read_table(tmp_path / "images" / manifest["exclusions"]).to_pylist()
    assert len(exclusions) == 2
    sidecar = pa.concat_tables(dataset.sidecar(s.index) for s in dataset.shards).to_pylist()
    by_key = {r["key"]: r for r in sidecar}
    for row in exclusions:
        shard, place = shard_row(row["winner"])
        loser = by_key[sample_key(row["shard"], row["row"], 8)]
        winner = by_key[sample_key(shard, place, 8)]
        assert (shard, place) < (row["shard"], row["row"])
        assert loser["caption"] == winner["caption"]
        same = "url" if row["reason"] == "duplicate_url" else "sha256"
        assert loser[same] == winner[same]
    # The sidecar's rows are the table's rows, in order.
    source = pq.read_table(table)
    assert [r["url"] for r in sidecar] == source["URL"].to_pylist()
    assert [r["caption_raw"] for r in sidecar] == source["TEXT"].to_pylist()


def test_sidecar_offsets_and_tar_members_tell_the_same(site: Site, tmp_path: Path) -> None:
    table = dirty_table(site, tmp_path)
    config = make_config(table, keep_columns=["similarity"])
    run(IngestStage(config, str(tmp_path / "images")))
    rows = pq.read_table(tmp_path / "images" / "00000.parquet").to_pylist()
    data = (tmp_path / "images" / "00000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    live = [r for r in rows if r["status"] == "success"]
    assert set(members) == {f"{r['key']}.{e}" for r in live for e in ("png", "txt", "json")}
    for r in live:
        assert data[r["image_offset"] : r["image_offset"] + r["image_size"]] == members[r["key"] + ".png"]
        assert members[r["key"] + ".txt"].decode() == r["caption"]
        meta = json.loads(members[r["key"] + ".json"])
        assert {k: r[k] for k in meta} == meta
        assert members[r["key"] + ".json"] == json.dumps(meta, indent=4).encode()  # as img2dataset writes it
        assert meta["similarity"] == 0.3


def test_equals_img2dataset_on_plain_pictures(site: Site, tmp_path: Path) -> None:
    img2dataset_reader, img2dataset_resizer, img2dataset_downloader, img2dataset_writer = (
        pytest.importorskip(f"img2dataset.{m}", exc_type=ImportError)
        for m in ("reader", "resizer", "downloader", "writer")
    )
    rows = []
    for i in range(23):
        side = (32, 32) if i % 2 else (32 + i, 32)
        body = image_bytes(i, *side)
        rows.append((site.add(f"/{i}.png", body), f'a caption, with é and "{i}"', i))
    rows[4] = (site.url("/dead.png"), "dead", 4)
    rows[9] = (site.add("/9.html", b"<html></html>"), "page", 9)
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as f:
        csv.writer(f).writerows([("url", "caption", "score"), *rows])
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    (theirs / "_tmp").mkdir(parents=True)
    # What its download() builds, without the processes around it.
    reader = img2dataset_reader.Reader(
        str(table), "csv", "url", "caption", None, None, ["score"], 10, set(), str(theirs / "_tmp")
    )
    resizer = img2dataset_resizer.Resizer(32, "center_crop", False, encode_format="png", encode_quality=6)
    download = img2dataset_downloader.Downloader(
        img2dataset_writer.WebDatasetSampleWriter,
        resizer,
        4,
        True,
        True,
        str(theirs),
        reader.column_list,
        10,
        10,
        5,
        "sha256",
        None,
        "png",
        0,
        None,
        None,
    )
    assert all(download(shard)[0] for shard in reader)
    run(IngestStage(make_config(table, samples_per_shard=10, keep_columns=["score"]), str(ours)))

    names = sorted(p.name for p in theirs.iterdir() if p.name[0].isdigit())
    assert names == sorted(p.name for p in ours.iterdir() if p.name[0].isdigit())
    for shard in ("00000", "00001", "00002"):
        a = pq.read_table(theirs / f"{shard}.parquet").sort_by("key")
        b = pq.read_table(ours / f"{shard}.parquet")
        assert set(a.column_names) <= set(b.column_names)
        b_shared = b.select(a.column_names)
        assert b_shared.schema.remove_metadata().equals(a.schema.remove_metadata())
        for x, y in zip(a.to_pylist(), b_shared.to_pylist(), strict=True):
            message_x, message_y = x.pop("error_message"), y.pop("error_message")
            assert (message_x is None) == (message_y is None)
            if x["status"] == "failed_to_resize":
                assert x.pop("sha256") is None
                assert len(y.pop("sha256")) == 64  # kept here, so that a bad file can be found again
            assert x == y
        stats_a, stats_b = (json.loads((d / f"{shard}_stats.json").read_text()) for d in (theirs, ours))
        for name in ("successes", "failed_to_download", "failed_to_resize"):
            assert stats_a[name] == stats_b[name]
        assert stats_a["count"] == stats_b["rows"]
        with_webdataset = [
            {s["__key__"]: s for s in webdataset.WebDataset(f"{d}/{shard}.tar", shardshuffle=False)}
            for d in (theirs, ours)
        ]
        assert with_webdataset[0].keys() == with_webdataset[1].keys()
        for key, sample in with_webdataset[0].items():
            other = with_webdataset[1][key]
            assert set(sample) - {"__url__", "__local_path__"} == set(other) - {"__url__", "__local_path__"}
            assert sample["txt"] == other["txt"]
            assert json.loads(sample["json"]) == json.loads(other["json"])
            assert decode_rgb(sample["png"]).tolist() == decode_rgb(other["png"]).tolist()


def test_the_demos_corpus_gives_the_funnel_that_was_planted(tmp_path: Path) -> None:
    corpus = demo_corpus.draw_corpus(tmp_path / "corpus", "http://127.0.0.1:8123", 60, 8, progress=False)
    with open(Path(__file__).parents[2] / "configs" / "demo.yaml", encoding="utf-8") as f:
        settings = yaml.safe_load(f)["ingest"]
    with demo_server.serve(tmp_path / "corpus") as server:
        for name in ("table", "heldout_table"):
            table = pq.read_table(getattr(corpus, name))
            urls = pc.replace_substring(table["URL"], "http://127.0.0.1:8123", server.url)
            pq.write_table(table.set_column(0, "URL", urls), tmp_path / f"{name}.parquet")
            settings[name] = str(tmp_path / f"{name}.parquet")
        settings["fetch"] |= {"backoff": 0.01}
        config = IngestConfig.model_validate(settings)
        manifest = run(IngestStage(config, str(tmp_path / "images")))
        heldout = run(IngestStage(config, str(tmp_path / "heldout"), "heldout"))
    (shard,) = [pq.read_table(f) for f in sorted((tmp_path / "images").glob("0*.parquet"))]
    good = [row for row in shard.select(["caption", "WRONG", "status"]).to_pylist() if row["status"] == "success"]
    # What is false of an image, in its caption's own words, comes along.
    wrong = [texts_in(row["WRONG"]) for row in good]
    assert wrong == [demo_scenes.exchanged(row["caption"]) for row in good]
    assert any(wrong)
    expected = corpus.expected
    counts = {name: n for name, n in manifest["counts"].items() if n}
    assert counts == {"rows": expected["rows"], **expected["status"]}
    assert manifest["errors"] == expected["errors"]
    assert manifest["duplicates_by"] == expected["duplicates_by"]
    by_column = {label.removeprefix("no ").split()[0].lower(): n for label, n in manifest["filtered_by"].items()}
    assert by_column == expected["filtered_by"]
    assert heldout["counts"]["success"] == 8


def test_bytes_do_not_depend_on_order_or_concurrency(site: Site, tmp_path: Path) -> None:
    table = dirty_table(site, tmp_path, good=40)
    a = IngestStage(make_config(table), str(tmp_path / "a"))
    b = IngestStage(
        make_config(table, decode_threads=3, fetch={"concurrency": 1, "host_concurrency": 1}), str(tmp_path / "b")
    )
    a.begin()
    shards = len(list(a.tasks()))
    first, second = run(a), run(b, order=list(np.random.default_rng(0).permutation(shards)))
    assert first == second
    for path in (tmp_path / "a").iterdir():
        if path.suffix in (".tar", ".parquet"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_shard_without_any_success_is_committed(site: Site, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    good = site.add("/a.png", image_bytes(0))
    table.write_text("url,caption\n" + f"{site.url('/none')},x\n" * 8 + f"{good},y\n")
    stage = IngestStage(make_config(table), str(tmp_path / "images"))
    manifest = run(stage)
    assert [s["count"] for s in manifest["shards"]] == [0, 1]
    assert all(read_stats(stage.root, t.index) for t in stage.tasks())
    lost = tmp_path / "lost.csv"
    lost.write_text(f"url,caption\n{site.add('/down', b'', 503)},x\n{good},y\n")
    run(IngestStage(make_config(lost, fetch={"retries": 3}), str(tmp_path / "lost")))
    assert (read_stats(str(tmp_path / "lost"), 0) or {})["retries"] == 3 == site.hits["/down"] - 1
    table.write_text("url,caption\n" + f"{site.url('/none')},x\n")
    with pytest.raises(StageError, match=r"none of 1 rows gave an image .*http_not_found"):
        run(IngestStage(make_config(table), str(tmp_path / "none")))


def test_an_edited_table_and_changed_settings_are_refused(site: Site, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    lines = [f"{site.add(f'/{i}.png', image_bytes(i))},caption {i}" for i in range(20)]
    table.write_text("\n".join(["url,caption", *lines]))
    stage = IngestStage(make_config(table), str(tmp_path / "images"))
    run(stage)
    assert stage.is_current()
    before = {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir() if p.is_file()}
    site.hits.clear()
    edited = [line.replace("caption 9", "caption IX") for line in lines]
    table.write_text("\n".join(["url,caption", *edited]))
    assert not stage.is_current()
    with pytest.raises(ConfigError, match=r"1 of its 3 shards \(00001 to 00001, 8 images\) were made of other rows"):
        stage.begin()
    assert {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir() if p.is_file()} == before
    table.write_text("\n".join(["url,caption", *lines]))
    other = IngestStage(make_config(table, image_size=16), stage.root)
    with pytest.raises(ConfigError, match=r"settings.image_size: 32 -> 16"):
        other.begin()
    faster = IngestStage(make_config(table, decode_threads=2, fetch={"timeout": 99.0}), stage.root)
    run(faster)
    assert not site.hits
    # What changed is taken anew behind all others: what is there twice is a duplicate, what is new comes in.
    table.write_text("\n".join(["url,caption", *edited]))
    manifest = run(IngestStage(make_config(table), stage.root, add_changed=True))
    assert manifest["counts"] | {"rows": 28, "success": 21, "duplicate": 7} == manifest["counts"]


@pytest.mark.parametrize(
    "settings", [{"keep_columns": ["score"]}, {"heldout_fraction": 0.3, "keep_columns": ["score"]}]
)
def test_a_file_that_sorts_first_changes_no_types_of_what_was_planned(
    site: Site, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def write(name: str, first: int, count: int, kind: pa.DataType) -> None:
        numbers = range(first, first + count)
        urls = [site.add(f"/{n}.png", image_bytes(n)) for n in numbers]
        table = pa.table({"url": urls, "caption": [f"c {n}" for n in numbers], "score": pa.array(numbers, kind)})
        pq.write_table(table, tmp_path / "table" / name)

    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "0-empty.csv").write_text("url,caption,score\n")  # all of it would be text
    write("b.parquet", 0, 40, pa.int64())
    stage = IngestStage(make_config(tmp_path / "table", **settings), str(tmp_path / "run" / "images"))
    stages = (
        [stage]
        if len(settings) == 1
        else [stage, dataclasses.replace(stage, root=str(tmp_path / "run" / "heldout"), split="heldout")]
    )
    stage.begin()
    worker = stage.worker()
    worker(next(iter(stage.tasks())))
    worker.close()
    write("0-early.parquet", 40, 8, pa.int32())  # before the empty one, of which the types are
    counts = [run(s)["counts"] for s in stages]
    assert sum(c["rows"] for c in counts) == sum(c["success"] for c in counts) == 48
    assert {type(v) for v in Dataset.open(stage.root).sidecar(0)["score"].to_pylist()} == {str}


def test_a_table_that_changes_while_a_shard_is_made_is_seen(site: Site, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    lines = [f"{site.add(f'/{i}.png', image_bytes(i))},caption {i}" for i in range(20)]
    table.write_text("\n".join(["url,caption", *lines]))
    stage = IngestStage(make_config(table), str(tmp_path / "images"))
    stage.begin()
    worker, tasks = stage.worker(), list(stage.tasks())
    table.write_text("\n".join(["url,caption", *lines[1:], lines[0]]))
    with pytest.raises(StageError, match="changed while it was being read"):
        worker(tasks[1])
    worker.close()


def test_a_list_of_urls_is_a_table_without_captions(site: Site, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(site.add(f"/{i}.png", image_bytes(i)) + "\n" for i in range(3)))
    with pytest.raises(ConfigError, match="empty_captions to keep"):
        IngestStage(make_config(tmp_path / "list.txt"), "").check()
    stage = IngestStage(make_config(tmp_path / "list.txt", empty_captions="keep"), str(tmp_path / "images"))
    assert run(stage)["counts"]["success"] == 3
    rows = pq.read_table(tmp_path / "images" / "00000.parquet").to_pylist()
    assert [(r["caption"], r["caption_raw"]) for r in rows] == [("", None)] * 3


def test_kept_columns_never_share_a_name(site: Site, tmp_path: Path) -> None:
    rows = {
        "url": [site.add("/a.png", image_bytes(0))],
        "caption": ["a"],
        "width": [1],
        "source_width": [2],
        "key": ["k"],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="'width' is kept as 'source_width'"):
        IngestStage(make_config(tmp_path / "t.parquet", keep_columns=["width", "source_width"]), "").check()
    stage = IngestStage(make_config(tmp_path / "t.parquet", keep_columns=["WIDTH", "key"]), str(tmp_path / "images"))
    run(stage)
    (row,) = pq.read_table(tmp_path / "images" / "00000.parquet").to_pylist()
    assert (row["source_width"], row["source_key"], row["width"], row["key"]) == (1, "k", 32, "000000")


def test_accounts_that_do_not_hold_are_an_error(site: Site, tmp_path: Path) -> None:
    table = dirty_table(site, tmp_path)
    stage = IngestStage(make_config(table), str(tmp_path / "images"))
    run(stage, finish=False)
    stats: list[dict[str, Any]] = [read_stats(stage.root, t.index) or {} for t in stage.tasks()]
    with pytest.raises(StageError, match="1 shards of the plan are not committed"):
        stage.finish(stats[:-1])
    with pytest.raises(StageError, match="shard 00002 holds 7 rows where the plan has 8"):
        stage.finish([{**s, "rows": 7} if s["shard"] == 2 else s for s in stats])
    wrong = [{**s, "success": s["success"] + 1, "count": s["count"] + 1} if s["shard"] == 2 else s for s in stats]
    with pytest.raises(StageError, match="the sidecars count"):
        stage.finish(wrong)
    assert stage.finish(stats)["counts"]["rows"] == 41


def test_heldout_fraction_splits_by_caption(site: Site, tmp_path: Path) -> None:
    urls = [site.add(f"/{i}.png", image_bytes(i)) for i in range(5)]
    rows = [(urls[i % 5], f" a  caption {i % 60}" if i % 2 else f"A caption {i % 60}") for i in range(240)]
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"url": [r[0] for r in rows], "caption": [r[1] for r in rows]}), table)
    config = make_config(table, heldout_fraction=0.25)
    parts = {}
    for split in ("train", "heldout"):
        stage = IngestStage(config, str(tmp_path / split), split, seed=3)
        parts[split] = run(stage)["counts"]["rows"]
    assert sum(parts.values()) == 240
    assert 0 < parts["heldout"] < parts["train"]
    captions = {
        split: {
            c.casefold()
            for s in Dataset.open(str(tmp_path / split)).shards
            for c in pq.read_table(tmp_path / split / f"{s.name}.parquet")["caption"].to_pylist()
        }
        for split in parts
    }
    assert not captions["train"] & captions["heldout"]
    assert len(captions["train"] | captions["heldout"]) == 60
    with pytest.raises(ConfigError, match="there is no held-out split"):
        IngestStage(make_config(table), str(tmp_path / "x"), "heldout").check()


def test_a_run_keeps_the_hash_that_it_was_begun_with(tmp_path: Path) -> None:
    """Also where the process was killed before the second of its folders was begun."""
    pq.write_table(pa.table({"url": list("abcdefgh"), "caption": list("abcdefgh")}), tmp_path / "t.parquet")
    stage = IngestStage(make_config(tmp_path / "t.parquet", heldout_fraction=0.5), str(tmp_path / "run" / "images"))
    heldout = dataclasses.replace(stage, root=str(tmp_path / "run" / "heldout"), split="heldout")
    stage.begin()
    both = (stage, heldout)
    assert [hash_of(one) for one in both] == ["polynomial"] * 2
    facts = json.loads(Path(stage.root, "made_with.json").read_text())
    assert facts["settings"]["split"].pop("hash") == "polynomial"
    Path(stage.root, "made_with.json").write_text(json.dumps(facts))  # as before there was another hash
    shutil.rmtree(heldout.root)
    assert [hash_of(one) for one in both] == ["blake2b"] * 2
    stage.begin()
    assert [json.loads(Path(s.root, "made_with.json").read_text())["settings"]["split"].get("hash") for s in both] == [
        None,
        None,
    ]


def hash_of(stage: IngestStage) -> str:
    rule = stage.heldout_rule(stage.layout())
    assert rule is not None
    assert rule.hash == stage.made_with().settings["split"].get("hash", "blake2b")
    return rule.hash


def child(config: str, root: str, first: Any) -> None:
    """What a run's process does: every shard that is not there yet, then the finish. `first` is set after one."""
    stage = IngestStage(IngestConfig.model_validate_json(config), root)
    stage.begin()
    worker = stage.worker()
    for task in stage.tasks():
        if read_stats(stage.root, task.index) is None:
            worker(task)
            first.set()
    stage.finish(read_stats(stage.root, t.index) or {} for t in stage.tasks())
    worker.close()


def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(site: Site, tmp_path: Path) -> None:
    table = dirty_table(site, tmp_path)
    config = make_config(table)
    run(IngestStage(config, str(tmp_path / "clean")))
    clean = {p.name: p.read_bytes() for p in (tmp_path / "clean").iterdir() if p.suffix in (".tar", ".parquet")}
    assert len(clean) == 2 * 6 + 1
    manifest = json.loads((tmp_path / "clean" / "dataset.json").read_text())
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)

    def start(root: Path) -> tuple[Any, Any]:
        first = processes.Event()
        process = processes.Process(target=child, args=(config.model_dump_json(by_alias=True), str(root), first))
        process.start()
        return process, first

    root = tmp_path / "killed"
    process, first = start(root)
    assert first.wait(60)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (root / "dataset.json").exists()
    again, _ = start(root)
    again.join(60)
    assert again.exitcode == 0
    for name, data in clean.items():
        assert (root / name).read_bytes() == data, name
    again_manifest = json.loads((root / "dataset.json").read_text())
    assert again_manifest == manifest


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails once, one after another, as on a disk that fills up at just that moment."""
    table = dirty_table(site, tmp_path, good=5)
    whole = IngestStage(make_config(table), str(tmp_path / "whole"))
    run(whole)
    stage = IngestStage(make_config(table), str(tmp_path / "images"))
    stage.begin()
    tasks, worker = list(stage.tasks()), stage.worker()
    real = os.fsync
    until_full = 0  # files that can still be written, the last of them no more; 0: all, -1: none

    def fsync(fd: int) -> None:
        nonlocal until_full
        if until_full and stat.S_ISREG(os.fstat(fd).st_mode):
            until_full = max(1, until_full - 1) if until_full > 1 else -1
            if until_full == -1:  # and stays full while the commit is tried again
                raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("shards.stage.PERSIST_PAUSES_S", (0.0,))
    for task in tasks:
        for until_full in (1, 2, 3):  # noqa: B007  # tar, parquet, stats
            with pytest.raises(StageError, match="the disk is full; free some space and run the same command again"):
                worker(task)
            assert read_stats(stage.root, task.index) is None
        until_full = 0
        worker(task)
    worker.close()
    stage.finish(read_stats(stage.root, t.index) or {} for t in tasks)
    for path in (tmp_path / "whole").iterdir():
        if path.suffix in (".tar", ".parquet"):
            assert path.read_bytes() == (tmp_path / "images" / path.name).read_bytes()
    assert not [p.name for p in (tmp_path / "images").iterdir() if ".tmp-" in p.name]


def test_a_dataset_on_s3_is_the_same(site: Site, tmp_path: Path) -> None:
    """The table, the shards, a retry and a take-down on an object store (moto): the bytes of a local run."""
    from ingest.takedown import TakenDown, url_digest

    with bucket() as objects:
        table = dirty_table(site, tmp_path, good=12)
        remote = f"{objects}/tables/table.parquet"
        storage.write_atomic(remote, table.read_bytes())
        site.add("/3.png", b"", 503)
        for root, source in ((str(tmp_path / "run" / "images"), str(table)), (f"{objects}/run/images", remote)):
            site.add("/3.png", b"", 503)
            stage = IngestStage(make_config(source, fetch={"retries": 0}), root)
            run(stage)
            site.add("/3.png", image_bytes(3))
            manifest = run(dataclasses.replace(stage, retry=RETRYABLE))
            assert manifest["shards"][-1]["rows"] == 1
            TakenDown.of(urls=[url_digest(site.url("/5.png"))]).create(stage.run)
            assert not stage.is_current()
            assert run(stage)["counts"]["opted_out"] == 2
            assert stage.is_current()
        for path in (tmp_path / "run" / "images").iterdir():
            if path.suffix in (".tar", ".parquet"):
                assert storage.read_bytes(f"{objects}/run/images/{path.name}") == path.read_bytes(), path.name
        here, there = Dataset.open(str(tmp_path / "run" / "images")), Dataset.open(f"{objects}/run/images")
        assert here.manifest == there.manifest


def test_what_the_table_says_wrongly_is_counted(site: Site, tmp_path: Path) -> None:
    url = site.add("/a.png", image_bytes(0, 48, 40))
    rows = [
        (url, "right", 48, 40, 0.3),
        (url, "swapped", 40, 48, 0.3),
        (url, "swapped too", 40, 48, -1.0),
        (url, "another size", 50, 40, 1.0),
        (url, "no size", None, 40, None),
        (url, "impossible", 48, 40, 6016.0),
        (url, " ", 48, 40, 0.5),
    ]
    names = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    filters = [
        {"column": "similarity", "min": -1, "missing": "keep"},
        {"column": "WIDTH", "min": 41, "missing": "keep"},
    ]

    def funnel(name: str, **settings: Any) -> dict[str, Any]:
        return run(IngestStage(make_config(tmp_path / "table.parquet", **settings), str(tmp_path / name)))

    plain = funnel("plain")
    assert plain["checks"] == {"size_as_said": 2, "size_swapped": 2, "size_other": 1}
    assert plain["counts"]["filtered"] == 1
    filtered = funnel("filtered", filters=filters)
    assert filtered["filtered_by"] == {"no caption": 1, "similarity >= -1": 0, "WIDTH >= 41": 2}
    assert filtered["checks"]["similarity_out_of_range"] == 1
    swapped = funnel("swapped", filters=filters, swapped_sizes=True)
    assert swapped["filtered_by"]["WIDTH >= 41"] == 4  # whose height is 40
    assert swapped["checks"]["size_as_said"] == 2
    kept = funnel("kept", empty_captions="keep")
    assert kept["counts"]["success"] == 7
    assert "filtered_by" in kept
    assert kept["counts"]["filtered"] == 0
