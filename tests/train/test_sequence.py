"""Text encoders of transformers: their states as latents, under a mask in the UNet, and in what is exported."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GemmaConfig,
    GemmaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from eval import model as checkpoints
from eval.generate import ImageGenerator, Sample
from eval.sample import Request, SampleConfig, SampleStage
from latents import planning
from latents.config import LatentsConfig
from latents.encoders import load_text_of, load_vae, other_encoder
from latents.inspection import inspect
from latents.text import SequenceEncoder
from latents.weights import find_sequence
from orchestration.config import RunConfig
from orchestration.parts import check_inputs, shard_stages
from shards.blank import blank_columns
from shards.columns import keep_rows, pack_columns, unpack_columns
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, load_sections, validate
from tests.eval.conftest import drive
from tests.latents import world
from tests.train import forked, tiny
from tests.train.test_padding import STABLE_DIFFUSION_1, public_tokenizer
from train import checkpoint, plan
from train.config import TrainConfig, TrainingSections
from train.data import micro_batches
from train.export import build_pipeline
from train.objectives import build

pytestmark = pytest.mark.timeout(900)

LENGTH = 128
PROMPTS = ["a red circle", "", "a blue square, low left! " * 9]


def save_tokenizer(folder: Path, ids: int, begin: str | None = None) -> None:
    """A token a byte, `</s>` behind (and what `begin` is in front), as T5's and Gemma's have it."""
    specials = ["<pad>", "</s>", "<s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials)}
    vocabulary |= {token: ids - 1 - i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = f"{begin} $A" if begin else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, i) for i, t in enumerate(specials)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side="left"
    ).save_pretrained(folder)


def save_t5(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=300,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        initializer_factor=2.0,
        dropout_rate=0.1,
    )
    T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder, 300)
    return folder


def save_gemma(folder: Path) -> Path:
    """Causal, with rotary places, no end token, and more ids than 16 bits hold."""
    torch.manual_seed(1)
    config = GemmaConfig(
        vocab_size=70_000,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    GemmaModel(config).save_pretrained(folder)
    save_tokenizer(folder, 70_000, "<s>")
    return folder


ENCODERS = {"t5": (save_t5, T5EncoderModel), "gemma": (save_gemma, GemmaModel)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a VAE and both encoders; there is no CLIP."""
    root = tmp_path_factory.mktemp("sequence")
    run = RunPaths(str(root / "images-alone"))
    world.image_dataset(run, shards=2, rows=14)
    world.save_vae(Path(run.autoencoder) / "model")
    for name, (save, _) in ENCODERS.items():
        save(root / name)
    return root


def settings(images: Path, run: Path, encoder: str = "t5", **latents: Any) -> dict[str, Any]:
    values = {"resolution": 32, "batch_size": 4, "device": "cpu", "buckets": {"step": 8, "max_aspect": 2}}
    text = {"kind": "transformers", "pretrained": str(images / encoder), "max_length": LENGTH}
    return {
        "run": str(run),
        "ingest": {"table": "none.parquet"},
        "autoencoder": {"pretrained": str(run / "autoencoder" / "model")},
        "latents": {**values, "text_encoder": text, **latents},
    }


def test_the_priors_latents_ask_for_no_clip_either(images: Path, tmp_path: Path) -> None:
    (tmp_path / "autoencoder").symlink_to(images / "images-alone" / "autoencoder")
    data = settings(images, tmp_path) | {"train": {"start_from": "x", "prior": {"prompt": "a dog", "count": 1}}}
    check_inputs("prior", validate(RunConfig, data, "x.yaml"))


def make(images: Path, run: Path, encoder: str = "t5", **latents: Any) -> RunPaths:
    run.mkdir(parents=True)
    for name in ("images", "autoencoder"):
        (run / name).symlink_to(images / "images-alone" / name)
    (run / "heldout").symlink_to(images / "images-alone" / "images")
    config = validate(RunConfig, settings(images, run, encoder, **latents), "x.yaml")
    check_inputs("latents", config)  # which asks for no CLIP
    stage = shard_stages("latents", config)[0][0]
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    return RunPaths(str(run))


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunPaths]:
    """By what the latents hold; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    return {text: make(images, root / text, text=text) for text in ("tokens", "embeddings")}


def objective_of(run: RunPaths, **values: Any) -> Any:
    config = TrainConfig(**{"images": 16, "batch_size": 8, "unet": tiny.UNET, "batch_by_area": None, **values})
    return build("train", config, [Dataset.open(run.latents)], 5)


def text_of(run: RunPaths) -> Any:
    return load_text_of(Dataset.open(run.latents).manifest["text"])


def theirs(folder: Path, kind: Any, captions: list[str], length: int = LENGTH) -> list[tuple[list[int], torch.Tensor]]:
    """Ids and last states of each caption by transformers alone, one at a time, so that nothing is padded."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder).eval()
    found = []
    for caption in captions:
        ids = tokenizer(caption, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append((ids[0].tolist(), model(input_ids=ids).last_hidden_state[0]))
    return found


# ---- latents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_latents_hold_transformers_own_states_packed(images: Path, encoder: str, tmp_path: Path) -> None:
    run = make(images, tmp_path / "r", encoder, text="embeddings", buckets=None)
    facts = Dataset.open(run.latents).manifest["text"]
    assert (facts["kind"], facts["width"], facts["context_length"]) == ("transformers", 24, LENGTH)
    for shard in ("00000", "00001"):
        stored = load_file(Path(run.latents) / f"{shard}.safetensors")
        assert stored["tokens"].dtype == {"t5": torch.uint16, "gemma": torch.uint32}[encoder]
        captions = [json.loads(line)[0] if line != "[]" else "" for line in lines_of(stored)]
        expected = theirs(images / encoder, ENCODERS[encoder][1], captions)
        ends = stored["embedding_end"].tolist()
        assert len(stored["embeddings"]) == ends[-1], "as many rows as tokens, and no padding"
        used = {}
        for i, (ids, states) in enumerate(expected):
            length, at = int(stored["text_length"][i]), int(stored["embedding_index"][i])
            assert stored["tokens"][i].to(torch.int64).tolist() == ids + [0] * (LENGTH - length)
            rows = stored["embeddings"][(ends[at - 1] if at else 0) : ends[at]]
            assert len(rows) == length == len(ids)
            torch.testing.assert_close(rows.float(), states, rtol=2e-3, atol=4e-3)
            used[at] = length
        assert sum(used.values()) == ends[-1], "a distinct caption once"
        assert max(used.values()) == LENGTH > min(used.values())
        empty = theirs(images / encoder, ENCODERS[encoder][1], [""])[0]
        torch.testing.assert_close(stored["empty_embedding"].float(), empty[1], rtol=2e-3, atol=4e-3)
        assert int(stored["empty_text_length"]) == len(empty[0])
    data = settings(images, Path(run.run), encoder, text="embeddings", buckets=None)
    stage: Any = shard_stages("latents", validate(RunConfig, data, "x.yaml"))[0][0]
    assert inspect(stage, count=6).complaint == ""
    # The plan knows that rows are packed.
    rates, facts = planning.rates_of(stage, samples=100), planning.facts_of(stage)
    planned = planning.column_bytes("embeddings", True, rates, facts)
    held = [load_file(Path(run.latents) / f"0000{i}.safetensors") for i in (0, 1)]
    assert facts["id_bytes"] == held[0]["tokens"].element_size() == (2 if encoder == "t5" else 4)
    names = ("mean", "logstd", "tokens", "text_length", "micro", "embeddings", "embedding_index")
    real = sum(h[n].nbytes for h in held for n in names) / sum(len(h["tokens"]) for h in held)
    assert abs(planned / real - 1) < 0.25


def lines_of(stored: dict[str, torch.Tensor]) -> list[str]:
    ends = [0, *stored["text_end.caption"].tolist()]
    data = bytes(stored["text.caption"].numpy())
    return [data[a:b].decode() for a, b in itertools.pairwise(ends)]


def test_one_worker_or_another_writes_the_same_bytes(images: Path, runs: dict[str, RunPaths], tmp_path: Path) -> None:
    again = make(images, tmp_path / "r", text="embeddings")
    for name in ("00000.safetensors", "00001.safetensors"):
        assert (Path(again.latents) / name).read_bytes() == (Path(runs["embeddings"].latents) / name).read_bytes()


def test_in_place_of_float16_the_encoder_runs_in_bfloat16(images: Path, tmp_path: Path) -> None:
    """The large T5s' states leave the range of float16, where transformers clips them: what comes out is finite, and
    nothing tells that it is wrong."""
    folder = tmp_path / "t5"
    shutil.copytree(images / "t5", folder)
    model = T5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".wo.weight"):
                value.mul_(3e4)
    model.save_pretrained(folder)
    weights = find_sequence(str(folder))
    half = SequenceEncoder(weights, 32, dtype=torch.float16)
    tokens = half.tokens_of(["a red circle"])
    exact = SequenceEncoder(weights, 32).encode_tokens(tokens)[0]
    ids, mask = (torch.from_numpy(tokens["tokens"][:, :13]), torch.ones(1, 13, dtype=torch.int64))
    with torch.no_grad():
        clipped = model.half()(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    assert torch.isfinite(clipped).all()
    assert (clipped - exact[:, :13]).norm() > 0.5 * exact.norm(), "or this shows nothing"
    assert (half.encode_tokens(tokens)[0] - exact).norm() < 0.1 * exact.norm()
    torch.testing.assert_close(half.encode_tokens(tokens, exact=True)[0], exact)
    batch = {n: torch.from_numpy(v) for n, v in tokens.items()}
    within = SequenceEncoder(weights, 32).features_of(batch, torch.float16)
    assert within.rows.dtype == torch.float16
    assert (within.rows.float() - exact).norm() < 0.1 * exact.norm()


def test_ids_that_the_encoder_does_not_know_are_left_out(images: Path, tmp_path: Path) -> None:
    """Some tokenizers have words beside those of the model, which any caption may hold; a model's own has no others."""
    folder = tmp_path / "t5"
    model = T5EncoderModel.from_pretrained(images / "t5")
    model.resize_token_embeddings(259)
    model.save_pretrained(folder)
    save_tokenizer(folder, 259)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    text = SequenceEncoder(find_sequence(str(folder)), 32)
    assert text.tokenizer("<image>")["input_ids"][0] == text.vocabulary == 259
    some, plain = text.tokens_of(["a <image>b"]), text.tokens_of(["a b"])
    assert {n: ids.tolist() for n, ids in some.items()} == {n: ids.tolist() for n, ids in plain.items()}
    save_tokenizer(folder, 70_000)
    with pytest.raises(ConfigError, match="its tokenizer has ids up to 69999, and its weights know 259 of them"):
        SequenceEncoder(find_sequence(str(folder)), 32)


def test_t5s_sentencepiece_model_alone_is_a_tokenizer(images: Path, tmp_path: Path) -> None:
    """Which is what T5's and UMT5's own repositories hold; what is exported has the same tokenizer in one file."""
    folder = tmp_path / "t5"
    shutil.copytree(images / "t5", folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    words = "a red circle on blue square low left green ring white it's naïve über don't on ground"
    rng = np.random.default_rng(0)
    lines = (" ".join(rng.choice(words.split(), 8)) for _ in range(300))
    specials = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    name = str(folder / "spiece")
    SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=name, vocab_size=40, minloglevel=2, **specials)
    text = SequenceEncoder(find_sequence(str(folder)), 32)
    theirs = SentencePieceProcessor(model_file=f"{name}.model")
    captions = [*PROMPTS[:2], "  two  spaces, it's naïve 绿", "a </s> <extra_id_0>"]
    found = text.tokens_of(captions)
    for i, caption in enumerate(captions[:3]):
        expected = [*theirs.encode(caption), 1]
        assert found["tokens"][i, : found["text_length"][i]].tolist() == expected
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    again = SequenceEncoder(find_sequence(str(folder)), 32)
    assert {n: v.tolist() for n, v in again.tokens_of(captions).items()} == {n: v.tolist() for n, v in found.items()}
    shutil.copytree(folder, tmp_path / "saved", ignore=shutil.ignore_patterns("spiece*", "tokenizer*"))
    text.tokenizer.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("spiece*"))
    saved = SequenceEncoder(find_sequence(str(tmp_path / "saved")), 32)
    assert {n: v.tolist() for n, v in saved.tokens_of(captions).items()} == {n: v.tolist() for n, v in found.items()}
    whole = find_sequence(str(folder)).digest
    (folder / "spiece.model").write_bytes(b"no model")
    assert find_sequence(str(folder)).digest != whole
    with pytest.raises(ConfigError, match=r"opened by transformers \(.*\); load it .* writes tokenizer\.json"):
        SequenceEncoder(find_sequence(str(folder)), 32)


def test_clips_vocabulary_and_merges_are_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    torch.manual_seed(2)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=40, **sizes)
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer = public_tokenizer(folder / "names", STABLE_DIFFUSION_1, context=40)
    for file in (folder / "names").iterdir():
        file.rename(folder / file.name)
    assert not (folder / "tokenizer.json").exists()
    text = SequenceEncoder(find_sequence(str(folder)), 40)
    found = text.tokens_of(PROMPTS)
    rows = text.encode_tokens(found)[0]
    model = CLIPTextModel.from_pretrained(folder).eval()
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, truncation=True, max_length=40, return_tensors="pt")["input_ids"]
        assert found["tokens"][i, : found["text_length"][i]].tolist() == ids[0].tolist()
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(rows[i, : len(states)], states, rtol=1e-4, atol=1e-5)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ConfigError, match=r"opened by transformers \(.*\); load it .* writes tokenizer\.json"):
        SequenceEncoder(find_sequence(str(folder)), 40)


def test_captions_longer_than_the_encoders_places_are_refused_beforehand(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    save_tokenizer(folder, 300)
    weights = find_sequence(str(folder))
    with pytest.raises(ConfigError, match=r"max_length is 41, and .* has places for 40 tokens; lower it"):
        weights.facts(41)
    text = SequenceEncoder(weights, weights.facts(40)["context_length"])
    assert torch.isfinite(text.encode_tokens(text.tokens_of(["a caption that is long " * 9]))[0]).all()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 38}))
    with pytest.raises(ConfigError, match="has places for 38 tokens"):
        find_sequence(str(folder)).facts(40)
    assert find_sequence(str(images / "t5")).longest is None


def test_the_priors_pictures_need_no_clip_either(images: Path, tmp_path: Path) -> None:
    train = {"images": 8, "start_from": "x", "prior": {"prompt": "a", "count": 1}}
    data = {**settings(images, tmp_path / "r"), "train": train}
    data["autoencoder"] = {"pretrained": str(images / "images-alone" / "autoencoder" / "model")}
    check_inputs("prior", validate(RunConfig, data, "x.yaml"))


def test_a_take_down_blanks_the_rows_of_a_caption_that_nobody_else_has() -> None:
    arrays = {
        "mean": np.ones((4, 2), np.float16),
        "tokens": np.ones((4, 3), np.uint16),
        "text_length": np.array([2, 1, 3, 2], np.uint16),
        "embedding_index": np.array([0, 1, 2, 0], np.int32),
        "embeddings": np.arange(1, 13, dtype=np.float16).reshape(6, 2),
        "embedding_end": np.array([2, 3, 6]),
        "empty_tokens": np.ones(3, np.uint16),
        "empty_text_length": np.uint16(1),
        "empty_embedding": np.ones((1, 2)),
    }
    data = pack_columns(arrays, {})
    found, _ = unpack_columns(blank_columns(data, np.array([0, 2]), np.array([1, 3])))
    assert found["embeddings"][:3].tolist() == arrays["embeddings"][:3].tolist(), "sample 3 has the first caption too"
    assert (found["embeddings"][3:] == 0).all()
    assert found["embedding_end"].tolist() == [2, 3, 6]
    kept = keep_rows(arrays, np.array([1, 2]), 4)
    assert kept["embeddings"].tolist() == arrays["embeddings"][2:].tolist()
    assert (kept["embedding_end"].tolist(), kept["embedding_index"].tolist()) == ([1, 4], [0, 1])


# ---- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["tokens", "embeddings"])
@torch.no_grad()
def test_padding_changes_nothing_and_words_beyond_77_do(runs: dict[str, RunPaths], text: str) -> None:
    objective = objective_of(runs[text], caption_dropout=0.4, initialisation="torch")
    objective.eval()
    batch = objective.batch(np.arange(8))
    assert set(batch) == {"x0", "noise", "t", "text_length", "tokens" if text == "tokens" else "text"}
    assert len(batch["text_length"].unique()) > 2
    own = objective.predict(batch["noise"], batch)
    name = "tokens" if text == "tokens" else "text"
    value = batch[name]
    # What lies behind a caption may be anything, and be longer.
    more = torch.nn.functional.pad(value, (0, 40) if text == "tokens" else (0, 0, 0, 40))
    behind = torch.arange(more.shape[1]) >= batch["text_length"][:, None]
    noise = torch.randint(3, 200, more.shape) if text == "tokens" else torch.randn(more.shape)
    more = torch.where(behind if text == "tokens" else behind[..., None], noise, more)
    longer = objective.predict(batch["noise"], {**batch, name: more})
    torch.testing.assert_close(longer, own, rtol=1e-4, atol=1e-5)
    # Without the mask it would not be so.
    unmasked = {**batch, name: more, "text_length": torch.full_like(batch["text_length"], more.shape[1])}
    assert (objective.predict(batch["noise"], unmasked) - own).abs().max() > 1e-3
    # A dropped caption is the empty one, as a prompt gives it.
    empty = objective.conditioning.prompts([""], text_of(runs[text]))
    dropped = objective.random.uniform("caption", np.arange(8)) < 0.4
    assert 0 < dropped.sum() < 8
    for i in np.flatnonzero(dropped):
        torch.testing.assert_close(batch[name][i], empty[name][0], rtol=2e-3, atol=4e-3)
        assert batch["text_length"][i] == empty["text_length"][0]
    # Half a surrogate pair is no reason to stop.
    assert int(objective.conditioning.prompts(["a \ud83d"], text_of(runs[text]))["text_length"][0]) == 4
    # A caption of 120 tokens, and its first 77.
    caption = "a red circle above a blue square, beside it " * 4
    whole = objective.conditioning.prompts([caption[:119]], text_of(runs[text]))
    assert int(whole["text_length"][0]) == 120
    first = objective.conditioning.prompts([caption[:76]], text_of(runs[text]))
    x = {k: batch[k][:1] for k in ("x0", "noise", "t")}
    apart = objective.predict(x["noise"], x | whole) - objective.predict(x["noise"], x | first)
    assert apart.abs().max() > 1e-3


@pytest.mark.parametrize("text", ["tokens", "embeddings"])
def test_half_precision_masks_too_and_captions_are_drawn(runs: dict[str, RunPaths], text: str) -> None:
    objective = objective_of(runs[text], captions={"caption": 1.0}, initialisation="torch", caption_dropout=0.0)
    batch, plain = objective.batch(np.arange(8)), objective_of(runs[text], caption_dropout=0.0).batch(np.arange(8))
    assert torch.equal(batch["text_length"], plain["text_length"])
    loss, _ = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = objective(batch)
    assert objective.conditioning.text.dtype == torch.bfloat16, "the frozen encoder runs in autocast's arithmetic"
    assert abs(half.item() / loss.item() - 1) < 0.02
    half.backward()
    assert {n for n, _ in objective.named_parameters()} == {f"model.{n}" for n, _ in objective.model.named_parameters()}


@pytest.mark.parametrize("text", ["tokens", "embeddings"])
def test_a_micro_batch_is_as_long_as_its_longest_caption(runs: dict[str, RunPaths], text: str) -> None:
    """In steps of 8; to the model it is what all places are. Where lengths are compiled it stays whole."""
    objective = objective_of(runs[text], caption_dropout=0.4, initialisation="torch", batch_size=2)
    config, name = objective.config, "tokens" if text == "tokens" else "text"
    ranks: Any = SimpleNamespace(world=1, rank=0, device=torch.device("cpu"))
    given = list(micro_batches(objective, config, ranks, 0))
    whole = [objective.batch(np.arange(i, i + 2)) for i in range(0, 16, 2)]
    lengths = [int(b["text_length"].max()) for b in whole]
    assert [b[name].shape[1] for b in given] == [-(-n // 8) * 8 for n in lengths]
    assert len({b[name].shape[1] for b in given}) > 2
    with torch.no_grad():
        for short, long in zip(given, whole, strict=True):
            assert long[name].shape[1] == LENGTH
            torch.testing.assert_close(
                objective.predict(long["noise"], short), objective.predict(long["noise"], long), rtol=1e-4, atol=1e-5
            )
    compiled = config.model_copy(update={"compile": "blocks"})
    assert next(micro_batches(objective, compiled, ranks, 0))[name].shape[1] == LENGTH
    # What is counted as work is what is done; what must fit is the longest caption that may come.
    at = int(np.argmin(lengths))
    found, full = (plan.plan(objective, whole[at], c, "fp32", 2, 1) for c in (config, compiled))
    assert found.flops < 0.9 * full.flops
    assert found.activations == full.activations


def test_memory_and_flops_are_counted_without_moving_the_encoder(runs: dict[str, RunPaths]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    objective = objective_of(runs["tokens"])
    text, batch = objective.conditioning.text, objective.batch(np.arange(8))
    before = {n: p.data_ptr() for n, p in text.model.named_parameters()}
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        fake = {k: mode.from_tensor(v).to("cuda") for k, v in batch.items()}
        rows = text.features_of(fake, torch.bfloat16).rows
        assert (rows.device.type, rows.dtype, tuple(rows.shape)) == ("cuda", torch.bfloat16, (8, LENGTH, 24))
    assert counter.get_total_flops() >= 2 * 2 * 8 * LENGTH * (4 * 24 * 24 + 3 * 24 * 32)
    assert {n: p.data_ptr() for n, p in text.model.named_parameters()} == before
    assert (text.dtype, text.device) == (torch.float32, "cpu")


def config_of(root: Path, run: RunPaths, **train: Any) -> Path:
    root.mkdir()
    for part in ("latents", "autoencoder", "heldout"):
        (root / part).symlink_to(Path(run.run) / part)
    data = tiny.configuration(root, learning_rate=1e-2, ema_halflife_images=8, caption_dropout=0.3, **train)
    data["train"] |= {"unet": {**tiny.UNET, "cross_attention_dim": 16, "encoder_hid_dim": 24}}
    return tiny.write_config(root, data)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tokens", "embeddings"])
def test_a_killed_fit_ends_with_the_same_bytes(runs: dict[str, RunPaths], text: str, tmp_path: Path) -> None:
    """On buckets, with dropout, EMA, held-out pictures and samples."""
    ends = []
    more = {"samples": {"prompts": PROMPTS, "steps": 2}, "validation": {"images": 4, "every_images": 8}}
    for name in ("whole", "killed"):
        config = config_of(tmp_path / name, runs[text], images=16, checkpoint_every_images=8, **more)
        run = RunPaths(str(tmp_path / name))
        if name == "killed":
            ranks = forked.start(1, forked.run_stage, str(config))
            forked.wait_for(lambda run=run: (Path(run.checkpoints) / "step-00000001" / "manifest.json").exists())
            ranks[0].kill()
            with pytest.raises(forked.RankError):
                ranks[0].result()
        forked.fit(config, 1)
        folder = Path(run.checkpoints) / "step-00000002"
        ends.append({state: checkpoint.load_weights(folder, state) for state in ("raw", "ema")})
    for state, values in ends[0].items():
        assert all(torch.equal(ends[1][state][k], v) for k, v in values.items()), state
    assert list((tmp_path / "killed" / "train" / "samples").iterdir())
    assert not any(k.startswith("text") for k in ends[0]["raw"]), "the frozen encoder is in no checkpoint"


@pytest.mark.slow
def test_what_is_exported_draws_where_there_is_no_carrara(runs: dict[str, RunPaths], tmp_path: Path) -> None:
    config = config_of(tmp_path / "r", runs["tokens"], images=8)
    run = RunPaths(str(tmp_path / "r"))
    forked.fit(config, 1)
    drawn = alone(Path(run.model), tmp_path)
    # What our own sampler, written out, draws with our own conditioning.
    sections = load_sections(str(config), (), TrainingSections)
    objective: Any = build("train", sections.train, [Dataset.open(run.latents)], 5)
    objective.model.load_state_dict(checkpoint.load_weights(Path(run.checkpoints) / "step-00000001", "ema"))
    by_hand = sampled_by_hand(objective, run, text_of(run), PROMPTS[2])
    assert np.abs(by_hand - drawn[0]).max() < 5e-5
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3, "what stands beyond its 77th token is drawn too"
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    again = build_pipeline(run.run)(PROMPTS[2], **given, output_type="np").images
    assert np.abs(again[0] - drawn[0]).max() < 5e-5
    card = (Path(run.model) / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "at most 128 tokens of 24 values, under a mask" in card
    evaluated(run, tmp_path)


def alone(model: Path, folder: Path) -> np.ndarray:
    """Two pictures by diffusers where there is no Carrara: of the long prompt, and of its first 77 bytes."""
    shutil.copytree(model, folder / "model")
    script = (
        "import sys, torch, numpy\n"
        "from diffusers import DiffusionPipeline\n"
        "p = DiffusionPipeline.from_pretrained('model', trust_remote_code=True)\n"
        "p.set_progress_bar_config(disable=True)\n"
        f"prompts = [{PROMPTS[2]!r}, {PROMPTS[2][:77]!r}]\n"
        "images = [p(q, num_inference_steps=3, guidance_scale=4.0, output_type='np',\n"
        "            generator=torch.Generator().manual_seed(0)).images[0] for q in prompts]\n"
        "assert not any(m.split('.')[0] in ('train', 'latents', 'shards') for m in sys.modules)\n"
        "numpy.save('pictures.npy', numpy.stack(images))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: np.ndarray = np.load(folder / "pictures.npy")
    return found


@torch.no_grad()
def sampled_by_hand(objective: Any, run: RunPaths, text: Any, prompt: str, steps: int = 3, scale: float = 4.0) -> Any:
    """DDIM (Song et al. 2020, eq. 12 with eta 0)."""
    batch = objective.conditioning.prompts(["", prompt], text)
    rows, _ = objective.conditioning.condition(batch)
    mask = torch.tensor([[1 if i < n else 0 for i in range(LENGTH)] for n in batch["text_length"].tolist()])
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]:
        out = objective.unet(x.repeat(2, 1, 1, 1), t, rows, encoder_attention_mask=mask).sample
        empty, full = out.chunk(2)
        noise = empty + scale * (full - empty)
        now, then = alpha_bar[t], alpha_bar[max(t - 1000 // steps, 0)]
        x0 = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = then**0.5 * x0 + (1 - then) ** 0.5 * noise
    vae = load_vae(str(Path(run.autoencoder) / "model"))
    return (vae.model.decode(x / objective.scale).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def evaluated(run: RunPaths, folder: Path) -> None:
    """`carrara sample` and evaluation's generator, from the checkpoint and from the exported folder alone."""
    request = validate(
        SampleConfig, {"requests": [Request(prompt=PROMPTS[2], negative="blue", seed=7)], "steps": 2}, "s"
    )
    drive(SampleStage(request, run, str(folder / "out")))
    file = json.loads((folder / "out" / "samples.json").read_text())["images"][0]["file"]
    assert np.asarray(Image.open(folder / "out" / file)).shape == (32, 32, 3)
    samples = [Sample("a", 0, PROMPTS[0]), Sample("b", 0, PROMPTS[2])]
    found = []
    for model in (checkpoints.find(run), checkpoints.of_pipeline(run.model)):
        generator = ImageGenerator(checkpoints.build_pipeline(run, model), "ddim", 2, 3.0, guidance_interval=(0.0, 0.9))
        found.append(generator(samples)[0].astype(int))
        one = np.concatenate([generator([s])[0] for s in samples]).astype(int)
        assert np.abs(one - found[-1]).max() <= 1, "a picture depends on its prompt alone"
    assert np.abs(found[0] - found[1]).max() <= 1
    given = validate(
        SampleConfig, {"requests": [Request(prompt="a")], "steps": 2, "image": str(folder / "out" / file)}, "s"
    )
    with pytest.raises(ConfigError, match="generates from prompts alone; give no --image"):
        drive(SampleStage(given, run, str(folder / "other")))


# ---- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"unet": {**tiny.UNET, "addition_embed_type": "text"}}, "addition_embed_type text cannot go with latents"),
        ({"inpaint": {}}, r"train\.inpaint needs a CLIP"),
        ({"unet": {**tiny.UNET, "cross_attention_dim": 32}}, "the text encoder of the latents has 24 values"),
        ({"unet": {**tiny.UNET, "encoder_hid_dim": 32, "cross_attention_dim": 16}}, r"encoder_hid_dim is 32, but"),
    ],
)
def test_what_needs_a_clip_is_refused(runs: dict[str, RunPaths], values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        objective_of(runs["tokens"], **values)


def test_weights_that_cannot_be_used_are_one_sentence(images: Path, tmp_path: Path) -> None:
    good = find_sequence(str(images / "t5"))
    assert find_sequence(str(images / "t5")).digest == good.digest
    folder = tmp_path / "t5"
    shutil.copytree(images / "t5", folder)
    assert find_sequence(str(folder)).digest == good.digest, "wherever it lies"
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"</s>"', '"</S>"'))
    assert find_sequence(str(folder)).digest != good.digest, "another tokenizer makes other latents"
    # In the layout of a pipeline it is the same one.
    whole = tmp_path / "pipeline"
    shutil.copytree(images / "t5", whole / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(images / "t5", whole / "tokenizer", ignore=shutil.ignore_patterns("model*", "config.json"))
    assert find_sequence(str(whole)).digest == good.digest
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for ref, said in (
        (str(folder), r"has no model\.safetensors.*a pickle may run anything"),
        (str(tmp_path), "has no config.json"),
        ("/nowhere/at/all", "neither a folder here nor a hub name"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            find_sequence(ref)
        assert "\n" not in str(error.value)
    (whole / "text_encoder" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="cannot be opened by transformers"):
        SequenceEncoder(find_sequence(str(whole)), 16)


def test_settings_that_do_not_go_together(runs: dict[str, RunPaths]) -> None:
    text = {"kind": "transformers", "pretrained": "x"}
    for values in ({"text_layer": "last"}, {"text_pad": "end"}, {"text": "embeddings", "text_pooled": True}):
        with pytest.raises(ConfigError, match="is a CLIP's; with text_encoder"):
            validate(LatentsConfig, {"text_encoder": text, **values}, "x.yaml")
    with pytest.raises(ConfigError, match="text_encoder"):
        validate(LatentsConfig, {"text_encoder": {"kind": "llama"}}, "x.yaml")
    assert LatentsConfig(text_encoder=text).settings()["text_encoder"] == {"kind": "transformers", "max_length": 256}
    # Latents of another length are of another kind.
    facts = Dataset.open(runs["tokens"].latents).manifest
    shorter = {**facts, "text": {**facts["text"], "context_length": 64}}
    assert other_encoder(facts, shorter) == "max_length of text_encoder"
