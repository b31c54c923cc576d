"""What a stage is: a lazy sequence of shard tasks, a worker built once a process, and a finish.

A stage is plain Python and knows nothing of Ray: orchestration/ drives any of them on a cluster or in
one process. Stage objects are small (configuration and paths) and can be pickled to a worker.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from shards.commit import Folder
from shards.fingerprint import Fingerprint
from shards.listing import listed
from shards.made_with import made_with_of, read_made_with
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.engine")


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One shard to make: its number, the digest of what it is made from, and what the worker needs to know."""

    index: int
    input: str | None = None
    payload: Any = None


Worker = Callable[[Task], dict[str, Any]]
Made = tuple[dict[str, bytes], dict[str, Any]]  # a shard's files by suffix, and its stats (rows, count, status, ...)
T = TypeVar("T")

PERSIST_PAUSES_S = (1.0, 4.0, 10.0)


def persist(commit: Callable[[], T]) -> T:
    """Call `commit`, and again after a while where it fails: what a store refuses for a moment was costly to make, and
    is at hand. Raises what the last try raised."""
    for pause in PERSIST_PAUSES_S:
        try:
            return commit()
        except ConfigError:
            raise
        except Exception as e:
            log.warning("a commit failed and is tried again in %.0f s: %s: %s", pause, type(e).__name__, e)
            time.sleep(pause)
    return commit()


def commit(folder: Folder, task: Task, make: Callable[[], Made]) -> dict[str, Any]:
    """Make one shard and commit it, with the seconds that it took where `make` does not say them itself, unless it is
    there; returns its committed stats."""
    if (found := folder.adopt(task.index)) is not None:
        return found
    started = time.perf_counter()
    files, stats = make()
    stats.setdefault("seconds", round(time.perf_counter() - started, 3))
    return persist(lambda: folder.commit(task.index, files, stats, task.input))


class Stage(Protocol):
    """A stage over shards.

    One whose manifest holds what was worked out over the whole run may have two methods more: `is_current() -> bool`,
    whether that was done with the present settings, and `begin(redo: bool)`, called under the lease in the place of
    `begin` below; a stage that `plans` is given `each` too. One whose worker may be called from several threads may
    say how many shards it wants at a time (`max_in_flight`). Stats that hold `encode_seconds` and `wait_seconds` are
    summed up beside the progress bar.
    """

    @property
    def name(self) -> str:
        """For people, and for the status file."""
        ...

    @property
    def root(self) -> str:
        """The dataset's folder."""
        ...

    @property
    def unit(self) -> str:
        """What is counted: images, ..."""
        ...

    @property
    def data(self) -> str:
        """The suffix of each shard's large file, which decides a commit: `.tar`, `.safetensors`."""
        ...

    def made_with(self) -> Fingerprint:
        """What the bytes of every shard depend on: stage, version, settings, weights."""
        ...

    def tasks(self) -> Iterator[Task]:
        """The shard tasks, lazily, always in the same sequence."""
        ...

    def worker(self) -> Worker:
        """Built once in each process; called with a task it commits one shard and returns its stats. It adopts a shard
        that is there before it makes one."""
        ...

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Merge the stats of all shards (in the order of the tasks) and write the manifest; returns the manifest."""
        ...


def begin(stage: Stage, redo: bool = False, each: Callable[..., Iterable[Any]] = map) -> Folder:
    """Make a stage's folder ready, or set one aside that was made with something else; under the lease.

    each: like the built-in map, for a stage that has a plan to make (shards/plan.py: Each).
    """
    own = getattr(stage, "begin", None)
    if own is not None:
        own(redo, **({"each": each} if getattr(stage, "plans", False) else {}))
    folder = Folder.begin(stage.root, stage.made_with(), stage.data, redo=redo and own is None, take_over=True)
    folder.sweep()
    return folder


def open_folder(stage: Stage) -> Folder:
    """The folder of a stage, for a worker."""
    return Folder.begin(stage.root, stage.made_with(), stage.data)


def is_begun(stage: Stage) -> bool:
    """Whether the stage's folder was begun with just its settings."""
    stored = read_made_with(stage.root)
    return stored is not None and not stage.made_with().differs(made_with_of(stored))


def refuse_other_settings(stage: Stage) -> None:
    """Raise StageError where the stage's folder was made with something else: weights, say, that were exchanged."""
    stored = read_made_with(stage.root)
    changes = ["not begun"] if stored is None else stage.made_with().differs(made_with_of(stored))
    if changes:
        raise StageError(
            f"{stage.root}: was made with other settings or weights than there are now ({'; '.join(changes)}); put "
            "them back, or run with --redo"
        )


def committed(stage: Stage, tasks: Iterable[Task]) -> list[bool]:
    """Whether the shard of each task is committed, by the names in the stage's folder."""
    return listed(stage.root, stage.data).is_committed(t.index for t in tasks).tolist()
