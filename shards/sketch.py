"""Histograms of any float32 column that merge exactly, whatever its range: quantiles of 2e9 values from shards' stats.

A value falls into the bin of its first 16 bits (sign, exponent, 7 bits of the mantissa), so a bin is at most 1/128 of
its value wide. Counts of bins add up to the same numbers in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

Sketch = dict[str, int]  # bin (of an order-preserving numbering, as text, for JSON) -> count


def _ordered(bits: np.ndarray) -> np.ndarray:
    """uint32 patterns of float32 -> uint32 in the order of the values; its own inverse is `_bits`."""
    negative = bits >> 31 == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32)


def _bits(ordered: np.ndarray) -> np.ndarray:
    positive = ordered >> 31 == 1
    return np.where(positive, ordered & np.uint32(0x7FFFFFFF), ~ordered).astype(np.uint32)


def sketch(values: np.ndarray) -> Sketch:
    """The histogram of an array of floats; what is not finite is left out."""
    finite = np.asarray(values, np.float32)
    finite = finite[np.isfinite(finite)] + np.float32(0)  # -0 becomes 0
    bins, counts = np.unique(_ordered(finite.view(np.uint32)) >> 16, return_counts=True)
    return {str(b): int(c) for b, c in zip(bins, counts, strict=True)}


def merge(sketches: Iterable[Mapping[str, int]]) -> Sketch:
    """The histogram of all of them together."""
    total: Sketch = {}
    for one in sketches:
        for b, count in one.items():
            total[b] = total.get(b, 0) + count
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def edges(histogram: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower edges, upper edges (float32, exclusive) and counts (int64) of the bins, in rising order."""
    bins = np.array(sorted(map(int, histogram)), np.uint32)
    counts = np.array([histogram[str(b)] for b in bins], np.int64)
    low = _bits(bins << 16).view(np.float32)
    high = _bits((bins << 16) + np.uint32(0xFFFF)).view(np.float32)
    return low, high, counts


def quantile(histogram: Mapping[str, int], q: float) -> float:
    """The value below which a share `q` of all values lies, to the lower edge of its bin; NaN where there are none."""
    low, _, counts = edges(histogram)
    if not len(counts):
        return float("nan")
    bin_ = int(np.searchsorted(np.cumsum(counts), q * counts.sum(), side="left"))
    return float(low[min(bin_, len(low) - 1)])
