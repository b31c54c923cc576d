"""What a shard holds: the tar of its successes and the sidecar with one row for each row of the table.

The sidecar's first columns are img2dataset's, in its order (its downloader.py), behind the columns that
are carried through; then ours. The bytes depend on the rows and on what became of them alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from ingest import tables
from ingest.config import IngestConfig
from ingest.digests import DIGESTS, of_texts
from ingest.pool import Outcome
from shards import storage
from shards.images import pack_tar
from shards.layout import sample_key
from shards.settings import ConfigError

_IMG2DATASET = [
    ("caption", pa.string()),
    ("url", pa.string()),
    ("key", pa.string()),
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("exif", pa.string()),
    ("sha256", pa.string()),
]
_OURS = [
    ("error", pa.string()),
    ("caption_raw", pa.string()),
    ("pixel_hash", pa.string()),
    ("phash", pa.string()),
    ("image_offset", pa.int64()),
    ("image_size", pa.int64()),
    ("image_ext", pa.string()),
    *DIGESTS,
]
_ADOPTED = [("image_file", pa.string())]  # which tar an image lies in, where that is not the shard's own
RESERVED = {name for name, _ in _IMG2DATASET + _OURS + _ADOPTED}
CAPTIONS = "captions"  # the column with all captions of a row, where the table has lists of them
_ROW = ("caption", "url", "key", "caption_raw")  # known before anything is fetched, as are the kept columns
_OF_IMAGE = ("width", "height", "original_width", "original_height", "exif")


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """A shard's rows before anything became of them. columns: values by name, those of `_ROW` and the kept ones."""

    columns: dict[str, list[Any]]
    kept: tuple[tuple[str, pa.DataType], ...]

    def pack(self, outcomes: Sequence[Outcome], adopted: bool = False) -> dict[str, bytes]:
        """The files of the shard, by suffix. adopted: images stay in the tars that they lie in."""
        columns = {name: self.columns[name] for name, _ in self.kept}
        columns |= {name: self.columns[name] for name in ("caption", "url", "key")}
        columns["status"] = [o.status for o in outcomes]
        columns["error_message"] = [o.message for o in outcomes]
        for name in _OF_IMAGE:
            columns[name] = [getattr(o.image or o.lies, name, None) for o in outcomes]
        columns["sha256"] = [o.sha256 for o in outcomes]
        live = [(i, o.image) for i, o in enumerate(outcomes) if o.image is not None]
        samples = []
        for i, image in live:
            meta = {name: values[i] for name, values in columns.items()}
            members = {
                image.extension: image.data,
                "json": _indented(meta),
                "txt": columns["caption"][i].encode("utf-8", "replace"),
            }
            samples.append((columns["key"][i], members))
        tar, extents = pack_tar(samples)
        columns["error"] = [o.error for o in outcomes]
        columns["caption_raw"] = self.columns["caption_raw"]
        for name in ("pixel_hash", "phash"):
            columns[name] = [getattr(o.image, name) if o.image else None for o in outcomes]
        offsets: list[int | None] = [None] * len(outcomes)
        sizes, extensions = offsets.copy(), [o.lies.extension if o.lies else None for o in outcomes]
        for (i, image), extent in zip(live, extents, strict=True):
            offsets[i], sizes[i] = extent[image.extension]
            extensions[i] = image.extension
        for i, o in enumerate(outcomes):
            if o.lies is not None:
                offsets[i], sizes[i] = o.lies.offset, o.lies.size
        if adopted:
            columns["image_file"] = [o.lies.image_file if o.lies else None for o in outcomes]
        columns |= {"image_offset": offsets, "image_size": sizes, "image_ext": extensions}
        columns |= of_texts(columns["url"], columns["caption"], columns["sha256"], [o.final_url for o in outcomes])
        schema = pa.schema([*self.kept, *_IMG2DATASET, *_OURS, *(_ADOPTED if adopted else ())])
        return {".tar": tar, ".parquet": storage.parquet_bytes(pa.table(columns, schema))}


def _indented(flat: dict[str, Any]) -> bytes:
    """json.dumps(flat, indent=4) of a dict without containers in it, by json's C encoder, which knows no indent."""
    flat = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()}  # JSON has no NaN
    text = json.dumps(flat, default=str, separators=(",\n    ", ": "), allow_nan=False)
    return f"{{\n    {text[1:-1]}\n}}".encode()


def new_sidecar(
    index: int,
    rows: pa.Table,
    layout: tables.Layout,
    config: IngestConfig,
    raw: list[str | None],
    cleaned: list[str],
    keep: Iterable[str],
) -> Sidecar:
    """The rows of a shard from the table's; raw and cleaned: their captions. keep: columns that are carried through."""
    kept = kept_columns(layout, keep)
    columns: dict[str, list[Any]] = {kept_as: rows[name].to_pylist() for name, kept_as in kept.items()}
    types = [(kept_as, rows.schema.field(name).type) for name, kept_as in kept.items()]
    if layout.caption_lists and CAPTIONS not in columns:  # all of them; `caption` is the first
        columns[CAPTIONS] = rows["caption"].to_pylist()
        types.append((CAPTIONS, pa.string()))
    columns["caption"] = list(cleaned)
    columns["url"] = rows["url"].to_pylist()
    columns["key"] = [sample_key(index, i, config.samples_per_shard) for i in range(rows.num_rows)]
    columns["caption_raw"] = raw
    return Sidecar(columns, tuple(types))


def rows_again(tables_: Sequence[pa.Table]) -> tuple[Sidecar, list[str | None]]:
    """Rows of committed sidecars as they were before anything became of them, with their own keys; and their URLs."""
    table = pa.concat_tables(tables_, promote_options="default")
    kept = tuple((f.name, f.type) for f in table.schema if f.name not in RESERVED)
    columns = {name: table[name].to_pylist() for name in (*_ROW, *(name for name, _ in kept))}
    return Sidecar(columns, kept), columns["url"]


def kept_columns(layout: tables.Layout, keep: Iterable[str]) -> dict[str, str]:
    """The layout's names of the kept columns and their names in the sidecar: `source_width` for a `width`.

    Raises ConfigError where two of them would have one name.
    """
    found = (tables.resolve(layout, k) for k in keep)
    names = dict.fromkeys(n for n in found if n is not None and n not in ("url", "caption"))
    kept = {n: f"source_{n}" if n in RESERVED else n for n in names}
    for name, kept_as in kept.items():
        if name != kept_as and kept_as in kept:
            raise ConfigError(
                f"ingest.keep_columns: '{name}' is kept as '{kept_as}', and the table has a column of that name too; "
                "keep one of them"
            )
    return kept
