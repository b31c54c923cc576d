"""The control stage: one image shard in, one shard of control images out, for `train.control.images` to name.

    <run>/controls/<name>/images/    image shards with the numbers and keys of the run's images
    <run>/controls/<name>/heldout/   the same of the held-out ones, on which a ControlNet is validated

    depth          grey, light is near
    segmentation   a colour for each class (the colour map of PASCAL VOC's devkit)
    pose           keypoints on black, joined as the model's own `edges` say, of everybody that a detector finds

The models are transformers', by name or folder. An image is worked on by itself, so that neither the others of its
shard nor their sizes change what comes out.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from curate import shardwork
from curate.config import ControlImages, CurateConfig
from curate.scorers import decoded, model_folder, tensors_digest
from shards import images, storage
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.layout import MANIFEST, RunPaths
from shards.settings import ConfigError
from shards.stage import Made, Task

VERSION = 1
AUTO = {  # transformers' classes of each kind; the first that knows the model is taken
    "depth": ("AutoModelForDepthEstimation",),
    "segmentation": ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"),
    "pose": ("AutoModelForPoseEstimation",),
    "detector": ("AutoModelForObjectDetection",),
}
PERSON = "person"  # a detector's name for what has a pose


def control_stages(config: CurateConfig, run: RunPaths) -> list[ControlStage]:
    """A stage for each set of control images, and one more of the held-out images where there are some."""
    splits = ["images"] + ["heldout"] * storage.exists(storage.join(run.heldout, MANIFEST))
    return [ControlStage(c, name, run, split) for name, c in config.controls.items() for split in splits]


@dataclasses.dataclass(frozen=True)
class ControlStage:
    """Stage over the run's image shards for one set of control images. split: `images` or `heldout`."""

    config: ControlImages
    control: str
    run: RunPaths
    split: str = "images"

    unit = "images"
    data = ".tar"

    @property
    def name(self) -> str:
        """`control-depth`, or `control-depth-heldout`."""
        return f"control-{self.control}" + ("" if self.split == "images" else f"-{self.split}")

    @property
    def root(self) -> str:
        """`<run>/controls/depth/images`."""
        return storage.join(self.run.run, "controls", self.control, self.split)

    @property
    def source(self) -> str:
        """The folder of the image shards that it is made of."""
        return storage.join(self.run.run, self.split)

    def made_with(self) -> Fingerprint:
        """Settings and weights; raises ConfigError where the weights are not there."""
        named = {"model": self.config.model, "detector": self.config.detector}
        weights = {n: tensors_digest(model_folder(ref, _what(n))) for n, ref in named.items() if ref}
        return Fingerprint("control", VERSION, self.config.settings(), None, weights)

    def tasks(self) -> Iterator[Task]:
        """One task an image shard."""
        for position, info in enumerate(Dataset.open(self.source).shards):
            yield Task(info.index, info.born, {"position": position})

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Loads the model once; the result makes one shard a call."""
        draw = Estimator(self.config)

        def make(shard: images.ImageShard, _: dict[str, Any]) -> Made:
            found = decoded(shard, self.config.decode_threads, 8)
            return _pack(shard, [None if pixels is None else images.png_bytes(draw(pixels)) for _, pixels in found])

        return shardwork.worker(self, self.source, self.config.threads, make)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Write the manifest, of image shards as ingest's are."""
        return write_manifest(self.root, "images", stats, {"settings": self.config.settings()})


def _pack(shard: images.ImageShard, drawn: list[bytes | None]) -> Made:
    """The files of a shard of control images, and its stats. drawn: one a sample; None: it cannot be decoded."""
    keys = shard.table["key"].to_pylist()
    files = dict(zip(shard.rows.tolist(), drawn, strict=True))
    tar, extents = images.pack_tar((keys[row], {"png": png}) for row, png in files.items() if png is not None)
    where = dict(zip((row for row, png in files.items() if png is not None), (e["png"] for e in extents), strict=True))
    rows = []
    for row, (key, status) in enumerate(zip(keys, shard.table["status"].to_pylist(), strict=True)):
        offset, size = where.get(row, (None, None))
        line = {"key": key, "status": status, "error": None, "image_offset": offset, "image_size": size}
        if row in files and row not in where:
            line |= {"status": "failed_to_resize", "error": "not_decoded"}
        elif row not in where and status == "success":
            line |= {"status": "filtered", "error": "excluded"}  # a duplicate, say: it is not trained on
        rows.append(line)
    types = {"image_offset": pa.int64(), "image_size": pa.int64()}
    table = pa.table({n: pa.array([r[n] for r in rows], types.get(n, pa.string())) for n in rows[0]})
    status = Counter(r["status"] for r in rows)
    stats = {"rows": len(rows), "count": status["success"], "status": dict(sorted(status.items()))}
    return {".tar": tar, ".parquet": storage.parquet_bytes(table)}, stats


# ---- the models --------------------------------------------------------------------------------------------


class Estimator:
    """A model of transformers and what is drawn of its answer. Raises ConfigError where it is of another kind."""

    def __init__(self, config: ControlImages) -> None:
        from latents.encoders import pick_device

        self.config, self.device = config, pick_device(config.device)
        self.processor, self.model = _load(config.kind, config.model, self.device)
        self.detector = _load("detector", config.detector, self.device) if config.detector else None
        self._draw = {"depth": self._depth, "segmentation": self._segmentation, "pose": self._pose}[config.kind]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H,W,3] -> the control image, uint8 [H,W] or [H,W,3]."""
        import torch

        with torch.inference_mode():
            return self._draw(pixels)

    def _depth(self, pixels: np.ndarray) -> np.ndarray:
        """From the nearest, white, to the farthest of this image."""
        size = pixels.shape[:2]
        out = self.model(**self.processor(images=pixels, return_tensors="pt").to(self.device))
        process = self.processor.post_process_depth_estimation
        sizes = [
            n for n in ("source_sizes", "target_sizes") if n in inspect.signature(process).parameters
        ]  # ZoeDepth's
        depth = process(out, **{n: [size] for n in sizes})[0]["predicted_depth"]
        found = depth.float().reshape(size).cpu().numpy() * (-1.0 if self.config.metres else 1.0)
        low, high = float(found.min()), float(found.max())
        return np.rint((found - low) / max(high - low, 1e-12) * 255).astype(np.uint8)

    def _segmentation(self, pixels: np.ndarray) -> np.ndarray:
        """The colour of each place's class."""
        out = self.model(**self.processor(images=pixels, return_tensors="pt").to(self.device))
        classes = self.processor.post_process_semantic_segmentation(out, target_sizes=[pixels.shape[:2]])[0]
        return colours(classes.cpu().numpy())

    def _pose(self, pixels: np.ndarray) -> np.ndarray:
        """Joints as lines and dots, those that the model is sure of."""
        height, width = pixels.shape[:2]
        canvas = Image.new("RGB", (width, height))
        boxes = self._people(pixels)
        if not boxes:
            return np.asarray(canvas)
        out = self.model(**self.processor(images=pixels, boxes=[boxes], return_tensors="pt").to(self.device))
        edges = getattr(self.model.config, "edges", None) or []
        pen, stroke = ImageDraw.Draw(canvas), max(1, min(width, height) // 128)
        for person in self.processor.post_process_pose_estimation(out, boxes=[boxes])[0]:
            scores = person["scores"].reshape(-1).tolist()
            at = [
                (x, y) if s > self.config.threshold else None
                for (x, y), s in zip(person["keypoints"].tolist(), scores, strict=True)
            ]
            for number, (a, b) in enumerate(edges):
                if at[a] and at[b]:
                    pen.line((at[a], at[b]), fill=_hue(number / len(edges)), width=stroke)
            for number, place in enumerate(at):
                if place:
                    x, y = place
                    pen.ellipse((x - stroke, y - stroke, x + stroke, y + stroke), fill=_hue(number / len(at)))
        return np.asarray(canvas)

    def _people(self, pixels: np.ndarray) -> list[list[float]]:
        """(left, top, width, height) of everybody, in pixels; without a detector the whole image is one person."""
        height, width = pixels.shape[:2]
        if self.detector is None:
            return [[0.0, 0.0, float(width), float(height)]]
        processor, model = self.detector
        out = model(**processor(images=pixels, return_tensors="pt").to(self.device))
        found = processor.post_process_object_detection(
            out, threshold=self.config.threshold, target_sizes=[(height, width)]
        )[0]
        people = [i for i, name in model.config.id2label.items() if name == PERSON]
        boxes = [
            b for b, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True) if label in people
        ]
        return [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]


def _load(kind: str, ref: str | None, device: Any) -> tuple[Any, Any]:
    """The processor and the model of one of AUTO, through which an image has gone once."""
    import transformers
    from safetensors import SafetensorError

    folder, problem = model_folder(ref, _what(kind)), ""
    for name in AUTO[kind]:
        known = getattr(transformers, name).from_pretrained
        build = functools.partial(
            known, folder, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            model, loaded = build()
            answer, missing = _answer(kind, processor, model), sorted(loaded["missing_keys"])
            # transformers draws what is missing at random; some models have parts that nothing depends on.
            if missing and not all(map(np.array_equal, answer, _answer(kind, processor, build()[0]))):
                raise ValueError(f"it has no weights for {missing[0]}, so it was never trained for this")
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            ImportError,
            RuntimeError,
            SafetensorError,
        ) as e:
            problem = problem or " ".join(str(e).split())[:300]
            continue
        if kind == "detector" and PERSON not in model.config.id2label.values():
            raise ConfigError(f"the detector '{ref}' has no label '{PERSON}'; name one that finds people")
        return processor, model.eval().to(device)
    raise ConfigError(f"the {_what(kind)} '{ref}': {problem}")


def _answer(kind: str, processor: Any, model: Any) -> list[np.ndarray]:
    """What a model on the CPU says of an image of noise."""
    import torch

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    more = {"boxes": [[[0.0, 0.0, 64.0, 64.0]]]} if kind == "pose" else {}
    with torch.inference_mode():
        out = model.eval()(**processor(images=pixels, return_tensors="pt", **more))
    return [t.float().numpy() for t in out.to_tuple() if isinstance(t, torch.Tensor)]


def _what(kind: str) -> str:
    return "detector" if kind == "detector" else "control model"


def colours(classes: np.ndarray) -> np.ndarray:
    """int [H,W] -> uint8 [H,W,3]: the colour of class n has its bits, three by three, from the highest down."""
    found = np.zeros((*classes.shape, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            found[..., channel] |= ((classes >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return found


def _hue(turn: float) -> tuple[int, int, int]:
    """A full colour by its place on the circle, 0..1."""
    r, g, b = (round(255 * c) for c in colorsys.hsv_to_rgb(turn, 1, 1))
    return r, g, b
