"""Killed, torn, stopped, changed, finished: what the same command does next."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.settings import load_sections
from tests.train import forked, tiny
from tests.train.test_zero import assert_same, step_folder, tensors
from train import folders
from train.config import TrainingSections
from train.state import StageState, stage_state

# Each starts ranks several times; a machine shared with others needs its time.
pytestmark = pytest.mark.timeout(900)

STEPS = 6
FILES = ("weights", *folders.STATES)


def config_of(run: Path, **train: Any) -> Path:
    return tiny.write_config(run, tiny.configuration(run, **train))


def state_of(config: Path, stage: str = "train") -> Any:
    sections = load_sections(str(config), (), TrainingSections)
    return stage_state(stage, sections.run, sections)


def second_run(run: Path, tmp_path: Path) -> Path:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("latents", "images"):
        (other / name).symlink_to(run / name)
    return other


def test_killed_runs_end_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """kill -9 of one rank at a time, three times at different moments; then the same command again."""
    forked.train(config_of(run), 2)
    other = second_run(run, tmp_path)
    config = config_of(other)
    log = other / "train" / "log.jsonl"
    for round_, step in enumerate((1, 3, 5)):
        ranks = forked.start(2, forked.train_stage, str(config))
        forked.wait_for(lambda step=step: log.exists() and f'"step": {step},' in log.read_text())
        ranks[round_ % 2].kill()
        for rank in ranks:
            with pytest.raises(forked.RankError):
                rank.result()
        assert state_of(config).state == (
            "resumable" if folders.latest_complete(other / "checkpoints", contents=False) else "new"
        )
    forked.train(config, 2)
    a, b = step_folder(run, STEPS), step_folder(other, STEPS)
    for name in FILES:
        assert_same(tensors(a, name), tensors(b, name))
    losses = [
        [(x["images"], x["loss"]) for x in map(json.loads, (r / "train" / "log.jsonl").read_text().splitlines())]
        for r in (run, other)
    ]
    assert losses[0] == losses[1]
    assert [i for i, _ in losses[0]] == [8 * s for s in range(1, STEPS + 1)]


def test_torn_checkpoints_fall_back_to_the_one_before(run: Path, tmp_path: Path) -> None:
    config = config_of(run)
    forked.train(config, 1)
    expected = {name: tensors(step_folder(run, STEPS), name) for name in FILES}
    # The last: a file cut short. The one before: a flipped byte, which only its hash tells.
    last, before = (next(step_folder(run, step).glob("rank-*")) for step in (6, 4))
    with open(last, "r+b") as f:
        f.truncate(1000)
    with open(before, "r+b") as f:
        f.seek(-5, os.SEEK_END)
        byte = f.read(1)
        f.seek(-5, os.SEEK_END)
        f.write(bytes([byte[0] ^ 1]))
    assert folders.latest_complete(run / "checkpoints") == str(step_folder(run, 2))
    assert "bytes where the manifest says" in folders.damage(step_folder(run, 6))
    assert "sha256" in folders.damage(step_folder(run, 4))
    forked.train(config, 1)
    for name in FILES:
        assert_same(tensors(step_folder(run, STEPS), name), expected[name])
    assert folders.latest_complete(run / "checkpoints") == str(step_folder(run, 6))
    # A folder without a manifest is no checkpoint either.
    (step_folder(run, 6) / "manifest.json").unlink()
    assert folders.latest_complete(run / "checkpoints") == str(step_folder(run, 4))


def test_old_checkpoints_go_but_never_the_last_complete_one(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"

    def put(step: int, whole: bool = True) -> None:
        folder = root / folders.folder_name(step)
        folder.mkdir(parents=True)
        files = {}
        for name in FILES:
            (folder / f"{name}.safetensors").write_bytes(b"12345")
            files[f"{name}.safetensors"] = {"size": 5 if whole else 6, "sha256": "?"}
        (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))

    def left() -> list[int]:
        return sorted(int(p.name.removeprefix("step-")) for p in root.iterdir())

    put(1), put(2), put(3, whole=False), put(4, whole=False)
    folders.delete_old(root, folders.Keep(2))
    assert left() == [1, 2, 3, 4]  # torn ones newer than any complete one are kept for a look
    put(5)
    folders.delete_old(root, folders.Keep(2))
    assert left() == [2, 5]
    put(6, whole=False), put(7, whole=False)
    folders.delete_old(root, folders.Keep(2))
    assert left() == [2, 5, 6, 7]


def test_sigterm_saves_and_the_run_goes_on(run: Path, tmp_path: Path) -> None:
    forked.train(config_of(run), 2)
    other = second_run(run, tmp_path)
    config = config_of(other, checkpoint_every_images=1000)
    ranks = forked.start(2, forked.train_stage, str(config))
    log = other / "train" / "log.jsonl"
    forked.wait_for(lambda: log.exists() and '"step": 2,' in log.read_text())
    os.kill(ranks[1].pid, signal.SIGTERM)  # one rank is told, all stop together
    for rank in ranks:
        with pytest.raises(forked.RankError, match=r"Stopped: train: stopped by SIGTERM at \d+ images"):
            rank.result()
    assert state_of(config).state == "resumable"
    assert json.loads((other / "status" / "train.json").read_text())["state"] == "stopped"
    forked.train(config, 2)
    for name in FILES:
        assert_same(tensors(step_folder(other, STEPS), name), tensors(step_folder(run, STEPS), name))


def test_finished_stages_do_nothing_and_changed_settings_are_refused(run: Path) -> None:
    config = config_of(run)
    assert state_of(config, "clip").state == "new"
    forked.fit(config, 1, stage="clip")
    marker = run / "clip" / "model" / "carrara.json"
    before = marker.stat().st_mtime_ns
    assert state_of(config, "clip").state == "done"
    forked.fit(config, 2, "clip.log_every_images=1000", stage="clip")  # ranks and intervals change no weights
    assert marker.stat().st_mtime_ns == before
    # A rate may be changed from here on, by consent; where the weights began may not.
    with pytest.raises(forked.RankError, match=r"ConfigError.*learning_rate.*--adopt"):
        forked.fit(config, 1, "clip.learning_rate=0.002", stage="clip")
    with pytest.raises(forked.RankError, match=r"(Config|Stage)Error.*initialisation.*--redo"):
        forked.fit(config, 1, "clip.initialisation=spread", stage="clip")


def test_pretrained_and_unmade_inputs(run: Path) -> None:
    data = tiny.configuration(run)
    data["clip"]["pretrained"] = "ViT-B-32:laion2b_s34b_b79k"
    assert state_of(tiny.write_config(run, data), "clip").state == "done"
    shutil.rmtree(run / "latents")
    state = state_of(tiny.write_config(run, data))
    assert state.state == "new"
    assert "no finished dataset" in state.reason


def hang(config: str) -> None:
    """Train, but rank 1 never comes to the end of its third step's forward pass."""
    import time

    from train import denoising

    forward, calls = denoising.Diffusion.forward, []

    def stuck(self: Any, batch: Any) -> Any:
        if type(batch["t"]) is torch.Tensor:  # the plan runs on tensors without values
            calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            time.sleep(3600)
        return forward(self, batch)

    denoising.Diffusion.forward = stuck
    forked.train_stage(config)


def test_a_hang_is_ended_with_the_stacks_of_all_ranks(run: Path) -> None:
    config = config_of(run, hang_s=20.0, checkpoint_every_images=8)
    ranks = forked.start(2, hang, str(config))
    for rank in ranks:
        with pytest.raises(forked.RankError, match="killed"):
            rank.result()
    stacks = [(run / "train" / "stacks" / f"rank-{r:05d}.txt").read_text() for r in range(2)]
    assert "in stuck" in stacks[1]
    assert "in stuck" not in stacks[0]
    assert "backward" in stacks[0] or "step" in stacks[0]
    assert folders.latest_complete(run / "checkpoints")


def redo(config: str) -> None:
    from train.main import run

    run("autoencoder", config, redo=True)


def test_a_vae_of_images_that_are_others_by_now_stays_unless_it_is_asked_for_anew(run: Path) -> None:
    config = config_of(run)
    forked.fit(config, 1, stage="autoencoder")
    marker = run / "autoencoder" / "model" / "carrara.json"
    first = marker.stat().st_mtime_ns
    forked.on_ranks(1, redo, str(config))
    assert marker.stat().st_mtime_ns == first, "the same settings and images: there is nothing to make anew"
    facts = json.loads(marker.read_text())
    facts["fingerprint"]["input"] = "of other images"
    marker.write_text(json.dumps(facts))
    found = state_of(config, "autoencoder")
    assert (found.state, found.reason) == ("done", "on other images than there are by now; --redo fits it anew")
    before = marker.stat().st_mtime_ns
    forked.fit(config, 1, stage="autoencoder")
    assert marker.stat().st_mtime_ns == before
    forked.on_ranks(1, redo, str(config))
    assert state_of(config, "autoencoder") == StageState("done")
    assert marker.stat().st_mtime_ns != before
