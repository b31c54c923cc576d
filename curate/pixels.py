"""Measures of an image that need no network: sharpness, entropy, JPEG quality, border, text-free area."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

LONGEST = 512  # pixels: images are measured at one scale, or sharpness would be a measure of size

# The luminance table of the JPEG standard (ITU-T T.81, Annex K.1), which libjpeg scales by quality.
_LUMINANCE = np.fromstring(
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 "
    "14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 "
    "49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99",
    np.int64,
    sep=" ",
)


def grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] -> float32 [h,w] in 0..255, its longest side at most 512 pixels."""
    image = Image.fromarray(pixels).convert("L")
    scale = LONGEST / max(image.size)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian of a grey image [h,w] (Pech-Pacheco et al. 2000); low where all of it is blurred."""
    return float(ndimage.laplace(image).var())


def entropy(image: np.ndarray) -> float:
    """Shannon entropy of the grey levels, in bits: 0 for one level, 8 for all equally often."""
    counts = np.bincount(np.clip(np.rint(image), 0, 255).astype(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() + 0.0)


def border(image: np.ndarray, spread: float = 4.0) -> float:
    """The share of the area in uniform bands along the edges: frames, letterboxes, blank margins. 1 for a blank image.

    A row or column belongs to a band while its grey levels, and those of the band before it, stay within `spread`
    standard deviations of one level.
    """

    def band(lines: np.ndarray) -> int:
        flat = (lines.std(axis=1) <= spread) & (np.abs(lines.mean(axis=1) - lines[0].mean()) <= spread)
        return int(np.argmin(flat)) if not flat.all() else len(lines)

    top, bottom = band(image), band(image[::-1])
    left, right = band(image.T), band(image.T[::-1])
    height, width = image.shape
    if top == height or left == width:
        return 1.0
    return 1.0 - (height - top - bottom) * (width - left - right) / (height * width)


def text_free(image: np.ndarray) -> float:
    """An estimate of the share of the area that holds no overlaid text, from the density of strokes.

    Text is where strong gradients lie close together along a line: the image's edges are joined along the rows by
    about two letters' width, and what comes out wide, filled and with many strokes counts as text (after the
    morphological detectors of Yassin Hassan and Karam 2000). Photographs of foliage or fabric can be taken for text.
    """
    if min(image.shape) < 16:
        return 1.0
    across = np.abs(np.diff(image, axis=1, prepend=image[:, :1]))
    edges = across > 48
    joined = ndimage.binary_closing(edges, np.ones((3, 17), bool))
    joined = ndimage.binary_opening(joined, np.ones((5, 9), bool))
    labels, count = ndimage.label(joined)
    area = 0
    for box in ndimage.find_objects(labels, count):
        height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
        if width < 2 * height or height > image.shape[0] // 3:
            continue
        inside = edges[box]
        strokes = float(np.diff(inside.astype(np.int8), axis=1).clip(min=0).sum(axis=1).mean())
        if strokes >= max(4.0, width / height) and joined[box].mean() > 0.5:
            area += height * width
    return 1.0 - min(1.0, area / image.size)


def jpeg_quality(data: bytes) -> float:
    """The quality that libjpeg would have been given for this file's luminance table, 1..100; NaN for other formats.

    libjpeg scales the standard's table by 5000/q below quality 50 and by 200-2q above (jcparam.c).
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            table = getattr(image, "quantization", {}).get(0)
    except (OSError, SyntaxError, ValueError):
        return float("nan")
    if not table:
        return float("nan")
    values = np.sort(np.asarray(table, np.float64))  # Pillow gives the table in zigzag or natural order, by version
    whole = (values > 1) & (values < 255)  # not cut off at either end of a byte
    ratios = (values / np.sort(_LUMINANCE))[whole]
    scale = float(np.median(ratios)) * 100 if len(ratios) else 1.0
    return float(np.clip(5000 / scale if scale > 100 else (200 - scale) / 2, 1, 100))


COLUMNS = ("sharpness", "entropy", "jpeg_quality", "border", "text_free")


def measure(data: bytes, pixels: np.ndarray) -> tuple[float, ...]:
    """The COLUMNS of one image: its file and its pixels, uint8 [H,W,3]."""
    image = grey(pixels)
    return sharpness(image), entropy(image), jpeg_quality(data), border(image), text_free(image)
