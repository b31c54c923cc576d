"""The bar that a person sees on long work, and the status file that `carrara status` reads.

On a terminal it is tqdm's bar, drawn in place; in a log (a Ray job's, say) it is a plain line every few
seconds. `<run>/status/<stage>.json` says the same to other processes, also when the cluster is gone. It is
written by a thread of its own, so that the work never waits for a store, and a write that fails is one line in
the log and nothing else: the work does not hang on it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from shards import storage

log = logging.getLogger("carrara")

LINE_EVERY_S = 5.0
STATUS_EVERY_S = 1.0
STATUS_AT_LEAST_EVERY_S = 10.0  # also where nothing has changed: a long step is no silence
LAST_TRIES = 5  # of the record that says how it ended, with growing pauses


class Progress:
    """Progress of one stage. total and counts are in `unit`s; keyword figures are shown beside the bar.

    total: 0 where it is not known. done: what an earlier run has already finished; it counts towards the bar, not
    towards the rate. state: what is being done: planning, running, finishing.
    """

    def __init__(
        self, stage: str, total: int, unit: str, status_url: str | None = None, done: int = 0, state: str = "running"
    ) -> None:
        self.stage, self.status_url = stage, status_url
        self.figures: dict[str, Any] = {}
        self._started = time.time()
        self._bar: tqdm[Any] | None = None
        self.unit = unit
        self._changed, self._closed = threading.Event(), threading.Event()
        self._complained = False
        self._work_rate: float | None = None  # of the running phase, once it is over
        self.state = ""
        self._writer: threading.Thread | None = None
        self.begin(state, total, unit, done)
        if status_url:
            self._writer = threading.Thread(target=self._write_on, name="status", daemon=True)
            self._writer.start()

    def begin(self, state: str, total: int = 0, unit: str | None = None, done: int = 0) -> None:
        """What is done from now on, with a bar of its own; an ended bar stays in sight."""
        self._end_bar()
        if self.state == "running":
            self._work_rate = self.rate
        self.state, self.total, self.unit = state, total, unit or self.unit
        self.done = self._start_done = done
        self._clock = time.monotonic()
        self._line_at = -1e9
        if sys.stderr.isatty():
            title = self.stage if state == "running" else f"{self.stage}, {state}"
            self._bar = tqdm(
                total=total or None, initial=done, desc=title, unit=f" {self.unit}", dynamic_ncols=True, smoothing=0.1
            )
        self._report()

    @property
    def rate(self) -> float:
        """Units a second since this state began; at the end, of the running phase: looking through what is done for the
        manifest, or for what is left to do, is many times quicker than the work was."""
        if self._closed.is_set():
            return self._work_rate or 0.0
        return (self.done - self._start_done) / max(time.monotonic() - self._clock, 1e-9)

    def update(self, n: int = 1, **figures: Any) -> None:
        """Count `n` more units; figures (numbers or short strings) replace those of the same name."""
        self.done += n
        self.figures.update(figures)
        if self._bar is not None:
            self._bar.set_postfix(self._shown(), refresh=False)
            self._bar.update(n)
        self._report()

    def close(self, state: str = "done", **figures: Any) -> None:
        """End the bar; state is done, failed or stopped. The last record is written before this returns, if it can."""
        self.figures.update(figures)
        self._end_bar()
        if self.state == "running":
            self._work_rate = self.rate
        self.state, self._line_at = state, -1e9
        self._closed.set()
        self._report()
        if self._writer is None:
            return
        self._writer.join(STATUS_AT_LEAST_EVERY_S)
        for attempt in range(LAST_TRIES):
            if self._write():
                return
            time.sleep(0.1 * 2**attempt)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _shown(self) -> dict[str, str]:
        return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in self.figures.items()}

    def _report(self) -> None:
        self._changed.set()
        now = time.monotonic()
        if self._bar is None and not sys.stderr.isatty() and now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            postfix = ", ".join(f"{k}={v}" for k, v in self._shown().items())
            line = tqdm.format_meter(
                self.done,
                self.total,  # 0: not known
                now - self._clock,
                ncols=None if not self.total else 110,
                prefix=self.stage if self.state == "running" else f"{self.stage}, {self.state}",
                unit=f" {self.unit}",
                initial=self._start_done,
                rate=self.rate if self._closed.is_set() else None,
                postfix=postfix or None,
            )
            print(line, file=sys.stderr, flush=True)

    def _write_on(self) -> None:
        while not self._closed.is_set():
            self._changed.wait(STATUS_AT_LEAST_EVERY_S)
            if self._closed.is_set():
                return
            self._changed.clear()
            self._write()
            self._closed.wait(STATUS_EVERY_S)

    def _write(self) -> bool:
        try:
            storage.write_json(str(self.status_url), self._record())
        except Exception as e:  # whatever a store may raise: the shards are what counts
            if not self._complained:
                self._complained = True
                log.warning("%s: its status cannot be written: %s: %s", self.stage, type(e).__name__, e)
            return False
        return True

    def _record(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        with contextlib.suppress(RuntimeError):  # changed at this very moment; the next record has them
            figures = {k: v for k, v in self.figures.items() if _fits_json(v)}
        rate, done, total, state = self.rate, self.done, self.total, self.state
        left = (total - done) / rate if rate > 0 and total else None
        return {
            "stage": self.stage,
            "state": state,
            "done": done,
            "total": total,
            "unit": self.unit,
            "rate": round(rate, 3),
            "seconds_left": None if left is None or self._closed.is_set() else round(left, 1),
            "began": self._started,
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "figures": figures,
        }


def _fits_json(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (int, float)) and math.isfinite(value))  # JSON has no infinity
