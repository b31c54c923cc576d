"""What the loop on Ray and the loop in one process share: a worker as it is built, and what is counted of a run."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from typing import Any

from orchestration.lease import Lease
from orchestration.ledger import Ledger
from orchestration.metrics import Exporter
from orchestration.stopping import StopFlag
from shards.machine import own_fault
from shards.progress import Progress
from shards.settings import ConfigError, NodeTrouble, StageError
from shards.stage import Stage, Task, Worker


def build_worker(stage: Stage, threads: int) -> Worker:
    """The stage's worker with so many threads for arithmetic, here as on Ray: rounding may depend on their number.

    Where it fails for want of disk, memory or the like, it raises NodeTrouble: no shard is blamed for its machine.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    worker = stage.worker()
    if "torch" in sys.modules:  # where it was imported before the variable was set
        sys.modules["torch"].set_num_threads(threads)

    def make(task: Task) -> dict[str, Any]:
        try:
            return worker(task)
        except Exception as e:
            fault = own_fault(e)
            if not fault or isinstance(e, NodeTrouble):
                raise
            raise NodeTrouble(sentence(e) if isinstance(e, StageError) else fault) from e

    return make


@dataclasses.dataclass
class Job:
    """One run of a stage: what the loops share."""

    stage: Stage
    ledger: Ledger
    progress: Progress
    stop: StopFlag
    lease: Lease
    peak_bytes: int = 0  # of a worker's memory, where an earlier run has measured it
    workers: int = 1
    samples: int = 0
    rows: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)
    exporter: Exporter | None = None  # on Ray

    def check(self) -> None:
        """Raise where the run is to end now."""
        self.lease.check()
        self.stop.check()

    def done(self, task: Task, stats: dict[str, Any] | None, **figures: Any) -> None:
        """Count a committed shard."""
        self.ledger.done(task)
        if stats:
            self.samples += int(stats.get("count", 0))
            self.rows += int(stats.get("rows", 0))
            self.busy_s += float(stats.get("encode_seconds", 0.0))
            self.wait_s += float(stats.get("wait_seconds", 0.0))
        if self.exporter is not None:
            self.exporter.shard(stats or {}, self.ledger.remaining, self.workers)
        if self.rows:
            figures["success"] = f"{self.samples / self.rows:.0%}"
        elapsed = max(time.monotonic() - self.began, 1e-9)
        if self.busy_s:
            # Of the time that the encoders were there: at work, and at rest for want of decoded images.
            figures["busy"] = f"{min(1.0, self.busy_s / (elapsed * max(self.workers, 1))):.0%}"
            figures["wait"] = f"{self.wait_s / (self.busy_s + self.wait_s):.0%}"
        rate = self.samples / elapsed
        self.progress.update(1, **{f"{self.stage.unit}/s": rate}, **figures)

    def blame(self, task: Task, error: BaseException, trace: str) -> None:
        """Count a failure that was the shard's own."""
        before = len(self.ledger.failed)
        self.ledger.blame(task, sentence(error), trace)
        if self.exporter is not None and len(self.ledger.failed) > before:
            self.exporter.set_aside()
        self.progress.update(0, failed=len(self.ledger.failed))


def sentence(error: BaseException) -> str:
    """One line that says what was raised."""
    text = str(error) if isinstance(error, StageError | ConfigError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]
