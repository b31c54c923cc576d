"""`carrara init PATH`: a commented YAML for what lies there. A part of it is looked at; nothing is changed."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ingest import formats, locations, sources, tables
from ingest.captions import DEFAULT_STEPS
from ingest.config import SOURCES, ColumnsConfig, SourceConfig, SourceKind
from ingest.errors import Rejected
from ingest.listing import Wanted
from ingest.locations import Below, Reader
from shards.images import pixel_size
from shards.settings import ConfigError

LOOKED_AT = 200  # images whose sizes are looked at
FEW = 1000  # with fewer images a model that is there is tuned, and none trained from scratch
FEW_FILES = 20  # of a table, into which is looked
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def run(path: str, out: str) -> str:
    """Write the YAML; returns what was found. Raises ConfigError where there is nothing, or the YAML cannot be made."""
    if os.path.exists(out):
        raise ConfigError(f"init: {out} is there already; give --out another name")
    if not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise ConfigError(f"init: there is no folder {os.path.dirname(out)} for --out")
    path = path if "://" in path else os.path.abspath(path)
    kind = sources.detect(path)
    found = _table(path) if kind == "table" else _images(path, kind)
    text = _yaml(path, kind, found, Path(out).stem)
    with open(out, "x", encoding="utf-8") as sink:
        sink.write(text)
    return (
        f"{path}: {SOURCES[kind]}; {'; '.join(found.said)}\n"
        f"written: {out}; look it through, then\n  carrara ingest --config {shlex.quote(out)} --local"
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies there. said: sentences; images: how many, None where they are not counted; captioned: how many of them
    have a caption; heldout: a fraction that leaves some on both sides; sizes: int64 [N,2] (width, height) of some;
    files_below: the folder that rows name files in."""

    said: tuple[str, ...]
    images: int | None = None
    captioned: int = 0
    heldout: float | None = 0.05
    sizes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    files_below: str | None = None


def _table(path: str) -> Found:
    layout = tables.read_layout(path, ColumnsConfig(), (), captionless=True)
    (url, _, _), (caption, _, _), *_ = layout.columns
    columns = f"the URLs are in '{url}'" if url else "a URL a line"
    columns += f", the captions in '{caption}'" if caption else ", and there are no captions"
    said = [f"{len(layout.files):,} file{'s' * (len(layout.files) > 1)}; {columns}"]
    rows, urls, captions = _rows(layout)
    said[0] += f"; about {rows:,} rows" if rows is not None else ""
    own = [unquote(u[7:]) if u.startswith("file://") else u for u in urls if not locations.is_web(u)]
    below = None
    if urls and len(own) == len(urls):
        levels = zip(*(o.split("/")[:-1] for o in own), strict=False)
        below = "/".join(some[0] for some in itertools.takewhile(lambda some: len(set(some)) == 1, levels))
        said.append(f"its rows name files below {below or '/'}")
    said.append("`carrara ingest --dry-run` counts what the filters keep")
    heldout = 0.05 if rows is None or rows >= FEW else _heldout_fraction(captions)
    return Found(tuple(said), rows, int(caption is not None), heldout, files_below=below)


def _rows(layout: tables.Layout) -> tuple[int | None, list[str], list[str]]:
    """About how many rows a table has, None where it has too many files to ask; some of its URLs; the captions of a
    small one."""
    total, urls, captions = 0, [], []
    for file in layout.files[:FEW_FILES]:
        batch, ends = next(formats.batches(file, layout.columns), (None, None))
        if batch is None or ends is None:
            continue
        total += formats.row_count(file, batch.num_rows, int(ends[-1]))
        urls += [u.strip() for u in batch["url"][:LOOKED_AT].to_pylist() if u and u.strip()]
        captions += [c or "" for c in batch["caption"][:FEW].to_pylist()]
    return (total if len(layout.files) <= FEW_FILES else None), urls[: 10 * LOOKED_AT], captions


def _images(path: str, kind: SourceKind) -> Found:
    sampled: list[tuple[float, str]] = []  # (-chance, location): LOOKED_AT of the images, each with the same chance
    rng = np.random.default_rng(0)
    images = captioned = captions = 0
    firsts: list[str] = []  # captions, of a few images
    with tempfile.TemporaryDirectory(prefix="carrara-init-") as scratch:
        wanted = Wanted((), ColumnsConfig(), SourceConfig())
        said = sources.refresh(scratch, path, kind, wanted, "init")
        for part in sorted(Path(scratch).glob("*.parquet")):
            for batch in pq.ParquetFile(part).iter_batches(columns=["place", "fault", "caption"]):
                good = [r for r in batch.to_pylist() if r["fault"] is None]
                images += len(good)
                captioned += sum(bool(r["caption"]) for r in good)
                captions += sum(len(r["caption"]) for r in good)
                firsts += [next(iter(r["caption"]), "") for r in good[: FEW - len(firsts)]]
                for row, chance in zip(good, rng.random(len(good)).tolist(), strict=True):
                    entry = (-chance, row["place"])
                    (heapq.heappush if len(sampled) < LOOKED_AT else heapq.heappushpop)(sampled, entry)
    if not images:
        raise ConfigError(f"init: there are no images in '{path}'; {'; '.join(said)}")
    reader = Reader(Below([sources.folder_of(path)]), 50_000_000)
    sizes = []
    for _, location in sampled:
        try:
            sizes.append(pixel_size(reader.read(location)))
        except (Rejected, OSError, ValueError):
            continue
    counted = f"{images:,} image{'s' * (images > 1)}, {captioned:,} of them with {captions:,} captions"
    heldout = 0.05 if images >= FEW else _heldout_fraction(firsts)
    return Found((counted, *said), images, captioned, heldout, np.array(sizes, np.int64).reshape(-1, 2))


def _heldout_fraction(captions: Sequence[str]) -> float | None:
    """The least of some fractions by which a few captions come to lie on both sides; None where none does."""
    batch = pa.RecordBatch.from_pydict({"caption": pa.array(captions, pa.string())})
    for fraction in (0.05, 0.1, 0.2, 0.3, 0.5):
        if 0 < tables.HeldoutRule(fraction, 0, DEFAULT_STEPS)(batch).sum() < len(captions):
            return fraction
    return None


def _quoted(text: str) -> str:
    """A text as YAML, on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _comment(text: str) -> str:
    """A sentence as a comment; names of files that are in it may hold anything."""
    return "# " + "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _yaml(path: str, kind: SourceKind, found: Found, name: str) -> str:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    resolution, buckets, seen = 256, False, ""
    if len(found.sizes):
        short, ratio = found.sizes.min(axis=1), found.sizes[:, 0] / found.sizes[:, 1]
        middle = int(np.median(short))
        resolution = next((r for r in (1024, 768, 512, 256, 128, 64) if middle >= r), 32)
        buckets = bool(((ratio > 1.1) | (ratio < 0.9)).mean() > 0.2) and resolution >= 256
        low, high = np.percentile(short, [5, 95]).astype(int).tolist()
        seen = (
            f"# Of {len(found.sizes)} images looked at, the median shorter side is {middle} pixels, {low} to {high} in "
            "nine of ten."
        )
    few = found.images is not None and found.images < FEW
    if few:
        resolution = min(resolution, 512)  # what that model was trained at
    lines = [
        f"# {SOURCES[kind]}:",
        *map(_comment, found.said),
        *([seen] if seen else []),
        f"# GPU: {gpu}" if gpu else "# No GPU was found on this machine.",
        "# `carrara schema > schema.json` gives what editors complete this from. Keys that are left out have defaults.",
        "",
        f"run: {_quoted('runs/' + name)} # everything that is made lies in here",
        "seed: 0",
        "",
        "ingest:",
        f"  table: {_quoted(path)}",
        f"  image_size: {resolution} # pixels of the shorter side that are stored",
        f"  resize_mode: {'keep_ratio' if buckets else 'center_crop'} # keep_ratio: for buckets of many shapes; "
        "center_crop: squares",
        f"  heldout_fraction: {found.heldout} # never trained on: prompts and real images of the evaluation"
        if found.heldout
        else "  # heldout_fraction: 0.5 # the captions are too few, or too alike, for some to be held out",
    ]
    if not found.captioned:
        lines.append("  empty_captions: keep # or none would stay, since no image has a caption")
    if kind == "folder":
        lines.append("  # source: {captions: folder} # the folder's name, where there is no caption")
    if kind == "webdataset":
        lines.append(
            "  # source: {adopt: true} # write an index alone and leave the images in their tars; no resize_mode then"
        )
    if found.files_below is not None:
        lines.append(f"  source: {{files_below: [{_quoted(found.files_below or '/')}]}} # no file elsewhere is read")
    lines += [
        "",
        "# Weights by folder, or by name on the hub; a VAE and a CLIP of your own are fitted where a `model` is given.",
        "autoencoder: {pretrained: stabilityai/sd-vae-ft-mse}",
        'clip: {pretrained: "ViT-L-14:openai"}',
        "",
        "latents:",
        f"  resolution: {resolution}",
        f"  buckets: {'{step: 64}' if buckets else 'null'} # {{step: 64}}: many shapes are not cropped to a square",
    ]
    if few:
        assert found.images is not None
        lines += [
            "  text_layer: last # as the model below reads its CLIP",
            "",
            "train:",
            f"  start_from: {MODEL} # tuned; from scratch without this, adapter and text_layer",
            "  adapter: {kind: lora, rank: 16} # all weights without this",
            f"  images: {min(max(100 * found.images, 2_000), 20_000)} # 100 times each, 2,000 at least",
            f"  batch_size: {min(8, max(1, found.images // 2))}",
            "  learning_rate: 1.0e-4",
            "  schedule: constant",
            "  ema_halflife_images: 500",
            "  checkpoint_every_images: 1_000",
        ]
    else:
        lines += [
            "",
            "train: # Stable Diffusion's UNet, from scratch",
            f"  # start_from: {MODEL} # tune a model that is there ...",
            "  # adapter: {kind: lora, rank: 16} # ... by a LoRA",
            "  images: 10_000_000 # what it is trained for, epochs counted",
            "  batch_size: 256",
        ]
    lines.append(f"  precision: {'bf16' if gpu else 'fp32'}")
    if not found.heldout:
        lines += ["", "# eval: {prompts_file: prompts.txt} # a prompt a line, since no caption is held out"]
    return "\n".join([*lines, ""])
