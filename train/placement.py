"""Which samples a global batch has: buckets, weighted sources and recorded segments over orders of streams; invertible.

A position counts the images of a run: those before a step, and a place in its global batch. A batch is of one bucket; a
ring deals the steps to the buckets. The p-th sample of a bucket, counted through the run, is turn `p // V` of stream
`p % V`, and a ring deals the stream's turns to the sources; a ring is a short fixed cycle whose entries are in
proportion to the weights and evenly spread, and stream v enters it at place v, so that a batch has the weights too. A
segment says from which position on which sources, weights and batch sizes hold; what a source has given before, it goes
on from. Nothing here depends on the number of ranks. `locate` and its inverse `position` need no search and no memory
of what came before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.order import Order

FEWEST_ROWS = 8  # of a window, however rare its bucket


class Ring:
    """Deals turns to kinds in proportion to weights, by a fixed cycle of the shortest length that meets them."""

    def __init__(self, weights: Sequence[float] | np.ndarray) -> None:
        share = np.asarray(weights, np.float64) / np.sum(weights)
        if len(share) == 0 or not (share > 0).all():
            raise ValueError("every kind of a ring needs a weight above 0")
        for length in (*range(1, 513), *(1 << d for d in range(10, 17))):
            counts = np.floor(share * length + 1e-9).astype(np.int64)
            counts[np.argsort(counts - share * length, kind="stable")[: length - counts.sum()]] += 1
            if (np.abs(counts / length - share) <= 1e-3 * share).all():
                break
        counts = np.maximum(counts, 1)  # even the rarest comes at times
        self.counts, self.length = counts, int(counts.sum())
        # Evenly spread, so that any run of turns has the weights within a turn or so.
        spread = np.argsort(np.concatenate([(np.arange(c) + 0.5) / c for c in counts]), kind="stable")
        self.kind = np.repeat(np.arange(len(counts)), counts)[spread]
        came = self.kind[None] == np.arange(len(counts))[:, None]
        self.before = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(came, axis=1)], axis=1)
        self.turns = [np.flatnonzero(c) for c in came]

    def at(self, turn: np.ndarray | int) -> np.ndarray:
        """Whose turns these are."""
        kinds: np.ndarray = self.kind[np.asarray(turn) % self.length]
        return kinds

    def had(self, kind: int, turn: np.ndarray | int) -> np.ndarray:
        """How many of the turns before `turn` were of a kind."""
        lap, offset = np.divmod(np.asarray(turn), self.length)
        result: np.ndarray = lap * self.counts[kind] + self.before[kind, offset]
        return result

    def when(self, kind: int, nth: int) -> int:
        """The turn at which a kind comes for the nth time (from 0)."""
        lap, i = divmod(int(nth), int(self.counts[kind]))
        return lap * self.length + int(self.turns[kind][i])


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A range of shards of a data set. key: of its order, for life. counts: int [shards, buckets]."""

    key: str
    counts: np.ndarray
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """What holds from position `images` on. batch_size: positions of a step; sizes: samples of a batch of each bucket,
    at most batch_size. Buckets of size 0 are not trained on."""

    images: int
    batch_size: int
    sizes: tuple[int, ...]
    sources: tuple[Source, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Samples of one source and bucket in a batch. source: its number in Placement.sources; here: int64, which of the
    batch's samples they are; indices: int64, in the source's order of that bucket."""

    source: int
    bucket: int
    here: np.ndarray
    indices: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """A segment worked out. begin: of each bucket, how many samples came before; given: by (key, bucket), how many each
    stream gave before, int64 [V]."""

    segment: Segment
    used: list[int]  # buckets that are trained on
    steps: Ring
    rings: dict[int, Ring]
    sources: dict[int, list[Source]]
    begin: dict[int, int]
    given: dict[tuple[str, int], np.ndarray]


class Placement:
    """Positions <-> samples. Raises ValueError where a segment has no samples, or begins between two steps."""

    def __init__(self, segments: Sequence[Segment], seed: int, streams: int, window: int) -> None:
        self.segments, self.streams, self.window = list(segments), streams, window
        self.sources: list[Source] = []
        self.orders: dict[tuple[str, int], Order] = {}
        self._number: dict[str, int] = {}
        self._plans: list[_Plan] = []
        begin = dict.fromkeys(range(max(len(s.sizes) for s in segments)), 0)
        given: dict[tuple[str, int], np.ndarray] = {}
        for n, segment in enumerate(segments):
            for x in segment.sources:
                if x.key not in self._number:
                    self._number[x.key] = len(self.sources)
                    self.sources.append(x)
            plan = _work_out(segment, begin, given, streams)
            for b in plan.used:
                for x in plan.sources[b]:
                    if (x.key, b) not in self.orders:
                        # Where a stream lies open in every bucket, they share what it holds.
                        rows = max(min(window, FEWEST_ROWS), round(window * x.counts[:, b].sum() / x.counts.sum()))
                        self.orders[x.key, b] = Order(x.counts[:, b], f"{x.key}:{seed}", streams, int(rows))
            self._plans.append(plan)
            if n + 1 < len(segments):
                steps, rest = divmod(segments[n + 1].images - segment.images, segment.batch_size)
                if rest or steps < 0:
                    raise ValueError("a segment begins where a step ends")
                begin, given = _after(plan, steps, streams)

    def _at(self, position: int) -> _Plan:
        if position < self.first:
            raise ValueError(f"position {position} lies before the order that begins at {self.first}")
        return next(h for h in reversed(self._plans) if h.segment.images <= position)

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 [B] -> (position at which their batch begins, slot within the batch), int64 [B] each."""
        positions = np.asarray(positions, np.int64)
        begin, slot = np.empty_like(positions), np.empty_like(positions)
        for n, plan in enumerate(self._plans):
            first = plan.segment.images
            mine = positions >= first if n else slice(None)  # later segments overwrite what lies in them
            slot[mine] = (positions[mine] - first) % plan.segment.batch_size
            begin[mine] = positions[mine] - slot[mine]
        return begin, slot

    def bucket(self, position: int) -> int:
        """The bucket of the batch that a position belongs to."""
        plan = self._at(position)
        return plan.used[int(plan.steps.at((position - plan.segment.images) // plan.segment.batch_size))]

    def samples(self, position: int) -> int:
        """How many samples the batch that a position belongs to has."""
        return self._at(position).segment.sizes[self.bucket(position)]

    def batch_size(self, position: int) -> int:
        """How many positions the step that a position belongs to counts."""
        return self._at(position).segment.batch_size

    @property
    def first(self) -> int:
        """The first position that there is."""
        return self.segments[0].images

    @property
    def size(self) -> int:
        """How many samples the last segment's sources hold, of the buckets that are trained on."""
        last = self.segments[-1]
        used = np.flatnonzero(last.sizes)
        return sum(int(x.counts[:, used].sum()) for x in last.sources)

    def locate(self, positions: np.ndarray) -> list[Part]:
        """Where the samples at these positions (int64 [B]) come from: each of them in one part."""
        parts: list[Part] = []
        begins, slots = self.split(positions)
        for begin in np.unique(begins):
            batch = np.flatnonzero(begins == begin)
            plan = self._at(int(begin))
            n = (int(begin) - plan.segment.images) // plan.segment.batch_size
            i = int(plan.steps.at(n))
            b = plan.used[i]
            p = plan.begin[b] + int(plan.steps.had(i, n)) * plan.segment.sizes[b] + slots[batch]
            turn, v = np.divmod(p, self.streams)
            ring, first = plan.rings[b], -(-(plan.begin[b] - v) // self.streams)
            kind = ring.at(turn + v)
            for k in np.unique(kind):
                mine = kind == k
                x = plan.sources[b][int(k)]
                had = ring.had(int(k), (turn + v)[mine]) - ring.had(int(k), (first + v)[mine])
                nth = plan.given[x.key, b][v[mine]] + had
                parts.append(Part(self._number[x.key], b, batch[mine], nth * self.streams + v[mine]))
        return parts

    def order(self, part: Part) -> Order:
        """The order that a part's indices are of."""
        return self.orders[self.sources[part.source].key, part.bucket]

    def position(self, key: str, bucket: int, shard: int, row: int, epoch: int) -> int | None:
        """The position at which a sample comes in an epoch of its source; None where no segment lets it come.

        shard: its position in the source's counts; row: within the shard's bucket.
        """
        if (key, bucket) not in self.orders:
            return None
        index = int(self.orders[key, bucket].index(epoch, np.array([shard]), np.array([row]))[0])
        nth, v = divmod(index, self.streams)
        for plan, after in zip(self._plans, [*self._plans[1:], None], strict=True):
            keys = [x.key for x in plan.sources.get(bucket, [])]
            if key not in keys or (after and nth >= after.given[key, bucket][v]):
                continue
            ring, k = plan.rings[bucket], keys.index(key)
            first = -(-(plan.begin[bucket] - v) // self.streams)
            turn = ring.when(k, nth - int(plan.given[key, bucket][v]) + int(ring.had(k, first + v))) - v
            n, slot = divmod(turn * self.streams + v - plan.begin[bucket], plan.segment.sizes[bucket])
            step = plan.steps.when(plan.used.index(bucket), n)
            return plan.segment.images + step * plan.segment.batch_size + slot
        return None

    def first_seen(self, key: str, bucket: int, shard: int, row: int) -> int | None:
        """The position at which a sample comes for the first time."""
        # A sample's second epoch may overtake its first by a few turns, where epochs are that short.
        found = [p for e in (0, 1) if (p := self.position(key, bucket, shard, row, e)) is not None]
        return min(found, default=None)


def _work_out(segment: Segment, begin: dict[int, int], given: dict[tuple[str, int], np.ndarray], streams: int) -> _Plan:
    given = dict(given)
    # A source's weight is shared out to the buckets as its samples are.
    shares = {}
    for b, size in enumerate(segment.sizes):
        if size and any(x.counts[:, b].any() for x in segment.sources):
            shares[b] = np.array([x.weight * x.counts[:, b].sum() / x.counts.sum() for x in segment.sources])
    if not shares:
        raise ValueError("a segment without samples has no order")
    used = list(shares)
    steps = Ring([shares[b].sum() / segment.sizes[b] for b in used])
    rings, sources = {}, {}
    for b in used:
        sources[b] = [x for x, share in zip(segment.sources, shares[b], strict=True) if share > 0]
        rings[b] = Ring([share for share in shares[b] if share > 0])
        for x in sources[b]:
            given.setdefault((x.key, b), np.zeros(streams, np.int64))
    return _Plan(segment, used, steps, rings, sources, dict(begin), given)


def _after(plan: _Plan, steps: int, streams: int) -> tuple[dict[int, int], dict[tuple[str, int], np.ndarray]]:
    """What had come, and who had given what, once a segment's steps are done."""
    begin, given, v = dict(plan.begin), dict(plan.given), np.arange(streams)
    for i, b in enumerate(plan.used):
        end = begin[b] + int(plan.steps.had(i, steps)) * plan.segment.sizes[b]
        first, last = (-(-(p - v) // streams) + v for p in (begin[b], end))  # each stream's turns, on the ring
        for k, x in enumerate(plan.sources[b]):
            ring = plan.rings[b]
            given[x.key, b] = given[x.key, b] + ring.had(k, last) - ring.had(k, first)
        begin[b] = end
    return begin, given
