"""How a stage is run, by its name; what each is, is in parts.py."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING

from orchestration import checks, engine, notify
from orchestration.config import Pool, RunConfig
from orchestration.connection import connected
from orchestration.metrics import Exporter
from orchestration.parts import (
    CURATED,
    FITS,
    check_inputs,
    evaluation,
    ingest_stages,
    is_complete,
    order,
    pretrained,
    shard_stages,
    taken_down_mark,
)
from shards import storage
from shards.layout import RunPaths
from shards.made_with import MADE_WITH
from shards.stage import Stage

if TYPE_CHECKING:
    from eval.evaluation import Evaluation
    from orchestration.evaluation import PipelineRun

log = logging.getLogger("carrara")


def run(
    name: str,
    config: RunConfig,
    local: bool = False,
    redo: bool = False,
    add_changed: bool = False,
    adopt: bool = False,
) -> None:
    """Run one stage to its end; on Ray, which is connected to only if there is something to do.

    add_changed: of ingest, take the rows of a table's file that changed anew, as further shards. adopt: of a fit, go
    on with what differs from the settings that it was begun with.
    Raises ConfigError where an input is missing, StageError, or Stopped; whoever is to be told of that is told.
    """
    if name == "train" and config.train.prior is not None:
        run("prior", config, local, redo)
    with notify.notified(config.notify, config.run, name) as outcome:
        outcome.worked = False
        if pretrained(name, config):
            why = "because the configuration names pretrained weights"
            log.info("%s: skipped, %s: %s", name, why, pretrained(name, config))
            return
        check_inputs(name, config)
        if is_complete(name, config):
            log.info("%s: complete; nothing to do", name)
            _settle(name, config)
            return
        outcome.worked = True
        outcome.report = _work(name, config, local, redo, add_changed, adopt)


def _work(name: str, config: RunConfig, local: bool, redo: bool, add_changed: bool, adopt: bool) -> str | None:
    """What `run` does where there is something to do; the report's path, of an evaluation."""
    checks.check_static(name, config)
    checks.claim(config)
    if name in FITS:
        from orchestration import trainer

        checks.warn_of_small_data(name, config)
        with connected(config.ray, local):
            trainer.run(name, config, local, redo, adopt)
        return None
    if name == "eval":
        with connected(config.ray, local):
            return run_evaluation(evaluation(config), config, local, redo)
    stages = shard_stages(name, config)
    if name == "ingest":
        stages = [(dataclasses.replace(s, add_changed=add_changed), config.ray.ingest) for s in ingest_stages(config)]
    with connected(config.ray, local):
        _run_shards(name, stages, config, local, redo)
    return None


def check_all(config: RunConfig) -> None:
    """What can be known to be wrong with any stage before the first begins; raises ConfigError with the first found."""
    for name in order(config):
        checks.check_static(name, config)
    checks.claim(config)
    notify.check(config.notify)


def retry_ingest(config: RunConfig, codes: str, local: bool = False) -> None:
    """Fetch the rows again that ended with these codes (`transient`: all that may pass), in shards of their own."""
    from ingest.retries import codes_to_retry

    chosen = codes_to_retry(codes)
    stages: list[tuple[Stage, Pool]] = [
        (dataclasses.replace(s, retry=chosen), config.ray.ingest) for s in ingest_stages(config)
    ]
    checks.claim(config)
    with notify.notified(config.notify, config.run, "ingest"):
        with connected(config.ray, local):
            _run_shards("ingest", stages, config, local, False)


def dry_run(config: RunConfig, rows: int | None = None) -> str:
    """The funnel and the cost of the ingest, as text; nothing is fetched."""
    from ingest import dryrun

    parts = []
    for stage in ingest_stages(config):
        stage.check()
        funnel = dryrun.funnel(stage, rows)
        cost = dryrun.image_cost(stage)
        workers = config.ray.ingest.most_workers or os.cpu_count() or 1
        parts.append(f"{stage.name}\n{funnel.text()}\n\n{cost.text(funnel.to_fetch, workers)}\n")
    return "\n".join(parts)


def _run_shards(name: str, stages: list[tuple[Stage, Pool]], config: RunConfig, local: bool, redo: bool) -> None:
    paths = RunPaths(config.run)
    if name == "latents" and storage.exists(storage.join(paths.latents, MADE_WITH)):
        _settle(name, config)  # a shard whose take-down was killed half-way is no whole one until that is done
    if name in ("latents", *CURATED):
        for stage, _ in stages:  # they may be made of images as these were before
            storage.remove(taken_down_mark(paths, stage.name))
    for stage, pool in stages:
        engine.run(stage, paths.status, config.ray, pool, local, redo)
    # Looked at once more now that the leases are let go: what was asked to be taken down meanwhile, also by the finish
    # of another split, which lists the bytes of what it took out.
    while behind := [(s, pool) for s, pool in stages if not getattr(s, "is_current", lambda: True)()]:
        for stage, pool in behind:
            engine.run(stage, paths.status, config.ray, pool, local)
    _settle(name, config)


def _settle(name: str, config: RunConfig) -> None:
    """Take out of latents, scores and captions what was taken down, also what a killed command did not come to."""
    from ingest import takedown

    paths = RunPaths(config.run)
    if name in ("ingest", "latents", *CURATED) and takedown.length(paths.run):
        from orchestration import remove

        if name in ("ingest", "latents"):
            remove.settle_latents(config, again=False)
        remove.settle_curated(paths, again=False)


def run_evaluation(found: Evaluation, config: RunConfig | PipelineRun, local: bool, redo: bool = False) -> str:
    """All stages of one evaluation, then its numbers and its report, whose path is returned: of the one checkpoint that
    was resolved at the beginning, whatever training writes meanwhile."""
    for stage in found.stages():
        engine.run(stage, RunPaths(config.run).status, config.ray, config.ray.eval, local, redo)
    report = found.conclude()
    log.info("eval: the report is %s", report)
    if (training := getattr(config, "train", None)) is not None:  # a pipeline of somebody else's has none
        from eval import trackers

        trackers.tell(training.trackers, found.run, found.result())
    if not local:
        Exporter(config.run, "eval").evaluated(found.result())
    sentence = f"eval: the report of {found.model.name} is there"
    notify.send(config.notify, "report", config.run, "eval", sentence, report=report)
    return report
