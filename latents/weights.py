"""Where an encoder's weights lie, and a digest of them, found without building the network.

A VAE is named by a diffusers folder, a single safetensors file, or a hub name; a CLIP by a folder with
open_clip_config.json (or the text_encoder of a diffusers pipeline), `MODEL:TAG`, `MODEL:/path/to/weights.safetensors`,
or `hf-hub:org/name` (with `/text_encoder` behind it, of a pipeline); any other text encoder by what transformers saved.
A name that leads nowhere is one sentence (ConfigError). A digest covers the weights' bytes and those parts of the
configuration that shape the network, so it is the same wherever the files lie.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError

if TYPE_CHECKING:
    from latents.config import LatentsConfig

INDEX = ".safetensors.index"  # in the name of a file that says which of several files holds which tensor
VAE_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    f"diffusion_pytorch_model{INDEX}.json",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    f"diffusion_pytorch_model{INDEX}.fp16.json",
)
CLIP_WEIGHTS = (  # open_clip's own order of preference, so that the file digested is the file it loads
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
)
PAIR = "clip_pair"  # the kind, in the facts of latents, of two CLIPs side by side
TEXT_ALONE = "text encoder alone"  # the name of a CLIP of which there is no more than its text tower
SEQUENCE = "transformers"  # and of an encoder of transformers, whose captions have as many rows as tokens
# Formats that are read without running code from the file: safetensors, or torch.load(weights_only=True).
SAFE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# The arguments of the kinds of autoencoder, all of which diffusers' save_pretrained writes (a test compares them
# with its own).
VAE_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)
TINY_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "encoder_block_out_channels",
    "decoder_block_out_channels",
    "act_fn",
    "upsample_fn",
    "latent_channels",
    "upsampling_scaling_factor",
    "num_encoder_blocks",
    "num_decoder_blocks",
    "latent_magnitude",
    "latent_shift",
    "force_upcast",
    "scaling_factor",
    "shift_factor",
)
DC_ARGUMENTS = (
    "in_channels",
    "latent_channels",
    "attention_head_dim",
    "encoder_block_types",
    "decoder_block_types",
    "encoder_block_out_channels",
    "decoder_block_out_channels",
    "encoder_layers_per_block",
    "decoder_layers_per_block",
    "encoder_qkv_multiscales",
    "decoder_qkv_multiscales",
    "upsample_block_type",
    "downsample_block_type",
    "decoder_norm_types",
    "decoder_act_fns",
    "encoder_out_shortcut",
    "decoder_in_shortcut",
    "decoder_conv_act_fn",
    "scaling_factor",
)
ARGUMENTS = {"AutoencoderKL": VAE_ARGUMENTS, "AutoencoderTiny": TINY_ARGUMENTS, "AutoencoderDC": DC_ARGUMENTS}
# What follows a caption's end token: id 0, as open_clip pads (Stable Diffusion 2, SDXL's second encoder), or the end
# token again, as Stable Diffusion 1's tokenizer pads.
PADS = ("zero", "end")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# By what a whole checkpoint holds beside its VAE: the VAE's scaling and shift, which its tensors do not tell.
WHOLE_CHECKPOINTS = {
    "conditioner.embedders.": {"scaling_factor": 0.13025},  # Stable Diffusion XL
    "model.diffusion_model.joint_blocks.": {"scaling_factor": 1.5305, "shift_factor": 0.0609},  # 3
    "cond_stage_model.": {"scaling_factor": 0.18215},  # 1 and 2
}
VAE_PREFIXES = ("first_stage_model.", "vae.", "")


@dataclasses.dataclass(frozen=True)
class VaeWeights:
    """A VAE that was found. kind: diffusers' class; config: its arguments; layout: whose names the tensors have, and
    prefix what stands before each of them; file: the weights, or the index of several files.

    An AutoencoderTiny (TAESD) or AutoencoderDC gives latents alone, no posterior: there is no spread to store.
    """

    ref: str
    file: Path
    config: dict[str, Any]
    layout: str  # "diffusers" or "ldm"
    kind: str = "AutoencoderKL"
    prefix: str = ""

    def __post_init__(self) -> None:
        levels = self._levels
        widths = self.config[levels]
        listed = isinstance(widths, list) and widths and all(_positive(w, int) for w in widths)
        wrong = {
            "in_channels": None if self.config["in_channels"] == 3 else "3, red, green and blue",
            "latent_channels": None if _positive(self.config["latent_channels"], int) else "a number of channels",
            "scaling_factor": None if _positive(self.config["scaling_factor"], (int, float)) else "a number above 0",
            levels: None if listed else "a list of widths",
        }
        for name, right in wrong.items():
            if right:
                raise ConfigError(
                    f"the VAE '{self.ref}': {name} is {self.config[name]!r} in its configuration; it must be {right}"
                )

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors; raises ConfigError where an index cannot be read or names one that is not
        there."""
        if INDEX not in self.file.name:
            return [self.file]
        weight_map = read_config(self.file, f"the VAE '{self.ref}'").get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        missing = next((n for n in names if not (self.file.parent / Path(n).name).is_file()), None)
        if not names or missing:
            what = f"names {missing}, which is not there" if missing else "has no weight_map"
            raise ConfigError(f"the VAE '{self.ref}': {self.file} {what}")
        return [self.file.parent / Path(n).name for n in names]

    @property
    def digest(self) -> str:
        """sha256 over the weights files' digests and the configuration."""
        digests = [file_digest(f) for f in self.files]
        return digest_json({"weights": digests[0] if len(digests) == 1 else digests, "config": self.config})

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before diffusion (1 / their std)."""
        return float(self.config["scaling_factor"])

    @property
    def downscale(self) -> int:
        """Pixels per latent place along one side."""
        return int(2 ** (len(self.config[self._levels]) - 1))

    @property
    def has_posterior(self) -> bool:
        """Whether a latent has a spread from which draws are taken."""
        return self.kind == "AutoencoderKL"

    @property
    def _levels(self) -> str:
        """The argument with a width for each level, between which the encoder halves."""
        return "block_out_channels" if self.has_posterior else "encoder_block_out_channels"


@dataclasses.dataclass(frozen=True)
class ClipWeights:
    """A CLIP that was found. name, pretrained: as open_clip wants them; file: the weights; model_cfg: architecture."""

    ref: str
    name: str
    pretrained: str | None
    file: Path
    model_cfg: dict[str, Any]
    quick_gelu: bool

    @property
    def digest(self) -> str:
        """sha256 over the weights file's digest and the architecture."""
        config = {**self.model_cfg, "quick_gelu": self.quick_gelu}
        return digest_json({"weights": file_digest(self.file), "config": config})

    @property
    def text_alone(self) -> bool:
        """Whether there is a text encoder and no image encoder, so that the CLIP can judge no image."""
        return self.name == TEXT_ALONE

    def require_image_encoder(self) -> None:
        """Raises ConfigError where there is none."""
        if self.text_alone:
            raise ConfigError(
                f"the CLIP '{self.ref}' is a text encoder alone and can judge no image; name a whole one "
                "(eval.clip, or the score's model)"
            )

    @property
    def context_length(self) -> int:
        """Tokens a caption."""
        return int(self.model_cfg["text_cfg"].get("context_length", 77))

    @property
    def width(self) -> int:
        """Width of the text transformer, the size of a token's embedding."""
        return int(self.model_cfg["text_cfg"].get("width", 512))


@dataclasses.dataclass(frozen=True)
class SequenceWeights:
    """A text encoder of transformers and its tokenizer on disk. model, tokenizer: folders; files: the weights; width:
    of its states; vocabulary: how many token ids there are."""

    ref: str
    model: Path
    tokenizer: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    width: int
    vocabulary: int

    @property
    def digest(self) -> str:
        """sha256 over the weights, the configuration, and the files of the tokenizer."""
        config = {k: v for k, v in self.config.items() if k not in _NO_PART_OF_A_MODEL}
        names = sorted(n for n in TOKENIZER_FILES if (self.tokenizer / n).is_file())
        tokenizer = {n: file_digest(self.tokenizer / n) for n in names}
        weights = {f.name: file_digest(f) for f in self.files}
        return digest_json({"weights": weights, "config": config, "tokenizer": tokenizer})

    @property
    def longest(self) -> int | None:
        """How many tokens it has places for; None where these are relative to each other, as T5's."""
        positions = _number(self.config, ("max_position_embeddings",))
        if positions is None or not (file := self.tokenizer / "tokenizer_config.json").is_file():
            return positions
        limit = read_config(file, "the tokenizer").get("model_max_length")  # RoBERTa has two fewer than its places
        return min(positions, int(limit)) if isinstance(limit, int | float) and limit > 0 else positions

    def facts(self, max_length: int) -> dict[str, Any]:
        """As `text_facts`; raises ConfigError where it has no places for so many tokens."""
        if (longest := self.longest) is not None and max_length > longest:
            raise ConfigError(
                f"latents.text_encoder.max_length is {max_length}, and '{self.ref}' has places for {longest} tokens; "
                "lower it"
            )
        return {
            "kind": SEQUENCE,
            "ref": self.ref,
            "digest": self.digest,
            "layer": "last_hidden_state",
            "pad": "masked",
            "context_length": max_length,
            "width": self.width,
        }


def find_vae(ref: str) -> VaeWeights:
    """Find the VAE named `ref`; raises ConfigError where there is none or it is of another kind."""
    path = Path(ref).expanduser()
    if path.is_file():
        return _vae_file(ref, path)
    if path.is_dir():
        return _vae_folder(ref, path)
    if HUB_NAME.fullmatch(ref):
        return _vae_folder(ref, hub_folder(ref, "the VAE", _VAE_HUB_FILES))
    raise ConfigError(
        f"the VAE '{ref}' is neither a folder nor a file here, nor a hub name such as stabilityai/sd-vae-ft-mse; "
        f"give the path of a diffusers {' or '.join(ARGUMENTS)}"
    )


def find_clip(ref: str) -> ClipWeights:
    """Find the CLIP named `ref`; raises ConfigError where there is none."""
    path = Path(ref.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return _clip_folder(ref, path)
    if ref.startswith("hf-hub:"):
        name, part = re.fullmatch(r"hf-hub:([^/]*/?[^/]*)/?(.*)", ref).groups()  # type: ignore[union-attr]
        wanted = [f"{part}/{file}" for file in _CLIP_TEXT_HUB_FILES] if part else _CLIP_HUB_FILES
        return _clip_folder(ref, hub_folder(name, "the CLIP", wanted) / part)
    model, colon, weights = ref.partition(":")
    if ref.startswith("local-dir:") or not colon or os.path.exists(ref):
        raise ConfigError(
            f"the CLIP '{ref}' is not a folder with open_clip_config.json; give such a folder, MODEL:TAG "
            "(for example ViT-H-14:laion2b_s32b_b79k), or MODEL:/path/to/weights.safetensors"
        )
    return _clip_named(ref, model, weights)


def text_facts(config: LatentsConfig, ref: str) -> dict[str, Any]:
    """What a manifest of latents says of what read the captions: its weights by name and digest, and how it is used.

    ref: the run's CLIP. A second one beside it makes `kind` clip_pair, with the facts of both under `encoders`, one
    digest and the width of both together. Raises ConfigError where weights are not there or do not go together.
    """
    if config.sequence is not None:
        return find_sequence(config.sequence.pretrained).facts(config.sequence.max_length)
    first = _clip_facts(find_clip(ref), config.text_layer, config.pad)
    if config.second_clip is None:
        return first
    second = _clip_facts(find_clip(config.second_clip.pretrained), config.text_layer, config.second_clip.pad or "zero")
    if first["context_length"] != second["context_length"]:
        raise ConfigError(
            f"latents.text_encoder: '{second['ref']}' reads {second['context_length']} tokens and '{ref}' "
            f"{first['context_length']}; two CLIPs are read side by side, token by token, so choose two of one length"
        )
    return {
        "kind": PAIR,
        "ref": f"{first['ref']} and {second['ref']}",
        "digest": digest_json([first["digest"], second["digest"]]),
        "layer": config.text_layer,
        "pad": first["pad"],
        "context_length": first["context_length"],
        "width": first["width"] + second["width"],
        "encoders": [first, second],
    }


def clips_of(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of each encoder in `text_facts`: one, or those of a pair."""
    return list(facts["encoders"]) if facts.get("kind") == PAIR else [dict(facts)]


def _clip_facts(text: ClipWeights, layer: str, pad: str) -> dict[str, Any]:
    return {
        "ref": text.ref,
        "digest": text.digest,
        "layer": layer,
        "pad": pad,
        "context_length": text.context_length,
        "width": text.width,
    }


def find_pad(ref: str, names: Sequence[str] = ("tokenizer_2", "tokenizer")) -> str | None:
    """How the tokenizer of the diffusers pipeline `ref` (a folder, or a hub name) pads: `zero` or `end`.

    None where there is no tokenizer, as beside a UNet alone. names: the first of them that is there counts; of two, by
    default the second's, whose encoder is the one that SDXL's refiner has. Raises ConfigError where it cannot be read
    or pads otherwise.
    """
    root = Path(ref)
    if not root.is_dir():
        if not HUB_NAME.fullmatch(ref):
            return None
        root = hub_folder(ref, "the tokenizer of", ["tokenizer*/*.json", "tokenizer*/*.txt"])
    folder = next((root / n for n in names if (root / n).is_dir()), None)
    if folder is None:
        return None
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as e:
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {_line(e)}") from None
    if tokenizer.pad_token_id == 0:
        return "zero"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return "end"
    raise ConfigError(
        f"the tokenizer in {folder} pads with id {tokenizer.pad_token_id}, which is neither 0 nor its end token; "
        "captions cannot be padded so here"
    )


# ---- VAE -------------------------------------------------------------------------------------------

_VAE_HUB_FILES = [
    f"{folder}{name}"
    for folder in ("", "vae/")
    for name in ("config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model[.-]*.safetensors")
]
_CLIP_HUB_FILES = ["open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.*"]
_CLIP_TEXT_HUB_FILES = ["config.json", "model.safetensors", "model.fp16.safetensors"]


def _vae_folder(ref: str, folder: Path) -> VaeWeights:
    for here in (folder, folder / "vae"):  # a VAE's own folder, or that of a whole pipeline
        config_file = here / "config.json"
        if not config_file.is_file():
            continue
        config = read_config(config_file, "the VAE")
        kind = config.get("_class_name", "AutoencoderKL")
        if kind not in ARGUMENTS:
            raise ConfigError(
                f"the VAE '{ref}': {config_file} describes a {kind}, where an {' or '.join(ARGUMENTS)} is needed"
            )
        file = next((here / n for n in VAE_WEIGHTS if (here / n).is_file()), None)
        if file is None:
            raise ConfigError(f"the VAE '{ref}': {here} has a config.json but no {VAE_WEIGHTS[0]}")
        found = VaeWeights(ref, file, _vae_config(config, kind), "diffusers", kind)
        found.files  # noqa: B018 (an index that leads nowhere is found out now)
        return found
    raise ConfigError(f"the VAE '{ref}': {folder} has no config.json; give the folder that diffusers saved a VAE in")


def _vae_file(ref: str, file: Path) -> VaeWeights:
    """A single file: in diffusers' names or the original ones (LDM); its config from beside it, or its shapes."""
    if file.suffix != ".safetensors":
        raise ConfigError(f"the VAE '{ref}': a single file must be .safetensors; convert it, or give a folder")
    try:
        with safe_open(file, "pt") as f:
            shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except Exception as e:  # safetensors raises its own type for every fault of a file
        raise ConfigError(f"the VAE '{ref}' cannot be read as safetensors: {e}") from None
    if "encoder.layers.0.weight" in shapes and "decoder.layers.0.weight" in shapes:  # TAESD in diffusers' names
        config = _config_beside(ref, file, "AutoencoderTiny") or {
            "latent_channels": shapes["decoder.layers.0.weight"][1]
        }
        return VaeWeights(ref, file, _vae_config(config, "AutoencoderTiny"), "diffusers", "AutoencoderTiny")
    prefix = next((p for p in VAE_PREFIXES if p + "encoder.conv_in.weight" in shapes), None)
    if prefix is None or prefix + "decoder.conv_in.weight" not in shapes:
        what = "decoder.conv_in.weight" if prefix is not None else "encoder.conv_in.weight"
        raise ConfigError(f"the VAE '{ref}' holds no autoencoder: there is no tensor {what} in it")
    layout = "ldm" if prefix + "encoder.down.0.block.0.conv1.weight" in shapes else "diffusers"
    found = None if prefix else _config_beside(ref, file, "AutoencoderKL")
    if found is None:
        found = _config_from_shapes(shapes, prefix, layout)
        whole = next(
            (known for start, known in WHOLE_CHECKPOINTS.items() if any(k.startswith(start) for k in shapes)), {}
        )
        if not whole and found["latent_channels"] > 4:
            raise ConfigError(
                f"the VAE '{ref}' has {found['latent_channels']} latent channels, and a single file does not say what "
                "they are scaled by; put its config.json beside it, or give the folder that diffusers saved it in"
            )
        found |= whole
    return VaeWeights(ref, file, _vae_config(found, "AutoencoderKL"), layout, "AutoencoderKL", prefix)


def _config_beside(ref: str, file: Path, kind: str) -> dict[str, Any] | None:
    """The configuration in the .json of the file's own name, else in config.json, if that is of such a network."""
    for path in (file.with_suffix(".json"), file.with_name("config.json")):
        if path.is_file():
            config = read_config(path, "the VAE")
            if config.get("_class_name", kind) == kind and "latent_channels" in config:
                return config
            if path.name != "config.json":
                raise ConfigError(f"the VAE '{ref}': {path} is not the configuration of an {kind}")
    return None


def _config_from_shapes(shapes: dict[str, tuple[int, ...]], prefix: str, layout: str) -> dict[str, Any]:
    """AutoencoderKL's arguments from tensor shapes; what shapes do not tell keeps diffusers' default (0.18215)."""
    level, block = ("encoder.down.", "block") if layout == "ldm" else ("encoder.down_blocks.", "resnets")
    pattern = re.compile(re.escape(prefix + level) + rf"(\d+)\.{block}\.(\d+)\.conv2\.weight")
    found = {(int(m[1]), int(m[2])): s[0] for k, s in shapes.items() if (m := pattern.fullmatch(k))}
    if not found:
        raise ConfigError("the VAE's shape cannot be told from the names of its tensors; give a folder of diffusers")
    widths = [found[i, 0] for i in range(1 + max(i for i, _ in found))]
    if any(w % 32 for w in widths):
        raise ConfigError("the VAE's group norms cannot be told from its shapes; put its config.json beside the file")
    return {
        "in_channels": shapes[prefix + "encoder.conv_in.weight"][1],
        "out_channels": shapes[prefix + "decoder.conv_out.weight"][0],
        "latent_channels": shapes[prefix + "decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": 1 + max(j for _, j in found),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_quant_conv": prefix + "quant_conv.weight" in shapes,
        "use_post_quant_conv": prefix + "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(".mid" in k and ".att" in k for k in shapes if k.startswith(prefix)),
    }


def _vae_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """All arguments of that class, defaults filled in, nothing that names a place or a library's version."""
    if all(name in config for name in ARGUMENTS[kind]):
        return {name: config[name] for name in ARGUMENTS[kind]}
    import diffusers  # whose import costs seconds, only for its defaults

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    filled = {n: config.get(n, p.default) for n, p in parameters.items() if n != "self"}
    return json.loads(json.dumps(filled))


# ---- CLIP ------------------------------------------------------------------------------------------


def _clip_folder(ref: str, folder: Path) -> ClipWeights:
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file() and (folder / "config.json").is_file():
        return _clip_text_folder(ref, folder)
    if not config_file.is_file():
        raise ConfigError(f"the CLIP '{ref}': {folder} has no open_clip_config.json")
    model_cfg = read_config(config_file, "the CLIP").get("model_cfg")
    if not isinstance(model_cfg, dict) or "text_cfg" not in model_cfg:
        raise ConfigError(f"the CLIP '{ref}': {config_file} has no model_cfg with a text_cfg")
    _require_plain_text(ref, model_cfg["text_cfg"])
    file = next((folder / n for n in CLIP_WEIGHTS if (folder / n).is_file()), None)
    if file is None:
        raise ConfigError(f"the CLIP '{ref}': {folder} has a configuration but no {CLIP_WEIGHTS[0]}")
    return ClipWeights(ref, f"local-dir:{folder}", None, file, model_cfg, bool(model_cfg.get("quick_gelu", False)))


def _clip_text_folder(ref: str, folder: Path) -> ClipWeights:
    """The text encoder of a diffusers pipeline, as transformers saves it, in open_clip's words."""
    config = read_config(folder / "config.json", "the CLIP")
    if config.get("model_type") != "clip_text_model":
        raise ConfigError(
            f"the CLIP '{ref}': {folder / 'config.json'} describes no CLIP's text encoder; give the folder "
            "text_encoder of a Stable Diffusion pipeline, or one with open_clip_config.json"
        )
    file = next((folder / n for n in ("model.safetensors", "model.fp16.safetensors") if (folder / n).is_file()), None)
    if file is None:
        raise ConfigError(f"the CLIP '{ref}': {folder} has a configuration but no model.safetensors")
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ConfigError(f"the CLIP '{ref}': its activation is {activation}, and must be gelu or quick_gelu")
    names = {
        "context_length": ("max_position_embeddings", 77),
        "vocab_size": ("vocab_size", 49408),
        "width": ("hidden_size", 512),
        "heads": ("num_attention_heads", 8),
        "layers": ("num_hidden_layers", 12),
    }
    text: dict[str, Any] = {ours: config.get(theirs, default) for ours, (theirs, default) in names.items()}
    inner, projection = config.get("intermediate_size", 2048), config.get("projection_dim", 512)
    if not all(_positive(v, int) for v in (*text.values(), inner, projection)):
        raise ConfigError(f"the CLIP '{ref}': {folder / 'config.json'} has a size that is no whole number above 0")
    if (eps := config.get("layer_norm_eps", 1e-5)) != 1e-5:
        raise ConfigError(f"the CLIP '{ref}': its layer_norm_eps is {eps}, and must be 1e-5 as all of CLIP's are")
    text["mlp_ratio"] = inner / text["width"]
    if int(text["width"] * text["mlp_ratio"]) != inner:  # which is how open_clip takes it back
        text["mlp_ratio"] = (inner + 0.5) / text["width"]
    _require_plain_text(ref, text)
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    model_cfg = {"embed_dim": projection if projected else None, "text_cfg": text}
    return ClipWeights(ref, TEXT_ALONE, None, file, model_cfg, activation == "quick_gelu")


def _require_plain_text(ref: str, text: dict[str, Any]) -> None:
    """Refuse, before any weights are fetched, a text tower that is not CLIP's own; ConfigError says what it is.

    Such a tower fits no text encoder of a Stable Diffusion pipeline. encoders.plain_text_tower looks at what is built.
    """
    odd = ""
    if not isinstance(text, dict):
        odd = "has no settings"
    elif text.get("hf_model_name"):
        odd = f"is {text['hf_model_name']}, not open_clip's own text transformer"
    elif text.get("hf_tokenizer_name"):
        odd = f"reads the tokens of {text['hf_tokenizer_name']}, not CLIP's"
    elif text.get("no_causal_mask"):
        odd = "is not causal"
    elif text.get("embed_cls"):
        odd = "appends a class token (CoCa)"
    elif int(text.get("vocab_size", 49408)) > 65536:
        odd = "has token ids beyond 65535, which the shards cannot hold"
    if odd:
        raise ConfigError(
            f"the CLIP '{ref}' cannot condition a Stable Diffusion pipeline: its text tower {odd}; "
            "give one with CLIP's causal text transformer, such as ViT-L-14 or ViT-H-14"
        )


def _clip_named(ref: str, model: str, weights: str) -> ClipWeights:
    import open_clip

    name = model.replace("/", "-")
    model_cfg = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if model_cfg is None:
        raise ConfigError(f"the CLIP '{ref}': open_clip has no model '{model}'; open_clip.list_models() names them")
    _require_plain_text(ref, model_cfg["text_cfg"])
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    tag = open_clip.get_pretrained_cfg(name, weights)
    if tag:
        # Weights that were trained with QuickGELU work with no other activation, whatever the model's name.
        quick_gelu = quick_gelu or bool(tag.get("quick_gelu"))
        try:
            file = Path(open_clip.download_pretrained(tag))
        except Exception as e:
            raise ConfigError(f"the CLIP '{ref}' cannot be downloaded: {_line(e)}") from None
    else:
        file = Path(weights).expanduser()
    if not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(f"the CLIP '{ref}': '{weights}' is neither a file nor a tag of {name} (its tags: {tags})")
    if file.suffix not in SAFE_SUFFIXES:
        raise ConfigError(f"the CLIP '{ref}': weights must be one of {', '.join(SAFE_SUFFIXES)}")
    return ClipWeights(ref, name, weights if tag else str(file), file, model_cfg, quick_gelu)


# ---- encoders of transformers ----------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")
_SEQUENCE_HUB_FILES = [
    f"{p}{name}"
    for p in ("", "text_encoder/", "tokenizer/")
    for name in ("config.json", "model*.safetensors*", *TOKENIZER_FILES)
]


def find_sequence(ref: str) -> SequenceWeights:
    """Find the text encoder of transformers named `ref`: its folder, that of a diffusers pipeline, or a hub name.

    Raises ConfigError where there is none, or none whose weights are safetensors: nothing pickled is opened.
    """
    what = f"the text encoder '{ref}'"
    root = Path(ref).expanduser()
    if not root.is_dir():
        if not HUB_NAME.fullmatch(ref):
            raise ConfigError(f"{what} is neither a folder here nor a hub name; give one that transformers saved")
        root = hub_folder(ref, "the text encoder", _SEQUENCE_HUB_FILES)
    model = next((f for f in (root, root / "text_encoder") if (f / "config.json").is_file()), None)
    if model is None:
        raise ConfigError(f"{what}: {root} has no config.json; give the folder that transformers saved a model in")
    config = read_config(model / "config.json", "the text encoder")
    tokenizer = root / "tokenizer" if (root / "tokenizer").is_dir() else model
    if not any((tokenizer / n).is_file() for n in TOKENIZER_FILES):
        raise ConfigError(
            f"{what}: {tokenizer} has no tokenizer; save it there, beside the model, with save_pretrained"
        )
    files = model_files(what, "the text encoder", model)
    width, vocabulary = (_number(config, names) for names in (("d_model", "hidden_size", "dim"), ("vocab_size",)))
    if width is None or vocabulary is None:
        raise ConfigError(f"{what}: {model / 'config.json'} names no width (d_model, hidden_size) or no vocab_size")
    return SequenceWeights(ref, model, tokenizer, tuple(files), config, width, vocabulary)


def model_files(what: str, kind: str, model: Path) -> list[Path]:
    """The safetensors files of a model in the folder that transformers saved it in, whole or in parts; ConfigError."""
    files: list[Path] = [model / "model.safetensors"]
    if (index := model / "model.safetensors.index.json").is_file() and not files[0].is_file():
        named = read_config(index, kind).get("weight_map")
        names = sorted(set(named.values())) if isinstance(named, dict) else []
        if not names or any(Path(str(n)).name != n or not (model / n).is_file() for n in names):
            raise ConfigError(f"{what}: {index} names files that are not beside it; bring them back")
        files = [model / n for n in names]
    if not files[0].is_file():
        raise ConfigError(
            f"{what}: {model} has no model.safetensors, whole or in parts; load the model with transformers and save "
            "it with save_pretrained (a pickle may run anything, and is not opened)"
        )
    return files


def _number(config: dict[str, Any], names: Sequence[str]) -> int | None:
    """The first of these settings of a text model, which may lie one level down in a configuration of several parts."""
    for part in (config, config.get("text_config"), config.get("encoder")):
        for name in names:
            if isinstance(part, dict) and _positive(part.get(name), int):
                return int(part[name])
    return None


# ---- shared ----------------------------------------------------------------------------------------


def hub_folder(name: str, what: str, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The local copy of those files of a hub repository that match, but for those to ignore; raises ConfigError where
    it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(ignore)))
    except Exception as e:
        raise ConfigError(f"{what} '{name}' is not a path here and cannot be had from the hub: {_line(e)}") from None


def read_config(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ConfigError where it is none. what: whose it is, for the sentence."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, OSError) as e:
        raise ConfigError(f"{what}: {file} cannot be read as JSON: {e}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{what}: {file} is not a JSON object")
    return config


def _positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def file_digest(file: Path) -> str:
    """sha256 of a file, read once as long as it is not changed."""
    info = os.stat(file)
    return _digest_of(str(file), info.st_size, info.st_mtime_ns, info.st_ino)


@functools.lru_cache(maxsize=64)
def _digest_of(file: str, size: int, mtime_ns: int, inode: int) -> str:
    return digest_file(file)
