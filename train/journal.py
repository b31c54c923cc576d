"""What rank 0 tells while training: JSON lines, the trackers (trackers.py), the bar and the status file.

log.jsonl      one line an interval: images, step, loss, loss_by_timestep, lr, grad_norm, samples_per_s, data_wait,
               tflops, mfu, memory_gib, skipped
events.jsonl   what a person should look at: skipped steps with their samples' keys, rollbacks, validations
tensorboard/   the same, and the grids of samples, as for any other tracker
samples/       the grids as files

All of it is written by a thread: the loop never waits for a disk. A run on an object store is told of in a temporary
folder that the thread copies there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shards import storage
from shards.progress import Progress
from train import folders
from train.plan import peak_flops
from train.ranks import Stopped
from train.run import Run, StepResult, crossed
from train.trackers import STATE, Trackers, append_whole

if TYPE_CHECKING:
    from train.guard import Guard
    from train.job import Job
    from train.objective import Objective
    from train.ranks import Ranks

log = logging.getLogger("carrara.train")

MIRROR_EVERY_S = 10.0


class Journal:
    """Silent on ranks other than 0. A resumed run first drops the lines that lie beyond its checkpoint, so each
    number of images is there once. images: where the run stands. precision: of its arithmetic. flops: of an image.
    A context, whose end says how it ended."""

    def __init__(self, job: Job, ranks: Ranks, objective: Objective, images: int, precision: str, flops: float) -> None:
        self.job, self.config, self.ranks = job, job.config, ranks
        self.figures, self.bins = ("loss", *objective.figures), objective.bins
        self.flops, self.peak = flops, peak_flops(ranks.device, precision)
        self.events = storage.join(job.logs, "events.jsonl")
        self._sums = np.zeros(len(self.figures) + 2 * self.bins)
        self._steps = self._skipped = 0
        self._images = images
        self._waited = self._paused = 0.0
        self._began = time.perf_counter()
        self._writer: _Writer | None = _Writer(job, images) if ranks.first else None

    def __enter__(self) -> Journal:
        for note in self.job.notes:
            self.event(self._images, "order", note=note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("done" if kind is None else "stopped" if issubclass(kind, Stopped) else "failed")

    def step(self, result: StepResult, waited: float) -> None:
        """Count one step; gives a line when a multiple of log_every_images is passed, and at the end.

        A skipped step counts in the rates, not in the figures. waited: seconds that the loop waited for data, in all.
        """
        if result.applied:
            self._steps += 1
            self._sums += result.figures
        else:
            self._skipped += 1
        if self._writer is None:
            return
        batch = self.config.batch_size
        self._writer.progress(batch, {"loss": result.figures[0]} if result.applied else {})
        if crossed(result.images, batch, self.config.log_every_images) or result.images >= self.config.images:
            self._line(result, waited)

    def _line(self, result: StepResult, waited: float) -> None:
        now = time.perf_counter()
        seconds = max(now - self._began - self._paused, 1e-9)
        speed = (result.images - self._images) / seconds
        line: dict[str, Any] = {"images": result.images, "step": result.step}
        n = len(self.figures)
        if self._steps:  # no skipped step has figures
            line |= dict(zip(self.figures, (self._sums[:n] / self._steps).tolist(), strict=True))
        if self.bins:
            sums, shares = self._sums[n : n + self.bins], self._sums[n + self.bins :]
            line["loss_by_timestep"] = [float(s / c) if c else None for s, c in zip(sums, shares, strict=True)]
        line |= {"lr": result.rate, "grad_norm": result.norm, "samples_per_s": speed, "skipped": self._skipped}
        line |= {"data_wait": (waited - self._waited) / seconds, "tflops": self.flops * speed / 1e12}
        if self.peak:
            line["mfu"] = self.flops * speed / (self.peak * self.ranks.world)
        if self.ranks.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        assert self._writer is not None
        self._writer.line(line)
        self._sums[:] = 0
        self._steps = self._skipped = 0
        self._images, self._began, self._waited, self._paused = result.images, now, waited, 0.0

    def skipped(self, result: StepResult, run: Run, guard: Guard, objective: Objective) -> None:
        """Say which samples a step that was not taken saw, and why it was not."""
        if self._writer is None:
            return
        from train.job import keys_at

        begin, loss = result.images - self.config.batch_size, result.figures[0]
        reason = guard.reason(loss, result.norm)
        keys = keys_at(objective, self.config, begin)
        facts = {"reason": reason, "loss": loss, "grad_norm": result.norm, "in_a_row": run.in_a_row, "keys": keys}
        self.event(result.images, "skipped", **facts)
        log.warning(
            "%s: the step at %d images is skipped: %s; its samples' keys are in %s",
            self.job.stage,
            begin,
            reason,
            self.events,
        )

    def event(self, images: int, kind: str, **facts: Any) -> None:
        """One line of events.jsonl; the trackers get what is a number."""
        if self._writer is not None:
            self._writer.event(images, kind, facts)

    def grid(self, images: int, pixels: np.ndarray | None) -> None:
        """A grid of samples, uint8 [H,W,3], on rank 0; nothing where there is none."""
        if self._writer is not None and pixels is not None:
            self._writer.grid(images, pixels)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose seconds do not count as training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    @contextlib.contextmanager
    def saving(self, images: int) -> Iterator[None]:
        """The same around a checkpoint; how long the loop stood still for it is told."""
        began = time.perf_counter()
        with self.pause():
            yield
        if self._writer is not None:
            self._writer.figures(images, {"checkpoint/seconds": time.perf_counter() - began})

    def close(self, state: str) -> None:
        """End the bar with a state: done, failed or stopped."""
        if self._writer is not None:
            self._writer.close(state)


class _Writer:
    """The thread of rank 0 that writes; each method gives it something to do and returns at once."""

    def __init__(self, job: Job, images: int) -> None:
        self._remote = None if storage.is_local(job.logs) else job.logs
        self.folder = Path(tempfile.mkdtemp()) if self._remote else storage.local_path(job.logs)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._copied: dict[str, tuple[int, int]] = {}
        self._mirrored = 0.0
        for name in ("log.jsonl", "events.jsonl"):
            if self._remote:
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name).write_bytes(storage.read_bytes(storage.join(self._remote, name)))
            folders.truncate_log(self.folder / name, images)
        settings = {**job.config.model_dump(mode="json"), "seed": job.seed}
        run, state = job.status_url.rsplit("/", 2)[0], storage.join(job.logs, STATE)
        self._tell = job.tell or (lambda _: None)
        self._trackers = Trackers(job.config.trackers, self.folder, state, images, run, job.stage, settings)
        self._progress = Progress(job.stage, job.config.images, "images", job.status_url, done=images)
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        failed = False
        while (work := self._todo.get()) is not None:
            try:
                work()
                if self._remote and time.monotonic() - self._mirrored > MIRROR_EVERY_S:
                    self._mirror()
            except Exception as e:  # what is told must not end what is done
                if not failed:
                    log.warning("the log of the training cannot be written: %s", e)
                failed = True

    def progress(self, images: int, figures: dict[str, float]) -> None:
        """The bar, and the status file."""
        self._todo.put(lambda: self._progress.update(images, **figures))

    def line(self, line: dict[str, Any]) -> None:
        """A line of the log."""

        def write() -> None:
            _append(self.folder / "log.jsonl", line)
            images = line["images"]
            by_timestep = {f"loss_by_timestep/{i}": v for i, v in enumerate(line.get("loss_by_timestep", []))}
            self._trackers.scalars("line", images, {k: v for k, v in line.items() if k != "images"} | by_timestep)
            self._tell(line)
            self._progress.update(0, lr=line["lr"], samples_per_s=line["samples_per_s"])

        self._todo.put(write)

    def figures(self, images: int, values: dict[str, float]) -> None:
        """What is no line of the log, for the trackers and whoever listens."""

        def write() -> None:
            self._trackers.scalars(min(values), images, values)
            self._tell(values)

        self._todo.put(write)

    def event(self, images: int, kind: str, facts: dict[str, Any]) -> None:
        """A line of the events."""

        def write() -> None:
            _append(self.folder / "events.jsonl", {"images": images, "kind": kind, **facts})
            self._trackers.scalars(kind, images, {f"{kind}/{k}": v for k, v in facts.items() if isinstance(v, float)})

        self._todo.put(write)

    def grid(self, images: int, pixels: np.ndarray) -> None:
        """A grid of samples, uint8 [H,W,3]."""

        def write() -> None:
            from PIL import Image

            folder = self.folder / "samples"
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{images:012d}.png")
            self._trackers.image("samples", images, pixels)

        self._todo.put(write)

    def _mirror(self) -> None:
        """Copy to the object store what changed."""
        assert self._remote is not None
        self._mirrored = time.monotonic()
        for file in (f for f in self.folder.rglob("*") if f.is_file()):
            with contextlib.suppress(FileNotFoundError):  # a tracker's own temporary file
                name, info = file.relative_to(self.folder).as_posix(), file.stat()
                if self._copied.get(name) != (mark := (info.st_size, info.st_mtime_ns)):
                    storage.write_atomic(storage.join(self._remote, name), file.read_bytes())
                    self._copied[name] = mark

    def close(self, state: str) -> None:
        """Write what is left, and end."""
        self._todo.put(self._trackers.close)
        self._todo.put(lambda: self._progress.close(state))
        self._todo.put(None)
        self._thread.join()
        if self._remote:
            try:
                self._mirror()
            except Exception as e:  # whatever a store may raise: the fit is what counts
                log.warning("the log of the training is left in %s: %s", self.folder, e)
                return
            shutil.rmtree(self.folder, ignore_errors=True)


def _append(file: Path, line: dict[str, Any]) -> None:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    append_whole(file, (json.dumps(finite) + "\n").encode())
