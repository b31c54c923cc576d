"""Grids of samples while training goes on: what a pipeline would draw, on any number of ranks, and no reason to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import StageError
from tests.train import tiny
from tests.train.test_facts import facts_of, save_checkpoint
from tests.train.test_tuning import make_run
from train import samples
from train.config import TrainConfig
from train.export import build_pipeline
from train.objectives import build
from train.part_config import SamplesConfig

PROMPTS = ("a red circle", "a blue square", "")


def ranks_of(rank: int, world: int, others: list[Any]) -> Any:
    """One of several ranks, whose gather gives what the others gave before."""

    def gather(value: Any) -> list[Any]:
        others.append(value)
        return list(reversed(others))  # the last one asked is rank 0

    return SimpleNamespace(rank=rank, world=world, first=rank == 0, device=torch.device("cpu"), gather=gather)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return make_run(tmp_path_factory.mktemp("samples") / "r")


KINDS: dict[str, dict[str, Any]] = {
    "stored": {},
    "encoded": {"captions": {"caption": 1.0}},
    "flow": {"prediction_type": "flow_prediction"},
    "variance": {"learned_variance": True},
}


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_a_grid_is_what_the_exported_pipeline_draws(values: dict[str, Any], run: RunPaths, tmp_path: Any) -> None:
    dataset = Dataset.open(run.latents)
    config = TrainConfig(images=16, batch_size=8, unet=tiny.UNET, **values)
    objective: Any = build("train", config, [dataset], 5)
    exported = RunPaths(str(tmp_path / "r"))
    unet = save_checkpoint(exported, facts_of(dataset), **values)
    objective.model.load_state_dict(unet.state_dict())
    others: list[Any] = []
    drawn: Any = None
    for rank in (1, 0):  # three prompts on two ranks: one is drawn twice
        sampler = samples.Samples(SamplesConfig(prompts=PROMPTS, steps=3, seed=7), objective, ranks_of(rank, 2, others))
        drawn = sampler.draw()
        assert (drawn is None) == (rank == 1)
    assert objective.training, "as it was"
    generators = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    expected = build_pipeline(exported.run)(
        list(PROMPTS), num_inference_steps=3, guidance_scale=3.0, generator=generators, output_type="np"
    ).images
    assert drawn.shape == (32 + samples.GAP + 32, 32 + samples.GAP + 32, 3)
    assert np.abs(samples.tile(np.rint(expected * 255).astype(np.uint8)).astype(int) - drawn).max() <= 1
    assert drawn[:32, :32].std() > 1


def test_pictures_that_cannot_be_drawn_end_no_training(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(images=16, batch_size=8, unet=tiny.UNET)
    objective: Any = build("train", config, [Dataset.open(run.latents)], 5)
    drawn = samples.Samples(SamplesConfig(prompts=PROMPTS[:1], steps=2), objective, ranks_of(0, 1, []))

    def gone(*_: Any) -> None:
        raise StageError("the VAE is not there")

    monkeypatch.setattr(samples, "load_vae", gone)
    assert drawn.draw() is None
    assert "no samples could be drawn: the VAE is not there" in caplog.text
