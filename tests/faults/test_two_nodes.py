"""The latents stage on two Ray nodes, one of which is killed in mid-run: the work finishes, with the same bytes.

Both losses are of the hard kind: the node's workers live on for a while, and go on committing shards that others are
given meanwhile, since the files lie on a disk that both see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from orchestration.cluster import Cluster, end_marked
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.verify import verify_shard
from tests.latents.world import image_dataset, save_clip, save_vae
from tests.orchestration.head import ROOT, ended, folder_bytes, run_here

SHARDS, ROWS = 24, 40


@dataclasses.dataclass
class Nodes:
    """Two nodes under way. cluster: the first, with one CPU; node: the process that runs the second, with two."""

    cluster: Cluster
    node: subprocess.Popen[str]
    lose: Callable[[], None]  # what happens to the second


def own_address() -> str:
    """Of this machine, as other nodes reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # which address would be used; nothing is sent
        s.connect(("10.255.255.255", 1))
        return str(s.getsockname()[0])


@contextlib.contextmanager
def first_node(
    address: str, cpus: int = 1, scaling: dict[str, Any] | None = None, more: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """A head at an address that other nodes can reach, which loopback is not for Ray; with a token, as everywhere.
    scaling: the configuration of an autoscaler beside it, {} for none; None: nothing reports. more: variables of its
    environment."""
    cluster = Cluster(cpus=cpus, cwd=ROOT)
    port, dashboard = (free_port(address) for _ in range(2))
    cluster.address, cluster.url = f"{address}:{port}", f"http://{address}:{dashboard}"
    command = [sys.executable, "-m", "orchestration.ray_head", "start", "--head", "--block", f"--num-cpus={cpus}"]
    command += [f"--node-ip-address={address}", f"--port={port}", f"--dashboard-host={address}"]
    command += [f"--dashboard-port={dashboard}", "--object-store-memory=100000000", "--disable-usage-stats"]
    # Sockets lie in the folder, whose paths may not be long; and /tmp/ray is where other Rays are looked for.
    with tempfile.TemporaryDirectory(prefix="carrara-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"]
        if scaling is None:
            command.append("--no-monitor")
        elif scaling:
            scaling["provider"]["gcs_address"] = cluster.address
            (Path(folder) / "autoscaler.yaml").write_text(yaml.safe_dump(scaling))
            command.append(f"--autoscaling-config={folder}/autoscaler.yaml")
        head = start_ray(cluster, command, more)
        try:
            with ending(head):
                wait_for(lambda: alive(cluster) == 1, head)
                yield cluster
        finally:
            end_marked(cluster.id)


def second_node(cluster: Cluster, address: str, *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "orchestration.ray_head", "start", f"--address={cluster.address}"]
    command += ["--block", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
    command += [f"--node-ip-address={address}", "--min-worker-port=0", "--max-worker-port=0"]
    return start_ray(cluster, command)


def start_ray(cluster: Cluster, command: list[str], more: dict[str, str] | None = None) -> subprocess.Popen[str]:
    # With what keeps our own heads to themselves, Ray would refuse to be one of several.
    env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", **(more or {})}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, **quiet)


@contextlib.contextmanager
def killed() -> Iterator[Nodes]:
    """The second node's daemon is killed; its workers live on for a while."""
    address = own_address()
    with first_node(address) as cluster:
        node = second_node(cluster, address)
        with ending(node):
            yield Nodes(cluster, node, lambda: os.kill(raylet_of(node).pid, signal.SIGKILL))


@contextlib.contextmanager
def cut_off() -> Iterator[Nodes]:
    """The second node is in a network namespace of its own, and the cable is pulled; all its processes live on."""
    name, here, there = f"carrara{os.getpid()}", "10.213.77.1", "10.213.77.2"
    cable = f"ca{os.getpid()}"[:14]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", "inside", "netns", name)
        ip("addr", "add", f"{here}/30", "dev", cable)
        ip("link", "set", cable, "up")
        ip("-n", name, "addr", "add", f"{there}/30", "dev", "inside")
        ip("-n", name, "link", "set", "inside", "up")
        ip("-n", name, "link", "set", "lo", "up")
        with first_node(here) as cluster:
            node = second_node(cluster, there, "ip", "netns", "exec", name)
            with ending(node):
                yield Nodes(cluster, node, lambda: ip("link", "set", cable, "down"))
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def free_port(address: str) -> int:
    with socket.socket() as s:
        s.bind((address, 0))
        return int(s.getsockname()[1])


def raylet_of(node: subprocess.Popen[str]) -> psutil.Process:
    return next(p for p in psutil.Process(node.pid).children(recursive=True) if p.name() == "raylet")


def alive(cluster: Cluster) -> int:
    try:
        nodes = cluster.request("/nodes?view=summary")["data"]["summary"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return sum(n["raylet"].get("state") == "ALIVE" for n in nodes)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The folder of a VAE and a CLIP, and what one process makes with them."""
    folder = tmp_path_factory.mktemp("alone")
    save_vae(folder / "vae")
    save_clip(folder / "clip")
    run_here("latents", prepare(folder, folder / "run", workers=1))
    return folder, folder_bytes(folder / "run/latents")


def prepare(weights: Path, run: Path, workers: int) -> Path:
    """A run's image shards and its configuration."""
    image_dataset(RunPaths(str(run)), shards=SHARDS, rows=ROWS, corrupt={2: (3,)})
    config = {
        "run": str(run),
        "ray": {"latents": {"workers": workers}, "back_off_s": 0.05},
        "ingest": {"table": str(weights), "resize_mode": "keep_ratio"},
        "autoencoder": {"pretrained": str(weights / "vae")},
        "clip": {"pretrained": str(weights / "clip")},
        "latents": {"resolution": 64, "batch_size": 8, "buckets": {"step": 16}, "device": "cpu"},
    }
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", [killed, pytest.param(cut_off, marks=pytest.mark.nightly)])
def test_a_node_lost_in_mid_run_costs_nothing(
    tmp_path: Path,
    nodes: Callable[[], contextlib.AbstractContextManager[Nodes]],
    alone: tuple[Path, dict[str, bytes]],
) -> None:
    weights, expected = alone
    with nodes() as both:
        wait_for(lambda: alive(both.cluster) == 2, both.node)
        config = prepare(weights, tmp_path / "both", workers=3)
        env = {**both.cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": both.cluster.address}
        command = [sys.executable, "orchestration/run_stage.py", "latents", "--config", str(config)]
        latents = tmp_path / "both/latents"
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        raylet = raylet_of(both.node)

        def workers_of_the_node() -> int:
            return sum("ray::ShardWorker" in " ".join(p.cmdline()) for p in raylet.children() if p.is_running())

        wait_for(lambda: workers_of_the_node() >= 1 and len(list(latents.glob("*_stats.json"))) >= 2, process)
        both.lose()
        assert len(list(latents.glob("*_stats.json"))) < SHARDS, "killed in mid-run"
        ended(process)

    assert folder_bytes(latents) == expected, "the same bytes from one process and from what was left of two nodes"
    dataset = Dataset.open(str(latents))
    assert not any(verify_shard(str(latents), i) for i in range(SHARDS))
    keys = [k for i in range(SHARDS) for k in pq.read_table(latents / f"{i:05d}.parquet")["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == SHARDS * ROWS == dataset.manifest["rows"]
