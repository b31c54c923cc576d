"""Ray's own autoscaler, of which nodes on this machine are asked: from none, while one of them is drained and another
killed. The ingest is real; which pictures its server gives, and when, the test decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from aiohttp import web

from orchestration.cluster import Cluster, _marked
from shards.dataset import Dataset
from tests.faults.test_engine_on_two_nodes import drain
from tests.faults.test_two_nodes import first_node, own_address
from tests.ingest.site import Site, image_bytes
from tests.orchestration.head import ROOT, ended, folder_bytes

ROWS, SHARD, FREE = 48, 2, 8  # pictures; in a shard; so many are given before the gate opens
HEAD = "f" * 51 + "00000"  # the id that Ray's provider of nodes on one machine has for the head
FIRST = {"CPU": 1, "object_store_memory": 80_000_000}


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


@contextlib.contextmanager
def autoscaled(kinds: dict[str, dict[str, float]]) -> Iterator[Cluster]:
    """A head without CPUs, and an autoscaler that makes up to three nodes of each kind. kinds: their resources."""
    types = {k: {"resources": {**FIRST, **more}, "node_config": {}, "max_workers": 3} for k, more in kinds.items()}
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "carrara",
        "max_workers": 8,
        "provider": {
            "type": "external",  # fake_multinode's defaults are a file that Ray's wheel does not have
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD,
            "disable_node_updaters": True,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 5,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    }
    names = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
    more = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with first_node(own_address(), 0, config, {**more, **dict.fromkeys(names, HEAD)}) as cluster:
        yield cluster


def raylets(cluster: Cluster, kind: str) -> dict[str, psutil.Process]:
    """The own processes of the nodes of a kind, by the ids that the autoscaler gave them."""
    found = {}
    for process in _marked(cluster.id):
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and (env := process.environ()).get("RAY_NODE_TYPE_NAME") == kind:
                found[env["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]] = process
    return found


class Gate:
    """Gives the first pictures of a site at once, and the others once it is open. asked: who asked for those."""

    def __init__(self, site: Site) -> None:
        self.open = False
        self.asked: set[int] = set()  # pictures, by number
        self.bodies = [image_bytes(i) for i in range(ROWS)]
        for i in range(ROWS):
            site.pages[f"/{i}.png"] = self._answer

    async def _answer(self, request: web.Request) -> Any:
        i = int(Path(request.path).stem)
        if i >= FREE:
            self.asked.add(i)
        while i >= FREE and not self.open:
            await asyncio.sleep(0.05)
        return web.Response(body=self.bodies[i], content_type="image/png")

    @property
    def shards(self) -> set[int]:
        """The shards that are under way behind the gate."""
        return {i // SHARD for i in self.asked}


def prepare(site: Site, folder: Path, name: str, pool: dict[str, Any]) -> Path:
    """The configuration of a run of its own."""
    pq.write_table(
        pa.table({"url": [site.url(f"/{i}.png") for i in range(ROWS)], "caption": [f"text {i}" for i in range(ROWS)]}),
        folder / "table.parquet",
    )
    fetch = {"allow_addresses": ["127.0.0.1/32"], "timeout": 300}
    config = {
        "run": str(folder / name),
        "ray": {"ingest": pool, "back_off_s": 0.05},
        "ingest": {
            "table": str(folder / "table.parquet"),
            "samples_per_shard": SHARD,
            "image_size": 32,
            "encode_format": "png",
            "fetch": fetch,
        },
        "autoencoder": {"pretrained": str(folder)},
        "clip": {"pretrained": str(folder)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def committed(run: Path) -> dict[str, int]:
    """When each shard's stats were written."""
    return {p.name: p.stat().st_mtime_ns for p in (run / "images").glob("*_stats.json")}


def made(run: Path) -> dict[str, bytes]:
    """What a run made, without what tells of times."""
    return {name: data for name, data in folder_bytes(run / "images").items() if name != "statistics.jsonl"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], said: Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_nodes_come_from_none_and_go_in_mid_run_and_no_row_is_lost_or_twice(site: Site, tmp_path: Path) -> None:
    gate = Gate(site)
    gate.open = True
    local = prepare(site, tmp_path, "local", {})
    command = [sys.executable, "orchestration/run_stage.py", "ingest", "--config"]
    ended(subprocess.Popen([*command, str(local), "--local"], cwd=ROOT, stderr=subprocess.PIPE, text=True))
    expected = made(tmp_path / "local")

    with autoscaled({"plain": {}, "own": {"own": 1}}) as cluster:
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}

        @contextlib.contextmanager
        def under_way(name: str, pool: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], Path]]:
            """A run of its own; at the end its bytes are those of the run in one process."""
            gate.open, said = False, tmp_path / f"{name}.txt"
            gate.asked.clear()
            site.hits.clear()
            config = prepare(site, tmp_path, name, pool)
            with said.open("w") as stderr:
                process = subprocess.Popen([*command, str(config)], cwd=ROOT, env=env, stderr=stderr, text=True)
            try:
                yield process, said
                assert process.wait(200) == 0, said.read_text()
            finally:
                process.kill()
                process.wait()
            assert made(tmp_path / name) == expected
            keys = [
                k
                for f in sorted((tmp_path / name / "images").glob("0*.parquet"))
                for k in pq.read_table(f)["key"].to_pylist()
            ]
            assert len(keys) == len(set(keys)) == len(Dataset.open(str(tmp_path / name / "images"))) == ROWS
            # What a worker's libraries print is passed on by Ray in colour, and is not what the driver says.
            assert "failed" not in "".join(line for line in said.open() if not line.startswith("\x1b"))

        with under_way("span", {"workers": {"min": 1, "max": 3}, "resources": {"own": 0.1}}) as (process, said):
            wait_for(lambda: len(gate.shards) == 3, process, said)  # one on each of the three nodes there may be
            (first, _), (_, raylet), *_ = raylets(cluster, "own").items()
            drain(cluster, first, 120)
            wait_for(lambda: "is being drained; its workers get no more shards" in said.read_text(), process, said)
            os.kill(raylet.pid, signal.SIGKILL)
            gate.open = True
        assert max(site.hits.values()) <= 2  # what was in hand on the node that was killed

        with under_way("null", {"workers": None}) as (process, said):
            wait_for(lambda: len(gate.shards) >= 4, process, said)
            gate.open = True


WAITING = """
import json, math, sys, time
import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from orchestration.nodes import Autoscaler

ray.init()

@ray.remote(num_cpus=1)
class Worker:
    pass

def reported():
    gcs = ray._private.worker.global_worker.gcs_client
    if sys.argv[1] == "1":
        return b"active_nodes" in (gcs.internal_kv_get(b"__autoscaling_status", None) or b"")
    return GetClusterStatusReply.FromString(gcs.get_cluster_status()).HasField("autoscaling_state")

workers = [Worker.remote() for _ in range(4)]
told, until = Autoscaler(), time.monotonic() + 60
while not reported() or told.room({"CPU": 1.0}, 1, 3) > 1:
    assert time.monotonic() < until
    time.sleep(0.5)
workers.clear()
time.sleep(4)
print(told.room({"CPU": 1.0}, 1, 0), told.room({"CPU": 1.0}, 2, 0))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("version", "known"), [("1", "1 2"), ("2", "1 inf")])
def test_ray_says_that_no_node_comes_where_they_were_joined_by_hand(version: str, known: str) -> None:
    """One place, four workers: the other three will wait for ever, which is remembered once they are let go."""
    more = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": str(int(version == "2"))}
    with first_node(own_address(), 1, {}, more) as cluster:
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
        done = subprocess.run(
            [sys.executable, "-c", WAITING, version], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200
        )
    assert known in done.stdout.splitlines(), done.stdout + done.stderr  # among what Ray says of those that wait
