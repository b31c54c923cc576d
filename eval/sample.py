"""Pictures from a checkpoint for people: prompts in, PNG files out; few in this process, many on a cluster.

    carrara sample runs/demo --prompt "a large red circle on the left of a white background" --count 4
    carrara sample runs/demo --prompts prompts.jsonl --out pictures
    carrara sample runs/demo --prompt "a blue star" --image photo.png --strength 0.6 [--mask mask.png]

A picture is a function of the weights, its prompt, the settings, the seed and its number: the n-th picture of a seed
has the same noise for every prompt, so that prompts compare. Image to image and inpainting are diffusers' own
pipelines around the same networks. Shards lie in OUT/shards, as everywhere, so that a killed run goes on where it
stood; the PNGs are unpacked from them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, model_validator

from eval import checkpoints
from eval.accounts import accounted
from eval.config import Sampler, Weights
from eval.generate import Draw, placed, seed_of, start_noise, swap_sampler, to_uint8
from eval.inputs import read_lines, read_picture
from eval.prompts import MAX_CHARS
from eval.reference import parquet, png
from latents.pictures import resize_crop
from shards import storage
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.images import ImageShard, pack_tar
from shards.layout import RunPaths, sample_key
from shards.settings import ConfigError, Strict, validate
from shards.stage import Task, open_folder

VERSION = 1
UNPACKED = 2000  # pictures; beyond that the shards are the result
ADVICE = "give a PNG, JPEG or WebP of a sensible size"


class Wish(Strict):
    """One line of what is wanted."""

    prompt: str = Field(max_length=MAX_CHARS)
    negative: str = Field(default="", max_length=MAX_CHARS)
    seed: int = Field(default=0, ge=0, lt=2**63)


class SampleConfig(Strict):
    """How pictures are drawn."""

    wishes: list[Wish] = Field(min_length=1)
    count: int = Field(default=1, ge=1, le=100_000, description="pictures a prompt")
    checkpoint: str = "latest"
    weights: Weights = "ema"
    sampler: Sampler = "ddim"
    steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = Field(default=3.0, ge=0.0, le=100.0)
    width: int | None = Field(default=None, ge=8, le=8192)
    height: int | None = Field(default=None, ge=8, le=8192)
    image: str | None = None
    mask: str | None = None
    strength: float = Field(default=0.6, gt=0, le=1, description="how far a given picture may change")
    batch_size: int = Field(default=8, ge=1, le=4096)
    shard_size: int = Field(default=64, ge=1, le=100_000)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=256)

    @model_validator(mode="after")
    def _together(self) -> SampleConfig:
        if self.mask and not self.image:
            raise ValueError("a mask needs the picture that it is of; give --image too")
        return self


def wishes_of(prompts: Iterable[str], file: str | None, negative: str, seed: int) -> list[Wish]:
    """Prompts of the command line, then those of a file: one a line, or (.jsonl) {prompt, negative, seed} a line."""
    found = [_wish({"prompt": p, "negative": negative, "seed": seed}, "--prompt") for p in prompts]
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
        found.append(_wish({"negative": negative, "seed": seed, **values}, f"{file}, line {number}"))
    return found


def _wish(values: dict[str, Any], source: str) -> Wish:
    return validate(Wish, values, source)


class SampleStage:
    """Stage over shards of pictures to draw. Small and picklable, but for a picture to start from."""

    name = "sample"
    unit = "images"
    data = ".tar"

    def __init__(self, config: SampleConfig, run: RunPaths, out: str) -> None:
        self.config, self.run, self.out = config, run, out
        self.root = storage.join(out, "shards")
        self.subject = checkpoints.find(run, config.checkpoint, config.weights)
        self.image = None if config.image is None else read_picture(config.image, "--image", ADVICE)
        self.mask = None if config.mask is None else read_picture(config.mask, "--mask", ADVICE)

    @property
    def total(self) -> int:
        """How many pictures are wanted."""
        return len(self.config.wishes) * self.config.count

    def made_with(self) -> Fingerprint:
        """Settings, weights and what is to be drawn."""
        c = self.config
        settings = c.model_dump(exclude={"wishes", "device", "image", "mask", "checkpoint"})
        settings["image"] = None if self.image is None else digest_bytes(self.image.tobytes())
        settings["mask"] = None if self.mask is None else digest_bytes(self.mask.tobytes())
        wanted = digest_json([[w.prompt, w.negative, w.seed] for w in c.wishes])
        return Fingerprint(self.name, VERSION, settings, wanted, {"unet": self.subject.digest})

    def tasks(self) -> Iterator[Task]:
        """One task a shard; the pictures of a prompt lie side by side."""
        c = self.config
        for index, start in enumerate(range(0, self.total, c.shard_size)):
            items = [(c.wishes[i // c.count], i % c.count) for i in range(start, min(start + c.shard_size, self.total))]
            yield Task(index, payload=items)

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Build the pipeline once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Write the manifest, and unpack the pictures beside it where there are not too many."""
        kept, _ = accounted(self.root, {task.index: len(task.payload) for task in self.tasks()}, stats)
        extra = {"checkpoint": self.subject.name, "settings": self.config.model_dump(mode="json")}
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
        storage.write_json(
            storage.join(self.out, "samples.json"), {"checkpoint": self.subject.name, "pictures": listed}
        )


class _Worker:
    def __init__(self, stage: SampleStage) -> None:
        from latents.encoders import pick_device
        from latents.stage import fixed_arithmetic

        self.stage, self.config, self.fixed = stage, stage.config, fixed_arithmetic
        self.folder = open_folder(stage)
        c = stage.config
        device = pick_device(c.device)
        with fixed_arithmetic(c.threads):
            base = checkpoints.build_pipeline(stage.run, stage.subject)
            swap_sampler(base, c.sampler)
            self.pipeline = _kind(base, stage.image is not None, stage.mask is not None)
            self.pipeline = placed(self.pipeline, device, c.precision)
        self.pipeline.set_progress_bar_config(disable=True)
        self.factor = int(self.pipeline.vae_scale_factor)
        self.width, self.height = (side or stage.subject.resolution for side in (c.width, c.height))
        for name, side in (("width", self.width), ("height", self.height)):
            if side % self.factor:
                near = round(side / self.factor) * self.factor or self.factor
                raise ConfigError(f"--{name} is {side}, which the VAE does not divide; {near} is the nearest that fits")

    def __call__(self, task: Task) -> dict[str, Any]:
        if (found := self.folder.adopt(task.index)) is not None:
            return found
        started = time.perf_counter()
        with self.fixed(self.config.threads):
            files, stats = self._make(task.index, task.payload)
        stats["seconds"] = round(time.perf_counter() - started, 3)
        return self.folder.commit(task.index, files, stats)

    def _make(self, index: int, items: list[tuple[Wish, int]]) -> tuple[dict[str, bytes], dict[str, Any]]:
        pictures: list[np.ndarray] = []
        finite: list[bool] = []
        for start in range(0, len(items), self.config.batch_size):
            drawn, fine = self._draw(items[start : start + self.config.batch_size])
            pictures += list(drawn)
            finite += fine.tolist()
        keys = [sample_key(index, row, self.config.shard_size) for row in range(len(items))]
        kept = [i for i, fine in enumerate(finite) if fine]
        encoded = {i: png(pictures[i]) for i in kept}
        tar, places = pack_tar((keys[i], {"png": encoded[i], "txt": items[i][0].prompt.encode()}) for i in kept)
        place = {i: p["png"] for i, p in zip(kept, places, strict=True)}
        table: dict[str, list[Any]] = {
            "key": keys,
            "caption": [w.prompt for w, _ in items],
            "negative": [w.negative for w, _ in items],
            "seed": [w.seed for w, _ in items],
            "number": [n for _, n in items],
            "status": ["success" if f else "failed_to_generate" for f in finite],
            "error": [None if f else "the picture is not finite" for f in finite],
            "image_offset": [place[i][0] if i in place else None for i in range(len(items))],
            "image_size": [place[i][1] if i in place else None for i in range(len(items))],
        }
        integers = ("seed", "number", "image_offset", "image_size")
        types = {n: pa.int64() if n in integers else pa.string() for n in table}
        stats = {"rows": len(items), "count": len(kept), "status": dict(sorted(Counter(table["status"]).items()))}
        return {".tar": tar, ".parquet": parquet(table, types)}, stats

    def _draw(self, items: list[tuple[Wish, int]]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        c, pipeline = self.config, self.pipeline
        draws = [Draw(f"seed {w.seed}", n, w.prompt) for w, n in items]
        steps = [torch.Generator().manual_seed(seed_of(d.prompt_id, d.replicate, "steps")) for d in draws]
        given: dict[str, Any] = {"generator": steps}
        if self.stage.image is None:
            shape = (int(pipeline.unet.config.in_channels), self.height // self.factor, self.width // self.factor)
            given["latents"] = start_noise(draws, shape).to(pipeline.device, pipeline.unet.dtype)
            given |= {"width": self.width, "height": self.height}
        else:
            given |= {"image": [self._fitted(self.stage.image)] * len(items), "strength": c.strength}
            if self.stage.mask is not None:
                grey = self._fitted(self.stage.mask).convert("L").point(lambda v: 255 if v >= 128 else 0)
                given |= {"mask_image": [grey] * len(items), "width": self.width, "height": self.height}
        with torch.inference_mode():
            pixels = pipeline(
                prompt=[w.prompt for w, _ in items],
                negative_prompt=[w.negative for w, _ in items],
                num_inference_steps=c.steps,
                guidance_scale=c.guidance_scale,
                output_type="pt",
                **given,
            ).images.float()
        fine = torch.isfinite(pixels).flatten(1).all(dim=1)
        return to_uint8(torch.where(fine[:, None, None, None], pixels, 0.0)), fine.cpu().numpy()

    def _fitted(self, pixels: np.ndarray) -> Image.Image:
        """A picture to start from at the size that is drawn: shorter side scaled, then the middle."""
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
