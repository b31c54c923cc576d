"""The perceptual distances: against the lpips package, against transformers' own hidden states, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file, save_model

from latents.weights import find_clip
from shards.dataset import Dataset
from shards.settings import ConfigError
from tests.train import tiny
from train import perceptual
from train.encoder_config import AutoencoderConfig
from train.objectives import build


def pictures(count: int = 2, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, count, 3, side, side, generator=generator) * 2 - 1
    return x, y


def peer(net: str) -> Any:
    """The package's model with random weights."""
    lpips = pytest.importorskip("lpips")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).eval().requires_grad_(False)
        for layer in range(5):
            getattr(model, f"lin{layer}").model[1].weight.uniform_(0, 1)
    return model


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_the_package(net: str, tmp_path: Path) -> None:
    """In value and gradient, from the package's own state dict and from torchvision's names beside the linear ones."""
    model, (x, y) = peer(net), pictures()
    save_model(model, str(tmp_path / "whole.safetensors"))
    names = {perceptual._plain(k): v.clone() for k, v in model.state_dict().items() if not k.startswith("lins.")}
    save_file(names, tmp_path / "parts.safetensors")
    wanted = model(x.requires_grad_(), y).flatten()
    slope = torch.autograd.grad(wanted.sum(), x)[0]
    for name in ("whole", "parts"):
        ours = perceptual.load(str(tmp_path / f"{name}.safetensors"))
        found = ours(x, y)
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
        error = (torch.autograd.grad(found.sum(), x)[0] - slope).abs().max()
        assert error < 1e-5 * slope.abs().max()
    assert perceptual.digest(str(tmp_path / "whole.safetensors")) != perceptual.digest(
        str(tmp_path / "parts.safetensors")
    )


def test_a_tower_of_transformers_is_compared_block_by_block(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path / "tower")
    ours, (x, y) = perceptual.load(str(tmp_path / "tower")), pictures(side=32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (perceptual.TOWER_MEAN, perceptual.TOWER_STD))
    with torch.no_grad():
        states = [
            model(pixel_values=((p + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states[1:] for p in (x, y)
        ]
    cosines = torch.stack([torch.cosine_similarity(a, b, dim=-1).mean(dim=1) for a, b in zip(*states, strict=True)])
    torch.testing.assert_close(ours(x, y), 1 - cosines.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert ours(x, x).abs().max() < 1e-6
    large, _ = pictures(side=48)
    ours(large.requires_grad_(), pictures(side=48)[1]).sum().backward()
    assert large.grad is not None
    assert large.grad.abs().max() > 0
    ours.train()
    assert not ours.tower.training


def test_a_tower_of_open_clip_is_taken(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.CLIP(**tiny.CLIP)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}))
    ours, (x, y) = perceptual.load(str(tmp_path)), pictures(side=16)
    assert ours.count == tiny.CLIP["vision_cfg"]["layers"]
    assert (ours(x, y) > 1e-3).all()
    assert not any(p.requires_grad for p in ours.parameters())
    assert perceptual.digest(str(tmp_path))


def test_a_file_that_is_no_lpips_is_one_sentence(tmp_path: Path) -> None:
    cases = {
        "absent": (None, "there is no file"),
        "broken": (b"nothing", "cannot be read"),
        "other": ({"w": torch.zeros(1)}, "holds neither VGG16 nor AlexNet: its features.0.weight is absent"),
        "half": (
            {"features.0.weight": torch.zeros(64, 3, 11, 11)},
            "is no LPIPS of alexnet: features.0.bias is absent",
        ),
    }
    for name, (content, sentence) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            save_file(content, path)
        for call in (perceptual.digest, perceptual.load):
            with pytest.raises(ConfigError, match=sentence) as e:
                call(str(path))
            assert str(e.value).startswith("autoencoder.perceptual.weights: ")
            assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="no folder of transformers, and no CLIP"):
        perceptual.digest(str(tmp_path / "nowhere"))


def test_a_file_of_weights_behind_the_name_of_a_model_is_no_lpips(tmp_path: Path) -> None:
    """MODEL:/file is open_clip's, also where the file ends as LPIPS's do; a colon in a file's own name is not."""
    save_file({"w": torch.zeros(1)}, tmp_path / "clip.safetensors")
    ref = f"ViT-B-32:{tmp_path / 'clip.safetensors'}"
    assert perceptual.digest(ref) == find_clip(ref).digest
    save_file({"w": torch.zeros(1)}, tmp_path / "a:b.safetensors")
    with pytest.raises(ConfigError, match="holds neither VGG16 nor AlexNet"):
        perceptual.digest(str(tmp_path / "a:b.safetensors"))


@pytest.mark.parametrize(("net", "smallest"), [("alexnet", 31), ("vgg16", 16)])
def test_pictures_too_small_for_the_network_are_refused_before_the_first_step(
    net: str, smallest: int, tmp_path: Path
) -> None:
    weights = {k: torch.rand(shape) for k, shape in perceptual._wanted(net).items()}
    save_file(weights, tmp_path / "lpips.safetensors")
    ours = perceptual.load(str(tmp_path / "lpips.safetensors"))
    assert ours(*pictures(1, smallest)).isfinite().all()
    with pytest.raises(RuntimeError, match="Output size is too small"):
        ours(*pictures(1, smallest - 1))
    tiny.make_images(tmp_path / "images", counts=(4,))
    given = {
        **tiny.configuration(tmp_path)["autoencoder"],
        "perceptual": {"weights": str(tmp_path / "lpips.safetensors")},
    }
    config = AutoencoderConfig(**{**given, "resolution": [32, 8]})
    sentence = rf"needs images of {smallest} pixels, and autoencoder\.resolution is 8"
    with pytest.raises(ConfigError, match=sentence):
        build("autoencoder", config, [Dataset.open(str(tmp_path / "images"))], 3)
