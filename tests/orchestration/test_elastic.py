"""Ranks that go and come back: what the driver does about it, with a gang that is told what it sees."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration import gang as gangs
from orchestration import trainer
from orchestration.config import Ranks as RanksConfig
from orchestration.config import RayConfig
from orchestration.lease import process_began
from orchestration.stopping import Stopped
from train.fit_config import FitConfig


class FakeGang:
    """Runs until it is signalled, or for ten ticks."""

    made: list[FakeGang]
    waited: list[tuple[int, float]]
    draining = False
    room = 8

    def __init__(self, stage: str, count: int, ranks: Any, patience_s: float, check: Any) -> None:
        self.count, self.check, self.began = count, check, 0.0
        FakeGang.waited.append((count, patience_s))
        self.processes: list[Any] = [SimpleNamespace(address="10.0.0.1", pid=1)]
        self.signals: list[int] = []

    def __enter__(self) -> FakeGang:
        if self.count > self.room:
            raise gangs.NoRoom("no room")
        FakeGang.made.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, work: Any, argument: Any) -> list[str | None]:
        for _ in range(10):
            self.check()
            if self.signals:
                return ["train: stopped by SIGTERM"] * self.count
        return [None] * self.count

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def leaving(self) -> str:
        return "the node 10.0.0.1 of its ranks is about to go" if self.draining else ""

    def room_for(self, more: int) -> str:
        return f"there is room for {more} ranks more" if 0 < more <= FakeGang.room - self.count else ""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(gangs, "Gang", FakeGang)
    monkeypatch.setattr(trainer, "LOOK_EVERY_S", -1.0)
    monkeypatch.setattr(FakeGang, "made", [], raising=False)
    monkeypatch.setattr(FakeGang, "waited", [], raising=False)
    monkeypatch.setattr(FakeGang, "draining", False)
    monkeypatch.setattr(FakeGang, "room", 8)
    flag = SimpleNamespace(set=False)
    return SimpleNamespace(is_set=lambda: flag.set, flag=flag, run=str(tmp_path))


def once(asked: Any) -> bool:
    fit = FitConfig(images=1000, batch_size=64, ranks=8)
    lease = SimpleNamespace(check=lambda: None)
    request = {"sections": {"run": asked.run}}
    return trainer._fit_once("train", request, fit, RanksConfig(min_ranks=2), RayConfig(), asked, lease)


def test_a_node_that_is_about_to_go_saves_first_and_the_rest_goes_on(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGang, "draining", True)
    assert once(asked) is False
    (gang,) = FakeGang.made
    assert (gang.count, gang.signals) == (8, [signal.SIGTERM]), "asked once, however often it is looked"
    monkeypatch.setattr(FakeGang, "draining", False)
    monkeypatch.setattr(FakeGang, "room", 4)
    assert once(asked) is True
    assert FakeGang.made[-1].count == 4


def test_room_for_all_is_waited_for_once_and_not_for_each_smaller_number(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGang, "room", 2)
    assert once(asked) is True
    assert FakeGang.waited == [(8, 60.0), (4, 5.0), (2, 600.0)]


@pytest.mark.parametrize(("few", "more"), [(4, 8), (2, 4)])  # all of them, and some
def test_it_grows_again_when_ranks_come_back(asked: Any, monkeypatch: pytest.MonkeyPatch, few: int, more: int) -> None:
    monkeypatch.setattr(FakeGang, "room", few)
    run = FakeGang.run

    def come_back(self: FakeGang, work: Any, argument: Any) -> list[str | None]:
        FakeGang.room = more
        return run(self, work, argument)

    monkeypatch.setattr(FakeGang, "run", come_back)
    monkeypatch.setattr(trainer, "GROW_AFTER_S", -1.0)
    assert once(asked) is False
    assert once(asked) is True
    assert [g.count for g in FakeGang.made] == [few, more]
    assert FakeGang.made[0].signals == [signal.SIGTERM]


def test_ranks_are_left_alone_for_a_while_and_a_request_to_stop_is_one(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGang, "room", 4)
    monkeypatch.setattr(FakeGang, "began", float("inf"), raising=False)
    monkeypatch.setattr(trainer, "GROW_AFTER_S", 1e12)
    assert once(asked) is True
    asked.flag.set = True
    with pytest.raises(Stopped):
        once(asked)


def deaf(request: dict[str, Any]) -> None:
    """A fit that does not come so far as to obey."""
    Path(request["sections"]).touch()
    time.sleep(100)


def test_a_request_to_stop_reaches_the_fit_of_this_process_and_no_other_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    monkeypatch.setattr(trainer, "_rank", deaf)
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,), daemon=True)
    other.start()

    def ask() -> None:
        while not there.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    sections: Any = SimpleNamespace(model_dump=lambda: str(there))
    with pytest.raises(Stopped, match="train: stopped on request"):
        trainer._without_ray("train", sections, redo=False, adopt=False)
    assert other.is_alive()
    other.kill()
    other.join()


def test_a_signal_is_sent_to_the_process_that_was_meant_not_to_one_with_its_number() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        began = process_began(process.pid)
        assert began is not None
        gangs._send(process.pid, began - 1, signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        gangs._send(process.pid, began, signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    gangs._send(process.pid, began, signal.SIGTERM)  # it has gone
