"""The forward process and its targets against float64 formulas of the papers and against diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from train import diffusion

SCHEDULES = [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 1e-4, 0.02)]


def alpha_bar(schedule: str, start: float, end: float, steps: int = 1000) -> torch.Tensor:
    return diffusion.alphas_cumprod(diffusion.betas(schedule, steps, start, end))


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_schedule_is_that_of_diffusers(schedule: str, start: float, end: float) -> None:
    theirs = DDPMScheduler(1000, start, end, schedule).alphas_cumprod.double()
    # Theirs is a product of 1000 factors in float32.
    torch.testing.assert_close(alpha_bar(schedule, start, end), theirs, rtol=2e-4, atol=1e-9)


def test_cosine_schedule_is_its_closed_form() -> None:
    """alpha_bar itself is a squared cosine (Nichol & Dhariwal eq. 17) until the cap on beta bites."""
    ours = alpha_bar("squaredcos_cap_v2", 0, 0)
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    expected = torch.tensor(f[1:], dtype=torch.float64) / f[0]
    torch.testing.assert_close(ours[:990], expected[:990], rtol=1e-10, atol=0)


def test_forward_process_is_the_composition_of_its_steps() -> None:
    """x_t of eq. 4 has the mean and variance of t single steps q(x_t | x_{t-1}) of eq. 2, in float64."""
    betas = diffusion.betas("scaled_linear", 50, 0.00085, 0.3)
    a = diffusion.alphas_cumprod(betas)
    mean, variance = torch.tensor(1.7, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(50):
        mean, variance = (1 - betas[t]).sqrt() * mean, (1 - betas[t]) * variance + betas[t]
        at = torch.tensor([t])
        torch.testing.assert_close(diffusion.add_noise(1.7 * one, zero, at, a)[0, 0], mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(diffusion.add_noise(zero, one, at, a)[0, 0] ** 2, variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_noise_and_velocity_are_those_of_diffusers(schedule: str, start: float, end: float) -> None:
    theirs = DDPMScheduler(1000, start, end, schedule)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(64, 4, 3, 3, generator=g), torch.randn(64, 4, 3, 3, generator=g)
    t = torch.randint(0, 1000, (64,), generator=g)
    a = alpha_bar(schedule, start, end)
    torch.testing.assert_close(
        diffusion.add_noise(x0, noise, t, a), theirs.add_noise(x0, noise, t), rtol=1e-4, atol=2e-4
    )
    torch.testing.assert_close(
        diffusion.velocity(x0, noise, t, a), theirs.get_velocity(x0, noise, t), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_target_inverts(prediction: str) -> None:
    a = alpha_bar("scaled_linear", 0.00085, 0.012)
    g = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(32, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.randint(0, 1000, (32,), generator=g)
    xt = diffusion.add_noise(x0, noise, t, a)
    output = diffusion.target(prediction, x0, noise, t, a)
    got_x0, got_noise = diffusion.to_x0_and_noise(prediction, output, xt, t, a)
    torch.testing.assert_close(got_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_noise, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_min_snr_is_one_weight_on_the_error_of_x0(prediction: str) -> None:
    """Second derivation: perturb x_0 and map it through each target; the weighted loss must be min(SNR, 5) |dx0|^2."""
    a = alpha_bar("scaled_linear", 0.00085, 0.012)
    t = torch.tensor([0, 10, 300, 700, 999])
    xt = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x0 = torch.zeros_like(xt)
    guess = x0 + 0.1

    def output(x: torch.Tensor) -> torch.Tensor:
        noise = (xt - a[t].sqrt()[:, None] * x) / (1 - a[t]).sqrt()[:, None]
        return diffusion.target(prediction, x, noise, t, a)

    weight = diffusion.loss_weight(prediction, t, a, 5.0).double()
    got = weight * (output(guess) - output(x0)).square().mean(dim=1)
    snr = a[t] / (1 - a[t])
    torch.testing.assert_close(got, snr.clamp(max=5.0) * 0.01, rtol=1e-6, atol=0)
    assert diffusion.loss_weight(prediction, t, a, None).tolist() == [1.0] * 5


def ddpm_step(x: Any, eps: Any, t: int, betas: Any, a: Any) -> tuple[Any, Any]:
    """Mean (Ho et al. 2020, eq. 11) and posterior variance (eq. 7) of p(x_{t-1} | x_t), float64."""
    before = a[t - 1] if t > 0 else 1.0
    mean = (x - betas[t] / np.sqrt(1 - a[t]) * eps) / np.sqrt(1 - betas[t])
    return mean, betas[t] * (1 - before) / (1 - a[t])


def ddim_step(x: Any, eps: Any, a_t: float, a_next: float, eta: float) -> tuple[Any, float]:
    """Mean and sigma (Song et al. 2020, eq. 12 and 16), float64."""
    sigma = eta * math.sqrt((1 - a_next) / (1 - a_t)) * math.sqrt(1 - a_t / a_next)
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps, sigma


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ddpm_step_is_the_papers(prediction: str, t: int) -> None:
    """The samplers that draw from our models take the step of the paper, from a network trained on our target."""
    scheduler = DDPMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        variance_type="fixed_small",
    )
    betas = diffusion.betas("scaled_linear", 1000, 0.00085, 0.012)
    a = diffusion.alphas_cumprod(betas)
    g = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(1, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    at = torch.tensor([t])
    xt = diffusion.add_noise(x0, noise, at, a)
    output = diffusion.target(prediction, x0, noise, at, a)
    mean, variance = ddpm_step(xt.numpy(), noise.numpy(), t, betas.numpy(), a.numpy())
    drawn = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = scheduler.step(output, t, xt, generator=torch.Generator().manual_seed(4)).prev_sample
    expected = torch.from_numpy(mean) + (math.sqrt(variance) * drawn if t > 0 else 0.0)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=5e-4)  # their coefficients are float32


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_step_is_the_papers(prediction: str, eta: float) -> None:
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, prediction_type=prediction,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    a = alpha_bar("scaled_linear", 0.00085, 0.012)
    g = torch.Generator().manual_seed(5)
    x0, noise = (torch.randn(1, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    for t in (999, 549, 99):
        at = torch.tensor([t])
        xt = diffusion.add_noise(x0, noise, at, a)
        output = diffusion.target(prediction, x0, noise, at, a)
        mean, sigma = ddim_step(xt.numpy(), noise.numpy(), float(a[t]), float(a[t - 50]), eta)
        drawn = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        got = scheduler.step(output, t, xt, eta=eta, generator=torch.Generator().manual_seed(6)).prev_sample
        torch.testing.assert_close(got, torch.from_numpy(mean) + sigma * drawn, rtol=2e-4, atol=5e-4)


def test_logit_normal_timesteps_have_the_stated_density() -> None:
    """Against scipy's normal distribution of the logit, at the quartiles and in the far ends."""
    steps, mean, std = 1000, 0.3, 1.2
    t = diffusion.logit_normal_timesteps(np.random.default_rng(0).standard_normal(400_000), steps, mean, std)
    assert t.dtype == np.int64
    assert 0 <= t.min() < t.max() < steps
    for edge in (50, 250, 500, 750, 950):
        share = edge / steps
        expected = scipy.stats.norm.cdf((np.log(share / (1 - share)) - mean) / std)
        assert (t < edge).mean() == pytest.approx(expected, abs=3e-3)
    assert diffusion.logit_normal_timesteps(np.array([-50.0, 50.0]), steps, mean, std).tolist() == [0, steps - 1]
