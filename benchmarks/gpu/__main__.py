"""One GPU, one script, a few minutes: python -m benchmarks.gpu [--out FOLDER] [--minutes 4.8] [--only PART ...]

A short proof of correctness first: the engine's steps beside a plain PyTorch loop, with every wait of the host made an
error (the parts `step_*`, `fp16_scale` and `checkpoints` prove more and run where --only names them). Then speed: the
measured peak of a matrix product; the VAE's and the text encoder's images a second for latents; our loop's steps and a
bare PyTorch loop's in turn, with a profile of each; Stable Diffusion 2's UNet at 256 and 512 px from stored embeddings
and from tokens at several batch sizes; images a second; SDXL's UNet at 1024 px; what a save costs; and last the
compiled UNet. Utilisation is counted FLOPs over the data sheet's and over the measured peak.

Every part has a process and a time limit of its own and is allowed to fail: with its process ends what it held of the
device. What there is so far is written to <out>/gpu.json after each. Without a GPU the same parts run at toy size, to
try the script.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.apart import Apart
from benchmarks.gpu.frame import Report, machine
from benchmarks.gpu.models import CUDA, SD2, SDXL, TOY
from benchmarks.gpu.proofs import checkpoints, correctness, fp16, save_stall, whole_loop
from benchmarks.gpu.speed import beside_bare, generation_speed, matmul_peak, planned, speed, text_speed, vae_speed

SLOWER = 1.0 if CUDA else 5.0  # a CPU that others use too only tries the script
COUNT_S = 60.0 * SLOWER


def run(out: str, minutes: float, only: list[str] | None = None) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sd2, sdxl = (SD2, SDXL) if CUDA else (TOY, TOY)
    counts = {
        "sd2_256": (sd2, 32 if CUDA else 8, False),
        "sd2_512": (sd2, 64 if CUDA else 16, False),
        "sdxl_1024": (sdxl, 128 if CUDA else 16, True),
    }
    asked = {n for n in counts if only is None or any(part.startswith(n) for part in only)}
    at = {"sd2_256": (64, 128, 192), "sd2_512": (32, 48, 64), "tokens": (128, 64), "xl": (4, 2), "compiled": (128,)}
    if not CUDA:
        at = dict.fromkeys(at, (2, 4))
    with Report(Path(out), minutes) as report:
        counting = {n: Apart() for n in counts if n in asked}
        for name, process in counting.items():
            process.begin(partial(planned, *counts[name]), COUNT_S)
        counted: dict[str, dict[str, float]] = {}

        def flops(name: str) -> dict[str, float]:
            if name not in counted:
                found = counting[name].result(report.left)
                if "result" not in found:
                    raise RuntimeError(f"its FLOPs were not counted: {found}")
                counted[name] = found["result"]
            return counted[name]

        def steps(name: str, sizes: str, changes: dict[str, Any] | None = None, **how: bool) -> Callable[[], Any]:
            unet, side, checkpointing = counts[name]
            peak = report.result("matmul_peak")
            how = {"checkpointing": checkpointing} | how
            return partial(speed, unet, side, flops(name), peak, at[sizes], changes or {}, **how)

        def always(work: Callable[..., Any], *arguments: Any) -> Callable[[], Callable[[], Any]]:
            return lambda: partial(work, *arguments)

        # The device's own work goes first, while other processes still count FLOPs: the loop's needs the host.
        parts: list[tuple[str, float, Callable[[], Callable[[], Any]]]] = [
            ("machine", 20, always(machine)),
            ("adamw_bf16_zero_0", 20, always(correctness, "adamw", "bf16", [0])),
            ("matmul_peak", 10, always(matmul_peak)),
            ("vae", 20, always(vae_speed)),
            ("text", 15, always(text_speed)),
            ("loop", 60, always(beside_bare, 32 if CUDA else 2, Path(out))),
            ("sd2_256", 60, lambda: steps("sd2_256", "sd2_256")),
            ("sd2_512", 50, lambda: steps("sd2_512", "sd2_512")),
            ("sd2_256_tokens", 25, lambda: steps("sd2_256", "tokens", tokens=True, first=True, channels_last=False)),
            ("generation", 30, always(generation_speed)),
            ("sdxl_1024", 60, lambda: steps("sdxl_1024", "xl", first=True, channels_last=False)),
            ("save_stall", 25, always(save_stall)),
            # Last, with whatever time is left: how long a compile takes is a part of what is asked.
            ("sd2_256_compiled", 400, lambda: steps("sd2_256", "compiled", {"compile": True}, channels_last=False)),
        ]
        # Longer proofs, run where they are named.
        further: list[tuple[str, float, Callable[[], Callable[[], Any]]]] = [
            ("step_adamw_fp32", 60, always(correctness, "adamw", "fp32")),
            ("step_muon_fp32", 60, always(correctness, "muon", "fp32")),
            ("step_adamw_bf16", 40, always(correctness, "adamw", "bf16")),
            ("fp16_scale", 20, always(fp16)),
            ("checkpoints", 40, always(checkpoints)),
            ("whole_loop", 40, always(whole_loop)),
        ]
        try:
            for name, limit, work in [*parts, *(part for part in further if only and part[0] in only)]:
                if only is None or name in only or name == "machine":
                    report.part(name, limit * SLOWER, work)
        finally:
            for process in counting.values():
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--minutes", type=float, default=4.8)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    run(given.out, given.minutes, given.only)


if __name__ == "__main__":
    main()
