"""The caption stage: one image shard in, one shard of new captions out.

    <run>/captions/<name>/   NNNNN.parquet: key, `captions` (list of text, one a prompt), `fate`, `tokens`

`fate` says what became of each image: captioned, refused, repeated, empty, failed, over_budget, not_decoded. The raw
caption stays in the image shard. A server that does not answer is no image's fate: the shard is tried again.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate import shardwork
from curate.captioners import Answer, Server, Transformers
from curate.config import CaptionConfig, CurateConfig
from curate.scorers import decoded, model_folder, tensors_digest
from shards import images, storage
from shards.columns import pack_columns
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths
from shards.stage import Made, Task

VERSION = 1
FATES = ("captioned", "refused", "repeated", "empty", "failed", "over_budget", "not_decoded")
LOOP = 4  # a phrase of some words that comes so often in a row is a model that repeats itself
SAME = 0.2  # an answer that more of a shard's images have than this share says nothing of any of them
MAX_CHARACTERS = 8192


def caption_stages(config: CurateConfig, run: RunPaths, seed: int = 0) -> list[CaptionStage]:
    """A stage for each set of captions."""
    return [CaptionStage(c, name, run, seed) for name, c in config.captions.items()]


@dataclasses.dataclass(frozen=True)
class CaptionStage:
    """Stage over the run's image shards for one set of captions."""

    config: CaptionConfig
    captions: str
    run: RunPaths
    seed: int = 0

    unit = "images"
    data = ".safetensors"

    @property
    def name(self) -> str:
        """`caption-long`."""
        return f"caption-{self.captions}"

    @property
    def root(self) -> str:
        """`<run>/captions/long`."""
        return storage.join(self.run.run, "captions", self.captions)

    def made_with(self) -> Fingerprint:
        """Settings, and the weights where the model is a local one."""
        settings: dict[str, Any] = self.config.settings()
        if self.config.temperature:
            settings["seed"] = self.seed
        weights = {"model": tensors_digest(model_folder(self.config.model, "captioner"))} if self.config.model else {}
        return Fingerprint("caption", VERSION, settings, None, weights)

    def tasks(self) -> Iterator[Task]:
        """One task an image shard, with its share of the budget of tokens."""
        dataset = Dataset.open(self.run.images)
        budget = self.config.endpoint.max_tokens_total if self.config.endpoint else None
        total = max(1, len(dataset))
        for position, info in enumerate(dataset.shards):
            share = None if budget is None else budget * info.count // total
            yield Task(info.index, info.born, {"position": position, "tokens": share})

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Loads the model once; the result makes one shard a call."""
        return shardwork.worker(self, self.run.images, self.config.threads, _Captions(self.config, self.seed))

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Count what became of the images, and write the manifest."""
        fates: Counter[str] = Counter()
        tokens = 0

        def folded() -> Iterator[dict[str, Any]]:
            nonlocal tokens
            for one in stats:
                fates.update(one["fates"])
                tokens += one["tokens"]
                yield one

        def extra() -> dict[str, Any]:
            counts = {f: fates[f] for f in FATES if fates[f]}
            return {"captions": self.captions, "settings": self.config.settings(), "fates": counts, "tokens": tokens}

        return write_manifest(self.root, "captions", folded(), extra)


class _Captions:
    """The captions of a shard, by a model that is loaded once."""

    def __init__(self, config: CaptionConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.refusals = [re.compile(r, re.IGNORECASE) for r in self.config.refusals]
        if self.config.endpoint:
            self.captioner: Transformers | Server = Server(self.config, self.config.endpoint)
            self.at_once = 4 * self.config.endpoint.concurrency
        else:
            self.captioner = Transformers(self.config, model_folder(self.config.model, "captioner"))
            self.at_once = self.config.batch_size

    def __call__(self, shard: images.ImageShard, payload: dict[str, Any]) -> Made:
        return self._pack(shard, self._answers(shard, payload["tokens"]))

    def _answers(self, shard: images.ImageShard, budget: int | None) -> list[list[Answer]]:
        """For each sample an Answer a prompt."""
        captions, prompts = shard.captions, self.config.prompts
        answers: list[list[Answer]] = [[] for _ in captions]
        batch: list[tuple[int, np.ndarray, str]] = []
        spent = done = 0

        def flush() -> None:
            nonlocal spent, done
            if batch and budget is not None and spent >= budget:
                for i, _, _ in batch:
                    answers[i].append(Answer(error="over_budget"))
            elif batch:
                seed = (self.seed << 40) + (shard.info.index << 20) + done
                for (i, _, _), said in zip(batch, self.captioner([(p, t) for _, p, t in batch], seed), strict=True):
                    answers[i].append(said)
                    spent += said.tokens
            done += len(batch)
            batch.clear()

        for i, (_, pixels) in enumerate(decoded(shard, self.config.decode_threads, 2 * self.at_once)):
            if pixels is None:
                answers[i] = [Answer(error="not_decoded")] * len(prompts)
                continue
            pixels = _shrunk(pixels, self.config.max_side)
            for prompt in prompts:
                batch.append((i, pixels, prompt.replace("{caption}", captions[i])))
                if len(batch) == self.at_once:
                    flush()
        flush()
        return answers

    def _pack(self, shard: images.ImageShard, answers: list[list[Answer]]) -> Made:
        texts = [[tidy(a.text) for a in some] for some in answers]
        often = Counter(t for some in texts for t in some if t)
        common = {t for t, n in often.items() if n > max(2, SAME * len(answers))}
        rows = shard.table.num_rows
        kept: list[list[str] | None] = [None] * rows
        fates: list[str | None] = [None] * rows
        tokens = np.zeros(rows, np.int32)
        for row, some, said in zip(shard.rows.tolist(), texts, answers, strict=True):
            judged = [self._fate(t, a, common) for t, a in zip(some, said, strict=True)]
            good = [t for t, f in zip(some, judged, strict=True) if f == "captioned"]
            kept[row] = list(dict.fromkeys(good))
            fates[row] = "captioned" if good else judged[0]
            tokens[row] = sum(a.tokens for a in said)
        column_row = np.full(rows, -1, np.int32)
        column_row[shard.rows] = np.arange(len(shard), dtype=np.int32)
        table = pa.table(
            {
                "key": shard.table["key"].combine_chunks(),
                "column_row": pa.array(column_row),
                "captions": pa.array(kept, pa.list_(pa.string())),
                "fate": pa.array(fates, pa.string()),
                "tokens": pa.array(tokens),
            }
        )
        counts = Counter(f for f in fates if f)
        stats = {"rows": rows, "count": len(shard), "fates": dict(sorted(counts.items())), "tokens": int(tokens.sum())}
        arrays = {"row": shard.rows.astype(np.int32), "tokens": tokens[shard.rows]}
        return {".safetensors": pack_columns(arrays, {}), ".parquet": storage.parquet_bytes(table)}, stats

    def _fate(self, text: str, answer: Answer, common: set[str]) -> str:
        if answer.error in ("over_budget", "not_decoded"):
            return answer.error
        if answer.error:
            return "failed"
        if not text:
            return "empty"
        if any(r.search(text) for r in self.refusals):
            return "refused"
        return "repeated" if text in common or loops(text) else "captioned"


def tidy(text: str) -> str:
    """A model's answer as a caption: one line, no control characters, no quotation marks around all of it, cut at 8192
    characters."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MAX_CHARACTERS]).split())
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "\"'":
        plain = plain[1:-1].strip()
    return plain[:MAX_CHARACTERS]


def loops(text: str) -> bool:
    """Whether a phrase of one to eight words comes four times in a row."""
    words = text.lower().split()
    for size in range(1, 9):
        run = 0
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else 0
            if run >= size * (LOOP - 1):
                return True
    return False


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if max(height, width) <= side:
        return pixels
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
