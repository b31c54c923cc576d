"""The training loop: one for all objectives, on DeepSpeed, on any number of ranks.

    while images < total:
        batch by position -> loss -> all ranks agree -> step (or skip) -> log -> validate -> checkpoint

It is launched by one of these (main.py says more); killed at any moment, the same line goes on:

    deepspeed train/main.py --config mine.yaml                                one machine
    deepspeed --hostfile hosts train/main.py --config mine.yaml               several, by pdsh
    deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr node1 train/main.py --config mine.yaml
                                                                              several, the line on each
    carrara train --config mine.yaml                                          on Ray

The clock is in images. Nothing but a checkpoint's tensors and its manifest is needed to go on: order, noise,
learning rate and EMA lengths are functions of the position.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.fingerprint import Fingerprint
from shards.settings import ConfigError, StageError
from train import checkpoint, folders, posthoc
from train import engine as deep
from train.config import FitConfig, ema_name, layout
from train.data import Ahead, Batch
from train.flops import count_flops
from train.guard import Guard
from train.journal import Journal, crossed
from train.objective import Objective
from train.optimizer import EmaAdamW, ema_decay, learning_rate
from train.order import derive_key
from train.ranks import Ranks, Sigterm, Stopped
from train.validation import Patience, Validator

log = logging.getLogger("carrara.train")


@dataclasses.dataclass(frozen=True)
class Job:
    """One fit. checkpoints, logs: folders. status_url: where progress is written. facts: stored in manifests.

    validator: None for no validation. draw: a checkpoint's folder -> a grid of samples, uint8 [H,W,3]; None for none.
    """

    stage: str
    config: FitConfig
    seed: int
    checkpoints: Path
    logs: Path
    status_url: str
    fingerprint: Fingerprint
    facts: dict[str, Any]
    validator: Validator | None = None
    draw: Callable[[Path], np.ndarray] | None = None


def fit(job: Job, objective: Objective, ranks: Ranks) -> Path:
    """Train to the end from the newest complete checkpoint, or from the start; returns the last checkpoint.

    Collective. Raises Stopped after SIGTERM, StageError on all ranks where training cannot go on.
    """
    config = job.config
    micro, accumulation = layout(job.stage, config, ranks.world)
    start = ranks.from_first(folders.latest_complete(job.checkpoints) if ranks.first else None)
    manifest: dict[str, Any] = folders.read_manifest(start) if start else {"images": 0, "step": 0, "optimizer_steps": 0}
    images, step, applied = manifest["images"], manifest["step"], manifest["optimizer_steps"]
    if start and (images >= config.images or manifest.get("finished")):
        return start

    # ---- the model, the engine around it, and what they had learned -------------------------------
    objective.to(ranks.device)
    flops = _probe(job, objective, ranks, micro)
    if start:
        checkpoint.load_model(start, objective.model)
    averages = deep.averages(config)
    engine, optimizer = deep.start(config, objective, ranks, micro, accumulation)
    if start:
        checkpoint.load_optimizer(start, engine, objective.model, optimizer, averages)
    scale = deep.loss_scale(config, manifest.get("loss_scale"))
    guard = Guard(config.spike_sigmas, config.max_skips, manifest.get("guard"))
    patience = Patience(job.validator.patience if job.validator else None, manifest.get("patience"))
    keep = folders.Keep(config.keep_checkpoints, config.keep_hours, config.keep_every_images)
    saver = checkpoint.Saver(
        job.checkpoints, engine, objective.model, optimizer, averages, keep, objective.saves_frozen
    )

    def save() -> Path:
        facts = {
            **job.facts,
            "stage": job.stage,
            "images": images,
            "optimizer_steps": applied,
            "config": config.model_dump(mode="json"),
            "model_config": objective.model_config,
            "fingerprint": job.fingerprint.to_json(),
            "loss_scale": dataclasses.asdict(scale),
            "guard": guard.state(),
            "patience": patience.state(),
            "finished": done,
        }
        return saver.save(step, facts)

    figures = ("loss", *objective.figures)
    batches = _batches(objective, config, ranks, micro, accumulation, images)
    journal = Journal(job.stage, config, job.logs, job.status_url, ranks, images, flops, figures, objective.bins)
    state = "failed"
    last = start
    done = False
    try:
        with Ahead(batches, config.prefetch) as ahead, Sigterm() as sigterm:
            while not done:
                # ---- gradients of the global batch ------------------------------------------------
                rate = _set_rates(optimizer, config, images)
                totals = torch.zeros(len(figures) + 2 * objective.bins + 2, dtype=torch.float64, device=ranks.device)
                for micro_step in range(accumulation):
                    batch = next(ahead)
                    if step == 0 and micro_step == 0:
                        _refuse_equal_draws(batch, ranks)
                    # For dropout inside a model; everything else is drawn by position.
                    torch.manual_seed(derive_key("model", job.seed, images, micro_step, ranks.rank) >> 1)
                    batch = {k: v.to(ranks.device, non_blocking=True) for k, v in batch.items()}
                    loss, details = engine(batch)
                    deep.backward(engine, loss, scale)
                    totals[0] += loss.detach().double() / accumulation
                    totals[1:-2] += details.double() / accumulation
                    if micro_step + 1 < accumulation:
                        engine.step()
                totals[-2], totals[-1] = sigterm.asked, saver.failed
                *means, stop, unsaved = ranks.mean(totals).tolist()
                if unsaved:
                    saver.finish()  # raises

                # ---- the step, unless all ranks agree that it must not be taken ---------------------
                norm = deep.clip_without_zero(engine, objective, config, scale)
                back = last if guard.exhausted else None
                if back:
                    saver.finish()
                    checkpoint.load_masters(back, engine, objective.model)
                    checkpoint.load_optimizer(back, engine, objective.model, optimizer, averages)
                optimizer.applied = False
                optimizer.veto = _veto(guard, engine, means[0], norm, back is not None)
                engine.step()
                norm = norm if norm is not None else deep.gradient_norm(engine)
                skipped = not optimizer.applied
                # An overflow is how fp16 finds its scale, as long as there is any to take away.
                overflow = scale.value > 1.0 and math.isfinite(means[0]) and deep.overflowed(engine, norm)
                scale.update(overflow)
                applied += optimizer.applied
                images, step = images + config.batch_size, step + 1
                if back:
                    applied = folders.read_manifest(back)["optimizer_steps"]
                    guard.rolled_back()
                    journal.event(images, "rollback", checkpoint=back.name, rollbacks=guard.rollbacks)
                elif skipped and not overflow:
                    guard.refuses(means[0], norm)  # DeepSpeed skips by itself where the norm is not finite
                    guard.left_out()
                    _tell_skip(job, objective, ranks, journal, guard, images, means[0], norm, last)
                elif not skipped:
                    guard.taken(means[0], norm)

                # ---- what a person sees, and what outlives this process ------------------------------
                journal.step(images, step, rate, norm, means, ahead.waited, skipped)
                done = images >= config.images
                if job.validator and (done or crossed(images, config.batch_size, job.validator.every_images)):
                    with journal.pause():
                        result = job.validator.measure(engine, ranks)
                    journal.event(images, "validation", loss=result)
                    done = patience.over(result) or done
                if done or stop or back or crossed(images, config.batch_size, config.checkpoint_every_images):
                    with journal.pause():
                        last = save()
                        if job.draw:
                            saver.finish()
                            if ranks.first:
                                journal.grid(images, job.draw(last))
                if stop and not done:
                    saver.finish()
                    state = "stopped"
                    raise Stopped(f"{job.stage}: stopped by SIGTERM at {images} images; the checkpoint is {last}")
            saver.finish()
        state = "done"
        assert last is not None
        return last
    finally:
        saver.wait()
        journal.close(state)
        engine.destroy()


def _set_rates(optimizer: EmaAdamW, config: FitConfig, images: int) -> float:
    """Give the optimizer the learning rate, returned, and the EMAs' factors of the step that begins at `images`."""
    rate = learning_rate(
        images, config.batch_size, config.images, config.learning_rate, config.warmup_images, config.schedule,
        config.final_fraction,
    )  # fmt: skip
    after = images + config.batch_size
    decays = {ema_name(): ema_decay(after, config.batch_size, config.ema_halflife_images, config.ema_rampup)}
    decays |= {ema_name(std): posthoc.decay(after, config.batch_size, std) for std in config.ema_stds}
    for group in optimizer.param_groups:
        group["lr"], group["ema_decays"] = rate, decays
    return rate


def _veto(guard: Guard, engine: Any, loss: float, norm: float | None, always: bool) -> Callable[[], bool]:
    """What the optimizer asks once DeepSpeed has summed up the gradients; under ZeRO 3 once for each group."""

    def veto() -> bool:
        return always or guard.refuses(loss, norm if norm is not None else deep.step_norm(engine))

    return veto


def _tell_skip(
    job: Job, objective: Objective, ranks: Ranks, journal: Journal, guard: Guard, images: int, loss: float,
    norm: float | None, last: Path | None,
) -> None:  # fmt: skip
    """Say on rank 0 which samples a skipped step saw; raises StageError on all ranks where going on is no use."""
    config = job.config
    begin = images - config.batch_size
    reason = guard.reason or f"the gradient norm is {norm}"
    if ranks.first:
        keys = objective.keys(objective.positions(begin, 0, 1, 0, config.batch_size))
        journal.event(images, "skipped", reason=reason, loss=loss, grad_norm=norm, in_a_row=guard.in_a_row, keys=keys)
        log.warning(
            "%s: the step at %d images is skipped: %s; its samples' keys are in %s",
            job.stage, begin, reason, journal.events,
        )  # fmt: skip
    if guard.exhausted and (last is None or guard.rollbacks >= config.max_rollbacks):
        why = "there is no checkpoint to go back to" if last is None else f"it went back {guard.rollbacks} times before"
        raise StageError(
            f"{job.stage}: {guard.in_a_row} steps in a row were skipped up to {images} images ({reason}), and {why}; "
            f"lower learning_rate, or look at the samples in {journal.events}"
        )


def _batches(
    objective: Objective, config: FitConfig, ranks: Ranks, micro: int, accumulation: int, images: int
) -> Iterator[Batch]:
    """This rank's micro-batches from position `images` to the end."""
    for begin in range(images, config.images, config.batch_size):
        for micro_step in range(accumulation):
            batch = objective.batch(objective.positions(begin, ranks.rank, ranks.world, micro_step, micro))
            yield {k: v.pin_memory() for k, v in batch.items()} if ranks.device.type == "cuda" else batch


def _probe(job: Job, objective: Objective, ranks: Ranks, micro: int) -> float:
    """FLOPs of one image, forward and backward; an impossible model is found here, before any work.

    Done on all ranks alike, so that all raise ConfigError where a batch does not go through the model.
    """
    whole = objective.positions(0, 0, 1, 0, job.config.batch_size)
    batch = objective.batch(whole[: min(micro, 2)])
    batch = {k: v.to(ranks.device) for k, v in batch.items()}
    field = "train.unet" if job.stage == "train" else f"{job.stage}.model"
    try:
        each = count_flops(objective, batch) / len(next(iter(batch.values())))
        return each * len(whole) / job.config.batch_size
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as e:
        raise ConfigError(f"{field}: a batch does not go through this model: {' '.join(str(e).split())[:300]}") from e


def _refuse_equal_draws(batch: Batch, ranks: Ranks) -> None:
    """At step 0: no two ranks may have drawn the same noise, or read the same samples.

    Trainers that seed every rank alike do exactly that, and nothing else about them looks wrong.
    """
    drawn = batch["noise"] if "noise" in batch else batch["pixels"]
    digest = hashlib.sha256(drawn.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    digests = ranks.gather(digest)
    if len(set(digests)) < len(digests):
        raise StageError("two ranks drew the same noise at step 0; this is a bug in the order or in the generators")
