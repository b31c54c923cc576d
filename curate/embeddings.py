"""Embeddings of a finished score, by the rows of the image shards that they are of."""

from __future__ import annotations

import numpy as np

from shards import storage
from shards.columns import unpack_columns
from shards.dataset import Dataset, read_stats
from shards.layout import shard_name
from shards.settings import StageError


def read_embeddings(dataset: Dataset, index: int, rows: np.ndarray, name: str) -> np.ndarray:
    """Embeddings [len(rows),D] of these sidecar rows of shard number `index`; rows of NaN where one has none.

    Raises StageError where the shard is not there.
    """
    if read_stats(dataset.root, index) is None:
        raise StageError(f"{dataset.root}: shard {shard_name(index)} is not there; run the score again")
    arrays, _ = unpack_columns(storage.read_bytes(storage.join(dataset.root, shard_name(index) + ".safetensors")))
    stored, lies = arrays[name], arrays["row"].astype(np.int64)
    lies[1:][lies[1:] == 0] = -1  # what was taken out is zero; only the first can be of row 0
    stored_row = np.full(max(int(lies.max(initial=0)), int(rows.max(initial=0))) + 1, -1, np.int64)
    stored_row[lies[lies >= 0]] = np.flatnonzero(lies >= 0)
    found = np.full((len(rows), stored.shape[1]), np.nan, stored.dtype)
    there = stored_row[rows] >= 0
    found[there] = stored[stored_row[rows[there]]]
    return found
