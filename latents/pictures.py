"""One picture to the encoder's size, and decoding in threads ahead of the encoder."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture comes to R x R: scaled to `scaled_width` x `scaled_height`, then cropped at (left, top), in px."""

    scaled_width: int
    scaled_height: int
    crop_left: int
    crop_top: int


def fit_square(width: int, height: int, side: int) -> Fit:
    """The shorter side becomes `side`, the longer one is cropped in the middle (SDXL's crop coordinates)."""
    short = min(width, height)
    scaled_width = max(side, round(width * side / short))
    scaled_height = max(side, round(height * side / short))
    return Fit(scaled_width, scaled_height, (scaled_width - side) // 2, (scaled_height - side) // 2)


def resize_crop(pixels: np.ndarray, side: int) -> tuple[np.ndarray, Fit]:
    """uint8 [H,W,3] -> uint8 [side,side,3] and what was done; Lanczos with antialiasing where the size differs."""
    height, width = pixels.shape[:2]
    fit = fit_square(width, height, side)
    if (fit.scaled_width, fit.scaled_height) != (width, height):
        image = Image.fromarray(pixels).resize((fit.scaled_width, fit.scaled_height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
    return pixels[fit.crop_top : fit.crop_top + side, fit.crop_left : fit.crop_left + side], fit


def ahead(load: Callable[[int], T], count: int, threads: int, window: int) -> Iterator[T]:
    """`load(0) .. load(count-1)` in order, computed by threads at most `window` items ahead of the consumer.

    The order and the results do not depend on the number of threads. An exception of `load` is raised at
    its item; whatever is still queued is then cancelled.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for i in range(count):
                pending.append(pool.submit(load, i))
                if len(pending) >= window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
