"""What a user sets for the three fits: `autoencoder`, `clip` and `train` of a run's YAML.

Lengths, schedules and intervals are counted in images seen, so they keep their meaning when the batch
size changes. Settings of DeepSpeed that are known to give wrong results (round_robin_gradients) have no
name here and so cannot be set.
"""

from __future__ import annotations

import enum
import logging
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from shards.selection import Rule
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


STAGES = ("autoencoder", "clip", "train")

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
        default=10, ge=1, description="skipped steps in a row after which the weights go back to the last checkpoint"
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
        description="torch.compile: true for the whole model, once for each shape of pictures; blocks for its repeated "
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


Side = Annotated[int, Field(ge=8, le=2048)]


class PerceptualConfig(Strict):
    """How unlike picture and reconstruction look to a frozen network (Zhang et al. 2018, arXiv:1801.03924)."""

    weights: str = Field(
        min_length=1,
        description="a .safetensors file of LPIPS, a folder of transformers with a vision tower, or an open_clip model",
    )
    weight: float = Field(default=1.0, gt=0)


class AdversarialConfig(Strict):
    """A discriminator of patches that learns beside the VAE (VQGAN, Esser et al. 2021, arXiv:2012.09841)."""

    weight: float = Field(
        default=0.5, gt=0, description="of the discriminator's gradient; adaptive: relative to the reconstruction's"
    )
    adaptive: bool = Field(
        default=True,
        description="the gradient that a picture's adversarial term gives the decoder's last layer is made as long as "
        "that of its reconstruction, before it gets its weight",
    )
    start_images: int = Field(default=0, ge=0, description="images before which it neither learns nor counts")
    channels: int = Field(
        default=64, ge=8, le=512, multiple_of=8, description="of its first layer; they double up to eight times"
    )
    layers: int = Field(default=3, ge=1, le=6, description="that halve the picture; 3 see patches of 70 pixels")

    @property
    def smallest(self) -> int:
        """The side, in pixels, of the smallest picture: two convolutions behind the halvings take a place each."""
        return 3 * 2**self.layers


class AutoencoderConfig(FitConfig):
    """A diffusers AutoencoderKL: mean absolute and squared error, KL, a perceptual and an adversarial term, as in
    latent diffusion (Rombach 2022)."""

    pretrained: str | None = Field(default=None, description="weights to use instead; then nothing is fitted")
    images: FromHereOn[int] = Field(default=1_000_000, ge=1)
    batch_size: FromHereOn[int] = Field(default=64, ge=1)
    resolution: FromHereOn[Side | tuple[Side, ...]] = Field(
        default=256, description="pictures are fitted to this square, in pixels; of several, batches take turns"
    )
    model: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.AutoencoderKL")
    start_from: str | None = Field(
        default=None,
        description="begin with this VAE (a diffusers folder, a file, a hub name) in place of `model`",
    )
    frozen_encoder: bool = Field(
        default=False, description="the decoder of start_from alone learns, so that latents stay what they are"
    )
    initialisation: Literal["torch", "thumbnail"] = Field(
        default="torch", description="thumbnail: begins as 'shrink, enlarge' and needs far fewer pictures"
    )
    l1_weight: FromHereOn[float] = Field(default=1.0, ge=0)
    mse_weight: FromHereOn[float] = Field(default=0.0, ge=0)
    kl_weight: FromHereOn[float] = Field(
        default=1e-6, ge=0, description="times the KL in nats, per value of the picture"
    )
    perceptual: PerceptualConfig | None = Field(default=None, description="a perceptual term beside l1 and mse")
    adversarial: AdversarialConfig | None = Field(default=None, description="a discriminator makes pictures sharp")
    measure_shift: bool = Field(
        default=False,
        description="write the latents' mean as shift_factor beside scaling_factor, so that they are centred as well",
    )
    cache_bytes: Operational[int] = Field(default=1 << 30, ge=0, description="decoded pictures kept in memory, a rank")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The sides of the squares, the largest first."""
        given = (self.resolution,) if isinstance(self.resolution, int) else self.resolution
        return tuple(sorted(given, reverse=True))

    @model_validator(mode="after")
    def _terms(self) -> Self:
        if len(set(self.resolutions)) < len(self.resolutions) or not self.resolutions:
            raise ValueError("resolution names one resolution twice, or none; give each once")
        if self.adversarial and self.resolutions[-1] < self.adversarial.smallest:
            raise ValueError(
                f"a discriminator of {self.adversarial.layers} layers needs {self.adversarial.smallest} pixels, and "
                f"the resolution is {self.resolutions[-1]}; make adversarial.layers fewer"
            )
        if self.adversarial and self.adversarial.start_images and self.spike_sigmas:
            raise ValueError(
                "spike_sigmas would take the start of the adversarial term for a spike; leave it out, or set "
                "adversarial.start_images to 0"
            )
        if self.measure_shift and self.frozen_encoder:
            raise ValueError("frozen_encoder keeps the latents' scale and shift; leave measure_shift out")
        return self

    @model_validator(mode="after")
    def _beginning(self) -> Self:
        if self.frozen_encoder and not self.start_from:
            raise ValueError("frozen_encoder needs a VAE that is there; name it with start_from")
        if self.start_from and (self.model or self.initialisation != "torch"):
            raise ValueError("model and initialisation are given by start_from; leave them out")
        return self


class ClipConfig(FitConfig):
    """An open_clip model, fitted with CLIP's contrastive loss over the global batch (Radford 2021)."""

    pretrained: str | None = Field(default=None, description="weights to use instead; then nothing is fitted")
    images: FromHereOn[int] = Field(default=1_000_000, ge=1)
    batch_size: FromHereOn[int] = Field(default=256, ge=2)
    model: dict[str, Any] = Field(
        default_factory=dict, description="open_clip's model_cfg: embed_dim, vision_cfg, text_cfg"
    )
    initialisation: Literal["open_clip", "spread"] = Field(
        default="open_clip",
        description="spread: words, and places in a caption, begin far apart, so that a short fit does not blur them",
    )
    wrong_captions: str | None = Field(
        default=None,
        description="column of the image shards with texts that are no captions of the image, which must tell them "
        "apart from its own: its words exchanged, say (NegCLIP, Yuksekgonul et al. 2023)",
    )
    cache_bytes: Operational[int] = Field(default=1 << 30, ge=0, description="decoded pictures kept in memory, a rank")

    @model_validator(mode="after")
    def _whole_batch(self) -> Self:
        if self.micro_batch_size is not None:
            raise ValueError("micro_batch_size cannot be set for clip: its loss needs the whole batch at once")
        return self


class SourceConfig(Strict):
    """One of the data sets that `train` mixes."""

    latents: str | None = Field(default=None, description="folder of latent shards; null: the run's own")
    weight: float = Field(default=1.0, gt=0, description="its share of the samples, relative to the others'")
    loss_weight: float = Field(
        default=1.0, ge=0, description="of its samples' loss; DreamBooth's lambda for the prior's pictures"
    )
    select: tuple[Rule, ...] = Field(
        default=(),
        description="rules on scores beside those of train.select; the same latents named several times, with rules "
        "and weights of their own, are sampled by weights that depend on a score",
    )

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return found if self.select else {k: v for k, v in found.items() if k != "select"}


PRIOR = "prior"  # stands for the latents of the pictures of `prior`, in place of a folder


class PriorConfig(Strict):
    """DreamBooth's prior preservation (Ruiz 2022): pictures of the class, drawn by start_from before it is trained."""

    prompt: str = Field(min_length=1, max_length=2000, description="of the class, such as `a photo of a dog`")
    count: int = Field(ge=1, le=100_000, description="pictures of it; the paper has 200 for each of one's own")
    weight: float = Field(default=1.0, gt=0, description="their share of the samples, relative to the sources'")
    loss_weight: float = Field(default=1.0, ge=0, description="of their loss: the paper's lambda")
    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = Field(default=7.5, ge=0, le=100)
    batch_size: int = Field(default=8, ge=1, le=4096, description="pictures that are drawn at once")


class AdapterConfig(Strict):
    """Low-rank updates in place of all weights, by peft: LoRA (Hu 2021), LoCon (on convolutions too; Yeh 2023), LoHa
    (Hyeon-Woo 2021) or LoKr (Yeh 2023)."""

    kind: Literal["lora", "locon", "loha", "lokr"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: int | None = Field(default=None, ge=1, description="the update is scaled by alpha / rank; null: rank")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="ends of the names of adapted layers"
    )
    convolutions: bool = Field(
        default=False, description="adapt the convolutions of the residual blocks too, as locon always does"
    )
    dora: bool = Field(
        default=False,
        description="lora, locon: learn outputs' magnitudes apart from directions (DoRA, Liu 2024)",
    )
    start_from: str | None = Field(
        default=None,
        description="lora, locon: go on from this safetensors file, in kohya's (A1111's), diffusers' or peft's names",
    )

    @model_validator(mode="after")
    def _of_lora(self) -> Self:
        for name in ("dora", "start_from"):
            if getattr(self, name) and self.kind not in ("lora", "locon"):
                raise ValueError(f"{name} is for lora and locon alone, not for {self.kind}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what adapters had no choice of once, so that their settings' fingerprint stays what it was."""
        found: dict[str, Any] = dump(self)
        return {k: v for k, v in found.items() if v or k not in ("dora", "start_from")}

    @property
    def is_lora(self) -> bool:
        """Whether diffusers' load_lora_weights reads what comes out."""
        return self.kind in ("lora", "locon")


class TextEncoderConfig(Strict):
    """The text encoder learns with the UNet: all of it, or by a LoRA on its attention."""

    kind: Literal["lora", "full"] = "lora"
    rank: int = Field(default=8, ge=1, description="of the LoRA")
    alpha: int | None = Field(default=None, ge=1, description="the update is scaled by alpha / rank; null: rank")


class InversionConfig(Strict):
    """Textual Inversion (Gal 2022): new words are learned, everything else is frozen."""

    token: str = Field(min_length=1, description="how prompts will name the new word, such as <statue>")
    initial: str = Field(min_length=1, description="a word that comes near it; its embedding is where it begins")
    vectors: int = Field(default=1, ge=1, le=16, description="embeddings that the token stands for")
    templates: tuple[str, ...] = Field(
        default=("a photo of {}", "a rendering of {}", "a close-up of {}", "{}"),
        min_length=1,
        description="captions in place of the stored ones; {} is where the token goes",
    )

    @field_validator("templates")
    @classmethod
    def _has_placeholder(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(t.count("{}") == 1 for t in value):
            raise ValueError("each of templates must have one {} for the token")
        return value


class InpaintConfig(Strict):
    """Inpainting, as Stable Diffusion's: the UNet is given a mask, drawn anew for every sample, and the latents of the
    picture without what lies under it."""

    whole: float = Field(default=0.25, ge=0, le=1, description="share of masks that cover everything")


class EditConfig(Strict):
    """Editing by instruction (InstructPix2Pix, Brooks 2023): the UNet is given the latents of the picture before."""

    before: str = Field(
        default="before",
        min_length=1,
        description="a run beside or within that of the latents, whose images are, by key, the pictures before; a "
        "relative path is relative to the run of the latents",
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of pictures before that are left out, half of them with the caption"
    )


class UpscaleConfig(Strict):
    """A decoder for small pictures, as Stable Diffusion's x4 upscaler: the UNet is given the picture at the latents'
    size, with noise of a level that it is given too (Ho 2021, arXiv:2106.15282), and draws it as large as the VAE does.
    """

    max_noise_level: int = Field(
        default=350, ge=1, le=1000, description="of 1000; each sample's small picture has noise of a level below it"
    )


class ControlConfig(Strict):
    """ControlNet (Zhang 2023): a second network, given a control image, steers the frozen UNet of start_from."""

    kind: Literal["canny", "sketch", "blur", "gray"] = Field(
        default="canny", description="how control images are made of the pictures that are trained on"
    )
    images: str | None = Field(
        default=None,
        min_length=1,
        description="a run whose images are, by key, the control images, in place of `kind`; a relative path is "
        "relative to the run of the latents",
    )
    low: float = Field(default=100.0, ge=0, description="of canny: edges weaker than this are none")
    high: float = Field(default=200.0, gt=0, description="of canny: edges stronger than this are ones")
    radius: float = Field(default=0.02, gt=0, le=1, description="of blur and sketch: in sides of the picture")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of control images that are left black")

    @model_validator(mode="after")
    def _thresholds(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class AlignmentConfig(Strict):
    """U-REPA (Tian 2025, arXiv:2503.18414): a block's features come near to those of a frozen vision tower."""

    weight: float = Field(default=0.5, gt=0, description="of both losses, beside that of the prediction")
    manifold_weight: float = Field(
        default=3.0, ge=0, description="of the loss by which places are as alike as in the tower, beside the cosine's"
    )
    block: str = Field(
        default="mid_block",
        pattern=r"^(mid_block|(down|up)_blocks\.\d{1,2})$",
        description="whose output is aligned: mid_block, down_blocks.N or up_blocks.N",
    )
    hidden: int = Field(default=2048, ge=1, le=16384, description="width of the projector's inner layers")
    until_images: int | None = Field(
        default=None, ge=1, description="images from which on it no longer counts; null: it counts to the end"
    )


class ValidationConfig(Strict):
    """The loss on pictures that are never trained on, always the same with the same noise and timesteps."""

    images: int = Field(default=256, ge=1)
    every_images: int = Field(default=100_000, ge=1)
    latents: str | None = Field(
        default=None, description="folder of latent shards; null: the run's held-out pictures, encoded at the start"
    )
    export: Literal["newest", "best"] = Field(
        default="newest", description="which checkpoint becomes the model in the end; that of the lowest loss is kept"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop early after so many validations without a new lowest loss"
    )


class SamplesConfig(Strict):
    """Pictures from the EMA of every checkpoint, as a grid in TensorBoard and in <run>/train/samples/."""

    prompts: tuple[str, ...] = Field(min_length=1, max_length=64)
    steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=3.0, ge=0)
    seed: int = Field(default=0, ge=0)


IMAGE_CONDITIONS = ("inpaint", "edit", "upscale", "control")  # fields of TrainConfig


class TrainConfig(FitConfig):
    """A conditional UNet on latents: DDPM (Ho 2020) with classifier-free guidance dropout (Ho & Salimans 2022)."""

    images: FromHereOn[int] = Field(default=10_000_000, ge=1)
    batch_size: FromHereOn[int] = Field(default=256, ge=1)
    unet: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.UNet2DConditionModel")
    start_from: str | None = Field(
        default=None, description="begin with the UNet of this diffusers pipeline (a folder, or a name on the hub)"
    )
    initialisation: Literal["torch", "zero"] = Field(
        default="zero", description="zero: residual branches and the output begin at zero, as in Ho 2020"
    )
    adapter: AdapterConfig | None = Field(default=None, description="train low-rank updates of start_from alone")
    text_encoder: TextEncoderConfig | None = Field(
        default=None, description="the text encoder of the latents learns too; null: it is frozen"
    )
    textual_inversion: InversionConfig | None = Field(default=None, description="learn a word for start_from alone")
    inpaint: InpaintConfig | None = Field(default=None, description="the UNet is given a mask and what lies around it")
    edit: EditConfig | None = Field(default=None, description="the UNet is given the picture that a caption changes")
    upscale: UpscaleConfig | None = Field(default=None, description="the UNet is given the picture made small")
    control: ControlConfig | None = Field(default=None, description="train a ControlNet beside start_from")
    sources: FromHereOn[tuple[SourceConfig, ...]] = Field(
        default=(SourceConfig(),), min_length=1, description="data sets mixed by weight; by default the run's latents"
    )
    prior: FromHereOn[PriorConfig | None] = Field(
        default=None, description="one source more: pictures that start_from draws of a prompt"
    )
    resolution: FromHereOn[Annotated[int, Field(ge=8)] | tuple[Annotated[int, Field(ge=8)], ...] | None] = Field(
        default=None, description="which of the latents' resolutions, in pixels, one or several; null: the main one"
    )
    batch_by_area: FromHereOn[int | None] = Field(
        default=None,
        ge=1,
        description="batch_size is that of the smallest bucket; larger ones get fewer, in multiples of this",
    )
    captions: FromHereOn[dict[str, Annotated[float, Field(gt=0)]] | None] = Field(
        default=None,
        min_length=1,
        description="columns of the latents' sidecar from which each sample's caption is drawn anew, and their weights",
    )
    select: FromHereOn[tuple[Rule, ...]] = Field(
        default=(),
        description="rules on scores that a sample must pass; the place of one that does not goes to a sample of its "
        "window that does",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = Field(
        default="epsilon", description="flow_prediction: rectified flow, whose straight path has no betas"
    )
    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    zero_terminal_snr: bool = Field(default=False, description="the last timestep is pure noise (Lin 2023)")
    snr_shift: float = Field(
        default=1.0, gt=0, le=100, description="divides the SNR by its square; larger pictures need more noise"
    )
    timestep_sampling: FromHereOn[Literal["uniform", "logit_normal"]] = "uniform"
    stratified: FromHereOn[bool] = Field(default=False, description="spread a batch's timesteps evenly (Kingma 2021)")
    logit_mean: FromHereOn[float] = Field(
        default=0.0, ge=-10, le=10, description="of logit_normal; above 0 leans towards noise"
    )
    logit_std: FromHereOn[float] = Field(default=1.0, gt=0, le=10)
    snr_gamma: FromHereOn[float | None] = Field(
        default=None, gt=0, description="min-SNR loss weight (Hang 2023); null for none"
    )
    p2_gamma: FromHereOn[float | None] = Field(
        default=None, gt=0, description="P2 loss weight (Choi 2022); null for none"
    )
    flip: FromHereOn[bool] = Field(
        default=False,
        description="each sample mirrored or not, by its own draw; needs latents.flip, and captions that name no sides",
    )
    noise_candidates: FromHereOn[int] = Field(
        default=1,
        ge=1,
        le=1024,
        description="each sample's noise is the nearest to it of so many draws (immiscible diffusion, Li 2025)",
    )
    contrastive_weight: FromHereOn[float] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="of the distance from another sample's target, which is subtracted (contrastive flow matching, "
        "Stoica 2025; the paper's weight is 0.05)",
    )
    alignment: AlignmentConfig | None = Field(
        default=None, description="align a block with a vision tower; needs latents.features"
    )
    offset_noise: FromHereOn[float] = Field(
        default=0.0, ge=0, le=1, description="noise common to a channel (Guttenberg 2023)"
    )
    learned_variance: bool = Field(
        default=False, description="the UNet gives the variance too: L_simple + vlb_weight L_vlb (Nichol 2021)"
    )
    vlb_weight: FromHereOn[float] = Field(
        default=0.001, gt=0, description="of L_vlb, in bits a value over all timesteps"
    )
    caption_dropout: FromHereOn[float] = Field(
        default=0.1, ge=0, lt=1, description="share of captions replaced by the empty one"
    )
    licence: Operational[str | None] = Field(
        default=None, description="of the weights, for the model card of what is exported"
    )
    validation: Operational[ValidationConfig | None] = None
    samples: Operational[SamplesConfig | None] = None

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The data sets that are mixed: `sources`, and behind them the pictures of `prior`, whose latents are PRIOR."""
        if self.prior is None:
            return self.sources
        prior = SourceConfig(latents=PRIOR, weight=self.prior.weight, loss_weight=self.prior.loss_weight)
        return (*self.sources, prior)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions to train at; none where it is the latents' main one."""
        if self.resolution is None:
            return ()
        return (self.resolution,) if isinstance(self.resolution, int) else self.resolution

    @property
    def conditioned_by(self) -> str | None:
        """The field by which the UNet is given a picture (image_conditioning.py); None where it is given none."""
        return next((name for name in IMAGE_CONDITIONS if getattr(self, name)), None)

    @model_validator(mode="after")
    def _image_conditions(self) -> Self:
        names = [name for name in IMAGE_CONDITIONS if getattr(self, name)]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are two ways to be given a picture; set one of them")
        if not names:
            return self
        for other in ("textual_inversion", *(("adapter", "text_encoder") if self.control else ())):
            if getattr(self, other):
                raise ValueError(f"{names[0]} and {other} are two ways to fine-tune; set one of them")
        if self.flip:
            raise ValueError(f"flip cannot go with {names[0]}, whose pictures are given as they lie; leave it out")
        if self.control and not self.start_from:
            raise ValueError("control steers a model that is there; name it with start_from")
        if self.samples:
            raise ValueError(
                f"samples are drawn from prompts alone, and with {names[0]} a picture is given too; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _batches(self) -> Self:
        if len(set(self.resolutions)) < len(self.resolutions) or self.resolution == ():
            raise ValueError("resolution names one resolution twice, or none; give each once")
        if self.batch_by_area and self.batch_size % self.batch_by_area:
            raise ValueError(
                f"batch_size ({self.batch_size}) is not a multiple of batch_by_area ({self.batch_by_area})"
            )
        return self

    @model_validator(mode="after")
    def _process(self, info: ValidationInfo) -> Self:
        flow = self.prediction_type == "flow_prediction"
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end ({self.beta_end}) is below beta_start ({self.beta_start})")
        if self.zero_terminal_snr and (flow or self.prediction_type == "epsilon"):
            why = "ends in pure noise by itself" if flow else "says nothing of x_0 where there is only noise"
            raise ValueError(f"zero_terminal_snr cannot go with prediction_type {self.prediction_type}, which {why}")
        if self.snr_gamma and self.p2_gamma:
            raise ValueError("snr_gamma and p2_gamma are two weights for the same loss; set one of them")
        # What was trained before these two were refused is opened all the same.
        new = not (info.context or {}).get("stored")
        if new and (self.snr_gamma or self.p2_gamma) and (flow or self.zero_terminal_snr):
            name = "snr_gamma" if self.snr_gamma else "p2_gamma"
            why = "prediction_type flow_prediction" if flow else "zero_terminal_snr"
            raise ValueError(
                f"{name} gives the last timestep no weight under {why}, where it is pure noise, and pictures are drawn "
                f"from there; leave {name} out"
            )
        if new and self.learned_variance and self.offset_noise:
            raise ValueError("learned_variance learns the variance of plain noise; set offset_noise to 0")
        if self.learned_variance and self.noise_candidates > 1:
            raise ValueError("learned_variance learns the variance of plain noise; set noise_candidates to 1")
        if self.contrastive_weight and not flow:
            raise ValueError(
                f"contrastive_weight is of flow_prediction's targets; prediction_type is {self.prediction_type}"
            )
        if self.learned_variance and (flow or self.zero_terminal_snr):
            raise ValueError("learned_variance needs the steps of DDPM: no flow_prediction and no zero_terminal_snr")
        return self

    @model_validator(mode="after")
    def _tuning(self) -> Self:
        for name in ("adapter", "text_encoder", "textual_inversion"):
            if getattr(self, name) and not self.start_from:
                raise ValueError(f"{name} changes a model that is there; name it with start_from")
        if (self.adapter or self.text_encoder or self.textual_inversion) and self.optimizer == "muon":
            raise ValueError("optimizer muon is for the matrices of a whole model; with an adapter or a word use adamw")
        for name in ("adapter", "text_encoder"):
            if getattr(self, name) and self.textual_inversion:
                raise ValueError(f"{name} and textual_inversion are two ways to fine-tune; set one of them")
        if self.prior and not self.start_from:
            raise ValueError("prior's pictures are drawn by a model that is there; name it with start_from")
        beside = [n for n in ("textual_inversion", "edit") if getattr(self, n)]
        beside += ["control.images"] if self.control and self.control.images else []
        beside += [f"captions.{n}" for n in self.captions or () if n != "caption"]
        if self.prior and beside:
            raise ValueError(f"prior cannot go with {beside[0]}: its pictures have their prompt and nothing beside it")
        if self.captions and self.textual_inversion:
            raise ValueError("captions cannot go with textual_inversion, whose templates are its captions")
        beside = [n for n in ("adapter", "textual_inversion", "control") if getattr(self, n)]
        if self.alignment and beside:
            raise ValueError(f"alignment is for a UNet all of which learns, and with {beside[0]} it does not")
        if self.start_from and self.unet:
            raise ValueError("unet is given by start_from; leave one of them out")
        return self


def stored_config(data: dict[str, Any]) -> TrainConfig:
    """The `train` section as a checkpoint keeps it, also of an older version: settings that are gone are left out."""
    known = {k: v for k, v in data.items() if k in TrainConfig.model_fields}
    return TrainConfig.model_validate(known, context={"stored": True})


class TrainingSections(Strict):
    """The sections of a run's YAML that this folder reads."""

    run: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    clip: ClipConfig = ClipConfig()
    train: TrainConfig = TrainConfig()


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
