"""Folders of format 1, whose every shard names what it was made with, become folders of this format.

Nothing is changed but names: what all stats agree on goes to `made_with.json`, and a large file without stats, to
which nobody can say what belongs, is moved to `.uncommitted/`. So no process of an older version may still write.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from shards import storage
from shards.fingerprint import Fingerprint
from shards.layout import MANIFEST, shard_name
from shards.listing import STATS, listed, number_of
from shards.made_with import MADE_WITH, read_made_with, write_made_with
from shards.settings import ConfigError
from shards.stats import read_stats_of

log = logging.getLogger("carrara.shards")

OLD_MANIFEST = "dataset-1.json"
# What a folder of format 1 may hold.
OLD_NAMES = [
    re.compile(p)
    for p in (
        r"\d{5,}(_stats\.json|\.\w+)",
        r"dataset(-1)?\.json",
        r"exclusions(-\w+)?\.parquet",
        r"statistics\.jsonl",
        r"plan",
        r"features",
        r"metrics\.json",
    )
]


def is_old(root: str) -> bool:
    """Whether a folder without `made_with.json` holds shards of format 1: the first stats file says it."""
    names = storage.list_names(root)
    name = next((n for n in names if (w := number_of(n)) is not None and w[1] == STATS), None)
    if name is None or MADE_WITH in names:
        return False
    try:
        stats = storage.read_json(storage.join(root, name))
    except ValueError:
        return False
    return (
        isinstance(stats, dict) and isinstance(stats.get("fingerprint"), dict) and isinstance(stats.get("files"), dict)
    )


def old_version(root: str, wanted: tuple[int, ...]) -> int | None:
    """The version of the stage that made the first shard of a folder of format 1, where it is one of these."""
    committed = listed(root).committed
    stats = storage.read_json(storage.join(root, shard_name(int(committed[0])) + STATS)) if len(committed) else None
    version = (stats or {}).get("fingerprint", {}).get("version")
    return version if version in wanted else None


def old_digests(root: str) -> dict[int, str]:
    """By shard number, what a manifest of format 1 called its digest: what later stages then took for their input.

    Of the manifest of before the folder was taken over, where it was. Empty where there is none.
    """
    for name in (OLD_MANIFEST, MANIFEST):
        try:
            manifest = storage.read_json(storage.join(root, name))
        except ValueError:
            manifest = None
        if isinstance(manifest, dict) and manifest.get("format_version") == 1:
            return {s["index"]: s["digest"] for s in manifest["shards"]}
    return {}


def take_over(root: str, made_with: Fingerprint, data: str, redo: bool = False) -> None:
    """Take over a folder of format 1; under the lease. Raises ConfigError, and changes nothing, where it cannot be."""
    # A pending.json alone was left behind by every take-down that found nothing.
    waiting = [n for n in storage.list_names(storage.join(root, ".staged")) if n.endswith(STATS)]
    if waiting:
        raise ConfigError(
            f"{root}/.staged: an older version was rewriting shards here ({waiting[0]}); finish it with that version, "
            "or delete .staged (what it was to replace still stands)"
        )
    there = listed(root, data)
    first: dict[str, Any] = {}
    for index, stats in read_stats_of(root, (int(i) for i in there.committed)):
        if stats is None or "fingerprint" not in stats:
            raise ConfigError(
                f"{root}: {shard_name(index)}{STATS} is not a stats file of Carrara, so nothing is changed here; move "
                "the shard's files away, or put the file back"
            )
        parts = {k: v for k, v in stats["fingerprint"].items() if k in ("stage", "version", "settings", "weights")}
        if first and parts != first["parts"]:
            a, b = shard_name(first["index"]), shard_name(index)
            changes = Fingerprint(**first["parts"]).differs({**parts, "input": None})
            raise ConfigError(
                f"{root}: shards {a} and {b} were made with different settings ({'; '.join(changes)}); two kinds "
                "cannot lie in one folder: make them anew with --redo, or set 'run' to another folder"
            )
        first = first or {"index": index, "parts": parts}
    if first and not redo:
        stored = {**first["parts"], "input": made_with.input}
        changes = made_with.differs(stored)
        if changes:
            raise ConfigError(
                f"{root}: was made with other settings ({'; '.join(changes)}); put the settings back, give --redo to "
                "set this folder aside and make it anew, or set 'run' to another folder"
            )
    manifest = storage.join(root, MANIFEST)
    if storage.exists(manifest):
        storage.create(storage.join(root, OLD_MANIFEST), storage.read_bytes(manifest))
    for index in there.begun:
        _move_aside(root, shard_name(int(index)))
    parts = first["parts"] if first else {k: getattr(made_with, k) for k in ("stage", "version", "settings", "weights")}
    write_made_with(root, Fingerprint(**parts, input=made_with.input), data, taken_over_from=1)
    log.info("%s: %d shards of an older version are taken over", root, len(there.committed))


def take_over_as_it_is(root: str, data: str) -> None:
    """Take over a folder of format 1 with the settings it was made with, whatever those of today: for a take-down."""
    if read_made_with(root) is None and is_old(root):
        take_over(root, Fingerprint("", 0, {}), data, redo=True)


def _move_aside(root: str, name: str) -> None:
    for other in storage.list_names(root):
        if other.startswith(name + "."):
            source, target = storage.join(root, other), storage.join(root, ".uncommitted", other)
            if storage.is_local(root):
                storage.make_folder(storage.join(root, ".uncommitted"))
                os.replace(storage.local_path(source), storage.local_path(target))
            else:
                storage.write_atomic(target, storage.read_bytes(source))
                storage.remove(source)
