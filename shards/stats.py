"""The stats of a shard, `00017_stats.json`: its commit, and what is counted of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shards import storage
from shards.fingerprint import digest_json
from shards.layout import shard_name
from shards.listing import STATS

_BLOCK = 2000  # stats files read at a time


def born_of(files: Mapping[str, Any]) -> str:
    """32 hex digits over sizes and sha256 of a shard's files, as its stats have them when it is committed."""
    return digest_json(dict(files))[:32]


def born(stats: Mapping[str, Any]) -> str:
    """Which commit a shard is of: it stays what it was when samples are taken out of the shard."""
    return str(stats["born"]) if "born" in stats else born_of(stats["files"])


def parse_stats(data: bytes) -> dict[str, Any] | None:
    """A stats file of ours; None where it is another's, or not whole."""
    try:
        stats = json.loads(data)
    except ValueError:
        return None
    if not isinstance(stats, dict) or not isinstance(stats.get("files"), dict):
        return None
    return stats if "made_with" in stats or "fingerprint" in stats else None


def json_bytes(value: Any) -> bytes:
    """A JSON file: indented, sorted keys, a line break at the end."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def read_stats(root: str, index: int) -> dict[str, Any] | None:
    """The stats of a committed shard; None where there are none or they cannot be read."""
    try:
        return parse_stats(storage.read_bytes(storage.join(root, shard_name(index) + STATS)))
    except FileNotFoundError:
        return None


def read_stats_of(root: str, indices: Iterable[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(index, stats) of committed shards, in this order, as `read_stats` gives them; many are read at once, and no more
    than that are held."""
    indices = iter(indices)
    while block := list(itertools.islice(indices, _BLOCK)):
        urls = [storage.join(root, shard_name(i) + STATS) for i in block]
        for index, data in zip(block, storage.read_many(urls), strict=True):
            yield index, None if data is None else parse_stats(data)
