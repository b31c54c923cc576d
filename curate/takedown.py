"""Take-downs in scores, captions and control images: what the images have no more is blanked where it lies.

The values of such a row become null, its embeddings zeros, its control image a comment of the tar; what was counted is
counted again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from curate.captioning import FATES
from curate.stage import columns_of, merge_counts
from latents.takedown import taken_down_rows
from shards import storage
from shards.blank import blank
from shards.columns import COLUMN_ROW, column_rows
from shards.dataset import Dataset, amend_manifest, read_stats_of
from shards.layout import shard_name
from shards.listing import listed
from shards.sketch import sketch

KEPT = ("key", COLUMN_ROW)  # columns that stay: which row it was, and where its zeros lie


def take_out(root: str, images: str, each: Callable[[int], Any] = lambda n: None) -> list[int]:
    """Blank the samples of scores or captions whose images were taken down; returns the shards that changed.

    root, images: the folders of the columns and of the image shards. each: called with 1 for each shard looked at.
    Under the lease of the stage that makes them.
    """
    changed = []
    for index in listed(root, ".safetensors").committed.tolist():
        name = shard_name(index) + ".parquet"
        gone = taken_down_rows(storage.join(images, name))
        if gone:
            table = storage.read_parquet(storage.join(root, name))
            stored_rows, filled = column_rows(table), _has_values(table)
            rows = [i for i in gone if stored_rows[i] >= 0 and filled[i]]
            if rows:
                blank(root, index, rows, _edit(rows))
                changed.append(index)
        each(1)
    return changed


def amend(root: str) -> None:
    """Bring a finished manifest up to its shards' stats."""
    dataset = Dataset.open(root)
    stats = {i: s for i, s in read_stats_of(root, [s.index for s in dataset.shards]) if s is not None}
    shards, extra = dataset.shards, dict[str, Any]()
    if dataset.kind == "images":
        shards = [dataclasses.replace(s, count=stats[s.index]["count"]) if s.index in stats else s for s in shards]
    elif dataset.kind == "scores":
        extra = {"columns": columns_of(stats.values())}
    else:
        fates: Counter[str] = Counter()
        for one in stats.values():
            fates.update(one["fates"])
        extra = {"fates": {f: fates[f] for f in FATES if fates[f]}}
    amend_manifest(root, dataset.manifest, shards, dataset.manifest.get("exclusions"), extra)


def _has_values(table: pa.Table) -> np.ndarray:
    """bool [rows]: whether a row says anything still."""
    filled = np.zeros(table.num_rows, bool)
    for name in table.column_names:
        if name not in KEPT:
            filled |= np.asarray(table[name].is_valid())
    return filled


def _edit(rows: Iterable[int]) -> Any:
    gone = set(rows)

    def edit(table: pa.Table, stats: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        gone_rows = pa.array([i in gone for i in range(table.num_rows)])
        stats = dict(stats)
        for name in table.column_names:
            if name in KEPT:
                continue
            at = table.schema.get_field_index(name)
            field = table.schema.field(at)
            values = table[name].combine_chunks().to_pylist()
            kept = pa.array([None if g else v for v, g in zip(values, gone_rows.to_pylist(), strict=True)], field.type)
            table = table.set_column(at, field, kept)
            living = [v for v in kept.to_pylist() if v is not None]
            if name in stats.get("sketch", {}):
                stats["sketch"] = {**stats["sketch"], name: sketch(np.array(living, np.float32))}
            if name in stats.get("values", {}):
                stats["values"] = {**stats["values"], name: merge_counts({v: 1} for v in living if v)}
            if name == "fate":
                stats["fates"] = dict(sorted(Counter(living).items()))
        return table, stats

    return edit
