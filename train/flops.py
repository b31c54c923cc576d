"""How many floating-point operations an image costs, and how many a second a device has at best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from train.data import Batch
    from train.objective import Objective

# Dense peaks in FLOP/s of the makers' data sheets, by a part of the device's name: (16-bit, fp32 or TF32).
PEAKS = {
    "B200": (2250e12, 1125e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 62.5e12),
    "L4": (121e12, 60e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device at a precision; None where it is not known (CPUs among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    half, single = next((p for part, p in PEAKS.items() if part in name), (None, None))
    return single if precision == "fp32" else half


def count_flops(objective: Objective, batch: Batch) -> float:
    """FLOPs of forward and backward over `batch` (matrix products and convolutions; a multiply-add is two).

    Runs the model once, for real, which costs a few samples' time; its gradients and mode are put back.
    Raises what the model raises where the batch does not fit it.
    """
    objective.eval()  # so that no running statistics move
    try:
        with FlopCounterMode(display=False) as counter:
            objective.probe(batch).backward()
    finally:
        objective.train()
        objective.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())
