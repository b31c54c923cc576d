"""The frame of the GPU's benchmark: a part's process ends with its time, with all that it started."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import apart
from benchmarks.gpu.apart import Apart


def nothing() -> None:
    """There is nothing to import."""


def done(work: Any, limit_s: float = 60.0) -> dict[str, Any]:
    with Apart(nothing) as process:
        process.begin(work, limit_s)
        return process.result()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def part_way() -> None:
    error = ValueError("too large")
    error.partial = {"batch_2": 1.0}  # type: ignore[attr-defined]
    raise error


def test_what_a_part_gives_and_how_it_failed() -> None:
    assert done(functools.partial(divmod, 7, 2)) == {"result": (3, 1)}
    found = done(part_way)
    assert (found["failed"], found["partial"]) == ("ValueError: too large", {"batch_2": 1.0})
    assert found["where"][-1].endswith("part_way")
    assert done(functools.partial(os._exit, 3)) == {"failed": "its process ended with code 3"}


def deaf(file: Path) -> None:
    """Works on whatever rings, as a compiler does, and has started another process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    other = subprocess.Popen(["sleep", "600"])
    file.write_text(f"{os.getpid()} {other.pid}")
    time.sleep(600)


def test_a_part_that_no_limit_reaches_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "GRACE_S", 2.0)
    began = time.monotonic()
    found = done(functools.partial(deaf, tmp_path / "pids"), 1.0)
    assert "did not end within 3 s" in found["failed"]
    assert time.monotonic() - began < 60
    pids = [int(x) for x in (tmp_path / "pids").read_text().split()]
    time.sleep(0.5)
    assert not [p for p in pids if alive(p)]


def test_a_limit_ends_what_can_be_ended() -> None:
    assert done(functools.partial(time.sleep, 600), 0.5)["failed"] == "TimeoutError: took longer than 0.5 s"
