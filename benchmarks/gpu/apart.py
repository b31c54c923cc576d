"""A part in a process of its own: when it ends, or is ended, the device is as it was before.

What a part that failed still holds cannot be let go of within its process: a compile that ran out of time kept the
memory, and whatever came after it found none.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

READY_S = 180.0  # at most, of imports on a machine that is busy
GRACE_S = 10.0  # from where a part's limit rings to where its process is killed


def everything() -> None:
    """Import what parts need, before any clock runs: a limit that rang within an import would leave it broken."""
    import open_clip  # noqa: F401
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    import train.loop  # noqa: F401
    from train import muon, plan  # noqa: F401
    from train.ranks import import_deepspeed

    import_deepspeed()


class Apart:
    """A process that gets ready, and then does one piece of work. A context, whose end kills it.

    prepare: what it does before its work comes.
    """

    def __init__(self, prepare: Callable[[], None] = everything) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has asked for a GPU has none
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare))
        self._process.start()
        theirs.close()
        self._limit_s = 0.0

    def begin(self, work: Callable[[], Any], limit_s: float) -> None:
        """Hand it its work, picklable, and how long that may take, its imports aside."""
        self._limit_s = limit_s
        self._ours.send((work, limit_s))

    def result(self, at_most_s: float = READY_S) -> dict[str, Any]:
        """{"result"}, or {"failed", "where", "partial"}; waits until its time is over, and kills it.

        at_most_s: for its imports.
        """
        try:
            for what, seconds in (("start", min(at_most_s, READY_S)), ("work", self._limit_s + GRACE_S)):
                if not self._ours.poll(seconds):
                    return {"failed": f"it was killed: its {what} did not end within {seconds:.0f} s"}
                found: dict[str, Any] = self._ours.recv()
            return found
        except (EOFError, OSError):
            self._process.join(GRACE_S)
            return {"failed": f"its process ended with code {self._process.exitcode}"}
        finally:
            self.kill()

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.pid and self._process.exitcode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # where it had no group of its own yet
        self._process.join()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve(out: Connection, prepare: Callable[[], None]) -> None:
    os.setpgid(0, 0)
    prepare()
    out.send({})  # its clock begins
    work, limit_s = out.recv()
    entry: dict[str, Any] = {}
    try:
        with limited(limit_s):
            entry["result"] = work()
    except BaseException as e:
        frames = traceback.extract_tb(e.__traceback__)[-6:]
        entry["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:600]}"
        entry["where"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
        if partial := getattr(e, "partial", None):
            entry["partial"] = partial
    out.send(entry)
    os._exit(0)  # no thread, compiler or process group is waited for


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Context that raises TimeoutError after so long."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: where it rings within a callback of the interpreter's, the error is dropped.
    signal.setitimer(signal.ITIMER_REAL, seconds, 3.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
