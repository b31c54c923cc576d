"""One job at a time on a stage's output: a lock file with a heartbeat, and on Ray a named actor besides.

The lock file (`<run>/status/<stage>.lock`, made with O_EXCL or a conditional put) also holds between two
clusters that share a file system. A job that dies leaves it behind; the next one takes it over at once
where it can know that the holder is gone: its process on this host, or its actor on this cluster, which
dies with the job. Otherwise it waits until the heartbeat is old. Should two jobs run at one moment all the
same, no harm is done but double work: shards are committed by the first writer, with the same bytes.
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
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from shards import storage
from shards.fingerprint import digest_bytes
from shards.settings import StageError

log = logging.getLogger("carrara.engine")

BEAT_S = 5.0
STALE_S = 60.0
PATIENCE_S = 4.0  # how long the actor of a job that has died may still have its name
NAMESPACE = "carrara-leases"


class Busy(StageError):
    """Another job is at work on the same output."""


class Lease:
    """Context: this process alone works on `root`. Raises Busy, naming the holder, where another does."""

    def __init__(self, status: str, stage: str, root: str, on_ray: bool) -> None:
        self.url = storage.join(status, f"{stage}.lock")
        self.stage, self.root, self.on_ray = stage, root, on_ray
        self.record: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": _host(),
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "process_began": psutil.Process().create_time(),
            "cluster": None,
        }
        self.lost = False
        self._end = threading.Event()
        self._actor: Any = None

    def __enter__(self) -> Lease:
        if self.on_ray:
            self._name_actor()
        self._lock()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        with contextlib.suppress(Exception):  # whatever ends the work must be seen, not this
            if self._token() == self.record["token"]:
                storage.remove(self.url)
        if self._actor is not None:
            import ray

            with contextlib.suppress(Exception):
                ray.kill(self._actor)

    def check(self) -> None:
        """Raise StageError where another job has taken the lock over, say after this process was suspended."""
        if self.lost:
            raise StageError(f"{self.stage}: another job has taken over {self.root}, so this one ends")

    def _name_actor(self) -> None:
        import ray

        # The head node's id is random, so it names this cluster and no other.
        heads = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
        self.record["cluster"] = heads[0] if heads else None
        name = f"{self.stage}:{digest_bytes(self.root.encode())[:24]}"
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": 0}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._actor = ray.remote(_Holder).options(**options).remote()
                return
            except ValueError:
                if time.monotonic() > deadline:
                    raise Busy(self._refusal(self._read() or {})) from None
                time.sleep(0.3)

    def _lock(self) -> None:
        deadline = time.monotonic() + 1.0  # a killed process may take a moment to go
        while not storage.create(self.url, self._bytes()):
            holder = self._read()
            if holder is not None and not self._gone(holder):
                if time.monotonic() > deadline:
                    raise Busy(self._refusal(holder))
                time.sleep(0.2)
                continue
            log.info("%s: taking over the lock of a job that is gone", self.stage)
            if self._token() == (holder or {}).get("token"):
                storage.remove(self.url)
        # Two jobs may have found the same dead holder: the one whose record stays has the lock.
        time.sleep(0.1)
        if self._token() != self.record["token"]:
            raise Busy(self._refusal(self._read() or {}))

    def _gone(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self.record["host"]:
            try:
                process = psutil.Process(int(holder["pid"]))
                return process.create_time() != holder["process_began"] or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True
        if self.record["cluster"] and holder.get("cluster") == self.record["cluster"]:
            return True  # its named actor would have refused us
        return time.time() - float(holder.get("beat", 0)) > STALE_S

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['pid']} on {holder['hostname']}" if "pid" in holder else "another job"
        return f"{self.stage}: {who} is already working on {self.root}; wait until it has ended, or stop it"

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                if self._token() != self.record["token"]:
                    self.lost = True
                    return
                storage.write_atomic(self.url, self._bytes())
            except OSError as e:  # a full or unreachable disk: the work itself will say so
                log.warning("%s: the lock file cannot be refreshed: %s", self.stage, e)

    def _bytes(self) -> bytes:
        return json.dumps({**self.record, "beat": time.time()}, indent=1).encode() + b"\n"

    def _read(self) -> dict[str, Any] | None:
        try:
            found = storage.read_json(self.url)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _token(self) -> str | None:
        return (self._read() or {}).get("token")


class _Holder:
    """An actor that does nothing: its name is the lock, and it dies with the job that made it."""


def _host() -> str:
    """This machine since its last start, and this process namespace: where a process id means something."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
    return "/".join(parts)
