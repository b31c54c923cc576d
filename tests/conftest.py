"""What all tests share: small thread counts (2 cores are enough), no network, a seeded generator."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Generator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("carrara", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("carrara")


def pytest_configure(config: pytest.Config) -> None:
    """A folder that all workers of a run share, and that goes with it: its name is in their environment."""
    if not hasattr(config, "workerinput"):
        folder = os.environ["TESTS_SHARED"] = tempfile.mkdtemp(prefix="tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test may run for longer than another before it is ended: machines and what runs beside it differ."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


def pytest_collection_finish() -> None:
    """What is imported by now lives as long as the process: the garbage collector need not walk through it for ever."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a failed one: what it wants is installed there."""
    report = yield
    if report.skipped and os.environ.get("CARRARA_CI") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
