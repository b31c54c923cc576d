"""The demo's judge as a scorer of the evaluation (eval.scorer: demo.scorer): does an image show what its caption says?

Captions of this corpus are a closed language, so that a detector reads each attribute back (faithfulness.py). A shape
counts as shown only where its outline is as clean as those of real images are: the nearest of four shapes is always
one of four, also of a blob.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from demo import faithfulness, scenes

SCORES = {
    **{f"shows_{a}": f"share of images that show the {a} as the prompt says" for a in faithfulness.ATTRIBUTES},
    "shows_all": "share of images that show everything as the prompt says",
}
CLEAN = (
    0.06  # unexplained share of a coverage: 99 % of real images stay below 0.04, random blobs above 0.06 (tests/demo)
)


def score(images: np.ndarray, captions: list[str]) -> dict[str, list[float | None]]:
    """1 or 0 for each of SCORES of each image, uint8 [B, H, W, 3]; None where the caption is not of this language."""
    verdicts = [_verdict(image, caption) for image, caption in zip(images, captions, strict=True)]
    return {
        name: [None if v is None else float(all(v.values()) if name == "shows_all" else v[name[6:]]) for v in verdicts]
        for name in SCORES
    }


def _verdict(image: np.ndarray, caption: str) -> dict[str, bool] | None:
    try:
        scene = scenes.parse(caption)
    except ValueError:
        return None
    verdict = faithfulness.judge(image, scene)
    found = faithfulness.detect(image).things[: len(scene.things)]
    clean = len(found) == len(scene.things) and all(f.fit <= CLEAN for f in found)
    return {**verdict, "shape": verdict["shape"] and clean}


def meaning(caption: str) -> Hashable:
    """Equal for captions that say the same: two wordings of one scene are no rivals in a retrieval."""
    try:
        return scenes.parse(caption)
    except ValueError:
        return caption


def tags(caption: str) -> list[str]:
    """How many things the caption names, and what they are."""
    try:
        things: Any = scenes.parse(caption).things
    except ValueError:
        return []
    return ["one thing" if len(things) == 1 else "two things", *sorted({t.shape for t in things})]
