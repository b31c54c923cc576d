"""Taking samples out of a committed shard without moving the others: all offsets stay, so any mixture of its files from
before and after fits, and a reader that holds the older sidecar gets the others right.

In a tar what is not a living sample becomes a comment of the same length (a pax global header, as `git archive` puts
one into every tarball), behind the last living sample zeros; in columns the rows become zeros. The large file is
replaced first, then the stats, whose `born` stays, and the sidecar last, since it says what is still to be done.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import commit, made_with, protocol, storage
from shards import stats as stats_files
from shards.columns import COLUMN_ROW, HEADER, column_rows, samples_columns, unpack_columns
from shards.fingerprint import digest_bytes
from shards.layout import shard_name
from shards.listing import STATS
from shards.settings import StageError

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 512 << 10  # libarchive takes no comment of more than 1 MiB

Edit = Callable[[pa.Table, dict[str, Any]], tuple[pa.Table, dict[str, Any]]]


def blank(root: str, index: int, rows: Iterable[int], edit: Edit) -> dict[str, Any]:
    """Take the samples in these rows of the sidecar out of a committed shard; returns its stats.

    edit(sidecar, stats): both as they are to be. It counts from the sidecar it gives back, since a take-down that was
    killed is done again over a large file and stats that are changed already. Raises StageError where the shard is not
    committed, or was changed by somebody else meanwhile.
    """
    rows = sorted(set(rows))
    name = shard_name(index)
    known = made_with.read_made_with(root)
    beside = None if known is None else storage.join(root, f".new-{known['id']}")
    if beside is not None:
        storage.make_folder(beside)
    there = storage.read_bytes(storage.join(root, name + STATS)) if known is not None else None
    stats = None if there is None else stats_files.parse_stats(there)
    if known is None or stats is None:
        raise StageError(f"{root}: shard {name} is not committed here")

    def edited(data: bytes, table: bytes, stats: bytes) -> tuple[bytes, bytes, bytes, str]:
        sidecar = pq.read_table(pa.BufferReader(table), pre_buffer=False)
        record = stats_files.parse_stats(stats)
        assert record is not None
        sidecar, new_data = _blanked(data, sidecar, rows, known["data"])
        new_sidecar, new_record = edit(sidecar, dict(record))
        new_table = storage.parquet_bytes(new_sidecar)
        digest = digest_bytes(new_data)
        files = dict(record["files"])
        files[known["data"]] = {"size": len(new_data), "sha256": digest}
        files[".parquet"] = {"size": len(new_table), "sha256": digest_bytes(new_table)}
        new_record |= {"files": files, "born": stats_files.born(record), "shard": index}
        return new_data, new_table, stats_files.json_bytes(new_record), digest

    names = protocol.Names(name + known["data"], name + STATS, "")
    try:
        done = commit.run(protocol.blank(names, name + ".parquet", edited), commit.Files(root, beside, versions=True))
    except protocol.TryAgain as e:
        raise StageError(f"{root}: {e}; run the same command again") from None
    result = None if done is None else stats_files.parse_stats(done)
    if result is None:
        raise StageError(f"{root}: shard {name} is not committed here")
    return result


def _blanked(data: bytes, sidecar: pa.Table, rows: list[int], suffix: str) -> tuple[pa.Table, bytes]:
    if suffix == ".safetensors":
        stored_rows = column_rows(sidecar)
        if COLUMN_ROW not in sidecar.column_names:
            # From now on the statuses no longer say which rows have a place in the columns.
            column = pa.array(stored_rows, pa.int32(), mask=stored_rows < 0)
            sidecar = sidecar.append_column(COLUMN_ROW, column)
        gone = stored_rows[rows]
        status = np.ones(sidecar.num_rows, bool)  # columns without a status hold nothing that several samples share
        if "status" in sidecar.column_names:
            status = np.array([s == "success" for s in sidecar["status"].to_pylist()], bool)
        status[rows] = False
        living = stored_rows[status & (stored_rows >= 0)]
        return sidecar, blank_columns(data, gone[gone >= 0], living)
    keys = sidecar["key"].take(pa.array(rows, pa.int64())).to_pylist()
    return sidecar, redact(data, set(keys))


def redact(data: bytes, gone: Collection[str]) -> bytes:
    """A tar of the same length without the samples `gone` (keys); where it has none of them, `data` itself.

    What was blanked before is joined with its neighbours, so the order of several take-downs does not matter.
    """
    gone = set(gone)
    spans: list[tuple[int, int]] = []
    found = False
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if not member.isreg():
                continue
            if member.name.partition(".")[0] in gone:
                found = True
                continue
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if spans and spans[-1][1] == member.offset:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((member.offset, end))
    if not found:
        return data
    out, at = bytearray(data), 0
    for start, end in spans:
        if start > at:
            out[at:start] = comment(start - at)
        at = end
    out[at:] = bytes(len(data) - at)
    return bytes(out)


def comment(length: int) -> bytes:
    """Tar entries of `length` bytes (at least 1,024, a multiple of 512) that every reader passes over.

    Python's tarfile calls itself once for each comment that directly follows another: so a long one is several, with
    the entry of the folder `./` between.
    """
    if length < 2 * _BLOCK or length % _BLOCK:
        raise ValueError(f"no comment has {length} bytes")
    parts: list[bytes] = []
    left = length
    while left:
        size = min(left - _BLOCK, _PIECE)
        if 0 < left - size - _BLOCK < 3 * _BLOCK:  # what is left must hold a folder and a comment
            size -= 3 * _BLOCK
        info = tarfile.TarInfo("pax_global_header")
        info.type, info.size = tarfile.XGLTYPE, size
        head = f"{size} comment=".encode()
        parts += [info.tobuf(tarfile.USTAR_FORMAT), head, b" " * (size - len(head) - 1), b"\n"]
        left -= size + _BLOCK
        if left:
            info = tarfile.TarInfo("./")
            info.type = tarfile.DIRTYPE
            parts.append(info.tobuf(tarfile.USTAR_FORMAT))
            left -= _BLOCK
    return b"".join(parts)


def blank_columns(data: bytes, gone: np.ndarray, living: np.ndarray) -> bytes:
    """A safetensors file of the same length in which the samples in the rows `gone` are zeros, `data` itself where they
    are already. living: the rows of those that stay; a caption's embedding stays as long as one of them has it."""
    arrays, _ = unpack_columns(data)
    out = bytearray(data)
    begin = HEADER + int.from_bytes(data[:HEADER], "little")
    for name, rows in samples_columns(arrays, gone, living).items():
        array = arrays[name]
        if not array.size or not len(rows):
            continue
        start = array.__array_interface__["data"][0] - np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        if not begin <= start <= len(data):
            raise AssertionError("a column that does not lie in the file")
        view = np.frombuffer(out, np.uint8, array.nbytes, start).reshape(len(array), -1)
        view[rows] = 0
        del view
    return data if out == data else bytes(out)
