"""The listing of images of one's own: parts of a table, each with what was not there when those before were written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.config import ColumnsConfig, SourceConfig
from ingest.formats import as_text
from shards import storage
from shards.plan import stamps
from shards.settings import StageError

LOCATION, FAULT = "place", "fault"  # columns of a listing: where the image lies, and the code of a row that has none

# What a listing's rows hold beside the columns that the configuration asks for.
FIXED = (("url", pa.string()), (LOCATION, pa.string()), (FAULT, pa.string()), ("caption", pa.list_(pa.string())))
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a tar or table has given: so many rows, and a digest of all of them but the last."""

    rows: int = 0
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Columns that the configuration names, and where captions are."""

    columns: tuple[str, ...]
    given: ColumnsConfig
    source: SourceConfig


class Listing:
    """The parts of one listing, and what they hold already."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.parts = 0
        self.files: dict[str, str] = {}  # tars and tables that are listed, with their stamps
        self.cut: dict[str, Seen] = {}  # those that were not whole, since half copied, perhaps
        self.hashes: list[np.ndarray] = []  # of the locations of single files, uint64
        self.schema: pa.Schema | None = None
        names = {n for n in storage.list_names(root) if n.endswith(".parquet")}
        while f"{self.parts:05d}.parquet" in names:
            url = storage.join(root, f"{self.parts:05d}.parquet")
            table = storage.read_parquet(url, ["place", "single"])
            said = json.loads((table.schema.metadata or {}).get(b"carrara", b"{}"))
            files = said.get("files", {})
            self.files |= files
            self.cut = {file: seen for file, seen in self.cut.items() if file not in files}
            self.cut |= dict.fromkeys(said.get("bare", ()), Seen())  # of listings of before
            self.cut |= {file: Seen(*seen) for file, seen in said.get("cut", {}).items()}
            single = table.filter(table["single"])["place"].to_pylist()
            self.hashes.append(hashes_of(single))
            if self.schema is None:
                with fsspec.open(url, "rb") as stream:
                    self.schema = pq.read_schema(stream).remove_metadata()
            self.parts += 1

    def known(self) -> np.ndarray:
        """Hashes of all single files that are listed, sorted."""
        return np.unique(np.concatenate(self.hashes)) if self.hashes else np.zeros(0, np.uint64)

    def unlisted(self, files: Sequence[str]) -> list[str]:
        """Which of these tars or tables are to be looked through: new ones, and what was not whole and has changed."""
        cut = stamps([f for f in files if f in self.cut])
        return [f for f in files if f not in self.files or cut.get(f, self.files[f]) != self.files[f]]

    def add(
        self,
        rows: Sequence[Row],
        files: Mapping[str, str],
        single: bool,
        wanted: Wanted,
        cut: Mapping[str, Seen] | None = None,
    ) -> None:
        """Create the next part; raises StageError where another process was faster. cut: files that are not whole."""
        if not rows and not (files and self.parts):
            return
        table = table_of(rows, single, wanted, self.schema)
        seen = {file: dataclasses.astuple(one) for file, one in (cut or {}).items()}
        said = {b"carrara": json.dumps({"files": dict(files), "cut": seen}).encode()}
        data = storage.parquet_bytes(table.replace_schema_metadata(said))
        if not storage.create(storage.join(self.root, f"{self.parts:05d}.parquet"), data):
            raise StageError(f"{self.root}: another job has listed at this moment; run the same command again")
        self.schema, self.parts = table.schema, self.parts + 1


def table_of(rows: Sequence[Row], single: bool, wanted: Wanted, schema: pa.Schema | None = None) -> pa.Table:
    """Rows as a part has them. schema: of the parts before. single: whether each image is a file of its own."""
    schema = schema or _schema(rows, wanted)
    columns: dict[str, Any] = {}
    for field in schema:
        values = [single] * len(rows) if field.name == "single" else [row.get(field.name) for row in rows]
        columns[field.name] = _as(values, field.type)
    return pa.table(columns, schema)


def hashes_of(texts: Sequence[str]) -> np.ndarray:
    """A hash of each text, uint64 [texts]."""
    found = [
        int.from_bytes(hashlib.blake2b(t.encode("utf-8", "replace"), digest_size=8).digest(), "little") for t in texts
    ]
    return np.array(found, np.uint64)


def _schema(rows: Sequence[Row], wanted: Wanted) -> pa.Schema:
    """The types of the columns that are asked for, by the first rows that have them; text where none has."""
    fields = [pa.field(n, t) for n, t in FIXED] + [pa.field("single", pa.bool_())]
    types = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}
    for name in wanted.columns:
        kinds = {type(row[name]) for row in rows if row.get(name) is not None}
        declared = types.get(wanted.given.types.get(name, ""))
        kind = pa.string()
        if kinds and kinds <= {bool}:
            kind = pa.bool_()
        elif kinds and kinds <= {int}:
            kind = pa.int64()
        elif kinds and kinds <= {int, float}:
            kind = pa.float64()
        fields.append(pa.field(name, declared or kind))
    return pa.schema(fields)


def _as(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as one type; those that are of another one are null, or their text where the column is of text."""
    fitting: list[Any] = []
    for v in values:
        if pa.types.is_string(kind):
            fitting.append(None if v is None else legal(v if isinstance(v, str) else as_text(v)))
        elif pa.types.is_list(kind):
            fitting.append([legal(text) for text in v])
        elif isinstance(v, bool) or pa.types.is_boolean(kind):
            fitting.append(v if isinstance(v, bool) and pa.types.is_boolean(kind) else None)
        elif isinstance(v, (int, float)) and abs(v) < 2**63:
            fitting.append(float(v) if pa.types.is_floating(kind) else int(v) if float(v).is_integer() else None)
        else:
            fitting.append(None)
    return pa.array(fitting, kind)


def legal(text: str) -> str:
    """Without half characters, which JSON and the names of files may have and tables may not."""
    return text.encode("utf-8", "replace").decode()
