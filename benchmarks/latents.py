"""Latents side by side with what they could at best be, and with what is usual.

    python -m benchmarks.latents                       all parts but scale, about three minutes on two cores
    python -m benchmarks.latents --only encode         one of encode, read, bytes, scale
    python -m benchmarks.latents --only encode --device cuda --vae sd --pictures 4096 --batch 64
    python -m benchmarks.latents --only scale          a run of 200,000 shards, planned and resumed; makes 600,000 files

encode: the stage, from image shards to committed latent shards, against a bare loop of the same encoders over the same
images, cut and in memory, and the same captions, tokenised; in turn, best of `--rounds`. On a GPU both are
bfloat16, channels_last and compiled, and the VAE's share of the card's own matrix product is printed.
read: samples/s out of latent shards against a webdataset of .npy members, one process each, in turn, best of rounds.
bytes: of everything that a latent shard consists of, over those of its columns; and what two billion samples take.
scale: seconds and memory of `carrara plan` over two billion rows, which also finds the shards that are left.
The images are drawn, with a photograph's spectrum and grain; the weights are random, which costs the same.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ingest import draw
from shards.dataset import Dataset, commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, pack_tar
from shards.layout import RunPaths, sample_key

ROOT = Path(__file__).resolve().parents[1]
# SD: Stable Diffusion's own VAE, 34 million weights in the encoder. quarter: a quarter of its widths.
VAES = {"sd": (128, 256, 512, 512), "quarter": (32, 64, 128, 128), "tiny": (8, 8, 8, 8)}
WORDS = [
    "a",
    "the",
    "red",
    "old",
    "small",
    "wooden",
    "bright",
    "house",
    "boat",
    "river",
    "dog",
    "woman",
    "street",
    "light",
    "window",
    "tree",
    "near",
    "over",
    "with",
]


def save_vae(folder: Path, widths: tuple[int, ...]) -> Path:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=min(32, widths[0]),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)
    return folder


def save_clip(folder: Path, width: int, layers: int) -> Path:
    import open_clip
    import torch
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "embed_dim": width,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": layers},
    }
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def image_run(run: RunPaths, shards: int, rows: int, side: int, distinct: int = 32) -> None:
    """Image shards as the ingest writes them for `image_size: side`, of `distinct` drawn images in turn."""
    from PIL import Image

    bodies = []
    for seed in range(distinct):
        image = Image.open(io.BytesIO(draw(seed, 4 * side // 3, side)))
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=95)
        bodies.append(sink.getvalue())
    rng = np.random.default_rng(0)
    stats = []
    for index in range(shards):
        lines, samples = [], []
        for row in range(rows):
            key, body = sample_key(index, row, rows), bodies[(index * rows + row) % distinct]
            caption = " ".join(rng.choice(WORDS, 9)) + f" {index * rows + row}"
            samples.append((key, {"jpg": body, "txt": caption.encode(), "json": json.dumps({"key": key}).encode()}))
            token = hashlib.sha256(key.encode()).hexdigest()
            lines.append(
                {
                    "url": f"https://images{row % 50}.example.com/{token[:2]}/{token[2:18]}.jpg",
                    "caption": caption,
                    "key": key,
                    "status": "success",
                    "error": None,
                    "error_message": None,
                    "width": 4 * side // 3,
                    "height": side,
                    "original_width": 640,
                    "original_height": 480,
                    "sha256": token,
                    "image_ext": "jpg",
                }
            )
        tar, extents = pack_tar(samples)
        for line, extent in zip(lines, extents, strict=True):
            line["image_offset"], line["image_size"] = extent["jpg"]
        schema = pa.Table.from_pylist(lines).schema
        for name in ("error", "error_message"):
            schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(lines, schema), sink, compression="zstd")
        files = {".tar": tar, ".parquet": sink.getvalue()}
        stats.append(
            commit_shard(run.images, index, files, {"rows": rows, "count": rows}, Fingerprint("ingest", 1, {}, index))
        )
    write_manifest(run.images, "images", stats)


def stage_of(folder: Path, name: str, images: Path, vae: Path, clip: Path, **settings: Any) -> Any:
    from latents.config import LatentsConfig
    from latents.stage import LatentsStage

    run = RunPaths(str(folder / name))
    Path(run.run).mkdir(parents=True, exist_ok=True)
    if not Path(run.images).exists():
        Path(run.images).symlink_to(images)
    return LatentsStage(LatentsConfig(**settings), run, str(vae), str(clip))


# ---- encode ----------------------------------------------------------------------------------------


def encode(given: argparse.Namespace, folder: Path) -> None:
    import torch

    from latents.arithmetic import fixed_arithmetic
    from latents.resize import resize_crop
    from shards.images import decode_rgb

    side, per_shard = given.side, max(given.batch, given.images // given.shards)
    on_gpu = given.device == "cuda"
    how: dict[str, Any] = {"resolution": side, "batch_size": given.batch, "device": given.device, "text": given.text}
    how["decode_threads"] = given.decode_threads
    if on_gpu:
        how |= {"precision": "bfloat16", "channels_last": True, "compile": True}
    vae, clip = save_vae(folder / "vae", VAES[given.vae]), save_clip(folder / "clip", 256, 4)
    source = RunPaths(str(folder / "source"))
    image_run(source, given.shards, per_shard, side)
    dataset = Dataset.open(source.images)
    stage = stage_of(folder, "warm", Path(source.images), vae, clip, **how)
    worker = stage.worker()  # one pair of encoders for both sides; compiled and warmed up by one shard
    worker(next(stage.tasks()))

    batches, tokens = [], []
    for position in range(given.shards):
        shard = ImageShard(dataset, position)
        cut = [resize_crop(decode_rgb(shard.image_bytes(i)), side)[0] for i in range(len(shard))]
        batches += [np.stack(cut[i : i + given.batch]) for i in range(0, len(cut), given.batch)]
        if given.text == "embeddings":
            found = worker.text.tokenize([*shard.captions, ""]).numpy()
            tokens += [found[i : i + given.batch] for i in range(0, len(found), given.batch)]
    count = sum(map(len, batches))

    def bare() -> float:
        began = time.perf_counter()
        with fixed_arithmetic(stage.config.threads):
            result = None
            for batch in batches:
                following = worker.vae.encode_stored(batch)
                if result is not None:
                    result()
                result = following
            if result is not None:
                result()
            for rows in tokens:
                worker.text.encode(rows)
        return time.perf_counter() - began

    def whole(turn: int) -> float:
        this = stage_of(folder, f"turn-{turn}", Path(source.images), vae, clip, **how)
        worker.root = this.root
        tasks = list(this.tasks())
        began = time.perf_counter()
        with ThreadPoolExecutor(this.max_in_flight) as pool:  # as many shards in hand as on Ray
            stats = list(pool.map(worker, tasks))
        this.finish(stats)
        return time.perf_counter() - began

    print(f"encode: {count} images of {side} px, VAE '{given.vae}', {given.text}, batch {given.batch}, {given.device}")
    bares, wholes = [], []
    for turn in range(given.rounds):
        bares.append(bare())
        wholes.append(whole(turn))
        print(f"  bare loop {count / bares[-1]:8.2f} images/s   stage {count / wholes[-1]:8.2f} images/s", flush=True)
    print(f"  the stage reaches {100 * min(bares) / min(wholes):.1f} % of the bare loop (best of {given.rounds} each)")
    if on_gpu:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            from diffusers import AutoencoderKL

            model = AutoencoderKL.from_config(AutoencoderKL.load_config(vae))
            model.encode(torch.zeros(1, 3, side, side))
        flops, peak = counter.get_total_flops(), _peak()
        seconds = _encoder_seconds(worker, batches[0])
        share = flops * len(batches[0]) / seconds / peak
        print(
            f"  VAE encoder alone {len(batches[0]) / seconds:.0f} images/s, {flops / 1e9:.0f} GFLOP each: "
            f"{100 * share:.0f} % of the {peak / 1e12:.0f} TFLOP/s of a bfloat16 matrix product here"
        )


def _peak() -> float:
    """FLOP/s of a large bfloat16 matrix product on this GPU."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (time.perf_counter() - began))
    return best


def _encoder_seconds(worker: Any, batch: np.ndarray) -> float:
    import torch

    x = torch.from_numpy(batch).cuda().permute(0, 3, 1, 2).to(torch.bfloat16)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(5):
                worker.vae.model.encode(x)
            torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - began) / 5)
    return best


# ---- read ------------------------------------------------------------------------------------------


def read(given: argparse.Namespace, folder: Path) -> None:
    import webdataset

    from shards.columns import ColumnShard, pack_columns

    rng, shards, count, batch = np.random.default_rng(0), 4, 2048, 128
    run = RunPaths(str(folder / "read"))
    tars, stats = [], []
    for index in range(shards):
        mean = rng.standard_normal((count, 4, 32, 32)).astype(np.float16)
        logstd = rng.integers(0, 256, mean.shape, np.uint8)
        tokens = rng.integers(0, 49408, (count, 77)).astype(np.uint16)
        keys = [sample_key(index, i, count) for i in range(count)]
        sink = io.BytesIO()
        pq.write_table(pa.table({"key": keys, "status": ["success"] * count}), sink)
        columns = pack_columns({"mean": mean, "logstd": logstd, "tokens": tokens}, {})
        files = {".safetensors": columns, ".parquet": sink.getvalue()}
        found = {"rows": count, "count": count}
        stats.append(commit_shard(run.latents, index, files, found, Fingerprint("latents", 1, {}, index)))
        tars.append(str(folder / f"{index:05d}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for i, key in enumerate(keys):
                for name, array in (("mean", mean[i]), ("logstd", logstd[i]), ("tokens", tokens[i])):
                    member = io.BytesIO()
                    np.save(member, array)
                    info = tarfile.TarInfo(f"{key}.{name}.npy")
                    info.size = member.tell()
                    member.seek(0)
                    tar.addfile(info, member)
    write_manifest(run.latents, "latents", stats)
    names = ("mean", "logstd", "tokens")

    def ours() -> tuple[int, int]:
        seen = total = 0
        dataset = Dataset.open(run.latents)
        for position in range(shards):
            shard = ColumnShard(dataset, position)
            order = np.random.default_rng(position).permutation(len(shard))
            for i in range(0, count, batch):
                arrays = [shard.arrays[n][order[i : i + batch]] for n in names]
                seen, total = seen + len(arrays[0]), total + int(arrays[2].sum())
        return seen, total

    def theirs() -> tuple[int, int]:
        seen = total = 0
        data = webdataset.WebDataset(tars, shardshuffle=False).decode()
        data = data.to_tuple(*(f"{n}.npy" for n in names)).batched(batch)
        for arrays in data:
            seen, total = seen + len(arrays[0]), total + int(np.asarray(arrays[2]).sum())
        return seen, total

    best: dict[str, float] = {}
    assert ours() == theirs(), "both read the same samples"
    for _ in range(given.rounds):
        for name, reader in (("latent shards, rows in random order", ours), ("webdataset of .npy, in order", theirs)):
            began = time.perf_counter()
            seen, _ = reader()
            best[name] = max(best.get(name, 0.0), seen / (time.perf_counter() - began))
    print(f"read: {shards * count} samples of 4x32x32, batches of {batch}, one process, best of {given.rounds}")
    for name, rate in best.items():
        print(f"  {name:38}{rate:>12,.0f} samples/s")
    a, b = best.values()
    print(f"  {a / b:.1f} times as fast")


# ---- bytes -----------------------------------------------------------------------------------------


def bytes_a_sample(given: argparse.Namespace, folder: Path) -> None:
    from shards.columns import ColumnShard

    vae, clip = save_vae(folder / "vae-tiny", VAES["tiny"]), save_clip(folder / "clip-tiny", 64, 1)
    source = RunPaths(str(folder / "source-bytes"))
    image_run(source, 1, given.samples, 256)
    settings = {"resolution": 256, "text": "tokens", "batch_size": 32, "device": "cpu"}
    stage = stage_of(folder, "bytes", Path(source.images), vae, clip, **settings)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    shard = ColumnShard(Dataset.open(stage.root), 0)
    columns = sum(a.nbytes for a in shard.arrays.values()) / len(shard)
    sizes = {p.suffix: p.stat().st_size / len(shard) for p in Path(stage.root).iterdir() if p.name[0] == "0"}
    whole = sum(sizes.values())
    print(f"bytes: {len(shard)} samples at 256 px, 4x32x32, moments and tokens")
    print(f"  columns {columns:,.1f} bytes a sample; " + ", ".join(f"{k} {v:,.1f}" for k, v in sorted(sizes.items())))
    print(f"  all files are {whole / columns:.4f} times the columns")
    usual = 2e9 * (8192 + 77 * 1024 * 2) / 1e12
    print(f"  2 billion samples: {2e9 * whole / 1e12:.1f} TB; half-precision latents and CLIP-H rows: {usual:.1f} TB")


# ---- scale -----------------------------------------------------------------------------------------


def scale(given: argparse.Namespace, folder: Path) -> None:
    from latents import planning
    from shards import storage
    from tests.latents.test_planning import RATES

    count = given.scale_shards
    vae, clip = save_vae(folder / "vae-tiny", VAES["tiny"]), save_clip(folder / "clip-tiny", 64, 1)
    run = RunPaths(str(folder / "large"))
    Path(run.images).mkdir(parents=True)
    Path(run.latents).mkdir()
    manifest = {
        "kind": "images",
        "format_version": 1,
        "fingerprint": "0" * 32,
        "rows": count * 10_000,
        "count": count * 9_000,
        "shards": [
            {"index": i, "rows": 10_000, "count": 9_000, "digest": hashlib.sha256(str(i).encode()).hexdigest()[:32]}
            for i in range(count)
        ],
    }
    Path(run.images, "dataset.json").write_text(json.dumps(manifest, indent=1))
    stage = stage_of(folder, "large", Path(run.images), vae, clip, device="cpu", text="tokens")
    four = [0.12345678901234567] * 4
    for task in stage.tasks():
        if task.index % 10 == 9:
            continue  # what is left
        stats = {
            "rows": 10_000,
            "count": 9_000,
            "status": {"failed_to_download": 1_000, "success": 9_000},
            "errors": {},
            "captions": None,
            "seconds": 812.4,
            "images_per_second": 11.1,
            "encode_seconds": 800.1,
            "wait_seconds": 1.2,
            "channels": {"count": 9_216_000, **dict.fromkeys(("mean", "m2", "variance", "minimum", "maximum"), four)},
            "shard": task.index,
            "fingerprint": task.fingerprint.to_json(),
            "files": {s: {"size": 1, "sha256": "a" * 64} for s in (".parquet", ".safetensors")},
        }
        base = f"{run.latents}/{task.index:05d}"
        Path(base + "_stats.json").write_text(json.dumps(stats, indent=1, sort_keys=True) + "\n")
        for suffix in stats["files"]:
            Path(base + suffix).write_bytes(b"x")
    config = {
        "run": run.run,
        "ingest": {"table": str(folder)},
        "autoencoder": {"pretrained": str(vae)},
        "clip": {"pretrained": str(clip)},
        "latents": {"device": "cpu", "text": "tokens"},
    }
    (folder / "large.json").write_text(json.dumps(config))
    # The rates are those of a pilot: they are measured once and kept.
    key = planning.rates_key(stage)
    storage.write_json(storage.join(run.status, planning.RATES), {"key": key, "rates": vars(RATES)})
    watch = (
        "import resource, subprocess, sys, time; began = time.perf_counter(); "
        "code = subprocess.run(sys.argv[1:]).returncode; "
        "print(f'{time.perf_counter() - began:.1f} s, "
        "{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB'); sys.exit(code)"
    )
    command = [sys.executable, "-m", "orchestration.run_stage", "plan", "--config", str(folder / "large.json")]
    print(f"scale: plan and resume over {count:,} shards of 10,000 rows")
    for turn in ("every stats file is read", "they were read before"):
        found = subprocess.run(
            [sys.executable, "-c", watch, *command, "--rows", str(count * 10_000)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        left, took = found.stdout.strip().splitlines()[-2:]
        print(f"  {turn}: {took}; {left}", flush=True)


PARTS = {"encode": encode, "read": read, "bytes": bytes_a_sample, "scale": scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vae", default="quarter", choices=VAES)
    parser.add_argument("--text", default="embeddings", choices=("tokens", "embeddings"))
    parser.add_argument("--pictures", dest="images", type=int, default=48)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--decode-threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000, help="bytes: images in the shard")
    parser.add_argument("--scale-shards", type=int, default=200_000)
    given = parser.parse_args()
    for name, part in PARTS.items():
        if given.only == name or (given.only is None and name != "scale"):
            with tempfile.TemporaryDirectory(prefix="carrara-latents-") as folder:
                part(given, Path(folder))


if __name__ == "__main__":
    main()
