"""Checkpoint folders: which there are, whether they are whole, and what their manifests say. No weights are read.

Apart from checkpoint.py, which reads and writes the weights, so that asking how far a fit has come needs no torch.
Folders are URLs: paths, or places on an object store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from shards import storage
from shards.fingerprint import digest_json
from shards.settings import StageError

log = logging.getLogger("carrara.train")

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (*MOMENTS, "ema")
POSTHOC = "posthoc"
CHUNK = 1 << 24
_NAME = re.compile(r"step-(\d{8,})")
# What this format, and the one before, put into a folder; nothing else in it is ever deleted.
_OURS = re.compile(
    r"rank-\d+-of-\d+-[0-9a-f]+\.safetensors|others-[0-9a-f]+\.safetensors|"
    r"(weights|exp_avg|exp_avg_sq|ema(_0\.\d{3})?)\.safetensors|manifest\.json"
)


def folder_name(step: int) -> str:
    """`1000` -> `step-00001000`."""
    return f"step-{step:08d}"


def folders(root: str | Path) -> list[str]:
    """Checkpoint folders, whole or not, newest first."""
    found = [storage.join(str(root), n) for n in storage.list_names(str(root)) if _NAME.fullmatch(n)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: str | Path) -> int:
    """The step of a checkpoint's folder."""
    match = _NAME.fullmatch(name_of(folder))
    assert match is not None, folder
    return int(match[1])


def name_of(folder: str | Path) -> str:
    """`.../step-00001000` -> `step-00001000`."""
    return str(folder).rstrip("/").rsplit("/", 1)[-1]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises StageError where there is none or it is not one."""
    try:
        found = storage.read_json(storage.join(str(folder), MANIFEST))
    except (ValueError, NotADirectoryError):
        found = None
    manifest: dict[str, Any] = found if isinstance(found, dict) else {}
    if manifest.get("format_version") not in (1, FORMAT_VERSION) or not isinstance(manifest.get("files"), dict):
        raise StageError(f"{folder}: not a checkpoint, or of another format: its {MANIFEST} is absent or unreadable")
    return manifest


def damage(folder: str | Path, contents: bool = True) -> str:
    """What is wrong with a checkpoint, as one sentence; empty where it is complete. contents: hash the files."""
    try:
        manifest = read_manifest(folder)
    except StageError as e:
        return str(e)
    return damage_of(folder, manifest["files"].items(), contents)


def damage_of(folder: str | Path, files: Iterable[tuple[str, dict[str, Any]]], contents: bool = True) -> str:
    """As `damage`, of some of a manifest's files."""
    for name, expected in files:
        url = storage.join(str(folder), name)
        if "/" in name or not isinstance(expected, dict):
            return f"{folder}: its {MANIFEST} names '{name}', which is no file of a checkpoint"
        size = storage.size(url)
        if size != expected.get("size"):
            there = "is absent" if size is None else f"has {size} bytes"
            return f"{url} {there} where the manifest says {expected.get('size')} bytes"
        if contents and digest(url) != expected.get("sha256"):
            return f"{url} does not have the sha256 that the manifest says"
    return ""


def digest(url: str) -> str:
    """sha256 of a file, streamed, as lower-case hex."""
    found = hashlib.sha256()
    with storage.open_read(url) as f:
        while part := f.read(CHUNK):
            found.update(part)
    return found.hexdigest()


def states(manifest: dict[str, Any]) -> set[str]:
    """Which states a checkpoint has, by its manifest: weights, exp_avg, ema, ..."""
    if manifest["format_version"] == 1:
        return {f.removesuffix(".safetensors") for f in manifest["files"]}
    return {array.partition(".")[2] for f in manifest["files"].values() for array in f.get("arrays", ())}


def weights_digest(manifest: dict[str, Any], state: str) -> str:
    """A digest of what a state of a checkpoint was read from, by its manifest; no weights are read."""
    files = manifest["files"]
    if manifest["format_version"] == 1:
        return str(files[f"{state}.safetensors"]["sha256"])
    return digest_json([state, sorted(f["sha256"] for f in files.values())])


def latest_complete(root: str | Path, contents: bool = True) -> str | None:
    """The newest checkpoint under `root` that is complete; torn ones are skipped with a line in the log."""
    for folder in folders(root):
        fault = damage(folder, contents)
        if not fault:
            return folder
        log.warning("the checkpoint %s is skipped: %s", name_of(folder), fault)
    return None


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay. newest: how many; hours: those younger than this too; every_images: for ever, the
    first at or after each multiple of it. `delete_old` is also told of single ones by name."""

    newest: int
    hours: float | None = None
    every_images: int | None = None


def delete_old(root: str | Path, keep: Keep, named: Iterable[str | None] = ()) -> None:
    """Delete what need not be kept. The newest complete checkpoint, the newest whose last step was taken (a rollback
    goes to it) with the one that it calls the best, and those `named` stay in any case."""
    everything = folders(root)
    complete = [f for f in everything if not damage(f, contents=False)]
    names = set(named)
    for folder in complete:
        manifest = read_manifest(folder)
        if not vetoed(manifest):
            names |= {name_of(folder), manifest.get("best")}
            break
    stay = set(complete[: max(keep.newest, 1)]) | {f for f in complete if name_of(f) in names}
    if keep.hours is not None:
        since = time.time() - 3600 * keep.hours
        stay |= {f for f in complete if _written(f) >= since}
    if keep.every_images is not None:
        before = 0
        for folder in reversed(complete):
            images = int(read_manifest(folder).get("images", 0))
            if images // keep.every_images > before // keep.every_images:
                stay.add(folder)
            before = images
    for folder in everything:
        # A torn one that is older than a complete one serves nobody; a newer one is left for a look.
        newer_and_torn = folder not in complete and not any(step_of(c) > step_of(folder) for c in complete)
        if folder not in stay and not newer_and_torn:
            delete(folder)


def vetoed(manifest: dict[str, Any]) -> bool:
    """Whether the last step before a checkpoint, of either format, was vetoed."""
    return bool((manifest.get("run") or manifest.get("guard") or {}).get("in_a_row"))


def delete(folder: str | Path, but: Iterable[str] = ()) -> None:
    """Delete a checkpoint's files, the manifest first, so that what is left of it counts for nothing.

    but: names of files that stay. What Carrara did not put there stays too, and the folder with it.
    """
    stay = set(but)
    names = [n for n in storage.list_names(str(folder)) if _OURS.fullmatch(n) and n not in stay]
    for name in sorted(names, key=lambda n: n != MANIFEST):
        storage.remove(storage.join(str(folder), name))
    if not stay and storage.is_local(str(folder)):
        with_others = storage.list_names(str(folder))
        if not with_others:
            storage.local_path(str(folder)).rmdir()


def _written(folder: str) -> float:
    """When a checkpoint was committed, in seconds since 1970."""
    url = storage.join(folder, MANIFEST)
    if storage.is_local(url):
        return storage.local_path(url).stat().st_mtime
    fs, path = url_to_fs(url)
    return float(fs.modified(path).timestamp())


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
