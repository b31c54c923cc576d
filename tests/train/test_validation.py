"""Validation, early stopping, samples and what they leave behind; checkpoints that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latents.encoders import load_vae
from latents.moments import dequantise_logstd, quantise_logstd
from latents.resize import resize_crop
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, load_sections
from tests.train import forked, tiny
from tests.train.test_guard import events
from tests.train.test_mixture import bucketed
from tests.train.test_tuning import make_run, run_and_export
from tests.train.test_zero import step_folder
from train import folders, samples, validation
from train.config import TrainingSections
from train.objectives import build
from train.part_config import ValidationConfig
from train.ranks import Ranks
from train.state import stage_state

pytestmark = pytest.mark.timeout(900)

HERE = Ranks(0, 1, torch.device("cpu"), False)


class Engine:
    """What Validator asks of DeepSpeed's engine, around an objective alone."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def __call__(self, batch: Any) -> Any:
        return self.objective(batch)

    def eval(self) -> None:
        self.objective.eval()

    def train(self) -> None:
        self.objective.train()


def test_the_same_whatever_the_ranks_and_the_mean_of_all_its_pictures(run: Path, tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "held", counts=(7, 6))
    sections = load_sections(
        str(tiny.write_config(run, tiny.configuration(run, initialisation="torch"))), (), TrainingSections
    )
    objective: Any = build("train", sections.train, [Dataset.open(str(run / "latents"))], 5)
    config = ValidationConfig(images=11, latents=str(tmp_path / "held"))
    losses = {}
    for micro in (11, 4, 3):
        validator = validation.Validator(config, objective, RunPaths(str(run)), HERE, micro)
        timesteps = torch.cat([b["t"] for _, b in validator._batches])
        assert sorted(int(t) * 11 // 1000 for t in timesteps) == list(range(11)), "one timestep in each eleventh"
        losses[micro] = validator.measure(Engine(objective), HERE)
        assert validator.measure(Engine(objective), HERE) == losses[micro]
    # By hand, over the shares of two ranks.
    total = count = 0.0
    for rank in range(2):
        share = validation.Validator(config, objective, RunPaths(str(run)), Ranks(rank, 2, HERE.device, False), 3)
        for weight, batch in share._batches:
            with torch.no_grad():
                error, _ = objective.errors(batch)
            total, count = total + float(error.mean()) * weight, count + weight
    assert count == 11
    assert total / count == pytest.approx(losses[3], rel=1e-5)


def test_with_buckets_too_the_set_depends_on_neither_ranks_nor_micro_batches(run: Path, tmp_path: Path) -> None:
    """With 20 of 40 samples in three buckets: which ones they are, their noise and timesteps, and so the loss."""
    held = bucketed(tmp_path / "held", counts=(9, 14, 5, 12))
    config = load_sections(
        str(tiny.write_config(run, tiny.configuration(run, initialisation="torch"))), (), TrainingSections
    ).train
    objective: Any = build("train", config, [bucketed(tmp_path / "train")], 5)
    objective.eval()
    found = {}
    for world, micro in ((1, 20), (1, 8), (1, 3), (2, 4), (3, 2), (7, 1)):
        samples, total, count, calls = [], 0.0, 0, set()
        for rank in range(world):
            ranks = Ranks(rank, world, HERE.device, False)
            settings = ValidationConfig(images=20, latents=held.root)
            batches = validation.Validator(settings, objective, RunPaths(str(run)), ranks, micro)._batches
            calls.add(len(batches))
            for weight, batch in batches:
                with torch.no_grad():
                    error, _ = objective.errors(batch)
                total, count = total + float(error.sum()) * (weight > 0), count + weight
                samples += [(batch["x0"][i].numpy().tobytes(), int(batch["t"][i])) for i in range(weight)]
        assert len(calls) == 1, "all ranks run the model equally often"
        assert count == 20
        found[world, micro] = (sorted(samples), total / count)
    first = found.pop((1, 20))
    assert len(set(first[0])) == 20
    for other in found.values():
        assert other[0] == first[0]
        assert other[1] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_held_out_pictures_are_encoded_as_the_latents_are(tmp_path: Path, flip: bool) -> None:
    """And are never mirrored."""
    run = make_run(tmp_path / "r", flip=flip)
    data = tiny.configuration(tmp_path / "r", flip=flip)
    sections = load_sections(str(tiny.write_config(tmp_path, data)), (), TrainingSections)
    objective: Any = build("train", sections.train, [Dataset.open(run.latents)], 5)
    config = ValidationConfig(images=5)
    with pytest.raises(ConfigError, match=r"holds no images; give ingest\.heldout_table"):
        validation.Validator(config, objective, run, HERE, 4)
    Path(run.heldout).symlink_to(run.images)
    validator = validation.Validator(config, objective, run, HERE, 5)
    ((_, batch),) = validator._batches
    shard = ImageShard(Dataset.open(run.heldout), 0)
    pixels = np.stack([resize_crop(decode_rgb(shard.image_bytes(i)), 32)[0] for i in range(5)])
    mean, logstd = load_vae(str(Path(run.autoencoder) / "model")).encode(pixels)
    draw = objective.random.normal("posterior", np.arange(5) + validation.FIRST, mean.shape[1:])
    # As latents are stored: the mean in half precision, the spread by its codes.
    spread = torch.from_numpy(dequantise_logstd(quantise_logstd(logstd.numpy())))
    expected = 0.7 * (mean.half().float() + torch.exp(spread) * torch.from_numpy(draw))
    torch.testing.assert_close(batch["x0"], expected, rtol=1e-3, atol=1e-3)


def test_patience() -> None:
    def of(limit: int | None) -> Any:
        return SimpleNamespace(patience=limit, of={"images": 4})

    patience = validation.Patience(of(2))
    assert [patience.over(v) for v in (3.0, 2.0, 2.5, 2.0)] == [False, False, False, True]
    again = validation.Patience(of(2), {"best": 2.0, "since": 1})  # as it was kept before it was said of what
    assert not again.over(1.9)
    assert again.state() == {"of": {"images": 4}, "best": 1.9, "best_step": None, "since": 0}
    assert not validation.Patience(of(None)).over(9.0)
    assert not validation.Patience(None).over(9.0)


@pytest.mark.slow
def test_a_run_that_stops_getting_better_ends_there_and_stays_ended(tmp_path: Path) -> None:
    """A learning rate too small to move anything in float32: the second validation is no better, so it ends."""
    run = make_run(tmp_path / "r")
    Path(run.heldout).symlink_to(run.images)
    validate = {"images": 6, "every_images": 16, "patience": 1}
    drawn = {"prompts": ["a red circle", "a blue square", ""], "steps": 2}
    values = {"images": 800, "learning_rate": 1e-20, "validation": validate, "samples": drawn, "weight_decay": 0.0}
    data = tiny.configuration(tmp_path / "r", **values)
    config = tiny.write_config(tmp_path, data)
    forked.on_ranks(2, run_and_export, str(config))
    found = events(tmp_path / "r", "validation")
    assert [e["images"] for e in found] == [16, 32]
    assert found[0]["loss"] == found[1]["loss"]
    last = folders.latest_complete(run.checkpoints)
    assert last == str(step_folder(tmp_path / "r", 4))
    assert folders.read_manifest(last)["finished"]
    sections = load_sections(str(config), (), TrainingSections)
    assert stage_state("train", run.run, sections).state == "done"
    grid = np.asarray(Image.open(tmp_path / "r" / "train" / "samples" / f"{32:012d}.png"))
    assert grid.shape == (32 + samples.GAP + 32, 32 + samples.GAP + 32, 3)
    assert (grid[-32:, -32:] == 255).all()
    assert grid[:32, :32].std() > 1


def with_losses(config: str, losses: list[float], adopt: bool = False) -> None:
    """A run whose validations come out as told."""
    left = list(losses)

    def measure(self: Any, engine: Any, ranks: Ranks) -> float:
        return left.pop(0)

    validation.Validator.measure = measure
    forked.run_stage(config, adopt=adopt)


def test_the_best_checkpoint_is_saved_kept_and_exported_by_choice(run: Path, tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "held", counts=(7,))
    validate = {"images": 4, "every_images": 8, "latents": str(tmp_path / "held"), "export": "best"}
    values = {"images": 80, "checkpoint_every_images": 16, "keep_checkpoints": 2, "validation": validate}
    config = tiny.write_config(run, tiny.configuration(run, **values))
    forked.on_ranks(1, with_losses, str(config), [3.0, 2.0, 1.0, *[2.0] * 7])
    # The third step was no multiple of 16 images, and is saved since it was the best so far.
    left = sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("step-"))
    assert left == ["step-00000003", "step-00000008", "step-00000010"]
    newest = folders.read_manifest(run / "checkpoints" / "step-00000010")
    assert newest["best"] == "step-00000003"
    of = {"images": 4, "latents": str(tmp_path / "held"), "resolution": 32}
    assert newest["patience"] == {"of": of, "best": 1.0, "best_step": 3, "since": 7}
    marker = json.loads((run / "model" / "carrara.json").read_text())
    assert marker["checkpoint"] == "step-00000003"
    sections = load_sections(str(config), (), TrainingSections)
    assert stage_state("train", str(run), sections).state == "done"
    other = load_sections(str(config), ("train.validation.export=newest",), TrainingSections)
    assert stage_state("train", str(run), other).state == "resumable", "the other choice is yet to be exported"


def broken_with_losses(config: str, losses: list[float], broken: tuple[int, ...]) -> None:
    """As with_losses; the training's losses of these steps (from 1) are not finite."""
    from train.denoising import Diffusion

    forward, calls = Diffusion.forward, [0]

    def forward_broken(self: Any, batch: Any) -> Any:
        loss, details = forward(self, batch)
        calls[0] += type(loss) is torch.Tensor  # the plan runs on tensors without values
        return loss * (float("nan") if calls[0] in broken else 1.0), details

    Diffusion.forward = forward_broken  # type: ignore[method-assign]
    with_losses(config, losses)


def validated(run: Path, held: Path, **more: Any) -> dict[str, Any]:
    """A configuration that validates after every step, and saves after each fourth."""
    if not held.exists():
        tiny.make_latents(held, counts=(7,))
    validate = {"images": 4, "every_images": 8, "latents": str(held), **more.pop("validation", {})}
    return tiny.configuration(run, **{"images": 96, "checkpoint_every_images": 32, "validation": validate} | more)


def test_weights_that_go_back_take_the_patience_of_then_with_them(run: Path, tmp_path: Path) -> None:
    """Steps 6 and 7 are lost and the weights go back to step 4's: what was measured of those that are gone counts no
    more, and those that were measured before are not measured again."""
    data = validated(run, tmp_path / "held", max_skips=2, validation={"patience": 4})
    losses = [4.0, 3.0, 2.0, 1.0, *[5.0] * 3, *[6.0] * 3, 0.5]
    forked.on_ranks(1, broken_with_losses, str(tiny.write_config(run, data)), losses, (6, 7))
    assert [e["images"] for e in events(run, "rollback")] == [64]
    found = {e["images"] // 8: e["loss"] for e in events(run, "validation")}
    assert found == dict(zip((*range(1, 8), *range(9, 13)), losses, strict=True))
    assert folders.read_manifest(step_folder(run, 8))["patience"]["since"] == 0
    last = folders.read_manifest(step_folder(run, 12))
    assert (last["patience"]["best"], last["best"]) == (0.5, "step-00000012")


def test_a_run_made_longer_has_its_patience_anew(run: Path, tmp_path: Path) -> None:
    data = validated(run, tmp_path / "held", validation={"patience": 2})
    config = tiny.write_config(run, data)
    forked.on_ranks(1, with_losses, str(config), [1.0, 2.0, 2.0])
    assert folders.read_manifest(step_folder(run, 3))["finished"]
    data["train"]["images"] = 160
    forked.on_ranks(1, with_losses, str(tiny.write_config(run, data)), [3.0, 0.5, 2.0, 2.0], True)
    last = folders.read_manifest(step_folder(run, 7))
    assert last["finished"]
    assert (last["patience"]["best"], last["patience"]["since"]) == (0.5, 2)


@pytest.mark.parametrize("changed", [{"images": 6}, {"latents": "other"}])
def test_the_losses_of_another_set_are_not_compared(run: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    """A lowest loss on other images says nothing; the checkpoint of the lowest is that of the set that is measured."""
    data = validated(run, tmp_path / "held", images=32)
    forked.on_ranks(1, with_losses, str(tiny.write_config(run, data)), [4.0, 1.0, 2.0, 2.0])
    if "latents" in changed:
        tiny.make_latents(tmp_path / "other", counts=(9,))
        changed = {"latents": str(tmp_path / "other")}
    data = validated(run, tmp_path / "held", images=64, validation=changed)
    forked.on_ranks(1, with_losses, str(tiny.write_config(run, data)), [3.0, 2.5, 2.8, 2.8], True)
    last = folders.read_manifest(step_folder(run, 8))
    assert (last["best"], last["patience"]["best"], last["patience"]["since"]) == ("step-00000006", 2.5, 2)


def full_disk(config: str) -> None:
    """The second checkpoint finds the disk full."""
    from train import checkpoint

    put_file = checkpoint.put_file

    def full(url: str, parts: Any) -> Any:
        if "step-00000004" in url:
            raise OSError(28, "No space left on device")
        return put_file(url, parts)

    checkpoint.put_file = full
    forked.run_stage(config)


def test_a_full_disk_ends_all_ranks_and_leaves_the_checkpoint_before(run: Path) -> None:
    config = tiny.write_config(run, tiny.configuration(run))
    for rank in forked.start(2, full_disk, str(config)):
        with pytest.raises(forked.RankError, match=r"StageError.*step-00000004.*No space"):
            rank.result()
    assert folders.latest_complete(run / "checkpoints") == str(step_folder(run, 2))
    assert not (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert json.loads((run / "status" / "train.json").read_text())["state"] == "failed"


def _written(root: Path, step: int, **more: Any) -> Path:
    folder = root / folders.folder_name(step)
    folder.mkdir()
    files = {}
    for name in ("weights", *folders.STATES):
        (folder / f"{name}.safetensors").write_bytes(b"12345")
        files[f"{name}.safetensors"] = {"size": 5, "sha256": "?"}
    record = {"format_version": 1, "files": files, "images": 10 * step, **more}
    (folder / "manifest.json").write_text(json.dumps(record))
    return folder


def _left(root: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in root.iterdir())


def test_one_from_before_vetoed_steps_stays(tmp_path: Path) -> None:
    """A rollback goes to it; in manifests of before, the guard counted."""
    manifests = ({}, {}, {"best": folders.folder_name(2)}, {"guard": {"in_a_row": 1}}, {"run": {"in_a_row": 2}})
    for step, more in enumerate(manifests, 1):
        _written(tmp_path, step, **more)
    folders.delete_old(tmp_path, folders.Keep(1))
    assert _left(tmp_path) == [2, 3, 5]  # 3, what it calls the best, and the newest


def test_checkpoints_are_kept_by_number_by_age_and_by_images(tmp_path: Path) -> None:
    import os
    import time

    for step in range(1, 9):
        folder = _written(tmp_path, step)
        hours = 9 - step
        os.utime(folder / "manifest.json", times=(time.time() - 3600 * hours,) * 2)

    folders.delete_old(tmp_path, folders.Keep(2, hours=4.5, every_images=25))
    assert _left(tmp_path) == [3, 5, 6, 7, 8]  # 30 passed 25, 50 and 80 a multiple; the last four are young
    folders.delete_old(tmp_path, folders.Keep(2, every_images=25))
    assert _left(tmp_path) == [3, 5, 7, 8]
    folders.delete_old(tmp_path, folders.Keep(2))
    assert _left(tmp_path) == [7, 8]
