"""The head's control store (GCS) dies in mid-stage and is started again, with its tables in Redis: the driver and its
workers live through it, and what the run needs of Ray afterwards, a new worker, comes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestration.cluster import Cluster, _marked, end_marked
from shards.dataset import Dataset
from tests.faults.test_engine_on_ray import committed, ended
from tests.faults.test_engine_on_two_nodes import start
from tests.faults.test_two_nodes import ending, free_port, wait_for
from tests.orchestration.drive import toy
from tests.orchestration.head import ROOT, folder_bytes
from tests.orchestration.test_engine import calls, local


@contextlib.contextmanager
def redis() -> Iterator[tuple[str, str]]:
    """(address, password) of a Redis on loopback that keeps nothing on disk."""
    port, password = free_port("127.0.0.1"), secrets.token_hex(16)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [*command, "--save", "", "--appendonly", "no", "--dir", folder], stdout=subprocess.DEVNULL, text=True
        )
        with ending(server):
            yield f"127.0.0.1:{port}", password


@contextlib.contextmanager
def head() -> Iterator[Cluster]:
    """A head whose tables are in Redis. Its processes are on their own: `ray start --block` would end them all once one
    of them is gone, as a container would."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # which address would be used; nothing is sent
        s.connect(("10.255.255.255", 1))
        address = s.getsockname()[0]
    cluster = Cluster(cpus=2, cwd=ROOT)
    port, dashboard = (free_port(address) for _ in range(2))
    cluster.address, cluster.url = f"{address}:{port}", f"http://{address}:{dashboard}"
    command = [sys.executable, "-m", "orchestration.ray_head", "start", "--head", "--num-cpus=2", "--no-monitor"]
    command += [f"--node-ip-address={address}", f"--port={port}", "--object-store-memory=100000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", "--include-dashboard=false"]
    with (
        redis() as (where, password),
        tempfile.TemporaryDirectory(prefix="carrara-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        env |= {"RAY_REDIS_ADDRESS": where, "RAY_external_storage_namespace": cluster.id}
        command += [f"--redis-password={password}", f"--temp-dir={folder}"]
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
            yield cluster
        finally:
            end_marked(cluster.id)


def gcs_of(cluster: Cluster) -> psutil.Process:
    return next(p for p in _marked(cluster.id) if p.name() == "gcs_server")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server of Debian is not here")
def test_the_driver_goes_on_once_the_control_store_is_back(tmp_path: Path) -> None:
    local(toy(tmp_path / "clean"))
    with head() as cluster:
        folder, gate = tmp_path / "run", tmp_path / "gate"
        process = start(cluster, folder, {"workers": 2, "gate": str(gate), "gated": 4})
        wait_for(lambda: committed(folder) == {0, 1, 2, 3} and len(calls(folder)) == 6, process)
        gcs = gcs_of(cluster)
        command, env, cwd = gcs.cmdline(), gcs.environ(), gcs.cwd()
        gcs.kill()
        gcs.wait(20)
        time.sleep(8)  # in which the driver asks for nodes at least once
        assert process.poll() is None
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        again = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True, **quiet)
        with ending(again):
            # Of those two in hand, one dies now: for its shard the new control store makes another worker.
            os.kill(int(next((folder / "calls").glob("5-*")).name.split("-")[1]), signal.SIGKILL)
            gate.touch()
            code, err = ended(process)
            assert code == 0, err
    assert folder_bytes(folder / "toy") == folder_bytes(tmp_path / "clean/toy")
    assert calls(folder) == sorted([*range(12), 5]), json.dumps(calls(folder))
    assert len(Dataset.open(str(folder / "toy"))) == 12 * 50
