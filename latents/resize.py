"""One image to the encoder's size, and decoding in threads ahead of the encoder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

MAX_SCALED = 64_000_000  # pixels of a scaled image that are held in memory


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an image is cut: scaled to `scaled_width` x `scaled_height`, then cropped at (left, top), in pixels."""

    scaled_width: int
    scaled_height: int
    crop_left: int
    crop_top: int


def crop_place(key: str) -> tuple[float, float]:
    """Where a sample's image is cropped if that is drawn: two numbers of [0, 1), across and down, by its key alone.

    So it is the same for its latent, for what lies beside it, and whenever either is made again.
    """
    digest = hashlib.sha256(f"crop {key}".encode("utf-8", "surrogatepass")).digest()
    across, down = (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in (0, 4))
    return across, down


def fit_cover(width: int, height: int, to_width: int, to_height: int, place: tuple[float, float] | None = None) -> Fit:
    """The smallest scale at which the image covers the target; what stands out is cropped evenly on both sides.

    place: of `crop_place`; each way in which the target fits in is then as likely.
    """
    if to_width * height >= to_height * width:
        scaled_width, scaled_height = to_width, max(to_height, round(height * to_width / width))
    else:
        scaled_width, scaled_height = max(to_width, round(width * to_height / height)), to_height
    spare = (scaled_width - to_width, scaled_height - to_height)
    if place is None:
        return Fit(scaled_width, scaled_height, spare[0] // 2, spare[1] // 2)
    return Fit(scaled_width, scaled_height, int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1)))


def crop_before(original: tuple[int, int], stored: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """What an image had lost already when it was stored, as left and top in pixels of the image scaled as by `fit`.

    original, stored: width and height as it was fetched, and as it lies in the tar, to which it was scaled and cropped
    evenly (resize_mode center_crop). Nothing where they have one shape.
    """
    if 0 in original or 0 in stored:
        return 0, 0
    before = fit_cover(*original, *stored)
    return round(before.crop_left * fit.scaled_width / stored[0]), round(
        before.crop_top * fit.scaled_height / stored[1]
    )


def resize_crop_to(
    pixels: np.ndarray, to_width: int, to_height: int, place: tuple[float, float] | None = None
) -> tuple[np.ndarray, Fit]:
    """uint8 [H,W,3] -> uint8 [to_height,to_width,3] and what was done; Lanczos, antialiased, where sizes differ.

    place: as for `fit_cover`.
    """
    height, width = pixels.shape[:2]
    fit = fit_cover(width, height, to_width, to_height, place)
    if (fit.scaled_width, fit.scaled_height) != (width, height):
        image = Image.fromarray(pixels)
        if fit.scaled_width * fit.scaled_height > MAX_SCALED:  # a strip: no more of it is scaled than is kept
            across, down = width / fit.scaled_width, height / fit.scaled_height
            left, top = fit.crop_left * across, fit.crop_top * down
            box = (left, top, left + to_width * across, top + to_height * down)
            return np.asarray(image.resize((to_width, to_height), Image.Resampling.LANCZOS, box)), fit
        pixels = np.asarray(image.resize((fit.scaled_width, fit.scaled_height), Image.Resampling.LANCZOS))
    return pixels[fit.crop_top : fit.crop_top + to_height, fit.crop_left : fit.crop_left + to_width], fit


def resize_crop(pixels: np.ndarray, side: int) -> tuple[np.ndarray, Fit]:
    """As `resize_crop_to`, to a square."""
    return resize_crop_to(pixels, side, side)


def prefetch(load: Callable[[int], T], count: int, threads: int, window: int) -> Iterator[T]:
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
