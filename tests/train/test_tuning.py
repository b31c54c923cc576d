"""Fine-tuning through the one loop, and what comes out opened by diffusers and peft alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from latents.config import LatentsConfig
from latents.encoders import load_text, load_vae
from latents.stage import LatentsStage
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, load_sections, validate
from tests.latents import world
from tests.train import forked, tiny
from tests.train.test_export import pictures, save_checkpoint
from tests.train.test_padding import STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, public_tokenizer
from train import adapters, checkpoint, folders
from train.config import TrainConfig, TrainingSections
from train.export import build_pipeline, export
from train.objectives import build
from train.text_export import clip_text_model, tokenizer

pytestmark = pytest.mark.timeout(900)

SHAPE: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tiny.UNET.items()}


def make_run(root: Path, **latents: Any) -> RunPaths:
    run = RunPaths(str(root))
    vae = world.save_vae(Path(run.autoencoder) / "model")
    clip = world.save_clip(Path(run.clip) / "model")
    world.image_dataset(run, shards=1, rows=12)
    config = LatentsConfig(resolution=32, batch_size=4, device="cpu", **latents)
    stage = LatentsStage(config, run, str(vae), str(clip))
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Path]:
    """A run, and the pipeline that was exported from it."""
    run = make_run(tmp_path_factory.mktemp("base") / "r")
    save_checkpoint(run, 10, seed=2)
    return run, Path(export(run.run))


def tuned(base: tuple[RunPaths, Path], folder: Path, **train: Any) -> tuple[RunPaths, Path]:
    """A run on the same latents that begins with the exported pipeline, trained for four steps."""
    for name in ("latents", "autoencoder", "clip"):
        (folder / name).symlink_to(Path(base[0].run) / name)
    data = tiny.configuration(folder, images=32, learning_rate=1e-2, ema_halflife_images=1, **train)
    data["train"] |= {"unet": {}, "start_from": str(base[1]), "num_train_timesteps": 100, "beta_schedule": "linear"}
    data["train"]["prediction_type"] = "v_prediction"
    config = tiny.write_config(folder, data)
    forked.on_ranks(1, run_and_export, str(config))
    return RunPaths(str(folder)), config


def run_and_export(config: str) -> None:
    from train.main import run

    run("train", config)


def plain(folder: Path | str) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.mark.slow
def test_full_fine_tuning_begins_with_the_pipelines_weights(base: Any, tmp_path: Path) -> None:
    run, config = tuned(base, tmp_path)
    sections = load_sections(str(config), (), TrainingSections)
    objective = build("train", sections.train, [Dataset.open(run.latents)], 5)
    start = UNet2DConditionModel.from_pretrained(base[1] / "unet").state_dict()
    assert all(torch.equal(start[k], v) for k, v in objective.model.state_dict().items())
    end = UNet2DConditionModel.from_pretrained(Path(run.model) / "unet").state_dict()
    assert max(float((start[k] - end[k]).abs().max()) for k in start) > 1e-3
    assert "began as" in (Path(run.model) / "README.md").read_text()


@pytest.mark.slow
def test_a_lora_is_what_load_lora_weights_takes(base: Any, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 4, "alpha": 8, "convolutions": True}
    run, _ = tuned(base, tmp_path, adapter=adapter, micro_batch_size=4, activation_checkpointing=True)
    prompt = {"prompt": ["a blue square", "a red circle"]}
    merged = pictures(plain(run.model), **prompt)
    pipeline = plain(base[1])
    before = pictures(pipeline, **prompt)
    pipeline.load_lora_weights(Path(run.model) / "lora")
    assert pipeline.unet.peft_config["default_0"].lora_alpha == 8
    assert np.abs(pictures(pipeline, **prompt) - merged).max() < 2e-5
    assert np.abs(before - merged).max() > 1e-3
    names = load_file(Path(run.model) / "lora" / "pytorch_lora_weights.safetensors")
    assert any("resnets.0.conv1.lora" in n for n in names)
    # Checkpoints hold the updates alone, and the frozen weights never moved.
    saved = checkpoint.whole(str(Path(run.checkpoints) / "step-00000004"), "weights")
    assert saved
    assert all(".lora_" in n for n in saved)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_adapters_are_pefts(base: Any, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    run, _ = tuned(base, tmp_path, adapter={"kind": kind, "rank": 4})
    merged = plain(run.model).unet
    unet = UNet2DConditionModel.from_pretrained(base[1] / "unet")
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 70]), torch.randn(2, 20, 32)
    with torch.no_grad():
        before = unet(x, t, text).sample
        theirs = PeftModel.from_pretrained(unet, Path(run.model) / "adapter")(x, t, text).sample
        ours = merged(x, t, text).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (before - ours).abs().max() > 1e-4


@pytest.mark.slow
def test_a_learned_word_is_what_load_textual_inversion_takes(base: Any, tmp_path: Path) -> None:
    word = {"token": "<thing>", "initial": "circle", "vectors": 2, "templates": ["a photo of {} on blue", "{}"]}
    run, config = tuned(base, tmp_path, textual_inversion=word, zero_stage=2)
    sections = load_sections(str(config), (), TrainingSections)
    objective: Any = build("train", sections.train, [Dataset.open(run.latents)], 5)
    begin = objective.model.text.rows.detach().clone()
    learned = load_file(Path(run.model) / "learned_embeds.safetensors")["<thing>"]
    assert (learned - begin).abs().max() > 1e-3
    # The UNet and the CLIP are those of the start, to the bit.
    start = UNet2DConditionModel.from_pretrained(base[1] / "unet").state_dict()
    assert all(torch.equal(start[k], v) for k, v in plain(run.model).unet.state_dict().items())
    pipeline = plain(run.model)
    pipeline.load_textual_inversion(Path(run.model) / "learned_embeds.safetensors")
    got, _ = pipeline.encode_prompt("a photo of <thing> on blue", "cpu", 1, False)
    objective.model.text.rows.data.copy_(learned)
    tokens, place = (torch.from_numpy(v)[None] for v in objective.conditioning.templates[0])
    with torch.no_grad():
        torch.testing.assert_close(got, objective.model.text(tokens, place), rtol=1e-4, atol=1e-5)
    in_memory = pictures(build_pipeline(run.run), prompt="a photo of <thing>")
    assert np.abs(pictures(pipeline, prompt="a photo of <thing>") - in_memory).max() < 2e-5


@pytest.mark.slow
def test_a_unet_that_is_told_sizes_becomes_an_sdxl_pipeline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", text_layer="penultimate_no_norm", text_pooled=True)
    unet = {
        **tiny.UNET,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    data = tiny.configuration(tmp_path / "r", images=16)
    data["train"] |= {"unet": unet}
    config = tiny.write_config(tmp_path, data)
    forked.on_ranks(1, run_and_export, str(config))
    pipeline = DiffusionPipeline.from_pretrained(run.model)
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    text = load_text(str(Path(run.clip) / "model"), "penultimate_no_norm")
    rows, pooled = text.encode_pooled(text.tokenize(["a blue square"]))
    got_rows, _, got_pooled, _ = pipeline.encode_prompt(
        "a blue square", device="cpu", do_classifier_free_guidance=False
    )
    torch.testing.assert_close(got_rows, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_pooled, pooled, rtol=1e-4, atol=1e-5)
    # The pictures are the trainer's own, up to where the weights lie in memory, and a sampler's written out below.
    drawn = pictures(pipeline, prompt="a blue square")
    assert drawn.shape == (1, 32, 32, 3)
    assert np.abs(drawn - pictures(build_pipeline(run.run), prompt="a blue square")).max() < 1e-6
    by_hand = sampled_by_hand(run, text, "a blue square", steps=3, scale=4.0, seed=0)
    assert np.abs(by_hand - drawn[0]).max() < 2e-5
    assert drawn.std() > 0.01
    # What the UNet is told in training: the stored sizes, in SDXL's order.
    sections = load_sections(str(config), (), TrainingSections)
    objective = build("train", sections.train, [Dataset.open(run.latents)], 5)
    batch = objective.batch(np.arange(9))
    micro = load_file(Path(run.latents) / "00000.safetensors")["micro"].float()
    assert len(micro) == len(batch["sizes"]) + 1  # nine of the ten samples
    assert {tuple(row) for row in batch["sizes"].tolist()} <= {tuple(row) for row in micro.tolist()}


@torch.no_grad()
def sampled_by_hand(run: RunPaths, text: Any, prompt: str, steps: int, scale: float, seed: int) -> np.ndarray:
    """DDIM (Song et al. 2020, eq. 12 with eta 0) from the checkpoint's EMA, open_clip's text and the latents' VAE."""
    folder = folders.latest_complete(run.checkpoints)
    assert folder is not None
    unet = UNet2DConditionModel.from_config(folders.read_manifest(folder)["model_config"]).eval()
    unet.load_state_dict(checkpoint.load_weights(folder))
    vae = load_vae(str(Path(run.autoencoder) / "model"), "cpu")
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    rows, pooled = text.encode_pooled(text.tokenize(["", prompt]))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    times = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    for t in times:
        empty, full = unet(x.repeat(2, 1, 1, 1), t, rows, added_cond_kwargs=added).sample.chunk(2)
        noise = empty + scale * (full - empty)
        now, then = alpha_bar[t], alpha_bar[max(t - 1000 // steps, 0)]
        x0 = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = then**0.5 * x0 + (1 - then) ** 0.5 * noise
    factor = Dataset.open(run.latents).manifest["vae"]["scaling_factor"]
    return (vae.model.decode(x / factor).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


# ---- pipelines as diffusers saves them -------------------------------------------------------------

DEEP: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "sample_size": 16,
}
PUBLIC: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd15-fp16": ("last", {**DEEP, "attention_head_dim": 2}, {"variant": "fp16"}),
    "sd2-sharded": (
        "penultimate",
        {**DEEP, "attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True},
        {"max_shard_size": "100KB"},
    ),
    "sdxl-fp16-sharded": (
        "penultimate_no_norm",
        {
            **DEEP,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "attention_head_dim": (1, 2, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
        {"variant": "fp16", "max_shard_size": "100KB"},
    ),
}


def save_public(name: str, run: RunPaths, folder: Path) -> dict[str, Any]:
    """A pipeline of random weights in the layout of a public one, saved by diffusers alone; how to open it."""
    layer, shape, how = PUBLIC[name]
    torch.manual_seed(11)
    unet = UNet2DConditionModel(**shape)
    text = load_text(str(Path(run.clip) / "model"), layer)
    parts = {
        "unet": unet,
        "vae": AutoencoderKL.from_pretrained(Path(run.autoencoder) / "model"),
        "scheduler": PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
    }
    made: Any
    if name.startswith("sdxl"):
        encoder = clip_text_model(text, projected=True)
        made = StableDiffusionXLPipeline(
            **parts,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=encoder,
            tokenizer_2=tokenizer(text),
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    else:
        made = StableDiffusionPipeline(
            **parts,
            text_encoder=clip_text_model(text),
            tokenizer=tokenizer(text),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    variant = how.get("variant")
    made.to(dtype=torch.float16 if variant else torch.float32).save_pretrained(folder, **how)
    for names in folder.glob("tokenizer*"):  # the public ones, with the special tokens that they have
        shutil.rmtree(names)
        public_tokenizer(names, STABLE_DIFFUSION_1 if name.startswith("sd15") else STABLE_DIFFUSION_2)
    return {"variant": variant} if variant else {}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_pipeline_is_fine_tuned_and_takes_the_lora(name: str, tmp_path: Path) -> None:
    layer = PUBLIC[name][0]
    pad = "end" if name.startswith("sd15") else "zero"
    run = make_run(tmp_path / "r", text_layer=layer, text_pooled=name.startswith("sdxl"), text_pad=pad)
    public = tmp_path / "public"
    opened = save_public(name, run, public)
    files = {p.name for p in (public / "unet").iterdir()}
    assert ("sharded" in name) == any("00001-of-" in f for f in files)
    assert ("fp16" in name) == all("fp16" in f for f in files if f != "config.json")
    data = tiny.configuration(tmp_path / "r", images=32, learning_rate=1e-2, ema_halflife_images=1)
    data["train"] |= {"unet": {}, "start_from": str(public), "adapter": {"rank": 4, "convolutions": True}}
    config = tiny.write_config(tmp_path, data)
    sections = load_sections(str(config), (), TrainingSections)
    theirs = UNet2DConditionModel.from_pretrained(public / "unet", torch_dtype=torch.float32, **opened).state_dict()
    ours = adapters.load_unet(str(public)).state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in ours.items())
    forked.on_ranks(1, run_and_export, str(config))
    merged = DiffusionPipeline.from_pretrained(run.model)
    pipeline = DiffusionPipeline.from_pretrained(public, torch_dtype=torch.float32, safety_checker=None, **opened)
    pipeline.scheduler = merged.scheduler
    pipeline.vae, prompt = merged.vae, {"prompt": ["a blue square", "a red circle"]}
    for part in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, part, None) is not None:
            setattr(pipeline, part, getattr(merged, part))  # half precision rounds those too
    before, after = pictures(pipeline, **prompt), pictures(merged, **prompt)
    pipeline.load_lora_weights(Path(run.model) / "lora")
    assert np.abs(pictures(pipeline, **prompt) - after).max() < 5e-5
    assert np.abs(before - after).max() > 1e-3
    # A part of the weights that is gone, or pickles: one sentence.
    adapters.find_unet.cache_clear()
    for part in (public / "unet").glob("*.safetensors"):
        part.rename(part.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"which is not beside it" if "sharded" in name else "are pickled"):
        build("train", sections.train, [Dataset.open(run.latents)], 5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"projection_class_embeddings_input_dim": 16 + 5 * 8},
            "input_dim is 56, but 16 values of pooled text and six",
        ),
        ({"cross_attention_dim": 64}, r"cross_attention_dim 64, but the latents ask for 32; .* two CLIPs side by side"),
    ],
)
def test_sdxl_models_that_are_told_something_else_are_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    """SDXL's refiner, which is told an aesthetic score, and its base model, which reads two CLIPs."""
    run = make_run(tmp_path / "r", text_layer="penultimate_no_norm", text_pooled=True)
    UNet2DConditionModel(**{**PUBLIC["sdxl-fp16-sharded"][1], **change}).save_pretrained(tmp_path / "unet")
    config = TrainConfig(images=16, start_from=str(tmp_path / "unet"))
    with pytest.raises(ConfigError, match=sentence):
        build("train", config, [Dataset.open(run.latents)], 5)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, ["prediction_type"]),
        ({"prediction_type": "v_prediction"}, []),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ["zero_terminal_snr"]),
        ({"prediction_type": "v_prediction", "beta_schedule": "linear"}, ["beta_schedule"]),
        ({"prediction_type": "v_prediction", "beta_end": 0.02}, ["beta_end"]),
        ({"prediction_type": "v_prediction", "num_train_timesteps": 100}, ["num_train_timesteps"]),
    ],
)
def test_another_process_than_the_pipelines_is_said(
    stored: dict[str, Any], said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UNet2DConditionModel(**SHAPE, sample_size=16, cross_attention_dim=32).save_pretrained(tmp_path / "unet")
    plain: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    PNDMScheduler(**plain).save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **stored}))
    adapters.check_process(str(tmp_path), TrainConfig(start_from="x", prediction_type="v_prediction"))
    assert [r.args[0] for r in caplog.records if r.name == "carrara.train"] == said


def test_where_a_unet_cannot_come_from(base: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no UNet"):
        adapters.find_unet(str(tmp_path / "empty"))
    data = {"start_from": str(base[1]), "adapter": {"targets": ["no_such_layer"]}}
    config = TrainConfig(images=8, batch_size=8, **data)
    with pytest.raises(ConfigError, match=r"train\.adapter\.targets"):
        build("train", config, [Dataset.open(base[0].latents)], 0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"adapter": {}}, "adapter changes a model that is there; name it with start_from"),
        ({"text_encoder": {}}, "text_encoder changes a model that is there; name it with start_from"),
        ({"start_from": "x", "text_encoder": {}, "optimizer": "muon"}, "text_encoder's few weights use adamw"),
        ({"start_from": "x", "unet": {"layers_per_block": 1}}, "unet is given by start_from"),
        ({"start_from": "x", "adapter": {}, "textual_inversion": {"token": "<a>", "initial": "b"}}, "two ways"),
        ({"start_from": "x", "textual_inversion": {"token": "<a>", "initial": "b", "templates": ["c"]}}, "one {}"),
    ],
)
def test_tuning_that_cannot_be(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(TrainConfig, values, "x.yaml")


@pytest.mark.slow
def test_dreambooth_is_two_sources_with_a_weight_of_their_loss(base: Any, tmp_path: Path) -> None:
    """Half of each batch from either; the prior's loss counts lambda times, as in the paper's equation 2."""
    prior = make_run(tmp_path / "prior")
    sources = [{"weight": 1}, {"latents": prior.latents, "weight": 1, "loss_weight": 0.25}]
    (tmp_path / "run").mkdir()
    run, config = tuned(base, tmp_path / "run", sources=sources)
    manifest = json.loads((Path(run.checkpoints) / "step-00000004" / "manifest.json").read_text())
    assert [s["root"] for s in manifest["sources"]] == [run.latents, prior.latents]
    sections = load_sections(str(config), (), TrainingSections)
    datasets = [Dataset.open(run.latents), Dataset.open(prior.latents)]
    objective: Any = build("train", sections.train, datasets, 5)
    batch = objective.batch(np.arange(8))
    assert sorted(batch["weight"].tolist()) == [0.25] * 4 + [1.0] * 4
    with torch.no_grad():
        error, _ = objective.errors(batch)
        loss, details = objective(batch)
    assert float(loss) == pytest.approx(float((error * batch["weight"]).mean()), rel=1e-5)
    assert float(details[0]) == pytest.approx(float(error.mean()), rel=1e-5)


@pytest.mark.parametrize(("layer", "sized"), [("last", True), ("penultimate", True), ("last_no_norm", False)])
def test_captions_that_no_pipeline_would_show_are_refused_before_training(
    tmp_path: Path, layer: str, sized: bool
) -> None:
    run = make_run(tmp_path / "r", text_layer=layer, text_pooled=True)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    config = TrainConfig(images=16, unet={**tiny.UNET, **(added if sized else {})})
    with pytest.raises(ConfigError, match=f"latents.text_layer {layer}"):
        build("train", config, [Dataset.open(run.latents)], 5)
