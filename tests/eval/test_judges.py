"""VQAScore and Soft-TIFA on a tiny model with random weights, against a plain loop over the same model; preference
scores against their formulas; suites out and scores in; once end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from eval import networks, suites
from eval.config import EvalConfig, JudgeConfig, PreferenceConfig
from eval.scoring import vqa
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.eval.conftest import evaluate, refs

WORDS = [
    "does",
    "this",
    "figure",
    "show",
    "please",
    "answer",
    "yes",
    "no",
    "Yes",
    "in",
    "one",
    "word",
    "how",
    "many",
    "is",
    "it",
    "a",
    "red",
    "blue",
    "circle",
    "star",
    "the",
    "USER",
    "four",
]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA of a few thousand weights, with its processor and chat template."""
    folder = tmp_path_factory.mktemp("vlm")
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,:\"'")
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*special, *WORDS, *letters]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    template = (
        "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
        "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=fast,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=vocab["<image>"],
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def plain(judge: vqa.Judge, image: np.ndarray, question: str, answer: str) -> float:
    """log P(answer), a token at a time, a question at a time."""
    text = judge._text(question)
    given = judge.processor(text=[text], images=[[Image.fromarray(image)]], return_tensors="pt")
    ids, total = given["input_ids"], 0.0
    for token in judge.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        out = judge.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given["pixel_values"]
        ).logits[0, -1]
        total += float(torch.log_softmax(out.float(), -1)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return total


def test_batched_answers_are_those_of_a_plain_loop(vlm: str) -> None:
    judge = vqa.Judge(JudgeConfig(model=vlm, precision="float32", batch_size=3), "cpu")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    rows = [
        {
            "caption": "a red circle",
            "questions": json.dumps([["how many circle is it ?", "four"], ["is it red ?", "Yes"]]),
        },
        {"caption": "a blue star in the red circle", "questions": None},
        {"caption": "star", "questions": json.dumps([["is it a star ?", "a blue star"]])},  # an answer of three tokens
    ]
    found = judge(judge.prepare(pixels, rows))
    for i, row in enumerate(rows):
        question = judge.config.question.replace("{prompt}", str(row["caption"]))
        assert found["vqa_score"][i, 0] == pytest.approx(np.exp(plain(judge, pixels[i], question, "Yes")), rel=1e-4)
    first = [
        plain(judge, pixels[0], q + vqa.ONE_WORD, a)
        for q, a in (("how many circle is it ?", "four"), ("is it red ?", "Yes"))
    ]
    assert found["atoms"][0, :2] == pytest.approx(np.exp(first), rel=1e-4)
    assert found["soft_tifa_am"][0, 0] == pytest.approx(np.mean(np.exp(first)), rel=1e-4)
    assert found["soft_tifa_gm"][0, 0] == pytest.approx(np.exp(np.mean(first)), rel=1e-4)
    assert np.isnan(found["soft_tifa_am"][1, 0])
    third = plain(judge, pixels[2], "is it a star ?" + vqa.ONE_WORD, "a blue star")
    assert found["atoms"][2, 0] == pytest.approx(np.exp(third), rel=1e-4)
    assert np.isnan(found["atoms"][2, 1:]).all()


def test_a_qwen_gives_the_chance_of_the_first_generated_token(tmp_path: Path) -> None:
    """P(Yes) as t2v_metrics takes it of Qwen2.5-VL, one image at a time: the scores of generate() for one new token.
    Ours come in batches of questions of unlike lengths, whose positions are of three axes."""
    special = ["<pad>", "<unk>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocab = {w: i for i, w in enumerate([*special, *WORDS, "on", "left"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=special[2:]
    )
    template = (
        "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|>"
        "<|image_pad|><|vision_end|>{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=4 * 28**2, max_pixels=16 * 28**2),
        video_processor=Qwen2VLVideoProcessor(),
        tokenizer=fast,
        chat_template=template,
    )
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(vocab)}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
            **{f"{n}_token_id": vocab[f"<|{n}_pad|>"] for n in ("image", "video")},
            **{f"vision_{n}_token_id": vocab[f"<|vision_{n}|>"] for n in ("start", "end")},
        )
    )
    for p in model.parameters():
        p.data *= 4  # so that answers differ
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    judge = vqa.Judge(JudgeConfig(model=str(tmp_path), precision="float32", batch_size=3), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8)
    captions = ["a red circle", "a blue star on the left", "red", "a circle on a star"]
    theirs = []
    for image, caption in zip(pixels, captions, strict=True):
        asked = judge._text(f'Does this figure show "{caption}"? Please answer yes or no.')
        given = judge.processor(text=[asked], images=[[Image.fromarray(image)]], return_tensors="pt")
        out = judge.model.generate(
            **given, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        theirs.append(float(out.scores[0].softmax(-1)[0, vocab["Yes"]]))
    ours = judge(judge.prepare(pixels, [{"caption": c} for c in captions]))["vqa_score"][:, 0]
    assert np.ptp(theirs) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_questions_that_memory_does_not_hold_are_asked_in_halves(vlm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = vqa.Judge(JudgeConfig(model=vlm, precision="float32", batch_size=6), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    prepared = judge.prepare(pixels, [{"caption": f"a {w} circle"} for w in ("red", "blue", "the", "a", "one", "four")])
    whole, sizes, ask = judge(prepared)["vqa_score"], [], judge.log_chances

    def little(images: list[Any], asked: list[tuple[int, str, str]]) -> list[float]:
        sizes.append(len(asked))
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(images, asked)

    monkeypatch.setattr(judge, "log_chances", little)
    np.testing.assert_allclose(judge(prepared)["vqa_score"], whole, rtol=1e-4)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(judge, "log_chances", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("one alone")))
    with pytest.raises(torch.OutOfMemoryError):
        judge(prepared)


def test_a_template_of_the_tokenizer_is_used_and_begins_once(vlm: str) -> None:
    """A tokenizer's template, which writes the first token, whose tokenizer adds one as well, and tokenizes by itself
    where it is not told otherwise: the ids are those of that tokenizer's own rendering."""
    from tokenizers.processors import TemplateProcessing

    judge = vqa.Judge(JudgeConfig(model=vlm, precision="float32"), "cpu")
    template, judge.processor.chat_template = judge.processor.chat_template, None
    judge.tokenizer.chat_template = "<s>" + template
    judge.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert judge.tokenizer("star")["input_ids"][:1] == [1]
    text = judge._text("is it red ?")
    assert text.startswith("<s>USER <image> is it red ?")
    seen: list[torch.Tensor] = []
    forward = judge.model.forward
    judge.model.forward = lambda **given: seen.append(given["input_ids"]) or forward(**given)
    judge.log_chances([Image.fromarray(np.zeros((32, 32, 3), np.uint8))], [(0, "is it red ?", "Yes")])
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red ?"}]}]
    plain_ids = judge.tokenizer.apply_chat_template(message, tokenize=True)["input_ids"]
    image = judge.tokenizer.convert_tokens_to_ids("<image>")
    assert [i for i in seen[0][0].tolist()[:-1] if i != image] == [i for i in plain_ids if i != image]
    assert seen[0][0].tolist().count(1) == 1


SUITE = [
    {
        "prompt": "a red circle",
        "id": "one",
        "vqa_list": [["is it red ?", "Yes"], ["how many circle ?", "four"]],
        "skills": ["attribute", "count"],
        "atom_count": 2,
    },
    {
        "prompt": "a blue star",
        "id": "two",
        "vqa_list": [["is it a star ?", "Yes"]],
        "skills": ["object"],
        "atom_count": 1,
    },
    {"prompt": "a/red_star\0 ../x", "id": "../three", "tags": ["odd"], "include": [1]},
]


@pytest.fixture(scope="module")
def judged(run: RunPaths, vlm: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import shutil

    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(run.run, folder / "run")
    (folder / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SUITE))
    config = EvalConfig(
        prompts_file=str(folder / "suite.jsonl"),
        num_prompts=10,
        replicates=4,
        steps=1,
        batch_size=4,
        shard_size=5,
        jackknife_groups=4,
        judge=JudgeConfig(model=vlm, precision="float32", batch_size=4),
    )
    return evaluate(RunPaths(str(folder / "run")), config), config


def test_a_suite_is_judged_end_to_end(judged: Any) -> None:
    found, config = judged
    metrics = json.loads(Path(found.folder, "metrics.json").read_bytes())
    assert metrics["counts"]["images"] == 12
    assert metrics["metrics"]["vqa_score"]["n"] == 12
    assert metrics["metrics"]["soft_tifa_am"]["n"] == 8  # the third prompt asks nothing
    assert metrics["protocol"]["judge"] == networks.find("judge", config.judge).digest
    assert set(metrics["by_tag"]) == {"attribute", "count", "object", "1 atoms", "2 atoms", "odd"}
    assert metrics["by_tag"]["count"]["soft_tifa_am"]["n"] == 4
    assert "low" in metrics["metrics"]["vqa_score"]
    assert "low" not in metrics["by_tag"]["2 atoms"]["vqa_score"]  # one prompt has no error
    page = (Path(found.run.reports) / f"{found.model.name}.html").read_text()
    assert "VQAScore" in page
    assert "2 atoms" in page
    # Another judge is another protocol, of the same images.
    other = found.config.model_copy(update={"judge": JudgeConfig(model=config.judge.model, yes="yes")})
    from eval.evaluation import Evaluation

    assert Evaluation(other, found.run, *refs(found.run)).protocol["id"] != found.protocol["id"]


def test_images_go_out_in_the_layouts_of_benchmarks(judged: Any, tmp_path: Path) -> None:
    found, _ = judged
    images = found.generate.root
    assert suites.export(images, "geneval", str(tmp_path / "g")) == 12
    assert suites.export(images, "geneval", str(tmp_path / "g")) == 12  # again: the same, nothing is overwritten
    assert json.loads((tmp_path / "g/00002/metadata.jsonl").read_text()) == SUITE[2]
    assert sorted(p.name for p in (tmp_path / "g/00001/samples").iterdir()) == [f"{i:05d}.png" for i in range(4)]
    suites.export(images, "dpg", str(tmp_path / "d"))
    assert sorted(p.name for p in (tmp_path / "d").glob("*.png")) == ["one.png", "three.png", "two.png"]
    assert Image.open(tmp_path / "d/one.png").size == (64, 64)
    suites.export(images, "compbench", str(tmp_path / "c"))
    names = sorted(p.name for p in (tmp_path / "c/samples").iterdir())
    assert names[0].split("_")[0] == "a blue star"
    assert all(p.resolve().is_relative_to(tmp_path) for p in tmp_path.rglob("*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        suites.export(images, "files", str(tmp_path / "mine"))
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "index.jsonl").write_text('{"chapter": 1}\n')
    with pytest.raises(ConfigError, match="is no index of an export"):
        suites.export(images, "files", str(tmp_path / "book"))
    assert [p.name for p in (tmp_path / "book").iterdir()] == ["index.jsonl"]
    other = tmp_path / "c" / "index.jsonl"
    other.write_text(other.read_text().replace('"a blue star"', '"of another result"'))
    with pytest.raises(ConfigError, match="holds the images of another result"):
        suites.export(images, "compbench", str(tmp_path / "c"))
    assert "of another result" in other.read_text()
    with pytest.raises(ConfigError, match="one of files, geneval"):
        suites.export(images, "x", str(tmp_path / "x"))


def test_scores_made_elsewhere_are_a_metric_like_any_other(judged: Any, tmp_path: Path) -> None:
    found, _ = judged
    images = found.generate.root
    suites.export(images, "geneval", str(tmp_path / "g"))
    keys = [r["key"] for s in Dataset.open(images).shards for r in Dataset.open(images).sidecar(s.index).to_pylist()]
    (tmp_path / "hps.jsonl").write_text(
        "".join(json.dumps({"id": k, "score": i / 10}) + "\n" for i, k in enumerate(keys))
    )
    index = [json.loads(x) for x in (tmp_path / "g/index.jsonl").read_text().splitlines()]
    lines = [
        {"filename": f"/elsewhere/out/{e['file']}", "tag": "t", "correct": n % 2 == 0} for n, e in enumerate(index)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))  # as GenEval writes them
    assert found.is_current()
    assert suites.bring_in(images, "taste", str(tmp_path / "hps.jsonl")) == 12
    assert suites.bring_in(images, "geneval", str(tmp_path / "results.jsonl"), str(tmp_path / "g/index.jsonl")) == 12
    assert not found.is_current()
    found.conclude()
    metrics = json.loads(Path(found.folder, "metrics.json").read_bytes())
    assert metrics["metrics"]["taste"]["value"] == pytest.approx(np.mean(np.arange(12) / 10))
    assert metrics["metrics"]["geneval"]["value"] == 0.5
    assert {"low", "high", "se"} <= set(metrics["metrics"]["geneval"])
    assert metrics["metrics"]["geneval"]["unit"] == "share"  # yes or no for every image
    assert "unit" not in metrics["metrics"]["taste"]
    assert "geneval" in metrics["by_tag"]["odd"]
    assert {"taste", "geneval"} <= set(metrics["jackknife"])
    assert "Geneval" in (Path(found.run.reports) / f"{found.model.name}.html").read_text()
    with pytest.raises(ConfigError, match=r"hps\.jsonl is no index\.jsonl"):
        suites.bring_in(images, "x", str(tmp_path / "results.jsonl"), str(tmp_path / "hps.jsonl"))
    for content, name, says in (
        ('{"id": "nobody", "score": 1}', "x", "there is no image 'nobody'"),
        (json.dumps({"id": keys[0]})[:-1] + ', "score": NaN}', "x", "finite number"),
        (json.dumps({"id": keys[0], "score": 10**400}), "x", "finite number"),
        (json.dumps({"id": keys[0], "score": -1e200}), "x", "finite number"),
        ("[" * 100_000, "x", "is no JSON"),
        ((json.dumps({"id": keys[0]})[:-1] + ', "score": 1}\n') * 2, "x", "has a score already"),
        ('{"score": 1}', "x", "names no image"),
        ("", "x", "has no scores"),
        (json.dumps({"id": keys[0]})[:-1] + ', "score": 1}', "taste", "has other scores named taste"),
        (json.dumps({"id": keys[0]})[:-1] + ', "score": 1}', "clip_score", "is no free name"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=says):
            suites.bring_in(images, name, str(tmp_path / "bad.jsonl"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.jsonl is no index\.jsonl"):
        suites.bring_in(images, "x", str(tmp_path / "results.jsonl"), str(tmp_path / "deep.jsonl"))
    file = Path(images, "scores", "taste.json")
    for damaged in (file.read_bytes()[:-9], b"[]", b'{"source": "x", "scores": [["a", 0, "b"]]}', b"[" * 100_000):
        file.write_bytes(damaged)
        with pytest.raises(StageError, match=r"taste\.json is damaged; delete it"):
            found.is_current()
    file.unlink()


@pytest.mark.parametrize(
    ("scores", "value", "says"),
    [
        ({"clip_score": "mine"}, 1.0, "calls a score 'clip_score', which is no free name"),
        ({"a<b>": "mine"}, 1.0, "no free name"),
        ({"mine": "mine"}, 10**400, "a mine that is no number"),
        ({"mine": "mine"}, "much", "a mine that is no number"),
        ({"mine": "mine"}, -1e300, "a mine that is no number"),
    ],
    ids=["a metric's name", "no name", "too large", "a text", "too small"],
)
def test_a_scorer_that_cannot_be_used_is_one_sentence(
    scores: dict[str, str], value: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tmp_path.name
    source = f"SCORES = {scores!r}\ndef score(images, captions): return {{n: [{value!r}] for n in SCORES}}\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def ask() -> None:
        network = networks.load(networks.find("scorer", name))
        network(network.prepare(np.zeros((1, 8, 8, 3), np.uint8), [{"caption": "a"}]))

    with pytest.raises(ConfigError, match=says):
        ask()


def test_preference_scores_are_their_formulas(run: RunPaths, tmp_path: Path) -> None:
    from eval.scoring.preference import Preference

    torch.manual_seed(1)
    layers = {
        f"layers.{n}.{k}": torch.randn(s)
        for n, shape in ((0, (8, 16)), (2, (1, 8)))
        for k, s in (("weight", shape), ("bias", shape[:1]))
    }
    torch.save(layers, tmp_path / "aesthetic.pth")
    config = PreferenceConfig(aesthetic=str(tmp_path / "aesthetic.pth"), aesthetic_clip=refs(run)[1])
    scorer = Preference(config, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = scorer(scorer.prepare(pixels, [{"caption": "x"}] * 2))["aesthetic"]
    x = torch.from_numpy(scorer.scorers["aesthetic"].clip(scorer.scorers["aesthetic"].clip.prepare(pixels))["images"])
    expected = (x @ layers["layers.0.weight"].T + layers["layers.0.bias"]) @ layers["layers.2.weight"].T + layers[
        "layers.2.bias"
    ]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert networks.find("preference", config).digest
    with pytest.raises(ConfigError, match="names no weights"):
        networks.find("preference", PreferenceConfig())
    with pytest.raises(ConfigError, match=r"eval\.preference\.hps: there is no file"):
        networks.find("preference", PreferenceConfig(hps="/nowhere.pt"))
