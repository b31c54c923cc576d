"""Speed: the loop's steps, a bare loop's, encoders and generation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.frame import (
    CLIP,
    DECAY,
    RATE,
    config_of,
    engine_of,
    free,
    ranks,
    synchronised,
)
from benchmarks.gpu.models import CUDA, DEVICE, SD2, TOY, VAE, clip_tower, encode, objective_of


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
    plan: dict[str, float],
    peak: dict[str, float],
    sizes: Sequence[int],
    changes: dict[str, Any],
    tokens: bool = False,
    checkpointing: bool = False,
    first: bool = False,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Images/s, memory and utilisation of the loop's own hot path at each batch size up to what fits.

    plan: of planned(). first: only the first of the sizes that fits. channels_last: once more so, at the fastest size.
    """
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
            judge, late, taken = Guard(None, ranks().device), Late(ranks().device), [0]

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
    judge, late, results = Guard(None, ranks().device), Late(ranks().device), []
    pool = [objective.batch(np.arange(i * batch, (i + 1) * batch)) for i in range(2)]

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        if CUDA:
            torch.cuda.set_device(ranks().device)
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
        sheet = peak_flops(ranks().device, precision)
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
