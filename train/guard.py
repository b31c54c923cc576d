"""Steps that must not be taken: a loss or a gradient that is not finite, or far above what it has been.

The judgement and its memory are tensors, so that the device decides while the host is ahead. All ranks judge the same
numbers, so all skip together; the memory is part of the checkpoint, so that a resumed run skips the same steps. After
some skips in a row the weights are bad, not the samples, and they go back to the last checkpoint while the order of
samples goes on (as PaLM's trainers did, Chowdhery et al. 2022, arXiv:2204.02311, section 5.1: the same samples from
other weights gave no spike).
"""

from __future__ import annotations

import math
from typing import Any

import torch

MEMORY = 0.98  # of the running mean and variance: about fifty steps
WARM_UP = 30  # steps before anything finite counts as a spike
LEAST_DEVIATION = 0.01  # of a logarithm: where nothing ever varied, a hundredth more is one deviation


class Guard:
    """Judges a step by its loss and its gradients' norm.

    memory: float64 [3,2]: count, mean and variance of the logarithms of both, with exponential forgetting.
    sigmas: how many deviations above the mean are a spike; None: only what is not finite is refused.
    """

    def __init__(self, sigmas: float | None, device: torch.device | str = "cpu", state: Any = None) -> None:
        self.sigmas = sigmas
        self.memory = torch.zeros(3, 2, dtype=torch.float64, device=device)
        if state:
            self.memory.copy_(torch.tensor(_memory(state), dtype=torch.float64))

    def __call__(self, figures: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether to take the step, bool on the device; where it is taken, it is remembered.

        figures: float64 [n], the loss first. norm: float64 scalar.
        """
        both = torch.stack([figures[0], norm])
        # What is not above 0 has no logarithm: it is no spike, and nothing is learned from it.
        positive = both > 0
        x = torch.where(positive, both, 1.0).log()
        count, mean, variance = self.memory
        spike = torch.zeros_like(positive)
        if self.sigmas is not None:
            far = (x - mean) / variance.sqrt().clamp(min=LEAST_DEVIATION) > self.sigmas
            spike = far & (count >= WARM_UP) & positive
        applied = (both.isfinite() & ~spike).all()
        keep = (1 - 1 / (count + 1)).clamp(max=MEMORY)
        step = x - mean
        after = torch.stack([count + 1, mean + (1 - keep) * step, keep * (variance + (1 - keep) * step.square())])
        self.memory = torch.where(applied & positive, after, self.memory)
        return applied

    def reason(self, loss: float, norm: float) -> str:
        """Why a step with these was refused, for a person; on the host, against the memory as it is now."""
        for i, (name, value) in enumerate((("loss", loss), ("gradient norm", norm))):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            count, mean, variance = self.memory[:, i].tolist()
            if self.sigmas is not None and count >= WARM_UP and value > 0:
                far = (math.log(value) - mean) / max(math.sqrt(variance), LEAST_DEVIATION)
                if far > self.sigmas:
                    return f"the {name} is {value:.4g}, {far:.1f} deviations above its mean"
        return f"the loss is {loss:.4g} and the gradient norm {norm:.4g}, far above their means"

    def forget(self) -> None:
        """Begin again after the weights went back: what is normal is learned anew."""
        self.memory = torch.zeros_like(self.memory)

    def state(self) -> list[list[float]]:
        """What a checkpoint keeps; waits for the device."""
        found: list[list[float]] = self.memory.tolist()
        return found


def _memory(state: Any) -> list[list[float]]:
    """The memory of a checkpoint; those of format 1 keep it by name."""
    if isinstance(state, dict):
        both = (state["loss"], state["norm"])
        return [[float(one[name]) for one in both] for name in ("count", "mean", "variance")]
    return [list(map(float, row)) for row in state]
