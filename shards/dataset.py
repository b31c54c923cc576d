"""Datasets of shards: commit one atomically, judge one on resume, write and open the manifest.

A shard NNNNN is a few data files (`.tar` or `.safetensors`, `.parquet`) and `NNNNN_stats.json`, which is
written last and is the commit: it holds the counts, the size and sha256 of every data file, and the
fingerprint. Whoever finds no valid stats file treats the shard as not there. `dataset.json` is the
manifest: it is written by the stage's finish, once every shard is committed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import storage
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.layout import shard_name
from shards.settings import StageError
from shards.stage import Task

log = logging.getLogger("carrara.shards")

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
EXCLUSIONS = "exclusions.parquet"

EXCLUSIONS_SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.int64()), ("row", pa.int64()), ("reason", pa.string()), ("winner", pa.string())]
)


@dataclasses.dataclass(frozen=True)
class ShardState:
    """What a shard on disk is worth for a task.

    missing: not there. done: committed for exactly this task. input_changed: what it was made from is
    another one now, so it is made again. damaged: its files do not match its stats, so it is made again.
    stale: made with other settings or weights; made again only if the user says so.
    """

    state: Literal["missing", "done", "input_changed", "damaged", "stale"]
    reason: str = ""


def _fault(point: str) -> None:
    """Die here if the environment asks for it: the fault tests kill a process at each step of a commit."""
    if os.environ.get("CARRARA_FAULT") == point:
        os.kill(os.getpid(), 9)


def commit_shard(
    root: str, index: int, files: Mapping[str, bytes], stats: dict[str, Any], fingerprint: Fingerprint
) -> dict[str, Any]:
    """Write one shard atomically and return its committed stats; the first writer wins.

    files: data by suffix, e.g. {".tar": ..., ".parquet": ...}. stats: JSON values; must hold `count`, the
    number of samples in the data files, and `rows`, the number of input rows. Sizes, digests and the
    fingerprint are added here.
    """
    name = shard_name(index)
    record = dict(stats)
    record["shard"] = index
    record["files"] = {s: {"size": len(d), "sha256": digest_bytes(d)} for s, d in sorted(files.items())}
    record["fingerprint"] = fingerprint.to_json()
    if "count" not in record or "rows" not in record:
        raise ValueError("the stats of a shard need 'count' and 'rows'")
    stats_url = storage.join(root, name + "_stats.json")
    existing = read_stats(root, index)
    if existing and existing["fingerprint"].get("digest") == fingerprint.digest and not _damage(root, name, existing):
        return existing  # somebody else was faster (a worker that was thought dead, say)
    # A shard that is to be made again stops counting before its files change under a reader.
    storage.remove(stats_url)
    _fault("before-data")
    for suffix, data in files.items():
        url = storage.join(root, name + suffix)
        # A file without a commit may be a dead writer's, or a living one's with the same bytes.
        if not storage.create(url, data) and not _same(url, data):
            storage.write_atomic(url, data)
        _fault("after" + suffix)
    text = _json_bytes(record)
    _fault("before-stats")
    if storage.create(stats_url, text):
        _fault("after-stats")
        return record
    winner = read_stats(root, index)
    if winner is None or winner["fingerprint"]["digest"] != fingerprint.digest:
        raise StageError(f"{root}: shard {name} was committed by another run with other settings at the same moment")
    return winner


def staging(root: str) -> str:
    """The folder of shards that wait to take the place of committed ones, a dataset of its own."""
    return storage.join(root, ".staged")


def files_digest(stats: dict[str, Any]) -> str:
    """32 hex digits over the bytes of a committed shard's files, as its stats have them."""
    return digest_json(stats["files"])[:32]


def stage_replacement(
    root: str,
    index: int,
    files: Mapping[str, bytes],
    stats: dict[str, Any],
    replaced: dict[str, Any],
    becomes: Fingerprint | dict[str, Any],
    fingerprint: Fingerprint,
) -> dict[str, Any]:
    """Commit a shard beside the one whose place it is to take; `put_in_place` makes the exchange.

    replaced: the committed stats of the shard that goes. becomes: the fingerprint the new one has from
    then on. fingerprint: of the replacement as a piece of work, until then.
    """
    json_of = becomes.to_json() if isinstance(becomes, Fingerprint) else becomes
    record = {**stats, "replaces": files_digest(replaced), "becomes": json_of}
    return commit_shard(staging(root), index, files, record, fingerprint)


def put_in_place(root: str) -> list[int]:
    """Exchange every shard that has a staged replacement; returns their numbers, in order.

    Killed at any point, the next call goes on: the replacement lies complete in the staging folder until
    the exchange is. A replacement of a shard that has been made again since is dropped. The manifest goes
    first, so whoever calls this writes it anew.
    """
    source = staging(root)
    names = [n for n in storage.list_names(source) if re.fullmatch(r"\d{5,}_stats\.json", n)]
    exchanged = []
    for index in sorted(int(n.removesuffix("_stats.json")) for n in names):
        record = read_stats(source, index)
        if record is None or _damage(source, shard_name(index), record, deep=True):
            _drop_staged(source, index)  # what it was to replace still stands
            continue
        current = read_stats(root, index)
        if current is not None and files_digest(current) not in (record["replaces"], files_digest(record)):
            log.warning("%s: shard %s was made again meanwhile; its replacement is dropped", root, shard_name(index))
            _drop_staged(source, index)
            continue
        storage.remove(storage.join(root, MANIFEST))
        _exchange(root, index, record)
        _drop_staged(source, index)
        exchanged.append(index)
    return exchanged


def _exchange(root: str, index: int, record: dict[str, Any]) -> None:
    name = shard_name(index)
    stats_url = storage.join(root, name + "_stats.json")
    storage.remove(stats_url)
    _fault("exchange-begun")
    for suffix in record["files"]:
        storage.write_atomic(
            storage.join(root, name + suffix), storage.read_bytes(storage.join(staging(root), name + suffix))
        )
        _fault("exchanged" + suffix)
    final = {k: v for k, v in record.items() if k not in ("replaces", "becomes")}
    final["fingerprint"] = record["becomes"]
    storage.write_atomic(stats_url, _json_bytes(final))
    _fault("exchanged")


def _drop_staged(source: str, index: int) -> None:
    """The stats last: as long as they are there, the exchange is known to be unfinished."""
    name = shard_name(index)
    for other in storage.list_names(source):
        if other.startswith(name + "."):
            storage.remove(storage.join(source, other))
    storage.remove(storage.join(source, name + "_stats.json"))


def read_stats(root: str, index: int) -> dict[str, Any] | None:
    """The stats of a committed shard; None where there are none or they cannot be read."""
    try:
        stats = storage.read_json(storage.join(root, shard_name(index) + "_stats.json"))
    except ValueError:
        return None
    if not isinstance(stats, dict) or "files" not in stats or "fingerprint" not in stats:
        return None
    return stats


def shard_state(root: str, task: Task) -> ShardState:
    """Judge the shard of a task: its stats, its fingerprint, and the sizes of its files."""
    name = shard_name(task.index)
    if not storage.exists(storage.join(root, name + "_stats.json")):
        return MISSING
    stats = read_stats(root, task.index)
    if stats is None:
        return ShardState("damaged", f"{root}/{name}_stats.json is not a complete stats file")
    damage = _damage(root, name, stats)
    if damage:
        return ShardState("damaged", damage)
    if stats["fingerprint"].get("digest") == task.fingerprint.digest:
        return DONE
    changes = task.fingerprint.differs(stats["fingerprint"])
    reason = f"{root}: shard {name} was made with other settings ({'; '.join(changes)})"
    if changes and all(c.split(":")[0].split(".")[0] == "input" for c in changes):
        return ShardState("input_changed", reason)
    return ShardState("stale", reason)


# The part of a stats file that says what was committed, as `_json_bytes` writes it; a string holds no line break.
_FILE = re.compile(rb'  "(\.\w+)": \{\n   "sha256": "[0-9a-f]{64}",\n   "size": (\d+)\n  \},?\n')
_FILES = re.compile(rb'\n "files": \{\n((?:' + re.sub(rb"[()]", b"", _FILE.pattern) + rb")+) \},\n")
_DIGEST = re.compile(rb'\n "fingerprint": \{\n  "digest": "([0-9a-f]{32})"')
DONE, MISSING = ShardState("done"), ShardState("missing")


def committed(data: bytes) -> tuple[str, dict[str, int]] | None:
    """What a stats file says was committed: the fingerprint's digest, and the files' sizes by suffix; None where the
    file is not complete.

    A resume asks this of every shard, and to parse 200,000 of these files takes as long as all else together: those
    written here are told by the few lines that matter.
    """
    files = _FILES.match(data, max(0, data.find(b'\n "files": {')))
    digest = _DIGEST.match(data, max(0, data.find(b'\n "fingerprint": {')))
    if files is not None and digest is not None and data.endswith(b"\n}\n"):
        return digest[1].decode(), {suffix.decode(): int(size) for suffix, size in _FILE.findall(files[1])}
    try:
        stats = json.loads(data)
        return str(stats["fingerprint"]["digest"]), {s: int(f["size"]) for s, f in stats["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def verify_shard(root: str, index: int) -> str:
    """Read a committed shard in full and compare sizes and sha256; an empty string where all is well."""
    stats = read_stats(root, index)
    if stats is None:
        return f"{root}/{shard_name(index)}: not committed"
    return _damage(root, shard_name(index), stats, deep=True)


def _damage(root: str, name: str, stats: dict[str, Any], deep: bool = False) -> str:
    for suffix, file in stats["files"].items():
        url = storage.join(root, name + suffix)
        found = storage.size(url)
        if found != file["size"]:
            return f"{url} has {'no file' if found is None else f'{found} bytes'} where {file['size']} were committed"
        if deep and digest_bytes(storage.read_bytes(url)) != file["sha256"]:
            return f"{url} does not have the sha256 that was committed"
    return ""


def _same(url: str, data: bytes) -> bool:
    return storage.size(url) == len(data) and storage.read_bytes(url) == data


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_exclusions(root: str, table: pa.Table) -> None:
    """Write which committed samples are not to be used (duplicates, take-downs), and why.

    table: the columns of EXCLUSIONS_SCHEMA, one row a sample. Written before the manifest; readers skip
    these samples, and a shard's digest changes with them, so that what was made from it is made again.
    """
    table = table.select(EXCLUSIONS_SCHEMA.names).cast(EXCLUSIONS_SCHEMA).sort_by("key")
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_atomic(storage.join(root, EXCLUSIONS), sink.getvalue())


def read_exclusions(root: str) -> pa.Table:
    """The excluded samples of a dataset; empty where there are none."""
    url = storage.join(root, EXCLUSIONS)
    if not storage.exists(url):
        return EXCLUSIONS_SCHEMA.empty_table()
    return storage.read_parquet(url)


def write_manifest(
    root: str, kind: str, stats: Iterable[dict[str, Any]], extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write `dataset.json` from the stats of all shards, and delete shards that lie beyond the last one.

    A shard's digest covers the bytes of its files and its excluded samples: it is what a later stage
    puts into its own fingerprints.
    """
    excluded: dict[int, list[str]] = {}
    exclusions = read_exclusions(root)
    for shard, key in zip(exclusions["shard"].to_pylist(), exclusions["key"].to_pylist(), strict=True):
        excluded.setdefault(shard, []).append(key)
    shards = []
    for s in stats:
        gone = sorted(excluded.get(s["shard"], []))
        shards.append(
            {
                "index": s["shard"],
                "rows": s["rows"],
                "count": s["count"] - len(gone),
                "digest": digest_json({"files": s["files"], "excluded": gone})[:32],
            }
        )
    manifest = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fingerprint": digest_json([s["digest"] for s in shards])[:32],
        "rows": sum(s["rows"] for s in shards),
        "count": sum(s["count"] for s in shards),
        "shards": shards,
        **(extra or {}),
    }
    _remove_beyond(root, {s["index"] for s in shards})
    if storage.read_json(storage.join(root, MANIFEST)) != manifest:
        storage.write_json(storage.join(root, MANIFEST), manifest)
    return manifest


def _remove_beyond(root: str, indices: set[int]) -> None:
    """Shards of an earlier, longer table are no part of the dataset; tools that glob would still read them."""
    names = [n for n in storage.list_names(root) if (m := re.match(r"(\d{5,})[._]", n)) and int(m[1]) not in indices]
    for name in sorted(names, key=lambda n: not n.endswith("_stats.json")):
        log.warning("%s: removed %s, which is not part of the dataset any more", root, name)
        storage.remove(storage.join(root, name))


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """A shard as the manifest has it. rows: input rows; count: samples that can be used; digest: 32 hex."""

    index: int
    rows: int
    count: int
    digest: str

    @property
    def name(self) -> str:
        """`00007`."""
        return shard_name(self.index)


class Dataset:
    """A finished dataset: its manifest, and its shards by position."""

    def __init__(self, root: str, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest
        self.kind: str = manifest["kind"]
        self.fingerprint: str = manifest["fingerprint"]
        self.shards = [ShardInfo(s["index"], s["rows"], s["count"], s["digest"]) for s in manifest["shards"]]
        self.counts = np.array([s.count for s in self.shards], np.int64)
        self._excluded: dict[int, np.ndarray] | None = None

    @classmethod
    def open(cls, root: str) -> Dataset:
        """Open the dataset in a folder; raises StageError where there is no manifest, or one of another format."""
        try:
            manifest = storage.read_json(storage.join(root, MANIFEST))
        except ValueError:
            manifest = {}
        if manifest is None:
            raise StageError(f"{root}: there is no finished dataset here (no {MANIFEST}); run the stage that makes it")
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise StageError(f"{root}/{MANIFEST}: not a manifest of format {FORMAT_VERSION}; run the stage again")
        return cls(root, manifest)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def sidecar(self, index: int) -> pa.Table:
        """The parquet sidecar of shard number `index`: one row per input row."""
        return storage.read_parquet(storage.join(self.root, shard_name(index) + ".parquet"))

    def excluded_rows(self, index: int) -> np.ndarray:
        """Row numbers (int64, sorted) of the samples of shard number `index` that are not to be used."""
        if self._excluded is None:
            by_shard: dict[int, list[int]] = {}
            table = read_exclusions(self.root)
            for shard, row in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True):
                by_shard.setdefault(shard, []).append(row)
            self._excluded = {k: np.array(sorted(v), np.int64) for k, v in by_shard.items()}
        return self._excluded.get(index, np.zeros(0, np.int64))
