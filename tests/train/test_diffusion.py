"""The forward process and its targets against float64 formulas of the papers and against diffusers."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDPMScheduler

from train import diffusion
from train.predictions import PREDICTIONS, PredictionType

SCHEDULES = [
    ("linear", 1e-4, 0.02),
    ("scaled_linear", 0.00085, 0.012),
    ("squaredcos_cap_v2", 1e-4, 0.02),
    ("sigmoid", 1e-4, 0.02),
]


def alpha_bar(schedule: str, start: float, end: float, steps: int = 1000) -> torch.Tensor:
    return diffusion.alphas_cumprod(diffusion.betas(schedule, steps, start, end))


def process(
    prediction: str = "epsilon",
    schedule: str = "scaled_linear",
    start: float = 0.00085,
    end: float = 0.012,
    steps: int = 1000,
) -> diffusion.Process:
    if prediction == "flow_prediction":
        return diffusion.rectified_flow(steps)
    return diffusion.variance_preserving(alpha_bar(schedule, start, end, steps))


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
    p = diffusion.variance_preserving(diffusion.alphas_cumprod(betas))
    mean, variance = torch.tensor(1.7, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(50):
        mean, variance = (1 - betas[t]).sqrt() * mean, (1 - betas[t]) * variance + betas[t]
        at = torch.tensor([t])
        torch.testing.assert_close(diffusion.add_noise(p, 1.7 * one, zero, at)[0, 0], mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(diffusion.add_noise(p, zero, one, at)[0, 0] ** 2, variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_noise_and_velocity_are_those_of_diffusers(schedule: str, start: float, end: float) -> None:
    theirs = DDPMScheduler(1000, start, end, schedule)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(64, 4, 3, 3, generator=g), torch.randn(64, 4, 3, 3, generator=g)
    t = torch.randint(0, 1000, (64,), generator=g)
    p = process("v_prediction", schedule, start, end)
    torch.testing.assert_close(
        diffusion.add_noise(p, x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-4, atol=2e-4
    )
    torch.testing.assert_close(
        diffusion.target(p, "v_prediction", x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=1e-4, atol=2e-4
    )


def test_every_prediction_that_may_be_set_is_in_the_table() -> None:
    assert get_args(PredictionType) == tuple(PREDICTIONS)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_inverts(prediction: str) -> None:
    p = process(prediction)
    g = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(32, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.randint(0, 1000, (32,), generator=g)
    xt = diffusion.add_noise(p, x0, noise, t)
    output = diffusion.target(p, prediction, x0, noise, t)
    got_x0, got_noise = diffusion.to_x0_and_noise(p, prediction, output, xt, t)
    torch.testing.assert_close(got_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_noise, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["min-snr", "p2"])
def test_a_weight_is_one_weight_on_the_error_of_x0(prediction: str, kind: str) -> None:
    """Second derivation: perturb x_0, map it through each target at the same x_t; what remains is the weight of x_0's
    error: min(SNR, 5), or P2's SNR / (1 + SNR) for gamma = 1."""
    p = process(prediction)
    t = torch.tensor([0, 10, 300, 700, 998])
    xt = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x0 = torch.zeros_like(xt)

    def output(x: torch.Tensor) -> torch.Tensor:
        noise = (xt - p.signal[t][:, None] * x) / p.noise[t][:, None]
        return diffusion.target(p, prediction, x, noise, t)

    gamma = {"snr_gamma": 5.0} if kind == "min-snr" else {"p2_gamma": 1.0}
    weight = diffusion.loss_weight(p, prediction, t, **gamma).double()
    got = weight * (output(x0 + 0.1) - output(x0)).square().mean(dim=1)
    snr = p.signal[t] ** 2 / p.noise[t] ** 2
    expected = snr.clamp(max=5.0) if kind == "min-snr" else snr / (1 + snr)
    torch.testing.assert_close(got, expected * 0.01, rtol=1e-6, atol=0)
    assert diffusion.loss_weight(p, prediction, t).tolist() == [1.0] * 5


def test_min_snr_is_that_of_diffusers_training_script() -> None:
    """Lines of train_text_to_image.py: min(snr, gamma) / snr for epsilon, / (snr + 1) for v, with its compute_snr."""
    from diffusers.training_utils import compute_snr

    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    t = torch.arange(0, 1000, 37)
    snr = compute_snr(theirs, t)
    capped = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    p = process()
    torch.testing.assert_close(diffusion.loss_weight(p, "epsilon", t, 5.0), capped / snr, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        diffusion.loss_weight(p, "v_prediction", t, 5.0), capped / (snr + 1), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_that_of_diffusers(schedule: str) -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    ours = diffusion.zero_terminal_snr(alpha_bar(schedule, 0.00085, 0.012))
    assert ours[-1] == 0
    betas = diffusion.betas(schedule, 1000, 0.00085, 0.012)
    torch.testing.assert_close(diffusion.to_betas(ours), rescale_zero_terminal_snr(betas), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours[0], alpha_bar(schedule, 0.00085, 0.012)[0])
    p = diffusion.variance_preserving(ours)
    assert torch.isfinite(diffusion.loss_weight(p, "v_prediction", torch.arange(1000), 5.0)).all()


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.5])
def test_shift_divides_the_snr_by_its_square_in_both_processes(shift: float) -> None:
    a = alpha_bar("scaled_linear", 0.00085, 0.012)
    shifted = diffusion.variance_preserving(diffusion.shift_snr(a, shift)).snr
    torch.testing.assert_close(shifted, a / (1 - a) / shift**2, rtol=1e-9, atol=0)
    flow, plain = diffusion.rectified_flow(1000, shift), diffusion.rectified_flow(1000)
    torch.testing.assert_close(flow.snr, plain.snr / shift**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_that_of_diffusers_flow_matching(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(1000, shift)
    p = diffusion.rectified_flow(1000, shift)
    torch.testing.assert_close(p.noise.flip(0).float(), theirs.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.time.flip(0), theirs.timesteps, rtol=1e-5, atol=1e-3)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g)
    t = torch.tensor([0, 400, 999])
    xt = diffusion.add_noise(p, x0, noise, t)
    torch.testing.assert_close(xt, theirs.scale_noise(x0, theirs.timesteps[999 - t], noise), rtol=1e-4, atol=1e-5)
    # Its Euler step with the true velocity, from any t to 0, lands on x_0.
    v = diffusion.target(p, "flow_prediction", x0, noise, t)
    torch.testing.assert_close(xt - p.noise[t].float()[:, None, None, None] * v, x0, rtol=1e-4, atol=1e-5)


def test_learned_variance_range_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", variance_type="learned_range")
    p = process()
    like = torch.zeros(1, 1, 1, 1)
    for t in (1, 17, 500, 999):
        low, high = diffusion.log_variance_range(p, torch.tensor([t]), like)
        for v, ours in ((-1.0, low), (1.0, high), (0.0, (low + high) / 2)):
            got = theirs._get_variance(t, predicted_variance=torch.tensor(v))
            assert float(ours) == pytest.approx(float(got), rel=2e-3, abs=2e-3)


def test_variational_bound_is_torchs_kl_of_the_posterior() -> None:
    """Against torch.distributions with DDPM's posterior from Bayes' rule on the two Gaussians that make it."""
    from torch.distributions import Normal, kl_divergence

    p = process()
    betas = diffusion.betas("scaled_linear", 1000, 0.00085, 0.012)
    a = diffusion.alphas_cumprod(betas)
    g = torch.Generator().manual_seed(3)
    x0, xt, guess = (torch.randn(4, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    v = torch.rand(4, 4, 2, 2, generator=g, dtype=torch.float64) * 2 - 1
    t = torch.tensor([3, 250, 999, 0])
    got = diffusion.variational_bound(p, x0, xt, guess, v, t)
    for i in range(3):
        n = int(t[i])
        # q(x_{t-1} | x_0) = N(sqrt(a) x0, 1 - a), q(x_t | x_{t-1}) = N(sqrt(1 - b) x_{t-1}, b): precisions add up.
        prior_var, b = 1 - a[n - 1], betas[n]
        var = 1 / (1 / prior_var + (1 - b) / b)

        def mean(
            x: torch.Tensor, prior_var: Any = prior_var, b: Any = b, var: Any = var, n: int = n, i: int = i
        ) -> Any:
            return var * (a[n - 1].sqrt() * x / prior_var + (1 - b).sqrt() * xt[i] / b)

        share = (v[i] + 1) / 2
        spread = torch.exp(0.5 * (share * b.log() + (1 - share) * var.log()))
        kl = kl_divergence(Normal(mean(x0[i]), var.sqrt()), Normal(mean(guess[i]), spread))
        assert float(got[i]) == pytest.approx(float(kl.mean()) / math.log(2), rel=1e-5)
    # t = 0: the density of x_0 about the guess (alpha_bar_{-1} is 1, so the posterior's mean is the guess itself).
    low = torch.log(betas[1] * (1 - a[0]) / (1 - a[1]))
    share = (v[3] + 1) / 2
    spread = torch.exp(0.5 * (share * betas[0].log() + (1 - share) * low))
    nll = -Normal(guess[3], spread).log_prob(x0[3])
    assert float(got[3]) == pytest.approx(float(nll.mean()) / math.log(2), rel=1e-5)


def test_stratified_timesteps_are_uniform_and_one_in_each_stratum() -> None:
    rng = np.random.default_rng(0)
    strata = np.tile(rng.permutation(64), 200)
    u = diffusion.stratified(rng.random(64 * 200), strata, 64)
    assert np.array_equal(np.sort((u[:64] * 64).astype(int)), np.arange(64))
    assert scipy.stats.kstest(u, "uniform").pvalue > 0.01
    # The mean over a batch varies far less than of as many independent draws: variance 1 / (12 n^3) against 1 / (12 n).
    assert u.reshape(200, 64).mean(axis=1).std() < 1.5 * math.sqrt(1 / (12 * 64**3))
    z = diffusion.normal_quantile(u)
    assert scipy.stats.kstest(z, "norm").pvalue > 0.01


def test_offset_noise_is_common_to_a_channel() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4000, 4, 2, 2)).astype(np.float32)
    shifted = diffusion.offset_noise(noise, rng.standard_normal((4000, 4)).astype(np.float32), 0.1)
    difference = shifted - noise
    assert np.allclose(difference, difference[:, :, :1, :1], atol=1e-6)
    assert difference[:, :, 0, 0].std() == pytest.approx(0.1, rel=0.03)
    assert shifted.dtype == np.float32


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
