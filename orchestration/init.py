"""`carrara init PATH`: a commented YAML for what lies there. A part of it is looked at; nothing is changed."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ingest import sources, tables
from ingest.config import ColumnsConfig, SourceConfig
from ingest.errors import Rejected
from ingest.places import Below, Reader
from shards.settings import ConfigError

LOOKED_AT = 200  # images whose sizes are looked at
WHAT = {
    "folder": "a folder of images",
    "webdataset": "WebDataset tars",
    "parquet": "parquet or Arrow files with the images' bytes",
    "table": "a table of URLs",
}


def run(path: str, out: str) -> str:
    """Write the YAML; returns what was found. Raises ConfigError where there is nothing, or the YAML is there."""
    if os.path.exists(out):
        raise ConfigError(f"init: {out} is there already; give --out another name")
    path = path if "://" in path else os.path.abspath(path)
    kind = sources.detect(path)
    found, sizes = _table(path) if kind == "table" else _images(path, kind)
    text = _yaml(path, kind, found, sizes, Path(out).stem)
    with open(out, "x", encoding="utf-8") as sink:
        sink.write(text)
    return (
        f"{path}: {WHAT[kind]}; {found}\nwritten: {out}; look it through, then\n  carrara ingest --config {out} --local"
    )


def _table(path: str) -> tuple[str, np.ndarray]:
    files = tables.list_files(path)
    return f"{len(files):,} files; `carrara ingest --dry-run` counts what the filters keep", np.zeros((0, 2), np.int64)


def _images(path: str, kind: sources.Kind) -> tuple[str, np.ndarray]:
    """How many images and captions there are, and sizes int64 [N,2] (width, height) of some."""
    with tempfile.TemporaryDirectory(prefix="carrara-init-") as scratch:
        wanted = sources.Wanted((), ColumnsConfig(), SourceConfig())
        said = sources.refresh(scratch, path, kind, wanted, "init")
        rows: list[dict[str, Any]] = []
        images = captioned = captions = 0
        for part in sorted(Path(scratch).glob("*.parquet")):
            table = pq.read_table(part, columns=["place", "fault", "caption"]).to_pylist()
            good = [r for r in table if r["fault"] is None]
            images += len(good)
            captioned += sum(bool(r["caption"]) for r in good)
            captions += sum(len(r["caption"]) for r in good)
            rows += good
    reader = Reader(Below([sources.folder_of(path)]), 50_000_000)
    sizes = []
    for row in rows[:: max(1, len(rows) // LOOKED_AT)][:LOOKED_AT]:
        try:
            with Image.open(io.BytesIO(reader.read(row["place"])), formats=("JPEG", "PNG", "WEBP")) as image:
                sizes.append(image.size)
        except (Rejected, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    found = f"{images:,} images, {captioned:,} of them with {captions:,} captions"
    return "; ".join([found, *said]), np.array(sizes, np.int64).reshape(-1, 2)


def _yaml(path: str, kind: sources.Kind, found: str, sizes: np.ndarray, name: str) -> str:
    import json

    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    resolution, buckets, seen = 256, False, ""
    if len(sizes):
        short, ratio = sizes.min(axis=1), sizes[:, 0] / sizes[:, 1]
        middle = int(np.median(short))
        resolution = next((r for r in (1024, 768, 512, 256, 128, 64) if middle >= r), 32)
        buckets = bool(((ratio > 1.1) | (ratio < 0.9)).mean() > 0.2) and resolution >= 256
        low, high = np.percentile(short, [5, 95]).astype(int).tolist()
        seen = f"# Of {len(sizes)} images the median shorter side is {middle} pixels, {low} to {high} in nine of ten.\n"
    notes = "\n".join(f"# {line}" for line in found.splitlines())
    precision = "bf16" if gpu else "fp32"
    shape = "keep_ratio" if buckets else "center_crop"
    lines = [
        f"# {WHAT[kind]}:",
        notes,
        seen + (f"# GPU: {gpu}" if gpu else "# No GPU was found on this machine."),
        "# `carrara schema > schema.json` gives what editors complete this from. Keys that are left out have defaults.",
        "",
        f"run: runs/{name} # everything that is made lies in here",
        "seed: 0",
        "",
        "ingest:",
        f"  table: {json.dumps(path)}",
        f"  image_size: {resolution} # pixels of the shorter side that are stored",
        f"  resize_mode: {shape} # keep_ratio: for buckets of many shapes; center_crop: squares",
        "  heldout_fraction: 0.05 # never trained on: prompts and real images of the evaluation",
    ]
    if kind == "folder":
        lines.append("  # source: {captions: folder} # the folder's name, where there is no caption")
    if kind == "webdataset":
        lines.append(
            "  # source: {adopt: true} # write an index alone and leave the images in their tars; no resize_mode then"
        )
    lines += [
        "",
        "# A VAE and a CLIP of your own are fitted where none is named here.",
        "# autoencoder: {pretrained: stabilityai/sd-vae-ft-mse}",
        '# clip: {pretrained: "ViT-L-14:openai"}',
        "",
        "latents:",
        f"  resolution: {resolution}",
        f"  buckets: {'{step: 64}' if buckets else 'null'} # {{step: 64}}: many shapes are not cropped to a square",
        "",
        "train:",
        "  # start_from: stable-diffusion-v1-5/stable-diffusion-v1-5 # tune a model that is there ...",
        "  # adapter: {kind: lora, rank: 16} # ... by a LoRA",
        f"  precision: {precision}",
        "",
    ]
    return "\n".join(lines)
