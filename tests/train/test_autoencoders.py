"""Models on latents of autoencoders without a posterior, from images to what opens where there is no Carrara."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from eval.generate import ImageGenerator, Sample
from eval.model import build_pipeline, of_pipeline
from eval.sample import _kind
from latents.config import LatentsConfig
from latents.stage import LatentsStage
from latents.weights import find_vae
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, validate
from shards.stage import begin
from tests.latents import world
from tests.latents.test_encoders import save_dc, save_tiny
from tests.train import forked, tiny
from tests.train.test_export import save_checkpoint
from tests.train.test_resume import config_of
from train.autoencoder_dc_pipeline import AutoencoderDCPipeline
from train.config import TrainConfig
from train.export import build_pipeline as checkpoint_pipeline
from train.export import fold_shift
from train.objectives import build

pytestmark = pytest.mark.timeout(900)

SAVED = {"AutoencoderDC": save_dc, "AutoencoderTiny": save_tiny}


def make_run(folder: Path, kind: str) -> RunPaths:
    """Images, encoders and latents with tokens."""
    run = RunPaths(str(folder))
    world.image_dataset(run)
    vae = SAVED[kind](folder / "vae")
    clip = world.save_clip(folder / "clip")
    config = LatentsConfig(resolution=32, batch_size=4, text="tokens", device="cpu", moments=False)
    stage = LatentsStage(config, run, str(vae), str(clip))
    begin(stage)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return run


ALONE = """
import sys, torch, numpy
from diffusers import DiffusionPipeline
p = DiffusionPipeline.from_pretrained('model', {how})
p.set_progress_bar_config(disable=True)
draw = lambda kind: p('a red circle', num_inference_steps=3, guidance_scale=3.0, output_type=kind,
                      generator=torch.Generator().manual_seed(0)).images
assert not any(m.split('.')[0] in ('train', 'latents', 'shards') for m in sys.modules)
numpy.savez('drawn.npz', latents=draw('latent'), pixels=draw('np'), kind=type(p).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny"])
def test_from_images_to_what_opens_in_diffusers(tmp_path: Path, kind: str) -> None:
    import diffusers

    run = make_run(tmp_path / "run", kind)
    arrays = ColumnShard(Dataset.open(run.latents), 0).arrays
    assert "logstd" not in arrays
    samples = {"prompts": ["a red circle"], "steps": 2}
    forked.fit(config_of(tmp_path / "run", images=16, samples=samples), 1)
    assert list((tmp_path / "run" / "train" / "samples").glob("*.png"))
    shutil.copytree(run.model, tmp_path / "alone" / "model")
    own = kind == "AutoencoderDC"
    script = ALONE.format(how="trust_remote_code=True" if own else "safety_checker=None")
    given = {"cwd": tmp_path / "alone", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-P", "-c", script], **given)
    assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "alone" / "drawn.npz")
    assert str(drawn["kind"]) == ("AutoencoderDCPipeline" if own else "StableDiffusionPipeline")
    # The latents that it drew, decoded by the VAE as it was given.
    vae = getattr(diffusers, kind).from_pretrained(tmp_path / "run" / "vae").eval()
    with torch.no_grad():
        z = torch.from_numpy(drawn["latents"]) / vae.config.scaling_factor
        pixels = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert drawn["pixels"].shape == (1, 32, 32, 3)
    np.testing.assert_allclose(drawn["pixels"], pixels, atol=1e-5)
    # Carrara's own commands open it without running what lies beside the weights.
    (Path(run.model) / "pipeline.py").write_text("raise SystemExit(3)\n")
    pipeline = build_pipeline(run, of_pipeline(run.model))
    again = pipeline(
        "a red circle",
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    np.testing.assert_allclose(again, drawn["pixels"], atol=1e-5)
    assert ("trust_remote_code=True" in (tmp_path / "alone" / "model" / "README.md").read_text()) == own
    # Evaluation, whose images may be of another size.
    made, finite = ImageGenerator(pipeline, "ddim", 2, 3.0, size=48)([Sample("k", 0, "a red circle")])
    assert made.shape == (1, 48, 48, 3)
    assert finite.all()
    if own:
        with pytest.raises(ConfigError, match="a model with an AutoencoderDC generates from prompts alone"):
            _kind(pipeline, {"image"})


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny"])
def test_the_pipeline_is_one_that_decodes_with_the_vae(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", kind)
    save_checkpoint(run, 10, seed=2)
    found = checkpoint_pipeline(run.run)
    wanted = AutoencoderDCPipeline if kind == "AutoencoderDC" else StableDiffusionPipeline
    assert type(found) is wanted
    assert found.vae_scale_factor == find_vae(str(tmp_path / "run" / "vae")).downscale


@pytest.mark.parametrize(
    ("kind", "more", "sentence"),
    [
        ("AutoencoderDC", {"inpaint": {}}, r"train\.inpaint: diffusers' StableDiffusionInpaintPipeline cannot decode"),
        ("AutoencoderTiny", {"upscale": {}}, r"train\.upscale: .* with an AutoencoderTiny, of which the latents are"),
        (
            "AutoencoderDC",
            {"unet": {**tiny.UNET, "addition_embed_type": "text_time"}},
            "and its StableDiffusionXLPipeline cannot decode with an AutoencoderDC",
        ),
    ],
)
def test_what_diffusers_could_not_decode_is_not_trained(
    tmp_path: Path, kind: str, more: dict[str, Any], sentence: str
) -> None:
    tiny.make_latents(tmp_path / "latents")
    dataset = Dataset.open(str(tmp_path / "latents"))
    dataset.manifest["vae"]["kind"] = kind
    sized = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56} if "unet" in more else {}
    given = {"unet": tiny.UNET, **more, "images": 8, "batch_size": 8}
    given["unet"] = {**given["unet"], **sized}
    config = validate(TrainConfig, given, "x.yaml")
    with pytest.raises(ConfigError, match=sentence):
        build("train", config, [dataset], 5)


def test_a_shift_that_no_convolution_could_hold_is_refused() -> None:
    from diffusers import AutoencoderTiny

    with pytest.raises(StageError, match="AutoencoderTiny has no convolutions that could shift or scale"):
        fold_shift(AutoencoderTiny(shift_factor=0.1))


def test_that_shift_is_refused_before_training_and_not_after(tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "latents")
    dataset = Dataset.open(str(tmp_path / "latents"))
    shifted = {**dataset.manifest["vae"]["config"], "shift_factor": 0.1}
    dataset.manifest["vae"] = {**dataset.manifest["vae"], "kind": "AutoencoderTiny", "config": shifted}
    config = validate(TrainConfig, {"unet": tiny.UNET, "images": 8, "batch_size": 8}, "x.yaml")
    with pytest.raises(ConfigError, match="an AutoencoderTiny with a shift_factor, which no pipeline here"):
        build("train", config, [dataset], 5)
