"""Attempts of one RayJob that overlap: KubeRay begins the next while the one before still runs somewhere.

Both are jobs of Ray with the very entrypoint that the manifests have. Each is told that it is on a host of its own, as
it is on Kubernetes, where every attempt has a cluster of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.dataset import Dataset
from tests.deploy.test_kubernetes import job_spec, rendered
from tests.faults.test_autoscaling import ROWS, Gate, committed, prepare
from tests.ingest.site import Site
from tests.orchestration.head import ROOT, head

# As pods differ; and with a shorter patience than 90 seconds.
ELSEWHERE = """
import os
from orchestration import lease
lease._host = lambda: os.environ["TEST_POD"]
lease.BEAT_S, lease.LOST_S, lease.WATCH_S = 0.3, 3.0, 4.0
"""


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


def submit(attempt: str, config: Path) -> None:
    """The request that `ray job submit` of KubeRay's submitter makes."""
    [job] = [spec for resource in rendered("stages/ingest") if (spec := job_spec(resource))]
    entrypoint = shlex.split(job["entrypoint"])
    assert entrypoint == ["carrara", "ingest", "--config", "/etc/carrara/run.yaml"]
    cluster, words = head(), [str(config) if w == "/etc/carrara/run.yaml" else w for w in entrypoint]
    variables = {"TEST_POD": attempt, "PYTHONPATH": os.pathsep.join([str(config.parent / "elsewhere"), str(ROOT)])}
    job = {"submission_id": attempt, "entrypoint": shlex.join(words), "runtime_env": {"env_vars": variables}}
    assert cluster.request("/api/jobs/", job)["submission_id"] == attempt


def log(attempt: str) -> str:
    return str(head().request(f"/api/jobs/{attempt}/logs")["logs"])


def until(attempt: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, log(attempt)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the manifests; it is not here")
def test_of_two_attempts_one_works_and_once_it_is_killed_the_next_goes_on(site: Site, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/sitecustomize.py").write_text(ELSEWHERE)
    gate = Gate(site)
    config = prepare(site, tmp_path, "run", {"workers": 1})
    first, second, third = (f"{tmp_path.name}-{i}" for i in range(3))
    try:
        submit(first, config)
        until(first, lambda: bool(gate.shards))
        done = committed(tmp_path / "run")

        submit(second, config)
        until(second, lambda: head().job(second).get("status") == "FAILED")
        assert head().job(second)["driver_exit_code"] == 1
        [lease] = (tmp_path / "run/status/ingest.lock").iterdir()
        holder = json.loads(lease.read_text())
        assert holder["host"] == first
        said = [line for line in log(second).splitlines() if line.startswith("carrara: ")]
        assert said == [
            f"carrara: ingest: process {holder['pid']} on {holder['hostname']} is already working on "
            f"{tmp_path}/run/images; wait until it has ended, or stop it"
        ]
        assert "Traceback" not in log(second)
        assert head().job(first)["status"] == "RUNNING"

        os.kill(holder["pid"], signal.SIGKILL)
        gate.open = True
        submit(third, config)
        until(third, lambda: head().job(third).get("status") in ("SUCCEEDED", "FAILED"))
        assert head().job(third)["status"] == "SUCCEEDED", log(third)
    finally:
        for attempt in (first, second, third):
            head().request(f"/api/jobs/{attempt}/stop", {})
    assert len(Dataset.open(str(tmp_path / "run/images"))) == ROWS
    after = committed(tmp_path / "run")
    assert len(done) >= 1
    assert {name: after[name] for name in done} == done, "nothing was made twice"
    assert max(site.hits.values()) <= 2
