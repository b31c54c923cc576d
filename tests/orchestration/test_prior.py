"""The prior's pictures: drawn by the model before it is trained, once, killed and gone on with, and mixed in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import StableDiffusionPipeline

from eval.generate import generator_of, seed_of
from latents.encoders import load_vae
from orchestration.run_stage import main
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, load_sections, validate
from tests.train import tiny
from tests.train.test_export import save_checkpoint
from tests.train.test_tuning import make_run
from train import segments
from train.config import TrainConfig, TrainingSections
from train.export import export
from train.objectives import build
from train.state import open_input

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a photo of a circle"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Path]:
    """A run, and the pipeline that was exported from it."""
    run = make_run(tmp_path_factory.mktemp("base") / "r")
    save_checkpoint(run, 10, seed=2)
    return run, Path(export(run.run))


def begun(base: tuple[RunPaths, Path], folder: Path, count: int = 40, **train: Any) -> Path:
    """A run's YAML that tunes the exported pipeline on the latents of the first run."""
    run = folder / "r"
    run.mkdir(parents=True)
    (run / "latents").symlink_to(Path(base[0].run) / "latents")
    (folder / "photos").mkdir()
    encoders = {n: {"pretrained": str(Path(base[0].run) / n / "model")} for n in ("autoencoder", "clip")}
    prior = {"prompt": PROMPT, "count": count, "num_inference_steps": 2, "loss_weight": 0.25, **train.pop("prior", {})}
    data = tiny.configuration(run, images=16, start_from=str(base[1]), prior=prior, **train)
    data["train"] |= {"unet": {}, "num_train_timesteps": 100, "prediction_type": "v_prediction"}
    data |= encoders
    data["ingest"] = {"table": str(folder / "photos")}
    data["latents"] = {"resolution": 32, "batch_size": 4, "device": "cpu"}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def carrara(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def contents(run: RunPaths) -> dict[str, bytes]:
    found = Path(run.prior).rglob("*")
    return {str(p.relative_to(run.prior)): p.read_bytes() for p in found if p.suffix in (".tar", ".safetensors")}


def test_its_pictures_are_the_pipelines_and_are_mixed_in_with_their_weight(base: Any, tmp_path: Path) -> None:
    file = begun(base, tmp_path, sources=[{"weight": 3}])
    assert carrara("prior", "--config", file, "--local") == 0
    run = RunPaths(str(tmp_path / "r"))
    images, latents = Dataset.open(RunPaths(run.prior).images), Dataset.open(RunPaths(run.prior).latents)
    assert len(images) == len(latents) == 40
    shard, columns = ImageShard(images, 1), ColumnShard(latents, 1)
    assert shard.captions == [PROMPT] * 8
    pixels = decode_rgb(shard.image_bytes(3))
    # The 36th picture, by the pipeline that diffusers opens, as whoever has it would draw it.
    pipeline = StableDiffusionPipeline.from_pretrained(base[1], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = generator_of(seed_of("seed 5", 35))
    drawn = pipeline(PROMPT, num_inference_steps=2, guidance_scale=7.5, generator=noise, output_type="np").images[0]
    assert np.abs(pixels.astype(int) - np.rint(drawn * 255).astype(int)).max() <= 1
    mean, _ = load_vae(str(Path(base[0].run) / "autoencoder" / "model")).encode(pixels[None])
    np.testing.assert_allclose(columns.arrays["mean"][3], mean[0], rtol=1e-3, atol=1e-3)
    assert columns.arrays["micro"][3].tolist() == [32, 32, 0, 0, 32, 32], "SDXL's conditioning knows their size"

    sections = load_sections_of(file)
    datasets = open_input("train", run, sections.train)
    assert [d.root for d in datasets] == [run.latents, latents.root]
    objective: Any = build("train", sections.train, datasets, 5)
    batch = objective.batch(np.arange(8))
    assert sorted(batch["weight"].tolist()) == [0.25] * 2 + [1.0] * 6
    assert [s.loss_weight for s in sections.train.all_sources] == [1.0, 0.25]
    history = segments.begin(sections.train, datasets)
    assert [r.weight for r in history.segments[0].ranges] == [3.0, 1.0]


def load_sections_of(file: Path) -> TrainingSections:
    data = yaml.safe_load(file.read_text())
    kept = {k: v for k, v in data.items() if k in ("run", "seed", "autoencoder", "clip", "train")}
    other = file.parent / "train.yaml"
    other.write_text(yaml.safe_dump(kept))
    return load_sections(str(other), (), TrainingSections)


def test_rules_and_scores_are_not_asked_of_it(base: Any) -> None:
    config = TrainConfig(
        start_from="x",
        prior={"prompt": "a", "count": 1},
        select=[{"column": "pixels.entropy", "min": 1}],
    )
    assert [len(segments.rules_of(config, n)) for n in range(2)] == [1, 0]


def test_without_its_pictures_training_says_how_they_come(base: Any, tmp_path: Path) -> None:
    sections = load_sections_of(begun(base, tmp_path))
    with pytest.raises(StageError, match=r"train\.prior: .* holds no images yet; `carrara prior` draws them"):
        open_input("train", RunPaths(sections.run), sections.train)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "prior's images are drawn by a model that is there; name it with start_from"),
        ({"start_from": "x", "edit": {}}, "prior cannot go with edit"),
        (
            {"start_from": "x", "textual_inversion": {"token": "<a>", "initial": "b"}},
            "cannot go with textual_inversion",
        ),
        ({"start_from": "x", "captions": {"caption": 1, "more": 1}}, "prior cannot go with captions.more"),
        ({"start_from": "x", "control": {"images": "edges"}}, "prior cannot go with control.images"),
    ],
)
def test_a_prior_that_cannot_be_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(TrainConfig, {"prior": {"prompt": "a", "count": 1}, **given}, "x.yaml")


def test_what_draws_no_pictures_is_refused_in_the_words_of_training(base: Any, tmp_path: Path, capsys: Any) -> None:
    file = begun(base, tmp_path)
    given = f"train.start_from={base[1] / 'unet'}"
    assert carrara("prior", "--config", file, "--local", given) == 2
    said = capsys.readouterr().err
    assert "train.prior: its images are generated by train.start_from" in said
    assert "eval.model" not in said
    shutil.copytree(base[1], tmp_path / "inpainting", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "inpainting" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    shutil.copyfile(base[1] / "unet" / WEIGHTS, config.parent / WEIGHTS)
    given = f"train.start_from={config.parents[1]}"
    for command in ("prior", "train"):
        assert carrara(command, "--config", file, "--local", given) == 2
        assert "is given an image too (9 channels in, 4 out); leave prior out" in capsys.readouterr().err
    assert not (tmp_path / "r" / "prior").exists()
    assert carrara("prior", "--config", file, "--local", "train.prior=null") == 2
    assert "train.prior is not set" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_while_it_draws_it_goes_on_and_training_follows(base: Any, tmp_path: Path, caplog: Any) -> None:
    """kill -9 behind the first shard: the same command ends with the same bytes, trains, and draws nothing twice."""
    whole = begun(base, tmp_path / "whole")
    assert carrara("prior", "--config", whole, "--local") == 0
    file = begun(base, tmp_path / "killed")
    run = RunPaths(str(tmp_path / "killed" / "r"))
    command = [sys.executable, "orchestration/run_stage.py", "train", "--config", str(file), "--local"]
    first = Path(RunPaths(run.prior).images) / "00000_stats.json"
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (Path(RunPaths(run.prior).latents) / "dataset.json").exists(), "killed before it was done"
    born = json.loads(first.read_text())["born"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(first.read_text())["born"] == born
    assert contents(run) == contents(RunPaths(str(tmp_path / "whole" / "r")))
    manifest = json.loads((Path(run.checkpoints) / "step-00000002" / "manifest.json").read_text())
    assert [s["root"] for s in manifest["sources"]] == [run.latents, RunPaths(run.prior).latents]
    caplog.set_level("INFO")
    assert carrara("train", "--config", file, "--local") == 0
    said = [r.getMessage() for r in caplog.records]
    assert {"prior: complete; nothing to do", "train: complete; nothing to do"} <= set(said)
