"""Files that people name on a command line or in a configuration: looked at before they are read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from latents.resize import resize_crop
from shards.images import decode_rgb
from shards.settings import ConfigError

MAX_TEXT = 64_000_000  # bytes of a list of prompts
MAX_IMAGE = 100_000_000  # bytes of one image


def read_lines(path: str, option: str, wanted: str) -> list[str]:
    """The lines of a UTF-8 text file; ConfigError, naming the option, where it is none. wanted: what to give."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{option}: {path} is not a file; give {wanted}")
    if file.stat().st_size > MAX_TEXT:
        raise ConfigError(f"{option}: {path} is larger than {MAX_TEXT // 1_000_000} MB; give a shorter list")
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: {path} is not UTF-8 text; save it as UTF-8") from None


def read_image(path: str | Path, option: str, advice: str) -> np.ndarray:
    """A image, uint8 [H, W, 3]: its size in bytes and in pixels is looked at before anything is decoded.

    Raises ConfigError, naming the option and ending with `advice`.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{option}: there is no file {path}")
    if file.stat().st_size > MAX_IMAGE:
        raise ConfigError(f"{option}: {path} is larger than {MAX_IMAGE // 1_000_000} MB; {advice}")
    try:
        return decode_rgb(file.read_bytes())
    except ValueError as e:
        why = re.sub(r"cannot identify image file <.*?>", "it is no image", str(e))
        raise ConfigError(f"{option}: {path}: {why}; {advice}") from None


def fitted(pixels: np.ndarray, width: int, height: int) -> Image.Image:
    """An image to start from at the size that is made: shorter side scaled, then the middle."""
    if width == height:
        return Image.fromarray(resize_crop(pixels, width)[0])
    return ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.LANCZOS)


def require_size(width: int, height: int, factor: int) -> None:
    """Raises ConfigError where the VAE, which shrinks by `factor`, does not divide a side."""
    for name, side in (("width", width), ("height", height)):
        if side % factor:
            near = round(side / factor) * factor or factor
            raise ConfigError(f"--{name} is {side}, which the VAE does not divide; {near} is the nearest that fits")
