"""What planning, finish, take-down and retry cost at 2e9 rows in 200,000 shards: synthetic parts, scaled up.

    python -m benchmarks.scale_ingest [plan] [nothing] [finish] [takedown] [dry_run] [retry]   (without: all)

Each line says what was measured and the arithmetic that leads to full size. CPU-seconds are of this process and its
threads; a node of two cores is assumed where hours are given.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, SHARDS, A_SHARD, FILES = 2_000_000_000, 200_000, 10_000, 10_000
STORED_TB = 45.0  # 225 MB a shard of 10,000 rows at 256 px
CORES = 2


def peak_mb() -> float:
    """The most memory this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """(seconds, CPU-seconds, result)."""
    began, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - began, time.process_time() - cpu, result


def say(what: str, measured: str, scaled: str) -> None:
    """One line of the report."""
    print(f"{what:44} {measured}\n{'':44} at full size: {scaled}", flush=True)


def _words(rng: np.random.Generator, count: int, plain: float) -> list[str]:
    """Captions of about 55 characters; a share of them not in ASCII."""
    letters = "".join(chr(c) for c in rng.integers(97, 123, 4000))
    starts = rng.integers(0, 3900, count)
    odd = rng.random(count) >= plain
    return [
        f"a photograph of {letters[s : s + 8]} {letters[s + 9 : s + 18]}, {letters[s + 20 : s + 26]}"
        + (" caf\u00e9 \u00fcber" if o else "")
        for s, o in zip(starts.tolist(), odd.tolist(), strict=True)
    ]


def _table(folder: Path, files: int, rows: int, plain: float = 0.8) -> None:
    rng = np.random.default_rng(0)
    for f in range(files):
        urls = [f"https://cdn-{i % 4999}.example.org/{f}/{i * 2654435761 % 2**40}.jpg?width=1024" for i in range(rows)]
        table = pa.table({"url": urls, "caption": _words(rng, rows, plain)})
        pq.write_table(table, folder / f"part-{f:05d}.parquet", compression="zstd", row_group_size=100_000)


def plan_() -> None:
    """Rows a second and core of the walk, with and without a held-out part."""
    from ingest import captions, tables
    from ingest.config import ColumnsConfig
    from ingest.tables import HeldoutRule, TableSource
    from shards import plan

    files, rows = 4, 500_000
    with tempfile.TemporaryDirectory() as name:
        for plain in (0.8, 0.4):
            folder = Path(name, f"table-{plain}")
            folder.mkdir()
            _table(folder, files, rows, plain)
            layout = tables.read_layout(str(folder), ColumnsConfig(), [])
            cases: list[tuple[str, HeldoutRule | None]] = [
                (f"plan, heldout_fraction, {100 * plain:.0f} % ASCII", HeldoutRule(0.01, 0, captions.DEFAULT_STEPS))
            ]
            if plain == 0.8:
                cases.insert(0, ("plan", None))
            for what, rule in cases:
                roots = {s: f"{name}/{what}/{s}" for s in ("train", *(["heldout"] if rule else []))}
                source = TableSource(layout, A_SHARD, rule)
                seconds, cpu, _ = timed(functools.partial(plan.grow, roots, source))
                rate = files * rows / cpu
                scaled = f"2e9 rows / {rate:,.0f} = {ROWS / rate / 60:.1f} core-minutes"
                if rule:
                    scaled += f"; files are independent: on 100 workers {ROWS / rate / 6000:.1f} minutes"
                say(what, f"{rate:,.0f} rows/s and core ({seconds:.1f} s), {peak_mb():.0f} MB", scaled)


def nothing() -> None:
    """What a command costs that finds nothing to do: the plan, the stamps of the table's files."""
    from shards import plan

    with tempfile.TemporaryDirectory() as name:
        files = [f"{name}/table/part-{i:05d}.parquet" for i in range(FILES)]
        Path(name, "table").mkdir()
        for file in files:
            Path(file).touch()
        stamps = plan.stamps(files)
        each = SHARDS // FILES
        rng = np.random.default_rng(0)
        for part in range(0, FILES, plan.FILES_A_PART):
            lines = [
                plan.Line((part + j) * each + i, f, i * A_SHARD, (i + 1) * A_SHARD, A_SHARD, rng.bytes(16), stamps[f])
                for j, f in enumerate(files[part : part + plan.FILES_A_PART])
                for i in range(each)
            ]
            plan.write_part(f"{name}/images", part // plan.FILES_A_PART, lines)
        before = peak_mb()
        seconds, cpu, grown = timed(lambda: plan.is_grown(f"{name}/images", files))
        assert grown
        tasks, tasks_cpu, count = timed(lambda: sum(1 for _ in plan.read(f"{name}/images").lines()))
        assert count == SHARDS
        stored = sum(p.stat().st_size for p in Path(name, "images", "plan").iterdir())
        measured = (
            f"{seconds:.2f} s ({cpu:.2f} CPU-s), and {tasks:.2f} s ({tasks_cpu:.2f} CPU-s) through all its lines; "
            f"{stored / 1e6:.1f} MB stored"
        )
        say("nothing to do: plan and stamps", measured, f"measured there; {peak_mb() - before:.0f} MB more memory")


def _sidecars(folder: Path, shards: int, rows: int = A_SHARD) -> None:
    """Sidecars with the columns that are looked at and those that make them large; 8 % of the rows repeat another."""
    rng = np.random.default_rng(0)
    for s in range(shards):
        ids = np.arange(s * rows, (s + 1) * rows)
        again = rng.random(rows) < 0.08
        ids[again] = rng.integers(0, s * rows + 1, int(again.sum()))
        numbers = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        ok = rng.random(rows) < 0.6
        urls = [f"https://cdn-{i % 4999}.example.org/{i * 2654435761 % 2**40}.jpg?width=1024" for i in ids.tolist()]
        sha = [f"{n:016x}" * 4 for n in numbers.tolist()]
        columns = {
            "url": pa.array(urls),
            "caption": pa.array(_words(rng, rows, 0.8)),
            "key": pa.array([f"{s:05d}{i:04d}" for i in range(rows)]),
            "status": pa.array(np.where(ok, "success", "failed_to_download")),
            "error": pa.array([None if o else "timeout" for o in ok.tolist()], pa.string()),
            "sha256": pa.array(sha),
            "url_digest": pa.array(numbers),
            "final_url_digest": pa.nulls(rows, pa.uint64()),
            "final_origin": pa.nulls(rows, pa.string()),
            "caption_digest": pa.array(numbers + np.uint64(1)),
            "bytes_digest": pa.array(numbers + np.uint64(2)),
        }
        pq.write_table(pa.table(columns), folder / f"{s:05d}.parquet", compression="zstd")


def _stats() -> dict[str, Any]:
    hosts = {f"host-{i}.example.org": {"timeout": 12, "http_not_found": 3} for i in range(50)}
    counts = {"success": 6000, "failed_to_download": 4000, "failed_to_resize": 0, "filtered": 0, "opted_out": 0}
    return {
        **counts,
        "rows": A_SHARD,
        "count": 6000,
        "errors": {"timeout": 3000, "http_not_found": 1000},
        "filters": {},
        "hosts": hosts,
        "smaller_sides": {str(2**i): 500 for i in range(6, 13)},
        "body_sizes": {str(2**i): 300 for i in range(8, 24)},
        "checks": {},
        "bytes_fetched": 10**9,
        "bytes_stored": 10**8,
        "retries": 100,
        "duration": 60.0,
        "end_time": 1.0,
        "files": {".tar": {"size": 1, "sha256": "0" * 64}, ".parquet": {"size": 1, "sha256": "0" * 64}},
    }


def finish() -> None:
    """The fold of the stats, the pass over the sidecars, and the query."""
    from ingest.duplicates import Sidecars, find_duplicates
    from ingest.statistics import Lines, RunCounts

    text = json.dumps(_stats())
    counts, lines = RunCounts(), Lines()
    n = 4000

    def fold() -> None:
        for i in range(n):
            s = json.loads(text) | {"shard": i}
            counts.add(s)
            lines.add(s)

    before = peak_mb()
    _, cpu, _ = timed(fold)
    a_shard = cpu / n
    fold_s = a_shard * SHARDS
    measured = f"{1e3 * a_shard:.2f} CPU-ms a shard, {peak_mb() - before:.0f} MB more after {n}"
    say("finish: fold of the stats", measured, f"x 200,000 = {fold_s / 60:.1f} minutes on one core")
    shards = 200
    with tempfile.TemporaryDirectory() as name:
        _sidecars(Path(name), shards)
        before = peak_mb()
        sidecars = Sidecars(name, lambda: ((i, True) for i in range(shards)))
        seconds, cpu, found = timed(lambda: find_duplicates(sidecars, lambda ts: sum(t.num_rows for t in ts)))
        total = (fold_s + cpu / shards * SHARDS / CORES) / 60
        say(
            "finish: duplicates, 2e6 rows, 1.2e6 live",
            f"{seconds:.1f} s, {1e3 * cpu / shards:.2f} CPU-ms a shard, {found.reasons.total():,} found, "
            f"{peak_mb() - before:.0f} MB more",
            f"x 200,000 / {CORES} cores = {cpu / shards * SHARDS / CORES / 60:.1f} minutes, with the fold {total:.1f}",
        )
    with tempfile.TemporaryDirectory() as name:
        files, rows = 20, 1_000_000
        rng = np.random.default_rng(0)
        for f in range(files):
            ids = np.arange(f * rows, (f + 1) * rows, dtype=np.uint64)
            again = rng.random(rows) < 0.1
            ids[again] = rng.integers(0, f * rows + 1, int(again.sum()))
            ids *= np.uint64(0x9E3779B97F4A7C15)
            digests = {c: pa.array(ids) for c in ("url_digest", "bytes_digest", "caption_digest")}
            texts = {"status": pa.array(["success"] * rows), "error": pa.nulls(rows, pa.string())}
            pq.write_table(pa.table({**texts, **digests}), Path(name, f"{f:05d}.parquet"))
        sidecars = Sidecars(name, lambda: ((i, True) for i in range(files)))
        live = 0.6 * ROWS
        for limit in ("100MB", "1GB"):  # of which the rows are 660 MB: what is spilled is to cost no more
            before = peak_mb()
            duplicates = functools.partial(find_duplicates, sidecars, lambda ts: sum(t.num_rows for t in ts))
            seconds, cpu, found = timed(functools.partial(duplicates, memory=limit))
            say(
                f"finish: the query alone, {files} million live rows, 10 % repeated",
                f"{seconds:.1f} s, {1e6 * cpu / (files * rows):.2f} CPU-us a row, {found.reasons.total():,} found, "
                f"{peak_mb() - before:.0f} MB more (limit {limit})",
                f"x {live:.1e} / {CORES} cores = {cpu / (files * rows) * live / CORES / 60:.1f} minutes",
            )


def takedown() -> None:
    """Matching a million URLs."""
    from ingest import removal
    from ingest.takedown import TakenDown

    shards = 200
    with tempfile.TemporaryDirectory() as name:
        _sidecars(Path(name), shards)
        rng = np.random.default_rng(1)
        raw = rng.bytes(32 * 1_000_000).hex()
        urls = [raw[i : i + 64] for i in range(0, len(raw), 64)]
        wanted = pq.read_table(f"{name}/00007.parquet", columns=["url_digest"])["url_digest"].to_pylist()[:100]
        urls += [f"{w:016x}" + "0" * 48 for w in wanted]
        listed = TakenDown.of(urls=urls)
        flags = [(i, True) for i in range(shards)]
        start, start_cpu, _ = timed(lambda: list(removal.find(name, [], listed)))
        seconds, cpu, hits = timed(lambda: list(removal.find(name, flags, listed)))
        assert len(hits) >= 100
        a_shard = (cpu - start_cpu) / shards
        copies = TakenDown.of(bytes=[raw[i : i + 64] for i in range(0, len(raw), 640)])
        _, begin_cpu, _ = timed(lambda: list(removal.find(name, flags[:1], copies)))
        _, copies_cpu, _ = timed(lambda: list(removal.find(name, flags, copies)))
        a_copy = (copies_cpu - begin_cpu) / (shards - 1)
        say(
            "take-down: a million URLs, then 100,000 copies",
            f"{seconds:.2f} s ({start:.2f} to begin), {1e3 * a_shard:.2f} and {1e3 * a_copy:.2f} CPU-ms a shard, "
            f"{len(hits)} hits",
            f"the sum x 200,000 / {CORES} cores = {(a_shard + a_copy) * SHARDS / CORES / 60:.1f} minutes",
        )


def dry_run() -> None:
    """Rows that a dry run with five filters judges, without and with a list of take-downs."""
    from ingest import dryrun
    from ingest.config import IngestConfig
    from ingest.stage import IngestStage
    from ingest.takedown import TakenDown

    rows, rng = 100_000, np.random.default_rng(0)
    filters = [
        {"column": "smaller_side", "min": 128},
        {"column": "aspect_ratio", "max": 3},
        {"column": "similarity", "min": 0.1},
        {"column": "nsfw", "not_in": ["NSFW"]},
        {"column": "caption_words", "min": 3},
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "table")
        folder.mkdir()
        _table(folder, 1, rows)
        (file,) = folder.iterdir()
        table = pq.read_table(file)
        for column, values in {
            "width": rng.integers(50, 2000, rows),
            "height": rng.integers(50, 2000, rows),
            "similarity": rng.random(rows),
            "nsfw": rng.choice(["UNLIKELY", "NSFW", "UNSURE"], rows),
        }.items():
            table = table.append_column(column, pa.array(values))
        pq.write_table(table, file)
        config = IngestConfig.model_validate({"table": str(folder), "filters": filters})
        for what, count in (("no take-downs", 0), ("100,000 take-downs", 100_000)):
            raw = rng.bytes(32 * count).hex()
            TakenDown.of(urls=[raw[i : i + 64] for i in range(0, len(raw), 64)]).create_if_any(f"{name}/run")
            stage = IngestStage(config, f"{name}/run/images")
            _, cpu, _ = timed(functools.partial(dryrun.funnel, stage, progress=False))
            say(
                f"dry run, five filters, {what}",
                f"{rows / cpu:,.0f} rows/s and core",
                f"{ROWS / rows * cpu / 3600:.1f} core-hours",
            )


def retry() -> None:
    """Bytes written by a retry of 1 % of the rows, by a real run against a server of its own."""
    from dataclasses import replace

    from ingest.config import IngestConfig
    from ingest.errors import RETRYABLE
    from ingest.stage import IngestStage
    from shards.dataset import read_stats
    from tests.ingest.site import Site, image_bytes

    site, shards, rows = Site(), 20, 200
    try:
        with tempfile.TemporaryDirectory() as name:
            bad = [i for i in range(shards * rows) if i % 100 == 7]
            urls = [site.add(f"/{i}.png", image_bytes(i % 500, 64, 64)) for i in range(shards * rows)]
            for i in bad:
                site.pages[f"/{i}.png"] = (503, {}, b"")
            pq.write_table(pa.table({"url": urls, "caption": urls}), f"{name}/table.parquet")
            fetch = {"allow_addresses": ["127.0.0.1/32"], "retries": 0, "host_concurrency": 64}
            settings = {"table": f"{name}/table.parquet", "samples_per_shard": rows, "image_size": 64, "fetch": fetch}
            stage = IngestStage(IngestConfig.model_validate(settings), f"{name}/run/images")

            def run(one: IngestStage) -> None:
                one.begin()
                worker, tasks = one.worker(), list(one.tasks())
                for task in tasks:
                    worker(task)
                worker.close()
                one.finish(read_stats(one.root, t.index) or {} for t in tasks)

            def stored() -> dict[str, int]:
                return {
                    p.name: p.stat().st_size for p in Path(stage.root).iterdir() if p.suffix in (".tar", ".parquet")
                }

            run(stage)
            first = stored()
            for i in bad:
                site.add(f"/{i}.png", image_bytes(i % 500, 64, 64))
            run(replace(stage, retry=RETRYABLE))
            more = {n: s for n, s in stored().items() if n not in first}
            share = sum(more.values()) / sum(first.values())
            say(
                "retry: 1 % of the rows",
                f"{len(more)} new files with {100 * share:.2f} % of the bytes of the {len(first)} old ones, none of "
                "which was written",
                f"x {STORED_TB:.0f} TB = {share * STORED_TB:.2f} TB written",
            )
    finally:
        site.close()


PARTS = {"plan": plan_, "nothing": nothing, "finish": finish, "takedown": takedown, "dry_run": dry_run, "retry": retry}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
