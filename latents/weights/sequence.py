"""The weights of a text encoder of transformers, and its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latents.weights.files import HUB_NAME, file_digest, hub_folder, model_files, positive, read_config
from shards.fingerprint import digest_json
from shards.settings import ConfigError

SEQUENCE = "transformers"  # the kind, in the facts of latents: captions have as many rows as tokens
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")
_SEQUENCE_HUB_FILES = [
    f"{p}{name}"
    for p in ("", "text_encoder/", "tokenizer/")
    for name in ("config.json", "model*.safetensors*", *TOKENIZER_FILES)
]


@dataclasses.dataclass(frozen=True)
class SequenceWeights:
    """A text encoder of transformers and its tokenizer on disk. model, tokenizer: folders; files: the weights; width:
    of its states; vocabulary: how many token ids there are."""

    ref: str
    model: Path
    tokenizer: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    width: int
    vocabulary: int

    @property
    def digest(self) -> str:
        """sha256 over the weights, the configuration, and the files of the tokenizer."""
        config = {k: v for k, v in self.config.items() if k not in _NO_PART_OF_A_MODEL}
        names = sorted(n for n in TOKENIZER_FILES if (self.tokenizer / n).is_file())
        tokenizer = {n: file_digest(self.tokenizer / n) for n in names}
        weights = {f.name: file_digest(f) for f in self.files}
        return digest_json({"weights": weights, "config": config, "tokenizer": tokenizer})

    @property
    def longest(self) -> int | None:
        """How many tokens it has places for; None where these are relative to each other, as T5's."""
        positions = _number(self.config, ("max_position_embeddings",))
        if positions is None or not (file := self.tokenizer / "tokenizer_config.json").is_file():
            return positions
        limit = read_config(file, "the tokenizer").get("model_max_length")  # RoBERTa has two fewer than its places
        return min(positions, int(limit)) if isinstance(limit, int | float) and limit > 0 else positions

    def facts(self, max_length: int) -> dict[str, Any]:
        """As `text_facts`; raises ConfigError where it has no places for so many tokens."""
        if (longest := self.longest) is not None and max_length > longest:
            raise ConfigError(
                f"latents.text_encoder.max_length is {max_length}, and '{self.ref}' has places for {longest} tokens; "
                "lower it"
            )
        return {
            "kind": SEQUENCE,
            "ref": self.ref,
            "digest": self.digest,
            "layer": "last_hidden_state",
            "pad": "masked",
            "context_length": max_length,
            "width": self.width,
        }


def find_sequence(ref: str) -> SequenceWeights:
    """Find the text encoder of transformers named `ref`: its folder, that of a diffusers pipeline, or a hub name.

    Raises ConfigError where there is none, or none whose weights are safetensors: nothing pickled is opened.
    """
    what = f"the text encoder '{ref}'"
    root = Path(ref).expanduser()
    if not root.is_dir():
        if not HUB_NAME.fullmatch(ref):
            raise ConfigError(f"{what} is neither a folder here nor a hub name; give one that transformers saved")
        root = hub_folder(ref, "the text encoder", _SEQUENCE_HUB_FILES)
    model = next((f for f in (root, root / "text_encoder") if (f / "config.json").is_file()), None)
    if model is None:
        raise ConfigError(f"{what}: {root} has no config.json; give the folder that transformers saved a model in")
    config = read_config(model / "config.json", "the text encoder")
    tokenizer = root / "tokenizer" if (root / "tokenizer").is_dir() else model
    if not any((tokenizer / n).is_file() for n in TOKENIZER_FILES):
        raise ConfigError(
            f"{what}: {tokenizer} has no tokenizer; save it there, beside the model, with save_pretrained"
        )
    files = model_files(what, "the text encoder", model)
    width, vocabulary = (_number(config, names) for names in (("d_model", "hidden_size", "dim"), ("vocab_size",)))
    if width is None or vocabulary is None:
        raise ConfigError(f"{what}: {model / 'config.json'} names no width (d_model, hidden_size) or no vocab_size")
    return SequenceWeights(ref, model, tokenizer, tuple(files), config, width, vocabulary)


def _number(config: dict[str, Any], names: Sequence[str]) -> int | None:
    """The first of these settings of a text model, which may lie one level down in a configuration of several parts."""
    for part in (config, config.get("text_config"), config.get("encoder")):
        for name in names:
            if isinstance(part, dict) and positive(part.get(name), int):
                return int(part[name])
    return None
