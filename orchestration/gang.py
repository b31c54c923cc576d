"""The ranks of one fit as Ray actors: placed together, given the environment that a launcher would, watched to the end.

One actor is one rank, and its process runs train/main.py's loop in its main thread, so that a SIGTERM is
obeyed there as under any launcher: it saves a checkpoint and ends. Ray Train (2.60) was left for this: it
runs the loop in a side thread, where no signal arrives, and starts five more processes for each fit, which
took 25 of 55 s of start-up and 1.4 GiB on a laptop. What is kept of it: a gang is placed as a whole or not at
all, and the death of one rank ends the others, which would wait for it in a collective for ever.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray._private.state as ray_state
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestration.config import Ranks
from orchestration.lease import process_began
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")

TICK_S = 1.0  # whole seconds: those that a placement group waits are
SAY_AGAIN_S = 60.0
LAST_WORDS_S = 10.0  # after one rank has failed, how long the others may take to say why they failed


class RankDied(Exception):
    """A rank ended other than by returning; what it says is for the log."""


class Rank:
    """The actor: one process of a fit."""

    def whereabouts(self) -> tuple[str, str, int, int, int | None]:
        """(node id, IP address, a free port there, process id, when that process began in ticks of its machine)."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind((address, 0))
            port = s.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), address, port, os.getpid(), process_began(os.getpid())

    def fit(self, work: Callable[[Any], Any], argument: Any, environment: dict[str, str]) -> Any:
        """Run the loop, in this process's main thread, as one of the ranks that the environment describes."""
        os.environ.update(environment)
        return work(argument)


@dataclasses.dataclass(frozen=True)
class _RankProcess:
    node: str
    address: str
    port: int
    pid: int
    began: int | None


class Gang:
    """Context: `count` ranks on the cluster. Raises StageError where there is no room for them in `patience_s`."""

    def __init__(self, stage: str, count: int, ranks: Ranks, patience_s: float, check: Callable[[], None]) -> None:
        self.stage, self.count, self.check = stage, count, check
        gpus = ranks.num_gpus if ranks.num_gpus is not None else min(1.0, ray.cluster_resources().get("GPU", 0.0))
        claims = {"CPU": ranks.num_cpus, "GPU": gpus, **ranks.resources}
        self.bundle = {name: amount for name, amount in claims.items() if amount > 0}
        self.options = {"num_cpus": ranks.num_cpus, "num_gpus": gpus, "resources": ranks.resources}
        self.patience_s = patience_s
        self.group: PlacementGroup | None = None
        self.wanted: PlacementGroup | None = None  # places of ranks that there was no room for
        self.actors: list[Any] = []
        self.processes: list[_RankProcess] = []
        self.began: float | None = None  # by the monotonic clock, once all are there

    def __enter__(self) -> Gang:
        try:
            self._reserve()
            actor = ray.remote(max_restarts=0, max_task_retries=0, **self.options)(Rank)
            self.actors = [
                actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, i)).remote()
                for i in range(self.count)
            ]
            processes = [_RankProcess(*p) for p in self._get([a.whereabouts.remote() for a in self.actors])]
        except BaseException:
            self._end()
            raise
        # Ranks of one node are neighbours, and rank 0 is the first of the first node.
        nodes = list(dict.fromkeys(p.node for p in processes))
        order = sorted(range(self.count), key=lambda i: (nodes.index(processes[i].node), i))
        self.actors, self.processes = [self.actors[i] for i in order], [processes[i] for i in order]
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, work: Callable[[Any], Any], argument: Any) -> list[Any]:
        """What `work(argument)` returns in each rank.

        Raises what a rank raised for people (ConfigError, StageError), else RankDied.
        """
        pairs = zip(self.actors, environments(self.processes), strict=True)
        calls = [a.fit.remote(work, argument, env) for a, env in pairs]
        waiting = list(calls)
        while waiting:
            self.check()
            done, waiting = ray.wait(waiting, timeout=TICK_S)
            for call in done:
                if self._failure(call) is not None:
                    # The others fail too, for lack of this one; the one with the reason may not be the first to end.
                    ended, _ = ray.wait(calls, num_returns=len(calls), timeout=LAST_WORDS_S)
                    raise root_cause([f for c in ended if (f := self._failure(c)) is not None])
        return list(ray.get(calls))

    def signal(self, number: int) -> None:
        """Send a signal to the first rank's process, wherever it runs; ranks that train agree on what to do of it.

        Not to every one: the last might get it when all have ended on account of the first, and would die of it.
        """
        first = self.processes[0]
        there = NodeAffinitySchedulingStrategy(first.node, soft=False)
        send = ray.remote(num_cpus=0, max_retries=0)(_send).options(scheduling_strategy=there)
        sent = send.remote(first.pid, first.began, number)
        with contextlib.suppress(RayError):
            ray.get(sent, timeout=30)

    def leaving(self) -> str:
        """Which node of the ranks is about to go (preempted, or drained), as a sentence; else empty."""
        draining = ray_state.state.get_draining_nodes()
        gone = [p.address for p in self.processes if p.node in draining]
        return f"the node {gone[0]} of its ranks is about to go" if gone else ""

    def room_for(self, more: int) -> str:
        """That there is room for so many ranks more, as a sentence; else empty. From the first call on their places are
        asked of Ray, so that an autoscaler brings nodes for them."""
        if more <= 0:
            return ""
        if self.wanted is None:
            self.wanted = placement_group([self.bundle] * more, strategy="PACK")
        # `wait` drops fractions of a second, and in 0 seconds a group that is ready is seldom seen.
        return f"there is room for {more} ranks more" if self.wanted.wait(TICK_S) else ""

    def _reserve(self) -> None:
        group = self.group = placement_group([self.bundle] * self.count, strategy="PACK")
        began = said = time.monotonic()
        wants = f"{self.count} times {_resources(self.bundle)}"
        while not group.wait(TICK_S):
            self.check()
            now = time.monotonic()
            free = _resources({k: v for k, v in ray.available_resources().items() if k in {"CPU", "GPU", *self.bundle}})
            if now - began > self.patience_s:
                raise NoRoom(
                    f"{self.stage}: no room for its ranks after {self.patience_s:.0f} s: it wants {wants}, and "
                    f"{free} are free; add nodes, or lower {self.stage}.ranks or what ray.{self.stage} claims"
                )
            if now - said > SAY_AGAIN_S or said == began:
                said = now
                log.warning("%s: waiting for room: %s are wanted, %s are free", self.stage, wants, free)

    def _get(self, calls: list[Any]) -> list[Any]:
        try:
            return list(ray.get(calls, timeout=600))
        except (RayError, TimeoutError) as e:
            raise RankDied(_line(e)) from e

    @staticmethod
    def _failure(call: Any) -> BaseException | None:
        try:
            ray.get(call)
        except RayTaskError as e:
            return e.cause if isinstance(e.cause, BaseException) else e
        except RayError as e:
            return e
        return None

    def _end(self) -> None:
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        for group in filter(None, (self.group, self.wanted)):
            with contextlib.suppress(Exception):
                remove_placement_group(group)
        self.actors, self.group, self.wanted = [], None, None


class NoRoom(StageError):
    """The cluster has no room for the ranks."""


def environments(processes: Sequence[Any]) -> list[dict[str, str]]:
    """What torch's and DeepSpeed's launchers would set for each rank (each has `node`, `address`, `port`)."""
    first = processes[0]
    here = collections.Counter(p.node for p in processes)
    seen: collections.Counter[str] = collections.Counter()
    result = []
    for rank, process in enumerate(processes):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(processes)),
            "LOCAL_RANK": str(seen[process.node]),
            "LOCAL_WORLD_SIZE": str(here[process.node]),
            "MASTER_ADDR": first.address,
            "MASTER_PORT": str(first.port),
        }
        if first.address.startswith("127."):
            env["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would look up the host's name, which may lead elsewhere
        seen[process.node] += 1
        result.append(env)
    return result


def root_cause(failures: Sequence[BaseException]) -> BaseException:
    """Of what the ranks died of: the one that is for people, else RankDied with the first."""
    for failure in failures:
        if isinstance(failure, ConfigError | StageError):
            return type(failure)(str(failure))
    return RankDied(f"{type(failures[0]).__name__}: {_line(failures[0])}")


def _send(pid: int, began: int | None, number: int) -> None:
    """Send a signal to a process of this machine, if it is still the one that began then: numbers are given again."""
    if began is not None and process_began(pid) == began:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _resources(amounts: dict[str, float]) -> str:
    return ", ".join(f"{v:g} {k}" for k, v in sorted(amounts.items())) or "nothing"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
