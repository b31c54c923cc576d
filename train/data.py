"""Shards into batches: random access by place in the order, and a thread that works ahead of the loop."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch

from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import ConfigError, StageError
from train.order import Mixture, Order

Batch = dict[str, torch.Tensor]
S = TypeVar("S", ImageShard, ColumnShard)

# Columns of a latent shard's sidecar that say how a picture was cut.
MICRO = ("original_height", "original_width", "crop_top", "crop_left")


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

    def keys(self, positions: np.ndarray) -> list[str]:
        """The keys of the samples at these places of the order."""
        shard, row = self.order.locate(positions)
        return [self._shards[int(s)].keys[int(r)] for s, r in zip(shard, row, strict=True)]

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
    """Posterior moments and text of the latent shards of one or several datasets, mixed by weight.

    Place p of the run is drawn from one of the datasets (order.Mixture), and each has an order of its own. Raises
    ConfigError where datasets were made with different encoders or shapes, which no model could tell apart.
    """

    def __init__(
        self, datasets: Sequence[Dataset], seed: int, window: int, weights: Sequence[float] = (1.0,), unit: int = 1
    ) -> None:
        self.orders = [Order(d.counts, d.fingerprint, seed, window) for d in datasets]
        self.mixture = Mixture(weights, unit, seed, *(d.fingerprint for d in datasets))
        self.dataset = datasets[0]
        self._shards = [OpenShards(d, ColumnShard, 2 * window) for d in datasets]
        first = [s[int(np.flatnonzero(d.counts)[0])].arrays for s, d in zip(self._shards, datasets, strict=True)]
        for dataset, arrays in zip(datasets[1:], first[1:], strict=True):
            _refuse_other_kind(self.dataset, first[0], dataset, arrays)
        self.shape: tuple[int, ...] = tuple(first[0]["mean"].shape[1:])
        self.has_embeddings = "embeddings" in first[0]
        self.has_spread = all("logstd" in arrays for arrays in first)
        self.empty_tokens = first[0]["empty_tokens"].astype(np.int64)
        self.empty_embedding = first[0]["empty_embedding"].astype(np.float32) if self.has_embeddings else None

    def source(self, positions: np.ndarray) -> np.ndarray:
        """Which of the datasets each sample comes from, int64 [B]."""
        return self.mixture.split(positions)[0]

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

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2), float32 [B,6].

        Original height and width, top and left of the crop in the scaled picture, and the height and width that
        were aimed at; in pixels. Raises StageError where a sidecar lacks them.
        """
        out = np.empty((len(positions), 6), np.float32)
        for shard, here, rows in self._groups(positions):
            out[here] = self._micro(shard)[rows]
        return out

    def keys(self, positions: np.ndarray) -> list[str]:
        """The samples' keys."""
        out = [""] * len(positions)
        for shard, here, rows in self._groups(positions):
            for i, row in zip(here, rows, strict=True):
                out[i] = shard.keys[row]
        return out

    def _micro(self, shard: ColumnShard) -> np.ndarray:
        cached: np.ndarray | None = getattr(shard, "micro", None)
        if cached is None:
            table, resolution = shard.table, float(self.dataset.manifest["resolution"])
            missing = [n for n in MICRO if n not in table.column_names]
            if missing:
                raise StageError(
                    f"{self.dataset.root}: shard {shard.info.name} has no column {missing[0]}, which a UNet with "
                    "addition_embed_type text_time is told; make the latents again from image shards that have it"
                )
            kept = table.filter(pc.equal(table["status"], "success"))
            cached = np.stack([kept[n].to_numpy().astype(np.float32) for n in MICRO], axis=1)
            cached = np.concatenate([cached, np.full((len(cached), 2), resolution, np.float32)], axis=1)
            shard.micro = cached  # type: ignore[attr-defined]
        return cached

    def _groups(self, positions: np.ndarray) -> Iterator[tuple[ColumnShard, np.ndarray, np.ndarray]]:
        source, place = self.mixture.split(positions)
        for i in np.unique(source):
            mine = np.flatnonzero(source == i)
            shard, row = self.orders[i].locate(place[mine])
            for s in np.unique(shard):
                here = np.flatnonzero(shard == s)
                yield self._shards[i][int(s)], mine[here], row[here]


def _refuse_other_kind(one: Dataset, first: dict[str, Any], other: Dataset, arrays: dict[str, Any]) -> None:
    for what, name in (("vae", "VAE"), ("text", "CLIP")):
        if one.manifest[what]["digest"] != other.manifest[what]["digest"]:
            raise ConfigError(
                f"train.sources: {other.root} was made with another {name} than {one.root}; "
                "make the latents of all sources with the same encoders"
            )
    if first["mean"].shape[1:] != arrays["mean"].shape[1:] or ("embeddings" in first) != ("embeddings" in arrays):
        raise ConfigError(
            f"train.sources: the latents of {other.root} have another shape, or other text, than those of {one.root}; "
            "make them with the same settings"
        )


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
