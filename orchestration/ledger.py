"""What of a stage is left to do, whose fault a failure was, and which shards were set aside.

The record of what is done is the output folder itself (shards/dataset.py): nothing here outlives the
process but the tracebacks of shards that kept failing, in `<run>/status/<stage>-failed/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from orchestration import attempts
from shards import storage
from shards.dataset import FORMAT_VERSION, MANIFEST, read_stats, read_stats_of
from shards.layout import shard_name
from shards.listing import STATS, listed
from shards.settings import NodeTrouble, StageError
from shards.stage import Stage, Task

log = logging.getLogger("carrara.engine")

FAILED_IN_A_ROW = 10  # set-aside shards without a success between: then the fault is not in the shards


@dataclasses.dataclass(frozen=True)
class Retries:
    """attempts: tries a shard gets. back_off_s: wait before the second try, doubled with each up to back_off_max_s."""

    attempts: int = 3
    back_off_s: float = 1.0
    back_off_max_s: float = 60.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures of one shard."""
        return min(self.back_off_s * 2.0 ** (failures - 1), self.back_off_max_s)


class Ledger:
    """The tasks of one stage in one run of the command.

    Made by one pass over `stage.tasks()` that keeps one byte a shard, and by the names that lie in the stage's folder,
    so that a resume over 200,000 shards opens no file of them. The folder is begun (shards/stage.py: begin), so what
    lies there was made with the stage's settings. look: called for every task that is looked at, and for every shard
    whose stats are read at the end; what it raises ends that.
    """

    def __init__(
        self, stage: Stage, status: str, retries: Retries | None = None, look: Callable[[], None] = lambda: None
    ) -> None:
        self.stage, self.status, self.retries = stage, status, retries or Retries()
        self.look = look
        self.failed: dict[int, str] = {}
        self.skipped = self.made = 0
        self._open = bytearray()  # by position in stage.tasks(): is it to be made?
        committed = listed(stage.root, stage.data).committed
        done = np.zeros(int(committed[-1]) + 1 if len(committed) else 0, bool)
        done[committed] = True
        there = done.tobytes()
        for task in stage.tasks():
            look()
            is_open = task.index >= len(there) or not there[task.index]
            if not is_open and not self.skipped:
                # One for all: where the input was made anew, every shard of it is another one.
                _refuse_other_input(stage, task, read_stats(stage.root, task.index))
            self.skipped += not is_open
            self._open.append(is_open)
        self.total = len(self._open)
        self._waiting: list[tuple[float, int, Task]] = []  # heap of (not before, index, task)
        self._suspects: deque[Task] = deque()
        self._alone: set[int] = set()  # shards that were suspects once
        self._blame: Counter[int] = Counter()
        self._troubles: Counter[int] = Counter()
        self._old_failures = set(storage.list_names(self.failures))  # of an earlier run
        self._in_a_row = 0
        self._next: Task | None = None
        self._lazy: Iterator[Task] = iter(())
        if self.skipped < self.total:  # or it would be walked through to its end
            self._lazy = (t for t, todo in zip(stage.tasks(), self._open, strict=True) if todo)
        self._advance()

    def _advance(self) -> None:
        self._next = next(self._lazy, None)

    @property
    def complete(self) -> bool:
        """Nothing is left to be made, and the manifest is there, is current, and lists just these shards."""
        if self.skipped != self.total or not getattr(self.stage, "is_current", lambda: True)():
            return False
        try:
            manifest = storage.read_json(storage.join(self.stage.root, MANIFEST))
        except ValueError:
            return False
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            return False
        return len(manifest.get("shards", ())) == self.total

    @property
    def empty(self) -> bool:
        """Whether every shard is handed out, those to be tried again included."""
        return self._next is None and not self._waiting and not self._suspects

    @property
    def remaining(self) -> int:
        """Shards that are neither committed nor set aside, those under way included."""
        return self.total - self.skipped - self.made - len(self.failed)

    def take(self) -> Task | None:
        """The next task whose time has come, None where there is none right now."""
        if self._due() and self._waiting[0][1] not in self._alone:
            return heapq.heappop(self._waiting)[2]
        task = self._next
        if task is not None:
            self._advance()
        return task

    def take_suspect(self) -> Task | None:
        """A task to be given to a worker that has and gets no other meanwhile; None where there is none."""
        if self._suspects:
            return self._suspects.popleft()
        if self._due() and self._waiting[0][1] in self._alone:
            return heapq.heappop(self._waiting)[2]
        return None

    def _due(self) -> bool:
        return bool(self._waiting) and self._waiting[0][0] <= time.monotonic()

    @property
    def next_retry_s(self) -> float | None:
        """Seconds until a failed shard may be tried again; None where none waits."""
        return max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None

    def give_back(self, task: Task, wait_s: float = 0.0) -> None:
        """The task was not done, and not by its own fault: it is next, or once so many seconds have passed."""
        heapq.heappush(self._waiting, (time.monotonic() + wait_s, task.index, task))

    def trouble(self, task: Task, error: NodeTrouble, traceback: str) -> None:
        """A machine could not make it, whosever fault that is: the task is given back, uncounted. Where several
        machines in turn come into trouble over it, it is blamed: it may want more memory than any has."""
        self._troubles[task.index] += 1
        attempts.note(self.status, self.stage.name, shard_name(task.index), "no fault", str(error), traceback)
        if self._troubles[task.index] > self.retries.attempts:
            self.blame(task, str(error), traceback)
        else:
            self.give_back(task, self.retries.wait(self._troubles[task.index]) if self._troubles[task.index] > 1 else 0)

    def was_troubled(self, task: Task) -> bool:
        """Whether a machine had trouble with it before."""
        return bool(self._troubles[task.index])

    def suspect(self, task: Task) -> None:
        """A worker died with this shard and others in hand, so that nobody can say whose fault it was: it is tried
        again by itself, and no attempt is counted."""
        self._alone.add(task.index)
        self._suspects.append(task)

    def committed(self, task: Task) -> bool:
        """Whether the shard is on disk after all, whatever became of the worker that made it."""
        return storage.exists(storage.join(self.stage.root, shard_name(task.index) + STATS))

    def done(self, task: Task) -> None:
        """The shard is committed. No request to the store: at hundreds of shards a second each would be felt."""
        self._in_a_row = 0
        self.made += 1
        if shard_name(task.index) + ".json" in self._old_failures:
            with contextlib.suppress(Exception):  # a record of an earlier failure too many ends no run
                storage.remove(self._failure_url(task))

    def blame(self, task: Task, error: str, traceback: str) -> None:
        """The shard failed by its own doing: try again later, or set it aside after the last attempt."""
        self._blame[task.index] += 1
        attempt = self._blame[task.index]
        name = f"{self.stage.name}: shard {shard_name(task.index)}"
        what = "failed" if attempt < self.retries.attempts else "set aside"
        attempts.note(self.status, self.stage.name, shard_name(task.index), what, error, traceback)
        if attempt < self.retries.attempts:
            wait = self.retries.wait(attempt)
            log.warning("%s failed (%d of %d), again in %.3g s: %s", name, attempt, self.retries.attempts, wait, error)
            heapq.heappush(self._waiting, (time.monotonic() + wait, task.index, task))
            return
        log.error("%s is set aside after %d attempts: %s", name, attempt, error)
        record = {
            "stage": self.stage.name,
            "shard": task.index,
            "attempts": attempt,
            "error": error,
            "traceback": traceback,
            "host": socket.gethostname(),
            "at": time.time(),
        }
        try:
            storage.write_json(self._failure_url(task), record)
        except Exception as e:  # the run goes on without it
            log.warning("%s: its traceback cannot be written to %s: %s\n%s", name, self.failures, e, traceback)
        self.failed[task.index] = error
        self._in_a_row += 1
        if self._in_a_row >= FAILED_IN_A_ROW:
            raise StageError(
                f"{self.stage.name}: {self._in_a_row} shards in a row failed {attempt} times each, so the rest is "
                f"not tried; the last one: {error}; the tracebacks are in {self.failures}"
            )

    @property
    def failures(self) -> str:
        """The folder with the tracebacks of the shards that failed."""
        return storage.join(self.status, f"{self.stage.name}-failed")

    def _failure_url(self, task: Task) -> str:
        return storage.join(self.failures, shard_name(task.index) + ".json")

    def refuse_failures(self) -> None:
        """Raise StageError naming the shards that were set aside, if there are any."""
        if not self.failed:
            return
        names = [shard_name(i) for i in sorted(self.failed)]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        first = self.failed[min(self.failed)]
        raise StageError(
            f"{self.stage.name}: {len(names)} of {self.total} shards failed and are set aside ({shown}), the others "
            f"are committed; {names[0]}: {first}; the tracebacks are in {self.failures}; run the same command again "
            "to try them once more"
        )

    def stats(self) -> Iterator[dict[str, Any]]:
        """The committed stats of every shard, in the order of the tasks, read as they are asked for. Raises StageError
        where one is not there, or was made from something else than its task says: images, say, that were made anew.
        """
        tasks, again = itertools.tee(self.stage.tasks())
        root = self.stage.root
        for task, (index, stats) in zip(tasks, read_stats_of(root, (t.index for t in again)), strict=True):
            self.look()
            if stats is None:
                raise StageError(f"{root}: the stats of shard {shard_name(index)} are missing or damaged; see `verify`")
            _refuse_other_input(self.stage, task, stats)
            yield stats


def _refuse_other_input(stage: Stage, task: Task, stats: dict[str, Any] | None) -> None:
    made_from = None if stats is None else stats.get("input")
    if made_from is not None and task.input is not None and made_from != task.input:
        raise StageError(
            f"{stage.root}: shard {shard_name(task.index)} was made from other data than lies there now; give "
            "--redo to set this folder aside and make it anew, or set 'run' to another folder"
        )
