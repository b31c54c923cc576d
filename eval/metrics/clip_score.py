"""CLIP score: how well an image and its caption agree, in the eyes of a given CLIP model.

The score is 100 * mean(max(cos, 0)), clamped for each pair before the mean (Hessel et al. 2021 clamp likewise, with a
weight of 2.5 in place of 100; torchmetrics clamps after the mean, which differs as soon as one pair is negative). The
raw mean cosine stands beside it. No prompt prefix is added. Captions longer than the context are cut with the end
token kept, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.metrics.estimate import Estimate, mean_by_cluster, with_groups


def cosines(images: npt.ArrayLike, captions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Cosine of each row pair of images [n, d] and captions [n, d] (normalised here, in float64) -> [n]."""
    a, b = np.asarray(images, np.float64), np.asarray(captions, np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"image features {a.shape} and caption features {b.shape} are not pairs")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("a feature vector is zero or not finite, so it has no cosine")
    return (a * b).sum(axis=1) / norms


def clip_score(cosine: npt.ArrayLike, prompts: Sequence[Any]) -> tuple[Estimate, Estimate]:
    """(score, raw mean cosine) of images' cosines [n], with errors that count a prompt's images as one draw."""
    cos = np.asarray(cosine, np.float64)
    return mean_by_cluster(100 * np.maximum(cos, 0), prompts), mean_by_cluster(cos, prompts)


def diversity(x: np.ndarray, prompts: Sequence[str], groups: np.ndarray) -> Estimate | None:
    """Mean of 1 - cosine over the pairs of each prompt's images, a prompt being one draw; None without replicates.

    The mean over pairs of n unit vectors is (|sum|^2 - n) / (n (n - 1)).
    """
    _, index, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    if counts.max() < 2:
        return None
    unit = np.array(x, np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sums = np.zeros((len(counts), unit.shape[1]))
    np.add.at(sums, index, unit)
    several = counts > 1
    n = counts[several]
    values = 1 - ((sums[several] ** 2).sum(1) - n) / (n * (n - 1))
    group = np.zeros(len(counts), np.int64)
    group[index] = groups
    return with_groups(mean_by_cluster(values, range(len(values))), values, group[several])
