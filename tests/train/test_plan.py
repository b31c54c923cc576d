"""The plan of a step on fake tensors, against a real run of the same step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shards.settings import ConfigError
from tests.train import tiny
from tests.train.test_engine import config_of
from tests.train.test_zero import settings
from train import plan
from train.fit_config import FitConfig

GIB = 2**30


def config(run: Path) -> str:
    return str(settings(run, initialisation="torch"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_and_memory_are_those_of_a_real_step(run: Path, precision: str, checkpointing: bool) -> None:
    """FLOPs to the last one; the peak of live storages to two percent. The model is as it was afterwards."""
    torch.set_num_threads(1)
    objective, c = config_of(config(run), activation_checkpointing=checkpointing)
    batch = objective.batch(np.arange(8))
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    found = plan.plan(objective, batch, c, precision, 8, 1)
    for name, p in objective.named_parameters():
        assert type(p) is torch.nn.Parameter, name
        assert torch.equal(p, before[name])
        assert p.grad is None
    objective.train()
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        objective(batch)[0].backward()
    assert found.flops * 8 == counter.get_total_flops()
    if checkpointing:
        objective.checkpoint_activations()
    with plan.Live() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(batch)[0]
        loss.backward()
    assert found.activations == pytest.approx(live.peak, rel=0.02)
    assert found.values == sum(p.numel() for p in objective.parameters())


def test_less_is_remembered_and_more_samples_need_more(run: Path) -> None:
    objective, c = config_of(config(run))
    batch = objective.batch(np.arange(8))
    some, more, less = (
        plan.plan(objective, batch, c.model_copy(update={"activation_checkpointing": again}), "fp32", micro, 1)
        for micro, again in ((8, False), (16, False), (8, True))
    )
    assert 1.8 * some.activations < more.activations < 2.1 * some.activations
    assert less.activations < 0.8 * some.activations
    assert some.flops == more.flops == less.flops


def plan_of(activations: int, values: int, c: FitConfig, world: int) -> plan.Plan:
    kept, host = plan.memory(values, 0, c, world)
    return plan.Plan(1e9, activations, kept, host, values)


@pytest.mark.parametrize(
    ("values", "activations", "world", "changes", "helps"),
    [
        (10**9, 60 * GIB, 1, {}, "train.activation_checkpointing: true, or train.micro_batch_size: 64"),
        (4_000_000_000, 10 * GIB, 8, {"zero_stage": 0, "activation_checkpointing": True}, "train.zero_stage: 1"),
        (3_500_000_000, 10 * GIB, 1, {"micro_batch_size": 1, "activation_checkpointing": True}, "train.offload: cpu"),
        (60_000_000_000, GIB, 1, {}, "train on more ranks, or a smaller model"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_setting_that_helps(
    values: int, activations: int, world: int, changes: dict[str, object], helps: str
) -> None:
    c = FitConfig.model_validate({"images": 10**6, "batch_size": 128, **changes})
    micro = c.micro_batch_size or 128 // world
    found = plan_of(activations, values, c, world)
    with pytest.raises(ConfigError, match="a step needs about") as e:
        plan.require_room(found, c, 80 * GIB, "train", micro, world)
    assert helps in str(e.value)
    plan.require_room(found, c, found.device, "train", micro, world)


def test_zero_keeps_what_deepspeed_documents() -> None:
    """Stable Diffusion 2 on 8 ranks, in GiB: 16, 8.1, then less; ZeRO never keeps more than the stage before."""
    c = FitConfig(images=10**6, batch_size=64)
    kept = [plan.memory(866_000_000, 0, c.model_copy(update={"zero_stage": s}), 8)[0] / GIB for s in range(4)]
    buckets = 8 * 200_000_000 / GIB
    assert kept[0] == pytest.approx(866e6 * 4 * 5 / GIB)
    assert kept[1] == pytest.approx(866e6 * 4 * (2 + 4 / 8) / GIB + buckets)
    assert kept[3] == pytest.approx(866e6 * 4 * 5 / 8 / GIB + buckets)
    assert kept == sorted(kept, reverse=True)


def test_a_batch_that_does_not_go_through_is_refused_before_any_work(run: Path) -> None:
    from tests.train import forked

    unet = {**tiny.UNET, "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2}
    path = tiny.write_config(run, tiny.configuration(run, unet={**unet, "class_embed_type": "timestep"}))
    with pytest.raises(forked.RankError, match=r"ConfigError: train\.unet: a batch does not go through this model"):
        forked.fit(path, 1)
    assert not (run / "checkpoints").exists()
