"""What every fit is told: its length, batch, rates, EMA, precision, checkpoints; and what changing a setting means.

Lengths, schedules and intervals are counted in images seen, so they keep their meaning when the batch
size changes. Settings of DeepSpeed that are known to give wrong results (round_robin_gradients) have no
name here and so cannot be set.
"""

from __future__ import annotations

import enum
import logging
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, field_validator, model_validator

from shards.settings import ConfigError, Strict

log = logging.getLogger("carrara")


class Kind(enum.Enum):
    """What it means to change a setting of a run that has begun; a field without one of these is part of what the run
    is, and cannot be changed."""

    FROM_HERE_ON = "from here on"  # it may be changed by consent (--adopt), for what is still to come
    OPERATIONAL = "operational"  # where and how fast the work happens, and what is kept of it; free at any time
    # (Another number of ranks changes the order of floating-point sums, hence the last bits, but no sample.)


T = TypeVar("T")
FromHereOn = Annotated[T, Kind.FROM_HERE_ON]
Operational = Annotated[T, Kind.OPERATIONAL]


def kind_of(config: type[BaseModel], name: str) -> Kind | None:
    """The kind of a setting; None where it is part of what a run is."""
    field = config.model_fields.get(name)
    return next((m for m in field.metadata if isinstance(m, Kind)), None) if field else None


# Why there is no tensor parallelism: counted by benchmarks/parallelism.py, which a test compares.
KEPT_BY_DATA, KEPT_BY_TENSOR, MOST_WEIGHTS = 0.91, 0.59, 32.9e9


class FitConfig(Strict):
    """What every fit has. All sizes and intervals are in images; rates are per step."""

    images: FromHereOn[int] = Field(ge=1, description="images to see in total; the clock of everything else")
    batch_size: FromHereOn[int] = Field(ge=1, description="the GLOBAL batch of one optimizer step, over all ranks")
    micro_batch_size: Operational[int | None] = Field(
        default=None, ge=1, description="what one rank computes at once; the rest of its share is accumulated"
    )
    learning_rate: FromHereOn[float] = Field(default=1e-4, gt=0, le=1)
    warmup_images: FromHereOn[int] = Field(default=0, ge=0, description="linear from 0 to learning_rate")
    schedule: FromHereOn[Literal["cosine", "constant", "wsd"]] = Field(
        default="cosine", description="wsd: constant, and down over the last cooldown_images; a run may be made longer"
    )
    final_fraction: FromHereOn[float] = Field(
        default=0.0, ge=0, le=1, description="cosine and wsd end at this share of learning_rate"
    )
    cooldown_images: FromHereOn[int | None] = Field(
        default=None, ge=0, description="over how many images wsd goes down; null: a fifth of images"
    )
    optimizer: Literal["adamw", "muon", "adamw8bit"] = Field(
        default="adamw",
        description="muon: for the blocks' matrices, AdamW for the rest; adamw8bit: moments in 8 bits (bitsandbytes)",
    )
    adamw_learning_rate: FromHereOn[float | None] = Field(
        default=None, gt=0, le=1, description="muon: of what it leaves to AdamW; null: learning_rate"
    )
    betas: FromHereOn[tuple[float, float]] = (0.9, 0.99)
    eps: FromHereOn[float] = Field(default=1e-8, gt=0)
    weight_decay: FromHereOn[float] = Field(
        default=0.01, ge=0, description="decoupled; not on biases, norms and scalars"
    )
    grad_clip: FromHereOn[float | None] = Field(
        default=1.0, gt=0, description="largest global gradient norm; null for none"
    )
    ema_halflife_images: FromHereOn[int] = Field(
        default=500_000, ge=1, description="images after which a weight in the EMA has halved"
    )
    ema_rampup: FromHereOn[float | None] = Field(
        default=0.05, gt=0, le=1, description="early on the half-life is at most this share of the images seen"
    )
    ema_stds: tuple[float, ...] = Field(
        default=(), description="further EMAs by relative standard deviation, for lengths chosen afterwards (EDM2)"
    )
    spike_sigmas: FromHereOn[float | None] = Field(
        default=None, gt=0, description="skip a step whose loss or gradient norm lies so many deviations above the mean"
    )
    max_skips: FromHereOn[int] = Field(
        default=10,
        ge=1,
        description="skipped steps in a row after which the weights go back to the last checkpoint before these",
    )
    max_rollbacks: FromHereOn[int] = Field(
        default=3, ge=0, description="how often they may go back before the run ends"
    )
    precision: FromHereOn[Literal["auto", "fp32", "bf16", "fp16"]] = Field(
        default="auto",
        description="arithmetic under autocast; weights, moments and EMA are always fp32. auto: bf16 where the device "
        "has it, else fp32",
    )
    zero_stage: Operational[Literal[0, 1, 2, 3]] = Field(
        default=1, description="what DeepSpeed shares out over the ranks"
    )
    ranks: Operational[int] = Field(
        default=1, ge=1, description="processes that `carrara` starts (launchers bring their own number)"
    )
    threads: Operational[int | None] = Field(
        default=None, ge=1, description="CPU threads a rank; null: the cores shared out evenly"
    )
    checkpoint_every_images: Operational[int] = Field(default=1_000_000, ge=1)
    keep_checkpoints: Operational[int] = Field(
        default=3, ge=2, description="how many of the newest are kept (two at least)"
    )
    keep_hours: Operational[float | None] = Field(default=None, gt=0, description="keep also those younger than this")
    keep_every_images: Operational[int | None] = Field(
        default=None, ge=1, description="keep for ever the first at or after each multiple of this"
    )
    log_every_images: Operational[int] = Field(default=10_000, ge=1)
    trackers: Operational[tuple[Literal["tensorboard", "wandb", "mlflow"], ...]] = Field(
        default=("tensorboard",), description="where the log's lines and the grids of samples are copied to"
    )
    channels_last: Operational[bool] = Field(
        default=False, description="activations in NHWC; the weights lie in DeepSpeed's flat buffers either way"
    )
    activation_checkpointing: Operational[bool] = Field(
        default=False, description="compute activations again in the backward pass: less memory, a third more work"
    )
    compile: Operational[bool | Literal["blocks"]] = Field(
        default=False,
        description="torch.compile: true for the whole model, once for each shape of images; blocks for its repeated "
        "blocks, once for all shapes",
    )
    hang_s: Operational[float] = Field(
        default=1800.0, gt=0, description="a step that takes longer ends the run, with the stacks of all ranks"
    )
    tensor_parallel: Operational[int] = Field(
        default=1, ge=1, description="ranks that share each layer; 1 alone is taken, see docs/parallelism.md"
    )
    offload: Operational[Literal["none", "cpu"]] = Field(
        default="none", description="cpu: moments, EMA and fp32 weights live in main memory (zero_stage 1 and above)"
    )
    streams: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="into how many streams the samples are cut, each read by one rank; null: by the data's size",
    )
    window: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="rows of a stream that are read, and mixed, together; null: about 2 MiB, at most 256",
    )
    prefetch: Operational[int] = Field(default=3, ge=1, le=64, description="micro-batches made ahead of the loop")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError("both betas must be at least 0 and below 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, given: Any) -> Any:
        """The settings of commit c20ac09 had `shuffle_window`, which the order of today has no use for."""
        if isinstance(given, dict) and "shuffle_window" in given:
            log.warning(
                "shuffle_window has no effect any more: see streams and window; take it out of the configuration"
            )
            return {k: v for k, v in given.items() if k != "shuffle_window"}
        return given

    @model_validator(mode="after")
    def _clock(self) -> Self:
        if self.warmup_images > self.images:
            raise ValueError(f"warmup_images ({self.warmup_images}) is longer than images ({self.images})")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self

    @field_validator("ema_stds")
    @classmethod
    def _stds(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        # A power function's relative deviation cannot exceed 0.289, that of a flat average (EDM2, eq. 126).
        if not all(0.001 <= v <= 0.28 for v in value) or len({ema_name(v) for v in value}) < len(value):
            raise ValueError("each of ema_stds must lie between 0.001 and 0.28, and none may come twice")
        return value

    @model_validator(mode="after")
    def _engine(self) -> Self:
        if self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, and 1 alone is taken: eight GPUs on NVLink keep "
                f"{KEPT_BY_DATA:.0%} of their speed with Stable Diffusion 2's UNet when each has images of its own, "
                f"and {KEPT_BY_TENSOR:.0%} when two share each layer; ZeRO 3 holds up to {MOST_WEIGHTS / 1e9:.0f} "
                "billion weights on them (docs/parallelism.md); set ranks and zero_stage instead"
            )
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1 or above: without ZeRO DeepSpeed ignores it")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile cannot go with zero_stage 3, whose hooks break its graph; use 1 or 2")
        if self.optimizer != "adamw" and self.offload != "none":
            raise ValueError(f"optimizer {self.optimizer} cannot go with offload; set one of them")
        if self.adamw_learning_rate is not None and self.optimizer != "muon":
            raise ValueError(f"adamw_learning_rate is beside muon's; the optimizer is {self.optimizer}")
        if self.cooldown_images is not None and self.schedule != "wsd":
            raise ValueError(f"cooldown_images is wsd's; the schedule is {self.schedule}")
        if self.cooldown + self.warmup_images > self.images:
            raise ValueError(
                f"warmup_images ({self.warmup_images}) and cooldown_images ({self.cooldown}) are longer than images "
                f"({self.images})"
            )
        return self

    @property
    def cooldown(self) -> int:
        """Over how many images the rate of `wsd` goes down; 0 under another schedule."""
        if self.schedule != "wsd":
            return 0
        return self.images // 5 if self.cooldown_images is None else self.cooldown_images

    @property
    def steps(self) -> int:
        """Optimizer steps in all; the last one may go beyond `images` by less than a batch."""
        return -(-self.images // self.batch_size)

    def settings(self) -> dict[str, Any]:
        """The settings that decide what comes out, for the fingerprint."""
        free = {name for name in type(self).model_fields if kind_of(type(self), name) is Kind.OPERATIONAL}
        return self.model_dump(mode="json", exclude=free)


def ema_name(std: float | None = None) -> str:
    """The name of an EMA among the optimizer's states: `ema`, or `ema_0.050` of a relative standard deviation."""
    return "ema" if std is None else f"ema_{std:.3f}"


def layout(stage: str, config: FitConfig, world: int) -> tuple[int, int]:
    """(micro batch of one rank, accumulation steps) for `world` ranks; raises ConfigError where it does not divide."""
    share, rest = divmod(config.batch_size, world)
    if rest or share == 0:
        raise ConfigError(
            f"{stage}.batch_size is {config.batch_size}, which {world} ranks cannot share evenly; "
            f"make it a multiple of {world} or change the number of ranks"
        )
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"{stage}.micro_batch_size is {micro}, which does not divide the {share} images of one of {world} ranks"
        )
    alignment = getattr(config, "alignment", None)
    paired = "contrastive_weight" if getattr(config, "contrastive_weight", 0) else None
    paired = paired or ("alignment.manifold_weight" if alignment and alignment.manifold_weight else None)
    if paired and micro % 2:
        raise ConfigError(
            f"{stage}.{paired} pairs the samples of a micro-batch, of which there are {micro}; make "
            f"{stage}.micro_batch_size even"
        )
    parts, by_area = config.batch_size // micro, getattr(config, "batch_by_area", None)
    if by_area and by_area % parts:
        raise ConfigError(
            f"{stage}.batch_by_area is {by_area}, which the {parts} micro-batches of a step ({world} ranks times "
            f"{share // micro}) cannot share evenly; make it a multiple of {parts}"
        )
    if by_area and paired and by_area // parts % 2:
        raise ConfigError(
            f"{stage}.{paired} pairs the samples of a micro-batch; make {stage}.batch_by_area a multiple of {2 * parts}"
        )
    return micro, share // micro
