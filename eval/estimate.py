"""A number and how far to trust it: jackknife, cluster and Wilson errors.

The errors cover one source of noise, the finite number of pictures that were drawn. Another training run of the same
configuration moves the numbers by more (MLPerf's reference runs of Stable Diffusion: FID 55.4, sd 2.8), and no error
bar here knows of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Estimate:
    """One metric: n units (pictures or prompts), its value, standard error, 95 % interval, bias-corrected value if
    any. left_out, sizes: the value without each jackknife group, and the groups' units, for paired comparisons."""

    n: int
    value: float
    se: float | None = None
    low: float | None = None
    high: float | None = None
    bias_corrected: float | None = None
    left_out: tuple[float, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the groups, without what is None."""
        groups = ("left_out", "sizes")
        return {key: value for key, value in asdict(self).items() if value is not None and key not in groups}


def jackknife(value: float, left_out: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Delete-a-group jackknife of a statistic with value `value` on all units and left_out[j] without group j.

    Groups may differ in size (the delete-m_j jackknife, Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for
    unequal m", equations 4 to 6; for equal sizes it is the textbook formula). It takes out the bias of order 1/n,
    which a Frechet distance has and which a bootstrap doubles instead.
    """
    theta, m = np.asarray(left_out, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if len(theta) != len(m) or len(theta) < 2 or (m <= 0).any():
        raise ValueError(f"a jackknife needs at least 2 groups with at least 1 unit each, not sizes {list(sizes)}")
    n, groups = m.sum(), len(m)
    h = n / m
    corrected = groups * value - float(((1 - m / n) * theta).sum())
    pseudo = h * value - (h - 1) * theta
    se = math.sqrt(float(((pseudo - corrected) ** 2 / (h - 1)).mean()))
    low, high = corrected - Z95 * se, corrected + Z95 * se
    left, counts = tuple(float(t) for t in theta), tuple(int(c) for c in m)
    return Estimate(int(n), float(value), se, low, high, corrected, left, counts)


def with_groups(estimate: Estimate, values: npt.ArrayLike, group: npt.ArrayLike) -> Estimate:
    """A mean with its values without each jackknife group added; values [n], group [n]: the number of each one's."""
    x = np.asarray(values, np.float64)
    _, index, sizes = np.unique(np.asarray(group), return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return estimate
    sums = np.bincount(index, weights=x)
    left = (x.sum() - sums) / (len(x) - sizes)
    return replace(estimate, left_out=tuple(map(float, left)), sizes=tuple(map(int, sizes)))


def mean_by_cluster(values: npt.ArrayLike, clusters: Sequence[Any]) -> Estimate:
    """Mean of `values` with a standard error that treats a cluster (the pictures of one prompt) as one draw.

    Linearised variance of a ratio estimator, sum over clusters of (sum of residuals)^2 * G/(G-1) / n^2; with one
    value a cluster it is the usual s/sqrt(n).
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) != len(clusters):
        raise ValueError(f"{len(clusters)} clusters for values of shape {x.shape}")
    if len(x) == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(x.mean())
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=x - mean)
    groups = len(sums)
    if groups < 2:
        return Estimate(len(x), mean)
    se = math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(x)
    return Estimate(len(x), mean, se, mean - Z95 * se, mean + Z95 * se)


def proportion(hits: npt.ArrayLike, clusters: Sequence[Any] | None = None) -> Estimate:
    """Share of hits with Wilson's score interval (Wilson 1927), which stays inside [0, 1] and does not collapse at
    its ends.

    hits: booleans, or chances between 0 and 1. Several pictures of one prompt are not independent, and chances vary
    less than booleans: the interval then uses the effective number of draws, p (1 - p) / variance of the mean.
    """
    x = np.asarray(hits, dtype=np.float64)
    n = len(x)
    if n == 0:
        raise ValueError("a proportion needs at least one value")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("a proportion is of values between 0 and 1")
    p = float(x.mean())
    groups = list(range(n)) if clusters is None else list(clusters)
    effective = float(len(set(groups)))  # the cautious end: all pictures of a prompt agree
    if 0 < p < 1 and (effective < n or not np.isin(x, (0.0, 1.0)).all()):
        clustered = mean_by_cluster(x, groups)
        if clustered.se:
            effective = max(1.0, p * (1 - p) / clustered.se**2)
    low, high = wilson(p, effective)
    return Estimate(n, p, math.sqrt(p * (1 - p) / effective), low, high)


def wilson(p: float, n: float) -> tuple[float, float]:
    """95 % score interval of a proportion p seen in n draws."""
    z2 = Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
