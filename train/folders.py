"""Checkpoint folders: which there are, whether they are whole, and what their manifests say. No weights are read.

Apart from checkpoint.py, which reads and writes the weights, so that asking how far a fit has come needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

from shards import storage
from shards.fingerprint import digest_file
from shards.settings import StageError

log = logging.getLogger("carrara.train")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (*MOMENTS, "ema")
POSTHOC = "posthoc"
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
    for name in sorted({*files, *(f"{n}.safetensors" for n in ("weights", *STATES))}):
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


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay. newest: how many; hours: those younger than this too; every_images: for ever, the
    first at or after each multiple of it."""

    newest: int
    hours: float | None = None
    every_images: int | None = None


def delete_old(root: Path, keep: Keep) -> None:
    """Delete what need not be kept; the newest complete checkpoint stays in any case."""
    everything = folders(root)
    complete = [f for f in everything if not damage(f, deep=False)]
    stay = set(complete[: keep.newest])
    if keep.hours is not None:
        since = time.time() - 3600 * keep.hours
        stay |= {f for f in complete if (f / MANIFEST).stat().st_mtime >= since}
    if keep.every_images is not None:
        before = 0
        for folder in reversed(complete):
            images = int(read_manifest(folder).get("images", 0))
            if images // keep.every_images > before // keep.every_images:
                stay.add(folder)
            before = images
    for folder in everything:
        # A torn one that is older than a complete one serves nobody; a newer one is left for a look.
        newer_and_torn = folder not in complete and not any(_step_of(c) > _step_of(folder) for c in complete)
        if folder not in stay and not newer_and_torn:
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
