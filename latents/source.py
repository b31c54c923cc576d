"""What an image shard says of its images: their sizes, the texts beside them, and how they were stored."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pyarrow as pa

from shards import images, storage
from shards.dataset import Dataset, read_stats

# What an image shard's sidecar says in words besides captions.
_NO_CAPTIONS = {"url", "final_url", "key", "status", "error", "error_message", "exif", "sha256", "md5", "caption_raw"}
_NO_CAPTIONS |= {"pixel_hash", "phash", "image_ext", "image_file", "place"}


def stored_sizes(shard: images.ImageShard) -> np.ndarray:
    """int64 [N,2]: width and height of the images in the tar, by the sidecar, else from their headers."""
    known = [texts_of(shard.table, c) for c in ("width", "height")]
    sizes = [(known[0][row], known[1][row]) for row in shard.rows.tolist()]
    return np.array([s if all(s) else _header(shard, i) for i, s in enumerate(sizes)], np.int64).reshape(-1, 2)


def _header(shard: images.ImageShard, i: int) -> tuple[int, int]:
    try:
        return images.pixel_size(shard.image_bytes(i))
    except ValueError:
        return 1, 1  # it will not decode either, and is set aside then


def original_sizes(shard: images.ImageShard) -> list[tuple[int, int]]:
    """Width and height of the images as they were fetched, else as they lie in the tar; 0 where nothing says."""
    table = shard.table
    columns = [texts_of(table, c) for c in ("original_width", "original_height", "width", "height")]
    return [
        (columns[0][row] or columns[2][row] or 0, columns[1][row] or columns[3][row] or 0)
        for row in shard.rows.tolist()
    ]


def caption_columns(shard: images.ImageShard) -> dict[str, list[list[str]]]:
    """Of each usable image the texts in `caption` and in every further column of texts, or lists of texts."""
    rows, found = pa.array(shard.rows), {}
    for field in shard.table.schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if field.name not in _NO_CAPTIONS and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            values = shard.table[field.name].take(rows).to_pylist()
            found[field.name] = [texts_in(v) for v in values]
    return found


def texts_in(value: Any) -> list[str]:
    """The texts in an entry of a column of captions: one, a list, or a list that ingest carried as JSON; no empty ones.

    Raises TypeError where it holds something else.
    """
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            if all(isinstance(v, str | None) for v in parsed):  # "[2]" may be a caption
                value = parsed
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(t, str | None) for t in texts):
        raise TypeError("neither text nor a list of texts")
    return [t for t in texts if t and t.strip()]


def image_settings(dataset: Dataset) -> dict[str, Any]:
    """The settings that a dataset's images were stored with; nothing where it does not say."""
    if not dataset.shards:
        return {}
    made = storage.read_json(storage.join(dataset.root, "made_with.json"))
    if made is None:
        made = (read_stats(dataset.root, dataset.shards[0].index) or {}).get("fingerprint")
    return dict((made or {}).get("settings") or {})


def texts_of(table: pa.Table, name: str) -> list[Any]:
    """A column's values, None for each row where it is not there."""
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
