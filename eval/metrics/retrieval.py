"""Retrieval: is an image's own caption the best match among a hundred distinct ones?

Which distractors an image meets is a matter of luck. Instead of drawing them, the exact chance over all draws is
taken: with k of the M - 1 other captions scoring at least as high as the right one, 99 distractors miss all k of them
with probability C(M-1-k, 99) / C(M-1, 99). With M = 100 that is plain rank 1. Ties count against the model, so a
model that gives every caption the same score has a retrieval of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import lgamma

import numpy as np
import numpy.typing as npt

from eval.metrics.estimate import Estimate, proportion

ROWS_AT_ONCE = 1024  # images held against all captions at once: bounded memory
TIE = 1e-9  # cosines nearer than this are a tie; rounding would decide between them


def distinct(captions: Sequence[str], meanings: Sequence[Hashable] | None = None) -> list[int]:
    """Row of the first caption of each meaning (by default its words), in order: two wordings of one scene are no
    rivals."""
    seen: dict[Hashable, int] = {}
    for row, caption in enumerate(captions):
        seen.setdefault(meanings[row] if meanings is not None else " ".join(caption.split()).casefold(), row)
    return list(seen.values())


def of_pairs(
    images: npt.ArrayLike,
    texts: npt.ArrayLike,
    captions: Sequence[str],
    candidates: int,
    meaning: Callable[[str], Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate | None:
    """Rank-1 share of image-caption pairs (unit rows [n, d] each) among `candidates` captions of distinct meaning.

    An image's own caption is in its own words; its rivals are one wording each of the other meanings. None with fewer
    than two meanings. clusters default to the meanings.
    """
    meanings = [meaning(c) if meaning else " ".join(c.split()).casefold() for c in captions]
    first = distinct(captions, meanings)
    index_of = {meanings[row]: i for i, row in enumerate(first)}
    own = [index_of[m] for m in meanings]
    b = np.asarray(texts)
    return rank_one(images, b[first], own, candidates, own if clusters is None else clusters, b)


def rank_one(
    images: npt.ArrayLike,
    texts: npt.ArrayLike,
    own: Sequence[int],
    candidates: int,
    clusters: Sequence[Hashable],
    own_texts: npt.ArrayLike | None = None,
) -> Estimate | None:
    """Expected share of images whose own caption is first among `candidates` captions.

    images [n, d] and texts [M, d] are unit rows, own[i] is the row in texts of image i's caption; own_texts [n, d]
    are the captions' own wordings where texts holds another wording of the same meaning. Uses min(candidates, M)
    captions; None where there are fewer than two, which is no contest.
    """
    a, b = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    size = min(candidates, len(b))
    if size < 2 or len(a) == 0:
        return None
    index = np.asarray(own)
    words = b[index] if own_texts is None else np.asarray(own_texts, np.float64)
    hits = []
    for start in range(0, len(a), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        similarity = a[rows] @ b.T
        right = (a[rows] * words[rows]).sum(axis=1)
        similarity[np.arange(len(right)), index[rows]] = -np.inf
        rivals = (similarity >= right[:, None] - TIE).sum(axis=1)
        hits += [_all_missed(int(k), len(b) - 1, size - 1) for k in rivals]
    return proportion(hits, clusters)


def _all_missed(bad: int, population: int, draws: int) -> float:
    """Chance that `draws` of `population`, drawn without replacement, hold none of `bad`: C(pop-bad, draws)/C(pop,
    draws)."""
    if population - bad < draws:
        return 0.0
    if bad == 0:
        return 1.0
    log_c = lgamma(population - bad + 1) - lgamma(population - bad - draws + 1)
    return float(np.exp(log_c - lgamma(population + 1) + lgamma(population - draws + 1)))
