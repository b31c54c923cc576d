"""The 64-bit digests in sidecars: what duplicates and take-downs are found by, at 30 bytes a row instead of its texts.

`url_digest` is of the URL's normal form, `final_url_digest` of where redirects led, `caption_digest` of the caption,
`bytes_digest` of the fetched bytes (the first 64 bits of their sha256). Rules compare two of them, 128 bits. Sidecars
of an earlier version have none: `readable` makes them from the texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ingest.takedown import digest, number, url_digest
from shards import storage
from shards.dataset import Dataset
from shards.layout import shard_name
from shards.made_with import read_made_with
from shards.settings import StageError

log = logging.getLogger("carrara.ingest")

T = TypeVar("T")

DIGESTS = [
    ("url_digest", pa.uint64()),
    ("final_url_digest", pa.uint64()),
    ("final_origin", pa.string()),
    ("caption_digest", pa.uint64()),
    ("bytes_digest", pa.uint64()),
]
ROW_BITS = 20  # samples_per_shard is at most 1,000,000
FILES_AT_ONCE = 1000

# The id of a row in the run: its shard and its row, as one number.
SAMPLE_ID = f"(regexp_extract(filename, '(\\d+)\\.parquet$', 1)::BIGINT << {ROW_BITS}) | file_row_number"


def of_texts(
    urls: Sequence[str | None],
    captions: Sequence[str | None],
    sha256: Sequence[str | None],
    final: Sequence[str | None],
) -> dict[str, list[Any]]:
    """The columns of DIGESTS. final: where redirects led; None where there were none."""
    return {
        "url_digest": [None if u is None else number(url_digest(u)) for u in urls],
        "final_url_digest": [None if u is None else number(url_digest(u)) for u in final],
        "final_origin": [None if u is None else _origin(u) for u in final],
        "caption_digest": [number(digest(c or "")) for c in captions],
        "bytes_digest": [None if s is None else number(s) for s in sha256],
    }


def _origin(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].partition('?')[0].rpartition('@')[2]}"


def with_digests(table: pa.Table) -> pa.Table:
    """A sidecar, or some of its columns, with the columns of DIGESTS added where it has none."""
    if "url_digest" in table.column_names:
        return table
    url, caption, sha256 = (
        table[n].to_pylist() if n in table.column_names else [None] * len(table) for n in ("url", "caption", "sha256")
    )
    made = of_texts(url, caption, sha256, [None] * len(table))
    for name, kind in DIGESTS:
        table = table.append_column(name, pa.array(made[name], kind))
    return table


def as_before(sidecar: bytes, before: bytes) -> bytes:
    """The sidecar of a shard that is made anew: what was taken down keeps the digests that it had `before`, so that
    what it excluded as a duplicate stays excluded, though it is not fetched again."""
    table, old = (pq.read_table(pa.BufferReader(data), pre_buffer=False) for data in (sidecar, before))
    if not table["key"].equals(old["key"]):
        return sidecar
    old = with_digests(old)
    both = pc.and_(*(pc.fill_null(pc.equal(t["error"], "taken_down"), False) for t in (table, old)))
    for name in ("sha256", "phash", *dict(DIGESTS)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pc.if_else(both, old[name], table[name]))
    return storage.parquet_bytes(table)


def has_digests(root: str, index: int) -> bool:
    """Whether a shard's sidecar holds digests; reads its footer."""
    with storage.open_read(storage.join(root, shard_name(index) + ".parquet")) as file:
        return "url_digest" in pq.read_schema(file).names


def connect(scratch: str, memory: str, threads: int) -> duckdb.DuckDBPyConnection:
    """A database that holds at most so much memory (`1GB`) and spills into the folder `scratch`."""
    config: dict[str, Any] = {"memory_limit": memory, "threads": str(threads), "temp_directory": scratch}
    db = duckdb.connect(config=config)
    run(db, "SET preserve_insertion_order = false")
    run(db, "SET enable_progress_bar = false")
    return db


def run(db: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]]:
    """Execute a statement and take all of its result."""
    return _interruptible(db, lambda: db.execute(sql).fetchall())


def stream(db: duckdb.DuckDBPyConnection, sql: str, rows: int) -> Iterator[pa.RecordBatch]:
    """The result of a query, so many rows at a time."""
    reader = _interruptible(db, lambda: db.sql(sql).to_arrow_reader(rows))
    while (batch := _interruptible(db, lambda: next(reader, None))) is not None:
        yield batch


def _interruptible(db: duckdb.DuckDBPyConnection, call: Callable[[], T]) -> T:
    """Call the database in a thread, and wait. Within a query it holds signals back, and makes an error of its own of
    what their handlers raise; here that ends the query and is raised as it is."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            return future.result()
        except BaseException:
            db.interrupt()  # without effect where nothing runs
            raise


def readable(
    root: str, shards: Iterable[tuple[int, bool]], columns: Sequence[str], scratch: str, threads: int = 8
) -> Iterator[list[str]]:
    """Sidecars as local files with digests, up to FILES_AT_ONCE at a time.

    shards: (number, whether its sidecar holds digests). columns: what is read of those that must be copied, from a
    store or to get digests; of a copy only the last batch is kept.
    """
    folder = Path(scratch, "sidecars")
    folder.mkdir(parents=True, exist_ok=True)
    texts = [c for c in columns if c not in dict(DIGESTS)]

    def copied(index: int, has: bool) -> str:
        name = shard_name(index) + ".parquet"
        wanted = [*columns] if has else [*dict.fromkeys([*texts, "url", "caption", "sha256"])]
        table = storage.read_parquet(storage.join(root, name), wanted)
        table = table if has else with_digests(table)
        pq.write_table(table.select(columns), folder / name, compression="none")
        return str(folder / name)

    def here(index: int) -> str:
        return str(storage.local_path(storage.join(root, shard_name(index) + ".parquet")))

    local = storage.is_local(root)
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(shards, FILES_AT_ONCE):
            copies = {i: pool.submit(copied, i, has) for i, has in batch if not (local and has)}
            yield [copies[i].result() if i in copies else here(i) for i, _ in batch]
            for i in copies:
                (folder / (shard_name(i) + ".parquet")).unlink()


def _batches(items: Iterable[tuple[int, bool]], size: int) -> Iterator[list[tuple[int, bool]]]:
    batch: list[tuple[int, bool]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def sql_files(files: Sequence[str]) -> str:
    """The files as a list in SQL."""
    return "[" + ", ".join("'" + f.replace("'", "''") + "'" for f in files) + "]"


def quietly(report: Callable[[int], Any] | None, count: int) -> None:
    """Tell a progress bar, where there is one."""
    if report is not None:
        report(count)


def with_flags(root: str, shards: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """(shard, whether its sidecar holds digests) of committed shards; those of an earlier version have none."""
    made_with = read_made_with(root) or {}
    if "taken_over_from" not in made_with:
        yield from ((i, True) for i in shards)
        return
    try:
        manifest = Dataset.open(root).manifest
    except StageError:
        manifest = {}
    old = set(manifest.get("without_digests", ()))
    known = {s["index"] for s in manifest.get("shards", ())} if manifest.get("format_version") == 2 else set()
    for index in shards:
        yield index, index not in old if index in known else has_digests(root, index)
