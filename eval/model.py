"""Which model is evaluated: a checkpoint of the run, its exported pipeline, or any diffusers text-to-image pipeline.

A model's digest covers everything that draws: the denoiser's weights, the VAE's, the text encoders', and the scheduler.
For a checkpoint it comes from manifests, so that finding one reads no tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from eval.networks.weights import model_folder
from latents.weights import SEQUENCE, clips_of
from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_bytes, digest_file, digest_json
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError

MAX_CONFIG = 10_000_000  # bytes of a model's JSON
DENOISERS = ("unet", "transformer")
# The classes of exported models for which diffusers has none (train/export.py).
SEQUENCE_PIPELINE, AUTOENCODER_DC_PIPELINE = "SequencePipeline", "AutoencoderDCPipeline"
OURS = [["pipeline", SEQUENCE_PIPELINE], ["pipeline", AUTOENCODER_DC_PIPELINE]]


def weights_state(weights: str) -> str | None:
    """The state of a checkpoint that these weights are; None for those that are put together (posthoc:0.08)."""
    return None if weights.startswith("posthoc:") else "weights" if weights == "raw" else weights


@dataclasses.dataclass(frozen=True)
class Model:
    """The model under test. name: of its folder under <run>/eval; parts: digest of each part's weights; size: side of
    its images, px; images_seen: how many it was trained on (None if unknown); folder: of a pipeline, None for a
    checkpoint; scheduler: its configuration."""

    name: str
    weights: str
    parts: dict[str, str]
    size: int
    images_seen: int | None
    folder: str | None
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    safety_checker: bool = False  # it has one, which is left out

    @property
    def digest(self) -> str:
        """Of all parts."""
        return digest_json({"parts": self.parts, "weights": self.weights})

    def to_json(self) -> dict[str, Any]:
        """What a result says of its model."""
        return {
            "name": self.name,
            "weights": self.weights,
            "parts": self.parts,
            "digest": self.digest,
            "images_seen": self.images_seen,
            "safety_checker_removed": self.safety_checker,
        }


def find(run: RunPaths, checkpoint: str = "latest", weights: str = "ema") -> Model:
    """The named checkpoint, or the newest complete one, or the exported pipeline where there is none; StageError says
    what to run where there is neither."""
    name = _newest(run) if checkpoint == "latest" else checkpoint
    if name is not None:
        return _checkpoint(run, name, weights)
    if not storage.exists(storage.join(run.model, "model_index.json")):
        raise StageError(f"{run.run}: there is no complete checkpoint and no exported model; run the train stage first")
    provenance = storage.read_json(storage.join(run.model, "carrara.json")) or {}
    if provenance.get("weights", weights) != weights:
        raise StageError(
            f"{run.model}: the exported pipeline has the weights '{provenance['weights']}', and there is no checkpoint "
            f"with others; set eval.weights to {provenance['weights']}"
        )
    found = of_pipeline(str(storage.local_path(run.model)))
    return dataclasses.replace(
        found,
        name=str(provenance.get("checkpoint") or "model"),
        weights=weights,
        images_seen=provenance.get("images_seen"),
    )


def of_pipeline(ref: str) -> Model:
    """The diffusers pipeline in a folder, or of a name on the hub; ConfigError where it is none.

    Its digest covers every part's configuration and weight files but the safety checker, which is not used.
    """
    folder = model_folder(ref, "eval.model", ["*.json", "*.safetensors", "*.txt", "*.model"], ["safety_checker/*"])
    index = _config(folder / "model_index.json", "eval.model")
    kind = next((k for k in DENOISERS if index.get(k, [None])[0]), None)
    if kind is None:
        raise ConfigError(f"eval.model: {ref} has neither a unet nor a transformer, so it generates nothing from noise")
    parts = {}
    for part, value in sorted(index.items()):
        if (
            isinstance(value, list)
            and value[0]
            and part[0] != "_"
            and part not in ("safety_checker", "feature_extractor", "scheduler")
        ):
            files = sorted(p for p in (folder / part).rglob("*") if p.suffix in (".safetensors", ".json", ".txt"))
            if part in (*DENOISERS, "vae") and not any(p.suffix == ".safetensors" for p in files):
                raise ConfigError(f"eval.model: {folder / part} has no .safetensors; weights are read from those alone")
            parts[part] = digest_json([[p.name, _digest(str(p), os.stat(p).st_mtime_ns)] for p in files])
    scheduler = _config(folder / "scheduler" / "scheduler_config.json", "eval.model")
    own = {k: v for k, v in scheduler.items() if not k.startswith("_")}
    parts["scheduler"] = digest_bytes(json.dumps(own, sort_keys=True).encode())  # it may hold an infinity
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(str(ref).rstrip("/"))).strip(".-") or "model"
    return Model(
        f"{name}-{digest_json(parts)[:8]}",
        "model",
        parts,
        _size(folder, kind),
        None,
        str(folder),
        scheduler,
        bool(index.get("safety_checker", [None])[0]),
    )


def build_pipeline(run: RunPaths, model: Model) -> Any:
    """The diffusers pipeline of `model`, on the CPU in float32, without a safety checker. StageError where its weights
    are damaged."""
    import diffusers
    import transformers

    # A worker's progress is in images; bars of files being read would only lie between.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if model.folder is None:
        from train import folders

        if fault := folders.damage(storage.join(run.checkpoints, model.name)):
            raise StageError(f"{fault}; evaluate another checkpoint")
        from train.export import build_pipeline as build

        return build(run.run, checkpoint=model.name, weights=model.weights)
    # A checker paints what it dislikes black, and black images count in every score; it is for users, not for this.
    off = {"safety_checker": None, "requires_safety_checker": False} if model.safety_checker else {}
    try:
        index = diffusers.DiffusionPipeline.load_config(model.folder, local_files_only=True)
        if index.get("_class_name") in OURS:
            return _own_pipeline(Path(model.folder), index)
        return diffusers.DiffusionPipeline.from_pretrained(
            model.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **off
        )
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as e:
        why = " ".join(str(e).split())[:200]
        raise StageError(f"{model.folder} cannot be opened as a diffusers pipeline: {why}") from None


def _own_pipeline(folder: Path, index: dict[str, Any]) -> Any:
    """An exported model of one of our own classes, by the code here: what lies beside the weights is not run."""
    import diffusers
    import torch
    import transformers

    from latents.text import SequenceEncoder
    from latents.weights import find_sequence
    from train.autoencoder_dc_pipeline import AutoencoderDCPipeline
    from train.sequence_pipeline import SequencePipeline

    parts: dict[str, Any] = {}
    bases = {"vae": diffusers.ModelMixin, "unet": diffusers.UNet2DConditionModel, "scheduler": diffusers.SchedulerMixin}
    for name, base in bases.items():
        kind = getattr(diffusers, str(index[name][1]), None)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise ValueError(f"its {name} is a {index[name][1]}, which diffusers does not have")
        how = {} if name == "scheduler" else {"use_safetensors": True, "torch_dtype": torch.float32}
        opened: Any = kind
        parts[name] = opened.from_pretrained(folder / name, local_files_only=True, **how)
    if index["_class_name"][1] == AUTOENCODER_DC_PIPELINE:
        encoder = transformers.CLIPTextModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        return AutoencoderDCPipeline(**parts, text_encoder=encoder, tokenizer=tokenizer)
    text = SequenceEncoder(find_sequence(str(folder)), int(index["max_length"]))
    return SequencePipeline(**parts, text_encoder=text.model, tokenizer=text.tokenizer, max_length=text.context_length)


def from_prompts(pipeline: Any) -> Any:
    """A pipeline that generates from prompts alone, of the same parts: of a ControlNet's, the model that it steers.

    Raises StageError where the denoiser cannot do without an image.
    """
    import diffusers

    if takes_image(pipeline):
        raise StageError(
            f"a {type(pipeline).__name__} is given an image beside each prompt, and cannot be judged by prompts "
            "alone; generate with `carrara sample RUN --image ...`"
        )
    if getattr(pipeline, "controlnet", None) is None:
        return pipeline
    return diffusers.AutoPipelineForText2Image.from_pipe(pipeline, controlnet=None)


def takes_image(pipeline: Any) -> bool:
    """Whether the UNet has input channels for an image beside those of the latents."""
    unet, vae = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    return unet is not None and vae is not None and unet.config.in_channels != vae.config.latent_channels


def control_settings(run: RunPaths, model: Model) -> dict[str, Any] | None:
    """How a ControlNet's control images were made (train.control); None for a model without one."""
    manifest = storage.read_json(storage.join(run.checkpoints, model.name, "manifest.json"))
    if manifest is None:
        manifest = {"config": (storage.read_json(storage.join(run.model, "carrara.json")) or {}).get("training", {})}
    found: dict[str, Any] | None = manifest["config"].get("control")
    return found


def complete(run: RunPaths) -> list[str]:
    """Names of the complete checkpoints, newest first, judged by their manifests and their files' sizes."""
    if not storage.list_names(run.checkpoints):
        return []
    from train.folders import damage, folders, name_of

    return [name_of(f) for f in folders(run.checkpoints) if not damage(f, contents=False)]


def _newest(run: RunPaths) -> str | None:
    return next(iter(complete(run)), None)


def _checkpoint(run: RunPaths, name: str, weights: str) -> Model:
    folder = storage.join(run.checkpoints, name)
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    if not isinstance(manifest, dict):
        there = [n for n in storage.list_names(run.checkpoints) if not n.startswith(".") and n != "latest"]
        raise StageError(
            f"eval.checkpoint: {folder} is not a complete checkpoint; there are {', '.join(there[-5:]) or 'none'}"
        )
    config = manifest.get("model_config") or {}
    latents = {} if {"resolution", "encoders"} <= manifest.keys() else Dataset.open(run.latents).manifest
    encoders = manifest.get("encoders") or {n: latents[n] for n in ("vae", "text")}
    parts = {
        "unet": digest_json({"weights": _weights_digest(run, folder, manifest, weights), "config": config}),
        "vae": str(encoders["vae"]["digest"]),
    }
    if encoders["text"].get("kind") == SEQUENCE:
        parts["transformers"] = str(encoders["text"]["digest"])
    else:
        for part, facts in zip(("text_encoder", "text_encoder_2"), clips_of(encoders["text"]), strict=False):
            parts[part] = str(facts["digest"])
    size = int(manifest.get("resolution") or latents["resolution"])
    return Model(name, weights, parts, size, manifest.get("images"), None)


def _weights_digest(run: RunPaths, folder: str, manifest: dict[str, Any], weights: str) -> str:
    from train import folders

    state, there = weights_state(weights), folders.states(manifest)
    if state is None:  # from the snapshots up to this checkpoint: which ones there are, of which training
        root, images = storage.join(run.checkpoints, folders.POSTHOC), int(manifest.get("images") or 0)
        used = {}
        for name in storage.list_names(root):
            snapshot = storage.read_json(storage.join(root, name, folders.MANIFEST)) if "." not in name else None
            if snapshot is not None and snapshot["images"] <= images:
                used[name] = digest_json(snapshot["files"])
            elif (at := name.removesuffix(".safetensors").rpartition("-")[2]).isdigit() and int(at) <= images:
                used[name] = str(storage.size(storage.join(root, name)))
        raw = folders.weights_digest(manifest, "weights")
        return digest_json({"weights": weights, "snapshots": used, "raw": raw})
    if state not in there:
        averages = sorted(s for s in there if s.startswith("ema"))
        raise StageError(f"{folder} has no weights '{state}'; set eval.weights to {' or '.join([*averages, 'raw'])}")
    return folders.weights_digest(manifest, state)


def _config(file: Path, option: str) -> dict[str, Any]:
    if not file.is_file() or file.stat().st_size > MAX_CONFIG:
        raise ConfigError(f"{option}: there is no {file}; name a diffusers pipeline's folder")
    try:
        found = json.loads(file.read_bytes())
    except ValueError as e:
        raise ConfigError(f"{option}: {file} is no JSON: {e}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{option}: {file} holds no configuration")
    return found


def _size(folder: Path, kind: str) -> int:
    """Side of the images in px: the denoiser's own latents times what the VAE enlarges by."""
    denoiser = _config(folder / kind / "config.json", "eval.model")
    side = denoiser.get("sample_size")
    if isinstance(side, list) and len(set(side)) == 1:
        side = side[0]
    if not isinstance(side, int) or side < 1:
        raise StageError(f"{folder}: the {kind}'s configuration names no square sample_size; set eval.size")
    vae = folder / "vae" / "config.json"
    if not vae.is_file():
        return side  # a model of pixels
    config = _config(vae, "eval.model")
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (0,)
    return side * 2 ** (len(blocks) - 1)


@functools.lru_cache(maxsize=256)
def _digest(path: str, _changed: int) -> str:
    return digest_file(path) if os.path.getsize(path) > 1_000_000 else digest_bytes(Path(path).read_bytes())
