"""What each stage of this folder does with a shard: read its images, make something of them, commit that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from latents.arithmetic import fixed_arithmetic
from shards.dataset import Dataset
from shards.images import ImageShard
from shards.stage import Made, Stage, Task, Worker, commit, open_folder


def worker(stage: Stage, source: str, threads: int, make: Callable[[ImageShard, dict[str, Any]], Made]) -> Worker:
    """A worker over the image shards in `source`. make: of a shard and its task's payload, what is committed."""
    folder, dataset = open_folder(stage), Dataset.open(source)

    def one(task: Task) -> dict[str, Any]:
        def made() -> Made:
            with contextlib.closing(ImageShard(dataset, task.payload["position"])) as shard:
                shard.fetch()
                with fixed_arithmetic(threads):
                    return make(shard, task.payload)

        return commit(folder, task, made)

    return one
