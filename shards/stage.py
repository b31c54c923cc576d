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

from shards.fingerprint import Fingerprint
from shards.settings import ConfigError

log = logging.getLogger("carrara.engine")


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to make: its number, what its bytes depend on, and what the worker needs to know."""

    index: int
    fingerprint: Fingerprint
    payload: Any = None


Worker = Callable[[Task], dict[str, Any]]
T = TypeVar("T")

PERSIST_PAUSES_S = (1.0, 4.0, 10.0)


def persist(commit: Callable[[], T]) -> T:
    """Call `commit`, and again after a while where it fails: what a store refuses for a moment was costly to make, and
    is in hand. Raises what the last try raised."""
    for pause in PERSIST_PAUSES_S:
        try:
            return commit()
        except ConfigError:
            raise
        except Exception as e:
            log.warning("a commit failed and is tried again in %.0f s: %s: %s", pause, type(e).__name__, e)
            time.sleep(pause)
    return commit()


class Stage(Protocol):
    """A stage over shards.

    One whose manifest holds what was worked out over the whole run may have two methods more: `is_current() -> bool`,
    whether that was done with the present settings, and `prepare()`, called once the folder is its own and before
    anything is judged. One whose worker may be called from several threads may say how many shards it wants at a
    time (`in_hand`). Stats that hold `encode_seconds` and `wait_seconds` are summed up beside the progress bar.
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

    def tasks(self) -> Iterator[Task]:
        """The shard tasks, lazily, always in the same sequence."""
        ...

    def worker(self) -> Worker:
        """Built once in each process; called with a task it commits one shard and returns its stats."""
        ...

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Merge the stats of all shards (in index order) and write the manifest; returns the manifest."""
        ...
