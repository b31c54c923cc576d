"""Score histograms of the report: against numpy over the values, before and after the rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.report import gather, scores
from shards.dataset import Dataset
from shards.layout import RunPaths
from tests.train import tiny
from tests.train.test_select import COUNTS, config, write_scores
from train import segments


@pytest.fixture
def values(tmp_path: Path) -> dict[int, np.ndarray]:
    """A run with a score: its values by shard. One more shard was scored than encoded."""
    tiny.make_latents(tmp_path / "latents", COUNTS, text="tokens")
    rng = np.random.default_rng(5)
    found = {i: rng.normal(5, 1, n).astype(np.float32) for i, n in enumerate((*COUNTS, 200))}
    write_scores(tmp_path, found)
    write_scores(tmp_path, {i: np.full(n, 2.5) for i, n in enumerate(COUNTS)}, "flat")
    return found


def checkpoint(root: Path, **more: Any) -> str:
    begun = segments.begin(config(**more), [Dataset.open(str(root / "latents"))])
    folder = root / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"order": begun.to_json()}))
    return folder.name


def test_what_was_scored_and_what_passes_the_rules(values: dict[int, np.ndarray], tmp_path: Path) -> None:
    name = checkpoint(tmp_path, select=[{"column": "quality.value", "min": 5.5}])
    first, second = scores.histograms(RunPaths(str(tmp_path)), name)
    assert (first.column, second.column) == ("quality.value", "flat.value")  # the one with a rule comes first
    assert first.ends == (5.5,)
    everything = np.concatenate(list(values.values()))
    expected = np.histogram(np.clip(everything, first.edges[0], first.edges[-1]), first.edges)[0] / len(everything)
    assert np.abs(np.cumsum(first.scored) - np.cumsum(expected)).max() < 0.03  # from bins of 1/128 of a value
    assert first.given is not None
    usable = []
    latents = Dataset.open(str(tmp_path / "latents"))
    for info in latents.shards:
        good = [s == "success" for s in latents.sidecar(info.index)["status"].to_pylist()]
        usable.append(values[info.index][good])
    passing = np.concatenate(usable)
    passing = passing[passing >= 5.5]
    counts = np.histogram(np.clip(passing, first.edges[0], first.edges[-1]), first.edges)[0]
    np.testing.assert_array_equal(first.given, counts / len(passing))
    assert first.images == len(passing)
    assert second.scored.max() == 1  # all in one bin


def test_without_rules_latents_or_scores(values: dict[int, np.ndarray], tmp_path: Path) -> None:
    run = RunPaths(str(tmp_path))
    name = checkpoint(tmp_path, select=())
    quality = next(h for h in scores.histograms(run, name) if h.column == "quality.value")
    assert quality.images == sum(COUNTS)
    assert quality.ends == ()
    (tmp_path / "latents").rename(tmp_path / "elsewhere")
    assert all(h.given is None for h in scores.histograms(run, "none"))
    assert len(gather.score_charts(run, "none")) == 2
    (tmp_path / "scores").rename(tmp_path / "gone")
    assert scores.histograms(run, name) == []


def test_a_chart_says_what_it_shows(values: dict[int, np.ndarray], tmp_path: Path) -> None:
    name = checkpoint(tmp_path, select=[{"column": "quality.value", "min": 6}])
    chart, _ = gather.score_charts(RunPaths(str(tmp_path)), name)
    assert chart.title == "quality.value"
    assert "Dotted: where a rule cuts." in chart.note
    assert "most of those trained on at 6." in chart.words
    assert chart.light != chart.dark
