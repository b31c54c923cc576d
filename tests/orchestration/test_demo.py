"""What the demo says at its end."""

from __future__ import annotations

from orchestration.demo import _headline


def test_the_numbers_are_said_with_their_intervals_and_what_was_not_measured_is_not() -> None:
    share = {"value": 0.628, "se": 0.03, "low": 0.57, "high": 0.69}
    metrics = {"faithful_shape": share, "vae_psnr": {"value": 31.04, "se": 0.12, "low": 30.81, "high": 31.28}}
    assert _headline({"metrics": metrics}) == [
        "Shape as prompted: 63 % (57 % to 69 %)",
        "VAE PSNR, dB: 31.04 (30.81 to 31.28)",
    ]
    assert _headline(None) == []
