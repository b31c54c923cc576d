"""Train the UNet, the VAE or the CLIP of a run.

On one machine, one process a GPU (or, without GPUs, as many as you say):

    deepspeed train/main.py --config configs/demo.yaml
    deepspeed --num_accelerators 2 train/main.py --config configs/demo.yaml --stage autoencoder

On several machines, with a hostfile of lines like `node1 slots=8` and ssh from the first to all:

    deepspeed --hostfile hosts train/main.py --config configs/sd2-256.yaml

On several machines without ssh, the same line on each with its own number:

    deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr node1 train/main.py --config configs/sd2-256.yaml

Settings can be changed at the end of the line: `train.learning_rate=2e-4 train.zero_stage=2`. Killed at any
moment, the same line goes on from the last checkpoint, also on another number of ranks; finished, it does
nothing. Exit codes: 0 done, 1 failed, 2 the configuration cannot be used, 75 stopped by SIGTERM and saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if __name__ == "__main__":
    # Run as a script, Python looks for modules in this file's folder; it is the one above that holds them.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shards import storage
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, load_sections
from train import trackers
from train.config import STAGES, TrainConfig, TrainingSections
from train.fit_config import layout
from train.ranks import Ranks, Stopped, join
from train.state import describe, discard, fingerprint, history, judge, open_input, stage_config, stage_paths

if TYPE_CHECKING:
    from train.denoising import Diffusion
    from train.job import Job
    from train.objective import Objective

log = logging.getLogger("carrara.train")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def run(
    stage: str,
    config: str | TrainingSections,
    overrides: Sequence[str] = (),
    redo: bool = False,
    adopt: bool = False,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Fit one stage on the ranks that the environment describes; call it in every rank.

    config: a run's YAML file (with dotted overrides), or its sections as read already. Does nothing where
    the stage is done or its weights are pretrained ones. redo: throw away what was begun as another run. adopt: go on
    with what differs, where that can be: a longer run, another rate, more data. tell: called on rank 0 with every line
    of the log, in a thread of its own. Raises ConfigError, StageError, or ranks.Stopped after a SIGTERM.
    """
    sections = load_sections(config, overrides, TrainingSections) if isinstance(config, str) else config
    if stage not in STAGES:
        raise ConfigError(f"there is no training stage '{stage}'; it is one of {', '.join(STAGES)}")
    settings = stage_config(stage, sections)
    if getattr(settings, "pretrained", None):
        log.info("%s: pretrained weights are named, so there is nothing to fit", stage)
        return
    layout(stage, settings, int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("RANK", "0") == "0":
        trackers.check(settings.trackers, f"{stage}.trackers")
    paths = stage_paths(stage, RunPaths(sections.run))
    run_paths = RunPaths(sections.run)
    datasets = open_input(stage, run_paths, settings)
    wanted = fingerprint(stage, settings, sections.seed, datasets)

    # Heavy imports come after everything that can be refused at once.
    from train import checkpoint
    from train.finish import finish
    from train.job import Job
    from train.loop import fit
    from train.objectives import build

    ranks = join(settings.threads)
    objective: Objective | None = None
    try:
        # Rank 0 judges for all: the others may see an older state of a shared disk.
        found = ranks.found_by_first(lambda: judge(stage, settings, wanted, paths, adopt))
        if found.state == "done" and not (redo and found.reason):
            log.info("%s: finished before%s, nothing to do", stage, f" {found.reason}" if found.reason else "")
            return
        if found.state == "changed" or (found.state == "stale" and not redo):
            raise ConfigError(found.reason)
        if ranks.first:
            if found.state in ("stale", "done"):  # done: with --redo alone
                discard(paths)
            # One trainer writes here, so whatever is temporary is a dead one's.
            storage.sweep_temporaries(paths.checkpoints, older_than_s=0.0)
        newest = checkpoint.newest(paths.checkpoints, ranks)
        manifest = newest[1] if newest else None
        taken = ranks.found_by_first(lambda: history(stage, settings, datasets, manifest, found, adopt))
        if ranks.first:
            for note in taken.notes:
                log.warning("%s: %s", stage, note)
        objective = build(stage, settings, datasets, sections.seed, taken.history)
        used = [describe(d) for d in datasets]
        facts = {"dataset": used[0], "sources": used, "seed": sections.seed, "order": taken.history.to_json()}
        facts |= objective.facts
        status = storage.join(run_paths.status, f"{stage}.json")
        job = Job(
            stage,
            settings,
            sections.seed,
            paths.checkpoints,
            paths.logs,
            status,
            wanted,
            facts,
            newest=newest,
            notes=taken.notes,
            tell=tell,
        )
        if isinstance(settings, TrainConfig):
            job = _watched(job, settings, objective, run_paths, ranks)
        last = fit(job, objective, ranks)
        finish(stage, sections.run, objective, last, wanted, paths, ranks)
    finally:
        if objective is not None:
            objective.close()
        ranks.leave()


def _watched(job: Job, config: TrainConfig, objective: Objective, run: RunPaths, ranks: Ranks) -> Job:
    """The job with what shows how good the UNet is becoming: validation and samples, where they are asked for."""
    from train.samples import Samples
    from train.validation import Validator

    micro, _ = layout("train", config, ranks.world)
    unet = cast("Diffusion", objective)
    validator = samples = None
    if config.validation:
        validator = Validator(config.validation, unet, run, ranks, micro)
    if config.samples:
        samples = Samples(config.samples, unet, ranks)
    return dataclasses.replace(job, validator=validator, samples=samples)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train the UNet, the VAE or the CLIP of a run.")
    parser.add_argument("--config", default=os.environ.get("CARRARA_CONFIG", "carrara.yaml"), help="a run's YAML file")
    parser.add_argument("--stage", choices=STAGES, default="train")
    parser.add_argument("--redo", action="store_true", help="throw away what was fitted with other settings")
    parser.add_argument(
        "--adopt", action="store_true", help="go on with changed settings, as a longer run, or with data that has grown"
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    given = parser.parse_args(arguments)
    if given.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(given.local_rank))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"
    try:
        run(given.stage, given.config, given.overrides, given.redo, given.adopt)
    except (ConfigError, StageError) as e:
        if first or isinstance(e, StageError):
            print(f"carrara: {e}", file=sys.stderr, flush=True)
        return 2 if isinstance(e, ConfigError) else 1
    except Stopped as e:
        if first:
            print(f"carrara: {e}", file=sys.stderr, flush=True)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
