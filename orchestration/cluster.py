"""A Ray head of our own on loopback, for the demo and the tests, and jobs submitted to it as a user would.

It keeps to itself: free ports for everything, its own temporary folder (so that the address file other
Rays leave in /tmp/ray stays as it is), token authentication, usage statistics off, a small object store.
Leaving the context ends exactly its own processes, which carry a mark in their environment, and never
those of another Ray. Should this process be killed, the kernel tells the head, which ends too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from orchestration.stopping import Stopped
from shards.settings import StageError

log = logging.getLogger("carrara.cluster")

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or site-packages where installed
MARK = "CARRARA_CLUSTER"
START_TIMEOUT_S = 240.0
START_ATTEMPTS = 3
FOLDER_PREFIX = "carrara-"
OBJECT_STORE_BYTES = 100_000_000  # shards never go through it
EXCLUDED = [".git", ".venv", "runs", "benchmarks", "*.tar", "*.safetensors", "*.pt", "*.log"]
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """Context: a Ray head of our own. cwd: where it is started, so what relative paths in jobs are relative to."""

    def __init__(self, cpus: int | None = None, cwd: str | os.PathLike[str] = ".", record: Path | None = None) -> None:
        self.cpus = cpus or max(2, len(os.sched_getaffinity(0)))
        self.cwd = Path(cwd).resolve()
        self.record = record  # a file that names our processes, should this one be killed
        self.id = secrets.token_hex(8)
        self.token = secrets.token_hex(32)
        self._head: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    # --- its life -----------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        if self.record is not None:
            end_recorded(self.record)
            self.record.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start()
                return self
            except StageError as e:  # a port may be taken meanwhile, and a busy machine be too slow for the raylet
                self._end()
                if attempt == START_ATTEMPTS:
                    self.stop()
                    raise
                log.warning("%s; trying again", e)
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        # Unix sockets lie in here, whose paths may have 107 characters at most, so TMPDIR is not asked.
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
        if self.record is not None:
            self.record.write_text(json.dumps({"id": self.id, "folder": str(self._folder)}))
        gcs, dashboard, *others = _free_ports(8)
        self.address, self.url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        names = ["ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
        names += ["runtime-env-agent-port", "metrics-export-port", "node-manager-port"]
        command = [sys.executable, "-m", "orchestration.ray_head", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={gcs}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--{name}={port}" for name, port in zip(names, others, strict=True)]
        command += ["--object-manager-port=0", "--min-worker-port=0", "--max-worker-port=0", "--no-monitor"]
        command += [f"--num-cpus={self.cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += [f"--temp-dir={self._folder}", "--disable-usage-stats"]
        log_path = self._folder / "head.log"
        with open(log_path, "wb") as out:
            self._head = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env={**self.environment(), "PYTHONPATH": _with_root()},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._head.poll() is not None or time.monotonic() > deadline:
                tail = " / ".join(log_path.read_text(errors="replace").strip().splitlines()[-3:])
                raise StageError(f"Ray did not start on this machine: {tail}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            self.request("/api/version")
            return bool(self.request("/nodes?view=summary")["data"]["summary"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def stop(self) -> None:
        """End the head and every process that carries its mark; nothing else."""
        self._end()
        if self.record is not None:
            self.record.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._head is not None and self._head.poll() is None:
            self._head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._head.wait(10)
        end_marked(self.id)
        if self._head is not None:
            self._head.wait()
            self._head = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- talking to it --------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment of the head, and of whoever talks to it: the same token and mode for all."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        env |= {
            MARK: self.id,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray puts the machine's outward address in place of 127.0.0.1 unless it may not form clusters.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_agent_register_timeout_ms": "180000",  # parts start slowly on a busy machine
            "RAY_JOB_STOP_WAIT_TIME_S": "25",
            "RAY_worker_niceness": "0",  # Ray's 15 leaves a worker 3 % of a core that something else wants, too
            "PYTHONUNBUFFERED": "1",
            # A job's `python` is to be this one.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        }
        return env

    def request(self, path: str, data: dict[str, Any] | None = None) -> Any:
        """A call of Ray's HTTP interface; returns its JSON. Raises OSError (URLError) and ValueError."""
        request = urllib.request.Request(
            self.url + path,
            data=None if data is None else json.dumps(data).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        with opener.open(request, timeout=10) as answer:
            return json.loads(answer.read())

    def job(self, submission_id: str) -> dict[str, Any]:
        """What Ray knows of a job: status, driver_exit_code, message; empty where it knows nothing."""
        try:
            found = self.request(f"/api/jobs/{submission_id}")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def submit(
        self,
        arguments: Sequence[str],
        on_line: Callable[[str], None],
        working_dir: Path | None = ROOT,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> int:
        """`ray job submit --working-dir ROOT -- python orchestration/run_stage.py ARGUMENTS`; its exit code.

        on_line gets the lines of the job's log, while_waiting is called twice a second. The job's
        own status is asked at the end: the command line's exit code is 0 for a stopped job too. Raises
        Stopped where the job was stopped, StageError where it cannot be submitted; on any exception here
        (Ctrl-C) the job is stopped.
        """
        job = f"carrara-{secrets.token_hex(6)}"
        process = subprocess.Popen(
            job_command(self.url, arguments, working_dir, job),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.cwd,
            env=self.environment(),
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        reader = threading.Thread(target=_read_lines, args=(process.stdout, on_line), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                while_waiting()
                time.sleep(0.5)  # each look costs CPU time that the stage could use
            reader.join(5)
            # The log's connection may break while the job goes on.
            while (found := self.job(job)) and found.get("status") not in ENDED:
                while_waiting()
                time.sleep(0.5)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                self.request(f"/api/jobs/{job}/stop", {})
            process.kill()
            raise
        if not found:
            raise StageError("the job could not be submitted, or Ray has gone; its lines above say more")
        if found["status"] == "STOPPED":
            raise Stopped("the job was stopped; the same command goes on from here")
        code = found.get("driver_exit_code")
        return code if code is not None else int(found["status"] != "SUCCEEDED")


def job_command(
    address: str,
    arguments: Sequence[str],
    working_dir: Path | None = ROOT,
    submission_id: str | None = None,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """The command line of `ray job submit` for run_stage.py with these arguments, and variables for the job."""
    command = [*_ray(), "job", "submit", f"--address={address}"]
    if submission_id:
        command.append(f"--submission-id={submission_id}")
    script = ["orchestration/run_stage.py"]
    if working_dir is not None and (working_dir / script[0]).is_file() and (working_dir / "pyproject.toml").is_file():
        runtime = {"excludes": EXCLUDED, **({"env_vars": environment} if environment else {})}
        command += [f"--working-dir={working_dir}", f"--runtime-env-json={json.dumps(runtime)}"]
    else:  # installed on the cluster, or started in a checkout there
        script = ["-m", "orchestration.run_stage"]
    return [*command, "--", "python", *script, *arguments]


def end_recorded(record: Path) -> None:
    """End what a killed process's cluster left, named by its record file."""
    try:
        left = json.loads(record.read_text())
        identity, folder = str(left["id"]), Path(left["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    count = end_marked(identity)
    if count:
        log.warning("ended %d processes of a Ray that an earlier run left", count)
    if folder.parent == Path("/tmp") and folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def end_marked(identity: str, patience_s: float = 10.0) -> int:
    """End all processes whose environment has the mark; SIGTERM, then SIGKILL. Returns how many there were."""
    marked = _marked(identity)
    for process in marked:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(marked, timeout=patience_s)
    deadline = time.monotonic() + patience_s
    while (rest := _marked(identity)) and time.monotonic() < deadline:
        for process in rest:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(rest, timeout=1)
    return len(marked)


def _marked(identity: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mine = process.pid != os.getpid() and process.environ().get(MARK) == identity
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _ray() -> list[str]:
    """Ray's command line: the script beside this Python, as a user would call it."""
    script = Path(sys.executable).parent / "ray"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "ray.scripts.scripts"]


def _with_root() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _end_with_parent() -> None:
    """In the child, before exec: have the kernel send SIGTERM when the parent dies (Linux's PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _read_lines(stream: Any, on_line: Callable[[str], None]) -> None:
    for line in stream:
        on_line(line.rstrip("\n"))


def _free_ports(count: int) -> list[int]:
    """Ports that are free on loopback at this moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
