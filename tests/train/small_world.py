"""A small world that a model learns in seconds: a coloured square in one of four corners, on a ground of some grey.

Its captions say the colour alone. Pictures have 16 px; the VAE is "shrink by two, enlarge by two" as the product begins
one (train/initial.py), so that latents are 8 x 8; the CLIP has random weights with words far apart. All is fitted and
exported by the product's own stages, and judged from pixels.
"""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from latents.config import LatentsConfig
from latents.stage import LatentsStage
from shards.dataset import commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import pack_tar
from shards.layout import RunPaths, sample_key
from shards.stage import begin
from tests.train import forked, tiny
from train.initial import spread_words, thumbnail

SIDE, SQUARE, PER_SHARD, CONTEXT = 16, 6, 500, 8
COLOURS = {"red": (220, 30, 30), "yellow": (245, 220, 40), "green": (30, 160, 50), "blue": (40, 70, 220)}
GREYS = (90, 190)
CORNERS = ((1, 1), (1, 9), (9, 1), (9, 9))

UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
ATTENTIVE = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
PROCESS = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
DRAWING = {"num_inference_steps": 10, "guidance_scale": 2.0}


class Things:
    """Colour (0..3), corner (0..3) and grey (0..1) of `count` pictures, by a seed."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.colour, self.corner, self.grey = (rng.integers(n, size=count) for n in (4, 4, 2))
        self.other = (self.colour + rng.integers(1, 4, count)) % 4  # what an instruction makes of the colour
        self.noise = rng.integers(-8, 9, (count, SIDE, SIDE, 3))

    def pixels(self, colour: np.ndarray | None = None) -> np.ndarray:
        """uint8 [N,16,16,3]; colour: other ones."""
        colour = self.colour if colour is None else colour
        out = np.empty((len(colour), SIDE, SIDE, 3), np.int64)
        for i, (c, corner, grey) in enumerate(zip(colour, self.corner, self.grey, strict=True)):
            y, x = CORNERS[corner]
            out[i] = GREYS[grey]
            out[i, y : y + SQUARE, x : x + SQUARE] = list(COLOURS.values())[c]
        found: np.ndarray = np.clip(out + self.noise, 0, 255).astype(np.uint8)
        return found

    def captions(self) -> list[str]:
        return [f"a {list(COLOURS)[c]} square" for c in self.colour]

    def instructions(self) -> list[str]:
        return [f"make it {list(COLOURS)[c]}" for c in self.other]


def read(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour, corner and grey of pictures, int64 [N] each: the corner whose middle is the least grey, its nearest
    colour, and the nearest grey of what the other corners show."""
    middles = np.stack([pixels[:, y + 1 : y + 5, x + 1 : x + 5].astype(float).mean((1, 2)) for y, x in CORNERS], axis=1)
    corner = np.ptp(middles, axis=2).argmax(1)
    rows = np.arange(len(pixels))
    palette = np.array(list(COLOURS.values()), float)
    colour = np.square(middles[rows, corner][:, None] - palette).sum(-1).argmin(1)
    ground = np.median(middles.mean(2), axis=1)
    return colour, corner, np.abs(ground[:, None] - np.array(GREYS)).argmin(1)


def clean() -> np.ndarray:
    """Every picture there is without its noise, uint8 [colour,corner,grey,16,16,3]."""
    out = np.empty((len(COLOURS), len(CORNERS), len(GREYS), SIDE, SIDE, 3), np.uint8)
    for (c, colour), (k, (y, x)), (g, grey) in itertools.product(
        enumerate(COLOURS.values()), enumerate(CORNERS), enumerate(GREYS)
    ):
        out[c, k, g] = grey
        out[c, k, g, y : y + SQUARE, x : x + SQUARE] = colour
    return out


def distances(pixels: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Root mean square differences, in levels of 255, float64 [N,colour,corner,grey], of pictures from those in `to`,
    shaped as `clean` has them."""
    off = pixels.astype(np.float64)[:, None, None, None] - to[None]
    found: np.ndarray = np.sqrt(np.square(off).mean(axis=(-1, -2, -3)))
    return found


def prepare(run: Path, count: int = 1500, **latents: Any) -> None:
    """Pictures with captions, a VAE, a CLIP, and the latents, with further settings of these."""
    things = Things(count, 1)
    write_images(run / "images", things.pixels(), things.captions())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks: dict[str, Any] = {"block_out_channels": (16, 16), "norm_num_groups": 4, "layers_per_block": 1}
        blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(**blocks, latent_channels=4, mid_block_add_attention=False, scaling_factor=1.5)
        thumbnail(vae)
        vae.save_pretrained(run / "autoencoder" / "model")
        text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        vision = {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
        model_cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
        clip = open_clip.CLIP(**model_cfg)
        spread_words(clip)
    folder = run / "clip" / "model"
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    write_latents(run, run, **latents)


def prepare_edits(run: Path, base: Path, count: int = 1500) -> None:
    """Pictures after as images with instructions as captions, and by key in `before` those before."""
    things = Things(count, 2)
    write_images(run / "images", things.pixels(things.other), things.instructions())
    write_images(run / "before" / "images", things.pixels(), things.instructions())
    write_latents(run, base)


def share_latents(run: Path, base: Path) -> None:
    """A run on the images and latents of another one."""
    run.mkdir()
    for name in ("images", "latents"):
        (run / name).symlink_to(base / name)


def write_images(root: Path, pixels: np.ndarray, captions: list[str]) -> None:
    stats = []
    for index, at in enumerate(range(0, len(pixels), PER_SHARD)):
        files, rows = [], []
        some = slice(at, at + PER_SHARD)
        for row, (picture, caption) in enumerate(zip(pixels[some], captions[some], strict=True)):
            sink = io.BytesIO()
            Image.fromarray(picture).save(sink, "PNG")
            key = sample_key(index, row, PER_SHARD)
            files.append((key, {"png": sink.getvalue()}))
            rows.append({"key": key, "caption": caption, "status": "success", "image_ext": "png"})
        tar, extents = pack_tar(files)
        for line, extent in zip(rows, extents, strict=True):
            line["image_offset"], line["image_size"] = extent["png"]
        made = {".tar": tar, ".parquet": tiny.parquet(tiny.pa.Table.from_pylist(rows))}
        count = {"count": len(rows), "rows": len(rows)}
        stats.append(commit_shard(str(root), index, made, count, Fingerprint("ingest", 1, {}, str(index))))
    write_manifest(str(root), "images", stats, {})


def write_latents(run: Path, encoders: Path, **latents: Any) -> None:
    config = LatentsConfig(resolution=SIDE, batch_size=64, device="cpu", text_layer="last", **latents)
    vae, clip = (str(encoders / name / "model") for name in ("autoencoder", "clip"))
    stage = LatentsStage(config, RunPaths(str(run)), vae, clip)
    begin(stage)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])


def fit(run: Path, images: int, seed: int = 3, **train: Any) -> None:
    """Fit and export the run's model."""
    values = {"batch_size": 32, "images": images, "learning_rate": 3e-3, "warmup_images": 480, "threads": 1}
    values |= {
        "optimizer": "muon",
        "ema_halflife_images": 500,
        "streams": 8,
        "log_every_images": 640,
        "checkpoint_every_images": 100_000,
    }
    config = tiny.write_config(run, {"run": str(run), "seed": seed, "train": {**values, **PROCESS, **train}})
    forked.fit(config, 1)


def draw_all(pipeline: Any, prompts: list[str], **given: Any) -> np.ndarray:
    """uint8 [N,H,W,3]: a picture a prompt, its noise by its number."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with torch.inference_mode():
        pixels = pipeline(prompts, generator=generators, output_type="np", **given).images
    found: np.ndarray = (pixels * 255).round().astype(np.uint8)
    return found
