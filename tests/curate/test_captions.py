"""Captions: a tiny model with random weights beside a plain loop, and a real HTTP server that fails, drips and lies."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from curate.captioners import Transformers
from curate.captioning import CaptionStage, caption_stages, loops, tidy
from curate.config import CurateConfig
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.curate.test_stage import score, write_images

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "dog",
    "cat",
    "on",
    "the",
    "left",
    "right",
    "of",
    "small",
    "large",
    "in",
    ".",
    ",",
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    """A folder with a tiny random BLIP captioner and its processor."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    torch.manual_seed(3)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **small,
            "vocab_size": 64,
            "encoder_hidden_size": 16,
            "bos_token_id": 5,
            "pad_token_id": 0,
            "sep_token_id": 3,
            "eos_token_id": 3,
            "initializer_range": 1.0,
            "projection_dim": 16,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16, "initializer_range": 1.0},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def stage_of(run: RunPaths, **settings: Any) -> CaptionStage:
    (stage,) = caption_stages(CurateConfig.model_validate({"captions": {"long": settings}}), run)
    return stage


def rows(stage: CaptionStage, index: int = 0) -> list[dict[str, Any]]:
    return Dataset.open(stage.root).sidecar(index).to_pylist()


def test_a_local_model_gives_what_a_plain_loop_over_it_gives(blip: Path, tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    run = RunPaths(str(tmp_path / "run"))
    dataset = write_images(run, broken=(1, 0))
    stage = stage_of(run, model=str(blip), prompts=["a dog on"], max_new_tokens=6, batch_size=1)
    manifest = score(stage)
    processor, model = BlipProcessor.from_pretrained(blip), BlipForConditionalGeneration.from_pretrained(blip).eval()
    captioner = Transformers(stage.config, blip)
    texts = set()
    for position in range(3):
        shard, table = ImageShard(dataset, position), rows(stage, position)
        for i, row in enumerate(shard.rows.tolist()):
            if (position, row) == (1, 0):
                assert table[row]["fate"] == "not_decoded"
                continue
            picture = decode_rgb(shard.image_bytes(i))
            inputs = processor(images=[picture], text=["a dog on"], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            text = processor.batch_decode(out, skip_special_tokens=True)[0]
            (answer,) = captioner([(picture, "a dog on")])
            assert answer.text
            assert text.removeprefix("a dog on").strip() == answer.text.removeprefix("a dog on").strip()
            assert table[row]["captions"] == ([tidy(answer.text)] if table[row]["fate"] == "captioned" else [])
            texts.add(answer.text)
        assert table[4]["fate"] is None
        assert table[4]["captions"] is None
    assert len(texts) > 1
    assert sum(manifest["fates"].values()) == 24


# ---- a server ----------------------------------------------------------------------------------------------

Reply = Callable[[int, dict[str, Any]], "tuple[int, bytes, dict[str, str]]"]


def completion(text: Any, tokens: Any = 10) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": {"total_tokens": tokens}}).encode()


class Serving:
    """An HTTP server on loopback whose answers a test decides; it remembers what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(body)
                    outer.headers.append(dict(self.headers))
                    number = len(outer.asked) - 1
                status, data, headers = reply(number, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Serving]]:
    started: list[Serving] = []

    def start(reply: Reply) -> Serving:
        started.append(Serving(reply))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


def picture_of(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def endpoint(server: Serving, **more: Any) -> dict[str, Any]:
    return {"endpoint": {"url": server.url, "model": "m", "back_off_s": 0.01, "concurrency": 3, **more}}


def test_every_image_is_sent_with_its_prompt_and_gets_its_own_answer(serve, tmp_path, monkeypatch) -> None:
    def reply(number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        image = picture_of(body)
        return 200, completion(f"{image.width} by {image.height}, {prompt_of(body)}"), {}

    server = serve(reply)
    run = RunPaths(str(tmp_path / "run"))
    dataset = write_images(run)
    monkeypatch.setenv("CAPTION_KEY", "secret")
    prompts = ["long: {caption}", "short"]
    stage = stage_of(run, prompts=prompts, max_side=44, **endpoint(server, api_key_variable="CAPTION_KEY"))
    score(stage)
    shard = ImageShard(dataset, 0)
    for i, row in enumerate(shard.rows.tolist()):
        height, width = decode_rgb(shard.image_bytes(i)).shape[:2]
        scale = 44 / max(height, width)
        size = f"{round(width * scale)} by {round(height * scale)}"
        texts = [f"{size}, long: {shard.captions[i]}", f"{size}, short"]
        assert rows(stage)[row]["captions"] == [tidy(t) for t in texts if not loops(t)]
        assert rows(stage)[row]["tokens"] == 20
    assert len(server.asked) == 2 * 24
    assert {h["Authorization"] for h in server.headers} == {"Bearer secret"}
    assert not any("secret" in p.read_text(errors="replace") for p in Path(stage.root).rglob("*") if p.is_file())


def test_failures_that_may_pass_are_tried_again_and_others_are_the_images(serve, tmp_path) -> None:
    tries: dict[str, int] = {}

    def reply(number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        width = picture_of(body).width  # 40 + row
        row, attempt = width - 40, tries.setdefault(str(width), 0)
        tries[str(width)] += 1
        if row == 0 and attempt < 2:
            return 503, b"busy", {"Retry-After": "0"}
        if row == 1 and attempt == 0:
            return 429, b"slow down", {"Retry-After": "not a number"}
        if row == 2:
            return 400, b"no such image", {}
        if row == 3:
            return 200, b"<html>" + b"x" * 100, {}
        if row == 5:
            return 200, completion({"not": "text"}), {}
        if row == 6:
            return 200, completion("I'm sorry, but I can't help with that."), {}
        if row == 7:
            return 200, completion("the cat and " * 9), {}
        return 200, completion(f'"picture\x00 of\n{width}"', tokens="many" if row == 8 else 5), {}

    server = serve(reply)
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, shards=1)
    stage = stage_of(run, **endpoint(server))
    manifest = score(stage)
    fates = {i: row["fate"] for i, row in enumerate(rows(stage))}
    assert fates == {
        0: "captioned",
        1: "captioned",
        2: "failed",
        3: "failed",
        4: None,
        5: "failed",
        6: "refused",
        7: "repeated",
        8: "failed",
    }
    assert rows(stage)[0]["captions"] == ["picture of 40"]
    assert tries["40"] == 3
    assert tries["41"] == 2
    assert tries["42"] == 1
    assert manifest["fates"] == {"captioned": 2, "refused": 1, "repeated": 1, "failed": 4}


def test_an_answer_without_an_end_is_cut_off(serve, tmp_path) -> None:
    server = serve(lambda number, body: (200, completion("word " * 400_000), {}))
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, shards=1, rows=2)
    stage = stage_of(run, **endpoint(server))
    assert score(stage)["fates"] == {"failed": 2}


def test_a_server_that_is_down_is_no_images_fate(serve, tmp_path) -> None:
    server = serve(lambda number, body: (500, b"", {}))
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, shards=1)
    stage = stage_of(run, **endpoint(server, attempts=2))
    with pytest.raises(StageError, match="did not answer in 2 attempts"):
        score(stage)
    assert not list(Path(stage.root).glob("0*"))
    refused = serve(lambda number, body: (401, b"who are you?", {}))
    with pytest.raises(StageError, match="answers 401: who are you"):
        score(stage_of(run, **endpoint(refused)))


def test_a_redirect_is_not_followed(serve, tmp_path) -> None:
    elsewhere = serve(lambda number, body: (200, completion("from elsewhere"), {}))
    server = serve(lambda number, body: (307, b"", {"Location": elsewhere.url + "/chat/completions"}))
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, shards=1)
    assert score(stage_of(run, **endpoint(server)))["fates"] == {"failed": 8}
    assert not elsewhere.asked


def test_the_budget_ends_the_asking(serve, tmp_path) -> None:
    server = serve(lambda number, body: (200, completion(f"caption {number}", tokens=100), {}))
    run = RunPaths(str(tmp_path / "run"))
    write_images(run)
    stage = stage_of(run, prompts=["a", "b", "c"], **endpoint(server, max_tokens_total=2400, concurrency=1))
    manifest = score(stage)
    # 24 images in 3 shards: 800 tokens a shard, asked four requests at a time.
    assert len(server.asked) == 24
    assert manifest["tokens"] == 2400
    assert manifest["fates"]["over_budget"] > 0


def test_what_a_shard_says_of_most_images_is_no_caption(serve, tmp_path) -> None:
    server = serve(lambda number, body: (200, completion("an image"), {}))
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, shards=1)
    assert score(stage_of(run, **endpoint(server)))["fates"] == {"repeated": 8}


def test_a_missing_key_is_one_sentence_before_anything_is_sent(serve, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    server = serve(lambda number, body: (200, completion("x"), {}))
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, shards=1)
    with pytest.raises(ConfigError, match="CAPTION_KEY"):
        score(stage_of(run, **endpoint(server, api_key_variable="CAPTION_KEY")))
    assert not server.asked


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "give either model or endpoint"),
        ({"model": "x", "endpoint": {"url": "http://h/v1", "model": "m"}}, "give either model or endpoint"),
        ({"model": "x", "prompts": ["{url}"]}, "other than {caption}"),
        ({"model": "x", "refusals": ["("]}, "no regular expression"),
        ({"endpoint": {"url": "file:///etc/passwd", "model": "m"}}, "pattern"),
    ],
)
def test_settings_that_cannot_be_meant(settings, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        CurateConfig.model_validate({"captions": {"long": settings}})


def test_loops_and_tidying() -> None:
    assert loops("very very very very good")
    assert loops("a dog and a dog and a dog and a dog and")
    assert not loops("a big big dog in a big big house")
    assert tidy(' "A\tdog\u202e."\n') == "A dog ."
    assert tidy("it's 'so'") == "it's 'so'"
    assert len(tidy("x" * 100_000)) == 8192
    assert np.array(tidy("")) == ""
