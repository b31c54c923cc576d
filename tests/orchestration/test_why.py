"""What became of a shard: its rows by fate, who made it, its failed attempts, also those of shards that came right."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pyarrow as pa
import pytest

from orchestration import attempts, engine, why
from orchestration.config import Pool, RayConfig
from orchestration.run_stage import main
from shards import plan
from shards.dataset import commit_shard
from shards.fingerprint import Fingerprint
from shards.settings import NodeTrouble, StageError
from tests import objects
from tests.orchestration.drive import toy
from tests.train.tiny import parquet

FATES = [("success", None)] * 5 + [("failed_to_download", "http_404")] * 3 + [("failed_to_download", "timeout")] * 2


def fill(run: Path | str) -> None:
    """Image shard 7 of ten rows, which is planned with shard 8."""
    root = f"{run}/images"
    sidecar = pa.table({"status": [s for s, _ in FATES], "error": [e for _, e in FATES]})
    files = {".tar": b"0" * 1234, ".parquet": parquet(sidecar)}
    stats = {"count": 5, "rows": 10, "duration": 12.34}
    commit_shard(root, 7, files, stats, Fingerprint("ingest", 1, {}))
    lines = [
        plan.Line(n, "/data/table.parquet", 70 + 10 * i, 80 + 10 * i, 10, bytes([n]) * 16, "s")
        for i, n in enumerate((7, 8))
    ]
    plan.write_part(root, 0, lines)


def test_a_shard_that_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert main(["why", str(tmp_path), "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ingest 00007: committed"
    assert f"on {socket.gethostname()} (process {os.getpid()}) in 12.3 s" in lines[1]
    assert time.strftime("%Y-%m-%d", time.gmtime()) in lines[1]
    assert lines[2].split(None, 1) == ["rows", "5 failed_to_download (http_404 3, timeout 2)"]
    assert lines[3].split(None, 1) == ["rows", "5 success"]
    assert lines[4].split(None, 1) == ["from", "/data/table.parquet, from 70 to 80 (10 rows)"]
    assert f"{tmp_path}/images/00007.tar (1,234 bytes)" in "\n".join(lines)
    (tmp_path / "images/00007.tar").unlink()
    assert "00007.tar (0 bytes; MISSING)" in why.show(str(tmp_path), "00007")
    (tmp_path / "images/00007.tar").write_bytes(b"1")
    assert "00007.tar (1 bytes; 1,234 WERE COMMITTED)" in why.show(str(tmp_path), "00007")


def test_what_an_error_quotes_does_not_steer_the_terminal(tmp_path: Path) -> None:
    fill(tmp_path)
    attempts.note(f"{tmp_path}/status", "ingest", "00008", "failed", "\x1b]0;mine\x07", "a\n\tcaption \u202e\x1b[2J")
    said = why.show(str(tmp_path), "8")
    assert "]0;mine" in said
    assert not {c for c in said if c != "\n" and not c.isprintable()}
    assert json.loads(why.show(str(tmp_path), "8", as_json=True))[0]["attempts"][0]["error"] == "\x1b]0;mine\x07"


def test_a_shard_that_is_planned_begun_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert why.show(str(tmp_path), "8").splitlines()[0] == "ingest 00008: planned"
    (tmp_path / "images/00008.tar").write_bytes(b"1")
    assert why.show(str(tmp_path), "8").splitlines()[0] == "ingest 00008: begun"
    assert main(["why", str(tmp_path), "9"]) == 2
    assert "no folder has a shard 00009, and none is planned" in capsys.readouterr().err
    assert main(["why", str(tmp_path), "seven"]) == 2
    assert "'seven' is no shard's number" in capsys.readouterr().err
    assert main(["why", str(tmp_path / "nowhere"), "7"]) == 2
    assert "there is no run here" in capsys.readouterr().err


def made(tmp_path: Path, **options: object) -> None:
    """The toy stage in the place of latents, in this process."""
    stage = toy(tmp_path, name="latents", **options)
    engine.run(stage, str(tmp_path / "status"), RayConfig(back_off_s=0.01), Pool(), local=True)


def test_failed_attempts_are_kept_also_of_a_shard_that_came_right(tmp_path: Path) -> None:
    with pytest.raises(StageError):
        made(tmp_path, misbehave=((2, "raise"), (4, "raise-once")))
    [lost] = why.look(why.RunPaths(str(tmp_path)), 2)
    assert (lost.stage, lost.state) == ("latents", "set aside")
    assert [e["what"] for e in lost.attempts] == ["failed", "failed", "set aside"]
    assert all("does not like this" in e["error"] for e in lost.attempts)
    text = why.show(str(tmp_path), "2")
    assert "Traceback (most recent call last)" in text
    assert "  set aside " in text
    [right] = why.look(why.RunPaths(str(tmp_path)), 4)
    assert [e["what"] for e in right.attempts] == ["failed"]
    assert not (tmp_path / "status/latents-failed/00004.json").exists()
    assert not (tmp_path / "status/latents-attempts/00003.json").exists()  # nothing happened to it
    assert json.loads(why.show(str(tmp_path), "4", as_json=True))[0]["attempts"][0]["what"] == "failed"


def test_trouble_of_a_machine_is_no_fault_of_the_shard(tmp_path: Path) -> None:
    from orchestration.ledger import Ledger

    stage = toy(tmp_path, name="latents")
    ledger = Ledger(stage, str(tmp_path / "status"))
    task = ledger.take()
    assert task is not None
    ledger.trouble(task, NodeTrouble("no DNS here"), "trace")
    assert "  no fault  " in why.show(str(tmp_path), "0")


def test_so_many_events_are_kept_and_a_store_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    status = str(tmp_path)
    for i in range(attempts.KEPT + 5):
        attempts.note(status, "latents", "00001", "failed", f"error {i}", "x" * 100_000)
    found = attempts.read(status, "latents", "00001")
    assert [e["error"] for e in found] == [f"error {i}" for i in range(5, attempts.KEPT + 5)]
    assert len(found[0]["traceback"]) == attempts.LONGEST
    monkeypatch.setattr(attempts.storage, "write_json", lambda *_: (_ for _ in ()).throw(OSError("away")))
    attempts.note(status, "latents", "00001", "failed", "one more")
    assert "cannot be noted: OSError: away" in caplog.text
    (tmp_path / "latents-attempts" / "00001.json").write_text("[{torn")
    assert attempts.read(status, "latents", "00001") == []


def test_the_ranks_of_a_fit(tmp_path: Path) -> None:
    status = str(tmp_path / "status")
    ranks = [{"address": "10.0.0.5", "pid": 123}]
    attempts.note(status, "train", attempts.RANKS, "started", "1 ranks", ranks=ranks)
    attempts.note(status, "train", attempts.RANKS, "died", "ActorDiedError: gone", images=800)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.jsonl").write_text("")
    text = why.show(str(tmp_path), "train")
    assert "rank 0: process 123 on 10.0.0.5; what it printed: ray logs actor --pid 123 --ip 10.0.0.5" in text
    assert "ActorDiedError: gone" in text
    assert f"{tmp_path}/train/log.jsonl" in text
    assert why.show(str(tmp_path), "clip").startswith("clip: nothing happened")


def test_a_run_in_a_bucket() -> None:
    with objects.bucket() as bucket:
        fill(f"{bucket}/mine")
        attempts.note(f"{bucket}/mine/status", "ingest", "00007", "failed", "a hiccup")
        text = why.show(f"{bucket}/mine", "7")
        assert text.startswith("ingest 00007: committed")
        assert "a hiccup" in text
