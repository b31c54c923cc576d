"""Shards into batches: random access by place in the order, and a thread that works ahead of the loop."""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from latents.encoders import other_encoder
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import ConfigError, StageError
from train.order import Mixture, Order

Batch = dict[str, torch.Tensor]
S = TypeVar("S", ImageShard, "LatentShard")


class OpenShards(Generic[S]):
    """The shards last used, kept open: as many as two windows of the order, so that each is opened once."""

    def __init__(self, dataset: Dataset, kind: Callable[[Dataset, int], S], limit: int) -> None:
        self._kind: Callable[[Dataset, int], S] = kind
        self.dataset, self._limit = dataset, limit
        self._open: OrderedDict[int, S] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, position: int) -> S:
        with self._lock:  # the loop asks for keys while the loader's thread reads
            shard = self._open.get(position)
            if shard is None:
                try:
                    shard = self._kind(self.dataset, position)
                except (OSError, ValueError, KeyError) as e:
                    name = self.dataset.shards[position].name
                    raise StageError(
                        f"{self.dataset.root}: shard {name} cannot be read: {e}; run its stage again"
                    ) from e
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

    A dataset with buckets gives batches of one shape: the global batches are shared out to the buckets so that each
    sample comes equally often, and all ranks have the same shape at a step. Within a bucket the datasets come by
    weight, and each (dataset, bucket) has an order of its own. resolutions: which of several the samples are taken at,
    in pixels, the main one first; none given is the datasets' main one.

    Each batch has `batch_size` places in the order of samples. With `by_area` the smallest pictures fill them, and
    larger ones take the first few alone, in inverse proportion to their area and in multiples of `by_area`, so that
    every step is about as much work.

    Raises ConfigError where datasets were made with different encoders or shapes, which no model could tell apart.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        seed: int,
        window: int,
        batch_size: int,
        weights: Sequence[float] = (1.0,),
        resolutions: Sequence[int] = (),
        by_area: int | None = None,
    ) -> None:
        self.dataset, self.batch_size = datasets[0], batch_size
        resolutions = resolutions or (int(self.dataset.manifest["resolution"]),)
        self.resolution = resolutions[0]
        self._shards = [OpenShards(d, LatentShard, 2 * window) for d in datasets]
        self._first = [s[int(np.flatnonzero(d.counts)[0])] for s, d in zip(self._shards, datasets, strict=True)]
        first = [shard.arrays for shard in self._first]
        for dataset, arrays in zip(datasets[1:], first[1:], strict=True):
            _refuse_other_kind(self.dataset, first[0], dataset, arrays)
        self.buckets, counts = _buckets(datasets, resolutions)
        self._sizes = _batch_sizes(self.dataset, self.buckets, batch_size, by_area)
        self.has_embeddings = "embeddings" in first[0]
        self.has_pooled = "pooled" in first[0]
        self.has_spread = all(any(n.partition(".")[0] == "logstd" for n in arrays) for arrays in first)
        self.empty_tokens = first[0]["empty_tokens"].astype(np.int64)
        self.empty_embedding = first[0]["empty_embedding"].astype(np.float32) if self.has_embeddings else None
        self.empty_pooled = first[0]["empty_pooled"].astype(np.float32) if self.has_pooled else None

        # For each bucket: its datasets, their orders and how they mix.
        self._parts: list[tuple[list[int], list[Order], Mixture]] = []
        share = []
        for b, bucket in enumerate(self.buckets):
            held = [i for i, c in enumerate(counts) if c[b].sum()]
            orders = [Order(counts[i][b], _name(datasets[i].fingerprint, bucket), seed, window) for i in held]
            portions = [weights[i] * counts[i][b].sum() / datasets[i].counts.sum() for i in held]
            names = [o.fingerprint for o in orders]
            self._parts.append((held, orders, Mixture(portions, self._sizes[b], seed, *names)))
            share.append(sum(portions) * (batch_size / self._sizes[b]))
        self._mixture = Mixture(share, 1, seed, "buckets", *(d.fingerprint for d in datasets))
        self.order = self._parts[0][1][0]
        self.side = self._side()
        self.channels = next(int(a.shape[1]) for n, a in first[0].items() if n.partition(".")[0] == "mean")

    def _side(self) -> int:
        """Side of a square latent of `resolution` pixels."""
        height = int(self.shape(np.zeros(1, np.int64))[1])
        if self.buckets[0] is None:
            return height
        bucket = int(self._mixture.split(np.zeros(1, np.int64))[0][0])
        number = self.buckets[bucket]
        assert number is not None
        return self.resolution * height // int(self.dataset.manifest["buckets"][number]["height"])

    def samples_in(self, batch: int) -> int:
        """How many samples the global batch of this number has."""
        bucket, _ = self._mixture.split(np.array([batch]))
        return self._sizes[int(bucket[0])]

    def source(self, positions: np.ndarray) -> np.ndarray:
        """Which of the datasets each sample comes from, int64 [B]."""
        out = np.empty(len(positions), np.int64)
        for _, source, here, _, _ in self._groups(positions):
            out[here] = source
        return out

    def shape(self, positions: np.ndarray) -> tuple[int, int, int]:
        """[C,h,w] of the batch that these samples belong to."""
        for shard, _, _, _, bucket in self._groups(positions[:1]):
            return shard.arrays[_column("mean", bucket)].shape[1:]  # type: ignore[return-value]
        raise ValueError("a batch without samples has no shape")

    def moments(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log-std, float32 [B,C,h,w], unscaled; the latter is None where only means are stored."""
        mean = np.empty((len(positions), *self.shape(positions)), np.float32)
        logstd = np.empty_like(mean) if self.has_spread else None
        for shard, _, here, rows, bucket in self._groups(positions):
            mean[here] = shard.arrays[_column("mean", bucket)][rows]
            if logstd is not None:
                minimum, step = float(shard.metadata["logstd_min"]), float(shard.metadata["logstd_step"])
                table = (minimum + step * np.arange(256)).astype(np.float32)
                logstd[here] = table[shard.arrays[_column("logstd", bucket)][rows]]
        return mean, logstd

    def tokens(self, positions: np.ndarray) -> np.ndarray:
        """Token ids, int64 [B,context]."""
        out = np.empty((len(positions), *self.empty_tokens.shape), np.int64)
        for shard, _, here, rows, bucket in self._groups(positions):
            out[here] = shard.arrays["tokens"][shard.samples(bucket, rows)]
        return out

    def embeddings(self, positions: np.ndarray) -> np.ndarray:
        """Token embeddings, float32 [B,context,width]."""
        assert self.empty_embedding is not None
        return self._by_caption("embeddings", self.empty_embedding.shape, positions)

    def pooled(self, positions: np.ndarray) -> np.ndarray:
        """The captions' pooled embeddings, float32 [B,width]."""
        assert self.empty_pooled is not None
        return self._by_caption("pooled", self.empty_pooled.shape, positions)

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2), float32 [B,6].

        Original height and width, top and left of the crop in the scaled picture, and the height and width that
        were aimed at; in pixels. Raises StageError where the latents lack it.
        """
        out = np.empty((len(positions), 6), np.float32)
        for shard, _, here, rows, bucket in self._groups(positions):
            if "micro" not in shard.arrays:
                raise StageError(
                    f"{self.dataset.root}: shard {shard.info.name} has no column 'micro', which a UNet with "
                    "addition_embed_type text_time is told; make the latents again"
                )
            level = 0 if bucket is None else _level(self.dataset, bucket)
            out[here] = shard.arrays["micro"][shard.samples(bucket, rows), level]
        return out

    def require_captions(self, columns: Sequence[str]) -> None:
        """Raises StageError where the first shard of a dataset has no texts in one of these columns of its sidecar."""
        for shard in self._first:
            for column in columns:
                shard.texts(column)

    def captions(self, positions: np.ndarray, columns: Sequence[str]) -> list[list[list[str]]]:
        """Of each sample, the captions in each of these columns of the sidecar, whose entries are texts or lists of
        texts; empty ones are left out. Raises StageError where a column is not there."""
        out: list[list[list[str]]] = [[] for _ in positions]
        for shard, _, here, rows, bucket in self._groups(positions):
            texts = [shard.texts(column) for column in columns]
            for i, row in zip(here, shard.samples(bucket, rows), strict=True):
                out[i] = [column[row] for column in texts]
        return out

    def keys(self, positions: np.ndarray) -> list[str]:
        """The samples' keys."""
        out = [""] * len(positions)
        for shard, _, here, rows, bucket in self._groups(positions):
            for i, row in zip(here, shard.samples(bucket, rows), strict=True):
                out[i] = shard.keys[row]
        return out

    def _by_caption(self, column: str, shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), *shape), np.float32)
        for shard, _, here, rows, bucket in self._groups(positions):
            out[here] = shard.arrays[column][shard.arrays["embedding_index"][shard.samples(bucket, rows)]]
        return out

    def _groups(self, positions: np.ndarray) -> Iterator[tuple[LatentShard, int, np.ndarray, np.ndarray, int | None]]:
        """Of each shard: itself, its dataset, which positions lie in it, their rows within the bucket, the bucket."""
        batch, within = np.divmod(np.asarray(positions, np.int64), self.batch_size)
        bucket, ordinal = self._mixture.split(batch)
        for b in np.unique(bucket):
            of_bucket = np.flatnonzero(bucket == b)
            held, orders, mixture = self._parts[b]
            source, place = mixture.split(ordinal[of_bucket] * self._sizes[b] + within[of_bucket])
            for i in np.unique(source):
                mine = np.flatnonzero(source == i)
                shard, row = orders[i].locate(place[mine])
                for s in np.unique(shard):
                    here = np.flatnonzero(shard == s)
                    opened = self._shards[held[i]][int(s)]
                    yield opened, held[i], of_bucket[mine[here]], row[here], self.buckets[b]


class LatentShard(ColumnShard):
    """A latent shard whose samples may lie in several buckets."""

    def samples(self, bucket: int | None, rows: np.ndarray) -> np.ndarray:
        """The samples, int64, that the rows of a bucket's arrays belong to."""
        if bucket is None:
            return rows
        members: np.ndarray = np.flatnonzero((self.arrays["bucket"] == bucket).any(axis=1))
        return members[rows]

    @functools.cached_property
    def keys(self) -> list[str]:
        """Keys of the samples, in their order."""
        return super().keys

    def texts(self, column: str) -> list[list[str]]:
        """Of each sample, the texts in a column of the sidecar: one, several, or none. Raises StageError."""
        if column not in self._texts:
            if column not in self.table.column_names:
                raise StageError(
                    f"{self._dataset.root}: shard {self.info.name} has no column '{column}' in its .parquet; carry it "
                    "there with ingest.keep_columns, or leave it out of train.captions"
                )
            found = []
            for value, status in zip(self.table[column].to_pylist(), self.table["status"].to_pylist(), strict=True):
                if status == "success":
                    found.append(_as_list(value))
            if not all(isinstance(t, str | None) for texts in found for t in texts):
                raise StageError(
                    f"{self._dataset.root}: column '{column}' of shard {self.info.name} holds no text, nor lists of "
                    "text; leave it out of train.captions"
                )
            self._texts[column] = [[t for t in texts if t and t.strip()] for texts in found]
        return self._texts[column]

    @functools.cached_property
    def _texts(self) -> dict[str, list[list[str]]]:
        return {}


def _as_list(value: Any) -> list[Any]:
    """The entry of a column of captions: a list, also one that ingest carried as JSON, or one text."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            if all(isinstance(v, str | None) for v in parsed):  # "[2]" may be a caption
                return list(parsed)
    return value if isinstance(value, list) else [value]


def _buckets(
    datasets: Sequence[Dataset], resolutions: Sequence[int]
) -> tuple[list[int | None], list[list[np.ndarray]]]:
    """The buckets of these resolutions that hold samples, and for each dataset and bucket its samples a shard."""
    facts = datasets[0].manifest
    shapes = facts["buckets"] if "bucket_counts" in facts else [{"resolution": facts["resolution"]}]
    there = sorted({shape["resolution"] for shape in shapes})
    for resolution in resolutions:
        if resolution not in there:
            raise ConfigError(
                f"train.resolution is {resolution}, but {datasets[0].root} holds latents of "
                f"{' and '.join(map(str, there))} pixels"
            )
    if "bucket_counts" not in facts:
        return [None], [[d.counts] for d in datasets]
    wanted = [b for b, shape in enumerate(shapes) if shape["resolution"] in resolutions]
    tables = [np.asarray(d.manifest["bucket_counts"], np.int64).reshape(len(d.shards), -1) for d in datasets]
    used: list[int | None] = [b for b in wanted if any(t[:, b].sum() for t in tables)]
    return used, [[t[:, b] for b in used] for t in tables]


def _batch_sizes(dataset: Dataset, buckets: Sequence[int | None], batch_size: int, by_area: int | None) -> list[int]:
    """Samples of a global batch of each bucket; raises ConfigError where its pictures leave room for none."""
    if by_area is None or buckets[0] is None:
        return [batch_size] * len(buckets)
    shapes = [dataset.manifest["buckets"][b] for b in buckets]
    areas = [int(shape["width"]) * int(shape["height"]) for shape in shapes]
    sizes = [batch_size * min(areas) // area // by_area * by_area for area in areas]
    if 0 in sizes:
        largest = shapes[int(np.argmax(areas))]
        raise ConfigError(
            f"train.batch_by_area is {by_area}, but a batch_size of {batch_size} leaves fewer pictures of "
            f"{largest['width']} x {largest['height']} pixels than that; raise batch_size, or lower it"
        )
    return sizes


def _level(dataset: Dataset, bucket: int) -> int:
    """The place of a bucket's resolution among the dataset's, which is that of its row in `micro`."""
    resolutions = list(dict.fromkeys(b["resolution"] for b in dataset.manifest["buckets"]))
    return resolutions.index(dataset.manifest["buckets"][bucket]["resolution"])


def _column(name: str, bucket: int | None) -> str:
    return name if bucket is None else f"{name}.{bucket}"


def _name(fingerprint: str, bucket: int | None) -> str:
    return fingerprint if bucket is None else f"{fingerprint}:{bucket}"


def _refuse_other_kind(one: Dataset, first: dict[str, Any], other: Dataset, arrays: dict[str, Any]) -> None:
    if different := other_encoder(one.manifest, other.manifest):
        raise ConfigError(
            f"train.sources: {other.root} was made with another {different} than {one.root}; "
            "make the latents of all sources with the same encoders"
        )
    same = one.manifest["resolution"] == other.manifest["resolution"]
    same &= one.manifest.get("buckets") == other.manifest.get("buckets") and first.keys() == arrays.keys()
    if not same:
        raise ConfigError(
            f"train.sources: the latents of {other.root} have other shapes, or other text, than those of {one.root}; "
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
