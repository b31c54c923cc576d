"""Which model is evaluated: the newest complete checkpoint, and the same pictures from it as from its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eval import model as checkpoints
from eval.config import EvalConfig, GridConfig
from eval.evaluation import Evaluation
from eval.grid import cells
from shards.fingerprint import digest_file
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, validate
from tests.eval.conftest import SIDE, drive, refs, shard_bytes
from train.export import export
from train.folders import POSTHOC
from train.posthoc import coefficients


def test_the_newest_complete_checkpoint_is_found(trained: RunPaths) -> None:
    newest = checkpoints.find(trained)
    assert (newest.name, newest.images_seen, newest.size, newest.folder) == ("step-00000002", 128, SIDE, None)
    assert checkpoints.find(trained, weights="raw").digest != newest.digest
    assert checkpoints.find(trained, "step-00000001").images_seen == 64
    (Path(trained.checkpoints) / "step-00000002" / "ema.safetensors").write_bytes(b"torn")
    assert checkpoints.find(trained).name == "step-00000001"


def test_a_checkpoint_and_its_export_make_the_same_images(trained: RunPaths) -> None:
    config = EvalConfig(num_prompts=4, steps=2, batch_size=2, shard_size=4)
    from_checkpoint = Evaluation(config, trained, *refs(trained))
    drive(from_checkpoint.generate)
    images = shard_bytes(from_checkpoint.generate.root)["00000.tar"]
    raw = Evaluation(config.model_copy(update={"weights": "raw"}), trained, *refs(trained))
    assert raw.protocol["id"] == from_checkpoint.protocol["id"]  # measured alike, of another model
    assert raw.folder != from_checkpoint.folder
    assert raw.generate.root != from_checkpoint.generate.root
    export(trained.run)
    shutil.rmtree(trained.checkpoints)
    from_export = Evaluation(config, trained, *refs(trained))
    assert from_export.model.folder is not None
    assert (from_export.model.name, from_export.model.images_seen) == ("step-00000002", 128)
    shutil.rmtree(trained.eval)
    drive(from_export.generate)
    assert shard_bytes(from_export.generate.root)["00000.tar"] == images


def test_an_exported_models_own_encoders_are_its_digest(trained: RunPaths) -> None:
    """Another VAE in the configuration changes neither what an exported pipeline is nor how it is measured; another
    one in its folder does."""
    export(trained.run)
    shutil.rmtree(trained.checkpoints)
    config = EvalConfig(num_prompts=4, steps=1)
    vae, clip = refs(trained)
    first = Evaluation(config, trained, vae, clip)
    other = Evaluation(config, trained, None, clip)
    assert (first.model.digest, first.protocol["id"]) == (other.model.digest, other.protocol["id"])
    file = Path(trained.model) / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file)
    changed = Evaluation(config, trained, vae, clip)
    assert changed.model.parts["vae"] != first.model.parts["vae"]
    assert changed.protocol["id"] == first.protocol["id"]


def test_an_export_of_other_weights_is_not_taken_for_these(trained: RunPaths) -> None:
    export(trained.run, weights="raw")
    shutil.rmtree(trained.checkpoints)
    assert checkpoints.find(trained, weights="raw").folder
    with pytest.raises(StageError, match=r"has the weights 'raw', .* set eval\.weights to raw"):
        checkpoints.find(trained)


def test_every_ema_length_can_be_evaluated(trained: RunPaths) -> None:
    """Further EMAs lie in the checkpoint; any other length is put together from the snapshots up to it."""
    folder = Path(trained.checkpoints) / "step-00000002"
    raw = load_file(folder / "weights.safetensors")
    save_file({k: v * 3 for k, v in raw.items()}, folder / "ema_0.050.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "ema_0.050.safetensors"
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": digest_file(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (snapshots := Path(trained.checkpoints) / POSTHOC).mkdir()
    for std, images, scale in (("0.050", 64, 1), ("0.100", 64, 1), ("0.050", 128, 3), ("0.100", 128, 2)):
        save_file({k: v * scale for k, v in raw.items()}, snapshots / f"ema_{std}-{images:012d}.safetensors")
    grid = GridConfig(weights=["raw", "ema", "ema_0.050", "posthoc:0.08"])
    found = {}
    for config in cells(EvalConfig(grid=grid)):
        subject = checkpoints.find(trained, weights=config.weights)
        pipeline = checkpoints.build_pipeline(trained, subject)
        found[config.weights] = (config.cell, subject.digest, float(pipeline.unet.conv_out.bias[0]))
    assert found["ema_0.050"][0] == "ddim-25-3-ema_0.050"
    assert found["posthoc:0.08"][0] == "ddim-25-3-posthoc0.08"
    assert len({digest for _, digest, _ in found.values()}) == 4
    unit = found["raw"][2]
    assert found["ema"][2] == pytest.approx(2 * unit)
    assert found["ema_0.050"][2] == pytest.approx(3 * unit)
    factors = coefficients([64, 128, 64, 128], [0.05, 0.05, 0.1, 0.1], 128, 0.08)
    assert found["posthoc:0.08"][2] == pytest.approx(float(factors @ [1, 3, 1, 2]) * unit, rel=1e-5)
    before = found["posthoc:0.08"][1]
    (snapshots / f"ema_0.050-{64:012d}.safetensors").unlink()
    assert checkpoints.find(trained, weights="posthoc:0.08").digest != before
    with pytest.raises(StageError, match=r"has no weights 'ema_0\.100'; set eval\.weights to ema or ema_0\.050 or raw"):
        checkpoints.find(trained, weights="ema_0.100")
    with pytest.raises(ConfigError, match="weights"):
        validate(EvalConfig, {"weights": "../ema"}, "run.yaml")


def test_other_encoders_than_those_of_the_latents_are_refused(trained: RunPaths) -> None:
    manifest = Path(trained.latents) / "dataset.json"
    facts = json.loads(manifest.read_text())
    facts["text"]["digest"] = "0" * 64
    manifest.write_text(json.dumps(facts))
    with pytest.raises(StageError, match=r"the CLIP at .* (is not the one|other)"):
        Evaluation(EvalConfig(), trained, *refs(trained))
