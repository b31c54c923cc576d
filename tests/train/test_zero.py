"""One loop under every ZeRO stage, precision and layout of ranks, against a plain PyTorch loop in fp32."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.dataset import Dataset
from shards.settings import load_sections
from tests.train import forked, tiny
from train import checkpoint, folders
from train import engine as engines
from train.config import TrainingSections
from train.engine import Engine
from train.objectives import Objective, build
from train.optimizer import ema_decay, learning_rate

# Each starts ranks several times; a machine shared with others needs its time.
pytestmark = pytest.mark.timeout(900)

STEPS = 4
Weights = dict[str, torch.Tensor]


def tensors(folder: Path, name: str) -> Weights:
    """A state of a checkpoint, whole."""
    return checkpoint.whole(str(folder), name)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / folders.folder_name(step)


def assert_close(a: Weights, b: Weights, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def settings(run: Path, **train: Any) -> Path:
    # eps is large, since Adam's first steps are signs of gradients, where rounding would decide.
    values = {"images": 8 * STEPS, "checkpoint_every_images": 8, "eps": 1e-3, "warmup_images": 16, "grad_clip": 0.5}
    return tiny.write_config(run, tiny.configuration(run, **{**values, **train}))


def objective_of(config: Path, stage: str = "train") -> tuple[Objective, Any]:
    sections = load_sections(str(config), (), TrainingSections)
    section = getattr(sections, stage)
    dataset = Dataset.open(sections.run + ("/latents" if stage == "train" else "/images"))
    return build(stage, section, [dataset], sections.seed), section


def plain_loop(config: Path) -> tuple[Weights, Weights]:
    """The same training in twenty lines of PyTorch: whole batches, torch's own AdamW, a full fp32 copy as EMA."""
    torch.set_num_threads(1)
    objective, c = objective_of(config)
    model = objective.model
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=c.betas, eps=c.eps)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    for images in range(0, c.images, c.batch_size):
        rate = learning_rate(images, c.batch_size, c.images, c.learning_rate, c.warmup_images, c.schedule, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, _ = objective(objective.batch(np.arange(images, images + c.batch_size)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        decay = ema_decay(images + c.batch_size, c.batch_size, c.ema_halflife_images, c.ema_rampup)
        for name, p in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    return {n: p.detach() for n, p in model.named_parameters()}, average


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_under_any_stage_equal_the_plain_loop(run: Path, stage: int) -> None:
    config = settings(run, zero_stage=stage)
    forked.train(config, 2)
    weights, average = plain_loop(config)
    last = step_folder(run, STEPS)
    assert_close(tensors(last, "weights"), weights)
    assert_close(tensors(last, "ema"), average)
    moved = max((tensors(last, "weights")[n] - w).abs().max() for n, w in initial(config).items())
    assert moved > 1e-4  # the comparison above is not one of weights that stood still


def initial(config: Path) -> Weights:
    return {n: p.detach() for n, p in objective_of(config)[0].model.named_parameters()}


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (2, "fp16")])
def test_average_is_exact_of_the_fp32_weights(run: Path, stage: int, precision: str) -> None:
    """The EMA is, to the bit, the recursion over the fp32 weights of every step, unrounded start included."""
    config = settings(run, zero_stage=stage, precision=precision)
    forked.train(config, 2)
    _, c = objective_of(config)
    average = {n: p.clone() for n, p in initial(config).items()}
    for step in range(1, STEPS + 1):
        decay = ema_decay(8 * step, 8, c.ema_halflife_images, c.ema_rampup)
        weights = tensors(step_folder(run, step), "weights")
        average = {n: e.lerp(weights[n], 1.0 - decay) for n, e in average.items()}
        assert_same(tensors(step_folder(run, step), "ema"), average)


def losses(run: Path) -> list[float]:
    lines = (run / "train" / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def beside(run: Path, folder: Path) -> Path:
    """Another run on the same latents."""
    folder.mkdir()
    (folder / "latents").symlink_to(run / "latents")
    return folder


def test_ranks_times_accumulation_see_the_same_samples_and_noise(run: Path, tmp_path: Path) -> None:
    """1x4, 2x2 and 4x1 agree to rounding, in the loss of every step too; at equal layout to the bit."""
    results = []
    for i, world in enumerate((1, 2, 4, 2)):
        folder = beside(run, tmp_path / str(i))
        forked.train(settings(folder, micro_batch_size=2), world)
        results.append((tensors(step_folder(folder, STEPS), "weights"), losses(folder)))
    for weights, curve in results[1:]:
        assert_close(weights, results[0][0])
        assert len(curve) == STEPS
        assert curve == pytest.approx(results[0][1], rel=1e-5)
    assert_same(results[1][0], results[3][0])
    assert results[1][1] == results[3][1]
    assert max(results[0][1]) > 1.01 * min(results[0][1])  # curves that were flat would agree whatever they saw


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32, to its end."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.make_latents(folder / "latents")
    forked.train(settings(folder), 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])  # what is ours is the same for 1 and 2
def test_fp16_takes_the_steps_of_fp32_and_finds_its_scale(
    plain: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm, clipping and update are those of fp32 up to fp16's rounding, whatever the loss is scaled with."""
    half = beside(plain, tmp_path / "half")
    forked.train(settings(half, zero_stage=stage, precision="fp16"), 2)
    norms = [
        [json.loads(line)["grad_norm"] for line in (f / "train" / "log.jsonl").read_text().splitlines()]
        for f in (plain, half)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert max(norms[0]) > 0.5, "clipping took place"
    start = initial(settings(half))
    steps = [{n: w - start[n] for n, w in tensors(step_folder(f, STEPS), "weights").items()} for f in (plain, half)]
    far = sum(float((a - b).square().sum()) for a, b in zip(*(s.values() for s in steps), strict=True))
    assert far < 0.03**2 * sum(float(a.square().sum()) for a in steps[0].values())
    # From a scale at which the gradients overflow it comes down, step by step, and nothing else happens there.
    high = beside(plain, tmp_path / "high")
    first, last = 2.0**30, 24
    monkeypatch.setattr(engines, "FIRST_SCALE", first)
    values = {"max_skips": 2, "images": 8 * last, "checkpoint_every_images": 32}
    config = settings(high, zero_stage=stage, precision="fp16", **values)
    forked.train(config, 2)
    manifest = folders.read_manifest(step_folder(high, last))
    skipped = last - manifest["optimizer_steps"]
    assert 5 < skipped < 20
    # Near the scale that fits, a step may pass before the last one that overflows: counted from that one, by the log.
    over = [bool(json.loads(line)["skipped"]) for line in (high / "train" / "log.jsonl").read_text().splitlines()]
    assert (len(over), sum(over)) == (last, skipped)
    steady = over[::-1].index(True)
    assert manifest["loss_scale"] == {"value": first / 2.0**skipped, "steady": steady}
    assert not (high / "train" / "events.jsonl").exists()
    # A resumed run goes on with the scale that was found.
    end = tensors(step_folder(high, last), "weights")
    shutil.rmtree(step_folder(high, last))
    forked.train(config, 2)
    assert folders.read_manifest(step_folder(high, last))["loss_scale"] == manifest["loss_scale"]
    assert_same(tensors(step_folder(high, last), "weights"), end)


@pytest.mark.slow
@pytest.mark.parametrize("how", [True, pytest.param("blocks", marks=pytest.mark.nightly)])
def test_compiled_training_is_eager_training_up_to_rounding(run: Path, tmp_path: Path, how: bool | str) -> None:
    eager, compiled = beside(run, tmp_path / "eager"), beside(run, tmp_path / "compiled")
    forked.train(settings(eager), 1)
    config = settings(compiled, compile=how)
    forked.on_ranks(1, run_counting_graphs, str(config), 1)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    for name in ("weights", *folders.STATES):
        assert_close(tensors(step_folder(compiled, STEPS), name), tensors(step_folder(eager, STEPS), name))
    # Names are the plain model's: it resumes compiled from an eager checkpoint, and the other way round.
    for folder, compile_ in ((eager, how), (compiled, False)):
        end = tensors(step_folder(folder, STEPS), "weights")
        for step in range(STEPS, 2, -1):
            shutil.rmtree(step_folder(folder, step))
        forked.on_ranks(1, run_counting_graphs, str(settings(folder, compile=compile_)), int(bool(compile_)))
        assert_close(tensors(step_folder(folder, STEPS), "weights"), end)


def run_counting_graphs(config: str, at_least: int) -> None:
    """Train, and see that the model was really compiled (or was not)."""
    from torch._dynamo.utils import counters

    forked.train_stage(config)
    found = counters["stats"]["unique_graphs"]
    assert (found >= at_least) if at_least else (found == 0), found


def test_without_a_compiler_compile_is_refused_with_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import exc

    def none_here() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_here)
    with pytest.raises(forked.RankError, match=r"ConfigError: compile: .* there is none here; install g\+\+"):
        forked.train(settings(run, compile=True), 1)


def test_another_stage_and_world_resumes(run: Path, tmp_path: Path) -> None:
    """A checkpoint of ZeRO 3 on two ranks is read by one of ZeRO 1 without a bit lost, and training goes on alike;
    other pairs are read in test_checkpoint.py."""
    forked.train(settings(run, zero_stage=3), 2)
    half = tmp_path / "half"
    half.mkdir()
    (half / "latents").symlink_to(run / "latents")
    (half / "checkpoints").mkdir()
    step_folder(run, 2).rename(step_folder(half, 2))
    config = settings(half, zero_stage=1, keep_checkpoints=9)
    echo = forked.on_ranks(1, load_and_save, str(config), str(half))
    assert echo[0] == {}
    forked.train(config, 1)
    for name in ("weights", *folders.STATES):
        assert_close(tensors(step_folder(half, STEPS), name), tensors(step_folder(run, STEPS), name))


@pytest.mark.slow
def test_killed_at_random_and_resumed_elsewhere_ends_where_the_undisturbed_run_does(run: Path, tmp_path: Path) -> None:
    """kill -9 of a rank whenever it may be, and on with another number of ranks and another ZeRO stage each time."""
    rng = random.Random(0)
    values = {"images": 8 * 30, "checkpoint_every_images": 16, "micro_batch_size": 2}
    calm, killed = beside(run, tmp_path / "calm"), beside(run, tmp_path / "killed")
    forked.train(settings(calm, zero_stage=1, **values), 1)
    log = killed / "train" / "log.jsonl"

    def steps() -> int:
        return len(losses(killed)) if log.exists() else 0

    ways = ((2, 4), (0, 1), (3, 2), (1, 1))  # every stage and every number of ranks
    for at, (stage, world) in zip(sorted(rng.sample(range(1, 26), 4)), ways, strict=True):
        config = settings(killed, zero_stage=stage, **values)
        ranks = forked.start(world, forked.train_stage, str(config))
        forked.wait_for(lambda at=at: steps() >= at)
        time.sleep(rng.random() / 5)
        rng.choice(ranks).kill()
        forked.end_as_a_launcher(ranks)
        for rank in ranks:
            with pytest.raises(forked.RankError):
                rank.result()
    forked.train(settings(killed, zero_stage=2, **values), 2)
    for name in ("weights", *folders.STATES):
        assert_close(tensors(step_folder(killed, 30), name), tensors(step_folder(calm, 30), name), rtol=2e-3, atol=1e-5)
    assert losses(killed) == pytest.approx(losses(calm), rel=1e-4)


def load_and_save(config: str, folder: str) -> dict[str, list[str]]:
    """Load step 2 into an engine, save it as step 7 elsewhere; the tensors that are not the same to the bit."""
    from train import ranks

    me = ranks.join(1)
    objective, c = objective_of(Path(config))
    start = step_folder(Path(folder), 2)
    engine = Engine(c, objective, me, c.batch_size // me.world, 1)
    checkpoint.load(str(start), folders.read_manifest(start), engine)
    saver = checkpoint.Saver(str(Path(folder) / "echo"), engine, folders.Keep(2), me)
    saved = saver.save(7, {"optimizer_steps": 2, "images": 56})
    saver.finish()
    assert folders.damage(saved) == ""
    different = {}
    for name in ("weights", *folders.STATES):
        a, b = tensors(start, name), tensors(Path(saved), name)
        bad = [n for n in a if n not in b or not torch.equal(a[n], b[n])]
        if bad or a.keys() != b.keys():
            different[name] = bad
    return different


OPTIONS: list[dict[str, Any]] = [
    {"activation_checkpointing": True},
    {"channels_last": True},
    {"offload": "cpu", "zero_stage": 2},
    {"offload": "cpu", "zero_stage": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_what_saves_time_or_memory_changes_no_result(run: Path, options: dict[str, Any]) -> None:
    config = settings(run, **options)
    forked.train(config, 2)
    weights, average = plain_loop(config)
    assert_close(tensors(step_folder(run, STEPS), "weights"), weights)
    assert_close(tensors(step_folder(run, STEPS), "ema"), average)


def clip_gradients(config: str) -> Weights:
    """The gradient of the global batch of 8, averaged over the ranks as DeepSpeed does it."""
    from train import ranks

    me = ranks.join(1)
    objective, _ = objective_of(Path(config), "clip")
    share = 8 // me.world
    loss, _ = objective(objective.batch(np.arange(me.rank * share, (me.rank + 1) * share)))
    loss.backward()
    gradients = {n: me.mean(p.grad.clone()) for n, p in objective.model.named_parameters() if p.grad is not None}
    return gradients | {"loss": me.mean(loss.detach())}


def test_clip_gradient_of_two_ranks_is_that_of_the_whole_batch(run: Path) -> None:
    """... computed here from the features with the formula of the paper's figure 3."""
    config = tiny.write_config(run, tiny.configuration(run))
    objective, _ = objective_of(config, "clip")
    image, text, scale = objective._features(objective.batch(np.arange(8)))
    logits = scale * image @ text.T
    labels = torch.arange(8)
    loss = 0.5 * (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    )
    loss.backward()
    expected = {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None} | {
        "loss": loss.detach()
    }
    assert expected["logit_scale"].abs() > 1e-4
    for world in (1, 2):
        for gradients in forked.on_ranks(world, clip_gradients, str(config)):
            assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def draws(config: str, same: bool) -> str:
    from train import job, ranks

    me = ranks.join(1)
    objective, _ = objective_of(Path(config))
    begin = 0 if same else me.rank * 4
    job.refuse_equal_draws(objective.batch(np.arange(begin, begin + 4)), me)
    return "passed"


def test_equal_noise_on_two_ranks_is_refused(run: Path) -> None:
    config = settings(run)
    assert forked.on_ranks(2, draws, str(config), False) == ["passed", "passed"]
    with pytest.raises(forked.RankError, match="drew the same noise"):
        forked.on_ranks(2, draws, str(config), True)
