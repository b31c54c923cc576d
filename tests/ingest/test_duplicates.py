"""Duplicates by the definition, in bounded memory; what was excluded stays so under growth, retries and take-downs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import digests
from ingest.config import DuplicatesConfig
from ingest.duplicates import Found, Sidecars, find_duplicates
from shards.exclusions import Exclusions, shard_row, write_exclusions
from shards.layout import sample_key, shard_name
from shards.listing import STATS, listed

Row = dict[str, Any]
TEXTS = ("status", "error", "url", "sha256", "caption", "phash")


def sha(text: str) -> str:
    return digests.digest(text)


def write(folder: Path, index: int, rows: list[Row], old: bool = False) -> None:
    """A sidecar; one of an earlier version has no digests."""
    columns = {n: pa.array([r.get(n) for r in rows], pa.string()) for n in TEXTS}
    table = pa.table(columns)
    if not old:
        table = digests.with_digests(table)
    pq.write_table(table, folder / f"{index:05d}.parquet")


def find(folder: Path, shards: int, old: bool = False, **how: Any) -> tuple[list[Row], Found]:
    tables: list[pa.Table] = []
    sidecars = Sidecars(str(folder), lambda: ((i, not old) for i in range(shards)))
    found = find_duplicates(sidecars, lambda ts: tables.extend(ts), memory="100MB", **how)
    rows = [r for t in tables for r in t.to_pylist()]
    assert Counter(r["reason"] for r in rows) == found.reasons
    return rows, found


def live(url: str, sha256: str, caption: str, **more: Any) -> Row:
    return {"status": "success", "url": f"http://a/{url}", "sha256": sha(sha256), "caption": caption, **more}


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from("12"), st.sampled_from("++-t")),
    max_size=24,
)


@settings(max_examples=25, deadline=None)
@given(ROWS, st.booleans())
def test_duplicates_leave_one_of_each(rows: list[tuple[str, str, str, str]], old: bool) -> None:
    """`t` was taken down: it is nobody's duplicate, and what was its duplicate stays out."""
    made: list[Row] = []
    for url, data, caption, fate in rows:
        row = live(url, data, caption)
        if fate == "-":
            row |= {"status": "filtered", "error": "filtered_out", "sha256": None}
        if fate == "t":
            row |= {"status": "opted_out", "error": "taken_down"}
        made.append(row)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [made[i : i + 5] for i in range(0, len(made), 5)]
        for index, part in enumerate(parts):
            write(folder, index, part, old)
        found, result = find(folder, len(parts), old)
        assert result.statuses == Counter(r["status"] for r in made)
        # By the definition: a row is a duplicate where an older one shares a key of either kind.
        seen: set[tuple[str, ...]] = set()
        expected = []
        for i, (url, data, caption, fate) in enumerate(rows):
            if fate == "-":
                continue
            keys = {("url", url, caption), ("bytes", data, caption)}
            if keys & seen and fate == "+":
                expected.append((i // 5, i % 5))
            seen |= keys
        assert [(r["shard"], r["row"]) for r in found] == expected
        out = set(expected)
        for r in found:
            assert shard_row(r["winner"]) < (r["shard"], r["row"])
            assert shard_row(r["winner"]) not in out


@settings(max_examples=12, deadline=None)
@given(ROWS, ROWS)
def test_growth_changes_nothing_in_what_was_there(before: list[Any], after: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [
            [live(u, d, c, status="success" if f == "+" else "filtered") for u, d, c, f in rows]
            for rows in (before, after)
        ]
        for index, part in enumerate(parts):
            write(folder, index, part)
        first, _ = find(folder, 1, caption_repeats=2)
        both, _ = find(folder, 2, caption_repeats=2)
        assert [r for r in both if r["shard"] == 0] == first


_HASHES = st.integers(0, 5).flatmap(
    lambda base: st.sets(st.integers(0, 63), max_size=4).map(
        lambda flips: (0x9E3779B97F4A7C15 * (base + 1) % 2**64) ^ sum(1 << b for b in flips)
    )
)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(_HASHES, st.sampled_from("xy")), max_size=20),
    st.integers(0, 7),
    st.sampled_from(["same_caption", "any_caption"]),
)
def test_pictures_that_look_alike_are_found_by_the_definition(
    rows: list[tuple[int, str]], distance: int, which: str
) -> None:
    rules = DuplicatesConfig(perceptual=which, distance=distance)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), 0, [live(str(i), str(i), c, phash=f"{h:016x}") for i, (h, c) in enumerate(rows)])
        found, _ = find(Path(name), 1, rules=rules)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ingest.duplicates.PARTITION_RECORDS", 3)
            assert find(Path(name), 1, rules=rules)[0] == found
    expected = []
    for i, (h, caption) in enumerate(rows):
        alike = (
            (h ^ other).bit_count() <= distance and (which == "any_caption" or text == caption)
            for other, text in rows[:i]
        )
        if any(alike):
            expected.append((i, "duplicate_picture"))
    assert [(r["row"], r["reason"]) for r in found] == expected
    assert not {shard_row(r["winner"])[1] for r in found} & {i for i, _ in expected}


def test_a_look_alike_of_what_was_taken_down_does_not_come_back(tmp_path: Path) -> None:
    rows = [live(str(i), str(i), "c", phash=f"{h:016x}") for i, h in enumerate((7, 7, 5, 2**63))]
    rules = DuplicatesConfig(perceptual="any_caption", distance=1)
    write(tmp_path, 0, rows)
    before, _ = find(tmp_path, 1, rules=rules)
    assert [r["row"] for r in before] == [1, 2]
    rows[0] |= {"status": "opted_out", "error": "taken_down"}
    write(tmp_path, 0, rows)
    assert find(tmp_path, 1, rules=rules)[0] == before


def test_a_caption_is_kept_so_often(tmp_path: Path) -> None:
    # Row 1 is a duplicate of row 0 and takes no place; row 2 was taken down and keeps its.
    urls, captions = ("u0", "u0", "u1", "u2", "u3", "u4", "u5", "u6"), "aaaaabba"
    rows = [live(u, str(i), c) for i, (u, c) in enumerate(zip(urls, captions, strict=True))]
    rows[2] |= {"status": "opted_out", "error": "taken_down"}
    write(tmp_path, 0, rows)
    found, _ = find(tmp_path, 1, caption_repeats=3)
    assert [(r["row"], r["reason"], r["winner"]) for r in found] == [
        (1, "duplicate_url", 0),
        (4, "caption_repeated", 0),
        (7, "caption_repeated", 0),
    ]


def test_of_shards_beyond_99999_the_lower_number_wins(tmp_path: Path) -> None:
    """Their names and keys are longer, so that they come first as texts; what is to have an order goes by numbers."""
    keys = [sample_key(index, 0, 10_000) for index in (99_999, 100_000)]
    assert keys == ["999990000", "1000000000"] != sorted(keys)
    for index in (99_999, 100_000):
        write(tmp_path, index, [live("1", "A", "one")])
        for suffix in (".tar", STATS):
            (tmp_path / (shard_name(index) + suffix)).touch()
    committed = listed(str(tmp_path)).committed.tolist()
    assert committed == [99_999, 100_000]
    names: list[Any] = []
    sidecars = Sidecars(str(tmp_path), lambda: ((i, True) for i in committed))
    find_duplicates(sidecars, lambda ts: names.append(write_exclusions(str(tmp_path), ts)))
    out = Exclusions(str(tmp_path), names[0])
    assert (out.reasons(99_999), out.reasons(100_000)) == ({}, {0: "duplicate_url"})


def test_train_and_heldout_never_share_bytes(tmp_path: Path) -> None:
    """Also under two captions; who is looked through later gives way, and what is out already takes nobody out."""
    train, heldout = tmp_path / "train", tmp_path / "heldout"
    train.mkdir(), heldout.mkdir()
    write(train, 0, [live("1", "A", "one"), live("2", "B", "two"), live("3", "B", "two")])
    write(heldout, 0, [live("4", "A", "four"), live("5", "B", "five"), live("6", "C", "six")])

    def sidecars(folder: Path, n: int = 1) -> Sidecars:
        return Sidecars(str(folder), lambda: ((i, True) for i in range(n)))

    def exclusions(folder: Path, n: int, other: Sidecars | None, theirs: Any) -> Exclusions:
        names: list[Any] = []
        find_duplicates(
            sidecars(folder, n),
            lambda ts: names.append(write_exclusions(str(folder), ts)),
            other=other,
            other_exclusions=theirs,
        )
        return Exclusions(str(folder), names[0])

    first = exclusions(train, 1, None, None)
    out = exclusions(heldout, 1, sidecars(train), first)
    assert out.reasons(0) == {0: "in_other_split", 1: "in_other_split"}
    # Train grows by a copy of what is held out: the new one goes, and the held-out one stays.
    write(train, 1, [live("7", "C", "seven")])
    later = exclusions(train, 2, sidecars(heldout), out)
    assert later.reasons(0) == first.reasons(0) == {2: "duplicate_url"} or later.reasons(0) == first.reasons(0)
    assert later.reasons(1) == {0: "in_other_split"}
    assert exclusions(heldout, 1, sidecars(train, 2), later).reasons(0) == out.reasons(0)


SCRIPT = """
import resource, sys, json
from ingest.duplicates import Sidecars, find_duplicates
import numpy as np, pyarrow as pa
folder, shards = sys.argv[1], int(sys.argv[2])
find_duplicates(Sidecars(folder, lambda: iter([])), lambda ts: [None for t in ts], memory="200MB")
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = [0]
def write(tables):
    for t in tables: count[0] += t.num_rows
found = find_duplicates(Sidecars(folder, lambda: ((i, True) for i in range(shards))), write, memory="200MB")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"mb": (peak - base) / 1024, "found": count[0], "reasons": found.reasons.total()}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_found(tmp_path: Path) -> None:
    """4e6 rows of which 3e6 are duplicates; what it held before was 162 bytes and a dict for each of them."""
    shards, rows = 20, 200_000
    rng = np.random.default_rng(0)
    for index in range(shards):
        one = rng.integers(0, 1_000_000, rows).astype(np.uint64)
        numbers = {n: pa.array(one * np.uint64(2654435761)) for n in ("url_digest", "bytes_digest", "caption_digest")}
        table = pa.table({"status": pa.array(["success"] * rows), "error": pa.nulls(rows, pa.string()), **numbers})
        pq.write_table(table, tmp_path / f"{index:05d}.parquet")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(shards)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["found"] == report["reasons"] > 2_900_000
    assert report["mb"] < 500


def test_what_is_read_from_a_store_is_what_lies_there(tmp_path: Path) -> None:
    rows = [{"status": "success", "url": "http://a.example/1", "sha256": sha("x"), "caption": "one"}]
    write(tmp_path, 0, rows)
    with fsspec.open(f"memory://{tmp_path.name}/b/00000.parquet", "wb") as sink:
        sink.write((tmp_path / "00000.parquet").read_bytes())
    report = pq.read_table(tmp_path / "00000.parquet", columns=["status", "bytes_digest"])
    for (file,) in digests.readable(
        f"memory://{tmp_path.name}/b", [(0, True)], ["status", "bytes_digest"], str(tmp_path)
    ):
        assert pq.read_table(file).equals(report)
