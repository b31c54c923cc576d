"""The status file: what it says while a stage is at work, and what stays of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from shards import progress
from shards.progress import Progress


def test_the_rate_that_stays_is_the_work_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten shards in half a second, then the manifest from all of them at once: 20 a second, and not thousands."""
    url = str(tmp_path / "status" / "toy.json")
    shown = Progress("toy", 0, "shards", url, state="planning")
    shown.update(1)
    shown.begin("running", 110, done=100)
    began = time.monotonic()
    for _ in range(10):
        time.sleep(0.05)
        shown.update()
    expected = 10 / (time.monotonic() - began)
    shown.begin("finishing", 110)
    shown.update(110)
    assert shown.rate > 1000  # of this phase, for the time that is left of it
    shown.close("done")
    record = json.loads(Path(url).read_text())
    assert (record["state"], record["done"]) == ("done", 110)
    assert record["rate"] == pytest.approx(expected, rel=0.2)
    assert "shards/s" in capsys.readouterr().err.splitlines()[-1]


def test_a_stage_that_had_nothing_to_do_has_no_rate(tmp_path: Path) -> None:
    url = str(tmp_path / "toy.json")
    shown = Progress("toy", 0, "shards", url, state="planning")
    shown.update(5000)
    shown.close("done")
    assert json.loads(Path(url).read_text())["rate"] == 0


def test_one_phase_keeps_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LAST_TRIES", 1)
    url = str(tmp_path / "toy.json")
    shown = Progress("toy", 4, "images", url)
    time.sleep(0.1)
    shown.update(4)
    shown.close("failed")
    assert 0 < json.loads(Path(url).read_text())["rate"] <= 40
