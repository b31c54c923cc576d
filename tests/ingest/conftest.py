"""Fixtures of the ingest tests: a local server, and a shorthand that runs the stage in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from ingest.config import IngestConfig
from ingest.stage import IngestStage
from shards.dataset import read_stats
from tests.ingest.site import Site

# Loaded once by the process that killed children are forked from.
PRELOAD = ["ingest.stage", "tests.ingest.test_stage"]


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


@pytest.fixture
def few_objects() -> None:
    """For tests that bound how long something takes: no collection walks over all that the tests have imported."""
    gc.collect()
    gc.freeze()


def make_config(table: Any, **settings: Any) -> IngestConfig:
    """A config that may reach this machine; `fetch` entries add to the tests' own."""
    ours = {} if settings.get("engine") == "img2dataset" else {"backoff": 0.01, "host_concurrency": 16}
    fetch = {"allow_addresses": ["127.0.0.1/32"], **ours, **settings.pop("fetch", {})}
    base = {"table": str(table), "samples_per_shard": 8, "image_size": 32, "encode_format": "png"}
    return IngestConfig.model_validate({**base, **settings, "fetch": fetch})


def run(stage: IngestStage, order: Any = None, finish: bool = True) -> dict[str, Any]:
    """Every task in this process, in the table's order or the one given; returns the manifest."""
    stage.begin()
    tasks = list(stage.tasks())
    worker = stage.worker()
    try:
        for i in order or range(len(tasks)):
            worker(tasks[i])
    finally:
        worker.close()
    return stage.finish([read_stats(stage.root, t.index) for t in tasks]) if finish else {}
