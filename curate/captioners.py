"""What writes captions: a transformers image-text-to-text model in this process, or an OpenAI-compatible server.

    answers = captioner([(image, prompt), ...])     # image: uint8 [H,W,3]; an Answer each, in order

An answer of a server is text from outside: its size is bounded, and it is taken for nothing but a caption.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image

from curate.config import CaptionConfig, Endpoint
from shards.settings import ConfigError, StageError

MAX_ANSWER = 1 << 20  # bytes of a server's answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: what was said; tokens: as the model counted them, prompt included; error: why there is no text."""

    text: str = ""
    tokens: int = 0
    error: str = ""


class Transformers:
    """A local model; greedy at temperature 0, else sampled with a generator that is seeded by the caller."""

    def __init__(self, config: CaptionConfig, folder: Path) -> None:
        import torch
        import transformers

        from latents.encoders import DTYPES, pick_device

        self.config, self.torch, self.device = config, torch, pick_device(config.device)
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=DTYPES[config.precision]
            )
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise ConfigError(f"the captioner '{config.model}': {' '.join(str(e).split())[:300]}") from None
        self.model = model.eval().to(self.device)
        if getattr(self.processor, "tokenizer", None) is not None:
            self.processor.tokenizer.padding_side = "left"  # or the shorter prompts of a batch continue their padding

    def __call__(self, requests: Sequence[tuple[np.ndarray, str]], seed: int = 0) -> list[Answer]:
        """One batch."""
        images, prompts = [i for i, _ in requests], [self._template(p) for _, p in requests]
        inputs = self.processor(images=images, text=prompts, return_tensors="pt", padding=True).to(self.device)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        sampled = {"do_sample": True, "temperature": self.config.temperature} if self.config.temperature else {}
        self.torch.manual_seed(seed)
        with self.torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=self.config.max_new_tokens, **(sampled or {"do_sample": False})
            )
        prompt = inputs["input_ids"]
        if out.shape[1] >= prompt.shape[1] and bool((out[:, : prompt.shape[1]] == prompt).all()):
            out = out[:, prompt.shape[1] :]  # decoders repeat what they were told; encoder-decoders do not
        texts = self.processor.batch_decode(out, skip_special_tokens=True)
        return [Answer(t, int(out.shape[1] + prompt.shape[1])) for t in texts]

    def _template(self, prompt: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            return prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return str(
            self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )


class Server:
    """An OpenAI-compatible server. Requests that may succeed later are tried again; a server that does not answer at
    all raises StageError, so that its trouble is no image's fate."""

    def __init__(self, config: CaptionConfig, endpoint: Endpoint) -> None:
        self.config, self.endpoint = config, endpoint
        self.headers = {"Content-Type": "application/json"}
        if endpoint.api_key_variable:
            key = os.environ.get(endpoint.api_key_variable)
            if not key:
                raise ConfigError(f"the environment variable {endpoint.api_key_variable} of the captioner is not set")
            self.headers["Authorization"] = f"Bearer {key}"

    def __call__(self, requests: Sequence[tuple[np.ndarray, str]], seed: int = 0) -> list[Answer]:
        """All of them, so many at a time as the configuration says."""
        return asyncio.run(self._all(requests, seed))

    async def _all(self, requests: Sequence[tuple[np.ndarray, str]], seed: int) -> list[Answer]:
        gate = asyncio.Semaphore(self.endpoint.concurrency)
        limit = aiohttp.ClientTimeout(total=self.endpoint.timeout_s)
        async with aiohttp.ClientSession(timeout=limit, headers=self.headers) as session:

            async def one(index: int, image: np.ndarray, prompt: str) -> Answer:
                async with gate:
                    return await self._ask(session, image, prompt, seed + index)

            return list(await asyncio.gather(*(one(n, i, p) for n, (i, p) in enumerate(requests))))

    async def _ask(self, session: aiohttp.ClientSession, image: np.ndarray, prompt: str, seed: int) -> Answer:
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, "JPEG", quality=92)
        image_url = "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": prompt}]
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "seed": seed,
        }
        why = ""
        for attempt in range(self.endpoint.attempts):
            wait = self.endpoint.back_off_s * 2.0**attempt
            try:
                url = self.endpoint.url.rstrip("/") + "/chat/completions"
                async with session.post(url, json=body, allow_redirects=False) as response:
                    data = await response.content.read(MAX_ANSWER + 1)
                    while len(data) <= MAX_ANSWER and (more := await response.content.read(MAX_ANSWER + 1 - len(data))):
                        data += more
                    if response.status == 200:
                        return _answer(data)
                    if response.status in (401, 403, 404):
                        raise StageError(f"{url} answers {response.status}: {_said(data)}; look at curate.captions")
                    if response.status not in (408, 409, 425, 429) and response.status < 500:
                        return Answer(error=f"http_{response.status}")
                    why = f"HTTP {response.status}"
                    wait = max(wait, min(_seconds(response.headers.get("Retry-After")), 60.0))
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                why = f"{type(e).__name__}: {e}"[:200]
            if attempt + 1 < self.endpoint.attempts:
                await asyncio.sleep(wait)
        raise StageError(f"{self.endpoint.url} did not answer in {self.endpoint.attempts} attempts ({why})")


def _answer(data: bytes) -> Answer:
    """The text of a chat completion; an Answer with an error where it is none."""
    if len(data) > MAX_ANSWER:
        return Answer(error="answer_too_large")
    try:
        said = json.loads(data)
        text = said["choices"][0]["message"]["content"]
        usage = said.get("usage") or {}
        tokens = usage.get("total_tokens", 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Answer(error="answer_malformed")
    if not isinstance(text, str) or type(tokens) is not int or not 0 <= tokens < 1 << 40:
        return Answer(error="answer_malformed")
    return Answer(text, tokens)


def _said(data: bytes) -> str:
    return " ".join(data[:200].decode("utf-8", "replace").split())


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
