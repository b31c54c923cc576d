"""The ledger of hosts as actors: what all workers of a run ask of a host is counted in one place.

The ledger is ingest/hosts.py, the workers' side of it ingest/desk.py; neither knows anything of Ray. The actor lives on
the driver's node and ends with the run. Where it is lost, Ray starts it again, empty; the workers tell it what
they hold. One ledger takes some 180,000 rows a second, so large clusters have several, each with its part of the hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ingest.hosts import Answer, Ledger, Message, joined, parted

ANSWER_S = 30.0  # for one exchange; then the worker tries again
CPUS = 1000  # of the cluster to one ledger: a CPU does some 80 rows a second

S = TypeVar("S")


class HostLedger:
    """The actor."""

    def __init__(self, limit: int, failures: int, pause: float) -> None:
        self.ledger = Ledger(limit, failures, pause, epoch=os.urandom(8).hex())

    def exchange(self, worker: str, message: Message) -> Answer:
        """See ingest.hosts.Ledger."""
        return self.ledger.exchange(worker, message)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How a worker reaches the actors; travels to it with the stage."""

    actors: tuple[Any, ...]

    def __call__(self, worker: str, message: Message) -> Answer:
        """Raises what Ray raises where an actor cannot be reached."""
        messages = [message] if len(self.actors) == 1 else parted(message, len(self.actors))
        asked = [a.exchange.remote(worker, m) for a, m in zip(self.actors, messages, strict=True)]
        return joined(ray.get(asked, timeout=ANSWER_S))


@contextlib.contextmanager
def shared(stage: S) -> Iterator[S]:
    """The stage with its hosts shared by all of its workers; as it is where it has no field `hosts`.

    To be entered where Ray is connected, and left when the workers have ended.
    """
    fields = {f.name for f in dataclasses.fields(stage)} if dataclasses.is_dataclass(stage) else set()
    config: Any = getattr(stage, "config", None)
    if not {"hosts", "config"} <= fields or config.engine != "carrara":
        yield stage
        return
    fetch = config.fetch
    here = ray.get_runtime_context().get_node_id()
    ledger = ray.remote(HostLedger).options(
        num_cpus=0, max_restarts=-1, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True)
    )
    count = 1 + int(ray.cluster_resources().get("CPU", 0)) // CPUS
    limits = (fetch.host_concurrency, fetch.host_failures, fetch.host_pause)
    actors = tuple(ledger.remote(*limits) for _ in range(count))
    try:
        yield dataclasses.replace(stage, hosts=Exchange(actors))  # type: ignore[type-var]
    finally:
        for actor in actors:
            with contextlib.suppress(Exception):  # it may be gone
                ray.kill(actor)
