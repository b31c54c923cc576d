"""SIGTERM as a request: no new work is begun, what is in hand is finished, and the exit code says "resumable".

At every moment of a command the request ends it with exit code 75 and one sentence. While shards are made the loop
looks at the flag (`waits`) and finishes what is in hand; at any other moment, such as planning, finishing or the start
of Ray, `Stopped` is raised where the process stands, which is safe since everything may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Stopped(BaseException):
    """The work was ended by a request; the same command goes on with it. Like KeyboardInterrupt, it is no Exception, so
    that no handler of errors on the way takes it for one."""


class StopFlag(threading.Event):
    """Set once the process was asked to end. what: named in the sentence."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what
        self.waiting = False  # whether somebody looks at the flag

    def check(self) -> None:
        """Raise Stopped where the request has come."""
        if self.is_set():
            raise self.stopped()

    def stopped(self) -> Stopped:
        """What the request ends with."""
        return Stopped(f"{self.what}: ".removeprefix(": ") + "stopped on request; the same command goes on from here")

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Within, the request sets the flag and nothing else: the loop looks at it."""
        self.check()
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False


@contextlib.contextmanager
def stop_on_sigterm(flag: StopFlag) -> Iterator[StopFlag]:
    """Within, SIGTERM sets `flag`, and raises Stopped where nobody looks at it. To be entered again after ray.init,
    which installs a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handler(_signum: int, _frame: FrameType | None) -> None:
        asked_before = flag.is_set()
        flag.set()
        if not flag.waiting and not asked_before:
            raise flag.stopped()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
