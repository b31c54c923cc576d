"""Tables of URLs and captions, streamed: parquet, CSV, TSV, JSON lines (all also .gz), a file, folder or glob.

A .txt is a list of URLs, one a line, without captions.

`TableSource` walks through a file once and cuts it into ranges of `samples_per_shard` rows, for both splits at a time
(shards/plan.py gives them their numbers). As in img2dataset a shard never spans two files. What a worker is handed is
small: a file and a range of it (rows of a parquet file, bytes of a text file), and a digest of the rows, so that an
edited table is seen. The worker reads that range again. Neither ever holds more than a block of a file in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ingest import captions
from ingest.config import ColumnsConfig
from ingest.formats import FORMAT, Columns, Cursor, batches, holds_lists, is_list, kept_type, read_schema, schema_of
from shards.plan import Line, Range
from shards.settings import ConfigError, StageError

# LAION-400M/5B, COYO and DataComp use URL/TEXT or url/text, Re-LAION and img2dataset's own sidecars url/caption,
# laion-coco has a top_caption. Compared without regard to case, in this order.
URL_NAMES = ("url", "image_url", "img_url")
CAPTION_NAMES = ("caption", "text", "top_caption", "alt", "alt_text", "title", "txt")

_TEXT = re.compile(r"\.txt(\.gz)?\Z", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which columns are read, under which names and types they go on, from the first file that was planned.

    columns: (name in the table, name from here on, type), URL and caption first. looked_at: so many of the last ones
    are merely compared with the images: they are no part of what a shard is made of. caption_lists: the caption
    column holds lists of captions, which go on as JSON text; the first of them is the caption.
    """

    files: tuple[str, ...]
    columns: Columns
    looked_at: int = 0
    caption_lists: bool = False

    @property
    def made_of(self) -> Columns:
        """The columns that the digest of rows covers: URL, caption, those that are kept or filtered by."""
        return self.columns[: len(self.columns) - self.looked_at]

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
            f"ingest.table: '{table}' holds neither images nor tars, and nothing in it ends in .parquet, .csv, .tsv or "
            ".jsonl (or those with .gz); folders below are reached by a glob such as tables/**/*.parquet"
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


def read_layout(
    table: str,
    columns: ColumnsConfig,
    wanted: Sequence[str],
    welcome: Sequence[str] = (),
    captionless: bool = False,
    planned: Sequence[str] = (),
) -> Layout:
    """Find the URL, caption and `wanted` columns; raises ConfigError naming the columns that there are.

    welcome: columns that are read where the table has them, in any case. captionless: captions may be absent. planned:
    the files that were there first, so that one that came later and sorts before them changes no types.
    """
    files = list_files(table)
    first = next((f for f in planned if f in files), files[0])
    if _TEXT.search(first):
        _require_urls(first)
    schema = read_schema(first, dict(columns.types))
    url = _find(schema, columns.url, URL_NAMES, "url", first)
    names = {n.lower() for n in schema.names}
    absent = captionless and columns.caption is None and names.isdisjoint(CAPTION_NAMES)
    caption = None if absent else _find(schema, columns.caption, CAPTION_NAMES, "caption", first)
    _check_texts(schema, url, caption, first)
    chosen: list[tuple[str | None, str, pa.DataType]] = [(url, "url", pa.string()), (caption, "caption", pa.string())]
    for name in dict.fromkeys(wanted):
        if name.lower() in ("url", "caption"):
            continue
        column = _named(schema, name, f"ingest names the column '{name}'", first)
        if column not in (url, caption):
            chosen.append((column, column, kept_type(schema.field(column).type)))
    taken = {source for source, _, _ in chosen}
    looked_at = [
        (column, column, kept_type(schema.field(column).type))
        for column in schema.names
        if column not in taken and column.lower() in welcome and schema.names.count(column) == 1
    ]
    lists = caption is not None and is_list(schema.field(caption).type)
    return Layout(tuple(files), (*chosen, *looked_at), len(looked_at), lists)


def _require_urls(file: str) -> None:
    """Raise ConfigError where a .txt is no list of URLs: the captions beside the images of a folder, say."""
    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            line = stream.readline(1000).decode("utf-8", "replace").strip()
    except (OSError, EOFError) as e:
        raise ConfigError(f"{file}: cannot be read: {e}") from None
    if line and "://" not in line:
        raise ConfigError(
            f"{file}: a .txt is read as a list of URLs, one a line, and this one begins with '{line[:60]}'; give "
            "ingest.table a table of URLs and captions (.parquet, .csv, .tsv, .jsonl), or the folder of images with "
            "their captions beside"
        )


def _check_texts(schema: pa.Schema, url: str, caption: str | None, file: str) -> None:
    """Raise ConfigError where the URL or caption column cannot hold such."""
    kinds = {url: schema.field(url).type, **({caption: schema.field(caption).type} if caption is not None else {})}
    for name, kind in kinds.items():
        value = kind.value_type if pa.types.is_dictionary(kind) or (name == caption and is_list(kind)) else kind
        if pa.types.is_nested(value) or (
            name == url and (pa.types.is_binary(value) or pa.types.is_large_binary(value))
        ):
            what = "URLs" if name == url else "captions"
            raise ConfigError(
                f"{file}: the column '{name}' holds {kind}, not {what}"
                + ("; set ingest.source.kind: parquet to read images from it" if name == url else "")
            )


def first_values(layout: Layout, names: Mapping[str, str]) -> dict[str, list[object]]:
    """Of the first rows of the table, the values of some columns: the layout's names by what they are to be called."""
    for batch, _ in batches(layout.files[0], layout.columns):
        return {called: batch.column(name).to_pylist() for called, name in names.items()}
    return {}


def first_caption(text: str | None) -> str:
    """The first caption of a list in JSON that is not blank, empty where there is none; a text that is no list."""
    try:
        values = json.loads(text or "[]")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list):
        return text or ""
    return next((t for t in values if isinstance(t, str) and t.strip()), "")


def resolve(layout: Layout, name: str) -> str | None:
    """The name in `layout.schema` that a user's column name means (case is overlooked); None where there is none.

    `url` and `caption` always mean the columns that serve as such.
    """
    if name.lower() in ("url", "caption"):
        return name.lower()
    exact = {source: target for source, target, _ in layout.columns if source is not None}
    lower = {source.lower(): target for source, target in exact.items()}
    return exact.get(name) or lower.get(name.lower())


@dataclasses.dataclass(frozen=True)
class HeldoutRule:
    """Which rows are held out: by the hash of the caption, cleaned and without case, so that a caption is on one side.

    fraction: of distinct captions. seed: of the hash. steps: of the cleaning. lists: the captions are lists in JSON.
    hash: a name in HASHES; a run keeps the one that it was begun with.
    """

    fraction: float
    seed: int
    steps: tuple[str, ...]
    lists: bool = False
    hash: str = "polynomial"

    def __call__(self, batch: pa.RecordBatch) -> np.ndarray:
        """Which rows of a batch are held out, bool [rows]."""
        column = batch.column("caption")
        if self.lists:
            column = pa.array([first_caption(t) for t in column.to_pylist()], pa.string())
        hashes = HASHES[self.hash](captions.clean_all(column, self.steps), self.seed)
        return hashes < int(self.fraction * 2**64)


def blake2b(texts: pa.Array, seed: int) -> np.ndarray:
    """A hash of each text without case, uint64 [texts]: that of runs which were begun before there was another."""
    salt = seed.to_bytes(8, "little", signed=True)
    words = (text.casefold().encode("utf-8", "surrogatepass") for text in texts.to_pylist())
    return np.frombuffer(b"".join(hashlib.blake2b(w, digest_size=8, salt=salt).digest() for w in words), "<u8")


_BLOCK = 1 << 16  # of a longer caption so many bytes count


def polynomial(texts: pa.Array, seed: int) -> np.ndarray:
    """A hash of each text (string array without nulls) in lower case, uint64 [texts].

    The sum of its bytes by the powers of a number, modulo 2**64 (Karp and Rabin, 1987), then a key and MurmurHash3's
    last steps, so that alike texts have unlike hashes. Number and key are drawn by the seed.
    """
    powers, inverses, key = _drawn(seed)
    found = np.zeros(len(texts), np.uint64)
    edges, data = captions.bytes_of(pc.utf8_lower(texts)) if len(texts) else (np.zeros(1, np.int32), np.zeros(0))
    row = 0
    while row < len(texts):
        stop = max(int(np.searchsorted(edges, edges[row] + _BLOCK, side="right")) - 1, row + 1)
        block = data[edges[row] : min(edges[stop], edges[row] + _BLOCK)]
        some = row + np.flatnonzero(
            edges[row:stop] < edges[row + 1 : stop + 1]
        )  # a sum of no bytes is not known to numpy
        at = edges[some] - edges[row]
        if len(some):  # the powers begin anew with each block, and what a text's place in it adds is taken out
            found[some] = np.add.reduceat(block * powers[: len(block)], at) * inverses[at]
        row = stop
    found ^= key
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        found ^= found >> np.uint64(33)
        found *= factor
    return found ^ (found >> np.uint64(33))


@functools.lru_cache(4)
def _drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.uint64]:
    """The powers of a number, those of its inverse, uint64 [_BLOCK], and a key."""
    drawn = hashlib.blake2b(seed.to_bytes(8, "little", signed=True)).digest()
    number = int.from_bytes(drawn[:8], "little") & ~7 | 5  # of these the powers repeat latest
    found = np.ones((2, _BLOCK), np.uint64)
    found[0, 1:], found[1, 1:] = np.uint64(number), np.uint64(pow(number, -1, 2**64))
    powers, inverses = np.cumprod(found, axis=1)
    return powers, inverses, np.uint64(int.from_bytes(drawn[8:16], "little"))


HASHES: dict[str, Callable[[pa.Array, int], np.ndarray]] = {"blake2b": blake2b, "polynomial": polynomial}


@dataclasses.dataclass(frozen=True)
class TableSource:
    """Implements shards.plan.Source for a table. heldout: where one table has both splits, else every row is of any.

    former: give the digests that earlier versions made as well, where these covered more columns.
    """

    layout: Layout
    samples_per_shard: int
    heldout: HeldoutRule | None = None
    former: bool = False

    def files(self) -> Sequence[str]:
        """The files of the table."""
        return self.layout.files

    def ranges(self, file: str, cuts: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Range]]:
        """The ranges of a file's rows for each split in `cuts`, in one walk; raises ConfigError where its captions are
        lists and those of the files before are not, since their shards have no place for more than one."""
        caption = self.layout.columns[1][0]
        if caption is not None and not self.layout.caption_lists and holds_lists(file, caption):
            raise ConfigError(
                f"{file}: the column '{caption}' holds lists of captions, and in the files before it one text; write "
                "one text a row here too, or ingest this file into a run of its own"
            )
        former = self.former and self.layout.looked_at > 0
        open_ = {split: _OpenRange(self.layout, self.samples_per_shard, sizes, former) for split, sizes in cuts.items()}
        for batch, ends in batches(file, self.layout.columns):
            mask = None if self.heldout is None else self.heldout(batch)
            for split, one in open_.items():
                chosen = np.arange(batch.num_rows) if mask is None else np.flatnonzero(mask == (split == "heldout"))
                for found in one.take(batch, ends, chosen):
                    yield split, found
        for split, one in open_.items():
            if one.rows:
                yield split, one.close()


class _OpenRange:
    """The range of a split that the walk through a file is in."""

    def __init__(self, layout: Layout, full: int, sizes: Sequence[int], former: bool) -> None:
        self._layout, self._full, self._former = layout, full, former
        self._sizes = list(sizes)
        self._start = self._stop = 0
        self._begin()

    def _begin(self) -> None:
        self._size = self._sizes.pop(0) if self._sizes else self._full
        self._digest = RowDigest(self._layout.made_of)
        self._former_digest = RowDigest(self._layout.columns) if self._former else None
        self.rows = 0

    def take(self, batch: pa.RecordBatch, ends: np.ndarray, chosen: np.ndarray) -> Iterator[Range]:
        """Take in the chosen rows (int, ascending) of a batch; yields what is full."""
        while len(chosen):
            some = chosen[: self._size - self.rows]
            part = take(batch, some)
            self._digest.update(part)
            if self._former_digest is not None:
                self._former_digest.update(part)
            self.rows, self._stop, chosen = self.rows + len(some), int(ends[some[-1]]), chosen[len(some) :]
            if self.rows == self._size:
                yield self.close()

    def close(self) -> Range:
        """End the range here, and begin the next."""
        former = None if self._former_digest is None else self._former_digest.digest()
        found = Range(self._start, self._stop, self.rows, self._digest.digest(), former)
        self._start = self._stop
        self._begin()
        return found


def read_range(
    layout: Layout,
    line: Line,
    heldout: HeldoutRule | None = None,
    split: str = "train",
    cursor: Cursor | None = None,
) -> pa.Table:
    """The rows of one shard; raises StageError where the file is no longer what the planner saw."""
    kept: list[pa.RecordBatch] = []
    digests = [RowDigest(c) for c in dict.fromkeys((layout.made_of, layout.columns))]
    for batch, _ in batches(line.file, layout.columns, line.start, line.stop, cursor):
        if heldout is not None:
            batch = take(batch, np.flatnonzero(heldout(batch) == (split == "heldout")))
        for digest in digests:
            digest.update(batch)
        kept.append(batch)
    table = pa.Table.from_batches(kept, layout.schema).combine_chunks()
    # The second digest is that of a shard which an earlier version planned.
    if table.num_rows != line.rows or line.digest not in [d.digest() for d in digests]:
        raise StageError(f"{line.file}: the table changed while it was being read; run the same command again")
    return table


def _find(schema: pa.Schema, given: str | None, names: Sequence[str], what: str, file: str) -> str:
    if given is not None:
        return _named(schema, given, f"ingest.columns.{what} is '{given}'", file)
    for name in names:
        for column in schema.names:
            if column.lower() == name:
                return _named(schema, column, f"the {what} is read from the column '{column}'", file)
    holds = [f"'{f.name}' holds {f.type}" for f in schema if _holds_bytes(f.type)] if what == "url" else []
    if holds:
        raise ConfigError(
            f"{file}: no column is known to hold the url, and {holds[0]}: if these are images, set "
            "ingest.source.kind: parquet and ingest.source.image_column"
        )
    or_not = " (or ingest.empty_captions to keep, to do without)" if what == "caption" else ""
    raise ConfigError(
        f"{file}: no column is known to hold the {what}; "
        f"set ingest.columns.{what} to one of {', '.join(schema.names)}{or_not}"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


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


class RowDigest:
    """sha256 over the values of rows, whatever the batches and buffers they come in and whoever wrote the file."""

    def __init__(self, columns: Columns) -> None:
        # Nulls, lengths and values of a column each have their own running hash, so that it does not matter
        # where one batch ends and the next begins.
        self._hashes = [[hashlib.sha256(f"{f.name}:{f.type}".encode()) for _ in range(3)] for f in schema_of(columns)]

    def update(self, batch: pa.RecordBatch) -> None:
        """Take in the rows of a batch, whose first columns are those that this digest covers."""
        for (nulls, lengths, values), array in zip(self._hashes, batch.columns, strict=False):
            nulls.update(array.is_null().to_numpy(zero_copy_only=False).astype(np.uint8).tobytes())
            if pa.types.is_string(array.type):
                array = array.fill_null("") if array.null_count else array
                lengths.update(pc.binary_length(array).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
                offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
                if len(array) and offsets[-1] > offsets[0]:
                    values.update(memoryview(array.buffers()[2])[offsets[0] : offsets[-1]])
            else:
                zero = False if pa.types.is_boolean(array.type) else 0
                values.update(array.fill_null(zero).to_numpy(zero_copy_only=False).tobytes())

    def digest(self) -> bytes:
        """16 bytes."""
        return hashlib.sha256(b"".join(h.digest() for three in self._hashes for h in three)).digest()[:16]
