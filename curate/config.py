"""What a user sets for scores.

    curate:
      scores:
        clip: {kind: clip, model: "ViT-L-14:/models/clip.safetensors"}       # null: the run's own CLIP
        aesthetic: {kind: head, embeddings: clip, weights: /models/aesthetic.safetensors}
        safety: {kind: classifier, model: /models/nsfw_image_detection}
        pixels: {kind: pixels}
        text: {kind: caption}

Each score is a dataset of its own, `<run>/scores/<name>/`: one that is added next month touches nothing else.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shards.settings import Strict

# Where the work happens; everything else changes what is stored.
PLACEMENT = {"device", "decode_threads"}
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class _Score(Strict):
    decode_threads: int = Field(default=2, ge=1, le=256, description="threads that decode pictures ahead")
    threads: int = Field(default=1, ge=1, le=256, description="threads of arithmetic in one worker")

    def settings(self) -> dict[str, Any]:
        """What the stored columns depend on."""
        return self.model_dump(mode="json", exclude=PLACEMENT)


class _Network(_Score):
    batch_size: int = Field(default=64, ge=1, le=4096)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ClipScore(_Network):
    """Embeddings of picture and caption by an open_clip model, and their cosine: column `similarity`."""

    kind: Literal["clip"]
    model: str | None = Field(
        default=None,
        description="an open_clip folder, MODEL:TAG, MODEL:/file.safetensors or hf-hub:NAME; null: the run's own CLIP",
    )


class HeadScore(_Score):
    """A linear map or MLP on kept embeddings, such as LAION's aesthetic and safety heads: one column an output."""

    kind: Literal["head"]
    embeddings: str = Field(default="clip", description="the score of kind clip whose picture embeddings it reads")
    weights: str = Field(description="a file of tensors (.safetensors, or .pth/.pt/.bin holding tensors alone)")
    columns: list[str] = Field(default=[], description="names of the outputs; empty: score, or score_0, score_1, ...")
    activation: Literal["none", "relu"] = Field(
        default="none", description="between its layers; LAION's aesthetic predictors have none"
    )
    output: Literal["linear", "sigmoid", "softmax"] = Field(default="linear", description="applied to the last layer")


class ClassifierScore(_Network):
    """The probabilities of a transformers image-classification model: one column a label."""

    kind: Literal["classifier"]
    model: str = Field(description="a folder or hub name")


class PixelScore(_Score):
    """Sharpness, entropy, JPEG quality, border and text-free area, from the pixels alone."""

    kind: Literal["pixels"]


class CaptionScore(_Score):
    """Language and length of captions: columns `language`, `tokens` (CLIP's BPE, uncut), `words`, `characters`."""

    kind: Literal["caption"]


Score = Annotated[ClipScore | HeadScore | ClassifierScore | PixelScore | CaptionScore, Field(discriminator="kind")]


class CurateConfig(Strict):
    """Scores by name."""

    scores: dict[str, Score] = Field(default={}, description="each becomes <run>/scores/<name>/")

    @model_validator(mode="after")
    def _names_fit(self) -> CurateConfig:
        for name, score in self.scores.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"the score '{name}' needs a name of lower-case letters, digits and _")
            if isinstance(score, HeadScore):
                below = self.scores.get(score.embeddings)
                if not isinstance(below, ClipScore):
                    kinds = [n for n, s in self.scores.items() if isinstance(s, ClipScore)]
                    raise ValueError(
                        f"the score '{name}' reads the embeddings of '{score.embeddings}', which is no score of kind "
                        f"clip here (there are: {', '.join(kinds) or 'none'})"
                    )
        return self

    def ordered(self) -> list[str]:
        """The scores' names, those that others read first."""
        return sorted(self.scores, key=lambda n: isinstance(self.scores[n], HeadScore))
