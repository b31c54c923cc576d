"""Which checkpoints saw a sample, and when: the inverse of the order, by a checkpoint's own record.

    account = Account(manifest, dataset)          # a checkpoint's manifest; the data set, as it is now
    account.first(shard_index, [4, 17])           # -> [81920, None]: seen where that lies below manifest["images"]

No search: about a millisecond a sample, whatever the data set's size; also with buckets, several sources and segments.
A sample that is taken down keeps its row, so the answer is the same before and after, and after later take-downs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards import storage
from shards.columns import ColumnFile, members
from shards.dataset import Dataset
from train import segments
from train.segments import History, Range, rows_laid


class Unknown(Exception):
    """A checkpoint whose order cannot be worked out any more: one sentence says why."""


class Account:
    """When the samples of a data set came in the training that made a checkpoint.

    manifest: the checkpoint's. dataset: the latents that it was trained on (or, of the other fits, the images), as they
    are now. Raises Unknown.
    """

    def __init__(self, manifest: dict[str, Any], dataset: Dataset) -> None:
        stored = manifest.get("order") or {}
        if stored.get("version") != segments.VERSION:
            raise Unknown("it was made with an older order of samples")
        self.dataset, history = dataset, History.from_json(stored)
        laid = rows_laid(dataset)
        self._ranges: dict[str, Range] = {}
        self._by_rules: dict[str, int] = {}  # from where on samples of a range may have stood for others of it
        config = manifest.get("config") or {}
        # Which samples lacked the image that was brought for them, nobody has recorded.
        brought = config.get("edit") or (config.get("control") or {}).get("images")
        for record in history.segments:
            for r in record.ranges:
                if r.given is None or dataset.root in (r.given, r.root):
                    self._ranges[r.key] = r
                    if any(record.select) or brought:
                        self._by_rules.setdefault(r.key, record.images)
        for r in self._ranges.values():
            if tuple(laid[r.first : r.end].sum(axis=0, dtype=np.int64).tolist()) != r.rows:
                raise Unknown(f"it was trained on other samples than {dataset.root} holds now")
        tables = {r.key: laid[r.first : r.end] for r in self._ranges.values()}
        self._placement = history.placement(tables, int(manifest["seed"]))
        self._positions = {info.index: position for position, info in enumerate(dataset.shards)}
        # An older order may have come before this one.
        self.begins = history.segments[0].images

    def first(self, shard_index: int, samples: Sequence[int]) -> list[int | None]:
        """Of samples of a shard the position, in images, at which each came first; None for never.

        By rules on scores, and where an image is brought for each, one stands for others, of any place: then the
        position before which it cannot have come, whether or not it passes them.

        samples: their places in the columns' sample axis (shards.columns.column_rows), of images among the usable ones.
        Raises Unknown where they may have come in an order that was not recorded.
        """
        if self.begins:
            raise Unknown(f"its first {self.begins} images were of an older order of samples")
        position = self._positions.get(shard_index)
        if position is None:
            return [None] * len(samples)
        return [
            min((p for b, row in rows for p in self._all(position, b, row)), default=None)
            for rows in self._rows(position, samples)
        ]

    def _all(self, position: int, bucket: int, row: int) -> list[int]:
        found = []
        for r in self._ranges.values():
            if r.first <= position < r.end:
                first = self._placement.first_seen(r.key, bucket, position - r.first, row)
                found += [p for p in (first, self._by_rules.get(r.key)) if p is not None]
        return found

    def _rows(self, position: int, samples: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Of each sample the buckets that hold it, and its row in each."""
        buckets = rows_laid(self.dataset).shape[1]
        if buckets == 1:
            return [[(0, int(n))] for n in samples]
        name = self.dataset.shards[position].name + ".safetensors"
        column = {"bucket": ColumnFile(storage.join(self.dataset.root, name)).whole("bucket")}
        rows = {b: members(column, b, len(column["bucket"])) for b in range(buckets)}
        return [[(int(b), int(np.searchsorted(rows[int(b)], n))) for b in column["bucket"][n]] for n in samples]


def first_seen(
    manifest: dict[str, Any], dataset: Dataset, shard_index: int, samples: Sequence[int]
) -> list[int | None]:
    """As `Account(manifest, dataset).first(shard_index, samples)`."""
    return Account(manifest, dataset).first(shard_index, samples)
