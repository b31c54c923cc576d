"""What happens to the engine on a real Ray when things die: poison shards, killed workers, killed drivers, stops."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from subprocess import PIPE, Popen

import psutil
import pytest

from orchestration.cluster import Cluster
from shards.dataset import Dataset
from shards.settings import StageError
from tests.orchestration.drive import toy
from tests.orchestration.head import ROOT, drive, folder_bytes, start
from tests.orchestration.test_engine import calls, local


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("clean")
    local(toy(folder))
    return folder_bytes(folder / "toy")


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def committed(folder: Path) -> set[int]:
    return {int(p.name[:5]) for p in (folder / "toy").glob("*_stats.json")}


def ended(process: Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_poison_shards_are_set_aside_and_the_rest_is_committed(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options = {"workers": 2, "misbehave": [[3, "die"], [5, "raise"], [7, "raise-once"]]}
    code, err = drive(tmp_path, json.dumps(options))
    assert code == 1, err
    assert "2 of 12 shards failed" in err
    assert "(00003, 00005)" in err
    assert committed(tmp_path) == set(range(12)) - {3, 5}
    counts = Counter(calls(tmp_path))
    assert (counts[3], counts[5], counts[7]) == (3, 3, 2)
    assert all(counts[i] == 1 for i in set(range(12)) - {3, 5, 7})
    assert not (tmp_path / "toy/dataset.json").exists()
    died = json.loads((tmp_path / "status/toy-failed/00003.json").read_text())
    assert "worker process died" in died["error"]
    assert "does not like this" in json.loads((tmp_path / "status/toy-failed/00005.json").read_text())["traceback"]
    # The cause is gone: the same command makes these two, and no other.
    code, err = drive(tmp_path, json.dumps({"workers": 1}))
    assert code == 0, err
    assert Counter(calls(tmp_path)) - counts == Counter({3: 1, 5: 1})
    assert folder_bytes(tmp_path / "toy") == clean


def test_the_company_of_a_poison_shard_is_not_blamed(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options = {"workers": 1, "max_in_flight": 3, "seconds": 0.2, "misbehave": [[4, "die"]]}
    code, err = drive(tmp_path, json.dumps(options))
    assert code == 1, err
    assert "1 of 12 shards failed" in err
    assert "(00004)" in err
    assert committed(tmp_path) == set(range(12)) - {4}
    counts = Counter(calls(tmp_path))
    assert counts[4] == 1 + 3, "once in company, and three times alone"
    assert all(counts[i] <= 2 for i in set(range(12)) - {4})
    code, err = drive(tmp_path, json.dumps({"workers": 1, "max_in_flight": 2}))
    assert code == 0, err
    assert folder_bytes(tmp_path / "toy") == clean


def gated(folder: Path, gated: int) -> tuple[str, Path]:
    """Options for a run whose shards from `gated` on wait until the returned file is there."""
    return json.dumps({"workers": 2, "gate": f"{folder}/gate", "gated": gated}), folder / "gate"


def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options, gate = gated(tmp_path, 4)
    process = start(tmp_path, options)
    wait_for(lambda: committed(tmp_path) == {0, 1, 2, 3} and len(calls(tmp_path)) == 6)
    victim = next((tmp_path / "calls").glob("5-*"))
    os.kill(int(victim.name.split("-")[1]), signal.SIGKILL)
    gate.touch()
    code, err = ended(process)
    assert code == 0, err
    assert folder_bytes(tmp_path / "toy") == clean
    assert len(Dataset.open(str(tmp_path / "toy"))) == 600
    assert calls(tmp_path) == sorted([*range(12), 5])


def test_a_killed_driver_blocks_nobody_and_the_same_command_finishes(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options, gate = gated(tmp_path, 4)
    process = start(tmp_path, options)
    wait_for(lambda: committed(tmp_path) == {0, 1, 2, 3} and len(calls(tmp_path)) == 6)
    workers = {int(p.name.split("-")[1]) for p in (tmp_path / "calls").iterdir()}
    process.kill()
    process.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in workers), 20)
    done = {i: (tmp_path / f"toy/{i:05d}_stats.json").stat().st_mtime_ns for i in committed(tmp_path)}
    assert set(done) == {0, 1, 2, 3}
    [left] = (tmp_path / "status/toy.lock").iterdir()
    assert "released" not in json.loads(left.read_text())
    gate.touch()
    code, err = drive(tmp_path, options)
    assert code == 0, err
    assert folder_bytes(tmp_path / "toy") == clean
    assert calls(tmp_path) == sorted([*range(12), 4, 5])  # the two in hand once more, nothing else twice
    assert all((tmp_path / f"toy/{i:05d}_stats.json").stat().st_mtime_ns == t for i, t in done.items())
    [left] = (tmp_path / "status/toy.lock").iterdir()
    assert json.loads(left.read_text())["released"]


def test_a_second_job_is_refused_and_sigterm_leaves_a_run_that_goes_on(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options, gate = gated(tmp_path, 4)
    process = start(tmp_path, options)
    wait_for(lambda: len(calls(tmp_path)) == 6)
    code, err = drive(tmp_path, options)
    assert code == 1, err
    assert f"toy: process {process.pid} on" in err
    assert "is already working on" in err
    with pytest.raises(StageError, match=f"process {process.pid} on .* is already working on"):
        local(toy(tmp_path))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    gate.touch()
    code, err = ended(process)
    assert code == 75, err
    assert "the same command goes on from here" in err
    assert committed(tmp_path) == set(range(6)), "the shards in hand are finished, no other is begun"
    assert calls(tmp_path) == list(range(6))
    local(toy(tmp_path))
    assert calls(tmp_path) == list(range(12))
    assert folder_bytes(tmp_path / "toy") == clean


def test_a_stop_does_not_wait_longer_than_its_grace(tmp_path: Path) -> None:
    process = start(tmp_path, json.dumps({"workers": 1, "seconds": 60.0, "grace_s": 0.5}))
    wait_for(lambda: len(calls(tmp_path)) >= 1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, err = ended(process)
    assert code == 75, err
    assert time.monotonic() - began < 15
    assert committed(tmp_path) == set()


def test_workers_that_cannot_start_or_find_no_room_end_the_run(tmp_path: Path) -> None:
    code, err = drive(tmp_path, json.dumps({"workers": 1, "start": "raise"}))
    assert code == 1, err
    assert "toy: workers do not start: OSError: no such weights" in err
    code, err = drive(tmp_path, json.dumps({"num_cpus": 64, "wait_for_nodes_s": 0}))
    assert code == 1, err
    assert "no node has room for a worker (it needs {'CPU': 64.0}, the cluster has {'CPU': 2.0})" in err
    assert calls(tmp_path) == []


def test_a_shard_that_hangs_is_ended_and_made_by_another_worker(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options = {"workers": 2, "deadline_s": 3.0, "misbehave": [[5, "hang-once"]]}
    began = time.monotonic()
    code, err = drive(tmp_path, json.dumps(options))
    assert code == 0, err
    assert time.monotonic() - began < 110, "the start of the Ray included"
    assert "shard 00005 failed (1 of 3)" in err
    assert "so its worker was ended" in err
    assert calls(tmp_path) == sorted([*range(12), 5])
    assert folder_bytes(tmp_path / "toy") == clean
    first, second = (int(p.name.split("-")[1]) for p in (tmp_path / "calls").glob("5-*"))
    assert first != second, "by another process"


def test_trouble_of_the_machine_gives_the_shard_back_uncounted(tmp_path: Path, clean: dict[str, bytes]) -> None:
    options = {"workers": 2, "attempts": 1, "misbehave": [[5, "trouble-once"]]}
    code, err = drive(tmp_path, json.dumps(options))
    assert code == 0, err
    assert "no name can be looked up here (1 of 3)" in err
    assert calls(tmp_path) == sorted([*range(12), 5])
    assert folder_bytes(tmp_path / "toy") == clean
    assert not list((tmp_path / "status").glob("toy-failed/*"))


@pytest.mark.slow
def test_a_node_short_of_memory_is_blamed_and_no_shard(
    tmp_path: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own monitor ends a worker where the machine has more in use than it is to have."""
    memory, plain = psutil.virtual_memory(), Cluster.environment
    limit = {"RAY_memory_usage_threshold": f"{1 - (memory.available - 2e9) / memory.total:.4f}"}
    monkeypatch.setattr(Cluster, "environment", lambda self: {**plain(self), **limit})
    options = {"workers": 1, "attempts": 5, "node_strikes": 99, "misbehave": [[5, "eat-once"]]}
    with Cluster(cpus=2, cwd=ROOT) as cluster:
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
        command = [sys.executable, "-m", "tests.orchestration.drive", str(tmp_path), json.dumps(options)]
        code, err = ended(Popen(command, cwd=ROOT, env=env, stderr=PIPE, text=True))
    assert code == 0, err
    assert "the node is short of memory (1 of 99)" in err
    assert set(calls(tmp_path)) == set(range(12))
    assert len(calls(tmp_path)) >= 13  # what else is on this machine may take memory, too
    assert folder_bytes(tmp_path / "toy") == clean


def test_trouble_that_stays_leaves_the_node_out_and_names_it(tmp_path: Path) -> None:
    options = {"workers": 2, "misbehave": [[i, "trouble"] for i in range(12)]}
    code, err = drive(tmp_path, json.dumps(options))
    assert code == 1, err
    assert "is left out from now on: no name can be looked up here" in err
    assert "no node is left to work on, all were left out (node " in err
    assert not list((tmp_path / "status").glob("toy-failed/*")), "no shard is blamed"


def test_the_memory_of_a_worker_is_measured_and_claimed_by_the_next_run(tmp_path: Path) -> None:
    code, err = drive(tmp_path, json.dumps({"workers": 2}))
    assert code == 0, err
    measured = json.loads((tmp_path / "status/toy.json").read_text())["figures"]["worker_gb"]
    assert 0.05 < measured < 3
    for file in (tmp_path / "toy").glob("00003*"):
        file.unlink()
    # The most that a node has is claimed at most: a claim from a machine that was larger must not block this one.
    record = json.loads((tmp_path / "status/toy.json").read_text())
    record["figures"]["worker_gb"] = 100_000.0
    (tmp_path / "status/toy.json").write_text(json.dumps(record))
    code, err = drive(tmp_path, json.dumps({"workers": 2}))
    assert code == 0, err
    code, err = drive(tmp_path / "large", json.dumps({"memory_gb": 100_000.0, "wait_for_nodes_s": 0}))
    assert code == 1, err
    assert "no node has room for a worker (it needs {'CPU': 1.0, 'memory': '100000.0 GB'}" in err
