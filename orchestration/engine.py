"""Drives one stage over its shards, on Ray or in this process: what is missing is made, then the manifest.

The same command after any kind of death goes on where the output folder says it stands; nothing else is
remembered. The loop on Ray is in actors.py, what both loops count in job.py, the book-keeping in ledger.py.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import Any

from orchestration import planning
from orchestration.config import Pool, RayConfig
from orchestration.job import Job, build_worker
from orchestration.lease import Lease
from orchestration.ledger import Ledger
from orchestration.metrics import Exporter
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from shards import storage
from shards.dataset import MANIFEST
from shards.progress import Progress
from shards.settings import NodeTrouble, StageError
from shards.stage import Stage, Worker, begin, is_begun

log = logging.getLogger("carrara.engine")

NODE_TROUBLES = 5  # of this machine in a row, with growing pauses, until a run in one process ends


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
        before: dict[str, Any] = {}  # the status as the last run of it left it, on which nothing hangs
        with contextlib.suppress(OSError):
            before = storage.read_object(status_url)
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


def _known_peak(record: dict[str, Any]) -> int:
    """The most memory that a worker of an earlier run was seen to use, in bytes; 0 where that is not known."""
    found = (record.get("figures") or {}).get("worker_gb", 0)
    return int(found * 1e9) if isinstance(found, (int, float)) else 0


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
