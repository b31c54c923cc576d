"""One fit and what it begins with: the job, the plan of its costs, and its micro-batches."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from shards.fingerprint import Fingerprint
from shards.settings import ConfigError, StageError
from train import plan
from train.data import Batch
from train.engine import Engine, resolve_precision
from train.fit_config import FitConfig, layout
from train.folders import Keep, folder_name
from train.guard import Guard
from train.objective import Objective
from train.order import derive_key
from train.ranks import Ranks
from train.run import Run
from train.samples import Samples
from train.validation import Patience, Validator

log = logging.getLogger("carrara.train")


@dataclasses.dataclass(frozen=True)
class Job:
    """One fit. checkpoints, logs: URLs of folders. status_url: where progress is written. facts: stored in manifests.

    newest: folder and manifest of the checkpoint to go on from, which is whole; None at the start.
    validator: None for no validation. samples: images at every checkpoint; None for none. notes: of what the run
    takes its samples from, for the journal. tell: called with every line of the journal, on rank 0.
    """

    stage: str
    config: FitConfig
    seed: int
    checkpoints: str
    logs: str
    status_url: str
    fingerprint: Fingerprint
    facts: dict[str, Any]
    newest: tuple[str, dict[str, Any]] | None = None
    validator: Validator | None = None
    samples: Samples | None = None
    notes: tuple[str, ...] = ()
    tell: Callable[[dict[str, Any]], None] | None = None

    @property
    def keep(self) -> Keep:
        """Which checkpoints stay."""
        c = self.config
        return Keep(c.keep_checkpoints, c.keep_hours, c.keep_every_images)

    def dropout_seed(self, images: int, micro_step: int, rank: int) -> int:
        """For dropout inside a model; everything else is drawn by position."""
        return derive_key("model", self.seed, images, micro_step, rank) >> 1

    def manifest(
        self, objective: Objective, run: Run, engine: Engine, guard: Guard, patience: Patience
    ) -> dict[str, Any]:
        """What a checkpoint says of itself beside its tensors."""
        return {
            **self.facts,
            "stage": self.stage,
            "images": run.images,
            "optimizer_steps": run.applied,
            "run": dataclasses.asdict(run),
            "finished": run.finished or run.images >= self.config.images,
            "config": self.config.model_dump(mode="json"),
            "precision": engine.precision,
            "model_config": objective.model_config,
            "fingerprint": self.fingerprint.to_json(),
            "loss_scale": engine.scaling(),
            "guard": guard.state(),
            "patience": patience.state(),
            "best": None if patience.best_step is None else folder_name(patience.best_step),
        }


def where(job: Job) -> tuple[str | None, dict[str, Any], Run]:
    """Folder and manifest of the checkpoint to go on from (None and nothing at the start), and where the run stands."""
    if job.newest is None:
        return None, {}, Run()
    folder, manifest = job.newest
    run = Run.of(manifest)
    # A run that had ended early goes on where it was made longer.
    run.finished = run.finished and manifest["config"]["images"] == job.config.images
    return folder, manifest, run


def begin(job: Job, objective: Objective, ranks: Ranks, images: int, fresh: bool) -> tuple[int, int, float]:
    """(micro batch of one rank, accumulation steps, FLOPs of an image), after all that can be refused is.

    images: where the run stands. fresh: whether this is its first step. Says on rank 0 what a step will cost. Raises
    ConfigError on all ranks alike where a batch does not go through the model, or does not fit the device; else moves
    the objective there. Collective.
    """
    config = job.config
    micro, accumulation = layout(job.stage, config, ranks.world)
    mine = objective.batch(objective.positions(images, ranks.rank, ranks.world, 0, micro))
    if fresh:
        refuse_equal_draws(mine, ranks)
    precision = resolve_precision(config.precision, ranks.device)
    field = "train.unet" if job.stage == "train" else f"{job.stage}.model"
    size = len(next(iter(mine.values())))

    def planned() -> plan.Plan:
        try:
            return plan.plan(objective, mine, config, precision, size, ranks.world)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as e:
            why = " ".join(str(e).split())[:300]
            raise ConfigError(f"{field}: a batch does not go through this model: {why}") from e

    found = ranks.found_by_first(planned)  # it takes seconds, and is the same for all
    # A batch by area holds fewer of large images; the clock counts places of the batch.
    found = dataclasses.replace(found, flops=found.flops * size / micro)
    if ranks.first:
        for line in plan.describe(found, config, precision, ranks.device, ranks.world, micro).splitlines():
            log.info("%s: %s", job.stage, line)
    if ranks.device.type == "cuda":
        plan.require_room(found, config, torch.cuda.mem_get_info(ranks.device)[1], job.stage, micro, ranks.world)
    objective.to(ranks.device)
    return micro, accumulation, found.flops


def keys_at(objective: Objective, config: FitConfig, images: int) -> list[str]:
    """The keys of the global batch that begins at `images`."""
    return objective.keys(objective.positions(images, 0, 1, 0, config.batch_size))


def refuse_equal_draws(batch: Batch, ranks: Ranks) -> None:
    """No two ranks may have drawn the same noise, or read the same samples, for the first step.

    Trainers that seed every rank alike do exactly that, and nothing else about them looks wrong.
    """
    noise = batch["noise"] if "noise" in batch else batch["pixels"]
    digest = hashlib.sha256(noise.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    digests = ranks.gather(digest)
    if len(set(digests)) < len(digests):
        raise StageError("two ranks drew the same noise at step 0; this is a bug in the order or in the generators")
