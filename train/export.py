"""A checkpoint as a diffusers pipeline that opens where there is no Carrara.

    from diffusers import StableDiffusionPipeline
    StableDiffusionPipeline.from_pretrained("<run>/model")("a red circle on a blue ground").images[0]

    carrara export runs/demo [--checkpoint step-00001000] [--weights raw] [--dtype float16] [--out FOLDER]

The UNet's weights come from the checkpoint, the VAE and the CLIP from where the latents were made, and
are refused where they are not the same ones. A UNet that is told sizes becomes a StableDiffusionXLPipeline. What was
fine-tuned with an adapter is merged, and lies beside it in the form that diffusers' load_lora_weights (or peft) reads;
a learned word lies there as load_textual_inversion reads it. The open_clip text tower becomes a transformers
CLIPTextModel with the layer choice baked into its depth, since `clip_skip` does not work with
transformers 5; the tokenizer is built from open_clip's own merges, with nothing downloaded.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latents.encoders import TextEncoder, Vae, kept_blocks, require_digest
from latents.weights import find_clip, find_vae
from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import Fingerprint, digest_json
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from train import adapters, diffusion, posthoc
from train.checkpoint import load_weights
from train.config import TrainConfig
from train.folders import POSTHOC, latest_complete
from train.model_card import model_card
from train.pipelines import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, pipeline_of, require_layer

VERSION = 1  # raise it when the same checkpoint gives another folder
PROVENANCE = "carrara.json"

SOT, EOT = "<|startoftext|>", "<|endoftext|>"
# open_clip fills captions up with id 0, which in its vocabulary is "!". Were "!" itself the pad token (as in
# Stable Diffusion 2's tokenizer), transformers would also turn every "!" of a prompt into it, where open_clip
# has 256 ("!" at the end of a word). So id 0 gets a second name that no prompt holds.
PAD, PAD_ID = "<|pad|>", 0

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def export(
    run: str, checkpoint: str = "latest", weights: str = "ema", dtype: str = "float32", out: str | None = None,
    licence: str | None = None,
) -> Path:  # fmt: skip
    """Write `<run>/model` (or `out`) from a checkpoint, atomically; nothing is done where it is there already.

    checkpoint: a folder name under `<run>/checkpoints`, or `latest`. weights: `ema`, `raw`, one of the further EMAs
    (`ema_0.050`), or `posthoc:STD`, an EMA of any relative deviation put together from their snapshots. dtype:
    float32 or float16. licence: of the weights, for the model card. Returns the folder. Raises StageError where the
    checkpoint, or the weights the latents were made with, are gone.
    """
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"the weights are exported as float32 or float16, not '{dtype}'")
    paths = RunPaths(run)
    final = storage.local_path(out or paths.model)
    source = _Source(paths, checkpoint, weights, dtype, licence)
    if out and final.exists() and not (final / PROVENANCE).is_file():
        raise ConfigError(f"{final} is there and is no exported model; name a folder that is not there yet")
    fingerprint = source.fingerprint()
    existing = storage.read_json(str(final / PROVENANCE))
    if existing is not None and existing.get("fingerprint", {}).get("digest") == fingerprint.digest:
        return final
    pipeline = source.pipeline()
    provenance = source.provenance(fingerprint)
    tmp = storage.temporary_folder(final)
    try:
        _write(pipeline.to(dtype=getattr(torch, dtype)), provenance, tmp)
        source.write_tuning(tmp)
        storage.replace_folder(tmp, final)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # it is there only where something failed
    return final


def build_pipeline(run: str, checkpoint: str = "latest", weights: str = "ema") -> Any:
    """The StableDiffusionPipeline of a checkpoint in memory, float32 on the CPU, without its progress bar."""
    source = _Source(RunPaths(run), checkpoint, weights)
    pipeline = source.pipeline()
    if source.config.textual_inversion:
        token = source.config.textual_inversion.token
        pipeline.load_textual_inversion(source.tuned["rows"], token=token)
    return pipeline


def _write(pipeline: Any, provenance: dict[str, Any], folder: Path) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    for suffix in ("", "_2"):  # SDXL's one text encoder is its second
        if (encoder := getattr(pipeline, f"text_encoder{suffix}", None)) is not None:
            _save_text_encoder(encoder, folder / f"text_encoder{suffix}")
            names = folder / f"tokenizer{suffix}"
            for file in names.iterdir():
                file.unlink()
            write_tokenizer(names, getattr(pipeline, names.name).model_max_length)
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
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_bytes())
        self.latents = Dataset.open(paths.latents)
        self.vae_facts, self.text_facts = self.latents.manifest["vae"], self.latents.manifest["text"]
        self.config = TrainConfig.model_validate(self.manifest["config"])
        self.licence = licence or self.config.licence
        self.tuned: dict[str, torch.Tensor] = {}  # what fine-tuning made, under its own names

    def fingerprint(self) -> Fingerprint:
        """What the exported folder's bytes depend on."""
        settings = {"checkpoint": self.folder.name, "weights": self.weights, "layer": self.text_facts["layer"]}
        settings |= {"dtype": self.dtype, "licence": self.licence}
        digests = {"vae": self.vae_facts["digest"], "text": self.text_facts["digest"]}
        return Fingerprint("export", VERSION, settings, digest_json(self.manifest), digests)

    def pipeline(self) -> Any:
        """The StableDiffusionPipeline, or the StableDiffusionXLPipeline of a UNet that is told sizes."""
        vae = self._vae()
        text = self._text()
        unet = self._unet(vae)
        if unet.config.cross_attention_dim != text.width:
            raise StageError(
                f"{self.folder}: its UNet attends to {unet.config.cross_attention_dim} values a token, "
                f"where the CLIP of the latents has {text.width}"
            )
        model = vae.model
        model.register_to_config(scaling_factor=self.vae_facts["scaling_factor"])
        parts = {"vae": model, "unet": unet, "scheduler": scheduler(self.manifest["config"])}
        pipeline = (_sdxl if pipeline_of(unet.config) is STABLE_DIFFUSION_XL else _sd)(text, parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def provenance(self, fingerprint: Fingerprint) -> dict[str, Any]:
        """Where the model comes from, as stored in carrara.json."""
        manifest = self.latents.manifest
        return {
            "checkpoint": self.folder.name,
            "weights": self.weights,
            "images_seen": self.manifest.get("images"),
            "steps": self.manifest.get("step"),
            "dtype": self.dtype,
            "licence": self.licence,
            "sources": self.manifest.get("sources", []),
            "training": {k: v for k, v in self.manifest["config"].items() if k != "unet"},
            "latents": {
                "fingerprint": self.latents.fingerprint,
                "resolution": manifest["resolution"],
                "samples": manifest["count"],
                "rows": manifest["rows"],
                "shards": len(manifest["shards"]),
                **_shard_range([s["index"] for s in manifest["shards"]]),
                "status": manifest.get("status", {}),
            },
            "vae": {k: self.vae_facts[k] for k in ("ref", "digest", "scaling_factor")},
            "text": dict(self.text_facts),
            "libraries": {n: importlib.metadata.version(n) for n in ("torch", "diffusers", "transformers")},
            "fingerprint": fingerprint.to_json(),
        }

    def _unet(self, vae: Vae) -> Any:
        from diffusers import UNet2DConditionModel

        values = self._weights()
        if not self.config.adapter and not self.config.textual_inversion:
            unet = UNet2DConditionModel.from_config(self.manifest["model_config"])
            unet.load_state_dict(values)
        else:
            unet = self._base()
            if self.config.adapter:
                adapters.add(unet, self.config.adapter, 0)
                require_all(unet.load_state_dict(values, strict=False), str(self.folder))
                self.tuned = adapters.state(unet)
                unet = adapters.merge(unet)
            else:
                self.tuned = {"rows": values["rows"]}
        # The pipeline draws pictures of this size unless told otherwise.
        unet.register_to_config(sample_size=self.latents.manifest["resolution"] // vae.downscale)
        return unet.eval().requires_grad_(False)

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
            storage.local_path(self.paths.checkpoints) / POSTHOC,
            int(self.manifest["images"]),
            float(self.weights.partition(":")[2]),
        )

    def write_tuning(self, folder: Path) -> None:
        """What fine-tuning made, in the form in which others take it; nothing for a model of its own."""
        from safetensors.torch import save_file

        values = {k: v.to(getattr(torch, self.dtype)).contiguous() for k, v in self.tuned.items()}
        if self.config.textual_inversion:
            save_file({self.config.textual_inversion.token: values["rows"]}, folder / "learned_embeds.safetensors")
        elif self.config.adapter and self.config.adapter.kind == "lora":
            adapters.save_lora(values, self.config.adapter, folder / "lora")
        elif self.config.adapter:
            adapters.save_peft(values, self.config.adapter, folder / "adapter")

    def _vae(self) -> Vae:
        beside = storage.join(self.paths.autoencoder, "model")
        return Vae(_same_weights("the VAE", find_vae, self.vae_facts, beside))

    def _text(self) -> TextEncoder:
        beside = storage.join(self.paths.clip, "model")
        return TextEncoder(_same_weights("the CLIP", find_clip, self.text_facts, beside), self.text_facts["layer"])


def _shard_range(indices: list[int]) -> dict[str, int]:
    return {"first_shard": min(indices), "last_shard": max(indices)} if indices else {}


def require_all(loaded: Any, where: str) -> None:
    """Raise StageError where a fine-tuned model's file held weights that the model lacks."""
    if loaded.unexpected_keys:
        raise StageError(f"{where} holds {loaded.unexpected_keys[0]}, which the model of train.start_from lacks")


def _checkpoint_folder(paths: RunPaths, checkpoint: str) -> Path:
    root = storage.local_path(paths.checkpoints)
    if checkpoint == "latest":
        folder = latest_complete(root)
        if folder is None:
            raise StageError(f"{root}: there is no complete checkpoint here; run the train stage")
        return folder
    folder = root / checkpoint
    if not (folder / "manifest.json").is_file():
        raise StageError(f"{root}: there is no complete checkpoint '{checkpoint}' here")
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


# ---- parts -----------------------------------------------------------------------------------------


def scheduler(config: dict[str, Any]) -> Any:
    """A scheduler of the trainer's own process and prediction type.

    config: TrainConfig as a mapping. DDIM (Song et al. 2020); for a learned variance DDPM, which uses it; for
    rectified flow DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) on the flow's sigmas, since diffusers' flow
    scheduler does not go into a StableDiffusionPipeline. Trailing spacing starts at the noisiest timestep, as training
    does (Lin et al. 2023, arXiv:2305.08891, table 2); the rest is as in Stable Diffusion's own configuration.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    full = TrainConfig.model_validate(config)
    if full.prediction_type == "flow_prediction":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=full.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=full.snr_shift,
            final_sigmas_type="zero",
        )
    shared: dict[str, Any] = {name: config[name] for name in SCHEDULE}
    shared |= {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "trailing"}
    if full.snr_shift != 1.0 or (full.beta_schedule == "sigmoid" and not full.learned_variance):
        alpha_bar = diffusion.alphas_cumprod(
            diffusion.betas(full.beta_schedule, full.num_train_timesteps, full.beta_start, full.beta_end)
        )
        shared["trained_betas"] = diffusion.to_betas(diffusion.shift_snr(alpha_bar, full.snr_shift)).tolist()
    if full.zero_terminal_snr:
        shared["rescale_betas_zero_snr"] = True
    if full.learned_variance:
        return DDPMScheduler(**shared, variance_type="learned_range")
    return DDIMScheduler(**shared, set_alpha_to_one=False)


def _sd(text: TextEncoder, parts: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **parts,
        text_encoder=clip_text_model(text),
        tokenizer=tokenizer(text),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(text: TextEncoder, parts: dict[str, Any]) -> Any:
    """With one text encoder, the second of SDXL's two, as SDXL's refiner has it."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        **parts,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_text_model(text, projected=True),
        tokenizer_2=tokenizer(text),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def clip_text_model(text: TextEncoder, projected: bool = False) -> Any:
    """transformers' CLIPTextModel with the weights of an open_clip text tower.

    Its `last_hidden_state` is what `text.encode` gives: blocks beyond the chosen layer are left out and
    the final layer norm is applied. projected: a CLIPTextModelWithProjection of all blocks, whose `text_embeds` are
    the pooled half of `text.encode_pooled` and whose `hidden_states` hold the layers without norm. Raises ConfigError
    where no pipeline reads that layer of it.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    require_layer(STABLE_DIFFUSION_XL if projected else STABLE_DIFFUSION, text.layer)
    tower = text.tower
    blocks = list(tower.transformer.resblocks) if projected else kept_blocks(tower, text.layer)
    first = blocks[0]
    projection = getattr(tower, "text_projection", None)
    config = CLIPTextConfig(
        vocab_size=tower.token_embedding.num_embeddings,
        hidden_size=text.width,
        intermediate_size=first.mlp.c_fc.out_features,
        projection_dim=text.width if projection is None else _projection_width(projection),
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        max_position_embeddings=text.context_length,
        hidden_act=_activation_name(first.mlp.gelu),
        layer_norm_eps=tower.ln_final.eps,
        pad_token_id=PAD_ID,
        bos_token_id=text.tokenizer.sot_token_id,
        eos_token_id=text.tokenizer.eot_token_id,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    weights = {prefix + k: v for k, v in text_tower_weights(tower, len(blocks)).items()}
    if projected:
        if projection is None:
            weight = torch.eye(text.width)
        else:
            weight = projection.weight if isinstance(projection, torch.nn.Linear) else projection.T
        weights["text_projection.weight"] = weight.detach().float().contiguous().clone()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def text_tower_weights(tower: Any, depth: int) -> dict[str, torch.Tensor]:
    """The first `depth` blocks of an open_clip text tower under transformers' names (without `text_model.`)."""
    source = tower.state_dict()
    out = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(depth):
        theirs, ours = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for part in ("weight", "bias"):
            stacked = source[f"{theirs}attn.in_proj_{part}"].chunk(3)  # query, key and value, one below another
            for which, tensor in zip("qkv", stacked, strict=True):
                out[f"{ours}self_attn.{which}_proj.{part}"] = tensor
            for name, new in names.items():
                out[f"{ours}{new}.{part}"] = source[f"{theirs}{name}.{part}"]
    return {k: v.detach().float().contiguous().clone() for k, v in out.items()}


def tokenizer(text: TextEncoder) -> Any:
    """transformers' CLIPTokenizer that gives open_clip's ids; raises ConfigError for another kind of tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer, _clean_lower
    from transformers import CLIPTokenizer

    if not isinstance(text.tokenizer, SimpleTokenizer) or text.tokenizer.clean_fn is not _clean_lower:
        raise ConfigError(
            f"the CLIP '{text.ref}' has a tokenizer of its own, which a Stable Diffusion pipeline cannot carry; "
            "choose a CLIP with open_clip's standard tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), text.context_length)
        return CLIPTokenizer.from_pretrained(folder)


def write_tokenizer(folder: Path, context_length: int) -> None:
    """vocab.json, merges.txt and the two settings files, from the merges that come with open_clip.

    The ids equal open_clip's for every caption that open_clip's cleaning leaves as it is (transformers
    does no such cleaning: it neither repairs mojibake nor unescapes HTML).
    """
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    source = SimpleTokenizer()
    names = {"<start_of_text>": SOT, "<end_of_text>": EOT}
    vocabulary = {names.get(k, k): v for k, v in source.encoder.items()} | {PAD: PAD_ID}
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as f:
        merges = f.read().split("\n")[1 : len(source.bpe_ranks) + 1]  # the first line is the file's version
    special = {"bos_token": SOT, "eos_token": EOT, "unk_token": EOT, "pad_token": PAD}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")


def _save_text_encoder(model: Any, folder: Path) -> None:
    """Write the weights with the `text_model.` prefix, which old and new transformers both read."""
    from safetensors.torch import save_file

    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    tensors = {
        k if k.startswith("text_projection.") else "text_model." + k.removeprefix("text_model."): v.contiguous()
        for k, v in model.state_dict().items()
    }
    tensors.pop("text_model.embeddings.position_ids", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _projection_width(projection: Any) -> int:
    return int(projection.out_features if isinstance(projection, torch.nn.Linear) else projection.shape[1])


def _activation_name(module: Any) -> str:
    """transformers' name of the feed-forward activation."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, torch.nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise ConfigError(f"the CLIP's activation {type(module).__name__} has no counterpart in transformers")
