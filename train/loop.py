"""The training loop: one for all objectives, on DeepSpeed, on any number of ranks.

    while images < total:  batch by position -> loss -> all ranks agree -> step -> log -> checkpoint

The clock is in images. Nothing but a checkpoint's tensors and its number of images is needed to go on:
order, noise, learning rate and EMA length are functions of the position.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shards.fingerprint import Fingerprint
from shards.progress import Progress
from shards.settings import ConfigError, StageError
from train import checkpoint, folders
from train.config import FitConfig, layout
from train.data import Ahead, Batch
from train.flops import count_flops, peak_flops
from train.objectives import Objective
from train.optimizer import EmaAdamW, ema_decay, learning_rate, parameter_groups
from train.order import batch_positions, derive_key
from train.ranks import Ranks, Sigterm, Stopped, import_deepspeed

log = logging.getLogger("carrara.train")


@dataclasses.dataclass(frozen=True)
class Job:
    """One fit. checkpoints, logs: folders. status_url: where progress is written. facts: stored in manifests."""

    stage: str
    config: FitConfig
    seed: int
    checkpoints: Path
    logs: Path
    status_url: str
    fingerprint: Fingerprint
    facts: dict[str, Any]


def fit(job: Job, objective: Objective, ranks: Ranks) -> Path:
    """Train to the end from the newest complete checkpoint, or from the start; returns the last checkpoint.

    Collective. Raises Stopped after SIGTERM, StageError on all ranks where the loss is not finite.
    """
    config = job.config
    micro, accumulation = layout(job.stage, config, ranks.world)
    start = ranks.from_first(folders.latest_complete(job.checkpoints) if ranks.first else None)
    manifest = folders.read_manifest(start) if start else {"images": 0, "step": 0, "optimizer_steps": 0}
    images, step, applied = manifest["images"], manifest["step"], manifest["optimizer_steps"]
    if start and images >= config.images:
        return start

    objective.to(ranks.device)
    flops = _probe(job, objective, ranks, micro)
    if start:
        checkpoint.load_model(start, objective.model)
    engine, optimizer = _engine(config, objective, ranks, micro, accumulation)
    if start:
        checkpoint.load_optimizer(start, engine, objective.model, optimizer)
        _restore_loss_scale(engine, manifest.get("loss_scale"))

    def save() -> Path:
        facts = {
            **job.facts,
            "stage": job.stage,
            "images": images,
            "optimizer_steps": applied,
            "config": config.model_dump(mode="json"),
            "model_config": objective.model_config,
            "fingerprint": job.fingerprint.to_json(),
            "loss_scale": _loss_scale(engine),
        }
        return checkpoint.save(
            job.checkpoints, step, engine, objective.model, optimizer, facts, config.keep_checkpoints
        )

    figures = ("loss", *objective.figures)
    batches = _batches(objective, config, ranks, micro, accumulation, images)
    journal = Journal(job, ranks, images, flops)
    state = "failed"
    try:
        with Ahead(batches, config.prefetch) as ahead, Sigterm() as sigterm:
            while images < config.images:
                rate = learning_rate(
                    images, config.batch_size, config.images, config.learning_rate,
                    config.warmup_images, config.schedule, config.final_fraction,
                )  # fmt: skip
                decay = ema_decay(
                    images + config.batch_size, config.batch_size, config.ema_halflife_images, config.ema_rampup
                )
                for group in optimizer.param_groups:
                    group["lr"], group["ema_decay"] = rate, decay

                totals = torch.zeros(len(figures) + 1, dtype=torch.float64, device=ranks.device)
                for micro_step in range(accumulation):
                    batch = next(ahead)
                    if step == 0 and micro_step == 0:
                        _refuse_equal_draws(batch, ranks)
                    # For dropout inside a model; everything else is drawn by position.
                    torch.manual_seed(derive_key("model", job.seed, images, micro_step, ranks.rank) >> 1)
                    batch = {k: v.to(ranks.device, non_blocking=True) for k, v in batch.items()}
                    loss, details = engine(batch)
                    engine.backward(loss)
                    totals[0] += loss.detach().double() / accumulation
                    totals[1:-1] += details.double() / accumulation
                    if micro_step + 1 < accumulation:
                        engine.step()
                totals[-1] = sigterm.asked
                *means, stop = ranks.mean(totals).tolist()
                # Before the step and on all ranks alike: the weights are still those of the last good step.
                if not math.isfinite(means[0]):
                    raise StageError(
                        f"{job.stage}: the loss is {means[0]} at {images} images (samples {images} to "
                        f"{images + config.batch_size - 1} of the order); lower learning_rate, or look at these samples"
                    )
                norm = _clip_without_zero(engine, objective, config)
                engine.step()
                norm = norm if norm is not None else engine.get_global_grad_norm()
                applied += bool(engine.was_step_applied())
                images, step = images + config.batch_size, step + 1

                journal.step(images, step, rate, norm, dict(zip(figures, means, strict=True)), ahead.waited)
                done = images >= config.images
                if done or stop or _crossed(images, config.batch_size, config.checkpoint_every_images):
                    with journal.pause():
                        last = save()
                if stop and not done:
                    state = "stopped"
                    raise Stopped(f"{job.stage}: stopped by SIGTERM at {images} images; the checkpoint is {last}")
        state = "done"
        return last
    finally:
        journal.close(state)
        engine.destroy()


def _batches(
    objective: Objective, config: FitConfig, ranks: Ranks, micro: int, accumulation: int, images: int
) -> Iterator[Batch]:
    """This rank's micro-batches from position `images` to the end."""
    for begin in range(images, config.images, config.batch_size):
        for micro_step in range(accumulation):
            batch = objective.batch(batch_positions(begin, ranks.rank, ranks.world, micro_step, micro))
            yield {k: v.pin_memory() for k, v in batch.items()} if ranks.device.type == "cuda" else batch


def _engine(
    config: FitConfig, objective: Objective, ranks: Ranks, micro: int, accumulation: int
) -> tuple[Any, EmaAdamW]:
    """DeepSpeed's engine around the objective, and the optimizer inside it.

    The module stays in fp32 and precision is autocast's: DeepSpeed's own bf16 mode would make its fp32
    masters from weights that were already rounded to bf16.
    """
    objective.train()
    optimizer = EmaAdamW(
        parameter_groups(objective.model, config.weight_decay),
        lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True,
    )  # fmt: skip
    # DeepSpeed allocates its buckets in full and wants them aligned.
    bucket = -(-min(sum(p.numel() for p in objective.parameters()), 200_000_000) // 4096) * 4096
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip if config.grad_clip and config.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # round_robin_gradients makes DeepSpeed's own maps of who owns what wrong (0.19), and with it checkpoints.
        "zero_optimization": {
            "stage": config.zero_stage,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # gloo has no reduce-scatter worth the name; with these two a step of the demo's UNet takes 0.85x on CPUs.
            "reduce_scatter": ranks.device.type != "cpu",
            "contiguous_gradients": ranks.device.type != "cpu",
        },
        "steps_per_print": None,
    }
    if config.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
    engine = import_deepspeed().initialize(model=objective, optimizer=optimizer, config=settings)[0]
    return engine, optimizer


def _clip_without_zero(engine: Any, objective: Objective, config: FitConfig) -> float | None:
    """Without ZeRO: clip the gradients, already summed over the ranks, and return their norm before; else None.

    DeepSpeed would clip too, but would not tell the norm. fp16 gradients are left to its loss scaler.
    """
    if config.zero_stage or engine.torch_autocast_z0_gradscaler is not None:
        return None
    return float(torch.nn.utils.clip_grad_norm_(objective.parameters(), config.grad_clip or math.inf))


def _loss_scale(engine: Any) -> float | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if engine.torch_autocast_z0_gradscaler is not None:
        return float(engine.torch_autocast_z0_gradscaler.get_scale())
    return float(scaler.cur_scale) if scaler is not None and scaler.dynamic else None


def _restore_loss_scale(engine: Any, scale: float | None) -> None:
    if scale is None:
        return
    if engine.torch_autocast_z0_gradscaler is not None:
        state = engine.torch_autocast_z0_gradscaler.state_dict()
        engine.torch_autocast_z0_gradscaler.load_state_dict({**state, "scale": scale})
    elif getattr(getattr(engine.optimizer, "loss_scaler", None), "dynamic", False):
        engine.optimizer.loss_scaler.cur_scale = scale


def _probe(job: Job, objective: Objective, ranks: Ranks, micro: int) -> float:
    """FLOPs of one image, forward and backward; an impossible model is found here, before any work.

    Done on all ranks alike, so that all raise ConfigError where a batch does not go through the model.
    """
    batch = objective.batch(batch_positions(0, 0, 1, 0, min(micro, 2)))
    batch = {k: v.to(ranks.device) for k, v in batch.items()}
    field = "train.unet" if job.stage == "train" else f"{job.stage}.model"
    try:
        return count_flops(objective, batch) / len(next(iter(batch.values())))
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


def _crossed(images: int, batch: int, every: int) -> bool:
    """Whether the step that ends at `images` passed a multiple of `every`."""
    return images // every > (images - batch) // every


class Journal:
    """What rank 0 tells: JSON lines, TensorBoard, the bar and the status file. Silent on other ranks.

    A resumed run first drops the lines that lie beyond its checkpoint, so each number of images is there once.
    """

    def __init__(self, job: Job, ranks: Ranks, images: int, flops: float) -> None:
        self.job, self.ranks, self.flops = job, ranks, flops
        self.every = job.config.log_every_images
        self.peak = peak_flops(ranks.device, job.config.precision)
        self._writer: Any = None
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._images = images
        self._waited = self._paused = 0.0
        self._began = time.perf_counter()
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            job.logs.mkdir(parents=True, exist_ok=True)
            self.file = job.logs / "log.jsonl"
            folders.truncate_log(self.file, images)
            self._writer = SummaryWriter(str(job.logs / "tensorboard"), purge_step=images if images else None)
            self.progress = Progress(job.stage, job.config.images, "images", job.status_url, done=images)

    def step(self, images: int, step: int, rate: float, norm: Any, figures: dict[str, float], waited: float) -> None:
        """Count one step; writes a line when a multiple of log_every_images is passed, and at the end."""
        self._steps += 1
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if not self.ranks.first:
            return
        batch = self.job.config.batch_size
        self.progress.update(batch, loss=figures["loss"])
        if _crossed(images, batch, self.every) or images >= self.job.config.images:
            self._line(images, step, rate, norm, waited)

    def _line(self, images: int, step: int, rate: float, norm: Any, waited: float) -> None:
        now = time.perf_counter()
        seconds = max(now - self._began - self._paused, 1e-9)
        speed = (images - self._images) / seconds
        line: dict[str, Any] = {"images": images, "step": step}
        line |= {name: total / self._steps for name, total in self._sums.items()}
        line |= {"lr": rate, "grad_norm": None if norm is None else float(norm), "samples_per_s": speed}
        line |= {"data_wait": (waited - self._waited) / seconds, "tflops": self.flops * speed / 1e12}
        if self.peak:
            line["mfu"] = self.flops * speed / (self.peak * self.ranks.world)
        if self.ranks.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "images":
                self._writer.add_scalar(name, value, images)
        self._writer.flush()
        self.progress.update(0, lr=rate, samples_per_s=speed)
        self._sums, self._steps, self._images = {}, 0, images
        self._began, self._waited, self._paused = now, waited, 0.0

    def pause(self) -> _Pause:
        """Context whose seconds do not count as training (saving a checkpoint)."""
        return _Pause(self)

    def paused(self, seconds: float) -> None:
        """Leave these seconds out of the rates."""
        self._paused += seconds

    def close(self, state: str) -> None:
        """End the bar with a state: done, failed or stopped."""
        if self.ranks.first:
            self._writer.close()
            self.progress.close(state)


class _Pause:
    def __init__(self, journal: Journal) -> None:
        self._journal, self._began = journal, 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._journal.paused(time.perf_counter() - self._began)
