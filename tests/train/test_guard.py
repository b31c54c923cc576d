"""What goes wrong is skipped by all ranks together, told with the samples' names, and undone where it goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train import forked, tiny
from tests.train.test_zero import assert_close, assert_same, objective_of, step_folder, tensors
from train import folders
from train.guard import WARM_UP, Guard

pytestmark = pytest.mark.timeout(900)

FILES = ("weights", *folders.STATES)


# ---- the judgement --------------------------------------------------------------------------------


def judged(guard: Guard, loss: float, norm: float) -> bool:
    return bool(guard(torch.tensor([loss, 7.0], dtype=torch.float64), torch.tensor(norm, dtype=torch.float64)))


def test_a_spike_is_judged_by_what_came_before_it() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0.0, 0.1, 400))
    guard = Guard(6.0)
    for v in values:
        assert judged(guard, float(v), float(2 * v))
    before = guard.memory.clone()
    assert not judged(guard, math.exp(0.9), 2.0)
    assert "deviations above its mean" in guard.reason(math.exp(0.9), 2.0)
    assert not judged(guard, 1.0, 2 * math.exp(0.9))
    assert "gradient norm" in guard.reason(1.0, 2 * math.exp(0.9))
    assert torch.equal(guard.memory, before), "what is refused must not become normal"
    assert judged(guard, math.exp(0.4), 2.0)
    assert judged(guard, 1e-6, 1e-6), "a loss that falls is no spike"
    # The recursion's mean and deviation against numpy's with the same weights.
    logs = np.log(values)[WARM_UP:]
    weights = 0.98 ** np.arange(len(logs))[::-1]
    _, mean, variance = before[:, 0].tolist()
    assert mean == pytest.approx(np.average(logs, weights=weights), abs=0.01)
    assert math.sqrt(variance) == pytest.approx(0.1, rel=0.25)


def test_nothing_finite_is_refused_without_sigmas_or_before_there_is_anything_to_compare_with() -> None:
    guard = Guard(None)
    for _ in range(100):
        assert judged(guard, 1.0, 1.0)
    assert judged(guard, 1e9, 1e9)
    assert not judged(guard, math.nan, 1.0)
    assert guard.reason(math.nan, 1.0) == "the loss is nan"
    assert not judged(guard, 1.0, math.inf)
    early = Guard(3.0)
    assert judged(early, 1.0, 1.0)
    assert judged(early, 1000.0, 1.0)
    assert judged(early, -1.0, 1.0), "a loss below 0 has no logarithm and is no spike"


def test_its_memory_survives_a_checkpoint() -> None:
    one = Guard(4.0)
    for i in range(100):
        judged(one, 1 + 0.01 * (i % 7), 2 + 0.01 * (i % 5))
    other = Guard(4.0, state=json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert judged(other, 2.0, 2.0) == judged(one, 2.0, 2.0) == False  # noqa: E712
    # As format 1 kept it.
    count, mean, variance = ([row[i] for i in range(2)] for row in one.state())
    names = {"count": count, "mean": mean, "variance": variance}
    old = {which: {n: v[i] for n, v in names.items()} for i, which in enumerate(("loss", "norm"))}
    assert Guard(4.0, state={**old, "in_a_row": 0, "skipped": 3, "rollbacks": 0}).state() == one.state()


# ---- in the loop ----------------------------------------------------------------------------------


def break_steps(config: str, broken: tuple[int, ...], factor: float = math.nan) -> None:
    """Train with the loss of these steps (from 1) times `factor`, on rank 1 alone."""
    from train import denoising

    forward = denoising.Diffusion.forward
    calls: list[int] = []

    def forward_broken(self: Any, batch: Any) -> Any:
        loss, details = forward(self, batch)
        if type(loss) is torch.Tensor:  # the plan runs on tensors without values
            calls.append(1)
        bad = len(calls) in broken and os.environ["RANK"] == "1"
        return (loss * factor if bad else loss), details

    denoising.Diffusion.forward = forward_broken
    forked.train_stage(config)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "train" / "events.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.slow
def test_skipped_steps_and_rollback_are_the_same_under_every_stage(run: Path, tmp_path: Path) -> None:
    """Steps 6 and 7 are lost; at the 8th the weights are the 4th's to the bit, and training goes on from them."""
    ends = []
    for stage in (0, 1, 3):  # what is ours is the same for 1 and 2
        folder = tmp_path / str(stage)
        folder.mkdir()
        (folder / "latents").symlink_to(run / "latents")
        values = {"images": 80, "checkpoint_every_images": 32, "max_skips": 2, "zero_stage": stage, "eps": 1e-3}
        config = tiny.write_config(folder, tiny.configuration(folder, **values))
        forked.on_ranks(2, break_steps, str(config), (6, 7))
        for name in FILES:
            assert_same(tensors(step_folder(folder, 8), name), tensors(step_folder(folder, 4), name))
        manifest = folders.read_manifest(step_folder(folder, 8))
        assert (manifest["optimizer_steps"], manifest["images"]) == (4, 64)
        assert folders.read_manifest(step_folder(folder, 10))["optimizer_steps"] == 6
        skipped = events(folder, "skipped")
        assert [e["images"] for e in skipped] == [48, 56]
        assert skipped[0]["keys"] == objective_of(config)[0].keys(np.arange(40, 48))
        assert "nan" in skipped[0]["reason"]
        assert [(e["images"], e["checkpoint"]) for e in events(folder, "rollback")] == [(64, "step-00000004")]
        lines = [json.loads(x) for x in (folder / "train" / "log.jsonl").read_text().splitlines()]
        # The 8th step was taken from weights that went back, so nothing is told of it.
        assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6, 7, 9, 10]
        assert [x["skipped"] for x in lines] == [0, 0, 0, 0, 0, 1, 1, 0, 0]
        assert "loss" not in lines[5]
        ends.append(tensors(step_folder(folder, 10), "weights"))
    for end in ends[1:]:
        assert_close(end, ends[0])


def test_weights_go_back_to_before_the_steps_that_were_refused(run: Path) -> None:
    """Not to a checkpoint that was saved between two of them, which has the weights that are there already."""
    values = {"images": 64, "checkpoint_every_images": 24, "max_skips": 2, "eps": 1e-3, "keep_checkpoints": 5}
    config = tiny.write_config(run, tiny.configuration(run, **values))
    forked.on_ranks(2, break_steps, str(config), (6, 7))
    assert folders.read_manifest(step_folder(run, 6))["run"]["in_a_row"] == 1
    assert [(e["images"], e["checkpoint"]) for e in events(run, "rollback")] == [(64, "step-00000003")]
    assert_same(tensors(step_folder(run, 8), "weights"), tensors(step_folder(run, 3), "weights"))


def test_a_run_that_cannot_be_helped_ends_with_a_sentence_on_all_ranks(run: Path) -> None:
    config = tiny.write_config(run, tiny.configuration(run, max_skips=2, checkpoint_every_images=1000))
    ranks = forked.start(2, break_steps, str(config), (3, 4))
    for rank in ranks:
        with pytest.raises(forked.RankError, match="StageError: train: 2 steps in a row were skipped up to 32 images"):
            rank.result()
    assert folders.latest_complete(run / "checkpoints") is None


@pytest.mark.slow
def test_a_spike_of_the_gradient_is_skipped_and_a_resumed_run_skips_it_too(run: Path, tmp_path: Path) -> None:
    """The gradient of step 40 is a thousand times too large; the optimizer must not see it under any stage."""
    values = {"images": 400, "checkpoint_every_images": 280, "spike_sigmas": 12.0, "grad_clip": None, "eps": 1e-3}
    for stage in (0, 2):
        folder = tmp_path / str(stage)
        folder.mkdir()
        (folder / "latents").symlink_to(run / "latents")
        config = tiny.write_config(folder, tiny.configuration(folder, zero_stage=stage, **values))
        forked.on_ranks(2, break_steps, str(config), (40,), 1e3)
        (event,) = events(folder, "skipped")
        assert (event["images"], event["in_a_row"]) == (320, 1)
        assert "deviations above" in event["reason"]
        assert folders.read_manifest(step_folder(folder, 50))["optimizer_steps"] == 49
        # Resumed at step 35, its 5th step is the broken one.
        end = tensors(step_folder(folder, 50), "weights")
        step_folder(folder, 50).rename(folder / "gone")
        forked.on_ranks(2, break_steps, str(config), (5,), 1e3)
        assert_same(tensors(step_folder(folder, 50), "weights"), end)
        assert len(events(folder, "skipped")) == 1
