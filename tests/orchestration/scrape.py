"""A Ray of its own with a metrics port, a toy stage and a training's line on it; prints what Prometheus would read.

python -m tests.orchestration.scrape FOLDER
"""

from __future__ import annotations

import socket
import sys
import time
import urllib.request
from pathlib import Path

import ray

from orchestration import engine
from orchestration.config import Pool, RayConfig
from orchestration.metrics import METRICS, Exporter
from orchestration.ray_head import be_patient, keep_apart
from shards.settings import StageError
from tests.orchestration.drive import toy


def scraped(port: int) -> str:
    """The page that the node's agent serves; empty while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def report(_: object) -> None:
    """In a worker, as a rank is: what a training and an evaluation say."""
    exporter = Exporter("runs/x", "train")
    exporter.line({"images": 800, "loss": 0.25, "samples_per_s": 12.5, "data_wait": 0.01, "mfu": 0.4})
    exporter.line({"checkpoint/seconds": 1.5})
    exporter.evaluated({"protocol": {"id": "abc"}, "metrics": {"fid": {"value": 7.5}}})
    other = Exporter("runs/x", "ingest")
    stats = {"count": 3, "errors": {"http_404": 2}, "bytes_fetched": 70, "encode_seconds": 2.0, "wait_seconds": 1.0}
    other.shard(stats, 4, 1)
    time.sleep(300)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    be_patient()
    keep_apart()
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=100_000_000,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
        logging_level="WARNING",
    )
    rank = ray.remote(num_cpus=1)(report).remote(None)
    stage = toy(folder, shards=6, misbehave=((2, "raise"),))
    try:
        engine.run(stage, str(folder / "status"), RayConfig(attempts=1), Pool(workers=1, num_gpus=0))
    except StageError as e:
        print(e, file=sys.stderr)
    wanted = [m.exported(name) for name, m in METRICS.items()]
    text, deadline = "", time.monotonic() + 120
    # Both processes tell of shards_left; which of them has told by now is chance.
    while time.monotonic() < deadline and not (
        all(w in text for w in wanted) and text.count("\nray_carrara_shards_left{") == 2
    ):
        time.sleep(1)
        text = scraped(port)
    time.sleep(2)  # each tells every half second: what it told last is there by now
    print(scraped(port))
    ray.cancel(rank, force=True)
    ray.shutdown()
