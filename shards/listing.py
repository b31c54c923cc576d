"""Which shards of a folder are committed and which are begun, by the names in it: one listing, no file is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from shards import storage
from shards.layout import SHARD_DIGITS, shard_name

STATS = "_stats.json"
# Of shards' names: an object store gives the listings of so many prefixes side by side.
PREFIXES = [f"{i:02d}" for i in range(100)]


@dataclasses.dataclass(frozen=True)
class Listing:
    """committed, begun: shard numbers, int64, sorted; begun ones have a large file and no stats. sizes: bytes of every
    file of a shard, by suffix and then by number, where they were asked for."""

    committed: np.ndarray
    begun: np.ndarray
    sizes: dict[str, dict[int, int]]

    def is_committed(self, indices: Iterable[int]) -> np.ndarray:
        """bool, one for each of these numbers."""
        return np.isin(np.fromiter(indices, np.int64), self.committed, assume_unique=False)


def number_of(name: str) -> tuple[int, str] | None:
    """`00017_stats.json` -> (17, "_stats.json"), `00017.tar` -> (17, ".tar"); None for names that no shard has."""
    head, dot, tail = name.partition(".")
    suffix = dot + tail
    if name.endswith(STATS):
        head, suffix = name[: -len(STATS)], STATS
    if not dot or not (head.isascii() and head.isdecimal()) or head != shard_name(int(head)):
        return None
    return int(head), suffix


def listed(root: str, data: str = ".tar", sizes: bool = False) -> Listing:
    """The shards that lie in a folder now. data: the suffix of the large file."""
    found: dict[str, list[int]] = {STATS: [], data: []}
    measured: dict[str, dict[int, int]] = {}
    if sizes or not storage.is_local(root):
        for name, size, _ in storage.list_files(root, PREFIXES):
            what = number_of(name)
            if what is not None:
                found.setdefault(what[1], []).append(what[0])
                if sizes:
                    measured.setdefault(what[1], {})[what[0]] = size
    else:
        end, cut = STATS, -len(STATS)
        for name in storage.names(root):
            # The two that matter, without a call each: there may be 600,000 names.
            head = name[:cut] if name.endswith(end) else name[: -len(data)] if name.endswith(data) else ""
            if len(head) >= SHARD_DIGITS and head.isdecimal() and head.isascii() and head == shard_name(int(head)):
                found[end if name.endswith(end) else data].append(int(head))
    committed = np.unique(np.array(found[STATS], np.int64))
    return Listing(committed, np.setdiff1d(np.array(found[data], np.int64), committed), measured)
