"""Frechet distance of two sets of feature vectors, each taken as a Gaussian (Dowson & Landau 1982; Heusel et al. 2017).

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With S1 = A A^T the last trace is the sum of the square roots of the eigenvalues of the symmetric A^T S2 A, so one
Cholesky factor and one symmetric eigenproblem do, and nothing complex or non-finite can come out. scipy's sqrtm of
the product S1 S2, which is what most FID codes call, takes several times as long, and between its versions has
returned 1e12 for a mode-collapsed set and lost the argument that they pass.

With fewer vectors than dimensions the product has rank at most min(n1, n2) - 1. The eigenvalues beyond that are
rounding errors of about 1e-16, whose square roots (1e-8, a thousand times over) are not: they are left out. Where the
vectors themselves are at hand, centred and divided by sqrt(n - 1) to B [n, d], S2 = B^T B and the trace is the nuclear
norm of B A: exact, and quicker by the ratio of d to n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.metrics.estimate import Estimate, jackknife
from eval.metrics.moments import Array, Moments, merge_all, unmerge


@dataclass(frozen=True)
class Reference:
    """The fixed side of a distance: mean [d], a factor A [d, r] of its covariance A A^T taken once, and its trace."""

    n: int
    mean: Array
    factor: Array
    trace: float

    @property
    def dim(self) -> int:
        return int(self.mean.shape[0])


def reference(moments: Moments) -> Reference:
    """Factors the covariance by Cholesky, or by its eigenvectors where it has not full rank. ValueError for fewer
    than two vectors."""
    covariance = moments.covariance
    return Reference(moments.n, moments.mean, _factor(covariance, moments.n - 1), float(np.trace(covariance)))


def reference_of_covariance(mean: npt.ArrayLike, covariance: npt.ArrayLike, n: int = 0) -> Reference:
    """The fixed side from a mean [d] and a covariance [d, d] of n vectors (0 where that is not known)."""
    matrix = np.asarray(covariance, np.float64)
    factor = _factor((matrix + matrix.T) / 2, n - 1 if n else len(matrix))
    return Reference(n, np.asarray(mean, np.float64), factor, float(np.trace(matrix)))


def reference_of(features: npt.ArrayLike) -> Reference:
    """The fixed side from vectors [n, d]; with n <= d no factorisation is needed, they are one themselves."""
    mean, scaled = _scaled(features)
    if len(scaled) > scaled.shape[1]:
        factor = _factor(scaled.T @ scaled, len(scaled) - 1)
    else:
        factor = np.ascontiguousarray(scaled.T)
    return Reference(len(scaled), mean, factor, float((scaled**2).sum()))


def distance(ref: Reference, moments: Moments) -> float:
    """Frechet distance (squared, as FID is quoted) between the reference and `moments`; never below 0."""
    from scipy.linalg import eigvalsh

    _same_dim(ref, moments.dim)
    covariance = moments.covariance
    inner = ref.factor.T @ (covariance @ ref.factor)
    inner = (inner + inner.T) / 2
    values = np.asarray(eigvalsh(inner, overwrite_a=True, check_finite=False), np.float64)
    keep = _significant(values, min(len(values), moments.n - 1))
    return _together(ref, moments.mean, float(np.trace(covariance)), float(np.sqrt(values[keep]).sum()))


def distance_of(ref: Reference, features: npt.ArrayLike) -> float:
    """As `distance`, from vectors [n, d]: the quicker and the more exact way where n <= d."""
    mean, scaled = _scaled(features)
    _same_dim(ref, scaled.shape[1])
    cross = float(np.linalg.svd(scaled @ ref.factor, compute_uv=False).sum())
    return _together(ref, mean, float((scaled**2).sum()), cross)


CORRECTABLE = 4  # vectors a dimension from which on the bias is of order 1/n, and the jackknife takes it out


def estimate(ref: Reference, groups: Mapping[int, Moments]) -> Estimate:
    """Distance with standard error from leaving out each of `groups` (by name) once.

    Covers the noise of the generated side; the reference is taken as given, as in every published FID. Needs at least
    two non-empty groups, and two vectors without any one of them. The bias is taken out in `bias_corrected` where
    there are CORRECTABLE vectors a dimension: with fewer, the eigenvalues' bias is not of order 1/n and no jackknife
    removes it (simulated in tests/eval/test_frechet.py).
    """
    filled = {name: group for name, group in sorted(groups.items()) if group.n > 0}
    total = merge_all(filled.items())
    left_out = [distance(ref, unmerge(total, group)) for group in filled.values()]
    return _estimate(ref, distance(ref, total), left_out, [g.n for g in filled.values()], list(filled))


def estimate_of(ref: Reference, features: npt.ArrayLike, group: npt.ArrayLike) -> Estimate:
    """As `estimate`, from vectors [n, d] and the name of the group of each [n]; meant for n <= d."""
    x, groups = np.asarray(features, np.float64), np.asarray(group)
    names, sizes = np.unique(groups, return_counts=True)
    left_out = [distance_of(ref, x[groups != g]) for g in names]
    return _estimate(ref, distance_of(ref, x), left_out, sizes.tolist(), names.tolist())


def _estimate(ref: Reference, value: float, left_out: list[float], sizes: list[int], names: list[int]) -> Estimate:
    return jackknife(value, left_out, sizes, names, correct=sum(sizes) >= CORRECTABLE * ref.dim, floor=0.0)


def _together(ref: Reference, mean: Array, trace: float, cross: float) -> float:
    delta = mean - ref.mean
    return max(0.0, float(delta @ delta) + ref.trace + trace - 2 * cross)


def _same_dim(ref: Reference, dim: int) -> None:
    if ref.dim != dim:
        raise ValueError(f"features of {ref.dim} and of {dim} dimensions have no distance")


def _scaled(features: npt.ArrayLike) -> tuple[Array, Array]:
    """Mean [d], and the centred vectors [n, d] over sqrt(n - 1)."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"a covariance needs at least 2 vectors, not features of shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features are not finite")
    mean = x.mean(axis=0)
    return mean, (x - mean) / np.sqrt(len(x) - 1)


def _factor(covariance: Array, rank: int) -> Array:
    """A with A A^T = covariance and as many columns as it can have rank."""
    if rank >= len(covariance):
        # The factor's last pivots say how near to singular the matrix is; where it is, the roots of rounding errors
        # would count, and the eigenvectors are needed to leave them out.
        from scipy.linalg.lapack import dpotrf

        factor, failed = dpotrf(covariance, lower=True, clean=True)
        pivots = np.diagonal(factor)
        if not failed and pivots.min() ** 2 > len(pivots) * np.finfo(np.float64).eps * pivots.max() ** 2:
            return np.asarray(factor, np.float64)
    values, vectors = np.linalg.eigh(covariance)
    keep = _significant(values, min(len(values), rank))
    return np.asarray(vectors[:, keep] * np.sqrt(values[keep]), np.float64)


def _significant(values: Array, rank: int) -> slice:
    """The eigenvalues (ascending) that are not rounding errors: at most `rank` of them, above d * eps of the
    largest."""
    largest = float(values[-1]) if len(values) else 0.0
    floor = len(values) * np.finfo(np.float64).eps * largest
    above = int((values > max(floor, 0.0)).sum())
    return slice(len(values) - min(rank, above), len(values))
