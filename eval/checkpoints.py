"""Which weights are evaluated: a complete checkpoint of the run, or the exported pipeline where there is none.

The digest of the UNet's weights file is what generated shards depend on; it comes from the checkpoint's own manifest,
so that finding a checkpoint reads no tensor.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_file, digest_json
from shards.layout import RunPaths
from shards.settings import StageError


def weights_state(weights: str) -> str | None:
    """The state of a checkpoint that these weights are; None for those that are put together (posthoc:0.08)."""
    return None if weights.startswith("posthoc:") else "weights" if weights == "raw" else weights


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model under test. resolution: side of its pictures, px; images: how many it was trained on (None if unknown);
    exported: it is <run>/model itself."""

    name: str
    weights: str
    digest: str
    resolution: int
    images: int | None
    exported: bool


def find(run: RunPaths, checkpoint: str = "latest", weights: str = "ema") -> Subject:
    """The named checkpoint, or the newest complete one; StageError says what to run where there is none."""
    name = _newest(run) if checkpoint == "latest" else checkpoint
    if name is not None:
        return _checkpoint(run, name, weights)
    exported = storage.read_json(storage.join(run.model, "unet", "config.json"))
    if exported is None:
        raise StageError(f"{run.run}: there is no complete checkpoint and no exported model; run the train stage first")
    provenance = storage.read_json(storage.join(run.model, "carrara.json")) or {}
    if provenance.get("weights", weights) != weights:
        raise StageError(
            f"{run.model}: the exported pipeline has the weights '{provenance['weights']}', and there is no checkpoint "
            f"with others; set eval.weights to {provenance['weights']}"
        )
    file = storage.local_path(storage.join(run.model, "unet", "diffusion_pytorch_model.safetensors"))
    if not file.is_file():
        raise StageError(
            f"{run.model}: the exported pipeline has no {file.name}; run the train stage again to export it"
        )
    return Subject(
        name=str(provenance.get("checkpoint") or "model"),
        weights=weights,
        digest=digest_file(file),
        resolution=_exported_resolution(run, exported),
        images=provenance.get("images_seen"),
        exported=True,
    )


def build_pipeline(run: RunPaths, subject: Subject) -> Any:
    """The diffusers pipeline of `subject`, on the CPU in float32. StageError where its weights are damaged."""
    if not subject.exported:
        from train import folders

        if fault := folders.damage(storage.join(run.checkpoints, subject.name)):
            raise StageError(f"{fault}; evaluate another checkpoint")
        from train.export import build_pipeline as build

        return build(run.run, checkpoint=subject.name, weights=subject.weights)
    import diffusers
    import transformers

    # A worker's progress is in pictures; bars of files being read would only lie between.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model = str(storage.local_path(run.model))
    return diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True)


def complete(run: RunPaths) -> list[str]:
    """Names of the complete checkpoints, newest first, judged by their manifests and their files' sizes."""
    if not storage.list_names(run.checkpoints):
        return []
    from train.folders import damage, folders, name_of

    return [name_of(f) for f in folders(run.checkpoints) if not damage(f, deep=False)]


def _newest(run: RunPaths) -> str | None:
    return next(iter(complete(run)), None)


def _checkpoint(run: RunPaths, name: str, weights: str) -> Subject:
    folder = storage.join(run.checkpoints, name)
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    if not isinstance(manifest, dict):
        there = [n for n in storage.list_names(run.checkpoints) if not n.startswith(".") and n != "latest"]
        raise StageError(
            f"eval.checkpoint: {folder} is not a complete checkpoint; there are {', '.join(there[-5:]) or 'none'}"
        )
    config = manifest.get("model_config") or {}
    return Subject(
        name=name,
        weights=weights,
        digest=digest_json({"weights": _weights_digest(run, folder, manifest, weights), "config": config}),
        resolution=int(manifest.get("resolution") or Dataset.open(run.latents).manifest["resolution"]),
        images=manifest.get("images"),
        exported=False,
    )


def _weights_digest(run: RunPaths, folder: str, manifest: dict[str, Any], weights: str) -> str:
    from train import folders

    state, there = weights_state(weights), folders.states(manifest)
    if state is None:  # from the snapshots up to this checkpoint: which ones there are, of which training
        place, images = storage.join(run.checkpoints, folders.POSTHOC), int(manifest.get("images") or 0)
        used = {}
        for name in storage.list_names(place):
            snapshot = storage.read_json(storage.join(place, name, folders.MANIFEST)) if "." not in name else None
            if snapshot is not None and snapshot["images"] <= images:
                used[name] = digest_json(snapshot["files"])
            elif (at := name.removesuffix(".safetensors").rpartition("-")[2]).isdigit() and int(at) <= images:
                used[name] = str(storage.size(storage.join(place, name)))
        raw = folders.weights_digest(manifest, "weights")
        return digest_json({"weights": weights, "snapshots": used, "raw": raw})
    if state not in there:
        averages = sorted(s for s in there if s.startswith("ema"))
        raise StageError(f"{folder} has no weights '{state}'; set eval.weights to {' or '.join([*averages, 'raw'])}")
    return folders.weights_digest(manifest, state)


def _exported_resolution(run: RunPaths, unet: dict[str, Any]) -> int:
    size = unet.get("sample_size")
    if not isinstance(size, int) or size < 1:
        raise StageError(
            f"{run.model}: the UNet's configuration names no square sample_size, so its pictures have no size"
        )
    vae = storage.read_json(storage.join(run.model, "vae", "config.json")) or {}
    return int(size * 2 ** (len(vae.get("block_out_channels", (0,))) - 1))
