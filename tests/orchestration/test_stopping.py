"""SIGTERM at every moment of a command is exit code 75 and one sentence, to the driver alone and to its group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ingest.digests import connect
from ingest.digests import run as query
from orchestration import connection
from orchestration.config import Pool, RayConfig
from orchestration.engine import run
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from tests.orchestration.drive import toy
from tests.orchestration.head import ROOT
from tests.orchestration.toy import ToyStage


def own_ray(folder: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
    """The toy stage with a Ray of its own, as the leader of a process group."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.orchestration.drive", str(folder), json.dumps(options)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def stopped(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("carrara: ")
    assert "the same command goes on from here" in last
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("after", [0.0, 1.5, 3.0, 4.5])
def test_sigterm_while_ray_starts(tmp_path: Path, after: float) -> None:
    process = own_ray(tmp_path, {"workers": 1, "seconds": 30.0, "grace_s": 0.5})
    assert process.stderr is not None
    assert "starting a Ray on this machine for this command" in process.stderr.readline()
    time.sleep(after)
    assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    stopped(process)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "its Ray has gone with it"


def test_what_ray_makes_of_a_sigterm_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one moment of its start on it is Ray's own handler that takes the signal: it sets an alarm that aborts a
    process which is not gone within three seconds, and raises SystemExit. What had been begun by then ends, and no
    other child of this process."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = {"RAY_agent_register_timeout_ms": "180000", "RAY_worker_niceness": "0"}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *values):  # which it would set for this very process
        monkeypatch.setenv(name, os.environ.get(name, values.get(name, "token")))
    for name in ("keep_apart", "be_patient"):  # which change how this very process starts a Ray
        monkeypatch.setattr(connection, name, lambda: None)

    sleep = ["sleep", "100"]
    other, begun = subprocess.Popen(sleep), list[subprocess.Popen[bytes]]()

    def init(**_: object) -> None:
        begun.append(subprocess.Popen(sleep))
        signal.alarm(3)
        sys.exit(15)

    last: list[tuple[object, ...]] = []
    monkeypatch.setattr("atexit.register", lambda *a, **_: last.append(a))
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(Stopped, match="the same command goes on from here"), connection.connected(RayConfig()):
        pytest.fail("no Ray was started")
    assert [a[1:] for a in last if a[0] is connection._leave] == [(75,)], "its library is not unloaded half connected"
    assert signal.alarm(0) == 0, "nothing will abort a process that takes its time to end"
    assert begun[0].wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_sigterm_to_the_process_group_finishes_what_is_in_hand(tmp_path: Path) -> None:
    process = own_ray(tmp_path, {"workers": 2, "seconds": 1.5})
    deadline = time.monotonic() + 200  # on a busy machine Ray takes its time to start
    while not list((tmp_path / "calls").glob("*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    inside = psutil.Process(process.pid).children(recursive=True)
    nice, parts = set(), []
    for child in inside:
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "".join(child.cmdline()[:1]).startswith("ray::ShardWorker"):
                nice.add(child.nice())
            if child.name() in ("raylet", "gcs_server"):
                parts.append(child)
    assert nice == {os.getpriority(os.PRIO_PROCESS, 0)}, "workers give way to nothing else"
    assert {c.name() for c in parts} == {"raylet", "gcs_server"}
    assert all(os.getsid(c.pid) != os.getsid(process.pid) for c in parts), "the signal is not for them"
    os.killpg(process.pid, signal.SIGTERM)
    began = time.monotonic()
    stopped(process)
    assert time.monotonic() - began < 25
    made = list((tmp_path / "calls").glob("*"))
    assert 0 < len(made) < 12
    assert len(list((tmp_path / "toy").glob("*_stats.json"))) == len(made), "what was in hand is committed"
    assert json.loads((tmp_path / "status/toy.json").read_text())["state"] == "stopped"


class Slow(ToyStage):
    """Takes its time for planning, or for the end."""

    where = "planning"

    def tasks(self):
        for task in ToyStage.tasks(self):
            if self.where == "planning":
                time.sleep(0.1)
            yield task

    def finish(self, stats):
        stats = list(stats)
        if self.where == "finishing":
            time.sleep(30)
        return ToyStage.finish(self, stats)


@pytest.mark.parametrize("where", ["planning", "finishing"])
def test_sigterm_while_planning_and_while_finishing(tmp_path: Path, where: str) -> None:
    stage = Slow(f"{tmp_path}/toy", f"{tmp_path}/calls")
    object.__setattr__(stage, "where", where)
    states: list[str] = []

    def stop() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                state = json.loads((tmp_path / "status/toy.json").read_text())["state"]
            except (OSError, ValueError):
                state = ""
            if state == where:
                states.append(state)
                break
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    began = time.monotonic()
    with pytest.raises(Stopped, match="toy: stopped on request; the same command goes on from here"):
        run(stage, f"{tmp_path}/status", RayConfig(), Pool(), local=True)
    assert time.monotonic() - began < 10
    assert states == [where], "the status says what is being done"
    assert json.loads((tmp_path / "status/toy.json").read_text())["state"] == "stopped"
    assert run(toy(tmp_path), f"{tmp_path}/status", RayConfig(), Pool(), local=True)


def test_sigterm_within_a_query_of_the_database(tmp_path: Path) -> None:
    """duckdb would hold the request back, and then raise an error of its own in its place."""
    db = connect(str(tmp_path), "100MB", 1)
    began = time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with stop_on_sigterm(StopFlag("ingest")), pytest.raises(Stopped):
        query(db, "SELECT count(*) FROM range(200000) a, range(100000) b WHERE hash(a.range + b.range) = 1")
    assert time.monotonic() - began < 10
    assert query(db, "SELECT 1") == [(1,)]


def test_the_request_is_seen_through_handlers_of_errors() -> None:
    with pytest.raises(Stopped), stop_on_sigterm(StopFlag("x")):  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            pytest.fail("a request is no error")


def wrong_address(answer: Callable[[socket.socket], None]) -> tuple[int, str, float]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        answer(server)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{port}"}
        code = (
            "from orchestration.config import RayConfig\n"
            "from orchestration.connection import connected\n"
            "from orchestration.run_stage import guarded\n"
            "def work():\n    with connected(RayConfig()): pass\n"
            "raise SystemExit(guarded(work))"
        )
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=90
        )
        return done.returncode, done.stderr, time.monotonic() - began


def test_a_wrong_ray_address_is_a_sentence_at_once() -> None:
    code, err, seconds = wrong_address(lambda server: None)
    assert code == 2, err
    assert "no connection to the Ray at 127.0.0.1:" in err
    assert "correct ray.address" in err
    assert seconds < 15


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:1"])
def test_an_address_that_cannot_be_asked_is_waited_for(address: str) -> None:
    """`auto` is what a platform's image may set: a slow head is no reason to say that it is no Ray."""
    assert connection._is_ray(address)


@pytest.mark.slow
def test_an_address_where_something_else_listens_is_a_sentence_within_half_a_minute() -> None:
    code, err, seconds = wrong_address(lambda server: server.listen(50))
    assert code == 2, err
    assert "does not answer as a Ray does" in err
    assert seconds < 40, "on a busy machine; 25 s by the clock of the watch"


@pytest.mark.parametrize("after", [0.3, 0.8])
def test_sigterm_while_carrara_itself_is_loaded(tmp_path: Path, after: float) -> None:
    """The handler comes before whatever takes time to load."""
    code = (
        "import sys, time; from orchestration import run_stage\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('shards.settings', 'typer'): time.sleep(5)\n"
        "sys.meta_path.insert(0, Slow()); print('loaded', flush=True); sys.exit(run_stage.main(['status', 'nowhere']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, **pipes)
    assert process.stdout.readline() == "loaded\n"
    time.sleep(after)
    process.send_signal(signal.SIGTERM)
    stopped(process)
