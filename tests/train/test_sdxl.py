"""SDXL's base model, which reads two CLIPs side by side: from captions in latents to the exported pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from eval import networks
from latents.config import LatentsConfig
from latents.encoders import load_text, load_text_of, load_vae, other_encoder
from latents.inspection import inspect
from latents.stage import LatentsStage
from latents.weights import find_clip
from orchestration.config import RunConfig
from orchestration.parts import shard_stages
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, load_sections, validate
from tests.latents import world
from tests.train import forked, tiny
from tests.train.test_export import pictures
from tests.train.test_padding import STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, public_tokenizer
from tests.train.test_tuning import PUBLIC, run_and_export
from train import checkpoint, folders
from train.config import TrainConfig, TrainingSections
from train.objectives import build
from train.text_export import clip_text_model, tokenizer

pytestmark = pytest.mark.timeout(900)

WIDTHS = (32, 16)  # of the two CLIPs; the UNet reads the sum
PROMPTS = ["a red circle", "", "word " * 60]
UNET = {**PUBLIC["sdxl-fp16-sharded"][1], "cross_attention_dim": sum(WIDTHS)}


def save_pipeline(run: RunPaths, second: str, folder: Path) -> StableDiffusionXLPipeline:
    """SDXL's base in small, of random weights, saved by diffusers: the first tokenizer pads with the end, the second
    with 0, and so do the public ones."""
    torch.manual_seed(11)
    one = load_text(str(Path(run.clip) / "model"), "penultimate_no_norm", pad="end")
    two = load_text(second, "penultimate_no_norm")
    made = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**UNET),
        vae=load_vae(str(Path(run.autoencoder) / "model")).model,
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        text_encoder=clip_text_model(one, first_of_two=True),
        tokenizer=tokenizer(one),
        text_encoder_2=clip_text_model(two, projected=True),
        tokenizer_2=tokenizer(two),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    made.save_pretrained(folder)
    for name, special in (("tokenizer", STABLE_DIFFUSION_1), ("tokenizer_2", STABLE_DIFFUSION_2)):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
        public_tokenizer(folder / name, special)
    return made


def settings(root: Path, second: str, **latents: Any) -> dict[str, Any]:
    values = {"resolution": 32, "batch_size": 4, "device": "cpu", "text_layer": "penultimate_no_norm"}
    return {
        "run": str(root),
        "ingest": {"table": "none.parquet"},
        "autoencoder": {"pretrained": str(root / "autoencoder" / "model")},
        "clip": {"pretrained": str(root / "clip" / "model")},
        "latents": values | {"text_encoder": {"kind": "second_clip", "pretrained": second}} | latents,
        "train": {"start_from": str(root.parent / "public"), "images": 16, "batch_size": 8},
    }


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Path, str]:
    """Latents with the tokens of both CLIPs, as `carrara latents` makes them for that pipeline; the pipeline; the
    second CLIP."""
    root = tmp_path_factory.mktemp("sdxl")
    run, second = RunPaths(str(root / "r")), str(root / "second")
    world.save_vae(Path(run.autoencoder) / "model")
    world.save_clip(Path(run.clip) / "model", quick_gelu=True, width=WIDTHS[0])
    world.save_clip(root / "second", seed=7, layers=4, width=WIDTHS[1])
    world.image_dataset(run, shards=2, rows=12)
    save_pipeline(run, second, root / "public")
    make(run, settings(root / "r", second, text="tokens"))
    return run, root / "public", second


def make(run: RunPaths, data: dict[str, Any]) -> None:
    stage = shard_stages("latents", validate(RunConfig, data, "x.yaml"))[0][0]
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])


@pytest.fixture(scope="module")
def embedded(sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """The same, with what both make of each caption."""
    root = tmp_path_factory.mktemp("embedded") / "r"
    root.mkdir()
    for name in ("images", "autoencoder", "clip"):
        (root / name).symlink_to(Path(sdxl[0].run) / name)
    (root.parent / "public").symlink_to(sdxl[1])
    make(RunPaths(str(root)), settings(root, sdxl[2], text="embeddings", text_pooled=True))
    return RunPaths(str(root))


def test_the_tokens_of_both_are_the_public_tokenizers(sdxl: Any) -> None:
    run, public, _ = sdxl
    facts = Dataset.open(run.latents).manifest["text"]
    assert (facts["kind"], facts["width"], [f["pad"] for f in facts["encoders"]]) == ("clip_pair", 48, ["end", "zero"])
    stored = load_file(Path(run.latents) / "00000.safetensors")
    theirs = StableDiffusionXLPipeline.from_pretrained(public)
    for name, one in (("tokens", theirs.tokenizer), ("tokens_2", theirs.tokenizer_2)):
        empty = one("", padding="max_length", max_length=20)["input_ids"]
        assert stored[f"empty_{name}"].tolist() == empty
    assert (stored["tokens"] != stored["tokens_2"]).any()
    assert inspect(stage_of(sdxl), count=4).complaint == ""


def test_a_pipelines_own_encoders_are_read_as_they_lie(sdxl: Any, tmp_path: Path) -> None:
    """What somebody has tuned comes as transformers saves it, and is no whole CLIP."""
    run, public, _ = sdxl
    data = settings(tmp_path / "r", str(public / "text_encoder_2"), text="embeddings", text_pooled=True)
    data["clip"]["pretrained"] = str(public / "text_encoder")
    data["autoencoder"]["pretrained"], data["train"]["start_from"] = str(public), str(public)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "images").symlink_to(Path(run.run) / "images")
    own = RunPaths(str(tmp_path / "r"))
    make(own, data)
    dataset = Dataset.open(own.latents)
    text: Any = load_text_of(dataset.manifest["text"])
    theirs = StableDiffusionXLPipeline.from_pretrained(public)
    rows, pooled = text.encode_tokens(text.tokens_of(PROMPTS), pooled=True)
    expected = theirs.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(rows, expected[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(pooled, expected[2], rtol=1e-4, atol=2e-5)
    for model, mine in (
        (theirs.text_encoder, clip_text_model(text.first, first_of_two=True)),
        (theirs.text_encoder_2, clip_text_model(text.second, projected=True)),
    ):
        assert model.state_dict().keys() == mine.state_dict().keys()
        assert all(torch.equal(v, mine.state_dict()[k]) for k, v in model.state_dict().items())
    build("train", TrainConfig(images=16, start_from=str(public)), [dataset], 5)
    config = json.loads((public / "text_encoder" / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model.safetensors").write_bytes(b"")
    for changes, said in (
        ({"intermediate_size": "64"}, "has a size that is no whole number"),
        ({"projection_dim": 0}, "has a size that is no whole number"),
        ({"layer_norm_eps": 1e-6}, "its layer_norm_eps is 1e-06, and must be 1e-5"),
    ):
        (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError, match=said):
            find_clip(str(tmp_path / "odd"))
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "hidden_size": 704, "intermediate_size": 960}))
    assert int(704 * find_clip(str(tmp_path / "odd")).model_cfg["text_cfg"]["mlp_ratio"]) == 960
    with pytest.raises(ConfigError, match="is a text encoder alone and can judge no image"):
        text.first.encode_captions(["a"])
    with pytest.raises(ConfigError, match="is a text encoder alone"):
        networks.find("clip", str(public / "text_encoder"))
    with pytest.raises(ConfigError, match="describes no CLIP's text encoder"):
        find_clip(str(public / "unet"))


def stage_of(sdxl: Any) -> LatentsStage:
    data = settings(Path(sdxl[0].run), sdxl[2], text="tokens")
    stage: Any = shard_stages("latents", validate(RunConfig, data, "x.yaml"))[0][0]
    return stage


@pytest.mark.parametrize("text", ["tokens", "embeddings"])
def test_the_unet_is_told_what_diffusers_tells_it(sdxl: Any, embedded: RunPaths, text: str) -> None:
    run, public, _ = sdxl
    run = run if text == "tokens" else embedded
    config = TrainConfig(images=16, batch_size=8, start_from=str(public), caption_dropout=0.5)
    objective: Any = build("train", config, [Dataset.open(run.latents)], 5)
    pipeline = StableDiffusionXLPipeline.from_pretrained(public)

    def encoded(prompts: list[str]) -> Any:
        found = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        return found[0], found[2]

    encoder = objective.conditioning
    own = load_text_of(objective.facts["encoders"]["text"]) if text == "embeddings" else None
    batch = encoder.prompts(PROMPTS, own) | {"sizes": torch.zeros(3, 6)}
    with torch.no_grad():
        rows, added = encoder.condition(batch)
        expected = encoded(PROMPTS)
    torch.testing.assert_close(rows, expected[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(added["text_embeds"], expected[1], rtol=1e-4, atol=2e-5)
    # And so are the captions of a batch, dropped ones being empty; the stored halves are rounded to half precision.
    positions = np.arange(8)
    u = objective.random.uniform("caption", positions)
    captions = [c[0][0] if c[0] else "" for c in objective.latents.captions(positions, ["caption"])]
    clean = [pipeline.tokenizer.decode(pipeline.tokenizer(c)["input_ids"], skip_special_tokens=True) for c in captions]
    # (To the public tokenizer of the second every "!" is what it fills up with: text_export.py.)
    kept = [c if c.isascii() and "!" not in c else None for c in clean]
    with torch.no_grad():
        rows, added = encoder.condition(objective.batch(positions))
        for i, caption in enumerate(kept):
            if caption is None and u[i] >= 0.5:
                continue  # decoding tokens does not give such a caption back
            both = encoded(["" if u[i] < 0.5 else str(caption)])
            torch.testing.assert_close(rows[i], both[0][0], rtol=5e-3, atol=5e-3)
            torch.testing.assert_close(added["text_embeds"][i], both[1][0], rtol=5e-3, atol=5e-3)
    assert 0 < (u < 0.5).sum() < 8
    # Captions that are drawn anew go through both too.
    drawn: Any = build(
        "train", config.model_copy(update={"captions": {"caption": 1.0}}), [Dataset.open(run.latents)], 5
    )
    with torch.no_grad():
        again, more = drawn.conditioning.condition(drawn.batch(positions))
    torch.testing.assert_close(again, rows, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(more["text_embeds"], added["text_embeds"], rtol=5e-3, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sdxl_is_tuned_and_exported_with_both(sdxl: Any, embedded: RunPaths, kind: str, tmp_path: Path) -> None:
    """Killed after a checkpoint, gone on with 2 ranks; with validation on held-out pictures and with samples."""
    data = sdxl[0] if kind == "full" else embedded
    root = tmp_path / "r"
    root.mkdir()
    for name in ("latents", "autoencoder", "clip"):
        (root / name).symlink_to(Path(data.run) / name)
    (root / "heldout").symlink_to(Path(sdxl[0].run) / "images")
    given = tiny.configuration(root, images=32, learning_rate=1e-2, ema_halflife_images=1)
    given["train"] |= {"unet": {}, "start_from": str(sdxl[1])}
    given["train"] |= {"adapter": {"rank": 4}} if kind == "lora" else {}
    given["train"] |= {"samples": {"prompts": ["a blue square"], "steps": 2}, "validation": {"images": 4}}
    config = tiny.write_config(tmp_path, given)
    run = RunPaths(str(root))
    first = forked.start(1, forked.run_stage, str(config))
    forked.wait_for(lambda: (Path(run.checkpoints) / "step-00000002" / "manifest.json").exists())
    first[0].kill()
    with pytest.raises(forked.RankError):
        first[0].result()
    forked.on_ranks(2, run_and_export, str(config))
    pipeline = DiffusionPipeline.from_pretrained(run.model)
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    public = StableDiffusionXLPipeline.from_pretrained(sdxl[1])
    for name in ("text_encoder", "text_encoder_2"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(public, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    for name in ("tokenizer", "tokenizer_2"):
        a, b = (getattr(p, name)("a red circle", padding="max_length", max_length=20) for p in (pipeline, public))
        assert a["input_ids"] == b["input_ids"]
    # What the exported pipeline draws is what our own conditioning draws, by a sampler that is written out.
    drawn = pictures(pipeline, prompt="a blue square")
    by_hand = sampled_by_hand(run, config, pipeline.unet, "a blue square")
    assert np.abs(by_hand - drawn[0]).max() < 5e-5
    before = pictures(
        StableDiffusionXLPipeline.from_pretrained(sdxl[1], scheduler=pipeline.scheduler), prompt="a blue square"
    )
    assert np.abs(before - drawn).max() > 1e-3
    if kind == "lora":
        public.scheduler = pipeline.scheduler
        public.load_lora_weights(Path(run.model) / "lora")
        assert np.abs(pictures(public, prompt="a blue square") - drawn).max() < 5e-5
    facts = json.loads((Path(run.model) / "carrara.json").read_text())
    card = (Path(run.model) / "README.md").read_text()
    assert all(one["digest"] in card for one in facts["text"]["encoders"])
    assert list((root / "train" / "samples").iterdir())


@torch.no_grad()
def sampled_by_hand(run: RunPaths, config: Path, unet: Any, prompt: str, steps: int = 3, scale: float = 4.0) -> Any:
    """DDIM (Song et al. 2020, eq. 12 with eta 0) of the trainer's own UNet and conditioning, and the latents' VAE."""
    folder = folders.latest_complete(run.checkpoints)
    assert folder is not None
    sections = load_sections(str(config), (), TrainingSections)
    objective: Any = build("train", sections.train, [Dataset.open(run.latents)], 5)
    objective.model.load_state_dict(checkpoint.load_weights(folder), strict=False)
    text = load_text_of(objective.facts["encoders"]["text"]) if objective.conditioning.stored else None
    sizes = {"sizes": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    rows, added = objective.conditioning.condition(objective.conditioning.prompts(["", prompt], text) | sizes)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]:
        empty, full = objective.unet(x.repeat(2, 1, 1, 1), t, rows, added_cond_kwargs=added).sample.chunk(2)
        noise = empty + scale * (full - empty)
        now, then = alpha_bar[t], alpha_bar[max(t - 1000 // steps, 0)]
        x0 = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = then**0.5 * x0 + (1 - then) ** 0.5 * noise
    vae, factor = load_vae(str(Path(run.autoencoder) / "model")), objective.scale
    return (vae.model.decode(x / factor).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def test_what_does_not_go_together_is_one_sentence(sdxl: Any, tmp_path: Path) -> None:
    run = sdxl[0]
    datasets = [Dataset.open(run.latents)]
    with pytest.raises(ConfigError, match=r"has one CLIP, and its latents were made with two"):
        build("train", TrainConfig(images=16, unet=tiny.UNET), datasets, 5)
    with pytest.raises(ConfigError, match="with text_layer: penultimate_no_norm; it is last"):
        validate(LatentsConfig, {"text_layer": "last", "text_encoder": {"kind": "second_clip", "pretrained": "x"}}, "x")
    short = world.save_clip(tmp_path / "short", context_length=8)
    data = settings(Path(run.run), str(short))
    with pytest.raises(ConfigError, match=r"reads 8 tokens and .* 20; two CLIPs are read side by side"):
        shard_stages("latents", validate(RunConfig, data, "x.yaml"))[0][0].made_with()
    # A pipeline whose second tokenizer pads otherwise.
    other = tmp_path / "other"
    UNet2DConditionModel(**UNET).save_pretrained(other / "unet")
    public_tokenizer(other / "tokenizer", STABLE_DIFFUSION_1)
    public_tokenizer(other / "tokenizer_2", STABLE_DIFFUSION_1)
    with pytest.raises(ConfigError, match=r"its end token.*latents\.text_encoder\.pad end"):
        build("train", TrainConfig(images=16, start_from=str(other)), datasets, 5)
    # Two pairs are the same encoders only where both halves are.
    facts = datasets[0].manifest
    stage = shard_stages(
        "latents", validate(RunConfig, settings(Path(run.run), str(world.save_clip(tmp_path / "b", width=16))), "x")
    )
    assert stage[0][0].made_with().weights["text"] != facts["text"]["digest"]
    assert other_encoder(facts, facts) is None
    first, second = facts["text"]["encoders"]
    padded = {**facts, "text": {**facts["text"], "encoders": [first, {**second, "pad": "end"}]}}
    assert second["pad"] == "zero"
    assert other_encoder(facts, padded) == "text_encoder.pad"


def test_latents_of_one_clip_are_what_they_were() -> None:
    assert "text_encoder" not in LatentsConfig(resolution=32).settings()
    pair = {"kind": "second_clip", "pretrained": "anywhere"}
    found = LatentsConfig(resolution=32, text_layer="penultimate_no_norm", text_encoder=pair).settings()
    assert found["text_encoder"] == {"kind": "second_clip", "pad": "zero"}, "where weights lie is no setting of a shard"
    assert found["text_pad"] == "end"
