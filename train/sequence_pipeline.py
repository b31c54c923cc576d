"""Text to image with a text encoder of transformers whose captions the UNet attends to under a mask.

diffusers has no class for that: StableDiffusionPipeline takes a CLIP, and passes no mask on. An exported model has a
copy of this file as pipeline.py beside its weights, and is opened where there is no Carrara by

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("path/to/model", trust_remote_code=True)
    pipeline("a red circle on a blue ground").images[0]

so it imports nothing but torch and diffusers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class SequencePipeline(DiffusionPipeline):
    """vae, text_encoder, tokenizer, unet, scheduler: as in StableDiffusionPipeline, but the encoder is any of
    transformers' whose `last_hidden_state` the UNet was trained on. max_length: tokens that are read of a prompt."""

    def __init__(
        self,
        vae: torch.nn.Module,
        text_encoder: torch.nn.Module,
        tokenizer: object,
        unet: torch.nn.Module,
        scheduler: object,
        max_length: int = 256,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(max_length=max_length)
        levels = self.vae.config.get("block_out_channels") or self.vae.config.encoder_block_out_channels
        self.vae_scale_factor = 2 ** (len(levels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States [B,max_length,width], zeros behind a prompt's tokens, and the mask int64 [B,max_length] of those.

        In the type of the VAE, which is that of the sampler's state too."""
        found = self.tokenizer(prompts, truncation=True, max_length=self.config.max_length, padding=False)["input_ids"]
        ids = torch.zeros(len(prompts), self.config.max_length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        known = self.text_encoder.get_input_embeddings().num_embeddings  # a tokenizer may have added words beyond
        for i, tokens in enumerate([token for token in tokens if token < known] for tokens in found):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        rows = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (rows * mask[..., None].to(rows.dtype)).to(self.vae.dtype), mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images of the prompts, as StableDiffusionPipeline makes them; classifier-free guidance above a scale of 1."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt or ""] * len(prompts) if not isinstance(negative_prompt, list) else negative_prompt
        if len(negative) != len(prompts):
            raise ValueError(f"there are {len(negative)} negative prompts for {len(prompts)} prompts")
        guided = guidance_scale > 1
        text, mask = self.encode_prompt((negative if guided else []) + prompts)
        if num_images_per_prompt > 1:
            text, mask = (x.repeat_interleave(num_images_per_prompt, dim=0) for x in (text, mask))
        count, side = len(prompts) * num_images_per_prompt, self.unet.config.sample_size
        shape = (
            count,
            self.vae.config.latent_channels,
            (height or side * self.vae_scale_factor) // self.vae_scale_factor,
            (width or side * self.vae_scale_factor) // self.vae_scale_factor,
        )
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x = (
            randn_tensor(shape, generator=generator, device=self.device, dtype=text.dtype)
            if latents is None
            else latents
        )
        x = x.to(self.device) * self.scheduler.init_noise_sigma
        # Ancestral samplers draw from the same generators.
        takes = inspect.signature(self.scheduler.step).parameters
        more = {"generator": generator} if "generator" in takes else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            given = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            out = self.unet(given, t, encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False)[0]
            if guided:
                empty, full = out.chunk(2)
                out = empty + guidance_scale * (full - empty)
            x = self.scheduler.step(out, t, x, **more, return_dict=False)[0]
        if output_type == "latent":
            images = x
        else:
            pixels = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
