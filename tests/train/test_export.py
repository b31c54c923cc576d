"""The exported pipeline: it opens in diffusers alone, and its parts give what the training models give."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from latents.config import LatentsConfig
from latents.encoders import load_text, load_vae
from latents.stage import LatentsStage
from shards.dataset import Dataset
from shards.fingerprint import digest_file
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.latents import world
from train import posthoc
from train.config import TrainConfig
from train.export import build_pipeline, export
from train.folders import STATES
from train.schedulers import scheduler
from train.text_export import clip_text_model, tokenizer, write_tokenizer

CONFIG = TrainConfig(
    images=1000, batch_size=10, prediction_type="v_prediction", num_train_timesteps=100, beta_schedule="linear"
)


def save_checkpoint(run: RunPaths, step: int, seed: int) -> UNet2DConditionModel:
    """A checkpoint folder whose EMA is a random UNet, which is returned; its raw weights are twice as large."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    folder = Path(run.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("weights", *STATES):
        scale = 1 if name == "ema" else 2
        save_file({k: v * scale for k, v in unet.state_dict().items()}, folder / f"{name}.safetensors")
    files = {f.name: {"size": f.stat().st_size, "sha256": digest_file(f)} for f in folder.iterdir()}
    manifest = {
        "format_version": 1,
        "files": files,
        "images": step * 10,
        "step": step,
        "config": CONFIG.model_dump(mode="json"),
        "model_config": dict(unet.config),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return unet.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[RunPaths, UNet2DConditionModel]:
    """A run up to its checkpoints, with its own VAE and CLIP; not to be changed."""
    run = RunPaths(str(tmp_path_factory.mktemp("run") / "r"))
    vae = world.save_vae(Path(run.autoencoder) / "model")
    clip = world.save_clip(Path(run.clip) / "model")
    world.image_dataset(run, shards=1, rows=8)
    stage = LatentsStage(LatentsConfig(resolution=32, batch_size=4, device="cpu"), run, str(vae), str(clip))
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    save_checkpoint(run, 5, seed=1)
    return run, save_checkpoint(run, 10, seed=2)


@pytest.fixture(scope="module")
def exported(source) -> Path:
    return Path(export(source[0].run))


@pytest.fixture
def copy(source, tmp_path) -> RunPaths:
    shutil.copytree(source[0].run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "model", ignore_errors=True)
    return RunPaths(str(tmp_path / "copy"))


# ---- text encoder and tokenizer -----------------------------------------------------------------


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize(("quick_gelu", "context_length", "layers"), [(False, 20, 4), (True, 77, 4), (False, 20, 1)])
def test_text_features_are_those_of_transformers(tmp_path, layer, quick_gelu, context_length, layers):
    folder = world.save_clip(tmp_path / "clip", layers=layers, context_length=context_length, quick_gelu=quick_gelu)
    text = load_text(str(folder), layer)
    model = clip_text_model(text)
    assert isinstance(model, CLIPTextModel)
    assert model.config.num_hidden_layers == (layers if layer == "last" else layers - 1)
    tokens = text.tokenize(world.CAPTIONS)
    with torch.no_grad():
        theirs = model(tokens).last_hidden_state
    torch.testing.assert_close(text.encode(tokens), theirs, rtol=1e-5, atol=1e-5)
    if layers == 1:
        return
    # And against open_clip's own intermediate outputs, which neither of the two computes.
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        blocks = reference.forward_intermediates(text=tokens, normalize_intermediates=True)["text_intermediates"]
    torch.testing.assert_close(theirs, blocks[-1 if layer == "last" else -2], rtol=1e-5, atol=1e-5)
    assert (blocks[-1] - blocks[-2]).abs().max() > 0.1


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 20)
    return open_clip.SimpleTokenizer(context_length=20), CLIPTokenizer.from_pretrained(folder)


def ids(theirs, captions: list[str]) -> np.ndarray:
    return np.array(theirs(captions, padding="max_length", truncation=True, max_length=20)["input_ids"])


def test_token_ids_are_open_clips(tokenizers):
    ours, theirs = tokenizers
    assert (theirs.model_max_length, theirs.pad_token_id) == (20, 0)
    captions = [
        "",
        "a red circle, low left!",
        "!! wow !",
        "don't 12 x 34 #tag @you 50% (off) [sic]",
        "café naïve ünïcödé",
        "猫 犬 と 😀 emoji 👩‍👩‍👧",
        "русский текст",
        "a" * 200,
        "word " * 100,
        "x!" * 60,
    ]
    assert [ours.clean_fn(c) for c in captions] == [c.strip() for c in captions]
    assert (ids(theirs, captions) == ours(captions).numpy()).all()
    assert (ids(theirs, ["A Photo OF a CAT"]) == ours(["a photo of a cat"]).numpy()).all()


# Categories: every character that Unicode assigns, except surrogates. (What a later Unicode assigns is a
# letter to one library and not to the other.)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)


@given(TEXT)
@example("hello! wow!!")
@example("'S 'LL it's")
def test_token_ids_are_open_clips_for_any_clean_caption(tokenizers, caption):
    ours, theirs = tokenizers
    clean = ours.clean_fn(caption)
    assume(ours.clean_fn(clean) == clean)
    assume(not any(s in clean for s in ("<|", "<start_of_text>", "<end_of_text>")))
    assert (ids(theirs, [clean]) == ours([clean]).numpy()).all()


def test_a_clip_with_a_tokenizer_of_its_own_is_refused(tmp_path):
    text = load_text(str(world.save_clip(tmp_path / "clip")))
    text.tokenizer = open_clip.SimpleTokenizer(context_length=20, clean="canonicalize")
    with pytest.raises(ConfigError, match="has a tokenizer of its own"):
        tokenizer(text)


# ---- scheduler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedulers_noise_is_the_trainers(schedule):
    from train import diffusion

    config = CONFIG.model_copy(update={"beta_schedule": schedule})
    found = scheduler(config)
    expected = diffusion.alphas_cumprod(diffusion.betas(schedule, 100, config.beta_start, config.beta_end))
    assert isinstance(found, DDIMScheduler)
    assert found.config.prediction_type == "v_prediction"
    torch.testing.assert_close(found.alphas_cumprod.double(), expected, rtol=1e-5, atol=1e-7)
    found.set_timesteps(10)
    assert found.timesteps[0] == 99


# ---- the pipeline -------------------------------------------------------------------------------


def pictures(pipeline, **prompt) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**prompt, num_inference_steps=3, guidance_scale=4.0, output_type="np", generator=generator).images


def test_the_exported_unet_is_the_checkpoints_ema(source, exported):
    _, unet = source
    pipeline = StableDiffusionPipeline.from_pretrained(exported)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 70]), torch.randn(2, 20, 32)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, t, text).sample, unet(x, t, text).sample)
    raw = build_pipeline(source[0].run, weights="raw").unet.state_dict()
    assert all(torch.equal(raw[k], 2 * v) for k, v in unet.state_dict().items())
    older = build_pipeline(source[0].run, "step-00000005").unet.state_dict()
    ema = load_file(Path(source[0].checkpoints) / "step-00000005" / "ema.safetensors")
    assert all(torch.equal(older[k], v) for k, v in ema.items())


def test_prompts_draw_what_open_clip_embeddings_draw(source, exported):
    run, _ = source
    text = load_text(str(Path(run.clip) / "model"), "penultimate")
    pipeline = StableDiffusionPipeline.from_pretrained(exported)
    prompts = ["a blue square, low left!", "café 猫"]
    embeddings = text.encode(text.tokenize(prompts))
    negative = text.encode(text.tokenize(["", ""]))
    from_prompt = pictures(pipeline, prompt=prompts)
    from_embeddings = pictures(pipeline, prompt_embeds=embeddings, negative_prompt_embeds=negative)
    assert from_prompt.shape == (2, 32, 32, 3)
    # Two implementations of the same CLIP: what remains is float32 rounding, through three steps and a decoder.
    assert np.abs(from_prompt - from_embeddings).max() <= 1e-5
    assert np.abs(pictures(pipeline, prompt=["a red circle", ""]) - from_prompt).max() > 1e-3
    in_memory = pictures(build_pipeline(run.run), prompt=prompts)
    assert np.abs(from_prompt - in_memory).max() <= 1e-6


def test_the_vae_is_the_latents_one(source, exported):
    run, _ = source
    vae = load_vae(str(exported))
    assert vae.digest == Dataset.open(run.latents).manifest["vae"]["digest"]
    assert StableDiffusionPipeline.from_pretrained(exported).vae.config.scaling_factor == 0.7


def test_weights_have_the_names_old_and_new_transformers_read(exported):
    with safe_open(exported / "text_encoder" / "model.safetensors", "pt") as f:
        names = list(f.keys())
    assert "text_model.embeddings.token_embedding.weight" in names
    assert all(n.startswith("text_model.") for n in names)
    assert {p.name for p in (exported / "tokenizer").iterdir()} == {
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_it_opens_where_there_is_no_carrara(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    script = (
        "import sys, torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        "p = StableDiffusionPipeline.from_pretrained('model')\n"
        "p.set_progress_bar_config(disable=True)\n"
        "image = p('a red circle!', num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]\n"
        "assert image.size == (32, 32), image.size\n"
        "assert not any(m.split('.')[0] in ('train', 'latents', 'shards') for m in sys.modules)\n"
        "image.save('picture.png')\n"
    )
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 0
    for complaint in ("safety", "deprecat", "unexpected", "newly initialized", "not used", "missing"):
        assert complaint not in done.stderr.lower(), done.stderr


# ---- the folder ---------------------------------------------------------------------------------


def test_provenance_and_card(source, exported):
    run, _ = source
    facts = json.loads((exported / "carrara.json").read_text())
    manifest = Dataset.open(run.latents).manifest
    assert (facts["checkpoint"], facts["weights"]) == ("step-00000010", "ema")
    assert (facts["images_seen"], facts["steps"]) == (100, 10)
    assert facts["latents"]["fingerprint"] == manifest["fingerprint"]
    assert facts["latents"]["samples"] == manifest["count"] == 7
    assert facts["vae"]["digest"] == manifest["vae"]["digest"]
    assert facts["text"]["digest"] == manifest["text"]["digest"]
    card = (exported / "README.md").read_text()
    for fact in ("step-00000010", "predicts the velocity", "7 images", "32 x 32", manifest["text"]["digest"]):
        assert fact in card
    assert "failed to download 1" in card


def test_a_second_export_does_nothing_and_another_checkpoint_replaces(copy):
    folder = Path(export(copy.run, "step-00000005"))
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_ino
    assert export(copy.run, "step-00000005") == str(folder)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_ino == before
    export(copy.run)
    assert json.loads((folder / "carrara.json").read_text())["checkpoint"] == "step-00000010"
    assert sorted(p.name for p in Path(copy.run).iterdir() if p.name.startswith(".")) == []


def test_options_of_the_command(copy, source, tmp_path, capsys):
    from orchestration.run_stage import main

    out = tmp_path / "half"
    options = ["--precision", "float16", "--out", str(out), "--licence", "CC-BY-4.0", "--weights", "raw"]
    assert main(["export", copy.run, "--checkpoint", "step-00000005", *options]) == 0
    assert not Path(copy.model).exists(), "--out is in place of RUN/model"
    raw = load_file(Path(copy.checkpoints) / "step-00000005" / "weights.safetensors")
    stored = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == raw.keys()
    assert all(stored[k].dtype == torch.float16 and torch.equal(stored[k], v.half()) for k, v in raw.items())
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert {v.dtype for v in load_file(out / part).values()} == {torch.float16}
    card, facts = (out / "README.md").read_text(), json.loads((out / "carrara.json").read_text())
    assert (facts["dtype"], facts["licence"], facts["weights"]) == ("float16", "CC-BY-4.0", "raw")
    assert 'license: other\nlicense_name: "CC-BY-4.0"' in card.split("---")[1]
    assert "Licence: CC-BY-4.0." in card
    # Half precision is the whole model rounded, and nothing else.
    whole = tmp_path / "whole"
    assert main(["export", copy.run, "--checkpoint", "step-00000005", "--out", str(whole), "--weights", "raw"]) == 0
    rounded = StableDiffusionPipeline.from_pretrained(whole).to(dtype=torch.float16).to(dtype=torch.float32)
    half = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    drawn = [pictures(p, prompt="a red circle") for p in (half, rounded)]
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-5
    assert "have not said under which licence" in (whole / "README.md").read_text()
    # Another option is another model; a folder that is none is left alone.
    before = (out / "carrara.json").read_text()
    assert main(["export", copy.run, "--checkpoint", "step-00000005", *options, "--weights", "ema"]) == 0
    assert (out / "carrara.json").read_text() != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert main(["export", copy.run, "--out", str(mine)]) == 2
    assert "is there and is no exported model" in capsys.readouterr().err
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    assert main(["export", copy.run, "--precision", "float8"]) == 2
    assert "float32 or float16, not 'float8'" in capsys.readouterr().err


def test_a_length_of_the_average_chosen_afterwards(copy, source):
    torch.manual_seed(3)
    folder = Path(copy.checkpoints) / "posthoc"
    folder.mkdir()
    unet = source[1].state_dict()
    kept = {
        (images, std): {k: torch.randn_like(v).half() for k, v in unet.items()}
        for images in (50, 100)
        for std in ("0.050", "0.100")
    }
    for (images, std), weights in kept.items():
        save_file(weights, folder / f"ema_{std}-{images:012d}.safetensors")
    export(copy.run, weights="posthoc:0.075")
    times, stds = [t for t, _ in kept], [float(s) for _, s in kept]
    factors = posthoc.coefficients(times, stds, 100, 0.075)
    stored = load_file(Path(copy.model) / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in stored.items():
        expected = sum(f * w[name].double() for f, w in zip(factors, kept.values(), strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert "put together from snapshots afterwards" in (Path(copy.model) / "README.md").read_text()
    shutil.rmtree(folder)
    with pytest.raises(StageError, match="snapshots of 0 EMAs at 50 images"):
        export(copy.run, "step-00000005", weights="posthoc:0.075")
    with pytest.raises(StageError, match=r"has no weights 'ema_0\.050'; it has raw, ema"):
        export(copy.run, weights="ema_0.050")


def test_a_run_that_was_moved_still_exports(copy, source):
    # The manifest names the encoders by their old place; here that place is gone.
    manifest = Path(copy.latents) / "dataset.json"
    manifest.write_text(manifest.read_text().replace(str(source[0].run), "/gone"))
    export(copy.run)
    assert (Path(copy.model) / "model_index.json").is_file()


@pytest.mark.parametrize("which", ["VAE", "CLIP"])
def test_other_encoders_are_refused(copy, source, which):
    manifest = Path(copy.latents) / "dataset.json"
    manifest.write_text(manifest.read_text().replace(str(source[0].run), str(copy.run)))
    root, save = (copy.autoencoder, world.save_vae) if which == "VAE" else (copy.clip, world.save_clip)
    shutil.rmtree(Path(root) / "model")
    with pytest.raises(StageError, match=f"the {which} that the latents were made with is not at") as gone:
        export(copy.run)
    save(Path(root) / "model", seed=9)
    with pytest.raises(StageError, match=f"the {which} at .* is not the one the latents were made with") as other:
        export(copy.run)
    for error in (gone, other):
        assert "\n" not in str(error.value)
    assert not Path(copy.model).exists()


def test_missing_checkpoints_are_one_sentence(copy):
    with pytest.raises(StageError, match="no complete checkpoint 'step-00000077'"):
        export(copy.run, "step-00000077")
    with pytest.raises(ConfigError, match="not 'best'"):
        export(copy.run, weights="best")
    shutil.rmtree(copy.checkpoints)
    with pytest.raises(StageError, match="no complete checkpoint here; run the train stage"):
        export(copy.run)
