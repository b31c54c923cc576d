"""Aspect-ratio buckets: the few shapes that images are brought to, so that batches have one shape.

The rule is NovelAI's ("NovelAI improvements on Stable Diffusion", 2022), with which SDXL was trained too
(Podell et al. 2023, arXiv:2307.01952, section 2.3): for each width that is a multiple of `step`, the greatest
multiple for the height that keeps the area within resolution**2, and the same with width and height exchanged.
An image goes to the bucket whose aspect ratio is nearest to its own by the difference of logarithms, so that
it makes no difference which side is called the width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A shape in pixels, of those that stand for a square of `resolution`."""

    resolution: int
    width: int
    height: int

    def to_json(self) -> dict[str, int]:
        """As it stands in a manifest."""
        return dataclasses.asdict(self)


def make_buckets(resolution: int, step: int, max_aspect: float) -> list[Bucket]:
    """The buckets of one resolution (a multiple of `step`), by rising aspect ratio, none beyond `max_aspect`."""
    area, longest = resolution**2, math.floor(resolution * math.sqrt(max_aspect))
    shapes = set()
    for long in range(resolution, longest + 1, step):
        short = area // long // step * step
        if short and long <= max_aspect * short:
            shapes |= {(long, short), (short, long)}
    return [Bucket(resolution, w, h) for w, h in sorted(shapes, key=lambda s: (s[0] / s[1], s[0]))]


def nearest(buckets: Sequence[Bucket], widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """int64 [N]: for images of these sizes, the place in `buckets` of the nearest; of two as near, the first."""
    own = np.log(np.asarray(widths, np.float64)) - np.log(np.asarray(heights, np.float64))
    theirs = np.array([math.log(b.width / b.height) for b in buckets])
    return np.abs(own[:, None] - theirs[None, :]).argmin(axis=1)
