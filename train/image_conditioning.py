"""What a UNet is given of an image, beside x_t, the time and the caption: a table with a row for each way.

    inpaint   a mask, and the latents of what lies around it, as further input channels (Stable Diffusion's inpainting)
    edit      the latents of the image before, as further input channels (Brooks et al. 2023, arXiv:2211.09800)
    upscale   the image made small, with noise, as further input channels; the noise's level as its class
              (Stable Diffusion's x4 upscaler)
    control   a control image, given to a second network whose outputs are added to the frozen UNet's
              (ControlNet; Zhang et al. 2023, arXiv:2302.05543)

A row has two halves, as captions have (conditioning.py): `batch` makes what one micro-batch needs of the images, on
the CPU in the loader's thread; `inputs` is called within the step, and gives what the UNet is called with. The images
come by key from image shards (segments.image_sets), cut as they were for their latents. Masks and drop-outs are
functions of a sample's place in the run. Both halves do what the row's pipeline in diffusers does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import nn

from latents.encoders import Vae, load_vae, require_digest
from latents.resize import resize_crop_to
from latents.weights import find_vae
from shards.dataset import Dataset
from shards.images import LOCATION, ImageShard, decode_rgb, is_image
from shards.layout import shard_name
from shards.settings import ConfigError, StageError
from train.config import TrainConfig
from train.data import Batch
from train.diffusion import alphas_cumprod
from train.image_samples import DECODERS
from train.part_config import ControlConfig
from train.randomness import Randomness
from train.reader import Kept
from train.segments import MOST_STREAMS

if TYPE_CHECKING:
    from train.denoising import Diffusion

# x_t with further channels, and what else the UNet is called with.
Inputs = tuple[torch.Tensor, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a UNet is given an image. channels: its input channels beside x_t's, by those of a latent. pipeline: the
    class in diffusers. encodes: whether the frozen VAE runs within the step."""

    channels: Callable[[int], int]
    pipeline: str
    encodes: bool
    batch: Callable[[ImageConditioning, np.ndarray, np.ndarray, np.ndarray], Batch]
    inputs: Callable[
        [ImageConditioning, Diffusion, torch.Tensor, Batch, torch.Tensor, dict[str, torch.Tensor] | None], Inputs
    ]


class ImageConditioning:
    """The images of a run that its UNet is given, in the way that `config.conditioned_by` names.

    vae: facts of the latents' VAE. Raises StageError where it is not that one any more.
    """

    def __init__(self, config: TrainConfig, vae: dict[str, Any], random: Randomness) -> None:
        assert config.conditioned_by is not None
        self.config, self.random, self.way = config, random, WAYS[config.conditioned_by]
        self.downscale = find_vae(vae["ref"]).downscale
        self.scale = float(vae["scaling_factor"])
        self.shift = float(vae.get("config", {}).get("shift_factor") or 0.0)
        self.vae: Vae | None = None
        if self.way.encodes:
            self.vae = load_vae(vae["ref"])
            require_digest("the VAE", self.vae.digest, vae["digest"], vae["ref"])
        self._decoders: ThreadPoolExecutor | None = None

    def batch(self, latents: Any, positions: np.ndarray, u: np.ndarray, first: int = 0) -> Batch:
        """What samples of `latents` (data.Latents) need; draws are those of place + first.

        u: uniform float64 [B]; below the configured share a sample's image is left out.
        """
        _, h, w = latents.shape(positions)
        size = (w * self.downscale, h * self.downscale)
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), thread_name_prefix="decode")

        def one(found: tuple[str, bytes, tuple[float, float] | None]) -> np.ndarray:
            return self._fitted(*found, size)

        pixels = np.stack(list(self._decoders.map(one, latents.images(positions))))
        return self.way.batch(self, pixels, positions + first, u)

    def inputs(
        self,
        objective: Diffusion,
        xt: torch.Tensor,
        batch: Batch,
        text: torch.Tensor,
        added: dict[str, torch.Tensor] | None,
    ) -> Inputs:
        """What the UNet is called with at x_t [B,C,h,w], where the batch lies."""
        return self.way.inputs(self, objective, xt, batch, text, added)

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels float [B,3,H,W] in -1..1 -> mean (shifted, unscaled) and log-std of their latents, float32."""
        assert self.vae is not None
        kind = pixels.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        dtype = torch.float32 if dtype == torch.float16 else dtype  # in which VAEs overflow
        mean, logstd = self.vae.posterior(pixels, dtype)
        return mean - self.shift, logstd

    def close(self) -> None:
        """Let go of threads."""
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)
            self._decoders = None

    def _fitted(self, key: str, data: bytes, place: tuple[float, float] | None, size: tuple[int, int]) -> np.ndarray:
        try:
            pixels = np.ascontiguousarray(resize_crop_to(decode_rgb(data), *size, place)[0])
        except (OSError, ValueError) as e:
            raise StageError(
                f"train.{self.config.conditioned_by}: the image of sample {key} cannot be read: {e}"
            ) from e
        control = self.config.control
        return control_image(pixels, control) if control and control.images is None else pixels


class ByKey:
    """Images by key from image shards, those of a shard of latents from the shard with the same number.

    Safe to call from several threads.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._position = {shard.index: i for i, shard in enumerate(dataset.shards)}
        self._shard = Kept(self._open, MOST_STREAMS + 64)  # a stream is in one shard at a time

    def _open(self, index: int) -> tuple[ImageShard, np.ndarray, np.ndarray]:
        """The shard, its keys in their order as text, and of each of these which sample it is."""
        shard = ImageShard(self.dataset, self._position[index], ("key", "status", *LOCATION))
        keys = np.array(shard.keys, np.str_)
        order = np.argsort(keys, kind="stable")
        return shard, keys[order], order

    def has_any(self, index: int, keys: Sequence[str]) -> bool:
        """Whether shard `index` has an image of one of these samples."""
        return index in self._position and bool(np.isin(np.array(keys, np.str_), self._shard(index)[1]).any())

    def read(self, index: int, keys: Sequence[str]) -> tuple[list[bytes], np.ndarray]:
        """The encoded images of samples of shard `index`, and which of them are there, bool [n]; the others are
        empty. Raises StageError where the shard cannot be read."""
        found = [b""] * len(keys)
        if index not in self._position:
            return found, np.zeros(len(keys), bool)
        try:
            shard, known, order = self._shard(index)
            wanted = np.array(keys, np.str_)
            slot = np.searchsorted(known, wanted).clip(max=max(len(known) - 1, 0))
            at = np.where(known[slot] == wanted, order[slot], -1) if len(known) else np.full(len(keys), -1)
            for i, data in zip(np.flatnonzero(at >= 0).tolist(), shard.encoded_images(at[at >= 0]), strict=True):
                found[i] = data
                if not is_image(data):  # taken down since the sidecar was read
                    at[i] = -1
        except (OSError, ValueError, KeyError) as e:
            raise StageError(
                f"{self.dataset.root}: shard {shard_name(index)} cannot be read: {e}; run its stage again"
            ) from e
        return found, at >= 0


# ---- inpainting ------------------------------------------------------------------------------------


def draw_mask(random: np.random.Generator, height: int, width: int, whole: float) -> np.ndarray:
    """A mask to be painted under, uint8 [height,width] of 0 and 1: everything with probability `whole`, else one to
    four boxes and brush strokes (Suvorov et al. 2022, arXiv:2109.07161, section 2.3)."""
    if random.random() < whole:
        return np.ones((height, width), np.uint8)
    side = min(height, width)
    canvas = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(random.integers(1, 5))):
        if random.random() < 0.5:
            w, h = (max(1, round(float(random.uniform(0.1, 0.8)) * n)) for n in (width, height))
            x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            pen.rectangle((x, y, x + w - 1, y + h - 1), fill=1)
        else:
            points = [(float(random.uniform(0, width)), float(random.uniform(0, height)))]
            angle, brush = float(random.uniform(0, 2 * np.pi)), max(1, round(float(random.uniform(0.08, 0.3)) * side))
            for _ in range(int(random.integers(2, 7))):
                angle += float(random.uniform(-1.5, 1.5))
                length = float(random.uniform(0.1, 0.35)) * side
                x1, y1 = points[-1]
                points.append((x1 + length * np.cos(angle), y1 + length * np.sin(angle)))
            pen.line(points, fill=1, width=brush, joint="curve")
            for px, py in points:
                pen.ellipse((px - brush / 2, py - brush / 2, px + brush / 2, py + brush / 2), fill=1)
    return np.asarray(canvas, np.uint8)


def _inpaint_batch(conditioning: ImageConditioning, pixels: np.ndarray, positions: np.ndarray, u: np.ndarray) -> Batch:
    """image uint8 [B,H,W,3], mask uint8 [B,1,H,W], and the posterior's draw masked_noise float32 [B,C,h,w]."""
    assert conditioning.config.inpaint is not None
    assert conditioning.vae is not None
    height, width = pixels.shape[1:3]
    whole = conditioning.config.inpaint.whole
    masks = [draw_mask(r, height, width, whole) for r in conditioning.random.each("mask", positions)]
    shape = (conditioning.vae.channels, height // conditioning.downscale, width // conditioning.downscale)
    return {
        "image": torch.from_numpy(pixels),
        "mask": torch.from_numpy(np.stack(masks)[:, None]),
        "masked_noise": torch.from_numpy(conditioning.random.normal("masked", positions, shape)),
    }


def _inpaint_inputs(
    conditioning: ImageConditioning,
    objective: Diffusion,
    xt: torch.Tensor,
    batch: Batch,
    text: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> Inputs:
    """x_t, the mask at the latents' places, and the latents of the image that is grey under the mask."""
    mask = batch["mask"].to(xt.dtype)
    mean, logstd = conditioning.posterior(_unit(batch["image"]) * (1 - mask))
    around = (mean + logstd.exp() * batch["masked_noise"]) * conditioning.scale
    f = conditioning.downscale
    return torch.cat([xt, mask[:, :, ::f, ::f], around.to(xt.dtype)], dim=1), {}


# ---- editing ---------------------------------------------------------------------------------------


def _edit_batch(conditioning: ImageConditioning, pixels: np.ndarray, positions: np.ndarray, u: np.ndarray) -> Batch:
    """before uint8 [B,H,W,3], kept float32 [B]: 0 where the image is left out."""
    assert conditioning.config.edit is not None
    kept = (u >= conditioning.config.edit.dropout).astype(np.float32)
    return {"before": torch.from_numpy(pixels), "kept": torch.from_numpy(kept)}


def _edit_inputs(
    conditioning: ImageConditioning,
    objective: Diffusion,
    xt: torch.Tensor,
    batch: Batch,
    text: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> Inputs:
    """x_t and the mean of the latents of the image before, which InstructPix2Pix does not scale."""
    mean, _ = conditioning.posterior(_unit(batch["before"]))
    return torch.cat([xt, (mean * batch["kept"][:, None, None, None]).to(xt.dtype)], dim=1), {}


# ---- upscaling -------------------------------------------------------------------------------------

LEVELS = 1000


def _upscale_batch(conditioning: ImageConditioning, pixels: np.ndarray, positions: np.ndarray, u: np.ndarray) -> Batch:
    """small float32 [B,3,h,w] in -1..1 with noise of level int64 [B], each below max_noise_level."""
    assert conditioning.config.upscale is not None
    h, w = (n // conditioning.downscale for n in pixels.shape[1:3])
    small = np.stack([np.asarray(shrink(Image.fromarray(p), w, h)) for p in pixels])
    x = np.ascontiguousarray(small.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1
    level = conditioning.random.integers("level", positions, conditioning.config.upscale.max_noise_level)
    kept = alphas_cumprod(torch.linspace(*LOW_RES_BETAS, LEVELS, dtype=torch.float64)).numpy()[level]
    noise = conditioning.random.normal("low_res", positions, x.shape[1:])
    signal, spread = (a.astype(np.float32)[:, None, None, None] for a in (np.sqrt(kept), np.sqrt(1 - kept)))
    return {"small": torch.from_numpy(signal * x + spread * noise), "level": torch.from_numpy(level)}


def shrink(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image made small, as for training and for those who measure: bicubic, antialiased."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


LOW_RES_BETAS = (0.0001, 0.02)  # first and last, linear: DDPM's own, and those of Stable Diffusion's x4 upscaler


def low_res_scheduler() -> Any:
    """diffusers' scheduler of the noise that a small image gets."""
    from diffusers import DDPMScheduler

    first, last = LOW_RES_BETAS
    return DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule="linear", beta_start=first, beta_end=last)


@torch.no_grad()
def add_levels(unet: Any) -> Any:
    """A UNet that is given a level of noise as its class, and begins by passing it over, in place."""
    width = unet.time_embedding.linear_2.out_features
    unet.class_embedding = nn.Embedding(LEVELS, width)
    unet.class_embedding.weight.zero_()
    unet.register_to_config(num_class_embeds=LEVELS)
    return unet


def _upscale_inputs(
    conditioning: ImageConditioning,
    objective: Diffusion,
    xt: torch.Tensor,
    batch: Batch,
    text: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> Inputs:
    """x_t and the small image; its level of noise as the class."""
    return torch.cat([xt, batch["small"].to(xt.dtype)], dim=1), {"class_labels": batch["level"]}


# ---- control ---------------------------------------------------------------------------------------


class Controlled(nn.Module):
    """A frozen UNet and the ControlNet that learns to steer it, as one model with the names `unet.` and `control.`."""

    def __init__(self, unet: nn.Module, control: nn.Module) -> None:
        super().__init__()
        self.unet, self.control = unet.requires_grad_(False), control


def control_net(unet: Any, downscale: int) -> Any:
    """diffusers' ControlNetModel that begins as a copy of a UNet's encoder behind zero convolutions.

    As its own `from_unet`, with as many halvings of the control image as the VAE has, and with all of the UNet's
    settings. Raises ConfigError where the VAE shrinks by no power of two.
    """
    import inspect

    from diffusers import ControlNetModel

    halvings = downscale.bit_length() - 1
    if 1 << halvings != downscale or halvings < 1:
        raise ConfigError(f"train.control: the VAE shrinks by {downscale}, and a ControlNet by powers of two")
    known = inspect.signature(ControlNetModel.__init__).parameters
    settings = {k: v for k, v in dict(unet.config).items() if k in known and not k.startswith("_")}
    widths = (16, 32, 96, 256, *[256] * (halvings - 3))[: halvings + 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the layers that no UNet has; what the zero convolutions let through begins as nothing
        control = ControlNetModel(**{**settings, "conditioning_embedding_out_channels": widths})
    shared = {k: v for k, v in unet.state_dict().items() if k in control.state_dict()}
    control.load_state_dict(shared, strict=False)
    return control


def control_image(pixels: np.ndarray, config: ControlConfig) -> np.ndarray:
    """A control image of an image, uint8 [H,W,3] each; light on black, which says nothing."""
    if config.kind == "canny":
        try:
            import cv2
        except ImportError:
            raise ConfigError(
                "train.control.kind canny needs OpenCV: pip install opencv-python-headless, or choose sketch"
            ) from None
        return np.repeat(cv2.Canny(pixels, config.low, config.high)[..., None], 3, axis=2)
    image = Image.fromarray(pixels)
    soft = ImageFilter.GaussianBlur(config.radius * min(image.size))
    if config.kind == "blur":
        return np.asarray(image.filter(soft))
    grey = np.asarray(image.convert("L"))
    if config.kind == "sketch":
        # What is darker than its surroundings, as a pencil would draw it: one minus their quotient.
        around = np.asarray(Image.fromarray(grey).filter(soft)).astype(np.float32)
        grey = (255 * (1 - grey / np.maximum(around, 1)).clip(0, 1)).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _control_batch(conditioning: ImageConditioning, pixels: np.ndarray, positions: np.ndarray, u: np.ndarray) -> Batch:
    """control uint8 [B,H,W,3], black where it is left out."""
    assert conditioning.config.control is not None
    pixels[u < conditioning.config.control.dropout] = 0
    return {"control": torch.from_numpy(pixels)}


def _control_inputs(
    conditioning: ImageConditioning,
    objective: Diffusion,
    xt: torch.Tensor,
    batch: Batch,
    text: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> Inputs:
    """x_t as it is, and what the ControlNet adds to the UNet's skip connections and to its middle."""
    assert isinstance(objective.model, Controlled)
    image = batch["control"].permute(0, 3, 1, 2).to(xt.dtype) / 255
    down, mid = objective.model.control(
        xt, objective.process.time[batch["t"]], text, controlnet_cond=image, added_cond_kwargs=added, return_dict=False
    )
    return xt, {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


WAYS = {
    "inpaint": Way(lambda c: c + 1, "StableDiffusionInpaintPipeline", True, _inpaint_batch, _inpaint_inputs),
    "edit": Way(lambda c: c, "StableDiffusionInstructPix2PixPipeline", True, _edit_batch, _edit_inputs),
    "upscale": Way(lambda c: 3, "StableDiffusionUpscalePipeline", False, _upscale_batch, _upscale_inputs),
    "control": Way(lambda c: 0, "StableDiffusionControlNetPipeline", False, _control_batch, _control_inputs),
}


@torch.no_grad()
def widen(unet: Any, more: int) -> Any:
    """A UNet that takes `more` further input channels and begins by passing them over, in place."""
    old = unet.conv_in
    new = nn.Conv2d(old.in_channels + more, old.out_channels, old.kernel_size, old.stride, old.padding)
    new.weight.zero_()
    new.weight[:, : old.in_channels] = old.weight
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)
    return unet
