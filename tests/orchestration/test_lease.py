"""The lease: of any number that want it one has it, whatever their clocks say; and who lost it knows.

The order of its operations is explored in every interleaving; processes are stopped, killed and overtaken for real.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration import lease as lease_module
from orchestration.lease import Busy, Lease, process_began, take
from shards import storage
from shards.settings import StageError
from tests.orchestration.explore import explore
from tests.orchestration.head import ROOT

# ---- explored ------------------------------------------------------------------------------------------------


def taker(me: bytes) -> Any:
    name, _ = yield from take(lambda: me, lambda record: record in (b"dead", b"released"))
    return "held" if name else "busy"


def released(me: bytes) -> Any:
    """Takes it, and lets it go by a record that says so; the number stays."""
    name, _ = yield from take(lambda: me, lambda record: record in (b"dead", b"released"))
    if name:
        yield ("put", name, b"released")
    return "released" if name else "busy"


def one_holder(count: int) -> Callable[[dict[str, bytes], dict[str, str]], str]:
    """Never two that have it; and once all `count` processes have ended, the highest number is its holder's."""

    def look(store: dict[str, bytes], outcomes: dict[str, str]) -> str:
        held = [name for name, what in outcomes.items() if what == "held"]
        if len(held) > 1:
            return f"{held} all have it"
        if held and len(outcomes) == count and store[max(store)] != held[0].encode():
            return f"{held[0]} has it, but {store[max(store)].decode()} stands above"
        return ""

    return look


@pytest.mark.parametrize("start", [{}, {"000001": b"dead"}, {"000006": b"released"}])
def test_of_three_that_want_it_one_has_it(start: dict[str, bytes]) -> None:
    processes = {n: (lambda n=n: taker(n.encode())) for n in "XYZ"}
    states, problem, way = explore(processes, one_holder(3), start)
    assert not problem, (problem, way)
    assert states > 100


def test_it_is_let_go_and_taken_again() -> None:
    processes: dict[str, Callable[[], Any]] = {n: (lambda n=n: released(n.encode())) for n in "VW"}
    processes |= {n: (lambda n=n: taker(n.encode())) for n in "XY"}
    states, problem, way = explore(processes, one_holder(4), {"000001": b"dead"})
    assert not problem, (problem, way)
    assert states > 5000


def test_a_holder_is_there_once_all_have_ended() -> None:
    """Nobody is turned away for ever: where several find a dead holder, one of them has it, or the next one gets it."""

    def ended(store: dict[str, bytes], outcomes: dict[str, str]) -> str:
        if len(outcomes) < 3 or "held" in outcomes.values():
            return ""
        return "" if store[max(store)] in (b"dead", b"released") else f"nobody has it, and {store} keeps all others out"

    processes = {n: (lambda n=n: taker(n.encode())) for n in "XYZ"}
    _, problem, way = explore(processes, ended, {"000001": b"dead"})
    assert not problem, (problem, way)


def test_the_explorer_finds_the_fault_of_a_lock_that_is_removed() -> None:
    def looked_and_removed(me: bytes) -> Any:
        while not (yield ("create", "lock", me)):
            holder = yield ("read", "lock")
            if holder not in (None, b"dead"):
                return "busy"
            if (yield ("read", "lock")) == holder:
                yield ("remove", "lock")
        return "held" if (yield ("read", "lock")) == me else "busy"

    processes = {n: (lambda n=n: looked_and_removed(n.encode())) for n in "XY"}
    _, problem, way = explore(processes, one_holder(3), {"lock": b"dead"})
    assert "all have it" in problem
    assert way


# ---- one process ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.1)
    monkeypatch.setattr(lease_module, "LOST_S", 0.8)
    monkeypatch.setattr(lease_module, "WATCH_S", 1.2)


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads(max((folder / "toy.lock").iterdir()).read_text()))


def foreign(**more: Any) -> dict[str, Any]:
    return {"token": "x", "host": "elsewhere", "hostname": "h", "pid": 7, "began": 1, "beats": 3, **more}


def lay(folder: Path, number: str, data: dict[str, Any]) -> None:
    (folder / "toy.lock").mkdir(exist_ok=True)
    (folder / "toy.lock" / number).write_text(json.dumps(data))


def test_a_living_holder_refuses_a_second_job_and_lets_go_by_a_record(tmp_path: Path) -> None:
    with Lease(str(tmp_path), "toy", "out"):
        with pytest.raises(Busy, match=f"process {os.getpid()} on .* is already working on out"):
            with Lease(str(tmp_path), "toy", "out"):
                pass
    assert record(tmp_path)["released"]
    began = time.monotonic()
    with Lease(str(tmp_path), "toy", "out") as lease:
        assert lease.name == "000002", "a number is not given twice"
        assert os.listdir(tmp_path / "toy.lock") == ["000002"]
    assert time.monotonic() - began < 0.8, "a released lease is not watched"


def test_the_lease_of_a_dead_process_of_this_machine_is_passed_at_once(tmp_path: Path) -> None:
    mine = Lease(str(tmp_path), "toy", "out").record["host"]
    lay(tmp_path, "000041", foreign(host=mine, pid=2**22 + 1))
    began = time.monotonic()
    with Lease(str(tmp_path), "toy", "out") as lease:
        assert lease.name == "000042"
    assert time.monotonic() - began < 1.0
    # The number of a process that has died is given to another one in time: it began at another moment.
    lay(tmp_path, "000050", foreign(host=mine, pid=os.getpid(), began=1))
    with Lease(str(tmp_path), "toy", "out") as lease:
        assert lease.name == "000051"


@pytest.mark.parametrize("hour", [-3600, 0, 3600])
def test_clocks_that_are_an_hour_off_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hour: int) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + hour)
    lay(tmp_path, "000001", foreign(beat=now + hour))
    os.utime(tmp_path / "toy.lock/000001", (now + hour, now + hour))
    began = time.monotonic()
    with Lease(str(tmp_path), "toy", "out") as lease:
        assert lease.name == "000002"
    assert 1.1 < time.monotonic() - began < 4, "a record that stands still is watched, and then passed"


def test_a_record_that_changes_is_of_a_holder_that_lives(tmp_path: Path) -> None:
    lay(tmp_path, "000001", foreign())
    code = (
        "import json, sys, time\n"
        "for beats in range(400):\n"
        "    data = {**json.loads(sys.argv[2]), 'beats': beats}\n"
        "    open(sys.argv[1] + '.new', 'w').write(json.dumps(data))\n"
        "    import os; os.replace(sys.argv[1] + '.new', sys.argv[1]); time.sleep(0.05)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "toy.lock/000001"), json.dumps(foreign())]
    holder = subprocess.Popen(command)
    try:
        time.sleep(0.5)
        with pytest.raises(Busy, match="process 7 on h is already working"):
            with Lease(str(tmp_path), "toy", "out"):
                pass
    finally:
        holder.kill()
        holder.wait()


def test_who_is_overtaken_knows_it_within_a_beat(tmp_path: Path) -> None:
    with Lease(str(tmp_path), "toy", "out") as lease:
        lease.check()
        lay(tmp_path, "000002", foreign())
        time.sleep(0.4)
        with pytest.raises(StageError, match="another job has taken over"):
            lease.check()
    assert not record(tmp_path).get("released"), "the other's record is not touched"
    assert record(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("error", [OSError("unreachable"), StageError("the disk is full"), RuntimeError("whatever")])
def test_a_store_that_fails_ends_the_holder_in_time_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = storage.write_atomic

    def failing(*_: Any) -> None:
        raise error

    with Lease(str(tmp_path), "toy", "out") as lease:
        monkeypatch.setattr(storage, "write_atomic", failing)
        time.sleep(0.4)
        monkeypatch.setattr(storage, "write_atomic", real)
        time.sleep(0.3)
        lease.check()
        monkeypatch.setattr(storage, "write_atomic", failing)
        time.sleep(1.5)
        with pytest.raises(StageError, match="could not be refreshed"):
            lease.check()
        assert lease._thread is not None
        assert not lease._thread.is_alive()


def test_a_write_that_hangs_ends_the_holder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(str(tmp_path), "toy", "out") as lease:
        monkeypatch.setattr(storage, "write_atomic", lambda *_: time.sleep(2))
        time.sleep(1.2)
        with pytest.raises(StageError, match="not refreshed"):
            lease.check()


def test_the_lock_file_of_an_earlier_version_is_passed_once_it_stands_still(tmp_path: Path) -> None:
    mine = Lease(str(tmp_path), "toy", "out").record["host"]
    dead = {"token": "x", "hostname": "h", "pid": 2**22 + 1, "process_began": 0.0, "cluster": None, "beat": time.time()}
    for host, least in ((mine, 0.0), ("elsewhere", 1.1)):
        (tmp_path / "toy.lock").write_text(json.dumps({**dead, "host": host}))
        began = time.monotonic()
        with Lease(str(tmp_path), "toy", "out"):
            assert (tmp_path / "toy.lock").is_dir()
        assert least <= time.monotonic() - began < least + 2
        for file in (tmp_path / "toy.lock").iterdir():
            file.unlink()
        (tmp_path / "toy.lock").rmdir()


def test_a_process_is_told_by_ticks_that_no_clock_moves() -> None:
    first = process_began(os.getpid())
    assert first is not None
    uptime = float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")
    assert 0 < first <= uptime
    assert process_began(os.getpid()) == first
    assert process_began(2**22 + 1) is None


# ---- processes -----------------------------------------------------------------------------------------------

HOLD = """
import sys, time, types
from orchestration import lease as module
from orchestration.lease import Busy, Lease
module.BEAT_S, module.LOST_S, module.WATCH_S = 0.1, 0.8, 1.2
module._host = lambda: sys.argv[2]
module.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep)  # and no time of day
try:
    with Lease(sys.argv[1], "toy", "out") as lease:
        print("held", flush=True)
        while True:
            time.sleep(0.02)
            lease.check()
except Exception as e:
    print(f"{type(e).__name__}: {e}", flush=True)
"""


@contextlib.contextmanager
def jobs() -> Iterator[Callable[[Path, str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def job(folder: Path, host: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), host]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(process)
        return process

    try:
        yield job
    finally:
        for process in started:
            process.kill()
            process.wait()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_three_processes_that_find_a_killed_holder_one_has_it(tmp_path: Path, elsewhere: bool) -> None:
    with jobs() as job:
        for round_ in range(3):
            folder = tmp_path / str(round_)
            holder = job(folder, "host-0")
            assert line(holder) == "held"
            holder.kill()
            holder.wait()
            others = [job(folder, f"host-{i}" if elsewhere else "host-0") for i in range(1, 4)]
            outcomes = sorted(line(p).split(":")[0] for p in others)
            assert outcomes == ["Busy", "Busy", "held"], outcomes


def test_a_stopped_holder_is_overtaken_and_says_so_when_it_goes_on(tmp_path: Path) -> None:
    with jobs() as job:
        first = job(tmp_path, "host-0")
        assert line(first) == "held"
        assert line(job(tmp_path, "host-1")).startswith("Busy: toy: process")
        os.kill(first.pid, signal.SIGSTOP)
        second = job(tmp_path, "host-1")
        assert line(second) == "held"
        os.kill(first.pid, signal.SIGCONT)
        assert line(first).startswith("StageError: toy: ")
        time.sleep(0.5)
        assert second.poll() is None
        assert record(tmp_path)["pid"] == second.pid
