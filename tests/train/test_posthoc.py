"""EMA lengths chosen afterwards: against the averages themselves, computed one by one in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import torch
from safetensors.torch import save_file

from shards.settings import StageError
from tests.train import forked, tiny
from tests.train.test_zero import assert_same, initial, step_folder, tensors
from train import checkpoint, folders, posthoc

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.2])
def test_exponent_gives_the_profile_its_deviation(std: float) -> None:
    """Against the moments of tau^gamma on [0, 1] by numerical integration."""
    gamma = posthoc.exponent(std)
    area, first, second = (scipy.integrate.quad(lambda x, k=k: x ** (gamma + k), 0, 1)[0] for k in range(3))
    assert (second / area - (first / area) ** 2) ** 0.5 == pytest.approx(std, rel=1e-6)


def test_inner_product_is_the_integral() -> None:
    for a, ga, b, gb in ((1.0, 16.97, 1.0, 6.94), (0.5, 6.94, 1.0, 16.97), (1.0, 3.0, 0.25, 10.0)):
        integral = scipy.integrate.quad(
            lambda x, a=a, ga=ga, b=b, gb=gb: (ga + 1) * x**ga / a ** (ga + 1) * (gb + 1) * x**gb / b ** (gb + 1),
            0,
            min(a, b),
        )[0]
        got = posthoc.inner_product(*(np.array(v) for v in (a, ga, b, gb)))
        assert float(got) == pytest.approx(integral, rel=1e-6)


def averages(values: np.ndarray, batch: int, std: float) -> np.ndarray:
    """After each step: the EMA by its recursion."""
    power = posthoc.exponent(std) + 1
    out = np.zeros_like(values)
    for i, v in enumerate(values):
        beta = (1 - 1 / (i + 1)) ** power
        assert i % 100 or beta == pytest.approx(posthoc.decay((i + 1) * batch, batch, std))
        out[i] = beta * out[i - 1] + (1 - beta) * v
    return out


def test_a_length_between_two_is_put_together_from_their_snapshots(tmp_path: Path) -> None:
    """A curve with a trend and noise; the third average that was never kept comes out to a part in a hundred."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 2000)[:, None]
    values = np.concatenate([np.exp(-3 * t), t**2, np.sin(9 * t)], axis=1) + 0.05 * rng.standard_normal((2000, 3))
    for std in (0.05, 0.1):
        kept = averages(values, 8, std)
        for steps in range(250, 2001, 250):
            snapshot = {"w": torch.from_numpy(kept[steps - 1]).half()}
            save_file(snapshot, tmp_path / f"ema_{std:.3f}-{steps * 8:012d}.safetensors")
    for std in (0.05, 0.07, 0.1, 0.14):
        expected = averages(values, 8, std)[-1]
        got = posthoc.reconstruct(tmp_path, 16000, std)["w"].numpy()
        assert got == pytest.approx(expected, abs=0.01), std
    assert np.abs(averages(values, 8, 0.05)[-1] - averages(values, 8, 0.14)[-1]).max() > 0.1
    with pytest.raises(StageError, match="snapshots of 0 EMAs at 999 images"):
        posthoc.reconstruct(tmp_path, 999, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])  # what is ours is the same for 1 and 2
def test_further_averages_are_exact_under_every_stage(run: Path, stage: int) -> None:
    config = tiny.write_config(
        run, tiny.configuration(run, images=32, checkpoint_every_images=8, ema_stds=[0.05, 0.1], zero_stage=stage)
    )
    forked.train(config, 2)
    for std in (0.05, 0.1):
        expected = initial(config)
        for step in range(1, 5):
            weights = tensors(step_folder(run, step), "weights")
            expected = {n: e.lerp(weights[n], 1.0 - posthoc.decay(8 * step, 8, std)) for n, e in expected.items()}
            assert_same(tensors(step_folder(run, step), f"ema_{std:.3f}"), expected)
    aside = run / "checkpoints" / folders.POSTHOC
    assert [folders.name_of(f) for f in folders.folders(aside)] == [f"step-{i:08d}" for i in (4, 3, 2, 1)]
    assert folders.states(folders.read_manifest(aside / "step-00000004")) == {"ema_0.050", "ema_0.100"}
    half = checkpoint.whole(str(aside / "step-00000004"), "ema_0.050")
    assert_same(half, {n: v.half().float() for n, v in tensors(step_folder(run, 4), "ema_0.050").items()})
    # At a length that was kept, and at the end, the reconstruction is that snapshot.
    found = posthoc.reconstruct(aside, 32, 0.05)
    assert all((found[n] - v).abs().max() < 2e-3 for n, v in half.items())
    assert folders.damage(step_folder(run, 4)) == ""
