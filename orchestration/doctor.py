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
from shards.settings import ConfigError, StageError

BLOCK = 8_000_000  # bytes written and read to see how fast a store is
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
    name = f".carrara-doctor{storage.TMP_MARK}{secrets.token_hex(6)}"
    url, problems = storage.join(run, name), []
    block = secrets.token_bytes(BLOCK)
    try:
        storage.probe(run)
        storage.create(url, b"first")
        if name not in storage.list_names(run):
            problems.append(f"{run}: a file that was just written is not in the listing")
        began = time.perf_counter()
        storage.write_atomic(url, block)
        up, began = time.perf_counter() - began, time.perf_counter()
        if storage.read_bytes(url) != block:
            problems.append(f"{run}: a file that was just replaced reads as something else")
        down = time.perf_counter() - began
        with storage.open_read(url) as f:
            f.seek(BLOCK // 2)
            if f.read(1000) != block[BLOCK // 2 :][:1000]:
                problems.append(f"{run}: a part of a file reads as something else")
        print(f"store        {run}: {BLOCK / up / 1e6:.0f} MB/s up, {BLOCK / down / 1e6:.0f} MB/s down, file by file")
    except ConfigError as e:
        problems.append(str(e))
    except Exception as e:
        problems.append(f"{run} cannot be worked on ({type(e).__name__}: {' '.join(str(e).split())[:300]})")
    finally:
        with contextlib.suppress(Exception):
            storage.remove(url)
    return problems
