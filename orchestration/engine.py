"""Drives one stage over its shards, on Ray or in this process: what is missing is made, then the manifest.

The same command after any kind of death goes on where the output folder says it stands; nothing else is
remembered. The loop on Ray is in actors.py, the book-keeping in ledger.py.
"""

from __future__ import annotations

import contextlib
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
from orchestration.metrics import Exporter
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from shards import storage
from shards.dataset import MANIFEST
from shards.progress import Progress
from shards.settings import ConfigError, NodeTrouble, StageError
from shards.stage import Stage, Task, Worker, begin, is_begun

log = logging.getLogger("carrara.engine")

NODE_TROUBLES = 5  # of this machine in a row, with growing pauses, until a run in one process ends


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
    status_url = storage.join(status, f"{stage.name}.json")
    with stop_on_sigterm(StopFlag(stage.name)) as stop, Lease(status, stage.name, stage.root) as lease:
        before = _record(status_url)
        progress = Progress(stage.name, 0, "shards", status_url, state="planning")
        state, begun = "failed", False
        try:
            folder = begin(stage, redo, map if local else planning.on_ray)
            freed = sum(storage.sweep_temporaries(f) for f in (folder.root, folder.beside))
            if freed:
                log.info("%s: removed %.1f MB that processes left when they died", stage.name, freed / 1e6)

            def look() -> None:
                lease.check()
                stop.check()
                progress.update()

            ledger = Ledger(stage, status, config.retries, look)
            if ledger.complete:
                progress.begin("planning", ledger.total, done=ledger.total)
                log.info("%s: complete, %d shards; nothing to do", stage.name, ledger.total)
                state = "done"
                return False
            begun = True
            progress.begin("running", ledger.total, done=ledger.skipped)
            exporter = None if local else Exporter(status.rsplit("/", 1)[0], stage.name)
            job = Job(stage, ledger, progress, stop, lease, _known_peak(before), exporter=exporter)
            with stop.waits():
                if local:
                    in_this_process(job, pool)
                else:
                    from orchestration.actors import on_ray

                    on_ray(job, pool, config)
            ledger.refuse_failures()
            progress.begin("finishing", ledger.total)
            stage.finish(ledger.stats())
            state = "done"
        except (Stopped, KeyboardInterrupt):
            state = "stopped"
            raise
        finally:
            progress.close(state)
            if before.get("state") == "done" and not begun:  # a try that did nothing leaves a finished stage finished
                with contextlib.suppress(Exception):
                    storage.write_json(status_url, before)
    return True


def _record(status_url: str) -> dict[str, Any]:
    """The stage's status as the last run of it left it."""
    with contextlib.suppress(Exception):  # nothing hangs on it
        found = storage.read_json(status_url)
        if isinstance(found, dict):
            return found
    return {}


def _known_peak(record: dict[str, Any]) -> int:
    """The most memory that a worker of an earlier run was seen to use, in bytes; 0 where that is not known."""
    found = (record.get("figures") or {}).get("worker_gb", 0)
    return int(found * 1e9) if isinstance(found, (int, float)) else 0


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
            # Of the time that the encoders were there: at work, and at rest for want of decoded pictures.
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


def in_this_process(job: Job, pool: Pool) -> None:
    """One shard after another, here; the same bytes as on Ray."""
    worker: Worker | None = None
    troubles = 0
    while not job.ledger.empty:
        job.check()
        task = job.ledger.take()
        if task is None:
            job.stop.wait(job.ledger.next_retry_s)
            continue
        worker = worker or build_worker(job.stage, pool.threads)
        try:
            stats = worker(task)
        except NodeTrouble as e:  # there is no other machine: it may pass, or the run ends
            troubles += 1
            if troubles >= NODE_TROUBLES:
                raise
            log.warning("%s: %s", job.stage.name, e)
            job.ledger.give_back(task, job.ledger.retries.wait(troubles))
        except Exception as e:
            job.blame(task, e, traceback.format_exc())
        else:
            troubles = 0
            job.done(task, stats)
