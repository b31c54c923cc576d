"""Shards into batches: samples by their position in the run, and a thread that works ahead of the loop."""

from __future__ import annotations

import functools
import itertools
import json
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch

from latents.columns import FEATURES, FLIPPED
from latents.encoders import other_encoder
from latents.resize import crop_place
from latents.source import texts_in
from shards import storage
from shards.columns import COLUMN_ROW, ENDS, ColumnFile, Columns, column, column_rows, members, packed_rows
from shards.dataset import Dataset
from shards.images import LOCATION, ImageShard, decode_rgb, is_image
from shards.selection import Selection
from shards.settings import ConfigError, StageError
from train import segments
from train.config import TrainConfig
from train.fit_config import FitConfig
from train.placement import Placement
from train.reader import Reader, Window
from train.segments import History

if TYPE_CHECKING:
    from train.image_conditioning import ByKey
    from train.objective import Objective
    from train.ranks import Ranks

Batch = dict[str, torch.Tensor]

TOKENS = ("tokens", "tokens_2", "text_length")  # columns of what a caption's encoders read of it (latents/text.py)

DECODERS = 4  # threads that decode images for one rank
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


class ImageSamples:
    """Images and captions of image shards, by position.

    fit: uint8 [H,W,3] -> uint8 [R,R,3], where `pixels` is given no other. cache_bytes: fitted images are kept in
    memory up to this size; there is no eviction, since an order in which each sample comes once an epoch gains nothing
    from it.
    more: a column of the sidecar that is read too, for `texts`.
    """

    def __init__(
        self,
        dataset: Dataset,
        placement: Placement,
        fit: Callable[[np.ndarray], np.ndarray],
        cache_bytes: int,
        more: str | None = None,
    ) -> None:
        self.dataset, self.placement, self._fit, self._room = dataset, placement, fit, cache_bytes
        self._texts = ("caption", "key") if more is None else ("caption", "key", more)
        self._reader = Reader(placement, self._load)
        self._cache: dict[tuple[Callable[[np.ndarray], np.ndarray], int, int], np.ndarray] = {}
        self._decoders: ThreadPoolExecutor | None = None
        # By shard what a window is cut from: small columns of the sidecar.
        self._shard = Kept(self._open, placement.streams + 16)

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read what `pixels` and `captions` of these places will ask for."""
        self._reader.expect(positions)

    def close(self) -> None:
        """Let go of threads and memory."""
        self._reader.close()
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)
            self._decoders = None

    def pixels(self, positions: np.ndarray, fit: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """uint8 [B,R,R,3] of the samples at these places, by this `fit` or the usual one."""
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), thread_name_prefix="decode")
        one = functools.partial(self._one, fit or self._fit)
        return np.stack(list(self._decoders.map(one, self._reader.take(positions))))

    def captions(self, positions: np.ndarray) -> list[str]:
        """The captions of the samples at these places."""
        return [window.columns["caption"][at] for window, at in self._reader.take(positions)]

    def texts(self, column: str, positions: np.ndarray) -> list[list[str]]:
        """Of each sample the texts in a column: one, several, or none. Raises TypeError where it holds no text."""
        return [texts_in(window.columns[column][at]) for window, at in self._reader.take(positions)]

    def keys(self, positions: np.ndarray) -> list[str]:
        """The keys of the samples at these places."""
        return [window.columns["key"][at] for window, at in self._reader.take(positions)]

    def _one(self, fit: Callable[[np.ndarray], np.ndarray], found: tuple[Window, int]) -> np.ndarray:
        window, at = found
        sample = (fit, int(window.shard[at]), int(window.row[at]))
        image = self._cache.get(sample)
        if image is None:
            try:
                image = np.ascontiguousarray(fit(decode_rgb(window.columns["image"][at])))
            except (OSError, ValueError) as e:
                shard = self.dataset.shards[sample[1]]
                raise StageError(
                    f"{self.dataset.root}: sample {window.columns['key'][at]} of shard {shard.name} cannot be read: {e}"
                ) from e
            if image.nbytes <= self._room:
                self._room -= image.nbytes
                self._cache[sample] = image
        return image

    def _open(self, position: int) -> ImageShard:
        return ImageShard(self.dataset, position, ("status", *self._texts, *LOCATION))

    def _load(self, source: int, bucket: int, runs: list[tuple[int, int, int]]) -> Window:
        columns: dict[str, list[Any]] = {"image": [], **{name: [] for name in self._texts}}
        shards: list[int] = []
        rows: list[int] = []
        alive: list[bool] = []
        for position, first, end in runs:
            with _named(self.dataset, position):
                shard = self._shard(position)
                # Where samples were taken out since the run began, others of the shard come in their place.
                wanted = np.arange(first, end) % max(1, len(shard))
                there = len(shard) > 0
                images = shard.encoded_images(wanted) if there else [b""] * len(wanted)
                columns["image"] += images
                for name in self._texts:
                    columns[name] += [v or "" for v in shard.values(name, wanted)] if there else [""] * len(wanted)
            shards += [position] * len(wanted)
            rows += wanted.tolist()
            alive += map(is_image, images)  # one may have been taken down since the sidecar was read
        return Window(np.array(shards), np.array(rows), np.array(alive), dict(columns))


class Latents:
    """Posterior moments and text of the latent shards of one or several datasets, by position in the run.

    history: what the run takes its samples from (segments.py), the last of its segments from these datasets. A batch is
    of one bucket, and so of one shape, on all ranks. beside: of each dataset the images that `pictures` gives; a
    sample without one counts as taken down.

    Raises ConfigError where datasets were made with different encoders or shapes, which no model could tell apart.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[Dataset],
        seed: int,
        history: History | None = None,
        beside: Sequence[ByKey] = (),
    ) -> None:
        history = history or segments.begin(config, datasets)
        self.datasets, self.dataset, self._beside = list(datasets), datasets[0], list(beside)
        self.placement = history.placement(segments.tables(history, config, datasets), seed)
        self.resolution = (config.resolutions or (int(self.dataset.manifest["resolution"]),))[0]
        select = history.segments[-1].select
        self._select = [
            Selection(segments.run_of(d), rules, recorded) if (rules := segments.rules_of(config, n)) else None
            for n, (d, recorded) in enumerate(zip(datasets, select or [()] * len(datasets), strict=True))
        ]
        self._file = Kept(
            lambda which, position: _LatentFile(self.datasets[which], position, self._select[which]),
            2 * history.streams * len(datasets),
        )
        first = [_LatentFile(d, int(np.flatnonzero(d.counts)[0])) for d in datasets]
        for dataset, file in zip(datasets[1:], first[1:], strict=True):
            _refuse_other_kind(self.dataset, first[0], dataset, file)
        self._first = first
        # By number of a source in the placement: which dataset, and the first of its shards.
        by_name = {r.key: r for r in history.segments[-1].ranges}
        names = segments.names(config)
        self._shard_of = {
            n: (names.index(by_name[x.key].source), by_name[x.key].first)
            for n, x in enumerate(self.placement.sources)
            if x.key in by_name
        }
        arrays = first[0]
        self.has_embeddings, self.has_pooled = "embeddings" in arrays.kinds, "pooled" in arrays.kinds
        self.has_spread = all("logstd" in file.kinds for file in first)
        self.token_names = tuple(n for n in TOKENS if n in arrays.kinds)
        self.empty = {n: arrays.whole(f"empty_{n}").astype(np.int64) for n in self.token_names}
        self.empty_embedding = arrays.whole("empty_embedding").astype(np.float32) if self.has_embeddings else None
        self.empty_pooled = arrays.whole("empty_pooled").astype(np.float32) if self.has_pooled else None
        self.wants = {"mean", *(("logstd",) if self.has_spread else ())}
        self.wants |= {"embeddings"} if self.has_embeddings else set(self.token_names)
        self.context_length = int(arrays.columns["empty_tokens"][1][0])
        self.wants |= {"image"} if beside else set()
        self._reader = Reader(self.placement, self._load)
        self._taken: tuple[bytes, list[tuple[Window, int]]] = (b"", [])
        self.channels, height, _ = arrays.shape_of_mean()
        self.side = self._side(height)

    def _side(self, height: int) -> int:
        """Side of a square latent of `resolution` pixels, by the height of some bucket's."""
        if len(self.dataset.manifest.get("buckets") or ()) < 2:
            return height
        bucket = self.dataset.manifest["buckets"][self._first[0].some_bucket()]
        return self.resolution * height // int(bucket["height"])

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read what these samples need."""
        self._reader.expect(positions)

    def close(self) -> None:
        """Let go of threads and memory."""
        self._reader.close()

    def samples_in(self, position: int) -> int:
        """How many samples the global batch that a position belongs to has."""
        return self.placement.samples(position)

    def source(self, positions: np.ndarray) -> np.ndarray:
        """Which of the datasets each sample comes from, int64 [B]."""
        out = np.empty(len(positions), np.int64)
        for part in self.placement.locate(positions):
            out[part.here] = self._shard_of[part.source][0]
        return out

    def shape(self, positions: np.ndarray) -> tuple[int, int, int]:
        """[C,h,w] of the batch that these samples belong to."""
        window, _ = self._rows(positions[:1])[0]
        c, h, w = window.columns["mean"].shape[1:]
        return c, h, w

    def moments(self, positions: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log-std, float32 [B,C,h,w], unscaled; the latter is None where only means are stored.

        flipped: bool [B], of which samples those of the mirrored image are given; None: of none.
        """
        mean = self._one_of("mean", positions, np.float32, flipped)
        if not self.has_spread:
            return mean, None
        codes = self._one_of("logstd", positions, np.uint8, flipped)
        minimum, step = (float(self._first[0].metadata[n]) for n in ("logstd_min", "logstd_step"))
        return mean, (minimum + step * np.arange(256)).astype(np.float32)[codes]

    def features(self, positions: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """A vision tower's features, float32 [B,g,g,D]; flipped: as for `moments`."""
        return self._one_of(FEATURES, positions, np.float32, flipped)

    def _one_of(self, name: str, positions: np.ndarray, dtype: Any, flipped: np.ndarray | None) -> np.ndarray:
        found = self._gather(name, positions, dtype)
        if flipped is not None and flipped.any():
            found[flipped] = self._gather(name + FLIPPED, positions, dtype)[flipped]
        return found

    @property
    def empty_tokens(self) -> np.ndarray:
        """The ids of the empty caption, int64 [context]."""
        return self.empty["tokens"]

    def tokens(self, positions: np.ndarray, name: str = "tokens") -> np.ndarray:
        """Token ids, int64 [B,context]; name: of `token_names`."""
        return self._gather(name, positions, np.int64)

    def embeddings(self, positions: np.ndarray) -> np.ndarray:
        """Token embeddings, float32 [B,context,width]; zeros behind those of a caption that has fewer."""
        if "text_length" not in self.token_names:
            return self._gather("embeddings", positions, np.float32)
        rows = self._rows(positions)
        found = [self._column(window, "embeddings")[at] for window, at in rows]
        out = np.zeros((len(rows), self.context_length, found[0].shape[-1]), np.float32)
        for row, values in zip(out, found, strict=True):
            row[: len(values)] = values
        return out

    def pooled(self, positions: np.ndarray) -> np.ndarray:
        """The captions' pooled embeddings, float32 [B,width]."""
        return self._gather("pooled", positions, np.float32)

    def sizes(self, positions: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2), float32 [B,6].

        Original height and width, top and left of the crop in the scaled image, and the height and width that
        were aimed at; in pixels. flipped: as for `moments`. Raises StageError where the latents lack it.
        """
        return self._one_of("micro", positions, np.float32, flipped)

    def require_captions(self, columns: Sequence[str]) -> None:
        """Raises StageError where the first shard of a dataset has no texts in one of these columns of its sidecar."""
        for file in self._first:
            for name in columns:
                if f"text.{name}" not in file.kinds:
                    file.sidecar_texts(name)

    def require_flipped(self) -> None:
        """Raises ConfigError where a dataset lacks the moments of mirrored images."""
        for file in self._first:
            if "mean" + FLIPPED not in file.kinds:
                raise ConfigError(
                    f"train.flip: {file.dataset.root} lacks the moments of mirrored images, which cannot be had from "
                    "those of the images; make the latents again with latents.flip true (carrara latents --redo)"
                )

    def require_features(self) -> dict[str, Any]:
        """The facts of the vision tower whose features lie beside the latents; raises ConfigError where a dataset has
        none, or those of another one."""
        facts: list[dict[str, Any]] = [d.manifest.get(FEATURES) or {} for d in self.datasets]
        for dataset, one in zip(self.datasets, facts, strict=True):
            if not one:
                raise ConfigError(
                    f"train.alignment: {dataset.root} has no features of a vision tower; make the latents again with "
                    "latents.features (carrara latents --redo)"
                )
            if any(one[n] != facts[0][n] for n in ("digest", "size", "grid")):
                raise ConfigError(
                    f"train.alignment: the features of {dataset.root} are of another vision tower, or of another size "
                    f"or grid, than those of {self.dataset.root}; make the latents of all sources with the same"
                )
        return facts[0]

    def require_images(self) -> None:
        """Raises StageError where beside the first shard of a dataset there is not one image of its samples."""
        for file, beside in zip(self._first, self._beside, strict=False):
            keys = file.keys
            if not beside.has_any(file.info.index, keys):
                raise StageError(
                    f"{beside.dataset.root}: its shard {file.info.name} has no image of the samples in shard "
                    f"{file.info.name} of {file.dataset.root}, such as {keys[0] if keys else 'none'}; make both from "
                    "the same table, with the same samples_per_shard"
                )

    def captions(self, positions: np.ndarray, columns: Sequence[str]) -> list[list[list[str]]]:
        """Of each sample, the captions in each of these columns of the sidecar, whose entries are texts or lists of
        texts; empty ones are left out. Raises StageError where a column is not there."""
        rows = self._rows(positions)
        found = [[self._column(window, f"text.{name}") for name in columns] for window, _ in rows]
        return [[texts[at] for texts in each] for each, (_, at) in zip(found, rows, strict=True)]

    def keys(self, positions: np.ndarray) -> list[str]:
        """The samples' keys."""
        rows = self._rows(positions)
        return [str(self._column(window, "key")[at]) for window, at in rows]

    def images(self, positions: np.ndarray) -> list[tuple[str, bytes, tuple[float, float] | None]]:
        """The samples' keys, the encoded images that lie beside their latents, and where their images were cropped
        for these (latents.resize.fit_cover)."""
        found = []
        for window, at in self._rows(positions):
            key = str(self._column(window, "key")[at])
            settings = self.datasets[self._shard_of[window.columns["runs"][0]][0]].manifest.get("settings") or {}
            place = crop_place(key) if settings.get("crop") == "random" else None
            found.append((key, self._column(window, "image")[at], place))
        return found

    def _rows(self, positions: np.ndarray) -> list[tuple[Window, int]]:
        """Where these samples lie in memory; a batch asks for the same ones several times."""
        name = np.asarray(positions, np.int64).tobytes()
        known, rows = self._taken
        if known != name:
            rows = self._reader.take(positions)
            self._taken = (name, rows)
        return rows

    def _gather(self, name: str, positions: np.ndarray, dtype: Any) -> np.ndarray:
        rows = self._rows(positions)
        first = self._column(rows[0][0], name)
        out = np.empty((len(rows), *first.shape[1:]), dtype)
        for i, (window, at) in enumerate(rows):
            out[i] = self._column(window, name)[at]
        return out

    def _column(self, window: Window, name: str) -> Any:
        """A column of a window; what nobody announced in `wants` is read now, and from now on with every window."""
        if name not in window.columns:
            self.wants.add(name)
            source, bucket, runs = window.columns["runs"]
            window.columns[name] = self._load(source, bucket, runs, {name}).columns[name]
        return window.columns[name]

    def _load(
        self, source: int, bucket: int, runs: list[tuple[int, int, int]], wants: set[str] | None = None
    ) -> Window:
        which, offset = self._shard_of[source]
        dataset, wants = self.datasets[which], set(wants or self.wants)
        wants |= {"key"} if "image" in wants else set()
        parts, shards, rows, alive = [], [], [], []
        for shard, first, end in runs:
            position = offset + shard
            with _named(dataset, position):
                file = self._file(which, position)
                parts.append(file.read(bucket, first, end, wants))
            alive.append(parts[-1].pop("alive"))
            if "image" in wants:
                parts[-1]["image"], there = self._beside[which].read(file.info.index, parts[-1]["key"])
                alive[-1] = alive[-1] & there
            shards.append(np.full(end - first, position))
            rows.append(np.arange(first, end))
        columns = {name: _joined([p[name] for p in parts]) for name in parts[0]}
        columns["runs"] = (source, bucket, runs)
        return Window(np.concatenate(shards), np.concatenate(rows), np.concatenate(alive), columns)


class _Rows:
    """Rows of a column that are kept once for several samples: [i] is that of sample i."""

    def __init__(self, values: np.ndarray, index: np.ndarray) -> None:
        self.values, self.index = values, index
        self.shape = (len(index), *values.shape[1:])

    def __getitem__(self, i: int) -> np.ndarray:
        row: np.ndarray = self.values[self.index[i]]
        return row


class _Packed:
    """Embeddings of samples that have as many rows as their captions have tokens: [i] is [length,width]."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.rows = rows

    def __getitem__(self, i: int) -> np.ndarray:
        return self.rows[i]


def _joined(parts: list[Any]) -> Any:
    """The rows of several shards one after the other."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], _Packed):
        return _Packed([row for p in parts for row in p.rows])
    if isinstance(parts[0], _Rows):
        ends = np.cumsum([0, *(len(p.values) for p in parts)])
        return _Rows(
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.index + e for p, e in zip(parts, ends, strict=False)]),
        )
    return [x for p in parts for x in p] if isinstance(parts[0], list) else np.concatenate(parts)


class _LatentFile:
    """One shard of latents, of which rows are read as ranges; its layout is read once."""

    def __init__(self, dataset: Dataset, position: int, select: Selection | None = None) -> None:
        self.dataset, self.position, self.info = dataset, position, dataset.shards[position]
        self._select = select
        with _named(dataset, position):
            self._file = ColumnFile(storage.join(dataset.root, self.info.name + ".safetensors"))
        names = self._file.columns
        # Names without the number of a bucket.
        self.several = "bucket" in names
        self.kinds = {n.rpartition(".")[0] if self.several and n.rpartition(".")[2].isdigit() else n for n in names}
        self.metadata = self._file.metadata
        self.buckets = len(dataset.manifest.get("buckets") or ()) if self.several else 1
        self._lock = threading.Lock()

    @property
    def columns(self) -> Columns:
        """Type, shape and place of the columns by name."""
        return self._file.columns

    def whole(self, name: str) -> np.ndarray:
        """A column that belongs to no sample."""
        return self._file.whole(name)

    def some_bucket(self) -> int:
        """A bucket that the file has moments of."""
        return next(int(n.partition(".")[2] or 0) for n in self._file.columns if n.partition(".")[0] == "mean")

    def shape_of_mean(self) -> tuple[int, int, int]:
        """[C,h,w] of that bucket's."""
        name = column("mean", self.some_bucket(), 2 if self.several else 1)
        c, h, w = self._file.columns[name][1][1:]
        return c, h, w

    def read(self, bucket: int, first: int, end: int, wants: set[str]) -> dict[str, Any]:
        """Columns of the rows from `first` up to `end` of a bucket, by name, and `alive`, bool."""
        found: dict[str, Any] = {}
        of_images = [name + end for name in ("mean", "logstd", FEATURES) for end in ("", FLIPPED)]
        # Where crops are of the middle they are those of the mirrored images too, and stand there once.
        of_images += ["micro", *(n for n in ("micro" + FLIPPED,) if n in self.kinds)]
        wants = wants | ({"micro"} if "micro" + FLIPPED in wants else set())
        plain: list[str] = [n for n in (*of_images, *TOKENS) if n in wants]
        by_caption: list[str] = [n for n in ("embeddings", "pooled") if n in wants]
        texts = [n.removeprefix("text.") for n in wants if n.startswith("text.")]
        stored = [t for t in texts if f"text.{t}" in self.kinds]
        asked = [*plain, *(["embedding_index"] if by_caption else []), *(f"text_end.{t}" for t in stored)]
        if "micro" in wants and "micro" not in self.kinds:
            raise StageError(
                f"{self.dataset.root}: shard {self.info.name} has no column 'micro', which a UNet with "
                "addition_embed_type text_time is given; make the latents again"
            )
        got = self._rows(bucket, first, end, [*asked, *(["alive"] if "alive" in self.kinds else [])])
        for name in plain:
            found[name] = got[name]
        if "micro" in found and found["micro"].ndim == 3:  # of every resolution, as it was once stored
            found["micro"] = found["micro"][:, self._level(bucket)]
        if "micro" + FLIPPED in wants:
            found.setdefault("micro" + FLIPPED, found["micro"])
        if by_caption:
            used, index = np.unique(got["embedding_index"], return_inverse=True)
            for name in by_caption:
                if name == "embeddings" and ENDS in self._file.columns:
                    found[name] = self._packed(used, index.reshape(-1))
                else:
                    found[name] = _Rows(self._some(name, used), index.reshape(-1))
        for name in stored:
            found[f"text.{name}"] = self._texts(bucket, first, got[f"text_end.{name}"], name)
        if set(texts) - set(stored) or "key" in wants:
            samples = self._samples(bucket)[first:end]
            for name in set(texts) - set(stored):
                lines = self.sidecar_texts(name)
                found[f"text.{name}"] = [lines[n] for n in samples]
            if "key" in wants:
                found["key"] = [self.keys[n] for n in samples]
        alive = got["alive"] != 0 if "alive" in got else np.ones(end - first, bool)
        for out in (self._dead, self._unselected):
            if out is not None:
                alive = alive & ~out[self._samples(bucket)[first:end]]
        return {**found, "alive": alive}

    def _rows(self, bucket: int, first: int, end: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Rows of columns by name; those that lie sample by sample, as all once did, are picked from a longer range."""
        parts: list[tuple[str, int, int]] = []
        picks: list[np.ndarray | None] = []
        for name in names:
            own = column(name, bucket, 2 if self.several else 1)
            if own in self._file.columns:
                begin, stop = (max(first - 1, 0), end) if name.startswith("text_end.") else (first, end)
                parts.append((own, begin, stop))
                picks.append(None)
            else:
                samples = self._samples(bucket)[first:end]
                parts.append((name, int(samples[0]), int(samples[-1]) + 1))
                picks.append(samples - samples[0])
        arrays = self._file.rows(parts) if parts else []
        return {n: a if p is None else a[p] for n, a, p in zip(names, arrays, picks, strict=True)}

    def _some(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Scattered rows (ascending) of a column, neighbours in one range."""
        breaks = np.flatnonzero(np.diff(rows) > 1) + 1
        runs = np.split(rows, breaks)
        return np.concatenate(self._file.rows([(name, int(r[0]), int(r[-1]) + 1) for r in runs]))

    def _packed(self, used: np.ndarray, index: np.ndarray) -> _Packed:
        """The embeddings of these captions (ascending), and which of them is each sample's."""
        with self._lock:
            if not hasattr(self, "_ends"):
                self._ends = self._file.whole(ENDS).astype(np.int64)
        values = self._some("embeddings", packed_rows(self._ends, used))
        ends = np.cumsum(np.diff(self._ends, prepend=0)[used])
        rows = np.split(values, ends[:-1])
        return _Packed([rows[i] for i in index.tolist()])

    def _texts(self, bucket: int, first: int, ends: np.ndarray, name: str) -> list[list[str]]:
        ends = ends if first else np.concatenate([[0], ends])  # else the end of the row before comes with them
        own = column(f"text.{name}", bucket, 2 if self.several else 1)
        (data,) = self._file.rows([(own, int(ends[0]), int(ends[-1]))])
        text = data.tobytes()
        lines = [text[a - ends[0] : b - ends[0]].strip(b"\0") for a, b in itertools.pairwise(ends)]
        return [list(json.loads(line)) if line else [] for line in lines]

    def _samples(self, bucket: int) -> np.ndarray:
        """The samples, int64, that the rows of a bucket belong to."""
        if not self.several:
            return np.arange(max(self._file.columns["tokens"][1][0], self.info.count))
        with self._lock:
            if not hasattr(self, "_bucket"):
                self._bucket = self._file.whole("bucket")
        return members({"bucket": self._bucket}, bucket, len(self._bucket))

    def _level(self, bucket: int) -> int:
        """The place of a bucket's resolution among the dataset's, which was that of its row in `micro`."""
        if not self.several:
            return 0
        resolutions = list(dict.fromkeys(b["resolution"] for b in self.dataset.manifest["buckets"]))
        return resolutions.index(self.dataset.manifest["buckets"][bucket]["resolution"])

    @functools.cached_property
    def _dead(self) -> np.ndarray | None:
        """bool [samples]: what the sidecar knows to be unusable where the columns do not say; None where nothing is."""
        excluded = self.dataset.excluded_rows(self.info.index)
        laid = int(self._file.columns["bucket"][1][0]) if self.several else int(self._file.columns["tokens"][1][0])
        if len(excluded) == 0 and ("alive" in self.kinds or laid == self.info.count):
            return None
        table = self._sidecar(["status"])
        usable = np.array([s == "success" for s in table["status"].to_pylist()], bool)
        usable[excluded] = False
        rows = column_rows(table)
        dead = np.ones(laid, bool)
        dead[rows[usable & (rows >= 0)]] = False
        return dead

    @functools.cached_property
    def _unselected(self) -> np.ndarray | None:
        """bool [samples]: what the rules leave out; None where there are none."""
        if self._select is None:
            return None
        rows = column_rows(self._sidecar(["status"]))
        there = np.flatnonzero(rows >= 0)
        out = np.ones(int(rows.max(initial=-1)) + 1, bool)
        out[rows[there]] = ~self._select.passes(self.info.index, there)
        return out

    @functools.cached_property
    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the columns."""
        return [str(k) for k in self._by_sample("key")]

    @functools.cached_property
    def _read_texts(self) -> dict[str, list[list[str]]]:
        return {}

    def sidecar_texts(self, name: str) -> list[list[str]]:
        """Of each sample, the texts in a column of the sidecar: one, several, or none. Raises StageError."""
        if name not in self._read_texts:
            try:
                self._read_texts[name] = [texts_in(v) for v in self._by_sample(name)]
            except TypeError:
                raise StageError(
                    f"{self.dataset.root}: column '{name}' of shard {self.info.name} holds no text, nor lists of "
                    "text; leave it out of train.captions"
                ) from None
        return self._read_texts[name]

    def _by_sample(self, name: str) -> list[Any]:
        table = self._sidecar(["status", name])
        if name not in table.column_names:
            raise StageError(
                f"{self.dataset.root}: shard {self.info.name} has no column '{name}' in its .parquet; carry it "
                "there with ingest.keep_columns, or leave it out of train.captions"
            )
        rows = column_rows(table)
        there = np.flatnonzero(rows >= 0)
        return list(table[name].take(pa.array(there[np.argsort(rows[there], kind="stable")])).to_pylist())

    def _sidecar(self, columns: Sequence[str]) -> pa.Table:
        table = self.dataset.sidecar(self.info.index)
        return table.select([c for c in (*dict.fromkeys(columns), COLUMN_ROW) if c in table.column_names])


class _named:
    """Context: what cannot be read is said of a shard of a dataset."""

    def __init__(self, dataset: Dataset, position: int) -> None:
        self.dataset, self.name = dataset, dataset.shards[position].name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError):
            raise StageError(
                f"{self.dataset.root}: shard {self.name} cannot be read: {error}; run its stage again"
            ) from error


def _refuse_other_kind(one: Dataset, first: _LatentFile, other: Dataset, file: _LatentFile) -> None:
    if different := other_encoder(one.manifest, other.manifest):
        raise ConfigError(
            f"train.sources: {other.root} was made with another {different} than {one.root}; "
            "make the latents of all sources with the same encoders"
        )
    columns = {"mean", "logstd", *TOKENS, "embeddings", "pooled"}
    same = one.manifest["resolution"] == other.manifest["resolution"]
    same &= one.manifest.get("buckets") == other.manifest.get("buckets")
    if not same or first.kinds & columns != file.kinds & columns:
        raise ConfigError(
            f"train.sources: the latents of {other.root} have other shapes, or other text, than those of {one.root}; "
            "make them with the same settings"
        )


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
