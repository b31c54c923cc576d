"""Models that are told pictures do with them what they are for: measured on a small world, by the demo's detector.

Each is fitted by the product's own stages, opened by plain diffusers, and judged on pictures that nobody trained on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import small_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model of captions that do not say the shape."""
    run = tmp_path_factory.mktemp("systems") / "base"
    run.mkdir()
    small_world.prepare(run)
    small_world.fit(run, "train", 4800, unet=small_world.UNET)
    return run


def test_shapes_follow_edges_where_the_prompt_does_not_say_them(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "control"
    small_world.share_latents(run, base)
    small_world.fit(run, "train", 4800, start_from=str(base / "model"), control={})
    on, off, _ = small_world.shapes_follow_edges(run / "model")
    assert off["shape"] < 0.5
    assert on["shape"] >= 0.9
    assert on["all"] > off["all"] + 0.4


def test_make_it_blue_makes_it_blue_and_leaves_the_rest(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "edit"
    run.mkdir()
    small_world.prepare_edits(run, base)
    small_world.fit(run, "train", 4800, start_from=str(base / "model"), edit={})
    edited, _ = small_world.edits_do_as_told(run / "model")
    assert edited["all"] >= 0.8


def test_what_is_missing_is_painted_to_fit_what_is_there(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "inpaint"
    small_world.share_latents(run, base)
    small_world.fit(run, "train", 4800, start_from=str(base / "model"), inpaint={})
    ours, blended, shown, _ = small_world.paints_what_is_missing(run / "model", base / "model")
    assert ours > blended + 2
    assert shown["colour"] > 0.9
