"""The evaluation's two stages: held-out pictures seen once (reference.py), and the pictures of one checkpoint (here).

    for stage in stages(config, RunPaths(run), vae_ref, text_ref):
        work = stage.worker()
        stage.finish(work(task) for task in stage.tasks())
    eval.report.render(run, checkpoint)

A generated shard holds its pictures as PNG in a tar, one row a picture in a parquet, and the CLIP's features of
pictures and prompts as float32 columns: a metric that is invented next month needs no new pictures. It is a pure
function of its prompts, the settings and the weights; noise depends on the prompt and the replicate alone, batches
are formed in row order.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from eval import checkpoints, clipscore, faithfulness, networks, prompts, results
from eval.accounts import accounted
from eval.config import EvalConfig
from eval.features import FeaturesStage, Settings
from eval.generate import Artist, Draw, seed_of
from eval.protocol import SEED_RULE, Protocol
from eval.reference import RESIZE, ReferenceStage, parquet, png, same_weights
from latents.weights import find_clip, find_vae
from shards import storage
from shards.columns import pack_columns
from shards.dataset import MANIFEST, Dataset, read_stats, write_manifest
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.images import pack_tar
from shards.layout import RunPaths, sample_key
from shards.settings import ConfigError, StageError
from shards.stage import Stage, Task, committed, is_begun, open_folder

if TYPE_CHECKING:
    from latents.encoders import TextEncoder

VERSION = 1  # raise it when the bytes of a shard change for the same settings
STATUSES = ("success", "failed_to_generate")


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture to draw, and the other prompt's caption it is held against as a control."""

    prompt: prompts.Prompt
    replicate: int
    control: str


class GenerateStage:
    """Stage over shards of prompts. Small and picklable: settings, paths, digests.

    Raises ConfigError or StageError at once where the checkpoint, the weights or the prompts are missing.
    """

    name = "eval"
    unit = "images"
    data = ".tar"

    def __init__(self, config: EvalConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int = 0) -> None:
        # The noise of a picture depends on its prompt alone, so that checkpoints, samplers and runs are compared at
        # the same noise. The seed is taken so that all stages are built alike.
        self.config, self.run, self.seed = config, run, seed
        self.vae_ref, self.text_ref = vae_ref, text_ref
        self.features_ref = config.features or text_ref
        self.subject = checkpoints.find(run, config.checkpoint, config.weights)
        vae = find_vae(vae_ref)
        self.resolution = self.subject.resolution
        self.weights = {
            "unet": self.subject.digest,
            "vae": vae.digest,
            "text": find_clip(text_ref).digest,
            "features": find_clip(self.features_ref).digest,
        }
        self.root = storage.join(run.eval, self.subject.name, config.cell)
        self.judges = {name: ref for name in ("inception", "dinov2") if (ref := getattr(config, name)) is not None}
        if not self.subject.exported:
            # The pipeline takes its VAE and text encoder from where the latents came from: they must be those named.
            made_with = Dataset.open(run.latents).manifest
            for name, ref in (("vae", vae_ref), ("text", text_ref)):
                what = "the VAE" if name == "vae" else "the CLIP"
                same_weights(what, self.weights[name], made_with[name]["digest"], ref)

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out real pictures to compare with."""
        return storage.exists(storage.join(self.run.heldout, MANIFEST))

    def reference(self) -> ReferenceStage | None:
        """The stage that this one's `finish` reads; None without held-out pictures."""
        if not self.has_heldout:
            return None
        return ReferenceStage(self.config, self.run, self.vae_ref, self.text_ref, self.resolution)

    @property
    def _distance_source(self) -> str | None:
        return self.config.reference or (self.run.heldout if self.has_heldout else None)

    def features(self) -> dict[str, FeaturesStage]:
        """The feature stages that the metrics read: real, generated and train, those of them that are asked for."""
        c, found = self.config, {}
        settings = Settings(self.resolution, c.batch_size, c.precision, c.threads)
        aside = storage.join(self.run.eval, "reference")

        def stage(label: str, source: str, folder: str, refs: dict[str, str], grows: bool = False) -> None:
            found[label] = FeaturesStage(source, folder, label, refs, settings, c.device, grows)

        if self.judges and self._distance_source is not None:
            source = self._distance_source
            stage("real", source, storage.join(aside, f"real-{digest_bytes(source.encode())[:8]}"), self.judges)
        if self.judges:
            stage("generated", self.root, storage.join(self.root, "features"), self.judges, grows=True)
        if c.memorisation:
            stage("train", self.run.images, storage.join(aside, "train"), {"clip": self.features_ref})
        return found

    def _feature_shards(self) -> dict[str, Dataset]:
        """What of the feature stages is committed now, by label."""
        found = {}
        for label, stage in self.features().items():
            try:
                tasks = list(stage.tasks())
            except StageError:  # its pictures are not finished
                if label != "generated":
                    continue
                drawn = results.dataset_of(self.root, self._committed()[0])
                tasks = [stage.task(position, info) for position, info in enumerate(drawn.shards)]
            done = [t.index for t, there in zip(tasks, committed(stage, tasks), strict=True) if there]
            stats = [s for index in done if (s := read_stats(stage.root, index)) is not None]
            if stats:
                found[label] = results.dataset_of(stage.root, stats)
        return found

    def prompts(self) -> list[prompts.Prompt]:
        """The prompts, in order."""
        if self.config.prompt_file is not None:
            return prompts.from_file(self.config.prompt_file, self.config.prompts)
        if not self.has_heldout:
            raise ConfigError(
                f"eval: there is no held-out set in {self.run.heldout}; set eval.prompt_file to a text file of prompts"
            )
        return prompts.from_heldout(Dataset.open(self.run.heldout), self.config.prompts)

    def protocol(self) -> Protocol:
        """How the numbers of this stage are measured."""
        chosen, c = self.prompts(), self.config
        return Protocol(
            prompts=prompts.digest(chosen),
            prompt_count=len(chosen),
            replicates=c.replicates,
            seed_rule=SEED_RULE,
            resolution=self.resolution,
            sampler=c.sampler,
            steps=c.steps,
            guidance_scale=c.guidance_scale,
            timestep_spacing=c.timestep_spacing or "",
            dtype=c.precision,
            resize=RESIZE,
            reference=Dataset.open(self.run.heldout).fingerprint if self.has_heldout else "",
            vae=self.weights["vae"],
            text=self.weights["text"],
            features=self.weights["features"],
            unet=self.weights["unet"],
            weights=c.weights,
            **{name: networks.find(name, ref).digest for name, ref in self.judges.items()},
            distance_reference=self._distance_fingerprint(),
        )

    def _distance_fingerprint(self) -> str:
        source = self._distance_source if self.judges else None
        return "" if source is None else Dataset.open(source).fingerprint

    def tasks(self) -> Iterator[Task]:
        """One task a shard of `shard_size` pictures; a prompt's replicates lie side by side."""
        chosen = self.prompts()
        items = (
            Item(prompt, replicate, control)
            for prompt, control in zip(chosen, prompts.controls(chosen), strict=True)
            for replicate in range(self.config.replicates)
        )
        index, part = 0, []
        for item in items:
            part.append(item)
            if len(part) == self.config.shard_size:
                yield self._task(index, part)
                index, part = index + 1, []
        if part:
            yield self._task(index, part)

    def _task(self, index: int, items: list[Item]) -> Task:
        drawn = [[i.prompt.id, i.replicate, i.prompt.key, i.prompt.shard, i.prompt.row, i.control] for i in items]
        return Task(index, digest_json(drawn), items)

    def made_with(self) -> Fingerprint:
        """Settings, weights, and for which prompts."""
        c = self.config
        settings = {
            "sampler": c.sampler,
            "steps": c.steps,
            "guidance_scale": c.guidance_scale,
            "timestep_spacing": c.timestep_spacing,
            "resolution": self.resolution,
            "precision": c.precision,
            "batch_size": c.batch_size,
            "threads": c.threads,
            "faithfulness": c.faithfulness,
            "shard_size": c.shard_size,
        }
        drawn = [prompts.digest(self.prompts()), c.replicates]
        return Fingerprint(self.name, VERSION, settings, digest_json(drawn), self.weights)

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Build the pipeline and the feature network once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check the accounting, write the manifest and metrics.json beside it; returns the manifest.

        Held-out shards whose features are missing are seen here first, one after another.
        """
        expected = {task.index: len(task.payload) for task in self.tasks()}
        kept, status = accounted(self.root, expected, stats)
        self._finish_reference()
        extra = {
            "checkpoint": self.subject.name,
            "images_seen": self.subject.images,
            "cell": self.config.cell,
            "protocol": self.protocol().to_json(),
            "status": {k: status[k] for k in STATUSES},
        }
        # The manifest comes last: with it the stage counts as done, so the metrics must be there.
        self.write_metrics()
        return write_manifest(self.root, "generated", kept, extra)

    def write_metrics(self) -> None:
        """Write metrics.json from the shards that are committed now.

        The report of earlier numbers goes first, so that a kill in between cannot leave it standing for these.
        """
        storage.remove(storage.join(self.run.reports, f"{self.subject.name}.html"))
        results.write(storage.join(self.root, results.METRICS), self.metrics())

    def metrics_are_current(self) -> bool:
        """Whether metrics.json is of this protocol and these settings of the statistics, and nothing is missing from
        it."""
        found = results.read(storage.join(self.root, results.METRICS))
        return (
            found is not None
            and found.get("protocol") == self.protocol().to_json()
            and found.get("statistics") == self._statistics()
            and not found["missing"]["pictures"]
            and found.get("features") == _described(self._feature_shards())
        )

    def _statistics(self) -> dict[str, Any]:
        """Settings that change the metrics but no picture."""
        c = self.config
        return {"retrieval_candidates": c.retrieval_candidates, "jackknife_groups": c.jackknife_groups}

    def metrics(self) -> dict[str, Any]:
        """The metrics of whatever shards are committed now: all of them after `finish`, a part of them before.

        What is missing is in the result, so a partial one can be read at any moment.
        """
        done, missing = self._committed()
        reference = self.reference()
        real = Dataset.open(reference.root) if reference and storage.exists(join_manifest(reference.root)) else None
        features = self._feature_shards()
        return {
            "checkpoint": self.subject.name,
            "images_seen": self.subject.images,
            "cell": self.config.cell,
            "protocol": self.protocol().to_json(),
            "statistics": self._statistics(),
            "reference": None if real is None else {"root": real.root.rsplit("/", 1)[-1], "pictures": len(real)},
            "missing": {"shards": sorted(missing), "pictures": sum(missing.values())},
            "features": _described(features),
            **results.measure(self.config, results.dataset_of(self.root, done), real, features),
        }

    def _committed(self) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """Stats of the shards that are committed now, and the numbers of pictures of those that are missing."""
        done, missing = [], {}
        tasks = list(self.tasks())
        there = committed(self, tasks) if is_begun(self) else [False] * len(tasks)
        for task, known in zip(tasks, there, strict=True):
            stats = read_stats(self.root, task.index) if known else None
            if stats is None:
                missing[task.index] = len(task.payload)
            else:
                done.append(stats)
        return done, missing

    def _finish_reference(self) -> None:
        reference = self.reference()
        if reference is None:
            return
        tasks = list(reference.tasks())
        left = [task for task, there in zip(tasks, committed(reference, tasks), strict=True) if not there]
        if left:
            work = reference.worker()
            for task in left:
                work(task)
        reference.finish(s for task in tasks if (s := read_stats(reference.root, task.index)) is not None)


def _described(features: dict[str, Dataset]) -> dict[str, Any]:
    told = ("fingerprint", "dropped", "converted")
    return {label: {"pictures": len(d), **{k: d.manifest[k] for k in told}} for label, d in features.items()}


def join_manifest(root: str) -> str:
    """Where a dataset's manifest lies."""
    return storage.join(root, MANIFEST)


def stages(config: EvalConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int = 0) -> list[Stage]:
    """The stages of one evaluation, in order: the reference where there are held-out pictures, the generation, and
    the features that `conclude` measures, of real pictures first."""
    generate = GenerateStage(config, run, vae_ref, text_ref, seed)
    reference = generate.reference()
    features = generate.features()
    last = features.pop("generated", None)
    parts: list[Stage | None] = [reference, *features.values(), generate, last]
    return [stage for stage in parts if stage is not None]


def conclude(config: EvalConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int = 0) -> str:
    """After the stages: measure again if only the statistics' settings changed, render the report; returns its path."""
    from eval import report

    stage = GenerateStage(config, run, vae_ref, text_ref, seed)
    if not stage.metrics_are_current():
        stage._finish_reference()
        stage.write_metrics()
    return report.render(run, stage.subject.name, config.cell)


class _Worker:
    """The networks of one process, and the making of one shard with them."""

    def __init__(self, stage: GenerateStage) -> None:
        from latents.encoders import load_text, pick_device
        from latents.stage import fixed_arithmetic

        self.stage, self.config, self.fixed = stage, stage.config, fixed_arithmetic
        self.folder = open_folder(stage)
        c = self.config
        device = pick_device(c.device)
        self.judge = faithfulness.load(c.faithfulness)
        with fixed_arithmetic(c.threads):
            pipeline = checkpoints.build_pipeline(stage.run, stage.subject)
            self.artist = Artist(
                pipeline, c.sampler, c.steps, c.guidance_scale, c.timestep_spacing, c.precision, device
            )
            self.clip = load_text(stage.features_ref, "last", device, c.precision)
            features = stage.features().get("generated")
            self.features = None if features is None else features.worker()
        if self.artist.side != stage.resolution:
            raise StageError(
                f"the pipeline draws pictures of {self.artist.side} px where {stage.resolution} were expected"
            )

    def __call__(self, task: Task) -> dict[str, Any]:
        """Draw, judge and commit one shard; returns its committed stats. Its features follow at once, so that they can
        be measured while the rest is drawn; should this process die in between, the feature stage makes them."""
        same_weights("the CLIP", self.clip.digest, self.stage.weights["features"], self.clip.ref)
        if (found := self.folder.adopt(task.index)) is not None:
            return self._followed(found)
        started = time.perf_counter()
        with self.fixed(self.config.threads):
            files, stats = self._make(task.index, task.payload)
        stats["seconds"] = round(time.perf_counter() - started, 3)
        return self._followed(self.folder.commit(task.index, files, stats, task.input))

    def _followed(self, stats: dict[str, Any]) -> dict[str, Any]:
        if self.features is not None:
            drawn = results.dataset_of(self.stage.root, [stats])
            self.features.of(drawn, self.features.stage.task(0, drawn.shards[0]))
        return stats

    def _make(self, index: int, items: list[Item]) -> tuple[dict[str, bytes], dict[str, Any]]:
        size = self.config.batch_size
        pictures: list[np.ndarray] = []
        finite: list[bool] = []
        for start in range(0, len(items), size):
            drawn, fine = self.artist(
                [Draw(i.prompt.id, i.replicate, i.prompt.text) for i in items[start : start + size]]
            )
            pictures += list(drawn)
            finite += fine.tolist()
        kept = [i for i, fine in enumerate(finite) if fine]
        captions = [items[i].prompt.text for i in kept]
        if kept:
            features = self.clip.encode_images(np.stack([pictures[i] for i in kept]), size).numpy()
            texts = self.clip.encode_captions(captions, size).numpy()
            fine_features = np.isfinite(features).all(axis=1) & np.isfinite(texts).all(axis=1)
            kept = [i for i, fine in zip(kept, fine_features, strict=True) if fine]
            features, texts = features[fine_features], texts[fine_features]
        if not kept:
            raise StageError(
                f"{self.stage.root}: shard {index} has not one finite picture; the model's weights are broken"
            )
        keys = [sample_key(index, row, self.config.shard_size) for row in range(len(items))]
        encoded = {i: png(pictures[i]) for i in kept}
        tar, places = pack_tar((keys[i], {"png": encoded[i], "txt": items[i].prompt.text.encode()}) for i in kept)
        place = {i: p["png"] for i, p in zip(kept, places, strict=True)}
        cosine = dict(zip(kept, clipscore.cosines(features, texts).tolist(), strict=True))
        cut = truncated(self.clip, [i.prompt.text for i in items])
        ok = set(kept)
        table: dict[str, list[Any]] = {
            "key": keys,
            "caption": [i.prompt.text for i in items],
            "prompt_id": [i.prompt.id for i in items],
            "replicate": [i.replicate for i in items],
            "seed": [seed_of(i.prompt.id, i.replicate, "start") for i in items],
            "control": [i.control for i in items],
            "source_key": [i.prompt.key or None for i in items],
            "source_shard": [i.prompt.shard for i in items],
            "source_row": [i.prompt.row for i in items],
            "status": [STATUSES[0] if i in ok else STATUSES[1] for i in range(len(items))],
            "error": [None if i in ok else "the picture or its features are not finite" for i in range(len(items))],
            "width": [self.artist.side] * len(items),
            "height": [self.artist.side] * len(items),
            "sha256": [digest_bytes(encoded[i]) if i in ok else None for i in range(len(items))],
            "image_offset": [place[i][0] if i in ok else None for i in range(len(items))],
            "image_size": [place[i][1] if i in ok else None for i in range(len(items))],
            "image_ext": ["png" if i in ok else None for i in range(len(items))],
            "clip_cosine": [cosine.get(i) for i in range(len(items))],
            "truncated": cut,
            "blank": [
                bool(np.ptp(pictures[i].reshape(-1, 3), axis=0).max() < BLANK) if i in ok else None
                for i in range(len(items))
            ],
        }
        if self.judge:
            own = [self.judge.judge(pictures[i], item.prompt.text) if i in ok else None for i, item in enumerate(items)]
            other = [
                self.judge.judge(pictures[i], item.control) if i in ok and item.control else None
                for i, item in enumerate(items)
            ]
            table |= faithfulness.columns(self.judge, own, "shows") | faithfulness.columns(self.judge, other, "control")
        columns = pack_columns({"images": features, "captions": texts}, {"features": self.clip.digest})
        files = {".tar": tar, ".safetensors": columns, ".parquet": parquet(table, {n: _type(n) for n in table})}
        stats = {"rows": len(items), "count": len(kept), "status": dict(sorted(Counter(table["status"]).items()))}
        return files, stats


BLANK = 8  # a picture whose channels all span fewer levels than this shows nothing
_INTEGERS = ("replicate", "seed", "source_shard", "source_row", "width", "height", "image_offset", "image_size")


def _type(name: str) -> pa.DataType:
    if name in _INTEGERS:
        return pa.int64()
    if name == "clip_cosine":
        return pa.float64()
    if name in ("truncated", "blank") or name.startswith(("shows_", "control_")):
        return pa.bool_()
    return pa.string()


def truncated(clip: TextEncoder, captions: list[str]) -> list[bool]:
    """Which captions have more tokens than the CLIP reads: those that fill a context one token longer to its end."""
    longer = clip.tokenizer([*captions, ""], context_length=clip.context_length + 1)
    padding = int(longer[-1, -1])
    return [bool(row[-1] != padding) for row in longer[:-1]]
