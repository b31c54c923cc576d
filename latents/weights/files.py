"""What the finding of all weights shares: files, configurations, the hub, digests."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.fingerprint import digest_file
from shards.settings import ConfigError

# Formats that are read without running code from the file: safetensors, or torch.load(weights_only=True).
SAFE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_folder(name: str, what: str, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The local copy of those files of a hub repository that match, but for those to ignore; raises ConfigError where
    it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(ignore)))
    except Exception as e:
        raise ConfigError(f"{what} '{name}' is not a path here and cannot be had from the hub: {line(e)}") from None


def read_config(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ConfigError where it is none. what: whose it is, for the sentence."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, OSError) as e:
        raise ConfigError(f"{what}: {file} cannot be read as JSON: {e}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{what}: {file} is not a JSON object")
    return config


def model_files(what: str, kind: str, model: Path) -> list[Path]:
    """The safetensors files of a model in the folder that transformers saved it in, whole or in parts; ConfigError."""
    files: list[Path] = [model / "model.safetensors"]
    if (index := model / "model.safetensors.index.json").is_file() and not files[0].is_file():
        named = read_config(index, kind).get("weight_map")
        names = sorted(set(named.values())) if isinstance(named, dict) else []
        if not names or any(Path(str(n)).name != n or not (model / n).is_file() for n in names):
            raise ConfigError(f"{what}: {index} names files that are not beside it; bring them back")
        files = [model / n for n in names]
    if not files[0].is_file():
        raise ConfigError(
            f"{what}: {model} has no model.safetensors, whole or in parts; load the model with transformers and save "
            "it with save_pretrained (a pickle may run anything, and is not opened)"
        )
    return files


def positive(value: Any, kind: Any) -> bool:
    """Whether it is a number of this type, or of one of these, above 0; truth is none."""
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:300]


def file_digest(file: Path) -> str:
    """sha256 of a file, read once as long as it is not changed."""
    info = os.stat(file)
    return _digest_of(str(file), info.st_size, info.st_mtime_ns, info.st_ino)


@functools.lru_cache(maxsize=64)
def _digest_of(file: str, size: int, mtime_ns: int, inode: int) -> str:
    return digest_file(file)
