"""What a user sets for the fit of the UNet, `train` of a run's YAML, and all the sections that this folder reads.

What every fit has is in fit_config.py, the autoencoder's and CLIP's in encoder_config.py, parts of
`train` in part_config.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from shards.selection import Rule
from shards.settings import Strict
from train.encoder_config import AutoencoderConfig, ClipConfig
from train.fit_config import FitConfig, FromHereOn, Operational
from train.part_config import (
    PRIOR,
    AdapterConfig,
    AlignmentConfig,
    ControlConfig,
    EditConfig,
    InpaintConfig,
    InversionConfig,
    PriorConfig,
    SamplesConfig,
    SourceConfig,
    TextEncoderConfig,
    UpscaleConfig,
    ValidationConfig,
)
from train.predictions import PREDICTIONS, PredictionType

STAGES = ("autoencoder", "clip", "train")
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
    edit: EditConfig | None = Field(default=None, description="the UNet is given the image that a caption changes")
    upscale: UpscaleConfig | None = Field(default=None, description="the UNet is given the image made small")
    control: ControlConfig | None = Field(default=None, description="train a ControlNet beside start_from")
    sources: FromHereOn[tuple[SourceConfig, ...]] = Field(
        default=(SourceConfig(),), min_length=1, description="data sets mixed by weight; by default the run's latents"
    )
    prior: FromHereOn[PriorConfig | None] = Field(
        default=None, description="one source more: images that start_from draws of a prompt"
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
    prediction_type: PredictionType = Field(
        default="epsilon", description="flow_prediction: rectified flow, whose straight path has no betas"
    )
    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    zero_terminal_snr: bool = Field(default=False, description="the last timestep is pure noise (Lin 2023)")
    snr_shift: float = Field(
        default=1.0, gt=0, le=100, description="divides the SNR by its square; larger images need more noise"
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
        """The data sets that are mixed: `sources`, and behind them the images of `prior`, whose latents are PRIOR."""
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
        """The field by which the UNet is given an image (image_conditioning.py); None where it is given none."""
        return next((name for name in IMAGE_CONDITIONS if getattr(self, name)), None)

    @model_validator(mode="after")
    def _image_conditions(self) -> Self:
        names = [name for name in IMAGE_CONDITIONS if getattr(self, name)]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are two ways to be given an image; set one of them")
        if not names:
            return self
        for other in ("textual_inversion", *(("adapter", "text_encoder") if self.control else ())):
            if getattr(self, other):
                raise ValueError(f"{names[0]} and {other} are two ways to fine-tune; set one of them")
        if self.flip:
            raise ValueError(f"flip cannot go with {names[0]}, whose images are given as they lie; leave it out")
        if self.control and not self.start_from:
            raise ValueError("control steers a model that is there; name it with start_from")
        if self.samples:
            raise ValueError(
                f"samples are drawn from prompts alone, and with {names[0]} an image is given too; leave it out"
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
        prediction = PREDICTIONS[self.prediction_type]
        flow = prediction.flow
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end ({self.beta_end}) is below beta_start ({self.beta_start})")
        if self.zero_terminal_snr and (flow or prediction.needs_signal):
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
                f"{name} gives the last timestep no weight under {why}, where it is pure noise, and images are drawn "
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
        # A whole text encoder may learn beside a new UNet, as the first latent diffusion models had it (Rombach 2022).
        text = self.text_encoder if self.text_encoder and self.text_encoder.kind == "lora" else None
        for name, part in (
            ("adapter", self.adapter),
            ("text_encoder", text),
            ("textual_inversion", self.textual_inversion),
        ):
            if part and not self.start_from:
                raise ValueError(f"{name} changes a model that is there; name it with start_from")
            if part and self.optimizer == "muon":
                raise ValueError(
                    f"optimizer muon is for the matrices of a whole model; with {name}'s few weights use adamw"
                )
        for name in ("adapter", "text_encoder"):
            if getattr(self, name) and self.textual_inversion:
                raise ValueError(f"{name} and textual_inversion are two ways to fine-tune; set one of them")
        if self.prior and not self.start_from:
            raise ValueError("prior's images are drawn by a model that is there; name it with start_from")
        beside = [n for n in ("textual_inversion", "edit") if getattr(self, n)]
        beside += ["control.images"] if self.control and self.control.images else []
        beside += [f"captions.{n}" for n in self.captions or () if n != "caption"]
        if self.prior and beside:
            raise ValueError(f"prior cannot go with {beside[0]}: its images have their prompt and nothing beside it")
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
