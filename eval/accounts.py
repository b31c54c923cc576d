"""What every stage of the evaluation checks at its end: each picture that went in is in exactly one shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from shards.settings import StageError


def accounted(
    root: str, expected: dict[int, int], stats: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """What the manifest keeps of each shard's stats, and how often each status occurs over all of them.

    expected: shard -> the pictures it must hold. Raises StageError where a shard is missing or counted twice, or
    its pictures do not add up.
    """
    left, kept, status = dict(expected), [], Counter[str]()
    for s in stats:
        if s["rows"] != left.pop(s["shard"], None) or sum(s["status"].values()) != s["rows"]:
            raise StageError(f"{root}: shard {s['shard']} does not have the pictures of its task; run again")
        status.update(s["status"])
        kept.append({k: s[k] for k in ("shard", "rows", "count", "files", "born")})
    if left:
        raise StageError(f"{root}: {len(left)} shards are missing, the first is {min(left)}; run again")
    return kept, status
