"""Reading a dataset's columns: the one place where the metrics and the report take rows from shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shards.columns import ColumnShard
from shards.dataset import Dataset, born
from shards.fingerprint import digest_bytes, digest_json
from shards.images import ImageShard
from shards.made_with import read_made_with


def feature_parts(dataset: Dataset, name: str) -> Iterator[np.ndarray]:
    """Column `name` [n, d] of each shard that has images, in order."""
    for position in range(len(dataset.shards)):
        if dataset.counts[position]:
            yield ColumnShard(dataset, position).arrays[name]


def column(dataset: Dataset, name: str) -> np.ndarray:
    """Column `name` of all shards, [n, d]."""
    return np.concatenate(list(feature_parts(dataset, name)))


def table(dataset: Dataset, *names: str) -> dict[str, list[Any]]:
    """Sidecar columns (all, or those named) of all rows, in order."""
    found: dict[str, list[Any]] = {}
    for shard in dataset.shards:
        sidecar = dataset.sidecar(shard.index)
        for name, values in sidecar.select(list(names) or sidecar.column_names).to_pydict().items():
            found.setdefault(name, []).extend(values)
        found.setdefault("shard", []).extend([shard.index] * sidecar.num_rows)
    return found


def images_of(dataset: Dataset) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """The row of each image that is there, in order, and its file; None for one that was not kept."""
    for position in range(len(dataset.shards)):
        with contextlib.closing(ImageShard(dataset, position)) as shard:
            for i, row in enumerate(shard.table.take(shard.rows).to_pylist()):
                yield row, None if row["image_offset"] is None else shard.image_bytes(i)


def live(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The rows of a `table` whose status is success."""
    rows = [i for i, status in enumerate(found.get("status", ())) if status == "success"]
    return {name: [values[i] for i in rows] for name, values in found.items()}


def group_of(names: Sequence[Any], groups: int) -> np.ndarray:
    """Jackknife group of each name, by its hash: it does not change when other images come or go."""
    return np.array([int(digest_bytes(str(name).encode())[:8], 16) % groups for name in names], dtype=np.int64)


def dataset_of(root: str, stats: Sequence[dict[str, Any]]) -> Dataset:
    """The committed shards as a dataset, whether or not its manifest is written yet.

    Its own manifest also tells how many images were dropped, and how many were converted to RGB."""
    shards = [
        {
            "index": s["shard"],
            "rows": s["rows"],
            "count": s["count"],
            "born": born(s),
        }
        for s in sorted(stats, key=lambda s: s["shard"])
    ]
    weights = (read_made_with(root) or {}).get("weights") or {} if stats else {}
    manifest = {
        "kind": "generated",
        "fingerprint": digest_json(shards)[:32],
        "shards": shards,
        "weights": weights,
        "dropped": sum(s["rows"] - s["count"] for s in stats),
        "converted": sum(s.get("converted", 0) for s in stats),
    }
    return Dataset(root, manifest)
