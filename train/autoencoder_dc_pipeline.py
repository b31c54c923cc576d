"""Text to image with diffusers' AutoencoderDC (Chen et al. 2024, arXiv:2410.10733), whose latents are 32 or 64 times
smaller than the image along each side.

diffusers has no class for that: StableDiffusionPipeline asks its VAE for block_out_channels, and hands a generator to
the decoder, and this one has neither. An exported model has a copy of this file as pipeline.py beside its weights, and
is opened where there is no Carrara by

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("path/to/model", trust_remote_code=True)
    pipeline("a red circle on a blue ground").images[0]

so it imports nothing but torch, transformers and diffusers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import AutoencoderDC, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from transformers import CLIPTextModel, CLIPTokenizer


class AutoencoderDCPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline with an AutoencoderDC in place of the VAE; all else is that class's."""

    def __init__(
        self,
        vae: AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        parts = (text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder)
        super().__init__(None, *parts, requires_safety_checker=requires_safety_checker)
        self.register_modules(vae=vae)
        self.vae_scale_factor = vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    @functools.wraps(StableDiffusionPipeline.__call__)  # whoever asks which arguments there are gets that one's
    def __call__(self, *args: Any, output_type: str = "pil", return_dict: bool = True, **kwargs: Any) -> Any:
        """As StableDiffusionPipeline's; no safety checker looks at the images."""
        latents = super().__call__(*args, output_type="latent", return_dict=False, **kwargs)[0]
        images = latents
        if output_type != "latent":
            pixels = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(pixels.detach(), output_type=output_type)
        self.maybe_free_model_hooks()
        found = StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)
        return found if return_dict else (images, None)
