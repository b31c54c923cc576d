"""The forward process of a discrete, variance-preserving diffusion, its targets and loss weights.

Notation as in DDPM (Ho, Jain & Abbeel 2020, arXiv:2006.11239): alpha_bar_t is the product of (1 - beta),
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (eq. 4). Velocity: Salimans & Ho 2022
(arXiv:2202.00512, appendix D): v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0. Coefficients are
made in float64 and given in float32.
"""

from __future__ import annotations

import math

import numpy as np
import torch

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def betas(schedule: str, steps: int, start: float, end: float) -> torch.Tensor:
    """float64 [steps]. The schedules and their names are those of diffusers' schedulers.

    linear: DDPM, section 4. scaled_linear: linear in the square root (Rombach 2022). squaredcos_cap_v2:
    improved DDPM (Nichol & Dhariwal 2021, eq. 17, with s = 0.008 and betas of at most 0.999).
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)], dtype=torch.float64)
    raise ValueError(f"unknown beta schedule '{schedule}'")


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """alpha_bar: float64 [steps], the cumulative product of 1 - beta."""
    return torch.cumprod(1.0 - betas.double(), dim=0)


def _coefficients(alpha_bar: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), of `like`'s dtype, shaped to multiply [B, ...]."""
    a = alpha_bar.double()[t].reshape(-1, *[1] * (like.ndim - 1))
    return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t of [B,...] for timesteps t int64 [B] (DDPM eq. 4)."""
    a, s = _coefficients(alpha_bar, t, x0)
    return a * x0 + s * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """v of [B,...] (Salimans & Ho 2022, appendix D)."""
    a, s = _coefficients(alpha_bar, t, x0)
    return a * noise - s * x0


def target(
    prediction: str, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """What the network is to predict: the noise, the clean latent, or the velocity."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return velocity(x0, noise, t, alpha_bar)
    raise ValueError(f"unknown prediction type '{prediction}'")


def to_x0_and_noise(
    prediction: str, output: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_0, eps) that a network's output stands for at x_t: `target` solved for both."""
    a, s = _coefficients(alpha_bar, t, xt)
    if prediction == "epsilon":
        return (xt - s * output) / a, output
    if prediction == "sample":
        return output, (xt - a * output) / s
    if prediction == "v_prediction":
        return a * xt - s * output, s * xt + a * output
    raise ValueError(f"unknown prediction type '{prediction}'")


def loss_weight(prediction: str, t: torch.Tensor, alpha_bar: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """float32 [B]: 1, or the min-SNR-gamma weight (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    With SNR = alpha_bar / (1 - alpha_bar), min(SNR, gamma) weighs the error of x_0; divided by SNR for
    the error of the noise, by SNR + 1 for that of the velocity.
    """
    if snr_gamma is None:
        return torch.ones(len(t), device=t.device)
    a = alpha_bar.double()[t]
    snr = a / (1 - a)
    capped = snr.clamp(max=snr_gamma)
    if prediction == "epsilon":
        weight = capped / snr
    elif prediction == "v_prediction":
        weight = capped / (snr + 1)
    else:
        weight = capped
    return weight.float()


def logit_normal_timesteps(z: np.ndarray, steps: int, mean: float, std: float) -> np.ndarray:
    """Standard normal z -> timesteps int64 in 0..steps-1 with logit(t / steps) ~ N(mean, std^2).

    Esser et al. 2024 (Stable Diffusion 3), eq. 19, where t = 1 is pure noise as here: both ends, where there
    is least to learn, come seldom. mean > 0 leans towards noise.
    """
    share = 1.0 / (1.0 + np.exp(-(mean + std * np.asarray(z, np.float64))))
    return np.minimum((share * steps).astype(np.int64), steps - 1)
