"""This process's connection to Ray: to the cluster it was started in, or to a small one of its own."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from orchestration.config import JOB_PACKAGE, RayConfig
from orchestration.ray_head import be_patient, keep_apart
from orchestration.stopping import EXIT_STOPPED, Stopped
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")

ROOT = Path(__file__).resolve().parent.parent
TCP_S = 5.0
SILENCE_S, PROBE_S = 13.0, 12.0  # how long ray.init may take before it is asked whether a Ray is there, and the answer
OBJECT_STORE_BYTES = 100_000_000  # of a Ray of our own; shards never go through it


@contextlib.contextmanager
def connected(config: RayConfig, local: bool = False) -> Iterator[None]:
    """Within, Ray is connected: to `ray.address`, else RAY_ADDRESS (which is set in jobs), else a Ray started here.

    local: all is done in this process, and nothing is connected.
    """
    if local:
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": "carrara"}
    if address and address.startswith("http"):
        raise ConfigError(
            f"the Ray address {address} is a dashboard's, to which jobs are submitted: "
            f"ray job submit --address {address} -- python orchestration/run_stage.py ..."
        )
    if JOB_PACKAGE not in os.getcwd() and Path.cwd() != ROOT:
        # Workers find this very code; a job's package and the current folder they know already.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    if address:
        _refuse_if_silent(address)
    else:
        # Ray would otherwise write a token file into the home folder, which changes how later heads start.
        if "RAY_AUTH_MODE" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        os.environ.setdefault("RAY_agent_register_timeout_ms", "180000")  # parts start slowly on a busy machine
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 leaves a worker next to nothing of a busy core
        be_patient()
        keep_apart()
        log.info("no Ray address given: starting a Ray on this machine for this command")
    import ray  # only now: its library reads the mode of authentication once, as it is loaded

    on_sigterm = signal.getsignal(signal.SIGTERM)
    others = frozenset(psutil.Process().children(recursive=True)) if address is None else frozenset()
    started = False
    try:
        with _watched(address):
            ray.init(**{"address": address, **options})
        started = True
    except SystemExit:  # what Ray makes of a SIGTERM, from the moment at which it installs a handler of its own
        atexit.register(_leave, EXIT_STOPPED)  # its library, half connected, may abort as it is unloaded
        raise Stopped("stopped on request while Ray was started; the same command goes on from here") from None
    except Exception as e:  # Ray raises bare ones, too
        text = " ".join(str(e).split())[:300]
        if address is None:
            raise StageError(f"Ray does not start on this machine: {text}") from e
        raise StageError(
            f"no connection to the Ray at {address}: {text}; is it running, and are RAY_AUTH_MODE and the token the "
            "same here as there (`carrara doctor` looks at both)?"
        ) from e
    finally:
        signal.alarm(0)  # which Ray's handler leaves behind: three seconds after a SIGTERM it would abort this process
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        if address is None and not started:
            _end_what_was_begun(others)
    try:
        yield
    finally:
        ray.shutdown()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_what_was_begun(others: frozenset[psutil.Process]) -> None:
    """End the parts of a Ray whose start was broken off, and none of the `others`, which this process had before. Ray
    ends those that it knows; what these had just started would outlive them by a minute."""
    import ray

    parts = psutil.Process().children(recursive=True)  # while their parents are there
    ray.shutdown()
    for part in set(parts) - others:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()


def _refuse_if_silent(address: str) -> None:
    """Raise ConfigError where nothing listens at a Ray address (host:port or ray://host:port)."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), TCP_S).close()
    except OSError as e:
        raise ConfigError(
            f"no connection to the Ray at {address}: {e.strerror or e}; correct ray.address or RAY_ADDRESS, or start a "
            "Ray there"
        ) from None


@contextlib.contextmanager
def _watched(address: str | None) -> Iterator[None]:
    """Within, a Ray address that something else answers at ends this process with a sentence: ray.init would wait for
    minutes, and cannot be interrupted."""
    over = threading.Event()

    def watch() -> None:
        if over.wait(SILENCE_S) or address is None or _is_ray(address) or over.is_set():
            return
        print(
            f"carrara: what listens at {address} does not answer as a Ray does within {SILENCE_S + PROBE_S:.0f} s; "
            "correct ray.address or RAY_ADDRESS (the port is that of `ray start`, 6379 by default, and not the "
            "dashboard's), and see that RAY_AUTH_MODE and the token are the same here as there",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    threading.Thread(target=watch, name="ray-address", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _is_ray(address: str) -> bool:
    """Whether a Ray answers there, asked by another process: Ray's client ends the one that asks in vain."""
    if address.startswith("ray://") or ":" not in address:  # a client's, or `auto`, which is no place to ask at
        return True
    code = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_get(b'-', None)"
    try:
        asked = subprocess.run([sys.executable, "-c", code, address], capture_output=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0
