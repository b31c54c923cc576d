"""A VAE's weights: a diffusers folder, a single safetensors file, or a hub name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from latents.weights.files import HUB_NAME, file_digest, hub_folder, positive, read_config
from shards.fingerprint import digest_json
from shards.settings import ConfigError

INDEX = ".safetensors.index"  # in the name of a file that says which of several files holds which tensor
VAE_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    f"diffusion_pytorch_model{INDEX}.json",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    f"diffusion_pytorch_model{INDEX}.fp16.json",
)
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
# By what a whole checkpoint holds beside its VAE: the VAE's scaling and shift, which its tensors do not tell.
WHOLE_CHECKPOINTS = {
    "conditioner.embedders.": {"scaling_factor": 0.13025},  # Stable Diffusion XL
    "model.diffusion_model.joint_blocks.": {"scaling_factor": 1.5305, "shift_factor": 0.0609},  # 3
    "cond_stage_model.": {"scaling_factor": 0.18215},  # 1 and 2
}
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_VAE_HUB_FILES = [
    f"{folder}{name}"
    for folder in ("", "vae/")
    for name in ("config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model[.-]*.safetensors")
]


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
        listed = isinstance(widths, list) and widths and all(positive(w, int) for w in widths)
        wrong = {
            "in_channels": None if self.config["in_channels"] == 3 else "3, red, green and blue",
            "latent_channels": None if positive(self.config["latent_channels"], int) else "a number of channels",
            "scaling_factor": None if positive(self.config["scaling_factor"], (int, float)) else "a number above 0",
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
        _ = found.files  # an index that leads nowhere is found out now
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
        raise ConfigError("the VAE's shape does not follow from the names of its tensors; give a folder of diffusers")
    widths = [found[i, 0] for i in range(1 + max(i for i, _ in found))]
    if any(w % 32 for w in widths):
        raise ConfigError("the VAE's group norms do not follow from its shapes; put its config.json beside the file")
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
