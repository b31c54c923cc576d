"""What can be known to be wrong before any work: every mistake of every stage that a look at the configuration and at
the files it names can find. `carrara all` asks for all stages before the first begins, a single stage for itself.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
from collections.abc import Callable
from typing import Any

from orchestration.config import RunConfig
from shards import storage
from shards.dataset import MANIFEST
from shards.layout import RunPaths
from shards.settings import ConfigError

log = logging.getLogger("carrara")

SQUARE = ("center_crop", "border")  # resize modes after which every image has one shape


def check_static(name: str, config: RunConfig) -> None:
    """Raise ConfigError where the stage `name` cannot succeed as configured, whatever the stages before it make."""
    CHECKS[name](config)


def claim(config: RunConfig) -> None:
    """See that the run's folder can be written to, and note in it what it is made with, for commands that are given
    the run alone. Raises ConfigError where it cannot."""
    url = storage.join(RunPaths(config.run).status, "config.json")
    try:
        storage.write_json(url, config.model_dump(mode="json"))
    except OSError as e:
        reason = {
            errno.EACCES: "it may not be written to",
            errno.EPERM: "it may not be written to",
            errno.EROFS: "its file system is read-only",
            errno.ENOTDIR: "it, or a folder on its way, is a file",
            errno.EEXIST: "it, or a folder on its way, is a file",
        }.get(e.errno or 0, f"it cannot be written to ({e.strerror or e})")
        raise ConfigError(f"run: {config.run}: {reason}; set 'run' to a folder that can be written to") from None


def _ingest(config: RunConfig) -> None:
    from ingest.stage import IngestStage

    IngestStage(config.ingest, RunPaths(config.run).images, "train", config.seed).check()
    if config.ingest.has_heldout:
        IngestStage(config.ingest, RunPaths(config.run).heldout, "heldout", config.seed).check()


def _fit(name: str) -> Callable[[RunConfig], None]:
    def check(config: RunConfig) -> None:
        from train import trackers
        from train.fit_config import layout

        fit: Any = getattr(config, name)
        layout(name, fit, fit.ranks)
        trackers.check(fit.trackers, f"{name}.trackers")

    return check


def _autoencoder(config: RunConfig) -> None:
    if config.autoencoder.pretrained:
        from latents.weights import find_vae

        find_vae(config.autoencoder.pretrained)
        return
    _fit("autoencoder")(config)
    if config.autoencoder.perceptual:
        from train import perceptual

        perceptual.digest(config.autoencoder.perceptual.weights)
    import torch
    from diffusers import AutoencoderKL

    try:
        with torch.device("meta"):
            AutoencoderKL(**{"sample_size": config.autoencoder.resolutions[0], **config.autoencoder.model})
    except Exception as e:
        line = " ".join(str(e).split())[:300]
        raise ConfigError(f"autoencoder.model: AutoencoderKL cannot be built from this: {line}") from None


def _clip(config: RunConfig) -> None:
    if config.clip.pretrained:
        from latents.weights import find_clip

        find_clip(config.clip.pretrained)
        return
    _fit("clip")(config)
    from train.clip import check_clip_config

    check_clip_config(config.clip.model)


def _latents(config: RunConfig) -> None:
    """What the latents ask of the images must be what the ingest stores, and weights that they name be there."""
    if config.latents.text_encoder is not None:
        from latents.weights import find_clip, find_sequence

        find = find_clip if config.latents.second_clip is not None else find_sequence
        find(config.latents.text_encoder.pretrained)
    own = storage.join(RunPaths(config.run).clip, "model")  # may be fitted before the latents are made
    if config.latents.features is not None and (config.latents.features.pretrained != own or os.path.exists(own)):
        from latents.vision import find_vision

        find_vision(config.latents.features.pretrained).facts(config.latents.features)
    stored, wanted = config.ingest.image_size, max(config.latents.resolutions)
    mode = config.ingest.resize_mode
    if mode != "no" and wanted > stored and not getattr(config.latents, "enlarge", False):
        raise ConfigError(
            f"latents.resolution is {wanted} and ingest.image_size {stored}, so every image would be enlarged; set "
            f"ingest.image_size to {wanted}, or the resolution to {stored}, or latents.enlarge to true if that is meant"
        )
    if config.latents.buckets is not None and mode in SQUARE and config.latents.buckets.max_aspect > 1:
        raise ConfigError(
            f"latents.buckets are for images of many shapes, and ingest.resize_mode '{mode}' makes them square; "
            "set ingest.resize_mode to keep_ratio, or leave latents.buckets out"
        )
    if config.latents.crop == "random" and mode in SQUARE:
        raise ConfigError(
            f"latents.crop is random, and ingest.resize_mode '{mode}' makes images square, of which there is nothing "
            "to choose from; set ingest.resize_mode to keep_ratio, or leave latents.crop out"
        )


def _train(config: RunConfig) -> None:
    _fit("train")(config)
    made = storage.exists(storage.join(RunPaths(config.run).latents, MANIFEST))  # else these settings make them
    if not made and any(s.latents is None for s in config.train.sources):
        for asked, needed in (("alignment", "features"), ("flip", "flip")):
            if getattr(config.train, asked) and not getattr(config.latents, needed):
                raise ConfigError(f"train.{asked} needs latents.{needed}, which is not set; set both, or neither")
    if config.train.start_from:
        from train.adapters import find_unet

        find_unet(config.train.start_from)
    else:
        import inspect

        from diffusers import UNet2DConditionModel

        known = [p for p in inspect.signature(UNet2DConditionModel.__init__).parameters if p != "self"]
        unknown = [k for k in config.train.unet if k not in known]
        if unknown:
            import difflib

            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known)}"
            raise ConfigError(f"train.unet: UNet2DConditionModel has no argument '{unknown[0]}'; {hint}")


def _prior(config: RunConfig) -> None:
    """The model that it is drawn by must draw from a prompt alone."""
    if config.train.prior is not None and config.train.start_from:
        from eval.prior import require_prompt_alone

        require_prompt_alone(config.train.start_from)


def _eval(config: RunConfig) -> None:
    settings = config.eval
    there = storage.exists(storage.join(RunPaths(config.run).heldout, MANIFEST))
    if settings.prompts_file is None and not config.ingest.has_heldout and not there:
        raise ConfigError(
            "eval: it would have no prompts; set ingest.heldout_fraction (0.01, say), ingest.heldout_table or "
            "eval.prompts_file"
        )
    files = {"prompts_file": settings.prompts_file, "reference": settings.reference, "dinov2": settings.dinov2}
    if settings.inception and settings.inception != "download":
        files["inception"] = settings.inception
    for field, file in files.items():
        if file and "://" not in file and not os.path.exists(file) and not glob.glob(file):
            raise ConfigError(f"eval.{field}: there is no {file}; correct it or leave it out")
    if settings.clip:
        from latents.weights import find_clip

        find_clip(settings.clip)


def _curated(config: RunConfig) -> None:
    """What curate names is checked as a whole when it is read; weights when they are needed."""


CHECKS: dict[str, Callable[[RunConfig], None]] = {
    "ingest": _ingest,
    "autoencoder": _autoencoder,
    "clip": _clip,
    "score": _curated,
    "caption": _curated,
    "control": _curated,
    "latents": _latents,
    "prior": _prior,
    "train": _train,
    "eval": _eval,
}


def warn_of_small_data(name: str, config: RunConfig) -> None:
    """A batch that is larger than the data set holds each image several times."""
    from shards.settings import StageError
    from train.state import open_input

    fit, paths = getattr(config, name), RunPaths(config.run)
    try:
        samples = sum(len(d) for d in open_input(name, paths, fit))
    except StageError:
        return  # which the stage itself says better
    if 0 < samples < fit.batch_size:
        log.warning(
            "%s.batch_size is %d, and there are %d images: each comes %.1f times in every batch",
            name,
            fit.batch_size,
            samples,
            fit.batch_size / samples,
        )
