"""Pictures from a checkpoint for people: prompts in, PNG files out; few in this process, many on a cluster.

    carrara sample runs/demo --prompt "a large red circle on the left of a white background" --count 4
    carrara sample runs/demo --prompts prompts.jsonl --out images
    carrara sample runs/demo --prompt "a blue star" --image photo.png --strength 0.6 [--mask mask.png]

A image is a function of the weights, its prompt, the settings, the seed and its number: the n-th image of a seed
has the same noise for every prompt, so that prompts compare. Image to image and inpainting are diffusers' own
pipelines around the same networks. Shards lie in OUT/shards, as everywhere, so that a killed run goes on where it
stood; the PNGs are unpacked from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, model_validator

from eval import model as models
from eval.config import Sampler, Weights
from eval.generate import ImageGenerator, Sample
from eval.inputs import read_image, read_lines
from eval.prompts import MAX_CHARS
from eval.shardwork import Made, accounted, commit, counted, parquet, png, tar_of
from latents.pictures import resize_crop
from shards import storage
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.images import ImageShard
from shards.layout import RunPaths, sample_key
from shards.settings import ConfigError, Strict, validate
from shards.stage import Task, open_folder

VERSION = 1
UNPACKED = 20_000  # images; beyond that the shards are the result
ADVICE = "give a PNG, JPEG or WebP of a sensible size"


class Request(Strict):
    """One line of what is wanted."""

    prompt: str = Field(max_length=MAX_CHARS)
    negative: str = Field(default="", max_length=MAX_CHARS)
    seed: int = Field(default=0, ge=0, lt=2**63)


class SampleConfig(Strict):
    """How images are drawn."""

    requests: list[Request] = Field(min_length=1)
    count: int = Field(default=1, ge=1, le=100_000, description="images a prompt")
    checkpoint: str = "latest"
    weights: Weights = "ema"
    sampler: Sampler = "ddim"
    steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = Field(default=3.0, ge=0.0, le=100.0)
    width: int | None = Field(default=None, ge=8, le=8192)
    height: int | None = Field(default=None, ge=8, le=8192)
    image: str | None = None
    mask: str | None = None
    strength: float = Field(default=0.6, gt=0, le=1, description="how far a given image may change")
    batch_size: int = Field(default=8, ge=1, le=4096)
    shard_size: int = Field(default=64, ge=1, le=100_000)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=256)

    @model_validator(mode="after")
    def _together(self) -> SampleConfig:
        if self.mask and not self.image:
            raise ValueError("a mask needs the image that it is of; give --image too")
        return self


def requests_of(prompts: Iterable[str], file: str | None, negative: str, seed: int) -> list[Request]:
    """Prompts of the command line, then those of a file: one a line, or (.jsonl) {prompt, negative, seed} a line."""
    found = [_request({"prompt": p, "negative": negative, "seed": seed}, "--prompt") for p in prompts]
    if file is None:
        return found
    lines = read_lines(file, "--prompts", "a text file with one prompt a line, or a .jsonl")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        values: Any = {"prompt": line.strip()}
        if Path(file).suffix == ".jsonl":
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                raise ConfigError(f'--prompts: line {number} of {file} is not a JSON object such as {{"prompt": ...}}')
        found.append(_request({"negative": negative, "seed": seed, **values}, f"{file}, line {number}"))
    return found


def _request(values: dict[str, Any], source: str) -> Request:
    return validate(Request, values, source)


class SampleStage:
    """Stage over shards of images to draw. Small and picklable, but for a image to start from."""

    name = "sample"
    unit = "images"
    data = ".tar"

    def __init__(self, config: SampleConfig, run: RunPaths, out: str) -> None:
        self.config, self.run, self.out = config, run, out
        self.root = storage.join(out, "shards")
        self.model = models.find(run, config.checkpoint, config.weights)
        self.image = None if config.image is None else read_image(config.image, "--image", ADVICE)
        self.mask = None if config.mask is None else read_image(config.mask, "--mask", ADVICE)

    @property
    def total(self) -> int:
        """How many images are wanted."""
        return len(self.config.requests) * self.config.count

    def made_with(self) -> Fingerprint:
        """Settings, weights and what is to be generated."""
        c = self.config
        settings = c.model_dump(exclude={"requests", "device", "image", "mask", "checkpoint"})
        settings["image"] = None if self.image is None else digest_bytes(self.image.tobytes())
        settings["mask"] = None if self.mask is None else digest_bytes(self.mask.tobytes())
        wanted = digest_json([[r.prompt, r.negative, r.seed] for r in c.requests])
        return Fingerprint(self.name, VERSION, settings, wanted, {"model": self.model.digest})

    def tasks(self) -> Iterator[Task]:
        """One task a shard; the images of a prompt lie side by side."""
        c = self.config
        for index, start in enumerate(range(0, self.total, c.shard_size)):
            places = range(start, min(start + c.shard_size, self.total))
            yield Task(index, payload=[(c.requests[i // c.count], i % c.count) for i in places])

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Build the pipeline once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Write the manifest, and unpack the images beside it where there are not too many."""
        kept, _ = accounted(self.root, {task.index: len(task.payload) for task in self.tasks()}, stats)
        extra = {"checkpoint": self.model.name, "settings": self.config.model_dump(mode="json")}
        manifest = write_manifest(self.root, "samples", kept, extra)
        if self.total <= UNPACKED:
            self._unpack()
        return manifest

    def _unpack(self) -> None:
        dataset = Dataset.open(self.root)
        listed = []
        for position in range(len(dataset.shards)):
            shard = ImageShard(dataset, position)
            rows = shard.table.take(shard.rows).to_pylist()
            for i, row in enumerate(rows):
                file = f"{row['key']}.png"
                storage.write_atomic(storage.join(self.out, file), shard.image_bytes(i))
                listed.append({"file": file, **{k: row[k] for k in ("caption", "negative", "seed", "number")}})
            shard.close()
        storage.write_json(storage.join(self.out, "samples.json"), {"checkpoint": self.model.name, "images": listed})


class _Worker:
    def __init__(self, stage: SampleStage) -> None:
        from latents.encoders import pick_device
        from latents.stage import fixed_arithmetic

        self.stage, self.config, self.fixed = stage, stage.config, fixed_arithmetic
        self.folder = open_folder(stage)
        c = stage.config
        with fixed_arithmetic(c.threads):
            base = models.build_pipeline(stage.run, stage.model)
            factor = int(base.vae_scale_factor)
            self.width, self.height = (side or stage.model.size for side in (c.width, c.height))
            for name, side in (("width", self.width), ("height", self.height)):
                if side % factor:
                    near = round(side / factor) * factor or factor
                    raise ConfigError(
                        f"--{name} is {side}, which the VAE does not divide; {near} is the nearest that fits"
                    )
            pipeline = _kind(base, stage.image is not None, stage.mask is not None)
            device = pick_device(c.device)
            self.generator = ImageGenerator(
                pipeline, c.sampler, c.steps, c.guidance_scale, precision=c.precision, device=device
            )

    def __call__(self, task: Task) -> dict[str, Any]:
        def make() -> Made:
            with self.fixed(self.config.threads):
                return self._make(task.index, task.payload)

        return commit(self.folder, task, make)

    def _make(self, index: int, items: list[tuple[Request, int]]) -> Made:
        images: list[np.ndarray] = []
        finite: list[bool] = []
        for start in range(0, len(items), self.config.batch_size):
            made, fine = self._generate(items[start : start + self.config.batch_size])
            images += list(made)
            finite += fine.tolist()
        keys = [sample_key(index, row, self.config.shard_size) for row in range(len(items))]
        tar, places = tar_of(
            [
                (key, {"png": png(image), "txt": request.prompt.encode()}) if fine else None
                for key, image, fine, (request, _) in zip(keys, images, finite, items, strict=True)
            ]
        )
        status = ["success" if f else "failed_to_generate" for f in finite]
        table: dict[str, list[Any]] = {
            "key": keys,
            "caption": [r.prompt for r, _ in items],
            "negative": [r.negative for r, _ in items],
            "seed": [r.seed for r, _ in items],
            "number": [n for _, n in items],
            "status": status,
            "error": [None if f else "the image is not finite" for f in finite],
            **places,
        }
        return {".tar": tar, ".parquet": parquet(table, seed=pa.int64(), number=pa.int64())}, counted(status)

    def _generate(self, items: list[tuple[Request, int]]) -> tuple[np.ndarray, np.ndarray]:
        samples = [Sample(f"seed {r.seed}", n, r.prompt) for r, n in items]
        given: dict[str, Any] = {"negative_prompt": [r.negative for r, _ in items]}
        if self.stage.image is None:
            given |= {"width": self.width, "height": self.height}
        else:
            given |= {"image": [self._fitted(self.stage.image)] * len(items), "strength": self.config.strength}
            if self.stage.mask is not None:
                grey = self._fitted(self.stage.mask).convert("L").point(lambda v: 255 if v >= 128 else 0)
                given |= {"mask_image": [grey] * len(items), "width": self.width, "height": self.height}
        return self.generator(samples, **given)

    def _fitted(self, pixels: np.ndarray) -> Image.Image:
        """An image to start from at the size that is made: shorter side scaled, then the middle."""
        if self.width == self.height:
            return Image.fromarray(resize_crop(pixels, self.width)[0])
        from PIL import ImageOps

        return ImageOps.fit(Image.fromarray(pixels), (self.width, self.height), Image.Resampling.LANCZOS)


def _kind(base: Any, image: bool, mask: bool) -> Any:
    """The text-to-image pipeline, or diffusers' other ones around the same parts."""
    if not image:
        return base
    import diffusers

    kind = diffusers.AutoPipelineForInpainting if mask else diffusers.AutoPipelineForImage2Image
    return kind.from_pipe(base)
