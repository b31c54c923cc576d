"""Features of an image's places by a frozen vision tower: a column of latents that a UNet may be aligned with.

    a folder of transformers, or a hub name    the last states of its vision tower (DINOv2, SigLIP, CLIP, ViT, ...)
    any other reference                        the vision tower of an open_clip model, as weights.find_clip names one

The image is brought to the tower's square as a whole, whatever its shape, so that the tower's grid covers what the
latent's covers. A grid that is smaller than the tower's own holds the means of its places.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from latents.config import FeaturesConfig
from latents.weights import HUB_NAME, ClipWeights, file_digest, find_clip, hub_folder, model_files, read_config
from shards.fingerprint import digest_json
from shards.settings import ConfigError, StageError

WHAT = "the vision tower"
_SIZES = ("image_size", "patch_size", "hidden_size")
_HUB_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*")


@dataclasses.dataclass(frozen=True)
class VisionWeights:
    """A vision tower that was found. size: side of its square in pixels; patch: of a place's; width: of its states;
    folder, files, config, and mean and std of values in 0..1: of transformers; clip: of open_clip."""

    ref: str
    size: int
    patch: int
    width: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clip: ClipWeights | None = None

    @property
    def digest(self) -> str:
        """sha256 over the weights, the configuration, and how values are normalised."""
        if self.clip is not None:
            return self.clip.digest
        config = {k: v for k, v in self.config.items() if k not in ("_name_or_path", "transformers_version", "dtype")}
        return digest_json([{f.name: file_digest(f) for f in self.files}, config, self.mean, self.std])

    def facts(self, config: FeaturesConfig) -> dict[str, Any]:
        """What a manifest of latents says of its features. grid: places along a side. Raises ConfigError where the
        tower has fewer than are asked for, or cannot take images of that size."""
        size = config.size or self.size
        own = size // self.patch
        if size % self.patch and size != self.size:  # its own may leave a rim that it does not see, as SigLIP's 384
            raise ConfigError(
                f"latents.features.size is {size}, and '{self.ref}' sees patches of {self.patch} pixels; make it a "
                f"multiple of {self.patch}"
            )
        if self.clip is not None and size != self.size:
            raise ConfigError(
                f"latents.features.size is {size}, and '{self.ref}', a tower of open_clip, takes {self.size} alone; "
                "leave it out"
            )
        grid = config.grid or own
        if grid > own:
            raise ConfigError(
                f"latents.features.grid is {grid}, and '{self.ref}' has {own} places along a side at {size} pixels; "
                "lower it"
            )
        return {"ref": self.ref, "digest": self.digest, "size": size, "grid": grid, "width": self.width}

    def settings(self, config: FeaturesConfig) -> dict[str, Any]:
        """What of a configuration is a setting of latents: a number that is the tower's own counts as null."""
        facts = self.facts(config)
        own = {"size": self.size, "grid": facts["size"] // self.patch}
        return {name: None if facts[name] == own[name] else facts[name] for name in own}


def find_vision(ref: str) -> VisionWeights:
    """Find the vision tower named `ref`, without building it; raises ConfigError with one sentence."""
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return _of_transformers(ref, folder) if _is_of_transformers(folder) else _of_open_clip(ref)
    if HUB_NAME.fullmatch(ref):
        return _of_transformers(ref, hub_folder(ref, WHAT, _HUB_FILES))
    return _of_open_clip(ref)


def _is_of_transformers(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _of_transformers(ref: str, folder: Path) -> VisionWeights:
    what = f"{WHAT} '{ref}'"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{what}: {folder} has no config.json; give the folder that transformers saved a model in")
    from transformers import AutoConfig

    config = read_config(folder / "config.json", WHAT)
    try:  # a config.json leaves out what is as its class has it
        filled = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        line = " ".join(str(e).split())[:200]
        raise ConfigError(f"{what}: {folder / 'config.json'} is of no model of transformers: {line}") from None
    given_sizes = [getattr(getattr(filled, "vision_config", filled), n, None) for n in _SIZES]
    sizes = [s for s in given_sizes if isinstance(s, int) and s > 0]
    if len(sizes) < len(_SIZES):
        raise ConfigError(
            f"{what}: its config.json names no image_size, patch_size and hidden_size, one number each; give a vision "
            "transformer, such as DINOv2, SigLIP or CLIP"
        )
    processor = folder / "preprocessor_config.json"
    known = read_config(processor, WHAT) if processor.is_file() else {}
    values = [v for n in ("image_mean", "image_std") if isinstance(v := known.get(n), list) and len(v) == 3]
    if len(values) < 2:
        raise ConfigError(
            f"{what}: {folder} has no preprocessor_config.json with image_mean and image_std; save the model's image "
            "processor there, beside the model"
        )
    size, patch, width = sizes
    files = tuple(model_files(what, WHAT, folder))
    return VisionWeights(ref, size, patch, width, tuple(values[0]), tuple(values[1]), folder, files, config)


def _of_open_clip(ref: str) -> VisionWeights:
    try:
        clip = find_clip(ref)
    except ConfigError as e:
        raise ConfigError(
            f"latents.features.pretrained: '{ref}' is no folder of transformers, no hub name and no CLIP ({e})"
        ) from None
    clip.require_image_encoder()
    vision = clip.model_cfg.get("vision_cfg") or {}
    size, patch, width = (vision.get(n, d) for n, d in (("image_size", 224), ("patch_size", 16), ("width", 768)))
    if "timm_model_name" in vision or not all(
        isinstance(v, int) for v in (size, patch, width, vision.get("layers", 1))
    ):
        raise ConfigError(
            f"latents.features.pretrained: the vision tower of '{ref}' is not open_clip's own vision transformer; give "
            "a folder of transformers in its place"
        )
    return VisionWeights(ref, size, patch, width, clip=clip)


class VisionEncoder:
    """A frozen vision tower. facts: as VisionWeights.facts gives them. Raises ConfigError where the weights cannot be
    loaded."""

    def __init__(
        self, weights: VisionWeights, facts: Mapping[str, Any], device: str = "cpu", precision: str = "float32"
    ) -> None:
        from latents.encoders import require_digest

        self.weights, self.ref, self.digest = weights, weights.ref, str(facts["digest"])
        self.size, self.grid, self.width = int(facts["size"]), int(facts["grid"]), int(facts["width"])
        self.places = self.size // weights.patch
        self.device, self.precision = device, precision
        tower, self._mean, self._std = _build(weights)
        require_digest(WHAT, weights.digest, self.digest, self.ref)  # it may have been exchanged meanwhile
        self.tower = _moved(tower, device, precision)
        self._exact: Any = self.tower if precision == "float32" else None

    def encode(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [B,H,W,3] -> float32 [B,grid,grid,width] on the CPU."""
        return self._encode(self.tower, pixels).cpu()

    def encode_exact(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """As `encode`, in float32 from the weights as stored; that network is loaded when first needed."""
        if self._exact is None:
            self._exact = _moved(_build(self.weights)[0], self.device, "float32")
        return self._encode(self._exact, pixels).cpu()

    def encode_stored(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to encode uint8 [B,H,W,3]; the result, once it is called for, is float16 [B,grid,grid,width], which is
        not finite where half precision cannot hold it. On a GPU the arithmetic goes on meanwhile."""
        found = self._encode(self.tower, pixels).to(torch.float16)
        return lambda: found.cpu().numpy()

    def _encode(self, tower: Any, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            x = torch.as_tensor(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
            if x.shape[-2:] != (self.size, self.size):
                x = functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self._mean, self._std))
            kind = next(tower.parameters()).dtype
            states = self._states(tower, ((x - mean) / std).to(kind)).float()
            if self.grid != self.places:
                states = functional.adaptive_avg_pool2d(states, self.grid)
            return states.permute(0, 2, 3, 1).contiguous()

    def _states(self, tower: Any, x: torch.Tensor) -> torch.Tensor:
        """[B,width,places,places]: the last states without those that stand for no place, which come first."""
        if self.weights.clip is not None:
            found = tower.forward_intermediates(x, indices=1, normalize_intermediates=True, intermediates_only=True)
            states: torch.Tensor = found["image_intermediates"][-1]
            return states
        more = {}
        if self.size != self.weights.size and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            more = {"interpolate_pos_encoding": True}
        hidden = tower(pixel_values=x, **more).last_hidden_state
        if hidden.ndim != 3 or hidden.shape[1] < self.places**2:
            raise StageError(
                f"latents.features.pretrained: '{self.ref}' gives states of shape {list(hidden.shape[1:])}, where "
                f"{self.places} x {self.places} places were expected; give a vision transformer"
            )
        last = hidden[:, -(self.places**2) :]
        return last.mT.reshape(len(x), -1, self.places, self.places)


def _moved(tower: Any, device: str, precision: str) -> Any:
    from latents.encoders import DTYPES

    return torch.nn.Module.to(tower, torch.device(device), DTYPES[precision])


def _build(weights: VisionWeights) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """The tower, frozen, float32 on the CPU; mean and std of its values."""
    if weights.clip is not None:
        from latents.encoders import build_clip

        visual = build_clip(weights.clip).visual
        preprocess = visual.preprocess_cfg
        return visual, tuple(preprocess["mean"]), tuple(preprocess["std"])
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(
            weights.folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as e:
        line = " ".join(str(e).split())[:200]
        raise ConfigError(f"{WHAT} '{weights.ref}': {weights.folder} cannot be loaded: {line}") from None
    tower = getattr(model, "vision_model", model)
    return tower.eval().requires_grad_(False), weights.mean, weights.std
