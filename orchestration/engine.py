"""Drives one stage over its shards, on Ray or in this process: what is missing is made, then the manifest.

The same command after any kind of death goes on where the output folder says it stands; nothing else is
remembered. The loop on Ray is in actors.py, the book-keeping in ledger.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
import traceback
from typing import Any

from orchestration import planning
from orchestration.config import Pool, RayConfig
from orchestration.lease import Lease
from orchestration.ledger import Ledger
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from shards import storage
from shards.dataset import MANIFEST
from shards.progress import Progress
from shards.settings import ConfigError, StageError
from shards.stage import Stage, Task, Worker, begin, is_begun

log = logging.getLogger("carrara.engine")


def build_worker(stage: Stage, threads: int) -> Worker:
    """The stage's worker with so many threads for arithmetic, here as on Ray: rounding may depend on their number."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    worker = stage.worker()
    if "torch" in sys.modules:  # where it was imported before the variable was set
        sys.modules["torch"].set_num_threads(threads)
    return worker


def is_complete(stage: Stage, status: str) -> bool:
    """Whether there is nothing to do: every shard committed for just these settings, and the manifest written."""
    if not storage.exists(storage.join(stage.root, MANIFEST)):
        return False
    try:
        return is_begun(stage) and Ledger(stage, status).complete
    except StageError:
        return False


def run(stage: Stage, status: str, config: RayConfig, pool: Pool, local: bool = False, redo: bool = False) -> bool:
    """Make every shard that is missing, then the manifest. status: the run's status folder.

    On Ray, `ray.init` was called before. Returns False where everything was there already. Raises
    StageError where shards were set aside or the stage cannot go on, and Stopped after SIGTERM.
    """
    with Lease(status, stage.name, stage.root, on_ray=not local) as lease:
        folder = begin(stage, redo, map if local else planning.on_ray)
        freed = sum(storage.sweep_temporaries(f) for f in (folder.root, folder.beside))
        if freed:
            log.info("%s: removed %.1f MB that processes left when they died", stage.name, freed / 1e6)
        ledger = Ledger(stage, status, config.retries)
        if ledger.complete:
            log.info("%s: complete, %d shards; nothing to do", stage.name, ledger.total)
            return False
        status_url = storage.join(status, f"{stage.name}.json")
        progress = Progress(stage.name, ledger.total, "shards", status_url, ledger.skipped)
        state = "failed"
        try:
            with stop_on_sigterm(StopFlag()) as stop:
                job = Job(stage, ledger, progress, stop, lease)
                if local:
                    in_this_process(job, pool)
                else:
                    from orchestration.actors import on_ray

                    on_ray(job, pool, config)
            ledger.refuse_failures()
            stage.finish(ledger.stats())
            state = "done"
        except (Stopped, KeyboardInterrupt):
            state = "stopped"
            raise
        finally:
            progress.close(state)
    return True


@dataclasses.dataclass
class Job:
    """One run of a stage: what the loops share."""

    stage: Stage
    ledger: Ledger
    progress: Progress
    stop: StopFlag
    lease: Lease
    workers: int = 1
    samples: int = 0
    rows: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raise where the run is to end now."""
        self.lease.check()
        if self.stop.is_set():
            raise Stopped(f"{self.stage.name}: stopped on request; the same command goes on from here")

    def done(self, task: Task, stats: dict[str, Any] | None, **figures: Any) -> None:
        """Count a committed shard."""
        self.ledger.done(task)
        if stats:
            self.samples += int(stats.get("count", 0))
            self.rows += int(stats.get("rows", 0))
            self.busy_s += float(stats.get("encode_seconds", 0.0))
            self.wait_s += float(stats.get("wait_seconds", 0.0))
        if self.rows:
            figures["success"] = f"{self.samples / self.rows:.0%}"
        elapsed = max(time.monotonic() - self.began, 1e-9)
        if self.busy_s:
            # Of the time that the encoders were there: at work, and at rest for want of decoded pictures.
            figures["busy"] = f"{min(1.0, self.busy_s / (elapsed * max(self.workers, 1))):.0%}"
            figures["wait"] = f"{self.wait_s / (self.busy_s + self.wait_s):.0%}"
        rate = self.samples / elapsed
        self.progress.update(1, **{f"{self.stage.unit}/s": rate}, **figures)

    def blame(self, task: Task, error: BaseException, trace: str) -> None:
        """Count a failure that was the shard's own."""
        self.ledger.blame(task, sentence(error), trace)
        self.progress.update(0, failed=len(self.ledger.failed))


def sentence(error: BaseException) -> str:
    """One line that says what was raised."""
    text = str(error) if isinstance(error, StageError | ConfigError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def in_this_process(job: Job, pool: Pool) -> None:
    """One shard after another, here; the same bytes as on Ray."""
    worker: Worker | None = None
    while not job.ledger.empty:
        job.check()
        task = job.ledger.take()
        if task is None:
            job.stop.wait(job.ledger.next_retry_s)
            continue
        worker = worker or build_worker(job.stage, pool.threads)
        try:
            stats = worker(task)
        except Exception as e:
            job.blame(task, e, traceback.format_exc())
        else:
            job.done(task, stats)
