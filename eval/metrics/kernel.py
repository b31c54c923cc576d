"""Kernel distances of two sets of feature vectors: KID, its like on DINOv2, and CMMD, of all images at once.

    KID, KD  k(x, y) = (x.y / d + 1)^3, unbiased: sums without the diagonals (Binkowski et al. 2018). May be negative.
    CMMD     k(x, y) = exp(-|x - y|^2 / (2 * 10^2)), times 1000, biased: with the diagonals (Jayasumana et al. 2024,
             as google-research's own code has it)

The usual KID is the mean over random subsets of 1000, whose spread is no standard error of anything, since the
subsets overlap. Here every pair counts once. Kernels are summed in float64 tiles, on the accelerator where there is
one, by jackknife group, so memory is one tile and the value without a group follows from the same sums. The sums of
the real side are worked out once and kept (statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eval.metrics.estimate import Estimate, jackknife

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
Kernel = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]  # [a, d], [b, d] -> [a, b]

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class Within:
    """Sums of a kernel over the pairs of one set of n vectors: all of them, and those of each with itself."""

    n: int
    total: float
    diagonal: float


@dataclass(frozen=True)
class Sums:
    """Sums of a kernel over pairs. xx [G, G], xy [G]: by group of x; x_diagonal [G]; real: the other side."""

    xx: Array
    xy: Array
    x_diagonal: Array
    x_sizes: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    real: Within


def polynomial(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KID's kernel of rows a [n, d] and b [m, d] -> [n, m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """CMMD's kernel of rows a [n, d] and b [m, d] -> [n, m]."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * (a @ b.T)
    return (-squared.clamp(min=0) / (2 * CMMD_SIGMA**2)).exp()


KERNELS: dict[str, Kernel] = {"polynomial": polynomial, "gaussian": gaussian}


def kid(x: npt.ArrayLike, y: npt.ArrayLike, group: npt.ArrayLike, real: Within | None = None, **how: Any) -> Estimate:
    """Unbiased KID of generated features x [n, d] against real ones y [m, d]; group [n]: jackknife group of each x;
    real: `within` of y, where it is known; how: device and tile of `group_sums`."""
    return _estimate(group_sums("polynomial", x, y, group, real, **how), _unbiased, correct=False)


def cmmd(x: npt.ArrayLike, y: npt.ArrayLike, group: npt.ArrayLike, real: Within | None = None, **how: Any) -> Estimate:
    """CMMD of unit-length CLIP features x [n, d] (generated) and y [m, d] (real), times 1000; the rest as in `kid`.

    `value` is the published, biased one; its bias is of order 1/n at any n, and `bias_corrected` is without it.
    """
    return _estimate(group_sums("gaussian", x, y, group, real, **how), _biased, correct=True)


def within(kernel: str, y: npt.ArrayLike, device: str = "cpu", tile: int = 2048) -> Within:
    """The sums over the pairs of one set of rows y [m, d]."""
    import torch

    b, k = np.asarray(y), KERNELS[kernel]
    total = diagonal = 0.0
    with torch.inference_mode():
        for i in range(0, len(b), tile):
            rows = rows_on(b[i : i + tile], device)
            for j in range(i, len(b), tile):
                block = k(rows, rows_on(b[j : j + tile], device))
                total += float(block.sum()) * (1 if i == j else 2)
                if i == j:
                    diagonal += float(block.diagonal().sum())
    return Within(len(b), total, diagonal)


def group_sums(
    kernel: str,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    group: npt.ArrayLike,
    real: Within | None = None,
    device: str = "cpu",
    tile: int = 2048,
) -> Sums:
    """The kernel's sums over all pairs, by group of x, from tiles of at most tile x tile; summed in float64."""
    import torch

    a, b, groups = np.asarray(x), np.asarray(y), np.asarray(group)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(groups) != len(a):
        raise ValueError(f"features {a.shape} and {b.shape} with {len(groups)} groups are no two sets of one dimension")
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    with torch.inference_mode():
        member = torch.eye(len(sizes), dtype=torch.float64)[torch.as_tensor(index)].to(device)  # [n, G]
        xx = torch.zeros(len(sizes), len(sizes), dtype=torch.float64, device=device)
        xy, x_diagonal = torch.zeros_like(xx[0]), torch.zeros_like(xx[0])
        for i in range(0, len(a), tile):
            rows, mine = rows_on(a[i : i + tile], device), member[i : i + tile]
            for j in range(i, len(a), tile):
                block = KERNELS[kernel](rows, rows_on(a[j : j + tile], device))
                part = mine.T @ block @ member[j : j + tile]
                xx += part if i == j else part + part.T
                if i == j:
                    x_diagonal += mine.T @ block.diagonal()
            for j in range(0, len(b), tile):
                xy += mine.T @ KERNELS[kernel](rows, rows_on(b[j : j + tile], device)).sum(dim=1)
    real = within(kernel, b, device, tile) if real is None else real
    return Sums(xx.cpu().numpy(), xy.cpu().numpy(), x_diagonal.cpu().numpy(), sizes, names, real)


def rows_on(rows: np.ndarray, device: str) -> torch.Tensor:
    """A block of features as float64, on the device."""
    import torch

    return torch.from_numpy(np.array(rows)).to(device, torch.float64)


def _unbiased(xx: float, x_diagonal: float, n: int, xy: float, real: Within) -> float:
    apart = (xx - x_diagonal) / (n * (n - 1)) + (real.total - real.diagonal) / (real.n * (real.n - 1))
    return apart - 2 * xy / (n * real.n)


def _biased(xx: float, x_diagonal: float, n: int, xy: float, real: Within) -> float:
    return CMMD_SCALE * (xx / n**2 + real.total / real.n**2 - 2 * xy / (n * real.n))


def _estimate(sums: Sums, statistic: Callable[[float, float, int, float, Within], float], correct: bool) -> Estimate:
    n = int(sums.x_sizes.sum())
    if sums.real.n < 2 or n - int(sums.x_sizes.max()) < 2:
        raise ValueError(f"a kernel distance needs at least 2 vectors on either side, also without any one group ({n})")
    total, diagonal, cross = float(sums.xx.sum()), float(sums.x_diagonal.sum()), float(sums.xy.sum())
    without = [
        statistic(
            total - 2 * float(sums.xx[g].sum()) + float(sums.xx[g, g]),
            diagonal - float(sums.x_diagonal[g]),
            n - int(size),
            cross - float(sums.xy[g]),
            sums.real,
        )
        for g, size in enumerate(sums.x_sizes)
    ]
    value = statistic(total, diagonal, n, cross, sums.real)
    return jackknife(value, without, sums.x_sizes.tolist(), sums.groups.tolist(), correct=correct, floor=0.0)
