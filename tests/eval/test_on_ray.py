"""The grid, the watcher and `carrara sample --ray` on a real Ray, seen to their ends; a worker killed in the grid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shards.layout import RunPaths
from tests.eval.test_grid import digests
from tests.eval.test_watch import configured, done
from tests.orchestration.head import ROOT, actors, ended, head, run_here, run_stage, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.nightly
def test_a_grid_whose_worker_is_killed_ends_with_the_same_bytes(workplace: tuple[Path, RunPaths]) -> None:
    folder, own = workplace
    config = folder / "run.yaml"
    run_here("grid", config)
    expected = digests(own.eval)
    shutil.rmtree(own.eval)
    before = actors("ShardWorker")
    process = run_stage("grid", config)
    wait_for(
        lambda: len(list(Path(own.eval).rglob("*_stats.json"))) >= 4 and bool(actors("ShardWorker") - before), process
    )
    os.kill(min(actors("ShardWorker") - before), signal.SIGKILL)
    ended(process)
    found = digests(own.eval)
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name
    assert Path(own.reports, "step-00000004.html").exists()


def test_watch_and_sample_end_on_ray(trained: RunPaths, tmp_path: Path) -> None:
    config = configured(trained).model_dump(mode="json")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    ended(run_stage("watch", tmp_path / "c.yaml", "--once"))
    assert done(trained) == ["step-00000002"]

    cluster = head()
    for out, words in (("ray", ["--ray"]), ("local", [])):
        command = ["sample", trained.run, "--prompt", "a red circle", "--count", "3", "--steps", "2"]
        arguments = [sys.executable, "orchestration/run_stage.py", *command, "--out", str(tmp_path / out), *words]
        env = {**cluster.environment(), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
        ended(subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    pictures = [sorted((tmp_path / out).glob("*.png")) for out in ("ray", "local")]
    assert [p.name for p in pictures[0]] == [p.name for p in pictures[1]]
    assert len(pictures[0]) == 3
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    assert len(json.loads((tmp_path / "ray" / "samples.json").read_text())["images"]) == 3


@pytest.mark.nightly
def test_two_watchers_that_are_killed_end_with_the_same_bytes(trained: RunPaths, tmp_path: Path) -> None:
    config = configured(trained, backfill=True).model_dump(mode="json")
    config["eval"] |= {"shard_size": 5, "batch_size": 5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run_here("watch", tmp_path / "c.yaml", "--once")
    words = ("watch", tmp_path / "c.yaml", "--once", "--local")
    expected = digests(trained.eval)
    shutil.rmtree(trained.eval)
    for committed in (4, 11):  # among the first checkpoint's shards, and among the second's
        both = [run_stage(*words) for _ in range(2)]
        wait_for(lambda n=committed: len(list(Path(trained.eval).rglob("*_stats.json"))) >= n, both[0])
        for process in both:
            process.kill()
            process.communicate()
        assert len(digests(trained.eval)) < len(expected)
    for process in [run_stage(*words) for _ in range(2)]:
        ended(process)
    assert digests(trained.eval) == expected
    notes = [json.loads(p.read_text()) for p in Path(trained.eval).rglob("alarm.json")]
    assert len(notes) == 2
