"""What a run of 2e9 rows in 200,000 shards costs where it does not fetch or encode: measured on synthetic files of a
stated size, and extrapolated with the arithmetic shown.

    python benchmarks/scale.py                       all parts
    python benchmarks/scale.py resume exclusions     some
    python benchmarks/scale.py --shards 20000        another scale of the synthetic folder

Each part runs in a process of its own, so that its memory is its own: peak resident set less what a process holds
that has only imported what the part imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FULL_SHARDS, FULL_ROWS, FILES = 200_000, 2_000_000_000, 10_000

Part = Callable[[str, int], dict[str, Any]]


def peak_mb() -> float:
    """Of this process alone; getrusage's figure would begin with the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# ---- a folder of shards ---------------------------------------------------------------------------------------------


TEMPLATES, MARK = 64, 7_777_777  # so many different texts of stats; the shard's number in each


def stats_of(index: int, made_with: str) -> dict[str, Any]:
    """Stats of the size that an ingest's have: 10 KB, most of it hosts and their errors."""
    files = {".tar": {"size": 0, "sha256": f"{index:064x}"}, ".parquet": {"size": 0, "sha256": f"{index + 1:064x}"}}
    hosts = {f"host-{(index * 37 + i) % 100_000}.example.org": {"timeout": 1, "http_not_found": 2} for i in range(110)}
    return {
        "shard": index,
        "rows": 10_000,
        "count": 8_200,
        "files": files,
        "born": f"{index:032x}",
        "input": None,
        "made_with": made_with,
        "success": 8_200,
        "errors": {"timeout": 300, "http_not_found": 1500},
        "hosts": hosts,
    }


def make_folder(root: str, shards: int) -> None:
    """Names as `shards` committed shards have them; the large files are empty, the stats of real size."""
    from shards.commit import Folder
    from shards.layout import shard_name
    from shards.stats import json_bytes

    make_table(root)
    stage = ingest_stage(root)
    folder = Folder.begin(root, stage.made_with(), take_over=True)
    texts = [json_bytes({**stats_of(i, folder.id), "shard": MARK}) for i in range(TEMPLATES)]
    for index in range(shards):
        name = os.path.join(root, shard_name(index))
        for suffix in (".tar", ".parquet"):
            os.close(os.open(name + suffix, os.O_CREAT | os.O_WRONLY))
        text = texts[index % TEMPLATES].replace(str(MARK).encode(), str(index).encode())
        Path(name + "_stats.json").write_bytes(text)
    write_plan(root, shards, stage)


def _table(root: str) -> str:
    return os.path.join(root, "..", "table")


def make_table(root: str) -> None:
    """A table in many files, of which the first alone is ever opened."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    os.makedirs(_table(root))
    for file in range(FILES):
        Path(_table(root), f"part-{file:05d}.parquet").touch()
    pq.write_table(
        pa.table({"url": ["http://h/1"], "caption": ["one"]}), os.path.join(_table(root), "part-00000.parquet")
    )


def ingest_stage(root: str) -> Any:
    """The ingest whose shards these are."""
    from ingest.config import IngestConfig
    from ingest.stage import IngestStage

    return IngestStage(IngestConfig.model_validate({"table": _table(root)}), root)


def write_plan(root: str, shards: int, stage: Any) -> None:
    """The plan that an ingest would have made, part by part."""
    from ingest import tables
    from shards import plan

    files = tables.list_files(stage.config.table)
    stamps, each = plan.stamps(files), max(1, shards // FILES)
    lines = [
        plan.Line(
            i,
            f := files[i // each % FILES],
            10_000 * (i % each),
            10_000 * (i % each + 1),
            10_000,
            i.to_bytes(16, "little"),
            stamps[f],
        )
        for i in range(shards)
    ]
    a_part = each * plan.FILES_A_PART
    for part in range(0, shards, a_part):
        plan.write_part(root, part // a_part, lines[part : part + a_part])
    used = {line.file for line in lines}
    rest = [plan.Line(-1, f, 0, 0, 0, bytes(16), stamps[f]) for f in files if f not in used]  # files without rows
    if rest:
        plan.write_part(root, plan.read(root).parts, rest)


def resume(folder: str, shards: int) -> dict[str, Any]:
    """What an ingest does before the first shard: the plan brought up to the table, and what is left, by names."""
    from orchestration.ledger import Ledger
    from shards.layout import shard_name
    from shards.listing import STATS
    from shards.stage import begin

    missing = shards // 2
    lost = os.path.join(folder, shard_name(missing) + STATS)
    for suffix in (".tar", ".parquet"):
        os.unlink(os.path.join(folder, shard_name(missing) + suffix))
    os.rename(lost, os.path.join(folder, "..", "lost"))
    base, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
    stage = ingest_stage(folder)
    begin(stage)
    ledger = Ledger(stage, os.path.join(folder, "..", "status"))
    assert not ledger.complete
    task = ledger.take()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert task is not None
    assert (task.index, ledger.remaining) == (missing, 1)
    os.rename(os.path.join(folder, "..", "lost"), lost)
    for suffix in (".tar", ".parquet"):
        Path(folder, shard_name(missing) + suffix).touch()
    return _at_full_size(shards, seconds, cpu, peak_mb() - base)


def nothing(folder: str, shards: int) -> dict[str, Any]:
    """The command that finds nothing to do."""
    from shards.dataset import FORMAT_VERSION, MANIFEST, ShardInfo

    stage = ingest_stage(folder)
    infos = [dataclasses.asdict(ShardInfo(i, 10_000, 8_200, f"{i:032x}")) for i in range(shards)]
    manifest = {"format_version": FORMAT_VERSION, "shards": infos, "passes": stage._passes()}
    Path(folder, MANIFEST).write_text(json.dumps(manifest, indent=1))
    del infos, manifest
    part = [sys.executable, __file__, "--part", "nothing_to_do", "--folder", folder, "--shards", str(shards)]
    done = subprocess.run(part, check=True, capture_output=True, text=True)
    os.unlink(os.path.join(folder, MANIFEST))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def nothing_to_do(folder: str, shards: int) -> dict[str, Any]:
    """The command itself, in its own process."""
    from orchestration import engine
    from orchestration.config import CpuPool, RayConfig

    base, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
    stage = ingest_stage(folder)
    assert not engine.run(stage, os.path.join(folder, "..", "status"), RayConfig(), CpuPool(), local=True)
    return _at_full_size(shards, time.perf_counter() - began, time.process_time() - cpu, peak_mb() - base)


def _at_full_size(shards: int, seconds: float, cpu: float, mb: float) -> dict[str, Any]:
    factor = FULL_SHARDS / shards
    return {
        "measured": f"{shards:,} shards, {3 * shards:,} files, a table of {FILES:,} files: {seconds:.2f} s, "
        f"{cpu:.2f} CPU-s, {mb:.0f} MB",
        "at 200,000 shards": f"{seconds:.2f} s x {factor:g} = {seconds * factor:.1f} s; {mb:.0f} MB x {factor:g} = "
        f"{mb * factor:.0f} MB",
        "wanted": "at most 10 s and 500 MiB",
    }


# ---- exclusions -----------------------------------------------------------------------------------------------------


def exclusion_tables(shards: int, each: int) -> Iterator[Any]:
    """`each` excluded rows of 10,000 in each shard, 500 shards a table."""
    import pyarrow as pa

    from shards.exclusions import SCHEMA

    for start in range(0, shards, 500):
        rng = np.random.default_rng(start)
        some = min(500, shards - start)
        row = np.sort(rng.random((some, 10_000), np.float32).argpartition(each, axis=1)[:, :each], axis=1)
        shard = np.repeat(np.arange(start, start + some, dtype=np.int32), each)
        winner = rng.integers(0, 1 + (shard.astype(np.int64) << 20))
        code = pa.array(rng.integers(0, 2, len(shard)).astype(np.int8))
        reason = pa.DictionaryArray.from_arrays(code, pa.array(["duplicate_url", "duplicate_bytes"]))
        yield pa.table([shard, row.reshape(-1).astype(np.int32), reason, winner], schema=SCHEMA)


def exclusions(folder: str, shards: int) -> dict[str, Any]:
    """What a reader's list of excluded samples costs it: a tenth of all rows, 1,000 of each shard."""
    from shards.exclusions import Exclusions, write_exclusions

    root = os.path.join(folder, "..", "excluded")
    began = time.perf_counter()
    name = write_exclusions(root, exclusion_tables(shards, 1000))
    written = time.perf_counter() - began
    assert name is not None
    part = [sys.executable, __file__, "--part", "read_exclusions", "--folder", root, "--shards", str(shards)]
    read = json.loads(subprocess.run(part, check=True, capture_output=True, text=True).stdout)
    groups = len(Exclusions(root, name)) / 65_536
    rows = shards * 1000
    grown = read["mb"]
    full = FULL_ROWS // 10 / 65_536
    return {
        "measured": f"{rows:,} rows out, {os.path.getsize(os.path.join(root, name)) / rows:.1f} bytes each, written in "
        f"{written:.0f} s; a reader: {grown:.1f} MB more, first shard {read['first_ms']:.0f} ms, next "
        f"{read['next_ms']:.2f} ms; {read['footer_mb']:.1f} MB of it are the footer of {groups:.0f} row groups",
        "at 2e9 rows (2e8 out)": f"{grown:.1f} MB + {read['footer_mb']:.1f} MB x ({full:.0f} / {groups:.0f} - 1) = "
        f"{grown + read['footer_mb'] * (full / groups - 1):.0f} MB",
        "wanted": "at most 50 MB in each reader",
    }


def read_exclusions(root: str, shards: int) -> dict[str, Any]:
    """The reader's side, in its own process."""
    import gc

    import pyarrow as pa
    import pyarrow.parquet as pq

    from shards.exclusions import Exclusions

    name = next(n for n in os.listdir(root) if n.startswith("exclusions-"))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"row": np.arange(100)}), sink, compression="zstd")
    pq.ParquetFile(pa.BufferReader(sink.getvalue())).read()  # what is loaded once for all
    gc.collect()
    base = peak_mb()
    reader = Exclusions(root, name)
    total = len(reader)
    footer = peak_mb() - base
    began = time.perf_counter()
    assert len(reader.rows(shards // 2)) == total // shards
    first = time.perf_counter() - began
    began = time.perf_counter()
    for shard in range(min(2000, shards)):
        reader.rows(shard)
    after = (time.perf_counter() - began) / min(2000, shards)
    return {"mb": peak_mb() - base, "footer_mb": footer, "first_ms": first * 1e3, "next_ms": after * 1e3}


PARTS: dict[str, Part] = {"resume": resume, "nothing": nothing, "exclusions": exclusions}
INNER: dict[str, Part] = {"read_exclusions": read_exclusions, "nothing_to_do": nothing_to_do}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; without, all of them")
    parser.add_argument("--shards", type=int, default=20_000, help="of the synthetic folder")
    parser.add_argument("--part", choices=[*PARTS, *INNER], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps((PARTS | INNER)[given.part](given.folder, given.shards)))
        return
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part '{min(unknown)}'; the parts are {', '.join(PARTS)}")
    top = tempfile.mkdtemp(prefix="carrara-scale-")
    try:
        folder = os.path.join(top, "images")
        make_folder(folder, given.shards)
        for name in given.parts or PARTS:
            command = [sys.executable, __file__, "--part", name, "--folder", folder, "--shards", str(given.shards)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(name)
            for what, figure in json.loads(done.stdout.splitlines()[-1]).items():
                print(f"  {what + ':':24} {figure}", flush=True)
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
