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
