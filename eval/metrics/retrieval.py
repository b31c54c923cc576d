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

Array = npt.NDArray[np.float64]
ROWS_AT_ONCE = 1024  # images held against all captions at once: bounded memory
TIE = 1e-9  # cosines nearer than this are a tie; rounding would decide between them


def meanings_of(captions: Sequence[str], meaning: Callable[[str], Hashable] | None = None) -> list[Hashable]:
    """What each caption says: by default its words, whatever their white space and case."""
    return [meaning(c) if meaning else " ".join(c.split()).casefold() for c in captions]


def distinct(meanings: Sequence[Hashable]) -> dict[Hashable, int]:
    """Row of the first caption of each meaning, in order: two wordings of one scene are no rivals."""
    return {m: row for row, m in reversed(list(enumerate(meanings)))}


def of_pairs(
    images: npt.ArrayLike, texts: npt.ArrayLike, meanings: Sequence[Hashable], candidates: int
) -> Array | None:
    """As `rank_one`, of image-caption pairs (unit rows [n, d] each) among captions of distinct meaning.

    An image's own caption is in its own words; its rivals are one wording each of the other meanings.
    """
    first = distinct(meanings)
    index_of = {m: i for i, m in enumerate(first)}
    b = np.asarray(texts)
    return rank_one(images, b[list(first.values())], [index_of[m] for m in meanings], candidates, b)


def rank_one(
    images: npt.ArrayLike,
    texts: npt.ArrayLike,
    own: Sequence[int],
    candidates: int,
    own_texts: npt.ArrayLike | None = None,
) -> Array | None:
    """Chance [n] of each image that its own caption is first among `candidates` captions.

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
    return np.array(hits)


def _all_missed(bad: int, population: int, draws: int) -> float:
    """Chance that `draws` of `population`, drawn without replacement, hold none of `bad`: C(pop-bad, draws)/C(pop,
    draws)."""
    if population - bad < draws:
        return 0.0
    if bad == 0:
        return 1.0
    log_c = lgamma(population - bad + 1) - lgamma(population - bad - draws + 1)
    return float(np.exp(log_c - lgamma(population + 1) + lgamma(population - draws + 1)))
