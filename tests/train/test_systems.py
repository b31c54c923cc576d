"""A model that is told pictures does with them what it is for, in a small world, on pictures never trained on.

It is fitted by the one loop, begins with the exported base model, and is drawn from by plain diffusers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image

from tests.train import small_world
from tests.train.small_world import DRAWING, Things, draw_all, read
from train.config import ControlConfig
from train.pictures import control_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT = 100


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model of captions that say the colour alone."""
    run = tmp_path_factory.mktemp("systems") / "base"
    run.mkdir()
    small_world.prepare(run)
    small_world.fit(run, 5000, unet=small_world.UNET)
    return run


@pytest.fixture(scope="module")
def unseen() -> Things:
    return Things(COUNT, 99)


def test_things_stand_where_the_edges_are(base: Path, unseen: Things, tmp_path: Path) -> None:
    run = tmp_path / "control"
    small_world.share_latents(run, base)
    small_world.fit(run, 5000, start_from=str(base / "model"), control={})
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(run / "model", safety_checker=None)
    edges = [Image.fromarray(control_image(x, ControlConfig())) for x in unseen.pixels()]
    given = {"image": edges, **DRAWING}
    colour, corner, _ = read(draw_all(pipeline, unseen.captions(), **given))
    _, without, _ = read(draw_all(pipeline, unseen.captions(), controlnet_conditioning_scale=0.0, **given))
    shares = [float((corner == unseen.corner).mean()), float((without == unseen.corner).mean())]
    print(f"where the edges are: {shares[0]:.2f}, with the control off {shares[1]:.2f}; "
          f"the prompt's colour {(colour == unseen.colour).mean():.2f}")  # fmt: skip
    assert shares[1] < 0.5
    assert shares[0] >= 0.9
    assert (colour == unseen.colour).mean() >= 0.8
