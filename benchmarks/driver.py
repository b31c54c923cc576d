"""How many shards a second the engine's loop can hand out and take back, with 4,800 workers, on a slow store.

    python -m benchmarks.driver                    4,800 workers, each request to the store takes 30 ms
    python -m benchmarks.driver --workers 480 --request-ms 0

The driver is the real one (orchestration/actors.py) with real calls of Ray; the workers are simulated: a few actors
answer for thousands, each call as soon as its shard's time is over. They share this machine's cores with the
driver, so what is measured is less than a driver with a core of its own would reach. Every function of
shards/storage.py that asks the store waits as long as a request would, and is counted: while shards are made, there
must be none but the status file's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import pickle
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from orchestration.config import CpuPool, RayConfig
from orchestration.connection import connected
from orchestration.job import Job
from orchestration.lease import Lease
from orchestration.ledger import Ledger
from orchestration.stopping import StopFlag
from shards import storage
from shards.progress import Progress
from shards.stage import Task

ASKING = ("exists", "size", "stamp", "read_bytes", "create", "write_atomic", "remove", "list_names")
HOSTS = 2  # processes that answer for all workers


class Simulated:
    """A stage whose shards are made nowhere."""

    name, unit, data, max_in_flight = "ingest", "images", ".tar", 1

    def __init__(self, root: str, shards: int) -> None:
        self.root, self.shards = root, shards

    def tasks(self) -> Iterator[Task]:
        for i in range(self.shards):
            yield Task(i, None, {"file": f"part-{i // 1000:05d}.parquet", "start": 10_000 * (i % 1000), "rows": 10_000})


class Host:
    """Answers for many workers."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def where(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    async def hello(self) -> None:
        pass

    async def process(self, task: bytes) -> tuple[dict[str, Any], int]:
        await asyncio.sleep(self.seconds)
        stats = {
            "shard": pickle.loads(task).index,
            "rows": 10_000,
            "count": 8_100,
            "encode_seconds": 0.0,
            "status": {"success": 8_100, "failed_to_download": 1_900},
            "errors": {"http_not_found": 1_000, "timeout": 900},
        }
        return stats, 350_000_000


class _Hosted:
    """In the place of the class of workers: thousands of handles on a few actors."""

    def __init__(self, hosts: list[Any]) -> None:
        self.hosts, self.made = hosts, 0

    def options(self, **_: Any) -> _Hosted:
        return self

    def remote(self, *_: Any) -> Any:
        self.made += 1
        return self.hosts[self.made % len(self.hosts)]


def driver(workers: int = 4800, request_ms: float = 30.0, seconds: float = 4.0, shards: int = 0) -> dict[str, Any]:
    """Measure the loop. seconds: what a shard takes a worker; so `workers / seconds` shards a second are offered."""
    shards = shards or int(workers / seconds * 20)
    asked: Counter[str] = Counter()
    _slow_down(request_ms / 1e3, asked)
    with tempfile.TemporaryDirectory() as folder, connected(RayConfig()):
        import ray  # only now: its library reads the mode of authentication once

        from orchestration import actors

        hosts = [ray.remote(Host).options(num_cpus=0, max_concurrency=workers).remote(seconds) for _ in range(HOSTS)]
        ray.get([h.where.remote() for h in hosts])
        stage: Any = Simulated(f"{folder}/images", shards)
        os.makedirs(stage.root)
        ledger = Ledger(stage, folder)
        progress = Progress("ingest", ledger.total, "shards", f"{folder}/ingest.json")
        job = Job(stage, ledger, progress, StopFlag(), Lease(folder, "ingest", stage.root))
        made = actors.Fleet

        class Fleet(made):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                self.actor = _Hosted(hosts)

            def _kill(self, worker: Any) -> None:
                pass

        actors.Fleet = Fleet
        asked.clear()
        cpu, began = time.process_time(), time.perf_counter()
        times: list[float] = []
        done = job.done

        def count(task: Task, stats: dict[str, Any] | None, **figures: Any) -> None:
            times.append(time.perf_counter())
            done(task, stats, **figures)

        job.done = count
        actors.on_ray(job, CpuPool(workers=workers, memory_gb=None), RayConfig())
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        by_thread = dict(asked)
        progress.close()
    middle = [t for t in times if times[len(times) // 5] <= t <= times[4 * len(times) // 5]]
    return {
        "workers": workers,
        "shards": shards,
        "offered shards/s": round(workers / seconds, 1),
        "shards/s, start and end included": round(shards / took, 1),
        "shards/s, middle three fifths": round((len(middle) - 1) / (middle[-1] - middle[0]), 1),
        "driver CPU ms a shard": round(1e3 * cpu / shards, 3),
        "requests in the loop's thread": {k: n for k, n in by_thread.items() if k.startswith("main")},
        "requests of other threads": sum(n for k, n in by_thread.items() if not k.startswith("main")),
        "request ms": request_ms,
    }


def _slow_down(seconds: float, asked: Counter[str]) -> None:
    for name in ASKING:
        real = getattr(storage, name)

        def slow(*arguments: Any, real: Any = real, name: str = name) -> Any:
            who = "main" if threading.current_thread() is threading.main_thread() else "other"
            asked[f"{who} {name}"] += 1
            time.sleep(seconds)
            return real(*arguments)

        setattr(storage, name, slow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4800)
    parser.add_argument("--request-ms", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="what a shard takes")
    parser.add_argument("--shards", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(driver(given.workers, given.request_ms, given.seconds, given.shards), indent=1))


if __name__ == "__main__":
    main()
