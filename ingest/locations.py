"""Where the bytes of an image of one's own lie, as text in a table's row, and reading them.

    /data/photos/cat.jpg                                           a file (a path, or any fsspec URL but http)
    s3://bucket/00000.tar#member=000123.jpg&offset=512&size=40960  a member of a tar
    /data/train.parquet#column=image&row=17                        a value of a parquet or Arrow file

Such text may stand in a table that came from elsewhere, so only what lies below folders that the configuration names
is read, and a link that leads out of them is not followed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ingest.errors import Rejected

_MEMBER = re.compile(r"(.+)#member=([^#&]*)&offset=(\d{1,18})&size=(\d{1,18})\Z", re.DOTALL)
_VALUE = re.compile(r"(.+)#column=([^#&]+)&row=(\d{1,18})\Z", re.DOTALL)
_WEB = re.compile(r"\s*https?:", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_BATCH, _BATCH_BYTES = 64, 8 << 20  # rows of a parquet file that are read together, and about how many bytes
_KEPT = 8  # batches that a worker keeps, since rows are asked for nearly in order


def is_web(url: str) -> bool:
    """Whether a row's text is a URL for the web client, rather than a location of one's own."""
    return _WEB.match(url) is not None


def member(tar: str, name: str, offset: int, size: int) -> str:
    """The location of a member of a tar. offset, size: of its data, in bytes."""
    return f"{tar}#member={quote(name, safe='', errors='replace')}&offset={offset}&size={size}"


def value(file: str, column: str, row: int) -> str:
    """The location of a value of a parquet or Arrow file."""
    return f"{file}#column={quote(column, safe='')}&row={row}"


@dataclasses.dataclass(frozen=True)
class Location:
    """A location, taken apart. offset, size: of a tar's member; column, row: of a table's value."""

    file: str
    offset: int | None = None
    size: int | None = None
    column: str | None = None
    row: int | None = None

    @classmethod
    def parse(cls, text: str) -> Location:
        """Any text is some location: what has no known end is a file."""
        if found := _MEMBER.match(text):
            return cls(found[1], offset=int(found[3]), size=int(found[4]))
        if found := _VALUE.match(text):
            return cls(found[1], column=unquote(found[2]), row=int(found[3]))
        return cls(text)


class Below:
    """The folders below which files may be read."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._local: list[str] = []
        self._remote: list[str] = []
        for folder in folders:
            fs, path = fsspec.core.url_to_fs(folder)
            if isinstance(fs, LocalFileSystem):
                self._local.append(os.path.realpath(path))
            else:
                self._remote.append(fs.unstrip_protocol(path).rstrip("/"))

    def require(self, url: str) -> None:
        """Raise Rejected unless a file lies there."""
        if not self.holds(url):
            raise Rejected("place_refused")

    def holds(self, url: str) -> bool:
        """Whether a file lies there, and no link on its way leads elsewhere."""
        scheme = _SCHEME.match(url)
        # fsspec reads `simplecache::http://host/x` from that host, and takes all before :// for a protocol.
        if "::" in url or "\0" in url or url.startswith("data:") or (scheme is None and "://" in url):
            return False
        if scheme is None or scheme[1] in ("file", "local"):
            # As fsspec has it, for which `file:/x` is /x and `~` somebody's home.
            path = os.path.realpath(LocalFileSystem._strip_protocol(url))
            return any(path == root or path.startswith(root.rstrip("/") + "/") for root in self._local)
        return "/../" not in url and any(url == r or url.startswith(r + "/") for r in self._remote)


class Reader:
    """Reads locations, from any thread. largest: bytes that an image may have."""

    def __init__(self, below: Below, largest: int) -> None:
        self.below, self.largest = below, largest
        self._tables: dict[tuple[str, str], _Values] = {}
        self._lock = threading.Lock()

    def read(self, text: str) -> bytes:
        """The bytes of an image; raises Rejected where there are none, OSError where the store or disk fails."""
        if not text:
            raise Rejected("source_missing")
        location = Location.parse(text)
        if location.file.startswith("file://") and not os.path.exists(location.file.removeprefix("file://")):
            location = dataclasses.replace(location, file=unquote(location.file))  # as RFC 8089 writes a blank
        self.below.require(location.file)
        try:
            data = self._value(location) if location.column is not None else self._bytes(location)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Rejected("source_missing") from None
        except PermissionError:
            raise Rejected("source_unreadable") from None
        except pa.ArrowException as e:
            raise Rejected("source_damaged", f"{type(e).__name__} in the file that holds it") from None
        if not data:
            raise Rejected("body_empty")
        if len(data) > self.largest:
            raise Rejected("body_too_large")
        return data

    def _bytes(self, location: Location) -> bytes:
        fs, path = fsspec.core.url_to_fs(location.file)
        if location.offset is None:
            size = fs.size(path)
            if size is not None and size > self.largest:
                raise Rejected("body_too_large")
            return bytes(fs.cat_file(path, start=0, end=self.largest + 1))
        size = location.size or 0
        if size > self.largest:
            raise Rejected("body_too_large")
        data = bytes(fs.cat_file(path, start=location.offset, end=location.offset + size))
        if len(data) != size:
            raise Rejected("source_damaged", "the tar ends before the end of this member")
        return data

    def _value(self, location: Location) -> bytes:
        assert location.column is not None
        assert location.row is not None
        with self._lock:
            key = location.file, location.column
            if key not in self._tables:
                while len(self._tables) >= 2:
                    self._tables.pop(next(iter(self._tables))).close()
                self._tables[key] = _Values(location.file, location.column, _KEPT * self.largest)
            return self._tables[key].get(location.row)


class _Values:
    """One column of one parquet or Arrow file, a few batches of it in memory. most: about how many bytes these hold."""

    def __init__(self, file: str, column: str, most: int) -> None:
        self.column, self.most = column, most
        self._batches: dict[int, pa.ChunkedArray | pa.Array] = {}  # by the first row
        self._stream: Iterator[pa.RecordBatch] | None = None
        self._whole: pa.ChunkedArray | None = None
        self._next = 0
        if file.lower().endswith(".arrow"):
            self._whole = read_arrow(file)[column]
            return
        self._file = fsspec.open(file, "rb").open()
        self._reader = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=1 << 20)
        self._begins = [0]
        for g in range(self._reader.num_row_groups):
            self._begins.append(self._begins[-1] + self._reader.metadata.row_group(g).num_rows)

    def get(self, row: int) -> bytes:
        """The bytes in one row; raises Rejected where there is no such row or value."""
        if self._whole is not None:
            if row >= len(self._whole):
                raise Rejected("source_missing")
            one = self._whole.slice(row, 1)
            one.validate(full=True)  # what points beyond the end of the file would end the process
            return image_bytes(one[0].as_py())
        for first, values in self._batches.items():
            if first <= row < first + len(values):
                return image_bytes(values[row - first].as_py())
        if row >= self._begins[-1]:
            raise Rejected("source_missing")
        if self._stream is None or row < self._next or row >= self._next + 4096:
            group = next(g for g in range(len(self._begins) - 1) if row < self._begins[g + 1])
            self._next = self._begins[group]
            # No batch is of two row groups, so that damage in one takes nothing of the other.
            self._stream = (
                batch
                for g in range(group, len(self._begins) - 1)
                for batch in self._reader.iter_batches(self._rows(g), [g], [self.column], use_threads=False)
            )
        stream, self._stream = self._stream, None  # one that ends by damage gives nothing any more
        for batch in stream:
            first, self._next = self._next, self._next + batch.num_rows
            self._batches[first] = batch.column(0)
            while len(self._batches) > _KEPT or (len(self._batches) > 1 and self._size() > self.most):
                self._batches.pop(next(iter(self._batches)))
            if first <= row < self._next:
                self._stream = stream
                return image_bytes(batch.column(0)[row - first].as_py())
        raise Rejected("source_missing")

    def _rows(self, group: int) -> int:
        """How many rows of a row group are read together, by what they take."""
        facts = self._reader.metadata.row_group(group)
        return min(_BATCH, max(1, _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))

    def _size(self) -> int:
        return sum(values.nbytes for values in self._batches.values())

    def close(self) -> None:
        """Close the file."""
        if self._whole is None:
            self._file.close()


def read_arrow(file: str) -> pa.Table:
    """An Arrow file, as `datasets` saves it (a stream), or in the file format; memory-mapped where it is local."""
    fs, path = fsspec.core.url_to_fs(file)
    source = pa.memory_map(path) if isinstance(fs, LocalFileSystem) else pa.BufferReader(fs.cat_file(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def image_bytes(found: Any) -> bytes:
    """The bytes in a value: binary, or Hugging Face's {bytes, path}. Raises Rejected where there are none."""
    if isinstance(found, dict):
        found = found.get("bytes")
    if found is None:
        raise Rejected("source_missing")
    if not isinstance(found, bytes):
        raise Rejected("source_damaged", "the value is not bytes")
    return found
