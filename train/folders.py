"""Checkpoint folders: which there are, whether they are whole, and what their manifests say. No weights are read.

Apart from checkpoint.py, which reads and writes the weights, so that asking how far a fit has come needs no torch.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from shards import storage
from shards.fingerprint import digest_file
from shards.settings import StageError

log = logging.getLogger("carrara.train")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATES = ("exp_avg", "exp_avg_sq", "ema")
_NAME = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """`1000` -> `step-00001000`."""
    return f"step-{step:08d}"


def folders(root: Path) -> list[Path]:
    """Checkpoint folders, whole or not, newest first."""
    found = [root / n for n in storage.list_names(str(root)) if _NAME.fullmatch(n)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises StageError where there is none or it is not one."""
    try:
        manifest = storage.read_json(str(folder / MANIFEST))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION or "files" not in manifest:
        raise StageError(f"{folder}: not a checkpoint, or of another format: its {MANIFEST} is absent or unreadable")
    return manifest


def damage(folder: Path, deep: bool = True) -> str:
    """What is wrong with a checkpoint, as one sentence; empty where it is complete. deep: read and hash the files."""
    try:
        files = read_manifest(folder)["files"]
    except StageError as e:
        return str(e)
    for name in sorted(f"{n}.safetensors" for n in ("weights", *STATES)):
        file = folder / name
        expected = files.get(name, {})
        size = file.stat().st_size if file.is_file() else None
        if size != expected.get("size"):
            return f"{file} has {size} bytes where the manifest says {expected.get('size')}"
        if deep and digest_file(file) != expected.get("sha256"):
            return f"{file} does not have the sha256 that the manifest says"
    return ""


def latest_complete(root: str | Path, deep: bool = True) -> Path | None:
    """The newest checkpoint under `root` that is complete; torn ones are skipped with a line in the log."""
    for folder in folders(Path(root)):
        fault = damage(folder, deep)
        if not fault:
            return folder
        log.warning("the checkpoint %s is skipped: %s", folder.name, fault)
    return None


def delete_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; the newest complete one stays in any case."""
    complete = [f for f in folders(root) if not damage(f, deep=False)]
    for folder in folders(root):
        # Torn folders older than a complete one serve nobody; a complete one goes when `keep` newer ones are there.
        newer = [c for c in complete if _step_of(c) > _step_of(folder)]
        if len(newer) >= (keep if folder in complete else 1):
            shutil.rmtree(folder, ignore_errors=True)


def truncate_log(file: Path, images: int) -> None:
    """Drop the lines of a JSON-lines log that lie beyond `images`: the run goes on from a checkpoint there."""
    if not file.exists():
        return
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["images"] <= images:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the torn last line of a killed run
    storage.write_atomic(str(file), b"".join(kept))
