"""The order of one bucket of one data set over canonical streams: a pure function of (key, index), with its inverse.

Index q of an epoch is turn `q // V` of stream `q % V`. An epoch lays all shards, permuted, on one line and cuts the
line into V equal stretches, one a stream; a stream walks its stretch window by window, and the rows of a window (a
contiguous run of the line: a few byte ranges of files) are permuted. So a rank that takes the indices = r (mod W), with
W a divisor of V, reads streams of its own alone, in sequence, each byte once an epoch. On other numbers of ranks the
order is the same and only the reading is shared. The windows of different streams end at different turns, so that
windows are read evenly through an epoch. placement.py puts several orders together.

A permutation of n things is a Feistel network on the smallest even number of bits that holds n, walked until it lands
below n (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
"""

from __future__ import annotations

import functools

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


def permute(index: np.ndarray, n: int | np.ndarray, key: int | np.ndarray, inverse: bool = False) -> np.ndarray:
    """The images of `index` (int64 [B]) under keyed permutations of 0..n-1, or under their inverses; int64 [B].

    n, key: one for all, or one for each (int64 and uint64 [B]). Each index must lie in 0..n-1.
    """
    index, n, key = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(n, np.int64), np.asarray(key, _U64))
    if index.size == 0:
        return np.zeros(index.shape, np.int64)
    half = np.maximum(1, (np.ceil(np.log2(np.maximum(n, 2))).astype(np.int64) + 1) // 2).astype(_U64)
    mask, x, size = (_U64(1) << half) - _U64(1), index.astype(_U64), n.astype(_U64)
    with np.errstate(over="ignore"):
        keys = [mix64(key + _U64(r * 0x9E3779B97F4A7C15 & (1 << 64) - 1)) for r in range(1, ROUNDS + 1)]

        def cipher(x: np.ndarray, at: np.ndarray | slice) -> np.ndarray:
            left, right = x >> half[at], x & mask[at]
            for k in keys[::-1] if inverse else keys:
                if inverse:
                    left, right = right ^ (mix64(left + k[at]) & mask[at]), left
                else:
                    left, right = right, left ^ (mix64(right + k[at]) & mask[at])
            return (left << half[at]) | right

        x = cipher(x, slice(None))
        while (outside := np.flatnonzero(x >= size)).size:
            x[outside] = cipher(x[outside], outside)
    return x.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _shuffled(key: str, shards: int, epoch: int) -> np.ndarray:
    """The shards, int32, in the order in which an epoch lays them down; all buckets of a data set share it."""
    return permute(np.arange(shards), shards, derive_key(key, "shards", epoch)).astype(np.int32)


class Order:
    """Indices 0, 1, 2, ... of one bucket of one data set -> its samples. Memory O(shards + V).

    counts: [shards], samples of each shard. key: what the order is a function of, beside counts. streams: V.
    window: the rows that are read, and mixed, together. Raises ValueError where there are no samples.
    """

    def __init__(self, counts: np.ndarray, key: str, streams: int, window: int) -> None:
        self.counts, self.key, self.streams, self.window = np.asarray(counts), key, streams, window
        self.size = int(self.counts.sum(dtype=np.int64))
        if self.size == 0:
            raise ValueError("a dataset without samples has no order")
        self.length = self.size // streams + (np.arange(streams) < self.size % streams)  # of each stream, an epoch
        # How far each stream is into its first window when an epoch begins.
        self.phase = np.arange(streams) * window // streams
        self.windows = -(-(int(self.length[0]) + int(self.phase[-1])) // window)  # numbers an epoch has, at the most
        self._rows = derive_key(key, "rows")
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Shards in their order; samples before each [shards+1]; where each stretch begins; streams by that."""
        shards = _shuffled(self.key, len(self.counts), epoch)
        before = np.zeros(len(shards) + 1, np.uint32 if self.size < 1 << 32 else np.int64)
        np.cumsum(self.counts[shards], out=before[1:])
        laid = permute(np.arange(self.streams), self.streams, derive_key(self.key, "streams", epoch))
        begins = np.empty(self.streams, np.int64)
        begins[laid] = np.cumsum(self.length[laid]) - self.length[laid]
        return shards, before, begins, laid

    def _window_key(self, epoch: np.ndarray, stream: np.ndarray, window: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            base = mix64(_U64(self._rows) + np.atleast_1d(epoch).astype(_U64))
            return mix64(mix64(base + stream.astype(_U64)) ^ window.astype(_U64))

    def extent(self, stream: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First turn and number of turns of windows of streams; int64 [B] each."""
        first = np.maximum(window * self.window - self.phase[stream], 0)
        end = np.minimum((window + 1) * self.window - self.phase[stream], self.length[stream])
        return first, end - first

    def spot(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Indices int64 [B] -> (epoch, stream, window, row within the window), int64 [B] each."""
        epoch, within = np.divmod(np.asarray(indices, np.int64), self.size)
        turn, v = np.divmod(within, self.streams)
        w = (turn + self.phase[v]) // self.window
        first, size = self.extent(v, w)
        return epoch, v, w, permute(turn - first, size, self._window_key(epoch, v, w))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices int64 [B] -> (shard position, row within the shard's bucket), int64 [B] each."""
        epochs, v, w, o = self.spot(indices)
        shard, row = np.empty_like(v), np.empty_like(v)
        for e in np.unique(epochs):
            mine = epochs == e
            shards, before, begins, _ = self.epoch(int(e))
            at = begins[v[mine]] + self.extent(v[mine], w[mine])[0] + o[mine]
            slot = np.searchsorted(before, at.astype(before.dtype), side="right") - 1
            shard[mine], row[mine] = shards[slot], at - before[slot].astype(np.int64)
        return shard, row

    def index(self, epoch: int, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """When samples come in an epoch: the inverse of `locate`, int64 [B]."""
        _, before, begins, laid = self.epoch(epoch)
        slot = permute(shard, len(self.counts), derive_key(self.key, "shards", epoch), inverse=True)
        at = before[slot].astype(np.int64) + row
        # Streams without a sample in this epoch begin where the next one does: the last of those that begin there.
        v = laid[np.searchsorted(begins[laid], at, side="right") - 1]
        turn = at - begins[v]
        w = (turn + self.phase[v]) // self.window
        first, size = self.extent(v, w)
        turn = first + permute(turn - first, size, self._window_key(np.array([epoch]), v, w), inverse=True)
        return epoch * self.size + turn * self.streams + v

    def runs(self, epoch: int, stream: int, window: int) -> list[tuple[int, int, int]]:
        """A window's rows as they lie in files: (shard position, first row, end), each a contiguous range."""
        shards, before, begins, _ = self.epoch(epoch)
        turn, size = (int(x) for x in self.extent(np.array(stream), np.array(window)))
        first = int(begins[stream]) + turn
        end = first + size
        a = int(np.searchsorted(before, before.dtype.type(first), side="right")) - 1
        b = int(np.searchsorted(before, before.dtype.type(end), side="left"))
        found = []
        for s in range(a, b):
            zero, full = int(before[s]), int(before[s + 1])
            if min(end, full) > max(first, zero):
                found.append((int(shards[s]), max(first, zero) - zero, min(end, full) - zero))
        return found
