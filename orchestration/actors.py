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
- A stage may want its workers to have several shards in flight (`max_in_flight`), so that one is read while another is
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
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError, RayTaskError

from orchestration.config import Pool, RayConfig, Span
from orchestration.hosts import shared
from orchestration.job import Job, build_worker, sentence
from orchestration.nodes import Autoscaler, Nodes
from shards.layout import shard_name
from shards.settings import NodeTrouble, StageError
from shards.stage import Stage, Task

log = logging.getLogger("carrara.engine")

TICK_S = 1.0
SLOW = 3.0  # a shard that takes so many times the 95th percentile is named in a line
KNOWN = 20  # so many shards must be done before their times tell how long one may take
LEAST_DEADLINE_S = 60.0  # however quick the others are
SPARE = 1.25  # memory claimed, times the most that was measured
BEYOND_ROOM = 8  # workers asked for beyond the room there is, for an autoscaler; once it answers, as many again


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
class _Worker:
    """A worker, as the driver sees it: where it is, how many shards it has, and whether it may have another."""

    actor: Any
    node: str | None = None
    ready: bool = False
    in_flight: int = 0
    alone: bool = False  # it has a suspect, which is to have no company
    crowded: bool = False  # it died with several shards in flight
    ended: bool = False  # by us: what its other calls say is no news
    leaving: bool = False  # its node is being drained
    memory: int = 0  # bytes that it claims
    kept_off: frozenset[str] = frozenset()  # nodes that it may not be placed on


@dataclasses.dataclass
class _Call:
    worker: _Worker
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
                log.warning("%s: %d shards in flight are left unfinished", job.stage.name, fleet.busy)
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
        self.max_in_flight = int(getattr(stage, "max_in_flight", 1))
        self.options = {
            "num_cpus": pool.num_cpus,
            "num_gpus": gpus,
            "resources": pool.resources,
            "scheduling_strategy": "SPREAD" if pool.placement == "SPREAD" else "DEFAULT",
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": self.max_in_flight,
        }
        self.actor = ray.remote(ShardWorker)
        self.nodes, self.autoscaler = Nodes(stage.name, config), Autoscaler()
        self.calls: dict[Any, _Call] = {}
        self.workers: dict[_Worker, None] = {}  # in the order of their making
        self.free: dict[_Worker, None] = {}  # those that may be given a shard
        self.busy = 0  # shards under way
        self.seconds: collections.deque[float] = collections.deque(maxlen=500)
        self.room: int | None = None  # workers that the cluster has room for; None until it was asked
        self.target, self.beyond = 0, BEYOND_ROOM
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
        count = min(self.target, remaining) - len(self.workers)
        for worker in [w for w in reversed(self.workers) if w.node is None][: max(-count, 0)]:
            self._retire(worker, ended=True)  # nothing is left for it, so no node need come for it
        if count > 0:
            kept_off = frozenset(self.nodes.left_out())
            memory = self._memory()
            actor = self.actor.options(**self._options(memory, kept_off))
            for _ in range(count):
                worker = _Worker(actor.remote(self.stage, self.pool.threads), kept_off=kept_off, memory=memory)
                self.workers[worker] = None
                self.calls[worker.actor.where.remote()] = _Call(worker, None, now)

    def _ask(self, now: float) -> None:
        """How many workers are wanted as things are, and which nodes are being drained."""
        self.asked_at = now
        self.nodes.look()
        needs = self._needs()
        room = self.nodes.room(needs)
        if self.room is not None and room > self.room:  # somebody adds nodes: more are asked for at a time
            self.beyond = max(BEYOND_ROOM, room)
        self.room = room
        waiting = sum(w.node is None for w in self.workers)
        self.target = self._target(
            room, room if self._overcommitted(room) else self.autoscaler.room(needs, room, waiting)
        )
        if room < 1:
            self._complain(now, needs)
        left_out = set(self.nodes.left_out())
        for worker in [w for w in self.workers if w.node is None and not w.kept_off <= left_out]:
            self._retire(worker, ended=True)  # it waits for room elsewhere, and a node has had its rest
        for worker in [w for w in self.workers if w.node in self.nodes.draining]:
            if not worker.leaving:
                log.info(
                    "%s: %s is being drained; its workers get no more shards",
                    self.stage.name,
                    self.nodes.name(worker.node),
                )
            worker.leaving = True
            self.free.pop(worker, None)
            if not worker.in_flight:
                self._retire(worker)

    def _overcommitted(self, room: int) -> bool:
        """Whether memory is what limits the room, and workers claim less than one is known to use: then Ray sees room
        that there is not, and would place those that are to wait for a node. Lets go of those that wait with such a
        claim."""
        used = min(self.peak_bytes, self._memory())
        short = [w for w in self.workers if w.memory < used]
        if not short or self.nodes.room(self.needs) <= room:
            return False
        for worker in [w for w in short if w.node is None]:
            self._retire(worker, ended=True)
        return True

    def _target(self, room: int, most: float) -> int:
        """How many workers are wanted. Those that wait for a node are what makes an autoscaler add one. most: how many
        there may be room for in time."""
        workers = self.pool.workers
        if isinstance(workers, int):
            return workers
        wanted = max(room, int(min(room + self.beyond, most)))
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

    def _options(self, memory: int, kept_off: frozenset[str]) -> dict[str, Any]:
        """Options of workers that are started now: what they claim, and the nodes that they are kept off."""
        options: dict[str, Any] = dict(self.options)
        if memory:
            options["memory"] = memory
        if kept_off:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(kept_off))})"}
        return options

    def _complain(self, now: float, needs: dict[str, float]) -> None:
        have = ray.cluster_resources()
        cluster = {k: v for k, v in have.items() if k in {"CPU", "GPU", *needs}}
        sizes = f"it needs {readable(needs)}, the cluster has {readable(cluster)}"
        text = f"{self.stage.name}: no node has room for a worker ({sizes})"
        if self.nodes.left_out():
            text += "; left out: " + ", ".join(self.nodes.name(n) for n in self.nodes.left_out())
        if now - self.working_at > self.config.wait_for_nodes_s:
            raise StageError(f"{text}; change ray.{self.stage.name} or add a node")
        log.warning("%s; waiting for one", text)

    # --- and work ---------------------------------------------------------------------------------------------

    def feed(self, job: Job) -> None:
        """Give shards to whoever has room for one, first to those who have none."""
        for load in range(self.max_in_flight):
            for worker in [w for w in self.free if w.in_flight == load]:
                task = job.ledger.take_suspect() if load == 0 else None
                worker.alone = task is not None
                task = task or job.ledger.take()
                if task is None:
                    return self._let_go(job)
                worker.in_flight, self.busy = worker.in_flight + 1, self.busy + 1
                if worker.alone or worker.in_flight == self.max_in_flight:
                    del self.free[worker]
                self.calls[worker.actor.process.remote(pickle.dumps(task))] = _Call(worker, task, time.monotonic())
        return None

    def _let_go(self, job: Job) -> None:
        """End workers that nothing is left for, so that nodes may go."""
        surplus = len(self.workers) - max(job.ledger.remaining, 1)
        for worker in [w for w in self.free if not w.in_flight][: max(surplus, 0)]:
            self._retire(worker)

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
            job.workers = sum(w.ready for w in self.workers)
            job.progress.update(0, workers=job.workers)
            if job.exporter is not None:
                job.exporter.left(job.ledger.remaining, job.workers)
            self._judge_ages(job, now)

    def _answer(self, job: Job, call: _Call, answer: Any) -> None:
        task, worker = call.task, call.worker
        if task is not None:
            worker.in_flight, self.busy = worker.in_flight - 1, self.busy - 1
        if isinstance(answer, RayError):
            self._failed(job, call, answer)
            return
        self.working_at = time.monotonic()
        if task is not None:
            stats, peak = answer
            self.seconds.append(time.monotonic() - call.began)
            self._measured(job, peak)
            self.nodes.commit(worker.node)
            self._free(worker)
            job.done(task, stats)
        elif worker.node is None:
            worker.node = answer
            if self.nodes.rests(worker.node) or worker.node in self.nodes.draining:  # it was on its way there
                self._retire(worker)
            elif worker in self.workers:
                self.calls[worker.actor.hello.remote()] = _Call(worker, None, time.monotonic())
        elif worker in self.workers:
            worker.ready = self.nodes.started = True
            self._free(worker)

    def _failed(self, job: Job, call: _Call, error: RayError) -> None:
        """A call came to nothing: whose fault is it?"""
        task, worker = call.task, call.worker
        cause: BaseException = error
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            cause = error.cause
        elif isinstance(error, OutOfMemoryError) and (task is None or not job.ledger.was_troubled(task)):
            # Ray chooses a worker to end, whichever brought the node there; a shard that it meets again is a suspect.
            cause = NodeTrouble("its worker was ended by Ray, since the node is short of memory")
        if task is None:
            self._retire(worker)
            if not worker.ended and not self.nodes.is_leaving(worker.node):
                self._did_not_start(worker, cause)
        elif isinstance(cause, NodeTrouble):
            self._retire(worker, ended=True)
            job.ledger.trouble(task, cause, str(error))
            if not self.nodes.is_leaving(worker.node):
                self.nodes.strike(worker.node, sentence(cause), cause, self._needs())
        elif isinstance(error, RayTaskError):  # raised by the stage's code
            self._free(worker)
            job.blame(task, cause, str(error))
        else:  # the process is gone: killed, out of memory, its node lost, or the shard is poison
            self._retire(worker, in_flight=worker.in_flight + 1, ended=isinstance(error, ActorUnavailableError))
            innocent = worker.ended or self.nodes.is_leaving(worker.node)
            if job.ledger.committed(task):
                job.done(task, None)
            elif innocent:
                job.ledger.give_back(task)
            elif worker.crowded:
                job.ledger.suspect(task)
            else:
                died = StageError("the worker process died while making it (killed, out of memory, or a crash)")
                job.blame(task, died, str(error))

    def _free(self, worker: _Worker) -> None:
        worker.alone = False
        if worker.leaving and not worker.in_flight:
            self._retire(worker)
        elif worker in self.workers and worker.ready and not worker.leaving:
            self.free[worker] = None

    def _measured(self, job: Job, peak: int) -> None:
        if peak > self.peak_bytes:
            self.peak_bytes = peak
            job.progress.update(0, worker_gb=round(peak / 1e9, 2))

    # --- and go -----------------------------------------------------------------------------------------------

    def _did_not_start(self, worker: _Worker, error: BaseException) -> None:
        text = str(error) if isinstance(error, NodeTrouble) else sentence(error)
        self.nodes.strike(worker.node, f"a worker did not start: {text}", error, self._needs())

    def _retire(self, worker: _Worker, in_flight: int = 0, ended: bool = False) -> None:
        """Strike a worker off; with its first failure it is known how many shards it had. ended: by our own doing."""
        if worker in self.workers:
            del self.workers[worker]
            self.free.pop(worker, None)
            worker.crowded, worker.ended = in_flight > 1, ended
            self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            ray.kill(worker.actor)

    def _judge_ages(self, job: Job, now: float) -> None:
        """Name what is slow, and end what hangs."""
        p95 = sorted(self.seconds)[int(0.95 * len(self.seconds))] if len(self.seconds) >= 5 else math.inf
        slow, limit = max(10.0, SLOW * p95), self.pool.deadline_s or math.inf
        if self.pool.deadline_factor is not None and len(self.seconds) >= KNOWN:
            limit = min(limit, max(LEAST_DEADLINE_S, self.pool.deadline_factor * p95))
        for ref, call in list(self.calls.items()):
            age, task, worker = now - call.began, call.task, call.worker
            if task is None:
                if worker.node is not None and age > self.pool.start_deadline_s:
                    del self.calls[ref]
                    self._retire(worker, ended=True)
                    late = StageError(f"it was not ready after {age:.0f} s (ray.{self.stage.name}.start_deadline_s)")
                    self._did_not_start(worker, late)
            elif age > limit:
                self._end_hung(job, ref, call, age)
            elif age > slow and not call.named:
                call.named = True
                log.warning(
                    "%s: shard %s is slow: %.0f s so far on %s",
                    self.stage.name,
                    shard_name(task.index),
                    age,
                    self.nodes.name(worker.node),
                )

    def _end_hung(self, job: Job, ref: Any, call: _Call, age: float) -> None:
        assert call.task is not None
        del self.calls[ref]
        call.worker.in_flight, self.busy = call.worker.in_flight - 1, self.busy - 1
        self._retire(call.worker, ended=True)
        if job.ledger.committed(call.task):  # it hangs after its work was done
            job.done(call.task, None)
            return
        where = self.nodes.name(call.worker.node)
        job.blame(
            call.task,
            StageError(
                f"it was not done after {age:.0f} s, on {where}, so its worker was ended "
                f"(ray.{self.stage.name}.deadline_s and deadline_factor)"
            ),
            "",
        )

    def out_of_grace(self) -> bool:
        """Whether a stop was asked for longer ago than shards in flight are waited for."""
        self.deadline = self.deadline or time.monotonic() + self.config.grace_s
        return time.monotonic() > self.deadline

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self.workers:
            self._kill(worker)


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
