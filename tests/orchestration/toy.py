"""A small real stage for the engine's tests: each shard is a text file made from its number.

It can be told to misbehave on some shards, and it notes every call in a folder, so that a test can count
how often a shard was made.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shards.dataset import write_manifest
from shards.fingerprint import Fingerprint
from shards.settings import NodeTrouble, StageError
from shards.stage import Task, open_folder


@dataclasses.dataclass(frozen=True)
class ToyStage:
    root: str
    calls: str  # a folder: one empty file a call, `<index>-<pid>-<time>`
    shards: int = 12
    rows: int = 50
    seconds: float = 0.0
    gate: str = ""  # shards from `gated` on wait until there is such a file
    gated: int = 0
    salt: str = "salt"
    # (index, "raise" | "die" | "raise-once" | "hang-once" | "trouble" | "trouble-once" | "full-once" | "eat-once")
    misbehave: tuple[tuple[int, str], ...] = ()
    scratch: str = ""  # a folder of the machine's own, where the making of each shard takes a megabyte
    start: str = "ok"  # or "raise"; "raise NAME", "die NAME": only on the node whose environment has TOY_NODE=NAME
    max_in_flight: int = 1
    name: str = "toy"
    unit: str = "lines"
    data: str = ".txt"

    def made_with(self) -> Fingerprint:
        return Fingerprint(self.name, 1, {"salt": self.salt, "rows": self.rows})

    def tasks(self) -> Iterator[Task]:
        for i in range(self.shards):
            yield Task(i, f"input-{i}")

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        how, _, where = self.start.partition(" ")
        if not where or os.environ.get("TOY_NODE") == where:
            if how == "raise":
                raise OSError("no such weights")
            if how == "die":
                os._exit(17)
        return self._make

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return write_manifest(self.root, "images", stats, {"kind_of_test": "toy"})

    def _make(self, task: Task) -> dict[str, Any]:
        folder = open_folder(self)
        if (found := folder.adopt(task.index)) is not None:
            return found
        Path(self.calls).mkdir(parents=True, exist_ok=True)
        before = len(list(Path(self.calls).glob(f"{task.index}-*")))
        (Path(self.calls) / f"{task.index}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(self.seconds)
        while self.gate and task.index >= self.gated and not os.path.exists(self.gate):
            time.sleep(0.02)
        how = dict(self.misbehave).get(task.index)
        if how == "die":
            os._exit(13)
        if how == "hang-once" and before == 0:
            time.sleep(3600)
        if how == "eat-once" and before == 0:
            eaten = [b"x" * 100_000_000 for _ in range(60)]
            time.sleep(60)
            del eaten
        if how == "trouble" or (how == "trouble-once" and before == 0):
            raise NodeTrouble("no name can be looked up here")
        if how == "full-once" and before == 0:
            raise StageError("/there: no room") from OSError(errno.ENOSPC, "No space left on device")
        if self.scratch:
            (Path(self.scratch) / str(os.getpid())).write_bytes(bytes(1_000_000))
        if how == "raise" or (how == "raise-once" and before == 0):
            raise ValueError(f"shard {task.index} does not like this")
        lines = [hashlib.sha256(f"{self.salt}-{task.index}-{r}".encode()).hexdigest() for r in range(self.rows)]
        stats = {"count": self.rows, "rows": self.rows, "status": {"success": self.rows}}
        return folder.commit(task.index, {".txt": "\n".join(lines).encode()}, stats, task.input)
