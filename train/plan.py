"""What a step will cost, before anything is started: FLOPs and memory on fake tensors, which hold no values.

The objective runs forward and backward under FakeTensorMode with the precision and the activation checkpointing of the
run. FlopCounterMode counts; a dispatch mode follows which storages live. What a rank keeps between steps is arithmetic.
On a device that the kernels' workspace and the allocator's gaps come on top of: `SLACK`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shards.settings import ConfigError
from train.data import Batch, shortened
from train.fit_config import FitConfig

if TYPE_CHECKING:
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
REACHED = 0.3  # of the peak: what published trainings of such UNets reach, for the expected speed
SLACK = 1.1
GIB = 2**30


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device at a precision (TF32's for fp32, see engine.py); None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    half, single = next((p for part, p in PEAKS.items() if part in name), (None, None))
    return single if precision == "fp32" else half


class Live(TorchDispatchMode):
    """The bytes of storages that were made under it and still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation makes."""
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage()) not in self._known:
                size = self._known[storage] = storage.nbytes()
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.bytes -= size


@dataclasses.dataclass(frozen=True)
class Plan:
    """flops: of one image, forward and backward. activations: bytes of one micro-batch at their peak, beside weights
    and gradients. kept: bytes that a rank keeps on its device. host: bytes that it keeps in main memory."""

    flops: float
    activations: int
    kept: int
    host: int
    values: int

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        return int((self.activations + self.kept) * SLACK)


def plan(objective: Objective, batch: Batch, config: FitConfig, precision: str, micro: int, world: int) -> Plan:
    """The cost of a step with micro-batches of `micro` samples like those of `batch`, on `world` ranks.

    Reckoned as a CPU would do it, whose autocast stands in for any device's; the objective's weights are not touched.
    Raises what the model raises where the batch does not go through it.
    """
    size = min(len(next(iter(batch.values()))), 2)
    usual = shortened(batch, config)  # and as long as captions may be, which is what must fit
    small = _run(objective, usual, size, precision, checkpointing=False, live=False)
    large = _run(objective, batch, micro, precision, config.activation_checkpointing, live=True)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    kept, host = memory(trained, frozen, config, world)
    return Plan(small[0] / size, large[1], kept, host, trained)


def _run(
    objective: Objective, batch: Batch, samples: int, precision: str, checkpointing: bool, live: bool
) -> tuple[float, int]:
    """(FLOPs, bytes at the peak beside weights and gradients) of a step on fake tensors."""
    from train.engine import DTYPES

    # What forward keeps on itself must not be fake tensors: a copy without copying what it holds.
    shadow = copy.copy(objective)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        state = {n: _fake(t) for n, t in [*objective.named_parameters(), *objective.named_buffers()]}
        given = {n: torch.empty((samples, *t.shape[1:]), dtype=t.dtype) for n, t in batch.items()}
    cast = contextlib.nullcontext()
    if precision in DTYPES:
        cast = torch.autocast("cpu", DTYPES[precision])
    was = [m.gradient_checkpointing for m in objective.modules() if hasattr(m, "gradient_checkpointing")]
    counter, lives = FlopCounterMode(display=False), Live()
    watch: Any = lives if live else counter
    training = objective.training
    shadow.train()
    for module in shadow.modules():
        if hasattr(module, "module_dropout"):  # peft's LoHa and LoKr ask a random value, which no fake tensor has
            module.training = False
    try:
        if checkpointing:
            objective.checkpoint_activations()
        with mode, _reparametrize_module(shadow, state):
            for p in state.values():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p)  # there from the start, so that they are not counted
            with watch:
                with cast:
                    loss = shadow.probe(given)
                loss.backward()
    finally:
        shadow.train(training)
        marked = [m for m in objective.modules() if hasattr(m, "gradient_checkpointing")]
        for module, value in zip(marked, was, strict=False):
            module.gradient_checkpointing = value
    return (0.0, lives.peak) if live else (float(counter.get_total_flops()), 0)


def _fake(t: torch.Tensor) -> torch.Tensor:
    found = torch.empty(t.shape, dtype=t.dtype)
    return found.requires_grad_() if t.requires_grad else found


def memory(trained: int, frozen: int, config: FitConfig, world: int) -> tuple[int, int]:
    """Bytes that a rank keeps (on its device, in main memory) of a model of so many values, between two steps.

    Weights and gradients in fp32; the optimizer's fp32 values, moments and averages are this rank's share.
    """
    stage = config.zero_stage
    share = trained / world
    weights = 4 * (trained if stage < 3 else share) + 4 * (frozen if stage < 3 else frozen / world)
    # Under ZeRO 1 the whole gradients are there in the end, and under 2 as long as the backward pass goes.
    gradients = 4 * (trained if stage < 3 else share)
    buckets = 4 * 2 * min(trained, 200_000_000) if stage and world > 1 else 0
    moments = {"adamw": 8.0, "muon": 4.0, "adamw8bit": 2.03}[config.optimizer]
    averages = 4 * (1 + len(config.ema_stds))
    states = (moments + averages) * (share if stage else trained) + (4 * share if stage in (1, 2) else 0)
    if config.offload == "cpu":
        return int(weights + gradients + buckets), int(states + 4 * share)
    return int(weights + gradients + buckets + states), 0


def describe(found: Plan, config: FitConfig, precision: str, device: torch.device, world: int, micro: int) -> str:
    """The plan for a person, a line each for the work and for the memory."""
    peak = peak_flops(device, precision)
    speed = f"; at {REACHED:.0%} of the peak {REACHED * peak * world / found.flops:,.0f} images/s" if peak else ""
    lines = [
        f"{found.values / 1e6:,.1f} M trained values, {found.flops / 1e9:,.1f} GFLOP an image, {precision}{speed}",
        f"a rank keeps {found.kept / GIB:.2f} GiB, and needs {found.activations / GIB:.2f} GiB for {micro} images"
        + (f" and {found.host / GIB:.2f} GiB of main memory" if found.host else ""),
    ]
    return "\n".join(f"plan: {line}" for line in lines)


def require_room(found: Plan, config: FitConfig, capacity: int, stage: str, micro: int, world: int) -> None:
    """Raises ConfigError where a step cannot fit into `capacity` bytes of a device, naming what would help."""
    if found.device <= capacity:
        return
    helps = []
    if not config.activation_checkpointing and found.activations > found.device - capacity:
        helps.append(f"{stage}.activation_checkpointing: true")
    if micro > 1 and found.activations > found.device - capacity:
        per_sample = found.activations / micro
        fits = int((capacity / SLACK - found.kept) / per_sample)
        while fits > 1 and config.batch_size // world % fits:
            fits -= 1
        if fits >= 1:
            helps.append(f"{stage}.micro_batch_size: {fits}")
    for stage_ in range(config.zero_stage + 1, 4):
        other = config.model_copy(update={"zero_stage": stage_, "compile": False})
        if world > 1 and (memory(found.values, 0, other, world)[0] + found.activations) * SLACK <= capacity:
            helps.append(f"{stage}.zero_stage: {stage_}")
            break
    if config.offload == "none":
        other = config.model_copy(update={"offload": "cpu", "zero_stage": max(config.zero_stage, 1)})
        if (memory(found.values, 0, other, world)[0] + found.activations) * SLACK <= capacity:
            helps.append(f"{stage}.offload: cpu")
    advice = f"set {', or '.join(helps)}" if helps else "train on more ranks, or a smaller model"
    raise ConfigError(
        f"{stage}: a step needs about {found.device / GIB:.1f} GiB on each device, which has {capacity / GIB:.1f} GiB "
        f"({found.kept / GIB:.1f} kept, {found.activations / GIB:.1f} for a micro-batch of {micro}); {advice}"
    )
