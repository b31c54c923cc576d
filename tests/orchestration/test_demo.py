"""What the demo says at its end."""

from __future__ import annotations

from orchestration.demo import _headline


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
