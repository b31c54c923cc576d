"""What lies in a dataset's folder, from one listing of it: how a resume judges 200,000 shards in seconds.

A listing tells size and stamp of every file, but not which fingerprint a shard was committed with: that stands in its
stats file, and to open 200,000 of those takes minutes over a network. So what a stats file said is remembered, under
the size and stamp it had then, and it is read again only where these have changed. Nothing is believed for having been
remembered: a shard counts as done only where its files lie there now, each with the size that was committed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shards import storage
from shards.columns import pack_columns, unpack_columns
from shards.dataset import DONE, MISSING, ShardState, committed, shard_state
from shards.layout import SHARD_DIGITS, shard_name
from shards.stage import Task

BLOCK = 2000  # tasks at a time
LARGE = 1000  # from so many shards on it pays to remember
STATS = "_stats.json"
# Of shards' names: an object store gives the listings of so many prefixes side by side.
PREFIXES = [f"{i:02d}" for i in range(100)]
_ABSENT = -1  # a size: there is no such file


class Inventory:
    """The shards of the dataset in `root`. memory: the URL of the file that keeps what their stats files said."""

    def __init__(self, root: str, memory: str) -> None:
        self.root, self.memory = root, memory
        self._listed: dict[str, np.ndarray] = {}  # sizes, int64, by suffix and then by shard number
        self._stamps = np.zeros(0, np.int64)  # of the stats files
        self._known: dict[str, np.ndarray] = {}  # what the memory holds, by shard number
        self._fresh: dict[int, tuple[str, int, int, dict[str, int]]] = {}  # and what it does not hold yet
        self._large = False

    def states(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, ShardState]]:
        """Every task with the state of its shard, as `shard_state` would give it; in the order of the tasks."""
        tasks = iter(tasks)
        block = list(itertools.islice(tasks, BLOCK))
        self._large = len(block) >= LARGE
        self._list()
        valid, digests = self._recall() if self._large else ([], b"")
        there = (self._listed[STATS] != _ABSENT).tolist() if STATS in self._listed else []
        while block:
            open_, found = [], {}
            for task in block:
                i = task.index
                if i >= len(there) or not there[i]:
                    found[i] = MISSING
                elif i < len(valid) and valid[i] and digests[16 * i : 16 * i + 16].hex() == task.fingerprint.digest:
                    found[i] = DONE
                else:
                    open_.append(task)
            urls = [storage.join(self.root, shard_name(t.index) + STATS) for t in open_]
            for task, data in zip(open_, storage.read_many(urls), strict=True):
                found[task.index] = self._judge(task, data)
            yield from ((task, found[task.index]) for task in block)
            block = list(itertools.islice(tasks, BLOCK))
        if len(self._fresh) >= LARGE:
            self.save()

    def _judge(self, task: Task, data: bytes | None) -> ShardState:
        commit = committed(data) if data is not None else None
        if data is not None and commit is not None and commit[0] == task.fingerprint.digest:
            i, sizes = task.index, commit[1]
            if all(s in self._listed and self._listed[s][i] == size for s, size in sizes.items()):
                if self._listed[STATS][i] == len(data):
                    self._fresh[i] = (commit[0], len(data), int(self._stamps[i]), sizes)
                return DONE
        return shard_state(self.root, task)  # which says what is wrong

    def _list(self) -> None:
        """Sizes and stamps of all shards' files, as they are now."""
        found: dict[str, tuple[list[int], list[int]]] = {}
        stamps: list[int] = []
        for name, size, stamp in storage.list_files(self.root, PREFIXES if self._large else [""]):
            head, dot, tail = name.partition(".")
            is_stats = tail == "json" and head.endswith("_stats")
            if is_stats:
                head = head[:-6]
            if (
                not head.isdecimal()
                or not SHARD_DIGITS <= len(head) <= 12
                or (head[0] == "0" and len(head) > SHARD_DIGITS)
            ):
                continue
            numbers, sizes = found.setdefault(STATS if is_stats else dot + tail, ([], []))
            numbers.append(int(head))
            sizes.append(size)
            if is_stats:
                stamps.append(stamp)
        # A stray file with a number of its own must not make the tables long.
        limit = 10 * sum(len(numbers) for numbers, _ in found.values()) + 1_000_000
        length = 1 + max((n for numbers, _ in found.values() for n in numbers if n < limit), default=-1)
        self._stamps = np.zeros(length, np.int64)
        for suffix, (numbers, sizes) in found.items():
            self._listed[suffix] = _by_number(numbers, sizes, length)
        if STATS in found:
            self._stamps = _by_number(found[STATS][0], stamps, length)

    def _recall(self) -> tuple[list[bool], bytes]:
        """By shard number: whether what is remembered holds still, and the digests (16 bytes each) that it tells."""
        try:
            arrays, metadata = unpack_columns(storage.read_bytes(self.memory))
            whole = {"digest", "stamp", STATS} <= arrays.keys() and len({len(a) for a in arrays.values()}) == 1
            if metadata.get("root") == self.root and whole:
                self._known = arrays
        except (FileNotFoundError, ValueError, KeyError):
            pass
        length = min(len(self._stamps), len(self._known.get("stamp", ())))
        if not length:
            return [], b""
        valid = self._known["stamp"][:length] == self._stamps[:length]
        for suffix in self._suffixes():
            known = self._known[suffix][:length]
            listed = self._listed.get(suffix)
            same = known == (listed[:length] if listed is not None else _ABSENT)
            valid &= same if suffix == STATS else same | (known == _ABSENT)
        valid &= self._known[STATS][:length] != _ABSENT
        return valid.tolist(), self._known["digest"][:length].tobytes()

    def _suffixes(self) -> list[str]:
        return [name for name in self._known if name not in ("digest", "stamp")]

    def remember(self, index: int, stats: dict[str, Any]) -> None:
        """Take note of a shard that was committed just now; written down once there are some."""
        if not self._large:
            return
        found = storage.stamp(storage.join(self.root, shard_name(index) + STATS))
        if found is not None:
            sizes = {suffix: int(file["size"]) for suffix, file in stats["files"].items()}
            self._fresh[index] = (stats["fingerprint"]["digest"], *found, sizes)
        if len(self._fresh) >= LARGE:
            self.save()

    def save(self) -> None:
        """Write down what is known; nothing where there is nothing new."""
        if not self._fresh:
            return
        length = max(len(self._known.get("stamp", ())), 1 + max(self._fresh))
        suffixes = {STATS, *self._suffixes(), *(s for *_, sizes in self._fresh.values() for s in sizes)}
        arrays = {s: np.full(length, _ABSENT, np.int64) for s in suffixes}
        arrays |= {"stamp": np.zeros(length, np.int64), "digest": np.zeros((length, 16), np.uint8)}
        for name, array in self._known.items():
            arrays[name][: len(array)] = array
        for index, (digest, size, stamp, sizes) in self._fresh.items():
            arrays["digest"][index] = np.frombuffer(bytes.fromhex(digest), np.uint8)
            arrays["stamp"][index] = stamp
            for suffix in suffixes:
                arrays[suffix][index] = size if suffix == STATS else sizes.get(suffix, _ABSENT)
        storage.write_atomic(self.memory, pack_columns(arrays, {"root": self.root}))
        self._known, self._fresh = arrays, {}


def _by_number(numbers: list[int], values: list[int], length: int) -> np.ndarray:
    """int64 [length]: the values at their numbers, those that lie beyond left out, `_ABSENT` where there is none."""
    places = np.array(numbers, np.int64)
    table, near = np.full(length, _ABSENT, np.int64), places < length
    table[places[near]] = np.array(values, np.int64)[near]
    return table


def read_stats_of(root: str, indices: Iterable[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(index, stats) of committed shards, in this order, as `read_stats` gives them; many are read at once."""
    indices = iter(indices)
    while block := list(itertools.islice(indices, BLOCK)):
        urls = [storage.join(root, shard_name(i) + STATS) for i in block]
        for index, data in zip(block, storage.read_many(urls), strict=True):
            stats = None
            if data is not None and committed(data) is not None:
                stats = json.loads(data)
            yield index, stats
