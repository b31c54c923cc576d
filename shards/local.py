"""Files and folders on a local or shared file system: written whole under a temporary name, durable, and swept where
their writer is dead. `storage` is what others write files with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from shards.settings import StageError

TMP_MARK = ".tmp-"


def replace_folder(tmp: Path, final: Path) -> None:
    """Publish a finished folder: fsync every file, then rename `tmp` to `final`, replacing an older one.

    A crash leaves the older folder, the newer one, or (between two renames) the older one under its
    temporary name and the newer one complete under its own; never a half-written folder at `final`.
    """
    for root, _, files in os.walk(tmp):
        for name in files:
            fsync_file(os.path.join(root, name))
        fsync_folder(root)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}{TMP_MARK}old-{secrets.token_hex(4)}")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    fsync_folder(str(final.parent))
    shutil.rmtree(old, ignore_errors=True)


def temporary_folder(final: Path) -> Path:
    """A fresh, empty folder beside `final` to build it in; give it to `replace_folder` when it is whole."""
    tmp = final.with_name(f".{final.name}{TMP_MARK}{secrets.token_hex(6)}")
    tmp.mkdir(parents=True)
    return tmp


def sweep(folder: Path, older_than_s: float) -> int:
    """Delete what dead writers left in a folder; returns the bytes freed.

    A temporary file names its host and process: on this host it goes as soon as that process is gone,
    otherwise once it is `older_than_s` seconds old.
    """
    freed = 0
    for entry in scan(folder):
        if TMP_MARK not in entry.name:
            continue
        try:
            info = entry.stat(follow_symlinks=False)
            if of_dead_process(entry.name) or time.time() - info.st_mtime > older_than_s:
                freed += info.st_size
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        except FileNotFoundError:
            continue
    return freed


def of_dead_process(name: str) -> bool:
    """Whether a temporary file is of a process of this host that is gone; its name says whose it is."""
    parts = name.rsplit(TMP_MARK, 1)[1].split("-")
    return len(parts) == 3 and parts[0] == _host() and parts[1].isdigit() and not _alive(int(parts[1]))


def scan(root: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder; nothing where there is none."""
    try:
        with os.scandir(root) as entries:
            yield from entries
    except FileNotFoundError:
        return


class written_beside:
    """Context: `data` durably under a temporary name in `folder` (None: beside `path`, in a folder that is made); that
    name is gone afterwards."""

    def __init__(self, path: str, data: bytes, folder: str | None = None) -> None:
        own, name = os.path.split(path)
        if folder is None:
            os.makedirs(own or ".", exist_ok=True)
        self.tmp = os.path.join(own if folder is None else folder, temporary_name(name))
        self.data = data

    def __enter__(self) -> str:
        try:
            with open(self.tmp, "wb") as f:
                f.write(self.data)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            self.__exit__()
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StageError(
                    f"{os.path.dirname(self.tmp)}: the disk is full; free some space and run the same command again"
                ) from e
            raise
        return self.tmp

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.tmp)


def temporary_name(name: str) -> str:
    """A name for a file that is to be `name`; it says whose it is (`of_dead_process`)."""
    return f".{name}{TMP_MARK}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def fsync_file(path: str) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: str) -> None:
    """The same of a folder; an empty path is the current one."""
    fsync_file(path or ".")


def _alive(pid: int) -> bool:
    """Asked by a signal, since /proc may hide other users' processes."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _host() -> str:
    return socket.gethostname().replace("-", "_")
