"""The loop on Ray: `ray.wait` over actors that own one shard at a time.

The rules, each found by breaking it:
- A worker gets a shard only once it has answered: a shard given to an actor that cannot be placed would wait for ever.
- `max_restarts=0`, and lost actors are replaced here: an actor that Ray restarts fails every call in the
  meantime and eats the attempts of innocent shards, and with task retries a shard that kills its worker
  would be tried for ever, unseen.
- Attempts are counted by shard, in the ledger; workers that do not start are counted by node (orchestration/nodes.py),
  and what goes with a node that is lost or drained is counted nowhere.
- A worker that is at one shard for far longer than others is ended, and the shard is blamed: a write that hangs
  would otherwise hang the run.
- Only task descriptions and stats go through Ray, so that the object store stays empty; and for a committed shard
  this process asks no store anything, so that it keeps up with thousands of workers. Ray is asked for all answers that
  are there at once, and a task goes as bytes, which Ray sends without looking into it.
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
import pickle
import resource
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from orchestration.config import Pool, RayConfig, Span
from orchestration.hosts import shared
from orchestration.job import Job, build_worker, sentence
from orchestration.nodes import Nodes, autoscaled_room
from shards.layout import shard_name
from shards.settings import NodeTrouble, StageError
from shards.stage import Stage, Task

log = logging.getLogger("carrara.engine")

TICK_S = 1.0
SLOW = 3.0  # a shard that takes so many times the 95th percentile is named in a line
KNOWN = 20  # so many shards must be done before their times tell how long one may take
LEAST_DEADLINE_S = 60.0  # however quick the others are
SPARE = 1.25  # memory claimed, times the most that was measured
AHEAD = 8  # workers asked of an autoscaler beyond the room there is; and as many again as there are


class ShardWorker:
    """The actor: loads what the stage needs in `hello`, then makes one shard a call."""

    def __init__(self, stage: Stage, threads: int) -> None:
        self.stage, self.threads = stage, threads

    def where(self) -> str:
        """The id of the node it runs on; answered at once, so that a start that fails has a place."""
        return str(ray.get_runtime_context().get_node_id())

    def hello(self) -> None:
        """Build the stage's worker; what it raises tells why a worker does not start."""
        self.make = build_worker(self.stage, self.threads)

    def process(self, task: bytes) -> tuple[dict[str, Any], int]:
        """Make and commit one shard; returns its stats, and the most memory this process has used, in bytes. task: a
        pickled Task."""
        return self.make(pickle.loads(task)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclasses.dataclass(eq=False)
class _Hand:
    """A worker, as the driver sees it: where it is, how many shards it has, and whether it may have another."""

    actor: Any
    node: str | None = None
    ready: bool = False
    held: int = 0
    alone: bool = False  # it has a suspect, which is to have no company
    crowded: bool = False  # it died with several shards in hand
    ended: bool = False  # by us: what its other calls say is no news
    leaving: bool = False  # its node is being drained
    kept_off: frozenset[str] = frozenset()  # nodes that it may not be placed on


@dataclasses.dataclass
class _Call:
    hand: _Hand
    task: Task | None  # None: a new worker's first words
    began: float
    named: bool = False


def on_ray(job: Job, pool: Pool, config: RayConfig) -> None:
    """Make every open shard of the job's ledger on the cluster that `ray.init` connected to."""
    with shared(job.stage) as stage:
        _drive(job, stage, pool, config)


def _drive(job: Job, stage: Stage, pool: Pool, config: RayConfig) -> None:
    fleet = Fleet(stage, pool, config, job.peak_bytes)
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


class Fleet:
    """The actors, and the calls under way to them. peak_bytes: the most memory a worker is known to use, or 0."""

    def __init__(self, stage: Stage, pool: Pool, config: RayConfig, peak_bytes: int = 0) -> None:
        self.stage, self.pool, self.config, self.peak_bytes = stage, pool, config, peak_bytes
        gpus = pool.num_gpus
        if gpus is None:
            gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        self.needs = {k: v for k, v in {"CPU": pool.num_cpus, "GPU": gpus, **pool.resources}.items() if v > 0}
        self.in_hand = int(getattr(stage, "in_hand", 1))
        self.options = {
            "num_cpus": pool.num_cpus,
            "num_gpus": gpus,
            "resources": pool.resources,
            "scheduling_strategy": "SPREAD" if pool.placement == "SPREAD" else "DEFAULT",
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": self.in_hand,
        }
        self.actor = ray.remote(ShardWorker)
        self.nodes = Nodes(stage.name, config)
        self.calls: dict[Any, _Call] = {}
        self.hands: dict[_Hand, None] = {}  # in the order of their making
        self.free: dict[_Hand, None] = {}  # those that may be given a shard
        self.busy = 0  # shards under way
        self.seconds: collections.deque[float] = collections.deque(maxlen=500)
        self.room = self.target = 0
        self.asked_at = self.judged_at = -math.inf
        self.working_at = time.monotonic()  # when a worker last answered, or shards were not waiting for one
        self.deadline: float | None = None

    # --- workers come -----------------------------------------------------------------------------------------

    def grow(self, remaining: int) -> None:
        """Start workers: as many as configured, or else as there is room for, and no more than shards."""
        now = time.monotonic()
        if now - self.asked_at >= 5:
            self._ask(now)
        if self.nodes.unknown_rests:
            return
        count = min(self.target, remaining) - len(self.hands)
        if count > 0:
            kept_off = frozenset(self.nodes.left_out())
            actor = self.actor.options(**self._options(kept_off))
            for _ in range(count):
                hand = _Hand(actor.remote(self.stage, self.pool.threads), kept_off=kept_off)
                self.hands[hand] = None
                self.calls[hand.actor.where.remote()] = _Call(hand, None, now)

    def _ask(self, now: float) -> None:
        """How many workers are wanted as things are, and which nodes are being drained."""
        self.asked_at = now
        self.nodes.look()
        needs = self._needs()
        self.room = self.nodes.room(needs)
        self.target = self._target(autoscaled_room(needs))
        if self.room < 1:
            self._complain(now, needs)
        left_out = set(self.nodes.left_out())
        for hand in [h for h in self.hands if h.node is None and not h.kept_off <= left_out]:
            self._retire(hand, ended=True)  # it waits for room elsewhere, and a node has had its rest
        for hand in [h for h in self.hands if h.node in self.nodes.draining]:
            if not hand.leaving:
                log.info(
                    "%s: %s is being drained; its workers get no more shards",
                    self.stage.name,
                    self.nodes.name(hand.node),
                )
            hand.leaving = True
            self.free.pop(hand, None)
            if not hand.held:
                self._retire(hand)

    def _target(self, autoscaled: float) -> int:
        workers = self.pool.workers
        if isinstance(workers, int):
            return workers
        wanted = self.room
        if autoscaled > self.room:  # workers that wait for a node are what makes an autoscaler add one
            wanted = int(min(autoscaled, self.room + max(AHEAD, self.room)))
        return max(workers.min, min(wanted, workers.max)) if isinstance(workers, Span) else wanted

    def _needs(self) -> dict[str, float]:
        memory = self._memory()
        return {**self.needs, **({"memory": memory} if memory else {})}

    def _memory(self) -> int:
        """Bytes a new worker claims: as configured, else by what was measured; never more than a node has."""
        if self.pool.memory_gb is not None:
            return int(self.pool.memory_gb * 1e9)
        most = self.nodes.largest_memory()
        claim = math.ceil(SPARE * self.peak_bytes / 50e6) * 50e6
        return int(min(claim, most)) if most else 0

    def _options(self, kept_off: frozenset[str]) -> dict[str, Any]:
        """Options of workers that are started now: what they claim, and the nodes that they are kept off."""
        options: dict[str, Any] = dict(self.options)
        if memory := self._memory():
            options["memory"] = memory
        if kept_off:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(kept_off))})"}
        return options

    def _complain(self, now: float, needs: dict[str, float]) -> None:
        have = ray.cluster_resources()
        held = {k: v for k, v in have.items() if k in {"CPU", "GPU", *needs}}
        sizes = f"it needs {readable(needs)}, the cluster has {readable(held)}"
        text = f"{self.stage.name}: no node has room for a worker ({sizes})"
        if self.nodes.left_out():
            text += "; left out: " + ", ".join(self.nodes.name(n) for n in self.nodes.left_out())
        if now - self.working_at > self.config.wait_for_nodes_s:
            raise StageError(f"{text}; change ray.{self.stage.name} or add a node")
        log.warning("%s; waiting for one", text)

    # --- and work ---------------------------------------------------------------------------------------------

    def feed(self, job: Job) -> None:
        """Give shards to whoever has room for one, first to those who have none."""
        for held in range(self.in_hand):
            for hand in [h for h in self.free if h.held == held]:
                task = job.ledger.take_suspect() if held == 0 else None
                hand.alone = task is not None
                task = task or job.ledger.take()
                if task is None:
                    return self._let_go(job)
                hand.held, self.busy = hand.held + 1, self.busy + 1
                if hand.alone or hand.held == self.in_hand:
                    del self.free[hand]
                self.calls[hand.actor.process.remote(pickle.dumps(task))] = _Call(hand, task, time.monotonic())
        return None

    def _let_go(self, job: Job) -> None:
        """End workers that nothing is left for, so that nodes may go."""
        surplus = len(self.hands) - max(job.ledger.remaining, 1)
        for hand in [h for h in self.free if not h.held][: max(surplus, 0)]:
            self._retire(hand)

    def wait(self, job: Job) -> None:
        """Wait for answers, at most a moment, and act on all that are there."""
        timeout = min(TICK_S, job.ledger.next_retry_s or TICK_S)
        if not self.calls:
            job.stop.wait(timeout)
            return
        ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            ready, _ = ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0, fetch_local=False)
        for ref, answer in zip(ready, _answers(ready), strict=True):
            if (call := self.calls.pop(ref, None)) is not None:
                self._answer(job, call, answer)
        now = time.monotonic()
        if now - self.judged_at >= TICK_S:
            self.judged_at = now
            job.workers = sum(h.ready for h in self.hands)
            job.progress.update(0, workers=job.workers)
            if job.exporter is not None:
                job.exporter.left(job.ledger.remaining, job.workers)
            self._judge_ages(job, now)

    def _answer(self, job: Job, call: _Call, answer: Any) -> None:
        task, hand = call.task, call.hand
        if task is not None:
            hand.held, self.busy = hand.held - 1, self.busy - 1
        if isinstance(answer, RayError):
            self._failed(job, call, answer)
            return
        self.working_at = time.monotonic()
        if task is not None:
            stats, peak = answer
            self.seconds.append(time.monotonic() - call.began)
            self._measured(job, peak)
            self.nodes.commit(hand.node)
            self._free(hand)
            job.done(task, stats)
        elif hand.node is None:
            hand.node = answer
            if self.nodes.rests(hand.node) or hand.node in self.nodes.draining:  # it was on its way there
                self._retire(hand)
            elif hand in self.hands:
                self.calls[hand.actor.hello.remote()] = _Call(hand, None, time.monotonic())
        elif hand in self.hands:
            hand.ready = self.nodes.started = True
            self._free(hand)

    def _failed(self, job: Job, call: _Call, error: RayError) -> None:
        """A call came to nothing: whose fault is it?"""
        task, hand = call.task, call.hand
        cause: BaseException = error
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            cause = error.cause
        if task is None:
            self._retire(hand)
            if not hand.ended and not self.nodes.is_leaving(hand.node):
                self._did_not_start(hand, cause)
        elif isinstance(cause, NodeTrouble):
            self._retire(hand, ended=True)
            job.ledger.trouble(task, cause, str(error))
            if not self.nodes.is_leaving(hand.node):
                self.nodes.strike(hand.node, sentence(cause), cause, self._needs())
        elif isinstance(error, RayTaskError):  # raised by the stage's code
            self._free(hand)
            job.blame(task, cause, str(error))
        else:  # the process is gone: killed, out of memory, its node lost, or the shard is poison
            self._retire(hand, held=hand.held + 1, ended=isinstance(error, ActorUnavailableError))
            innocent = hand.ended or self.nodes.is_leaving(hand.node)
            if job.ledger.committed(task):
                job.done(task, None)
            elif innocent:
                job.ledger.give_back(task)
            elif hand.crowded:
                job.ledger.suspect(task)
            else:
                died = StageError("the worker process died while making it (killed, out of memory, or a crash)")
                job.blame(task, died, str(error))

    def _free(self, hand: _Hand) -> None:
        hand.alone = False
        if hand.leaving and not hand.held:
            self._retire(hand)
        elif hand in self.hands and hand.ready and not hand.leaving:
            self.free[hand] = None

    def _measured(self, job: Job, peak: int) -> None:
        if peak > self.peak_bytes:
            self.peak_bytes = peak
            job.progress.update(0, worker_gb=round(peak / 1e9, 2))

    # --- and go -----------------------------------------------------------------------------------------------

    def _did_not_start(self, hand: _Hand, error: BaseException) -> None:
        text = str(error) if isinstance(error, NodeTrouble) else sentence(error)
        self.nodes.strike(hand.node, f"a worker did not start: {text}", error, self._needs())

    def _retire(self, hand: _Hand, held: int = 0, ended: bool = False) -> None:
        """Strike a worker off; with its first failure it is known how many shards it had. ended: by our own doing."""
        if hand in self.hands:
            del self.hands[hand]
            self.free.pop(hand, None)
            hand.crowded, hand.ended = held > 1, ended
            self._kill(hand)

    def _kill(self, hand: _Hand) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            ray.kill(hand.actor)

    def _judge_ages(self, job: Job, now: float) -> None:
        """Name what is slow, and end what hangs."""
        p95 = sorted(self.seconds)[int(0.95 * len(self.seconds))] if len(self.seconds) >= 5 else math.inf
        slow, limit = max(10.0, SLOW * p95), self.pool.deadline_s or math.inf
        if self.pool.deadline_factor is not None and len(self.seconds) >= KNOWN:
            limit = min(limit, max(LEAST_DEADLINE_S, self.pool.deadline_factor * p95))
        for ref, call in list(self.calls.items()):
            age, task, hand = now - call.began, call.task, call.hand
            if task is None:
                if hand.node is not None and age > self.pool.start_deadline_s:
                    del self.calls[ref]
                    self._retire(hand, ended=True)
                    late = StageError(f"it was not ready after {age:.0f} s (ray.{self.stage.name}.start_deadline_s)")
                    self._did_not_start(hand, late)
            elif age > limit:
                self._end_hung(job, ref, call, age)
            elif age > slow and not call.named:
                call.named = True
                log.warning(
                    "%s: shard %s is slow: %.0f s so far on %s",
                    self.stage.name,
                    shard_name(task.index),
                    age,
                    self.nodes.name(hand.node),
                )

    def _end_hung(self, job: Job, ref: Any, call: _Call, age: float) -> None:
        assert call.task is not None
        del self.calls[ref]
        call.hand.held, self.busy = call.hand.held - 1, self.busy - 1
        self._retire(call.hand, ended=True)
        if job.ledger.committed(call.task):  # it hangs after its work was done
            job.done(call.task, None)
            return
        where = self.nodes.name(call.hand.node)
        job.blame(
            call.task,
            StageError(
                f"it was not done after {age:.0f} s, on {where}, so its worker was ended "
                f"(ray.{self.stage.name}.deadline_s and deadline_factor)"
            ),
            "",
        )

    def out_of_grace(self) -> bool:
        """Whether a stop was asked for longer ago than shards in hand are waited for."""
        self.deadline = self.deadline or time.monotonic() + self.config.grace_s
        return time.monotonic() > self.deadline

    def dismiss(self) -> None:
        """End all workers."""
        for hand in self.hands:
            self._kill(hand)


def _answers(refs: Sequence[Any]) -> list[Any]:
    """What each of these calls, which are over, returned, or the RayError that it raised."""
    try:
        return list(ray.get(refs))
    except RayError:  # of one of them, and nobody says of which
        return [_answer_of(ref) for ref in refs]


def _answer_of(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def readable(amounts: dict[str, float]) -> dict[str, Any]:
    """Resources for people: memory in GB."""
    return {k: f"{v / 1e9:.1f} GB" if k == "memory" else v for k, v in amounts.items()}
