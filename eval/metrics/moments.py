"""Count, mean and scatter of feature vectors in float64: the sufficient statistics of a Frechet distance.

They merge (Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances")
and un-merge, so features of a million pictures need no more memory than those of one shard, and leaving a group out
costs a subtraction. Sums of floats depend on their order: `merge_all` takes parts in the order of their shard ids,
which makes a result the same, bit for bit, however many workers made the parts and in whatever order they came.
`Accumulator` takes rows and whole parts in that order in the memory of two matrices, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def of(features: npt.ArrayLike, keys: Sequence[str] | None = None) -> Moments:
    """Moments of features [n, d] (any float type; summed in float64, centred first so that an offset costs no digits).

    ValueError names the picture (by `keys`) whose features are not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"features must be [pictures, dimensions], not of shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        names = ", ".join(str(keys[i]) if keys is not None else f"row {i}" for i in bad[:5])
        raise ValueError(f"features of {bad.size} of {len(x)} pictures are not finite (first: {names})")
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


def to_columns(part: Moments) -> dict[str, np.ndarray]:
    """As columns of a shard (shards/columns.py): n, mean [d], and the scatter's upper triangle [d (d + 1) / 2]."""
    return {"n": np.array([part.n]), "mean": part.mean, "upper": part.scatter[np.triu_indices(part.dim)]}


def from_columns(columns: Mapping[str, np.ndarray]) -> Moments:
    """The inverse of `to_columns`; ValueError where the columns do not fit each other."""
    n, mean, upper = int(columns["n"][0]), np.asarray(columns["mean"], np.float64), columns["upper"]
    if upper.shape != (len(mean) * (len(mean) + 1) // 2,):
        raise ValueError(f"a triangle of {upper.shape} numbers is none of {len(mean)} dimensions")
    return Moments(n, mean, _square(upper, len(mean)))


def _square(upper: np.ndarray, dim: int) -> Array:
    full = np.zeros((dim, dim))
    full[np.triu_indices(dim)] = upper
    return full + np.triu(full, 1).T


class Accumulator:
    """Moments of feature rows and of other moments that come one after another, in constant memory.

    Merging by `merge` costs an outer product [d, d] each time. Here rows wait in a block, and the deviations of
    parts' means from one fixed point c (the first mean) in another; each full block costs one matrix product:

        scatter = sum S_i + sum n_i (m_i - c)(m_i - c)^T - n (m - c)(m - c)^T

    c lies within the data, so that the last difference costs no digits. The result depends on the order in which
    things were added, and on nothing else.
    """

    def __init__(self, dim: int, block: int = 512) -> None:
        self.dim, self.n = dim, 0
        self._block = block
        self._rows: list[Array] = []
        self._waiting = 0
        self._centre: Array | None = None
        self._sum = np.zeros(dim)  # of n_i (m_i - c)
        self._scatter = np.zeros((dim, dim))
        self._deviations: list[Array] = []
        self._upper: Array | None = None  # of shards that come as triangles, added as such

    def add(self, features: npt.ArrayLike, keys: Sequence[str] | None = None) -> None:
        """Rows [n, d] of any float type; ValueError as in `of`."""
        x = np.asarray(features)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"features must be [pictures, {self.dim}], not of shape {x.shape}")
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if bad.size:
            of(x, keys)  # raises, and names them
        self.n += len(x)
        while len(x):
            part, x = x[: self._block - self._waiting], x[self._block - self._waiting :]
            self._rows.append(np.array(part))  # a copy: the caller's may be a view of a file that is closed
            self._waiting += len(part)
            if self._waiting == self._block:
                self._flush()

    def merge(self, part: Moments) -> None:
        """Everything that `part` was made of; the matrices are added in place."""
        if part.dim != self.dim:
            raise ValueError(f"moments of {self.dim} and of {part.dim} dimensions cannot be merged")
        if part.n:
            self._flush()
            self.n += part.n
            self._take(part)

    def merge_columns(self, columns: Mapping[str, np.ndarray]) -> None:
        """As `merge`, of a shard of `to_columns`: half the numbers are read and added."""
        n, mean, upper = int(columns["n"][0]), np.asarray(columns["mean"], np.float64), columns["upper"]
        if mean.shape != (self.dim,) or upper.shape != (self.dim * (self.dim + 1) // 2,):
            raise ValueError(f"moments of {self.dim} and of {len(mean)} dimensions cannot be merged")
        if n:
            self._flush()
            self.n += n
            if self._upper is None:
                self._upper = np.zeros(upper.shape)
            self._upper += upper
            self._deviate(n, mean)

    def result(self) -> Moments:
        """The moments of all that was added so far."""
        self._flush()
        self._fold()
        if self._upper is not None:
            self._scatter += _square(self._upper, self.dim)
            self._upper = None
        if self._centre is None:
            return empty(self.dim)
        mean = self._sum / self.n
        return Moments(self.n, self._centre + mean, self._scatter - np.outer(mean, mean) * self.n)

    def _flush(self) -> None:
        if self._waiting:
            self._take(of(np.concatenate(self._rows)))
            self._rows, self._waiting = [], 0

    def _take(self, part: Moments) -> None:
        self._scatter += part.scatter
        self._deviate(part.n, part.mean)

    def _deviate(self, n: int, mean: Array) -> None:
        if self._centre is None:
            self._centre = mean.copy()
        deviation = mean - self._centre
        self._sum += n * deviation
        self._deviations.append(np.sqrt(n) * deviation)
        if len(self._deviations) == self._block:
            self._fold()

    def _fold(self) -> None:
        if self._deviations:
            d = np.stack(self._deviations)
            self._scatter += d.T @ d
            self._deviations = []
