"""Our own Ray head: closed to strangers, on loopback alone, jobs as a user submits them, nothing left behind."""

from __future__ import annotations

import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from orchestration.cluster import MARK, Cluster, _marked, end_recorded
from shards.dataset import Dataset
from tests.orchestration.head import ROOT, drive, head


class Pictures(http.server.BaseHTTPRequestHandler):
    """Answers every path with a small PNG of its own colour."""

    def do_GET(self) -> None:
        buffer = io.BytesIO()
        shade = sum(self.path.encode()) % 256
        Image.fromarray(np.full((64, 64, 3), (shade, 90, 255 - shade), np.uint8)).save(buffer, "PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(buffer.tell()))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pictures():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_nobody_gets_in_without_the_token() -> None:
    cluster = head()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        for path in ("/api/version", "/api/jobs/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                opener.open(urllib.request.Request(cluster.url + path, headers=headers), timeout=10)
            assert refused.value.code in (401, 403)
    assert cluster.request("/api/jobs/") is not None
    job = {"entrypoint": "touch /tmp/never", "submission_id": "stranger"}
    request = urllib.request.Request(cluster.url + "/api/jobs/", json.dumps(job).encode(), method="POST")
    with pytest.raises(urllib.error.HTTPError):
        opener.open(request, timeout=10)
    assert cluster.job("stranger") == {}


def test_it_listens_on_loopback_alone_and_writes_no_address_file() -> None:
    cluster = head()
    ports = [c.laddr for p in _marked(cluster.id) for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(ports) >= 5
    assert {ip.removeprefix("::ffff:") for ip, _ in ports} == {"127.0.0.1"}
    shared = Path("/tmp/ray/ray_current_cluster")
    assert not shared.exists() or cluster.address not in shared.read_text()


def test_a_job_resolves_the_run_from_where_ray_was_started(
    tmp_path_factory: pytest.TempPathFactory, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job submit --working-dir ROOT -- ... run_stage.py ingest`, with ray started in another folder."""
    home = tmp_path_factory.mktemp("home")
    rows = "".join(f"{pictures}/{i}.png,picture number {i}\n" for i in range(6))
    (home / "table.csv").write_text("url,caption\n" + rows)
    fetch = {"allow_addresses": ["127.0.0.1/32"], "concurrency": 2, "retries": 0}
    settings = {
        "run": "run",
        "ray": {"ingest": {"workers": 1}},
        "ingest": {
            "table": "table.csv",
            "samples_per_shard": 3,
            "image_size": 16,
            "encode_format": "png",
            "fetch": fetch,
        },
    }
    (home / "carrara.yaml").write_text(yaml.safe_dump(settings))
    record = home / "cluster.json"
    monkeypatch.setenv("CARRARA_CONFIG", "carrara.yaml")  # in the head's environment, relative to its folder
    lines: list[str] = []
    with Cluster(cpus=2, cwd=home, record=record) as cluster:
        assert json.loads(record.read_text())["id"] == cluster.id
        assert cluster.submit(["ingest"], lines.append, ROOT) == 0, lines
        text = "\n".join(lines)
        assert f"relative paths are from {home}, the folder where this Ray node was started" in text
        assert len(Dataset.open(str(home / "run/images"))) == 6
        assert sorted(p.name for p in home.iterdir()) == ["carrara.yaml", "cluster.json", "run", "table.csv"]
        lines.clear()
        assert cluster.submit(["ingest", "ingest.image_size=2"], lines.append, ROOT) == 2
        assert "'ingest.image_size'" in "\n".join(lines)
        identity, folder = cluster.id, cluster._folder
        assert _marked(identity)
    assert _marked(identity) == []
    assert folder is not None
    assert not folder.exists()
    assert not record.exists()


def test_a_driver_without_the_token_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = head()
    env = {**cluster.environment(), "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": "0" * 64}
    env.pop(MARK)
    command = [sys.executable, "-m", "tests.orchestration.drive", str(tmp_path), "{}"]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert found.returncode == 2
    assert cluster.address in found.stderr
    assert "the token are the same here as there" in found.stderr
    assert not (tmp_path / "toy").exists()


def test_a_killed_owner_leaves_no_ray(tmp_path: Path) -> None:
    """SIGKILL of the process that owns the head: the kernel tells the head; what is left is ended by the next run."""
    record = tmp_path / "cluster.json"
    code = (
        "import sys; from pathlib import Path; from orchestration.cluster import Cluster\n"
        "Cluster(cpus=1, record=Path(sys.argv[1])).__enter__()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", code, str(record)], env=env, cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not record.exists() or len(_marked(json.loads(record.read_text())["id"])) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    left = json.loads(record.read_text())
    identity = left["id"]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    end_recorded(record)
    assert _marked(identity) == []
    assert not Path(left["folder"]).exists()


def test_work_goes_on_after_all_that(tmp_path: Path) -> None:
    """None of the above touched the other head."""
    code, err = drive(tmp_path, json.dumps({"shards": 2, "workers": 1}))
    assert code == 0, err


def test_without_an_address_a_ray_is_started_for_the_command() -> None:
    code = (
        "from orchestration.connection import connected; from orchestration.config import RayConfig\n"
        "with connected(RayConfig()):\n"
        "    import ray\n"
        "    print('answer', ray.get(ray.remote(lambda: 6 * 7).remote()))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert "answer 42" in done.stdout, done.stderr
