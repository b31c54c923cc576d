"""The command line, end to end: VAE, CLIP, latents, UNet, and what opens without Carrara."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.layout import RunPaths
from tests.train import forked, tiny
from train.checkpoint import load_weights
from train.folders import latest_complete


@pytest.mark.timeout(900)
def test_every_stage_and_the_pipeline_at_the_end(run: Path) -> None:
    from latents.config import LatentsConfig
    from latents.encoders import load_text, load_vae
    from latents.stage import LatentsStage

    (run / "latents").rename(run / "not-these")
    config = tiny.write_config(run, tiny.configuration(run))
    forked.fit(config, 2, stage="autoencoder")
    forked.fit(config, 2, stage="clip")

    paths = RunPaths(str(run))
    vae_ref, text_ref = str(run / "autoencoder" / "model"), str(run / "clip" / "model")
    vae, text = load_vae(vae_ref), load_text(text_ref, "last")
    for stage, model in (("autoencoder", vae.model), ("clip", text.model)):
        last = latest_complete(run / stage / "checkpoints")
        assert last is not None
        state = model.state_dict()
        for name, average in load_weights(last, "ema").items():
            assert torch.equal(state[name], average.reshape(state[name].shape)), name

    stage = LatentsStage(LatentsConfig(resolution=16, text_layer="last"), paths, vae_ref, text_ref)
    work = stage.worker()
    manifest = stage.finish(work(task) for task in stage.tasks())
    # The measured scale makes the latents that the UNet sees of unit variance. Channels are of one size, so the
    # variance over all is that within channels plus that between their means.
    channels = manifest["channels"]
    mean, std = np.array(channels["mean"]), np.array(channels["sample_std"])
    overall = np.sqrt((std**2).mean() + mean.var())
    assert vae.scaling_factor * overall == pytest.approx(1.0, rel=0.01)

    text_out = tiny.train_main(config, 2)  # a real process a rank, as a launcher starts them
    assert "train" in text_out
    assert json.loads((run / "status" / "train.json").read_text())["state"] == "done"
    pipeline_opens(run)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    forked.on_ranks(1, run_again, str(config))
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def run_again(config: str) -> None:
    from train.main import main

    assert [main(["--config", config, "--stage", s]) for s in ("autoencoder", "clip", "train")] == [0, 0, 0]


def pipeline_opens(run: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    last = latest_complete(run / "checkpoints")
    assert last is not None
    average = load_weights(last, "ema")
    assert all(torch.equal(v, average[k]) for k, v in pipeline.unet.state_dict().items())
    image = pipeline("a red square", num_inference_steps=2, height=16, width=16, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert np.isfinite(image).all()
