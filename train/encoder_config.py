"""What a user sets for the fits of the encoders: `autoencoder` and `clip` of a run's YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shards.settings import Strict
from train.fit_config import FitConfig, FromHereOn, Operational

Side = Annotated[int, Field(ge=8, le=2048)]


class PerceptualConfig(Strict):
    """How unlike image and reconstruction look to a frozen network (Zhang et al. 2018, arXiv:1801.03924)."""

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
        description="the gradient that an image's adversarial term gives the decoder's last layer is made as long as "
        "that of its reconstruction, before it gets its weight",
    )
    start_images: int = Field(default=0, ge=0, description="images before which it neither learns nor counts")
    channels: int = Field(
        default=64, ge=8, le=512, multiple_of=8, description="of its first layer; they double up to eight times"
    )
    layers: int = Field(default=3, ge=1, le=6, description="that halve the image; 3 see patches of 70 pixels")

    @property
    def smallest(self) -> int:
        """The side, in pixels, of the smallest image: two convolutions behind the halvings take a place each."""
        return 3 * 2**self.layers


class AutoencoderConfig(FitConfig):
    """A diffusers AutoencoderKL: mean absolute and squared error, KL, a perceptual and an adversarial term, as in
    latent diffusion (Rombach 2022)."""

    pretrained: str | None = Field(default=None, description="weights to use instead; then nothing is fitted")
    images: FromHereOn[int] = Field(default=1_000_000, ge=1)
    batch_size: FromHereOn[int] = Field(default=64, ge=1)
    resolution: FromHereOn[Side | tuple[Side, ...]] = Field(
        default=256, description="images are fitted to this square, in pixels; of several, batches take turns"
    )
    model: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.AutoencoderKL")
    start_from: str | None = Field(
        default=None, description="begin with this VAE (a diffusers folder, a file, a hub name) in place of `model`"
    )
    frozen_encoder: bool = Field(
        default=False, description="the decoder of start_from alone learns, so that latents stay what they are"
    )
    initialisation: Literal["torch", "thumbnail"] = Field(
        default="torch", description="thumbnail: begins as 'shrink, enlarge' and needs far fewer images"
    )
    l1_weight: FromHereOn[float] = Field(default=1.0, ge=0)
    mse_weight: FromHereOn[float] = Field(default=0.0, ge=0)
    kl_weight: FromHereOn[float] = Field(default=1e-6, ge=0, description="times the KL in nats, per value of the image")
    perceptual: PerceptualConfig | None = Field(default=None, description="a perceptual term beside l1 and mse")
    adversarial: AdversarialConfig | None = Field(default=None, description="a discriminator makes images sharp")
    measure_shift: bool = Field(
        default=False,
        description="write the latents' mean as shift_factor beside scaling_factor, so that they are centred as well",
    )
    cache_bytes: Operational[int] = Field(default=1 << 30, ge=0, description="decoded images kept in memory, a rank")

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
    cache_bytes: Operational[int] = Field(default=1 << 30, ge=0, description="decoded images kept in memory, a rank")

    @model_validator(mode="after")
    def _whole_batch(self) -> Self:
        if self.micro_batch_size is not None:
            raise ValueError("micro_batch_size cannot be set for clip: its loss needs the whole batch at once")
        return self
