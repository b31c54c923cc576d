"""The bar that a person sees on long work, and the status file that `carrara status` reads.

On a terminal it is tqdm's bar, drawn in place; in a log (a Ray job's, say) it is a plain line every few
seconds. `<run>/status/<stage>.json` says the same to other processes, also when the cluster is gone.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

from tqdm import tqdm

from shards import storage

LINE_EVERY_S = 5.0
STATUS_EVERY_S = 1.0


class Progress:
    """Progress of one stage. total and counts are in `unit`s; keyword figures are shown beside the bar.

    done: what an earlier run has already finished; it counts towards the bar, not towards the rate.
    """

    def __init__(self, stage: str, total: int, unit: str, status_url: str | None = None, done: int = 0) -> None:
        self.stage, self.total, self.unit, self.status_url = stage, total, unit, status_url
        self.done = self._start_done = done
        self.figures: dict[str, Any] = {}
        self._began = time.time()
        self._clock = time.monotonic()
        self._line_at = self._status_at = -1e9
        self._bar = (
            tqdm(total=total, initial=done, desc=stage, unit=f" {unit}", dynamic_ncols=True, smoothing=0.1)
            if sys.stderr.isatty()
            else None
        )
        self._report("running")

    @property
    def rate(self) -> float:
        """Units a second since this process began."""
        return (self.done - self._start_done) / max(time.monotonic() - self._clock, 1e-9)

    def update(self, n: int = 1, **figures: Any) -> None:
        """Count `n` more units; figures (numbers or short strings) replace those of the same name."""
        self.done += n
        self.figures.update(figures)
        if self._bar is not None:
            self._bar.set_postfix(self._shown(), refresh=False)
            self._bar.update(n)
        self._report("running")

    def close(self, state: str = "done", **figures: Any) -> None:
        """End the bar; state is done, failed or stopped."""
        self.figures.update(figures)
        if self._bar is not None:
            self._bar.close()
        self._line_at = self._status_at = -1e9
        self._report(state)

    def _shown(self) -> dict[str, str]:
        return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in self.figures.items()}

    def _report(self, state: str) -> None:
        now = time.monotonic()
        if self._bar is None and now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            postfix = ", ".join(f"{k}={v}" for k, v in self._shown().items())
            line = tqdm.format_meter(
                self.done,
                self.total,  # 0: not known
                now - self._clock,
                ncols=None if not self.total else 110,
                prefix=self.stage,
                unit=f" {self.unit}",
                initial=self._start_done,
                postfix=postfix or None,
            )
            print(line, file=sys.stderr, flush=True)
        if self.status_url and now - self._status_at >= STATUS_EVERY_S:
            self._status_at = now
            left = (self.total - self.done) / self.rate if self.rate > 0 and self.total else None
            storage.write_json(
                self.status_url,
                {
                    "stage": self.stage,
                    "state": state,
                    "done": self.done,
                    "total": self.total,
                    "unit": self.unit,
                    "rate": round(self.rate, 3),
                    "seconds_left": None if left is None or state != "running" else round(left, 1),
                    "began": self._began,
                    "updated": time.time(),
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "figures": {k: v for k, v in self.figures.items() if isinstance(v, (int, float, str))},
                },
            )
