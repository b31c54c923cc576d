"""One Ray head of our own for all tests that need one: started by the first, stopped when pytest ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestration.cluster import Cluster, _marked
from orchestration.run_stage import main

ROOT = Path(__file__).resolve().parents[2]


def head() -> Cluster:
    """It. Fails once, with what Ray said, where it has ended by itself; who comes next gets a new one."""
    cluster = _started()
    if cluster._head is not None and cluster._head.poll() is not None:
        said = (cluster._folder / "head.log").read_text(errors="replace") if cluster._folder else ""
        code = cluster._head.returncode
        cluster.stop()
        _started.cache_clear()
        raise AssertionError(f"the Ray head has ended by itself with {code}; it said: {said[-2000:]}")
    return cluster


@functools.cache
def _started() -> Cluster:
    cluster = Cluster(cpus=2, cwd=ROOT)
    cluster.__enter__()
    atexit.register(cluster.stop)
    return cluster


def start(*arguments: object, on_ray: bool = True) -> subprocess.Popen[str]:
    """`python -m tests.orchestration.drive ARGUMENTS` as a process; its stderr is a pipe."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if on_ray:
        cluster = head()
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "tests.orchestration.drive", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def drive(*arguments: object, on_ray: bool = True) -> tuple[int, str]:
    """The same to its end: (exit code, stderr)."""
    process = start(*arguments, on_ray=on_ray)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset but the stats, which hold times, and `made_with.json`, which holds an id."""
    names = (p for p in sorted(folder.iterdir()) if p.is_file())
    return {p.name: p.read_bytes() for p in names if not p.name.endswith(("_stats.json", "made_with.json"))}


def actors(title: str) -> set[int]:
    """Process ids of the head's own actors that Ray calls `ray::TITLE...`; other tests may have a head beside it."""
    found = set()
    for process in _marked(head().id):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith(f"ray::{title}"):
                found.add(process.pid)
    return found


def run_stage(stage: str, config: Path, *words: str) -> subprocess.Popen[str]:
    """`run_stage.py STAGE --config CONFIG WORDS` on the head, as a process; its stderr is a pipe."""
    cluster = head()
    env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    arguments = [sys.executable, "orchestration/run_stage.py", stage, "--config", str(config), *words]
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_here(stage: str, config: Path, *words: str) -> None:
    """`run_stage.py STAGE --config CONFIG --local WORDS` in this process, which has imported already what it takes."""
    assert main([stage, "--config", str(config), "--local", *words]) == 0


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it said on stderr, once it has ended with this exit code."""
    _, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, while the process lives."""
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
