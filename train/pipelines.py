"""Which of diffusers' pipelines a UNet is exported as, and which layers of a CLIP that pipeline shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shards.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """name: the class in diffusers. layers: what of `latents.text_layer` it reads a prompt with. reads: in words."""

    name: str
    layers: tuple[str, ...]
    reads: str


STABLE_DIFFUSION = Pipeline("StableDiffusionPipeline", ("last", "penultimate"), "a CLIP's layer after the final norm")
STABLE_DIFFUSION_XL = Pipeline(
    "StableDiffusionXLPipeline", ("penultimate_no_norm",), "a CLIP's last block but one without the final norm"
)


def pipeline_of(unet: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a UNet2DConditionModel with this config: SDXL's where it is given sizes and pooled text."""
    return STABLE_DIFFUSION_XL if unet.get("addition_embed_type") == "text_time" else STABLE_DIFFUSION


def require_layer(pipeline: Pipeline, layer: str) -> None:
    """Raises ConfigError where the pipeline would not show a UNet the captions as latents of this layer hold them."""
    if layer not in pipeline.layers:
        fitting = layer.removesuffix("_no_norm")
        wanted = fitting if fitting in pipeline.layers else pipeline.layers[0]
        raise ConfigError(
            f"this UNet is exported as a {pipeline.name}, which reads {pipeline.reads}, and its latents were made with "
            f"latents.text_layer {layer}; make the latents with {wanted}, and train on those"
        )
