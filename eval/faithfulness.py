"""Does a picture show what its caption says? A bridge to judges of corpora whose captions are a closed language.

Three things are judged alike, and a share means something only beside the other two: generated pictures against their
own captions, the same pictures against other prompts' captions (what luck alone gives), and the real held-out pictures
against theirs (what the judge itself can reach).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from eval.estimate import Estimate, proportion

Verdict = Mapping[str, bool]


@dataclasses.dataclass(frozen=True)
class Judge:
    """attributes: what is judged, in the order to show. judge: uint8 [H, W, 3] and a caption -> a verdict for each
    attribute, or None where the caption is not of the judge's language. meaning: captions that say the same are
    equal."""

    name: str
    attributes: tuple[str, ...]
    judge: Callable[[np.ndarray, str], Verdict | None]
    meaning: Callable[[str], Hashable]


def load(name: str | None) -> Judge | None:
    """The judge of that name; None for None."""
    return None if name is None else JUDGES[name]()


def _scenes() -> Judge:
    from demo import faithfulness, scenes

    def judge(picture: np.ndarray, caption: str) -> Verdict | None:
        try:
            scene = scenes.parse(caption)
        except ValueError:
            return None
        return faithfulness.judge(picture, scene)

    def meaning(caption: str) -> Hashable:
        try:
            return scenes.parse(caption)
        except ValueError:
            return caption

    return Judge("scenes", tuple(faithfulness.ATTRIBUTES), judge, meaning)


JUDGES: dict[str, Callable[[], Judge]] = {"scenes": _scenes}


def columns(judge: Judge, verdicts: Sequence[Verdict | None], prefix: str) -> dict[str, list[bool | None]]:
    """Sidecar columns `<prefix>_<attribute>`; null where nothing was judged."""
    return {f"{prefix}_{a}": [None if v is None else bool(v[a]) for v in verdicts] for a in judge.attributes}


def shares(
    judged: Mapping[str, Sequence[bool | None]], attributes: Sequence[str], prefix: str, clusters: Sequence[Hashable]
) -> dict[str, Estimate]:
    """Share of pictures in which each attribute is right, and `all` of them, with Wilson intervals; empty if none was
    judged.

    judged: sidecar columns by name, one entry a picture; clusters: the prompt of each picture.
    """
    picked = [judged[f"{prefix}_{a}"] for a in attributes]
    rows = [i for i in range(len(clusters)) if all(column[i] is not None for column in picked)]
    if not rows:
        return {}
    right = np.array([[bool(column[i]) for column in picked] for i in rows], dtype=bool)
    groups = [clusters[i] for i in rows]
    result = {a: proportion(right[:, j], groups) for j, a in enumerate(attributes)}
    result["all"] = proportion(right.all(axis=1), groups)
    return result
