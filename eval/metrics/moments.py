"""Count, mean and scatter of feature vectors in float64: the sufficient statistics of a Frechet distance.

They merge (Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances")
and un-merge, so features of a million images need no more memory than those of one shard, and leaving a group out
costs a subtraction. Sums of floats depend on their order: `merge_all` takes parts in the order of their shard ids,
which makes a result the same, bit for bit, however many workers made the parts and in whatever order they came.
`Accumulator` takes rows in that order, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """n vectors' mean [d] and centred scatter sum (x - mean)(x - mean)^T [d, d], float64."""

    n: int
    mean: Array
    scatter: Array

    @property
    def dim(self) -> int:
        return int(self.mean.shape[0])

    @property
    def covariance(self) -> Array:
        """Unbiased (ddof = 1) covariance [d, d]; ValueError for fewer than two vectors, which have none."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, there are {self.n}")
        return self.scatter / (self.n - 1)


def empty(dim: int) -> Moments:
    """The neutral element of `merge`."""
    return Moments(0, np.zeros(dim), np.zeros((dim, dim)))


def of(features: npt.ArrayLike) -> Moments:
    """Moments of features [n, d] (any float type; summed in float64, centred first so that an offset costs no digits).

    ValueError names the rows whose features are not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"features must be [images, dimensions], not of shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise ValueError(f"features of {bad.size} of {len(x)} images are not finite (first: row {bad[0]})")
    if len(x) == 0:
        return empty(x.shape[1])
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the two sets together."""
    if a.dim != b.dim:
        raise ValueError(f"moments of {a.dim} and of {b.dim} dimensions cannot be merged")
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n = a.n + b.n
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * (b.n / n), a.scatter + b.scatter + np.outer(delta, delta) * (a.n * b.n / n))


def unmerge(total: Moments, part: Moments) -> Moments:
    """What is left of `total` without `part`: the inverse of `merge`."""
    n = total.n - part.n
    if n < 0:
        raise ValueError(f"a part of {part.n} vectors cannot be taken out of {total.n}")
    if part.n == 0:
        return total
    if n == 0:
        return empty(total.dim)
    mean = total.mean + (total.mean - part.mean) * (part.n / n)
    delta = part.mean - mean
    return Moments(n, mean, total.scatter - part.scatter - np.outer(delta, delta) * (n * part.n / total.n))


def merge_all(parts: Iterable[tuple[int, Moments]]) -> Moments:
    """Merges (shard id, moments) in the order of the ids, whatever order they arrive in: bit-identical results."""
    ordered = sorted(parts, key=lambda part: part[0])
    if not ordered:
        raise ValueError("there are no moments to merge")
    total = ordered[0][1]
    for _, part in ordered[1:]:
        total = merge(total, part)
    return total


class Accumulator:
    """Moments of feature rows that come one after another, in constant memory: rows wait in a block, and each full one
    is merged. The result depends on the order in which rows were added, and on nothing else."""

    def __init__(self, dim: int, block: int = 512) -> None:
        self._total, self._block = empty(dim), block
        self._rows: list[np.ndarray] = []
        self._waiting = 0

    def add(self, features: npt.ArrayLike) -> None:
        """Rows [n, d] of any float type; ValueError as in `of`, once their block is full."""
        x = np.asarray(features)
        if x.ndim != 2 or x.shape[1] != self._total.dim:
            raise ValueError(f"features must be [images, {self._total.dim}], not of shape {x.shape}")
        while len(x):
            part, x = x[: self._block - self._waiting], x[self._block - self._waiting :]
            self._rows.append(np.array(part))  # a copy: the caller's may be a view of a file that is closed
            self._waiting += len(part)
            if self._waiting == self._block:
                self.result()

    def result(self) -> Moments:
        """The moments of all that was added so far."""
        if self._waiting:
            self._total = merge(self._total, of(np.concatenate(self._rows)))
            self._rows, self._waiting = [], 0
        return self._total
