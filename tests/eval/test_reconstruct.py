"""Reconstructions of a VAE, measured: against torchmetrics, the lpips package, diffusers and numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import structural_similarity_index_measure

from eval import reconstruct
from shards.dataset import Dataset
from shards.settings import ConfigError, StageError
from tests.latents import world
from tests.train import tiny
from tests.train.test_autoencoder import pictures

SIDE = 64


def test_ssim_is_that_of_torchmetrics() -> None:
    """Whose window stays within the picture too, once what it pads is cut off."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 40, 52, 3)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(p).permute(0, 3, 1, 2).double() for p in (a, b))
    places: Any = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True, sigma=1.5)[1]
    wanted = places[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # the others see what it reflects at the border
    np.testing.assert_allclose(reconstruct.ssim(a, b), wanted.numpy(), rtol=1e-6)
    assert reconstruct.ssim(a, a) == pytest.approx(1.0)


def test_blur_is_seen() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    soft = (sharp.astype(float) + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2) + np.roll(sharp, (1, 1), (1, 2))) / 4
    for energy in (reconstruct.gradient_energy, reconstruct.high_frequencies):
        assert (energy(soft.astype(np.uint8)) < 0.6 * energy(sharp)).all()
        assert energy(np.full((1, 8, 8, 3), 77, np.uint8)) == pytest.approx(0.0, abs=1e-6)
    # Parseval: without a threshold the spectrum's power is the picture's, N times over.
    one = np.zeros((1, 8, 8, 3), np.uint8)
    one[0, 3, 4] = 10
    share = np.mean(np.hypot(*np.meshgrid(np.fft.fftfreq(8), np.fft.fftfreq(8))) >= 0.25)
    assert reconstruct.high_frequencies(one)[0] == pytest.approx(3 * 100 * 64 * share)


@pytest.mark.slow
def test_every_figure_is_that_of_others(tmp_path: Path, inception_weights: Path) -> None:
    from diffusers import AutoencoderKL

    lpips = pytest.importorskip("lpips")
    tiny.make_images(tmp_path / "images", counts=(5, 4), side=80)
    folder = world.save_vae(tmp_path / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        peer = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
    save_model(peer, str(tmp_path / "lpips.safetensors"))
    dataset = Dataset.open(str(tmp_path / "images"))
    found = reconstruct.measure(
        dataset, str(folder), SIDE, 8, str(tmp_path / "lpips.safetensors"), str(inception_weights), "cpu"
    )
    originals = np.stack([reconstruct.resize_crop(p, SIDE)[0] for p in pictures(tmp_path).values()])[:8]
    vae = AutoencoderKL.from_pretrained(folder).eval()
    to_unit = lambda p: torch.from_numpy(p).permute(0, 3, 1, 2).float() / 127.5 - 1  # noqa: E731
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_unit(originals)).latent_dist.mean).sample
        decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        distance = peer(to_unit(decoded), to_unit(originals)).flatten().double().numpy()
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights))
        sides = [network(torch.from_numpy(p).permute(0, 3, 1, 2))[0].double().numpy() for p in (originals, decoded)]
    error = np.square(originals.astype(float) - decoded).mean(axis=(1, 2, 3))
    m = {k: v["value"] for k, v in found.metrics.items()}
    assert m["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-4)
    assert m["lpips"] == pytest.approx(distance.mean(), rel=1e-4)
    assert m["gradient_energy"] == pytest.approx(
        reconstruct.gradient_energy(decoded).sum() / reconstruct.gradient_energy(originals).sum(), rel=1e-3
    )
    a, b = ((f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in sides)
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    gap = np.square(sides[0].mean(axis=0) - sides[1].mean(axis=0)).sum()
    assert m["rfid"] == pytest.approx(gap + (a**2).sum() + (b**2).sum() - 2 * trace, rel=1e-2)
    assert "mostly bias" in found.notes[0]
    url = reconstruct.write(found, str(tmp_path / "reports"), "The VAE of <b>")
    page = Path(url).read_text()
    assert page.count("<figure>") == 8
    assert "The VAE of &lt;b&gt;" in page
    report = json.loads((tmp_path / "reports" / "vae.json").read_text())
    assert report["metrics"]["psnr"]["n"] == 8
    assert report["weights"].keys() == {"vae", "perceptual", "inception"}
    assert (tmp_path / "reports" / "vae.png").stat().st_size > 1000


def test_nothing_to_look_at_is_one_sentence(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "images", counts=(2,))
    with pytest.raises(StageError, match="there is not one image to reconstruct"):
        reconstruct.measure(Dataset.open(str(tmp_path / "images")), str(world.save_vae(tmp_path / "vae")), 16, 0)


def test_pictures_too_small_for_ssim_are_refused(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "images", counts=(2,))
    with pytest.raises(ConfigError, match=r"latents\.resolution is 8, and SSIM looks at 11 pixels"):
        reconstruct.measure(Dataset.open(str(tmp_path / "images")), str(world.save_vae(tmp_path / "vae")), 8)
