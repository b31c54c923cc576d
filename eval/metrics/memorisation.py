"""Does the model repeat its training images? Each generated image's nearest one in the training set.

Nearness is the cosine of CLIP features, and by itself says little: in a corpus of portraits every image is near
another. So the held-out real images, which nobody trained on, are searched for in the same way, and a generated image
counts as near where it is nearer to its neighbour than 99 % of them are to theirs. The search is a stage: a task holds
all queries against a chunk of the training set's shards and keeps the nearest in it; the real images' search is made
once for all models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.metrics.estimate import Z95, Estimate, proportion
from eval.rows import column, live, table
from eval.shardwork import accounted, counted, parquet
from shards import storage
from shards.columns import ColumnShard, pack_columns
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint, digest_json
from shards.settings import StageError
from shards.stage import Made, Task, commit, open_folder

QUANTILE = 0.99
SHEET = 12  # pairs for the report
CHUNK = 64  # shards of the training set a task
BLOCK = 4096  # training images held against all queries at once
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Of each searched image [n]: the highest cosine, and where that training image lies (shard number, key)."""

    cosine: npt.NDArray[np.float64]
    shard: npt.NDArray[np.int64]
    key: list[str]


class NearestStage:
    """Stage over chunks of the training set's feature shards; queries: the root of the searched images' features."""

    unit = "chunks"
    data = ".safetensors"

    def __init__(self, label: str, queries: str, train: str) -> None:
        self.name, self.queries, self.train = f"nearest-{label}", queries, train

    def made_with(self) -> Fingerprint:
        """Which images are searched for, and among which."""
        sides = [_fingerprint(self.queries), _fingerprint(self.train)]
        return Fingerprint("nearest", VERSION, {"chunk": CHUNK}, digest_json(sides))

    @property
    def root(self) -> str:
        """Beside the searched images' features; named by both sides, so that others have another folder."""
        return storage.join(self.queries, f"nearest-{self.made_with().digest[:10]}")

    def tasks(self) -> Iterator[Task]:
        """One task for CHUNK training shards."""
        Dataset.open(self.queries)
        shards = Dataset.open(self.train).shards
        for index, start in enumerate(range(0, len(shards), CHUNK)):
            chunk = list(range(start, min(start + CHUNK, len(shards))))
            yield Task(index, digest_json([shards[p].born for p in chunk]), chunk)

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Reads the queries once; the result makes one shard a call."""
        queries, train = column(Dataset.open(self.queries), "images"), Dataset.open(self.train)
        folder = open_folder(self)
        return lambda task: commit(folder, task, lambda: _made(nearest(queries, train, task.payload)))

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Write the manifest."""
        rows = len(Dataset.open(self.queries))
        kept, _ = accounted(self.root, {task.index: rows for task in self.tasks()}, stats)
        return write_manifest(self.root, "nearest", kept)

    def result(self) -> Nearest:
        """The nearest of all chunks; among equals the first in order."""
        found: Nearest | None = None
        dataset = Dataset.open(self.root)
        for position in range(len(dataset.shards)):
            shard = ColumnShard(dataset, position)
            one = Nearest(
                shard.arrays["cosine"].copy(), shard.arrays["shard"].copy(), shard.table["train_key"].to_pylist()
            )
            if found is None:
                found = one
                continue
            for i in np.flatnonzero(one.cosine > found.cosine):
                found.cosine[i], found.shard[i], found.key[i] = one.cosine[i], one.shard[i], one.key[i]
        assert found is not None
        return found


def _fingerprint(root: str) -> str:
    try:
        return Dataset.open(root).fingerprint
    except StageError:
        return ""  # not finished yet


def _made(found: Nearest) -> Made:
    keys = [f"{i:09d}" for i in range(len(found.key))]
    status = ["success"] * len(keys)
    sidecar = parquet({"key": keys, "train_key": found.key, "status": status})
    return {
        ".safetensors": pack_columns({"cosine": found.cosine, "shard": found.shard}, {}),
        ".parquet": sidecar,
    }, counted(status)


def nearest(features: npt.ArrayLike, train: Dataset, positions: Iterable[int], name: str = "images") -> Nearest:
    """The nearest training image of each row of unit-length features [n, d] in the shards at `positions`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(np.array(features, np.float32)).to(device)
    best, shard_of = np.full(len(x), -np.inf), np.full(len(x), -1, np.int64)
    key_of = [""] * len(x)
    for position in positions:
        if not train.counts[position]:
            continue
        shard = ColumnShard(train, position)
        keys = shard.keys
        for start in range(0, len(keys), BLOCK):
            rows = torch.from_numpy(np.array(shard.arrays[name][start : start + BLOCK], np.float32)).to(device)
            with torch.inference_mode():
                value, best_row = (x @ rows.T).max(dim=1)
            values, best_rows = value.double().cpu().numpy(), best_row.cpu().numpy()
            for i in np.flatnonzero(values > best):
                best[i], shard_of[i] = values[i], train.shards[position].index
                key_of[i] = keys[start + int(best_rows[i])]
    return Nearest(best, shard_of, key_of)


def measure(
    generated: NearestStage, real: NearestStage, prompts: list[str], keys: list[str], chosen: np.ndarray
) -> tuple[Estimate, dict[str, int], list[dict[str, Any]]]:
    """Share of near images with its interval over prompts; counts; and the SHEET nearest pairs, nearest first.

    prompts, keys: of the searched images that are measured; chosen: their places among all that were searched. The
    threshold is a quantile of few real images and uncertain itself: its own 95 % interval (of order statistics) is in
    the result's.
    """
    found, limits = generated.result(), threshold(real.result().cosine)
    cosine = found.cosine[chosen]
    near = cosine > limits[1]
    e = proportion(near, prompts)
    assert e.low is not None
    assert e.high is not None
    # Wide where the threshold could be elsewhere: half of what the share moves by between its ends, in quadrature.
    moves = (float((cosine > limits[0]).mean()) - e.value, e.value - float((cosine > limits[2]).mean()))
    low = max(0.0, e.value - math.hypot(e.value - e.low, moves[1]))
    high = min(1.0, e.value + math.hypot(e.high - e.value, moves[0]))
    se = math.hypot(e.se or 0.0, (moves[0] + moves[1]) / (2 * Z95))
    shards = live(table(Dataset.open(generated.queries), "key", "status"))["shard"]
    sheet = [
        {
            "key": keys[i],
            "shard": shards[chosen[i]],
            "train_key": found.key[chosen[i]],
            "train_shard": int(found.shard[chosen[i]]),
            "cosine": round(float(cosine[i]), 6),
            "near": bool(near[i]),
        }
        for i in np.argsort(-cosine, kind="stable")[:SHEET]
    ]
    counts = {"training_images": len(Dataset.open(generated.train)), "near_training": int(near.sum())}
    return dataclasses.replace(e, se=se, low=low, high=high), counts, sheet


def threshold(cosines: npt.ArrayLike) -> tuple[float, float, float]:
    """(low, value, high): the cosine that 99 % of held-out real images do not reach to their nearest training image,
    with its distribution-free 95 % interval from order statistics (David & Nagaraja 2003, section 7.1)."""
    from scipy.stats import binom

    x = np.sort(np.asarray(cosines, np.float64))
    low, high = (int(binom.ppf(p, len(x), QUANTILE)) for p in (0.025, 0.975))
    return float(x[max(0, low - 1)]), float(np.quantile(x, QUANTILE)), float(x[min(len(x) - 1, high)])
