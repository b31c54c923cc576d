"""The demo's detector as the evaluation's scorer (eval.scorer: demo.scorer): does an image show what its caption says?

Captions of this corpus are a closed language, so that a detector reads each attribute back (faithfulness.py). There are
two limits for what counts as a shape, `present` and `tight`, and results are told apart by kind of caption (KINDS).
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from demo import faithfulness, scenes

KINDS = {1: "one thing", 2: "two things"}  # by the number of things that a caption names
SCORES = {
    "shows_all": "share of images that show everything as the prompt says; a rough outline counts",
    "shows_all_tight": "share of images that show everything as the prompt says, with outlines as clean as real ones",
    "shows_shape_tight": "share of images whose outlines are as the prompt says and as clean as real ones",
    **{f"shows_{a}": f"share of images that show the {a} as the prompt says" for a in faithfulness.ATTRIBUTES},
}


def score(images: np.ndarray, captions: list[str]) -> dict[str, list[float | None]]:
    """1 or 0 for each of SCORES of each image, uint8 [B, H, W, 3]; None where the caption is not of this language."""
    found = [_scores(image, caption) for image, caption in zip(images, captions, strict=True)]
    return {name: [None if f is None else float(f[name]) for f in found] for name in SCORES}


def _scores(image: np.ndarray, caption: str) -> dict[str, bool] | None:
    try:
        scene = scenes.parse(caption)
    except ValueError:
        return None
    found = faithfulness.detect(image)
    present, tight = (faithfulness.compare(found, scene, x) for x in (faithfulness.PRESENT, faithfulness.TIGHT))
    return {
        "shows_all": all(present.values()),
        "shows_all_tight": all(tight.values()),
        "shows_shape_tight": tight["shape"],
        **{f"shows_{a}": value for a, value in present.items()},
    }


def meaning(caption: str) -> Hashable:
    """Equal for captions that say the same: two wordings of one scene are no rivals in a retrieval."""
    try:
        return scenes.parse(caption)
    except ValueError:
        return caption


def tags(caption: str) -> list[str]:
    """How many things the caption names, and what they are."""
    try:
        things = scenes.parse(caption).things
    except ValueError:
        return []
    return [KINDS[len(things)], *sorted({t.shape for t in things})]
