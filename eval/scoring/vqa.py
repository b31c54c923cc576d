"""VQAScore and Soft-TIFA: the chance that a vision-language model gives the right answer about an image.

VQAScore (Lin et al. 2024): P("Yes" | image, 'Does this figure show "..."?'). Soft-TIFA (Kamath et al. 2025, GenEval 2):
each question of a prompt's suite, asked with "Answer in one word.", scores P(right answer | image, question); a
prompt's score is the arithmetic mean over its atoms (AM, for atoms) or the geometric one (GM, for whole prompts). An
answer of several tokens has the product of their chances.

Any transformers image-text-to-text model serves: questions go through its own chat template, several at once, padded
to the left, the answers behind them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import JudgeConfig
from eval.networks.weights import Rows, model_folder
from eval.shardwork import Halving
from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError

ATOMS = 40  # questions of one prompt that are asked; the width of the column
ONE_WORD = " Answer in one word."
COLUMNS = ("vqa_score", "soft_tifa_am", "soft_tifa_gm", "atoms")


class Judge:
    """Scores images: columns vqa_score, soft_tifa_am, soft_tifa_gm [B, 1] and atoms [B, ATOMS], NaN where not asked."""

    def __init__(self, config: JudgeConfig, device: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.config, self.device = config, device
        try:
            self.processor: Any = transformers.AutoProcessor.from_pretrained(
                config.model, local_files_only=_local(config.model)
            )
            self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                config.model,
                local_files_only=_local(config.model),
                use_safetensors=True,
                dtype=getattr(torch, config.precision),
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
            why = " ".join(str(e).split())[:200]
            raise ConfigError(f"eval.judge.model: {config.model} is no image-text-to-text model ({why})") from None
        self.model.eval().requires_grad_(False).to(device)
        self.tokenizer: Any = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self._in_pieces = Halving("questions")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prepare(self, pixels: np.ndarray, rows: Rows) -> tuple[list[Any], list[tuple[int, str, str]], int]:
        """Images, (image, question, answer) of everything to ask, and how many images there are."""
        from PIL import Image

        images = [Image.fromarray(p) for p in pixels]
        asked = []
        for i, row in enumerate(rows):
            asked.append((i, self.config.question.replace("{prompt}", str(row["caption"])), self.config.yes))
            for question, answer in json.loads(row.get("questions") or "[]")[:ATOMS]:
                asked.append((i, question + ONE_WORD, answer))
        return images, asked, len(rows)

    def __call__(self, prepared: tuple[list[Any], list[tuple[int, str, str]], int]) -> dict[str, np.ndarray]:
        images, asked, count = prepared
        size, log_p = self.config.batch_size, []
        for at in range(0, len(asked), size):
            batch = asked[at : at + size]
            for part in self._in_pieces(len(batch), lambda piece: self.log_chances(images, batch[piece])):  # noqa: B023
                log_p += part
        whole, atoms = np.full((count, 1), np.nan, np.float32), np.full((count, ATOMS), np.nan)
        filled = [-1] * count  # the first of an image's questions is VQAScore's
        for (i, _, _), value in zip(asked, log_p, strict=True):
            if filled[i] < 0:
                whole[i, 0] = np.exp(value)
            else:
                atoms[i, filled[i]] = value
            filled[i] += 1
        any_ = ~np.isnan(atoms).all(axis=1)
        mean, geometric = np.full((count, 1), np.nan), np.full((count, 1), np.nan)
        mean[any_, 0] = np.nanmean(np.exp(atoms[any_]), axis=1)
        geometric[any_, 0] = np.exp(np.nanmean(atoms[any_], axis=1))
        found = {"vqa_score": whole, "soft_tifa_am": mean, "soft_tifa_gm": geometric, "atoms": np.exp(atoms)}
        return {name: v.astype(np.float32) for name, v in found.items()}

    def log_chances(self, images: list[Any], asked: list[tuple[int, str, str]]) -> list[float]:
        """log P(answer | image, question) of each, in one batch."""
        import torch

        texts = [self._text(question) for _, question, _ in asked]
        # A template that writes the first token itself gets no second one, as where transformers tokenizes templates.
        bos = self.tokenizer.bos_token
        once = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        shown = [[images[i]] for i, _, _ in asked]
        given = self.processor(text=texts, images=shown, padding=True, return_tensors="pt", **once)
        answers = [self.tokenizer(a, add_special_tokens=False)["input_ids"] for _, _, a in asked]
        longest = max(map(len, answers))
        padding = self.tokenizer.pad_token_id
        tail = torch.tensor([a + [padding] * (longest - len(a)) for a in answers])
        mask = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers])
        begin = given["input_ids"].shape[1]
        given["input_ids"] = torch.cat([given["input_ids"], tail], dim=1)
        given["attention_mask"] = torch.cat([given["attention_mask"], mask], dim=1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in given:
                given[name] = torch.cat([given[name], torch.zeros_like(tail)], dim=1)
        with torch.inference_mode():
            moved = {
                k: v.to(self.device, self.model.dtype if v.is_floating_point() else v.dtype) for k, v in given.items()
            }
            logits = self.model(**moved).logits[:, begin - 1 : begin - 1 + longest].float()
            chosen = torch.log_softmax(logits, dim=-1).gather(2, tail[:, :, None].to(logits.device))[:, :, 0]
            return [float(v) for v in (chosen * mask.to(logits.device)).sum(dim=1).cpu()]

    def _text(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        for owner in (self.processor, self.tokenizer):  # older models keep the template with the tokenizer
            if getattr(owner, "chat_template", None):
                return str(owner.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}\n"


def _local(ref: str) -> bool:
    return Path(ref).is_dir()


@functools.lru_cache(maxsize=8)
def digest(ref: str, field: str = "eval.judge.model") -> str:
    """sha256 over the model's files; of a hub name, of its files in the local cache, fetched if need be. field: of the
    configuration, for errors."""
    folder = model_folder(ref, field, ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".json", ".safetensors", ".jinja")]
    if not any(p.suffix == ".safetensors" for p in files):
        raise ConfigError(f"{field}: {ref} has no .safetensors; weights are read from those alone")
    return digest_json([[p.name, digest_file(p)] for p in files])
