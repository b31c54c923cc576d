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
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu.frame import STARTED, Report, ranks
from benchmarks.gpu.models import CUDA, SD2, SDXL, TOY
from benchmarks.gpu.proofs import checkpoints, correctness, fp16, save_stall, whole_loop
from benchmarks.gpu.speed import beside_bare, generation_speed, matmul_peak, planned, speed, text_speed, vae_speed


class AtOnce(Executor):
    """Does what it is given before it returns: models are built with torch's one generator."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **named))
        return done


def run(out: str, minutes: float, only: list[str] | None = None) -> None:
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

    ranks()
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
        ranks().leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--minutes", type=float, default=4.8)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    run(given.out, given.minutes, given.only)


if __name__ == "__main__":
    main()
