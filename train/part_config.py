"""The parts of the section `train`: its sources, ways to tune a model, images that it is given, what is looked at."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from shards.selection import Rule
from shards.settings import Strict


class SourceConfig(Strict):
    """One of the data sets that `train` mixes."""

    latents: str | None = Field(default=None, description="folder of latent shards; null: the run's own")
    weight: float = Field(default=1.0, gt=0, description="its share of the samples, relative to the others'")
    loss_weight: float = Field(
        default=1.0, ge=0, description="of its samples' loss; DreamBooth's lambda for the prior's images"
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


PRIOR = "prior"  # stands for the latents of the images of `prior`, in place of a folder


class PriorConfig(Strict):
    """DreamBooth's prior preservation (Ruiz 2022): images of the class, drawn by start_from before it is trained."""

    prompt: str = Field(min_length=1, max_length=2000, description="of the class, such as `a photo of a dog`")
    count: int = Field(ge=1, le=100_000, description="images of it; the paper has 200 for each of one's own")
    weight: float = Field(default=1.0, gt=0, description="their share of the samples, relative to the sources'")
    loss_weight: float = Field(default=1.0, ge=0, description="of their loss: the paper's lambda")
    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = Field(default=7.5, ge=0, le=100)
    batch_size: int = Field(default=8, ge=1, le=4096, description="images that are drawn at once")


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
        default=False, description="lora, locon: learn outputs' magnitudes apart from directions (DoRA, Liu 2024)"
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
    image without what lies under it."""

    whole: float = Field(default=0.25, ge=0, le=1, description="share of masks that cover everything")


class EditConfig(Strict):
    """Editing by instruction (InstructPix2Pix, Brooks 2023): the UNet is given the latents of the image before."""

    before: str = Field(
        default="before",
        min_length=1,
        description="a run beside or within that of the latents, whose images are, by key, the images before; a "
        "relative path is relative to the run of the latents",
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of images before that are left out, half of them with the caption"
    )


class UpscaleConfig(Strict):
    """A decoder for small images, as Stable Diffusion's x4 upscaler: the UNet is given the image at the latents'
    size, with noise of a level that it is given too (Ho 2021, arXiv:2106.15282), and draws it as large as the VAE does.
    """

    max_noise_level: int = Field(
        default=350, ge=1, le=1000, description="of 1000; each sample's small image has noise of a level below it"
    )


class ControlConfig(Strict):
    """ControlNet (Zhang 2023): a second network, given a control image, steers the frozen UNet of start_from."""

    kind: Literal["canny", "sketch", "blur", "gray"] = Field(
        default="canny", description="how control images are made of the images that are trained on"
    )
    images: str | None = Field(
        default=None,
        min_length=1,
        description="a run whose images are, by key, the control images, in place of `kind`; a relative path is "
        "relative to the run of the latents",
    )
    low: float = Field(default=100.0, ge=0, description="of canny: edges weaker than this are none")
    high: float = Field(default=200.0, gt=0, description="of canny: edges stronger than this are ones")
    radius: float = Field(default=0.02, gt=0, le=1, description="of blur and sketch: in sides of the image")
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
    """The loss on images that are never trained on, always the same with the same noise and timesteps."""

    images: int = Field(default=256, ge=1)
    every_images: int = Field(default=100_000, ge=1)
    latents: str | None = Field(
        default=None, description="folder of latent shards; null: the run's held-out images, encoded at the start"
    )
    export: Literal["newest", "best"] = Field(
        default="newest", description="which checkpoint becomes the model in the end; that of the lowest loss is kept"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop early after so many validations without a new lowest loss"
    )


class SamplesConfig(Strict):
    """Images from the EMA of every checkpoint, as a grid in TensorBoard and in <run>/train/samples/."""

    prompts: tuple[str, ...] = Field(min_length=1, max_length=64)
    steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=3.0, ge=0)
    seed: int = Field(default=0, ge=0)
