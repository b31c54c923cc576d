"""Inception score: exp(mean KL(p(class | image) || p(class))) (Salimans et al. 2016), over all images at once.

The published score is a mean over ten splits, which makes it lower the fewer images there are, and takes the spread
of the splits for an error. Here is one split, with a jackknife that also takes the bias out where there are
four images a class. Logits are those without
the last layer's bias, as in the original TensorFlow graph and in torch-fidelity (`logits_unbiased`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eval.metrics.estimate import Estimate, jackknife


def inception_score(logits: npt.ArrayLike, group: npt.ArrayLike) -> Estimate:
    """Score of logits [n, classes]; group [n]: jackknife group of each image. ValueError for fewer than two groups.

    From the groups' sums of p and of sum p log p alone, in float64.
    """
    x, groups = np.asarray(logits, np.float64), np.asarray(group)
    if x.ndim != 2 or len(x) != len(groups):
        raise ValueError(f"logits {x.shape} with {len(groups)} groups have no Inception score")
    if not np.isfinite(x).all():
        raise ValueError("logits are not finite")
    shifted = x - x.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    member = np.eye(len(sizes))[index]
    mass, negentropy = member.T @ p, member.T @ (p * log_p).sum(axis=1)
    total_mass, total, n = mass.sum(axis=0), float(negentropy.sum()), len(x)
    without = [
        _score(total_mass - mass[g], total - float(negentropy[g]), n - int(size)) for g, size in enumerate(sizes)
    ]
    value = _score(total_mass, total, n)
    return jackknife(value, without, sizes.tolist(), names.tolist(), correct=n >= 4 * x.shape[1], floor=1.0)


def _score(mass: npt.NDArray[np.float64], negentropy: float, n: int) -> float:
    marginal = mass / n
    positive = marginal[marginal > 0]
    return float(np.exp(negentropy / n - (positive * np.log(positive)).sum()))
