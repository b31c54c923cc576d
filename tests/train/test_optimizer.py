"""AdamW with its averages against torch, and the schedules against their formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.engine import Engine
from train.fit_config import FitConfig
from train.muon import direction, orthogonalise
from train.optimizer import AdamW, ema_decay, is_hidden, learning_rate, parameter_groups


def optimizer_of(parameters: list[torch.Tensor], **settings: Any) -> AdamW:
    optimizer = AdamW([{"params": parameters, "weight_decay": 0.1, "lr": 1e-2}], ("ema",), (0.9, 0.95), 1e-7)
    optimizer.begin(parameters, [], True)
    return optimizer


def test_update_is_adamws_and_the_average_is_its_recursion() -> None:
    """Beside torch's on scaled gradients; steps with a veto leave no bit changed, whatever their gradients are."""
    torch.manual_seed(0)
    ours = [torch.randn(7, 5, requires_grad=True), torch.randn(11, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    mine = optimizer_of(ours)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1, fused=True)
    averages = [p.detach().double().clone() for p in theirs]
    for step in range(12):
        decay = 0.5 + 0.03 * step
        mine.param_groups[0]["decays"] = {"ema": decay}
        mine.scale, mine.veto = torch.tensor(8.0), torch.tensor(float(step in (3, 7)))
        before = [v.clone() for p in ours for v in (p.detach(), *mine.state[p].values())]
        for a, b in zip(ours, theirs, strict=True):
            gradient = torch.randn(a.shape)
            a.grad, b.grad = gradient * (math.inf if step == 3 else 8.0), gradient
        mine.step()
        if step in (3, 7):
            after = [v for p in ours for v in (p.detach(), *mine.state[p].values())]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            continue
        reference.step()
        averages = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(averages, theirs, strict=True)]
    for a, b, e in zip(ours, theirs, averages, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(mine.state[a]["ema"].double(), e, rtol=1e-6, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = optimizer_of([p, q])
    p.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(p, torch.ones(3))
    assert torch.equal(q, torch.ones(3))
    assert torch.equal(optimizer.state[q]["ema"], torch.ones(3))


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


def test_wsd_stays_and_goes_down_at_the_end_alone() -> None:
    """... so that a longer run has the same rates until the shorter one's cool-down begins."""
    shape = {"batch_size": 10, "peak": 2.0, "warmup": 100, "final_fraction": 0.1, "schedule": "wsd", "cooldown": 200}
    short = {i: learning_rate(i, total=1000, **shape) for i in range(0, 1001, 10)}
    long = {i: learning_rate(i, total=5000, **shape) for i in range(0, 1001, 10)}
    assert short[0] == pytest.approx(0.2)
    assert {i: v for i, v in short.items() if i <= 800} == {i: v for i, v in long.items() if i <= 800}
    assert short[800] == 2.0
    assert short[850] == pytest.approx(0.1 * 2 + 0.9 * 2 * 0.5)  # 1 - sqrt(1 / 4)
    assert short[1000] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(list(short.values())[9:], list(short.values())[10:], strict=False))


def test_muon_is_for_the_blocks_matrices_and_its_direction_is_orthogonal() -> None:
    """Singular values near one (Newton-Schulz stops early by design), the same singular vectors, AdamW's size."""
    hidden = {
        "down_blocks.0.resnets.0.conv1.weight": (64, 32, 3, 3),
        "mid_block.attentions.0.to_q.weight": (64, 64),
        "text.encoder.layers.0.self_attn.q_proj.weight": (64, 64),
        "text.embeddings.token_embedding.weight": (99, 64),
        "projector.layers.0.weight": (64, 64),
        "conv_in.weight": (64, 4, 3, 3),
        "time_embedding.linear_1.weight": (64, 64),
        "up_blocks.1.resnets.0.norm1.weight": (64,),
    }
    assert [n for n, s in hidden.items() if is_hidden(n, s)] == list(hidden)[:3]
    torch.manual_seed(0)
    for rows, columns in ((48, 20), (20, 48), (20, 33), (32, 32)):
        momentum = torch.randn(3, rows, columns)
        found = direction(momentum) / (0.2 * max(rows, columns) ** 0.5)
        u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
        singular = torch.linalg.svdvals(found)
        assert float(singular.min()) > 0.3
        assert float(singular.max()) < 1.3
        along = torch.diagonal(u.mT @ found @ vh.mT, dim1=-2, dim2=-1)
        assert torch.allclose(along.sort(descending=True).values, singular, atol=2e-3)
        rms = direction(momentum).square().mean().sqrt()
        assert 0.1 < float(rms) < 0.3


def test_long_matrices_are_made_orthogonal_by_their_gram_matrix_alone() -> None:
    """The same as the iteration on the whole matrix, also where singular values lie far apart."""
    torch.manual_seed(0)
    for shape in ((2, 24, 200), (2, 200, 24)):
        u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        x = u @ torch.diag(torch.logspace(0, -4, 24)) @ vh
        whole = x / torch.linalg.matrix_norm(x, keepdim=True)
        for _ in range(5):
            gram = whole @ whole.mT
            whole = 3.4445 * whole + (-4.7750 * gram + 2.0315 * gram @ gram) @ whole
        torch.testing.assert_close(orthogonalise(x), whole, rtol=0, atol=2e-3)


def test_what_tf32_would_round_goes_the_long_way() -> None:
    """Under TF32 the Gram matrix's small eigenvalues may come out negative, and grow without bound."""
    before = torch.get_float32_matmul_precision()
    x = torch.randn(2, 24, 200)
    exact = orthogonalise(x)
    torch.set_float32_matmul_precision("high")
    try:
        assert not torch.equal(orthogonalise(x), exact)  # a different sum, of the same thing
        torch.testing.assert_close(orthogonalise(x), exact, rtol=0, atol=2e-3)
    finally:
        torch.set_float32_matmul_precision(before)


def test_beside_muon_adamws_rate_keeps_its_ratio() -> None:
    config = FitConfig(images=1, batch_size=1, optimizer="muon", learning_rate=4e-3, adamw_learning_rate=1e-3)
    groups: list[dict[str, object]] = [{"muon": True}, {}]
    engine = SimpleNamespace(config=config, optimizer=SimpleNamespace(param_groups=groups))
    Engine.rates(engine, 2e-3, {"ema": 0.5})
    assert [g["lr"] for g in groups] == [2e-3, pytest.approx(0.5e-3)]
    engine.config = FitConfig(images=1, batch_size=1, optimizer="muon", learning_rate=4e-3)
    Engine.rates(engine, 2e-3, {"ema": 0.5})
    assert [g["lr"] for g in groups] == [2e-3, 2e-3]
    with pytest.raises(ValueError, match="beside muon"):
        FitConfig(images=1, batch_size=1, adamw_learning_rate=1e-3)
