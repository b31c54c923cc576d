"""The loss on images that are never trained on: the same images, noise and timesteps at every validation.

Its samples' timesteps are spread evenly, so that a few hundred images give a number that moves with the model and
not with the draw. Which samples they are depends neither on ranks nor on micro-batches, also where the latents have
buckets; two validations of the same weights agree up to the rounding of a sum. It is measured on the EMA, which is what
is exported.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latents.config import LatentsConfig
from latents.encoders import other_encoder
from latents.stage import LatentsStage
from latents.weights import clips_of
from shards.dataset import Dataset
from shards.images import LOCATION, ImageShard
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.stage import begin
from train import segments
from train.config import IMAGE_CONDITIONS, TrainConfig
from train.data import Batch
from train.denoising import Diffusion
from train.image_conditioning import ByKey
from train.latent_samples import Latents
from train.order import permute
from train.part_config import SourceConfig, ValidationConfig
from train.ranks import Ranks
from train.reader import Window

# Validation's places in the order of samples, whose noise no training sample ever has.
FIRST = 1 << 62


class Validator:
    """`measure` gives the mean squared error of the UNet's prediction. Batches are made once and kept in memory.

    of: what tells the images that are measured from others, for a checkpoint.
    """

    def __init__(self, config: ValidationConfig, objective: Diffusion, run: RunPaths, ranks: Ranks, micro: int) -> None:
        self.every_images, self.patience = config.every_images, config.patience
        resolution = objective.latents.resolution
        self.of = {"images": config.images, "latents": config.latents, "resolution": resolution}
        with tempfile.TemporaryDirectory(prefix="carrara-validation-") as folder:
            root = config.latents or _held_out(config, objective, run, ranks.device.type, folder)
            latents = Chosen(objective.config, _open(root, objective), config.images, _beside(config, objective, run))
            latents.wants = objective.latents.wants
            self._batches = [
                (weight, self._batch(objective, latents, rows))
                for weight, rows in _share(latents.buckets, ranks, micro)
            ]
            latents.close()

    def _batch(self, objective: Diffusion, latents: Chosen, rows: np.ndarray) -> Batch:
        count, steps = len(latents.buckets), objective.process.steps
        t = (permute(rows, count, 0) * 2 + 1) * steps // (2 * count)
        batch = objective.latent_batch(latents, rows, t, FIRST)
        if objective.image_conditioning:
            batch |= objective.image_conditioning.batch(latents, rows, np.ones(len(rows)), FIRST)
        return batch | objective.conditioning.batch(latents, rows, np.zeros(len(rows), bool))

    @torch.no_grad()
    def measure(self, engine: Any, ranks: Ranks) -> float:
        """The mean over the whole set, on all ranks. Collective; called where the engine uses the EMA."""
        engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for weight, batch in self._batches:
            _, details = engine({k: v.to(ranks.device, non_blocking=True) for k, v in batch.items()})
            sums[0] += details[0].double() * weight
            sums[1] += weight
        engine.train()
        total, count = ranks.mean(sums).tolist()
        return float(total / count)


def _share(buckets: np.ndarray, ranks: Ranks, micro: int) -> list[tuple[int, np.ndarray]]:
    """This rank's share of the samples in batches of one bucket, and how many of each batch's rows count.

    buckets: int64 [N], of each sample. Under ZeRO 3 all ranks must run the model equally often: who has no rows left
    repeats a sample, uncounted.
    """
    found = []
    for bucket in np.unique(buckets):
        rows = np.flatnonzero(buckets == bucket)
        mine = rows[ranks.rank :: ranks.world]
        for begins in range(0, -(-len(rows) // ranks.world), micro):
            part = mine[begins : begins + micro]
            found.append((len(part), part) if len(part) else (0, rows[:1]))
    return found


class Patience:
    """When to stop early: `validator.patience` validations without a new lowest loss; None is never.

    best_step: where the lowest loss was. state: of a checkpoint. Losses on other images are not compared with it, and
    where patience had run out, as in a run that is made longer, it begins anew.
    """

    def __init__(self, validator: Validator | None, state: dict[str, Any] | None = None) -> None:
        self.limit = validator.patience if validator else None
        state = state or {}
        self.of: dict[str, Any] | None = validator.of if validator else state.get("of")
        if (state.get("of") or self.of) != self.of:
            state = {}
        self.best: float | None = state.get("best")
        self.best_step: int | None = state.get("best_step")
        since: int = state.get("since", 0)
        self.since = 0 if self.limit is not None and since >= self.limit else since

    def over(self, loss: float, step: int | None = None) -> bool:
        """Take a validation's loss in; whether training should end."""
        if self.best is None or loss < self.best:
            self.best, self.best_step, self.since = loss, step, 0
        else:
            self.since += 1
        return self.limit is not None and self.since >= self.limit

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"of": self.of, "best": self.best, "best_step": self.best_step, "since": self.since}


class Chosen(Latents):
    """Some samples of a dataset, numbered from 0: spread over it, the same ones every time.

    buckets: int64 [N], of each sample.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, count: int, beside: Sequence[ByKey] = ()) -> None:
        plain = {"sources": (SourceConfig(),), "resolution": config.resolutions[:1] or None, "batch_by_area": None}
        plain |= dict.fromkeys(IMAGE_CONDITIONS)  # the images are those of `beside`
        plain["prior"] = None
        plain["select"] = ()  # scores are of what is trained on
        super().__init__(config.model_copy(update=plain), [dataset], 0, beside=beside)
        laid = segments.rows_laid(dataset).astype(np.int64)
        used = np.flatnonzero(self.placement.segments[0].sizes)
        ends = np.cumsum(laid[:, used].T.reshape(-1))  # bucket by bucket, shard by shard
        total = int(ends[-1])
        numbers = np.sort(permute(np.arange(min(count, total)), total, 0))
        slot = np.searchsorted(ends, numbers, side="right")
        rows = numbers - (ends[slot] - laid[:, used].T.reshape(-1)[slot])
        picks = zip(used[slot // len(laid)].tolist(), (slot % len(laid)).tolist(), rows.tolist(), strict=True)
        # Of those that were taken down nothing is measured.
        self._picks = [p for p in picks if self._window(p).alive[0]]
        self.buckets = np.array([b for b, _, _ in self._picks], np.int64)
        if not self._picks:
            raise StageError(f"{dataset.root}: there is not one sample to validate on")

    @functools.cache  # noqa: B019 (as long as the object, which is short)
    def _window(self, pick: tuple[int, int, int]) -> Window:
        bucket, shard, row = pick
        return self._load(0, bucket, [(shard, row, row + 1)])

    def _rows(self, positions: np.ndarray) -> list[tuple[Window, int]]:
        return [(self._window(self._picks[int(p)]), 0) for p in positions]


def _open(root: str, objective: Diffusion) -> Dataset:
    """Latents of images that nobody trains on, of the same encoders as the training's."""
    dataset = Dataset.open(root)
    if different := other_encoder(objective.latents.dataset.manifest, dataset.manifest):
        raise StageError(
            f"train.validation: {root} was made with another {different} than the latents that are trained on; "
            "make it with the same encoders"
        )
    return dataset


def _beside(config: ValidationConfig, objective: Diffusion, run: RunPaths) -> list[ByKey]:
    """The images that the UNet is given of the samples that it is validated on; none where it is given none."""
    train = objective.config
    if not train.conditioned_by:
        return []
    if config.latents:
        return [ByKey(d) for d in segments.image_sets(train, [Dataset.open(config.latents)])]
    return [ByKey(Dataset.open(RunPaths(segments.run_of_images(train, run.run)).heldout))]


def _held_out(config: ValidationConfig, objective: Diffusion, run: RunPaths, device: str, folder: str) -> str:
    """The run's held-out images as a dataset of latents, made as those that are trained on were.

    Raises ConfigError where there are none, StageError where not one can be used.
    """
    facts = objective.latents.dataset.manifest
    try:
        heldout = Dataset.open(run.heldout)
    except StageError:
        raise ConfigError(
            f"train.validation: {run.heldout} holds no images; give ingest.heldout_table, or name a folder of "
            "latents with train.validation.latents"
        ) from None
    known = {k: v for k, v in facts.get("settings", {}).items() if k in LatentsConfig.model_fields}
    if known.get("text_encoder"):  # where its weights lie is no setting of theirs, but a fact
        known["text_encoder"] = {**known["text_encoder"], "pretrained": clips_of(facts["text"])[-1]["ref"]}
    known |= {"device": device, "resolution": objective.latents.resolution, "more_resolutions": [], "enlarge": True}
    known |= {
        "flip": False,
        "features": None,
        "crop": "center",
    }  # it is measured on images as they are, by the prediction alone
    settings = LatentsConfig(**known)
    few = _first(heldout, config.images)
    if len(few) == 0:
        raise StageError(f"{heldout.root}: there is not one held-out image to validate on")
    stage = _Stage(settings, RunPaths(folder), facts["vae"]["ref"], clips_of(facts["text"])[0]["ref"])
    stage.image_dataset = few
    begin(stage)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return stage.root


class _Stage(LatentsStage):
    """The latents of a dataset that is at hand."""

    image_dataset: Dataset

    def images(self) -> Dataset:
        return self.image_dataset


def _first(dataset: Dataset, count: int) -> Dataset:
    """The first samples of a dataset, as a dataset of its own; the others count as excluded."""
    shards, beyond = [], {}
    for position, info in enumerate(dataset.shards):
        if count <= 0:
            break
        rows = ImageShard(dataset, position, ("status", *LOCATION)).rows
        shards.append({**dataclasses.asdict(info), "count": min(count, len(rows))})
        beyond[info.index] = rows[count:]
        count -= len(rows)
    few = Dataset(dataset.root, {**dataset.manifest, "format_version": 2, "shards": shards})
    few.exclusions = _Beyond(dataset.exclusions, beyond)  # type: ignore[assignment]
    return few


class _Beyond:
    """Exclusions, and rows that are not asked for."""

    def __init__(self, inner: Any, beyond: dict[int, np.ndarray]) -> None:
        self._inner, self._beyond = inner, beyond

    def rows(self, shard: int) -> np.ndarray:
        return np.union1d(self._inner.rows(shard), self._beyond[shard])

    def reasons(self, shard: int) -> dict[int, str]:
        return {**self._inner.reasons(shard), **dict.fromkeys(self._beyond[shard].tolist(), "not asked for")}
