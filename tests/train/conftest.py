"""A run folder with tiny image and latent shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    tiny.make_latents(folder / "latents")
    tiny.make_images(folder / "images")
    return folder
