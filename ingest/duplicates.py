"""Duplicates over a whole run: a pass over the sidecars, once every shard is there.

A sample is a duplicate where an older one (by its id: shard, then row) has the same URL and caption, the same
fetched bytes and caption, or (if so configured) an image that looks alike. One image under several captions is no
duplicate, unless the configuration says so. A sample whose bytes the other split holds is left out as well, so that
train and held-out share none. Then samples beyond the permitted number of one caption go.

The older one wins, so neither growth nor a retry changes what is excluded in a shard that was there before. What was
taken down keeps its digests and its id: what it excluded stays excluded.

The digests of the sidecars go into a database (duckdb) that spills to disk beyond its limit of memory. Perceptual
hashes within a distance d share at least one of d + 1 bands of their bits (pigeonhole), so only hashes with a common
band are compared, all of them: nothing within the distance is missed.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from ingest.config import DuplicatesConfig
from ingest.digests import SAMPLE_ID, connect, quietly, readable, run, sql_files, stream
from shards import exclusions

MEMORY = "1GB"
PARTITION_RECORDS = 4_000_000

# In the order in which they are looked for; of several that hold for a sample the oldest winner counts.
REASONS = ("duplicate_url", "duplicate_bytes", "duplicate_picture", "in_other_split", "caption_repeated")

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("id", "<i8")])
_HASH_BITS = 64
_COMPARED_AT_ONCE = 1 << 22  # pairs of hashes, a few times 32 MB

# Rows that were taken down win against others, but they are nobody's duplicates.
_ROWS = """INSERT INTO rows SELECT {id}, status = 'success', url_digest, bytes_digest, caption_digest, {phash}
  FROM read_parquet({files}, filename = true, file_row_number = true)
  WHERE status = 'success' OR (error = 'taken_down' AND bytes_digest IS NOT NULL)"""
_SAME = """INSERT INTO found SELECT id, winner, {reason} FROM rows JOIN
    (SELECT {by}, min(id) AS winner FROM rows GROUP BY {by} HAVING count(*) > 1) USING ({by})
  WHERE live AND id <> winner"""
_REPEATS = """INSERT INTO found SELECT id, first, {reason} FROM
    (SELECT id, live, row_number() OVER w AS n, min(id) OVER (PARTITION BY c) AS first FROM rows
     SEMI JOIN (SELECT c FROM rows GROUP BY c HAVING count(*) > {most}) USING (c) ANTI JOIN found USING (id)
     WINDOW w AS (PARTITION BY c ORDER BY id)) WHERE n > {most} AND live"""
_ELSEWHERE = """INSERT INTO shared SELECT DISTINCT bytes_digest FROM
    (SELECT {id} AS id, bytes_digest FROM read_parquet({files}, filename = true, file_row_number = true)
     WHERE status = 'success') ANTI JOIN gone USING (id)
  WHERE bytes_digest IN (SELECT b FROM rows WHERE live)"""
# One line a sample: the oldest winner and its reason.
_LEFT_OUT = """CREATE TABLE out AS SELECT id, min(winner) AS winner,
    arg_min(reason, coalesce(winner, id) * 8 + reason) AS reason FROM found GROUP BY id"""
# The winner by one rule may be out by another; ids only go down.
_CHAIN = """UPDATE out SET winner = other.winner FROM out AS other
  WHERE out.winner = other.id AND other.winner IS NOT NULL"""


@dataclasses.dataclass(frozen=True)
class Sidecars:
    """The sidecars of a dataset. shards: (number, whether the sidecar holds digests), again at each call."""

    root: str
    shards: Callable[[], Iterable[tuple[int, bool]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """statuses: rows by status. reasons: samples left out, by reason."""

    statuses: Counter[str]
    reasons: Counter[str]


def find_duplicates(
    mine: Sidecars,
    write: Callable[[Iterable[pa.Table]], Any],
    rules: DuplicatesConfig | None = None,
    caption_repeats: int | None = None,
    other: Sidecars | None = None,
    other_exclusions: exclusions.Exclusions | None = None,
    memory: str = MEMORY,
    threads: int = 2,
    progress: Callable[[int], Any] | None = None,
) -> Found:
    """Find what is to be left out of a dataset, and hand it to `write` as tables of shards.exclusions.SCHEMA, in order.

    other: the other split. progress: called with the number of sidecars that were read. Takes `memory` and about as
    much again, and scratch space of some 50 bytes a sample in the folder for temporary files (TMPDIR).
    """
    rules = rules or DuplicatesConfig()
    with tempfile.TemporaryDirectory(prefix="carrara-duplicates-") as scratch:
        db = connect(os.path.join(scratch, "spill"), memory, threads)
        try:
            statuses = _load(db, mine, scratch, rules.perceptual != "off", progress)
            _find(db, rules, scratch)
            if other is not None:
                _find_elsewhere(db, other, other_exclusions, scratch, progress)
            if caption_repeats is not None:
                run(db, _REPEATS.format(reason=REASONS.index("caption_repeated"), most=caption_repeats))
            run(db, _LEFT_OUT)
            while run(db, _CHAIN)[0][0]:
                pass
            counts = run(db, "SELECT reason, count(*) FROM out GROUP BY reason")
            write(_tables(db))
        finally:
            db.close()
    return Found(statuses, Counter({REASONS[r]: n for r, n in counts}))


def _load(
    db: duckdb.DuckDBPyConnection, mine: Sidecars, scratch: str, hashes: bool, progress: Callable[[int], Any] | None
) -> Counter[str]:
    run(db, "CREATE TABLE rows (id BIGINT, live BOOLEAN, u UBIGINT, b UBIGINT, c UBIGINT, p UBIGINT)")
    run(db, "CREATE TABLE found (id BIGINT, winner BIGINT, reason TINYINT)")
    columns = ["status", "error", "url_digest", "bytes_digest", "caption_digest", *(["phash"] if hashes else [])]
    phash = "('0x' || phash)::UBIGINT" if hashes else "NULL"
    statuses: Counter[str] = Counter()
    for files in readable(mine.root, mine.shards(), columns, scratch):
        listed = sql_files(files)
        run(db, _ROWS.format(id=SAMPLE_ID, phash=phash, files=listed))
        for status, count in run(db, f"SELECT status, count(*) FROM read_parquet({listed}) GROUP BY status"):
            statuses[status] += count
        quietly(progress, len(files))
    return statuses


def _find(db: duckdb.DuckDBPyConnection, rules: DuplicatesConfig, scratch: str) -> None:
    if rules.url:
        run(db, _SAME.format(reason=REASONS.index("duplicate_url"), by="u, c"))
    if rules.bytes:
        run(db, _SAME.format(reason=REASONS.index("duplicate_bytes"), by="b, c"))
    if rules.perceptual == "off":
        return
    by = "p, c" if rules.perceptual == "same_caption" else "p"
    reason = REASONS.index("duplicate_picture")
    run(db, _SAME.format(reason=reason, by=by))
    if rules.distance:
        # What holds for a hash holds for its repeats, so only the first of each goes on.
        run(db, f"CREATE TABLE firsts AS SELECT min(id) AS id, {by} FROM rows WHERE p IS NOT NULL GROUP BY {by}")
        for pairs in _alike(db, "c" if "c" in by else "0::UBIGINT", rules.distance, scratch):
            db.register("pairs", pairs)
            same = " AND ".join(f"rows.{n} = firsts.{n}" for n in by.split(", "))
            run(
                db,
                f"INSERT INTO found SELECT rows.id, pairs.winner, {reason} FROM pairs JOIN firsts USING (id) "
                f"JOIN rows ON {same} WHERE rows.live",
            )
            db.unregister("pairs")


def _find_elsewhere(
    db: duckdb.DuckDBPyConnection,
    other: Sidecars,
    left_out: exclusions.Exclusions | None,
    scratch: str,
    progress: Callable[[int], Any] | None,
) -> None:
    run(db, "CREATE TABLE gone (id BIGINT)")
    run(db, "CREATE TABLE shared (b UBIGINT)")
    for table in left_out.tables() if left_out is not None else ():
        shards, rows = (table[n].cast(pa.int64()).to_numpy() for n in ("shard", "row"))
        db.register("more", pa.table({"id": (shards << 20) | rows}))
        run(db, "INSERT INTO gone SELECT id FROM more")
        db.unregister("more")
    for files in readable(other.root, other.shards(), ["status", "bytes_digest"], scratch):
        run(db, _ELSEWHERE.format(id=SAMPLE_ID, files=sql_files(files)))
        quietly(progress, len(files))
    reason = REASONS.index("in_other_split")
    run(db, f"INSERT INTO found SELECT id, NULL, {reason} FROM rows SEMI JOIN shared USING (b) WHERE live")


def _tables(db: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    for batch in stream(db, "SELECT id, winner, reason FROM out ORDER BY id", 1 << 16):
        sample_ids = batch.column("id").to_numpy()
        columns = {
            "shard": pa.array(sample_ids >> 20, pa.int32()),
            "row": pa.array(sample_ids & 0xFFFFF, pa.int32()),
            "reason": pa.DictionaryArray.from_arrays(batch.column("reason").cast(pa.int8()), pa.array(REASONS)),
            "winner": batch.column("winner").fill_null(-1),
        }
        yield pa.table(columns, exclusions.SCHEMA)


# ---- images that look alike ------------------------------------------------------------------------------


def _alike(db: duckdb.DuckDBPyConnection, caption: str, distance: int, scratch: str) -> Iterator[pa.Table]:
    """(id, winner) of every first of a hash that has an older one within `distance`, a table a partition.

    24 bytes a hash and band go to partition files by band; one file is open and one partition in memory at a time.
    """
    ((count,),) = run(db, "SELECT count(*) FROM firsts")
    partitions = max(1, -(-count * (distance + 1) // PARTITION_RECORDS))
    files = [Path(scratch, f"band-{p}") for p in range(partitions)]
    for file in files:
        file.touch()
    for batch in stream(db, f"SELECT id, p, {caption} AS c FROM firsts", 1 << 20):
        hashes, captions, sample_ids = (batch.column(n).to_numpy() for n in ("p", "c", "id"))
        records = _band_records(hashes, captions, sample_ids, distance)
        home = records["high"] % np.uint64(partitions)
        records = records[np.argsort(home, kind="stable")]
        ends = np.cumsum(np.bincount(home.astype(np.int64), minlength=partitions))
        for file, part in zip(files, np.split(records, ends[:-1]), strict=True):
            if len(part):
                with open(file, "ab") as out:
                    out.write(part.tobytes())
    for file in files:
        pairs = np.array(list(_near(np.fromfile(file, _RECORD), distance)), np.int64).reshape(-1, 2)
        file.unlink()
        if len(pairs):
            yield pa.table({"id": pairs[:, 0], "winner": pairs[:, 1]})


def _band_records(bits: np.ndarray, captions: np.ndarray, sample_ids: np.ndarray, distance: int) -> np.ndarray:
    """distance + 1 records a sample: `high` stands for a band's bits and the caption, `low` is the hash."""
    parts = []
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        value = (bits >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        part = np.zeros(len(sample_ids), _RECORD)
        with np.errstate(over="ignore"):
            part["high"] = _mix(_mix(value + np.uint64(band << 60)) ^ captions)
        part["low"], part["id"] = bits, sample_ids
        parts.append(part)
    return np.concatenate(parts)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): uint64 -> uint64, a bijection that spreads each bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _near(records: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """(id, id of the oldest within `distance` bits that shares `high`) of every record that has one."""
    records = records[np.lexsort((records["id"], records["high"]))]
    groups = np.flatnonzero(np.concatenate([[True], records["high"][1:] != records["high"][:-1]]))
    for start, stop in zip(groups, np.append(groups[1:], len(records)), strict=True):
        if stop - start < 2:
            continue
        hashes, sample_ids = records["low"][start:stop], records["id"][start:stop]
        step = max(1, _COMPARED_AT_ONCE // len(hashes))
        for begin in range(0, len(hashes), step):
            some = slice(begin, begin + step)
            # Row by row of the block, the oldest of those before it that is near.
            near = np.bitwise_count(hashes[some, None] ^ hashes[None, :]) <= distance
            near &= sample_ids[None, :] < sample_ids[some, None]
            for i in np.flatnonzero(near.any(axis=1)):
                yield int(sample_ids[begin + i]), int(sample_ids[near[i].argmax()])
