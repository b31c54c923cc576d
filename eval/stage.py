"""The generation: shards of images of one model by one sampler.

A shard holds its images as PNG in a tar and a row an image in a parquet. It is a pure function of its prompts, the
settings and the weights; noise depends on the prompt and the replicate alone. Which images a shard holds is written
once (plan.json) and grows: more prompts of a list are further shards, and none that is there is made again. Two shards
are in hand at a time, so that encoding and committing one, and resizing for the networks, go on beside the making of
the next; the networks get the images in memory, and their features are committed before the images are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from eval import model as models
from eval.features import FeaturesStage
from eval.generate import ImageGenerator, Sample, seed_of
from eval.prompts import Prompt
from eval.shardwork import accounted, committed_stats, counted, parquet, png, tar_of
from shards import storage
from shards.commit import Folder, describe, set_aside
from shards.dataset import write_manifest
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.layout import sample_key, shard_name
from shards.settings import ConfigError, StageError
from shards.stage import Made, Task, commit, is_begun, open_folder
from shards.stage import committed as are_committed
from shards.stats import born_of

if TYPE_CHECKING:
    from eval.evaluation import Evaluation

VERSION = 2  # raise it when the bytes of a shard change for the same settings
STATUSES = ("success", "failed_to_generate")
PLAN = "plan.json"
BLANK = 8  # an image whose channels all span fewer levels than this shows nothing
ENCODERS = 4  # threads that encode PNG
Item = tuple[Prompt, int]  # a prompt and which of its images


class GenerateStage:
    """Stage over shards of prompts. Small and picklable: settings, paths, digests."""

    name = "eval"
    unit = "images"
    data = ".tar"
    max_in_flight = 2

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation, self.config, self.run = evaluation, evaluation.config, evaluation.run
        self.model, self.size = evaluation.model, evaluation.size
        self.root = storage.join(self.run.eval, self.model.name, f"images-{evaluation.generation_id}")

    def features(self) -> list[FeaturesStage]:
        """The stages of the networks that these images are given to as they are made."""
        return self.evaluation.features_of(self.root, storage.join(self.root, "features"), "generated")

    @property
    def wanted(self) -> int:
        """Images that are asked for."""
        return len(self.evaluation.prompts) * self.config.replicates

    def _ends(self) -> list[int]:
        """Where each planned shard ends, in images; those that are written, and behind them what is still wanted."""
        try:
            ends = [int(e) for e in (storage.read_json(storage.join(self.root, PLAN)) or {}).get("ends", [])]
        except ValueError:
            raise StageError(f"{self.root}/{PLAN} is torn; delete it if no shard lies beside it") from None
        while not ends or ends[-1] < self.wanted:
            ends.append(min((ends[-1] if ends else 0) + self.config.shard_size, self.wanted))
        return ends

    def begin(self, redo: bool = False, each: Any = map) -> None:
        """Begin the folders of the images and of their features, and write the plan, grown by what is wanted; called
        under the lease.

        A network may be asked for later, as long as it finds the images: where they did not stay, ConfigError says so,
        and redo sets their folder aside.
        """
        if (network := self._asked_too_late()) is not None:
            if not redo:
                raise ConfigError(
                    f"eval: {network} is to see the images in {self.root}, and not all of them stayed "
                    f"(eval.keep_images); give --redo to set that folder aside and generate them again, or leave "
                    f"{network} out"
                )
            set_aside(self.root)
        Folder.begin(self.root, self.made_with(), self.data, redo=redo, take_over=True, known=("features", "scores"))
        for stage in self.features():
            Folder.begin(stage.root, stage.made_with(), stage.data, redo=redo, take_over=True)
        ends = self._ends()
        url = storage.join(self.root, PLAN)
        if (storage.read_json(url) or {}).get("ends") != ends:
            storage.write_json(url, {"ends": ends, "replicates": self.config.replicates})

    def _asked_too_late(self) -> str | None:
        """A network without features of a shard whose images did not all stay; None for none."""
        tasks = list(self.tasks()) if is_begun(self) else []
        there = [task for task, done in zip(tasks, are_committed(self, tasks), strict=True) if done]
        for stage in self.features():
            seen = are_committed(stage, there) if is_begun(stage) else [False] * len(there)
            for task in (t for t, done in zip(there, seen, strict=True) if not done):
                sidecar = storage.read_parquet(
                    storage.join(self.root, shard_name(task.index) + ".parquet"), ["status", "image_offset"]
                )
                if any(r["status"] == STATUSES[0] and r["image_offset"] is None for r in sidecar.to_pylist()):
                    return stage.found.name
        return None

    def tasks(self) -> Iterator[Task]:
        """One task a planned shard that is wanted or there; a prompt's replicates lie side by side."""
        ends = self._ends()
        prompts = self.evaluation.prompt_list(-(-ends[-1] // self.config.replicates)).prompts
        per = self.config.replicates
        start = 0
        for index, end in enumerate(ends):
            if start >= self.wanted and not storage.exists(storage.join(self.root, shard_name(index) + "_stats.json")):
                return
            items = [(prompts[i // per], i % per) for i in range(start, min(end, len(prompts) * per))]
            yield Task(index, digest_json([[p.id, r, p.text] for p, r in items]), items)
            start = end

    def made_with(self) -> Fingerprint:
        """The part of the protocol that images depend on, and the model's parts."""
        return Fingerprint(self.name, VERSION, self.evaluation.generation, None, self.model.parts)

    def worker(self) -> _Worker:
        """Build the pipeline and the networks once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check the accounting and write the manifest."""
        kept, status = accounted(self.root, {task.index: len(task.payload) for task in self.tasks()}, stats)
        extra = {
            "model": self.model.to_json(),
            "cell": self.config.cell,
            "generation": self.evaluation.generation,
            "status": {k: status[k] for k in STATUSES},
        }
        return write_manifest(self.root, "generated", kept, extra)

    def committed(self) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """Stats of the shards with wanted images that are committed now, and how many wanted images the others lack."""
        done, missing, start = [], {}, 0
        tasks = list(self.tasks())
        for task, stats in zip(tasks, committed_stats(self, tasks), strict=True):
            if start < self.wanted and stats is not None:
                done.append(stats)
            elif start < self.wanted:
                missing[task.index] = min(len(task.payload), self.wanted - start)
            start += len(task.payload)
        return done, missing


class _Worker:
    """The pipeline and the networks of one process. Safe to call from several threads."""

    def __init__(self, stage: GenerateStage) -> None:
        from latents.arithmetic import fixed_arithmetic
        from latents.encoders import pick_device

        self.stage, self.config, self.fixed = stage, stage.config, fixed_arithmetic
        c, self.lock = stage.config, threading.Lock()
        self.folder = open_folder(stage)
        self.device = pick_device(c.device)
        with fixed_arithmetic(c.threads):
            pipeline = models.from_prompts(models.build_pipeline(stage.run, stage.model))
            self.generator = ImageGenerator(
                pipeline,
                c.sampler,
                c.steps,
                c.guidance_scale,
                c.timestep_spacing,
                c.precision,
                self.device,
                stage.size,
                c.guidance_interval,
                c.channels_last,
                c.compile,
            )
            self.features = [f.worker() for f in stage.features()]
        for worker in self.features:
            worker.lock = self.lock  # one device, one at a time

    def __call__(self, task: Task) -> dict[str, Any]:
        """Generate and commit one shard; returns its committed stats. Its features come first, from the images in
        memory, so that a shard that is there has those of its time, also where its images do not stay."""
        if (found := self.folder.adopt(task.index)) is not None:
            return found
        items: list[Item] = task.payload
        images: list[np.ndarray] = []
        ok: list[bool] = []
        with self.lock, self.fixed(self.config.threads):
            began, size = time.perf_counter(), self.config.batch_size
            for start in range(0, len(items), size):
                made, finite = self.generator([Sample(p.id, r, p.text) for p, r in items[start : start + size]])
                images += list(made)
                ok += finite.tolist()
            generated_s = time.perf_counter() - began
        began = time.perf_counter()
        files, stats = self._made(task.index, items, images, ok)
        stats["seconds"] = round(generated_s + time.perf_counter() - began, 3)  # without the wait for the device
        live = [i for i, f in enumerate(ok) if f]
        keys, rows = self._keys(task.index, len(items)), [_row(p) for p, _ in items]
        for worker in self.features:
            of = Task(task.index, born_of(describe(files)))
            worker.of_images(of, [keys[i] for i in live], [images[i] for i in live], [rows[i] for i in live])
        return commit(self.folder, task, lambda: (files, stats))

    def _keys(self, index: int, count: int) -> list[str]:
        return [sample_key(index, row, max(self.config.shard_size, count)) for row in range(count)]

    def _made(self, index: int, items: list[Item], images: list[np.ndarray], ok: list[bool]) -> Made:
        if not any(ok):
            raise StageError(
                f"{self.stage.root}: shard {index} has not one finite image; the model's weights are broken"
            )
        live = [i for i, f in enumerate(ok) if f]
        with ThreadPoolExecutor(ENCODERS) as pool:
            encoded = dict(zip(live, pool.map(png, [images[i] for i in live]), strict=True))
        keys, most = self._keys(index, len(items)), self.config.keep_images
        stays = set(live if most is None else [i for i in live if i < most])
        tar, located = tar_of(
            [
                (k, {"png": encoded[i], "txt": items[i][0].text.encode()}) if i in stays else None
                for i, k in enumerate(keys)
            ]
        )
        status = [STATUSES[0] if f else STATUSES[1] for f in ok]
        table: dict[str, list[Any]] = {
            "key": keys,
            "replicate": [r for _, r in items],
            "seed": [f"{seed_of(p.id, r):032x}" for p, r in items],
            "source_key": [p.key or None for p, _ in items],
            "source_shard": [p.shard for p, _ in items],
            "source_row": [p.row for p, _ in items],
            "name": [p.name or None for p, _ in items],
            "tags": [list(p.tags) for p, _ in items],
            "extra": [p.extra or None for p, _ in items],
            "status": status,
            "error": [None if f else "the image is not finite" for f in ok],
            "width": [self.generator.size] * len(items),
            "height": [self.generator.size] * len(items),
            "sha256": [digest_bytes(encoded[i]) if i in encoded else None for i in range(len(items))],
            "image_ext": ["png" if i in stays else None for i in range(len(items))],
            "blank": [
                bool(np.ptp(images[i].reshape(-1, 3), axis=0).max() < BLANK) if f else None for i, f in enumerate(ok)
            ],
            **{name: [_row(p)[name] for p, _ in items] for name in ("caption", "prompt_id", "questions")},
            **located,
        }
        integers = dict.fromkeys(("replicate", "source_shard", "source_row", "width", "height"), pa.int64())
        sidecar = parquet(table, blank=pa.bool_(), tags=pa.list_(pa.string()), **integers)
        return {".tar": tar, ".parquet": sidecar}, {**counted(status), "device": _device(self.device)}


def _row(prompt: Prompt) -> dict[str, Any]:
    questions = json.dumps(prompt.questions, ensure_ascii=False) if prompt.questions else None
    return {"caption": prompt.text, "prompt_id": prompt.id, "questions": questions}


def _device(device: str) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
