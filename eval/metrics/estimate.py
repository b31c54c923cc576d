"""A number and how far to trust it: jackknife, cluster and Wilson errors.

The errors cover one source of noise, the finite number of images that were drawn. Another training run of the same
configuration moves the numbers by more (MLPerf's reference runs of Stable Diffusion: FID 55.4, sd 2.8), and no error
bar here knows of that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@functools.lru_cache(maxsize=4096)
def quantile95(draws: int) -> float:
    """97.5 % quantile of Student's t for a standard error from so many independent draws (draws - 1 degrees of
    freedom): 12.7 for two, 2.09 for twenty, 1.96 for very many."""
    from scipy.stats import t

    return float(t.ppf(0.975, draws - 1))


@dataclass(frozen=True)
class Estimate:
    """One metric: n units (images or prompts), its value as published, standard error and 95 % interval of it.

    bias_corrected, corrected_low, corrected_high: the value without its bias of order 1/n, where that is one.
    groups, left_out, sizes: names of the jackknife groups, the value without each, their units, for paired comparisons.
    """

    n: int
    value: float
    se: float | None = None
    low: float | None = None
    high: float | None = None
    bias_corrected: float | None = None
    corrected_low: float | None = None
    corrected_high: float | None = None
    groups: tuple[int, ...] | None = None
    left_out: tuple[float, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the groups, without what is None."""
        apart = ("groups", "left_out", "sizes")
        return {key: value for key, value in asdict(self).items() if value is not None and key not in apart}


def jackknife(
    value: float,
    left_out: Sequence[float],
    sizes: Sequence[int],
    groups: Sequence[int] | None = None,
    correct: bool = True,
    floor: float = -math.inf,
) -> Estimate:
    """Delete-a-group jackknife of a statistic with value `value` on all units and left_out[j] without group j.

    Groups may differ in size (the delete-m_j jackknife, Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for
    unequal m", equations 4 to 6; for equal sizes it is the textbook formula). The interval is of the value that other
    images of the same number would give: Student's t on groups - 1. correct: whether the bias is of order 1/n, so that
    the jackknife takes it out. floor: what the quantity is never below, 0 for a distance.
    """
    theta, m = np.asarray(left_out, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if len(theta) != len(m) or len(theta) < 2 or (m <= 0).any():
        raise ValueError(f"a jackknife needs at least 2 groups with at least 1 unit each, not sizes {list(sizes)}")
    n, count = m.sum(), len(m)
    h = n / m
    corrected = count * value - float(((1 - m / n) * theta).sum())
    pseudo = h * value - (h - 1) * theta
    se = math.sqrt(float(((pseudo - corrected) ** 2 / (h - 1)).mean()))
    half = quantile95(count) * se
    bottom = min(floor, value)  # an unbiased distance may be below it itself
    unbiased = (max(floor, corrected), max(floor, corrected - half), max(floor, corrected + half))
    shown = unbiased if correct else (None, None, None)
    return Estimate(
        n=int(n),
        value=float(value),
        se=se,
        low=max(bottom, value - half),
        high=value + half,
        bias_corrected=shown[0],
        corrected_low=shown[1],
        corrected_high=shown[2],
        groups=tuple(range(count)) if groups is None else tuple(int(g) for g in groups),
        left_out=tuple(float(t) for t in theta),
        sizes=tuple(int(c) for c in m),
    )


def paired(a: Sequence[float], b: Sequence[float], value: float, sizes: Sequence[int]) -> tuple[float, float]:
    """(difference b - a, its standard error) from the values without each of the same groups.

    The difference is the plain one of the two values, so that a bias that both have cancels; the error is the
    jackknife's of the differences.
    """
    e = jackknife(value, [y - x for x, y in zip(a, b, strict=True)], sizes)
    assert e.se is not None
    return value, e.se


def with_groups(estimate: Estimate, values: npt.ArrayLike, group: npt.ArrayLike) -> Estimate:
    """A mean with its values without each jackknife group added; values [n], group [n]: the number of each one's."""
    x = np.asarray(values, np.float64)
    names, index, sizes = np.unique(np.asarray(group), return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return estimate
    sums = np.bincount(index, weights=x)
    left = (x.sum() - sums) / (len(x) - sizes)
    return replace(
        estimate, groups=tuple(map(int, names)), left_out=tuple(map(float, left)), sizes=tuple(map(int, sizes))
    )


def mean_by_cluster(values: npt.ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Mean of `values` with a standard error that treats a cluster (the images of one prompt) as one draw.

    Linearised variance of a ratio estimator, sum over clusters of (sum of residuals)^2 * G/(G-1) / n^2; with one
    value a cluster it is the usual s/sqrt(n). The interval is Student's t on clusters - 1.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) != len(clusters):
        raise ValueError(f"{len(clusters)} clusters for values of shape {x.shape}")
    if len(x) == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(x.mean())
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}  # a scorer's meanings have no order
    sums = np.bincount([number[cluster] for cluster in clusters], weights=x - mean)
    groups = len(sums)
    if groups < 2:
        return Estimate(len(x), mean)
    se = math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(x)
    half = quantile95(groups) * se
    return Estimate(len(x), mean, se, mean - half, mean + half)


def proportion(hits: npt.ArrayLike, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Share of hits with Wilson's score interval (Wilson 1927), which stays inside [0, 1] and does not collapse at
    its ends.

    hits: booleans, or chances between 0 and 1. Several images of one prompt are not independent, and chances vary
    less than booleans: the interval then uses the effective number of draws, p (1 - p) / variance of the mean, and
    Student's t where the clusters are few.
    """
    x = np.asarray(hits, dtype=np.float64)
    n = len(x)
    if n == 0:
        raise ValueError("a proportion needs at least one value")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("a proportion is of values between 0 and 1")
    p = float(x.mean())
    groups = list(range(n)) if clusters is None else list(clusters)
    draws = len(set(groups))
    effective, z = float(draws), Z95  # the cautious end: all images of a prompt agree
    if 0 < p < 1 and (effective < n or not np.isin(x, (0.0, 1.0)).all()):
        clustered = mean_by_cluster(x, groups)
        if clustered.se:
            effective, z = max(1.0, p * (1 - p) / clustered.se**2), quantile95(draws)
    low, high = wilson(p, effective, z)
    return Estimate(n, p, math.sqrt(p * (1 - p) / effective), low, high)


def wilson(p: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion p seen in n draws, by default of 95 %."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def undominated(items: Sequence[T], costs: Callable[[T], tuple[float, ...]]) -> list[T]:
    """The items of which no other one has all costs as low, and one lower: the Pareto frontier, in their order."""
    of = [costs(item) for item in items]
    worse = [any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in of) for p in of]
    return [item for item, beaten in zip(items, worse, strict=True) if not beaten]
