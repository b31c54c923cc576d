"""How a shard is committed, taken over and blanked, step by step: generators of storage operations.

The same text is run on real stores (shards/commit.py) and by a model checker that goes through every interleaving of
several processes with a death at every step (tests/shards/test_protocol.py). A generator yields one operation at a
time and is sent its result:

    ("read", name)            the data, None where there is no such file
    ("digest", name)          sha256 of the data, None where there is no such file
    ("create", name, data)    writes a file if there is none; whether this call wrote it
    ("replace", name, data)   writes a file in the place of the one that was read last under this name
    ("remove", name)          also where there is none
    ("list", prefix)          the names that begin so

A shard is a large file (`00017.tar`), which is created once and decides, small ones (`00017.parquet`), and the stats,
which are the commit. What belongs to a large file lies beside it, under its digest, before it is created. So any
number of writers may be at one shard: whoever comes second takes over what the first began; steps after the creation
of the large file write only what lies beside, so that all write the same bytes, and by `create`, so that a late
writer changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

Steps = Generator[tuple[Any, ...], Any, Any]


class TryAgain(Exception):
    """Somebody else is at this shard, or the store says so: the same work may be tried again."""


@dataclasses.dataclass(frozen=True)
class Names:
    """The files of one shard. large: the one that decides. stats: the commit. beside: begins the names of what lies
    ready, a file for each large one that somebody wanted to commit, named by its digest."""

    large: str
    stats: str
    beside: str


@dataclasses.dataclass(frozen=True)
class Codec:
    """unpack: what lies beside, as ([(name, data) of the small files], stats). born: which commit some stats are of."""

    unpack: Callable[[Any], tuple[list[tuple[str, Any]], Any]]
    born: Callable[[Any], Any]


def commit(names: Names, data: Any, digest: str, beside: Any, codec: Codec) -> Steps:
    """Commit a shard; returns the stats that lie there in the end, which may be another writer's.

    data: the large file, digest: its own. beside: small files and stats, packed.
    """
    ready = names.beside + digest
    # Two writers may have the same large file and other failures: the first of them says what belongs to it.
    if not (yield ("create", ready, beside)):
        beside = yield ("read", ready)
    if beside is not None and (yield ("create", names.large, data)):
        return (yield from _end(names, ready, beside, codec))
    found = yield from adopt(names, codec)
    if found is None:
        raise TryAgain(f"{names.large}: said to be there and not found")
    yield ("remove", ready)  # the shard is committed: nobody will ask for it
    return found


def adopt(names: Names, codec: Codec) -> Steps:
    """End a shard that was begun; returns its stats, None where it was not begun. To be done before it is made."""
    for _ in range(2):  # what is missing at the first look was removed since, by whoever ended it
        stats = yield ("read", names.stats)
        if stats is not None:
            return stats
        digest = yield ("digest", names.large)
        if digest is None:
            return None
        ready = names.beside + digest
        beside = yield ("read", ready)
        if beside is not None:
            return (yield from _end(names, ready, beside, codec))
    raise TryAgain(f"{names.large}: a file without those that belong to it")


def _end(names: Names, ready: str, beside: Any, codec: Codec) -> Steps:
    """Bring the small files to their names, the stats last. Everyone who does it writes the same bytes."""
    small, stats = codec.unpack(beside)
    for name, data in small:
        yield ("create", name, data)
    if not (yield ("create", names.stats, stats)):
        there = yield ("read", names.stats)
        if there is None or codec.born(there) != codec.born(stats):
            raise TryAgain(f"{names.stats}: is not of the {names.large} that was created now; somebody deleted or wrote one of them")
        stats = there
    yield ("remove", ready)
    return stats


def sweep(names: Names) -> Steps:
    """Remove what dead writers left beside a committed shard; whether it is one. Looks at no time."""
    if (yield ("read", names.stats)) is None:
        return False
    for name in (yield ("list", names.beside)):
        yield ("remove", name)
    return True


def blank(names: Names, sidecar: str, edit: Callable[[Any, Any, Any], tuple[Any, Any, Any, str]]) -> Steps:
    """Take samples out of a committed shard where they lie; returns the stats, None where it is not committed.

    edit(large, sidecar, stats) gives all three as they are to be, and the digest of the first: sizes and offsets of the large file stay, so that
    any mixture of old and new files fits. The sidecar comes last, since it says what is still to be done.
    """
    stats = yield ("read", names.stats)
    if stats is None:
        return None
    table = yield ("read", sidecar)
    data = yield ("read", names.large)
    if data is None or table is None:
        raise TryAgain(f"{names.large}: it or its sidecar is missing; look with verify")
    new_data, new_table, new_stats, digest = edit(data, table, stats)
    if new_data is not data:
        yield ("replace", names.large, new_data)
        if (yield ("digest", names.large)) != digest:
            raise TryAgain(f"{names.large}: changed by somebody else while samples were taken out")
    if new_stats != stats:
        yield ("replace", names.stats, new_stats)
    if new_table != table:
        yield ("replace", sidecar, new_table)
    return new_stats
