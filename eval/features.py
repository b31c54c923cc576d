"""The feature stage: images of any shards through one network, once, into columns that stay.

One feature shard an image shard, one float32 column a feature, one row an image in the parquet. A metric that is
invented next month reads these and needs neither images nor networks. The same stage serves generated images, real
ones and the training set, and every kind of network: Inception, DINOv2, CLIP, the VAE, scoring. A generated shard's
images are handed over in memory as they are made (`of_images`); others are read, decoded and resized in threads ahead
of the network, three batches at most, so the network waits for nothing and memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from eval import networks
from eval.rows import dataset_of
from eval.shardwork import accounted, committed_stats, counted, parquet, png, tar_of
from latents.resize import prefetch, resize_crop
from shards import images, storage
from shards.columns import pack_columns
from shards.dataset import Dataset, ShardInfo, write_manifest
from shards.fingerprint import Fingerprint, digest_json
from shards.settings import StageError
from shards.stage import Made, Task, commit, open_folder

VERSION = 2
SHEET = 16  # reconstructions kept of each shard, for the report
ROW_COLUMNS = ("caption", "prompt_id", "questions")  # of the images' sidecar, where it has them


class FeaturesStage:
    """Stage over the image shards in `source`, into `folder`/<network>-<id>. Small and picklable.

    ref: the network's weights. resolution: images of another size are brought to it first, as for training; 0 leaves
    them as they are. label: for the stage's name, e.g. real.
    """

    unit = "images"
    data = ".safetensors"

    def __init__(
        self,
        source: str,
        folder: str,
        label: str,
        network: str,
        ref: Any,
        resolution: int,
        batch_size: int = 16,
        threads: int = 1,
        device: str = "auto",
    ) -> None:
        self.source, self.resolution, self.batch_size = source, resolution, batch_size
        self.threads, self.device = threads, device
        self.name = f"features-{label}-{network}"
        self.found = networks.find(network, ref)
        self.weights = {network: self.found.digest}
        # Other images, another folder: but for those that are being made, of which none goes again.
        self.images = None if label == "generated" else _fingerprint(source)
        self.root = storage.join(folder, f"{network}-{digest_json(self.made_with().to_json())[:10]}")

    def made_with(self) -> Fingerprint:
        """Resolution, weights, and which images."""
        return Fingerprint("features", VERSION, {"resolution": self.resolution}, self.images, self.weights)

    def tasks(self) -> Iterator[Task]:
        """One task a shard of images; StageError where the images are not finished."""
        for position, info in enumerate(Dataset.open(self.source).shards):
            yield self.task(position, info)

    def task(self, position: int, info: ShardInfo) -> Task:
        """The task of the shard at this position of the images, which need not be finished."""
        return Task(info.index, info.born, position)

    def worker(self) -> FeaturesWorker:
        """Load the network once; the result makes one shard a call."""
        return FeaturesWorker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check that every image is accounted for and write the manifest, with counts of what was dropped."""
        source = Dataset.open(self.source)
        kept, status = accounted(self.root, {s.index: s.count for s in source.shards}, stats)
        extra = {"source": source.fingerprint, "weights": self.weights, "status": dict(sorted(status.items()))}
        return write_manifest(self.root, "features", kept, {**extra, "resolution": self.resolution})

    def committed(self, images_of: Dataset | None = None) -> Dataset | None:
        """What is committed now of the features of these images (by default of the finished ones); None for none."""
        try:
            found = Dataset.open(self.source) if images_of is None else images_of
        except StageError:
            return None
        tasks = [self.task(position, info) for position, info in enumerate(found.shards)]
        done = [s for s in committed_stats(self, tasks) if s is not None]
        return dataset_of(self.root, done) if done else None


def _fingerprint(source: str) -> str:
    try:
        return Dataset.open(source).fingerprint
    except StageError:
        return ""  # not finished; `tasks` says so


class FeaturesWorker:
    """The network of one process, and the features of one shard with it. Safe to call from several threads."""

    def __init__(self, stage: FeaturesStage) -> None:
        from latents.arithmetic import fixed_arithmetic
        from latents.encoders import pick_device

        self.stage, self._fixed, self.lock = stage, fixed_arithmetic, threading.Lock()
        self.folder = open_folder(stage)
        found = stage.found
        if networks.find(found.name, found.ref).digest != found.digest:
            raise StageError(f"{found.ref}: the {found.name} weights here are others than where this was begun")
        with fixed_arithmetic(stage.threads):
            self.network = networks.load(found, pick_device(stage.device))
        self.dataset: Dataset | None = None

    def __call__(self, task: Task) -> dict[str, Any]:
        """Make and commit the features of one shard of the finished images; returns their committed stats."""
        position, known = task.payload, self.dataset
        if known is None or position >= len(known.shards) or known.shards[position].born != task.input:
            known = self.dataset = Dataset.open(self.stage.source)  # perhaps finished again since this worker started
            if known.shards[position].born != task.input:
                raise StageError(f"{self.stage.source}: the images changed during the run; run the same command again")
        shard = images.ImageShard(known, position)
        with contextlib.closing(shard):
            return commit(self.folder, task, lambda: self._of_shard(shard))

    def of_images(
        self, task: Task, keys: list[str], pixels: list[np.ndarray], rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """As a call, from images in memory, uint8 [H, W, 3] each, and their rows."""

        def batches() -> Iterator[tuple[list[int], Any]]:
            size = self.stage.batch_size
            for start in range(0, len(keys), size):
                stacked = np.stack([self._resized(p) for p in pixels[start : start + size]])
                ready = self.network.prepare(stacked, rows[start : start + size])
                yield list(range(start, start + len(stacked))), ready

        errors: list[str | None] = [None] * len(keys)
        return commit(self.folder, task, lambda: self._made(keys, rows, batches(), errors, [False] * len(keys)))

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        side = self.stage.resolution
        return resize_crop(pixels, side)[0] if side and pixels.shape[:2] != (side, side) else pixels

    def _of_shard(self, shard: images.ImageShard) -> Made:
        size = self.stage.batch_size
        if shard.table["image_offset"].take(pa.array(shard.rows)).null_count:
            raise StageError(
                f"{self.stage.source}: its images are not kept (eval.keep_images), so {self.stage.found.name} cannot "
                "see them; evaluate the model again with all of them"
            )
        rows = self._rows(shard)
        errors: list[str | None] = [None] * len(shard)
        converted: list[bool] = [False] * len(shard)

        def decoded(i: int) -> np.ndarray | None:
            try:
                data = shard.image_bytes(i)
                converted[i] = not images.is_rgb(data)
                return self._resized(images.decode_rgb(data))
            except ValueError as e:
                errors[i] = " ".join(str(e).split())[:500]
                return None

        def load(batch: int) -> list[tuple[list[int], Any]]:
            """The images of one batch as the network wants them; several groups where they keep their own sizes."""
            members = range(batch * size, min(len(shard), (batch + 1) * size))
            whole = [(i, pixels) for i in members if (pixels := decoded(i)) is not None]
            groups = []
            for _, group in itertools.groupby(whole, lambda item: item[1].shape):
                indices, arrays = zip(*group, strict=True)
                groups.append((list(indices), self.network.prepare(np.stack(arrays), [rows[i] for i in indices])))
            return groups

        batches = (group for groups in prefetch(load, -(-len(shard) // size), 2, 3) for group in groups)
        return self._made(shard.keys, rows, batches, errors, converted)

    def _rows(self, shard: images.ImageShard) -> list[dict[str, Any]]:
        names = [n for n in ROW_COLUMNS if n in shard.table.column_names]
        return list(shard.table.select(names).take(pa.array(shard.rows)).to_pylist())

    def _made(
        self,
        keys: list[str],
        rows: list[dict[str, Any]],
        batches: Iterable[tuple[list[int], Any]],
        errors: list[str | None],
        converted: list[bool],
    ) -> Made:
        began, waited = time.perf_counter(), 0.0
        columns: dict[str, list[np.ndarray]] = {}
        kept: list[int] = []
        sheet: dict[int, bytes] = {}
        scores = self.stage.found.name in networks.SCORING
        for indices, ready in batches:
            asked = time.perf_counter()
            with self.lock, self._fixed(self.stage.threads):
                waited += time.perf_counter() - asked
                parts = self.network(ready)
                if isinstance(self.network, networks.Reconstruction) and len(sheet) < SHEET:
                    sheet |= {i: png(p) for i, p in zip(indices, self.network.images, strict=True) if i < SHEET}
            finite = np.logical_and.reduce([np.isfinite(v).all(axis=1) | scores for v in parts.values()])
            kept += [i for i, good in zip(indices, finite, strict=True) if good]
            for i, good in zip(indices, finite, strict=True):
                errors[i] = None if good else "its features are not finite"
            for name, part in parts.items():
                columns.setdefault(name, []).append(part[finite].astype(np.float32, copy=False))
        order = np.argsort(kept, kind="stable")
        arrays = {name: np.concatenate(parts)[order] for name, parts in columns.items()}
        if not arrays:  # a shard without one usable image still has every column
            arrays = {c: np.zeros((0, 0), np.float32) for c in networks.COLUMNS.get(self.stage.found.name, ())}
        status = ["success" if e is None else "failed" for e in errors]
        table: dict[str, list[Any]] = {
            "key": keys,
            "caption": [r.get("caption") for r in rows],
            "prompt_id": [r.get("prompt_id") for r in rows],
            "status": status,
            "error": list(errors),
            "converted": converted,
        }
        files = {".safetensors": pack_columns(arrays, self.stage.weights)}
        if sheet:
            tar, located = tar_of([(k, {"png": sheet[i]}) if i in sheet else None for i, k in enumerate(keys)])
            files[".tar"], table = tar, table | located
        files[".parquet"] = parquet(table, converted=pa.bool_())
        seconds = round(time.perf_counter() - began - waited, 3)
        return files, {**counted(status), "converted": sum(converted), "seconds": seconds}
