"""Scores that learned from people's choices, each in its authors' own units, from weights on disk.

pickscore   exp(logit scale) * cos(text, image) of PickScore_v1, a CLIP-H in transformers' layout (Kirstain et al.
            2023)
hps         100 * cos(text, image) of HPSv2 or 2.1, open_clip's ViT-H-14 with the file's weights (Wu et al. 2023)
aesthetic   LAION's predictor: linear layers on a ViT-L-14's image embedding of unit length; 1 to 10
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import PreferenceConfig
from eval.networks.clip import Clip
from eval.networks.weights import Found, Rows, check_file, digest_of, tensors
from latents.weights import find_clip
from shards.settings import ConfigError

HPS_MODEL = "ViT-H-14"
NAMES = ("pickscore", "hps", "aesthetic")


class Preference:
    """Columns [B, 1] by name, for those whose weights are given."""

    def __init__(self, config: PreferenceConfig, device: str, hps_model: str = HPS_MODEL) -> None:
        self.device = device
        self.scorers: dict[str, Any] = {}
        if config.pickscore:
            self.scorers["pickscore"] = PickScore(config.pickscore, device)
        if config.hps:
            self.scorers["hps"] = Hps(config.hps, device, hps_model)
        if config.aesthetic:
            self.scorers["aesthetic"] = Aesthetic(config.aesthetic, config.aesthetic_clip, device)

    def prepare(self, pixels: np.ndarray, rows: Rows) -> dict[str, Any]:
        """Of each scorer what it wants."""
        captions = [str(r["caption"] or "") for r in rows]
        return {name: scorer.prepare(pixels, captions) for name, scorer in self.scorers.items()}

    def __call__(self, prepared: dict[str, Any]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            return {n: s(prepared[n]).float().cpu().numpy()[:, None] for n, s in self.scorers.items()}


class PickScore:
    """transformers' CLIP with its own processor."""

    def __init__(self, ref: str, device: str) -> None:
        import transformers

        try:
            local = Path(ref).is_dir()
            self.model: Any = transformers.CLIPModel.from_pretrained(ref, local_files_only=local, use_safetensors=True)
            self.processor: Any = transformers.CLIPProcessor.from_pretrained(ref, local_files_only=local)
        except (OSError, ValueError, KeyError) as e:
            why = " ".join(str(e).split())[:200]
            raise ConfigError(f"eval.preference.pickscore: {ref} is no CLIP with a processor ({why})") from None
        self.model.eval().requires_grad_(False).to(device)
        self.device = device

    def prepare(self, pixels: np.ndarray, captions: list[str]) -> Any:
        return self.processor(
            text=captions, images=list(pixels), padding=True, truncation=True, max_length=77, return_tensors="pt"
        )

    def __call__(self, prepared: Any) -> Any:
        found = self.model(**prepared.to(self.device))
        return self.model.logit_scale.exp() * (found.text_embeds * found.image_embeds).sum(dim=-1)


class Hps:
    """open_clip's model with the weights of HPSv2."""

    def __init__(self, path: str, device: str, model: str = HPS_MODEL) -> None:
        import open_clip
        import torch

        state: Any = _state(Path(path), "eval.preference.hps")
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(model)
        try:
            self.model.load_state_dict(state)
        except RuntimeError as e:
            raise ConfigError(
                f"eval.preference.hps: {path} does not hold a {model}'s weights ({str(e)[:120]})"
            ) from None
        self.model.eval().requires_grad_(False).to(device)
        self.tokenizer, self.device = open_clip.get_tokenizer(model), torch.device(device)

    def prepare(self, pixels: np.ndarray, captions: list[str]) -> Any:
        import torch
        from PIL import Image

        return torch.stack([self.preprocess(Image.fromarray(p)) for p in pixels]), self.tokenizer(captions)

    def __call__(self, prepared: Any) -> Any:
        images, tokens = (t.to(self.device) for t in prepared)
        a = self.model.encode_image(images, normalize=True)
        return 100 * (a * self.model.encode_text(tokens, normalize=True)).sum(dim=-1)


class Aesthetic:
    """The predictor's layers, applied one after another (its dropout is of training alone)."""

    def __init__(self, path: str, clip: str, device: str) -> None:
        state = _state(Path(path), "eval.preference.aesthetic")
        numbers = sorted({int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.weight$", name))})
        if not numbers:
            raise ConfigError(f"eval.preference.aesthetic: {path} has no layers.N.weight; give the linear predictor")
        self.layers = [(state[f"layers.{n}.weight"].to(device), state[f"layers.{n}.bias"].to(device)) for n in numbers]
        self.clip = Clip(Found("clip", clip, None, find_clip(clip).digest), device)

    def prepare(self, pixels: np.ndarray, captions: list[str]) -> Any:
        return self.clip.prepare(pixels)

    def __call__(self, prepared: Any) -> Any:
        import torch

        x = torch.from_numpy(self.clip(prepared)["images"]).to(self.layers[0][0].device)
        for weight, bias in self.layers:
            x = torch.nn.functional.linear(x, weight, bias)
        return x[:, 0]


def _state(path: Path, option: str) -> dict[str, Any]:
    check_file(path, option, "the file of its weights")
    return tensors(path, option, inner="state_dict")


def digests(config: PreferenceConfig) -> dict[str, str]:
    """sha256 of each scorer's weights; ConfigError where a file is missing or none is named."""
    from eval.scoring.vqa import digest

    found = {}
    if config.pickscore:
        found["pickscore"] = digest(config.pickscore, "eval.preference.pickscore")
    for name in ("hps", "aesthetic"):
        if file := getattr(config, name):
            check_file(Path(file), f"eval.preference.{name}", "the file of its weights")
            found[name] = digest_of(file, os.stat(file).st_mtime_ns)
    if config.aesthetic:
        found["clip"] = find_clip(config.aesthetic_clip).digest
    if not found:
        raise ConfigError("eval.preference names no weights; give pickscore, hps or aesthetic")
    return found
