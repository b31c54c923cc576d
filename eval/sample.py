"""Images from a checkpoint for people: prompts in, PNG files out; few in this process, many on a cluster.

    carrara sample runs/demo --prompt "a large red circle on the left of a white background" --count 4
    carrara sample runs/demo --prompts prompts.jsonl --out images
    carrara sample runs/demo --prompt "a blue star" --image photo.png --strength 0.6 [--mask mask.png]
    carrara sample runs/inpaint --prompt "a blue star" --image photo.png --mask mask.png
    carrara sample runs/edit --prompt "make it blue" --image photo.png --image-guidance-scale 1.5
    carrara sample runs/control --prompt "a blue star" --control edges.png | --control-of photo.png
    carrara sample runs/demo --prompt "a blue star" --upscale runs/upscaler

An image is a function of the weights, its prompt, the settings, the seed and its number: the n-th image of a seed
has the same noise for every prompt, so that prompts compare. Image to image and inpainting are diffusers' own
pipelines around the same networks; what lies outside of a mask is the given image's, to the bit. Shards lie in
OUT/shards, as everywhere, so that a killed run goes on where it stood; the PNGs are unpacked from them.
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
from eval.inputs import fitted, read_image, read_lines, require_size
from eval.prompts import MAX_CHARS
from eval.rows import images_of
from eval.shardwork import accounted, counted, parquet, png, tar_of
from latents.resize import resize_crop_to
from shards import storage
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.layout import RunPaths, sample_key
from shards.settings import ConfigError, Strict, validate
from shards.stage import Made, Task, commit, open_folder

VERSION = 1
IMAGE_OPTIONS = ("image", "mask", "control", "control_of")  # options that are files
MAX_SIDE = 8192  # px
UNPACKED = 20_000  # images; beyond that the shards are the result
ADVICE = "give a PNG, JPEG or WebP of a sensible size"


class Request(Strict):
    """One line of what is wanted."""

    prompt: str = Field(max_length=MAX_CHARS)
    negative: str = Field(default="", max_length=MAX_CHARS)
    seed: int = Field(default=0, ge=0, lt=2**63)


class GenerationConfig(Strict):
    """From which weights images are generated, and how."""

    checkpoint: str = "latest"
    weights: Weights = "ema"
    sampler: Sampler = "ddim"
    steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = Field(default=3.0, ge=0.0, le=100.0)
    width: int | None = Field(default=None, ge=8, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=8, le=MAX_SIDE)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=256)


class SampleConfig(GenerationConfig):
    """What is asked for, and of what beside prompts."""

    requests: list[Request] = Field(min_length=1)
    count: int = Field(default=1, ge=1, le=100_000, description="images a prompt")
    image: str | None = None
    mask: str | None = None
    control: str | None = Field(default=None, description="a control image, for a ControlNet")
    control_of: str | None = Field(default=None, description="an image whose control image is made as in training")
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="how far a given image may change; null: 0.6, or 1 where a model inpaints",
    )
    image_guidance_scale: float = Field(
        default=1.5, ge=1.0, le=100.0, description="of a model that edits: how near to stay to the image"
    )
    noise_level: int = Field(default=20, ge=0, lt=1000, description="of an upscaler: noise on the small image")
    upscale: str | None = Field(default=None, description="a run of train.upscale that enlarges the images")
    batch_size: int = Field(default=8, ge=1, le=4096)
    shard_size: int = Field(default=64, ge=1, le=100_000)

    @model_validator(mode="after")
    def _together(self) -> SampleConfig:
        if self.mask and not self.image:
            raise ValueError("a mask needs the image that it is of; give --image too")
        if self.control and self.control_of:
            raise ValueError("--control and --control-of are two ways to say the same; give one of them")
        if self.mask and (self.control or self.control_of):
            raise ValueError("a mask cannot go with a control image; leave one of them out")
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
    """Stage over shards of images to generate. Small and picklable, but for an image to start from."""

    name = "sample"
    unit = "images"
    data = ".tar"

    def __init__(self, config: SampleConfig, run: RunPaths, out: str, model: models.Model | None = None) -> None:
        self.config, self.run, self.out = config, run, out
        self.root = storage.join(out, "shards")
        self.model = models.find(run, config.checkpoint, config.weights) if model is None else model
        self.upscaler = None if config.upscale is None else models.find(RunPaths(config.upscale))
        self.image = None if config.image is None else read_image(config.image, "--image", ADVICE)
        self.mask = None if config.mask is None else read_image(config.mask, "--mask", ADVICE)
        self.control = None if config.control is None else read_image(config.control, "--control", ADVICE)
        self.control_of = None if config.control_of is None else read_image(config.control_of, "--control-of", ADVICE)

    @property
    def total(self) -> int:
        """How many images are wanted."""
        return len(self.config.requests) * self.config.count

    def made_with(self) -> Fingerprint:
        """Settings, weights and what is to be generated."""
        c = self.config
        settings = c.model_dump(exclude={"requests", "device", "checkpoint", *IMAGE_OPTIONS})
        for name in IMAGE_OPTIONS:
            pixels: np.ndarray | None = getattr(self, name)
            settings[name] = None if pixels is None else digest_bytes(pixels.tobytes())
        wanted = digest_json([[r.prompt, r.negative, r.seed] for r in c.requests])
        weights = {"model": self.model.digest} | ({"upscaler": self.upscaler.digest} if self.upscaler else {})
        return Fingerprint(self.name, VERSION, settings, wanted, weights)

    def tasks(self) -> Iterator[Task]:
        """One task a shard; the images of a prompt lie side by side."""
        c = self.config
        for index, start in enumerate(range(0, self.total, c.shard_size)):
            numbers = range(start, min(start + c.shard_size, self.total))
            yield Task(index, payload=[(c.requests[i // c.count], i % c.count) for i in numbers])

    def columns(self, images: list[np.ndarray]) -> dict[str, list[Any]]:
        """Further columns of integers of a shard's sidecar, by its images."""
        return {}

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
        listed = []
        for row, data in images_of(Dataset.open(self.root)):
            assert data is not None
            file = f"{row['key']}.png"
            storage.write_atomic(storage.join(self.out, file), data)
            listed.append({"file": file, **{k: row[k] for k in ("caption", "negative", "seed", "number")}})
        storage.write_json(storage.join(self.out, "samples.json"), {"checkpoint": self.model.name, "images": listed})


class _Worker:
    def __init__(self, stage: SampleStage) -> None:
        from latents.arithmetic import fixed_arithmetic
        from latents.encoders import pick_device

        self.stage, self.config, self.fixed = stage, stage.config, fixed_arithmetic
        self.folder = open_folder(stage)
        c = stage.config
        with fixed_arithmetic(c.threads):
            base = models.build_pipeline(stage.run, stage.model)
            self.width, self.height = (side or stage.model.size for side in (c.width, c.height))
            require_size(self.width, self.height, int(base.vae_scale_factor))
            given = {name for name in ("image", "mask") if getattr(stage, name) is not None}
            given |= {"control"} if c.control or c.control_of else set()
            pipeline = _kind(base, given)
            self.inputs = self._inputs(pipeline)
            device = pick_device(c.device)
            self.generator = ImageGenerator(
                pipeline, c.sampler, c.steps, c.guidance_scale, precision=c.precision, device=device
            )
            self.upscaler = self._upscaler(device)

    def _upscaler(self, device: str) -> ImageGenerator | None:
        """What enlarges the images; None where that is not asked for."""
        c = self.config
        if c.upscale is None or self.stage.upscaler is None:
            return None
        pipeline = models.build_pipeline(RunPaths(c.upscale), self.stage.upscaler)
        if type(pipeline).__name__ != UPSCALES:
            raise ConfigError(f"--upscale: the model of {c.upscale} is no upscaler; train one with train.upscale")
        require_level(pipeline, c.noise_level)
        return ImageGenerator(pipeline, c.sampler, c.steps, c.guidance_scale, precision=c.precision, device=device)

    def __call__(self, task: Task) -> dict[str, Any]:
        def make() -> Made:
            with self.fixed(self.config.threads):
                return self._make(task.index, task.payload)

        return commit(self.folder, task, make)

    def _make(self, index: int, items: list[tuple[Request, int]]) -> Made:
        images: list[np.ndarray] = []
        finite: list[bool] = []
        for start in range(0, len(items), self.config.batch_size):
            made, ok = self._generate(items[start : start + self.config.batch_size])
            images += list(made)
            finite += ok.tolist()
        keys = [sample_key(index, row, self.config.shard_size) for row in range(len(items))]
        tar, located = tar_of(
            [
                (key, {"png": png(image), "txt": request.prompt.encode()}) if ok else None
                for key, image, ok, (request, _) in zip(keys, images, finite, items, strict=True)
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
            **located,
        }
        more = self.stage.columns(images)
        types = dict.fromkeys(("seed", "number", *more), pa.int64())
        return {".tar": tar, ".parquet": parquet({**table, **more}, **types)}, counted(status)

    def _generate(self, items: list[tuple[Request, int]]) -> tuple[np.ndarray, np.ndarray]:
        samples = [Sample(f"seed {r.seed}", n, r.prompt) for r, n in items]
        given: dict[str, Any] = {"negative_prompt": [r.negative for r, _ in items]}
        for name, value in self.inputs.items():
            given[name] = [value] * len(items) if isinstance(value, Image.Image) else value
        images, finite = self.generator(samples, **given)
        if "mask_image" in self.inputs:
            # What lies outside of the mask has been through the VAE, and is to be what it was.
            painted = np.asarray(self.inputs["mask_image"])[..., None] > 0
            images = np.where(painted, images, np.asarray(self.inputs["image"]))
        if self.upscaler is not None:
            small = [Image.fromarray(image) for image in images]
            more = {"negative_prompt": given["negative_prompt"], "noise_level": self.config.noise_level}
            images, upscaled = self.upscaler(samples, image=small, **more)
            finite &= upscaled
        return images, finite

    def _inputs(self, pipeline: Any) -> dict[str, Any]:
        """The pipeline's arguments beside prompts and seeds."""
        stage, name = self.stage, type(pipeline).__name__
        size = {"width": self.width, "height": self.height}
        control = self._control() if stage.control is not None or stage.control_of is not None else None
        if stage.image is None:
            return size if control is None else {**size, "image": control}
        found: dict[str, Any] = {"image": self._fitted(stage.image)}
        if control is not None:
            found |= {"control_image": control, **size}  # alone of its kind this pipeline scales what it is given
        if name == UPSCALES:
            require_level(pipeline, self.config.noise_level)
            return {"image": self._small(stage.image, pipeline), "noise_level": self.config.noise_level}
        if name == EDITS:
            return {**found, "image_guidance_scale": self.config.image_guidance_scale}
        found["strength"] = self.config.strength or (1.0 if models.takes_image(pipeline) else 0.6)
        if stage.mask is not None:
            grey = self._fitted(stage.mask).convert("L").point(lambda v: 255 if v >= 128 else 0)
            found |= {"mask_image": grey, **size}
        return found

    def _small(self, pixels: np.ndarray, pipeline: Any) -> Image.Image:
        """A small image for an upscaler: as it is, cut to what its UNet can halve, or for the size asked for."""
        factor = int(pipeline.vae_scale_factor)
        height, width = pixels.shape[:2]
        if self.config.width or self.config.height:
            width, height = self.width // factor, self.height // factor
        step = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
        width, height = (max(step, side // step * step) for side in (width, height))
        if max(width, height) * factor > MAX_SIDE:
            raise ConfigError(
                f"--image: an upscaler would make {width * factor}x{height * factor} of {self.config.image}, more than "
                f"{MAX_SIDE} on a side; give a smaller one, or --width and --height"
            )
        return Image.fromarray(resize_crop_to(pixels, width, height)[0])

    def _control(self) -> Image.Image:
        """The control image: the given one, or one that is made of the given image."""
        stage = self.stage
        if stage.control is not None:
            return self._fitted(stage.control)
        from train.image_conditioning import control_image
        from train.part_config import ControlConfig

        settings = ControlConfig(**(models.control_settings(stage.run, stage.model) or {}))
        if settings.images:
            raise ConfigError(
                "--control-of: this ControlNet was trained on control images that were brought; give one as --control"
            )
        assert stage.control_of is not None
        return Image.fromarray(control_image(np.asarray(self._fitted(stage.control_of)), settings))

    def _fitted(self, pixels: np.ndarray) -> Image.Image:
        """An image to start from at the size that is made."""
        return fitted(pixels, self.width, self.height)


def require_level(upscaler: Any, level: int) -> None:
    """Raises ConfigError where an upscaler has not learned that noise level."""
    most = int(upscaler.config.max_noise_level)
    if level > most:
        raise ConfigError(f"--noise-level is {level}, and this upscaler was trained for levels up to {most}")


EDITS = "StableDiffusionInstructPix2PixPipeline"
UPSCALES = "StableDiffusionUpscalePipeline"
# What a model is given that cannot do without an image, by its pipeline.
NEEDS = {EDITS: {"image"}, UPSCALES: {"image"}, "StableDiffusionInpaintPipeline": {"image", "mask"}}


def _kind(base: Any, given: set[str]) -> Any:
    """The model's own pipeline, or diffusers' other ones around the same parts, for what is given of image, mask and
    control. Raises ConfigError where the model takes something else."""
    import diffusers

    if models.takes_image(base):
        needs = NEEDS.get(type(base).__name__, set())
        if given != needs:
            wanted = " and ".join(f"--{n}" for n in sorted(needs))
            raise ConfigError(f"sample: this model is given an image beside each prompt; give {wanted} and no other")
        return base
    if "control" in given:
        if getattr(base, "controlnet", None) is None:
            raise ConfigError("sample: this model has no ControlNet; leave --control out, or train one (train.control)")
        return diffusers.AutoPipelineForImage2Image.from_pipe(base) if "image" in given else base
    base = models.from_prompts(base)
    if "image" not in given:
        return base
    alone = {
        models.SEQUENCE_PIPELINE: "a text encoder of transformers",
        models.AUTOENCODER_DC_PIPELINE: "an AutoencoderDC",
    }
    if (what := alone.get(type(base).__name__)) is not None:
        raise ConfigError(f"sample: a model with {what} generates from prompts alone; give no --image")
    kind = diffusers.AutoPipelineForInpainting if "mask" in given else diffusers.AutoPipelineForImage2Image
    return kind.from_pipe(base)
