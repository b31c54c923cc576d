"""The forward process of a diffusion in discrete time: noise schedules, targets, loss weights, timesteps.

A process is three tables over the timesteps: x_t = signal[t] x_0 + noise[t] eps, and time[t] is what the
network is given. Two kinds, one notation:

    variance-preserving   signal = sqrt(alpha_bar_t), noise = sqrt(1 - alpha_bar_t): DDPM (Ho, Jain & Abbeel 2020,
                          arXiv:2006.11239, eq. 4), where alpha_bar_t is the product of (1 - beta)
    rectified flow        signal = 1 - sigma, noise = sigma: the straight line from x_0 to the noise (Liu et al. 2022,
                          arXiv:2209.03003; as in Stable Diffusion 3, Esser et al. 2024, arXiv:2403.03206, eq. 13)

SNR is (signal / noise)^2 in both. Tables are float64; what multiplies a batch is given in its own dtype.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.special
import torch

from train.predictions import PREDICTIONS, PredictionType

# ---- schedules -------------------------------------------------------------------------------------


def betas(schedule: str, steps: int, start: float, end: float) -> torch.Tensor:
    """float64 [steps]. The schedules and their names are those of diffusers' schedulers.

    linear: DDPM, section 4. scaled_linear: linear in the square root (Rombach 2022). squaredcos_cap_v2:
    improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17, with s = 0.008 and betas of at most 0.999).
    sigmoid: GeoDiff (Xu et al. 2022, arXiv:2203.02923), from -6 to 6.
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)], dtype=torch.float64)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    raise ValueError(f"unknown beta schedule '{schedule}'")


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """alpha_bar: float64 [steps], the cumulative product of 1 - beta."""
    return torch.cumprod(1.0 - betas.double(), dim=0)


def shift_snr(alpha_bar: torch.Tensor, shift: float) -> torch.Tensor:
    """alpha_bar whose SNR is divided by shift^2, for images `shift` times as large as the schedule was made for.

    Simple diffusion (Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1): averaging over shift x shift pixels
    takes away that much of the noise.
    """
    return alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))


def zero_terminal_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """alpha_bar whose last step is pure noise, its first unchanged (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def to_betas(alpha_bar: torch.Tensor) -> torch.Tensor:
    """The betas, float64 [steps], whose cumulative product `alpha_bar` is."""
    before = torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    return 1 - alpha_bar / before


# ---- processes -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    """signal, noise: float64 [steps]; time: [steps], int64 or float32, what the network is given of each timestep."""

    signal: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor

    @property
    def steps(self) -> int:
        """How many timesteps there are."""
        return len(self.signal)

    @property
    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio in power, float64 [steps]."""
        return (self.signal / self.noise) ** 2

    def to(self, device: torch.device) -> Process:
        """The same tables on another device."""
        return Process(self.signal.to(device), self.noise.to(device), self.time.to(device))

    def at(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """signal and noise of timesteps t int64 [B], in `like`'s dtype, shaped to multiply [B, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal[t].reshape(shape).to(like.dtype), self.noise[t].reshape(shape).to(like.dtype)


def variance_preserving(alpha_bar: torch.Tensor) -> Process:
    """DDPM's process; the network is given t itself."""
    a = alpha_bar.double()
    return Process(a.sqrt(), (1 - a).sqrt(), torch.arange(len(a)))


def rectified_flow(steps: int, shift: float = 1.0) -> Process:
    """sigma = 1/steps .. 1, shifted as in Stable Diffusion 3 (eq. 23); the network is given steps * sigma.

    The shift divides the SNR by shift^2, as `shift_snr` does.
    """
    sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return Process(1 - sigma, sigma, (sigma * steps).float())


def add_noise(process: Process, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t of [B,...] for timesteps t int64 [B]."""
    a, s = process.at(t, x0)
    return a * x0 + s * noise


def target(
    process: Process, prediction: PredictionType, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """What the network is to predict, [B,...]."""
    return PREDICTIONS[prediction].target(*process.at(t, x0), x0, noise)


def to_x0_and_noise(
    process: Process, prediction: PredictionType, output: torch.Tensor, xt: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_0, eps) that a network's output stands for at x_t: `target` and `add_noise` solved for both."""
    return PREDICTIONS[prediction].solve(*process.at(t, xt), output, xt)


# ---- weights ---------------------------------------------------------------------------------------


def loss_weight(
    process: Process,
    prediction: PredictionType,
    t: torch.Tensor,
    snr_gamma: float | None = None,
    p2_gamma: float | None = None,
) -> torch.Tensor:
    """Weight of each squared error, float32 [B]: 1, min-SNR-gamma or P2.

    Both papers weigh the error of the noise: min-SNR by min(SNR, gamma) / SNR (Hang et al. 2023,
    arXiv:2303.09556, section 3.4), P2 by 1 / (1 + SNR)^gamma (Choi et al. 2022, arXiv:2204.00227, eq. 8, k = 1).
    |d eps|^2 is SNR |d x_0|^2, so that of x_0 is weighed by SNR times as much; an error of another prediction is the
    same error of x_0 seen through another scale.
    """
    signal, noise = process.signal[t], process.noise[t]
    snr = (signal / noise) ** 2
    if snr_gamma is not None:
        of_x0 = snr.clamp(max=snr_gamma)
    elif p2_gamma is not None:
        of_x0 = snr / (1 + snr) ** p2_gamma
    else:
        return torch.ones(len(t), device=t.device)
    return (of_x0 * PREDICTIONS[prediction].error_scale(signal, noise)).float()


# ---- timesteps and noise ---------------------------------------------------------------------------


def stratified(u: np.ndarray, stratum: np.ndarray, strata: int | np.ndarray) -> np.ndarray:
    """Uniform u of [0, 1), float64 [B] -> uniform within each sample's own of `strata` equal parts of [0, 1).

    One sample in each stratum of a batch keeps the batch's mean of the loss over t from fluctuating
    (low-discrepancy timesteps: Kingma et al. 2021, arXiv:2107.00630, appendix I.1; here with jitter).
    """
    return (stratum + u) / strata


def uniform_timesteps(u: np.ndarray, steps: int) -> np.ndarray:
    """Uniform u in [0, 1), float64 [B] -> timesteps int64 in 0..steps-1."""
    return np.minimum((np.asarray(u) * steps).astype(np.int64), steps - 1)


def logit_normal_timesteps(z: np.ndarray, steps: int, mean: float, std: float) -> np.ndarray:
    """Standard normal z -> timesteps int64 in 0..steps-1 with logit(t / steps) ~ N(mean, std^2).

    Esser et al. 2024 (Stable Diffusion 3), eq. 19, where t = 1 is pure noise as here: both ends, where there
    is least to learn, come seldom. mean > 0 leans towards noise.
    """
    share = 1.0 / (1.0 + np.exp(-(mean + std * np.asarray(z, np.float64))))
    return np.minimum((share * steps).astype(np.int64), steps - 1)


def normal_quantile(u: np.ndarray) -> np.ndarray:
    """Uniform u in [0, 1) -> standard normal, float64 [B]."""
    return scipy.special.ndtri(np.clip(u, 1e-12, 1 - 1e-12))


def offset_noise(noise: np.ndarray, shift: np.ndarray, strength: float) -> np.ndarray:
    """noise [B,C,h,w] plus `strength` times one normal number a channel, [B,C]: whole images may be dark or bright.

    Guttenberg 2023, "Diffusion with offset noise" (crosslabs.org/blog/diffusion-with-offset-noise).
    """
    return noise + np.float32(strength) * shift[:, :, None, None]


def nearest_noise(candidates: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Of each sample's k draws, [B,k,C,h,w], the nearest to its x0 [B,C,h,w] by Euclidean distance, [B,C,h,w].

    Paths from images to noise then cross less, and the target is surer (immiscible diffusion: Li et al. 2024,
    arXiv:2406.12303; by k draws a sample in place of an assignment: Li et al. 2025, arXiv:2505.18521). The first of
    equals is taken.
    """
    # |x0 - e|^2 without |x0|^2, which is the same for all.
    flat = candidates.reshape(*candidates.shape[:2], -1)
    near = np.square(flat).sum(axis=2) - 2 * np.einsum("bkn,bn->bk", flat, x0.reshape(len(x0), -1))
    found: np.ndarray = candidates[np.arange(len(x0)), near.argmin(axis=1)]
    return found


def other_targets(target: torch.Tensor) -> torch.Tensor:
    """Of each sample of a micro-batch [B,...], B even, the target of the sample half a micro-batch away.

    A micro-batch takes every n-th place of a global batch (data.batch_slots), so that is the sample half a global batch
    away, for any number of ranks and accumulation steps.
    """
    return target.roll(len(target) // 2, dims=0)


# ---- learned variance ------------------------------------------------------------------------------


def posterior(process: Process, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Mean of q(x_{t-1} | x_t, x_0), [B,...] (DDPM eq. 7), of a variance-preserving process."""
    alpha_bar, before, beta = _steps(process, t, xt)
    return (before.sqrt() * beta / (1 - alpha_bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar) * xt).to(
        xt.dtype
    )


def log_variance_range(process: Process, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithms of beta_tilde_t and beta_t, float64, shaped to multiply [B,...]: the range of a learned variance.

    beta_tilde at t = 0 is 0; as in improved DDPM's code, the value at t = 1 stands in for it.
    """
    alpha_bar, before, beta = _steps(process, t, like)
    small = beta * (1 - before) / (1 - alpha_bar)
    a1, b1, beta1 = _steps(process, torch.ones_like(t), like)
    small = torch.where(small > 0, small, beta1 * (1 - b1) / (1 - a1))
    return small.log(), beta.log()


def variational_bound(
    process: Process, x0: torch.Tensor, xt: torch.Tensor, x0_guess: torch.Tensor, v: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """L_vlb's term of each sample at its t, in bits a value, float32 [B] (improved DDPM, eq. 4 to 7 and 15).

    v [B,...] is the network's second half: -1 is the smallest log variance, 1 the largest. For t > 0 the term is
    KL(q(x_{t-1} | x_t, x_0) | p(x_{t-1} | x_t)). Latents are continuous, so t = 0 takes the density of x_0 where
    pixels would take the probability of their bin.
    """
    low, high = log_variance_range(process, t, xt)
    share = (v.double() + 1) / 2
    log_var = share * high + (1 - share) * low
    guess = posterior(process, x0_guess.double(), xt.double(), t)
    truth = posterior(process, x0.double(), xt.double(), t)
    kl = 0.5 * (log_var - low + torch.exp(low - log_var) + (truth - guess) ** 2 * torch.exp(-log_var) - 1)
    nll = 0.5 * (math.log(2 * math.pi) + log_var + (x0.double() - guess) ** 2 * torch.exp(-log_var))
    term = torch.where((t == 0).reshape(-1, *[1] * (xt.ndim - 1)), nll, kl)
    return (term.flatten(1).mean(dim=1) / math.log(2)).float()


def _steps(process: Process, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha_bar_t, alpha_bar_{t-1} and beta_t, float64, shaped to multiply [B,...]."""
    alpha_bar = process.signal**2
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    shape = (-1, *[1] * (like.ndim - 1))
    a, b = alpha_bar[t].reshape(shape), before[t].reshape(shape)
    return a, b, 1 - a / b
