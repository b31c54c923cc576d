"""How an image comes to a feature network's size: the one step in which evaluation codes differ most.

Each function takes uint8 [B, H, W, 3] and gives float32 [B, 3, S, S] in 0..255, not rounded unless its name says so.

    tf           TensorFlow 1's bilinear without antialiasing, as in the network of 2015: torch-fidelity, fid_tf
    clean        Pillow's bicubic with antialiasing, each channel in float32: clean-fid, fid_clean
    torch_fid    torch's bilinear without antialiasing, half-pixel centres: pytorch-fid
    antialias    torch's bilinear with antialiasing: torchmetrics since 1.8
    centre_uint8 centre crop, then Pillow's bicubic, rounded to uint8: text2image-benchmark, which calls it "clean"
    bicubic      Pillow's bicubic in uint8, stretched: dgm-eval's and edm2's `pil`, for DINOv2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch


def tf(pixels: np.ndarray, side: int = 299) -> torch.Tensor:
    """TensorFlow 1's resize_bilinear, by torch-fidelity's own function."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized: torch.Tensor = interpolate_bilinear_2d_like_tensorflow1x(
        _planes(pixels), size=(side, side), align_corners=False
    )
    return resized


def clean(pixels: np.ndarray, side: int = 299) -> torch.Tensor:
    """clean-fid's: a channel at a time as a float32 image, bicubic, clipped to 0..255."""
    import torch

    channels = [
        [
            np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC))
            for plane in np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
        ]
        for image in pixels
    ]
    return torch.from_numpy(np.clip(np.array(channels, np.float32).reshape(-1, 3, side, side), 0, 255))


def torch_fid(pixels: np.ndarray, side: int = 299) -> torch.Tensor:
    """pytorch-fid's, inside its network."""
    import torch

    return torch.nn.functional.interpolate(_planes(pixels), (side, side), mode="bilinear", align_corners=False)


def antialias(pixels: np.ndarray, side: int = 299) -> torch.Tensor:
    """torchmetrics' default."""
    import torch

    return torch.nn.functional.interpolate(
        _planes(pixels), (side, side), mode="bilinear", align_corners=False, antialias=True
    )


def centre_uint8(pixels: np.ndarray, side: int = 299) -> torch.Tensor:
    """text2image-benchmark's: the largest centred square, bicubic, rounded."""
    height, width = pixels.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return bicubic(pixels[:, top : top + short, left : left + short], side)


def bicubic(pixels: np.ndarray, side: int) -> torch.Tensor:
    """Pillow's bicubic on uint8, whatever the aspect ratio."""
    resized = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in pixels]
    return _planes(np.array(resized, np.uint8).reshape(-1, side, side, 3))


def _planes(pixels: np.ndarray) -> torch.Tensor:
    import torch

    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"images are uint8 [B, H, W, 3], not {pixels.dtype} {pixels.shape}")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float()
