"""Adapters' files in and out: diffusers reads both namings that are written, and either can be gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from latents.encoders import load_text
from shards.settings import ConfigError
from tests.latents import world
from train import adapters
from train.config import TrainConfig
from train.part_config import AdapterConfig, TextEncoderConfig
from train.text_export import clip_text_model

SHAPE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
DRAWN = torch.Generator().manual_seed(0)
X, T = torch.randn(2, 4, 16, 16, generator=DRAWN), torch.tensor([3, 70])
C = torch.randn(2, 20, 32, generator=DRAWN)
FILES = ("pytorch_lora_weights.safetensors", adapters.KOHYA)


def plain_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SHAPE).eval()


def shaken(model: Any, seed: int = 1) -> Any:
    """Updates as they may be after a training, where they begin as none."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    return unet(X, T, C).sample


@pytest.mark.parametrize(
    "values",
    [{"kind": "lora"}, {"kind": "locon"}, {"kind": "lora", "dora": True}, {"kind": "locon", "dora": True}],
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_diffusers_reads_both_namings_and_either_is_gone_on_from(values: dict[str, Any], tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=2, **values)
    tuned = shaken(adapters.add(plain_unet(), config, 1))
    ours, before = output(tuned), output(plain_unet())
    adapters.save_lora(adapters.state(tuned), config, {}, None, False, tmp_path)
    assert (ours - before).abs().max() > 0.03
    torch.testing.assert_close(output(adapters.merge(tuned)), ours, rtol=1e-4, atol=1e-5)
    files = [f for f in FILES if (tmp_path / f).is_file()]
    assert files == list(FILES[:1] if config.dora else FILES)
    convolutions = any("conv1" in k for k in load_file(tmp_path / FILES[0]))
    assert convolutions == (config.kind == "locon")
    for file in files:
        theirs = plain_unet()
        found = StableDiffusionPipeline.lora_state_dict(
            tmp_path / file, unet_config=theirs.config, return_lora_metadata=True
        )
        StableDiffusionPipeline.load_lora_into_unet(found[0], found[1], theirs, metadata=found[2])
        torch.testing.assert_close(output(theirs), ours, rtol=1e-5, atol=1e-6)
        # Gone on from with another alpha: it begins as what it was, not as what another scale makes of it.
        other = adapters.add(plain_unet(), AdapterConfig(rank=4, alpha=8, **values), 7)
        adapters.load_lora(str(tmp_path / file), other)
        torch.testing.assert_close(output(other), ours, rtol=1e-5, atol=1e-6)


def test_kohyas_file_has_kohyas_names(tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=2)
    adapters.save_lora(adapters.state(adapters.add(plain_unet(), config, 1)), config, {}, None, False, tmp_path)
    found = load_file(tmp_path / adapters.KOHYA)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {k.partition(".")[2] for k in found} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert float(found[f"{layer}.alpha"]) == 2
    assert found[f"{layer}.lora_down.weight"].shape == (4, 8)


@pytest.mark.parametrize("file", FILES)
def test_the_text_encoders_part_too(file: str, tmp_path: Path) -> None:
    text = load_text(str(world.save_clip(tmp_path / "clip")), "last")
    unet_config, config = AdapterConfig(rank=2), TextEncoderConfig(rank=4, alpha=2)
    unet = shaken(adapters.add(plain_unet(), unet_config, 1))
    encoder = shaken(adapters.learning_text(text, False, config, 1))
    tokens = text.tokenize(["a red circle"])
    with torch.no_grad():
        ours = encoder(tokens).last_hidden_state
    texts = {"text_encoder": adapters.state(encoder)}
    adapters.save_lora(adapters.state(unet), unet_config, texts, config, False, tmp_path)
    theirs = clip_text_model(text)
    with torch.no_grad():
        before = theirs(tokens).last_hidden_state
    found = StableDiffusionPipeline.lora_state_dict(tmp_path / file, unet_config=unet.config, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_text_encoder(
        found[0], found[1], theirs, prefix="text_encoder", metadata=found[2]
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).last_hidden_state, ours, rtol=1e-5, atol=1e-6)
    assert (before - ours).abs().max() > 1e-2
    other = adapters.learning_text(text, False, TextEncoderConfig(rank=4, alpha=16), 5)
    bare = adapters.add(plain_unet(), AdapterConfig(rank=2, alpha=1), 3)
    with pytest.raises(ConfigError, match=r"changes the text encoder too; set train\.text_encoder"):
        adapters.load_lora(str(tmp_path / file), bare)
    adapters.load_lora(str(tmp_path / file), bare, other)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).last_hidden_state, ours, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(bare), output(unet), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 8}, r"set train\.adapter\.rank and dora as the file has them"),
        ({"rank": 4, "targets": ("to_q",)}, r"which train\.adapter leaves as it is"),
        ({"rank": 4, "convolutions": True}, r"has no .*, which train\.adapter learns"),
        ({"rank": 4, "dora": True}, r"has no .*magnitude"),
    ],
)
def test_a_file_that_does_not_fit(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4)
    adapters.save_lora(adapters.state(adapters.add(plain_unet(), config, 1)), config, {}, None, False, tmp_path)
    other = adapters.add(plain_unet(), AdapterConfig(**values), 3)
    with pytest.raises(ConfigError, match=sentence) as e:
        adapters.load_lora(str(tmp_path / adapters.KOHYA), other)
    assert "\n" not in str(e.value)


def test_dora_in_kohyas_names_is_neither_written_nor_read(tmp_path: Path, caplog: Any) -> None:
    """In a sentence each time: diffusers drops such magnitudes, and others read them along the other axis."""
    config = AdapterConfig(rank=4, dora=True)
    tuned = adapters.add(plain_unet(), config, 1)
    adapters.save_lora(adapters.state(tuned), config, {}, None, False, tmp_path)
    assert not (tmp_path / adapters.KOHYA).exists()
    assert "kohya.safetensors is not written" in caplog.text
    assert "take pytorch_lora_weights.safetensors" in caplog.text
    plain = AdapterConfig(rank=4)
    adapters.save_lora(adapters.state(adapters.add(plain_unet(), plain, 1)), plain, {}, None, False, tmp_path)
    kohya = load_file(tmp_path / adapters.KOHYA)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({**kohya, f"{layer}.dora_scale": torch.ones(8, 1)}, tmp_path / "theirs.safetensors")
    for target in (plain, config):
        with pytest.raises(ConfigError, match=r"is a DoRA in kohya's names, which cannot be gone on from"):
            adapters.load_lora(str(tmp_path / "theirs.safetensors"), adapters.add(plain_unet(), target, 3))


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    unet = adapters.add(plain_unet(), AdapterConfig(rank=4), 3)
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    save_file({"weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match=r"train\.adapter\.start_from"):
            adapters.load_lora(str(tmp_path / f"{name}.safetensors"), unet)


def test_settings_of_before_keep_their_fingerprint() -> None:
    config = TrainConfig(images=8, start_from="x", adapter={"rank": 4})
    assert set(config.settings()["adapter"]) == {"kind", "rank", "alpha", "targets", "convolutions"}
    assert json.loads(config.model_dump_json())["adapter"]["kind"] == "lora"
    with pytest.raises(ValueError, match="dora is for lora and locon alone"):
        AdapterConfig(kind="loha", dora=True)
