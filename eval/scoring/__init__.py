"""What scores images by their prompts: a vision-language judge, learned preferences, a module of the user's own.

    judge       eval.judge: VQAScore and Soft-TIFA from any image-text-to-text model (vqa.py)
    preference  eval.preference: PickScore, HPSv2, LAION's aesthetic predictor (preference.py)
    scorer      eval.scorer: a Python module with SCORES, {name: what it means}, and
                score(images uint8 [B, H, W, 3], captions) -> {name: [float or None, ...]}; if it likes,
                meaning(caption), equal for captions that say the same, and tags(caption), a list of texts

Each is a network like the others (eval/networks): found and digested without being loaded, asked in batches, and its
scores are columns. Scores made elsewhere come in as files (suites.py).
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import numpy as np

from eval.metrics.definitions import is_free
from eval.networks.weights import Found, Network, Rows
from eval.suites import LARGEST
from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError


def find(name: str, ref: Any) -> Found:
    """What scores, by the configuration's section `ref`; ConfigError where weights or module are missing."""
    if name == "scorer":
        return Found(name, ref, None, digest_file(str(scorer(ref).__file__)))
    from eval.scoring import preference, vqa

    if name == "judge":
        return Found(name, ref, None, digest_json([vqa.digest(ref.model), ref.question, ref.yes, ref.precision]))
    return Found(name, ref, None, digest_json(preference.digests(ref)))


def load(found: Found, device: str) -> Network:
    """What scores, ready."""
    if found.name == "scorer":
        return Scorer(found.ref)
    from eval.scoring import preference, vqa

    return vqa.Judge(found.ref, device) if found.name == "judge" else preference.Preference(found.ref, device)


def scorer(name: str) -> ModuleType:
    """The user's module; ConfigError where it cannot be imported or lacks SCORES or score."""
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(f"eval.scorer: the module {name} cannot be imported ({e}); put it on PYTHONPATH") from None
    scores = getattr(module, "SCORES", None)
    if not isinstance(scores, dict) or not scores or not callable(getattr(module, "score", None)):
        raise ConfigError(f"eval.scorer: {name} needs SCORES, names with their meaning, and score(images, captions)")
    if (taken := next((n for n in scores if not is_free(n)), None)) is not None:
        raise ConfigError(
            f"eval.scorer: {name} calls a score {taken!r}, which is no free name; use small letters, digits and _, and "
            "no name of a metric"
        )
    if not module.__file__ or not os.path.isfile(module.__file__):
        raise ConfigError(f"eval.scorer: {name} is no file, so that nobody could say what it was; name a module")
    return module


class Scorer:
    """The user's module as a network."""

    def __init__(self, name: str) -> None:
        self.module = scorer(name)

    def prepare(self, pixels: np.ndarray, rows: Rows) -> tuple[np.ndarray, list[str]]:
        """Nothing to prepare."""
        return pixels, [str(r["caption"] or "") for r in rows]

    def __call__(self, prepared: tuple[np.ndarray, list[str]]) -> dict[str, np.ndarray]:
        """A column [B, 1] for each of SCORES; NaN for None."""
        found = self.module.score(*prepared)
        if set(found) != set(self.module.SCORES) or any(len(v) != len(prepared[1]) for v in found.values()):
            raise ConfigError(f"eval.scorer: {self.module.__name__}.score gave other scores than SCORES, or too few")
        return {name: np.array([[self._number(name, v)] for v in values], np.float32) for name, values in found.items()}

    def _number(self, name: str, value: Any) -> float:
        try:
            number = float("nan") if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("inf")
        if abs(number) > LARGEST:
            raise ConfigError(
                f"eval.scorer: {self.module.__name__}.score gave a {name} that is no number of a sensible size"
            )
        return number
