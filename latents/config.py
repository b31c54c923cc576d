"""What a user sets for the latents stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from latents.buckets import Bucket, make_buckets
from shards.selection import Rule
from shards.settings import Strict

# Where the work happens, and consent; everything else in LatentsConfig changes the bytes of a shard.
PLACEMENT = ("decode_threads", "device", "enlarge")


class BucketsConfig(Strict):
    """Aspect-ratio buckets (see buckets.py): shapes of about resolution**2 pixels in multiples of `step`."""

    step: int = Field(default=64, ge=8, le=1024, description="sides are multiples of it, in pixels")
    max_aspect: float = Field(default=2.0, ge=1, le=16, description="longest side over shortest")


class SecondClipConfig(Strict):
    """A CLIP beside the run's own, as SDXL's base model has it: the UNet reads what both make of a caption, side by
    side, and is given the text embedding of this one."""

    kind: Literal["second_clip"]
    pretrained: str = Field(min_length=1, description="as clip.pretrained names one")
    pad: Literal["zero", "end"] | None = Field(
        default=None, description="as text_pad; null: as tokenizer_2 of train.start_from has it, else zero"
    )


class SequenceConfig(Strict):
    """Any text encoder of transformers (T5, Gemma, ...) in place of the run's CLIP: its last states, as many as a
    caption has tokens, which the UNet attends to under a mask."""

    kind: Literal["transformers"]
    pretrained: str = Field(
        min_length=1,
        description="a folder with the model and its tokenizer, a diffusers pipeline's, or a hub name; safetensors",
    )
    max_length: int = Field(default=256, ge=2, le=4096, description="tokens that are read of a caption, at most")


class FeaturesConfig(Strict):
    """Features of an image's places by a frozen vision tower, beside its latent: what train.alignment brings a UNet's
    features near to (vision.py)."""

    pretrained: str = Field(
        min_length=1,
        description="a folder of transformers or a hub name (DINOv2, SigLIP, CLIP, ...), or an open_clip model; "
        "safetensors",
    )
    size: int | None = Field(
        default=None, ge=8, le=4096, description="side in pixels that images are brought to; null: the tower's own"
    )
    grid: int | None = Field(
        default=None, ge=1, le=256, description="places along a side that are stored; null: as many as the tower has"
    )


class LatentsConfig(Strict):
    """Settings of the latents stage. Resolutions are in pixels, `batch_size` in images of `resolution`."""

    resolution: int = Field(default=256, ge=8, le=4096, description="side of the square, or of one of the same area")
    more_resolutions: list[int] = Field(default=[], description="encoded too, from the same decoded images")
    buckets: BucketsConfig | None = Field(default=None, description="null: every image is cropped to the square")
    enlarge: bool = Field(
        default=False, description="make latents of a resolution above ingest.image_size: every image is enlarged"
    )
    batch_size: int = Field(default=32, ge=1, le=4096)
    moments: bool = Field(default=True, description="store the posterior's log-std too, so that epochs draw afresh")
    flip: bool = Field(
        default=False,
        description="store the moments of the mirrored image too, for train.flip: twice the encoding and the bytes",
    )
    crop: Literal["center", "random"] = Field(
        default="center",
        description="which part of an image is kept where not all of it fits: the middle, or one drawn by its key, the "
        "same at every resolution and whenever it is made",
    )
    features: FeaturesConfig | None = Field(
        default=None, description="store a vision tower's features too, for train.alignment; null: none"
    )
    text: Literal["tokens", "embeddings"] = "embeddings"
    text_layer: Literal["last", "penultimate", "last_no_norm", "penultimate_no_norm"] = Field(
        default="penultimate",
        description="the block whose output conditions the UNet, after the final norm or without: Stable Diffusion 1 "
        "has last, 2 penultimate, SDXL penultimate_no_norm",
    )
    text_pad: Literal["zero", "end"] | None = Field(
        default=None,
        description="what follows a caption's end token: id 0 (Stable Diffusion 2, SDXL's second encoder), or the end "
        "token again (Stable Diffusion 1, SDXL's first); null: as the tokenizer of train.start_from has it, else end "
        "with a second CLIP and zero without",
    )
    text_pooled: bool = Field(default=False, description="with embeddings: the CLIP's text embedding too, as for SDXL")
    text_encoder: SecondClipConfig | SequenceConfig | None = Field(
        default=None,
        discriminator="kind",
        description="what reads the captions beside the run's CLIP, or in its place; null: that CLIP alone",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="arithmetic of the encoders; what is not finite is encoded again in float32"
    )
    # One thread a worker: a matrix product's rounding may depend on the number of threads, and a cluster's
    # parallelism comes from workers. It is part of the fingerprint.
    threads: int = Field(default=1, ge=1, le=256, description="threads of the encoders in one worker")
    decode_threads: int = Field(default=2, ge=1, le=256, description="threads that decode images ahead")
    channels_last: bool = Field(default=False, description="memory layout of the VAE; often faster in half precision")
    compile: bool = Field(default=False, description="torch.compile the VAE's encoder; pays on a GPU, after a minute")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    select: list[Rule] = Field(
        default=[], description="rules on scores that an image must pass to be encoded; `carrara select` shows them"
    )
    captions: list[str] = Field(
        default=[], description="sets of new captions, of curate.captions, that are laid beside for train.captions"
    )

    @model_validator(mode="after")
    def _shapes_exist(self) -> LatentsConfig:
        if len({self.resolution, *self.more_resolutions}) != 1 + len(self.more_resolutions):
            raise ValueError("resolution and more_resolutions must all be different")
        if any(not 8 <= r <= 4096 for r in self.more_resolutions):
            raise ValueError("more_resolutions must lie between 8 and 4096")
        step = self.buckets.step if self.buckets else 1
        for side in self.resolutions:
            if side % step:
                raise ValueError(f"with buckets every resolution must be a multiple of buckets.step; {side} is not")
        if self.text_pooled and self.text != "embeddings":
            raise ValueError("text_pooled needs text: embeddings; with tokens the trainer's own CLIP gives it")
        if self.sequence is not None:
            for name in ("text_layer", "text_pad", "text_pooled"):
                if name in self.model_fields_set and getattr(self, name):
                    raise ValueError(f"{name} is a CLIP's; with text_encoder {{kind: transformers}} leave it out")
        if self.second_clip is not None and self.text_layer != "penultimate_no_norm":
            raise ValueError(
                "two CLIPs side by side are read as SDXL reads them, with text_layer: penultimate_no_norm; "
                f"it is {self.text_layer}"
            )
        return self

    @property
    def resolutions(self) -> list[int]:
        """All of them, the main one first."""
        return [self.resolution, *self.more_resolutions]

    @property
    def pad(self) -> str:
        """What follows a caption's end token."""
        return self.text_pad or ("zero" if self.second_clip is None else "end")

    @property
    def second_clip(self) -> SecondClipConfig | None:
        """The CLIP beside the run's own; None where there is none."""
        return self.text_encoder if isinstance(self.text_encoder, SecondClipConfig) else None

    @property
    def sequence(self) -> SequenceConfig | None:
        """The encoder in place of the run's CLIP; None where there is none."""
        return self.text_encoder if isinstance(self.text_encoder, SequenceConfig) else None

    def bucket_list(self) -> list[Bucket]:
        """Every shape there is, resolution by resolution; a bucket's number is its place here."""
        if self.buckets is None:
            return [Bucket(r, r, r) for r in self.resolutions]
        return [b for r in self.resolutions for b in make_buckets(r, self.buckets.step, self.buckets.max_aspect)]

    def settings(self) -> dict[str, Any]:
        """The settings that change the bytes of a shard, for its fingerprint."""
        found = self.model_dump(exclude=set(PLACEMENT))
        found["text_pad"] = self.pad
        if self.pad == "zero":  # as all latents had it before there was a choice
            del found["text_pad"]
        if not self.flip:
            del found["flip"]
        if self.crop == "center":
            del found["crop"]
        if self.features is None:
            del found["features"]
        else:
            found["features"] = self.features.model_dump(exclude={"pretrained"})
        # Which weights they are is said by their digest, wherever they lie.
        if self.second_clip is not None:
            found["text_encoder"] = {"kind": self.second_clip.kind, "pad": self.second_clip.pad or "zero"}
        elif self.sequence is not None:
            found["text_encoder"] = self.sequence.model_dump(exclude={"pretrained"})
            for name in ("text_layer", "text_pooled"):
                del found[name]
        else:
            del found["text_encoder"]
        for name in ("select", "captions"):  # thresholds and what made the captions are added by the stage
            del found[name]
        return found
