"""Precision, recall, density and coverage: where two sets of features lie to each other, by nearest neighbours.

An image's ball reaches to its k-th nearest neighbour in its own set.

    precision  share of generated images inside the ball of some real one   (Kynkaanniemi et al. 2019)
    recall     share of real images inside the ball of some generated one
    density    real balls that a generated image lies in, over k, on average (Naeem et al. 2020)
    coverage   share of real images with a generated one inside their ball

As in clovaai's reference code k is 5 and inside means nearer than the radius (torch-fidelity: 3, and the rim counts,
on VGG's features: its numbers are others). All four depend on the number of images, so that only results of equal
counts compare. Distances are computed in float64 tiles, on the accelerator where there is one: memory grows with the
number of images, not with its square. The radii of the real side are worked out once and kept (statistics.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eval.metrics.kernel import rows_on

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
NEIGHBOURS = 5


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of rows a [n, d] and b [m, d] -> [n, m]."""
    return ((a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * (a @ b.T)).clamp(min=0).sqrt()


def radii(x: npt.ArrayLike, k: int = NEIGHBOURS, device: str = "cpu", tile: int = 1024) -> Array:
    """Distance of each row [n, d] to its k-th nearest other row -> [n]; ValueError with fewer than k others."""
    import torch

    rows = np.asarray(x)
    if rows.ndim != 2 or len(rows) <= k:
        raise ValueError(f"{len(rows)} images have no {k} neighbours each; evaluate more of them")
    found = np.empty(len(rows))
    with torch.inference_mode():
        for i in range(0, len(rows), tile):
            mine, near = rows_on(rows[i : i + tile], device), None
            for j in range(0, len(rows), tile):
                block = distances(mine, rows_on(rows[j : j + tile], device))
                if i == j:
                    block.fill_diagonal_(torch.inf)  # nobody is their own neighbour
                block = block if near is None else torch.cat([near, block], dim=1)
                near = block.topk(min(k, block.shape[1]), dim=1, largest=False).values
            assert near is not None
            found[i : i + tile] = near.amax(dim=1).cpu().numpy()
    return found


def prdc(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    real_radii: Array | None = None,
    k: int = NEIGHBOURS,
    device: str = "cpu",
    tile: int = 1024,
) -> dict[str, np.ndarray]:
    """Of real [m, d] and generated [n, d] features, by name: of each generated one whether it counts to the precision
    [n] and what it adds to the density [n], of each real one whether it counts to recall and coverage [m]. The four
    shares are the means.

    real_radii [m]: `radii` of the real ones, where they are known.
    """
    import torch

    a, b = np.asarray(real), np.asarray(generated)
    around_real = torch.tensor(radii(a, k, device, tile) if real_radii is None else real_radii).to(device)
    around_generated = torch.from_numpy(radii(b, k, device, tile)).to(device)
    precise, dense = np.zeros(len(b), bool), np.zeros(len(b))
    recalled, covered = np.zeros(len(a), bool), np.zeros(len(a), bool)
    with torch.inference_mode():
        for i in range(0, len(a), tile):
            rows = rows_on(a[i : i + tile], device)
            for j in range(0, len(b), tile):
                block = distances(rows, rows_on(b[j : j + tile], device))
                inside = block < around_real[i : i + tile, None]
                precise[j : j + tile] |= inside.any(dim=0).cpu().numpy()
                dense[j : j + tile] += inside.sum(dim=0).cpu().numpy() / k
                covered[i : i + tile] |= inside.any(dim=1).cpu().numpy()
                recalled[i : i + tile] |= (block < around_generated[None, j : j + tile]).any(dim=1).cpu().numpy()
    return {"precision": precise, "density": dense, "recall": recalled, "coverage": covered}
