"""`carrara submit`: any command, from any folder, with the user's own files; and it ends as the job ended."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration import submit
from orchestration.commands.parser import read_here
from orchestration.stopping import Stopped
from shards.dataset import Dataset
from shards.settings import ConfigError, StageError
from tests.orchestration.head import ROOT, head
from tests.orchestration.test_cluster import pictures

__all__ = ["pictures"]


def test_what_is_sent_is_carrara_and_the_files_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder = tmp_path / "home", tmp_path / "sent"
    (home / "deep").mkdir(parents=True)
    folder.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.delenv("CARRARA_CONFIG", raising=False)
    (home / "deep/mine.yaml").write_text("run: x")
    (home / "list.txt").write_text("http://x.org/1.png")
    (home / "train.py").write_text("raise SystemExit('the user\\'s own')")
    (home / "x.org").write_text("a file that happens to have the name of a host")
    arguments = ["remove", "--config", "deep/mine.yaml", "--urls=list.txt", "ingest.table=list.txt", "--host", "x.org"]
    sent = submit.pack(folder, arguments, read_here)
    assert sent == [
        "remove",
        "--config",
        "sent/2-mine.yaml",
        "--urls=sent/3-list.txt",
        "ingest.table=list.txt",
        "--host",
        "x.org",
    ]
    assert (folder / "sent/2-mine.yaml").read_text() == "run: x"
    assert (folder / "sent/3-list.txt").read_text() == "http://x.org/1.png"
    assert not (folder / "train.py").exists()
    assert (folder / "train/main.py").exists()
    done = subprocess.run(
        [sys.executable, "orchestration/run_stage.py", "status", "nowhere"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "nowhere: there is no run here" in done.stderr
    # The configuration that the command would find here by itself goes along too.
    (home / "carrara.yaml").write_text("run: y")
    assert submit.pack(tmp_path / "again", ["latents", "latents.batch_size=4"], read_here)[-2:] == [
        "--config",
        "sent/3-carrara.yaml",
    ]
    with open(home / "large.txt", "wb") as f:
        f.truncate(submit.LARGEST + 1)
    with pytest.raises(ConfigError, match=r"large\.txt has more than 50 MB"):
        submit.pack(tmp_path / "third", ["remove", "--urls", "large.txt"], read_here)


@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("sample runs/x --prompt cat --image cat", {5}),
        ("sample cat --negative=cat --mask=cat", {3}),
        ("why cat cat", set()),
        ("compare cat cat --json cat", set()),  # which it writes
        ("scores cat cat --name cat --index cat", {2, 6}),
        ("human score cat cat cat", {3, 4}),
        ("reference coco --out cat --all --annotations cat", {6}),
        ("watch --once cat --config cat", {4}),
        ("edit-table cat --table cat --out cat", {3}),
        ("human cat", set()),
        ("human", set()),
    ],
)
def test_words_that_name_files_are_told_from_others(command: str, files: set[int]) -> None:
    assert read_here(command.split())[0] == files


@pytest.mark.parametrize(
    ("command", "goes_along"),
    [
        ("latents latents.batch_size=4", True),
        ("watch --once", True),
        ("latents --config=mine.yaml", False),
        ("watch --once runs/x", False),
        ("plan --rows 5 runs/x", False),
        ("eval --model pipeline --run out", False),
        ("compare runs/x:a runs/x:b", False),
        ("images runs/x:a --out files", False),
        ("scores runs/x:a scores.jsonl --name mine", False),
        ("reference coco --annotations a.json --images val2014 --out coco", False),
        ("human pack runs/x a/1 b/1 --out pack", False),
        ("export runs/x", False),
    ],
)
def test_a_configuration_goes_along_only_where_the_command_would_look_for_it(command: str, goes_along: bool) -> None:
    assert read_here(command.split())[1] == goes_along


def test_a_job_is_asked_with_the_headers_that_it_was_submitted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers.get("X-Gate") == "open" else 403)
            self.end_headers()
            details = {"type": "SUBMISSION", "status": "FAILED", "entrypoint": "x", "driver_exit_code": 75}
            version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}
            self.wfile.write(json.dumps(version if self.path.endswith("version") else details).encode())

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Gate": "open"}')
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = submit._job(f"http://127.0.0.1:{server.server_port}", "job")
        server.shutdown()
    assert found == ("FAILED", 75)


@pytest.mark.parametrize(
    ("status", "code", "raised"),
    [
        ("STOPPED", None, Stopped),
        ("STOPPED", 0, Stopped),
        ("FAILED", 75, Stopped),
        ("FAILED", 2, ConfigError),
        ("FAILED", 1, StageError),
        ("FAILED", None, StageError),
        (None, None, StageError),
    ],
)
def test_it_ends_as_the_job_ended(
    monkeypatch: pytest.MonkeyPatch, status: str | None, code: int | None, raised: type[BaseException]
) -> None:
    """Ray's own command line ends with 0 for a job that was stopped."""
    monkeypatch.setattr(submit, "_job", lambda *_: (status, code) if status else None)
    with pytest.raises(raised):
        submit.end("http://here", "job", 0)
    monkeypatch.setattr(submit, "_job", lambda *_: ("SUCCEEDED", 0))
    submit.end("http://here", "job", 1)  # the log's connection broke


@pytest.mark.slow
def test_a_command_with_options_runs_as_a_job_from_another_folder(tmp_path: Path, pictures: str) -> None:
    """An ingest with a configuration beside the user, whose paths are meant from there; then a job that is stopped."""
    rows = "".join(f"{pictures}/{i}.png,picture number {i}\n" for i in range(4))
    (tmp_path / "table.csv").write_text("url,caption\n" + rows)
    (tmp_path / "train.py").write_text("raise SystemExit('the user\\'s own')\n")
    settings: dict[str, Any] = {
        "run": "run",
        "ray": {"ingest": {"workers": 1}},
        "ingest": {
            "table": "table.csv",
            "samples_per_shard": 2,
            "image_size": 16,
            "encode_format": "png",
            "fetch": {"allow_addresses": ["127.0.0.1/32"], "concurrency": 2, "retries": 0},
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    cluster = head()
    env = {**cluster.environment(), "PYTHONPATH": str(ROOT)}
    code = "from orchestration.run_stage import main; import sys; sys.exit(main(sys.argv[1:]))"

    def carrara(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, "submit", "--address", cluster.url, *words],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    done = carrara("ingest", "--config", "mine.yaml", "--dry-run", "--rows", "100")
    out, _ = done.communicate(timeout=200)
    assert done.returncode == 0, out
    assert not (tmp_path / "run").exists()
    done = carrara("ingest", "--config", "mine.yaml")
    out, _ = done.communicate(timeout=200)
    assert done.returncode == 0, out
    assert f"relative paths are from {tmp_path}, the folder where the job was submitted" in out
    assert len(Dataset.open(str(tmp_path / "run/images"))) == 4
    done = carrara("ingest", "--config", "mine.yaml", "ingest.image_size=2")
    out, _ = done.communicate(timeout=200)
    assert done.returncode == 2, out
    # Stopped by somebody else: that is no success.
    watch = carrara("watch", "--config", "mine.yaml", "--forever", "eval.watch.every_s=60")
    deadline = time.monotonic() + 150
    jobs: list[dict[str, Any]] = []
    while not jobs:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        jobs = [j for j in cluster.request("/api/jobs/") if j["status"] == "RUNNING" and "watch" in j["entrypoint"]]
    time.sleep(8)
    cluster.request(f"/api/jobs/{jobs[0]['submission_id']}/stop", {})
    out, _ = watch.communicate(timeout=100)
    assert watch.returncode == 75, out
    assert "was stopped; the same command goes on from here" in out
