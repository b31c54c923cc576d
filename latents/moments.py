"""Posterior moments as stored, and per-channel statistics that merge.

A KL autoencoder gives each image a diagonal Gaussian (Kingma & Welling 2013, eq. 9). The mean is
stored in float16, unscaled; the log of the standard deviation in 8 bits on a fixed grid. A trainer then
draws mean + std * noise afresh each epoch at 1.5x the bytes of one frozen draw, where a second float16
column would take 2x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# diffusers clamps the log-variance to [-30, 20] (DiagonalGaussianDistribution), so this grid holds every
# value there is: none is clipped. Half a step is 0.049: a stored std is within 5.1 % of the true one.
LOGSTD_MIN = -15.0
LOGSTD_STEP = 25.0 / 255.0


def to_half(mean: np.ndarray) -> np.ndarray:
    """float32 to float16; values beyond its range become infinite, which `finite_rows` then finds."""
    with np.errstate(over="ignore"):
        return mean.astype(np.float16)


def finite_rows(array: np.ndarray) -> np.ndarray:
    """bool [N]: whether every value of row n of `array` [N, ...] is finite."""
    return np.isfinite(array).reshape(len(array), -1).all(axis=1)


def quantise_logstd(logstd: np.ndarray) -> np.ndarray:
    """Natural log of the std, float, any shape -> uint8 codes of the nearest grid value (clipped to the grid)."""
    codes = np.rint((logstd.astype(np.float64) - LOGSTD_MIN) / LOGSTD_STEP)
    return np.clip(codes, 0, 255).astype(np.uint8)


def dequantise_logstd(codes: np.ndarray, minimum: float = LOGSTD_MIN, step: float = LOGSTD_STEP) -> np.ndarray:
    """uint8 codes -> float32 log-std, `minimum + step * code`; both numbers stand in a shard's metadata."""
    return (minimum + step * np.arange(256, dtype=np.float64)).astype(np.float32)[codes]


_ARRAYS = ("mean", "m2", "variance", "minimum", "maximum")


@dataclasses.dataclass(frozen=True)
class ChannelStats:
    """Per-channel statistics over samples and places, in float64 [C] each.

    count: values per channel. mean, m2: of the posterior means (m2: sum of squared deviations).
    variance: mean of the posterior variances. minimum, maximum: of the posterior means.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray
    variance: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray

    @classmethod
    def of(cls, mean: np.ndarray, logstd: np.ndarray | None = None) -> ChannelStats:
        """Statistics of stored moments: mean float16 [N,C,h,w], logstd float32 of the same shape or None."""
        channels = mean.shape[1]
        if len(mean) == 0:
            zeros = np.zeros(channels)
            return cls(0, zeros, zeros, zeros, zeros + np.inf, zeros - np.inf)
        total = cls.of(mean[:0])
        # By blocks, so that float64 copies of a whole shard are never in memory at once.
        for i in range(0, len(mean), 256):
            x = np.moveaxis(mean[i : i + 256].astype(np.float64), 1, 0).reshape(channels, -1)
            centre = x.mean(axis=1)
            variance = np.zeros(channels)
            if logstd is not None:
                variance = np.exp(2.0 * logstd[i : i + 256].astype(np.float64)).mean(axis=(0, 2, 3))
            m2 = np.square(x - centre[:, None]).sum(axis=1)
            total = total.merge(cls(x.shape[1], centre, m2, variance, x.min(axis=1), x.max(axis=1)))
        return total

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Both together (Chan, Golub & LeVeque 1979, eq. 2.1); merge shards in index order for the same bits."""
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return ChannelStats(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + np.square(delta) * self.count * share,
            self.variance + (other.variance - self.variance) * share,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )

    def to_json(self) -> dict[str, Any] | None:
        """Parts as JSON numbers, exactly; None where nothing was counted."""
        if self.count == 0:
            return None
        return {"count": self.count, **{name: [float(x) for x in getattr(self, name)] for name in _ARRAYS}}

    @classmethod
    def from_json(cls, parts: dict[str, Any]) -> ChannelStats:
        """The inverse of `to_json`."""
        return cls(int(parts["count"]), *(np.array(parts[name], np.float64) for name in _ARRAYS))

    def summary(self) -> dict[str, Any]:
        """What a manifest states: mean, std, min, max of the means, and the std of posterior draws."""
        std = np.sqrt(self.m2 / self.count)
        sample_std = np.sqrt(self.m2 / self.count + self.variance)
        values = {"mean": self.mean, "std": std, "min": self.minimum, "max": self.maximum, "sample_std": sample_std}
        return {"count": self.count, **{k: [float(x) for x in v] for k, v in values.items()}}


def of_columns(arrays: dict[str, np.ndarray]) -> ChannelStats:
    """Statistics of all moments of a shard, of every bucket, in the order of their numbers."""
    buckets = sorted((n for n in arrays if n.partition(".")[0] == "mean"), key=lambda n: int(n.partition(".")[2] or 0))
    total = ChannelStats.of(arrays[buckets[0]][:0])
    for name in buckets:
        codes = arrays.get("logstd" + name.removeprefix("mean"))
        total = total.merge(ChannelStats.of(arrays[name], None if codes is None else dequantise_logstd(codes)))
    return total
