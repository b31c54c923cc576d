"""Settings that cannot be are refused with one sentence that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shards.dataset import Dataset
from shards.settings import ConfigError, load_sections
from tests.train import tiny
from train.config import TrainingSections
from train.fit_config import FitConfig, layout
from train.main import main
from train.objectives import build


def read(run: Path, data: dict[str, Any], *overrides: str) -> TrainingSections:
    return load_sections(str(tiny.write_config(run, data)), overrides, TrainingSections)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.batchsize=3", "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.round_robin_gradients=true", "unknown key 'train.round_robin_gradients'"),
        ("train.precision=fp8", "train.precision"),
        ("train.warmup_images=100", r"warmup_images \(100\) is longer than images \(48\)"),
        ("train.micro_batch_size=3", r"batch_size \(8\) is not a multiple of micro_batch_size \(3\)"),
        ("train.betas=[0.9, 1.0]", "betas"),
        ("train.keep_checkpoints=1", "keep_checkpoints"),
        ("clip.micro_batch_size=4", "micro_batch_size cannot be set for clip"),
        ("train.beta_end=0.0001", "beta_end"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as e:
        read(tmp_path, tiny.configuration(tmp_path), override)
    assert "\n" not in str(e.value)


def test_layout_of_ranks() -> None:
    config = FitConfig(images=10, batch_size=24, micro_batch_size=3)
    assert layout("train", config, 1) == (3, 8)
    assert layout("train", config, 2) == (3, 4)
    assert layout("train", config, 8) == (3, 1)
    assert layout("train", FitConfig(images=10, batch_size=24), 4) == (6, 1)
    assert layout("train", config, 24) == (1, 1)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 24, which 5 ranks cannot share"):
        layout("train", config, 5)
    with pytest.raises(ConfigError, match="micro_batch_size is 3, which does not divide the 4 images"):
        layout("train", config, 6)


def test_operational_settings_leave_the_fingerprint_alone() -> None:
    one, other = FitConfig(images=10, batch_size=8), FitConfig(images=10, batch_size=8, ranks=4, zero_stage=3)
    assert one.settings() == other.settings()
    assert one.settings() != FitConfig(images=10, batch_size=8, eps=1e-6).settings()


@pytest.mark.parametrize(
    ("stage", "key", "value", "sentence"),
    [
        ("train", "unet", {"block_out_chanels": [8]}, "did you mean 'block_out_channels'"),
        ("train", "unet", {**tiny.UNET, "cross_attention_dim": 99}, "text encoder of the latents has 8 values a token"),
        ("train", "unet", {**tiny.UNET, "in_channels": 3}, r"train\.unet\.in_channels is 3, but the latents ask for 4"),
        ("train", "unet", {**tiny.UNET, "norm_num_groups": 7}, r"train\.unet: UNet2DConditionModel cannot be built"),
        ("autoencoder", "model", {**tiny.VAE, "latent_chanels": 4}, "did you mean 'latent_channels'"),
        ("autoencoder", "resolution", 15, "make it a multiple of 2"),
        ("clip", "model", {"embed_dim": 4, "vision_cfg": {}}, r"clip\.model\.text_cfg is missing"),
        ("clip", "model", {**tiny.CLIP, "vision_cfg": {"layrs": 3}}, "did you mean 'layers'"),
        ("clip", "model", {**tiny.CLIP, "text_cfg": {"hf_tokenizer_name": "x/y"}}, "cannot be fitted here"),
    ],
)
def test_models_that_cannot_be(run: Path, stage: str, key: str, value: Any, sentence: str) -> None:
    data = tiny.configuration(run)
    data[stage][key] = value
    sections = read(run, data)
    dataset = Dataset.open(str(run / ("latents" if stage == "train" else "images")))
    with pytest.raises(ConfigError, match=sentence) as e:
        build(stage, getattr(sections, stage), [dataset], 0)
    assert "\n" not in str(e.value)


def test_exit_codes(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(tiny.write_config(run, tiny.configuration(run)))
    assert main(["--config", "absent.yaml"]) == 2
    assert main(["--config", config, "train.images=0"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["--config", config]) == 2
    monkeypatch.delenv("WORLD_SIZE")
    (run / "latents" / "dataset.json").unlink()
    assert main(["--config", config]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert all(line.startswith("carrara: ") for line in lines)
    assert "there is no such configuration file" in lines[0]
    assert "train.images" in lines[1]
    assert "3 ranks cannot share" in lines[2]
    assert "no finished dataset" in lines[3]


def test_a_model_that_a_batch_does_not_fit_is_found_before_any_work(run: Path) -> None:
    from tests.train import forked

    unet = {**tiny.UNET, "class_embed_type": "timestep"}  # a network that wants class labels beside the text
    config = tiny.write_config(run, tiny.configuration(run, unet=unet))
    with pytest.raises(forked.RankError, match=r"ConfigError: train\.unet: a batch does not go through"):
        forked.fit(config, 1)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("file", sorted((tiny.ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_the_configurations_that_come_with_it_can_be_used(file: Path) -> None:
    sections = load_sections(str(file), (), TrainingSections)
    assert layout("train", sections.train, sections.train.ranks)[0] >= 1


@pytest.mark.parametrize("file", sorted((tiny.ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_the_unets_that_come_with_it_can_be_built(file: Path) -> None:
    """On `meta`, at their own widths; one batch of latents and text of the CLIP that is named goes through."""
    import open_clip
    from diffusers import UNet2DConditionModel

    sections = load_sections(str(file), (), TrainingSections)
    train = sections.train
    if not train.unet:  # a pipeline's own: one to start from, or one that is only evaluated
        assert train.start_from or "coco30k" in file.name
        return
    clip = sections.clip.model or open_clip.get_model_config(str(sections.clip.pretrained).partition(":")[0])
    width = clip["text_cfg"]["width"]
    channels = sections.autoencoder.model.get("latent_channels", 4)
    with torch.device("meta"):
        arguments = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width, **train.unet}
        unet = UNet2DConditionModel(**arguments)
        out = unet(torch.zeros(2, channels, 16, 16), torch.zeros(2), torch.zeros(2, 77, width)).sample
    assert out.shape == (2, channels, 16, 16)
    count = sum(p.numel() for p in unet.parameters())
    if file.name == "sd2-256.yaml":
        assert count == 865_910_724  # as published (stabilityai/stable-diffusion-2-base)
