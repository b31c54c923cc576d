"""What a user sets for the three fits: `autoencoder`, `clip` and `train` of a run's YAML.

Lengths, schedules and intervals are counted in images seen, so they keep their meaning when the batch
size changes. Settings of DeepSpeed that are known to give wrong results (round_robin_gradients) have no
name here and so cannot be set.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from shards.settings import ConfigError, Strict

# Settings that say where and how fast the work happens, or what is kept of it, but not what comes out.
# (Another number of ranks changes the order of floating-point sums, hence the last bits, but no sample.)
OPERATIONAL = (
    "micro_batch_size",
    "zero_stage",
    "ranks",
    "threads",
    "checkpoint_every_images",
    "keep_checkpoints",
    "log_every_images",
    "channels_last",
    "prefetch",
    "cache_bytes",
)

STAGES = ("autoencoder", "clip", "train")


class FitConfig(Strict):
    """What every fit has. All sizes and intervals are in images; rates are per step."""

    images: int = Field(ge=1, description="images to see in total; the clock of everything else")
    batch_size: int = Field(ge=1, description="the GLOBAL batch of one optimizer step, over all ranks")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="what one rank computes at once; the rest of its share is accumulated"
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    warmup_images: int = Field(default=0, ge=0, description="linear from 0 to learning_rate")
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="cosine ends at this share of learning_rate")
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled; not on biases, norms and scalars")
    grad_clip: float | None = Field(default=1.0, gt=0, description="largest global gradient norm; null for none")
    ema_halflife_images: int = Field(
        default=500_000, ge=1, description="images after which a weight in the EMA has halved"
    )
    ema_rampup: float | None = Field(
        default=0.05, gt=0, le=1, description="early on the half-life is at most this share of the images seen"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="arithmetic under autocast; weights, moments and EMA are always fp32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(default=1, description="what DeepSpeed shares out over the ranks")
    ranks: int = Field(
        default=1, ge=1, description="processes that `carrara` starts (launchers bring their own number)"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads a rank; null: the cores shared out evenly")
    checkpoint_every_images: int = Field(default=1_000_000, ge=1)
    keep_checkpoints: int = Field(default=3, ge=2, description="how many of the newest are kept (two at least)")
    log_every_images: int = Field(default=10_000, ge=1)
    channels_last: bool = Field(
        default=False, description="activations in NHWC; the weights lie in DeepSpeed's flat buffers either way"
    )
    shuffle_window: int = Field(default=16, ge=1, description="shards whose rows are mixed with one another")
    prefetch: int = Field(default=3, ge=1, le=64, description="micro-batches made ahead of the loop")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError("both betas must be at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _clock(self) -> Self:
        if self.warmup_images > self.images:
            raise ValueError(f"warmup_images ({self.warmup_images}) is longer than images ({self.images})")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps in all; the last one may go beyond `images` by less than a batch."""
        return -(-self.images // self.batch_size)

    def settings(self) -> dict[str, Any]:
        """The settings that decide what comes out, for the fingerprint."""
        return self.model_dump(mode="json", exclude=set(OPERATIONAL))


class AutoencoderConfig(FitConfig):
    """A diffusers AutoencoderKL: mean absolute and squared error, and KL, as in latent diffusion (Rombach 2022)."""

    pretrained: str | None = Field(default=None, description="weights to use instead; then nothing is fitted")
    images: int = Field(default=1_000_000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    resolution: int = Field(default=256, ge=8, le=2048, description="pictures are fitted to this square, in pixels")
    model: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.AutoencoderKL")
    initialisation: Literal["torch", "thumbnail"] = Field(
        default="torch", description="thumbnail: begins as 'shrink, enlarge' and needs far fewer pictures"
    )
    l1_weight: float = Field(default=1.0, ge=0)
    mse_weight: float = Field(default=0.0, ge=0)
    kl_weight: float = Field(default=1e-6, ge=0, description="times the KL in nats, per value of the picture")
    cache_bytes: int = Field(default=1 << 30, ge=0, description="decoded pictures kept in memory, a rank")


class ClipConfig(FitConfig):
    """An open_clip model, fitted with CLIP's contrastive loss over the global batch (Radford 2021)."""

    pretrained: str | None = Field(default=None, description="weights to use instead; then nothing is fitted")
    images: int = Field(default=1_000_000, ge=1)
    batch_size: int = Field(default=256, ge=2)
    model: dict[str, Any] = Field(
        default_factory=dict, description="open_clip's model_cfg: embed_dim, vision_cfg, text_cfg"
    )
    initialisation: Literal["open_clip", "spread"] = Field(
        default="open_clip", description="spread: words begin far apart, so that a short fit does not blur them"
    )
    cache_bytes: int = Field(default=1 << 30, ge=0, description="decoded pictures kept in memory, a rank")

    @model_validator(mode="after")
    def _whole_batch(self) -> Self:
        if self.micro_batch_size is not None:
            raise ValueError("micro_batch_size cannot be set for clip: its loss needs the whole batch at once")
        return self


class TrainConfig(FitConfig):
    """A conditional UNet on latents: DDPM (Ho 2020) with classifier-free guidance dropout (Ho & Salimans 2022)."""

    images: int = Field(default=10_000_000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    unet: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.UNet2DConditionModel")
    initialisation: Literal["torch", "zero"] = Field(
        default="zero", description="zero: residual branches and the output begin at zero, as in Ho 2020"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = Field(default=0.0, ge=-10, le=10, description="of logit_normal; above 0 leans towards noise")
    logit_std: float = Field(default=1.0, gt=0, le=10)
    snr_gamma: float | None = Field(default=None, gt=0, description="min-SNR loss weight (Hang 2023); null for none")
    caption_dropout: float = Field(default=0.1, ge=0, lt=1, description="share of captions replaced by the empty one")

    @model_validator(mode="after")
    def _betas_ordered(self) -> Self:
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end ({self.beta_end}) is below beta_start ({self.beta_start})")
        return self


class TrainingSections(Strict):
    """The sections of a run's YAML that this folder reads."""

    run: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    clip: ClipConfig = ClipConfig()
    train: TrainConfig = TrainConfig()


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
    return micro, share // micro
