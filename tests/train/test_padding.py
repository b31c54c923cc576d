"""What follows a caption's end token: as the tokenizer of the pipeline that is tuned has it, everywhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from latents.config import LatentsConfig
from latents.encoders import load_text, load_text_of, other_encoder
from latents.stage import LatentsStage
from latents.weights import find_pad
from orchestration.config import RunConfig
from orchestration.parts import shard_stages
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, validate
from tests.latents import world
from train import denoising
from train.config import TrainConfig
from train.objectives import build
from train.text_export import clip_text_model, tokenizer, write_tokenizer

START, END = 49406, 49407
# The special tokens of the public pipelines' tokenizers, as their special_tokens_map.json has them.
STABLE_DIFFUSION_1 = {"pad_token": "<|endoftext|>"}
STABLE_DIFFUSION_2 = {"pad_token": "!"}


def public_tokenizer(folder: Path, special: dict[str, str], context: int = 20) -> CLIPTokenizer:
    """transformers' tokenizer in the layout of a public pipeline, from CLIP's own vocabulary and merges."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    source = SimpleTokenizer()
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as f:
        merges = f.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", **special}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({names.get(k, k): v for k, v in source.encoder.items()}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, "do_lower_case": True, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def ids(public: CLIPTokenizer, captions: list[str], context: int = 20) -> np.ndarray:
    return np.array(public(captions, padding="max_length", truncation=True, max_length=context)["input_ids"])


def save_unet(folder: Path) -> None:
    torch.manual_seed(3)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Path, CLIPTokenizer]:
    """Latents for a pipeline with Stable Diffusion 1's tokenizer, made as `carrara latents` makes them."""
    root = tmp_path_factory.mktemp("padding")
    run, pipeline = RunPaths(str(root / "r")), root / "sd1"
    public = public_tokenizer(pipeline / "tokenizer", STABLE_DIFFUSION_1)
    save_unet(pipeline)
    world.image_dataset(run, shards=1, rows=12)
    data: dict[str, Any] = {
        "run": run.run,
        "ingest": {"table": "none.parquet"},
        "autoencoder": {"pretrained": str(world.save_vae(root / "vae"))},
        "clip": {"pretrained": str(world.save_clip(root / "clip"))},
        "latents": {"resolution": 32, "batch_size": 4, "device": "cpu", "text_layer": "last"},
        "train": {"start_from": str(pipeline), "images": 16, "batch_size": 8},
    }
    stage = shard_stages("latents", validate(RunConfig, data, "x.yaml"))[0][0]
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return run, pipeline, public


def test_stored_tokens_are_the_public_tokenizers(tuned: Any) -> None:
    run, _, public = tuned
    dataset = Dataset.open(run.latents)
    assert dataset.manifest["text"]["pad"] == "end"
    stored = load_file(Path(run.latents) / "00000.safetensors")
    rows = pq.read_table(Path(run.latents) / "00000.parquet").to_pylist()
    captions = [r["caption"] for r in rows if r["status"] == "success"]
    clean = [SimpleTokenizer().clean_fn(c) for c in captions]
    assert (stored["tokens"].numpy() == ids(public, clean)).all()
    assert stored["empty_tokens"].tolist() == [START] + [END] * 19
    # The embeddings are of these tokens, the unconditional prompt's too.
    text = load_text(dataset.manifest["text"]["ref"], "last")
    empty = text.encode(torch.tensor([[START] + [END] * 19]))[0]
    torch.testing.assert_close(stored["empty_embedding"].float(), empty, rtol=2e-3, atol=2e-3)


def test_drawn_captions_and_learned_words_have_it_too(tuned: Any) -> None:
    run, pipeline, public = tuned
    datasets = [Dataset.open(run.latents)]
    shared = {"start_from": str(pipeline), "images": 16, "batch_size": 8}
    drawn: Any = build("train", TrainConfig(captions={"caption": 1.0}, caption_dropout=0.5, **shared), datasets, 5)
    rows = drawn.batch(np.arange(8))["tokens"].numpy()
    assert ((rows == END).cumsum(axis=1) > 0)[:, -1].all()
    for row in rows:
        first = row.tolist().index(END)
        assert (row[first:] == END).all()
    word = {"token": "<thing>", "initial": "circle", "templates": ["a photo of {} on blue"]}
    inverted: Any = build("train", TrainConfig(textual_inversion=word, **shared), datasets, 5)
    tokens, place = inverted.conditioning.templates[0]
    public.add_tokens(["<thing>"])
    theirs = ids(public, ["a photo of <thing> on blue"])[0]
    assert (tokens[place < 0] == theirs[place < 0]).all()
    assert theirs[place >= 0].tolist() == [public.convert_tokens_to_ids("<thing>")]


def test_the_exported_tokenizer_and_encoder_pad_so(tuned: Any, tmp_path: Path) -> None:
    run, _, public = tuned
    text = load_text_of(Dataset.open(run.latents).manifest["text"])
    captions = ["a red circle, low left!", "", "!! wow !", "word " * 60]
    ours = tokenizer(text)
    assert (ids(ours, captions) == ids(public, captions)).all()
    write_tokenizer(tmp_path / "written", 20, "end")
    assert find_pad_of(tmp_path / "written") == "end"
    model = clip_text_model(text)
    assert model.config.pad_token_id == END
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids(public, captions))).last_hidden_state
    torch.testing.assert_close(text.encode(text.tokenize(captions)), theirs, rtol=1e-4, atol=1e-5)


def find_pad_of(folder: Path) -> str | None:
    (folder.parent / "p").mkdir()
    (folder.parent / "p" / "tokenizer").symlink_to(folder)
    return find_pad(str(folder.parent / "p"))


@pytest.mark.parametrize(
    ("special", "pad"), [(STABLE_DIFFUSION_1, "end"), (STABLE_DIFFUSION_2, "zero"), ({"pad_token": "<|pad|>"}, None)]
)
def test_how_a_public_tokenizer_pads(special: dict[str, str], pad: str | None, tmp_path: Path) -> None:
    public = public_tokenizer(tmp_path / "p" / "tokenizer", special)
    if pad is None:  # an id of its own, beyond those of CLIP
        assert public.pad_token_id not in (0, END)
        with pytest.raises(ConfigError, match="neither 0 nor its end token"):
            find_pad(str(tmp_path / "p"))
        return
    assert find_pad(str(tmp_path / "p")) == pad
    # Of SDXL's two tokenizers, the second's.
    public_tokenizer(tmp_path / "p" / "tokenizer_2", STABLE_DIFFUSION_2)
    assert find_pad(str(tmp_path / "p")) == "zero"
    assert find_pad(str(tmp_path / "unet alone")) is None


def test_a_pipeline_that_pads_otherwise_is_refused(tuned: Any, tmp_path: Path) -> None:
    run, pipeline, _ = tuned
    other = RunPaths(str(tmp_path / "r"))
    facts = Dataset.open(run.latents).manifest
    world.image_dataset(other, shards=1, rows=6)
    config = LatentsConfig(resolution=32, batch_size=4, device="cpu", text_layer="last")
    stage = LatentsStage(config, other, facts["vae"]["ref"], facts["text"]["ref"])
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    dataset = Dataset.open(other.latents)
    with pytest.raises(ConfigError, match=r"fills prompts up with its end token.*latents\.text_pad end"):
        build("train", TrainConfig(start_from=str(pipeline), images=16, batch_size=8), [dataset], 5)
    denoising.require_pad(str(pipeline), "end")
    # Nor do the two kinds mix in one training.
    assert other_encoder(facts, dataset.manifest) == "text_pad"
    settings = LatentsConfig(resolution=32).settings()
    assert "text_pad" not in settings, "latents that were made before there was a choice stay what they are"
    assert LatentsConfig(resolution=32, text_pad="end").settings()["text_pad"] == "end"
