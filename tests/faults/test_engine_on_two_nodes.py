"""The engine on two Ray nodes, one of which is bad, has a full disk, or is drained: work goes on, nobody is blamed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.cluster import Cluster
from shards.dataset import Dataset
from tests.faults.test_two_nodes import alive, ending, first_node, second_node, wait_for
from tests.orchestration.head import ROOT
from tests.orchestration.test_engine import calls


def start(
    cluster: Cluster, folder: Path, options: dict[str, Any], stderr: Any = subprocess.PIPE
) -> subprocess.Popen[str]:
    env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "tests.orchestration.drive", str(folder), json.dumps(options)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def drain(cluster: Cluster, node: str, seconds: int) -> None:
    """What an autoscaler does with a spot node whose end was announced."""
    ray = str(Path(sys.executable).parent / "ray")
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", f"--node-id={node}"]
    words += [f"--deadline-remaining-seconds={seconds}", f"--address={cluster.address}"]
    done = subprocess.run([ray, "drain-node", *words], env=cluster.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def other_node(cluster: Cluster) -> str:
    """The id of the node that is not the head."""
    nodes = cluster.request("/nodes?view=summary")["data"]["summary"]
    return str(next(n["raylet"]["nodeId"] for n in nodes if not n["raylet"]["isHeadNode"]))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_bad_node_is_left_out_and_a_drained_one_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces need root")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # which address would be used; nothing is sent
        s.connect(("10.255.255.255", 1))
        address = s.getsockname()[0]
    with first_node(address) as cluster:
        monkeypatch.setenv("TOY_NODE", "bad")
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        # The second node has a disk of its own there, which has no room.
        small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', str(scratch)]
        node = second_node(cluster, address, *small)
        monkeypatch.delenv("TOY_NODE")
        with ending(node):
            wait_for(lambda: alive(cluster) == 2, node)
            for how in ("raise", "die"):
                folder = tmp_path / how
                process = start(cluster, folder, {"workers": 3, "start": f"{how} bad", "seconds": 1.0, "shards": 60})
                _, err = process.communicate(timeout=250)
                assert process.returncode == 0, err
                assert f"node {socket.gethostname()} ({address}) is left out from now on" in err
                assert ("no such weights" in err) == (how == "raise")
                assert calls(folder) == list(range(60))

            folder = tmp_path / "full"
            options = {"workers": 3, "attempts": 1, "seconds": 0.3, "shards": 60, "scratch": str(scratch)}
            process = start(cluster, folder, options)
            _, err = process.communicate(timeout=250)
            assert process.returncode == 0, err
            assert f"node {socket.gethostname()} ({address}) is left out from now on: the disk is full" in err
            assert set(calls(folder)) == set(range(60))
            assert not list((folder / "status").glob("toy-failed/*")), "no shard is blamed for a disk"

            # Every worker has a shard in hand, which none ends before the driver knows that the node is drained.
            folder, gate, said = tmp_path / "drained", tmp_path / "gate", tmp_path / "said.txt"
            options = {"workers": 3, "seconds": 0.5, "shards": 24, "gated": 12, "gate": str(gate)}
            with said.open("w") as stderr:
                process = start(cluster, folder, options, stderr)
            wait_for(lambda: len({p.name.split("-")[1] for p in (folder / "calls").glob("1[2-9]-*")}) == 3, process)
            drain(cluster, other_node(cluster), 120)
            wait_for(lambda: "is being drained; its workers get no more shards" in said.read_text(), process)
            gate.touch()
            process.wait(250)
            err = said.read_text()
            assert process.returncode == 0, err
            assert calls(folder) == list(range(24)), "what was in hand there was finished, and made once"
            assert "failed" not in err
            assert len(Dataset.open(str(folder / "toy"))) == 24 * 50
            late = sorted((folder / "calls").glob("*"), key=lambda p: os.stat(p).st_mtime)[-6:]
            assert len({p.name.split("-")[1] for p in late}) == 1, "at the end the other node's one worker is alone"
