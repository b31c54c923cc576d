"""One run's whole configuration: every stage's section, and how Ray is used; checked before any work.

    run: runs/mine               # the folder (or fsspec URL) that everything of the run is written to
    seed: 0
    ray:
      latents: {workers: 8, num_gpus: 1, num_cpus: 4}
    ingest: {table: ...}         # each section is the model in that stage's own config.py
    autoencoder: {...}
    clip: {...}
    curate: {...}                # scores, captions and control images, where there are any
    latents: {...}
    train: {...}
    eval: {...}
    notify: {command: [...]}     # whom to notify of the end, a failure, an alarm (orchestration/notify.py)

The file is the one given with --config, else $CARRARA_CONFIG, else ./carrara.yaml. Relative paths in it
are meant from where the user stands, which in a Ray job is not the current folder: see `base_folder`.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from typing import Annotated, Literal

import psutil
import pydantic
from pydantic import Field

from curate.config import CurateConfig
from eval.config import EvalConfig
from ingest.config import IngestConfig
from latents.config import LatentsConfig
from orchestration.ledger import Retries
from orchestration.notify import NotifyConfig
from shards import storage
from shards.layout import RunPaths
from shards.settings import ConfigError, Strict, absolute, apply_overrides, load_yaml, resolved, validate
from train.config import TrainConfig
from train.encoder_config import AutoencoderConfig, ClipConfig

log = logging.getLogger("carrara")

JOB_PACKAGE = "_ray_pkg_"  # what Ray calls the temporary copy of a job's --working-dir


class Span(Strict):
    """From how many workers to how many."""

    min: int = Field(default=0, ge=0, description="so many are asked for, also where there is no room yet")
    max: int = Field(ge=1)

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Span:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min must not be more than max")
        return self


class Pool(Strict):
    """The workers of one stage, and what each claims of the cluster."""

    workers: Annotated[int, Field(ge=1)] | Span | None = Field(
        default=None,
        description="a number; null: as many as the cluster has room for, or its autoscaler may make room for; "
        "{min, max}: the same between these",
    )
    placement: Literal["PACK", "SPREAD"] = Field(
        default="PACK", description="SPREAD: over as many nodes as possible, for what the network limits"
    )
    memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="memory a worker claims; null: a quarter more than the most that one was seen to use",
    )
    deadline_s: float | None = Field(
        default=21_600.0, gt=0, description="a worker that is at one shard for longer is ended; null: no such limit"
    )
    deadline_factor: float | None = Field(
        default=20.0,
        gt=1,
        description="the same after so many times what 95 of 100 shards took, once 20 are done; null: no limit",
    )
    start_deadline_s: float = Field(default=1_800.0, gt=0, description="how long a worker may take to start")
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float | None = Field(default=None, ge=0, description="null: one where the cluster has any, else none")
    resources: dict[str, float] = Field(default={}, description="Ray's custom resources, e.g. {fast_disk: 1}")

    @property
    def most_workers(self) -> int | None:
        """The number of workers, or the most there may be; None where the cluster decides."""
        return self.workers.max if isinstance(self.workers, Span) else self.workers

    @property
    def threads(self) -> int:
        """Threads for arithmetic in one worker: its CPUs."""
        return max(1, int(self.num_cpus))


class CpuPool(Pool):
    """Workers that have no use for a GPU."""

    num_gpus: float | None = Field(default=0.0, ge=0)
    placement: Literal["PACK", "SPREAD"] = Field(
        default="SPREAD", description="over as many nodes as possible: downloads share their networks"
    )


class Ranks(Strict):
    """What one rank of a training stage claims; how many ranks there are is said in that stage's own section."""

    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float | None = Field(default=None, ge=0, description="null: one where the cluster has any, else none")
    resources: dict[str, float] = Field(default={}, description="Ray's custom resources")
    max_failures: int = Field(default=3, ge=-1, description="restarts from the last checkpoint; -1 for no limit")
    min_ranks: int | None = Field(
        default=None, ge=1, description="how few ranks will do where there is no room for all; null: no fewer"
    )


class RayConfig(Strict):
    """How Ray is used. Nothing here changes a byte of what comes out."""

    address: str | None = Field(
        default=None, description="a running cluster; null: $RAY_ADDRESS (set in jobs), else one of our own, here"
    )
    ingest: CpuPool = CpuPool()
    latents: Pool = Pool()
    score: Pool = Pool()
    caption: Pool = Pool()
    control: Pool = Pool()
    eval: Pool = Pool()
    autoencoder: Ranks = Ranks()
    clip: Ranks = Ranks()
    train: Ranks = Ranks()
    attempts: int = Field(default=3, ge=1, description="tries a shard gets before it is set aside")
    back_off_s: float = Field(default=1.0, ge=0, description="wait before a shard's second try; doubles with each")
    grace_s: float = Field(default=20.0, ge=0, description="on SIGTERM, how long shards in hand are waited for")
    node_strikes: int = Field(
        default=3,
        ge=1,
        description="workers that fail to start on a node, or name trouble of its own, until it is left out",
    )
    wait_for_nodes_s: float = Field(
        default=600.0, ge=0, description="how long to wait for a node with room for a worker"
    )

    @property
    def retries(self) -> Retries:
        """How failed shards are tried again."""
        return Retries(self.attempts, self.back_off_s)


class RunConfig(Strict):
    """The settings of one run."""

    run: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    ray: RayConfig = RayConfig()
    ingest: IngestConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    clip: ClipConfig = ClipConfig()
    curate: CurateConfig = CurateConfig()
    latents: LatentsConfig = LatentsConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    notify: NotifyConfig = NotifyConfig()


def find_config(given: str | None, base: str) -> str:
    """The YAML to read; raises ConfigError where there is none."""
    for path, source in ((given, "--config"), (os.environ.get("CARRARA_CONFIG"), "CARRARA_CONFIG")):
        if path:
            for candidate in (path, os.path.join(base, path)):  # a job's working folder may lack ignored files
                if os.path.isfile(candidate):
                    return candidate
            raise ConfigError(f"{path}: there is no such configuration file; it was named by {source}")
    for folder in (".", base):
        if os.path.isfile(os.path.join(folder, "carrara.yaml")):
            return os.path.normpath(os.path.join(folder, "carrara.yaml"))
    raise ConfigError("no configuration: give --config FILE, set CARRARA_CONFIG, or put a carrara.yaml here")


def load(path: str, overrides: Sequence[str], base: str, tables: bool = True) -> RunConfig:
    """Read and check a run's YAML; paths in the result are absolute. tables: they must be there. Raises ConfigError."""
    data = load_yaml(path, overrides)
    validate(RunConfig, data, path)
    config = validate(RunConfig, resolved(data, base), path)
    if tables:
        _check_tables(config, path)
    return config


def load_of_run(run: str, overrides: Sequence[str], base: str) -> RunConfig | None:
    """The configuration that a run was last worked on with, as it is noted there, with overrides; None where there is
    none. Raises ConfigError where it does not fit this version."""
    url = storage.join(RunPaths(absolute(run, base)).status, "config.json")
    try:
        data = storage.read_json(url)
    except (ValueError, OSError):
        return None
    if not isinstance(data, dict):
        return None
    data["run"] = run  # and not where it lay then: it may be a copy, or have been moved
    apply_overrides(data, overrides)
    return validate(RunConfig, resolved(data, base), url)


def base_folder() -> tuple[str, str]:
    """(folder, why): what relative paths in the configuration are relative to.

    `ray job submit --working-dir .` runs the job in a temporary copy of the folder, and whatever were
    written there would be lost with it. So: CARRARA_ROOT if set; in such a copy, the folder in which
    `carrara submit` was called, where there is one of that name, else that in which the Ray daemon was started
    that this process descends from; otherwise the current folder.
    """
    root = os.environ.get("CARRARA_ROOT")
    if root:
        if not os.path.isdir(root):
            raise ConfigError(f"CARRARA_ROOT is '{root}', which is not a folder on this machine; correct or unset it")
        return os.path.abspath(root), "CARRARA_ROOT"
    here = os.getcwd()
    if JOB_PACKAGE not in here:
        return here, "the current folder"
    sent_from = os.environ.get("CARRARA_SENT_FROM")
    if sent_from and os.path.isdir(sent_from):
        return sent_from, "the folder where the job was submitted"
    try:
        for parent in psutil.Process().parents():
            if parent.name() == "raylet":
                return parent.cwd(), "the folder where this Ray node was started"
    except psutil.Error:
        pass
    raise ConfigError(
        f"this job runs in Ray's temporary copy {here}, and the folder where Ray was started cannot be found; "
        "set CARRARA_ROOT, or make 'run' and the tables absolute paths"
    )


def _check_tables(config: RunConfig, source: str) -> None:
    for name in ("table", "heldout_table"):
        table = getattr(config.ingest, name)
        if table and "://" not in table and not os.path.exists(table) and not glob.glob(table, recursive=True):
            raise ConfigError(f"{source}: 'ingest.{name}': there is no file, folder or match for {table}")
