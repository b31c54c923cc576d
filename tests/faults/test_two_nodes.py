"""The latents stage on two Ray nodes, one of which is killed in mid-run: the work finishes, with the same bytes.

The second node is a raylet of its own that joins a head on loopback. Its death is the hard kind: the daemon is gone
at once, its workers live on for a while and go on committing shards that others are given meanwhile.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from orchestration.cluster import Cluster
from shards.dataset import Dataset, verify_shard
from shards.layout import RunPaths
from tests.latents.world import image_dataset, save_clip, save_vae
from tests.orchestration.head import ROOT, ended, folder_bytes

SHARDS, ROWS = 24, 120


@pytest.fixture
def two_nodes() -> Iterator[tuple[Cluster, subprocess.Popen[str]]]:
    """A head with one CPU, and the process that runs a second node with two."""
    with Cluster(cpus=1, cwd=ROOT) as cluster:
        command = [sys.executable, "-m", "orchestration.ray_head", "start", f"--address={cluster.address}", "--block"]
        command += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
        node = subprocess.Popen(
            command,
            cwd=ROOT,
            # On its own it would refuse to be one of several.
            env={**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for(lambda: alive(cluster) == 2, node)
            yield cluster, node
        finally:
            node.terminate()
            node.wait(30)


def alive(cluster: Cluster) -> int:
    nodes = cluster.request("/nodes?view=summary")["data"]["summary"]
    return sum(n["raylet"].get("state") == "ALIVE" for n in nodes)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_killed_in_mid_run_costs_nothing(tmp_path: Path, two_nodes) -> None:  # type: ignore[no-untyped-def]
    cluster, node = two_nodes
    save_vae(tmp_path / "vae")
    save_clip(tmp_path / "clip")
    runs = {}
    for name, workers in (("alone", 1), ("both", 3)):
        run = tmp_path / name
        image_dataset(RunPaths(str(run)), shards=SHARDS, rows=ROWS, corrupt={2: (3,)})
        config = {
            "run": str(run),
            "ray": {"latents": {"workers": workers}, "back_off_s": 0.05},
            "ingest": {"table": str(tmp_path)},
            "autoencoder": {"pretrained": str(tmp_path / "vae")},
            "clip": {"pretrained": str(tmp_path / "clip")},
            "latents": {"resolution": 32, "batch_size": 8, "buckets": {"step": 8}, "device": "cpu"},
        }
        runs[name] = tmp_path / f"{name}.yaml"
        runs[name].write_text(yaml.safe_dump(config))

    def start(name: str, *words: str) -> subprocess.Popen[str]:
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
        command = [sys.executable, "orchestration/run_stage.py", "latents", "--config", str(runs[name]), *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    ended(start("alone", "--local"))
    expected = folder_bytes(tmp_path / "alone/latents")

    latents = tmp_path / "both/latents"
    process = start("both")
    there = psutil.Process(node.pid)
    raylet = next(p for p in there.children(recursive=True) if p.name() == "raylet")

    def workers_of_the_node() -> int:
        return sum("ShardWorker.process" in " ".join(p.cmdline()) for p in raylet.children() if p.is_running())

    wait_for(lambda: workers_of_the_node() >= 1 and len(list(latents.glob("*_stats.json"))) >= 2, process)
    os.kill(raylet.pid, signal.SIGKILL)
    assert len(list(latents.glob("*_stats.json"))) < SHARDS, "killed in mid-run"
    ended(process)

    assert folder_bytes(latents) == expected, "the same bytes from one process and from what was left of two nodes"
    dataset = Dataset.open(str(latents))
    assert not any(verify_shard(str(latents), i) for i in range(SHARDS))
    keys = [k for i in range(SHARDS) for k in pq.read_table(latents / f"{i:05d}.parquet")["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == SHARDS * ROWS == dataset.manifest["rows"]
