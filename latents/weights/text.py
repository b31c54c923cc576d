"""What reads the captions: the facts of one encoder or of two CLIPs side by side, and how captions are padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latents.weights.clip import ClipWeights, find_clip
from latents.weights.files import HUB_NAME, hub_folder, line
from latents.weights.sequence import find_sequence
from shards.fingerprint import digest_json
from shards.settings import ConfigError

if TYPE_CHECKING:
    from latents.config import LatentsConfig


PAIR = "clip_pair"  # the kind, in the facts of latents, of two CLIPs side by side
# What follows a caption's end token: id 0, as open_clip pads (Stable Diffusion 2, SDXL's second encoder), or the end
# token again, as Stable Diffusion 1's tokenizer pads.
PADS = ("zero", "end")


def text_facts(config: LatentsConfig, ref: str) -> dict[str, Any]:
    """What a manifest of latents says of what read the captions: its weights by name and digest, and how it is used.

    ref: the run's CLIP. A second one beside it makes `kind` clip_pair, with the facts of both under `encoders`, one
    digest and the width of both together. Raises ConfigError where weights are not there or do not go together.
    """
    if config.sequence is not None:
        return find_sequence(config.sequence.pretrained).facts(config.sequence.max_length)
    first = _clip_facts(find_clip(ref), config.text_layer, config.pad)
    if config.second_clip is None:
        return first
    second = _clip_facts(find_clip(config.second_clip.pretrained), config.text_layer, config.second_clip.pad or "zero")
    if first["context_length"] != second["context_length"]:
        raise ConfigError(
            f"latents.text_encoder: '{second['ref']}' reads {second['context_length']} tokens and '{ref}' "
            f"{first['context_length']}; two CLIPs are read side by side, token by token, so choose two of one length"
        )
    return {
        "kind": PAIR,
        "ref": f"{first['ref']} and {second['ref']}",
        "digest": digest_json([first["digest"], second["digest"]]),
        "layer": config.text_layer,
        "pad": first["pad"],
        "context_length": first["context_length"],
        "width": first["width"] + second["width"],
        "encoders": [first, second],
    }


def clips_of(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of each encoder in `text_facts`: one, or those of a pair."""
    return list(facts["encoders"]) if facts.get("kind") == PAIR else [dict(facts)]


def _clip_facts(text: ClipWeights, layer: str, pad: str) -> dict[str, Any]:
    return {
        "ref": text.ref,
        "digest": text.digest,
        "layer": layer,
        "pad": pad,
        "context_length": text.context_length,
        "width": text.width,
    }


def find_pad(ref: str, names: Sequence[str] = ("tokenizer_2", "tokenizer")) -> str | None:
    """How the tokenizer of the diffusers pipeline `ref` (a folder, or a hub name) pads: `zero` or `end`.

    None where there is no tokenizer, as beside a UNet alone. names: the first of them that is there counts; of two, by
    default the second's, whose encoder is the one that SDXL's refiner has. Raises ConfigError where it cannot be read
    or pads otherwise.
    """
    root = Path(ref)
    if not root.is_dir():
        if not HUB_NAME.fullmatch(ref):
            return None
        root = hub_folder(ref, "the tokenizer of", ["tokenizer*/*.json", "tokenizer*/*.txt"])
    folder = next((root / n for n in names if (root / n).is_dir()), None)
    if folder is None:
        return None
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as e:
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {line(e)}") from None
    if tokenizer.pad_token_id == 0:
        return "zero"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return "end"
    raise ConfigError(
        f"the tokenizer in {folder} pads with id {tokenizer.pad_token_id}, which is neither 0 nor its end token; "
        "captions cannot be padded so here"
    )
