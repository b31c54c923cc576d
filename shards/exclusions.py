"""Which committed samples are not to be used, and why: one parquet, sorted by shard and row, read a piece at a time.

`dataset.json` names the file, whose name holds the digest of its bytes: an old manifest keeps its own file, and a
reader that opened it goes on. A reader reads the footer and then the row groups of the shards it is asked for, so that
its memory does not grow with the file: a footer is some 300 bytes for each 65,536 rows.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import storage
from shards.fingerprint import digest_file
from shards.settings import StageError

SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("winner", pa.int64()),
    ]
)
GROUP = 65_536
ROW_BITS = 20  # of an id; a shard of 10,000 rows needs 14


def sample_id(shard: int, row: int) -> int:
    """A sample's id, one number: the shard above the row's 20 bits."""
    if not 0 <= row < 1 << ROW_BITS:
        raise ValueError(f"row {row} does not fit into an id")
    return shard << ROW_BITS | row


def shard_row(sample_id: int) -> tuple[int, int]:
    """(shard, row) of an id."""
    return sample_id >> ROW_BITS, sample_id & (1 << ROW_BITS) - 1


def write_exclusions(root: str, tables: Iterable[pa.Table]) -> str | None:
    """Write the exclusions of a dataset as a new file; returns its name, for `write_manifest`, None without any.

    tables: columns of SCHEMA, all together in the order of (shard, row), each sample once; they are written as they
    come. winner: the id of the sample that is used instead, -1 where there is none. Raises ValueError where the
    order is another one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "exclusions.parquet")
        last, rows = -1, 0
        pending: list[pa.Table] = []
        with pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=["reason"]) as writer:
            for table in tables:
                if not table.num_rows:
                    continue
                table = table.select(SCHEMA.names).cast(SCHEMA)
                sample_ids = table["shard"].to_numpy().astype(np.int64) << ROW_BITS | table["row"].to_numpy()
                if sample_ids[0] <= last or (np.diff(sample_ids) <= 0).any():
                    raise ValueError("exclusions must come in the order of shard and row, each sample once")
                last, rows = int(sample_ids[-1]), rows + table.num_rows
                pending.append(table)
                if sum(t.num_rows for t in pending) >= GROUP:
                    joined = pa.concat_tables(pending).unify_dictionaries()
                    full = joined.num_rows // GROUP * GROUP
                    writer.write_table(joined.slice(0, full), row_group_size=GROUP)
                    pending = [joined.slice(full)] if full < joined.num_rows else []
            if pending:
                writer.write_table(pa.concat_tables(pending).unify_dictionaries(), row_group_size=GROUP)
        if not rows:
            return None
        name = f"exclusions-{digest_file(path)[:16]}.parquet"
        storage.put_file(path, storage.join(root, name))
        return name


class Exclusions:
    """The exclusions of one manifest. Safe to use from several threads; keeps the row groups it read last."""

    def __init__(self, root: str, name: str | None) -> None:
        self.url = None if name is None else storage.join(root, name)
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._parquet: Any = None
        self._cached: tuple[int, int, pa.Table] | None = None
        self._first = self._last = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """How many samples are excluded."""
        with self._lock:
            return 0 if self._open() is None else int(self._parquet.metadata.num_rows)

    def of(self, shard: int) -> pa.Table:
        """What is excluded of one shard, in the order of the rows; columns of SCHEMA."""
        with self._lock:
            if self._open() is None:
                return SCHEMA.empty_table()
            first = int(np.searchsorted(self._last, shard))
            end = int(np.searchsorted(self._first, shard, "right"))
            if first >= end:
                return SCHEMA.empty_table()
            if self._cached is None or self._cached[:2] != (first, end):
                self._cached = None
                self._cached = (first, end, self._parquet.read_row_groups(list(range(first, end)), use_threads=False))
            table = self._cached[2]
            shards = table["shard"].to_numpy()
            begin = int(np.searchsorted(shards, shard))
            return table.slice(begin, int(np.searchsorted(shards, shard, "right")) - begin)

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard that are excluded, int64, sorted."""
        return self.of(shard)["row"].to_numpy().astype(np.int64)

    def reasons(self, shard: int) -> dict[int, str]:
        """Why, by row."""
        table = self.of(shard)
        return dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """All of it, a row group at a time."""
        with self._lock:
            groups = 0 if self._open() is None else self._parquet.metadata.num_row_groups
        for group in range(groups):
            with self._lock:
                table = self._parquet.read_row_group(group, columns=columns, use_threads=False)
            yield table

    def counts(self) -> dict[int, int]:
        """How many samples of each shard are excluded; shards without any are not there."""
        found: dict[int, int] = {}
        for table in self.tables(["shard"]):
            shards, counts = np.unique(table["shard"].to_numpy(), return_counts=True)
            for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
                found[shard] = found.get(shard, 0) + count
        return found

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = self._parquet = self._cached = None

    def _open(self) -> Any:
        if self.url is None or self._parquet is not None:
            return self._parquet
        try:
            self._file = storage.open_read(self.url)
        except FileNotFoundError:
            raise StageError(
                f"{self.url}: the list of what is excluded is missing; run the stage again that makes this dataset"
            ) from None
        try:
            # Without pyarrow's read-ahead: its threads may hold the bytes until the interpreter ends.
            self._parquet = pq.ParquetFile(self._file, pre_buffer=False)
        except pa.ArrowInvalid as e:
            with contextlib.suppress(OSError):
                self._file.close()
            raise StageError(f"{self.url}: cannot be read ({e}); run the stage again that makes this dataset") from None
        metadata = self._parquet.metadata
        found = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
        self._first = np.array([s.min for s in found], np.int64)
        self._last = np.array([s.max for s in found], np.int64)
        return self._parquet

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Exclusions.__init__(self, "", None)
        self.url = state["url"]


class OldExclusions(Exclusions):
    """Those of a dataset of format 1: one file, of keys and places, read as a whole."""

    def _open(self) -> Any:
        if self.url is None or self._parquet is not None:
            return self._parquet
        try:
            table = storage.read_parquet(self.url)
        except FileNotFoundError:
            self.url = None
            return None
        table = converted(table)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=GROUP)
        self._parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue()), pre_buffer=False)
        metadata = self._parquet.metadata
        found = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
        self._first = np.array([s.min for s in found if s], np.int64)
        self._last = np.array([s.max for s in found if s], np.int64)
        return self._parquet


def converted(table: pa.Table) -> pa.Table:
    """Exclusions of format 1 (key, shard, row, reason, winner's key) in this format; the winners are left out."""
    table = table.sort_by([("shard", "ascending"), ("row", "ascending")])
    reason = table["reason"].combine_chunks().dictionary_encode()
    columns = [table["shard"], table["row"], reason, pa.array(np.full(table.num_rows, -1, np.int64))]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True))).cast(SCHEMA)
