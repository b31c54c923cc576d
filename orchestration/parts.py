"""The stages by name, in order: what each needs beforehand, what it consists of, and whether it is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.config import ClipScore
from orchestration import engine
from orchestration.config import Pool, RunConfig
from shards import storage
from shards.dataset import MANIFEST
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.stage import Stage

if TYPE_CHECKING:
    from eval.evaluation import Evaluation
    from ingest.stage import IngestStage
    from latents.config import LatentsConfig
    from latents.stage import LatentsStage

STAGES = ("ingest", "autoencoder", "clip", "latents", "train", "eval")
FITS = ("autoencoder", "clip", "train")
CURATED = ("score", "caption", "control")  # stages that a run has where its configuration names some


def vae_ref(config: RunConfig) -> str:
    """The VAE of this run: the pretrained one that the configuration names, else the run's own."""
    return config.autoencoder.pretrained or storage.join(RunPaths(config.run).autoencoder, "model")


def text_ref(config: RunConfig) -> str:
    """The CLIP of this run: the pretrained one that the configuration names, else the run's own."""
    return config.clip.pretrained or storage.join(RunPaths(config.run).clip, "model")


def latents_settings(config: RunConfig) -> LatentsConfig:
    """`latents`, with what it leaves to the tokenizers of train.start_from: what follows a caption's end token."""
    settings, start_from = config.latents, config.train.start_from
    if not start_from:
        return settings
    from latents.weights import find_pad

    second = settings.second_clip
    if settings.sequence is not None:
        return settings
    if second is None:
        return settings.model_copy(update={"text_pad": settings.text_pad or find_pad(start_from)})
    pads = [
        given or find_pad(start_from, (name,))
        for given, name in ((settings.text_pad, "tokenizer"), (second.pad, "tokenizer_2"))
    ]
    return settings.model_copy(update={"text_pad": pads[0], "text_encoder": second.model_copy(update={"pad": pads[1]})})


def pretrained(name: str, config: RunConfig) -> str | None:
    """The weights that the configuration names in place of fitting `name`; None where it is fitted or is no fit."""
    return getattr(getattr(config, name, None), "pretrained", None)


def check_inputs(name: str, config: RunConfig) -> None:
    """Raise ConfigError where what the stage reads is not there, saying which command makes it."""
    paths = RunPaths(config.run)
    images, latents = storage.join(paths.images, MANIFEST), storage.join(paths.latents, MANIFEST)
    heldout = storage.join(paths.heldout, MANIFEST)
    needs: list[tuple[str, str, str]] = []  # (file, what it is, the stage that makes it)
    if name in ("autoencoder", "clip", "latents", *CURATED):
        needs.append((images, "finished image shards", "ingest"))
    if name in CURATED and not getattr(config.curate, name + "s"):
        raise ConfigError(f"{name}: curate.{name}s names none; see docs/own-data.md")
    own_clip = any(isinstance(s, ClipScore) and s.model is None for s in config.curate.scores.values())
    if name == "score" and own_clip and not pretrained("clip", config):
        needs.append((text_ref(config), "a finished clip", "clip"))
    if name == "prior" and config.train.prior is None:
        raise ConfigError("prior: train.prior is not set, so no images are to be drawn; see docs/train.md")
    if name in ("latents", "prior", "eval"):
        fitted = [n for n in ("autoencoder", "clip") if not pretrained(n, config)]
        if name != "eval" and config.latents.sequence is not None:
            fitted = [n for n in fitted if n != "clip"]  # that encoder stands in its place
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


def taken_down_mark(paths: RunPaths, stage: str) -> str:
    """Where it stands for how many parts of the list of take-downs a stage's shards were looked through."""
    return storage.join(paths.status, f"{stage}-taken-down.json")


def order(config: RunConfig) -> tuple[str, ...]:
    """The stages that this configuration has, in order."""
    curated = tuple(n for n in CURATED if getattr(config.curate, n + "s"))
    at, train = STAGES.index("latents"), STAGES.index("train")
    return (*STAGES[:at], *curated, *STAGES[at:train], *(["prior"] if config.train.prior else []), *STAGES[train:])


def ingest_stages(config: RunConfig) -> list[IngestStage]:
    """The ingest of the images to train on, and that of the held-out ones where there are some."""
    from ingest.stage import IngestStage

    paths = RunPaths(config.run)
    stages = [IngestStage(config.ingest, paths.images, "train", config.seed)]
    if config.ingest.has_heldout:
        stages.append(IngestStage(config.ingest, paths.heldout, "heldout", config.seed))
    return stages


def latents_stage(config: RunConfig) -> LatentsStage:
    """The latents stage of this configuration."""
    from latents.stage import LatentsStage

    paths = RunPaths(config.run)
    return LatentsStage(latents_settings(config), paths, vae_ref(config), text_ref(config), config.seed)


def shard_stages(name: str, config: RunConfig) -> list[tuple[Stage, Pool]]:
    """The stages over shards that `name` consists of, in order, and whose workers make them."""
    paths = RunPaths(config.run)
    if name == "ingest":
        return [(s, config.ray.ingest) for s in ingest_stages(config)]
    if name == "latents":
        return [(latents_stage(config), config.ray.latents)]
    if name == "prior":
        from eval import prior

        given = latents_settings(config)
        generated, encoded = prior.stages(config.train, given, paths, vae_ref(config), text_ref(config), config.seed)
        return [(generated, config.ray.eval), (encoded, config.ray.latents)]
    if name == "score":
        from curate.stage import score_stages

        return [(s, config.ray.score) for s in score_stages(config.curate, paths, text_ref(config))]
    if name == "caption":
        from curate.captioning import caption_stages

        return [(s, config.ray.caption) for s in caption_stages(config.curate, paths, config.seed)]
    if name == "control":
        from curate.controls import control_stages

        return [(s, config.ray.control) for s in control_stages(config.curate, paths)]
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


def report_path(config: RunConfig, checkpoint: str) -> str:
    """Where the report of a checkpoint lies."""
    return storage.join(RunPaths(config.run).reports, f"{checkpoint}.html")
