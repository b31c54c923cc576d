"""The feature stage: pictures of any image shards through every network asked for, once, into shards that stay.

One feature shard a picture shard, one float32 column a feature (networks.COLUMNS), one row a picture in the parquet.
A metric that is invented next month reads these and needs neither pictures nor networks. The same stage serves
generated pictures, held-out ones and the training set; a generated shard has its features as soon as it is drawn.
Pictures are read, decoded and resized in threads ahead of the networks, three batches at most, so the networks wait
for nothing and memory does not grow with the number of pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from eval import networks
from eval.accounts import accounted
from eval.reference import parquet
from latents.pictures import ahead, resize_crop
from shards import images, storage
from shards.columns import pack_columns
from shards.dataset import Dataset, ShardInfo, write_manifest
from shards.fingerprint import Fingerprint, digest_json
from shards.settings import StageError
from shards.stage import Task, open_folder

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the bytes of a feature shard depend on besides pictures and weights."""

    resolution: int  # pictures of another size are brought to it first, as for training; 0 leaves them as they are
    batch_size: int = 16
    precision: str = "float32"  # of the CLIP; the others are always float32
    threads: int = 1


class FeaturesStage:
    """Stage over the image shards in `source`, into `folder`/<id>. Small and picklable.

    refs: network's name -> its weights' reference. label: for the stage's name, e.g. heldout.
    """

    unit = "images"
    data = ".safetensors"

    def __init__(
        self,
        source: str,
        folder: str,
        label: str,
        refs: Mapping[str, str],
        settings: Settings,
        device: str = "auto",
        grows: bool = False,
    ) -> None:
        self.source, self.settings, self.device = source, settings, device
        self.name = f"features-{label}"
        self.found = {name: networks.find(name, ref) for name, ref in sorted(refs.items())}
        self.weights = {name: found.digest for name, found in self.found.items()}
        # Other pictures, another folder: but for those that are being made, of which nothing goes again.
        self.pictures = None if grows else _fingerprint(source)
        self.root = storage.join(folder, digest_json([dataclasses.asdict(settings), self.weights, self.pictures])[:10])

    def made_with(self) -> Fingerprint:
        """Settings, weights, and which pictures are measured."""
        return Fingerprint("features", VERSION, dataclasses.asdict(self.settings), self.pictures, self.weights)

    def tasks(self) -> Iterator[Task]:
        """One task a shard of pictures; StageError where the pictures are not finished."""
        for position, info in enumerate(Dataset.open(self.source).shards):
            yield self.task(position, info)

    def task(self, position: int, info: ShardInfo) -> Task:
        """The task of the shard at this position of the pictures, which need not be finished."""
        return Task(info.index, info.born, position)

    def worker(self) -> FeaturesWorker:
        """Load the networks once; the result makes one shard a call."""
        return FeaturesWorker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check that every picture is accounted for and write the manifest, with counts of what was dropped."""
        expected = {s.index: s.count for s in Dataset.open(self.source).shards}
        kept, status = accounted(self.root, expected, stats)
        extra = {
            "source": Dataset.open(self.source).fingerprint,
            "weights": self.weights,
            "settings": dataclasses.asdict(self.settings),
            "status": dict(sorted(status.items())),
        }
        return write_manifest(self.root, "features", kept, extra)


def _fingerprint(source: str) -> str:
    try:
        return Dataset.open(source).fingerprint
    except StageError:
        return ""  # not finished; `tasks` says so


class FeaturesWorker:
    """The networks of one process, and the features of one shard with them."""

    def __init__(self, stage: FeaturesStage) -> None:
        from latents.encoders import pick_device
        from latents.stage import fixed_arithmetic

        self.stage, self.settings, self.fixed = stage, stage.settings, fixed_arithmetic
        self.folder = open_folder(stage)
        device = pick_device(stage.device)
        for found in stage.found.values():
            if networks.find(found.name, found.ref).digest != found.digest:
                raise StageError(f"{found.ref}: the {found.name} weights here are others than where this was begun")
        with fixed_arithmetic(self.settings.threads):
            self.networks = [networks.load(f, device, self.settings.precision) for f in stage.found.values()]
        self.dataset: Dataset | None = None

    def __call__(self, task: Task) -> dict[str, Any]:
        """Make and commit the features of one shard of the finished pictures; returns their committed stats."""
        position, known = task.payload, self.dataset
        if known is None or position >= len(known.shards) or known.shards[position].born != task.input:
            self.dataset = Dataset.open(self.stage.source)  # perhaps finished again since this worker started
            if self.dataset.shards[position].born != task.input:
                raise StageError(
                    f"{self.stage.source}: the pictures changed during the run; run the same command again"
                )
        assert self.dataset is not None
        return self.of(self.dataset, task)

    def of(self, pictures: Dataset, task: Task) -> dict[str, Any]:
        """As a call, from these pictures, of which this shard alone need be committed."""
        if (found := self.folder.adopt(task.index)) is not None:
            return found
        started = time.perf_counter()
        shard = images.ImageShard(pictures, task.payload)
        with self.fixed(self.settings.threads):
            files, stats = self._make(shard)
        shard.close()
        stats["seconds"] = round(time.perf_counter() - started, 3)
        return self.folder.commit(task.index, files, stats, task.input)

    def _make(self, shard: images.ImageShard) -> tuple[dict[str, bytes], dict[str, Any]]:
        size, side = self.settings.batch_size, self.settings.resolution
        errors: list[str | None] = [None] * len(shard)
        converted: list[bool] = [False] * len(shard)

        def decoded(i: int) -> np.ndarray | None:
            try:
                data = shard.image_bytes(i)
                converted[i] = not images.is_rgb(data)
                pixels = images.decode_rgb(data)
                return resize_crop(pixels, side)[0] if side else pixels
            except ValueError as e:
                errors[i] = " ".join(str(e).split())[:500]
                return None

        def load(batch: int) -> list[tuple[list[int], list[Any]]]:
            """The pictures of one batch as every network wants them; several groups where they keep their own sizes."""
            rows = range(batch * size, min(len(shard), (batch + 1) * size))
            whole = [(i, pixels) for i in rows if (pixels := decoded(i)) is not None]
            groups = []
            for _, group in itertools.groupby(whole, lambda item: item[1].shape):
                indices, pictures = zip(*group, strict=True)
                stacked = np.stack(pictures)
                groups.append((list(indices), [network.prepare(stacked) for network in self.networks]))
            return groups

        columns: dict[str, list[np.ndarray]] = {}
        kept: list[int] = []
        for groups in ahead(load, -(-len(shard) // size), 2, 3):
            for indices, prepared in groups:
                parts: dict[str, np.ndarray] = {}
                for network, ready in zip(self.networks, prepared, strict=True):
                    parts |= network(ready)
                fine = np.logical_and.reduce([np.isfinite(v).all(axis=1) for v in parts.values()])
                for i, good in zip(indices, fine, strict=True):
                    if good:
                        kept.append(i)
                    else:
                        errors[i] = "its features are not finite"
                for name, part in parts.items():
                    columns.setdefault(name, []).append(part[fine].astype(np.float32, copy=False))
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        if not arrays:  # a shard without one usable picture still has every column
            arrays = {c: np.zeros((0, 0), np.float32) for n in self.stage.found for c in networks.COLUMNS[n]}
        status = ["success" if e is None else "failed" for e in errors]
        prompts = shard.table["prompt_id"].take(pa.array(shard.rows)).to_pylist() if _generated(shard) else None
        table = {
            "key": shard.keys,
            "row": shard.rows.tolist(),
            "prompt_id": prompts or [None] * len(shard),
            "status": status,
            "error": errors,
            "converted": converted,
        }
        types = {"row": pa.int64(), "converted": pa.bool_()}
        files = {
            ".safetensors": pack_columns(arrays, self.stage.weights),
            ".parquet": parquet(table, {n: types.get(n, pa.string()) for n in table}),
        }
        counts = Counter(status)
        counts["success"] += 0
        return files, {
            "rows": len(shard),
            "count": len(kept),
            "status": dict(sorted(counts.items())),
            "converted": sum(converted),
        }


def _generated(shard: images.ImageShard) -> bool:
    return "prompt_id" in shard.table.column_names
