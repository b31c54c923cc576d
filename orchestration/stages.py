"""The stages by name, in order: what each needs beforehand, whether it is complete, and how it is run."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestration import engine
from orchestration.config import Pool, RunConfig
from shards import storage
from shards.dataset import MANIFEST
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.stage import Stage

if TYPE_CHECKING:
    from eval.evaluation import Evaluation

log = logging.getLogger("carrara")

STAGES = ("ingest", "autoencoder", "clip", "latents", "train", "eval")
FITS = ("autoencoder", "clip", "train")


def known(name: str, others: tuple[str, ...] = ()) -> str:
    """`name`, if there is such a stage or other command; raises ConfigError with the nearest name."""
    names = (*STAGES, *others)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"there is no stage or command '{name}'; {hint}")
    return name


def vae_ref(config: RunConfig) -> str:
    """The VAE of this run: the pretrained one that the configuration names, else the run's own."""
    return config.autoencoder.pretrained or storage.join(RunPaths(config.run).autoencoder, "model")


def text_ref(config: RunConfig) -> str:
    """The CLIP of this run: the pretrained one that the configuration names, else the run's own."""
    return config.clip.pretrained or storage.join(RunPaths(config.run).clip, "model")


def text_pad(config: RunConfig) -> str | None:
    """What follows a caption's end token: as configured, else as the tokenizer of train.start_from has it."""
    if config.latents.text_pad is None and config.train.start_from:
        from latents.weights import find_pad

        return find_pad(config.train.start_from)
    return config.latents.text_pad


def pretrained(name: str, config: RunConfig) -> str | None:
    """The weights that the configuration names in place of fitting `name`; None where it is fitted or is no fit."""
    return getattr(getattr(config, name), "pretrained", None)


def check_inputs(name: str, config: RunConfig) -> None:
    """Raise ConfigError where what the stage reads is not there, saying which command makes it."""
    paths = RunPaths(config.run)
    images, latents = storage.join(paths.images, MANIFEST), storage.join(paths.latents, MANIFEST)
    heldout = storage.join(paths.heldout, MANIFEST)
    needs: list[tuple[str, str, str]] = []  # (file, what it is, the stage that makes it)
    if name in ("autoencoder", "clip", "latents"):
        needs.append((images, "finished image shards", "ingest"))
    if name in ("latents", "eval"):
        fitted = [n for n in ("autoencoder", "clip") if not pretrained(n, config)]
        models = {"autoencoder": vae_ref(config), "clip": text_ref(config)}
        needs += [(models[n], f"a finished {n}", n) for n in fitted]
    if name == "train":
        needs.append((latents, "finished latent shards", "latents"))
    if name == "eval":
        if not storage.exists(storage.join(paths.model, "model_index.json")):
            needs.append((paths.checkpoints, "a checkpoint", "train"))
        if config.eval.prompts_file is None:
            needs.append((heldout, "held-out image shards, whose captions are the prompts", "ingest"))
    for file, what, maker in needs:
        if not storage.exists(file):
            raise ConfigError(f"{name}: there is no {file}, so it lacks {what}; run the stage '{maker}' first")


def shard_stages(name: str, config: RunConfig) -> list[tuple[Stage, Pool]]:
    """The stages over shards that `name` consists of, in order, and whose workers make them."""
    paths = RunPaths(config.run)
    if name == "ingest":
        from ingest.stage import IngestStage

        stages: list[Stage] = [IngestStage(config.ingest, paths.images, "train", config.seed)]
        if config.ingest.has_heldout:
            stages.append(IngestStage(config.ingest, paths.heldout, "heldout", config.seed))
        return [(s, config.ray.ingest) for s in stages]
    if name == "latents":
        from latents.stage import LatentsStage

        latents = config.latents.model_copy(update={"text_pad": text_pad(config)})
        return [(LatentsStage(latents, paths, vae_ref(config), text_ref(config), config.seed), config.ray.latents)]
    if name == "eval":
        return [(s, config.ray.eval) for s in evaluation(config).stages()]
    raise ValueError(f"{name} is not a stage over shards")


def is_complete(name: str, config: RunConfig) -> bool:
    """Whether the stage has nothing left to do for just this configuration, judged from the run's folder."""
    if name in FITS:
        from train.state import stage_state

        return stage_state(name, config.run, config).state == "done"
    try:
        check_inputs(name, config)
        status = RunPaths(config.run).status
        if name == "eval":
            return _evaluation_is_complete(evaluation(config), status, config)
        return all(engine.is_complete(stage, status) for stage, _ in shard_stages(name, config))
    except (ConfigError, StageError):
        return False


def _evaluation_is_complete(found: Evaluation, status: str, config: RunConfig) -> bool:
    if not found.is_current() or not storage.exists(report_path(config, found.model.name)):
        return False
    return all(engine.is_complete(stage, status) for stage in found.stages())


def evaluation(config: RunConfig) -> Evaluation:
    """The evaluation of this configuration, with its checkpoint, prompts and weights resolved now."""
    from eval.evaluation import Evaluation

    return Evaluation(config.eval, RunPaths(config.run), vae_ref(config), text_ref(config), config.seed)


def check_all(config: RunConfig) -> None:
    """What the configuration alone says will be missing, before any stage begins: an evaluation without prompts after
    days of training, say. Raises ConfigError."""
    if config.eval.prompts_file is None and not config.ingest.has_heldout:
        raise ConfigError(
            "eval: it would have no prompts; set ingest.heldout_fraction (0.01, say), ingest.heldout_table or "
            "eval.prompts_file"
        )
    for field in ("prompts_file", "inception", "dinov2", "reference"):
        path = getattr(config.eval, field)
        if path and "://" not in path and path != "download" and not os.path.exists(path):
            raise ConfigError(f"eval.{field}: there is no {path}")


def report_path(config: RunConfig, checkpoint: str) -> str:
    """Where the report of a checkpoint lies."""
    return storage.join(RunPaths(config.run).reports, f"{checkpoint}.html")


def run(
    name: str, config: RunConfig, local: bool = False, redo: bool = False, add_changed: bool = False,
    adopt: bool = False,
) -> None:  # fmt: skip
    """Run one stage to its end; on Ray, which is connected to only if there is something to do.

    add_changed: of ingest, take the rows of a table's file that changed anew, as further shards.
    Raises ConfigError where an input is missing, StageError, or Stopped.
    """
    if pretrained(name, config):
        log.info("%s: skipped, because the configuration names pretrained weights: %s", name, pretrained(name, config))
        return
    check_inputs(name, config)
    if is_complete(name, config):
        log.info("%s: complete; nothing to do", name)
        return
    if name in FITS:
        from orchestration import trainer

        work: Callable[[], Any] = lambda: trainer.run(name, config, local, redo, adopt)  # noqa: E731
    elif name == "eval":
        work = lambda: run_evaluation(evaluation(config), config, local, redo)  # noqa: E731
    else:
        stages = shard_stages(name, config)
        if name == "ingest":
            stages = [(dataclasses.replace(s, add_changed=add_changed), pool) for s, pool in stages]  # type: ignore[type-var]
            for stage, _ in stages:
                stage.check()  # type: ignore[attr-defined]  # opens the table and finds its columns
        work = lambda: _run_shards(name, stages, config, local, redo)  # noqa: E731
    if local:
        work()
        return
    from orchestration.connection import connected

    with connected(config.ray):
        work()


def retry_ingest(config: RunConfig, codes: str, local: bool = False) -> None:
    """Fetch the rows again that ended with these codes (`transient`: all that may pass), in shards of their own."""
    from ingest.stage import codes_to_retry

    chosen = codes_to_retry(codes)
    stages: list[tuple[Stage, Pool]] = [
        (dataclasses.replace(s, retry=chosen), pool)  # type: ignore[type-var]
        for s, pool in shard_stages("ingest", config)
    ]
    if local:
        _run_shards("ingest", stages, config, local, False)
        return
    from orchestration.connection import connected

    with connected(config.ray):
        _run_shards("ingest", stages, config, local, False)


def dry_run(config: RunConfig, rows: int | None = None) -> str:
    """The funnel and the cost of the ingest, as text; nothing is fetched."""
    from ingest import dryrun

    parts = []
    for stage, pool in shard_stages("ingest", config):
        stage.check()  # type: ignore[attr-defined]
        funnel = dryrun.funnel(stage, rows)  # type: ignore[arg-type]
        cost = dryrun.picture_cost(stage)  # type: ignore[arg-type]
        workers = pool.workers or os.cpu_count() or 1
        parts.append(f"{stage.name}\n{funnel.text()}\n\n{cost.text(funnel.to_fetch, workers)}\n")
    return "\n".join(parts)


def _run_shards(name: str, stages: list[tuple[Stage, Pool]], config: RunConfig, local: bool, redo: bool) -> None:
    paths = RunPaths(config.run)
    for stage, pool in stages:
        engine.run(stage, paths.status, config.ray, pool, local, redo)
    for stage, pool in stages:
        # Looked at once more now that the lease is let go: what was asked to be taken down meanwhile.
        while not getattr(stage, "is_current", lambda: True)():
            engine.run(stage, paths.status, config.ray, pool, local)
    from ingest import takedown

    if name in ("ingest", "latents") and takedown.length(paths.run):
        from orchestration.remove import settle_latents

        settle_latents(config, again=name == "latents")


def run_evaluation(found: Evaluation, config: RunConfig, local: bool, redo: bool = False) -> str:
    """All stages of one evaluation, then its numbers and its report, whose path is returned: of the one checkpoint that
    was resolved at the beginning, whatever training writes meanwhile."""
    for stage in found.stages():
        engine.run(stage, RunPaths(config.run).status, config.ray, config.ray.eval, local, redo)
    report = found.conclude()
    log.info("eval: the report is %s", report)
    return report
