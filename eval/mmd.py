"""Kernel distances of two sets of feature vectors: KID and CMMD, of all pictures at once, with jackknife errors.

    KID   k(x, y) = (x.y / d + 1)^3, unbiased: sums without the diagonals (Binkowski et al. 2018). May be negative.
    CMMD  k(x, y) = exp(-|x - y|^2 / (2 * 10^2)), times 1000, biased: with the diagonals (Jayasumana et al. 2024,
          as google-research's own code has it)

The usual KID is the mean over random subsets of 1000, whose spread is no standard error of anything, since the
subsets overlap. Here every pair counts once. Kernels are summed in tiles, by jackknife group, so memory is one tile
and the value without a group follows from the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.estimate import Estimate, jackknife

Array = npt.NDArray[np.float64]
Kernel = Callable[[Array, Array], Array]  # [a, d], [b, d] -> [a, b]

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class Sums:
    """Sums of a kernel over pairs. xx [G, G], xy [G]: by group of x; yy: a number; diagonals of xx [G] and of yy."""

    xx: Array
    xy: Array
    yy: float
    x_diagonal: Array
    y_diagonal: float
    x_sizes: npt.NDArray[np.int64]
    y_size: int


def polynomial(a: Array, b: Array) -> Array:
    """KID's kernel of rows a [n, d] and b [m, d] -> [n, m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Array, b: Array, sigma: float = CMMD_SIGMA) -> Array:
    """CMMD's kernel of rows a [n, d] and b [m, d] -> [n, m]."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * (a @ b.T)
    return np.exp(-np.maximum(squared, 0) / (2 * sigma**2))


def kid(x: npt.ArrayLike, y: npt.ArrayLike, group: npt.ArrayLike, tile: int = 2048) -> Estimate:
    """Unbiased KID of generated features x [n, d] against real ones y [m, d]; group [n]: jackknife group of each x."""
    return _estimate(group_sums(polynomial, x, y, group, tile), _unbiased)


def cmmd(x: npt.ArrayLike, y: npt.ArrayLike, group: npt.ArrayLike, tile: int = 2048) -> Estimate:
    """CMMD of unit-length CLIP features x [n, d] (generated) and y [m, d] (real), times 1000; group as in `kid`.

    `value` is the published, biased one; the jackknife's `bias_corrected` takes its bias of order 1/n out again.
    """
    return _estimate(group_sums(gaussian, x, y, group, tile), _biased)


def group_sums(kernel: Kernel, x: npt.ArrayLike, y: npt.ArrayLike, group: npt.ArrayLike, tile: int = 2048) -> Sums:
    """The kernel's sums over all pairs, by group of x, from tiles of at most tile x tile; summed in float64."""
    a, b, owner = np.asarray(x), np.asarray(y), np.asarray(group)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(owner) != len(a):
        raise ValueError(f"features {a.shape} and {b.shape} with {len(owner)} groups are no two sets of one dimension")
    _, index, sizes = np.unique(owner, return_inverse=True, return_counts=True)
    member = np.eye(len(sizes))[index]  # [n, G]
    xx, xy, yy = np.zeros((len(sizes), len(sizes))), np.zeros(len(sizes)), 0.0
    x_diagonal, y_diagonal = np.zeros(len(sizes)), 0.0
    for i in range(0, len(a), tile):
        rows = np.asarray(a[i : i + tile], np.float64)
        mine = member[i : i + tile]
        for j in range(i, len(a), tile):
            block = kernel(rows, np.asarray(a[j : j + tile], np.float64))
            part = mine.T @ block @ member[j : j + tile]
            xx += part if i == j else part + part.T
            if i == j:
                x_diagonal += mine.T @ np.diagonal(block)
        for j in range(0, len(b), tile):
            xy += mine.T @ kernel(rows, np.asarray(b[j : j + tile], np.float64)).sum(axis=1)
    for i in range(0, len(b), tile):
        rows = np.asarray(b[i : i + tile], np.float64)
        for j in range(i, len(b), tile):
            block = kernel(rows, np.asarray(b[j : j + tile], np.float64))
            yy += float(block.sum()) * (1 if i == j else 2)
            if i == j:
                y_diagonal += float(np.trace(block))
    return Sums(xx, xy, yy, x_diagonal, y_diagonal, sizes, len(b))


def _unbiased(xx: float, x_diagonal: float, n: int, xy: float, sums: Sums) -> float:
    m = sums.y_size
    within = (xx - x_diagonal) / (n * (n - 1)) + (sums.yy - sums.y_diagonal) / (m * (m - 1))
    return within - 2 * xy / (n * m)


def _biased(xx: float, x_diagonal: float, n: int, xy: float, sums: Sums) -> float:
    m = sums.y_size
    return CMMD_SCALE * (xx / n**2 + sums.yy / m**2 - 2 * xy / (n * m))


def _estimate(sums: Sums, statistic: Callable[[float, float, int, float, Sums], float]) -> Estimate:
    n = int(sums.x_sizes.sum())
    if sums.y_size < 2 or n - int(sums.x_sizes.max()) < 2:
        raise ValueError(f"a kernel distance needs at least 2 vectors on either side, also without any one group ({n})")
    total, diagonal, cross = float(sums.xx.sum()), float(sums.x_diagonal.sum()), float(sums.xy.sum())
    without = [
        statistic(
            total - 2 * float(sums.xx[g].sum()) + float(sums.xx[g, g]),
            diagonal - float(sums.x_diagonal[g]),
            n - int(size),
            cross - float(sums.xy[g]),
            sums,
        )
        for g, size in enumerate(sums.x_sizes)
    ]
    return jackknife(statistic(total, diagonal, n, cross, sums), without, sums.x_sizes.tolist())
