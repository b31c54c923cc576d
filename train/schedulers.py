"""The diffusers scheduler of a training's own process, as an exported pipeline carries it."""

from __future__ import annotations

from typing import Any

from train import diffusion
from train.config import TrainConfig
from train.predictions import PREDICTIONS

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def scheduler(config: TrainConfig) -> Any:
    """A scheduler of the trainer's own process and prediction type.

    DDIM (Song et al. 2020), also for a learned variance, which a pipeline's guidance
    would spoil (export.without_variance); for rectified flow DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) on the
    flow's sigmas, since diffusers' flow scheduler does not go into a StableDiffusionPipeline. Trailing spacing starts
    at the noisiest timestep, as training does (Lin et al. 2023, arXiv:2305.08891, table 2); the rest is as in Stable
    Diffusion's own configuration.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if PREDICTIONS[config.prediction_type].flow:
        return DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            prediction_type=config.prediction_type,
            use_flow_sigmas=True,
            flow_shift=config.snr_shift,
            final_sigmas_type="zero",
        )
    shared: dict[str, Any] = {name: getattr(config, name) for name in SCHEDULE}
    shared |= {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "trailing"}
    if config.snr_shift != 1.0 or config.beta_schedule == "sigmoid":
        alpha_bar = diffusion.alphas_cumprod(
            diffusion.betas(config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
        )
        shared["trained_betas"] = diffusion.to_betas(diffusion.shift_snr(alpha_bar, config.snr_shift)).tolist()
    if config.zero_terminal_snr:
        shared["rescale_betas_zero_snr"] = True
    return DDIMScheduler(**shared, set_alpha_to_one=False)
