"""Tables of URLs and captions, streamed: parquet, CSV, TSV, JSON lines (all also .gz), a file, folder or glob.

A .txt is a list of URLs, one a line, without captions.

The planner walks through the tables once and cuts them into shards of `samples_per_shard` rows. As in
img2dataset a shard never spans two files. What it hands to a worker is small: a file and a range of it
(rows of a parquet file, bytes of a text file), and a digest of the rows, so that an edited table is seen.
The worker reads that range again. Neither ever holds more than a block of a file in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ingest.config import ColumnsConfig
from ingest.formats import FORMAT, Columns, Cursor, batches, kept_type, read_schema, schema_of
from shards.settings import ConfigError, StageError

# LAION-400M/5B, COYO and DataComp use URL/TEXT or url/text, Re-LAION and img2dataset's own sidecars url/caption,
# laion-coco has a top_caption. Compared without regard to case, in this order.
URL_NAMES = ("url", "image_url", "img_url")
CAPTION_NAMES = ("caption", "text", "top_caption", "alt", "alt_text", "title", "txt")

_TEXT = re.compile(r"\.txt(\.gz)?\Z", re.IGNORECASE)

Keep = Callable[[pa.RecordBatch], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RowRange:
    """A shard's place in a table: rows (parquet) or bytes of the decompressed text, from start up to stop.

    rows: how many of the rows there belong to the split. digest: of these rows, in their order.
    """

    file: str
    start: int
    stop: int
    rows: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which columns are read, under which names and types they go on, from the first file of the table.

    columns: (name in the table, name from here on, type), URL and caption first.
    """

    files: tuple[str, ...]
    columns: Columns

    @property
    def schema(self) -> pa.Schema:
        """The schema of the batches that come out."""
        return schema_of(self.columns)


def list_files(table: str) -> list[str]:
    """The files of a table in a fixed order; raises ConfigError where there are none that can be read."""
    try:
        fs, path = fsspec.core.url_to_fs(table)
        there, folder = fs.exists(path), fs.isdir(path)
        if any(c in table for c in "*?[") and not there:
            found = sorted(p for p in fs.glob(path) if not _hidden(p))
        elif folder:
            found = sorted(p for p in fs.ls(path, detail=False) if FORMAT.search(p) and not _hidden(p))
            # Where there are tables, texts beside them are notes.
            found = [p for p in found if not _TEXT.search(p)] or found
        elif there:
            found = [path]
        else:
            raise ConfigError(f"ingest.table: there is no file or folder '{table}'")
    except ConfigError:
        raise
    except Exception as e:  # each kind of store has its own
        raise ConfigError(f"ingest.table: '{table}' cannot be opened: {' '.join(str(e).split())[:300]}") from None
    files = [str(fs.unstrip_protocol(p)) if "://" in table else str(p) for p in found]
    if not files:
        raise ConfigError(
            f"ingest.table: nothing in '{table}' ends in .parquet, .csv, .tsv or .jsonl (or those with .gz); "
            "folders below are reached by a glob such as tables/**/*.parquet"
        )
    for file in files:
        if not FORMAT.search(file):
            raise ConfigError(
                f"ingest.table: '{file}' ends in none of .parquet, .csv, .tsv, .jsonl, .txt, with or without .gz"
            )
    return files


def _hidden(path: str) -> bool:
    """Whether a file is a writer's own note, such as _metadata, or another program's: so all readers of tables."""
    return path.rstrip("/").rpartition("/")[2].startswith((".", "_"))


def make_plan(
    table: str, columns: ColumnsConfig, wanted: Sequence[str], welcome: Sequence[str] = (), captionless: bool = False
) -> Plan:
    """Find the URL, caption and `wanted` columns; raises ConfigError naming the columns that there are.

    welcome: columns that are read where the table has them, in any case. captionless: captions may be absent.
    """
    files = list_files(table)
    schema = read_schema(files[0], dict(columns.types))
    url = _find(schema, columns.url, URL_NAMES, "url", files[0])
    names = {n.lower() for n in schema.names}
    absent = captionless and columns.caption is None and names.isdisjoint(CAPTION_NAMES)
    caption = None if absent else _find(schema, columns.caption, CAPTION_NAMES, "caption", files[0])
    chosen: list[tuple[str | None, str, pa.DataType]] = [(url, "url", pa.string()), (caption, "caption", pa.string())]
    for name in dict.fromkeys(wanted):
        if name.lower() in ("url", "caption"):
            continue
        column = _named(schema, name, f"ingest names the column '{name}'", files[0])
        if column not in (url, caption):
            chosen.append((column, column, kept_type(schema.field(column).type)))
    taken = {source for source, _, _ in chosen}
    for column in schema.names:
        if column not in taken and column.lower() in welcome and schema.names.count(column) == 1:
            chosen.append((column, column, kept_type(schema.field(column).type)))
    return Plan(tuple(files), tuple(chosen))


def resolve(plan: Plan, name: str) -> str | None:
    """The name in `plan.schema` that a user's column name means (case is overlooked); None where there is none.

    `url` and `caption` always mean the columns that serve as such.
    """
    if name.lower() in ("url", "caption"):
        return name.lower()
    exact = {source: target for source, target, _ in plan.columns if source is not None}
    lower = {source.lower(): target for source, target in exact.items()}
    return exact.get(name) or lower.get(name.lower())


def shard_ranges(plan: Plan, samples_per_shard: int, keep: Keep | None = None) -> Iterator[RowRange]:
    """Cut the table into shards. keep: the split's rows of a batch, as bool [rows]; None for all of them."""
    for file in plan.files:
        digest, start, rows, stop = _RowDigest(plan.schema), 0, 0, 0
        for batch, ends in batches(file, plan.columns):
            chosen = np.arange(batch.num_rows) if keep is None else np.flatnonzero(keep(batch))
            while len(chosen):
                some = chosen[: samples_per_shard - rows]
                digest.update(take(batch, some))
                rows, stop, chosen = rows + len(some), int(ends[some[-1]]), chosen[len(some) :]
                if rows == samples_per_shard:
                    yield RowRange(file, start, stop, rows, digest.hexdigest())
                    digest, start, rows = _RowDigest(plan.schema), stop, 0
        if rows:
            yield RowRange(file, start, stop, rows, digest.hexdigest())


def read_range(plan: Plan, place: RowRange, keep: Keep | None = None, cursor: Cursor | None = None) -> pa.Table:
    """The rows of one shard; raises StageError where the file is no longer what the planner saw."""
    kept: list[pa.RecordBatch] = []
    digest = _RowDigest(plan.schema)
    for batch, _ in batches(place.file, plan.columns, place.start, place.stop, cursor):
        if keep is not None:
            batch = take(batch, np.flatnonzero(keep(batch)))
        digest.update(batch)
        kept.append(batch)
    table = pa.Table.from_batches(kept, plan.schema).combine_chunks()
    if table.num_rows != place.rows or digest.hexdigest() != place.digest:
        raise StageError(f"{place.file}: the table changed while it was being read; run the same command again")
    return table


def _find(schema: pa.Schema, given: str | None, names: Sequence[str], what: str, file: str) -> str:
    if given is not None:
        return _named(schema, given, f"ingest.columns.{what} is '{given}'", file)
    for name in names:
        for column in schema.names:
            if column.lower() == name:
                return _named(schema, column, f"the {what} is read from the column '{column}'", file)
    or_not = " (or ingest.empty_captions to keep, to do without)" if what == "caption" else ""
    raise ConfigError(
        f"{file}: no column is known to hold the {what}; "
        f"set ingest.columns.{what} to one of {', '.join(schema.names)}{or_not}"
    )


def _named(schema: pa.Schema, name: str, saying: str, file: str) -> str:
    if schema.names.count(name) > 1:
        raise ConfigError(f"{saying}, which {file} has {schema.names.count(name)} times; leave one of them")
    if name in schema.names:
        return name
    near = [c for c in schema.names if c.lower() == name.lower()]
    if len(near) == 1:
        return str(near[0])
    raise ConfigError(f"{saying}, which {file} does not have; its columns are {', '.join(schema.names)}")


def take(batch: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    """Some rows (int, ascending) of a batch."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return batch.slice(int(rows[0]), len(rows))
    return batch.take(pa.array(rows, pa.int64()))


class _RowDigest:
    """sha256 over the values of rows, whatever the batches and buffers they come in and whoever wrote the file."""

    def __init__(self, schema: pa.Schema) -> None:
        # Nulls, lengths and values of a column each have their own running hash, so that it does not matter
        # where one batch ends and the next begins.
        self._hashes = [[hashlib.sha256(f"{f.name}:{f.type}".encode()) for _ in range(3)] for f in schema]

    def update(self, batch: pa.RecordBatch) -> None:
        """Take in the rows of a batch."""
        for (nulls, lengths, values), array in zip(self._hashes, batch.columns, strict=True):
            nulls.update(array.is_null().to_numpy(zero_copy_only=False).astype(np.uint8).tobytes())
            if pa.types.is_string(array.type):
                array = array.fill_null("")
                lengths.update(pc.binary_length(array).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
                offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
                if len(array) and offsets[-1] > offsets[0]:
                    values.update(memoryview(array.buffers()[2])[offsets[0] : offsets[-1]])
            else:
                zero = False if pa.types.is_boolean(array.type) else 0
                values.update(array.fill_null(zero).to_numpy(zero_copy_only=False).tobytes())

    def hexdigest(self) -> str:
        """32 hex digits."""
        return hashlib.sha256(b"".join(h.digest() for three in self._hashes for h in three)).hexdigest()[:32]
