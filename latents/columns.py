"""The columns of a latent shard: their names and types, and how samples are laid in them bucket by bucket."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from latents.buckets import Bucket
from shards.columns import column, members
from shards.fingerprint import digest_bytes

FLIPPED = "_flipped"  # ends the names of the columns of mirrored images' moments and features
FEATURES = "features"  # the column of a vision tower's features, float16 [n,grid,grid,width]


def id_type(vocabulary: int) -> np.dtype[Any]:
    """The type of a column of token ids below `vocabulary`."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def lay_out(
    each: dict[str, np.ndarray],
    micro: dict[str, np.ndarray],
    texts: dict[str, list[list[str]]],
    bucket: np.ndarray,
    buckets: list[Bucket],
) -> dict[str, np.ndarray]:
    """The columns of the samples bucket by bucket, so that rows that are trained on together lie together.

    each: columns of one row a sample; micro: columns, int32 [N,R,6]; texts: of each sample, by column of the
    sidecar; bucket: int64 [N,R].
    """
    count = len(buckets)
    resolutions = list(dict.fromkeys(b.resolution for b in buckets))
    arrays: dict[str, np.ndarray] = {"bucket": bucket.astype(np.uint16)} if count > 1 else {}
    for b in range(count):
        rows = members(arrays, b, len(bucket))
        level = resolutions.index(buckets[b].resolution)
        for name, array in (each | {n: m[:, level] for n, m in micro.items()}).items():
            arrays[column(name, b, count)] = array[rows]
        for name, values in texts.items():
            lines = [json.dumps(values[i], ensure_ascii=False).encode("utf-8", "surrogatepass") for i in rows]
            ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
            arrays[column(f"text_end.{name}", b, count)] = ends
            arrays[column(f"text.{name}", b, count)] = np.frombuffer(b"".join(lines), np.uint8)
    return arrays


def by_first_use(parts: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct values of several arrays in the order in which they first come, and the arrays as places in it."""
    values, first, inverse = np.unique(np.concatenate(parts), return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    position = np.empty(len(order), np.int32)
    position[order] = np.arange(len(order))
    ends = np.cumsum([len(p) for p in parts])[:-1]
    return values[order], np.split(position[inverse.reshape(-1)], ends)


def rows_digest(rows: np.ndarray) -> str:
    """A short digest of row numbers."""
    return digest_bytes(rows.astype("<i8").tobytes())[:16]
