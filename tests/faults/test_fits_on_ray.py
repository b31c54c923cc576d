"""A fit on a real Ray, a rank killed and the job stopped: it ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from orchestration.gang import RankDied, environments, root_cause
from shards.settings import ConfigError, StageError
from tests.faults import test_two_nodes as two_nodes
from tests.orchestration.head import ROOT, actors, ended, head, run_stage, wait_for
from tests.train import forked, tiny
from train.checkpoint import load_weights
from train.folders import folders, latest_complete, name_of, read_manifest

IMAGES, EVERY = 2000, 200


def write_config(run: Path) -> Path:
    data = tiny.configuration(run)
    data["autoencoder"] |= {"images": IMAGES, "checkpoint_every_images": EVERY, "keep_checkpoints": 20, "ranks": 2}
    return tiny.write_config(run, {**data, "ingest": {"table": str(run)}})


def ranks() -> set[int]:
    """Process ids of the ranks that are fitting on the cluster."""
    return actors("Rank.fit")


def checkpoints(run: Path) -> list[str]:
    return folders(run / "autoencoder" / "checkpoints")


def digests(run: Path) -> dict[str, str]:
    last = latest_complete(run / "autoencoder" / "checkpoints")
    assert last is not None
    manifest = read_manifest(last)
    assert manifest["images"] == IMAGES
    # What a file of pieces is called ends in a part that is its writer's.
    return {re.sub(r"-[0-9a-f]{8}(?=\.)", "", name): file["sha256"] for name, file in manifest["files"].items()}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("clean")
    tiny.make_images(folder / "images")
    forked.fit(write_config(folder), 2, stage="autoencoder")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_and_a_stopped_job_cost_time_and_nothing_else(run: Path, clean: Path) -> None:
    config = write_config(run)
    process = run_stage("autoencoder", config)
    wait_for(lambda: len(checkpoints(run)) >= 2, process)
    first = ranks()
    assert len(first) == 2
    os.kill(min(first), signal.SIGKILL)
    before = len(checkpoints(run))
    wait_for(lambda: bool(ranks()) and not first & ranks(), process)
    wait_for(lambda: len(checkpoints(run)) > before, process)
    process.send_signal(signal.SIGTERM)
    said = ended(process, 75)
    assert "stopped by SIGTERM at" in said, said[-2000:]
    newest = latest_complete(run / "autoencoder" / "checkpoints")
    assert newest is not None
    at = read_manifest(newest)["images"]
    assert EVERY < at < IMAGES
    assert at % EVERY, "saved where it stopped, not where a checkpoint was due anyway"

    err = ended(run_stage("autoencoder", config))
    assert "rank died" not in err
    assert digests(run) == digests(clean)
    assert "nothing to do" in ended(run_stage("autoencoder", config))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_lost_in_mid_run_leaves_fewer_ranks_that_go_on(run: Path, clean: Path) -> None:
    """Two ranks; the node of at least one of them is killed; by itself the fit goes on with the one that has room."""
    data = yaml.safe_load(write_config(run).read_text())
    data["ray"] = {"autoencoder": {"min_ranks": 1}, "wait_for_nodes_s": 5}
    config = tiny.write_config(run, data)
    with two_nodes.killed() as both:
        two_nodes.wait_for(lambda: two_nodes.alive(both.cluster) == 2, both.node)
        env = {**both.cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": both.cluster.address}
        command = [sys.executable, "orchestration/run_stage.py", "autoencoder", "--config", str(config)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(checkpoints(run)) >= 2, process)
        both.lose()
        assert len(checkpoints(run)) < IMAGES // EVERY - 1, "killed in mid-run"
        said = ended(process)
    assert "a rank died" in said
    assert "going on with fewer" in said
    last = latest_complete(run / "autoencoder" / "checkpoints")
    undisturbed = latest_complete(clean / "autoencoder" / "checkpoints")
    assert last is not None
    assert undisturbed is not None
    manifest = read_manifest(last)
    assert (name_of(last), manifest["images"]) == (name_of(undisturbed), IMAGES)
    # Sums in another order: the same weights up to what 250 steps make of rounding.
    ours, theirs = (load_weights(f, "ema") for f in (last, undisturbed))
    far = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    assert far < 1e-2**2 * sum(float(v.square().sum()) for v in theirs.values())


def test_ranks_get_what_a_launcher_would_set() -> None:
    processes = [
        SimpleNamespace(node=n, address=a, port=p)
        for n, a, p in (("x", "10.0.0.1", 5), ("x", "10.0.0.1", 6), ("y", "10.0.0.2", 7))
    ]
    found = environments(processes)
    assert [(e["RANK"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"], e["WORLD_SIZE"]) for e in found] == [
        ("0", "0", "2", "3"),
        ("1", "1", "2", "3"),
        ("2", "0", "1", "3"),
    ]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in found} == {("10.0.0.1", "5")}
    assert all("GLOO_SOCKET_IFNAME" not in e for e in found)


def test_the_reason_is_found_among_what_follows_from_it() -> None:
    lost = RuntimeError("Connection closed by peer")
    assert isinstance(root_cause([lost, StageError("the loss is nan")]), StageError)
    assert str(root_cause([lost, ConfigError("lower it")])) == "lower it"
    died = root_cause([lost, lost])
    assert isinstance(died, RankDied)
    assert "Connection closed" in str(died)


GROWS = """
import time
from ray.util import placement_group_table
from orchestration.config import RayConfig, Ranks
from orchestration.connection import connected
from orchestration.gang import Gang

def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)

def waiting(state="PENDING"):
    return [len(g["bundles"]) for g in placement_group_table().values() if g["state"] == state]

with connected(RayConfig()):
    with Gang("train", 1, Ranks(), 60, lambda: None) as gang:
        print([gang.room_for(0), gang.room_for(5), gang.room_for(5)], waiting(), flush=True)
    until(lambda: not waiting())
    with Gang("train", 1, Ranks(), 60, lambda: None) as gang:
        gang.room_for(1)
        until(lambda: len(waiting("CREATED")) == 2)
        print({gang.room_for(1) for _ in range(10)}, flush=True)  # said whenever it is asked, once there is room
    with Gang("train", 2, Ranks(), 60, lambda: None) as gang:  # nothing of what was asked for is left in its way
        print(len(gang.processes), flush=True)
"""


@pytest.mark.slow
def test_the_places_of_missing_ranks_are_asked_for_where_an_autoscaler_sees_it() -> None:
    cluster = head()
    env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", GROWS], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == ["['', '', ''] [5]", "{'there is room for 1 ranks more'}", "2"], done.stderr
