"""The frame that every part runs in: its time limit, what it found, a configuration and an engine."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.apart import GRACE_S, Apart
from benchmarks.gpu.models import CUDA

STARTED = time.monotonic()
STEPS, BATCH, DECAY, RATE, CLIP = 8, 8, 0.9, 1e-3, 0.5


class Report:
    """What was found, written after each part. A context: while a part works, the next one's process gets ready."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.file, self.ends = out / "gpu.json", STARTED + 60 * minutes
        self.found: dict[str, Any] = {"parts": {}}
        out.mkdir(parents=True, exist_ok=True)
        self._ready = Apart()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._ready.kill()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def result(self, name: str) -> dict[str, Any]:
        """Of a part that was run; nothing of one that was not, or failed."""
        found: dict[str, Any] = self.found["parts"].get(name, {}).get("result", {})
        return found

    def part(self, name: str, limit_s: float, work: Callable[[], Callable[[], Any]]) -> None:
        """Run a part in a process of its own, for so long at most. work: gives what that process is to do."""
        began = time.monotonic()
        entry: dict[str, Any] = {}
        if self.left < GRACE_S + min(limit_s, 20):
            entry["skipped"] = f"{self.left:.0f} s were left"
        else:
            try:
                task = work()
                with self._ready as apart:
                    self._ready = Apart()
                    apart.begin(task, min(limit_s, self.left - GRACE_S))
                    entry = apart.result(self.left)
            except (RuntimeError, OSError) as e:
                entry["failed"] = f"{type(e).__name__}: {e}"
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.found["parts"][name] = entry
        self.file.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")
        print(
            f"{name:24} {entry['seconds']:6.1f} s  {json.dumps(entry.get('result', entry), default=str)[:900]}",
            flush=True,
        )


def free() -> None:
    gc.collect()
    if CUDA:
        with contextlib.suppress(RuntimeError):
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def machine() -> dict[str, Any]:
    """What it is measured on."""
    import deepspeed
    import diffusers

    found = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "diffusers": diffusers.__version__}
    found |= {"python": sys.version.split()[0], "cpus": os.cpu_count()}
    if CUDA:
        free_, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(), "memory_gib": total / 2**30, "free_gib": free_ / 2**30}
    return found


def synchronised() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def ranks() -> Any:
    """This process as the only rank."""
    from train.ranks import join

    return join(None if CUDA else 1)


def config_of(**changes: Any) -> Any:
    from train.fit_config import FitConfig

    values = {"images": 10**9, "batch_size": BATCH, "eps": 1e-4, "grad_clip": CLIP, "learning_rate": RATE}
    return FitConfig.model_validate(values | {"warmup_images": 0, "schedule": "constant"} | changes)


def engine_of(objective: Any, **changes: Any) -> Any:
    from train.engine import Engine

    config = config_of(**changes)
    parts = changes.get("accumulation_", 1)
    return Engine(config, objective.to(ranks().device), ranks(), config.batch_size // parts, parts)
