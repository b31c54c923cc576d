"""That a demo leaves another of the same run alone, and what it says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration import demo
from orchestration.cluster import ROOT
from orchestration.demo import _headline
from orchestration.lease import Busy, Lease
from shards.layout import RunPaths


def test_a_second_demo_of_a_run_leaves_the_first_ones_ray_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the record of the first's Ray for what a killed one left, and end it."""
    monkeypatch.setattr(demo, "_incomplete", lambda _: pytest.fail("it began"))
    with Lease(RunPaths(str(tmp_path)).status, "demo", str(tmp_path)), pytest.raises(Busy, match="already working"):
        demo.run(str(ROOT / "configs/demo.yaml"), [f"run={tmp_path}"], 10, 5)


def test_the_numbers_are_said_with_their_intervals_and_what_was_not_measured_is_not() -> None:
    share = {"value": 0.628, "se": 0.03, "low": 0.57, "high": 0.69, "n": 200, "unit": "share"}
    share |= {"label": "Shape as prompted", "definition": "judged by the demo"}
    aside = {**share, "label": "VAE PSNR, dB", "definition": "of real images"}
    metrics = {"shape": share, "vae_psnr": aside}
    assert _headline({"metrics": metrics, "by_tag": {}}) == ["Shape as prompted: 63 % (57 % to 69 %)"]
    assert _headline(None) == []


def test_what_each_kind_of_caption_comes_to_is_said_by_both_limits() -> None:
    def share(value: float, label: str) -> dict[str, object]:
        return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 200, "unit": "share", "label": label}

    by_tag = {
        "one thing": {"shows_all": share(0.9, "Shows all"), "shows_all_tight": share(0.6, "Shows all tight")},
        "two things": {"shows_all": share(0.2, "Shows all"), "clip_score": share(0.5, "CLIP score")},
        "circle": {"shows_all": share(0.7, "Shows all")},
    }
    assert _headline({"metrics": {}, "by_tag": by_tag}) == [
        "one thing: Shows all: 90 % (85 % to 95 %), Shows all tight: 60 % (55 % to 65 %)",
        "two things: Shows all: 20 % (15 % to 25 %)",
    ]
