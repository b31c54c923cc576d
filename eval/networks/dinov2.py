"""DINOv2's class token after the last norm (Oquab et al. 2023; as a metric Stein et al. 2023), in either public layout.

    a folder   config.json and model.safetensors, as transformers saves facebook/dinov2-large
    a file     dinov2_vitl14_pretrain.pth, as torch.hub's facebookresearch/dinov2 has it

Images are stretched to 224 px by Pillow's bicubic. The weights were trained at 518 px, so their position embeddings
are interpolated, and the two libraries do it differently: torch.hub's code by the factor (16 + 0.1) / 37, transformers
to exactly 16. Published distances come from torch.hub's, so both layouts are read with its rule, and give the same
features.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.networks import resize
from shards.settings import ConfigError

if TYPE_CHECKING:
    import torch

SIDE = 224
OFFSET = 0.1  # interpolate_offset of torch.hub's models without registers
HEAD = 64  # width of an attention head in all of them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILES = ("config.json", "model.safetensors")


class Dinov2:
    """The network; float32 [B, d] from images uint8 [B, H, W, 3]. state: tensors of a torch.hub file, None for a
    folder. Raises ConfigError where `path` holds no DINOv2."""

    def __init__(self, path: Path, state: dict[str, torch.Tensor] | None, device: str) -> None:
        import torch

        try:
            model = _of_folder(path) if state is None else _of_hub(state)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as e:
            raise ConfigError(f"eval.dinov2: {path} is not a DINOv2: {' '.join(str(e).split())[:200]}") from None
        self.device, self.hub = device, state is not None
        self.model: Any = model.eval().requires_grad_(False).to(device, torch.float32)

    def prepare(self, pixels: np.ndarray) -> torch.Tensor:
        """float32 [B, 3, 224, 224], normalised as for ImageNet."""
        import torch

        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (resize.bicubic(pixels, SIDE) / 255 - mean) / std

    def features(self, prepared: torch.Tensor) -> torch.Tensor:
        """float32 [B, d] of what `prepare` gives."""
        x = prepared.to(self.device)
        found: torch.Tensor = self.model(x) if self.hub else self.model(x).last_hidden_state[:, 0]
        return found


def positions(embeddings: torch.Tensor, patch: int) -> torch.Tensor:
    """Position embeddings [1, 1 + M * M, d] for images of 224 px, as torch.hub's code interpolates them."""
    import torch

    side, wanted = math.isqrt(embeddings.shape[1] - 1), SIDE // patch
    if side * side + 1 != embeddings.shape[1]:
        raise ValueError(f"{embeddings.shape[1]} position embeddings are no square and a class token")
    if side == wanted:
        return embeddings
    grid = embeddings[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (wanted + OFFSET) / side
    resized = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([embeddings[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _of_folder(folder: Path) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.Dinov2Model.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    kept = model.embeddings.position_embeddings
    model.embeddings.position_embeddings = torch.nn.Parameter(positions(kept.data, int(model.config.patch_size)))
    return model


def _of_hub(state: dict[str, torch.Tensor]) -> Any:
    """timm's vision transformer has torch.hub's names for everything but the gated layers of the largest model."""
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    if "register_tokens" in state:
        raise ValueError("it has register tokens, which no published distance is measured with; give one without")
    named = {re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", n)): v for n, v in state.items()}
    named.pop("mask_token", None)
    gated = any(".mlp.w12." in n for n in state)
    patch, width = int(named["patch_embed.proj.weight"].shape[-1]), int(named["cls_token"].shape[-1])
    named["pos_embed"] = positions(named["pos_embed"], patch)
    depth = 1 + max(int(m[1]) for n in named if (m := re.match(r"blocks\.(\d+)\.", n)))
    hidden = int(named["blocks.0.mlp.fc1.weight"].shape[0])
    kind = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if gated else {}
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=patch,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=width // HEAD,
        mlp_ratio=(hidden + 0.5) / width,
        init_values=1.0,
        weight_init="skip",
        **kind,
    )
    model.load_state_dict(named)
    return model


def weight_files(ref: str) -> list[Path]:
    """The files of a reference: the folder's two, or the one; they may be absent."""
    path = Path(ref)
    return [path] if path.suffix in (".pth", ".pt") or os.path.isfile(ref) else [path / n for n in FILES]
