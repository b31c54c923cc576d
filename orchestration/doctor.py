"""`carrara doctor`: what is installed, what the machine has, and the traps that are known."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards import storage
from shards.local import TMP_MARK
from shards.settings import ConfigError, StageError

BLOCK = 8_000_000  # bytes written and read to see how fast a store is
CLOCK_S = 300.0  # how far the clocks of a store and of this machine may be apart
PACKAGES = ("ray", "torch", "deepspeed", "diffusers", "open_clip_torch", "transformers", "webdataset")


def examine(config_path: str | None = None, overrides: Sequence[str] = (), run: str | None = None) -> None:
    """Print what was found; raises StageError where something is in the way. run: a store to prove in place of the
    configuration's."""
    problems: list[str] = []
    print(f"python       {platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        try:
            print(f"{name:12} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:12} missing")
            problems.append(f"{name} is not installed")
    print(f"cpus         {len(os.sched_getaffinity(0))}")
    print(f"accelerators {_accelerators()}")
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    print(f"/dev/shm     {shm / 1e9:.1f} GB free")
    if shm < 200_000_000:
        problems.append("/dev/shm has less than 0.2 GB, where Ray keeps its object store; give the container more")
    problems += _authentication()
    problems += _store(run) if run is not None else _configured(config_path, overrides)
    if problems:
        raise StageError("; ".join(problems))
    print("nothing is in the way")


def _accelerators() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "none; everything runs on the CPU"


def _authentication() -> list[str]:
    """Ray's head, submitter and drivers must agree on RAY_AUTH_MODE; a token file changes what a head starts with."""
    mode = os.environ.get("RAY_AUTH_MODE")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    there = "there" if file.exists() else "absent"
    print(f"ray tokens   RAY_AUTH_MODE is {mode or 'unset'}, the token file {file} is {there}")
    token = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.exists()
    if mode == "token" and not token:
        return ["RAY_AUTH_MODE is token, but there is neither RAY_AUTH_TOKEN nor a token file"]
    if mode is None and token:
        return [
            "a Ray token is there but RAY_AUTH_MODE is unset: a head started now asks for the token, and `ray job "
            "submit` does not send it; export RAY_AUTH_MODE=token for the head, the submitter and the drivers alike"
        ]
    if mode is None:
        print("             a head started with `ray start` here lets anybody in who can reach it;")
        print("             `ray get-auth-token --generate` and RAY_AUTH_MODE=token close it")
    return []


def _configured(config_path: str | None, overrides: Sequence[str]) -> list[str]:
    from orchestration.config import base_folder, find_config, load

    base, why = base_folder()
    try:
        config = load(find_config(config_path, base), overrides, base, tables=False)
    except ConfigError as e:
        if overrides:
            raise
        print(f"run          no configuration looked at ({e})")
        return [str(e)] if config_path else []
    print(f"run          {config.run} (relative paths are from {base}, {why})")
    return _store(config.run)


def _store(run: str) -> list[str]:
    """Each operation that Carrara needs of a store, done there: what does not hold is named. Leaves nothing behind."""
    name = f".carrara-doctor{TMP_MARK}{secrets.token_hex(6)}"
    url, problems = storage.join(run, name), []
    block = secrets.token_bytes(BLOCK)
    print(f"store        {run}")

    def proved(what: str, holds: bool, otherwise: str) -> None:
        print(f"             {what}: {'yes' if holds else 'NO'}")
        if not holds:
            problems.append(f"{run}: {otherwise}")

    try:
        storage.probe(run)
        proved(
            "creates a file only if there is none of its name",
            storage.create(url, b"first"),
            "a name that was never used is said to be there already",
        )
        proved(
            "lists a file once it is written",
            name in storage.list_names(run),
            "a file that was just written is not in the listing; shards would seem to be missing",
        )
        before = time.time()
        began = time.perf_counter()
        storage.write_atomic(url, block)
        up, after = time.perf_counter() - began, time.time()
        began = time.perf_counter()
        whole = storage.read_bytes(url)
        down = time.perf_counter() - began
        proved("replaces a file as a whole", whole == block, "a file that was just replaced reads as something else")
        ranges = [(0, 1), (BLOCK // 2, BLOCK // 2 + 1000), (BLOCK - 7, BLOCK)]
        proved(
            "reads parts of a file",
            storage.read_ranges(url, ranges) == [block[a:b] for a, b in ranges],
            "a part of a file reads as something else; latents are read in parts",
        )
        written = storage.written_at(url)
        storage.remove(url)
        proved(
            "forgets a file that was removed",
            storage.size(url) is None and name not in storage.list_names(run),
            "a file that was removed is still there",
        )
        print(f"             one file at a time: {BLOCK / up / 1e6:.0f} MB/s up, {BLOCK / down / 1e6:.0f} MB/s down")
        problems += [f"{run}: {problem}" for problem in _clock(written, before, after)]
    except ConfigError as e:
        problems.append(str(e))
    except Exception as e:
        problems.append(f"{run} cannot be worked on ({type(e).__name__}: {' '.join(str(e).split())[:300]})")
    finally:
        with contextlib.suppress(Exception):
            storage.remove(url)
    return problems


def _clock(written: float | None, before: float, after: float) -> list[str]:
    """How far the store's clock is from this machine's: a file was written between two of this machine's moments."""
    if written is None:
        print("             clock: this store does not tell when a file was written")
        return []
    skew = 0.0 if before - 1 <= written <= after + 1 else written - (before + after) / 2  # stores tell whole seconds
    print(f"             clock: {abs(skew):.0f} s {'behind' if skew < 0 else 'ahead of'} this machine's")
    if abs(skew) <= CLOCK_S:
        return []
    return [
        f"its clock is {abs(skew):.0f} s {'behind' if skew < 0 else 'ahead of'} this machine's; signed requests are "
        "refused from a quarter of an hour on, and what dead processes left is told by its age: set the clock (NTP)"
    ]
