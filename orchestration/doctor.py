"""`carrara doctor`: what is installed, what the machine has, and the traps that are known."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from shards import storage
from shards.settings import ConfigError, StageError

PACKAGES = ("ray", "torch", "deepspeed", "diffusers", "open_clip_torch", "transformers", "webdataset")


def examine(config_path: str | None = None) -> None:
    """Print what was found; raises StageError where something is in the way."""
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
    problems += _writable(config_path)
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


def _writable(config_path: str | None) -> list[str]:
    from orchestration.config import base_folder, find_config, load

    base, why = base_folder()
    try:
        config = load(find_config(config_path, base), (), base, tables=False)
    except ConfigError as e:
        print(f"run          no configuration looked at ({e})")
        return [str(e)] if config_path else []
    print(f"run          {config.run} (relative paths are from {base}, {why})")
    try:
        storage.probe(config.run)
    except ConfigError as e:
        return [str(e)]
    return []
