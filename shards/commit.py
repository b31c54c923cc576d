"""A folder of shards: what it is made with, and how a shard comes to lie in it.

    folder = Folder.begin(root, Fingerprint("ingest", 4, settings))
    stats = folder.adopt(7) or folder.commit(7, {".tar": tar, ".parquet": sidecar}, {"rows": 10, "count": 9})

A folder is made with one set of settings, which stand in `made_with.json` beside an id; whoever wants others is
refused once, as a whole. A shard number is written once, by the steps of shards/protocol.py: its `_stats.json` is the
commit, and where there is one, the shard's files are there and are its own, whoever else writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from shards import protocol, storage, takeover
from shards.fingerprint import Fingerprint, digest_bytes
from shards.layout import shard_name
from shards.listing import STATS
from shards.made_with import MADE_WITH, made_with_of, read_made_with, write_made_with
from shards.settings import ConfigError, StageError
from shards.stats import born, born_of, json_bytes, parse_stats

log = logging.getLogger("carrara.shards")

# What may lie in a folder before it is begun: what another process of Carrara is just writing, and hidden files.
_NOT_FOREIGN = re.compile(r"\..*")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that was begun. id: 12 hex digits that no other has, also not one of the same name before or after.
    data: the suffix of the large file of each shard."""

    root: str
    id: str
    data: str
    made_with: Fingerprint

    @classmethod
    def begin(
        cls,
        root: str,
        made_with: Fingerprint,
        data: str = ".tar",
        *,
        redo: bool = False,
        take_over: bool = False,
        known: Iterable[str] = (),
    ) -> Folder:
        """Begin a folder, or open one that was begun with the same.

        redo: a folder made with something else is set aside, as `<root>.replaced-1`. take_over: for whoever holds the
        lease: the store is probed, and a folder of format 1 becomes one of this format. known: regular expressions
        of further names that may lie in a folder that is not begun. Raises ConfigError where the folder holds what
        Carrara did not make, was made with something else, or the store cannot keep a commit.
        """
        stored = read_made_with(root)
        if stored is None:
            refuse_foreign(root, data, known)
            if take_over:
                storage.probe(root)
                if takeover.is_old(root):
                    takeover.take_over(root, made_with, data, redo)
            stored = read_made_with(root) or _create(root, made_with, data)
        elif take_over:
            storage.probe(root)
        changes = made_with.differs(made_with_of(stored))
        if changes and (redo or (take_over and _is_empty(root, stored))):
            set_aside(root)
            return cls.begin(root, made_with, data, take_over=take_over)
        if changes:
            raise ConfigError(
                f"{root}: was made with other settings ({'; '.join(changes)}); put the settings back, give --redo to "
                "set this folder aside and make it anew, or set 'run' to another folder"
            )
        folder = cls(root, str(stored["id"]), data, made_with)
        if take_over:
            storage.make_folder(folder.beside)  # it may have been deleted by hand
        return folder

    @property
    def beside(self) -> str:
        """Where small files lie until the large one is there. A worker never makes this folder, so one of before a
        --redo cannot reach the folder that came after."""
        return storage.join(self.root, f".new-{self.id}")

    def adopt(self, index: int) -> dict[str, Any] | None:
        """The stats of a committed shard; one that was begun is committed first. None where it was not begun."""
        return self._run(protocol.adopt(self._names(index), CODEC))

    def commit(
        self, index: int, files: Mapping[str, bytes], stats: Mapping[str, Any], input: Any = None
    ) -> dict[str, Any]:
        """Commit a shard and return the stats that lie there in the end: where another writer was first, its own.

        files: the data by suffix; one of them has the folder's `data`. stats: JSON values, with `count`, the samples in
        the data, and `rows`, the input rows. input: what this shard was made from, where that has a digest. Raises
        StageError where it is to be tried again, or where the folder is another one by now.
        """
        if not {"count", "rows"} <= stats.keys():
            raise ValueError("the stats of a shard need 'count' and 'rows'")
        name = shard_name(index)
        described = describe(files)
        record = {
            **stats,
            "shard": index,
            "files": described,
            "born": born_of(described),
            "input": input,
            "made_with": self.id,
            "made_by": {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time()},
        }
        small = [(name + s, d) for s, d in sorted(files.items()) if s != self.data]
        beside = pack(small, json_bytes(record))
        digest = described[self.data]["sha256"]
        found = self._run(protocol.commit(self._names(index), files[self.data], digest, beside, CODEC))
        assert found is not None
        return found

    def sweep(self) -> int:
        """Remove what dead writers left beside shards that are committed; returns how many files."""
        names = storage.list_names(self.beside)
        waiting: dict[int, list[str]] = {}
        for name in names:
            head = name.partition("-")[0]
            if head.isdecimal():
                waiting.setdefault(int(head), []).append(name)
        gone = 0
        for index, some in waiting.items():
            if run(protocol.sweep(self._names(index)), Files(self.root, self.beside)):
                gone += len(some)
        return gone

    def _names(self, index: int) -> protocol.Names:
        name = shard_name(index)
        return protocol.Names(name + self.data, name + STATS, f".new-{self.id}/{name}-")

    def _run(self, steps: protocol.Steps) -> dict[str, Any] | None:
        try:
            found = run(steps, Files(self.root, self.beside))
        except protocol.TryAgain as e:
            raise StageError(f"{self.root}: {e}") from None
        except FileNotFoundError as e:
            raise StageError(
                f"{self.root}: this folder was set aside or deleted while a shard was made ({e})"
            ) from None
        if found is None:
            return None
        stats = parse_stats(found)
        if stats is None:
            raise StageError(f"{self.root}: a shard's stats file cannot be read, or is not of Carrara; see `verify`")
        return stats


def describe(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of a shard's files by suffix, as its stats have them."""
    return {s: {"size": len(d), "sha256": digest_bytes(d)} for s, d in sorted(files.items())}


def commit_shard(
    root: str, index: int, files: Mapping[str, bytes], stats: Mapping[str, Any], made_with: Fingerprint
) -> dict[str, Any]:
    """Commit one shard by itself, in a folder that is begun with it; the input is the fingerprint's own. Its large file
    is the first of `files`. Stages begin their folder once instead."""
    folder = Folder.begin(root, dataclasses.replace(made_with, input=None), next(iter(files)))
    return folder.commit(index, files, stats, made_with.input)


class Files:
    """The operations of shards/protocol.py in a folder. beside: where temporary files are written, on a file system.
    versions: take note of what is read, so that `replace` does not replace another version."""

    def __init__(self, root: str, beside: str | None = None, versions: bool = False) -> None:
        self.root, self.versions = root, versions
        local = beside is not None and storage.is_local(beside)
        self._temporary = str(storage.local_path(beside)) if local and beside is not None else None
        self._seen: dict[str, str | None] = {}  # of the versions that were read

    def read(self, name: str) -> bytes | None:
        """The data, None where there is no such file."""
        url = storage.join(self.root, name)
        if self.versions and name not in self._seen:
            self._seen[name] = storage.etag(url)
        try:
            return storage.read_bytes(url)
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str | None:
        """sha256 of a file, None where there is none."""
        return storage.digest(storage.join(self.root, name))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file if there is none."""
        return storage.create(storage.join(self.root, name), data, self._temporary)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file in the place of the one that was read."""
        storage.replace(storage.join(self.root, name), data, self._seen.get(name), self._temporary)

    def remove(self, name: str) -> None:
        """Delete a file if there is one."""
        storage.remove(storage.join(self.root, name))

    def list(self, prefix: str) -> tuple[str, ...]:
        """The names in a folder that begin so."""
        folder, _, head = prefix.rpartition("/")
        names = storage.list_names(storage.join(self.root, folder) if folder else self.root)
        return tuple(f"{folder}/{n}" if folder else n for n in names if n.startswith(head))


def run(steps: protocol.Steps, files: Any) -> Any:
    """Carry out the operations of a protocol one after another; returns what it returns."""
    try:
        operation = next(steps)
        while True:
            operation = steps.send(getattr(files, operation[0])(*operation[1:]))
    except StopIteration as end:
        return end.value


def pack(small: Iterable[tuple[str, bytes]], stats: bytes) -> bytes:
    """Small files and stats as one: a line of JSON with names and sizes, then their bytes."""
    small = list(small)
    head = json.dumps({"stats": len(stats), "files": [[n, len(d)] for n, d in small]}).encode()
    return b"".join([head, b"\n", stats, *(d for _, d in small)])


def unpack(packed: bytes) -> tuple[list[tuple[str, bytes]], bytes]:
    """What `pack` made one of."""
    end = packed.index(b"\n")
    head = json.loads(packed[:end])
    at = end + 1 + head["stats"]
    stats, small = packed[end + 1 : at], []
    for name, size in head["files"]:
        small.append((name, packed[at : at + size]))
        at += size
    return small, stats


def _born_of_bytes(stats: bytes) -> str | None:
    found = parse_stats(stats)
    return None if found is None else born(found)


CODEC = protocol.Codec(unpack, _born_of_bytes)


def _create(root: str, made_with: Fingerprint, data: str) -> dict[str, Any]:
    if takeover.is_old(root):
        raise StageError(f"{root}: was made by an older version; run the stage that makes it, which takes it over")
    return write_made_with(root, made_with, data)


def refuse_foreign(root: str, data: str, known: Iterable[str] = ()) -> None:
    """Raise ConfigError, naming it, where a folder that is not begun holds what Carrara did not make."""
    allowed = [re.compile(k) for k in known]
    if takeover.is_old(root):
        allowed += takeover.OLD_NAMES
    names = [n for n in storage.list_names(root) if not _NOT_FOREIGN.fullmatch(n)]
    foreign = [n for n in names if n != MADE_WITH and not any(a.fullmatch(n) for a in allowed)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ConfigError(
            f"{root}: holds {foreign[0]}{more}, which Carrara did not make, so nothing is written here; set 'run' to "
            "another folder, or move these files"
        )


def _is_empty(root: str, stored: Mapping[str, Any]) -> bool:
    """Whether a folder was begun, and no shard in it."""
    return set(storage.list_names(root)) <= {MADE_WITH, f".new-{stored['id']}"} and not storage.list_names(
        storage.join(root, f".new-{stored['id']}")
    )


def set_aside(root: str) -> None:
    """Rename a begun folder, to make room for another of its name. One in which no shard was begun leaves nothing."""
    stored = read_made_with(root)
    assert stored is not None
    empty = _is_empty(root, stored)
    if not storage.is_local(root):
        if not empty:
            raise ConfigError(
                f"{root}: --redo sets a folder aside by renaming it, which an object store cannot; set 'run' to "
                "another prefix"
            )
        storage.remove(storage.join(root, MADE_WITH))
        return
    path = storage.local_path(root)
    for number in range(1, 10_000):
        other = path.with_name(f"{path.name}.replaced-{number}")
        if other.exists():
            continue
        os.rename(path, other)
        if empty:
            with contextlib.suppress(OSError):
                os.rmdir(other / f".new-{stored['id']}")
                os.unlink(other / MADE_WITH)
                os.rmdir(other)
        else:
            log.warning("%s: set aside as %s; delete it when it is no longer needed", root, other.name)
        return
    raise ConfigError(f"{root}: there are too many folders named {path.name}.replaced-N; delete some")
