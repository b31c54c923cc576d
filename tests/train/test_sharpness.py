"""What the adversarial term is for: grain that no latent can hold is painted again, where errors alone leave blur."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import reconstruct
from shards.dataset import Dataset
from tests.train import forked, small_world, tiny
from tests.train.test_autoencoder import model

SIDE, IMAGES = 16, 3200


def grainy(count: int, seed: int) -> np.ndarray:
    """uint8 [N,16,16,3]: a disc of fine grain on a smooth ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    out = np.empty((count, SIDE, SIDE, 3))
    for i in range(count):
        one, other = rng.uniform(60, 200, (2, 3))
        slope = x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
        slope = (slope - slope.min()) / np.ptp(slope)
        across, down = rng.uniform(5, 11, 2)
        disc = (x - across) ** 2 + (y - down) ** 2 < 20
        grain = rng.choice([-50.0, 50.0], (SIDE, SIDE)) * disc
        out[i] = one + (other - one) * slope[..., None] + grain[..., None]
    found: np.ndarray = np.clip(out, 0, 255).astype(np.uint8)
    return found


def fitted(run: Path, images: Path, term: dict[str, Any] | None) -> None:
    run.mkdir()
    (run / "images").symlink_to(images)
    shape = model(3, 4) | {"block_out_channels": [16] * 3, "norm_num_groups": 8, "mid_block_add_attention": False}
    settings = {
        "model": shape, "initialisation": "thumbnail", "resolution": SIDE, "images": IMAGES, "batch_size": 16,
        "learning_rate": 2e-3, "warmup_images": 320, "betas": (0.5, 0.9), "ema_halflife_images": 400, "threads": 1,
        "zero_stage": 0, "streams": 8, "adversarial": term,
    }  # fmt: skip
    config = tiny.write_config(run, {"run": str(run), "seed": 3, "autoencoder": settings})
    forked.fit(config, 1, stage="autoencoder")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_adversarial_term_gives_grain_back(tmp_path: Path) -> None:
    """Beside the same fit without it, on pictures that neither saw."""
    small_world.write_images(tmp_path / "images", grainy(1000, 1), ["grain"] * 1000)
    small_world.write_images(tmp_path / "heldout", grainy(64, 2), ["grain"] * 64)
    found = {}
    for name, term in (("plain", None), ("sharp", {"channels": 16, "layers": 2, "start_images": IMAGES // 4})):
        began = time.perf_counter()
        fitted(tmp_path / name, tmp_path / "images", term)
        model_folder = str(tmp_path / name / "autoencoder" / "model")
        seen = reconstruct.measure(Dataset.open(str(tmp_path / "heldout")), model_folder, SIDE, 64, device="cpu")
        found[name] = {k: m["value"] for k, m in seen.metrics.items()}
        print(f"{name}: {time.perf_counter() - began:.0f} s")
        print(reconstruct.summary(seen))
        reconstruct.sheet(seen, 8, 64).save(tmp_path / f"{name}.png")
    plain, sharp = found["plain"], found["sharp"]
    assert sharp["gradient_energy"] > 1.5 * plain["gradient_energy"]
    assert sharp["high_frequencies"] > 1.5 * plain["high_frequencies"]
    assert sharp["psnr"] > plain["psnr"] - 4
