"""Local paths and fsspec URLs behind one set of functions; every write is atomic and durable.

`create` writes a file if there is none of its name, and all that several processes may write at one moment is written
so. On a local or shared file system a file is written under a unique temporary name, fsynced, and then linked
(`create`) or renamed (`replace`) to its final name. On an object store a put is atomic by itself; `create` is a
conditional put (If-None-Match). `probe` refuses a store that does not keep this.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import io
import json
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import fsspec
import fsspec.config
from fsspec.implementations.local import LocalFileSystem

from shards.local import fsync_file, fsync_folder, scan, sweep, temporary_name, written_beside
from shards.settings import ConfigError, StageError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
_PAUSES_S = (0.05, 0.2, 1.0)  # before a file that is said to be there, and is not, is tried again
# What os.link says where there are no links: FUSE over object stores, SMB, exFAT.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.ENOTSUP)
_AT_ONCE = 16  # requests under way, over a network
_SLOW_READ_S = 5e-5  # a small file that takes longer comes from a disk or over a network
_LISTS_BY_PREFIX = {"s3", "s3a", "gs", "gcs", "abfs", "az"}

# botocore keeps 10 connections, and a training reads with 32 threads. Who configures fsspec otherwise is left alone.
for _protocol in ("s3", "s3a"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("config_kwargs", {}).setdefault("max_pool_connections", 64)


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


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Bytes from the first of each pair up to the second, of one file; over a network all at once.

    A store that throttles, or a read that breaks off, is tried again with growing pauses, for about a minute in all.
    Raises FileNotFoundError at once, ValueError where the file ends before.
    """
    found = patiently(url, lambda: _read_ranges(url, ranges))
    for data, (begin, end) in zip(found, ranges, strict=True):
        if len(data) != end - begin:
            raise ValueError(f"{url}: ends before byte {end}")
    return found


def patiently(url: str, read: Callable[[], T]) -> T:
    """What `read` returns of `url`; one that fails is tried again with growing pauses, for about a minute in all.

    Raises FileNotFoundError and PermissionError at once, OSError in the end.
    """
    pause = 0.2
    while True:
        try:
            return read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as e:  # each store has errors of its own
            if pause > 30:
                raise OSError(f"{url}: cannot be read: {type(e).__name__}: {e}") from e
            time.sleep(pause * (1 + random.random()))
            pause *= 2


def _read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    fs, path = (None, url) if _plain(url) else _fs(url)
    if fs is None or isinstance(fs, LocalFileSystem):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [_pread(fd, begin, end - begin) for begin, end in ranges]
        finally:
            os.close(fd)
    # By name: the second argument of s3fs's cat_file is another one than that of other file systems.
    starts, ends = [b for b, _ in ranges], [e for _, e in ranges]
    if len(ranges) == 1:
        return [bytes(fs.cat_file(path, start=starts[0], end=ends[0]))]
    found = fs.cat_ranges([path] * len(ranges), starts=starts, ends=ends, on_error="raise")
    return [bytes(data) for data in found]


def _pread(fd: int, begin: int, length: int) -> bytes:
    parts = []
    while length > 0 and (data := os.pread(fd, length, begin)):  # one call gives 2 GiB at the most
        parts.append(data)
        begin, length = begin + len(data), length - len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_parquet(url: str, columns: list[str] | None = None) -> pa.Table:
    """The whole table, or some of its columns; raises FileNotFoundError.

    Without pyarrow's read-ahead: its threads may hold the bytes until the interpreter ends, and crash it there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(read_bytes(url)), columns=columns, pre_buffer=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the parquet file that all of Carrara writes: zstd."""
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_json(url: str) -> Any | None:
    """A JSON file's value; None where the file is absent. Raises ValueError where it is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except FileNotFoundError:
        return None


def read_object(url: str) -> dict[str, Any]:
    """The object in a JSON file that no run hangs on: empty where it is absent, torn, or something else."""
    try:
        found = read_json(url)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


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


def names(url: str) -> Iterator[str]:
    """Names of the entries of a local folder, in no order and without looking at any; none where there is none."""
    return (entry.name for entry in scan(local_path(url)))


def list_files(url: str, prefixes: Sequence[str] = ("",)) -> Iterator[tuple[str, int, int]]:
    """(name, size in bytes, stamp as `stamp` gives it) of what lies in a folder, in no order; none where there is no
    folder. On an object store one listing for each of `prefixes`, which no two may share a file, several at a time."""
    fs, path = _fs(url)
    if isinstance(fs, LocalFileSystem):
        for entry in scan(Path(path)):
            try:
                info = entry.stat()
            except FileNotFoundError:  # it went meanwhile
                continue
            yield entry.name, info.st_size, _local_mark(info)
        return
    fs.invalidate_cache()
    if len(prefixes) < 2 or not _LISTS_BY_PREFIX.intersection(
        [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    ):
        with contextlib.suppress(FileNotFoundError):
            for info in fs.ls(path, detail=True):
                if info["type"] == "file":
                    yield info["name"].rsplit("/", 1)[-1], int(info["size"]), _mark(info)
        return
    start = len(fs._strip_protocol(path).rstrip("/")) + 1

    def listed(prefix: str) -> list[tuple[str, int, int]]:
        found = fs.find(path, prefix=prefix, detail=True).values()
        return [(info["name"][start:], int(info["size"]), _mark(info)) for info in found]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for part in pool.map(listed, prefixes):
            yield from part


def stamp(url: str) -> tuple[int, int] | None:
    """Size in bytes of a file, and a number that is another one once it is written again; None where it is absent."""
    fs, path = _fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            found = os.stat(path)
            return found.st_size, _local_mark(found)
        fs.invalidate_cache()
        info = fs.info(path)
        return int(info["size"]), _mark(info)
    except FileNotFoundError:
        return None


def written_at(url: str) -> float | None:
    """When a file was last written by the clock of the store or file server, in seconds since 1970; None where the
    file is absent or its store does not tell."""
    fs, path = _fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return os.stat(path).st_mtime
        fs.invalidate_cache()
        info = fs.info(path)
    except FileNotFoundError:
        return None
    for name in ("LastModified", "last_modified", "updated", "mtime"):
        value = info.get(name)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
    return None


def _local_mark(info: os.stat_result) -> int:
    return (info.st_mtime_ns ^ info.st_ino << 1) & 0x7FFF_FFFF_FFFF_FFFF


def _mark(info: dict[str, Any]) -> int:
    """Of a file on an object store, by whichever of these its file system tells."""
    names = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime", "created")
    version = next((str(info[n]) for n in names if info.get(n) is not None), secrets.token_hex(8))
    return int.from_bytes(hashlib.sha256(version.strip('"').encode()).digest()[:8], "big") % 2**63


def read_many(urls: Sequence[str]) -> list[bytes | None]:
    """The whole of each file, None where it is absent; many are read at once."""
    if not urls:
        return []
    fs, _ = _fs(urls[0])
    if not isinstance(fs, LocalFileSystem):
        paths = [_fs(url)[1] for url in urls]
        found = fs.cat(paths, on_error="return")
        values = [found[p] for p in paths]
        for value in values:
            if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                raise value
        return [None if isinstance(v, Exception) else bytes(v) for v in values]

    # Threads pay where a file is waited for; out of a warm cache they only get in each other's way.
    began = time.perf_counter()
    first, rest = _read_some(urls[:32]), urls[32:]
    if time.perf_counter() - began < _SLOW_READ_S * len(first):
        return first + _read_some(rest)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        parts = pool.map(_read_some, (rest[i : i + 16] for i in range(0, len(rest), 16)))
        return first + [data for part in parts for data in part]


def _read_some(urls: Sequence[str]) -> list[bytes | None]:
    return [_read_or_none(url) for url in urls]


def _read_or_none(url: str) -> bytes | None:
    try:
        return read_bytes(url)
    except FileNotFoundError:
        return None


def make_folder(url: str) -> None:
    """Create a folder and its parents (nothing to do on an object store)."""
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)


def create(url: str, data: bytes, beside: str | None = None) -> bool:
    """Write a file unless there is one; True if this call wrote it. Atomic, durable.

    False may also mean that it was this call's own: a network may lose the answer, and the file is there at the second
    try. Whoever is told False looks at what lies there. beside: a local folder for the temporary file, which must be
    there; without, the file's own, which is made. Raises StageError where the store says that the file is there and
    then that it is not, FileNotFoundError where `beside` is no more.
    """
    for wait in (*_PAUSES_S, None):
        if _create(url, data, beside):
            return True
        # "Exists" is believed once it is seen: a store may mean "somebody else is at it, try again" (409).
        if size(url) is not None:
            return False
        if wait is not None:
            time.sleep(wait)
    raise StageError(f"{url}: the store says that this file is there, and then that it is not; try again")


def _create(url: str, data: bytes, beside: str | None) -> bool:
    fs, path = _fs(url)
    if not isinstance(fs, LocalFileSystem):
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as e:
            if _is_conflict(e):
                return False
            raise
        return True
    with written_beside(path, data, beside) as tmp:
        try:
            os.link(tmp, path)
            created = True
        except FileExistsError:
            created = False
    fsync_folder(os.path.dirname(path))
    return created


def _is_conflict(error: BaseException) -> bool:
    """Whether an object store says that the put cannot be judged now: HTTP 409, or 412 where fsspec has no name for it;
    or that its parts are gone, as after a put in parts that was done and whose answer was lost.

    By the answer's own fields, never by its text, in which a file's name may stand.
    """
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and (
            response.get("Error", {}).get("Code")
            in ("PreconditionFailed", "ConditionalRequestConflict", "OperationAborted", "NoSuchUpload")
            or response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
        ):
            return True
    return False


def probe(folder: str) -> None:
    """Raise ConfigError, in a sentence that says what to do, where a folder does not keep `create`: two writes."""
    url = join(folder, temporary_name("probe"))
    try:
        kept = _create(url, b"1", None) and not _create(url, b"2", None)
        if not kept or read_bytes(url) != b"1":
            raise ConfigError(
                f"{folder}: this store overwrites a file that was to be created only if absent (it ignores "
                "If-None-Match), so workers could mix their shards; use one that has conditional puts"
            )
    except OSError as e:
        if is_local(url) and e.errno in _NO_LINKS:
            raise ConfigError(
                f"{folder}: files cannot be linked here; give the store's own address (s3://, gs://) instead of a "
                "mount of it, or a folder on another disk"
            ) from None
        raise ConfigError(f"{folder}: cannot be written to ({e.strerror or e}); set 'run' to another folder") from None
    except NotImplementedError:
        raise ConfigError(
            f"{folder}: this kind of store cannot create a file only if it is absent; use another"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            remove(url)


def etag(url: str) -> str | None:
    """What an object store calls this version of a file; None on a file system, and where there is no file."""
    fs, path = _fs(url)
    if isinstance(fs, LocalFileSystem):
        return None
    fs.invalidate_cache()
    try:
        found = fs.info(path).get("ETag")
    except FileNotFoundError:
        return None
    return None if found is None else str(found)


def replace(url: str, data: bytes, seen: str | None = None, beside: str | None = None) -> None:
    """Write a file in the place of the one that is there. Atomic, durable.

    seen: on S3, what `etag` said of the file that `data` was made from: where it is another one by now, StageError.
    """
    fs, path = _fs(url)
    if not isinstance(fs, LocalFileSystem):
        try:
            if seen is None:
                fs.pipe_file(path, data)
            else:  # as one put, since the parts of a put in parts know no condition until their end
                fs.pipe_file(path, data, chunksize=5 * 2**30, IfMatch=seen)
        except OSError as e:
            if _is_conflict(e) or isinstance(e, FileExistsError):
                raise StageError(
                    f"{url}: was changed by somebody else at this moment; run the same command again"
                ) from e
            raise
        return
    with written_beside(path, data, beside) as tmp:
        os.replace(tmp, path)
    fsync_folder(os.path.dirname(path))


def write_atomic(url: str, data: bytes) -> None:
    """Write a file, replacing what is there. Atomic, durable."""
    replace(url, data)


def put_file(path: str, url: str) -> bool:
    """Bring a local file to `url` unless there is one, without holding it in memory; True if this call did."""
    fs, there = _fs(url)
    if not isinstance(fs, LocalFileSystem):
        if size(url) is not None:
            return False
        fs.put_file(path, there)
        return True
    os.makedirs(os.path.dirname(there) or ".", exist_ok=True)
    tmp = os.path.join(os.path.dirname(there), temporary_name(os.path.basename(there)))
    try:
        shutil.copyfile(path, tmp)
        fsync_file(tmp)
        os.link(tmp, there)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
    fsync_folder(os.path.dirname(there))
    return True


def digest(url: str) -> str | None:
    """sha256 of a file as lower-case hex, in pieces; None where it is absent."""
    found = hashlib.sha256()
    try:
        with open_read(url) as f:
            while piece := f.read(8 << 20):
                found.update(piece)
    except FileNotFoundError:
        return None
    return found.hexdigest()


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


def sweep_temporaries(folder: str, older_than_s: float = 3600.0) -> int:
    """`local.sweep` of a local folder; nothing on an object store, which has no temporary files. Returns the bytes
    freed."""
    return sweep(local_path(folder), older_than_s) if is_local(folder) else 0
