"""Does the model repeat its training pictures? Each generated picture's nearest one in the training set.

Nearness is the cosine of CLIP features, and by itself says little: in a corpus of portraits every picture is near
another. So the held-out real pictures, which nobody trained on, are searched for in the same way, and a generated
picture counts as near where it is nearer to its neighbour than 99 % of them are to theirs. Training features are read
shard by shard: memory does not grow with the training set.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.estimate import Estimate, proportion
from shards.columns import ColumnShard
from shards.dataset import Dataset

QUANTILE = 0.99
SHEET = 12  # pairs for the report
BLOCK = 4096  # training pictures held against all others at once


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Of each searched picture [n]: the highest cosine, and where that training picture lies (shard number, key)."""

    cosine: npt.NDArray[np.float64]
    shard: npt.NDArray[np.int64]
    key: list[str]


def nearest(features: npt.ArrayLike, train: Dataset, column: str = "clip") -> Nearest:
    """The nearest training picture of each row of unit-length features [n, d]; among equals the first in order."""
    x = np.asarray(features, np.float64)
    best, shard_of = np.full(len(x), -np.inf), np.full(len(x), -1, np.int64)
    key_of = [""] * len(x)
    for position, info in enumerate(train.shards):
        if not train.counts[position]:
            continue
        shard = ColumnShard(train, position)
        keys = shard.keys
        for start in range(0, len(keys), BLOCK):
            cosine = x @ np.asarray(shard.arrays[column][start : start + BLOCK], np.float64).T
            place = cosine.argmax(axis=1)
            value = cosine[np.arange(len(x)), place]
            for i in np.flatnonzero(value > best):
                best[i], shard_of[i], key_of[i] = value[i], info.index, keys[start + int(place[i])]
    return Nearest(best, shard_of, key_of)


def measure(
    generated: Dataset, real: Dataset, train: Dataset
) -> tuple[Estimate | None, dict[str, int], list[dict[str, Any]]]:
    """Share of near pictures with its interval over prompts; counts: near, and the training pictures searched; and the
    SHEET nearest pairs, nearest first: key and shard of either picture, cosine, whether it counts as near.

    generated: shards of eval/stage.py, real: of eval/reference.py, train: of eval/features.py; all with the features
    of one CLIP. None where one of them is empty.
    """
    counts = {"training_pictures": len(train), "near_training": 0}
    if not len(real) or not len(train):
        return None, counts, []
    limit = threshold(real, train)
    found = nearest(_column(generated, "images"), train)
    near = found.cosine > limit
    counts["near_training"] = int(near.sum())
    keys, shards = _keys(generated)
    sheet = [
        {
            "key": keys[i],
            "shard": shards[i],
            "train_key": found.key[i],
            "train_shard": int(found.shard[i]),
            "cosine": round(float(found.cosine[i]), 6),
            "near": bool(near[i]),
        }
        for i in np.argsort(-found.cosine, kind="stable")[:SHEET]
    ]
    return proportion(near, _prompts(generated)), counts, sheet


def threshold(real: Dataset, train: Dataset) -> float:
    """The cosine that 99 % of held-out real pictures do not reach to their nearest training picture."""
    return float(np.quantile(nearest(_column(real, "images"), train).cosine, QUANTILE))


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return np.concatenate(
        [ColumnShard(dataset, p).arrays[name] for p in range(len(dataset.shards)) if dataset.counts[p]]
    )


def _keys(dataset: Dataset) -> tuple[list[str], list[int]]:
    keys, shards = [], []
    for p in range(len(dataset.shards)):
        if dataset.counts[p]:
            mine = ColumnShard(dataset, p).keys
            keys += mine
            shards += [dataset.shards[p].index] * len(mine)
    return keys, shards


def _prompts(dataset: Dataset) -> list[str]:
    found: list[str] = []
    for p in range(len(dataset.shards)):
        table = dataset.sidecar(dataset.shards[p].index)
        rows = zip(table["prompt_id"].to_pylist(), table["status"].to_pylist(), strict=True)
        found += [prompt for prompt, status in rows if status == "success"]
    return found
