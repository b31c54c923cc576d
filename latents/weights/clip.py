"""A CLIP's weights: a folder or a name of open_clip's, the text encoder of a diffusers pipeline, or a hub name."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from latents.weights.files import SAFE_SUFFIXES, file_digest, hub_folder, line, positive, read_config
from shards.fingerprint import digest_json
from shards.settings import ConfigError

CLIP_WEIGHTS = (  # open_clip's own order of preference, so that the file digested is the file it loads
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
)
TEXT_ALONE = "text encoder alone"  # the name of a CLIP of which there is no more than its text tower
_CLIP_HUB_FILES = ["open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.*"]
_CLIP_TEXT_HUB_FILES = ["config.json", "model.safetensors", "model.fp16.safetensors"]


@dataclasses.dataclass(frozen=True)
class ClipWeights:
    """A CLIP that was found. name, pretrained: as open_clip wants them; file: the weights; model_cfg: architecture."""

    ref: str
    name: str
    pretrained: str | None
    file: Path
    model_cfg: dict[str, Any]
    quick_gelu: bool

    @property
    def digest(self) -> str:
        """sha256 over the weights file's digest and the architecture."""
        config = {**self.model_cfg, "quick_gelu": self.quick_gelu}
        return digest_json({"weights": file_digest(self.file), "config": config})

    @property
    def text_alone(self) -> bool:
        """Whether there is a text encoder and no image encoder, so that the CLIP can judge no image."""
        return self.name == TEXT_ALONE

    def require_image_encoder(self) -> None:
        """Raises ConfigError where there is none."""
        if self.text_alone:
            raise ConfigError(
                f"the CLIP '{self.ref}' is a text encoder alone and can judge no image; name a whole one "
                "(eval.clip, or the score's model)"
            )

    @property
    def context_length(self) -> int:
        """Tokens a caption."""
        return int(self.model_cfg["text_cfg"].get("context_length", 77))

    @property
    def width(self) -> int:
        """Width of the text transformer, the size of a token's embedding."""
        return int(self.model_cfg["text_cfg"].get("width", 512))


def find_clip(ref: str) -> ClipWeights:
    """Find the CLIP named `ref`; raises ConfigError where there is none."""
    path = Path(ref.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return _clip_folder(ref, path)
    if ref.startswith("hf-hub:"):
        name, part = re.fullmatch(r"hf-hub:([^/]*/?[^/]*)/?(.*)", ref).groups()  # type: ignore[union-attr]
        wanted = [f"{part}/{file}" for file in _CLIP_TEXT_HUB_FILES] if part else _CLIP_HUB_FILES
        return _clip_folder(ref, hub_folder(name, "the CLIP", wanted) / part)
    model, colon, weights = ref.partition(":")
    if ref.startswith("local-dir:") or not colon or os.path.exists(ref):
        raise ConfigError(
            f"the CLIP '{ref}' is not a folder with open_clip_config.json; give such a folder, MODEL:TAG "
            "(for example ViT-H-14:laion2b_s32b_b79k), or MODEL:/path/to/weights.safetensors"
        )
    return _clip_named(ref, model, weights)


def _clip_folder(ref: str, folder: Path) -> ClipWeights:
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file() and (folder / "config.json").is_file():
        return _clip_text_folder(ref, folder)
    if not config_file.is_file():
        raise ConfigError(f"the CLIP '{ref}': {folder} has no open_clip_config.json")
    model_cfg = read_config(config_file, "the CLIP").get("model_cfg")
    if not isinstance(model_cfg, dict) or "text_cfg" not in model_cfg:
        raise ConfigError(f"the CLIP '{ref}': {config_file} has no model_cfg with a text_cfg")
    _require_plain_text(ref, model_cfg["text_cfg"])
    file = next((folder / n for n in CLIP_WEIGHTS if (folder / n).is_file()), None)
    if file is None:
        raise ConfigError(f"the CLIP '{ref}': {folder} has a configuration but no {CLIP_WEIGHTS[0]}")
    return ClipWeights(ref, f"local-dir:{folder}", None, file, model_cfg, bool(model_cfg.get("quick_gelu", False)))


def _clip_text_folder(ref: str, folder: Path) -> ClipWeights:
    """The text encoder of a diffusers pipeline, as transformers saves it, in open_clip's words."""
    config = read_config(folder / "config.json", "the CLIP")
    if config.get("model_type") != "clip_text_model":
        raise ConfigError(
            f"the CLIP '{ref}': {folder / 'config.json'} describes no CLIP's text encoder; give the folder "
            "text_encoder of a Stable Diffusion pipeline, or one with open_clip_config.json"
        )
    file = next((folder / n for n in ("model.safetensors", "model.fp16.safetensors") if (folder / n).is_file()), None)
    if file is None:
        raise ConfigError(f"the CLIP '{ref}': {folder} has a configuration but no model.safetensors")
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ConfigError(f"the CLIP '{ref}': its activation is {activation}, and must be gelu or quick_gelu")
    names = {
        "context_length": ("max_position_embeddings", 77),
        "vocab_size": ("vocab_size", 49408),
        "width": ("hidden_size", 512),
        "heads": ("num_attention_heads", 8),
        "layers": ("num_hidden_layers", 12),
    }
    text: dict[str, Any] = {ours: config.get(theirs, default) for ours, (theirs, default) in names.items()}
    inner, projection = config.get("intermediate_size", 2048), config.get("projection_dim", 512)
    if not all(positive(v, int) for v in (*text.values(), inner, projection)):
        raise ConfigError(f"the CLIP '{ref}': {folder / 'config.json'} has a size that is no whole number above 0")
    if (eps := config.get("layer_norm_eps", 1e-5)) != 1e-5:
        raise ConfigError(f"the CLIP '{ref}': its layer_norm_eps is {eps}, and must be 1e-5 as all of CLIP's are")
    text["mlp_ratio"] = inner / text["width"]
    if int(text["width"] * text["mlp_ratio"]) != inner:  # which is how open_clip takes it back
        text["mlp_ratio"] = (inner + 0.5) / text["width"]
    _require_plain_text(ref, text)
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    model_cfg = {"embed_dim": projection if projected else None, "text_cfg": text}
    return ClipWeights(ref, TEXT_ALONE, None, file, model_cfg, activation == "quick_gelu")


def _require_plain_text(ref: str, text: dict[str, Any]) -> None:
    """Refuse, before any weights are fetched, a text tower that is not CLIP's own; ConfigError says what it is.

    Such a tower fits no text encoder of a Stable Diffusion pipeline. encoders.plain_text_tower looks at what is built.
    """
    odd = ""
    if not isinstance(text, dict):
        odd = "has no settings"
    elif text.get("hf_model_name"):
        odd = f"is {text['hf_model_name']}, not open_clip's own text transformer"
    elif text.get("hf_tokenizer_name"):
        odd = f"reads the tokens of {text['hf_tokenizer_name']}, not CLIP's"
    elif text.get("no_causal_mask"):
        odd = "is not causal"
    elif text.get("embed_cls"):
        odd = "appends a class token (CoCa)"
    elif int(text.get("vocab_size", 49408)) > 65536:
        odd = "has token ids beyond 65535, which the shards cannot hold"
    if odd:
        raise ConfigError(
            f"the CLIP '{ref}' cannot condition a Stable Diffusion pipeline: its text tower {odd}; "
            "give one with CLIP's causal text transformer, such as ViT-L-14 or ViT-H-14"
        )


def _clip_named(ref: str, model: str, weights: str) -> ClipWeights:
    import open_clip

    name = model.replace("/", "-")
    model_cfg = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if model_cfg is None:
        raise ConfigError(f"the CLIP '{ref}': open_clip has no model '{model}'; open_clip.list_models() names them")
    _require_plain_text(ref, model_cfg["text_cfg"])
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    tag = open_clip.get_pretrained_cfg(name, weights)
    if tag:
        # Weights that were trained with QuickGELU work with no other activation, whatever the model's name.
        quick_gelu = quick_gelu or bool(tag.get("quick_gelu"))
        try:
            file = Path(open_clip.download_pretrained(tag))
        except Exception as e:
            raise ConfigError(f"the CLIP '{ref}' cannot be downloaded: {line(e)}") from None
    else:
        file = Path(weights).expanduser()
    if not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(f"the CLIP '{ref}': '{weights}' is neither a file nor a tag of {name} (its tags: {tags})")
    if file.suffix not in SAFE_SUFFIXES:
        raise ConfigError(f"the CLIP '{ref}': weights must be one of {', '.join(SAFE_SUFFIXES)}")
    return ClipWeights(ref, name, weights if tag else str(file), file, model_cfg, quick_gelu)
