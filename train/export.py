"""A checkpoint as a diffusers pipeline that opens where there is no Carrara.

    from diffusers import StableDiffusionPipeline
    StableDiffusionPipeline.from_pretrained("<run>/model")("a red circle on a blue ground").images[0]

    carrara export runs/demo [--checkpoint step-00001000] [--weights raw] [--precision float16] [--out FOLDER]

The UNet's weights come from the checkpoint, the VAE and the CLIP from where the latents were made that it was trained
on, as its manifest says, and are refused where they are not the same ones. A UNet that is given sizes becomes a
StableDiffusionXLPipeline. What was fine-tuned with an adapter is merged, and lies beside it in the form that diffusers'
load_lora_weights (or peft) reads; a learned word lies there as load_textual_inversion reads it. The text encoder and
its tokenizer are transformers' own (text_export.py).
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from latents.encoders import TextEncoder, Vae, require_digest
from latents.text import ClipPair, SequenceEncoder, moved
from latents.weights import PAIR, SEQUENCE, clips_of, find_clip, find_sequence, find_vae
from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import Fingerprint, digest_json
from shards.layout import RunPaths
from shards.local import replace_folder, temporary_folder
from shards.settings import ConfigError, StageError
from train import adapters, alignment, autoencoder_dc_pipeline, posthoc, sequence_pipeline
from train.autoencoder_dc_pipeline import AutoencoderDCPipeline
from train.checkpoint import load_weights, put_file
from train.config import TrainConfig, stored_config
from train.folders import CHUNK, MANIFEST, POSTHOC, latest_complete, name_of, read_manifest
from train.image_conditioning import WAYS, control_net, low_res_scheduler
from train.model_card import model_card
from train.objective import public_config
from train.pipelines import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, pipeline_of
from train.schedulers import scheduler
from train.sequence_pipeline import SequencePipeline
from train.state import describe
from train.text_export import clip_text_model, save_text_encoder, tokenizer, write_tokenizer

VERSION = 2  # raise it when the same checkpoint gives another folder
PROVENANCE = "carrara.json"
# Our own pipelines, for which diffusers has none, and the modules that go along with the models that need them.
OWN_PIPELINES = {SequencePipeline: sequence_pipeline, AutoencoderDCPipeline: autoencoder_dc_pipeline}
UPSCALER_SCALE = 0.08333  # what diffusers' StableDiffusionUpscalePipeline sets a VAE's scaling_factor to


def export(
    run: str,
    checkpoint: str = "latest",
    weights: str = "ema",
    dtype: str = "float32",
    out: str | None = None,
    licence: str | None = None,
) -> str:
    """Write `<run>/model` (or `out`) from a checkpoint, atomically; nothing is done where it is there already.

    checkpoint: a folder name under `<run>/checkpoints`, `latest`, or `best` by its
    validation. weights: `ema`, `raw`, one of the further EMAs
    (`ema_0.050`), or `posthoc:STD`, an EMA of any relative deviation put together from their snapshots. dtype:
    float32 or float16. licence: of the weights, for the model card. Returns the folder. Raises StageError where the
    checkpoint, or the weights the latents were made with, are gone.
    """
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"the weights are exported as float32 or float16, not '{dtype}'")
    paths = RunPaths(run)
    final = out or paths.model
    source = _Source(paths, checkpoint, weights, dtype, licence)
    if out and storage.exists(final) and not storage.exists(storage.join(final, PROVENANCE)):
        raise ConfigError(f"{final} is there and is no exported model; name a folder that is not there yet")
    fingerprint = source.fingerprint()
    existing = storage.read_json(storage.join(final, PROVENANCE))
    if existing is not None and existing.get("fingerprint", {}).get("digest") == fingerprint.digest:
        return final
    pipeline = source.pipeline()
    provenance = source.provenance(fingerprint)
    local = storage.is_local(final)
    tmp = temporary_folder(storage.local_path(final)) if local else Path(tempfile.mkdtemp(prefix="carrara-"))
    try:
        _write(_in_dtype(pipeline, getattr(torch, dtype)), provenance, source.pads, tmp)
        source.write_tuning(tmp)
        if local:
            replace_folder(tmp, storage.local_path(final))
        else:
            _upload(tmp, final)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # it is there only where something failed, or was uploaded
    return final


def _upload(folder: Path, url: str) -> None:
    """Put a finished folder on an object store; it counts as a model once its provenance is there, which goes last."""
    storage.remove(storage.join(url, PROVENANCE))
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f != folder / PROVENANCE):
        with file.open("rb") as f:
            put_file(storage.join(url, file.relative_to(folder).as_posix()), _chunks(f))
    storage.write_atomic(storage.join(url, PROVENANCE), (folder / PROVENANCE).read_bytes())


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def build_pipeline(run: str, checkpoint: str = "latest", weights: str = "ema") -> Any:
    """The StableDiffusionPipeline of a checkpoint in memory, float32 on the CPU, without its progress bar."""
    source = _Source(RunPaths(run), checkpoint, weights)
    pipeline = source.pipeline()
    if source.config.textual_inversion:
        token = source.config.textual_inversion.token
        pipeline.load_textual_inversion(source.tuned["rows"], token=token)
    return pipeline


def _in_dtype(pipeline: Any, dtype: torch.dtype) -> Any:
    """The pipeline in that type, but an encoder of transformers in bfloat16 for float16, in which T5 overflows."""
    if isinstance(pipeline, SequencePipeline) and dtype == torch.float16:
        moved(pipeline.text_encoder, pipeline.device, torch.bfloat16)
        for part in (pipeline.unet, pipeline.vae):
            part.to(dtype=dtype)
        return pipeline
    return pipeline.to(dtype=dtype)


def _write(pipeline: Any, provenance: dict[str, Any], pads: list[str], folder: Path) -> None:
    """pads: what each of a CLIP's tokenizers fills prompts up with."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    suffixes = [s for s in ("", "_2") if getattr(pipeline, f"text_encoder{s}", None) is not None]
    if isinstance(pipeline, SequencePipeline):  # transformers' own files are as they should be
        suffixes = []
    if (source := OWN_PIPELINES.get(type(pipeline))) is not None:  # its class goes along
        shutil.copyfile(str(source.__file__), folder / "pipeline.py")
        index = json.loads((folder / "model_index.json").read_bytes())
        index["_class_name"] = ["pipeline", type(pipeline).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for suffix, pad in zip(suffixes, pads, strict=True):  # one text encoder of SDXL's is its second
        save_text_encoder(getattr(pipeline, f"text_encoder{suffix}"), folder / f"text_encoder{suffix}")
        names = folder / f"tokenizer{suffix}"
        for file in names.iterdir():
            file.unlink()
        write_tokenizer(names, getattr(pipeline, names.name).model_max_length, pad)
    (folder / "README.md").write_text(model_card(provenance), encoding="utf-8")
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class _Source:
    """What a pipeline is made of: a checkpoint, and the encoders that its latents were made with."""

    def __init__(
        self, paths: RunPaths, checkpoint: str, weights: str, dtype: str = "float32", licence: str | None = None
    ) -> None:
        if weights != "raw" and not re.fullmatch(r"ema(_0\.\d{3})?|posthoc:0?\.\d+", weights):
            raise ConfigError(
                f"the weights to export are 'ema', 'raw', an EMA such as 'ema_0.050' or 'posthoc:0.08', not '{weights}'"
            )
        self.paths, self.weights, self.dtype = paths, weights, dtype
        self.folder = _checkpoint_folder(paths, checkpoint)
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self.config = stored_config(self.manifest["config"])
        if "encoders" not in self.manifest:
            self.manifest |= _facts_of_old(paths, self.folder, self.manifest, self.config)
        self.vae_facts, self.text_facts = self.manifest["encoders"]["vae"], self.manifest["encoders"]["text"]
        self.licence = licence or self.config.licence
        # What fine-tuning made of the UNet and of the text encoders, under its own names.
        self.tuned: dict[str, torch.Tensor] = {}
        self.tuned_texts: dict[str, dict[str, torch.Tensor]] = {}  # by the encoders' names in the pipeline

    @property
    def pads(self) -> list[str]:
        """What fills up a prompt, of each CLIP."""
        if self.text_facts.get("kind") == SEQUENCE:
            return []
        return [facts.get("pad", "zero") for facts in clips_of(self.text_facts)]

    def fingerprint(self) -> Fingerprint:
        """What the exported folder's bytes depend on."""
        settings = {"checkpoint": name_of(self.folder), "weights": self.weights, "layer": self.text_facts["layer"]}
        settings |= {"dtype": self.dtype, "licence": self.licence}
        digests = {"vae": self.vae_facts["digest"], "text": self.text_facts["digest"]}
        return Fingerprint("export", VERSION, settings, digest_json(self.manifest), digests)

    def pipeline(self) -> Any:
        """The StableDiffusionPipeline, the StableDiffusionXLPipeline of a UNet that is given sizes, the class for the
        way in which it is given an image (image_conditioning.py), or our own for an encoder of transformers
        (sequence_pipeline.py).
        """
        vae = self._vae()
        text = self._text()
        unet, learned = self._unet(vae)
        reads = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        if reads != text.width:
            raise StageError(
                f"{self.folder}: its UNet attends to {reads} values a token, "
                f"where {text.called} of the latents has {text.width}"
            )
        scale = self.vae_facts["scaling_factor"]
        # The upscaler's pipeline in diffusers sets this factor, whatever the VAE says.
        wanted = UPSCALER_SCALE if self.config.upscale else scale
        model = fold_shift(vae.model, scale / wanted)
        model.register_to_config(scaling_factor=wanted)
        if isinstance(text, SequenceEncoder):
            parts = {"vae": model, "unet": unet, "scheduler": scheduler(self.config)}
            given = {"text_encoder": text.model, "tokenizer": text.tokenizer, "max_length": text.context_length}
            found = SequencePipeline(**parts, **given)
            found.set_progress_bar_config(disable=True)
            return found
        sized = pipeline_of(unet.config) is STABLE_DIFFUSION_XL
        encoder = clip_text_model(text.second if isinstance(text, ClipPair) else text, projected=sized)
        encoders = {"text_encoder_2" if sized else "text_encoder": encoder}
        if isinstance(text, ClipPair):
            encoders["text_encoder"] = clip_text_model(text.first, first_of_two=True)
        for name, one in encoders.items() if self.config.text_encoder else ():
            own = {k.partition(".")[2]: v for k, v in learned.items() if k.startswith(f"{name}.")}
            self._learned_text(name, one, own if len(encoders) > 1 else learned)
        parts = {"vae": model, "unet": unet, "scheduler": scheduler(self.config)}
        if self.config.control:
            parts["controlnet"] = self._control(unet, vae, learned)
        if self.config.upscale:
            parts |= {"low_res_scheduler": low_res_scheduler(), "max_noise_level": self.config.upscale.max_noise_level}
        kind: str | type = STABLE_DIFFUSION.name
        if self.config.conditioned_by:
            kind = WAYS[self.config.conditioned_by].pipeline
        if vae.weights.kind == "AutoencoderDC":
            kind = AutoencoderDCPipeline
        if isinstance(text, ClipPair):
            first = {"text_encoder": encoders["text_encoder"], "tokenizer": tokenizer(text.first)}
            pipeline = _sdxl(text.second, encoder, parts | first)
        else:
            pipeline = _sdxl(text, encoder, parts) if sized else _sd(kind, text, encoder, parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def provenance(self, fingerprint: Fingerprint) -> dict[str, Any]:
        """Where the model comes from, as stored in carrara.json."""
        sources = self.manifest["sources"]
        status: Counter[str] = Counter()
        for source in sources:
            status.update(source.get("status") or {})
        prints = [source["fingerprint"] for source in sources]
        return {
            "checkpoint": name_of(self.folder),
            "weights": self.weights,
            "images_seen": self.manifest.get("images"),
            "steps": self.manifest.get("step"),
            "dtype": self.dtype,
            "licence": self.licence,
            "sources": sources,
            "training": {k: v for k, v in self.manifest["config"].items() if k != "unet"},
            "latents": {
                "fingerprint": prints[0] if len(prints) == 1 else digest_json(prints),
                "resolution": self.manifest["resolution"],
                **{n: sum(s.get(n) or 0 for s in sources) for n in ("samples", "rows", "shards")},
                **({n: sources[0].get(n) for n in ("first_shard", "last_shard")} if len(sources) == 1 else {}),
                "status": dict(status),
            },
            "vae": {k: self.vae_facts[k] for k in ("ref", "digest", "scaling_factor", "kind") if k in self.vae_facts},
            "text": dict(self.text_facts),
            "libraries": {n: importlib.metadata.version(n) for n in ("torch", "diffusers", "transformers")},
            "fingerprint": fingerprint.to_json(),
        }

    def _unet(self, vae: Vae) -> tuple[Any, dict[str, torch.Tensor]]:
        """The UNet, and what else the checkpoint holds: values of a learned text encoder, word, or ControlNet."""
        from diffusers import UNet2DConditionModel

        values = {k: v for k, v in self._weights().items() if not k.startswith(f"{alignment.NAME}.")}
        if self.config.control:
            unet, values = self._base(), {k.removeprefix("control."): v for k, v in values.items()}
            if self.config.learned_variance:
                unet = without_variance(unet)
            unet.register_to_config(sample_size=self.manifest["resolution"] // vae.downscale)
            return unet.eval().requires_grad_(False), values
        learned = {k.removeprefix("text."): v for k, v in values.items() if k.startswith("text.")}
        if "rows" in values:  # a word, as it was called before the UNet and the text shared a model
            learned = {"rows": values.pop("rows")}
        if learned:
            values = {k.removeprefix("unet."): v for k, v in values.items() if k.startswith("unet.")}
        if not self.config.adapter and not self.config.textual_inversion:
            unet = UNet2DConditionModel.from_config(self.manifest["model_config"])
            unet.load_state_dict(values)
        else:
            unet = self._base()
            if self.config.adapter:
                adapters.add(unet, self.config.adapter, 0)
                require_all(unet.load_state_dict(values, strict=False), self.folder)
                self.tuned = adapters.state(unet)
                unet = adapters.merge(unet)
            else:
                self.tuned = {"rows": learned["rows"]}
        if self.config.learned_variance:
            unet = without_variance(unet)
        # The pipeline draws images of this size unless told otherwise.
        unet.register_to_config(sample_size=self.manifest["resolution"] // vae.downscale)
        return unet.eval().requires_grad_(False), learned

    def _control(self, unet: Any, vae: Vae, learned: dict[str, torch.Tensor]) -> Any:
        """The ControlNet of a checkpoint's values."""
        control = control_net(unet, vae.downscale)
        control.load_state_dict(learned)
        return control.eval().requires_grad_(False)

    def _learned_text(self, name: str, encoder: Any, learned: dict[str, torch.Tensor]) -> None:
        """Put what a text encoder learned into transformers' model of it, in place. name: in the pipeline."""
        assert self.config.text_encoder is not None
        if self.config.text_encoder.kind == "full":
            require_all(encoder.load_state_dict(learned, strict=False), self.folder)  # what is not read did not learn
            return
        tuned = adapters.tuned_text(copy.deepcopy(encoder), learned, self.config.text_encoder, self.folder)
        self.tuned_texts[name] = adapters.state(tuned)
        encoder.load_state_dict(adapters.merged_weights(tuned))

    def _base(self) -> Any:
        """The UNet that was fine-tuned; raises StageError where it is not the same one any more."""
        ref = self.config.start_from or ""
        weights = self.manifest["fingerprint"].get("weights") or {}
        require_digest("the UNet of train.start_from", adapters.digest(ref), weights.get("start_from", ""), ref)
        return adapters.load_unet(ref)

    def _weights(self) -> dict[str, torch.Tensor]:
        if not self.weights.startswith("posthoc:"):
            return load_weights(self.folder, self.weights)
        return posthoc.reconstruct(
            storage.join(self.paths.checkpoints, POSTHOC),
            int(self.manifest["images"]),
            float(self.weights.partition(":")[2]),
        )

    def write_tuning(self, folder: Path) -> None:
        """What fine-tuning made, in the form in which others take it; nothing for a model of its own."""
        from safetensors.torch import save_file

        dtype = getattr(torch, self.dtype)
        values = {k: v.to(dtype).contiguous() for k, v in self.tuned.items()}
        texts = {n: {k: v.to(dtype).contiguous() for k, v in own.items()} for n, own in self.tuned_texts.items()}
        if self.config.textual_inversion:
            save_file({self.config.textual_inversion.token: values["rows"]}, folder / "learned_embeds.safetensors")
            return
        unet = self.config.adapter if self.config.adapter and self.config.adapter.is_lora else None
        if unet or texts:
            sized = pipeline_of(self.manifest["model_config"]) is STABLE_DIFFUSION_XL
            adapters.save_lora(values if unet else {}, unet, texts, self.config.text_encoder, sized, folder / "lora")
        if self.config.adapter and not unet:
            adapters.save_peft(values, self.config.adapter, folder / "adapter")

    def _vae(self) -> Vae:
        beside = storage.join(self.paths.autoencoder, "model")
        return Vae(_same_weights("the VAE", find_vae, self.vae_facts, beside))

    def _text(self) -> TextEncoder | ClipPair | SequenceEncoder:
        if self.text_facts.get("kind") == SEQUENCE:
            weights = _same_weights("the text encoder", find_sequence, self.text_facts, self.text_facts["ref"])
            return SequenceEncoder(weights, int(self.text_facts["context_length"]))
        beside = storage.join(self.paths.clip, "model")
        clips = []
        for facts in clips_of(self.text_facts):
            found = _same_weights("the CLIP", find_clip, facts, beside)
            clips.append(TextEncoder(found, facts["layer"], pad=facts.get("pad", "zero")))
        return ClipPair(*clips) if self.text_facts.get("kind") == PAIR else clips[0]


def _facts_of_old(paths: RunPaths, folder: str, manifest: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What checkpoints hold of their encoders, for one from before they did: from the run's latents.

    Raises StageError where those are not there, or were made again with other encoders meanwhile.
    """
    latents = Dataset.open(paths.latents)
    trained = manifest.get("fingerprint", {}).get("weights") or {}
    for what, name in (("vae", "VAE"), ("text", "CLIP")):
        if trained.get(what, latents.manifest[what]["digest"]) != latents.manifest[what]["digest"]:
            raise StageError(
                f"{paths.latents} was made again with another {name} than {name_of(folder)} was trained with, and that "
                "checkpoint does not say where its own lies; bring the earlier latents back"
            )
    return {
        "encoders": {"vae": latents.manifest["vae"], "text": latents.manifest["text"]},
        "resolution": (*config.resolutions, latents.manifest["resolution"])[0],
        "sources": [describe(latents)],
    }


@torch.no_grad()
def without_variance(unet: Any) -> Any:
    """The UNet of a learned variance without that half of its output.

    A pipeline's guidance extrapolates all of the output, and a variance that is extrapolated leaves its range (guided
    diffusion and DiT guide the other half alone). DDIM, which asks for none, is also the better sampler at few steps
    (Nichol & Dhariwal 2021, arXiv:2102.09672, figure 8).
    """
    from diffusers import UNet2DConditionModel

    config = public_config(unet)
    channels = config["out_channels"] // 2
    plain = UNet2DConditionModel.from_config({**config, "out_channels": channels})
    weights = unet.state_dict()
    for part in ("weight", "bias"):
        weights[f"conv_out.{part}"] = weights[f"conv_out.{part}"][:channels]
    plain.load_state_dict(weights)
    return plain


@torch.no_grad()
def fold_shift(vae: Any, factor: float = 1.0) -> Any:
    """A VAE whose latents are shifted before they are scaled (Stable Diffusion 3), as one that shifts by itself, and
    whose latents are `factor` times as large.

    StableDiffusionPipeline scales alone, and its upscaler by a number of its own. Shift and factor go into the 1x1
    convolutions behind the encoder and before the decoder, which are added where there are none; nothing else is
    changed, and nothing where there is neither.
    """
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
    if not shift and factor == 1.0:
        return vae
    if not hasattr(vae, "post_quant_conv"):
        raise StageError(
            f"an {type(vae).__name__} has no convolutions that could shift or scale its latents, which the pipeline "
            "does not do; train on latents of an AutoencoderKL"
        )
    channels = int(vae.config.latent_channels)
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if getattr(vae, name, None) is None:
            mixing = torch.nn.Conv2d(width, width, 1)
            mixing.weight.copy_(torch.eye(width)[:, :, None, None])
            mixing.bias.zero_()
            setattr(vae, name, mixing.requires_grad_(False))
            vae.register_to_config(**{f"use_{name}": True})
    vae.quant_conv.bias[:channels] -= shift
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * math.log(factor)  # the logarithm of the variance
    vae.post_quant_conv.bias += vae.post_quant_conv.weight.sum(dim=(1, 2, 3)) * shift
    vae.post_quant_conv.weight /= factor
    vae.register_to_config(shift_factor=None)
    return vae


def require_all(loaded: Any, where: str) -> None:
    """Raise StageError where a fine-tuned model's file held weights that the model lacks."""
    if loaded.unexpected_keys:
        raise StageError(f"{where} holds {loaded.unexpected_keys[0]}, which the model of train.start_from lacks")


def _checkpoint_folder(paths: RunPaths, checkpoint: str) -> str:
    if checkpoint == "latest":
        found = latest_complete(paths.checkpoints)
        if found is None:
            raise StageError(f"{paths.checkpoints}: there is no complete checkpoint here; run the train stage")
        return found
    if checkpoint == "best":
        newest = latest_complete(paths.checkpoints)
        checkpoint = (read_manifest(newest).get("best") if newest else None) or "best"
    folder = storage.join(paths.checkpoints, checkpoint)
    if not storage.exists(storage.join(folder, MANIFEST)):
        raise StageError(f"{paths.checkpoints}: there is no complete checkpoint '{checkpoint}' here")
    return folder


def _same_weights(what: str, find: Callable[[str], Any], facts: dict[str, Any], beside: str) -> Any:
    """The weights the latents were made with: where they lay then, or in this run's own folder if it was moved."""
    found = None
    for ref in (facts["ref"], beside):
        try:
            candidate = find(ref)
        except ConfigError:
            continue
        if candidate.digest == facts["digest"]:
            return candidate
        found = found or candidate
    if found is None:
        raise StageError(f"{what} that the latents were made with is not at '{facts['ref']}' any more; bring it back")
    require_digest(what, found.digest, facts["digest"], found.ref)
    raise AssertionError("unreachable: the digests differ")


# ---- pipelines -------------------------------------------------------------------------------------


def _sd(kind: str | type, text: TextEncoder, encoder: Any, parts: dict[str, Any]) -> Any:
    """One of diffusers' StableDiffusion...Pipeline classes by its name, or a class like them."""
    import diffusers

    given = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == WAYS["upscale"].pipeline:
        del given["requires_safety_checker"]  # it asks for none
    build: Any = getattr(diffusers, kind) if isinstance(kind, str) else kind
    return build(**parts, **given, text_encoder=encoder, tokenizer=tokenizer(text))


def _sdxl(text: TextEncoder, encoder: Any, parts: dict[str, Any]) -> Any:
    """With one text encoder, the second of SDXL's two, as SDXL's refiner has it, where `parts` has no first."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        **{"text_encoder": None, "tokenizer": None, **parts},
        text_encoder_2=encoder,
        tokenizer_2=tokenizer(text),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
