"""A text encoder that learns with the UNet: wholly, or by a LoRA; what comes out opened by diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from latents.encoders import load_text
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import load_sections
from tests.train import forked, tiny
from tests.train.test_export import pictures
from tests.train.test_sdxl import sdxl  # noqa: F401 (a fixture)
from tests.train.test_tuning import base, make_run, plain, save_public  # noqa: F401 (a fixture)
from train import adapters, checkpoint
from train.config import TrainConfig, TrainingSections
from train.export import build_pipeline
from train.objectives import build
from train.text_export import clip_text_model

pytestmark = pytest.mark.timeout(900)

PROMPT = {"prompt": ["a blue square", "a red circle"]}


def config_of(source: tuple[RunPaths, Path], folder: Path, **train: Any) -> Path:
    folder.mkdir()
    for name in ("latents", "autoencoder", "clip"):
        (folder / name).symlink_to(Path(source[0].run) / name)
    data = tiny.configuration(folder, images=32, learning_rate=1e-2, ema_halflife_images=1, **train)
    data["train"] |= {"unet": {}, "start_from": str(source[1]), "num_train_timesteps": 100, "beta_schedule": "linear"}
    data["train"]["prediction_type"] = "v_prediction"
    return tiny.write_config(folder, data)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_learning_encoder_begins_as_the_frozen_one_and_has_its_gradient(base: Any, kind: str) -> None:  # noqa: F811
    values = {"images": 16, "batch_size": 8, "start_from": str(base[1])}
    datasets = [Dataset.open(base[0].latents)]
    frozen: Any = build("train", TrainConfig(captions={"caption": 1.0}, **values), datasets, 5)
    learning: Any = build("train", TrainConfig(text_encoder={"kind": kind}, **values), datasets, 5)
    batch = learning.batch(np.arange(8))
    torch.testing.assert_close(
        learning.conditioning.condition(batch)[0],
        frozen.conditioning.condition(frozen.batch(np.arange(8)))[0],
        rtol=1e-4,
        atol=1e-5,
    )
    learning(batch)[0].backward()
    moved = {n for n, p in learning.model.named_parameters() if n.startswith("text.") and p.grad is not None}
    trained = {n for n, p in learning.model.named_parameters() if n.startswith("text.") and p.requires_grad}
    assert moved == trained
    assert all(".lora_" in n for n in trained) == (kind == "lora")
    assert learning.saves_frozen == (kind == "full")


@pytest.mark.slow
def test_loras_of_both_are_what_load_lora_weights_takes(base: Any, tmp_path: Path) -> None:  # noqa: F811
    """Killed after a checkpoint, gone on with 2 ranks under ZeRO 2; the merged model and the LoRA draw the same."""
    values = {"adapter": {"rank": 4, "alpha": 8}, "text_encoder": {"rank": 4, "alpha": 2}, "zero_stage": 2}
    config = config_of(base, tmp_path / "r", **values)
    run = RunPaths(str(tmp_path / "r"))
    ranks = forked.start(1, forked.run_stage, str(config))
    forked.wait_for(lambda: (Path(run.checkpoints) / "step-00000002" / "manifest.json").exists())
    ranks[0].kill()
    with pytest.raises(forked.RankError):
        ranks[0].result()
    forked.fit(config, 2)
    whole = config_of(base, tmp_path / "undisturbed", **values)
    forked.fit(whole, 1)
    ends = [checkpoint.load_weights(p / "checkpoints" / "step-00000004", "raw") for p in (tmp_path / "r", whole.parent)]
    assert ends[0].keys() == ends[1].keys()
    assert max(float((ends[0][k] - v).abs().max()) for k, v in ends[1].items()) < 5e-5
    merged = pictures(plain(run.model), **PROMPT)
    pipeline = plain(base[1])
    before = pictures(pipeline, **PROMPT)
    names = load_file(Path(run.model) / "lora" / "pytorch_lora_weights.safetensors")
    assert {n.partition(".")[0] for n in names} == {"unet", "text_encoder"}
    pipeline.load_lora_weights(Path(run.model) / "lora")
    assert pipeline.text_encoder.peft_config["default_0"].lora_alpha == 2
    assert np.abs(pictures(pipeline, **PROMPT) - merged).max() < 5e-5
    assert np.abs(before - merged).max() > 1e-3
    # The text's part alone moves what a prompt means.
    prompts = [p.encode_prompt("a blue square", "cpu", 1, False)[0] for p in (plain(base[1]), plain(run.model))]
    assert (prompts[0] - prompts[1]).abs().max() > 1e-3
    held = ends[0]
    assert all(".lora_" in n for n in held), "checkpoints hold the updates alone"


@pytest.mark.slow
def test_a_whole_text_encoder_is_exported_as_it_learned(base: Any, tmp_path: Path) -> None:  # noqa: F811
    config = config_of(base, tmp_path / "r", text_encoder={"kind": "full"}, activation_checkpointing=True)
    run = RunPaths(str(tmp_path / "r"))
    forked.fit(config, 1)
    values = checkpoint.load_weights(Path(run.checkpoints) / "step-00000004", "ema")
    pipeline = plain(run.model)
    stored = pipeline.text_encoder.state_dict()
    for name, value in stored.items():
        assert torch.equal(values[f"text.{name}"], value), name
    assert all(torch.equal(values[f"unet.{k}"], v) for k, v in pipeline.unet.state_dict().items())
    start = plain(base[1]).text_encoder.state_dict()
    assert max(float((start[k] - v).abs().max()) for k, v in stored.items()) > 1e-3
    in_memory = pictures(build_pipeline(run.run), **PROMPT)
    assert np.abs(pictures(pipeline, **PROMPT) - in_memory).max() < 1e-5
    assert "the text encoder learned too, as a whole" in (Path(run.model) / "README.md").read_text()


@pytest.mark.slow
def test_a_whole_text_encoder_learns_beside_a_unet_that_begins_anew(tmp_path: Path) -> None:
    """As the demo does: from tokens, read as a whole too, on 2 ranks, the matrices of both by Muon; it begins as the
    run's own CLIP. Killed after a checkpoint, it ends with the bytes of an undisturbed run."""
    source = make_run(tmp_path / "base", text="tokens", text_layer="last")
    unet = tiny.UNET | {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    muon = {"optimizer": "muon", "learning_rate": 1e-2, "adamw_learning_rate": 1e-3}
    configs = []
    for name in ("r", "undisturbed"):
        config = config_of((source, tmp_path), tmp_path / name, text_encoder={"kind": "full"}, caption_dropout=0.1)
        data = yaml.safe_load(config.read_text())
        del data["train"]["start_from"]
        data["train"] |= {"unet": unet, **muon}
        configs.append(tiny.write_config(tmp_path / name, data))
    config, run = configs[0], RunPaths(str(tmp_path / "r"))
    ranks = forked.start(2, forked.run_stage, str(config))
    forked.wait_for(lambda: (Path(run.checkpoints) / "step-00000002" / "manifest.json").exists())
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        with pytest.raises(forked.RankError):
            rank.result()
    forked.fit(config, 2)
    forked.train(configs[1], 2)
    found = Path(run.checkpoints) / "step-00000004"
    values, squares = checkpoint.load_weights(found, "ema"), checkpoint.whole(str(found), "exp_avg_sq")
    by_muon = values.keys() - squares.keys()
    assert {n.partition(".")[0] for n in by_muon} == {"unet", "text"}
    assert all("layers" in n.split(".") for n in by_muon if n.startswith("text."))
    again = tmp_path / "undisturbed" / "checkpoints" / "step-00000004"
    for state in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        undisturbed, gone_on = (checkpoint.whole(str(folder), state) for folder in (again, found))
        assert undisturbed.keys() == gone_on.keys()
        assert all(torch.equal(undisturbed[n], v) for n, v in gone_on.items()), state
    pipeline = plain(run.model)
    begun = clip_text_model(load_text(str(Path(source.clip) / "model"), "last")).state_dict()
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(values[f"text.{name}"], value), name
    moved = {n: float((values[f"text.{n}"] - v).abs().max()) for n, v in begun.items()}
    assert all(moved[n.removeprefix("text.")] > 1e-3 for n in by_muon if n.startswith("text."))
    assert max(moved.values()) < 0.1, "four steps from where the CLIP stood"
    assert "The text encoder learned with the UNet, as a whole" in (Path(run.model) / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sdxls_text_encoder_learns_too(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", text="tokens", text_layer="penultimate_no_norm")
    save_public("sdxl-fp16-sharded", run, tmp_path / "public")
    data = tiny.configuration(tmp_path / "r", images=16, learning_rate=1e-2, ema_halflife_images=1)
    data["train"] |= {"unet": {}, "start_from": str(tmp_path / "public"), "text_encoder": {"kind": kind}}
    config = tiny.write_config(tmp_path, data)
    forked.fit(config, 2)
    sections = load_sections(str(config), (), TrainingSections)
    objective: Any = build("train", sections.train, [Dataset.open(run.latents)], 5)
    objective.model.load_state_dict(
        {**objective.model.state_dict(), **checkpoint.load_weights(Path(run.checkpoints) / "step-00000002", "ema")}
    )
    pipeline = DiffusionPipeline.from_pretrained(run.model)
    rows, _, pooled, _ = pipeline.encode_prompt("a blue square", device="cpu", do_classifier_free_guidance=False)
    tokens = objective.conditioning.text.tokenize(["a blue square"])
    with torch.no_grad():
        text, added = objective.conditioning.condition({"tokens": tokens, "sizes": torch.zeros(1, 6)})
    torch.testing.assert_close(rows, text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, added["text_embeds"], rtol=1e-4, atol=1e-5)
    if kind == "lora":
        public = DiffusionPipeline.from_pretrained(tmp_path / "public", variant="fp16", torch_dtype=torch.float32)
        public.text_encoder_2, public.vae, public.scheduler = frozen_encoder(run), pipeline.vae, pipeline.scheduler
        public.unet = pipeline.unet
        public.load_lora_weights(Path(run.model) / "lora")
        assert (
            np.abs(pictures(public, prompt="a blue square") - pictures(pipeline, prompt="a blue square")).max() < 5e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_both_of_sdxls_text_encoders_learn(sdxl: Any, kind: str, tmp_path: Path) -> None:  # noqa: F811
    """On 2 ranks under ZeRO 2; what diffusers alone opens encodes and draws as what was trained."""
    root = tmp_path / "r"
    root.mkdir()
    for name in ("latents", "autoencoder", "clip"):
        (root / name).symlink_to(Path(sdxl[0].run) / name)
    data = tiny.configuration(root, images=16, learning_rate=1e-2, ema_halflife_images=1, zero_stage=2)
    data["train"] |= {"unet": {}, "start_from": str(sdxl[1]), "text_encoder": {"kind": kind, "rank": 4, "alpha": 2}}
    data["train"] |= {"adapter": {"rank": 4}} if kind == "lora" else {"activation_checkpointing": True}
    config, run = tiny.write_config(tmp_path, data), RunPaths(str(root))
    forked.fit(config, 2)
    sections = load_sections(str(config), (), TrainingSections)
    objective: Any = build("train", sections.train, [Dataset.open(run.latents)], 5)
    values = checkpoint.load_weights(Path(run.checkpoints) / "step-00000002", "ema")
    fresh = {k: v.clone() for k, v in objective.model.state_dict().items()}
    objective.model.load_state_dict({**fresh, **values})
    moved = {n.split(".")[1] for n, v in values.items() if n.startswith("text.") and not torch.equal(v, fresh[n])}
    assert moved == {"text_encoder", "text_encoder_2"}
    # What nothing reads does not learn: the first's last block, and its last norm.
    still = {n for n in fresh if n.startswith("text.") and n not in values and (".lora_" in n or kind == "full")}
    last = max(
        int(n.partition(".layers.")[2].partition(".")[0]) for n in fresh if "text_encoder." in n and "layers" in n
    )
    assert still
    assert all(n.startswith("text.text_encoder.") for n in still)
    assert all(f".layers.{last}." in n or "final_layer_norm" in n for n in still)
    batch = objective.batch(np.arange(8))
    objective(batch)[0].backward()
    assert all(p.grad is not None for p in objective.model.parameters() if p.requires_grad)
    pipeline = DiffusionPipeline.from_pretrained(run.model)
    rows, _, pooled, _ = pipeline.encode_prompt("a blue square", device="cpu", do_classifier_free_guidance=False)
    with torch.no_grad():
        prompt = objective.conditioning.prompts(["a blue square"])
        text, added = objective.conditioning.condition({**prompt, "sizes": torch.zeros(1, 6)})
    torch.testing.assert_close(rows, text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, added["text_embeds"], rtol=1e-4, atol=1e-5)
    if kind == "full":
        return
    drawn = pictures(pipeline, prompt="a blue square")
    for file in ("pytorch_lora_weights.safetensors", adapters.KOHYA):
        public = DiffusionPipeline.from_pretrained(sdxl[1], scheduler=pipeline.scheduler)
        before = pictures(public, prompt="a blue square")
        public.load_lora_weights(Path(run.model) / "lora", weight_name=file)
        for name in ("text_encoder", "text_encoder_2"):
            assert getattr(public, name).peft_config["default_0"].lora_alpha == 2, file
        assert np.abs(pictures(public, prompt="a blue square") - drawn).max() < 5e-5, file
        assert np.abs(before - drawn).max() > 1e-3
        # And it is gone on from as what it is.
        given = {"rank": 4, "start_from": str(Path(run.model) / "lora" / file)}
        again = TrainConfig(images=16, start_from=str(sdxl[1]), adapter=given, text_encoder={"rank": 4, "alpha": 8})
        other: Any = build("train", again, [Dataset.open(run.latents)], 9)
        with torch.no_grad():
            rows, _ = other.conditioning.condition({**prompt, "sizes": torch.zeros(1, 6)})
        torch.testing.assert_close(rows, text, rtol=1e-4, atol=1e-5)


def frozen_encoder(run: RunPaths) -> Any:
    """In full precision, where the public pipeline's is in half."""
    return clip_text_model(load_text(str(Path(run.clip) / "model"), "penultimate_no_norm"), projected=True)
