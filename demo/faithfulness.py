"""Does a picture show what its caption says? Image processing reads colour, shape, size, position and ground back.

Nothing here is learned. The ground is the colour of the picture's rim; a thing is a connected region away from it; its
soft coverage (the alpha that compositing it onto the ground would need) gives its area and centroid to a fraction of a
pixel; its shape is the outline that, drawn with that area at that centroid, fits the coverage best.

    >>> found = detect(picture)         # Detection(things=(Found(colour="red", shape="star", ...),), ground="gray")
    >>> compare(found, parse(caption))  # {"colour": True, "shape": True, "size": True, "position": True, ...}
    >>> compare(found, parse(caption), TIGHT)

The nearest of four shapes is always one of four, also of a blob. So a shape counts only where its outline explains the
coverage well enough, by one of two limits: PRESENT takes a rough star for a star and no random blob for anything; TIGHT
asks for outlines as clean as those of real images are, and takes no goblet for a circle.

Lengths are fractions of the picture's side, so that 32 px and 256 px are read alike; below about 24 px a small star and
a small triangle are the same few pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from demo.scenes import COLOURS, GROUNDS, PAIR_SIZES, POSITIONS, SHAPES, SIZES, Scene, outline

ATTRIBUTES = ("colour", "shape", "size", "position", "ground", "count")

AWAY = 30.0  # a pixel this far from the ground (Euclidean, of 255) may belong to a thing
LEVELS = 8  # how many rising thresholds try to part two things that a blur has joined
LEAST_AREA = 0.010  # of the picture; the smallest thing drawn covers 0.03
LEAST_PART = 0.008  # of the picture, for a part at a raised threshold
SOFT_EDGES = (0.45, 0.9)  # pixels: Gaussians that stand for a resize's blur and a decoder's when outlines are compared
TURNS = (-4.0, 0.0, 4.0)  # degrees

# By shape the largest Found.fit that still is the shape. Of 1,500 real images in all of the corpus's formats, 32 px,
# the largest were circle 0.0105, square 0.0186, triangle 0.0309, star 0.0315; nearly all random blobs are above
# PRESENT.
PRESENT = dict.fromkeys(SHAPES, 0.060)
TIGHT = {"circle": 0.015, "square": 0.022, "triangle": 0.035, "star": 0.040}


@dataclass(frozen=True)
class Found:
    """A thing as measured. `x`, `y` and `radius` are in sides of the picture; `fit` is the share of its coverage that
    the best outline leaves unexplained (0 = perfect)."""

    colour: str
    shape: str
    size: str
    position: str
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Detection:
    """What was found: the things, largest first, and the ground."""

    things: tuple[Found, ...]
    ground: str


def nearest_word(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """The word of `palette` whose colour is nearest to `colour` (float [3], 0..255)."""
    return min(palette, key=lambda word: float(np.square(colour - np.array(palette[word])).sum()))


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape's outline of radius 1, by the shoelace formula."""
    points = np.array(outline(shape, 0.0, 0.0, 1.0))
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    x, y = ((points + following) * cross[:, None]).sum(0) / (3 * cross.sum())
    return abs(float(cross.sum())) / 2, float(x), float(y)


def _coverage(points: list[tuple[float, float]], height: int, width: int) -> np.ndarray:
    """Coverage float32 [height, width] of a polygon given in pixels."""
    over = 4
    canvas = Image.new("L", (width * over, height * over))
    # A pixel's centre is at +0.5; Pillow fills the pixels whose centres are inside.
    ImageDraw.Draw(canvas).polygon([(x * over - 0.5, y * over - 0.5) for x, y in points], fill=255)
    return np.asarray(canvas.reduce(over), np.float32) / 255


def _best_outline(alpha: np.ndarray) -> tuple[float, str, float, float, float]:
    """(unexplained share, shape, x, y, radius) of the outline that fits a coverage float [H, W] best, in pixels.

    Area and centroid fix an outline's radius and position, so only shape, turn and softness are tried.
    """
    area = float(alpha.sum())
    height, width = alpha.shape
    centre_x = float(alpha.sum(0) @ (np.arange(width) + 0.5)) / area
    centre_y = float(alpha.sum(1) @ (np.arange(height) + 0.5)) / area
    tried: list[tuple[str, float, float, float]] = []
    masks: list[np.ndarray] = []
    for shape in SHAPES:
        unit_area, off_x, off_y = _moments(shape)
        radius = math.sqrt(area / unit_area)
        x, y = centre_x - off_x * radius, centre_y - off_y * radius
        for turn in TURNS if shape != "circle" else (0.0,):
            tried.append((shape, x, y, radius))
            masks.append(_coverage(outline(shape, x, y, radius, turn), height, width))
    sharp = np.stack(masks)
    soft = np.stack([ndimage.gaussian_filter(sharp, (0, s, s), mode="nearest", truncate=3) for s in SOFT_EDGES])
    errors = np.square(alpha - soft).sum((2, 3)).min(0) / area
    best = int(errors.argmin())
    return float(errors[best]), *tried[best]


def _regions(distance: np.ndarray) -> list[np.ndarray]:
    """Boolean masks of the things: connected regions away from the ground, parted where a raised threshold does it."""
    pixels = distance.size
    labels, count = ndimage.label(distance > AWAY)
    regions = []
    for index in range(1, count + 1):
        region = labels == index
        if region.sum() < LEAST_AREA * pixels:
            continue
        # Most of a thing is flat; the few pixels beyond that are a sharp resize's ringing along its edges.
        flat = float(np.median(distance[region]))
        for level in np.linspace(AWAY, 0.8 * flat, LEVELS)[1:]:
            parts, n = ndimage.label(region & (distance > level))
            sizes = np.bincount(parts.ravel(), minlength=n + 1)[1:]
            large = [i + 1 for i in range(n) if sizes[i] >= LEAST_PART * pixels]
            if len(large) > 1:  # each pixel of the region goes to the nearest part
                seeds = np.where(np.isin(parts, large), parts, 0)
                _, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
                part_of = seeds[rows, columns]
                regions += [region & (part_of == i) for i in large]
                break
        else:
            regions.append(region)
    return regions


def _read(image: np.ndarray, ground: np.ndarray, distance: np.ndarray, region: np.ndarray, others: np.ndarray) -> Found:
    """Measure one thing. `picture` float [H, W, 3], `region` its pixels, `others` pixels of other things."""
    height, width = region.shape
    side = min(height, width)
    # The ink: the pixels of the region that are furthest from the ground are those that no edge has mixed with it.
    far = distance[region]
    ink = np.median(image[region][far >= np.quantile(far, 0.65)], axis=0)
    # Coverage by projection onto the line from ground to ink, in the region and just around it.
    alpha = (image - ground) @ (ink - ground) / max(float(np.square(ink - ground).sum()), 1.0)
    reach = ndimage.binary_dilation(region, iterations=max(1, round(side / 32))) & ~others
    alpha = np.where(reach, alpha.clip(0, 1), 0)
    (rows, columns) = (np.flatnonzero(reach.any(axis)) for axis in (1, 0))
    top, left = max(0, int(rows[0]) - 2), max(0, int(columns[0]) - 2)
    fit, shape, x, y, radius = _best_outline(alpha[top : rows[-1] + 3, left : columns[-1] + 3])
    x, y = x + left, y + top
    x, y, radius = (x - (width - side) / 2) / side, (y - (height - side) / 2) / side, radius / side
    size = _size(radius, SIZES)
    position = min(POSITIONS, key=lambda word: math.dist(POSITIONS[word], (x, y)))
    return Found(nearest_word(ink, COLOURS), shape, size, position, x, y, radius, fit)


def detect(image: np.ndarray) -> Detection:
    """The things in a picture, uint8 [H, W, 3] of at least 16 x 16 pixels.

    Where there are two, each one's position is relative to the other (left and right, or top and bottom), and both are
    measured by the sizes that two things have.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 16:
        raise ValueError(f"a picture is uint8 [H, W, 3] of 16 x 16 or more, not {image.dtype} {image.shape}")
    pixels = image.astype(np.float32)
    height, width = image.shape[:2]
    rim = max(1, round(min(height, width) / 32))
    inner = np.zeros((height, width), bool)
    inner[rim:-rim, rim:-rim] = True
    ground = np.median(pixels[~inner], axis=0)
    distance = np.sqrt(np.square(pixels - ground).sum(-1))
    regions = _regions(distance)
    everything = np.any(regions, axis=0) if regions else np.zeros((height, width), bool)
    things = [_read(pixels, ground, distance, region, everything & ~region) for region in regions]
    things.sort(key=lambda thing: -thing.radius)
    if len(things) == 2:
        a, b = things
        first, second = ("left", "right") if abs(a.x - b.x) >= abs(a.y - b.y) else ("top", "bottom")
        a_first = a.x < b.x if first == "left" else a.y < b.y
        things = [_of_two(a, first if a_first else second), _of_two(b, second if a_first else first)]
    return Detection(tuple(things), nearest_word(ground, GROUNDS))


def _of_two(thing: Found, position: str) -> Found:
    return dataclasses.replace(thing, position=position, size=_size(thing.radius, PAIR_SIZES))


def _size(radius: float, sizes: dict[str, float]) -> str:
    return min(sizes, key=lambda word: abs(sizes[word] - radius))


def compare(found: Detection, scene: Scene, limits: Mapping[str, float] = PRESENT) -> dict[str, bool]:
    """Whether what was found is a scene: one boolean for each of ATTRIBUTES.

    An attribute holds where it holds for every thing of the scene. The largest found things are compared, two by where
    they stand (so a picture that swaps two colours has them wrong); a thing that was not found has every attribute
    wrong. `count` says that there are as many things as there should be. limits: by shape the largest fit that counts.
    """
    wanted = len(scene.things)
    things = list(found.things[:wanted])
    verdict = {"ground": found.ground == scene.ground, "count": len(found.things) == wanted}
    if len(things) < wanted:
        return {name: verdict.get(name, False) for name in ATTRIBUTES}
    if wanted == 2:
        across = scene.things[0].position == "left"
        things.sort(key=lambda thing: thing.x if across else thing.y)
        same_axis = (abs(things[0].x - things[1].x) >= abs(things[0].y - things[1].y)) == across
        verdict["position"] = same_axis
    else:
        position = min(POSITIONS, key=lambda word: math.dist(POSITIONS[word], (things[0].x, things[0].y)))
        verdict["position"] = position == scene.things[0].position
    for name in ("colour", "shape", "size"):
        verdict[name] = all(getattr(f, name) == getattr(t, name) for f, t in zip(things, scene.things, strict=True))
    verdict["shape"] &= all(f.fit <= limits[f.shape] for f in things)
    return {name: verdict[name] for name in ATTRIBUTES}
