"""The ingest stage on a real Ray, killed: its worker, then its driver; the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from shards.verify import verify_shard
from tests.ingest.site import Site, image_bytes
from tests.orchestration.head import actors, ended, folder_bytes, run_here, run_stage, wait_for

pytestmark = pytest.mark.slow

ROWS, SHARD = 240, 8


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


def prepare(site: Site, folder: Path, name: str) -> Path:
    """A run's configuration over the table in `folder`."""
    config = {
        "run": str(folder / name),
        "ray": {"ingest": {"workers": 2}, "back_off_s": 0.05},
        "ingest": {
            "table": str(folder / "table.parquet"),
            "samples_per_shard": SHARD,
            "image_size": 32,
            "encode_format": "png",
            "fetch": {"allow_addresses": ["127.0.0.1/32"], "backoff": 0.01},
        },
        "autoencoder": {"pretrained": str(folder)},
        "clip": {"pretrained": str(folder)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def committed(run: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (run / "images").glob("*_stats.json")}


@pytest.mark.timeout(900)
def test_killed_workers_and_drivers_cost_time_and_nothing_else(site: Site, tmp_path: Path) -> None:
    rows = [(site.add(f"/{i}.png", image_bytes(i % 200)), f"caption {i % 200}") for i in range(ROWS)]
    rows[5] = (site.url("/gone"), "dead")
    urls, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"url": urls, "caption": texts}), tmp_path / "table.parquet")
    clean, torn = tmp_path / "clean", tmp_path / "torn"
    run_here("ingest", prepare(site, tmp_path, "clean"))
    expected = folder_bytes(clean / "images")

    config, before = prepare(site, tmp_path, "torn"), actors("ShardWorker")
    site.slow = 0.3  # each answer waits so long: a shard of 8 pictures takes a third of a second
    process = run_stage("ingest", config)
    wait_for(lambda: len(committed(torn)) >= 2, process)
    os.kill(min(actors("ShardWorker") - before), signal.SIGKILL)
    at = len(committed(torn))
    wait_for(lambda: len(committed(torn)) >= at + 3, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while actors("ShardWorker") - before:  # they notice that their driver is gone
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = committed(torn)
    assert 5 <= len(done) < ROWS // SHARD, "killed in the middle"
    assert not (torn / "images/dataset.json").exists()

    site.slow = 0.0
    ended(run_stage("ingest", config))
    assert {k: v for k, v in folder_bytes(torn / "images").items() if k != "statistics.jsonl"} == {
        k: v for k, v in expected.items() if k != "statistics.jsonl"
    }
    after = committed(torn)
    assert {name: after[name] for name in done} == done, "nothing was made twice"
    assert json.loads((torn / "images/dataset.json").read_text())["counts"]["rows"] == ROWS
    assert not any(verify_shard(str(torn / "images"), i) for i in range(ROWS // SHARD))
