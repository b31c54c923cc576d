"""How good the VAE and the CLIP are by themselves, on held-out pictures: no model built on them can be better.

PSNR = 10 log10(255^2 / MSE) of the reconstruction from the posterior's mean, both as uint8, for each picture; the
metric is the mean over pictures. The CLIP's own skill is a held-out picture's caption among a hundred (retrieval.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.estimate import Estimate, mean_by_cluster

PSNR_CAP = 100.0  # dB, for a reconstruction without any error, whose PSNR would be infinite


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR in dB, float64 [B], of uint8 pictures [B, H, W, 3], at most PSNR_CAP."""
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"PSNR compares uint8 pictures of one shape, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    squared = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).reshape(len(a), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(255.0**2 / squared), PSNR_CAP)


def reconstruction(psnrs: Sequence[float]) -> Estimate:
    """Mean PSNR in dB of held-out pictures, each a draw of its own."""
    return mean_by_cluster(psnrs, range(len(psnrs)))
