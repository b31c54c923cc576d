"""What each stage of this folder does with a shard: read its images, make something of them, commit that."""

from __future__ import annotations

import contextlib
from typing import Any

from latents.arithmetic import fixed_arithmetic
from shards.dataset import Dataset
from shards.images import ImageShard
from shards.stage import Made, Stage, Task, commit, open_folder


class ShardWorker:
    """A worker over image shards; a subclass says in `make` what it makes of one. source: the images' folder."""

    def __init__(self, stage: Stage, source: str, threads: int) -> None:
        self.folder, self.images, self.threads = open_folder(stage), Dataset.open(source), threads

    def __call__(self, task: Task) -> dict[str, Any]:
        """Make one shard and commit it; returns its committed stats."""

        def made() -> Made:
            with contextlib.closing(ImageShard(self.images, task.payload["position"])) as shard:
                shard.fetch()
                with fixed_arithmetic(self.threads):
                    return self.make(shard, task.payload)

        return commit(self.folder, task, made)

    def make(self, shard: ImageShard, payload: dict[str, Any]) -> Made:
        """The files of a shard, and its stats. payload: the task's."""
        raise NotImplementedError
