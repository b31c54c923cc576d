"""The engine in one process: what is made, what is skipped, what is set aside; and the same bytes on Ray."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from pathlib import Path

import pytest

from orchestration import engine as engine_module
from orchestration.config import Pool, RayConfig
from orchestration.engine import is_complete, run
from orchestration.ledger import FAILED_IN_A_ROW, Ledger, Retries
from orchestration.stopping import Stopped
from shards import progress as progress_module
from shards import stage as stage_module
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
        def tasks(self):
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
        def tasks(self):
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


def test_the_same_bytes_on_ray_as_in_one_process(tmp_path: Path) -> None:
    local(toy(tmp_path / "here"))
    code, err = drive(tmp_path / "there", json.dumps({"workers": 2}))
    assert code == 0, err
    assert folder_bytes(tmp_path / "there/toy") == folder_bytes(tmp_path / "here/toy")
    assert calls(tmp_path / "there") == list(range(12))
    here, there = (json.loads((tmp_path / d / "toy/00007_stats.json").read_text()) for d in ("here", "there"))
    assert here.pop("made_with") != there.pop("made_with")  # each folder has an id of its own
    assert here.pop("made_by")["pid"] != there.pop("made_by")["pid"]
    assert here == there  # the toy's own stats hold no times
    code, err = drive(tmp_path / "there", "{}")
    assert code == 0, err
    assert "nothing to do" in err
    assert calls(tmp_path / "there") == list(range(12))


def test_trouble_of_this_machine_is_not_the_shards_and_ends_the_run_where_it_stays(tmp_path: Path) -> None:
    assert local(toy(tmp_path / "once", misbehave=[[4, "trouble-once"]]))
    assert calls(tmp_path / "once") == sorted([*range(12), 4])
    with pytest.raises(StageError, match="no name can be looked up here"):
        local(toy(tmp_path / "stays", misbehave=[[i, "trouble"] for i in range(12)]))
    assert not (tmp_path / "stays/status/toy-failed").exists(), "no shard is blamed"
    assert local(toy(tmp_path / "stays"))


def test_a_full_disk_is_no_shards_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = QUICK.model_copy(update={"attempts": 1})
    assert run(toy(tmp_path, misbehave=[[4, "full-once"]]), f"{tmp_path}/status", once, Pool(), local=True)
    assert calls(tmp_path) == sorted([*range(12), 4])
    assert "/there: no room" in caplog.text


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = storage.write_atomic, []

    def stale(url: str, data: bytes) -> None:
        if url.endswith("toy.json"):
            refused.append(url)
            raise OSError(errno.ESTALE, "Stale file handle")
        real(url, data)

    monkeypatch.setattr(storage, "write_atomic", stale)
    assert local(toy(tmp_path, seconds=0.1))
    assert refused
    assert len(Dataset.open(f"{tmp_path}/toy")) == 600


def test_a_traceback_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.write_atomic

    def refuse(url: str, data: bytes) -> None:
        if "toy-failed" in url:
            raise OSError(errno.EIO, "Input/output error")
        real(url, data)

    monkeypatch.setattr(storage, "write_atomic", refuse)
    with pytest.raises(StageError, match="1 of 12 shards failed"):
        local(toy(tmp_path, misbehave=[[4, "raise"]]))
    assert len(list((tmp_path / "toy").glob("*_stats.json"))) == 11


def test_the_driver_asks_the_store_nothing_for_a_committed_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 500 shards a second one request each, 30 ms long, would take fifteen times as long as there is."""
    ledger = Ledger(toy(tmp_path, shards=50), f"{tmp_path}/status")
    asked: list[str] = []
    for name in (
        "exists",
        "size",
        "stamp",
        "read_bytes",
        "read_json",
        "create",
        "write_atomic",
        "remove",
        "list_names",
    ):
        monkeypatch.setattr(storage, name, lambda *a, name=name: asked.append(name))
    for _ in range(50):
        task = ledger.take()
        assert task is not None
        ledger.done(task)
    assert asked == []
    assert ledger.remaining == 0


def test_a_commit_that_fails_is_tried_again_without_making_the_shard_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "PERSIST_PAUSES_S", (0.0, 0.0))
    tries: list[int] = []

    def commit() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EIO, "a hiccup")
        return "committed"

    assert stage_module.persist(commit) == "committed"
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(stage_module, "PERSIST_PAUSES_S", ())
    with pytest.raises(OSError, match="a hiccup"):
        stage_module.persist(commit)


def test_planning_and_finishing_have_a_state_and_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    class Recorded(progress_module.Progress):
        def begin(self, state: str, total: int = 0, unit: str | None = None, done: int = 0) -> None:
            super().begin(state, total, unit, done)
            seen.append((state, total))

    monkeypatch.setattr(engine_module, "Progress", Recorded)
    local(toy(tmp_path))
    assert seen == [("planning", 0), ("running", 12), ("finishing", 12)]
