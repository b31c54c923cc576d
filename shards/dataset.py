"""Datasets of shards: what a shard's stats say, the manifest, and opening both.

`dataset.json` is the manifest: it is written by the stage's finish, once every shard is committed, and replaced as a
whole when the dataset grows or changes. It names its shards and the file of what is excluded of them; an old one
stays true while new shards are made, so readers go on. How shards come to be is in shards/commit.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from shards import storage
from shards.commit import commit_shard
from shards.exclusions import Exclusions, OldExclusions
from shards.fingerprint import digest_bytes
from shards.layout import MANIFEST, shard_name
from shards.listing import listed
from shards.made_with import read_made_with
from shards.settings import StageError
from shards.stats import born, json_bytes, read_stats, read_stats_of

__all__ = [
    "MANIFEST",
    "Dataset",
    "ShardInfo",
    "amend_manifest",
    "born",
    "commit_shard",
    "read_stats",
    "read_stats_of",
    "write_manifest",
]

FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard as the manifest has it. rows: input rows; count: samples that can be used; born: 32 hex digits that say
    which commit it is of, whatever is taken out of it later."""

    index: int
    rows: int
    count: int
    born: str

    @property
    def name(self) -> str:
        """`00007`."""
        return shard_name(self.index)


def write_manifest(
    root: str,
    kind: str,
    stats: Iterable[Mapping[str, Any]],
    extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    exclusions: str | Callable[[], str | None] | None = None,
) -> dict[str, Any]:
    """Write `dataset.json` from the stats of all shards, and return it.

    stats: `shard`, `rows`, `count`, `files` and `born` of each; taken as they come, and not kept. extra: what else is
    to stand there; exclusions: what `write_exclusions` returned. Either may be a function, which is called after the
    last of the stats. Raises StageError where a file of a shard is missing, has another size than was committed, or is
    of another folder.
    """
    sizes: dict[str, dict[int, int]] | None = None
    made_with = (read_made_with(root) or {}).get("id")
    shards: list[ShardInfo] = []
    for s in stats:
        if sizes is None:
            sizes = listed(root, sizes=True).sizes
        index = s["shard"]
        if s.get("made_with", made_with) != made_with:
            raise StageError(
                f"{root}: shard {shard_name(index)} was made for another folder, or by a process of before this one "
                "was begun; move its files away, and run the same command again"
            )
        for suffix, file in s["files"].items():
            found = sizes.get(suffix, {}).get(index)
            if found != file["size"]:  # perhaps it was committed since, where shards are made while they are counted
                sizes = listed(root, sizes=True).sizes
                found = sizes.get(suffix, {}).get(index)
            if found != file["size"]:
                lies = "no file" if found is None else f"{found} bytes"
                raise StageError(
                    f"{root}/{shard_name(index)}{suffix} has {lies} where {file['size']} were committed; see "
                    "`carrara verify`"
                )
        shards.append(ShardInfo(index, s["rows"], s["count"], born(s)))
    more = extra() if callable(extra) else extra or {}
    exclusions = exclusions() if callable(exclusions) else exclusions
    out = Exclusions(root, exclusions).counts()
    shards = [dataclasses.replace(s, count=s.count - out.pop(s.index, 0)) for s in shards]
    if out:
        raise StageError(f"{root}: samples are excluded of shard {min(out)}, which is not part of the dataset")
    shards.sort(key=lambda s: s.index)
    manifest = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint_of(shards, exclusions),
        "rows": sum(s.rows for s in shards),
        "count": sum(s.count for s in shards),
        "exclusions": exclusions,
        "shards": [dataclasses.asdict(s) for s in shards],
        **more,
    }
    url = storage.join(root, MANIFEST)
    text = json_bytes(manifest)
    try:
        current = storage.read_bytes(url) == text
    except FileNotFoundError:
        current = False
    if not current:
        storage.replace(url, text)
    return manifest


def amend_manifest(
    root: str, manifest: Mapping[str, Any], shards: list[ShardInfo], exclusions: str | None, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace `dataset.json` after samples were taken out of its shards, and return it.

    shards: the same, with their counts of now. exclusions: what `write_exclusions` returned. extra: what else changes.
    """
    amended = {
        **manifest,
        "fingerprint": fingerprint_of(shards, exclusions),
        "count": sum(s.count for s in shards),
        "exclusions": exclusions,
        "shards": [dataclasses.asdict(s) for s in shards],
        **extra,
    }
    storage.replace(storage.join(root, MANIFEST), json_bytes(amended))
    return amended


def fingerprint_of(shards: Iterable[ShardInfo], exclusions: str | None) -> str:
    """32 hex digits: which samples a dataset consists of."""
    lines = [f"{s.index} {s.count} {s.born}\n" for s in shards]
    return digest_bytes("".join([f"{exclusions}\n", *lines]).encode())[:32]


class Dataset:
    """A finished dataset: its manifest, and its shards by position."""

    def __init__(self, root: str, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest
        self.kind: str = manifest["kind"]
        self.fingerprint: str = manifest["fingerprint"]
        self.format: int = manifest.get("format_version", FORMAT_VERSION)
        old = self.format == 1  # its shards' digests say something else than `born` will, once it is taken over
        mark = "digest" if old else "born"
        self.shards = [ShardInfo(s["index"], s["rows"], s["count"], s[mark]) for s in manifest["shards"]]
        self.counts = np.array([s.count for s in self.shards], np.int64)
        self.exclusions: Exclusions = (
            OldExclusions(root, "exclusions.parquet") if old else Exclusions(root, manifest.get("exclusions"))
        )

    @classmethod
    def open(cls, root: str) -> Dataset:
        """Open the dataset in a folder; raises StageError where there is no manifest, or one of another format."""
        try:
            manifest = storage.read_json(storage.join(root, MANIFEST))
        except ValueError:
            manifest = {}
        if manifest is None:
            raise StageError(f"{root}: there is no finished dataset here (no {MANIFEST}); run the stage that makes it")
        if not isinstance(manifest, dict) or manifest.get("format_version") not in (1, FORMAT_VERSION):
            raise StageError(f"{root}/{MANIFEST}: not a manifest of format {FORMAT_VERSION}; run the stage again")
        return cls(root, manifest)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def sidecar(self, index: int) -> pa.Table:
        """The parquet sidecar of shard number `index`: one row per input row."""
        return storage.read_parquet(storage.join(self.root, shard_name(index) + ".parquet"))

    def excluded_rows(self, index: int) -> np.ndarray:
        """Row numbers (int64, sorted) of the samples of shard number `index` that are not to be used."""
        return self.exclusions.rows(index)
