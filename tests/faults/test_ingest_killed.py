"""Kill -9 at random moments of an ingest (25 times, every night 100): nothing lost, nothing twice, the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.config import IngestConfig
from ingest.stage import IngestStage
from orchestration import engine
from orchestration.config import CpuPool, RayConfig
from shards.verify import verify_shard
from tests.ingest.conftest import PRELOAD, make_config
from tests.ingest.site import Site, image_bytes

ROWS, SHARD = 320, 4


def drive(config: str, run: str) -> None:
    """What `carrara ingest --local` does, lease and ledger included."""
    stage = IngestStage(IngestConfig.model_validate_json(config), f"{run}/images")
    engine.run(stage, f"{run}/status", RayConfig(), CpuPool(), local=True)


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in root.iterdir() if p.suffix in (".tar", ".parquet")}


def committed(run: Path) -> int:
    return len(list((run / "images").glob("*_stats.json")))


@pytest.mark.slow
@pytest.mark.parametrize("enough", [25, pytest.param(100, marks=pytest.mark.nightly)])
def test_kills_at_any_moment_change_nothing(tmp_path: Path, enough: int) -> None:
    site = Site()
    rows = [(site.add(f"/{i}.png", image_bytes(i % 300)), f"caption {i % 300}") for i in range(ROWS)]
    rows[7] = (site.url("/gone"), "dead")
    rows[9] = (site.add("/page", b"<html>"), "page")
    urls, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"url": urls, "caption": texts}), tmp_path / "table.parquet")
    config = make_config(tmp_path / "table.parquet", samples_per_shard=SHARD).model_dump_json(by_alias=True)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([*PRELOAD, "tests.faults.test_ingest_killed"])
    drive(config, str(tmp_path / "whole"))

    rng = random.Random(1)
    kills = in_the_middle = 0
    run = tmp_path / "killed"
    while True:
        process = processes.Process(target=drive, args=(config, str(run)))
        process.start()
        if kills < enough:
            before = committed(run)
            if kills % 2:  # some at any moment of the start, the others once it has committed something
                while process.is_alive() and committed(run) <= before:
                    time.sleep(0.02)
            process.join(rng.uniform(0.0, 0.2))
            process.kill()
            process.join(30)
            # It may have finished: then the work begins anew, since an unfinished run is what is to be killed.
            if process.exitcode == 0:
                for stats in rng.sample(sorted((run / "images").glob("*_stats.json")), 40):
                    for file in stats.parent.glob(stats.name[:5] + "*"):
                        file.unlink()
                (run / "images" / "dataset.json").unlink(missing_ok=True)
                continue
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            in_the_middle += committed(run) > before
            continue
        process.join(120)
        assert process.exitcode == 0
        break
    site.close()
    assert in_the_middle > enough // 5  # or the kills came too early to mean anything
    assert shard_bytes(run / "images") == shard_bytes(tmp_path / "whole" / "images")
    manifests = [json.loads((r / "images" / "dataset.json").read_text()) for r in (tmp_path / "whole", run)]
    assert manifests[0] == manifests[1]
    assert manifests[0]["counts"]["rows"] == ROWS
    assert not any(verify_shard(str(run / "images"), i) for i in range(ROWS // SHARD))
    leftovers = [p.name for p in (run / "images").rglob("*") if ".tmp-" in p.name or p.parent.name.startswith(".new-")]
    assert not leftovers
