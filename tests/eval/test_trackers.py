"""An evaluation's numbers in the trackers: each once, in whatever order checkpoints are evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import trackers
from eval.report import history
from orchestration import watch
from shards.layout import RunPaths
from tests.eval.test_watch import configured


def points(run: RunPaths) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(Path(run.reports) / "tensorboard"))
    read.Reload()
    [sheet] = read.Tags()["images"]
    assert len(read.Images(sheet)) == 2  # also that of the checkpoint before, which came second
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_numbers_and_images_are_told_once(trained: RunPaths, tmp_path: Path) -> None:
    """The newest checkpoint first, then the one before: two points each, and a second telling adds none."""
    watch.watch(configured(trained, backfill=True), local=True, once=True)
    results = history.read_all(trained)
    assert len(results) == 2
    expected = {
        f"{r['folder']}/{name}": sorted((q["images_seen"], q["metrics"][name]["value"]) for q in results)
        for r in results[:1]
        for name in r["metrics"]
    }
    for result in results:
        trackers.tell(("tensorboard",), trained, result)
    found = points(trained)
    assert {k: [i for i, _ in sorted(v)] for k, v in found.items()} == {
        k: [i for i, _ in v] for k, v in expected.items()
    }
    for name, values in expected.items():
        assert [v for _, v in sorted(found[name])] == pytest.approx([v for _, v in values], rel=1e-5)


def test_a_contact_sheet_is_of_the_first_images(trained: RunPaths) -> None:
    watch.watch(configured(trained), local=True, once=True)
    [result] = history.read_all(trained)
    sheet = trackers.contact_sheet(trained, result)
    assert sheet is not None
    assert sheet.shape == (4 * 32, 6 * 32, 3)
    assert sheet.std() > 1
    assert trackers.contact_sheet(trained, {**result, "images": "gone"}) is None


def test_a_tool_without_its_key_is_a_warning_and_not_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    result = {"checkpoint": "step-1", "folder": "f", "label": "x", "images_seen": 1, "metrics": {}}
    trackers.tell(("wandb",), RunPaths(str(tmp_path)), result)
    assert "the trackers did not get step-1: ConfigError: train.trackers names wandb" in caplog.text
    assert not (tmp_path / "reports").exists()


def test_what_cannot_be_told_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("a full disk")

    monkeypatch.setattr(trackers, "_tell", fails)
    trackers.tell(("tensorboard",), RunPaths(str(tmp_path)), json.loads('{"checkpoint": "step-1"}'))
    assert "the trackers did not get step-1: OSError: a full disk" in caplog.text
