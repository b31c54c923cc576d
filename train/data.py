"""Micro-batches in the order of a run, and a thread that makes them ahead of the loop."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from train.fit_config import FitConfig

if TYPE_CHECKING:
    from train.objective import Objective
    from train.ranks import Ranks


Batch = dict[str, torch.Tensor]
# Steps whose windows are asked for before their batches are made: at least, and at most where a quarter of what the
# streams hold lasts that long. A step of 50 ms then leaves a store more than a second to answer.
LEAST_PREFETCH, MOST_PREFETCH = 4, 32


def batch_slots(samples: int, rank: int, world: int, micro_step: int, accumulation: int) -> np.ndarray:
    """The places, int64, that one micro-batch of a rank takes of a global batch of `samples`.

    Those that are `rank` modulo `world`, so that a rank reads streams of its own, dealt out to the micro-steps; a batch
    is the same whatever the ranks and steps.
    """
    return np.arange(rank + world * micro_step, samples, world * accumulation, dtype=np.int64)


def micro_batches(objective: Objective, config: FitConfig, ranks: Ranks, images: int) -> Iterator[Batch]:
    """This rank's micro-batches from position `images` to the end, on the CPU; pinned where its device is a GPU.

    What they need is asked for some steps before they are made.
    """
    waiting: deque[np.ndarray] = deque()
    share = config.batch_size // ranks.world
    micro = min(config.micro_batch_size or share, share)
    accumulation = share // micro
    capacity = objective.placement.streams * objective.placement.window
    least = max(LEAST_PREFETCH, -(-objective.placement.streams // config.batch_size))
    steps = max(least, min(MOST_PREFETCH, capacity // (4 * config.batch_size)))

    def made(positions: np.ndarray) -> Batch:
        batch = shortened(objective.batch(positions), config)
        return {k: v.pin_memory() for k, v in batch.items()} if ranks.device.type == "cuda" else batch

    for begin in range(images, config.images, config.batch_size):
        for micro_step in range(accumulation):
            positions = objective.positions(begin, ranks.rank, ranks.world, micro_step, micro)
            objective.expect(positions)
            waiting.append(positions)
        while len(waiting) > steps * accumulation:
            yield made(waiting.popleft())
    while waiting:
        yield made(waiting.popleft())


def shortened(batch: Batch, config: FitConfig) -> Batch:
    """The text of a micro-batch cut to as many places as its longest caption has tokens, in steps of 8: those behind
    are masked, in the encoder and in the UNet. As it is for a CLIP, and where each length would be compiled anew."""
    if "text_length" not in batch or config.compile:
        return batch
    places = -(-int(batch["text_length"].max().clamp(min=1)) // 8) * 8
    return {k: v[:, :places].contiguous() if k in ("tokens", "text") else v for k, v in batch.items()}


T = TypeVar("T")


class Prefetcher(Generic[T]):
    """An iterator that a thread runs at most `depth` items ahead; `waited` is the seconds its consumer waited.

    device: the rank's; where it is a GPU, that of the thread too, which would begin with the first one.

    What lies in the queue has not been consumed: a resumed run asks for it again by position. An error of
    the thread is raised at its item. Use as a context, so that the thread ends with the loop.
    """

    def __init__(self, items: Iterator[T], depth: int, device: torch.device | None = None) -> None:
        self.waited, self._device = 0.0, device
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="data", daemon=True)

    def _work(self, items: Iterator[T]) -> None:
        try:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            for item in items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as e:
            self._put(("error", e))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __enter__(self) -> Prefetcher[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        kind, item = self._queue.get()
        self.waited += time.perf_counter() - started
        if kind == "error":
            raise item
        if kind == "end":
            raise StopIteration
        return item
