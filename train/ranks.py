"""Joining the other ranks, whoever started them: the deepspeed launcher, torchrun, Ray's actors, or nobody.

The launcher's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) is all that is read;
a process group that exists already is used as it is; without either this is a run of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shards import storage
from shards.settings import ConfigError, StageError

V = TypeVar("V")
TIMEOUT = datetime.timedelta(minutes=30)


class Stopped(Exception):
    """SIGTERM was obeyed: a checkpoint is written, and the same command goes on from it."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the ranks. owned: whether the process group is ours to take down."""

    rank: int
    world: int
    device: torch.device
    owned: bool

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all ranks."""
        if self.world == 1:
            return values
        dist.all_reduce(values)
        return values / self.world

    def gather(self, value: Any) -> list[Any]:
        """One object of each rank, in order of ranks."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's object, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def found_by_first(self, find: Callable[[], V]) -> V:
        """What rank 0 finds, on all ranks; an error that says what to change is raised on all of them alike."""
        found: V | Exception | None = None
        if self.first:
            try:
                found = find()
            except (ConfigError, StageError) as e:
                found = e
        value: V | Exception = self.from_first(found)
        if isinstance(value, Exception):
            raise value
        return value

    def leave(self) -> None:
        """Take the process group down, if it is ours."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()


def join(threads: int | None) -> Ranks:
    """Join the process group and choose this rank's device and number of CPU threads."""
    cuda = torch.cuda.is_available()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    local = int(os.environ["LOCAL_RANK"])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // max(beside, 1)))
    device = torch.device("cpu")
    if cuda:
        # A launcher may show each rank all GPUs or its own alone.
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, owned)


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without anything that it would have to compile first."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its autotuner, which is not used here, imports MLflow where that is installed: 4 s in every rank.
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
        import deepspeed.ops
    finally:
        if hidden:
            del sys.modules["mlflow"]

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU it would build its shared-memory collectives with ninja and a compiler. A fresh machine has
    # neither, and sums would differ in the last bits between machines that have them and those that do not.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Sigterm:
    """Context that turns SIGTERM into `asked`, so that the loop can save and end.

    Signals reach the main thread alone; in another one nothing is caught.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Sigterm:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


class Alarm:
    """Context that ends this process where a step takes longer than `seconds`, and says where every thread stands.

    A rank that hangs makes all others wait for it, so all say where they stand and end, and whoever started them goes
    on from the last checkpoint. The stacks go to stderr and, where `logs` lies on a disk, to `<logs>/stacks/`.
    """

    BACKSTOP_S = (
        60.0  # after this long Python's own thread did not get to it: faulthandler's, which needs no lock, does
    )

    def __init__(self, seconds: float, logs: str, ranks: Ranks) -> None:
        self.seconds, self.logs, self.rank = seconds, logs, ranks.rank
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alarm", daemon=True)

    def __enter__(self) -> Alarm:
        self.again()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def again(self) -> None:
        """A step begins."""
        self._since = time.monotonic()
        with contextlib.suppress(ValueError, OSError):  # stderr may be no file
            faulthandler.dump_traceback_later(self.seconds + self.BACKSTOP_S, exit=True)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                with contextlib.suppress(Exception):
                    self._tell()
                os._exit(1)

    def _tell(self) -> None:
        text = f"carrara: rank {self.rank}: a step took longer than hang_s ({self.seconds:g} s), so this rank ends"
        if storage.is_local(self.logs):
            file = storage.local_path(self.logs) / "stacks" / f"rank-{self.rank:05d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w", encoding="utf-8") as f:
                faulthandler.dump_traceback(f, all_threads=True)
            text += f"; where each thread stood is in {file}"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
