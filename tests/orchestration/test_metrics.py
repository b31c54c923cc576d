"""What Prometheus reads of a run on a real Ray, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration import metrics, trainer
from orchestration.metrics import METRICS, Exporter
from tests.orchestration.head import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "carrara.json"


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    found = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
    return found + [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported() -> None:
    exported = {metric.exported(name): {"run", "stage", *metric.tags} for name, metric in METRICS.items()}
    asked = set()
    for query in queries():
        names = set(re.findall(r"\bray_\w+", query))
        assert names, query
        assert names <= exported.keys(), query
        grouped = {w for part in re.findall(r"by \(([^)]*)\)", query) for w in part.split(", ")}
        chosen = set(re.findall(r"[{ ](\w+)=", query))
        assert all(grouped | chosen <= exported[name] for name in names), query
        asked |= names
    assert asked == exported.keys()  # and draws all of them


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == "carrara"
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in board["panels"])
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(p["datasource"] == source for p in board["panels"] if p["type"] != "row")


def test_a_metric_that_cannot_be_told_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(name: str) -> Any:
        raise RuntimeError("no Ray here")

    monkeypatch.setattr(metrics, "_made", fails)
    exporter = Exporter("runs/x", "ingest")
    exporter.shard({"count": 3}, 1, 1)
    exporter.line({"loss": float("nan")})
    assert len(caplog.messages) == 1


def test_the_first_rank_of_a_fit_on_ray_exports_the_lines_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    sent: list[tuple[str, float]] = []
    monkeypatch.setattr("train.main.run", lambda *_, tell, **__: given.append(tell))
    monkeypatch.setattr(Exporter, "tell", lambda self, name, value, **tags: sent.append((name, value)))
    sections = {"run": "runs/x", "train": {"images": 8, "batch_size": 8}}
    trainer._rank({"stage": "train", "sections": sections, "redo": False, "adopt": False, "on_ray": True})
    trainer._rank({"stage": "train", "sections": sections, "redo": False, "adopt": False})
    assert given[1] is None
    given[0]({"images": 8, "loss": 0.5, "note": "x", "checkpoint/seconds": 2.0})
    assert sent == [("carrara_images", 8), ("carrara_loss", 0.5), ("carrara_checkpoint_seconds", 2.0)]


@pytest.mark.slow
def test_prometheus_reads_what_a_run_does(tmp_path: Path) -> None:
    """Six shards of 50 rows, of which one fails, and what a rank tells; by their names, types and labels."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.orchestration.scrape", str(tmp_path)]
    found = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    lines = [x for x in found.stdout.splitlines() if x.startswith("ray_carrara")]
    values: dict[tuple[str, str], float] = {}
    for line in lines:
        name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        key = next((tags[t] for t in ("code", "kind", "outcome", "metric") if t in tags), "")
        values[name, f"{tags['stage']} {key}".strip()] = float(value)
        assert tags["run"] == ("runs/x" if tags["stage"] != "toy" else str(tmp_path))
    for (name, what), value in {
        ("rows_total", "toy success"): 5 * 50,
        ("shards_total", "toy done"): 5,
        ("shards_total", "toy set_aside"): 1,
        ("shards_left", "toy"): 0,
        ("workers", "ingest"): 1,
        ("rows_total", "ingest http_404"): 2,
        ("rows_total", "ingest success"): 3,
        ("bytes_total", "ingest fetched"): 70,
        ("shards_left", "ingest"): 4,
        ("busy_seconds_total", "ingest"): 2,
        ("wait_seconds_total", "ingest"): 1,
        ("images", "train"): 800,
        ("loss", "train"): 0.25,
        ("images_per_second", "train"): 12.5,
        ("data_wait", "train"): 0.01,
        ("mfu", "train"): 0.4,
        ("checkpoint_seconds", "train"): 1.5,
        ("eval", "train fid"): 7.5,
    }.items():
        assert values.get((f"ray_carrara_{name}", what)) == value, (name, what, sorted(values))
    types = dict(re.findall(r"^# TYPE (ray_carrara\w+) (\w+)", found.stdout, re.MULTILINE))
    for name, metric in METRICS.items():
        assert types.get(metric.exported(name), types.get(metric.exported(name).removesuffix("_total"))) == metric.kind
