"""One GPU, one script, a few minutes: python -m benchmarks.gpu [--out FOLDER] [--minutes 4.8] [--only PART ...]

A short proof of correctness first: the engine's steps beside a plain PyTorch loop, with every wait of the host made an
error (the parts `step_*`, `fp16_scale` and `checkpoints` prove more and run where --only names them). Then speed: the
measured peak of a matrix product; the VAE's and the text encoder's images a second for latents; our loop's steps and a
bare PyTorch loop's in turn, with a profile of each; Stable Diffusion 2's UNet at 256 and 512 px from stored embeddings
and from tokens at several batch sizes; images a second; SDXL's UNet at 1024 px; what a save costs; and last the
compiled UNet. Utilisation is counted FLOPs over the data sheet's and over the measured peak.

Every part has a time limit of its own and is allowed to fail; what there is so far is written to <out>/gpu.json after
each. Without a GPU the same parts run at toy size, to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SD2 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280, 1280],
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TOY = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_H_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
STEPS, BATCH, DECAY, RATE, CLIP = 8, 8, 0.9, 1e-3, 0.5
BAD = {3: math.nan, 6: 80.0}


# ---- an objective without data ---------------------------------------------------------------------


def objective_of(
    unet_config: dict[str, Any], side: int, tower: nn.Module | None = None, seed: int = 0, device: str | None = None
) -> Any:
    """A denoising objective on random numbers, the same at every use. tower: encodes tokens within the step."""
    from diffusers import UNet2DConditionModel

    from train.objective import Objective

    class Synthetic(Objective):
        figures = ("mse",)

        def __init__(self) -> None:
            torch.manual_seed(seed)
            with torch.device(device or DEVICE):
                unet = UNet2DConditionModel(**unet_config)
            super().__init__(unet, unet_config, None)
            self.tower = [tower]  # in a list, so that it is no part of what is trained
            self.channels_last = False
            self.sized = unet_config.get("addition_embed_type") == "text_time"
            self.register_buffer("levels", torch.linspace(0.02, 0.98, 1000), persistent=False)

        def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
            n, width = len(positions), unet_config["cross_attention_dim"]
            g = torch.Generator().manual_seed(int(positions[0]) % 8)
            found = {
                "x0": torch.randn(n, 4, side, side, generator=g),
                "noise": torch.randn(n, 4, side, side, generator=g),
                "t": torch.randint(0, 1000, (n,), generator=g),
                "times": torch.ones(n),
            }
            if tower is None:
                found["text"] = torch.randn(n, 77, width, generator=g)
            else:
                found["tokens"] = torch.randint(1, 49000, (n, 77), generator=g)
            if self.sized:
                found |= {"pooled": torch.randn(n, 1280, generator=g), "sizes": torch.full((n, 6), 1024.0)}
            return found

        def keys(self, positions: np.ndarray) -> list[str]:
            return [str(p) for p in positions]

        def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            level = self.levels[batch["t"]].reshape(-1, 1, 1, 1)
            xt = (1 - level) * batch["x0"] + level * batch["noise"]
            if self.channels_last:
                xt = xt.contiguous(memory_format=torch.channels_last)
            if self.tower[0] is None:
                text = batch["text"]
            else:
                with torch.no_grad():
                    text = encode(self.tower[0], batch["tokens"])
            added_cond = {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]} if self.sized else None
            output = self.model(xt, batch["t"], text, added_cond_kwargs=added_cond, return_dict=False)[0]
            loss = (output.float() - batch["noise"]).square().mean() * batch["times"][0]
            return loss, loss.detach()[None]

    return Synthetic()


def encode(tower: Any, tokens: torch.Tensor) -> torch.Tensor:
    """open_clip's text tower up to its last block: tokens int64 [B,77] -> [B,77,width]."""
    x = tower.token_embedding(tokens) + tower.positional_embedding
    return tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))


def clip_tower() -> Any:
    """The text half of ViT-H/14, random weights, bf16 where that is fast."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
    text = CLIP_H_TEXT if CUDA else {**CLIP_H_TEXT, "width": 16, "heads": 2, "layers": 2}
    with torch.device(DEVICE):
        clip = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)
    return clip.to(torch.bfloat16) if CUDA else clip


# ---- the frame -------------------------------------------------------------------------------------

STARTED = time.monotonic()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Report:
    """What was found, written after each part."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.file, self.ends = out / "gpu.json", STARTED + 60 * minutes
        self.found: dict[str, Any] = {"parts": {}, "machine": machine()}
        out.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, limit_s: float, work: Callable[[], Any]) -> None:
        left = self.ends - time.monotonic()
        began = time.monotonic()
        entry: dict[str, Any] = {}
        if left < min(limit_s, 20):
            entry["skipped"] = f"{left:.0f} s were left"
        else:
            try:
                with limited(min(limit_s, left)):
                    entry["result"] = work()
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt):
                    raise
                frames = traceback.extract_tb(e.__traceback__)[-6:]
                entry["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:600]}"
                entry["where"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
                clean = getattr(e, "partial", None)
                if clean:
                    entry["partial"] = clean
        free()
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.found["parts"][name] = entry
        self.file.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")
        print(
            f"{name:24} {entry['seconds']:6.1f} s  {json.dumps(entry.get('result', entry), default=str)[:900]}",
            flush=True,
        )


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Context that raises TimeoutError after so long."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: where it rings within a callback of the interpreter's, the error is dropped.
    signal.setitimer(signal.ITIMER_REAL, seconds, 3.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free() -> None:
    gc.collect()
    if CUDA:
        with contextlib.suppress(RuntimeError):
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def machine() -> dict[str, Any]:
    import deepspeed
    import diffusers

    found = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "diffusers": diffusers.__version__}
    found |= {"python": sys.version.split()[0], "cpus": os.cpu_count()}
    if CUDA:
        free_, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(), "memory_gib": total / 2**30, "free_gib": free_ / 2**30}
    return found


def synchronised() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def config_of(**changes: Any) -> Any:
    from train.fit_config import FitConfig

    values = {"images": 10**9, "batch_size": BATCH, "eps": 1e-4, "grad_clip": CLIP, "learning_rate": RATE}
    return FitConfig.model_validate(values | {"warmup_images": 0, "schedule": "constant"} | changes)


def engine_of(objective: Any, **changes: Any) -> Any:
    from train.engine import Engine

    config = config_of(**changes)
    parts = changes.get("accumulation_", 1)
    return Engine(config, objective.to(RANKS.device), RANKS, config.batch_size // parts, parts)


# ---- correctness -----------------------------------------------------------------------------------


def sample(objective: Any, step: int) -> dict[str, torch.Tensor]:
    batch = objective.batch(np.arange(step * BATCH, (step + 1) * BATCH))
    batch["times"] = torch.full((BATCH,), BAD.get(step, 1.0))
    return {k: v.to(DEVICE) for k, v in batch.items()}


def plain(optimizer: str, precision: str = "fp32") -> dict[str, torch.Tensor]:
    """Eight steps in plain PyTorch, decided on the host; the vetoed ones left out."""
    from train import muon
    from train.optimizer import parameter_groups

    objective = objective_of(TOY, 8).to(DEVICE).train()
    model = objective.model
    groups = parameter_groups(model, 0.01, optimizer)
    hidden = [p for g in groups if g.get("muon") for p in g["params"]]
    adam = torch.optim.AdamW([g for g in groups if not g.get("muon")], lr=RATE, betas=(0.9, 0.99), eps=1e-4)
    momentum = [torch.zeros_like(p) for p in hidden]
    for step in range(STEPS):
        if step in BAD:
            continue
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = objective(sample(objective, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        with torch.no_grad():
            for p, m in zip(hidden, momentum, strict=True):
                m.lerp_(p.grad, 1 - muon.BETA)
                blend = p.grad.lerp(m, muon.BETA).view(1, *muon.as_matrix(p.shape))
                p.mul_(1 - RATE * 0.01).sub_(RATE * muon.direction(blend).view_as(p))
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def stepped(strict: bool, **changes: Any) -> tuple[Any, list[int], list[int], list[str]]:
    """(engine, vetoed steps, steps where a veto moved something or another moved nothing, waits of the host)."""
    from train import guard as guards
    from train.guard import Guard

    guards.WARM_UP = 2
    objective = objective_of(TOY, 8)
    engine = engine_of(objective, **changes)
    judge = Guard(8.0, RANKS.device)
    vetoed, moved, waited = [], [], []
    for step in range(STEPS):
        batch = sample(objective, step)
        before = [v.clone() for _, _, v in engine.arrays()]
        synchronised()
        if strict and CUDA and step > 0:  # kernels are loaded at the first
            torch.cuda.set_sync_debug_mode("error")
        try:
            engine.backward(batch)
            engine.rates(RATE, {"ema": DECAY})
            outcome = engine.step(judge, False)
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
        same = all(torch.equal(a, b) for a, (_, _, b) in zip(before, engine.arrays(), strict=True))
        if not bool(outcome.applied):
            vetoed.append(step)
        if same != (not bool(outcome.applied)):
            moved.append(step)
    return engine, vetoed, moved, waited


def weights_of(engine: Any, name: str = "weights") -> dict[str, torch.Tensor]:
    """One rank has all pieces."""
    flats, found = engine.values(name), {}
    for p in engine.pieces:
        full = found.setdefault(p.name, torch.full(p.shape, math.nan, device=flats[p.flat].device))
        full.view(-1)[p.offset : p.offset + p.length] = flats[p.flat].narrow(0, p.start, p.length)
    return found


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n] - b[n].to(a[n].device)).abs().max()) for n in b)


def correctness(optimizer: str, precision: str, stages: Sequence[int] = range(4)) -> dict[str, Any]:
    """Beside the plain loop, under these stages, with waits an error (and without, where they are ones)."""
    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    reference, result = plain(optimizer, precision), {}
    for stage in stages:
        entry: dict[str, Any] = {}
        try:
            engine, vetoed, moved, _ = stepped(stage < 3, zero_stage=stage, optimizer=optimizer, precision=precision)
            entry["host_waits"] = 0 if stage < 3 else "not watched"
        except RuntimeError as e:
            frames = [f for f in traceback.extract_tb(e.__traceback__) if "torch/" not in f.filename][-3:]
            entry["waits"] = f"{' '.join(str(e).split())[:200]} at " + " < ".join(
                f"{Path(f.filename).name}:{f.lineno}" for f in frames
            )
            free()
            engine, vetoed, moved, _ = stepped(False, zero_stage=stage, optimizer=optimizer, precision=precision)
        entry |= {"vetoed": vetoed, "moved_wrongly": moved, "off": far(weights_of(engine), reference)}
        entry["right"] = vetoed == sorted(BAD) and not moved and entry["off"] < (5e-3 if precision == "bf16" else 1e-4)
        engine.destroy()
        result[f"zero_{stage}"] = entry
        free()
    return result


def fp16() -> dict[str, Any]:
    """The loss scale comes down from where gradients overflow, and no step is taken until then."""
    if not CUDA:
        return {"right": None, "why": "fp16 is slow on a CPU; tests hold it there"}
    from train import engine as engines
    from train.guard import Guard

    before, engines.FIRST_SCALE = engines.FIRST_SCALE, 2.0**40
    try:
        engine = engine_of(objective_of(TOY, 8), zero_stage=1, precision="fp16")
        judge, overflows = Guard(None, RANKS.device), 0
        for _ in range(40):
            engine.backward({**sample(engine.objective, 0), "times": torch.ones(BATCH, device=DEVICE)})
            engine.rates(RATE, {"ema": DECAY})
            outcome = engine.step(judge, False)
            overflows += bool(outcome.overflow)
        return {"overflows": overflows, "scale": float(engine.scale), "right": 5 < overflows < 40}
    finally:
        engines.FIRST_SCALE = before


def checkpoints() -> dict[str, Any]:
    """Written under one stage, read under another, bit for bit; and how long a save makes the loop stand still."""
    from train import checkpoint, folders

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for stage, other in ((1, 3), (2, 0), (3, 1)):
            engine, _, _, _ = stepped(False, zero_stage=stage, optimizer="muon")
            saver = checkpoint.Saver(f"{root}/{stage}", engine, folders.Keep(2), RANKS)
            saver.save(8, {"images": 64, "optimizer_steps": 6})
            saver.finish()
            saved = {n: weights_of(engine, n) for n in ("weights", "ema")}
            folder, manifest = checkpoint.newest(f"{root}/{stage}", RANKS) or ("", {})
            second = engine_of(objective_of(TOY, 8, seed=1), zero_stage=other, optimizer="muon")
            checkpoint.load(folder, manifest, second)
            result[f"zero_{stage}_to_{other}"] = max(far(weights_of(second, n), saved[n]) for n in saved)
            result[f"export_{stage}"] = far(
                {n: v.to(DEVICE) for n, v in checkpoint.load_weights(folder, "ema").items()}, saved["ema"]
            )
            free()
    result["right"] = all(v == 0.0 for k, v in result.items())
    return result


def save_stall() -> dict[str, Any]:
    """Of a quarter of SD 2's UNet, on one rank: what a save takes from the loop, the second time (memory is kept)."""
    from train import checkpoint, folders

    wide = {**SD2, "block_out_channels": [160, 320, 640, 640]} if CUDA else TOY
    engine = engine_of(objective_of(wide, 32 if CUDA else 8), zero_stage=1, precision="auto")
    values = sum(p.length for p in engine.pieces)
    seconds = []
    with tempfile.TemporaryDirectory() as root:
        saver = checkpoint.Saver(root, engine, folders.Keep(2), RANKS)
        for step in range(1, 4):
            began = synchronised()
            saver.save(step, {"images": step, "optimizer_steps": 0})
            seconds.append(synchronised() - began)
            saver.finish()
    return {"values_m": values / 1e6, "states": 4, "first_s": seconds[0], "stall_s": statistics.median(seconds[1:])}


def whole_loop() -> dict[str, Any]:
    """train/main.py's own loop on a tiny run on disk: to the end, and on from the middle to the same weights."""
    import shutil

    import train.finish
    import train.main
    from tests.train import tiny
    from train import checkpoint, folders

    with tempfile.TemporaryDirectory() as root:
        result: dict[str, Any] = {}
        ends = []
        train.finish.finish = lambda *a, **k: None  # the export needs encoders
        for name in ("once", "again"):
            run = Path(root) / name
            run.mkdir()
            tiny.make_latents(run / "latents")
            config = tiny.write_config(run, tiny.configuration(run, precision="auto", images=48))
            train.main.run("train", str(config))
            if name == "again":
                for folder in folders.folders(str(run / "checkpoints"))[:-1]:
                    shutil.rmtree(folder)
                train.main.run("train", str(config))
            newest = folders.latest_complete(str(run / "checkpoints"))
            assert newest
            ends.append(checkpoint.load_weights(newest, "ema"))
            result[name] = json.loads((run / "train" / "log.jsonl").read_text().splitlines()[-1])
        result["off"] = far(*ends)
        result["right"] = result["off"] < 1e-3
        return result


# ---- speed -----------------------------------------------------------------------------------------


def matmul_peak() -> dict[str, float]:
    """TFLOP/s of a bf16 and of a TF32 matrix product on random numbers."""
    n, result = (8192 if CUDA else 256), {}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        began = synchronised()
        for _ in range(10):
            a @ b
        result[name] = 10 * 2 * n**3 / (synchronised() - began) / 1e12
    return result


def planned(unet_config: dict[str, Any], side: int, checkpointing: bool) -> dict[str, float]:
    """In a process of its own: FLOPs of an image, bytes of activations a sample, trained values."""
    from train import plan

    objective = objective_of(unet_config, side, device="meta")
    config = config_of(batch_size=4, activation_checkpointing=checkpointing)
    found = plan.plan(objective, objective.batch(np.arange(4)), config, "bf16", 4, 1)
    return {"flops": found.flops, "activations": found.activations / 4, "values": found.values}


def speed(
    unet: dict[str, Any],
    side: int,
    counted: Future[dict[str, float]],
    peak: dict[str, float],
    sizes: Sequence[int],
    changes: dict[str, Any],
    tokens: bool = False,
    checkpointing: bool = False,
    first: bool = False,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Images/s, memory and utilisation of the loop's own hot path at each batch size up to what fits.

    first: only the first of the sizes that fits. channels_last: once more so, at the fastest size.
    """
    plan = counted.result(timeout=60)  # of a part that was not named there is none, and nobody asks
    result: dict[str, Any] = {"gflop_an_image": plan["flops"] / 1e9}
    try:
        for size in sizes:
            found = _or_too_large(unet, side, size, plan["flops"], peak, changes, tokens, checkpointing)
            free()  # only now: an error holds the frames that it came through
            result[f"batch_{size}"] = found or {"failed": "out of memory"}
            if bool(found) == first:
                break
        ran = {n: r["images_per_s"] for n, r in result.items() if isinstance(r, dict) and "images_per_s" in r}
        if channels_last and ran:
            best = max(ran, key=lambda n: ran[n])
            size = int(best.removeprefix("batch_"))
            again = {**changes, "channels_last": True}
            found = _or_too_large(unet, side, size, plan["flops"], peak, again, tokens, checkpointing)
            result[f"channels_last_{best}"] = found or {"failed": "out of memory"}
    except BaseException as e:
        e.partial = result
        raise
    return result


def _or_too_large(*arguments: Any) -> dict[str, Any] | None:
    try:
        return one_speed(*arguments)
    except torch.OutOfMemoryError:
        return None


def beside_bare(batch: int, out: Path) -> dict[str, Any]:
    """Seconds of our loop's steps and of a bare loop's, in turn, on the same batch in memory; a profile of each.

    Bare: autocast in bf16, backward, clip_grad_norm_, torch's fused AdamW. Ours clips, guards, averages and reports.
    ratio: the bare loop's seconds over ours, median of the pairs of steps. host_s: until the last call of a step
    returned, the device not waited for. device_s: what the device was busy, of the profiled step.
    """
    from train.guard import Guard
    from train.optimizer import parameter_groups
    from train.run import Late, Run

    unet, side, pairs = (SD2, 32, 10) if CUDA else (TOY, 8, 3)
    plain_ = objective_of(unet, side).to(DEVICE).train()
    weights = list(plain_.model.parameters())
    adam = torch.optim.AdamW(parameter_groups(plain_.model, 0.01), lr=1e-4, fused=True)
    data = {k: v.to(DEVICE) for k, v in plain_.batch(np.arange(batch)).items()}

    def bare() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, _ = plain_(data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        adam.step()
        adam.zero_grad(set_to_none=True)

    result: dict[str, Any] = {"batch": batch, "parameters": len(weights)}
    try:
        for stage in (0, 1):
            engine = engine_of(objective_of(unet, side), batch_size=batch, precision="bf16", zero_stage=stage)
            judge, late, taken = Guard(None, RANKS.device), Late(RANKS.device), [0]

            def ours(engine: Any = engine, judge: Any = judge, late: Any = late, taken: Any = taken) -> None:
                engine.backward(data)
                engine.rates(1e-4, {"ema": DECAY})
                list(late.read(engine.step(judge, False, False), Run(taken[0], taken[0]), 1e-4, False))
                taken[0] += 1

            times: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
            for i in range(pairs + 3):
                for name, step in (("bare", bare), ("ours", ours)):
                    began = synchronised()
                    step()
                    host = time.perf_counter() - began
                    if i >= 3:
                        times[name].append((host, synchronised() - began))
            entry: dict[str, Any] = {}
            for name, both in times.items():
                entry[name] = {"host_s": statistics.median(h for h, _ in both)}
                entry[name]["step_s"] = statistics.median(s for _, s in both)
            ratios = [b[1] / o[1] for b, o in zip(times["bare"], times["ours"], strict=True)]
            entry |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            result[f"zero_{stage}"] = entry
            for name, step in (("bare", bare), ("ours", ours)):
                if stage == 0 or name == "ours":
                    entry[name] |= profiled(step, out / f"profile_{name}{stage if name == 'ours' else ''}.txt")
            engine.destroy()
            del engine, ours, step, judge, late
            free()
    except BaseException as e:
        e.partial = result
        raise
    return result


def profiled(step: Callable[[], None], file: Path) -> dict[str, Any]:
    """Of one step: its operators, launches and seconds of the device; the 25 operators that cost most go to `file`."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as found:
        step()
        synchronised()
    sums = found.key_averages()
    file.write_text(
        sums.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
        + sums.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60),
        encoding="utf-8",
    )
    named = [e for e in sums if e.key.startswith("aten::")]
    kernels = [e for e in sums if str(e.device_type).endswith("CUDA") and not getattr(e, "is_user_annotation", False)]
    busy = sum(e.self_device_time_total for e in kernels)
    launches = sum(e.count for e in sums if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    return {"operators": sum(e.count for e in named), "kernel_launches": launches, "device_s": busy / 1e6}


def one_speed(
    unet: dict[str, Any],
    side: int,
    batch: int,
    flops: float,
    peak: dict[str, float],
    changes: dict[str, Any],
    tokens: bool,
    checkpointing: bool,
) -> dict[str, Any]:
    from train.data import Prefetcher
    from train.guard import Guard
    from train.plan import peak_flops
    from train.run import Late, Run

    changes = dict(changes)
    channels_last = changes.pop("channels_last", False)
    torch.backends.cudnn.benchmark = changes.pop("cudnn_benchmark", False)
    objective = objective_of(unet, side, clip_tower() if tokens else None)
    objective.channels_last = channels_last
    began = synchronised()
    precision = "bf16" if CUDA else "fp32"
    engine = engine_of(
        objective,
        batch_size=batch,
        precision=precision,
        activation_checkpointing=checkpointing,
        **({"zero_stage": 0} | changes),  # one rank has nothing to share out
    )
    judge, late, results = Guard(None, RANKS.device), Late(RANKS.device), []
    pool = [objective.batch(np.arange(i * batch, (i + 1) * batch)) for i in range(2)]

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        if CUDA:
            torch.cuda.set_device(RANKS.device)
        for i in range(10**9):
            found = pool[i % 2]
            yield {k: v.pin_memory() for k, v in found.items()} if CUDA else found

    steps, seconds = (11 if CUDA else 4), []
    with Prefetcher(batches(), 3) as prefetcher:
        first = None
        for step in range(steps):
            engine.backward(next(prefetcher))
            engine.rates(RATE, {"ema": DECAY})
            outcome = engine.step(judge, False, False)
            results += list(late.read(outcome, Run(step, step), RATE, step == steps - 1))
            if step == 0:
                first = synchronised() - began
            if step in (3, steps - 1) or not CUDA:
                seconds.append(synchronised())
    each = (seconds[-1] - seconds[0]) / (steps - 4) if CUDA else (seconds[-1] - seconds[0]) / (steps - 1)
    result = {
        "images_per_s": batch / each,
        "step_s": each,
        "first_step_s": first,
        "tflops": batch * flops / each / 1e12,
        "data_wait_s": prefetcher.waited,
        "loss": results[-1].figures[0],
    }
    if CUDA:
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        sheet = peak_flops(RANKS.device, precision)
        result["mfu"] = result["tflops"] * 1e12 / sheet if sheet else None
        result["of_measured_peak"] = result["tflops"] / peak["bf16"] if peak.get("bf16") else None
    engine.destroy()
    del engine
    return result


def vae_speed() -> dict[str, Any]:
    """Images/s of the VAE's encoder, bf16 and channels_last, as latents are made."""
    from diffusers import AutoencoderKL

    config = VAE if CUDA else {**VAE, "block_out_channels": [16, 16, 16, 16], "norm_num_groups": 4}
    with torch.device(DEVICE):
        vae = AutoencoderKL(**config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    result = {}
    for side, batch in ((256, 64), (512, 32)) if CUDA else ((32, 2),):
        x = torch.rand(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            for _ in range(2):
                vae.encode(x)
            began = synchronised()
            for _ in range(5):
                vae.encode(x)
            result[f"{side}px_images_per_s"] = 5 * batch / (synchronised() - began)
    return result


def text_speed() -> dict[str, float]:
    """Captions/s of ViT-H's text tower in bf16."""
    tower, batch = clip_tower(), 256 if CUDA else 4
    tokens = torch.randint(1, 49000, (batch, 77), device=DEVICE)
    with torch.inference_mode():
        for _ in range(2):
            encode(tower, tokens)
        began = synchronised()
        for _ in range(10):
            encode(tower, tokens)
        return {"captions_per_s": 10 * batch / (synchronised() - began)}


def generation_speed() -> dict[str, Any]:
    """Images/s of diffusers' own pipeline with SD 2's networks at 512 px, 50 steps of DPM-Solver++, guidance."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

    dtype = torch.bfloat16 if CUDA else torch.float32
    unet_config = SD2 if CUDA else TOY
    vae_config = VAE if CUDA else {**VAE, "block_out_channels": [16, 16, 16, 16], "norm_num_groups": 4}
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(**unet_config).eval().to(dtype=dtype, memory_format=torch.channels_last)
        vae = AutoencoderKL(**vae_config).eval().to(dtype=dtype, memory_format=torch.channels_last)
    pipeline = StableDiffusionPipeline(
        vae, None, None, unet, DPMSolverMultistepScheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    batch, steps = (8, 50) if CUDA else (1, 2)
    text = torch.randn(batch, 77, unet_config["cross_attention_dim"], device=DEVICE, dtype=dtype)

    def draw(steps: int) -> None:
        pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=text,
            num_inference_steps=steps,
            guidance_scale=5.0,
            output_type="pt",
        )

    draw(2)
    began = synchronised()
    draw(steps)
    return {"pictures_per_s": batch / (synchronised() - began), "batch": batch, "steps": steps, "side": 512}


# ---- all of it -------------------------------------------------------------------------------------

RANKS: Any = None


class AtOnce(Executor):
    """Does what it is given before it returns: models are built with torch's one generator."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **named))
        return done


def run(out: str, minutes: float, only: list[str] | None = None) -> None:
    global RANKS
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Imported before any clock runs: a limit that rang within an import would leave it broken.
    import open_clip  # noqa: F401
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    import train.loop  # noqa: F401
    from train import checkpoint, muon, plan  # noqa: F401
    from train.ranks import join

    RANKS = join(None if CUDA else 1)
    report = Report(Path(out), minutes)
    pool: Executor = ProcessPoolExecutor(3, mp_context=get_context("spawn")) if CUDA else AtOnce()
    big = CUDA
    counts = (
        ("sd2_256", SD2 if big else TOY, 32 if big else 8, False),
        ("sd2_512", SD2 if big else TOY, 64 if big else 16, False),
        ("sdxl_1024", SDXL if big else TOY, 128 if big else 16, True),
    )
    counted = {
        name: pool.submit(planned, *arguments)
        for name, *arguments in counts
        if only is None or any(part.startswith(name) for part in only)
    }
    peak: dict[str, float] = {}
    sd2, sdxl = (SD2, SDXL) if big else (TOY, TOY)

    def measure_peak() -> dict[str, float]:
        peak.update(matmul_peak())
        return peak

    px = (32, 64, 128) if big else (8, 16, 16)
    slower = 1.0 if CUDA else 5.0  # a CPU that others use too only tries the script
    at = {"sd2_256": (64, 128, 192), "sd2_512": (32, 48, 64), "tokens": (128, 64), "xl": (4, 2), "compiled": (128,)}
    if not CUDA:
        at = dict.fromkeys(at, (2, 4))
    small, large, xl = (counted.get(name) or Future() for name in ("sd2_256", "sd2_512", "sdxl_1024"))
    loop_batch = 32 if CUDA else 2

    def compiled() -> dict[str, Any]:
        changes = {"compile": True}
        return speed(sd2, px[0], small, peak, at["compiled"], changes, first=True, channels_last=False)

    # The device's own work goes first, while other processes still count FLOPs: the loop's needs the host.
    parts: list[tuple[str, float, Callable[[], Any]]] = [
        ("adamw_bf16_zero_0", 20, lambda: correctness("adamw", "bf16", [0])),
        ("matmul_peak", 10, measure_peak),
        ("vae", 20, vae_speed),
        ("text", 15, text_speed),
        ("loop", 60, lambda: beside_bare(loop_batch, Path(out))),
        ("sd2_256", 60, lambda: speed(sd2, px[0], small, peak, at["sd2_256"], {})),
        ("sd2_512", 50, lambda: speed(sd2, px[1], large, peak, at["sd2_512"], {})),
        ("sd2_256_tokens", 25, lambda: speed(sd2, px[0], small, peak, at["tokens"], {}, True, False, True, False)),
        ("generation", 30, generation_speed),
        ("sdxl_1024", 40, lambda: speed(sdxl, px[2], xl, peak, at["xl"], {}, False, True, True, False)),
        ("save_stall", 25, save_stall),
        ("sd2_256_compiled", 90, compiled),
    ]
    # Longer proofs, run where they are named.
    further: list[tuple[str, float, Callable[[], Any]]] = [
        ("step_adamw_fp32", 60, lambda: correctness("adamw", "fp32")),
        ("step_muon_fp32", 60, lambda: correctness("muon", "fp32")),
        ("step_adamw_bf16", 40, lambda: correctness("adamw", "bf16")),
        ("fp16_scale", 20, fp16),
        ("checkpoints", 40, checkpoints),
        ("whole_loop", 40, whole_loop),
    ]
    parts += [part for part in further if only and part[0] in only]
    watch = threading.Timer(60 * minutes - (time.monotonic() - STARTED) + 5, lambda: os._exit(3))
    watch.daemon = True  # a part that no signal reaches must not take the others' time: all else is written
    if CUDA:
        watch.start()
    for name, limit, work in parts:
        if only is None or name in only:
            report.part(name, limit * slower, work)
    watch.cancel()
    pool.shutdown(wait=False, cancel_futures=True)
    with contextlib.suppress(Exception):
        RANKS.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--minutes", type=float, default=4.8)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    run(given.out, given.minutes, given.only)


if __name__ == "__main__":
    main()
