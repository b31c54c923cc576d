"""Proofs: the engine's steps beside a plain PyTorch loop, its checkpoints, the whole loop."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.frame import (
    BATCH,
    CLIP,
    DECAY,
    RATE,
    STEPS,
    engine_of,
    free,
    ranks,
    synchronised,
)
from benchmarks.gpu.models import CUDA, DEVICE, SD2, TOY, objective_of

BAD = {3: math.nan, 6: 80.0}


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
    judge = Guard(8.0, ranks().device)
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
        judge, overflows = Guard(None, ranks().device), 0
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
            saver = checkpoint.Saver(f"{root}/{stage}", engine, folders.Keep(2), ranks())
            saver.save(8, {"images": 64, "optimizer_steps": 6})
            saver.finish()
            saved = {n: weights_of(engine, n) for n in ("weights", "ema")}
            folder, manifest = checkpoint.newest(f"{root}/{stage}", ranks()) or ("", {})
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
        saver = checkpoint.Saver(root, engine, folders.Keep(2), ranks())
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
