"""The frozen CLIP within the step: where, in which arithmetic, and that it changes nothing of what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latents.encoders import TextEncoder, load_text
from shards.dataset import Dataset
from shards.layout import RunPaths
from tests.train import forked, tiny
from tests.train.test_tuning import make_run
from train.checkpoint import load_weights
from train.config import TrainConfig
from train.objectives import build

pytestmark = pytest.mark.timeout(900)

TOLD = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run whose latents hold tokens alone; not to be changed."""
    return make_run(tmp_path_factory.mktemp("tokens") / "r", text="tokens", text_layer="penultimate")


def objective_of(run: RunPaths, **values: Any) -> Any:
    config = TrainConfig(**{"images": 16, "batch_size": 8, "unet": tiny.UNET, **values})
    return build("train", config, [Dataset.open(run.latents)], 5)


@pytest.mark.parametrize("values", [{}, {"captions": {"caption": 1.0}}], ids=["tokens", "captions"])
def test_the_loader_tokenises_and_touches_no_network(
    tokens: RunPaths, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(tokens, **values)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a network ran in the loader's thread")

    monkeypatch.setattr(torch.nn.Module, "__call__", never)
    monkeypatch.setattr(torch.Tensor, "to", never)
    batch = objective.batch(np.arange(8))
    assert (batch["tokens"].dtype, batch["tokens"].shape) == (torch.int64, (8, 20))
    assert "text" not in batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_features_are_those_of_open_clip_in_autocasts_arithmetic(tokens: RunPaths, dtype: torch.dtype) -> None:
    objective = objective_of(tokens)
    batch = objective.batch(np.arange(8))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        text, added = objective.conditioning.condition(batch)
        loss, _ = objective(batch)
    assert (text.dtype, text.requires_grad, added) == (dtype, False, None)
    assert objective.conditioning.text.tower.token_embedding.weight.dtype == dtype
    exact = load_text(Dataset.open(tokens.latents).manifest["text"]["ref"], "penultimate").encode(batch["tokens"])
    error = float((text.float() - exact).norm() / exact.norm())
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (error > 1e-5) == (dtype != torch.float32), "in that arithmetic, and not in another"
    loss.backward()
    # The CLIP is no part of what is trained, moved to checkpoints or given to the optimizer.
    assert {n for n, _ in objective.named_parameters()} == {f"model.{n}" for n, _ in objective.model.named_parameters()}
    assert objective.model is objective.unet
    assert all(p.grad is None for p in objective.conditioning.text.model.parameters())


def test_memory_and_flops_are_counted_without_moving_the_encoder(tokens: RunPaths) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    objective = objective_of(tokens)
    text: TextEncoder = objective.conditioning.text
    batch = objective.batch(np.arange(8))
    before = {n: p.data_ptr() for n, p in text.tower.named_parameters()}
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        fake = {k: mode.from_tensor(v).to("cuda") for k, v in batch.items()}
        rows, _ = text.features(fake["tokens"], torch.bfloat16)
        assert (rows.device.type, rows.dtype, tuple(rows.shape)) == ("cuda", torch.bfloat16, (8, 20, 32))
    # Two blocks of width 32 over 8 captions of 20 tokens: 24 w^2 a token for the products with weights.
    assert counter.get_total_flops() >= 2 * 8 * 20 * 24 * 32**2
    assert {n: p.data_ptr() for n, p in text.tower.named_parameters()} == before
    assert text.tower.token_embedding.weight.dtype == torch.float32


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokens": ({"text": "tokens"}, {}),
    "captions": ({"text": "embeddings"}, {"captions": {"caption": 1.0}}),
    "sdxl-tokens": ({"text": "tokens", "text_layer": "penultimate_no_norm"}, {"unet": {**tiny.UNET, **TOLD}}),
    "sdxl-stored": (
        {"text": "embeddings", "text_layer": "penultimate_no_norm", "text_pooled": True},
        {"unet": {**tiny.UNET, **TOLD}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fits_on_two_ranks_learn_what_one_learns(kind: str, tmp_path: Path) -> None:
    latents, train = KINDS[kind]
    data = make_run(tmp_path / "data", **latents)
    found = []
    for ranks, stage in ((1, 0), (2, 2)):
        folder = tmp_path / f"on{ranks}"
        folder.mkdir()
        for name in ("latents", "autoencoder", "clip"):
            (folder / name).symlink_to(Path(data.run) / name)
        config = tiny.write_config(folder, tiny.configuration(folder, images=24, zero_stage=stage, **train))
        forked.fit(config, ranks)
        checkpoint = Path(RunPaths(str(folder)).checkpoints) / "step-00000003"
        found.append(load_weights(checkpoint, "raw"))
        assert not any(k.startswith("text") for k in found[-1])
        loss = [json.loads(line)["loss"] for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
        assert np.isfinite(loss).all()
        assert load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").keys() == found[-1].keys()
    begin = build(
        "train", TrainConfig(images=24, batch_size=8, **{"unet": tiny.UNET, **train}), [Dataset.open(data.latents)], 5
    ).model.state_dict()
    moved = max(float((begin[k] - v).abs().max()) for k, v in found[0].items())
    apart = max(float((found[1][k] - v).abs().max()) for k, v in found[0].items())
    assert moved > 1e-3
    assert apart < 2e-5
