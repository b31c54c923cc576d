"""Steps that must not be taken: a loss or a gradient that is not finite, or far above what it has been.

All ranks judge the same numbers, so all skip together. The judgement's memory is part of the checkpoint, so that a
resumed run skips the same steps. After some skips in a row the weights are bad, not the samples, and they go back to
the last checkpoint while the order of samples goes on (as PaLM's trainers did, Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1: the same samples from other weights gave no spike).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

MEMORY = 0.98  # of the running mean and variance: about fifty steps
WARM_UP = 30  # steps before anything finite counts as a spike


@dataclasses.dataclass
class Running:
    """Mean and variance of the logarithm of a positive number, with exponential forgetting."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def deviations(self, value: float) -> float:
        """How many standard deviations log(value) lies above the mean; 0 while there is too little to compare with."""
        if self.count < WARM_UP or value <= 0:
            return 0.0
        # Where nothing ever varied, a hundredth more is one deviation.
        return (math.log(value) - self.mean) / max(math.sqrt(self.variance), 0.01)

    def add(self, value: float) -> None:
        """Take a value in."""
        if value <= 0:
            return
        self.count += 1
        keep = min(MEMORY, 1 - 1 / self.count)
        step = math.log(value) - self.mean
        self.mean += (1 - keep) * step
        self.variance = keep * (self.variance + (1 - keep) * step * step)


class Guard:
    """Judges each step. sigmas: deviations that make a spike, None for none; max_skips: in a row, see `exhausted`."""

    def __init__(self, sigmas: float | None, max_skips: int, state: dict[str, Any] | None = None) -> None:
        self.sigmas, self.max_skips = sigmas, max_skips
        state = state or {}
        self.loss, self.norm = Running(**state.get("loss", {})), Running(**state.get("norm", {}))
        self.in_a_row: int = state.get("in_a_row", 0)
        self.skipped: int = state.get("skipped", 0)
        self.rollbacks: int = state.get("rollbacks", 0)
        self.reason = ""

    def refuses(self, loss: float, norm: float | None) -> bool:
        """Whether the step with this loss and gradient norm (None: not known) must not be taken; sets `reason`."""
        self.reason = ""
        for name, value, running in (("loss", loss, self.loss), ("gradient norm", norm, self.norm)):
            if value is None or self.reason:
                continue
            if not math.isfinite(value):
                self.reason = f"the {name} is {value}"
            elif self.sigmas and running.deviations(value) > self.sigmas:
                self.reason = f"the {name} is {value:.4g}, {running.deviations(value):.1f} deviations above its mean"
        return bool(self.reason)

    def taken(self, loss: float, norm: float | None) -> None:
        """Remember a step that was taken."""
        self.in_a_row = 0
        self.loss.add(loss)
        if norm is not None:
            self.norm.add(norm)

    def left_out(self) -> None:
        """Remember a step that was skipped."""
        self.in_a_row += 1
        self.skipped += 1

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that the weights should go back."""
        return self.in_a_row >= self.max_skips

    def rolled_back(self) -> None:
        """Begin again after the weights went back; what was normal is learned anew."""
        self.rollbacks += 1
        self.in_a_row = 0
        self.loss, self.norm = Running(), Running()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "loss": dataclasses.asdict(self.loss),
            "norm": dataclasses.asdict(self.norm),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
        }
