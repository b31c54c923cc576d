"""One job at a time on a stage's output: `<run>/status/<stage>.lock/000007`, numbered epochs and no clock.

The highest number holds. Each number is created once (shards/storage.py), so of several that want it one gets it. The
holder replaces its own record every few seconds with another count of beats; the record of one that has ended says
`released`, and stays, so that no number is given twice. Who wants the lease passes at once where there is none, where
it was released, or where its holder was a process of this very machine and is gone. Otherwise the record is watched
for a while by the watcher's own monotonic clock: if it changes, the holder lives; if not, the next number is taken.
Nobody compares the times of two machines, or a time of day with another. A holder ends when it sees a higher number,
and when it could not write for a while, whatever was raised.

Should two jobs run at one moment all the same (one was suspended), no harm is done but double work: shards are
committed once (shards/dataset.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import Any

from shards import storage
from shards.settings import StageError

log = logging.getLogger("carrara.engine")

BEAT_S = 5.0
LOST_S = 60.0  # a holder that could not write for so long ends
WATCH_S = 90.0  # a record that has not changed for so long is of a holder that is gone; longer than LOST_S
GONE_S = 1.0  # a killed process of this machine may take a moment to go
DIGITS = 6

Operations = Generator[tuple[Any, ...], Any, Any]


class Busy(StageError):
    """Another job is at work on the same output."""


def take(
    mine: Callable[[], bytes], gone: Callable[[bytes], bool], watch: Callable[[str, bytes], bool] | None = None
) -> Operations:
    """The taking of a lease as storage operations, which the caller carries out and answers: ("list", ""),
    ("read", name), ("create", name, bytes), ("remove", name). Returns (name, None) where it was taken, else (None, the
    record that holds it).

    mine: this holder's record. gone: whether the holder of a record has released it, or is known to be dead. watch:
    given a name and its record, whether it stood still for long enough; None: not watched.
    """
    names = yield ("list", "")
    top = names[-1] if names else None
    record = (yield ("read", top)) if top else None
    if top and record is not None and not gone(record) and not (watch and watch(top, record)):
        return None, record
    name = f"{int(top or 0) + 1:0{DIGITS}d}"
    if not (yield ("create", name, mine())):
        return None, (yield ("read", name))
    names = yield ("list", "")
    if names[-1] != name:  # others came and went since the first look
        yield ("remove", name)
        return None, (yield ("read", names[-1]))
    for old in names[:-1]:
        yield ("remove", old)
    return name, None


class Lease:
    """Context: this process alone works on `root`. Raises Busy, naming the holder, where another does.

    status: the run's status folder. stage: what is worked on there; a name of its own for each output. check() raises
    once the lease was lost.
    """

    def __init__(self, status: str, stage: str, root: str) -> None:
        self.url = storage.join(status, f"{stage}.lock")
        self.stage, self.root = stage, root
        self.record: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": _host(),
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "began": process_began(os.getpid()),
        }
        self.beats = 0
        self.name: str | None = None  # the number that is ours
        self.lost = ""  # why, once it is
        self._good = time.monotonic()  # when the record was last written
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self._end_old_lock()
        deadline = time.monotonic() + GONE_S
        while True:
            name, holder = self._carry_out(take(self._bytes, self._is_gone, self._stood_still))
            if name is not None:
                break
            if not self._is_here(_record(holder)) or time.monotonic() > deadline:
                raise Busy(self._refusal(holder))
            time.sleep(0.1)
        self.name, self._good = name, time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(LOST_S)  # a beat after the release would take it back
        with contextlib.suppress(Exception):  # whatever ends the work must be seen, not this
            if self.name is not None and not self.lost and self._names()[-1:] == [self.name]:
                storage.write_atomic(storage.join(self.url, self.name), self._bytes(released=True))

    def check(self) -> None:
        """Raise StageError where the lease was lost, say after this process was suspended or its disk went away."""
        if not self.lost and time.monotonic() - self._good > LOST_S:  # the beat may hang in a write, too
            self.lost = f"its lease was not refreshed for {LOST_S:.0f} s"
        if self.lost:
            raise StageError(f"{self.stage}: {self.lost}, so this one ends; the same command goes on with {self.root}")

    # --- taking it ----------------------------------------------------------------------------------------

    def _carry_out(self, operations: Operations) -> Any:
        result: Any = None
        while True:
            try:
                kind, name, *data = operations.send(result)
            except StopIteration as stop:
                return stop.value
            url = storage.join(self.url, name) if name else self.url
            if kind == "list":
                result = self._names()
            elif kind == "read":
                result = _read(url)
            elif kind == "create":
                result = storage.create(url, data[0])
            else:
                result = None
                storage.remove(url)

    def _names(self) -> list[str]:
        return [n for n in storage.list_names(self.url) if n.isdecimal()]

    def _is_gone(self, data: bytes) -> bool:
        """Known at once of a record that was released, and of a process of this machine; others are watched."""
        record = _record(data)
        if record.get("released"):
            return True
        return self._is_here(record) and process_began(int(record["pid"])) != record.get("began")

    def _is_here(self, record: dict[str, Any]) -> bool:
        return record.get("host") == self.record["host"]

    def _stood_still(self, name: str, data: bytes) -> bool:
        if self._is_here(_record(data)):
            return False  # it lives
        log.warning("%s; watching for %.0f s whether it still lives", self._refusal(data).split(";")[0], WATCH_S)
        until = time.monotonic() + WATCH_S
        while time.monotonic() < until:
            time.sleep(BEAT_S)
            if self._names()[-1:] != [name] or _read(storage.join(self.url, name)) != data:
                return False
        log.warning("%s: taking over the lease of a job that is gone", self.stage)
        return True

    def _refusal(self, data: bytes | None) -> str:
        holder = _record(data)
        who = f"process {holder['pid']} on {holder['hostname']}" if "pid" in holder else "another job"
        return f"{self.stage}: {who} is already working on {self.root}; wait until it has ended, or stop it"

    def _end_old_lock(self) -> None:
        """An earlier version had one file in the place of the folder; a job that died left it behind."""
        data = _read(self.url)
        if data is None:
            return
        holder = _record(data)
        if not (self._is_here(holder) and process_began(int(holder["pid"])) is None):
            log.warning("%s; watching for %.0f s whether it still lives", self._refusal(data).split(";")[0], WATCH_S)
            until = time.monotonic() + WATCH_S
            while time.monotonic() < until:
                time.sleep(BEAT_S)
                if _read(self.url) != data:
                    raise Busy(self._refusal(data))
        with contextlib.suppress(IsADirectoryError):  # another was faster
            storage.remove(self.url)

    # --- keeping it ---------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                if self._names()[-1:] != [self.name]:
                    self.lost = "another job has taken over"
                    return
                self.beats += 1
                storage.write_atomic(storage.join(self.url, str(self.name)), self._bytes())
                self._good = time.monotonic()
            except Exception as e:  # whatever a store may raise: what counts is for how long
                log.warning("%s: the lease cannot be refreshed: %s: %s", self.stage, type(e).__name__, e)
                if time.monotonic() - self._good > LOST_S:
                    self.lost = f"its lease could not be refreshed for {LOST_S:.0f} s ({type(e).__name__}: {e})"
                    return

    def _bytes(self, **more: Any) -> bytes:
        return json.dumps({**self.record, "beats": self.beats, **more}, indent=1).encode() + b"\n"


def _read(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        return None


def _record(data: bytes | None) -> dict[str, Any]:
    """A record's fields; none of one that cannot be read, which is then watched like any other."""
    with contextlib.suppress(ValueError):
        found = json.loads(data or b"")
        if isinstance(found, dict) and {"host", "hostname", "pid"} <= found.keys():
            return found
    return {}


def process_began(pid: int) -> int | None:
    """When a process began, in ticks since the machine's start, which no clock changes; None: it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])


def _host() -> str:
    """This machine since its last start, and this process namespace: where a process id means something."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
    return "/".join(parts)
