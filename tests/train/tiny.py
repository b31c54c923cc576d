"""A tiny run on disk (image shards and latent shards of random content) and its configuration."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from shards.columns import pack_columns
from shards.dataset import commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import pack_tar
from shards.layout import sample_key

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, WIDTH = 6, 8
COLOURS = ("red", "green", "blue", "white")


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@functools.cache
def encoders() -> dict[str, dict[str, Any]]:
    """The facts of a VAE (8 pixels a place, 4 channels) and a CLIP (CONTEXT tokens of WIDTH values) of random weights,
    as a manifest of latents has them; saved once a process."""
    import open_clip
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from latents.weights import find_clip, find_vae

    root = Path(tempfile.mkdtemp(prefix="carrara-tiny-"))
    atexit.register(_remove, root, os.getpid())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        shape = {**VAE, **blocks, "block_out_channels": [8] * 4, "scaling_factor": 0.9}
        AutoencoderKL(**shape).save_pretrained(root / "vae")
        text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1}
        model_cfg = {"embed_dim": WIDTH, "vision_cfg": CLIP["vision_cfg"], "text_cfg": text}
        (root / "clip").mkdir()
        save_file(open_clip.CLIP(**model_cfg).state_dict(), root / "clip" / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": {}}
    (root / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    vae, clip = find_vae(str(root / "vae")), find_clip(str(root / "clip"))
    return {
        "vae": {"ref": vae.ref, "digest": vae.digest, "scaling_factor": 0.9, "config": vae.config},
        "text": {"ref": clip.ref, "digest": clip.digest, "layer": "last", "context_length": CONTEXT, "width": WIDTH},
    }


def _remove(root: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork
        shutil.rmtree(root, ignore_errors=True)


def make_latents(
    root: Path,
    counts: tuple[int, ...] = (9, 14, 5, 12),
    text: str = "embeddings",
    flip: bool = False,
    features: tuple[int, int] | None = None,
) -> None:
    """features: places along a side, and width, of a vision tower's."""
    rng, mirrored = np.random.default_rng(1), np.random.default_rng(2)
    tower = np.random.default_rng(3).normal(size=(4, features[1] if features else 0)).astype(np.float32)
    stats = []
    for index, n in enumerate(counts):
        arrays = {
            "mean": rng.normal(size=(n, 4, 4, 4)).astype(np.float16),
            "logstd": rng.integers(60, 120, (n, 4, 4, 4)).astype(np.uint8),
            "tokens": rng.integers(1, 100, (n, CONTEXT)).astype(np.uint16),
            "empty_tokens": np.zeros(CONTEXT, np.uint16),
        }
        if text == "embeddings":
            arrays |= {
                "embeddings": rng.normal(size=(3, CONTEXT, WIDTH)).astype(np.float16),
                "embedding_index": rng.integers(0, 3, n).astype(np.int32),
                "empty_embedding": np.zeros((CONTEXT, WIDTH), np.float16),
            }
        if flip:
            arrays["mean_flipped"] = mirrored.normal(size=(n, 4, 4, 4)).astype(np.float16)
            arrays["logstd_flipped"] = mirrored.integers(60, 120, (n, 4, 4, 4)).astype(np.uint8)
        for end in (("", "_flipped") if flip else ("",)) if features else ():
            at = np.arange(features[0]) * 4 // features[0]  # of the places, so that there is something to be seen
            mean = arrays["mean" + end][:, :, at][:, :, :, at].transpose(0, 2, 3, 1).astype(np.float32)
            arrays["features" + end] = (mean @ tower).astype(np.float16)
        data = pack_columns(arrays, {"logstd_min": "-15.0", "logstd_step": "0.098"})
        keys = [sample_key(index, r, 100) for r in range(n)]
        sidecar = parquet(pa.table({"key": keys, "status": ["success"] * n}))
        files = {".safetensors": data, ".parquet": sidecar}
        stats.append(
            commit_shard(str(root), index, files, {"count": n, "rows": n}, Fingerprint("latents", 1, {}, index))
        )
    extra = {"resolution": 32, **encoders(), "laid": [[n] for n in counts]}
    if features:
        extra["features"] = {"ref": "tower", "digest": "d", "size": 32, "grid": features[0], "width": features[1]}
    write_manifest(str(root), "latents", stats, extra)


def make_images(root: Path, counts: tuple[int, ...] = (10, 7, 11), side: int = 16) -> None:
    rng = np.random.default_rng(2)
    stats = []
    for index, n in enumerate(counts):
        samples, rows = [], []
        for r in range(n):
            colour = int(rng.integers(len(COLOURS)))
            pixels = rng.integers(0, 60, (side, side, 3)).astype(np.uint8)
            pixels[4:12, 4:12] = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)][colour]
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, "PNG")
            key = sample_key(index, r, 100)
            samples.append((key, {"png": sink.getvalue(), "txt": f"a {COLOURS[colour]} square".encode()}))
            # Every third picture has no caption beside its own.
            others = [f"{COLOURS[colour]} {what} {r}" for what in ("box", "tile")] if r % 3 != 2 else None
            row = {"key": key, "caption": f"a {COLOURS[colour]} square", "status": "success", "image_ext": "png"}
            rows.append({**row, "others": others, "as_json": others and json.dumps(others)})
        data, extents = pack_tar(samples)
        for row, extent in zip(rows, extents, strict=True):
            row["image_offset"], row["image_size"] = extent["png"]
        files = {".tar": data, ".parquet": parquet(pa.Table.from_pylist(rows))}
        stats.append(
            commit_shard(str(root), index, files, {"count": n, "rows": n}, Fingerprint("ingest", 1, {}, index))
        )
    write_manifest(str(root), "images", stats, {})


UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def configuration(run: Path, **train: Any) -> dict[str, Any]:
    shared = {"batch_size": 8, "images": 48, "learning_rate": 1e-3, "threads": 1, "ema_halflife_images": 40}
    intervals = {"log_every_images": 8, "checkpoint_every_images": 16, "keep_checkpoints": 9}
    return {
        "run": str(run),
        "seed": 5,
        "autoencoder": {**shared, **intervals, "resolution": 16, "model": VAE},
        "clip": {**shared, **intervals, "model": CLIP},
        "train": {**shared, **intervals, "unet": UNET, "streams": 4, "window": 4, **train},
    }


def write_config(folder: Path, data: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_ranks(command: list[str], world: int, env: dict[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """`python <command>` once for each of `world` ranks, with the environment that a launcher sets."""
    port = str(free_port())
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]


def finish_ranks(ranks: list[subprocess.Popen[str]], expect: int | None = 0, timeout: float = 600) -> str:
    """Wait for all ranks; the output of all. Asserts each exit code."""
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in ranks]
    finally:
        for p in ranks:
            if p.poll() is None:
                p.kill()
    text = "\n".join(outputs)
    if expect is not None:
        assert [p.returncode for p in ranks] == [expect] * len(ranks), text
    return text


def train_main(config: Path, world: int, *arguments: str, stage: str = "train", expect: int | None = 0) -> str:
    """Run train/main.py on `world` ranks to its end."""
    command = ["train/main.py", "--config", str(config), "--stage", stage, *arguments]
    return finish_ranks(start_ranks(command, world), expect)
