"""What a user sets for scores, captions and control images.

    curate:
      scores:
        clip: {kind: clip, model: "ViT-L-14:/models/clip.safetensors"}       # null: the run's own CLIP
        aesthetic: {kind: head, embeddings: clip, weights: /models/aesthetic.safetensors}
        safety: {kind: classifier, model: /models/nsfw_image_detection}
        pixels: {kind: pixels}
        text: {kind: caption}
        semantic: {kind: duplicates, embeddings: clip}
      controls:
        depth: {kind: depth, model: /models/depth-anything}
      captions:
        long: {model: /models/a-vision-language-model, prompts: ["Describe this image in detail."]}
        short: {endpoint: {url: "http://127.0.0.1:8000/v1", model: served-name}, prompts: ["A caption of ten words."]}

Each is a dataset of its own, `<run>/scores/<name>/`, `<run>/captions/<name>/` or `<run>/controls/<name>/images/`: one
that is added next month touches nothing else.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shards.settings import Strict

# Where the work happens; everything else changes what is stored.
PLACEMENT = {"device", "decode_threads", "memory_gb"}
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class _Score(Strict):
    decode_threads: int = Field(default=2, ge=1, le=256, description="threads that decode images ahead")
    threads: int = Field(default=1, ge=1, le=256, description="threads of arithmetic in one worker")

    def settings(self) -> dict[str, Any]:
        """What the stored columns depend on."""
        return self.model_dump(mode="json", exclude=PLACEMENT)


class _Network(_Score):
    batch_size: int = Field(default=64, ge=1, le=4096)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ClipScore(_Network):
    """Embeddings of image and caption by an open_clip model, and their cosine: column `similarity`."""

    kind: Literal["clip"]
    model: str | None = Field(
        default=None,
        description="an open_clip folder, MODEL:TAG, MODEL:/file.safetensors or hf-hub:NAME; null: the run's own CLIP",
    )


class HeadScore(_Score):
    """A linear map or MLP on kept embeddings, such as LAION's aesthetic and safety heads: one column an output."""

    kind: Literal["head"]
    embeddings: str = Field(default="clip", description="the score of kind clip whose image embeddings it reads")
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


class DuplicateScore(_Score):
    """Semantic duplicates (SemDeDup) by kept embeddings: column `nearest`, the highest cosine to an image of the same
    cluster that is kept rather than this one; `centroid`, the cosine to the cluster's centre; `cluster`."""

    kind: Literal["duplicates"]
    embeddings: str = Field(default="clip", description="the score of kind clip whose image embeddings it compares")
    clusters: int | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="of k-means; null: one for each 1,000 images there are at first, at most 16,384",
    )
    keep: str = Field(
        default="farthest",
        description="which of alike images is kept: the farthest from its cluster's centre, as in the paper, the "
        "nearest, or the highest by a score, such as aesthetic.score",
        pattern=r"^(farthest|nearest|[a-z][a-z0-9_]*\.\w+)$",
    )
    memory_gb: float = Field(
        default=2.0, gt=0, description="what the search may hold of embeddings as it compares them"
    )


Score = Annotated[
    ClipScore | HeadScore | ClassifierScore | PixelScore | CaptionScore | DuplicateScore, Field(discriminator="kind")
]


class Endpoint(Strict):
    """An OpenAI-compatible server (vLLM, TGI, ...). Images and captions are sent there and nowhere else."""

    url: str = Field(description="up to and with /v1", pattern=r"^https?://[^\s]+$")
    model: str = Field(description="as the server names it")
    api_key_variable: str | None = Field(default=None, description="the environment variable that holds the key")
    concurrency: int = Field(default=16, ge=1, le=1024, description="requests under way, a worker")
    timeout_s: float = Field(default=120.0, gt=0, description="for one request, from its begin to its end")
    attempts: int = Field(default=4, ge=1, le=20, description="tries of one request that may succeed later")
    back_off_s: float = Field(default=1.0, ge=0, description="before the second try, doubled with each")
    max_tokens_total: int | None = Field(
        default=None, ge=1, description="for the whole run, prompts included; shards share it by their images"
    )


class CaptionConfig(Strict):
    """New captions of every image, by a vision-language model; the captions of the source stay as they are."""

    model: str | None = Field(default=None, description="a transformers image-text-to-text model: folder or hub name")
    endpoint: Endpoint | None = None
    prompts: list[str] = Field(
        default=["Describe this image."],
        min_length=1,
        description="one caption an image and prompt; {caption} is the caption that the image has",
    )
    max_new_tokens: int = Field(default=128, ge=1, le=4096)
    temperature: float = Field(default=0.0, ge=0, le=4, description="0: the likeliest token each time")
    max_side: int = Field(default=1024, ge=32, le=8192, description="images are shrunk to this longest side, in pixels")
    batch_size: int = Field(default=8, ge=1, le=1024)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=256, description="threads of arithmetic in one worker")
    decode_threads: int = Field(default=2, ge=1, le=256)
    refusals: list[str] = Field(
        default=[r"^(i'?m sorry|sorry|i can(no|')t|i am (unable|not able)|as an ai)\b"],
        description="regular expressions, without case: an answer that one finds is a refusal and no caption",
    )

    @model_validator(mode="after")
    def _is_one_model(self) -> CaptionConfig:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give either model or endpoint")
        for expression in self.refusals:
            try:
                re.compile(expression)
            except re.error as e:
                raise ValueError(f"refusals: '{expression}' is no regular expression ({e})") from None
        for prompt in self.prompts:
            if re.sub(r"\{caption\}", "", prompt).count("{"):
                raise ValueError(f"prompts: '{prompt}' has a {{...}} other than {{caption}}")
        return self

    def settings(self) -> dict[str, Any]:
        """What the captions depend on, not where or how quickly they are made."""
        served = self.endpoint.model_dump(include={"model", "max_tokens_total"}) if self.endpoint else None
        return self.model_dump(mode="json", exclude=PLACEMENT | {"endpoint"}) | {"endpoint": served}


class ControlImages(_Score):
    """A control image of every image, by a model of transformers: `train.control: {images: controls/<name>}`."""

    kind: Literal["depth", "segmentation", "pose"]
    model: str = Field(description="a folder or hub name")
    metres: bool = Field(
        default=False,
        description="of depth: the model says how far things are (ZoeDepth, GLPN, Depth Pro), not how near",
    )
    detector: str | None = Field(
        default=None, description="of pose: an object detection model that finds people; null: each image is of one"
    )
    threshold: float = Field(default=0.3, ge=0, le=1, description="of pose: below it, no person and no keypoint")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class CurateConfig(Strict):
    """Scores, captions and control images by name."""

    scores: dict[str, Score] = Field(default={}, description="each becomes <run>/scores/<name>/")
    captions: dict[str, CaptionConfig] = Field(default={}, description="each becomes <run>/captions/<name>/")
    controls: dict[str, ControlImages] = Field(default={}, description="each becomes <run>/controls/<name>/images/")

    @model_validator(mode="after")
    def _names_fit(self) -> CurateConfig:
        for name in (*self.scores, *self.captions, *self.controls):
            if not NAME.fullmatch(name):
                raise ValueError(f"'{name}' is no name of lower-case letters, digits and _ that begins with a letter")
        for name, score in self.scores.items():
            if isinstance(score, HeadScore | DuplicateScore):
                below = self.scores.get(score.embeddings)
                if not isinstance(below, ClipScore):
                    kinds = [n for n, s in self.scores.items() if isinstance(s, ClipScore)]
                    raise ValueError(
                        f"the score '{name}' reads the embeddings of '{score.embeddings}', which is no score of kind "
                        f"clip here (there are: {', '.join(kinds) or 'none'})"
                    )
            if isinstance(score, DuplicateScore) and "." in score.keep:
                other = self.scores.get(score.keep.partition(".")[0])
                if other is None or isinstance(other, DuplicateScore):
                    raise ValueError(f"the score '{name}' keeps by '{score.keep}', which is no other score here")
        return self

    def ordered(self) -> list[str]:
        """The scores' names, those that others read first."""
        behind = {HeadScore: 1, DuplicateScore: 2}
        return sorted(self.scores, key=lambda n: behind.get(type(self.scores[n]), 0))
