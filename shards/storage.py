"""Local paths and fsspec URLs behind one set of functions; every write is atomic and durable.

On a local or shared file system a file is written under a unique temporary name in the same folder,
fsynced, and then linked (first writer wins) or renamed (last writer wins) to its final name. On an
object store a put is atomic by itself; "first writer wins" is a conditional put (If-None-Match).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shards.settings import StageError

if TYPE_CHECKING:
    import pyarrow as pa

TMP_MARK = ".tmp-"


def join(base: str, *parts: str) -> str:
    """Join a path or URL with further parts, by `/`."""
    return "/".join([base.rstrip("/") or "/", *(p.strip("/") for p in parts)])


def _fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, path = fsspec.core.url_to_fs(str(url))
    return fs, path


def _plain(url: str) -> bool:
    """Whether this is an absolute path as the operating system takes it. fsspec would spend a tenth of a millisecond
    on finding that out, which a resume over 200,000 shards does a million times."""
    return url.startswith("/") and "::" not in url and "://" not in url


def is_local(url: str) -> bool:
    """True where the path lies on a mounted file system rather than an object store."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The path of a local URL; raises StageError for an object store."""
    if not is_local(url):
        raise StageError(f"{url}: this needs a local or shared file system; set 'run' to a folder on one")
    return Path(_fs(url)[1])


def exists(url: str) -> bool:
    """Whether a file or folder is there (object stores are asked afresh, not from a cached listing)."""
    if _plain(url):
        return os.path.lexists(url)
    fs, path = _fs(url)
    if isinstance(fs, LocalFileSystem):
        return os.path.lexists(path)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def size(url: str) -> int | None:
    """Size of a file in bytes, None where it is absent."""
    if _plain(url):
        try:
            return os.stat(url).st_size
        except FileNotFoundError:
            return None
    fs, path = _fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return os.stat(path).st_size
        fs.invalidate_cache()
        return int(fs.info(path)["size"])
    except FileNotFoundError:
        return None


def read_bytes(url: str) -> bytes:
    """The whole file; raises FileNotFoundError."""
    if _plain(url):
        fd = os.open(url, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(fd, 16384)
            if len(data) == os.fstat(fd).st_size:  # the whole of it, in one go
                return data
        finally:
            os.close(fd)
        return Path(url).read_bytes()
    fs, path = _fs(url)
    return bytes(fs.cat_file(path))


def read_parquet(url: str, columns: list[str] | None = None) -> pa.Table:
    """The whole table, or some of its columns; raises FileNotFoundError.

    Without pyarrow's read-ahead: its threads may hold the bytes until the interpreter ends, and crash it there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(read_bytes(url)), columns=columns, pre_buffer=False)


def read_json(url: str) -> Any | None:
    """A JSON file's value; None where the file is absent. Raises ValueError where it is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except FileNotFoundError:
        return None


def open_read(url: str) -> IO[bytes]:
    """A seekable binary reader."""
    fs, path = _fs(url)
    return open(path, "rb") if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")


def list_names(url: str) -> list[str]:
    """Sorted names of the entries of a folder; empty where there is none."""
    fs, path = _fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return sorted(os.listdir(path))
        fs.invalidate_cache()
        return sorted(os.path.basename(p.rstrip("/")) for p in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def make_folder(url: str) -> None:
    """Create a folder and its parents (nothing to do on an object store)."""
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)


def create(url: str, data: bytes) -> bool:
    """Write a file unless it is there already; True if this call wrote it. Atomic, durable."""
    fs, path = _fs(url)
    if not isinstance(fs, LocalFileSystem):
        try:
            fs.pipe_file(path, data, mode="create")
            return True
        except (FileExistsError, OSError) as e:
            if isinstance(e, FileExistsError) or _is_precondition_failed(e):
                return False
            raise
    with _written_beside(path, data) as tmp:
        try:
            os.link(tmp, path)
            created = True
        except FileExistsError:
            created = False
    _fsync_folder(os.path.dirname(path))
    return created


def write_atomic(url: str, data: bytes) -> None:
    """Write a file, replacing what is there. Atomic, durable."""
    fs, path = _fs(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with _written_beside(path, data) as tmp:
        os.replace(tmp, path)
    _fsync_folder(os.path.dirname(path))


def write_json(url: str, value: Any) -> None:
    """Write a JSON file (indented, sorted keys), replacing what is there. Atomic, durable."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(url, text.encode("utf-8", "surrogatepass") + b"\n")


def remove(url: str) -> None:
    """Delete a file; nothing happens where it is absent."""
    fs, path = _fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            os.unlink(path)
        else:
            fs.rm_file(path)
    except FileNotFoundError:
        pass


def replace_folder(tmp: Path, final: Path) -> None:
    """Publish a finished folder: fsync every file, then rename `tmp` to `final`, replacing an older one.

    A crash leaves the older folder, the newer one, or (between two renames) the older one under its
    temporary name and the newer one complete under its own; never a half-written folder at `final`.
    """
    for root, _, files in os.walk(tmp):
        for name in files:
            _fsync_file(os.path.join(root, name))
        _fsync_folder(root)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}{TMP_MARK}old-{secrets.token_hex(4)}")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    _fsync_folder(str(final.parent))
    shutil.rmtree(old, ignore_errors=True)


def temporary_folder(final: Path) -> Path:
    """A fresh, empty folder beside `final` to build it in; give it to `replace_folder` when it is whole."""
    tmp = final.with_name(f".{final.name}{TMP_MARK}{secrets.token_hex(6)}")
    tmp.mkdir(parents=True)
    return tmp


def sweep_temporaries(folder: str, older_than_s: float = 3600.0) -> int:
    """Delete what dead writers left in a local folder; returns the bytes freed.

    A temporary file names its host and process: on this host it goes as soon as that process is gone,
    otherwise once it is `older_than_s` seconds old.
    """
    if not is_local(folder):
        return 0
    freed = 0
    root = local_path(folder)
    for entry in _scan(root):
        if TMP_MARK not in entry.name:
            continue
        parts = entry.name.rsplit(TMP_MARK, 1)[1].split("-")
        dead = len(parts) == 3 and parts[0] == _host() and parts[1].isdigit() and not _alive(int(parts[1]))
        try:
            info = entry.stat(follow_symlinks=False)
            if dead or time.time() - info.st_mtime > older_than_s:
                freed += info.st_size
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        except FileNotFoundError:
            continue
    return freed


def _scan(root: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            yield from entries
    except FileNotFoundError:
        return


class _written_beside:
    """Context: `data` durably under a temporary name beside `path`; that name is gone afterwards."""

    def __init__(self, path: str, data: bytes) -> None:
        folder, name = os.path.split(path)
        os.makedirs(folder or ".", exist_ok=True)
        self.tmp = os.path.join(folder, f".{name}{TMP_MARK}{_host()}-{os.getpid()}-{secrets.token_hex(4)}")
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


def _is_precondition_failed(error: BaseException) -> bool:
    """Whether an object store said "it exists already": HTTP 412, or 409 for two puts at one moment."""
    text = f"{error} {error.__cause__}"
    return any(s in text for s in ("PreconditionFailed", "ConditionalRequestConflict", "412", "pre-conditions"))


def _fsync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_folder(path: str) -> None:
    _fsync_file(path or ".")


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
