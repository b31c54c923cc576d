"""Copies of what the journal and the evaluation tell, for the tools that people watch their runs in.

    train:
      trackers: [tensorboard, wandb, mlflow]     # tensorboard is the default; the others are the extra `trackers`

log.jsonl, events.jsonl and the evaluation's metrics.json are what counts; a tracker is a copy. Each has a thread of its
own, so that a service that hangs or fails delays nothing and ends nothing: that is one warning. What the services are
told about themselves is their own environment variables: WANDB_MODE, WANDB_API_KEY, WANDB_PROJECT; MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME.

A training that goes on does so in the same run of a tracker: the run's name there, and up to where each series was
told, is kept in `trackers.json`. That is written before a point is sent, so that after a kill a point may be missing
from a copy and none is there twice. The steps are images seen.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import logging
import math
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from shards import storage
from shards.settings import ConfigError

log = logging.getLogger("carrara.train")

Name = Literal["tensorboard", "wandb", "mlflow"]
WAITING = 10_000  # points on their way to one tracker; further ones are dropped, with a warning
CLOSE_S = 60.0  # how long the end of a training waits for a tracker
STATE = "trackers.json"


class Tracker(Protocol):
    """One tool. Its methods are called in one thread, in order."""

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, at so many images."""

    def image(self, images: int, name: str, pixels: np.ndarray) -> None:
        """An image, uint8 [H,W,3]."""

    def close(self) -> None:
        """Send what is left."""


def check(names: Sequence[Name], field: str) -> None:
    """Raise ConfigError where a tracker cannot be used here: its package is not installed, or it is not told where to
    write. field: the setting that names them."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"{field} names {name}, which is not installed; pip install 'carrara[trackers]'")
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(f"{field} names mlflow; set MLFLOW_TRACKING_URI to the server's URL")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        key = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()
        if not key:  # wandb would ask on the terminal, and wait
            raise ConfigError(f"{field} names wandb; set WANDB_API_KEY, or WANDB_MODE=offline")


class Trackers:
    """All trackers of one fit or evaluation; nothing here waits or raises.

    folder: local, for what a tracker keeps in files. state: URL of the file that is kept between runs. images: where
    this training begins; None: points come in any order. run, part: how it is called there. settings: noted once, as
    dotted names.
    """

    def __init__(
        self,
        names: Sequence[Name],
        folder: Path,
        state: str,
        images: int | None,
        run: str,
        part: str,
        settings: Mapping[str, Any],
    ) -> None:
        self._threads = []
        for name in dict.fromkeys(names):
            make = _MAKERS[name]
            # TensorBoard drops what lies beyond the beginning by itself, and is to be told it again.
            sent = None if name == "tensorboard" and images is not None else _Sent(state, name)
            about = _About(folder, images, run.rstrip("/").rsplit("/", 1)[-1], part, flat(settings))
            self._threads.append(_Thread(name, make, about, sent))

    def scalars(self, series: str, images: int, values: Mapping[str, Any]) -> None:
        """The finite numbers among `values`. series: a kind of lines; each line of it has another number of images."""
        finite = {k: float(v) for k, v in values.items() if _is_number(v)}
        if finite:
            for thread in self._threads:
                thread.put(series, images, lambda tracker: tracker.scalars(images, finite))

    def image(self, name: str, images: int, pixels: np.ndarray, series: str | None = None) -> None:
        """An image, uint8 [H,W,3]. series: `name`, unless such images come in any order."""
        for thread in self._threads:
            thread.put(series or name, images, lambda tracker: tracker.image(images, name, pixels))

    def close(self) -> None:
        """Send what is left, for at most a minute."""
        for thread in self._threads:
            thread.end()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.wait(deadline - time.monotonic())


class _Thread:
    """One tracker and its thread. sent: up to where it was told of each series, where that is kept."""

    def __init__(self, name: str, make: Callable[[_About, str], Tracker], about: _About, sent: _Sent | None) -> None:
        self.name, self._make, self._about, self._sent = name, make, about, sent
        self._todo: queue.SimpleQueue[tuple[str, int, Callable[[Tracker], None]] | None] = queue.SimpleQueue()
        self._failed = self._given_up = False
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, series: str, images: int, send: Callable[[Tracker], None]) -> None:
        if self._todo.qsize() >= WAITING:
            self._warn("it does not keep up, and points are left out")
        else:
            self._todo.put((series, images, send))

    def end(self) -> None:
        self._todo.put(None)  # also where it is full: what waits is sent, and the tool is told that this is the end

    def wait(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._given_up = True  # else what goes on in its run would be told beside it
            self._warn(f"what it was still to be told is given up after {CLOSE_S:.0f} s")

    def _run(self) -> None:
        tracker: Tracker | None = None
        while (work := self._todo.get()) is not None:
            if self._given_up:
                return
            series, images, send = work
            try:
                tracker = tracker or self._make(self._about, self._sent.id if self._sent else "")
                if self._sent is None or self._sent.advance(series, images):
                    send(tracker)
            except (Exception, SystemExit) as e:  # whatever a client library may raise: it is a copy
                self._warn(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        try:
            if tracker is not None:
                tracker.close()
        except (Exception, SystemExit) as e:
            self._warn(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")

    def _warn(self, why: str) -> None:
        if not self._failed:
            log.warning("the tracker %s is not told everything: %s", self.name, why)
        self._failed = True


class _Sent:
    """What is kept of one tracker: the name of its run, and how far each series was told. Read when it is needed, in
    the tracker's own thread; several trackers share the file."""

    _lock = threading.Lock()

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self._mine: dict[str, Any] | None = None

    def _read(self) -> dict[str, Any]:
        try:
            found = storage.read_json(self.url)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _load(self) -> dict[str, Any]:
        if self._mine is None:
            mine = self._read().get(self.name)
            self._mine = mine if isinstance(mine, dict) and {"id", "told"} <= mine.keys() else {}
            if not self._mine:
                self._mine = {"id": secrets.token_hex(6), "told": {}}
                self._write()
        return self._mine

    @property
    def id(self) -> str:
        """The name of the tracker's run, the same as long as the file is there."""
        with self._lock:
            return str(self._load()["id"])

    def advance(self, series: str, images: int) -> bool:
        """Whether this point is a new one; if so, it counts as told from now on."""
        with self._lock:
            sent = self._load()["told"]
            if images <= sent.get(series, -1):
                return False
            sent[series] = images
            self._write()
            return True

    def _write(self) -> None:
        storage.write_json(self.url, {**self._read(), self.name: self._mine})


class _About:
    """What a tracker is made with."""

    def __init__(self, folder: Path, images: int | None, run: str, part: str, settings: dict[str, str]) -> None:
        self.folder, self.images, self.run, self.part, self.settings = folder, images, run, part, settings


# ---- the tools -------------------------------------------------------------------------------------


class _TensorBoard:
    """Event files in `<folder>/tensorboard`; a resumed run drops there what lies beyond its checkpoint.

    Written here record by record: the writers of TensorBoard and torch end with the first error of a disk, for good.
    """

    def __init__(self, about: _About, _id: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._event = Event
        self._head = [Event(file_version="brain.Event:2")]
        if about.images is not None:
            # What is dropped is at this step and beyond, and the checkpoint's own was told before it was saved.
            self._head.append(Event(step=about.images + 1, session_log=SessionLog(status=SessionLog.START)))
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = about.folder / "tensorboard" / f"events.out.tfevents.{name}"

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._put(images, [scalar(name, value) for name, value in values.items()])

    def image(self, images: int, name: str, pixels: np.ndarray) -> None:
        from torch.utils.tensorboard.summary import image

        self._put(images, [image(name, pixels, dataformats="HWC")])

    def _put(self, images: int, summaries: Sequence[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._file.parent.mkdir(parents=True, exist_ok=True)
        begun = self._file.exists() and self._file.stat().st_size > 0
        records = io.BytesIO()
        for event in (*(() if begun else self._head), *(self._event(step=images, summary=s) for s in summaries)):
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        append_whole(self._file, records.getvalue())

    def close(self) -> None:
        pass


class _Wandb:
    """One run of Weights & Biases; its own step is not used, since it only goes up: `images` is the axis."""

    def __init__(self, about: _About, id_: str) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "carrara"),
            id=id_,
            resume="allow",
            name=f"{about.run} {about.part}",
            group=about.run,
            job_type=about.part,
            config=about.settings,
            dir=os.environ.get("WANDB_DIR", str(about.folder)),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        self._run.log({"images": images, **values})

    def image(self, images: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({"images": images, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """One run of MLflow, known by a tag of ours, since MLflow itself gives the ids."""

    TAG = "carrara.id"

    def __init__(self, about: _About, id_: str) -> None:
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "carrara")
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([where], f"tags.`{self.TAG}` = '{id_}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self._client.set_terminated(self.id, "RUNNING")
            return
        tags = {self.TAG: id_, "carrara.run": about.run, "carrara.part": about.part}
        self.id = self._client.create_run(where, tags=tags, run_name=f"{about.run} {about.part}").info.run_id
        settings = [Param(k, v[:500]) for k, v in about.settings.items()]
        for start in range(0, len(settings), 100):  # the most that one request may have
            self._client.log_batch(self.id, params=settings[start : start + 100])

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(k, v, now, images) for k, v in values.items()])

    def image(self, images: int, name: str, pixels: np.ndarray) -> None:
        from PIL import Image

        self._client.log_image(self.id, Image.fromarray(pixels), f"{name.replace('/', '_')}/{images:012d}.png")

    def close(self) -> None:
        self._client.set_terminated(self.id, "FINISHED")


_MAKERS: dict[Name, Callable[[_About, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def append_whole(file: Path, data: bytes) -> None:
    """Append to a file, all or nothing: on a full disk, half a record would take the next one with it."""
    with open(file, "ab", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        try:
            if f.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        except OSError:
            with contextlib.suppress(OSError):
                f.truncate(size)
            raise


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and texts, without what was left unset."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif value is not None:
            found[name] = str(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
