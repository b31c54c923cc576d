"""SIGTERM as a request: no new work is begun, what is in hand is finished, and the exit code says "resumable"."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Stopped(Exception):
    """The work was ended by a request; the same command goes on with it."""


class StopFlag(threading.Event):
    """Set once the process was asked to end."""


@contextlib.contextmanager
def stop_on_sigterm(flag: StopFlag) -> Iterator[StopFlag]:
    """Within, SIGTERM sets `flag`. To be entered after ray.init, which installs a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handler(_signum: int, _frame: FrameType | None) -> None:
        flag.set()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
