"""Taking samples out where they lie: every reader of tars gets every living sample byte for byte, and nothing else."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import storage
from shards.blank import blank, blank_columns, comment, redact
from shards.columns import COLUMN_ROW, ColumnShard, column_rows, keep_rows, pack_columns, unpack_columns
from shards.commit import Folder
from shards.dataset import Dataset, read_stats, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, pack_tar
from shards.settings import StageError
from shards.verify import verify_shard
from tests.objects import bucket

Truth = dict[str, dict[str, bytes]]
Extents = dict[str, dict[str, tuple[int, int]]]


def make(count: int, rng: np.random.Generator, most: int = 9000) -> tuple[bytes, Truth, Extents]:
    truth = {
        f"{i:09d}": {
            "jpg": rng.bytes(int(rng.integers(0, most))),
            "json": b'{"url": "http://example.org/%d"}' % i,
            "txt": b"a caption of %d" % i,
        }
        for i in range(count)
    }
    data, extents = pack_tar(truth.items())
    return data, truth, dict(zip(truth, extents, strict=True))


def readers(path: Path, data: bytes, truth: Truth, extents: Extents) -> dict[str, dict[str, bytes]]:
    """name -> bytes of what each reader gets."""
    path.write_bytes(data)
    found = {}
    with tarfile.open(path) as tar:
        found["tarfile"] = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    with open(path, "rb") as f, tarfile.open(fileobj=f, mode="r|*") as tar:
        found["tarfile, as a stream"] = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    pipeline = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    found["webdataset"] = {f"{s['__key__']}.{n}": s[n] for s in pipeline for n in ("jpg", "json", "txt")}
    found["by offset"] = {f"{k}.{n}": data[o : o + s] for k in truth for n, (o, s) in extents[k].items()}
    commands = {"GNU tar": ["tar"], "bsdtar": ["bsdtar"], "busybox": ["busybox", "tar"]}
    for name, command in commands.items():
        if shutil.which(command[0]) is None:
            continue
        into = path.with_name(name)
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        done = subprocess.run([*command, "-xf", str(path), "-C", str(into)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), (name, done.stderr)
        found[name] = {p.name: p.read_bytes() for p in into.iterdir()}
    return found


def test_the_tools_are_here():
    """CI installs them; where they are missing the next test looks by fewer readers."""
    missing = [t for t in ("tar", "bsdtar", "busybox") if shutil.which(t) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt install libarchive-tools busybox)")


def test_every_reader_gets_the_living_and_nothing_of_the_others_in_every_round(tmp_path, rng):
    data, truth, extents = make(150, rng)
    keys = list(truth)
    rounds = [
        {keys[7]},
        {keys[0]},
        {keys[-1]},
        set(keys[20:120]),
        {keys[8], keys[6]},
        set(keys[-5:]),
        set(rng.choice(keys, 30, replace=False)),
        set(keys),
    ]
    now = data
    for gone in rounds:
        now = redact(now, gone)
        for key in gone:
            secret = truth.pop(key, {}).get("jpg", b"")
            assert len(secret) < 64 or secret not in now
        assert len(now) == len(data)
        expected = {f"{k}.{n}": v for k, some in truth.items() for n, v in some.items()}
        for reader, got in readers(tmp_path / "00000.tar", now, truth, extents).items():
            assert got == expected, reader


@given(st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_two_take_downs_give_the_same_in_either_order_and_done_again_change_nothing(one, two):
    data, truth, _ = make(12, np.random.default_rng(1), most=1500)
    keys = list(truth)
    first, second = ({keys[i] for i in part} for part in (one, two))
    assert redact(redact(data, first), second) == redact(redact(data, second), first) == redact(data, first | second)
    done = redact(data, first)
    assert redact(done, first) is done
    assert (done is data) == (not first)


@settings(max_examples=25)
@given(st.one_of(st.integers(2, 40), st.integers(1020, 1035), st.integers(2, 3200)))
def test_a_comment_has_its_length_and_is_passed_over(blocks):
    data = comment(512 * blocks)
    assert len(data) == 512 * blocks
    member, _ = pack_tar([("k", {"txt": b"x"})])
    with tarfile.open(fileobj=io.BytesIO(data + member)) as tar:
        assert [m.name for m in tar if m.name != "."] == ["k.txt"]


@pytest.mark.parametrize("length", [0, 512, 1025])
def test_no_comment_of_another_length(length):
    with pytest.raises(ValueError, match="no comment has"):
        comment(length)


def test_a_reader_with_the_sidecar_of_before_gets_the_others_right(rng):
    data, truth, extents = make(100, rng)
    gone = list(truth)[40]
    now = redact(data, {gone})
    wrong = [k for k in truth for o, s in [extents[k]["jpg"]] if now[o : o + s] != truth[k]["jpg"]]
    assert wrong == [gone]


# ---- a shard -----------------------------------------------------------------------------------------------------


def shard(root: str, rng: np.random.Generator, index: int = 0) -> tuple[Folder, Truth]:
    folder = Folder.begin(root, Fingerprint("ingest", 1, {}), take_over=True)
    data, truth, extents = make(9, rng)
    table = pa.table(
        {
            "key": list(truth),
            "caption": ["c"] * 9,
            "status": ["success"] * 9,
            "image_offset": [p["jpg"][0] for p in extents.values()],
            "image_size": [p["jpg"][1] for p in extents.values()],
        }
    )
    folder.commit(index, {".tar": data, ".parquet": parquet(table)}, {"rows": 9, "count": 9, "status": {"success": 9}})
    return folder, truth


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def out(rows: list[int]):
    """An edit as take-down has it: statuses by the sidecar, counts from the sidecar."""

    def edit(table: pa.Table, stats: dict) -> tuple[pa.Table, dict]:
        status = table["status"].to_pylist()
        for row in rows:
            status[row] = "opted_out"
        table = table.set_column(table.column_names.index("status"), "status", pa.array(status))
        counts = {s: status.count(s) for s in sorted(set(status))}
        return table, stats | {"count": counts.get("success", 0), "status": counts, "list": 1}

    return edit


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_committed_shard_loses_its_samples_and_keeps_its_birth(tmp_path, rng, where):
    if where == "s3":
        with bucket() as url:
            _blanked(f"{url}/run/images", rng)
    else:
        _blanked(str(tmp_path / "images"), rng)


def _blanked(root: str, rng: np.random.Generator) -> None:
    folder, truth = shard(root, rng)
    before = read_stats(root, 0) or {}
    stats = blank(root, 0, [2, 5], out([2, 5]))
    assert stats == read_stats(root, 0)
    assert (stats["born"], stats["count"], stats["status"]) == (before["born"], 7, {"opted_out": 2, "success": 7})
    assert stats["files"][".tar"]["size"] == before["files"][".tar"]["size"]
    assert stats["files"][".tar"]["sha256"] != before["files"][".tar"]["sha256"]
    assert verify_shard(root, 0) == ""
    write_manifest(root, "images", [stats])
    images = ImageShard(Dataset.open(root), 0)
    keys = [k for i, k in enumerate(truth) if i not in (2, 5)]
    assert images.keys == keys
    assert [images.image_bytes(i) for i in range(7)] == [truth[k]["jpg"] for k in keys]
    assert blank(root, 0, [2, 5], out([2, 5])) == stats, "done again it changes nothing"
    # A late writer of this shard, with the pictures that went: it is told what lies there, and brings nothing back.
    data, *_ = make(9, np.random.default_rng(7))
    assert folder.commit(0, {".tar": data, ".parquet": b"p"}, {"rows": 9, "count": 9}) == stats
    assert verify_shard(root, 0) == ""


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_killed_between_the_files_it_is_done_again_and_ends_the_same(tmp_path, rng, monkeypatch, dies_at):
    whole, torn = str(tmp_path / "whole"), str(tmp_path / "torn")
    shard(whole, np.random.default_rng(3))
    shard(torn, np.random.default_rng(3))
    expected = blank(whole, 0, [1], out([1]))
    real, calls = storage.replace, []

    def dying(*args, **more):
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **more)

    monkeypatch.setattr(storage, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        blank(torn, 0, [1], out([1]))
    monkeypatch.undo()
    table = Dataset(torn, {"kind": "images", "fingerprint": "", "shards": []}).sidecar(0)
    assert table["status"].to_pylist()[1] == "success", "the sidecar says that it is still to be done"
    found = blank(torn, 0, [1], out([1]))
    for own in ("made_with", "made_by"):
        assert found.pop(own) != expected.pop(own)
    assert found == expected
    for name in ("00000.tar", "00000.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "torn" / name).read_bytes()


def test_a_tar_that_another_take_down_changed_meanwhile_is_noticed(tmp_path, rng, monkeypatch):
    root = str(tmp_path / "images")
    shard(root, rng)
    real = storage.replace

    def and_another(url, data, seen=None, beside=None):
        real(url, data, seen, beside)
        if url.endswith(".tar"):
            real(url, redact(data, {"000000007"}), None, beside)

    monkeypatch.setattr(storage, "replace", and_another)
    with pytest.raises(StageError, match="changed by somebody else"):
        blank(root, 0, [1], out([1]))


def test_on_a_store_two_take_downs_at_one_moment_exclude_each_other(rng, monkeypatch):
    with bucket() as url:
        root = f"{url}/run/images"
        shard(root, rng)
        real = storage.replace

        def late(target, data, seen=None, beside=None):
            monkeypatch.undo()
            blank(root, 0, [4], out([4]))
            real(target, data, seen, beside)

        monkeypatch.setattr(storage, "replace", late)
        with pytest.raises(StageError, match="changed by somebody else"):
            blank(root, 0, [1], out([1]))
        stats = blank(root, 0, [1], out([1, 4]))
        assert stats["count"] == 7
        assert verify_shard(root, 0) == ""


def test_a_shard_that_is_not_committed_is_refused(tmp_path):
    root = str(tmp_path / "images")
    with pytest.raises((StageError, FileNotFoundError)):
        blank(root, 0, [0], out([0]))


# ---- columns -----------------------------------------------------------------------------------------------------


def columns(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    bucket_of = rng.integers(0, 2, (n, 1)).astype(np.uint16)
    arrays = {
        "tokens": rng.integers(1, 99, (n, 5)).astype(np.uint16),
        "micro": rng.integers(1, 99, (n, 1, 6)).astype(np.int32),
        "bucket": bucket_of,
        "embedding_index": rng.integers(0, 3, n).astype(np.int32),
        "embeddings": rng.standard_normal((3, 5, 4)).astype(np.float16) + 9,
        "empty_embedding": np.ones((5, 4), np.float16),
    }
    for b in range(2):
        arrays[f"mean.{b}"] = rng.standard_normal((int((bucket_of == b).sum()), 4, 2, 2)).astype(np.float16) + 9
    return arrays


@given(st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)), st.integers(0, 99))
def test_blanked_columns_keep_the_living_and_their_places(one, two, seed):
    arrays = columns(9, np.random.default_rng(seed))
    data = pack_columns(arrays, {"vae": "x"})
    now = data
    for gone, known in ((one, one), (two, one | two)):
        living = np.array(sorted(set(range(9)) - known), np.int64)
        now = blank_columns(now, np.array(sorted(gone), np.int64), living)
    assert len(now) == len(data)
    found, _ = unpack_columns(now)
    out_of_it = np.array(sorted(one | two), np.int64)
    living = np.array(sorted(set(range(9)) - one - two), np.int64)
    kept, expected = keep_rows(found, living, 9), keep_rows(arrays, living, 9)
    assert kept.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(kept[name], expected[name], err_msg=name)
    assert not found["tokens"][out_of_it].any()
    assert not found["micro"][out_of_it].any()
    for b in range(2):
        members = np.flatnonzero((arrays["bucket"] == b).any(axis=1))
        zeros = np.isin(members, out_of_it)
        assert not found[f"mean.{b}"][zeros].any()
        assert found[f"mean.{b}"][~zeros].all()
    used = set(arrays["embedding_index"][living].tolist())
    for i in range(3):
        orphan = i not in used and i in arrays["embedding_index"]
        assert found["embeddings"][i].any() != orphan
    assert (now is data) == (not one and not two)


def test_a_latent_shard_is_blanked_and_read_by_place_also_after_a_second_time(tmp_path, rng):
    root = str(tmp_path / "latents")
    folder = Folder.begin(root, Fingerprint("latents", 1, {}), ".safetensors", take_over=True)
    arrays, status = columns(6, rng), ["success"] * 3 + ["failed_to_download"] + ["success"] * 3
    table = pa.table({"key": [f"k{i}" for i in range(7)], "status": status, "error": [None] * 7})
    files = {".safetensors": pack_columns(arrays, {}), ".parquet": parquet(table)}
    stats = folder.commit(0, files, {"rows": 7, "count": 6})
    assert column_rows(table).tolist() == [0, 1, 2, -1, 3, 4, 5]
    for rows, left in (([1, 3], [0, 2, 4, 5, 6]), ([5], [0, 2, 4, 6])):
        stats = blank(root, 0, rows, out(rows))
        assert verify_shard(root, 0) == ""
        write_manifest(root, "latents", [stats])
        shard = ColumnShard(Dataset.open(root), 0)
        assert shard.keys == [f"k{i}" for i in left]
        extents = [{0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 6: 5}[i] for i in left]
        np.testing.assert_array_equal(shard.arrays["tokens"], arrays["tokens"][extents])
        assert shard.table[COLUMN_ROW].to_pylist() == [0, 1, 2, None, 3, 4, 5]
    assert stats["count"] == 4
