"""Precision, recall, density and coverage: where two sets of features lie to each other, by nearest neighbours.

A picture's ball reaches to its k-th nearest neighbour in its own set.

    precision  share of generated pictures inside the ball of some real one   (Kynkaanniemi et al. 2019)
    recall     share of real pictures inside the ball of some generated one
    density    real balls that a generated picture lies in, over k, on average (Naeem et al. 2020)
    coverage   share of real pictures with a generated one inside their ball

As in clovaai's reference code k is 5 and inside means nearer than the radius (torch-fidelity: 3, and the rim counts).
All four depend on the number of pictures, so that only results of equal counts compare. Distances are computed in
tiles: memory grows with the number of pictures, not with its square.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from eval.estimate import Estimate, mean_by_cluster, proportion

Array = npt.NDArray[np.float64]
NEIGHBOURS = 5


def distances(a: Array, b: Array) -> Array:
    """Euclidean distances of rows a [n, d] and b [m, d] -> float64 [n, m]."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * (a @ b.T)
    return np.sqrt(np.maximum(squared, 0))


def radii(x: npt.ArrayLike, k: int = NEIGHBOURS, tile: int = 1024) -> Array:
    """Distance of each row [n, d] to its k-th nearest other row -> [n]; ValueError with fewer than k others."""
    rows = np.asarray(x, np.float64)
    if rows.ndim != 2 or len(rows) <= k:
        raise ValueError(f"{len(rows)} pictures have no {k} neighbours each; evaluate more of them")
    found = np.empty(len(rows))
    for i in range(0, len(rows), tile):
        near: Array | None = None
        for j in range(0, len(rows), tile):
            block = distances(rows[i : i + tile], rows[j : j + tile])
            if i == j:
                np.fill_diagonal(block, np.inf)  # nobody is their own neighbour
            block = block if near is None else np.concatenate([near, block], axis=1)
            near = np.partition(block, k - 1, axis=1)[:, :k] if block.shape[1] > k else block
        assert near is not None
        found[i : i + tile] = near.max(axis=1)
    return found


def prdc(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    clusters: Sequence[Hashable],
    k: int = NEIGHBOURS,
    tile: int = 1024,
) -> dict[str, Estimate]:
    """The four shares of real [m, d] and generated [n, d] features; clusters [n]: the prompt of each generated one.

    The intervals of precision and density are over prompts; those of recall and coverage over real pictures, with the
    generated ones as given.
    """
    a, b = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    real_radii, generated_radii = radii(a, k, tile), radii(b, k, tile)
    precise, dense = np.zeros(len(b), bool), np.zeros(len(b))
    recalled, covered = np.zeros(len(a), bool), np.zeros(len(a), bool)
    for i in range(0, len(a), tile):
        for j in range(0, len(b), tile):
            block = distances(a[i : i + tile], b[j : j + tile])
            inside = block < real_radii[i : i + tile, None]
            precise[j : j + tile] |= inside.any(axis=0)
            dense[j : j + tile] += inside.sum(axis=0) / k
            covered[i : i + tile] |= inside.any(axis=1)
            recalled[i : i + tile] |= (block < generated_radii[None, j : j + tile]).any(axis=1)
    return {
        "precision": proportion(precise, clusters),
        "recall": proportion(recalled),
        "density": mean_by_cluster(dense, clusters),
        "coverage": proportion(covered),
    }
