"""Duplicates over a whole run: a pass over the sidecars, once every shard is there.

A sample is a duplicate where an earlier one (in the table's order) has the same URL and caption, the same
fetched bytes and caption, or (if so configured) a picture that looks alike. One picture under several
captions is no duplicate, unless the configuration says so. Then samples beyond the permitted number of
one caption go. Shards stay pure functions of their tasks: what is found here goes to exclusions.parquet
with the winner's key.

Bounded memory: 24 bytes a sample and rule go to partition files by digest, and one partition is sorted
at a time; only the duplicates themselves are held. Perceptual hashes within a distance d share at least
one of d + 1 bands of their bits (pigeonhole), so only hashes with a common band are compared, all of them:
nothing within the distance is missed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ingest.config import DuplicatesConfig
from shards import storage
from shards.layout import sample_key, shard_name

PARTITION_SAMPLES = 4_000_000

_SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.int64()), ("row", pa.int64()), ("reason", pa.string()), ("winner", pa.string())]
)
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
_ROW_BITS = 20  # samples_per_shard is at most 1,000,000
_HASH_BITS = 64
_COMPARED_AT_ONCE = 1 << 22  # pairs of hashes, a few times 32 MB


def find_duplicates(
    root: str,
    indices: Sequence[int],
    samples_per_shard: int,
    samples: int,
    partition_samples: int = PARTITION_SAMPLES,
    rules: DuplicatesConfig | None = None,
    caption_repeats: int | None = None,
) -> tuple[pa.Table, Counter[str]]:
    """The exclusions of a dataset (columns of _SCHEMA, sorted by place), and its rows by status.

    indices: of the shards, in order. samples: how many successes there are, to size the partitions.
    """
    rules = rules or DuplicatesConfig()
    makers = _makers(rules, caption_repeats)
    partitions = max(1, -(-samples // partition_samples))
    statuses: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="carrara-duplicates-") as folder:
        with contextlib.ExitStack() as stack:
            files = [
                [stack.enter_context(open(Path(folder, f"{reason}-{p}"), "wb")) for p in range(partitions)]
                for reason in makers
            ]
            for index in indices:
                counts, live, places = _successes(root, index, makers)
                statuses.update(counts)
                for make, outs in zip(makers.values(), files, strict=True):
                    records = make(live, places)
                    home = records["high"] % np.uint64(partitions)
                    for p in range(partitions):
                        outs[p].write(records[home == p].tobytes())
        winners: dict[int, tuple[int, str]] = {}
        for reason in makers:
            alike = reason == "duplicate_picture" and rules.distance > 0
            for p in range(partitions):
                records = np.fromfile(Path(folder, f"{reason}-{p}"), _RECORD)
                if reason == "caption_repeated":  # the last rule: what is out already takes nobody's place
                    out = np.fromiter(winners, np.int64, len(winners))
                    records = records[~np.isin(records["place"], out)]
                    pairs = _repeats(records, caption_repeats or 1)
                else:
                    pairs = _near(records, rules.distance) if alike else _repeats(records)
                for place, winner in pairs:
                    # A place that several rules find keeps the earliest winner.
                    if place not in winners or winner < winners[place][0]:
                        winners[place] = (winner, reason)
    return _table(winners, samples_per_shard), statuses


_Columns = dict[str, list[str]]


def _makers(
    rules: DuplicatesConfig, caption_repeats: int | None
) -> dict[str, Callable[[_Columns, np.ndarray], np.ndarray]]:
    """By reason: how the records of a shard's successes are made."""
    makers: dict[str, Callable[[_Columns, np.ndarray], np.ndarray]] = {}
    if rules.url:
        makers["duplicate_url"] = lambda live, places: _records(live["url"], live["caption"], places)
    if rules.bytes:
        makers["duplicate_bytes"] = lambda live, places: _records(live["sha256"], live["caption"], places)
    if rules.perceptual != "off":
        same = rules.perceptual == "same_caption"

        def pictures(live: _Columns, places: np.ndarray) -> np.ndarray:
            captions = live["caption"] if same else [""] * len(places)
            if rules.distance == 0:
                return _records(live["phash"], captions, places)
            return _band_records(live["phash"], captions, places, rules.distance)

        makers["duplicate_picture"] = pictures
    if caption_repeats is not None:
        makers["caption_repeated"] = lambda live, places: _records(live["caption"], [""] * len(places), places)
    return makers


def _successes(
    root: str, index: int, makers: dict[str, Callable[[_Columns, np.ndarray], np.ndarray]]
) -> tuple[Counter[str], _Columns, np.ndarray]:
    """Rows by status, and of the successes the columns that are compared and their places in the run."""
    columns = ["url", "caption", "sha256", *(["phash"] if "duplicate_picture" in makers else [])]
    url = storage.join(root, shard_name(index) + ".parquet")
    table = storage.read_parquet(url, ["status", *columns])
    status = table["status"].to_pylist()
    rows = [i for i, s in enumerate(status) if s == "success"]
    live = table.take(pa.array(rows, pa.int64()))
    places = (np.int64(index) << _ROW_BITS) | np.array(rows, np.int64)
    return Counter(status), {name: live[name].to_pylist() for name in columns}, places


def _records(firsts: list[str], seconds: list[str], places: np.ndarray) -> np.ndarray:
    records = np.zeros(len(places), _RECORD)
    digests = b"".join(
        hashlib.blake2b(f"{a}\0{b}".encode(), digest_size=16).digest() for a, b in zip(firsts, seconds, strict=True)
    )
    halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
    records["high"], records["low"], records["place"] = halves[:, 0], halves[:, 1], places
    return records


def _band_records(hashes: list[str], captions: list[str], places: np.ndarray, distance: int) -> np.ndarray:
    """distance + 1 records a sample: `high` stands for a band's bits and the caption, `low` is the hash."""
    bits = np.array([int(h, 16) for h in hashes], np.uint64)
    texts = np.array(
        [int.from_bytes(hashlib.blake2b(c.encode(), digest_size=8).digest(), "little") for c in captions], np.uint64
    )
    parts = []
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        value = (bits >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        part = np.zeros(len(places), _RECORD)
        with np.errstate(over="ignore"):
            part["high"] = _mix(_mix(value + np.uint64(band << 60)) ^ texts)
        part["low"], part["place"] = bits, places
        parts.append(part)
    return np.concatenate(parts)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): uint64 -> uint64, a bijection that spreads each bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _repeats(records: np.ndarray, keep: int = 1) -> Iterator[tuple[int, int]]:
    """(place, place of the first with the same digest) of every record but the first `keep` of a digest."""
    records = records[np.lexsort((records["place"], records["low"], records["high"]))]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    first = np.repeat(starts, np.diff(np.append(starts, len(records))))
    for i in np.flatnonzero(np.arange(len(records)) - first >= keep):
        yield int(records["place"][i]), int(records["place"][first[i]])


def _near(records: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """(place, place of the earliest within `distance` bits that shares `high`) of every record that has one."""
    records = records[np.lexsort((records["place"], records["low"], records["high"]))]
    yield from _repeats(records)
    # What holds for a hash holds for its repeats, so only the first of each goes on.
    new = np.ones(len(records), bool)
    new[1:] = (records["high"][1:] != records["high"][:-1]) | (records["low"][1:] != records["low"][:-1])
    records = records[new]
    groups = np.flatnonzero(np.concatenate([[True], records["high"][1:] != records["high"][:-1]]))
    for start, stop in zip(groups, np.append(groups[1:], len(records)), strict=True):
        if stop - start < 2:
            continue
        group = np.sort(records[start:stop], order="place")
        hashes, places = group["low"], group["place"]
        step = max(1, _COMPARED_AT_ONCE // len(group))
        for begin in range(0, len(group), step):
            some = slice(begin, begin + step)
            # Row by row of the block, the earliest of those before it that is near.
            near = np.bitwise_count(hashes[some, None] ^ hashes[None, :]) <= distance
            near &= places[None, :] < places[some, None]
            for i in np.flatnonzero(near.any(axis=1)):
                yield int(places[begin + i]), int(places[near[i].argmax()])


def _table(winners: dict[int, tuple[int, str]], samples_per_shard: int) -> pa.Table:
    rows = []
    for place in sorted(winners):
        winner, reason = winners[place]
        while winner in winners:  # the winner by one rule may be a duplicate by the other; places only go down
            winner = winners[winner][0]
        (shard, row), (shard_won, row_won) = (divmod(p, 1 << _ROW_BITS) for p in (place, winner))
        rows.append(
            {
                "key": sample_key(shard, row, samples_per_shard),
                "shard": shard,
                "row": row,
                "reason": reason,
                "winner": sample_key(shard_won, row_won, samples_per_shard),
            }
        )
    return pa.Table.from_pylist(rows, _SCHEMA)
