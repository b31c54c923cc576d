"""Ranks as forks of this process: its imports are there already, and a fork can be killed like any process.

Only for the CPU: nothing may have joined a process group before the fork, and threads must be few.
"""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.train import tiny
from train import plan
from train.ranks import import_deepspeed

# A process whose first backward comes after a compilation gives autograd a thread, for a device that the compiler made
# up, and no fork of it can go backward any more: so that first one is here, before any test.
torch.ones(1, requires_grad=True).sum().backward()


@functools.cache
def warm() -> None:
    """Import once, before any fork, what every rank will need."""
    torch.set_num_threads(1)
    import_deepspeed()
    for name in (
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch.utils.tensorboard",
        "open_clip",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "train.loop",
        "train.finish",
        "train.export",
    ):
        importlib.import_module(name)
    from transformers import CLIPTextConfig, CLIPTextModel

    from train.text_export import _words

    _words()

    with tempfile.TemporaryDirectory() as folder:  # transformers makes its list of renamed weights as it first saves
        CLIPTextModel(CLIPTextConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folder)
    gc.collect()
    gc.freeze()  # or each fork would walk through, and so copy, all that is here


@functools.cache
def _reckoned() -> Path:
    """A folder of what forks have found a step to cost: most of a small fit's time goes into that."""
    shared = os.environ.get("TESTS_SHARED")  # tests/conftest.py's; benchmarks have none
    if not shared:
        shared = tempfile.mkdtemp(prefix="reckoned-")
        atexit.register(shutil.rmtree, shared, ignore_errors=True)
    folder = Path(shared) / "reckoned"
    folder.mkdir(exist_ok=True)
    return folder


def _reckon_once(run: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """plan._run, which answers from the folder where a fork has asked the same of the same model before."""

    def known(objective: torch.nn.Module, batch: dict[str, torch.Tensor], *how: Any, **ways: bool) -> Any:
        tensors = [*objective.named_parameters(), *objective.named_buffers(), *batch.items()]
        shapes = [(name, t.shape[name in batch :], t.dtype, t.requires_grad) for name, t in tensors]
        file = folder / hashlib.sha256(repr((objective, shapes, how, ways)).encode()).hexdigest()
        if not file.exists():
            found = run(objective, batch, *how, **ways)
            new = file.with_suffix(f".{os.getpid()}")  # another rank may be at the same
            new.write_bytes(pickle.dumps(found))
            new.rename(file)
        return pickle.loads(file.read_bytes())

    return known


class Fork:
    """One rank in a process of its own."""

    def __init__(
        self, rank: int, world: int, port: int, function: Callable[..., Any], arguments: Sequence[Any]
    ) -> None:
        self._result, theirs = multiprocessing.Pipe(duplex=False)
        folder = _reckoned()
        self.pid = os.fork()
        if self.pid == 0:
            plan._run = _reckon_once(plan._run, folder)
            self._child(rank, world, port, function, arguments, theirs)
        theirs.close()

    @staticmethod
    def _child(
        rank: int, world: int, port: int, function: Callable[..., Any], arguments: Sequence[Any], out: Connection
    ) -> None:
        code = 1
        try:
            torch.set_num_threads(1)
            env = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({k: str(v) for k, v in env.items()})
            out.send_bytes(pickle.dumps(("value", function(*arguments))))  # by value: this process ends now
            code = 0
        except BaseException as e:
            out.send_bytes(pickle.dumps(("error", f"{type(e).__name__}: {e}", traceback.format_exc())))
        finally:
            os._exit(code)

    def result(self) -> Any:
        """The function's value; raises RankError with what the rank raised, or that it was killed."""
        try:
            message = pickle.loads(self._result.recv_bytes())
        except EOFError:
            message = ("error", "killed", "")
        os.waitpid(self.pid, 0)
        if message[0] == "error":
            raise RankError(message[1], message[2])
        return message[1]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, or does so in this time."""
        return self._result.poll(seconds)


class RankError(Exception):
    def __init__(self, summary: str, trace: str) -> None:
        super().__init__(summary + "\n" + trace)
        self.summary = summary


def start(world: int, function: Callable[..., Any], *arguments: Any) -> list[Fork]:
    warm()
    port = tiny.free_port()
    return [Fork(rank, world, port, function, arguments) for rank in range(world)]


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on `world` ranks; the values in order of ranks."""
    forks = start(world, function, *arguments)
    values, errors = [], []
    for fork in forks:
        try:
            values.append(fork.result())
        except RankError as e:
            errors.append(e)
    if errors:
        raise errors[0]
    return values


def end_as_a_launcher(ranks: Sequence[Fork], patience: float = 20.0) -> None:
    """One rank was killed: the others end when they miss it; those that wait for one that never joined are killed."""
    until = time.monotonic() + patience
    for rank in ranks:
        if not rank.wait(max(0.0, until - time.monotonic())):
            rank.kill()


def run_stage(
    config: str, stage: str = "train", overrides: Sequence[str] = (), redo: bool = False, adopt: bool = False
) -> None:
    """train.main.run, to the exported pipeline."""
    from train.main import run

    run(stage, config, overrides, redo, adopt)


def train_stage(config: str, overrides: Sequence[str] = (), adopt: bool = False) -> None:
    """train.main.run to the last checkpoint of `train`, without the export, which takes longer than a small fit.

    In a fork alone: what it leaves out is left out there for good."""
    from train import finish
    from train.main import run

    finish.finish = lambda *_: None
    run("train", config, overrides, adopt=adopt)


def train(config: Path, world: int, *overrides: str, adopt: bool = False) -> None:
    """`train_stage` on `world` ranks to its end."""
    on_ranks(world, train_stage, str(config), overrides, adopt)


def traced(stage: Callable[..., None], *arguments: Any) -> None:
    """`stage(*arguments)`, where what is compiled is traced and run by torch's own kernels: to build others takes
    minutes, and test_zero.py has them built. In a fork alone, as above."""
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    stage(*arguments)


def fit(
    config: Path, world: int, *overrides: str, stage: str = "train", redo: bool = False, adopt: bool = False
) -> None:
    """Run a stage on `world` ranks to its end."""
    on_ranks(world, run_stage, str(config), stage, overrides, redo, adopt)


def wait_for(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    """Wait until a condition holds; fails after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)
