"""What the tests of the latents share: image shards, a small VAE and a small CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.latents import world


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    return world.save_vae(tmp_path_factory.mktemp("vae") / "model")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return world.save_clip(tmp_path_factory.mktemp("clip") / "model")
