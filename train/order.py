"""Which sample comes when: a pure function of (dataset, seed, position), in memory O(shards).

Position p is the p-th sample of the run, counted over all ranks and epochs. Each epoch is a keyed
permutation of the shards, cut into windows of a few shards, and within a window a keyed permutation of
its rows. So each sample comes once an epoch; nothing depends on ranks, workers or batches; a resumed run
goes on at its position at once; and only a window's shards need to be open at a time.

A permutation of n things is a Feistel network on the smallest even number of bits that holds n, walked
until it lands below n (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from shards.fingerprint import digest_json

ROUNDS = 6
_U64 = np.uint64


def derive_key(*parts: str | int) -> int:
    """A 64-bit key from strings and integers (the first bytes of their sha256)."""
    return int(digest_json(list(parts))[:16], 16)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): uint64 -> uint64, a bijection that spreads each bit."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `index` (int64, each in 0..n-1) under the keyed permutation of 0..n-1; int64 of the same shape."""
    if n <= 1:
        return np.zeros_like(index)
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask, shift, size = _U64((1 << half) - 1), _U64(half), _U64(n)
    keys = mix64(_U64(key) + np.arange(1, ROUNDS + 1, dtype=_U64) * _U64(0x9E3779B97F4A7C15))

    def cipher(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & mask
        for k in keys:
            left, right = right, left ^ (mix64(right + k) & mask)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        x = cipher(index.astype(_U64))
        while (outside := np.flatnonzero(x >= size)).size:
            x[outside] = cipher(x[outside])
    return x.astype(np.int64)


class Order:
    """The order of a dataset's samples under a seed.

    counts: int64 [shards], samples of each shard. fingerprint: the dataset's, so that another dataset has
    another order. window: how many shards are mixed with one another.
    """

    def __init__(self, counts: np.ndarray, fingerprint: str, seed: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.size = int(self.counts.sum())
        if self.size == 0:
            raise ValueError("a dataset without samples has no order")
        self.fingerprint = fingerprint
        self._parts = (fingerprint, int(seed))
        self.window = window
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one epoch: the shards in their order, and how many samples lie before each and in all ([shards + 1])."""
        n = len(self.counts)
        shards = permute(np.arange(n, dtype=np.int64), n, derive_key("shards", *self._parts, epoch))
        return shards, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[shards])])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 [B] -> (shard position, row within the shard), int64 [B] each."""
        positions = np.asarray(positions, np.int64)
        shard, row = np.empty_like(positions), np.empty_like(positions)
        epochs, places = np.divmod(positions, self.size)
        for epoch in np.unique(epochs):
            mine = np.flatnonzero(epochs == epoch)
            shards, before = self._epoch(int(epoch))
            slot = np.searchsorted(before, places[mine], side="right") - 1
            windows = slot // self.window
            for w in np.unique(windows):
                here = mine[windows == w]
                first, last = int(w) * self.window, min((int(w) + 1) * self.window, len(shards))
                begin, end = int(before[first]), int(before[last])
                key = derive_key("rows", *self._parts, int(epoch), int(w))
                place = begin + permute(places[here] - begin, end - begin, key)
                slots = np.searchsorted(before, place, side="right") - 1
                shard[here], row[here] = shards[slots], place - before[slots]
        return shard, row


class Mixture:
    """Which of several streams comes next: in proportion to their weights, in shuffled blocks of exact composition.

    weights: float [streams], positive, of any sum. unit: how many draws belong together; a block is that many
    times a power of two, the smallest that meets the weights to a thousandth, so that where the weights allow it
    every batch of `unit` samples has the same composition.
    """

    def __init__(self, weights: Sequence[float], unit: int, *key: str | int) -> None:
        share = np.asarray(weights, np.float64) / np.sum(weights)
        if len(share) == 0 or not (share > 0).all():
            raise ValueError("every stream of a mixture needs a weight above 0")
        for doublings in range(17):
            self.counts = np.maximum(_apportion(share, unit << doublings), 1)  # even the rarest comes at times
            if (np.abs(self.counts / self.counts.sum() - share) <= 1e-3 * share).all():
                break
        self.length, self._key = int(self.counts.sum()), key
        self._block = functools.lru_cache(maxsize=4)(self._plan)

    def _plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one block: the stream of each place, and how often that stream came before in the block."""
        slots = np.repeat(np.arange(len(self.counts)), self.counts)
        place = permute(np.arange(self.length, dtype=np.int64), self.length, derive_key("mixture", *self._key, block))
        stream = slots[place]
        before = np.empty(self.length, np.int64)
        for s, n in enumerate(self.counts):
            before[stream == s] = np.arange(n)
        return stream, before

    def split(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws int64 [B] -> (stream, place within that stream), int64 [B] each; each place of a stream comes once."""
        index = np.asarray(index, np.int64)
        if len(self.counts) == 1:
            return np.zeros_like(index), index
        stream, place = np.empty_like(index), np.empty_like(index)
        blocks, rest = np.divmod(index, self.length)
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            streams, before = self._block(int(block))
            stream[here] = streams[rest[here]]
            place[here] = block * self.counts[stream[here]] + before[rest[here]]
        return stream, place


def _apportion(share: np.ndarray, length: int) -> np.ndarray:
    """Whole numbers, int64, in proportion to `share` with sum `length` (largest remainders)."""
    exact = share * length
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: length - int(counts.sum())]] += 1
    return counts


def batch_positions(images: int, rank: int, world: int, micro_step: int, micro: int) -> np.ndarray:
    """Positions (int64 [micro]) of one rank's micro-batch of the global batch that begins at position `images`.

    Micro-step by micro-step the ranks lie side by side, so 2 ranks and 1 rank with 2 accumulation steps
    see the same samples in the same global batch.
    """
    return images + (micro_step * world + rank) * micro + np.arange(micro, dtype=np.int64)
