"""How unlike two images look to a frozen network: a loss for the VAE, and a measure of its reconstructions.

    FILE.safetensors            LPIPS (Zhang et al. 2018, arXiv:1801.03924), version 0.1, on VGG16 or AlexNet
    a folder of transformers    a vision tower (CLIP, SigLIP, DINOv2, ...): the outputs of all its blocks
    any other reference         the vision tower of an open_clip model: a folder, MODEL:TAG or MODEL:/file

The LPIPS file holds the trunk's weights as torchvision names them (`features.0.weight`) and the package's linear ones
(`lin0.model.1.weight`), or the state dict of the package's own model (`net.slice1.0.weight`). Nothing is unpickled.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latents.weights import find_clip
from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError

if TYPE_CHECKING:
    from latents.weights import ClipWeights

FIELD = "autoencoder.perceptual.weights"
# The last of torchvision's layers in each of LPIPS's five parts, and the parts' channels.
ENDS = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
SMALLEST = {"vgg16": 16, "alexnet": 31}  # sides, in pixels, which leave a place to the last part
CHANNELS = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}
# LPIPS's ScalingLayer, for images in -1..1: ImageNet's mean and deviation.
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TOWER_MEAN, TOWER_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of 0..1


class Distance(nn.Module):
    """Base of both kinds. Frozen, and in its mode for use whatever the mode of what it is part of."""

    def train(self, mode: bool = True) -> Distance:
        """Stays as it is for use."""
        super().train(False)
        return self

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images float [B,3,H,W] in -1..1 -> features, of each layer."""
        raise NotImplementedError

    def compared(self, layer: int, squared: torch.Tensor) -> torch.Tensor:
        """Squared differences of a layer's features of unit length -> float32 [B]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Distances of images float [B,3,H,W] in -1..1, float32 [B]; `target` gets no gradient."""
        with torch.no_grad():
            wanted = self.features(target)
        total = torch.zeros(len(x), device=x.device)
        for layer, (a, b) in enumerate(zip(self.features(x), wanted, strict=True)):
            units = [nn.functional.normalize(f.float(), dim=self.axis, eps=1e-10) for f in (a, b)]
            total = total + self.compared(layer, (units[0] - units[1]).square())
        return total

    axis = 1
    smallest = 1  # side of images, in pixels

    def require(self, side: int, field: str) -> None:
        """Raises ConfigError, naming the setting, where images of that side are too small to be compared."""
        if side < self.smallest:
            raise ConfigError(
                f"{FIELD}: its network needs images of {self.smallest} pixels, and {field} is {side}; name another "
                "network"
            )


class Lpips(Distance):
    """LPIPS 0.1: differences of unit-length features, weighted channel by channel, over places; summed over layers."""

    def __init__(self, kind: str, weights: dict[str, torch.Tensor]) -> None:
        import torchvision

        super().__init__()
        with torch.device("meta"):
            trunk = getattr(torchvision.models, kind)(weights=None).features[: ENDS[kind][-1] + 1]
        for layer in trunk:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.trunk, self.ends, self.smallest = trunk, ENDS[kind], SMALLEST[kind]
        self.lins = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False, device="meta") for c in CHANNELS[kind])
        named = {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}
        trunk.load_state_dict({k: named[k] for k in trunk.state_dict()}, assign=True)
        lins = {f"{i}.weight": weights[f"lin{i}.model.1.weight"] for i in range(len(self.ends))}
        self.lins.load_state_dict(lins, assign=True)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.float().requires_grad_(False).train()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """As Distance's; [B,C,h,w] each."""
        x, found = (x - self.mean) / self.std, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in self.ends:
                found.append(x)
        return found

    def compared(self, layer: int, squared: torch.Tensor) -> torch.Tensor:
        """As Distance's."""
        found: torch.Tensor = self.lins[layer](squared).float().mean(dim=(1, 2, 3))
        return found


class Tower(Distance):
    """1 - cosine of a vision tower's features, over places and over blocks, in the mean.

    size: images are brought to this square. mean, std: of values in 0..1.
    """

    axis = -1

    def __init__(self, tower: Any, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.tower, self.size = tower, size
        rows = [m for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        alike = [list(m) for m in rows if len({type(block) for block in m}) == 1]
        blocks = max(alike, key=lambda row: sum(p.numel() for block in row for p in block.parameters()), default=[])
        if not blocks:
            raise ConfigError(f"{FIELD}: this vision tower has no blocks one after another whose outputs are compared")
        self._seen: list[torch.Tensor] = []
        for block in blocks:
            block.register_forward_hook(self._see)
        self.count = len(blocks)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.float().requires_grad_(False).train()

    def _see(self, module: nn.Module, given: Any, output: Any) -> None:
        self._seen.append(output[0] if isinstance(output, tuple) else output)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """As Distance's; [B,places,width] each."""
        if x.shape[-2:] != (self.size, self.size):
            x = nn.functional.interpolate(x.float(), (self.size, self.size), mode="bicubic", antialias=True)
        self.tower(((x + 1) / 2 - self.mean) / self.std)
        found, self._seen = self._seen, []
        return [f.flatten(2).mT if f.ndim == 4 else f for f in found]

    def compared(self, layer: int, squared: torch.Tensor) -> torch.Tensor:
        """As Distance's."""
        return squared.sum(dim=-1).flatten(1).mean(dim=1) / (2 * self.count)


def digest(ref: str) -> str:
    """What identifies the weights; raises ConfigError with one sentence where there are none that can be used."""
    path = Path(ref)
    if _of_lpips(path):
        _lpips_kind(path)
        return _digest(str(path), os.stat(path).st_mtime_ns)
    if _of_transformers(path):
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        if len(files) == 1:
            raise ConfigError(f"{FIELD}: {path} has a config.json but no .safetensors file of weights")
        return digest_json([_digest(str(f), os.stat(f).st_mtime_ns) for f in files])
    return _clip(ref).digest


def load(ref: str) -> Distance:
    """The distance that `ref` names, float32 on the CPU; raises ConfigError where it cannot be loaded."""
    from safetensors.torch import load_file

    path = Path(ref)
    if _of_lpips(path):
        kind = _lpips_kind(path)
        return Lpips(kind, {_plain(k): v for k, v in load_file(path).items()})
    if _of_transformers(path):
        return _transformers_tower(path)
    from latents.encoders import build_clip

    visual = build_clip(_clip(ref)).visual
    size = visual.image_size
    given = [getattr(visual, n, None) or d for n, d in (("image_mean", TOWER_MEAN), ("image_std", TOWER_STD))]
    return Tower(visual, size if isinstance(size, int) else size[0], *given)


def _plain(name: str) -> str:
    """A tensor's name in the package's state dict -> torchvision's, and one name of each linear layer."""
    return re.sub(r"^lins\.(\d)\.", r"lin\1.", re.sub(r"^net\.slice\d\.", "features.", name))


def _of_lpips(path: Path) -> bool:
    """Whether it is a file by its name alone, and no MODEL:/file of open_clip."""
    return path.suffix == ".safetensors" and (":" not in str(path) or path.is_file())


def _lpips_kind(path: Path) -> str:
    """The trunk of an LPIPS file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"{FIELD}: there is no file {path}; docs/train.md says how an LPIPS file is made")
    try:
        with safe_open(path, "pt") as f:
            shapes = {_plain(k): tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{FIELD}: {path} cannot be read: {' '.join(str(e).split())[:200]}") from None
    first = shapes.get("features.0.weight")
    kind = {(64, 3, 3, 3): "vgg16", (64, 3, 11, 11): "alexnet"}.get(first or ())
    if kind is None:
        raise ConfigError(
            f"{FIELD}: {path} holds neither VGG16 nor AlexNet: its features.0.weight is {first or 'absent'}; "
            "docs/train.md says how an LPIPS file is made"
        )
    for name, shape in _wanted(kind).items():
        if shapes.get(name) != shape:
            raise ConfigError(
                f"{FIELD}: {path} is no LPIPS of {kind}: {name} is {shapes.get(name, 'absent')} and should be {shape}; "
                "docs/train.md says how an LPIPS file is made"
            )
    return kind


@functools.cache
def _wanted(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an LPIPS file."""
    import torchvision

    with torch.device("meta"):
        trunk = getattr(torchvision.models, kind)(weights=None).features[: ENDS[kind][-1] + 1]
    found = {f"features.{k}": tuple(v.shape) for k, v in trunk.state_dict().items()}
    return found | {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(CHANNELS[kind])}


def _of_transformers(path: Path) -> bool:
    try:
        return "model_type" in json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _clip(ref: str) -> ClipWeights:
    try:
        return find_clip(ref)
    except ConfigError as e:
        raise ConfigError(
            f"{FIELD}: '{ref}' is no .safetensors file of LPIPS, no folder of transformers, and no CLIP ({e})"
        ) from None


def _transformers_tower(path: Path) -> Tower:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except Exception as e:
        raise ConfigError(f"{FIELD}: {path} cannot be loaded: {' '.join(str(e).split())[:200]}") from None
    tower = getattr(model, "vision_model", model)
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{FIELD}: {path} is no vision tower: its config.json has no image_size")
    preprocessor: dict[str, Any] = {}
    if (file := path / "preprocessor_config.json").is_file():
        preprocessor = json.loads(file.read_bytes())
    mean, std = (tuple(preprocessor.get(n) or d) for n, d in (("image_mean", TOWER_MEAN), ("image_std", TOWER_STD)))
    return Tower(tower, size, mean, std)


@functools.lru_cache(maxsize=16)
def _digest(file: str, mtime_ns: int) -> str:
    return digest_file(file)
