"""Trackers: the same numbers as in the log, one run over every restart, no step twice, and no harm from any of them."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError

from shards.settings import ConfigError
from tests.train import forked, tiny
from train import journal, trackers
from train.config import TrainConfig
from train.trackers import Trackers

ALL = ("tensorboard", "wandb", "mlflow")


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """wandb offline, and MLflow in files."""
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return tmp_path


def made(folder: Path, names: tuple[Any, ...], images: int | None) -> Trackers:
    settings = {"learning_rate": 1e-4, "unet": {"layers_per_block": 1}, "compile": None}
    return Trackers(names, folder, str(folder / "trackers.json"), images, "/data/runs/mine", "train", settings)


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def records(log: bytes) -> Iterator[bytes]:
    """What a log in LevelDB's format holds: blocks of 32 KiB, in which a piece has a sum, a length and a kind (whole,
    first, middle, last), behind the seven bytes that wandb begins its files with."""
    assert log.startswith(b":W&B")
    at, whole = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def in_wandb(folder: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """(ids of runs, lines) of all offline runs under a folder, as `wandb sync` would send them."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, lines = set(), []
    for file in sorted(folder.rglob("run-*.wandb")):
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            if record.history.item:
                lines.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return ids, lines


def in_mlflow(name: str) -> tuple[list[Any], list[tuple[int, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("carrara")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    points = [(m.step, m.value) for r in runs for m in client.get_metric_history(r.info.run_id, name)]
    return runs, sorted(points)


def test_a_training_that_goes_on_does_so_in_the_same_runs(services: Path) -> None:
    """Killed at 32 images with a checkpoint at 16: what lies between is told again by the training, and once in all."""
    grid = np.zeros((8, 8, 3), np.uint8)
    for begin, sent in ((0, (8, 16, 24, 32)), (16, (24, 32, 40))):
        found = made(services, ALL, begin)
        for images in sent:
            found.scalars("line", images, {"loss": 1 / images, "mfu": float("nan"), "skipped": 0, "note": "x"})
        found.scalars("validation", sent[-1], {"validation/loss": 0.5})  # a series of its own, at the same images
        found.image("samples", sent[-1], grid)
        found.close()
    expected = [(i, 1 / i) for i in (8, 16, 24, 32, 40)]
    board = in_tensorboard(services)
    assert [i for i, _ in board["loss"]] == [i for i, _ in expected]
    assert [i for i, _ in board["validation/loss"]] == [40]  # that at 32 lay beyond the checkpoint
    assert "mfu" not in board
    ids, lines = in_wandb(services)
    state = json.loads((services / "trackers.json").read_text())
    assert ids == {state["wandb"]["id"]}
    assert sorted((x["images"], x["loss"]) for x in lines if "loss" in x) == expected
    assert sorted(x["images"] for x in lines if "validation/loss" in x) == [32, 40]
    assert sorted(x["images"] for x in lines if any(k.startswith("samples") for k in x)) == [32, 40]
    [run], points = in_mlflow("loss")
    assert points == expected
    assert run.data.params == {"learning_rate": "0.0001", "unet.layers_per_block": "1"}
    assert run.info.status == "FINISHED"
    assert run.data.tags["carrara.run"] == "mine"
    assert len(list((services / "mlruns").rglob("*.png"))) == 2


def test_a_point_that_was_being_sent_when_the_process_died_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    class Dies:
        def __init__(self, *_: Any) -> None: ...

        def scalars(self, images: int, values: Any) -> None:
            sent.append(images)
            if len(sent) == 2:
                raise SystemExit("killed here")

        def image(self, *_: Any) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(trackers._MAKERS, "wandb", Dies)
    for points in ((8, 16), (8, 16, 24)):
        found = made(tmp_path, ("wandb",), 0)
        for images in points:
            found.scalars("line", images, {"loss": 1.0})
        found.close()
    assert sent == [8, 16, 24]


def test_a_tracker_that_fails_or_hangs_is_one_warning_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise ConnectionError("no such service")

    def hangs(*_: Any) -> Any:
        time.sleep(30)

    monkeypatch.setitem(trackers._MAKERS, "wandb", fails)
    monkeypatch.setitem(trackers._MAKERS, "mlflow", hangs)
    monkeypatch.setattr(trackers, "CLOSE_S", 1.0)
    monkeypatch.setattr(trackers, "WAITING", 50)
    began = time.monotonic()
    found = made(tmp_path, ALL, 0)
    for images in range(1, 41):
        found.scalars("line", images, {"loss": 1.0})
    found.close()
    assert time.monotonic() - began < 10
    assert len(in_tensorboard(tmp_path)["loss"]) == 40
    warned = Counter(m.split(" is not")[0] for m in caplog.messages)
    assert warned == {"the tracker wandb": 1, "the tracker mlflow": 1}
    assert "ConnectionError: no such service" in caplog.text


def test_a_tracker_that_does_not_keep_up_is_still_told_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go = threading.Event(), threading.Event()
    did: list[Any] = []

    class Slow:
        def __init__(self, *_: Any) -> None: ...

        def scalars(self, images: int, values: Any) -> None:
            begun.set()
            go.wait(20)
            did.append(images)

        def close(self) -> None:
            did.append("closed")

    monkeypatch.setitem(trackers._MAKERS, "wandb", Slow)
    monkeypatch.setattr(trackers, "WAITING", 5)
    monkeypatch.setattr(trackers, "CLOSE_S", 5.0)
    found = made(tmp_path, ("wandb",), 0)
    found.scalars("line", 1, {"loss": 1.0})
    assert begun.wait(20)
    for images in range(2, 20):
        found.scalars("line", images, {"loss": 1.0})
    threading.Timer(0.5, go.set).start()
    found.close()
    assert did == [1, 2, 3, 4, 5, 6, "closed"]
    assert [m for m in caplog.messages if "tracker" in m] == [
        "the tracker wandb is not told everything: it does not keep up, and points are left out"
    ]


def test_what_was_given_up_is_not_told_behind_the_back_of_who_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    did: list[int] = []

    class Slow:
        def __init__(self, *_: Any) -> None: ...

        def scalars(self, images: int, values: Any) -> None:
            begun.set()
            go.wait(20)
            did.append(images)

        def close(self) -> None: ...

    monkeypatch.setitem(trackers._MAKERS, "wandb", Slow)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    found = made(tmp_path, ("wandb",), 0)
    for images in (1, 2, 3):
        found.scalars("line", images, {"loss": 1.0})
    assert begun.wait(20)
    found.close()
    again = made(tmp_path, ("wandb",), 0)
    go.set()
    for images in (2, 3):
        again.scalars("line", images, {"loss": 1.0})
    for told in (found, again):
        told._threads[0]._thread.join(0.5)
    again.close()
    assert sorted(did) == [1, 2, 3]


def test_what_a_tracker_lacks_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    trackers.check(("tensorboard",), "train.trackers")
    with pytest.raises(ConfigError, match=r"train\.trackers names mlflow; set MLFLOW_TRACKING_URI"):
        trackers.check(("mlflow",), "train.trackers")
    with pytest.raises(ConfigError, match=r"clip\.trackers names wandb; set WANDB_API_KEY"):
        trackers.check(("wandb",), "clip.trackers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check(("wandb",), "clip.trackers")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'carrara\[trackers\]'"):
        trackers.check(("wandb",), "clip.trackers")


@pytest.mark.slow
def test_a_fit_tells_them_what_its_log_says(run: Path, services: Path) -> None:
    """On two ranks, of which the first alone tells."""
    config = tiny.write_config(run, tiny.configuration(run, trackers=list(ALL), checkpoint_every_images=16))
    forked.fit(config, 2)
    lines = [json.loads(x) for x in (run / "train" / "log.jsonl").read_text().splitlines()]
    expected = [(x["images"], x["loss"]) for x in lines]
    assert [i for i, _ in in_tensorboard(run / "train")["loss"]] == [i for i, _ in expected]
    assert any(tag.startswith("loss_by_timestep/") for tag in in_tensorboard(run / "train"))
    _, sent = in_wandb(run)
    assert sorted((x["images"], x["loss"]) for x in sent if "loss" in x) == expected
    [found], points = in_mlflow("loss")
    assert points == expected
    assert found.data.params["batch_size"] == "8"


def test_a_full_disk_takes_one_line_of_the_log_and_not_the_next(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    journal._append(file, {"images": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            journal._append(file, {"images": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal._append(file, {"images": 3})
    assert [json.loads(x)["images"] for x in file.read_text().splitlines()] == [1, 3]


def test_a_full_disk_takes_points_of_tensorboard_and_not_those_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """One warning, and once there is room again it is told what comes then; the file stays readable, and one."""
    found = made(tmp_path, ("tensorboard",), 0)
    found.scalars("line", 8, {"loss": 1.0})
    forked.wait_for(lambda: len(list((tmp_path / "tensorboard").glob("*"))) == 1)
    found.image("samples", 8, np.zeros((4, 4, 3), np.uint8))
    (file,) = (tmp_path / "tensorboard").glob("*")
    forked.wait_for(lambda: b"samples" in file.read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, hard))
    try:
        for images in (16, 24, 32):
            found.scalars("line", images, {"loss": 2.0})
        forked.wait_for(lambda: not found._threads[0]._todo.qsize() and caplog.messages)
        time.sleep(0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found.scalars("line", 40, {"loss": 3.0})
    found.close()
    assert in_tensorboard(tmp_path)["loss"] == [(8, 1.0), (40, 3.0)]
    assert list((tmp_path / "tensorboard").glob("*")) == [file]
    assert [m.split(":")[0] for m in caplog.messages] == ["the tracker tensorboard is not told everything"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_store_that_is_away_at_the_end_ends_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What botocore raises where nothing answers is no OSError."""
    config = TrainConfig(images=100, batch_size=10, trackers=())
    job: Any = types.SimpleNamespace(
        logs=f"memory://{tmp_path.name}/train",
        status_url=str(tmp_path / "status" / "train.json"),
        stage="train",
        seed=0,
        config=config,
        tell=None,
    )
    writer = journal._Writer(job, 0)
    monkeypatch.setattr(journal, "MIRROR_EVERY_S", 1e9)
    writer._mirrored = time.monotonic()
    writer.line({"images": 10, "loss": 0.5, "lr": 1e-4, "samples_per_s": 3.0})

    def away(*_: Any) -> None:
        raise EndpointConnectionError(endpoint_url="http://store")

    monkeypatch.setattr(journal.storage, "write_atomic", away)
    writer.close("done")
    assert f"the log of the training is left in {writer.folder}" in caplog.text
    assert (writer.folder / "log.jsonl").read_text().count("\n") == 1
    shutil.rmtree(writer.folder)


def test_whoever_listens_hears_every_line_and_how_long_checkpoints_take(tmp_path: Path) -> None:
    """What the metrics of a run on Ray are made from; a listener that fails ends nothing."""
    sent: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        sent.append(line)
        raise OSError("no Ray any more")

    config = TrainConfig(images=100, batch_size=10, trackers=())
    job: Any = types.SimpleNamespace(
        logs=str(tmp_path / "train"),
        status_url=str(tmp_path / "status" / "train.json"),
        stage="train",
        seed=0,
        config=config,
        tell=tell,
    )
    writer = journal._Writer(job, 0)
    for images in (10, 20):
        writer.line({"images": images, "loss": 0.5, "lr": 1e-4, "samples_per_s": 3.0})
    writer.figures(20, {"checkpoint/seconds": 1.5})
    writer.close("done")
    assert [x.get("images") for x in sent] == [10, 20, None]
    assert sent[2] == {"checkpoint/seconds": 1.5}
    assert len((tmp_path / "train" / "log.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "status" / "train.json").read_text())["state"] == "done"
