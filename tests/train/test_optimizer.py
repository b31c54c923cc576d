"""AdamW with its averages against torch, and the schedules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from train.optimizer import EmaAdamW, ema_decay, learning_rate, parameter_groups


@pytest.mark.parametrize("fused", [False, True])
def test_update_is_adamws_and_the_average_is_its_recursion(fused: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(7, 5, requires_grad=True), torch.randn(11, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1, "fused": fused}
    mine, reference = EmaAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    averages = [p.detach().double().clone() for p in theirs]
    for step in range(12):
        decay = 0.5 + 0.03 * step
        mine.param_groups[0]["ema_decays"] = {"ema": decay}
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        averages = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(averages, theirs, strict=True)]
    for a, b, e in zip(ours, theirs, averages, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(mine.state[a]["ema"].double(), e, rtol=1e-6, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = EmaAdamW([p, q], lr=0.1, weight_decay=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert "ema" not in optimizer.state.get(q, {})


def test_halflife_is_in_images_and_does_not_depend_on_the_batch() -> None:
    weight = {}
    for batch in (10, 50, 250):
        weight[batch] = math.prod(ema_decay(10_000 + i, batch, 1000, None) for i in range(batch, 1001, batch))
    assert weight == {b: pytest.approx(0.5, rel=1e-12) for b in weight}


def test_rampup_forgets_the_random_beginning() -> None:
    assert ema_decay(64, 64, 1000, 0.05) == 0.0  # the first average is the first value
    assert ema_decay(6464, 64, 100_000, 0.05) == pytest.approx(0.5 ** (64 / 320))
    assert ema_decay(10_000_064, 64, 1000, 0.05) == ema_decay(64, 64, 1000, None)


def test_learning_rate_over_images() -> None:
    shape = {"batch_size": 10, "total": 1000, "peak": 2.0, "warmup": 100, "final_fraction": 0.1}
    rates = {i: learning_rate(i, schedule="cosine", **shape) for i in range(0, 1000, 10)}
    assert rates[0] == pytest.approx(0.2)
    assert rates[40] == pytest.approx(1.0)
    assert rates[90] == rates[100] == 2.0
    assert rates[550] == pytest.approx(0.1 * 2 + 0.9 * 2 * 0.5)
    assert learning_rate(1000, schedule="cosine", **shape) == pytest.approx(0.2)
    assert learning_rate(990, schedule="constant", **shape) == 2.0


def test_decay_is_for_matrices_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].bias.requires_grad = False
    matrices, rest = parameter_groups(model, 0.3)
    assert [p.shape for p in matrices["params"]] == [(4, 3)]
    assert matrices["weight_decay"] == 0.3
    assert [p.shape for p in rest["params"]] == [(4,), (4,)]
    assert rest["weight_decay"] == 0.0
