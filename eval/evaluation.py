"""One evaluation: a model, a protocol, the stages that make what it needs, and the numbers at their end.

    evaluation = Evaluation(config, RunPaths(run), vae_ref, clip_ref)
    for stage in evaluation.stages():                     # each a stage over shards
        work = stage.worker()
        stage.finish(work(task) for task in stage.tasks())
    evaluation.conclude()                                  # metrics.json and the report

On disk, below <run>/eval:

    <model>/images-<id>/        generated images, named by what they depend on; features/ beside them
    <model>/<protocol id>/      metrics.json, label.txt: one way of measuring, which no other one touches
    real-<id>/                  features of the real images, and what the distances need of them, once for all models

Everything is resolved once, when this object is made: a checkpoint that appears meanwhile belongs to the next one.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from eval import measure, networks, protocol
from eval import model as models
from eval import prompts as lists
from eval.config import EvalConfig
from eval.features import FeaturesStage
from eval.metrics import statistics
from eval.metrics.memorisation import NearestStage
from eval.rows import dataset_of
from eval.stage import GenerateStage
from shards import storage
from shards.dataset import MANIFEST, Dataset
from shards.fingerprint import digest_bytes, digest_json
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.stage import Stage

log = logging.getLogger("carrara.eval")

METRICS = "metrics.json"


class Evaluation:
    """Small and picklable: settings, paths, digests.

    vae_ref, clip_ref: the run's own, for what the VAE keeps and for scores; None where a pipeline is evaluated that
    has none. Raises ConfigError or StageError at once where the model, the weights or the prompts are missing.
    """

    def __init__(
        self, config: EvalConfig, run: RunPaths, vae_ref: str | None = None, clip_ref: str | None = None, seed: int = 0
    ) -> None:
        # An image's noise depends on its prompt alone, so that checkpoints, samplers and runs are compared at the same
        # noise. The seed is taken so that all stages are built alike.
        self.config, self.run, self.seed = config, run, seed
        self._lists: dict[int, lists.PromptList] = {}
        if config.model is not None:
            self.model = models.of_pipeline(config.model)
        else:
            self.model = models.find(run, config.checkpoint, config.weights)
        self.size = config.size or self.model.size
        self.resolution = config.resolution or self.size
        clip = config.clip or (clip_ref if _sees_images(clip_ref) else None)
        self.refs: dict[str, Any] = {"clip": clip, "inception": config.inception}
        self.refs |= {"dinov2": config.dinov2, "judge": config.judge, "preference": config.preference}
        self.refs = {name: ref for name, ref in (self.refs | {"scorer": config.scorer}).items() if ref is not None}
        self.vae_ref = vae_ref
        if self.model.folder is None:
            self._same_encoders(vae_ref, clip_ref)
        if config.memorisation and ("clip" not in self.refs or not storage.exists(storage.join(run.images, MANIFEST))):
            raise ConfigError("eval.memorisation needs a CLIP and the run's image shards; set it to false")

    def _same_encoders(self, vae_ref: str | None, clip_ref: str | None) -> None:
        """A checkpoint's pipeline takes its VAE and text encoder from where the latents came from: those named."""
        from latents.weights import find_clip, find_vae

        for what, part, found in (
            ("the VAE", "vae", vae_ref and find_vae(vae_ref)),
            ("the CLIP", "text_encoder", clip_ref and find_clip(clip_ref)),
        ):
            if found and part in self.model.parts and found.digest != self.model.parts[part]:
                from latents.encoders import require_digest

                require_digest(what, self.model.parts[part], found.digest, found.ref)

    # ---- what is measured, and how ---------------------------------------------------------------------

    @property
    def real_source(self) -> str | None:
        """The real images that all distances are to; None where there are none."""
        if self.config.reference is not None:
            return self.config.reference
        return self.run.heldout if storage.exists(storage.join(self.run.heldout, MANIFEST)) else None

    @functools.cached_property
    def prompts(self) -> list[lists.Prompt]:
        """The prompts that are asked for, in order."""
        return self.prompt_list(self.config.num_prompts).prompts

    def __getstate__(self) -> dict[str, Any]:
        """Without the prompts: a worker's tasks bring their own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("prompts", "_lists")} | {"_lists": {}}

    def prompt_list(self, count: int) -> lists.PromptList:
        """The first `count` prompts; read once."""
        if count not in self._lists:
            self._lists[count] = self._read_prompts(count)
        return self._lists[count]

    def _read_prompts(self, count: int) -> lists.PromptList:
        if self.config.prompts_file is not None:
            return lists.from_file(self.config.prompts_file, count)
        if not storage.exists(storage.join(self.run.heldout, MANIFEST)):
            raise ConfigError(
                f"eval: there is no held-out set in {self.run.heldout}; set eval.prompts_file to a file of prompts"
            )
        return lists.from_heldout(Dataset.open(self.run.heldout), count)

    @functools.cached_property
    def protocol(self) -> dict[str, Any]:
        """How the numbers are measured; its fields, and `id`."""
        c = self.config
        spacing = c.timestep_spacing or self.model.scheduler.get("timestep_spacing")
        source = self.real_source
        found = {
            # What the images depend on.
            "prompts": self.prompt_list(c.num_prompts).digest,
            "replicates": c.replicates,
            "seed_rule": protocol.SEED_RULE,
            "size": self.size,
            "sampler": c.sampler,
            "steps": c.steps,
            "guidance_scale": c.guidance_scale,
            "guidance_interval": None if c.guidance_interval is None else list(c.guidance_interval),
            "timestep_spacing": spacing or ("trailing" if self.model.folder is None else "the scheduler's own"),
            "precision": c.precision,
            "code": protocol.CODE,
            "generated_with": protocol.libraries("torch", "diffusers", "transformers"),
            # What the numbers depend on besides.
            "num_prompts": len(self.prompts),
            "resolution": self.resolution,
            "resize": protocol.RESIZE,
            "reference": "" if source is None else Dataset.open(source).fingerprint,
            "reference_as_is": c.reference_as_is,
            **{name: self._digest(name) for name in ("clip", "inception", "dinov2", "judge", "preference", "scorer")},
            "fid_statistics": {
                n: statistics.npz_digest(f, f"eval.fid_statistics.{n}") for n, f in sorted(c.fid_statistics.items())
            },
            "training_set": Dataset.open(self.run.images).fingerprint if c.memorisation else "",
            "retrieval_candidates": c.retrieval_candidates,
            "jackknife_groups": c.jackknife_groups,
            "measured_with": {
                "eval": protocol.MEASURES,
                **protocol.libraries("numpy", "scipy", "pillow", "open_clip_torch", "torch-fidelity"),
            },
        }
        return {"id": protocol.identity(found), **found}

    def _digest(self, name: str) -> str:
        return networks.find(name, self.refs[name]).digest if name in self.refs else ""

    @property
    def generation(self) -> dict[str, Any]:
        """The part of the protocol that the images depend on, and which of the model's weights."""
        return {**{k: self.protocol[k] for k in protocol.GENERATION}, "weights": self.model.weights}

    @property
    def generation_id(self) -> str:
        """Ten hex digits of `generation`."""
        return digest_json(self.generation)[:10]

    @property
    def folder(self) -> str:
        """Where the numbers lie: named by the protocol, and by the weights where they are not the EMA."""
        weights = self.model.weights
        other = "" if weights in ("ema", "model") else f"-{weights.replace(':', '')}"
        return storage.join(self.run.eval, self.model.name, self.protocol["id"] + other)

    @property
    def label(self) -> str:
        """One line for people: what the protocol's id stands for."""
        c = self.config
        source = c.prompts_file.rsplit("/", 1)[-1] if c.prompts_file else "held-out captions"
        each = f" x {c.replicates}" if c.replicates > 1 else ""
        resized = "" if self.resolution == self.size else f" resized to {self.resolution}"
        return f"{c.cell}, {len(self.prompts):,}{each} prompts of {source}, {self.size}{resized} px, {c.precision}"

    # ---- the stages -------------------------------------------------------------------------------------

    def features_of(self, source: str, folder: str, label: str, only: tuple[str, ...] = ()) -> list[FeaturesStage]:
        """The feature stages of the images in `source`; only: these networks."""
        c = self.config
        side = 0 if label == "real" and c.reference_as_is else self.resolution
        refs = {n: r for n, r in self.refs.items() if not only or n in only}
        if label == "real" and self.vae_ref is not None and not c.reference_as_is:
            refs["vae"] = self.vae_ref
        return [
            FeaturesStage(source, folder, label, n, r, side, c.batch_size, c.threads, c.device) for n, r in refs.items()
        ]

    @functools.cached_property
    def generate(self) -> GenerateStage:
        """The stage that makes the images."""
        return GenerateStage(self)

    def real(self) -> list[FeaturesStage]:
        """Features of the real images."""
        source = self.real_source
        return [] if source is None else self.features_of(source, self._aside("real", source), "real")

    def train(self) -> list[FeaturesStage]:
        """Features of the training images, for the search for copies."""
        if not self.config.memorisation:
            return []
        return self.features_of(self.run.images, self._aside("train", self.run.images), "train", ("clip",))

    def _aside(self, kind: str, source: str) -> str:
        return storage.join(self.run.eval, f"{kind}-{digest_bytes(source.encode())[:8]}")

    def nearest(self) -> dict[str, NearestStage]:
        """The search for training images near to generated and to real ones."""
        found = {}
        for train in self.train():
            sides = {"real": self.real(), "generated": self.generate.features()}
            for label, stages in sides.items():
                queries = next((s.root for s in stages if s.found.name == "clip"), None)
                if queries is not None:
                    found[label] = NearestStage(label, queries, train.root)
        return found

    def stages(self) -> list[Stage]:
        """All of them, in order: the real side, which is made once for all models, then this model's images."""
        nearest = self.nearest()
        parts: list[Any] = [*self.real(), *self.train(), nearest.get("real"), self.generate]
        parts += [*self.generate.features(), nearest.get("generated")]
        return [stage for stage in parts if stage is not None]

    # ---- the numbers ------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """The metrics of whatever shards are committed now: all of them after the stages, a part of them before.

        What is missing is in the result, so a partial one can be read at any moment.
        """
        done, missing = self.generate.committed()
        generated = dataset_of(self.generate.root, done)
        return {
            "checkpoint": self.model.name,
            "images_seen": self.model.images_seen,
            "cell": self.config.cell,
            "label": self.label,
            "protocol": self.protocol,
            "model": self.model.to_json(),
            "images": self.generate.root.rsplit("/", 1)[-1],
            "missing": {"shards": sorted(missing), "images": sum(missing.values())},
            **measure.measure(self, generated),
        }

    def is_current(self) -> bool:
        """Whether metrics.json is there, whole, and of all that is committed now."""
        found = measure.read(storage.join(self.folder, METRICS))
        if found is None or found["missing"]["images"]:
            return False
        done, _ = self.generate.committed()
        return bool(found["inputs"] == measure.inputs(self, dataset_of(self.generate.root, done)))

    def measure(self) -> None:
        """Write metrics.json where it is not current."""
        from eval.report import page

        if self.is_current():
            return
        found = self.metrics()
        if not found["counts"]["images"]:
            raise StageError(f"{self.generate.root}: there is not one image to measure; run the eval stage")
        # The report of earlier numbers goes first, so that a kill in between cannot leave it standing for these.
        storage.remove(page.url_of(self.run, self.model.name))
        storage.write_atomic(storage.join(self.folder, "label.txt"), (self.label + "\n").encode())
        storage.write_json(storage.join(self.folder, "provenance.json"), protocol.provenance(self))
        measure.write(storage.join(self.folder, METRICS), found)

    def result(self) -> dict[str, Any]:
        """What metrics.json says, with its folder's name. Raises StageError where it is not there."""
        result = measure.read(storage.join(self.folder, METRICS))
        if result is None:
            raise StageError(f"{self.folder}: there are no numbers; run the eval stage")
        return {**result, "folder": self.folder.rsplit("/", 1)[-1]}

    def conclude(self) -> str:
        """After the stages: metrics.json, and the report; returns the report's path."""
        from eval.report import page

        self.measure()
        return page.render(self.run, self.model.name, self.folder.rsplit("/", 1)[-1], self.config.watch)


def _sees_images(clip_ref: str | None) -> bool:
    """Whether the run's CLIP has an image encoder; one that is a pipeline's text encoder alone has none."""
    from latents.weights import find_clip

    try:
        return clip_ref is not None and not find_clip(clip_ref).text_alone
    except ConfigError:  # what is missing is said where it is needed
        return True
