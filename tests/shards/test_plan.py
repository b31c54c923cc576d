"""The plan: what happens to the shards that are stored when a table changes, in every way that tables do."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ingest import tables
from ingest.config import ColumnsConfig
from ingest.tables import HeldoutRule, TableSource
from shards import plan, storage
from shards.plan import Line, Range
from shards.settings import ConfigError, StageError

N = 1000  # samples a shard


def rows(first: int, count: int, word: str = "caption") -> list[str]:
    return [f"http://example.org/{i}.jpg,{word} {i}\n" for i in range(first, first + count)]


def write(folder: Path, name: str, lines: list[str]) -> None:
    (folder / name).write_text("url,caption\n" + "".join(lines))


def source(folder: Path, **how: object) -> TableSource:
    layout = tables.read_layout(str(folder), ColumnsConfig(), [], ("width", "height"))
    return TableSource(layout, N, **how)


A, B = rows(0, 3400), rows(10_000, 2000)
Change = Callable[[Path], None]


def as_parquet(t: Path) -> None:
    """The same rows exported again by another program: another order of columns, other row groups."""
    table = pyarrow.csv.read_csv(t / "part-2.csv").select(["caption", "url"])
    (t / "part-2.csv").unlink()
    pq.write_table(table, t / "part-2.parquet", row_group_size=77)


REFUSED = (
    "part-1.csv is not the file that was planned: {} of its 4 shards ({} to 00003, {:,} images) were made of other "
    "rows. Nothing was touched. Give new rows as a file of their own; or put this file back; or take its rows anew, as "
    "further shards, with --add-changed: what is stored stays, and a row that is there twice counts as a duplicate"
)
MOVED = ". It begins with the rows of part-2.csv: if files exchanged their names, give these back"


def exchange(t: Path) -> None:
    write(t, "part-1.csv", B)
    write(t, "part-2.csv", A)


CASES: dict[str, tuple[Change, list[str]]] = {
    "nothing": (lambda t: None, ["the table is as it was"]),
    "a file more": (lambda t: write(t, "part-3.csv", rows(20_000, 1500)), ["part-3.csv: 2 new shards, 00006 to 00007"]),
    "a file of one row that sorts first": (
        lambda t: write(t, "part-0.csv", rows(30_000, 1)),
        ["part-0.csv: 1 new shards, 00006 to 00006"],
    ),
    "rows appended to a file": (
        lambda t: write(t, "part-1.csv", A + rows(40_000, 1000)),
        ["part-1.csv: 1 new shards, 00006 to 00006"],
    ),
    "written again with the same rows": (
        lambda t: write(t, "part-1.csv", A),
        ["part-1.csv: written again with the same rows"],
    ),
    "renamed": (
        lambda t: os.rename(t / "part-2.csv", t / "part-0.csv"),
        ["part-0.csv holds the rows of 2 shards whose file is gone: they are those"],
    ),
    "exported as parquet": (
        as_parquet,
        ["part-2.parquet holds the rows of 2 shards whose file is gone: they are those"],
    ),
    "a row in front": (lambda t: write(t, "part-1.csv", rows(50_000, 1) + A), [REFUSED.format(4, "00000", 3600)]),
    "a caption corrected": (
        lambda t: write(t, "part-1.csv", A[: 3400 - 100] + rows(3300, 1, "Caption") + A[3301:]),
        [REFUSED.format(1, "00003", 900)],
    ),
    "the last rows gone": (lambda t: write(t, "part-1.csv", A[:3000]), [REFUSED.format(1, "00003", 900)]),
    "names exchanged": (exchange, [REFUSED.format(4, "00000", 3600) + MOVED]),
    "a file gone": (lambda t: (t / "part-2.csv").unlink(), ["part-2.csv: 1 file is gone; their 2 shards stay"]),
}


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Path, str, dict[int, tuple[int, bytes]]]:
    """A table of two files, its plan's folder, and what each of its six numbers stands for."""
    table, root = tmp_path / "table", str(tmp_path / "images")
    table.mkdir()
    write(table, "part-1.csv", A)
    write(table, "part-2.csv", B)
    said = plan.grow({"train": root}, source(table))
    assert said == ["part-1.csv: 4 new shards, 00000 to 00003", "part-2.csv: 2 new shards, 00004 to 00005"]
    return table, root, numbers(root)


def numbers(root: str) -> dict[int, tuple[int, bytes]]:
    return {line.shard: (line.rows, line.digest) for line in plan.read(root).lines() if line.shard >= 0}


def stored(split: str, shards: Sequence[int]) -> tuple[int, int]:
    return len(shards), 900 * len(shards)


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_keeps_its_number_whatever_becomes_of_the_table(planned, name: str) -> None:
    table, root, before = planned
    parts = {p.name: p.read_bytes() for p in (Path(root) / "plan").iterdir()}
    change, expected = CASES[name]
    change(table)
    try:
        said = plan.grow({"train": root}, source(table), stored=stored)
    except ConfigError as e:
        said = [str(e)]
        assert plan.read(root).parts == len(parts)
    else:
        assert plan.grow({"train": root}, source(table), stored=stored)[-1].endswith(("as it was", "shards stay"))
    assert said == expected
    after = numbers(root)
    assert before.items() <= after.items()
    for part, data in parts.items():
        assert (Path(root) / "plan" / part).read_bytes() == data
    # What the plan says now can be read where it says so; a shard whose file is gone has no place.
    layout = source(table).layout
    for line in plan.read(root).lines():
        if not expected[0].startswith(REFUSED[:40]) and Path(line.file).exists():
            assert tables.read_range(layout, line).num_rows == line.rows


def test_add_changed_takes_the_rows_anew_behind_all_others(planned) -> None:
    table, root, before = planned
    write(table, "part-1.csv", rows(50_000, 1) + A)
    said = plan.grow({"train": root}, source(table), add_changed=True, stored=stored)
    assert said[0].endswith("what is stored stays, and its rows are planned anew as 00006 and on")
    assert said[1] == "part-1.csv: 4 new shards, 00006 to 00009"
    after = numbers(root)
    assert before.items() <= after.items()
    assert sum(n for s, (n, _) in after.items() if s >= 6) == 3401
    assert plan.read(root).line(0).file == plan.NOWHERE
    assert plan.grow({"train": root}, source(table), stored=stored) == ["the table is as it was"]


def test_what_is_not_committed_yet_is_planned_anew_without_asking(planned) -> None:
    table, root, before = planned
    write(table, "part-1.csv", rows(50_000, 1) + A)
    plan.grow({"train": root}, source(table), stored=lambda split, shards: (0, 0))
    assert {s for s in numbers(root) if s not in before} == {6, 7, 8, 9}


def test_ranges_that_did_not_change_keep_their_shards(planned) -> None:
    """A row corrected in what is not fetched yet: what is stored of the same file is not fetched again."""
    table, root, _ = planned
    lines = [*A[:1500], *rows(1500, 1, "Caption"), *A[1501:], *rows(40_000, 10)]
    write(table, "part-1.csv", lines)
    said = plan.grow({"train": root}, source(table), stored=lambda split, shards: (0, 0))
    assert said[1] == "part-1.csv: 2 new shards, 00006 to 00007"
    known, layout = plan.read(root), source(table).layout
    places = [(i, known.line(i).start, known.line(i).rows) for i in (0, 6, 2, 3, 7)]
    assert [n for _, _, n in places] == [1000, 1000, 1000, 400, 10]
    assert [start for _, start, _ in places] == sorted(start for _, start, _ in places)
    assert all(tables.read_range(layout, known.line(i)).num_rows for i, _, _ in places)
    assert known.line(1).file == plan.NOWHERE
    assert plan.grow({"train": root}, source(table), stored=stored) == ["the table is as it was"]


@pytest.mark.parametrize("more", [0, 50])
def test_a_file_that_had_grown_is_known_by_another_name(planned, more: int) -> None:
    table, root, _ = planned
    write(table, "part-1.csv", A + rows(40_000, 1000))
    plan.grow({"train": root}, source(table), stored=stored)
    before = numbers(root)
    (table / "part-1.csv").unlink()
    write(table, "part-9.csv", A + rows(40_000, 1000 + more))
    said = plan.grow({"train": root}, source(table), stored=stored)
    assert said[0] == "part-9.csv holds the rows of 5 shards whose file is gone: they are those"
    assert len(said) == 1 + bool(more)
    assert sum(n for s, (n, _) in numbers(root).items() if s not in before) == more
    layout = source(table).layout
    assert all(tables.read_range(layout, line).num_rows == line.rows for line in plan.read(root).lines())


def test_a_file_without_rows_that_is_filled_later_is_planned_for_good(planned) -> None:
    table, root, _ = planned
    write(table, "part-3.csv", [])
    plan.grow({"train": root}, source(table))
    files = source(table).files()
    assert plan.is_grown(root, files)
    write(table, "part-3.csv", rows(60_000, 5))
    assert not plan.is_grown(root, files)
    assert plan.grow({"train": root}, source(table)) == ["part-3.csv: 1 new shards, 00006 to 00006"]
    assert plan.is_grown(root, files)
    os.utime(table / "part-3.csv", ns=(1, 1))
    assert not plan.is_grown(root, files)


def test_sizes_that_are_merely_looked_at_are_no_part_of_the_digest(tmp_path: Path) -> None:
    table, root = tmp_path / "table", str(tmp_path / "images")
    table.mkdir()
    urls = [f"http://a/{i}" for i in range(5)]

    def export(width: int) -> None:
        columns = {"url": urls, "caption": urls, "width": [width] * 5, "height": [8] * 5}
        pq.write_table(pa.table(columns), table / "part.parquet")

    export(640)
    plan.grow({"train": root}, source(table))
    before = numbers(root)
    export(641)
    assert plan.grow({"train": root}, source(table), stored=stored) == [
        "part.parquet: written again with the same rows"
    ]
    assert numbers(root) == before


def test_a_run_of_an_earlier_version_is_found_by_its_digests(tmp_path: Path) -> None:
    """Also where these covered the columns that are merely looked at."""
    table, root = tmp_path / "table", str(tmp_path / "images")
    table.mkdir()
    urls = [f"http://a/{i}" for i in range(2500)]
    columns = {"url": urls, "caption": urls, "WIDTH": [1] * 2500, "HEIGHT": [2] * 2500}
    pq.write_table(pa.table(columns), table / "part.parquet")
    layout = source(table).layout
    assert layout.looked_at == 2
    old = dataclasses.replace(layout, looked_at=0)
    was = [r for _, r in TableSource(old, N).ranges(layout.files[0], {"train": ()})]
    lines = [Line(i, plan.BEFORE, r.rows * i, r.rows * (i + 1), r.rows, r.digest) for i, r in enumerate(was)]
    plan.write_part(root, 0, lines)
    said = plan.grow({"train": root}, source(table, former=True), stored=stored)
    assert said == ["part.parquet holds the rows of 3 shards whose file is gone: they are those"]
    assert [line.file for line in plan.read(root).lines()] == [str(table / "part.parquet")] * 3
    assert tables.read_range(layout, plan.read(root).line(1)).num_rows == N
    # From now on the new digests hold: other sizes are the same rows.
    pq.write_table(pa.table({**columns, "WIDTH": [3] * 2500}), table / "part.parquet")
    assert "written again with the same rows" in plan.grow({"train": root}, source(table), stored=stored)[0]


def test_a_planning_that_is_killed_goes_on_behind_the_last_part(tmp_path: Path) -> None:
    table, root = tmp_path / "table", str(tmp_path / "images")
    table.mkdir()
    for i in range(7):
        write(table, f"part-{i}.csv", rows(i * 10_000, 1500))

    def dies(function: Callable, units: Sequence) -> Iterator:
        for i, unit in enumerate(units):
            if i == 5:
                raise KeyboardInterrupt
            yield function(unit)

    with pytest.raises(KeyboardInterrupt):
        plan.grow({"train": root}, source(table), each=dies, files_a_part=2)
    assert plan.read(root).parts == 2
    half = numbers(root)
    walked: list[str] = []

    def counts(function: Callable, units: Sequence) -> Iterator:
        for unit in units:
            walked.append(Path(unit[0]).name)
            yield function(unit)

    plan.grow({"train": root}, source(table), each=counts, files_a_part=2)
    assert walked == ["part-4.csv", "part-5.csv", "part-6.csv"]
    after = numbers(root)
    assert half.items() <= after.items()
    assert list(after) == list(range(14))
    whole = str(tmp_path / "whole")
    plan.grow({"train": whole}, source(table))
    assert numbers(whole) == after


def test_of_two_that_plan_at_one_moment_one_is_told(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    table, root, _before = planned
    write(table, "part-3.csv", rows(20_000, 1500))
    others = plan.grow

    def late(url: str, data: bytes) -> bool:
        monkeypatch.undo()
        others({"train": root}, source(table))
        return storage.create(url, data)

    monkeypatch.setattr(storage, "create", late)
    with pytest.raises(StageError, match="another job has planned at this moment"):
        plan.grow({"train": root}, source(table))
    assert sorted(numbers(root)) == list(range(8))
    assert plan.grow({"train": root}, source(table)) == ["the table is as it was"]


def test_one_walk_plans_both_splits_as_two_walks_would(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.mkdir()
    lines = rows(0, 3000) + rows(500, 1000, "  Caption") + [f"http://b/{i},caf\u00e9 &amp; {i}\n" for i in range(500)]
    write(table, "part-1.csv", lines)
    write(table, "part-2.csv", rows(70_000, 1))  # so one split has none of it
    rule = HeldoutRule(0.3, 7, ("html_entities", "mojibake", "nfc", "whitespace"))
    both = {"train": str(tmp_path / "a"), "heldout": str(tmp_path / "b")}
    walks: list[str] = []

    def counts(function: Callable, units: Sequence) -> Iterator:
        for unit in units:
            walks.append(unit[0])
            yield function(unit)

    plan.grow(both, source(table, heldout=rule), each=counts)
    assert len(walks) == 2
    found: dict[str, set[str]] = {}
    for split, root in both.items():
        layout = source(table).layout
        found[split] = set()
        for line in plan.read(root).lines():
            if line.shard >= 0:
                table_ = tables.read_range(layout, line, rule, split)
                found[split] |= {" ".join(c.split()).casefold() for c in table_["caption"].to_pylist()}
        alone = str(tmp_path / f"{split}-alone")
        plan.grow({split: alone}, source(table, heldout=rule))
        assert numbers(alone) == numbers(root)
    assert not found["train"] & found["heldout"]  # a caption is on one side, however it is written
    share = len(found["heldout"]) / (len(found["heldout"]) + len(found["train"]))
    assert 0.25 < share < 0.35
    # A file in which a split has no rows is not walked through each time.
    walks.clear()
    assert plan.grow(both, source(table, heldout=rule), each=counts) == ["the table is as it was"]
    assert walks == []


def test_the_walk_can_be_done_by_other_processes(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.mkdir()
    for i in range(4):
        write(table, f"part-{i}.csv", rows(i * 10_000, 1500))
    plan.grow({"train": str(tmp_path / "here")}, source(table))
    with ProcessPoolExecutor(2) as pool:
        plan.grow({"train": str(tmp_path / "there")}, source(table), each=pool.map)
    assert numbers(str(tmp_path / "here")) == numbers(str(tmp_path / "there"))


class Folder:
    """A source that is no table: a file is a sample."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self) -> list[str]:
        return [str(p) for p in sorted(self.root.iterdir())]

    def ranges(self, file: str, cuts: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Range]]:
        for split in cuts:
            yield split, Range(0, 1, 1, (Path(file).read_bytes() * 16)[:16])


def test_any_source_can_be_planned(tmp_path: Path) -> None:
    pictures, root = tmp_path / "pictures", str(tmp_path / "images")
    pictures.mkdir()
    for name in "ab":
        (pictures / name).write_text(name)
    plan.grow({"train": root}, Folder(pictures))
    (pictures / "0").write_text("0")
    plan.grow({"train": root}, Folder(pictures))
    assert [Path(line.file).name for line in plan.read(root).lines()] == ["a", "b", "0"]


def test_a_plan_is_read_once_and_again_where_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read = str(tmp_path / "run"), []
    real = storage.read_parquet
    monkeypatch.setattr(storage, "read_parquet", lambda url: read.append(url) or real(url))

    def line(shard: int, rows: int) -> plan.Line:
        return plan.Line(shard, "f", 0, rows, rows, bytes(16))

    plan.write_part(root, 0, [line(0, 5)])
    assert [plan.read(root).rows() for _ in range(3)] == [{0: 5}] * 3
    assert len(read) == 1
    plan.write_part(root, 1, [line(1, 7)])  # by any process
    assert plan.read(root, after=1).rows() == {1: 7}
    assert plan.read(root).rows() == {0: 5, 1: 7}
    replaced = tmp_path / "run.replaced-1"
    Path(root).rename(replaced)  # --redo
    plan.write_part(root, 0, [line(0, 6)])
    plan.write_part(root, 1, [line(1, 8)])
    for part in ("00000.parquet", "00001.parquet"):
        before, after = (Path(r, plan.FOLDER, part).stat().st_size for r in (replaced, root))
        assert before == after, "another plan of the same sizes"
    assert plan.read(root).rows() == {0: 6, 1: 8}


def test_the_fast_way_to_clean_is_the_slow_one() -> None:
    from ingest.captions import DEFAULT_STEPS, clean, clean_all

    texts = [
        None,
        "",
        " a  b ",
        "a\tb\n",
        "a &amp; b",
        "caf\u00e9",
        "\u00a0x\u00a0",
        "-" * 300,
        "\x7f",
        "\x00a",
        "a\n",
        "A~!",
        "Stra\u00dfe",
    ]
    texts += ["".join(t) for t in itertools.product("A &\n\u00e9", repeat=4)]
    for steps in (DEFAULT_STEPS, (), ("whitespace",), ("nfc",), (*DEFAULT_STEPS, "emails")):
        expected = [clean(t or "", steps) for t in texts]
        assert clean_all(pa.array(texts, pa.string()), steps).to_pylist() == expected
        assert clean_all(pa.array(["x", *texts], pa.string()).slice(1), steps).to_pylist() == expected
        assert len(clean_all(pa.array([], pa.string()), steps)) == len(clean_all(pa.array([""])[:0], steps)) == 0


def test_the_split_is_that_of_the_definition() -> None:
    """Of both hashes; the figures stand for ever, or a run that goes on would hold out other rows."""
    import hashlib

    from ingest import captions

    key = hashlib.blake2b((-5).to_bytes(8, "little", signed=True)).digest()
    number = int.from_bytes(key[:8], "little") & ~7 | 5

    def polynomial(text: str) -> int:
        words = "".join(c.lower() if len(c.lower()) == 1 else c for c in text).encode()[: 1 << 16]
        h = sum(b * pow(number, i, 2**64) for i, b in enumerate(words)) % 2**64 ^ int.from_bytes(key[8:16], "little")
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            h = (h ^ h >> 33) * factor % 2**64
        return h ^ h >> 33

    def blake2b(text: str) -> int:
        salted = hashlib.blake2b(text.casefold().encode(), digest_size=8, salt=(-5).to_bytes(8, "little", signed=True))
        return int.from_bytes(salted.digest(), "little")

    texts = [f"Caption  {i} \u00dc" if i % 3 else f"Plain {i}" for i in range(300)] + [None, "", "x" * 70_000, "y", " "]
    for name, digest in (("polynomial", polynomial), ("blake2b", blake2b)):
        rule = HeldoutRule(0.4, -5, captions.DEFAULT_STEPS, hash=name)
        found = rule(pa.record_batch({"caption": pa.array(texts, pa.string())}))
        cleaned = [captions.clean(text or "", captions.DEFAULT_STEPS) for text in texts]
        assert found.tolist() == [digest(text) < int(0.4 * 2**64) for text in cleaned]
        assert tables.HASHES[name](pa.array(["x", *cleaned]).slice(1), -5).tolist() == [digest(t) for t in cleaned]
        assert np.count_nonzero(found) > 50
    assert tables.polynomial(pa.array(["", "A red ball", "\u00c9t\u00e9"]), 0).tolist() == [
        4_444_528_919_949_974_614,
        10_145_403_284_444_849_468,
        18_007_020_506_894_209_142,
    ]


def test_alike_captions_are_held_out_by_chance_alone() -> None:
    """Of numbered captions, of single letters, and of those that differ at one place, wherever it is."""
    kinds = {
        "numbered": [f"Photo {i}" for i in range(40_000)],
        "numbered in front": [f"{i} images of the same cat on a mat, seen from the side" for i in range(40_000)],
        "pairs": [f"{a}{b}" for a in map(chr, range(0x61, 0x7B)) for b in map(chr, range(0x4E00, 0x5000))],
        "one place": [
            f"{'.' * i}{c}{'.' * (80 - i)}" for i in range(81) for c in "abcdefghijklmnopqrstuvwxyz0123456789"
        ],
    }
    for texts in kinds.values():
        sides = {}
        for seed in (0, 1):
            hashes = tables.polynomial(pa.array(texts), seed)
            assert len(np.unique(hashes)) == len(texts)
            # Pearson's chi-square of 64 equal ranges of the top bits, of the low bits, and of neighbours' differences.
            for values in (hashes >> np.uint64(58), hashes & np.uint64(63), np.diff(hashes) >> np.uint64(58)):
                counts = np.bincount(values.astype(np.int64), minlength=64)
                assert ((counts - len(values) / 64) ** 2).sum() / (
                    len(values) / 64
                ) < 130  # 63 on average, deviation 11
            sides[seed] = hashes < 2**62
        both, one = np.count_nonzero(sides[0] & sides[1]), len(texts) / 16
        assert abs(both - one) < 5 * one**0.5, "of another seed other captions are held out"
