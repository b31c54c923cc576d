"""The engine's step beside plain PyTorch: what it computes, what it leaves alone, and how often the host waits."""

from __future__ import annotations

import collections
import contextlib
import gc
import math
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.train import forked, tiny
from tests.train.test_zero import objective_of, settings
from train import engine as engines
from train import guard as guards
from train import muon
from train.engine import Engine
from train.fit_config import FitConfig
from train.guard import Guard
from train.objective import Objective
from train.optimizer import AdamW8bit, parameter_groups

pytestmark = pytest.mark.timeout(900)

STEPS, BATCH, DECAY, RATE, CLIP = 10, 8, 0.9, 1e-3, 0.5
BAD = {5: math.nan, 7: 60.0}  # what the loss of a step is multiplied with


class Scaled(torch.nn.Module):
    """An objective whose loss is multiplied by batch["times"]."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective, self.model, self.saves_frozen, self.beside = objective, objective.model, True, objective.beside

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        times = batch["times"][0]
        loss, figures = self.objective({k: v for k, v in batch.items() if k != "times"})
        return loss * times, figures

    def checkpoint_activations(self) -> None:
        self.objective.checkpoint_activations()


def share(objective: Objective, step: int, rank: int, world: int, part: int, parts: int) -> dict[str, torch.Tensor]:
    positions = np.arange(step * BATCH, (step + 1) * BATCH)[rank + world * part :: world * parts]
    batch = objective.batch(positions)
    # A NaN comes from one rank alone.
    times = 1.0 if step == 5 and rank else BAD.get(step, 1.0)
    return batch | {"times": torch.full((len(positions),), times)}


def config_of(config: str, **changes: Any) -> tuple[Objective, FitConfig]:
    objective, section = objective_of(Path(config))
    # Such an eps, lest Adam make signs of rounding errors.
    update = {"eps": 1e-4, "grad_clip": CLIP, "batch_size": BATCH, **changes}
    return objective, section.model_copy(update=update)


def plain(config: str, optimizer: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[int], float]:
    """The reference: one process, whole batches and matrices, decisions on the host, torch's AdamW, Muon as published.

    Weights, averages, vetoed steps, and the loss of the last batch with the average in the weights' place.
    """
    torch.set_num_threads(1)
    objective, c = config_of(config)
    model, judge, vetoed = objective.model, Guard(6.0), []
    groups = parameter_groups(model, 0.01, optimizer)
    hidden = [p for g in groups if g.get("muon") for p in g["params"]]
    adam = torch.optim.AdamW([g for g in groups if not g.get("muon")], lr=RATE, betas=c.betas, eps=c.eps)
    momentum = [torch.zeros_like(p) for p in hidden]
    average = [p.detach().clone() for p in model.parameters()]
    for step in range(STEPS):
        model.zero_grad()
        loss, _ = Scaled(objective)(share(objective, step, 0, 1, 0, 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not judge(loss.detach().double()[None], norm.double()):
            vetoed.append(step)
            continue
        adam.step()
        with torch.no_grad():
            for p, m in zip(hidden, momentum, strict=True):
                assert p.grad is not None
                m.lerp_(p.grad, 1 - muon.BETA)
                blend = p.grad.lerp(m, muon.BETA).view(1, *muon.as_matrix(p.shape))
                p.mul_(1 - RATE * 0.01).sub_(RATE * muon.direction(blend).view_as(p))
            for e, p in zip(average, model.parameters(), strict=True):
                e.lerp_(p, 1 - DECAY)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p, e in zip(model.parameters(), average, strict=True):
            p.copy_(e)
        expected = float(objective(objective.batch(np.arange(BATCH)))[0])
    return weights, dict(zip(weights, average, strict=True)), vetoed, expected


@contextlib.contextmanager
def waits(found: collections.Counter[str]) -> Iterator[None]:
    """Counts, by place, the calls that make the host wait for a device, were the tensors on one."""
    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")
    before = {n: getattr(torch.Tensor, n) for n in names}

    def counting(call: Any) -> Any:
        def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frames = traceback.extract_stack()[:-1]
            frame = next(f for f in reversed(frames) if "/torch/" not in f.filename)
            found[f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"] += 1
            return call(self, *args, **kwargs)

        return counted

    from deepspeed.accelerator import get_accelerator

    kind, synchronize = type(get_accelerator()), type(get_accelerator()).synchronize
    for name, call in before.items():
        setattr(torch.Tensor, name, counting(call))
    kind.synchronize = counting(synchronize)
    try:
        yield
    finally:
        kind.synchronize = synchronize
        for name, call in before.items():
            setattr(torch.Tensor, name, call)


def whole(engine: Engine, name: str) -> dict[str, torch.Tensor]:
    """The whole parameters of a state, gathered from all ranks."""
    flats, found = engine.values(name), {}
    mine = [(p.name, p.shape, p.offset, flats[p.flat].narrow(0, p.start, p.length).clone()) for p in engine.pieces]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name_, shape, offset, values in (x for rank in everyone for x in rank):
        full = found.setdefault(name_, torch.full(shape, torch.nan))
        full.view(-1)[offset : offset + len(values)] = values
    return found


def train(config: str, stage: int, **changes: Any) -> dict[str, Any]:
    """Ten steps of two micro-batches with an Engine; what `plain` gives, the waits, and what vetoed steps moved."""
    from train import ranks

    guards.WARM_UP = 3
    me = ranks.join(1)
    objective, c = config_of(config, zero_stage=stage, **changes)
    gc.collect()  # an engine of before has a farewell of its own, which must not come in one of this one's steps
    engine = Engine(c, Scaled(objective), me, BATCH // me.world // 2, 2)
    judge, seen, vetoed, moved, late = Guard(6.0), collections.Counter[str](), [], [], []
    for step in range(STEPS):
        batches = [share(objective, step, me.rank, me.world, part, 2) for part in range(2)]
        before = [v.clone() for _, _, v in engine.arrays()]
        # In its first steps ZeRO 3 compares what the ranks call.
        with waits(seen if step > 2 else collections.Counter()):
            for batch in batches:
                engine.backward(batch)
            engine.rates(RATE, {"ema": DECAY})
            outcome = engine.step(judge, False)
        late.append(outcome)
        same = all(torch.equal(a, b) for a, (_, _, b) in zip(before, engine.arrays(), strict=True))
        if not outcome.applied:
            vetoed.append(step)
        if same != (not outcome.applied):
            moved.append(step)
    held = [v.clone() for v in engine.values("weights")]
    engine.eval()
    with engine.using("ema"), torch.no_grad():
        ones = torch.ones(BATCH)
        loss = float(engine(objective.batch(np.arange(BATCH)) | {"times": ones})[0])
    assert all(torch.equal(a, b) for a, b in zip(held, engine.values("weights"), strict=True))
    result = {"weights": whole(engine, "weights"), "ema": whole(engine, "ema"), "vetoed": vetoed, "loss": loss}
    return result | {"moved": moved, "waits": dict(seen), "norm": [float(o.norm) for o in late]}


def train_all(config: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(config, **c) for c in changes]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.fixture
def config(run: Path) -> str:
    return str(settings(run))


def backward() -> float:
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    return float(x.grad.sum())


def test_ranks_can_be_forked_whatever_was_compiled_before() -> None:
    """Of the tests themselves: in which order they run is not to matter."""
    with FakeTensorMode():
        torch.empty(2)
    assert backward() == 4.0
    assert forked.Fork(0, 1, 0, backward, ()).result() == 4.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_take_the_steps_of_a_plain_loop_and_nobody_waits(
    config: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 0 to 3, two micro-batches a step: weights, averages, vetoes (a NaN on one rank, a spike), their traces."""
    monkeypatch.setattr(guards, "WARM_UP", 3)
    weights, average, vetoed, loss = plain(config, optimizer)
    assert vetoed == [5, 7]
    changes = [{"stage": stage, "optimizer": optimizer} for stage in range(4)]
    for results in forked.on_ranks(2, train_all, config, changes):
        for stage, found in enumerate(results):
            assert found["vetoed"] == vetoed, stage
            assert found["moved"] == [], f"ZeRO {stage}: a vetoed step changed something, or another one nothing"
            assert furthest(found["weights"], weights) < 2e-6, stage
            assert furthest(found["ema"], average) < 2e-6, stage
            assert found["loss"] == pytest.approx(loss, rel=1e-5), stage
            # ZeRO 3 asks whether a number that lies on the host is finite.
            assert sum(found["waits"].values()) <= (STEPS if stage == 3 else 0), (stage, found["waits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts", [((1, (0, 2)), (4, (1, 3))), pytest.param(((1, (1, 3)), (4, (0, 2))), marks=pytest.mark.nightly)]
)
def test_four_ranks_and_one_agree_under_muon(
    config: str, layouts: tuple[tuple[int, tuple[int, ...]], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "WARM_UP", 3)
    weights, _, _, _ = plain(config, "muon")
    for world, stages in layouts:  # two ranks under each stage are above
        changes = [{"stage": stage, "optimizer": "muon"} for stage in stages]
        for results in forked.on_ranks(world, train_all_in_halves, config, changes):
            for found in results:
                assert furthest(found["weights"], weights) < 4e-6


def train_all_in_halves(config: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(config, **c) for c in changes]


def test_offload_takes_the_same_steps(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "WARM_UP", 3)
    weights, average, vetoed, _ = plain(config, "adamw")
    changes = [{"stage": stage, "offload": "cpu"} for stage in (1, 3)]
    for results in forked.on_ranks(2, train_all, config, changes):
        for found in results:
            assert (found["vetoed"], found["moved"]) == (vetoed, [])
            assert furthest(found["weights"], weights) < 1e-5
            assert furthest(found["ema"], average) < 1e-5


# ---- arithmetic ------------------------------------------------------------------------------------


def gradients_in_bf16(config: str, stage: int) -> tuple[float, bool]:
    """How far this rank's averaged gradients are from the sum, in float64, of what each rank has; whether bf16 ran."""
    from train import ranks

    me = ranks.join(1)
    objective, c = config_of(config, zero_stage=stage, precision="bf16")
    alone, _ = objective_of(Path(config))
    batch = objective.batch(np.arange(BATCH)[me.rank :: me.world])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = alone(batch)
    loss.backward()
    exact = {}
    for n, p in alone.model.named_parameters():
        assert p.grad is not None
        total = p.grad.double()
        dist.all_reduce(total)
        exact[n] = (total / me.world).view(-1)
    engine = Engine(c, objective, me, BATCH // me.world, 1)
    seen: list[torch.dtype] = []
    layer = objective.model.get_submodule("down_blocks.0.resnets.0.conv1")
    layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    engine.backward(batch)
    flat = engine._gradients()
    if stage:
        found = [
            torch.cat([g.reshape(-1) for g in engine.engine.optimizer.averaged_gradients[i]])
            for i in range(len(engine.flats))
        ]
    else:
        found = [g.view(-1) for g in flat]
    got = torch.cat([found[p.flat][p.start : p.start + p.length] for p in engine.pieces]).double()
    want = torch.cat([exact[p.name][p.offset : p.offset + p.length] for p in engine.pieces])
    return float((got - want).norm() / want.norm()), seen == [torch.bfloat16]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_of_bf16_are_summed_up_in_float32(run: Path, stage: int) -> None:
    # Where residual branches begin at zero, so do most gradients.
    config = str(settings(run, initialisation="torch"))
    for error, ran in forked.on_ranks(2, gradients_in_bf16, config, stage):
        assert ran, "precision bf16 computed in another precision"
        assert error < 1e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how", [True, "blocks"])
def test_compile_is_of_the_networks_or_of_their_blocks(config: str, how: bool | str) -> None:
    """What is compiled, before anything is: torch compiles at the first call."""
    objective, _ = config_of(config)
    engines._compile(objective, how)
    compiled = [m for m in objective.modules() if m._compiled_call_impl is not None]
    networks = objective.networks()
    if how == "blocks":
        assert {type(m).__name__ for m in compiled} >= {"ResnetBlock2D"}
        assert not any(m is n for m in compiled for n in networks)
    else:
        assert compiled == networks


def remembered(config: str, checkpointing: bool) -> int:
    """Bytes that the backward pass of one batch needs from the forward pass."""
    from train import ranks

    me = ranks.join(1)
    objective, c = config_of(config, activation_checkpointing=checkpointing)
    engine = Engine(c, objective, me, BATCH, 1)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
        engine(objective.batch(np.arange(BATCH)))
    return sum(saved)


def test_activation_checkpointing_remembers_less(config: str) -> None:
    (with_,), (without,) = (forked.on_ranks(1, remembered, config, c) for c in (True, False))
    assert with_ < 0.6 * without


def handled(config: str, stage: int) -> tuple[int, int, bool]:
    """Of one step of one rank: parameters whose values were laid elsewhere, gradients that were copied for a sum of
    one, and whether the model has what the optimizer made."""
    from train import ranks

    me = ranks.join(1)
    objective, c = config_of(config, zero_stage=stage)
    engine = Engine(c, objective, me, BATCH, 1)
    judge, batch = Guard(None), objective.batch(np.arange(BATCH))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
        engine.backward(batch)
    engine.rates(RATE, {"ema": DECAY})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as step:
        engine.step(judge, False)
    count = {
        name: sum(e.name == name for e in found.events())
        for found, name in (
            (step, "aten::_has_compatible_shallow_copy_type"),
            (backward, "aten::unflatten_dense_tensors"),
        )
    }
    made, model = whole(engine, "weights"), dict(engine.model.named_parameters())
    return *count.values(), all(torch.equal(made[n], model[n]) for n in made)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_of_one_rank_does_nothing_once_a_parameter_that_it_need_not(config: str, stage: int) -> None:
    ((laid, copied, same),) = forked.on_ranks(1, handled, config, stage)
    assert same
    if stage:
        assert laid == 0
    else:
        assert copied == 0


def formats(config: str, channels_last: bool) -> bool:
    objective, c = config_of(config, channels_last=channels_last)
    objective.config = c
    seen: list[bool] = []
    layer = objective.model.get_submodule("down_blocks.0.resnets.0.conv1")
    layer.register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    objective(objective.batch(np.arange(2)))
    return all(seen)


def test_channels_last_reaches_the_convolutions(config: str) -> None:
    assert formats(config, True)
    assert not formats(config, False)


# ---- 8 bits ----------------------------------------------------------------------------------------


def test_moments_in_8_bits_follow_adamw(config: str) -> None:
    """Beside torch's AdamW on the same gradients; a vetoed step moves no bit; a checkpoint's moments come back."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = torch.randn(40_000) * 0.1
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = AdamW8bit([{"params": [ours], "weight_decay": 0.01}], ("ema",), (0.9, 0.99), 1e-6)
    mine.begin([ours], [], True)
    reference = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    mine.param_groups[0] |= {"lr": 1e-3, "decays": {"ema": DECAY}}
    for step in range(30):
        gradient = torch.randn(40_000) * (1 + torch.arange(40_000) / 10_000)
        mine.veto = torch.full((), float(step == 20))
        before = [v.clone() for _, v in mine.arrays(ours)]
        ours.grad = gradient if step != 20 else gradient * math.nan
        mine.step()
        if step == 20:
            assert all(torch.equal(a, b) for a, (_, b) in zip(before, mine.arrays(ours), strict=True))
            continue
        theirs.grad = gradient
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    assert mine.state[ours]["exp_avg"][0][0].dtype == torch.uint8
    kept = dict(mine.arrays(ours))
    other = AdamW8bit([{"params": [torch.nn.Parameter(start)]}], ("ema",), (0.9, 0.99), 1e-6)
    flat = other.param_groups[0]["params"][0]
    other.begin([flat], [], True)
    for name, values in kept.items():
        other.restore(flat, name, 0, values)
    other.restored(29, 29)
    for name, values in other.arrays(flat):
        assert (values - kept[name]).norm() <= 0.02 * kept[name].norm(), name


def test_without_bitsandbytes_8_bits_are_refused_with_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    with pytest.raises(forked.RankError, match=r"ConfigError: optimizer adamw8bit needs bitsandbytes.*pip install"):
        forked.fit(tiny.write_config(run, tiny.configuration(run, optimizer="adamw8bit")), 1)


def test_deepspeed_comes_without_mlflow() -> None:
    """In a process of its own: here all may have been imported already. MLflow itself can be imported afterwards."""
    script = (
        "import sys; from train.ranks import import_deepspeed; import_deepspeed()\n"
        "assert not [m for m in sys.modules if m.partition('.')[0] == 'mlflow']\n"
        "import importlib.util; assert importlib.util.find_spec('mlflow')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tiny.ROOT, check=True)
