"""Prompts to pictures with a diffusers pipeline, each picture's noise a function of its prompt and replicate alone.

    seed = first 8 bytes of sha256(JSON [prompt id, replicate, purpose]), purpose "start" or "steps"

So a picture is the same whichever worker draws it, in whatever batch, and two checkpoints or samplers are compared at
the same noise. Reseeding for every chunk, as several public evaluation scripts do, gives 30,000 pictures from a few
noises.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shards.fingerprint import digest_bytes
from shards.settings import ConfigError

if TYPE_CHECKING:
    import torch

# diffusers' scheduler class and what it is told beyond the exported scheduler's own configuration.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
# Those that know rectified flows (use_flow_sigmas), and those that take a variance beside the prediction.
FLOW_SAMPLERS = ["dpm-solver++", "unipc"]
LEARNED_VARIANCE_SAMPLERS = ["ddpm"]


class Draw(NamedTuple):
    """One picture to draw."""

    prompt_id: str
    replicate: int
    text: str


def seed_of(prompt_id: str, replicate: int, purpose: str) -> int:
    """63-bit seed of one picture's noise for one purpose."""
    text = json.dumps([prompt_id, replicate, purpose], ensure_ascii=False, separators=(",", ":"))
    return int(digest_bytes(text.encode())[:16], 16) >> 1


def start_noise(draws: Sequence[Draw], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 [len(draws), *shape], drawn on the CPU so that it is the same for every device."""
    import torch

    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(d.prompt_id, d.replicate, "start")))
        for d in draws
    ]
    return torch.stack(noise)


def swap_sampler(pipeline: Any, sampler: str, timestep_spacing: str | None = None) -> None:
    """Gives the pipeline another of SAMPLERS; betas and prediction type stay those that it was trained with."""
    import diffusers

    if sampler not in SAMPLERS:
        raise ConfigError(f"eval.sampler is '{sampler}'; it must be one of {', '.join(SAMPLERS)}")
    config = pipeline.scheduler.config
    fitting = list(SAMPLERS)
    if config.prediction_type == "flow_prediction":
        fitting, what = FLOW_SAMPLERS, "a rectified flow"
    elif str(config.get("variance_type", "")).startswith("learned"):
        fitting, what = LEARNED_VARIANCE_SAMPLERS, "a model that has learned its variance"
    if sampler not in fitting:
        raise ConfigError(f"eval.sampler is '{sampler}', which cannot sample {what}; take {' or '.join(fitting)}")
    name, extra = SAMPLERS[sampler]
    if timestep_spacing is not None:
        extra = {**extra, "timestep_spacing": timestep_spacing}
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **extra)


def placed(pipeline: Any, device: str, precision: str) -> Any:
    """The pipeline on that device; in float32 as it is."""
    import torch

    return pipeline.to(device) if precision == "float32" else pipeline.to(device, getattr(torch, precision))


class Artist:
    """A pipeline that draws batches. `side` is the pictures' size in px."""

    def __init__(
        self,
        pipeline: Any,
        sampler: str,
        steps: int,
        guidance_scale: float,
        timestep_spacing: str | None = None,
        precision: str = "float32",
        device: str = "cpu",
    ) -> None:
        swap_sampler(pipeline, sampler, timestep_spacing)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = placed(pipeline, device, precision)
        self.steps, self.guidance_scale = steps, guidance_scale
        self.latent_side = int(pipeline.unet.config.sample_size)
        self.channels = int(pipeline.unet.config.in_channels)
        self.side = self.latent_side * int(pipeline.vae_scale_factor)

    def __call__(self, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, side, side, 3], and which of them are finite, bool [B] (the others are black)."""
        import torch

        noise = start_noise(draws, (self.channels, self.latent_side, self.latent_side))
        generators = [torch.Generator().manual_seed(seed_of(d.prompt_id, d.replicate, "steps")) for d in draws]
        with torch.inference_mode():
            pixels = self.pipeline(
                prompt=[d.text for d in draws],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                latents=noise.to(self.pipeline.device, self.pipeline.unet.dtype),
                generator=generators,
                output_type="pt",
            ).images.float()
        finite = torch.isfinite(pixels).flatten(1).all(dim=1)
        return to_uint8(torch.where(finite[:, None, None, None], pixels, 0.0)), finite.cpu().numpy()


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Float [B, 3, H, W] in 0..1 -> uint8 [B, H, W, 3]: rounded to the nearest level (truncation darkens by half a
    level)."""
    import torch

    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
