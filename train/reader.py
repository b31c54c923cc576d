"""Windows of an order, read ahead: each is fetched whole, once an epoch, by threads that the loader does not wait for.

A window is a run of rows of one shard or of a few that follow each other: a few ranges of bytes, the same for files,
NFS and object stores. Of every stream the window lies in memory that its next rows come from, and the one behind it
once its turn is near.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from shards.dataset import Dataset
from shards.settings import StageError
from train.order import mix64
from train.placement import Placement

THREADS = 32  # windows under way at a time; they wait for disks and networks, not for a CPU
_TRIES = 1000  # other places that are looked at for a living sample where a whole window was taken down


@dataclasses.dataclass(eq=False)
class Window:
    """Rows that were read together. shard, row: int64 [n], where each lies; alive: bool [n]; columns: by name, anything
    that is indexed by row."""

    shard: np.ndarray
    row: np.ndarray
    alive: np.ndarray
    columns: dict[str, Any]

    def __post_init__(self) -> None:
        # The place of a sample that is taken down goes to a living one of the window, chosen by index.
        living = np.flatnonzero(self.alive)
        self.stands = np.arange(len(self.alive))
        if len(living) == 0:
            self.stands[:] = -1
        elif len(living) < len(self.alive):
            dead = np.flatnonzero(~self.alive)
            self.stands[dead] = living[mix64(dead.astype(np.uint64)) % np.uint64(len(living))]


# (number of the source in the placement, bucket, [(shard of the source, first row, end)]) -> the window
Load = Callable[[int, int, list[tuple[int, int, int]]], Window]


class Reader:
    """Samples by position. Safe to call from several threads."""

    def __init__(self, placement: Placement, load: Load) -> None:
        self.placement, self._load = placement, load
        self._windows: dict[tuple[int, int, int], dict[int, Future[Window]]] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read what the samples at these positions need; returns at once."""
        self._ask(positions)

    def take(self, positions: np.ndarray) -> list[tuple[Window, int]]:
        """The window of each sample, and its row in it; waits for what is not read yet."""
        found: list[Any] = [None] * len(positions)
        for i, (stream, number, o, elsewhere) in self._ask(positions).items():
            window = self._wait(stream, number)
            at = int(window.stands[o])
            found[i] = (window, at) if at >= 0 else self._elsewhere(*elsewhere)
        return found

    def close(self) -> None:
        """Let go of the threads and of what was read."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._windows.clear()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, positions: np.ndarray) -> dict[int, tuple[tuple[int, int, int], int, int, tuple[int, int, int]]]:
        """Of each sample its stream, the number of its window and its row there; all windows are under way then."""
        asked = {}
        for part in self.placement.locate(positions):
            order = self.placement.order(part)
            epoch, v, w, o = (x.tolist() for x in order.spot(part.indices))
            for i, index, e, s, n, row in zip(part.here.tolist(), part.indices.tolist(), epoch, v, w, o, strict=True):
                # Indices are given out stream by stream of the run; an epoch's own streams begin anew with each.
                stream, number = (part.source, part.bucket, index % order.streams), e * order.windows + n
                with self._lock:
                    windows = self._windows.setdefault(stream, {})
                    if number not in windows:
                        if self._pool is None:
                            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")
                        windows[number] = self._pool.submit(self._read, part.source, part.bucket, e, s, n)
                asked[i] = (stream, number, row, (part.source, part.bucket, index))
        return asked

    def _read(self, source: int, bucket: int, epoch: int, stream: int, window: int) -> Window:
        order = self.placement.orders[self.placement.sources[source].key, bucket]
        return self._load(source, bucket, order.runs(epoch, stream, window))

    def _wait(self, stream: tuple[int, int, int], number: int) -> Window:
        with self._lock:
            windows = self._windows.setdefault(stream, {})
            future = windows.get(number)
            for other in [n for n in windows if n < number]:  # a stream goes forward
                del windows[other]
        assert future is not None
        try:
            return future.result()
        except BaseException:
            with self._lock:
                windows.pop(number, None)  # whoever asks again tries again
            raise

    def _elsewhere(self, source: int, bucket: int, index: int) -> tuple[Window, int]:
        """A living sample in place of one whose whole window was taken down, chosen by index."""
        order = self.placement.orders[self.placement.sources[source].key, bucket]
        with np.errstate(over="ignore"):
            tries = mix64(np.uint64(index) + np.arange(1, _TRIES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        for other in (tries % np.uint64(order.size)).astype(np.int64):
            epoch, v, w, o = (int(x[0]) for x in order.spot(np.array([other])))
            window = self._load(source, bucket, order.runs(epoch, v, w))
            if window.stands[o] >= 0:
                return window, int(window.stands[o])
        raise StageError(
            "all samples of a bucket were taken down or are left out by train.select; nothing of it is left"
        )


K = TypeVar("K")


class Kept(Generic[K]):
    """What was made last for some arguments, at most `limit` of it; several threads that ask for one make it once."""

    def __init__(self, make: Callable[..., K], limit: int) -> None:
        self._make, self._limit = make, limit
        self._found: OrderedDict[tuple[Any, ...], tuple[threading.Lock, list[K]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> K:
        with self._lock:
            lock, value = self._found.setdefault(arguments, (threading.Lock(), []))
            self._found.move_to_end(arguments)
            while len(self._found) > self._limit:
                self._found.popitem(last=False)
        with lock:
            if not value:
                value.append(self._make(*arguments))
        return value[0]


@contextlib.contextmanager
def named(dataset: Dataset, position: int) -> Iterator[None]:
    """Context: what cannot be read is said of a shard of a dataset."""
    try:
        yield
    except (OSError, ValueError, KeyError) as e:
        raise StageError(
            f"{dataset.root}: shard {dataset.shards[position].name} cannot be read: {e}; run its stage again"
        ) from e
