"""Whether a fit is done, can go on, or was begun with other settings; and what it depends on.

A setting is of one of three kinds (config.py): what the run is, which cannot be changed; what may be changed by consent
for what is still to come; and what is free. Data that has grown, or that samples were taken out of, never ends a run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fsspec.core import url_to_fs

from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import Fingerprint, digest_file, digest_json
from shards.layout import MANIFEST, RunPaths
from shards.settings import ConfigError, StageError, resolved
from train import folders, segments
from train.config import TrainConfig, TrainingSections
from train.encoder_config import AutoencoderConfig, ClipConfig
from train.fit_config import FitConfig, Kind, kind_of
from train.part_config import PRIOR

VERSION = 2  # raise it when the same settings lead to other weights
MARKER = "carrara.json"

StageConfig = AutoencoderConfig | ClipConfig | TrainConfig


@dataclasses.dataclass(frozen=True)
class StagePaths:
    """Where a fit keeps its things: URLs of folders."""

    checkpoints: str
    model: str
    logs: str


@dataclasses.dataclass(frozen=True)
class StageState:
    """done: nothing to do. resumable: a checkpoint is there. new: nothing is. stale: it was begun as another run.
    changed: it goes on once the changes are adopted. changes: what differs of what may be changed, a sentence each."""

    state: Literal["done", "resumable", "new", "stale", "changed"]
    reason: str = ""
    changes: tuple[str, ...] = ()


def stage_paths(stage: str, run: RunPaths) -> StagePaths:
    """The folders of a stage."""
    if stage == "train":
        return StagePaths(run.checkpoints, run.model, run.train)
    root = run.autoencoder if stage == "autoencoder" else run.clip
    return StagePaths(storage.join(root, "checkpoints"), storage.join(root, "model"), root)


def stage_config(stage: str, sections: Any) -> StageConfig:
    """The section of a stage, of any model with the fields autoencoder, clip and train."""
    config: StageConfig = getattr(sections, stage)
    return config


def open_input(stage: str, run: RunPaths, config: StageConfig) -> list[Dataset]:
    """The dataset that a stage fits, or for `train` those of its sources in their order.

    Raises StageError where one is not there or has no samples.
    """
    roots = [run.images]
    if isinstance(config, TrainConfig):
        prior = RunPaths(run.prior).latents
        if config.prior and not storage.exists(storage.join(prior, MANIFEST)):
            raise StageError(
                f"train.prior: {prior} holds no images yet; `carrara prior` draws them, as `carrara train` does first"
            )
        roots = [prior if s.latents == PRIOR else s.latents or run.latents for s in config.all_sources]
    datasets = [Dataset.open(root) for root in roots]
    for dataset in datasets:
        if len(dataset) == 0:
            raise StageError(f"{dataset.root}: there is not one sample to train on")
    return datasets


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint keeps of a dataset, so that whoever has the checkpoint knows what it saw."""
    indices = [s.index for s in dataset.shards]
    return {
        "root": dataset.root,
        "fingerprint": dataset.fingerprint,
        "samples": len(dataset),
        "rows": dataset.manifest.get("rows"),
        "shards": len(indices),
        "first_shard": min(indices, default=None),
        "last_shard": max(indices, default=None),
        "status": dataset.manifest.get("status", {}),
    }


def fingerprint(stage: str, config: StageConfig, seed: int, datasets: Sequence[Dataset]) -> Fingerprint:
    """What the weights of a stage depend on. Raises ConfigError where `train.start_from` is not there."""
    weights = None
    if isinstance(config, TrainConfig):
        weights = {name: datasets[0].manifest[name]["digest"] for name in ("vae", "text")}
        if config.alignment and (features := datasets[0].manifest.get("features")):
            weights["features"] = features["digest"]
        if config.start_from:
            from train.adapters import digest

            weights["start_from"] = digest(config.start_from)
        if config.adapter and config.adapter.start_from:
            if not Path(config.adapter.start_from).is_file():
                raise ConfigError(f"train.adapter.start_from: there is no file {config.adapter.start_from}")
            weights["adapter"] = digest_file(config.adapter.start_from)
    if isinstance(config, AutoencoderConfig):
        weights = {}
        if config.start_from:
            from latents.weights import find_vae

            weights["start_from"] = find_vae(config.start_from).digest
        if config.perceptual:
            from train import perceptual

            weights["perceptual"] = perceptual.digest(config.perceptual.weights)
        weights = weights or None
    found = [d.fingerprint for d in datasets]
    given = found[0] if len(found) == 1 else digest_json(found)
    return Fingerprint(stage, VERSION, {**config.settings(), "seed": seed}, given, weights)


def stage_state(stage: str, run: str, sections: Any) -> StageState:
    """Judge a fit by what lies on disk, without reading any weights.

    sections: TrainingSections, or any model with its fields. Where the input is not made yet, the state
    is `new` and the reason says so.
    """
    config, paths = stage_config(stage, sections), RunPaths(run)
    if getattr(config, "pretrained", None):
        return StageState("done", f"{stage}.pretrained names weights, so nothing is fitted")
    try:
        datasets = open_input(stage, paths, config)
    except StageError as e:
        return StageState("new", str(e))
    return judge(stage, config, fingerprint(stage, config, sections.seed, datasets), stage_paths(stage, paths))


def judge(stage: str, config: StageConfig, wanted: Fingerprint, paths: StagePaths, adopt: bool = False) -> StageState:
    """As `stage_state`, of a fit whose fingerprint is known. adopt: changes that may be made are consented to."""
    marker = _marker(paths.model)
    newest = folders.latest_complete(paths.checkpoints, contents=False)
    manifest = folders.read_manifest(newest) if newest else {}
    finished = stage != "train" and marker is not None
    found = marker if finished else manifest
    if not found:
        return StageState("new")
    what, later = differences(stage, config, wanted, found.get("fingerprint", {}))
    where = paths.model if finished else str(newest)
    if what:
        return StageState(
            "stale",
            f"{where} was made with other settings ({'; '.join(what)}); put them back, set another 'run', "
            "or give --redo to throw it away and fit again",
        )
    if later and not adopt:
        return StageState(
            "changed",
            f"{where} was made with other settings ({'; '.join(later)}); give --adopt to go on with these from there, "
            "or put them back",
            tuple(later),
        )
    if finished and not later:
        others = found["fingerprint"].get("input") != wanted.input
        return StageState("done", "on other images than there are by now; --redo fits it anew" if others else "")
    longer = any(line.startswith(f"{stage}.images:") for line in later)
    fitted = manifest.get("images", 0) >= config.images or (manifest.get("finished", False) and not longer)
    wanted_name = to_export(config, newest, manifest) if newest else None
    exported = stage == "train" and marker is not None and marker.get("checkpoint") == wanted_name
    return StageState("done" if fitted and exported else "resumable", where, tuple(later))


def to_export(config: Any, newest: str, manifest: dict[str, Any]) -> str:
    """The name of the checkpoint that becomes the model of a run whose last one is `newest`, by its manifest."""
    validation = getattr(config, "validation", None)
    best = manifest.get("best") if validation is not None and validation.export == "best" else None
    return str(best or folders.name_of(newest))


# A setting that says this leaves the choice to the program, which made it when the run began.
_LEFT_OPEN = (None, "auto")
_CHOSEN = ("streams", "window", "precision")


def differences(
    stage: str, config: StageConfig, wanted: Fingerprint, stored: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """What a run was begun with and is asked for differently: what cannot be changed, and what can by consent,
    a sentence each. stored: the fingerprint in a manifest. A setting that it does not name had its default."""
    kind = type(config)
    # A path is the same one however it was written.
    then, now = (
        resolved({stage: json.loads(json.dumps(s))}, os.getcwd())[stage]
        for s in (stored.get("settings", {}), wanted.settings)
    )
    what: list[str] = []
    later: list[str] = []
    for name in sorted(now):
        default = _default(kind, name) if name in kind.model_fields else None
        before, after = then.get(name, default), now[name]
        if before == after or (name in _CHOSEN and (before in _LEFT_OPEN or after in _LEFT_OPEN)):
            continue
        field = name if name == "seed" else f"{stage}.{name}"
        line = f"{field}: {_short(before)} -> {_short(after)}"
        (later if kind_of(kind, name) is Kind.FROM_HERE_ON else what).append(line)
    weights, given = stored.get("weights") or {}, wanted.weights or {}
    names = {"vae": "the VAE", "text": "the text encoder", "start_from": f"{stage}.start_from"}
    names["features"] = "the vision tower of train.alignment"
    names["perceptual"] = f"{stage}.perceptual.weights"
    for name in sorted(weights.keys() | given.keys()):
        if weights.get(name) != given.get(name):
            what.append(f"{names.get(name, name)}: {_short(weights.get(name))} -> {_short(given.get(name))}")
    return what, later


def _default(config: type[FitConfig], name: str) -> Any:
    value = config.model_fields[name].get_default(call_default_factory=True)
    return json.loads(json.dumps(value, default=lambda model: model.model_dump(mode="json")))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else text[:12] + "..." + text[-4:]


def history(
    stage: str,
    config: StageConfig,
    datasets: Sequence[Dataset],
    manifest: dict[str, Any] | None,
    found: StageState,
    adopt: bool,
) -> segments.Taken:
    """What a run takes its samples from, from where it goes on; see segments.resume.

    manifest: of the checkpoint that it goes on from, None at the start. Raises ConfigError where that needs consent.
    """
    few = tuple(segments.too_few(config, datasets))
    if manifest is None:
        return segments.Taken(segments.begin(config, datasets), few)
    taken = segments.resume(
        manifest.get("order"), manifest["images"], manifest["step"], config, datasets, adopt, found.changes
    )
    if taken.refusal:
        raise ConfigError(f"{stage}: {taken.refusal}")
    return dataclasses.replace(taken, notes=(*taken.notes, *few))


def _marker(model: str) -> dict[str, Any] | None:
    try:
        marker = storage.read_json(storage.join(model, MARKER))
    except ValueError:
        return None
    return marker if isinstance(marker, dict) else None


def discard(paths: StagePaths) -> None:
    """Delete a fit: its checkpoints, its model and its log."""
    # The newest checkpoint goes last: should this be cut short, what is left still says what it was made with.
    for root in (storage.join(paths.checkpoints, folders.POSTHOC), paths.checkpoints):
        for folder in reversed(folders.folders(root)):
            folders.delete(folder)
    for name in ("tensorboard", "samples"):
        _delete_tree(storage.join(paths.logs, name))
    _delete_tree(paths.model)
    for name in ("log.jsonl", "events.jsonl", "trackers.json"):  # another fit is another run of a tracker
        storage.remove(storage.join(paths.logs, name))
    storage.remove(storage.join(paths.checkpoints, "latest"))


def _delete_tree(url: str) -> None:
    if storage.is_local(url):
        shutil.rmtree(storage.local_path(url), ignore_errors=True)
        return
    fs, path = url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


__all__ = ["StageState", "TrainingSections", "discard", "judge", "open_input", "stage_paths", "stage_state"]
