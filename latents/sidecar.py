"""A latent shard's sidecar: the image shard's rows, with what became of each, and the stats that follow."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from latents.buckets import Bucket
from latents.encoding import Plan, Sample
from latents.moments import of_columns
from latents.source import texts_of
from shards import images
from shards.columns import COLUMN_ROW, ENDS, column

# An image shard's words for what became of a row, and ours for an image that was there but has no latent.
STATUSES = (*images.STATUSES, "failed_to_encode")
FIT_COLUMNS = ("bucket_width", "bucket_height", "scaled_width", "scaled_height", "crop_left", "crop_top")
# Where an image lies, in its tar or in another; it means nothing beside a latent.
_IMAGE_LOCATION = ("image_offset", "image_size", "image_ext", "image_file", "place")


def sidecar(
    shard: images.ImageShard, plan: Plan, samples: list[Sample], excluded: dict[int, str], buckets: list[Bucket]
) -> pa.Table:
    """The image shard's rows, all of them, with what became of each here and how its image was cut.

    excluded: why, by row, of those that were not encoded.
    """
    table = shard.table.drop_columns([c for c in _IMAGE_LOCATION if c in shard.table.column_names])
    number: list[int | None] = [None] * table.num_rows  # of each row among the columns' samples, for ever
    kept = [row for row, sample in zip(shard.rows.tolist(), samples, strict=True) if sample.error is None]
    for n, row in enumerate(kept):
        number[row] = n
    status, errors, messages = (texts_of(table, c) for c in ("status", "error", "error_message"))
    _, *more = dict.fromkeys(b.resolution for b in buckets)
    suffixes = ["", *(f"_{r}" for r in more)]
    fits: dict[str, list[int | None]] = {c + s: [None] * table.num_rows for s in suffixes for c in FIT_COLUMNS}
    for row, reason in excluded.items():
        known = reason in images.STATUSES
        status[row], errors[row] = reason if known else "filtered", None if known else reason
    for i, (row, sample) in enumerate(zip(shard.rows.tolist(), samples, strict=True)):
        if sample.error is not None:
            status[row], (errors[row], messages[row]) = "failed_to_encode", sample.error
        for r, fit in enumerate(sample.fits):
            bucket = buckets[plan.bucket[i, r]]
            facts = {"bucket_width": bucket.width, "bucket_height": bucket.height, **dataclasses.asdict(fit)}
            for c, value in facts.items():
                fits[c + suffixes[r]][row] = value
    for name, values in (("status", status), ("error", errors), ("error_message", messages)):
        table = _with_column(table, name, pa.array(values, pa.string()))
    for name, numbers in fits.items():
        table = _with_column(table, name, pa.array(numbers, pa.int32()))
    table = _with_column(table, COLUMN_ROW, pa.array(number, pa.int32()))
    return table.replace_schema_metadata(None)


def describe(arrays: dict[str, np.ndarray], table: pa.Table, buckets: int = 1) -> dict[str, Any]:
    """The stats of a latent shard that follow from its columns and its sidecar."""
    rows = table.select(["status", "error"]).to_pylist()
    stats = {
        "rows": table.num_rows,
        "count": len(arrays["bucket"] if buckets > 1 else arrays["tokens"]),
        "status": dict(sorted(Counter(r["status"] for r in rows).items())),
        "errors": dict(sorted(Counter(r["error"] for r in rows if r["status"] == "failed_to_encode").items())),
        "captions": len(arrays[ENDS if ENDS in arrays else "embeddings"]) if "embeddings" in arrays else None,
        "channels": of_columns(arrays).to_json(),
    }
    stats["laid"] = [len(arrays[column("mean", b, buckets)]) for b in range(buckets)]
    return stats


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = table.column_names.index(name) if name in table.column_names else -1
    return table.set_column(at, name, values) if at >= 0 else table.append_column(name, values)
