"""What rank 0 tells while training: JSON lines, TensorBoard, the bar and the status file.

log.jsonl      one line an interval: images, step, loss, loss_by_timestep, lr, grad_norm, samples_per_s, data_wait,
               tflops, mfu, memory_gib, skipped
events.jsonl   what a person should look at: skipped steps with their samples' keys, rollbacks, validations
tensorboard/   the same, and the grids of samples
samples/       the grids as files
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.progress import Progress
from train import folders
from train.config import FitConfig
from train.flops import peak_flops
from train.ranks import Ranks

log = logging.getLogger("carrara.train")


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether the step that ends at `images` passed a multiple of `every`."""
    return images // every > (images - batch) // every


class Journal:
    """Silent on ranks other than 0. A resumed run first drops the lines that lie beyond its checkpoint, so each
    number of images is there once.

    figures: names of what `step` gets by sum over micro-steps; bins: how many bins of loss by timestep follow them.
    flops: of one image.
    """

    def __init__(
        self, stage: str, config: FitConfig, logs: Path, status_url: str, ranks: Ranks, images: int, flops: float,
        figures: tuple[str, ...], bins: int,
    ) -> None:  # fmt: skip
        self.config, self.ranks, self.flops, self.figures, self.bins = config, ranks, flops, figures, bins
        self.logs, self.file, self.events = logs, logs / "log.jsonl", logs / "events.jsonl"
        self.peak = peak_flops(ranks.device, config.precision)
        self._writer: Any = None
        self._sums = np.zeros(len(figures) + 2 * bins)
        self._steps = self._skipped = 0
        self._images = images
        self._waited = self._paused = 0.0
        self._began = time.perf_counter()
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            logs.mkdir(parents=True, exist_ok=True)
            for file in (self.file, self.events):
                folders.truncate_log(file, images)
            self._writer = SummaryWriter(str(logs / "tensorboard"), purge_step=images if images else None)
            self.progress = Progress(stage, config.images, "images", status_url, done=images)

    def step(
        self, images: int, step: int, rate: float, norm: float | None, values: list[float], waited: float, skipped: bool
    ) -> None:
        """Count one step; writes a line when a multiple of log_every_images is passed, and at the end.

        values: the figures' means over the global batch, then the bins' sums and shares. A skipped step counts in the
        rates, not in the figures.
        """
        if skipped:
            self._skipped += 1
        else:
            self._steps += 1
            self._sums += values
        if not self.ranks.first:
            return
        batch = self.config.batch_size
        self.progress.update(batch, **({} if skipped else {"loss": values[0]}))
        if crossed(images, batch, self.config.log_every_images) or images >= self.config.images:
            self._line(images, step, rate, norm, waited)

    def _line(self, images: int, step: int, rate: float, norm: float | None, waited: float) -> None:
        now = time.perf_counter()
        seconds = max(now - self._began - self._paused, 1e-9)
        speed = (images - self._images) / seconds
        line: dict[str, Any] = {"images": images, "step": step}
        n = len(self.figures)
        if self._steps:  # no skipped step has figures
            line |= dict(zip(self.figures, (self._sums[:n] / self._steps).tolist(), strict=True))
        if self.bins:
            sums, shares = self._sums[n : n + self.bins], self._sums[n + self.bins :]
            line["loss_by_timestep"] = [float(s / c) if c else None for s, c in zip(sums, shares, strict=True)]
        line |= {"lr": rate, "grad_norm": norm, "samples_per_s": speed, "skipped": self._skipped}
        line |= {"data_wait": (waited - self._waited) / seconds, "tflops": self.flops * speed / 1e12}
        if self.peak:
            line["mfu"] = self.flops * speed / (self.peak * self.ranks.world)
        if self.ranks.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        _append(self.file, line)
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "images" and math.isfinite(value):
                self._writer.add_scalar(name, value, images)
        for i, value in enumerate(line.get("loss_by_timestep", [])):
            if value is not None:
                self._writer.add_scalar(f"loss_by_timestep/{i}", value, images)
        self._writer.flush()
        self.progress.update(0, lr=rate, samples_per_s=speed)
        self._sums[:] = 0
        self._steps = self._skipped = 0
        self._images, self._began, self._waited, self._paused = images, now, waited, 0.0

    def event(self, images: int, kind: str, **facts: Any) -> None:
        """One line of events.jsonl, and of the log where a person watches."""
        if not self.ranks.first:
            return
        _append(self.events, {"images": images, "kind": kind, **facts})
        for name, value in facts.items():
            if isinstance(value, float) and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, images)

    def grid(self, images: int, pictures: np.ndarray) -> None:
        """A grid of samples, uint8 [H,W,3], on rank 0."""
        from PIL import Image

        folder = self.logs / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pictures).save(folder / f"{images:012d}.png")
        self._writer.add_image("samples", pictures, images, dataformats="HWC")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose seconds do not count as training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def close(self, state: str) -> None:
        """End the bar with a state: done, failed or stopped."""
        if self.ranks.first:
            self._writer.close()
            self.progress.close(state)


def _append(file: Path, line: dict[str, Any]) -> None:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    with open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(finite) + "\n")
