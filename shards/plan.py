"""The plan of a dataset: which rows of which file each shard number stands for, written once and grown.

A plan is `plan/00000.parquet`, `plan/00001.parquet`, ... in the dataset's folder. Each part is created once and never
changed, so that a planning that is killed goes on behind the last part, and of two that plan at one moment one is
told to look again. Numbers are given in the order in which ranges of rows were first seen, not in that of the files,
and a number keeps its rows for ever. A later line of a shard says where its rows lie by now.

Any kind of samples can be planned: a `Source` is files with stamps, and a walk through a file that gives ranges of
its rows with digests. One walk may plan several datasets at once (`splits`: the folders by the split's name).

A line with `takes_over` is no range of a file: the shard takes all rows that ended with one of `codes` in these older
shards, which no earlier line has taken (a retry).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from shards import storage
from shards.layout import shard_name
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.plan")

FOLDER = "plan"
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("file", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("rows", pa.int32()),
        ("digest", pa.binary(16)),
        ("stamp", pa.string()),
        ("takes_over", pa.list_(pa.int32())),
        ("codes", pa.list_(pa.string())),
    ]
)
FILES_A_PART = 64
BEFORE = "(before there was a plan)"  # the file of shards that an earlier version made, until their rows are found
NOWHERE = ""  # the file of a shard whose rows no file has any more: what is stored of it stays


@dataclasses.dataclass(frozen=True)
class Range:
    """Rows of a file for one shard. start, stop: as the source counts (rows, bytes). digest: 16 bytes, of the rows.

    former: what an earlier version made as their digest, where that was another one.
    """

    start: int
    stop: int
    rows: int
    digest: bytes
    former: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """What a shard number stands for: rows of a file, or rows that older shards could not get."""

    shard: int
    file: str
    start: int
    stop: int
    rows: int
    digest: bytes
    stamp: str = ""
    takes_over: tuple[int, ...] = ()
    codes: tuple[str, ...] = ()


class Source(Protocol):
    """Where samples come from: files, and a walk through one of them. Small, and can be pickled to another process."""

    def files(self) -> Sequence[str]:
        """Every file, in a fixed order."""
        ...

    def ranges(self, file: str, cuts: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Range]]:
        """(split, range) through a file once: for each split in `cuts` first ranges of so many rows, then full ones."""
        ...


# (split, numbers of its shards) -> how many of them are committed, and how many samples these hold.
Stored = Callable[[str, Sequence[int]], tuple[int, int]]
# Like the built-in map: calls a function with each of many units, here or elsewhere, and gives the results in order.
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Plan:
    """The lines of all parts of one dataset, the latest of each shard."""

    def __init__(self, table: pa.Table, parts: int) -> None:
        self.parts = parts
        # Files without rows are noted as shard -1, or each planning would walk through them again; by file, the stamp.
        nothing = table.filter(pc.less(table["shard"], 0))
        self.without_rows = dict(zip(nothing["file"].to_pylist(), nothing["stamp"].to_pylist(), strict=True))
        table = table.filter(pc.greater_equal(table["shard"], 0))
        shards = table["shard"].to_numpy()
        # The latest line of each shard: the first of its number from behind.
        _, behind = np.unique(shards[::-1], return_index=True)
        self.table: pa.Table = table.take(pa.array(len(shards) - 1 - behind, pa.int64())).combine_chunks()
        self.shards: np.ndarray = self.table["shard"].to_numpy()  # ascending

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def next_number(self) -> int:
        """The number that no shard has yet."""
        return int(self.shards[-1]) + 1 if len(self.shards) else 0

    def lines(self) -> Iterator[Line]:
        """Every shard's line, in the order of the numbers."""
        for batch in self.table.to_batches(1 << 16):
            columns = [batch.column(name).to_pylist() for name in SCHEMA.names[:7]]
            over = batch.column("takes_over").is_valid().to_numpy(zero_copy_only=False)
            for i, values in enumerate(zip(*columns, strict=True)):
                yield _line(batch.slice(i, 1).to_pylist()[0]) if over[i] else Line(*values)

    def line(self, shard: int) -> Line | None:
        """The line of one shard; None where it is not planned."""
        at = int(np.searchsorted(self.shards, shard))
        if at == len(self.shards) or self.shards[at] != shard:
            return None
        return _line(self.table.slice(at, 1).to_pylist()[0])

    def retries(self) -> list[Line]:
        """The lines that take rows over, in the order of the numbers."""
        chosen = np.flatnonzero(self.table["takes_over"].is_valid().to_numpy())
        return [_line(row) for row in self.table.take(pa.array(chosen, pa.int64())).to_pylist()]

    def has(self, file: str) -> bool:
        """Whether rows of a file are planned."""
        return file in pc.unique(self.table["file"]).to_pylist()

    def rows(self) -> dict[int, int]:
        """How many rows each shard stands for."""
        return dict(zip(self.shards.tolist(), self.table["rows"].to_pylist(), strict=True))


def _line(row: dict[str, Any]) -> Line:
    return Line(**{**row, "takes_over": tuple(row["takes_over"] or ()), "codes": tuple(row["codes"] or ())})


def is_grown(root: str, files: Sequence[str]) -> bool:
    """Whether a plan is up to these files: each is planned as it is now."""
    known = read(root)
    pairs = known.table.select(["file", "stamp"]).group_by(["file", "stamp"]).aggregate([])
    planned: dict[str, set[str]] = {}
    for file, stamp in zip(pairs["file"].to_pylist(), pairs["stamp"].to_pylist(), strict=True):
        planned.setdefault(file, set()).add(stamp)
    # A file that once had no rows may have some by now.
    without_rows = {file: {stamp} for file, stamp in known.without_rows.items()}
    return all({**without_rows, **planned}.get(file) == {stamp} for file, stamp in stamps(files).items())


def first_files(root: str) -> list[str]:
    """The files of the first part of a dataset's plan, sorted, also those without rows; none where there is no plan."""
    url = part_url(root, 0)
    return sorted(pc.unique(_part(url)["file"]).to_pylist()) if storage.exists(url) else []


def part_url(root: str, number: int) -> str:
    """Where a part of a dataset's plan lies."""
    return storage.join(root, FOLDER, f"{number:05d}.parquet")


_READ: dict[str, tuple[Any, Plan]] = {}  # by folder: the plan as it was last read, and the parts that it is made of
_KEPT = 4


def read(root: str, after: int = 0) -> Plan:
    """The plan of a dataset; empty where nothing is planned. after: leave out so many parts. Raises StageError where a
    part is damaged.

    Asked for many times in a command, it is read again only where other parts lie there.
    """
    there = {name: (size, mark) for name, size, mark in storage.list_files(storage.join(root, FOLDER))}
    parts = after
    while f"{parts:05d}.parquet" in there:
        parts += 1
    made_of = after, tuple(there[f"{n:05d}.parquet"] for n in range(after, parts))
    known, plan = _READ.get(root, (None, None))
    if plan is None or known != made_of:
        tables = [_part(part_url(root, n)) for n in range(after, parts)]
        plan = Plan(pa.concat_tables(tables) if tables else SCHEMA.empty_table(), parts)
        if len(_READ) >= _KEPT:
            _READ.clear()
        _READ[root] = made_of, plan
    return plan


def _part(url: str) -> pa.Table:
    try:
        return storage.read_parquet(url).cast(SCHEMA)
    except (pa.ArrowInvalid, ValueError) as e:
        said = " ".join(str(e).split())[:200]
        raise StageError(
            f"{url}: this part of the plan is damaged ({said}); put it back from a copy: it says which rows are in "
            "which shard"
        ) from None


def write_part(root: str, number: int, lines: Iterable[Line]) -> None:
    """Create one part; raises StageError where another process was faster."""
    lines = list(lines)
    columns: dict[str, list[Any]] = {name: [getattr(line, name) for line in lines] for name in SCHEMA.names}
    for name in ("takes_over", "codes"):
        columns[name] = [values or None for values in columns[name]]
    if not storage.create(part_url(root, number), storage.parquet_bytes(pa.table(columns, SCHEMA))):
        raise StageError(f"{root}: another job has planned at this moment; run the same command again")


def stamps(files: Sequence[str]) -> dict[str, str]:
    """By file, what changes when it is written again: size and time of the last change, on a store the ETag.

    Raises ConfigError where a file's name is not UTF-8, in which a plan could not name it.
    """
    found = {}
    for file in files:
        if file != file.encode("utf-8", "replace").decode():
            raise ConfigError(f"{file.encode('utf-8', 'backslashreplace').decode()}: its name is not UTF-8; rename it")
        if storage.is_local(file):
            status = os.stat(storage.local_path(file))
            found[file] = f"{status.st_size}-{status.st_mtime_ns}"
            continue
        fs, path = fsspec.core.url_to_fs(file)
        info = fs.info(path)
        mark = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("generation")
        found[file] = f"{info.get('size')}-{mark or info.get('mtime') or info.get('LastModified')}"
    return found


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Calls the source's walk; an object, so that it can be pickled to where the walk is done."""

    source: Source

    def __call__(self, unit: tuple[str, Mapping[str, Sequence[int]]]) -> dict[str, list[Range]]:
        file, cuts = unit
        found: dict[str, list[Range]] = {split: [] for split in cuts}
        for split, one in self.source.ranges(file, cuts):
            found[split].append(one)
        return found


def grow(
    splits: Mapping[str, str],
    source: Source,
    *,
    add_changed: bool = False,
    stored: Stored = lambda split, shards: (len(shards), 0),
    each: Each = map,
    files_a_part: int = FILES_A_PART,
    progress: str = "",
) -> list[str]:
    """Bring the plans of these splits up to the source's files; returns what happened, a sentence each.

    splits: the folder of each split's dataset. Files that are as they were are not read. Raises ConfigError where a
    file no longer holds the rows that committed shards were made of, unless `add_changed`; nothing is written then for
    this file and those behind it. progress: what the bar says before its figures; no bar without.
    """
    names = list(source.files())
    marks = stamps(names)
    growing = [_Growing(split, root, set(names)) for split, root in splits.items()]
    changed = [f for f in names if any(g.wants(f, marks[f]) for g in growing)]
    # Files that are there already come first: what is refused is refused before anything new is planned.
    changed.sort(key=lambda f: not any(f in g.known for g in growing))
    units = [(f, {g.split: g.cuts(f) for g in growing}) for f in changed]
    with tqdm(total=len(units), desc=progress, unit=" files", disable=None if progress else True) as bar:
        rows = since = 0
        for file, found in zip(changed, each(_Walk(source), units), strict=True):
            for g in growing:
                cuts: list[int] | None
                if g.is_changed(file, marks[file], found[g.split]):
                    cuts = g.forget(file, found[g.split], add_changed, stored)
                else:
                    cuts = g.cuts_of_gone(file, found[g.split])
                if cuts is not None:  # other ranges than were walked through
                    (found_anew,) = each(_Walk(source), [(file, {g.split: cuts})])
                    found[g.split] = found_anew[g.split]
                g.take(file, marks[file], found[g.split])
            rows += sum(r.rows for ranges in found.values() for r in ranges)
            bar.set_postfix(rows=f"{rows:,}", refresh=False)
            bar.update(1)
            since += 1
            if since >= files_a_part and not any(g.taking_over for g in growing):
                for g in growing:
                    g.flush()
                since = 0
        for g in growing:
            g.refuse_lost(add_changed, stored)
        for g in growing:
            g.flush()
    said = [sentence for g in growing for sentence in (*g.said, *g.gone())]
    return list(dict.fromkeys(said)) or ["the table is as it was"]


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def _same(old: list[Line], found: list[Range]) -> list[bool]:
    """Whether each range is what its line stands for, as far as both go."""
    return [a.rows == b.rows and a.digest in (b.digest, b.former) for a, b in zip(old, found, strict=False)]


class _Growing:
    """The growth of one split's plan."""

    def __init__(self, split: str, root: str, files: set[str]) -> None:
        self.split, self.root = split, root
        plan = read(root)
        self.parts, self.number = plan.parts, plan.next_number
        self.first = self.number
        self.known: dict[str, list[Line | None]] = {}  # None: a range that is to be another shard
        # A range that the plan knows from a file that is gone is that shard: files may be renamed.
        self.orphans: dict[bytes, list[Line]] = {}
        self.empty = plan.without_rows
        for line in plan.lines():
            if line.takes_over:
                continue
            if line.file in files:
                self.known.setdefault(line.file, []).append(line)
            elif line.file != NOWHERE:
                self.orphans.setdefault(line.digest, []).append(line)
        for lines in self.known.values():
            lines.sort(key=lambda line: line.start if line else 0)
        # Gone files may be there under another name, also such that had grown: by file, its shards in its order.
        self.gone_files: dict[str, list[Line]] = {}
        for line in sorted((one for some in self.orphans.values() for one in some), key=lambda line: line.start):
            if line.file != BEFORE:
                self.gone_files.setdefault(line.file, []).append(line)
        self.lines: list[Line] = []
        self.blank: dict[str, str] = {}
        self.said: list[str] = []

    def cuts(self, file: str) -> list[int]:
        """How many rows the shards of a file have, in its order."""
        return [line.rows for line in self.known.get(file, ()) if line is not None]

    def wants(self, file: str, mark: str) -> bool:
        """Whether a file must be walked through: it is new, or another one than was planned."""
        if file in self.known:
            return any(line is not None and line.stamp != mark for line in self.known[file])
        return self.empty.get(file) != mark

    def is_changed(self, file: str, mark: str, found: list[Range]) -> bool:
        """Whether the file no longer holds the rows that its shards stand for."""
        old = [line for line in self.known.get(file, ()) if line is not None]
        return self.wants(file, mark) and not (len(found) >= len(old) and all(_same(old, found)))

    def cuts_of_gone(self, file: str, found: list[Range]) -> list[int] | None:
        """How a new file is to be cut where it seems to be one that is gone and that was cut otherwise, since it had
        grown before; else None."""
        if file in self.known or not found:
            return None
        total = sum(f.rows for f in found)
        for lines in self.gone_files.values():
            cuts = [line.rows for line in lines]
            if cuts != [f.rows for f in found[: len(cuts)]] and (
                sum(cuts) == total or found[0].digest == lines[0].digest
            ):
                return cuts
        return None

    def forget(self, file: str, found: list[Range], add_changed: bool, stored: Stored) -> list[int]:
        """A file whose rows have changed: its shards stay as they are, and ranges that have not changed are theirs.
        Returns how the file is to be cut then. Raises ConfigError where shards that are stored were made of other rows,
        unless that is agreed."""
        old = [line for line in self.known.pop(file) if line is not None]
        same = _same(old, found)
        same += [False] * (len(old) - len(same))
        bad = [line for line, ok in zip(old, same, strict=True) if not ok]
        committed, samples = stored(self.split, [line.shard for line in bad])
        what = (
            f"{_name(file)} is not the file that was planned: {len(bad)} of its {len(old)} shards "
            f"({shard_name(bad[0].shard)} to {shard_name(bad[-1].shard)}, {samples:,} images) were made of other rows"
        )
        if committed and not add_changed:
            raise ConfigError(
                f"{what}. Nothing was touched. Give new rows as a file of their own; or put this file back; or "
                "take its rows anew, as further shards, with --add-changed: what is stored stays, and a row that "
                "is there twice counts as a duplicate" + self._moved_from(file, found)
            )
        self.said.append(
            f"{what}; what is stored stays, and its rows are planned anew as {shard_name(self.number)} and on"
        )
        self.lines += [Line(line.shard, NOWHERE, 0, 0, line.rows, line.digest) for line in bad]
        while same and not same[-1]:
            same.pop()
        if same:
            self.known[file] = [line if ok else None for line, ok in zip(old, same, strict=False)]
        return [line.rows for line, _ in zip(old, same, strict=False)]

    def _moved_from(self, file: str, found: list[Range]) -> str:
        """What is said where the rows are those that were planned of another file, which is there too."""
        for other, lines in self.known.items():
            if other != file and found and any(line is not None and _same([line], found)[0] for line in lines):
                return f". It begins with the rows of {_name(other)}: if files exchanged their names, give these back"
        return ""

    def take(self, file: str, mark: str, found: list[Range]) -> None:
        """Plan a file's ranges, which begin with those that are known of it."""
        if not self.wants(file, mark):
            return  # walked through for another split
        name, old = _name(file), self.known.get(file, [])
        moved, first = 0, self.number
        for line, f in itertools.zip_longest(old, found):
            if line is not None:  # it has only moved; the file's new stamp is noted with it
                self.lines.append(dataclasses.replace(line, start=f.start, stop=f.stop, digest=f.digest, stamp=mark))
                continue
            orphans = self.orphans.get(f.digest) or self.orphans.get(f.former or b"")
            if orphans:
                line, moved = orphans.pop(0), moved + 1
                self.lines.append(Line(line.shard, file, f.start, f.stop, f.rows, f.digest, mark))
            else:
                self.lines.append(Line(self.number, file, f.start, f.stop, f.rows, f.digest, mark))
                self.number += 1
        if moved:
            self.said.append(f"{name} holds the rows of {moved} shards whose file is gone: they are those")
        if self.number > first:
            numbers = f"{shard_name(first)} to {shard_name(self.number - 1)}"
            self.said.append(f"{name}: {self.number - first} new shards, {numbers}")
        elif old:
            self.said.append(f"{name}: written again with the same rows")
        if not found:
            self.blank[file] = mark

    @property
    def taking_over(self) -> bool:
        """Whether shards of an earlier version wait for their rows to be found; until then nothing is written."""
        return any(line.file == BEFORE for lines in self.orphans.values() for line in lines)

    def refuse_lost(self, add_changed: bool, stored: Stored) -> None:
        """Raise ConfigError, unless that is agreed, where the table has no longer the rows that an earlier version's
        shards were made of, and has others."""
        lost = [line for lines in self.orphans.values() for line in lines if line.file == BEFORE]
        new = self.number - self.first
        if not lost or not new or add_changed:
            return
        shards = sorted(line.shard for line in lost)
        committed, samples = stored(self.split, shards)
        if committed:
            raise ConfigError(
                f"{len(lost)} shards that an earlier version made ({shard_name(shards[0])} to "
                f"{shard_name(shards[-1])}, {samples:,} images) were made of other rows than the table has now, and "
                f"it makes {new} new ones. "
                "Nothing was touched. Put the table back as it was, and give new rows as a file of their own; or take "
                "its rows anew, as further shards, with --add-changed: what is stored stays, and a row that is there "
                "twice counts as a duplicate"
            )

    def flush(self) -> None:
        """Create the next part, if there is anything to say."""
        lines = [*self.lines, *(Line(-1, f, 0, 0, 0, bytes(16), m) for f, m in self.blank.items())]
        if lines:
            write_part(self.root, self.parts, lines)
            self.parts += 1
        self.lines, self.blank = [], {}

    def gone(self) -> Iterator[str]:
        """What is said of files that are not there any more."""
        left = [line for lines in self.orphans.values() for line in lines]
        if left:
            names = sorted({_name(line.file) for line in left})
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            are = "files are" if len(names) > 1 else "file is"
            yield f"{', '.join(names[:3])}{more}: {len(names)} {are} gone; their {len(left)} shards stay"
