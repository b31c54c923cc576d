"""Prompts to images with a diffusers pipeline, each image's noise a function of its prompt and replicate alone.

A generator's whole state comes from 128 bits of sha256(JSON [prompt id, replicate]), so an image is the same whichever
worker makes it, in whatever batch, and two checkpoints or samplers are compared at the same noise. (torch's own
`manual_seed` keeps 32 bits of a seed: among a million images 109 would share their noise. Reseeding for every chunk,
as several public evaluation scripts do, gives 30,000 images from a few noises.)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eval.shardwork import Halving
from shards.fingerprint import digest_bytes
from shards.settings import ConfigError
from train.predictions import PREDICTIONS

if TYPE_CHECKING:
    import torch

# diffusers' scheduler class and what it is given beyond the exported scheduler's own configuration; None: the model's.
SAMPLERS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "model": None,
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm-solver++-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm-solver++-sde-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    # On a rectified flow the first order of DPM-Solver++ is Euler's step in the flow's own time.
    "flow-euler": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 1}),
}
# Those that know rectified flows (use_flow_sigmas), and those that take a variance beside the prediction.
FLOW_SAMPLERS = ["dpm-solver++", "unipc", "flow-euler", "model"]
LEARNED_VARIANCE_SAMPLERS = ["ddpm", "model"]


class Sample(NamedTuple):
    """One image to generate."""

    prompt_id: str
    replicate: int
    text: str


def seed_of(prompt_id: str, replicate: int) -> int:
    """128 bits: the seed of one image's noise."""
    text = json.dumps([prompt_id, replicate], ensure_ascii=False, separators=(",", ":"))
    return int(digest_bytes(text.encode())[:32], 16)


def generator_of(seed: int) -> torch.Generator:
    """A CPU generator whose Mersenne Twister is filled from all bits of `seed`, by numpy's SeedSequence.

    torch keeps the 624 words of its state, as uint64, from byte 24 on; before them stand the seed, how many words are
    left and where the next one is. It does not fill them from more than 32 bits itself.
    """
    import torch

    words = np.random.MT19937(np.random.SeedSequence(seed)).state["state"]["key"]
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state().numpy().copy()
    state[24 : 24 + 8 * len(words)] = words.astype("<u8").view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator


def generators(samples: Sequence[Sample]) -> list[torch.Generator]:
    """One generator an image."""
    return [generator_of(seed_of(s.prompt_id, s.replicate)) for s in samples]


def swap_sampler(pipeline: Any, sampler: str, timestep_spacing: str | None = None) -> None:
    """Gives the pipeline another of SAMPLERS; betas and prediction type stay those that it was trained with."""
    import diffusers

    if sampler not in SAMPLERS:
        raise ConfigError(f"eval.sampler is '{sampler}'; it must be one of {', '.join(SAMPLERS)}")
    config, chosen = pipeline.scheduler.config, SAMPLERS[sampler]
    fitting, what = list(SAMPLERS), ""
    if "FlowMatch" in type(pipeline.scheduler).__name__:
        fitting, what = ["flow-euler", "model"], "this pipeline's rectified flow"
        chosen = None if sampler == "flow-euler" else chosen
    elif (prediction := PREDICTIONS.get(config.get("prediction_type"))) and prediction.flow:
        fitting, what = FLOW_SAMPLERS, "a rectified flow"
    elif str(config.get("variance_type", "")).startswith("learned"):
        fitting, what = LEARNED_VARIANCE_SAMPLERS, "a model that has learned its variance"
    elif sampler == "flow-euler":
        fitting, what = [s for s in SAMPLERS if s != "flow-euler"], "a model that is no rectified flow"
    if sampler not in fitting:
        raise ConfigError(f"eval.sampler is '{sampler}', which cannot sample {what}; take {' or '.join(fitting)}")
    extra = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    if chosen is not None:
        name, more = chosen
        pipeline.scheduler = getattr(diffusers, name).from_config(config, **more, **extra)
    elif extra:
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, **extra)


def evaluations(sampler: str, steps: int, guidance_scale: float) -> int:
    """Evaluations of the denoiser that one image takes: the cost that does not depend on the machine.

    Heun's method takes two a step and one at the last; PNDM, without its Runge-Kutta steps, repeats its second.
    """
    once = 2 * steps - 1 if sampler.startswith("heun") else steps + (sampler == "pndm")
    return once * (2 if guidance_scale > 1 else 1)


class ImageGenerator:
    """A pipeline that makes batches of images of `size` px.

    Of its parts the denoiser alone runs in `precision`: the sampler's state, the VAE and the text encoders are float32,
    since 8 significant bits are too few for 8-bit images and for sums over steps.
    """

    def __init__(
        self,
        pipeline: Any,
        sampler: str,
        steps: int,
        guidance_scale: float,
        timestep_spacing: str | None = None,
        precision: str = "float32",
        device: str = "cpu",
        size: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        import torch

        swap_sampler(pipeline, sampler, timestep_spacing)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.steps, self.guidance_scale = pipeline.to(device), steps, guidance_scale
        self.denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        self.interval, self.dtype = guidance_interval, getattr(torch, precision)
        self._batch, self._doubled = 0, False
        if channels_last and hasattr(pipeline, "unet"):
            self.denoiser.to(memory_format=torch.channels_last)
        if precision != "float32":
            self.denoiser.to(self.dtype)
        if compile:
            from train.engine import require_compiler

            require_compiler("eval.compile")
        self._forward = torch.compile(self.denoiser.forward) if compile else self.denoiser.forward
        if precision != "float32" or guidance_interval is not None or compile:
            self._names = list(inspect.signature(self.denoiser.forward).parameters)
            self.denoiser.forward = self._denoise
        scale = int(getattr(pipeline, "vae_scale_factor", 1))
        self.size = size or int(self.denoiser.config.sample_size) * scale
        if self.size % scale:
            near = round(self.size / scale) * scale or scale
            raise ConfigError(
                f"eval.size is {self.size}, which the VAE does not divide; {near} is the nearest that fits"
            )
        self._in_pieces = Halving("images")

    def __call__(self, samples: Sequence[Sample], **more: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, size, size, 3], and which of them are finite, bool [B] (the others are black).

        A batch that the device's memory does not hold is made in halves, and so are all later ones. more: further
        arguments of the pipeline.
        """

        def make(at: slice) -> tuple[np.ndarray, np.ndarray]:
            given = {k: v[at] if isinstance(v, list) else v for k, v in more.items()}
            return self._make(list(samples[at]), **given)

        parts = self._in_pieces(len(samples), make)
        return np.concatenate([p for p, _ in parts]), np.concatenate([f for _, f in parts])

    def _make(self, samples: list[Sample], **more: Any) -> tuple[np.ndarray, np.ndarray]:
        import torch

        self._batch = len(samples)
        known = inspect.signature(self.pipeline.__call__).parameters
        given = {"height": self.size, "width": self.size, "use_resolution_binning": False}
        with torch.inference_mode():
            pixels = self.pipeline(
                prompt=[s.text for s in samples],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                generator=generators(samples),
                output_type="pt",
                **{k: v for k, v in given.items() if k in known and k not in more},
                **more,
            ).images.float()
        if self.interval is not None and self.guidance_scale > 1 and not self._doubled:
            raise ConfigError(
                "eval.guidance_interval limits the guidance of a denoiser that is given two halves at once, and "
                f"{type(self.pipeline).__name__}'s is not; leave it out"
            )
        finite = torch.isfinite(pixels).flatten(1).all(dim=1)
        return to_uint8(torch.where(finite[:, None, None, None], pixels, 0.0)), finite.cpu().numpy()

    def _denoise(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser in its own precision; outside the guidance interval on the conditioned half alone."""
        import torch

        named = dict(zip(self._names, args, strict=False)) | kwargs
        x = next(v for n in ("sample", "hidden_states") if (v := named.get(n)) is not None)
        doubled = len(x) == 2 * self._batch
        self._doubled |= doubled
        halved = doubled and not self._guided(named.get("timestep"))

        def cast(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: cast(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(cast(v) for v in value)
            if not isinstance(value, torch.Tensor):
                return value
            if halved and value.ndim and len(value) == 2 * self._batch:
                value = value[self._batch :]  # the conditioned half comes second in every pipeline
            return value.to(self.dtype) if value.is_floating_point() and value.ndim > 1 else value

        found = self._forward(**{name: cast(value) for name, value in named.items()})
        out = (found[0] if isinstance(found, tuple) else found.sample).to(x.dtype)
        out = torch.cat([out, out]) if halved else out
        if isinstance(found, tuple):
            return (out, *found[1:])
        found.sample = out
        return found

    def _guided(self, timestep: Any) -> bool:
        if self.interval is None or timestep is None:
            return True
        scheduler = self.pipeline.scheduler
        last = float(scheduler.timesteps.max())
        time = float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)
        time /= scheduler.config.num_train_timesteps if last > 1 else 1
        return self.interval[0] <= time <= self.interval[1]


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Float [B, 3, H, W] in 0..1 -> uint8 [B, H, W, 3]: rounded to the nearest level (truncation darkens by half a
    level)."""
    import torch

    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
