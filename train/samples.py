"""Grids of pictures from a checkpoint, drawn while training goes on, so that a person sees how far the model is."""

from __future__ import annotations

import numpy as np
import torch

from train.config import SamplesConfig
from train.folders import name_of

GAP = 2  # pixels between two pictures


def grid(run: str, config: SamplesConfig, device: str, checkpoint: str) -> np.ndarray:
    """One picture a prompt from the EMA of `checkpoint`, in rows as wide as high, uint8 [H,W,3].

    A prompt has the same noise at every checkpoint: its own generator, seeded with config.seed and its place.
    """
    from train.export import build_pipeline

    # Building models draws from torch's generator, which belongs to the training.
    with torch.random.fork_rng():
        pipeline = build_pipeline(run, name_of(checkpoint)).to(device)
        generators = [torch.Generator("cpu").manual_seed(config.seed + i) for i in range(len(config.prompts))]
        pictures = pipeline(
            list(config.prompts), num_inference_steps=config.steps, guidance_scale=config.guidance_scale,
            generator=generators, output_type="np",
        ).images  # fmt: skip
    return tile(np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8))


def tile(pictures: np.ndarray) -> np.ndarray:
    """uint8 [N,h,w,3] -> one picture of ceil(sqrt(N)) columns, white where there is none."""
    n, h, w, _ = pictures.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    out = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (h + GAP), i % columns * (w + GAP)
        out[y : y + h, x : x + w] = picture
    return out
