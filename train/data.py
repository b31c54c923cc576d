"""Shards into batches: random access by place in the order, and a thread that works ahead of the loop."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import StageError
from train.order import Order

Batch = dict[str, torch.Tensor]
S = TypeVar("S", ImageShard, ColumnShard)


class OpenShards(Generic[S]):
    """The shards last used, kept open: as many as two windows of the order, so that each is opened once."""

    def __init__(self, dataset: Dataset, kind: Callable[[Dataset, int], S], limit: int) -> None:
        self._kind: Callable[[Dataset, int], S] = kind
        self.dataset, self._limit = dataset, limit
        self._open: OrderedDict[int, S] = OrderedDict()

    def __getitem__(self, position: int) -> S:
        shard = self._open.get(position)
        if shard is None:
            try:
                shard = self._kind(self.dataset, position)
            except (OSError, ValueError, KeyError) as e:
                name = self.dataset.shards[position].name
                raise StageError(f"{self.dataset.root}: shard {name} cannot be read: {e}; run its stage again") from e
            self._open[position] = shard
            if len(self._open) > self._limit:
                _, oldest = self._open.popitem(last=False)
                if isinstance(oldest, ImageShard):
                    oldest.close()
        self._open.move_to_end(position)
        return shard


class Pictures:
    """Pictures and captions of image shards.

    fit: uint8 [H,W,3] -> uint8 [R,R,3]. cache_bytes: fitted pictures are kept in memory up to this size;
    there is no eviction, since an order in which each sample comes once an epoch gains nothing from it.
    """

    def __init__(
        self, dataset: Dataset, order: Order, fit: Callable[[np.ndarray], np.ndarray], cache_bytes: int
    ) -> None:
        self.order, self._fit, self._room = order, fit, cache_bytes
        self._shards = OpenShards(dataset, ImageShard, 2 * order.window)
        self._captions: OrderedDict[int, list[str]] = OrderedDict()
        self._cache: dict[tuple[int, int], np.ndarray] = {}

    def pixels(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [B,R,R,3] of the samples at these places of the order."""
        shard, row = self.order.locate(positions)
        return np.stack([self._one(int(s), int(r)) for s, r in zip(shard, row, strict=True)])

    def captions(self, positions: np.ndarray) -> list[str]:
        """The captions of the samples at these places of the order."""
        shard, row = self.order.locate(positions)
        return [self._shard_captions(int(s))[int(r)] for s, r in zip(shard, row, strict=True)]

    def _one(self, shard: int, row: int) -> np.ndarray:
        picture = self._cache.get((shard, row))
        if picture is None:
            source = self._shards[shard]
            try:
                picture = np.ascontiguousarray(self._fit(decode_rgb(source.image_bytes(row))))
            except (OSError, ValueError) as e:
                raise StageError(f"{source.url}: sample {source.keys[row]} cannot be read: {e}") from e
            if picture.nbytes <= self._room:
                self._room -= picture.nbytes
                self._cache[shard, row] = picture
        return picture

    def _shard_captions(self, shard: int) -> list[str]:
        captions = self._captions.get(shard)
        if captions is None:
            captions = self._captions[shard] = self._shards[shard].captions
            if len(self._captions) > 2 * self.order.window:
                self._captions.popitem(last=False)
        return captions


class Latents:
    """Posterior moments and text of latent shards."""

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self.dataset, self.order = dataset, order
        self._shards = OpenShards(dataset, ColumnShard, 2 * order.window)
        first = self._shards[int(np.flatnonzero(dataset.counts)[0])].arrays
        self.shape: tuple[int, ...] = tuple(first["mean"].shape[1:])
        self.has_embeddings = "embeddings" in first
        self.has_spread = "logstd" in first
        self.empty_tokens = first["empty_tokens"].astype(np.int64)
        self.empty_embedding = first["empty_embedding"].astype(np.float32) if self.has_embeddings else None

    def moments(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log-std, float32 [B,C,h,w], unscaled; the latter is None where only means are stored."""
        mean = np.empty((len(positions), *self.shape), np.float32)
        logstd = np.empty_like(mean) if self.has_spread else None
        for shard, here, rows in self._groups(positions):
            mean[here] = shard.arrays["mean"][rows]
            if logstd is not None:
                minimum, step = float(shard.metadata["logstd_min"]), float(shard.metadata["logstd_step"])
                table = (minimum + step * np.arange(256)).astype(np.float32)
                logstd[here] = table[shard.arrays["logstd"][rows]]
        return mean, logstd

    def tokens(self, positions: np.ndarray) -> np.ndarray:
        """Token ids, int64 [B,context]."""
        out = np.empty((len(positions), *self.empty_tokens.shape), np.int64)
        for shard, here, rows in self._groups(positions):
            out[here] = shard.arrays["tokens"][rows]
        return out

    def embeddings(self, positions: np.ndarray) -> np.ndarray:
        """Token embeddings, float32 [B,context,width]."""
        assert self.empty_embedding is not None
        out = np.empty((len(positions), *self.empty_embedding.shape), np.float32)
        for shard, here, rows in self._groups(positions):
            out[here] = shard.arrays["embeddings"][shard.arrays["embedding_index"][rows]]
        return out

    def _groups(self, positions: np.ndarray) -> Iterator[tuple[ColumnShard, np.ndarray, np.ndarray]]:
        shard, row = self.order.locate(positions)
        for s in np.unique(shard):
            here = np.flatnonzero(shard == s)
            yield self._shards[int(s)], here, row[here]


T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator that a thread runs at most `depth` items ahead; `waited` is the seconds its consumer waited.

    What lies in the queue has not been consumed: a resumed run asks for it again by position. An error of
    the thread is raised at its item. Use as a context, so that the thread ends with the loop.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.waited = 0.0
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="data", daemon=True)

    def _work(self, items: Iterator[T]) -> None:
        try:
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

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Ahead[T]:
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
