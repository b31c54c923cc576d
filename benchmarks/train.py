"""Training side by side with its peers:

    python -m benchmarks.train [loop] [diffusers] [ema] [save] [waits] [resume]

loop         our loop from latent shards against a bare PyTorch loop on batches that lie in memory; wait for data
diffusers    our loop from latents against the steps of diffusers' train_text_to_image.py (pixels -> VAE -> UNet, with
             diffusers' and transformers' own classes), same UNet, images and machine; VAE and UNet are Stable
             Diffusion's with an eighth of the channels, so that their costs stand in SD's own proportion
ema          what the averages add to a step: AdamW with and without them on the same weights, as a share of a step
save         for how long the loop stands still when a checkpoint is saved, on 1, 2 and 4 ranks, as a share of a step;
             and what the fullest rank keeps for it in memory
waits        how often a step makes the host wait for the device, under ZeRO 0 to 3 (counted)
resume       the first batch at the start of an epoch and at its end: its place in 2e9 samples, its latents from shards

Peer and ours, each in a process of its own, take turns step by step until the interval is narrow; the median of the
pairs' ratios is printed with it, and what is asked of it. On two cores all of it takes about ten minutes.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

SMALL_UNET = {
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
# Stable Diffusion 1's UNet and VAE with an eighth of the channels, and of the heads: one, as wide as each of SD's.
EIGHTH_UNET = {"block_out_channels": [40, 80, 160, 160], "attention_head_dim": 1, "norm_num_groups": 8}
EIGHTH_VAE = {
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
CONTEXT = 77


# ---- data ------------------------------------------------------------------------------------------


def latent_shards(root: Path, samples: int, side: int, width: int, captions: int = 16) -> None:
    """Latent shards of random numbers, with the manifest that the latents stage writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from shards.columns import pack_columns
    from shards.dataset import commit_shard, write_manifest
    from shards.fingerprint import Fingerprint
    from shards.layout import sample_key

    rng = np.random.default_rng(0)
    per_shard, stats = 512, []
    for index, begin in enumerate(range(0, samples, per_shard)):
        n = min(per_shard, samples - begin)
        arrays = {
            "mean": rng.standard_normal((n, 4, side, side), np.float32).astype(np.float16),
            "logstd": rng.integers(60, 120, (n, 4, side, side)).astype(np.uint8),
            "tokens": rng.integers(1, 400, (n, CONTEXT)).astype(np.uint16),
            "empty_tokens": np.zeros(CONTEXT, np.uint16),
            "embeddings": rng.standard_normal((captions, CONTEXT, width), np.float32).astype(np.float16),
            "embedding_index": rng.integers(0, captions, n).astype(np.int32),
            "empty_embedding": np.zeros((CONTEXT, width), np.float16),
        }
        sink = io.BytesIO()
        keys = [sample_key(index, r, per_shard) for r in range(n)]
        pq.write_table(pa.table({"key": keys, "status": ["success"] * n}), sink)
        data = pack_columns(arrays, {"logstd_min": "-15.0", "logstd_step": "0.098"})
        files = {".safetensors": data, ".parquet": sink.getvalue()}
        made = Fingerprint("latents", 1, {}, index)
        stats.append(commit_shard(str(root), index, files, {"count": n, "rows": n}, made))
    text = {"ref": "none", "digest": "t" * 64, "layer": "last", "context_length": CONTEXT, "width": width}
    vae = {"ref": "none", "digest": "v" * 64, "scaling_factor": 0.18, "config": {}}
    write_manifest(str(root), "latents", stats, {"resolution": 8 * side, "vae": vae, "text": text})


# ---- ours and the bare loop, each in a process of its own ------------------------------------------


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


class Turns:
    """One of two processes that take a step each in turn, so that whatever else the machine does meets both alike."""

    def __init__(self, mine: Any, other: Any) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []
        self._began: float | None = None

    def next(self) -> None:
        """Between two steps: note how long the last took, and wait while the other takes one."""
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
            self.other.release()
        if not self.mine.acquire(timeout=600):
            raise RuntimeError("the other one does not come to its step")
        self._began = time.perf_counter()

    def leave(self) -> None:
        """No more steps here: the other need not wait any more."""
        for _ in range(1000):
            self.other.release()


TURNS: Turns | None = None  # of this process, where it is one of two


def _sit_down(mine: Any, other: Any) -> None:
    global TURNS
    TURNS = Turns(mine, other)


def in_turn(theirs: Callable[..., Any], mine: Callable[..., Any], skip: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each step of both, in pairs, without the first `skip`. theirs, mine: picklable, without arguments."""
    context = multiprocessing.get_context("spawn")
    one, two = context.Semaphore(1), context.Semaphore(0)
    pools = [
        ProcessPoolExecutor(1, mp_context=context, initializer=_sit_down, initargs=pair)
        for pair in ((one, two), (two, one))
    ]
    found = [pool.submit(work) for pool, work in zip(pools, (theirs, mine), strict=True)]
    a, b = (np.array(f.result()) for f in found)
    for pool in pools:
        pool.shutdown()
    n = min(len(a), len(b))
    return a[skip:n], b[skip:n]


def compared(peer: np.ndarray, mine: np.ndarray, batch: int) -> str:
    """Speeds of median steps, and the median of the pairs' ratios with its 95 % interval (bootstrap over pairs)."""
    pairs = peer / mine
    low, high = interval(pairs)
    return (
        f"{batch / np.median(peer):6.2f}/s   ours {batch / np.median(mine):6.2f}/s   ratio {np.median(pairs):.3f} "
        f"[{low:.3f}, {high:.3f}] of {len(pairs)} pairs of steps"
    )


def paced(run: str, settings: dict[str, Any]) -> list[float]:
    """The seconds of our loop's steps, all that is between two forward passes, taken in turn with another process."""
    from train import denoising

    turns = TURNS
    assert turns is not None
    forward = denoising.Diffusion.forward

    def in_my_turn(self: Any, batch: Any) -> Any:
        turns.next()
        return forward(self, batch)

    denoising.Diffusion.forward = in_my_turn
    ours(run, settings)
    turns.leave()
    return turns.seconds


def ours(run: str, settings: dict[str, Any]) -> dict[str, float]:
    """Train with our loop, without the export; samples/s and the wait for data, of the lines after the first."""
    from shards.dataset import Dataset
    from shards.fingerprint import Fingerprint
    from train.config import TrainConfig
    from train.job import Job
    from train.loop import fit
    from train.objectives import build
    from train.ranks import join

    config = TrainConfig.model_validate(settings)
    ranks = join(config.threads)
    dataset = Dataset.open(run + "/latents")
    objective = build("train", config, [dataset], 0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = Fingerprint("train", 1, {}, "")
        job = Job("train", config, 0, str(root / "c"), str(root), str(root / "s.json"), made, {})
        fit(job, objective, ranks)
        lines = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()][1:]
    speed = statistics.median(line["samples_per_s"] for line in lines)
    wait = statistics.median(line["data_wait"] for line in lines)
    last = {k: lines[-1][k] for k in ("mfu", "memory_gib", "tflops") if k in lines[-1]}
    return {"speed": speed, "wait": wait, **last}


def bare(run: str, settings: dict[str, Any]) -> list[float]:
    """The seconds of the plainest loop's steps: the same UNet and loss, torch's AdamW, the batches ready in memory."""
    from shards.dataset import Dataset
    from train.config import TrainConfig
    from train.objectives import build
    from train.optimizer import parameter_groups

    turns = TURNS
    assert turns is not None
    config = TrainConfig.model_validate(settings)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    objective = build("train", config, [Dataset.open(run + "/latents")], 0).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective.model, 0.01), lr=1e-4, fused=True)
    batches = [
        objective.batch(np.arange(i, i + config.batch_size)) for i in range(0, 4 * config.batch_size, config.batch_size)
    ]
    for step in range(config.images // config.batch_size):
        turns.next()
        loss, _ = objective(batches[step % 4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    turns.leave()
    return turns.seconds


def until_narrow(theirs: Callable[..., Any], mine: Callable[..., Any], width: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of steps, round after round, until half of the ratio's interval is `width`; six rounds at most."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(6):
        pairs.append(in_turn(theirs, mine, 3))
        peer, ours_ = (np.concatenate(side) for side in zip(*pairs, strict=True))
        low, high = interval(peer / ours_)
        if (high - low) / 2 <= width:
            break
    return peer, ours_


def interval(pairs: np.ndarray) -> tuple[float, float]:
    """Of the median, 95 %, by bootstrap over pairs."""
    draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def bench_loop(steps: int, threads: int, width: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        latent_shards(Path(folder) / "latents", 4096, 16, 96)
        settings = {
            "images": 32 * steps,
            "batch_size": 32,
            "unet": SMALL_UNET,
            "threads": threads,
            "zero_stage": 1,
            "log_every_images": 32 * 4,
            "checkpoint_every_images": 10**9,
            "initialisation": "torch",
        }
        pairs = until_narrow(
            functools.partial(bare, folder, settings), functools.partial(paced, folder, settings), width
        )
        print(f"loop        bare {compared(*pairs, 32)} (wanted 0.97)", flush=True)
        found = alone(ours, folder, {**settings, "images": 32 * 20})
    print(f"            wait for data {100 * found['wait']:.2f} % of the time (wanted at most 1 %)", flush=True)


# ---- diffusers' script -----------------------------------------------------------------------------


def make_images(folder: Path, count: int, side: int) -> None:
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(small).resize((side + side // 4, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:05d}.jpg", quality=92)


def peer(run: str, settings: dict[str, Any], side: int) -> list[float]:
    """The seconds of the steps of diffusers' examples/text_to_image/train_text_to_image.py with its defaults.

    As far as one process has them: decoding and augmenting in the DataLoader (no workers, its default), the VAE's
    latent_dist.sample() times its scaling factor, the CLIP text model on the token ids, noise,
    DDPMScheduler.add_noise, the UNet, mse, clipping to 1, AdamW. Its --use_ema is off, though ours has its EMA on.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from torchvision import transforms
    from transformers import CLIPTextConfig, CLIPTextModel

    turns = TURNS
    assert turns is not None
    batch_size, steps = settings["batch_size"], settings["images"] // settings["batch_size"]
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    # CLIP ViT-L's text model with an eighth of the width.
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4)
    ).requires_grad_(False)
    vae = AutoencoderKL(**EIGHTH_VAE, sample_size=side).requires_grad_(False)
    unet = UNet2DConditionModel(**EIGHTH_UNET, sample_size=side // 8, cross_attention_dim=96).train()
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    transform = transforms.Compose(
        [
            transforms.Resize(side, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    files = sorted(Path(run, "pictures").iterdir())

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            pixels = transform(Image.open(files[i % len(files)]).convert("RGB"))
            return pixels, torch.randint(0, 49000, (CONTEXT,))

    batches = iter(torch.utils.data.DataLoader(Images(), batch_size, shuffle=False))
    for _ in range(steps):
        turns.next()
        pixels, ids = next(batches)
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (batch_size,)).long()
        noisy = scheduler.add_noise(latents, noise, t)
        states = text(ids, return_dict=False)[0]
        prediction = unet(noisy, t, states, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    turns.leave()
    return turns.seconds


def bench_diffusers(steps: int, threads: int, side: int, compiled: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        latent_shards(Path(folder) / "latents", 1024, side // 8, 96)
        make_images(Path(folder) / "pictures", 64, side)
        settings = {
            "images": 4 * steps,
            "batch_size": 4,
            "unet": EIGHTH_UNET,
            "threads": threads,
            "log_every_images": 8,
            "checkpoint_every_images": 10**9,
            "initialisation": "torch",
            "compile": compiled,
        }
        pairs = in_turn(functools.partial(peer, folder, settings, side), functools.partial(paced, folder, settings), 3)
    how = "compiled" if compiled else "with its defaults"
    print(f"diffusers   its script's steps {compared(*pairs, 4)} (wanted 1.5), {side} px, ours {how}", flush=True)


# ---- averages, checkpoints, resume -----------------------------------------------------------------


def steps_of(run: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole step, of the averages in it, and of what a save takes from the loop (medians); bytes kept."""
    from shards.dataset import Dataset
    from train import checkpoint, folders
    from train.config import TrainConfig
    from train.engine import Engine
    from train.guard import Guard
    from train.objectives import build
    from train.ranks import join

    config = TrainConfig.model_validate(settings)
    ranks = join(config.threads)
    objective = build("train", config, [Dataset.open(run + "/latents")], 0)
    objective.to(ranks.device)
    micro = config.batch_size // ranks.world
    batch = objective.batch(np.arange(config.batch_size)[ranks.rank :: ranks.world])
    engine, judge = Engine(config, objective, ranks, micro, 1), Guard(None, ranks.device)
    seconds: dict[str, list[float]] = {"step": [], "save": [], "beside a save": [], "update": [], "averages too": []}

    def synchronised() -> float:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        if ranks.world > 1:
            torch.distributed.barrier()
        return time.perf_counter()

    def one() -> float:
        began = synchronised()
        engine.backward(batch)
        engine.rates(1e-4, dict.fromkeys(engine.averages, 0.999))
        engine.step(judge)
        return synchronised() - began

    for _ in range(3):
        one()
    with tempfile.TemporaryDirectory() as folder:
        root = ranks.from_first(folder)
        saver = checkpoint.Saver(root, engine, folders.Keep(2), ranks)
        saver.save(1, {"images": 0, "optimizer_steps": 3})
        saver.finish()
        for i in range(2, 8):
            seconds["step"].append(one())
            began = synchronised()
            saver.save(i, {"images": i, "optimizer_steps": i})
            seconds["save"].append(synchronised() - began)
            seconds["beside a save"].append(one())
            saver.finish()
        kept = max(ranks.gather(sum(t.nbytes for t in saver._copies.values())))
        ranks.gather(None)
    # The optimizer alone, on gradients like its own.
    for flat in engine.flats:
        flat.grad = torch.full_like(flat, 1e-6)
    for i in range(20):
        kind = "averages too" if i % 2 else "update"
        decays = dict.fromkeys(engine.averages, 0.999) if i % 2 else {}
        for group in engine.optimizer.param_groups:
            group["params"], group["decays"] = list(engine.flats), decays
        began = time.perf_counter()
        engine.optimizer.param_groups[:1] and engine.optimizer.step()
        seconds[kind].append(time.perf_counter() - began)
    values = sum(int(np.prod(shape)) for _, shape in engine.parameters())
    return {name: statistics.median(s) for name, s in seconds.items()} | {"kept": kept, "values": values}


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns on the first of `world` ranks, each in a process of its own."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with ProcessPoolExecutor(world, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(_as_rank, rank, world, port, work, *arguments) for rank in range(world)]
        return next(iter([f.result() for f in found]))


def _as_rank(rank: int, world: int, port: int, work: Callable[..., Any], *arguments: Any) -> Any:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in values.items()})
    return work(*arguments)


def bench_steps(which: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        latent_shards(Path(folder) / "latents", 512, 16, 96)
        settings = {"images": 64, "batch_size": 32, "unet": SMALL_UNET, "threads": 1, "initialisation": "torch"}
        for world in (1, 2, 4) if "save" in which else (1,):
            s = on_ranks(world, steps_of, folder, settings)
            if "ema" in which and world == 1:
                added = s["averages too"] - s["update"]
                share = 100 * added / s["step"]
                print(f"ema         {1e3 * added:.2f} ms of {1e3 * s['step']:.0f} ms: {share:.2f} % (wanted 2 %)")
            if "save" in which:
                own = 16 * s["values"] / world  # four states of float32
                print(
                    f"save        {world} ranks: the loop stands still {1e3 * s['save']:.1f} ms, "
                    f"{s['save'] / s['step']:.3f} of a step of {1e3 * s['step']:.0f} ms (wanted 0.1 at 4 ranks); the "
                    f"next one {1e3 * (s['beside a save'] - s['step']):+.0f} ms while it is written; kept by "
                    f"the fullest rank {s['kept'] / 2**20:.1f} MiB, {s['kept'] / own:.2f} of its share (wanted 1.1)",
                    flush=True,
                )


def waits_of(run: str, settings: dict[str, Any], steps: int) -> tuple[float, dict[str, int]]:
    """How often a step calls what would make the host wait, were the tensors on a device; and where from."""
    import collections
    import traceback

    from shards.dataset import Dataset
    from train.config import TrainConfig
    from train.engine import Engine
    from train.guard import Guard
    from train.objectives import build
    from train.ranks import join

    config = TrainConfig.model_validate(settings)
    ranks = join(config.threads)
    objective = build("train", config, [Dataset.open(run + "/latents")], 0)
    engine, judge = Engine(config, objective, ranks, config.batch_size // ranks.world, 1), Guard(8.0)
    found: collections.Counter[str] = collections.Counter()
    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")
    calls = {n: getattr(torch.Tensor, n) for n in names}

    def counting(call: Any) -> Any:
        def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            found[f"{Path(frame.filename).name}:{frame.lineno}"] += 1
            return call(self, *args, **kwargs)

        return counted

    from deepspeed.accelerator import get_accelerator

    kind, synchronize = type(get_accelerator()), type(get_accelerator()).synchronize
    for step in range(steps + 3):
        batch = objective.batch(np.arange(config.batch_size)[ranks.rank :: ranks.world])
        if step == 3:  # ZeRO 3 looks at what the ranks call in its first steps
            for name, call in calls.items():
                setattr(torch.Tensor, name, counting(call))
            kind.synchronize = counting(synchronize)
        engine.backward(batch)
        engine.rates(1e-4, {"ema": 0.999})
        engine.step(judge, False, False)
    kind.synchronize = synchronize
    for name, call in calls.items():
        setattr(torch.Tensor, name, call)
    return sum(found.values()) / steps, dict(found)


def bench_waits() -> None:
    with tempfile.TemporaryDirectory() as folder:
        latent_shards(Path(folder) / "latents", 64, 16, 96)
        for stage in range(4):
            settings = {"images": 64, "batch_size": 4, "unet": SMALL_UNET, "threads": 1, "zero_stage": stage}
            each, where = on_ranks(2, waits_of, folder, settings, 4)
            print(
                f"waits       ZeRO {stage} on 2 ranks: {each:g} a step {where or ''} (wanted 0 for 0 to 2)", flush=True
            )


def bench_resume() -> None:
    from shards.dataset import Dataset
    from train.config import TrainConfig
    from train.latent_samples import Latents
    from train.order import Order

    counts = np.full(200_000, 10_000)
    seconds = {}
    for name, begin in (("start", 0), ("end", int(counts.sum()) - 4096)):
        best = np.inf
        for _ in range(3):
            order = Order(counts, "x", 1024, 256)  # nothing held over from the turn before
            began = time.perf_counter()
            order.locate(np.arange(begin, begin + 256))
            best = min(best, time.perf_counter() - began)
        seconds[name] = best
    a, b = seconds["start"], seconds["end"]
    print(
        f"resume      the place of the first batch in 2e9 samples: start {1e3 * a:.0f} ms, end {1e3 * b:.0f} ms, "
        f"ratio {b / a:.2f} (wanted 1)"
    )
    # From real shards: everything that is opened anew after a kill, up to the first batch.
    size, batch = 8192, 64
    config = TrainConfig(images=size, batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        latent_shards(Path(folder) / "latents", size, 32, 96)
        first: dict[str, list[float]] = {"start": [], "end": []}
        for _ in range(7):
            for name, begin in (("start", 0), ("end", size - batch)):
                began = time.perf_counter()
                latents = Latents(config, [Dataset.open(folder + "/latents")], 0)
                positions = np.arange(begin, begin + batch)
                latents.moments(positions)
                latents.embeddings(positions)
                first[name].append(time.perf_counter() - began)
                latents.close()
    a, b = (statistics.median(first[name]) for name in ("start", "end"))
    print(
        f"            its latents and text, of {size} in shards: start {1e3 * a:.0f} ms, end {1e3 * b:.0f} ms, "
        f"ratio {b / a:.2f} (wanted 1)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["loop", "diffusers", "ema", "save", "waits", "resume"])
    parser.add_argument("--steps", type=int, default=40, help="of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each side, without a GPU")
    parser.add_argument("--compile", action="store_true", help="beside diffusers' script, with train.compile")
    parser.add_argument("--side", type=int, default=256, help="pixels, beside diffusers' script")
    parser.add_argument("--until", type=float, default=0.02, help="half-width of the ratio's interval to stop at")
    given = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{os.cpu_count()} CPUs, {device}, torch {torch.__version__}", flush=True)
    what = tuple(given.what)
    if "loop" in what:
        bench_loop(given.steps, given.threads, given.until)
    if "diffusers" in what:
        bench_diffusers(given.steps, given.threads, given.side, given.compile)
    if {"ema", "save"} & set(what):
        bench_steps(what)
    if "waits" in what:
        bench_waits()
    if "resume" in what:
        bench_resume()


if __name__ == "__main__":
    main()
