"""What a folder of shards is made with: `made_with.json`, created when the folder is begun and never changed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from typing import Any

from shards import storage
from shards.fingerprint import Fingerprint
from shards.settings import ConfigError, StageError
from shards.stats import json_bytes

MADE_WITH = "made_with.json"
FORMAT_VERSION = 2
_PARTS = ("stage", "version", "settings", "input", "weights")


def read_made_with(root: str) -> dict[str, Any] | None:
    """What a folder was made with; None where it is not begun. Raises ConfigError where the file cannot be used."""
    url = storage.join(root, MADE_WITH)
    try:
        stored = storage.read_json(url)
    except ValueError:
        stored = {}
    except (NotADirectoryError, PermissionError) as e:
        raise ConfigError(f"{root}: cannot be used as a folder ({e.strerror}); set 'run' to another one") from None
    if stored is None:
        return None
    if not isinstance(stored, dict) or not {"id", "stage", "settings"} <= stored.keys():
        raise ConfigError(f"{url}: cannot be read; it is not a file of Carrara, or was damaged")
    if stored.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{url}: is of format {stored.get('format_version')}, and this Carrara knows {FORMAT_VERSION}"
        )
    return stored


def made_with_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a fingerprint in what `read_made_with` returns."""
    return {k: v for k, v in stored.items() if k in _PARTS}


def write_made_with(root: str, made_with: Fingerprint, data: str, **more: Any) -> dict[str, Any]:
    """Create `made_with.json`; returns what stands there, which may be another process's."""
    record = {
        "format_version": FORMAT_VERSION,
        "id": secrets.token_hex(6),
        "data": data,
        **made_with_of(made_with.to_json()),
        **more,
    }
    beside = storage.join(root, f".new-{record['id']}")
    storage.make_folder(beside)
    if not storage.create(storage.join(root, MADE_WITH), json_bytes(record)):
        if storage.is_local(beside):
            with contextlib.suppress(OSError):
                os.rmdir(storage.local_path(beside))
        there = read_made_with(root)
        if there is None:
            raise StageError(f"{root}: {MADE_WITH} was there and is not any more; run the same command again")
        return there
    return record
