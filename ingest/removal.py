"""Take-downs applied: find what is listed in a dataset's committed shards, and blank it where it lies.

Rows are found by the 64-bit digests of the sidecars (a million URLs in about a millisecond a shard), hosts by their
name in the URL's text, and then judged by the list itself. What is blanked keeps its digests and its place in the
sidecar, so what it excluded as a duplicate stays excluded. Rows that never gave an image stay as they are: no ingest
fetches them again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import idna
import pyarrow as pa

from ingest import statistics
from ingest.digests import SAMPLE_ID, connect, readable, run, sql_files, with_digests
from ingest.errors import ERRORS
from ingest.takedown import TakenDown
from shards import storage
from shards.blank import blank
from shards.exclusions import shard_row
from shards.layout import shard_name
from shards.progress import Progress

log = logging.getLogger("carrara.ingest")

MEMORY = "512MB"
_OF_URLS, _OF_BYTES = ("url_digest", "final_url_digest"), ("bytes_digest",)
_TEXTS = ("url", "final_origin")  # what hosts are found by
_OF_IMAGE = ("width", "height", "original_width", "original_height", "exif", "pixel_hash")
_LOCATION = ("image_offset", "image_size", "image_ext", "image_file")


@dataclasses.dataclass(frozen=True)
class Hit:
    """A row that is listed. live: it has an image. sha256: of an image that is listed by its URL, so of its copies
    too. by: the digests and hosts of the list that it was found by."""

    shard: int
    row: int
    key: str
    live: bool
    sha256: str | None
    by: frozenset[int | str]


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a look through some shards has found, of all that the parts of the list from `after` to before `parts` hold,
    and perhaps of more."""

    after: int
    parts: int
    shards: frozenset[int]
    hits: Sequence[Hit]

    def covers(self, shards: Iterable[int], after: int, parts: int) -> bool:
        """Whether it tells what these parts hold of these shards."""
        return self.after <= after and parts == self.parts and self.shards.issuperset(shards)


def find(
    root: str, shards: Iterable[tuple[int, bool]], listed: TakenDown, total: int = 0, name: str = "", threads: int = 2
) -> Iterator[Hit]:
    """The rows of these shards that are listed, also those that are out already.

    shards: (number, whether the sidecar holds digests). total, name: for the progress bar; none without a name. Of the
    sidecars the columns alone are read that something on the list can stand in.
    """
    if not listed:
        return
    bar = Progress(f"{name}: take-down", total, "shards") if name else None
    with tempfile.TemporaryDirectory(prefix="carrara-take-down-") as scratch:
        db = connect(os.path.join(scratch, "spill"), MEMORY, threads)
        try:
            for table, digests in (("urls", listed.urls), ("bytes", listed.bytes)):
                db.register("given", pa.table({"n": pa.array(digests.numbers, pa.uint64())}))
                run(db, f"CREATE TABLE listed_{table} AS SELECT DISTINCT n FROM given")
                db.unregister("given")
            columns = [
                *(_OF_URLS if len(listed.urls) else ()),
                *(_OF_BYTES if len(listed.bytes) else ()),
                *(_TEXTS if listed.hosts else ()),
            ]
            for files in readable(root, shards, columns, scratch):
                rows = run(
                    db,
                    f"SELECT {SAMPLE_ID}, {', '.join(columns)} FROM read_parquet({sql_files(files)}, filename = true, "
                    f"file_row_number = true) WHERE {_condition(listed)}",
                )
                yield from _hits(root, columns, sorted(rows), listed)
                if bar is not None:
                    bar.update(len(files))
        finally:
            db.close()
            if bar is not None:
                bar.close()


def _condition(listed: TakenDown) -> str:
    tests = ["false"]
    if len(listed.urls):
        tests += [f"{c} IN (SELECT n FROM listed_urls)" for c in _OF_URLS]
    if len(listed.bytes):
        tests.append("bytes_digest IN (SELECT n FROM listed_bytes)")
    if listed.hosts:
        # IPv6 addresses have many spellings, so whatever has one is looked at.
        names = {"[" if entry.count(":") > 1 else entry.strip(".").partition(":")[0] for entry in listed.hosts}
        texts = [n.replace("'", "''") for n in sorted(names | set(map(_unicode, names)))]
        for column in ("url", "final_origin"):
            # A host that is not written in plain letters is looked at closely, whatever it is.
            odd = f"NOT regexp_full_match({column}, '[!-$&-~]*') OR contains({column}, '%')"
            named = " OR ".join(f"contains(lower({column}), '{text}')" for text in texts)
            tests.append(f"({column} IS NOT NULL AND ({named} OR {odd}))")
    return " OR ".join(tests)


def _unicode(name: str) -> str:
    try:
        return idna.decode(name)
    except (idna.IDNAError, UnicodeError):
        return name


def _hits(root: str, columns: Sequence[str], rows: Iterable[tuple[Any, ...]], listed: TakenDown) -> Iterator[Hit]:
    """The rows (id, then columns) that are listed indeed. The long columns are read of their shards alone."""
    found = [
        (*shard_row(sample_id), judged)
        for sample_id, *values in rows
        if (judged := _judge(dict(zip(columns, values, strict=True)), listed)) is not None
    ]
    for shard, some in itertools.groupby(found, key=lambda one: one[0]):
        chosen = [(row, judged) for _, row, judged in some]
        table = storage.read_parquet(storage.join(root, shard_name(shard) + ".parquet"), ["key", "status", "sha256"])
        facts = table.take(pa.array([row for row, _ in chosen], pa.int64())).to_pylist()
        for (row, (by, by_url)), fact in zip(chosen, facts, strict=True):
            live = fact["status"] == "success"
            yield Hit(shard, row, fact["key"], live, fact["sha256"] if by_url and live else None, by)


def _judge(row: dict[str, Any], listed: TakenDown) -> tuple[frozenset[int | str], bool] | None:
    """What of the list a row was found by, and whether by its URL or host; None where it is not listed."""
    by: set[int | str] = {n for c in _OF_URLS if (n := row.get(c)) is not None and listed.urls.has_number(n)}
    if listed.hosts:
        for text in (row["url"], row["final_origin"]):
            by |= listed.hosts_of(text or "")
    by_url = bool(by)
    digest = row.get("bytes_digest")
    if digest is not None and listed.bytes.has_number(digest):
        by.add(digest)
    return (frozenset(by), by_url) if by else None


def take_out(root: str, hits: Iterable[Hit], parts: int, name: str = "") -> set[int]:
    """Blank the images of these rows; returns the shards that changed. parts: of the list, for the shards' stats."""
    by_shard: dict[int, list[Hit]] = {}
    for hit in hits:
        if hit.live:
            by_shard.setdefault(hit.shard, []).append(hit)
    bar = Progress(f"{name}: blanking", len(by_shard), "shards") if name and by_shard else None
    for shard, some in sorted(by_shard.items()):
        blank(root, shard, [h.row for h in some], _edit([h.row for h in some], parts))
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    return set(by_shard)


def _edit(rows: Sequence[int], parts: int) -> Any:
    """For shards.blank: sidecar and stats of a shard without the images of these rows."""
    gone = set(rows)

    def edit(table: pa.Table, stats: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        table = with_digests(table)
        fates = {"status": "opted_out", "error": "taken_down", "error_message": ERRORS["taken_down"].meaning}
        for column in (*fates, *_OF_IMAGE, *_LOCATION):
            if column in table.column_names:
                values = table[column].to_pylist()
                values = [fates.get(column) if i in gone else v for i, v in enumerate(values)]
                at = table.schema.get_field_index(column)
                table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
        counted = statistics.counts_of(*(table[n].to_pylist() for n in ("status", "error", "error_message")))
        return table, {**stats, **counted, "digests": True, "list": parts}

    return edit
