"""An export is made from what its checkpoint says: its encoders, its resolution, its data; and from nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from eval import model as models
from latents.config import LatentsConfig
from latents.encoders import load_text, load_vae
from latents.stage import LatentsStage
from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_file
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.latents import world
from tests.objects import bucket
from tests.train import forked, tiny
from tests.train.test_export import pictures
from train.config import TrainConfig
from train.export import build_pipeline, export, fold_shift
from train.folders import STATES
from train.objectives import build

pytestmark = pytest.mark.timeout(600)


def encode(run: RunPaths, vae: Path, clip: Path, **settings: Any) -> Dataset:
    config = LatentsConfig(**{"resolution": 32, "batch_size": 4, "device": "cpu", **settings})
    stage = LatentsStage(config, run, str(vae), str(clip))
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return Dataset.open(run.latents)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunPaths]:
    """Weights, and latents of two resolutions in a run of their own; not to be changed."""
    root = tmp_path_factory.mktemp("elsewhere")
    run = RunPaths(str(root / "data"))
    world.image_dataset(run, shards=1, rows=12)
    encode(run, world.save_vae(root / "vae"), world.save_clip(root / "clip"), more_resolutions=[16])
    return root, run


def configured(folder: Path, source: str, **train: Any) -> Path:
    data = tiny.configuration(folder, images=16, sources=[{"latents": source}], **train)
    return tiny.write_config(folder, data)


def provenance(run: RunPaths) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((Path(run.model) / "carrara.json").read_text())
    return facts


def test_sources_elsewhere_and_another_resolution_are_exported(elsewhere: Any, tmp_path: Path) -> None:
    """The run itself has no latents at all; the main resolution of those it trains on is another one."""
    _, data = elsewhere
    # The grid of samples is drawn from the first checkpoint on.
    samples = {"prompts": ["a red circle", "a blue square"], "steps": 2}
    config = configured(tmp_path, data.latents, resolution=16, samples=samples)
    forked.fit(config, 1)
    run = RunPaths(str(tmp_path))
    assert not Path(run.latents).exists()
    manifest = json.loads((Path(run.checkpoints) / "step-00000002" / "manifest.json").read_text())
    dataset = Dataset.open(data.latents)
    assert manifest["encoders"] == {"vae": dataset.manifest["vae"], "text": dataset.manifest["text"]}
    assert manifest["resolution"] == 16
    pipeline = StableDiffusionPipeline.from_pretrained(run.model, safety_checker=None)
    assert pipeline.unet.config.sample_size == 8
    assert pictures(pipeline, prompt="a red circle").shape == (1, 16, 16, 3)
    assert "16 x 16" in (Path(run.model) / "README.md").read_text()
    facts = provenance(run)
    assert (facts["latents"]["resolution"], facts["latents"]["samples"]) == (16, len(dataset))
    assert facts["latents"]["fingerprint"] == dataset.fingerprint
    # eval asks the checkpoint, too.
    subject = models.find(run)
    assert subject.size == 16
    drawn = pictures(models.build_pipeline(run, subject), prompt="a red circle")
    assert np.abs(drawn - pictures(pipeline, prompt="a red circle")).max() < 1e-5
    from PIL import Image

    grids = sorted((Path(run.train) / "samples").glob("*.png"))
    assert Image.open(grids[0]).size == (2 * 16 + 2, 16)


def save_checkpoint(run: RunPaths, facts: dict[str, Any], **config: Any) -> UNet2DConditionModel:
    """A checkpoint as the loop writes it, with these facts in its manifest; returns its UNet."""
    torch.manual_seed(2)
    shape = {**tiny.UNET, "sample_size": 16, "cross_attention_dim": 32, "out_channels": 4}
    settings = TrainConfig(images=16, batch_size=8, **config)
    shape["out_channels"] *= 2 if settings.learned_variance else 1
    unet = UNet2DConditionModel(**shape)
    folder = Path(run.checkpoints) / "step-00000002"
    folder.mkdir(parents=True)
    for name in ("weights", *STATES):
        save_file(unet.state_dict(), folder / f"{name}.safetensors")
    manifest = {
        "format_version": 1,
        "files": {f.name: {"size": f.stat().st_size, "sha256": digest_file(f)} for f in folder.iterdir()},
        "images": 16,
        "step": 2,
        "config": settings.model_dump(mode="json"),
        "model_config": dict(unet.config),
        **facts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return unet.eval()


def facts_of(dataset: Dataset, **more: Any) -> dict[str, Any]:
    from train.state import describe

    encoders = {"vae": dataset.manifest["vae"], "text": dataset.manifest["text"]}
    return {"encoders": encoders, "resolution": dataset.manifest["resolution"], "sources": [describe(dataset)], **more}


def test_latents_made_again_with_other_encoders_change_no_export(elsewhere: Any, tmp_path: Path) -> None:
    root, _ = elsewhere
    run = RunPaths(str(tmp_path / "r"))
    world.image_dataset(run, shards=1, rows=6)
    before = encode(run, root / "vae", root / "clip")
    trained = facts_of(before, fingerprint={"weights": {n: before.manifest[n]["digest"] for n in ("vae", "text")}})
    save_checkpoint(run, trained)
    shutil.rmtree(run.latents)
    encode(run, world.save_vae(tmp_path / "vae", seed=9), world.save_clip(tmp_path / "clip", seed=9))
    export(run.run)
    assert load_vae(run.model).digest == before.manifest["vae"]["digest"]
    # A checkpoint from before it kept its encoders cannot be exported with the new ones.
    file = Path(run.checkpoints) / "step-00000002" / "manifest.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("encoders", "resolution", "sources")}
    file.write_text(json.dumps(old))
    shutil.rmtree(run.model)
    with pytest.raises(StageError, match="made again with another VAE than step-00000002 was trained with"):
        export(run.run)
    assert not Path(run.model).exists()


def test_text_of_two_layers_is_not_mixed(elsewhere: Any, tmp_path: Path) -> None:
    root, data = elsewhere
    other = RunPaths(str(tmp_path / "r"))
    world.image_dataset(other, shards=1, rows=6)
    last = encode(other, root / "vae", root / "clip", text_layer="last", more_resolutions=[16])
    config = TrainConfig(images=16, batch_size=8, unet=tiny.UNET, sources=({}, {"latents": other.latents}))
    with pytest.raises(ConfigError, match=r"train\.sources: .* another text_layer"):
        build("train", config, [Dataset.open(data.latents), last], 0)


@pytest.mark.parametrize("parts", [{"use_quant_conv": True, "use_post_quant_conv": True}, {}])
def test_a_shifted_vae_draws_right_in_a_pipeline_that_only_scales(parts: dict[str, bool]) -> None:
    """Against decode(z / scale + shift), which Stable Diffusion 3's pipeline does and Stable Diffusion's does not."""
    torch.manual_seed(0)
    shape = {
        **tiny.VAE,
        "scaling_factor": 1.5,
        "shift_factor": 0.6,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    vae = AutoencoderKL(**{**shape, **parts}).eval()
    z, x = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.decode(z / 1.5 + 0.6).sample
        mean = vae.encode(x).latent_dist.mean
        folded = fold_shift(vae)
        torch.testing.assert_close(folded.decode(z / 1.5).sample, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded.encode(x).latent_dist.mean, mean - 0.6, rtol=1e-4, atol=1e-5)
    assert not folded.config.shift_factor
    again = AutoencoderKL.from_config(folded.config)
    again.load_state_dict(folded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval().decode(z / 1.5).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_shift_is_taken_from_what_is_trained_on(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    config = TrainConfig(images=16, batch_size=8, unet=tiny.UNET)
    plain: Any = build("train", config, [dataset], 0)
    dataset.manifest["vae"] = {**dataset.manifest["vae"], "config": {"shift_factor": 0.25}}
    shifted: Any = build("train", config, [dataset], 0)
    a, b = (o.batch(np.arange(8))["x0"] for o in (plain, shifted))
    torch.testing.assert_close(a - 0.25 * 0.9, b, rtol=1e-5, atol=1e-6)


def test_a_learned_variance_is_drawn_with_guidance(elsewhere: Any, tmp_path: Path) -> None:
    """The exported model in plain diffusers against the full UNet whose noise alone is guided, written out."""
    _, data = elsewhere
    run = RunPaths(str(tmp_path / "r"))
    dataset = Dataset.open(data.latents)
    whole = save_checkpoint(run, facts_of(dataset), learned_variance=True)
    assert whole.config.out_channels == 8
    pipeline = StableDiffusionPipeline.from_pretrained(export(run.run), safety_checker=None)
    assert pipeline.unet.config.out_channels == 4
    scale, steps = 7.5, 4
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        "a red circle", num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="latent"
    ).images
    text = load_text(dataset.manifest["text"]["ref"], "penultimate")
    rows = text.encode(text.tokenize(["", "a red circle"]))
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in range(steps):
            t = round(1000 - i * 1000 / steps) - 1
            empty, full = whole(x.repeat(2, 1, 1, 1), t, rows).sample[:, :4].chunk(2)
            noise = empty + scale * (full - empty)
            now, then = alpha_bar[t], alpha_bar[max(t - 1000 // steps, 0)]
            x = then**0.5 * (x - (1 - now) ** 0.5 * noise) / now**0.5 + (1 - then) ** 0.5 * noise
    torch.testing.assert_close(drawn, x.float(), rtol=1e-3, atol=1e-3)


def test_settings_that_would_be_refused_today_are_exported(elsewhere: Any, tmp_path: Path) -> None:
    """A checkpoint whose settings would be refused today, or are no more, is exported as it is."""
    _, data = elsewhere
    run = RunPaths(str(tmp_path / "r"))
    unet = save_checkpoint(run, facts_of(Dataset.open(data.latents)), prediction_type="v_prediction")
    file = Path(run.checkpoints) / "step-00000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"] |= {"zero_terminal_snr": True, "snr_gamma": 5.0, "no_such_setting_any_more": 3}
    file.write_text(json.dumps(manifest))
    pipeline = build_pipeline(run.run)
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    stored = load_file(Path(run.checkpoints) / "step-00000002" / "ema.safetensors")
    assert all(torch.equal(pipeline.unet.state_dict()[k], v) for k, v in stored.items())
    assert unet.config.out_channels == 4


def test_a_run_on_an_object_store_is_exported_there(
    elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an export before it died half-way: until the last file is there, it counts as none."""
    import train.export

    _, data = elsewhere
    here = RunPaths(str(tmp_path / "r"))
    save_checkpoint(here, facts_of(Dataset.open(data.latents)))
    put, calls = train.export.put_file, []

    def dies(url: str, parts: Any) -> Any:
        calls.append(url)
        if len(calls) == 5:
            raise OSError("the line is cut")
        return put(url, parts)

    with bucket() as url:
        run = RunPaths(f"{url}/run")
        for file in sorted((Path(here.checkpoints) / "step-00000002").iterdir()):
            storage.write_atomic(storage.join(run.checkpoints, "step-00000002", file.name), file.read_bytes())
        monkeypatch.setattr(train.export, "put_file", dies)
        with pytest.raises(OSError, match="the line is cut"):
            export(run.run)
        assert not storage.exists(storage.join(run.model, "carrara.json"))
        assert export(run.run) == run.model
        count = len(calls)
        assert export(run.run) == run.model
        assert len(calls) == count, "it is there already"
        fsspec.filesystem("s3").get(run.model, str(tmp_path / "copy"), recursive=True)
    drawn = [
        pictures(StableDiffusionPipeline.from_pretrained(p, safety_checker=None), prompt="a red circle")
        for p in (tmp_path / "copy", export(here.run))
    ]
    assert np.array_equal(*drawn)
