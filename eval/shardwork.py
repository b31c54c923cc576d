"""What every stage of the evaluation does with a shard: work in batches that fit, encode, lay out as tar and parquet,
account.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from shards import storage
from shards.dataset import read_stats
from shards.images import pack_tar, png_bytes
from shards.settings import StageError
from shards.stage import Stage, Task, committed, is_begun

log = logging.getLogger("carrara.eval")
T = TypeVar("T")

PNG_LEVEL = 1  # of zlib; higher ones cost time beside the accelerator


class Halving:
    """Works on as many items at once as the device's memory holds: a batch that it does not hold is worked on in
    halves, and so are all later ones. what: the items, for the log."""

    def __init__(self, what: str) -> None:
        self.what, self.most = what, 1 << 30

    def __call__(self, count: int, work: Callable[[slice], T]) -> list[T]:
        """What `work` gives for each slice of range(count), in order; torch.OutOfMemoryError where one item alone does
        not fit."""
        import torch

        found: list[T] = []
        start = 0
        while start < count:
            stop = min(count, start + self.most)
            try:
                found.append(work(slice(start, stop)))
                start = stop
                continue
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
                self.most = (stop - start) // 2
            torch.cuda.empty_cache()  # here, where no traceback holds the batch's tensors any more
            log.warning(
                "eval: the device's memory does not hold %d %s at once; now %d", stop - start, self.what, self.most
            )
        return found


def committed_stats(stage: Stage, tasks: Iterable[Task]) -> list[dict[str, Any] | None]:
    """The stats of each task's shard; None for those that are not committed with the stage's settings."""
    wanted = list(tasks)
    if not is_begun(stage):
        return [None] * len(wanted)
    there = committed(stage, wanted)
    return [read_stats(stage.root, t.index) if known else None for t, known in zip(wanted, there, strict=True)]


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    return png_bytes(image, PNG_LEVEL)


def tar_of(rows: list[tuple[str, dict[str, bytes]] | None]) -> tuple[bytes, dict[str, list[Any]]]:
    """A tar of (key, members with a png) and the columns that say where each row's image lies; None: has none."""
    tar, extents = pack_tar([row for row in rows if row is not None])
    following = iter(extents)
    extent = [None if row is None else next(following)["png"] for row in rows]
    return tar, {
        "image_offset": [None if p is None else p[0] for p in extent],
        "image_size": [None if p is None else p[1] for p in extent],
    }


def parquet(table: dict[str, list[Any]], **types: pa.DataType) -> bytes:
    """Columns as a parquet file; string unless a type is given, so that a column of nulls has its type too."""
    given = {"image_offset": pa.int64(), "image_size": pa.int64(), **types}
    columns = {n: pa.array(v, given.get(n, pa.string())) for n, v in table.items()}
    return storage.parquet_bytes(pa.table(columns))


def counted(status: list[str]) -> dict[str, Any]:
    """rows, count and status of a shard's stats."""
    return {"rows": len(status), "count": status.count("success"), "status": dict(sorted(Counter(status).items()))}


def accounted(
    root: str, expected: dict[int, int], stats: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """What the manifest keeps of each shard's stats, and how often each status occurs over all of them.

    expected: shard -> the images it must hold. Raises StageError where a shard is missing or counted twice, or
    its images do not add up.
    """
    left, kept, status = dict(expected), [], Counter[str]()
    for s in stats:
        if s["rows"] != left.pop(s["shard"], None) or sum(s["status"].values()) != s["rows"]:
            raise StageError(f"{root}: shard {s['shard']} does not have the images of its task; run again")
        status.update(s["status"])
        kept.append({k: s[k] for k in ("shard", "rows", "count", "files", "born")})
    if left:
        raise StageError(f"{root}: {len(left)} shards are missing, the first is {min(left)}; run again")
    return kept, status
