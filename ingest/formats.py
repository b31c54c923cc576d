"""The file formats of tables: parquet, CSV, TSV, JSON lines, lists of URLs as streams of batches with their places.

A place is a row number in a parquet file and a byte offset in a (decompressed) text file: with it a worker
reads just its own part. No file is ever held whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from shards.settings import ConfigError

BLOCK_BYTES = 4 << 20
BATCH_ROWS = 8192
LONGEST_RECORD = 64 << 20

FORMAT = re.compile(r"\.(parquet|csv|tsv|jsonl|ndjson|txt)(\.gz)?\Z", re.IGNORECASE)

# What reading a damaged file raises; a parquet file's names of columns may be no text.
DAMAGED = (pa.ArrowException, EOFError, OSError, zlib.error, UnicodeDecodeError)

# (name in the file, name from here on, type from here on) of each column that is read. Without a name in the file it
# is null throughout.
Columns = tuple[tuple[str | None, str, pa.DataType], ...]


def schema_of(columns: Columns) -> pa.Schema:
    """The schema of the batches that come out."""
    return pa.schema([(name, kind) for _, name, kind in columns])


class Cursor:
    """One open file of a worker, kept between shards: a .gz can only be read onwards from where one is."""

    def __init__(self) -> None:
        self._file: str | None = None
        self._stream: IO[bytes] | None = None

    def open(self, file: str) -> IO[bytes]:
        """The file, decompressed, seekable; the one that was open before is closed."""
        if file != self._file or self._stream is None:
            self.close()
            self._stream, self._file = _open(file), file
        return self._stream

    def close(self) -> None:
        """Close what is open."""
        if self._stream is not None:
            self._stream.close()
        self._file = self._stream = None


def _format(file: str) -> tuple[str, bool]:
    match = FORMAT.search(file)
    assert match is not None
    return {"ndjson": "jsonl"}.get(match[1].lower(), match[1].lower()), bool(match[2])


def _open(file: str) -> IO[bytes]:
    raw = fsspec.open(file, "rb").open()
    return gzip.GzipFile(fileobj=raw) if _format(file)[1] else raw  # type: ignore[return-value]


def batches(
    file: str, columns: Columns, start: int = 0, stop: int | None = None, cursor: Cursor | None = None
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Batches of the columns' schema, and for each row where it ends (row number or byte), int64 [rows]."""
    own = Cursor()
    try:
        stream = (cursor or own).open(file)
        read = _parquet_batches if _format(file)[0] == "parquet" else _text_batches
        yield from read(stream, file, columns, start, stop)
    except DAMAGED as e:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(e).split())[:300]}") from e
    finally:
        own.close()


def row_count(file: str, seen: int, end: int) -> int:
    """How many rows a file has: told by parquet, for text estimated from `seen` rows that end at byte `end`.

    A compressed text is taken to be four times its compressed size.
    """
    kind, packed = _format(file)
    if kind == "parquet":
        with _open(file) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)
    fs, path = fsspec.core.url_to_fs(file)
    size = int(fs.size(path) or 0) * (4 if packed else 1)
    return max(seen, round(seen * size / end)) if end else seen


def _parquet_batches(
    stream: IO[bytes], file: str, columns: Columns, start: int, stop: int | None
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    # Without pre_buffer, which keeps every byte read until the last row: the whole file, in the end.
    reader = pq.ParquetFile(stream, pre_buffer=False)
    _require(reader.schema_arrow.names, columns, file)
    group_ends = np.cumsum(
        [reader.metadata.row_group(g).num_rows for g in range(reader.num_row_groups)], dtype=np.int64
    )
    first = int(np.searchsorted(group_ends, start, side="right"))
    last = len(group_ends) if stop is None else int(np.searchsorted(group_ends, stop, side="left")) + 1
    groups = list(range(first, min(last, len(group_ends))))
    if not groups:
        return
    position = int(group_ends[first - 1]) if first else 0
    names = [source for source, _, _ in columns if source is not None]
    for batch in reader.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
        low, high = max(start - position, 0), batch.num_rows if stop is None else min(batch.num_rows, stop - position)
        if high > low:
            piece = batch.slice(low, high - low)
            arrays = {source: piece.column(source) for source in names}
            yield _conform(arrays, columns, file), np.arange(position + low + 1, position + high + 1)
        position += batch.num_rows
        if stop is not None and position >= stop:
            return


def _text_batches(
    stream: IO[bytes], file: str, columns: Columns, start: int, stop: int | None
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    delimiter = _delimiter(file)
    header: list[str] = []
    if delimiter:
        header, first = _csv_header(stream, file)
        start = max(start, first)
        _require(header, columns, file)
    for chunk, ends in _records(stream, file, start, stop, delimiter):
        if delimiter:
            arrays = _parse_csv(chunk, file, header, [source for source, _, _ in columns if source is not None])
        elif _format(file)[0] == "txt":
            arrays = {"url": pa.array([u for line in chunk.split(b"\n") if (u := line.rstrip(b"\r"))], pa.binary())}
        else:
            arrays = _parse_jsonl(chunk, file, columns)
        if any(len(a) != len(ends) for a in arrays.values()):
            raise ConfigError(
                f"{file}: the rows before byte {int(ends[-1])} cannot be separated; check its quotes and line ends"
            )
        yield _conform(arrays, columns, file), ends


def _delimiter(file: str) -> bytes:
    """The delimiter of a CSV or TSV file; empty where every line is a record."""
    return {"csv": b",", "tsv": b"\t"}.get(_format(file)[0], b"")


def _records(
    stream: IO[bytes], file: str, start: int, stop: int | None, delimiter: bytes
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Blocks of whole records, and the byte at which each record ends (int64). Blank lines are no records.

    delimiter: of CSV, where a line break within quotes ends no record; empty where every line is a record.
    """
    stream.seek(start)
    position, carry = start, b""
    while True:
        want = BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position - len(carry))
        block = stream.read(want) if want > 0 else b""
        data = carry + block
        if not data:
            return
        end_of_file = not block
        if end_of_file and not data.endswith(b"\n"):
            data += b"\n"  # a file's last record may lack it
        buffer = np.frombuffer(data, np.uint8)
        breaks = np.flatnonzero(buffer == ord("\n"))
        if delimiter and len(breaks):
            breaks = breaks[~_within_quotes(data, buffer, breaks, delimiter)]
        if len(breaks):
            ends = breaks + 1
            begins = np.concatenate([[0], ends[:-1]])
            blank = (ends - begins == 1) | ((ends - begins == 2) & (buffer[begins] == ord("\r")))
            whole = int(ends[-1])
            if not blank.all():
                yield data[:whole], position + ends[~blank]
            position, carry = position + whole, data[whole:]
        else:
            carry = data
        if end_of_file and carry:
            raise ConfigError(f"{file}: a quote opened after byte {position} is never closed")
        if len(carry) > LONGEST_RECORD:
            raise ConfigError(
                f"{file}: the row at byte {position} is longer than {LONGEST_RECORD >> 20} MiB; is a quote open?"
            )


def _within_quotes(data: bytes, buffer: np.ndarray, breaks: np.ndarray, delimiter: bytes) -> np.ndarray:
    """Which line breaks lie within quotes, bool [breaks]; `data` begins outside of them.

    As Arrow's CSV reader has it: a quote opens only at the start of a field, `""` within stands for one
    quote, and after the closing one the field goes on without quotes up to the delimiter.
    """
    within = np.zeros(len(breaks), bool)
    lines = np.unique(np.searchsorted(breaks, np.flatnonzero(buffer == ord('"'))))
    inside, since = False, 0
    for i in lines[lines < len(breaks)].tolist():
        if inside:
            within[since:i] = True  # lines without any quote
        line = data[int(breaks[i - 1]) + 1 if i else 0 : int(breaks[i])]
        inside, since = _open_quote_after(line, inside, delimiter), i
    if inside:
        within[since:] = True
    return within


def _open_quote_after(line: bytes, inside: bool, delimiter: bytes) -> bool:
    """Whether a quoted field is still open at the end of a line."""
    at = 0
    if not inside and line.startswith(b'"'):
        inside, at = True, 1
    while True:
        if inside:
            at = line.find(b'"', at)
            if at < 0:
                return True
            if line[at + 1 : at + 2] == b'"':
                at += 2
            else:
                inside, at = False, at + 1
        else:
            at = line.find(delimiter + b'"', at)
            if at < 0:
                return False
            inside, at = True, at + 2


def _parse_csv(chunk: bytes, file: str, header: list[str], names: list[str]) -> dict[str, pa.Array]:
    table = pyarrow.csv.read_csv(
        io.BytesIO(chunk),
        pyarrow.csv.ReadOptions(column_names=header, use_threads=False, block_size=max(len(chunk) + 1, 1024)),
        pyarrow.csv.ParseOptions(delimiter=_delimiter(file).decode(), newlines_in_values=True),
        pyarrow.csv.ConvertOptions(
            include_columns=names,
            column_types={n: pa.binary() for n in names},
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
    )
    return {n: table.column(n).combine_chunks() for n in names}


def _csv_header(stream: IO[bytes], file: str) -> tuple[list[str], int]:
    """The column names and the byte after the header."""
    stream.seek(0)
    line = stream.readline(1 << 20)
    skip = 3 if line.startswith(b"\xef\xbb\xbf") else 0
    try:
        names = next(csv.reader([decoded(line[skip:]).rstrip("\r\n")], delimiter=_delimiter(file).decode()), [])
    except csv.Error:
        names = []
    if not names or len(set(names)) != len(names) or any("\0" in n for n in names):
        what = "it is empty; its" if not line else "the"
        raise ConfigError(f"{file}: {what} first line must hold the column names, each once, in UTF-8")
    return names, len(line)


def _parse_jsonl(chunk: bytes, file: str, columns: Columns) -> dict[str, pa.Array]:
    rows = []
    for line in chunk.split(b"\n"):
        if line in (b"", b"\r"):
            continue
        row = _loads(line)
        if not isinstance(row, dict):
            raise _no_object(file, line)
        rows.append(row)
    arrays = {}
    for source, _, kind in columns:
        if source is None:
            continue
        values = [row.get(source) for row in rows]
        if pa.types.is_string(kind):
            # A lone surrogate is legal in JSON and nowhere else.
            texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
            values = [t and t.encode("utf-8", "replace").decode() for t in texts]
            arrays[source] = pa.array(values, pa.string())
            continue
        try:
            arrays[source] = pa.array(values, kind)
        except (pa.ArrowException, OverflowError) as e:
            raise _wrong_type(file, source, kind, str(e)) from None
    return arrays


def _no_object(file: str, line: bytes) -> ConfigError:
    return ConfigError(f"{file}: not one JSON object a line: {line[:60].decode('utf-8', 'replace')!r}")


def read_schema(file: str, types: dict[str, str]) -> pa.Schema:
    """Names and types of the columns, those of text tables by their first block; `types`: the configuration's."""
    try:
        with _open(file) as stream:
            if _format(file)[0] == "parquet":
                schema = pq.ParquetFile(stream).schema_arrow
            else:
                schema = _infer_schema(stream, file)
    except DAMAGED as e:
        raise ConfigError(f"{file}: cannot be read as a table: {' '.join(str(e).split())[:300]}") from None
    kinds = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}
    for name, word in types.items():
        if name not in schema.names:
            raise ConfigError(f"ingest.columns.types: {file} has no column '{name}'; it has {', '.join(schema.names)}")
        schema = schema.set(schema.names.index(name), pa.field(name, kinds[word]))
    return schema


def holds_lists(file: str, column: str) -> bool:
    """Whether a column of a file holds lists, those of text tables by their first block; CSV has none."""
    if _format(file)[0] not in ("parquet", "jsonl"):
        return False
    schema = read_schema(file, {})
    return column in schema.names and is_list(schema.field(column).type)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _infer_schema(stream: IO[bytes], file: str) -> pa.Schema:
    fields: dict[str, pa.DataType] = {}
    if _format(file)[0] == "txt":
        fields = {"url": pa.string()}
    elif _format(file)[0] == "jsonl":
        chunk = next(_records(stream, file, 0, None, b""), (b"", None))[0]
        rows = [row for line in chunk.split(b"\n")[:10_000] if line.strip() and isinstance(row := _loads(line), dict)]
        if not rows:
            raise _no_object(file, chunk.split(b"\n", 1)[0])
        names = list(dict.fromkeys(name for row in rows for name in row))
        fields = {name: _json_type([row[name] for row in rows if row.get(name) is not None]) for name in names}
    else:
        header, first = _csv_header(stream, file)
        fields = {name: pa.string() for name in header}
        chunk = next(_records(stream, file, first, None, _delimiter(file)), (b"", None))[0]
        if chunk:
            texts = _parse_csv(chunk, file, header, header)
            fields = {name: _text_type(text_array(texts[name])) for name in header}
    return pa.schema(list(fields.items()))


def _json_type(values: list[Any]) -> pa.DataType:
    kinds = {type(v) for v in values}
    texts = (t for v in values for t in (v if isinstance(v, list) else [v]) if t is not None)
    if list in kinds and all(isinstance(t, str) for t in texts):
        return pa.list_(pa.string())
    if kinds == {bool}:
        return pa.bool_()
    if not kinds or not kinds <= {int, float} or any(abs(v) >= 2**63 for v in values if isinstance(v, int)):
        return pa.string()
    return pa.int64() if kinds == {int} else pa.float64()


def _loads(line: bytes) -> Any:
    """The value of a line; None where it has none (or one so deep that the parser gives up)."""
    try:
        try:
            return json.loads(line)
        except UnicodeDecodeError:
            return json.loads(decoded(line))
    except (ValueError, RecursionError):
        return None


def _text_type(values: pa.Array) -> pa.DataType:
    if values.null_count == len(values):
        return pa.string()
    for kind in (pa.int64(), pa.float64()):
        try:
            values.cast(kind)
            return kind
        except pa.ArrowException:
            continue
    return pa.string()


def kept_type(kind: pa.DataType) -> pa.DataType:
    """The type in which a column goes on: numbers as they are, everything that is no number or text as JSON text."""
    if pa.types.is_dictionary(kind):
        return kept_type(kind.value_type)
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return kind
    return pa.string()


def _require(names: Sequence[str], columns: Columns, file: str) -> None:
    missing = [source for source, _, _ in columns if source is not None and source not in names]
    if missing:
        raise ConfigError(
            f"{file}: has no column {', '.join(missing)}, which the table's first file has; "
            f"its columns are {', '.join(names)}"
        )


def _wrong_type(file: str, column: str, kind: pa.DataType, why: str) -> ConfigError:
    why = " ".join(why.split())[:160]
    return ConfigError(
        f"{file}: column '{column}' is not {kind} throughout ({why}); set its type in ingest.columns.types"
    )


def _conform(found: dict[str, Any], columns: Columns, file: str) -> pa.RecordBatch:
    """The columns in their types, all text valid UTF-8 (see `decoded` for what is not)."""
    arrays: list[pa.Array] = []
    for source, _, kind in columns:
        if source is None:
            arrays.append(pa.nulls(len(arrays[0]), kind))
            continue
        array = found[source]
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        try:
            if pa.types.is_string(kind):
                arrays.append(text_array(array))
            else:
                arrays.append(array.cast(kind))
        except pa.ArrowException as e:
            raise _wrong_type(file, source, kind, str(e)) from None
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(columns))


def text_array(array: pa.Array) -> pa.Array:
    """An array as text, all of it valid UTF-8 (see `decoded` for what is not)."""
    if pa.types.is_nested(array.type):
        return pa.array([None if v is None else as_text(v) for v in array.to_pylist()], pa.string())
    if pa.types.is_large_string(array.type) or pa.types.is_string(array.type):
        array = array.cast(pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary())
    try:
        return array.cast(pa.string())  # from binary this checks the encoding
    except pa.ArrowInvalid:
        return pa.array([None if v is None else as_text(v) for v in array.to_pylist()], pa.string())


def decoded(value: bytes) -> str:
    """UTF-8; what has none of it beyond ASCII is taken for Windows-1252, as browsers do (it covers Latin-1)."""
    text = value.decode("utf-8", "replace")
    return text if any(c > "\x7f" and c != "\ufffd" for c in text) else value.decode("cp1252", "replace")


def as_text(value: Any) -> str:
    """A value as text: bytes as what they stand for, anything else as JSON."""
    return decoded(value) if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, default=str)
