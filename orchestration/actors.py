"""The loop on Ray: `ray.wait` over actors that own one shard at a time.

The rules, each found by breaking it:
- A worker gets a shard only once it has answered (`hello`): a shard given to an actor that cannot be
  placed would wait for ever.
- `max_restarts=0`, and lost actors are replaced here: an actor that Ray restarts fails every call in the
  meantime and eats the attempts of innocent shards, and with task retries a shard that kills its worker
  would be tried for ever, unseen.
- Attempts are counted by shard, in the ledger; workers that do not start are counted apart, here.
- Only task descriptions and stats go through Ray, so that the object store stays empty.
- A stage may want its workers to have more than one shard in hand (`in_hand`), so that one is read while another is
  computed and a third committed. When such a worker dies, each of them may have killed it: they are tried again one
  at a time, and only a shard that dies alone is blamed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from orchestration.config import Pool, RayConfig
from orchestration.engine import Job, build_worker, sentence
from orchestration.hosts import shared
from shards.layout import shard_name
from shards.settings import ConfigError, StageError
from shards.stage import Stage, Task

log = logging.getLogger("carrara.engine")

START_FAILURES = 3  # workers in a row that fail to start, then the run gives up
TICK_S = 1.0
SLOW = 3.0  # a shard that takes so many times the 95th percentile is named in a line


class ShardWorker:
    """The actor: loads what the stage needs in `hello`, then makes one shard a call."""

    def __init__(self, stage: Stage, threads: int) -> None:
        self.stage, self.threads = stage, threads

    def hello(self) -> None:
        """Build the stage's worker; what it raises tells why a worker does not start."""
        self.make = build_worker(self.stage, self.threads)

    def process(self, task: Task) -> dict[str, Any]:
        """Make and commit one shard; returns its stats."""
        return self.make(task)


@dataclasses.dataclass(eq=False)
class _Hand:
    """A worker, as the driver sees it: how many shards it has, and whether it may have another."""

    actor: Any
    ready: bool = False
    held: int = 0
    alone: bool = False  # it has a suspect, which is to have no company
    crowded: bool = False  # it died with several shards in hand


@dataclasses.dataclass
class _Call:
    hand: _Hand
    task: Task | None  # None: the hello of a new worker
    began: float
    named: bool = False


def on_ray(job: Job, pool: Pool, config: RayConfig) -> None:
    """Make every open shard of the job's ledger on the cluster that `ray.init` connected to."""
    with shared(job.stage) as stage:
        _drive(job, stage, pool, config)


def _drive(job: Job, stage: Stage, pool: Pool, config: RayConfig) -> None:
    fleet = _Fleet(stage, pool, config)
    try:
        while (not job.ledger.empty and not job.stop.is_set()) or fleet.busy:
            job.lease.check()
            if not job.stop.is_set():
                fleet.grow(job.ledger.remaining)
                fleet.feed(job)
            elif fleet.out_of_grace():
                log.warning("%s: %d shards in hand are left unfinished", job.stage.name, fleet.busy)
                break
            fleet.wait(job)
        if job.ledger.remaining:
            job.check()
    finally:
        fleet.dismiss()


class _Fleet:
    """The actors, and the calls under way to them."""

    def __init__(self, stage: Stage, pool: Pool, config: RayConfig) -> None:
        self.stage, self.config, self.limit, self.threads = stage, config, pool.workers, pool.threads
        gpus = pool.num_gpus
        if gpus is None:
            gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        self.needs = {k: v for k, v in {"CPU": pool.num_cpus, "GPU": gpus, **pool.resources}.items() if v > 0}
        self.in_hand = int(getattr(stage, "in_hand", 1))
        self.actor = ray.remote(ShardWorker).options(
            num_cpus=pool.num_cpus,
            num_gpus=gpus,
            resources=pool.resources,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=self.in_hand,
        )
        self.calls: dict[Any, _Call] = {}
        self.hands: list[_Hand] = []
        self.seconds: collections.deque[float] = collections.deque(maxlen=500)
        self.start_failures = self.room = 0
        self.asked_at = -math.inf
        self.working_at = time.monotonic()  # when a worker last answered, or shards were not waiting for one
        self.deadline: float | None = None

    @property
    def busy(self) -> int:
        """Shards under way."""
        return sum(c.task is not None for c in self.calls.values())

    def grow(self, remaining: int) -> None:
        """Start workers: as many as configured, or else as the cluster has room for, and no more than shards."""
        now = time.monotonic()
        if now - self.asked_at >= 10:
            have = ray.cluster_resources()
            self.room = min((math.floor(have.get(k, 0.0) / v + 1e-9) for k, v in self.needs.items()), default=1)
            self.asked_at = now
            if self.room < 1:
                self._complain(now, have)
        for _ in range(min(self.limit or self.room, remaining) - len(self.hands)):
            hand = _Hand(self.actor.remote(self.stage, self.threads))
            self.hands.append(hand)
            self.calls[hand.actor.hello.remote()] = _Call(hand, None, now)

    def _complain(self, now: float, have: dict[str, float]) -> None:
        held = {k: v for k, v in have.items() if k in {"CPU", "GPU", *self.needs}}
        text = f"{self.stage.name}: no node has room for a worker (it needs {self.needs}, the cluster has {held})"
        if now - self.working_at > self.config.wait_for_nodes_s:
            raise StageError(f"{text}; change ray.{self.stage.name} or add a node")
        log.warning("%s; waiting for one", text)

    def feed(self, job: Job) -> None:
        """Give shards to whoever has room for one, first to those who have none."""
        for held in range(self.in_hand):
            for hand in [h for h in self.hands if h.ready and h.held == held and not h.alone]:
                task = job.ledger.take_suspect() if held == 0 else None
                hand.alone = task is not None
                task = task or job.ledger.take()
                if task is None:
                    return
                hand.held += 1
                self.calls[hand.actor.process.remote(task)] = _Call(hand, task, time.monotonic())

    def wait(self, job: Job) -> None:
        """Wait for an answer, at most a moment, and act on it."""
        if not self.calls:
            job.stop.wait(min(TICK_S, job.ledger.next_retry_s or TICK_S))
            return
        ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=min(TICK_S, job.ledger.next_retry_s or TICK_S))
        for ref in ready:
            self._answer(job, ref, self.calls.pop(ref))
        job.workers = sum(h.ready for h in self.hands)
        job.progress.update(0, workers=job.workers)
        self._name_slow(job)

    def _answer(self, job: Job, ref: Any, call: _Call) -> None:
        task, hand, stats = call.task, call.hand, None
        try:
            stats = ray.get(ref)
            self._free(hand, task)
        except ActorUnavailableError:  # the network or the node: nobody's fault
            self._retire(hand)
            if task is not None and not job.ledger.committed(task):
                job.ledger.give_back(task)
                return
        except RayTaskError as e:  # raised by the stage's code
            cause = e.cause if isinstance(e.cause, BaseException) else e
            if task is None:
                self._retire(hand)
                self._did_not_start(cause)
                return
            self._free(hand, task)
            job.blame(task, cause, str(e))
            return
        except RayError as e:  # the process died: killed, out of memory, or the shard is poison
            self._retire(hand)
            if task is None:
                self._did_not_start(e)
                return
            if not job.ledger.committed(task):
                if hand.crowded:
                    job.ledger.suspect(task)
                    return
                job.blame(
                    task,
                    StageError("the worker process died while making it (killed, out of memory, or a crash)"),
                    str(e),
                )
                return
        self.start_failures, self.working_at = 0, time.monotonic()
        if task is not None:
            self.seconds.append(time.monotonic() - call.began)
            job.done(task, stats)

    def _free(self, hand: _Hand, task: Task | None) -> None:
        if task is None:
            hand.ready = True
        else:
            hand.held, hand.alone = hand.held - 1, False

    def _did_not_start(self, error: BaseException) -> None:
        self.start_failures += 1
        log.warning("%s: a worker did not start: %s", self.stage.name, sentence(error))
        if self.start_failures >= START_FAILURES:
            if isinstance(error, ConfigError):
                raise ConfigError(str(error))
            raise StageError(f"{self.stage.name}: workers do not start: {sentence(error)}")

    def _retire(self, hand: _Hand) -> None:
        """Strike a worker off; with its first failure it is known how many shards it had."""
        if hand in self.hands:
            self.hands.remove(hand)
            hand.crowded = hand.held > 1
            self._kill(hand)

    def _kill(self, hand: _Hand) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            ray.kill(hand.actor)

    def _name_slow(self, job: Job) -> None:
        if len(self.seconds) < 5:
            return
        limit = max(10.0, SLOW * sorted(self.seconds)[int(0.95 * len(self.seconds))])
        for call in self.calls.values():
            age = time.monotonic() - call.began
            if call.task is not None and not call.named and age > limit:
                call.named = True
                log.warning("%s: shard %s is slow: %.0f s so far", self.stage.name, shard_name(call.task.index), age)

    def out_of_grace(self) -> bool:
        """Whether a stop was asked for longer ago than shards in hand are waited for."""
        self.deadline = self.deadline or time.monotonic() + self.config.grace_s
        return time.monotonic() > self.deadline

    def dismiss(self) -> None:
        """End all workers."""
        for hand in self.hands:
            self._kill(hand)
