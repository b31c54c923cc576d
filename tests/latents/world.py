"""A small run to test on: drawn image shards, a tiny random VAE and a tiny random CLIP."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from shards.dataset import commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import pack_tar
from shards.layout import RunPaths, sample_key

CAPTIONS = [
    "a red circle",
    "A  RED circle",
    "a blue square, low left!",
    "",
    "caf\u00e9 \u732b \U0001f600",
    "word " * 60,
]


def save_vae(folder: Path, seed: int = 0, gain: float = 1.0) -> Path:
    """A diffusers folder with a random AutoencoderKL whose moments have a spread worth testing."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.7,
    )
    with torch.no_grad():
        vae.quant_conv.weight.mul_(4 * gain)
        vae.quant_conv.bias.copy_(torch.linspace(-3, 1, 8))
    vae.save_pretrained(folder)
    return folder


def save_clip(
    folder: Path, seed: int = 0, layers: int = 3, context_length: int = 20, quick_gelu: bool = False, width: int = 32
) -> Path:
    """A folder as open_clip's local-dir: wants it, with a random model."""
    import open_clip
    from safetensors.torch import save_file

    model_cfg = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": 49408,
            "width": width,
            "heads": 2,
            "layers": layers,
        },
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**model_cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "logit_scale":
                p.add_(torch.randn_like(p) * 0.1)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth picture with a box in it."""
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    image.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), (left, top, left + width // 3, top + height // 3))
    return image


def encoded(image: Image.Image, extension: str) -> bytes:
    sink = io.BytesIO()
    image.save(sink, {"jpg": "JPEG", "png": "PNG"}[extension], **({"quality": 95} if extension == "jpg" else {}))
    return sink.getvalue()


def image_shard(run: RunPaths, index: int, rows: int, size: int = 32, corrupt: tuple[int, ...] = ()) -> dict:
    """Commit one image shard of `rows` rows, every fifth of which never was downloaded."""
    rng = np.random.default_rng(100 + index)
    lines, samples = [], []
    for row in range(rows):
        key, caption = sample_key(index, row, 100), CAPTIONS[int(rng.integers(len(CAPTIONS)))]
        ok = row % 5 != 4
        width, height = [(size, size), (size + 13, size), (size, 2 * size), (size - 9, size + 4)][row % 4]
        extension = "png" if row % 2 else "jpg"
        data = encoded(draw(rng, width, height), extension)
        if row in corrupt:
            data = data[: len(data) // 3]
        lines.append(
            {
                "url": f"http://example.invalid/{key}",
                "caption": caption,
                "key": key,
                "status": "success" if ok else "failed_to_download",
                "error": None if ok else "http_404",
                "error_message": None if ok else "HTTP 404",
                "width": width if ok else None,
                "height": height if ok else None,
                "original_width": 2 * width if ok else None,
                "original_height": 2 * height if ok else None,
                "sha256": f"{index:02d}{row:02d}",
                "image_ext": extension if ok else None,
            }
        )
        if ok:
            samples.append((key, {extension: data, "txt": caption.encode()}))
    tar, extents = pack_tar(samples)
    found = {key: next(iter(extent.values())) for (key, _), extent in zip(samples, extents, strict=True)}
    for line in lines:
        line["image_offset"], line["image_size"] = found.get(line["key"], (None, None))
    table = pa.Table.from_pylist(lines)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    stats = {"rows": rows, "count": len(samples)}
    files = {".tar": tar, ".parquet": sink.getvalue()}
    return commit_shard(run.images, index, files, stats, Fingerprint("ingest", 1, {}, input=str(index)))


def image_dataset(run: RunPaths, shards: int = 2, rows: int = 13, corrupt: dict[int, tuple[int, ...]] | None = None):
    """Commit a dataset of image shards and its manifest."""
    stats = [image_shard(run, i, rows, corrupt=(corrupt or {}).get(i, ())) for i in range(shards)]
    return write_manifest(run.images, "images", stats)
