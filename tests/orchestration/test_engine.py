"""The engine in one process: what is made, what is skipped, what is set aside; and the same bytes on Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest

from orchestration.config import Pool, RayConfig
from orchestration.engine import is_complete, run
from orchestration.lease import Lease
from orchestration.ledger import FAILED_IN_A_ROW, Ledger, Retries
from orchestration.stopping import Stopped
from shards import storage
from shards.dataset import Dataset
from shards.listing import listed
from shards.settings import ConfigError, StageError
from shards.stage import Task
from tests.orchestration.drive import toy
from tests.orchestration.head import drive, folder_bytes
from tests.orchestration.toy import ToyStage

QUICK = RayConfig(back_off_s=0.0)


def local(stage: ToyStage, redo: bool = False) -> bool:
    return run(stage, f"{Path(stage.root).parent}/status", QUICK, Pool(), local=True, redo=redo)


def calls(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[0]) for p in (folder / "calls").glob("*"))


def test_every_shard_is_made_once_and_then_nothing(tmp_path: Path) -> None:
    stage = toy(tmp_path)
    assert not is_complete(stage, f"{tmp_path}/status")
    assert local(stage)
    assert calls(tmp_path) == list(range(12))
    assert len(Dataset.open(stage.root)) == 12 * 50
    before = folder_bytes(tmp_path / "toy")
    assert is_complete(stage, f"{tmp_path}/status")
    assert not local(stage)
    assert calls(tmp_path) == list(range(12))
    assert folder_bytes(tmp_path / "toy") == before
    status = json.loads((tmp_path / "status/toy.json").read_text())
    assert (status["state"], status["done"], status["total"]) == ("done", 12, 12)


def remove_shard(folder: Path, index: int) -> None:
    for file in folder.glob(f"{index:05d}*"):
        file.unlink()


def test_only_what_is_missing_is_made_again_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    stage = toy(tmp_path)
    local(stage)
    before = folder_bytes(tmp_path / "toy")
    remove_shard(tmp_path / "toy", 3)
    (tmp_path / "toy/00005.txt").write_text("half")
    assert not is_complete(stage, f"{tmp_path}/status")
    with pytest.raises(StageError, match=r"00005\.txt has 4 bytes where"):
        local(stage)
    assert calls(tmp_path) == sorted([*range(12), 3])
    remove_shard(tmp_path / "toy", 5)
    local(stage)
    assert calls(tmp_path) == sorted([*range(12), 3, 5])
    assert folder_bytes(tmp_path / "toy") == before


def test_a_shard_that_was_begun_is_ended_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, real = toy(tmp_path), storage.create

    def dying(url: str, data: bytes, beside: str | None = None) -> bool:
        if url.endswith("00004_stats.json"):
            raise KeyboardInterrupt
        return real(url, data, beside)

    monkeypatch.setattr(storage, "create", dying)
    with pytest.raises(KeyboardInterrupt):
        local(stage)
    monkeypatch.undo()
    assert listed(stage.root, ".txt").begun.tolist() == [4]
    local(stage)
    assert calls(tmp_path) == list(range(12))


def test_the_manifest_of_before_stands_while_a_dataset_grows(tmp_path: Path) -> None:
    local(toy(tmp_path))
    before = (tmp_path / "toy/dataset.json").read_bytes()
    with pytest.raises(StageError, match="00013"):
        local(toy(tmp_path, shards=15, misbehave=[[13, "raise"]]))
    assert (tmp_path / "toy/dataset.json").read_bytes() == before
    local(toy(tmp_path, shards=15))
    assert len(Dataset.open(f"{tmp_path}/toy")) == 750


def test_changed_settings_are_refused_by_name_and_redone_on_demand(tmp_path: Path) -> None:
    local(toy(tmp_path))
    other = toy(tmp_path, salt="pepper")
    with pytest.raises(ConfigError, match=r"settings\.salt: salt -> pepper.*--redo"):
        local(other)
    assert calls(tmp_path) == list(range(12))
    assert (tmp_path / "toy/dataset.json").exists()
    before = folder_bytes(tmp_path / "toy")
    local(other, redo=True)
    local(toy(tmp_path / "fresh", salt="pepper"))
    assert folder_bytes(tmp_path / "toy") == folder_bytes(tmp_path / "fresh/toy")
    assert folder_bytes(tmp_path / "toy.replaced-1") == before


def test_settings_may_change_as_long_as_no_shard_was_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such weights"):
        local(toy(tmp_path, start="raise"))
    local(toy(tmp_path, salt="pepper"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calls", "status", "toy"]


def test_data_that_was_made_anew_is_refused_before_any_work(tmp_path: Path) -> None:
    local(toy(tmp_path))
    remove_shard(tmp_path / "toy", 3)

    class Other(ToyStage):
        def tasks(self):  # type: ignore[no-untyped-def]
            for task in ToyStage.tasks(self):
                yield Task(task.index, "other")

    other = Other(**dataclasses.asdict(toy(tmp_path)))
    with pytest.raises(StageError, match=r"shard 00000 was made from other data"):
        local(other)
    assert calls(tmp_path) == list(range(12))


def test_a_raising_shard_is_tried_again_then_set_aside_and_named(tmp_path: Path) -> None:
    stage = toy(tmp_path, misbehave=[[4, "raise"], [9, "raise-once"]])
    with pytest.raises(StageError, match=r"1 of 12 shards failed.*\(00004\).*does not like this"):
        local(stage)
    assert calls(tmp_path) == sorted([*range(12), 4, 4, 9])
    record = json.loads((tmp_path / "status/toy-failed/00004.json").read_text())
    assert record["attempts"] == 3
    assert "Traceback" in record["traceback"]
    assert "ValueError: shard 4 does not like this" in record["traceback"]
    assert json.loads((tmp_path / "status/toy.json").read_text())["state"] == "failed"
    # Once the cause is gone the same command finishes, and the record of the failure goes.
    local(toy(tmp_path))
    assert calls(tmp_path).count(4) == 4
    assert list((tmp_path / "status/toy-failed").iterdir()) == []


def test_a_fault_of_every_shard_ends_the_run_early(tmp_path: Path) -> None:
    stage = toy(tmp_path, shards=40, misbehave=[[i, "raise"] for i in range(40)])
    with pytest.raises(StageError, match="in a row failed"):
        local(stage)
    assert len(set(calls(tmp_path))) <= 40
    assert len(list((tmp_path / "status/toy-failed").iterdir())) == FAILED_IN_A_ROW


def test_a_worker_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such weights"):
        local(toy(tmp_path, start="raise"))


def test_back_off_doubles_up_to_a_limit() -> None:
    retries = Retries(attempts=9, back_off_s=1.0, back_off_max_s=10.0)
    assert [retries.wait(n) for n in (1, 2, 3, 4, 5, 6)] == [1, 2, 4, 8, 10, 10]


def test_the_ledger_is_lazy(tmp_path: Path) -> None:
    drawn = []

    class Counted(ToyStage):
        def tasks(self):  # type: ignore[no-untyped-def]
            for task in ToyStage.tasks(self):
                drawn.append(task.index)
                yield task

    ledger = Ledger(Counted(f"{tmp_path}/toy", f"{tmp_path}/calls", shards=1000), f"{tmp_path}/status")
    drawn.clear()
    for expected in range(10):
        task = ledger.take()
        assert task is not None
        assert task.index == expected
    assert len(drawn) <= 11
    assert ledger.remaining == 1000


def test_sigterm_finishes_the_shard_in_hand_and_resumes(tmp_path: Path) -> None:
    stage = toy(tmp_path, seconds=0.2)
    threading.Timer(0.5, os.kill, (os.getpid(), 15)).start()
    with pytest.raises(Stopped, match="the same command goes on"):
        local(stage)
    made = calls(tmp_path)
    assert 0 < len(made) < 12
    assert all((tmp_path / f"toy/{i:05d}_stats.json").exists() for i in made)
    assert json.loads((tmp_path / "status/toy.json").read_text())["state"] == "stopped"
    local(toy(tmp_path))
    assert calls(tmp_path) == list(range(12))


def test_a_living_holder_refuses_a_second_job(tmp_path: Path) -> None:
    with Lease(f"{tmp_path}", "toy", "out", on_ray=False):
        with pytest.raises(StageError, match=f"process {os.getpid()} on .* is already working on out"):
            with Lease(f"{tmp_path}", "toy", "out", on_ray=False):
                pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("foreign", [True, False])
def test_the_lock_of_a_dead_holder_is_taken_over(tmp_path: Path, foreign: bool) -> None:
    dead = {"token": "x", "hostname": "h", "pid": 2**22 + 1, "process_began": 0.0, "cluster": None}
    mine = Lease(str(tmp_path), "toy", "out", on_ray=False).record["host"]
    # On another host only the age of the heartbeat tells.
    dead |= {"host": "elsewhere", "beat": time.time() - 3600} if foreign else {"host": mine, "beat": time.time()}
    (tmp_path / "toy.lock").write_text(json.dumps(dead))
    began = time.monotonic()
    with Lease(str(tmp_path), "toy", "out", on_ray=False) as lease:
        assert json.loads((tmp_path / "toy.lock").read_text())["token"] == lease.record["token"]
    assert time.monotonic() - began < 3


def test_a_fresh_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    held = {"token": "x", "host": "elsewhere", "hostname": "h", "pid": 7, "beat": time.time(), "cluster": "c"}
    (tmp_path / "toy.lock").write_text(json.dumps(held))
    with pytest.raises(StageError, match="process 7 on h"), Lease(str(tmp_path), "toy", "out", on_ray=False):
        pass


def test_the_same_bytes_on_ray_as_in_one_process(tmp_path: Path) -> None:
    local(toy(tmp_path / "here"))
    code, err = drive(tmp_path / "there", json.dumps({"workers": 2}))
    assert code == 0, err
    assert folder_bytes(tmp_path / "there/toy") == folder_bytes(tmp_path / "here/toy")
    assert calls(tmp_path / "there") == list(range(12))
    here, there = (json.loads((tmp_path / d / "toy/00007_stats.json").read_text()) for d in ("here", "there"))
    assert here.pop("made_with") != there.pop("made_with")  # each folder has an id of its own
    assert here == there  # the toy's stats hold no times
    code, err = drive(tmp_path / "there", "{}")
    assert code == 0, err
    assert "nothing to do" in err
    assert calls(tmp_path / "there") == list(range(12))
