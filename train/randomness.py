"""Random numbers derived from (seed, a sample's place in the order, purpose): nothing to save, none shared by ranks.

So 1x4, 2x2 and 4x1 ranks x accumulation draw the same noise for the same sample, a resumed run needs no
generator state, and one sample can be replayed alone. Numbers come from Philox (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), a counter-based generator: the key is made of seed and
purpose, the position is the high half of its counter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from train.order import derive_key


class Randomness:
    """Draws of one run. positions: int64 [B], places in the run's order of samples."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[str, tuple[np.random.Philox, np.random.Generator, np.ndarray]] = {}

    def normal(self, purpose: str, positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal, float32 [B, *shape]."""
        out = np.empty((len(positions), *shape), np.float32)
        for i, p in enumerate(positions):
            self._at(purpose, int(p)).standard_normal(out=out[i], dtype=np.float32)
        return out

    def uniform(self, purpose: str, positions: np.ndarray) -> np.ndarray:
        """Uniform in [0, 1), float64 [B]."""
        return np.array([self._at(purpose, int(p)).random() for p in positions], np.float64)

    def integers(self, purpose: str, positions: np.ndarray, high: int) -> np.ndarray:
        """Uniform over 0 .. high-1, int64 [B]."""
        return np.array([self._at(purpose, int(p)).integers(high) for p in positions], np.int64)

    def each(self, purpose: str, positions: np.ndarray) -> Iterator[np.random.Generator]:
        """Of each sample its generator, for draws of any kind; it serves until the next one is asked for."""
        return (self._at(purpose, int(p)) for p in positions)

    def _at(self, purpose: str, position: int) -> np.random.Generator:
        """The generator of one sample and purpose, at its beginning."""
        if purpose not in self._streams:
            key = np.array([derive_key("random", self.seed, purpose, i) for i in range(2)], np.uint64)
            bits = np.random.Philox(key=key)
            self._streams[purpose] = (bits, np.random.Generator(bits), key)
        bits, generator, key = self._streams[purpose]
        # Setting the state costs a third of building a generator. A sample has 2^128 numbers of its own.
        bits.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, position, 0], np.uint64), "key": key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return generator
