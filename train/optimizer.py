"""AdamW that keeps exponential moving averages of whatever it updates as further states.

DeepSpeed hands the optimizer exactly the fp32 values that this rank owns, so the averages are exact under
ZeRO 0 to 3, need no communication, shrink with the ranks, move with the moments, and are left alone in
steps that are skipped for an overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class EmaAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) with `state[p]["ema"]`, which begins as the value before the first step.

    Each parameter group has `ema_decays`: for each average, by the name of its state, the factor by which it
    keeps its past; set it, like `lr`, before each step. veto: asked at each step, once DeepSpeed knows the
    gradients' norm; where it says True, nothing changes. applied: whether the last step changed the weights.
    """

    def __init__(self, params: Iterable[Any], averages: Iterable[str] = ("ema",), **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            group.setdefault("ema_decays", dict.fromkeys(averages, 0.0))
        self.veto: Callable[[], bool] | None = None
        self.applied = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One AdamW update, then ema <- ema + (1 - decay) (value - ema) for each average."""
        # torch's loss scaler leaves it to a fused optimizer to skip a step that overflowed.
        overflow = getattr(self, "found_inf", None)
        self.applied = not (overflow is not None and bool(overflow.item())) and not (self.veto and self.veto())
        if not self.applied:
            return None
        live = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        first = {p: p.detach().clone() for _, p in live if "ema" not in self.state.get(p, {})}
        result = super().step(closure)
        for group, p in live:
            state = self.state[p]
            for name, decay in group["ema_decays"].items():
                # Only now: AdamW makes its moments where a parameter's state is still empty.
                if name not in state:
                    state[name] = first[p] if len(group["ema_decays"]) == 1 else first[p].clone()
                state[name].lerp_(p.detach(), 1.0 - decay)
        return result


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay; biases, norms and scalars (fewer than two dimensions) without.

    A parameter that is not to be trained must have requires_grad False: ZeRO decays whatever it is given.
    """
    live = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in live if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in live if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def ema_decay(images: int, batch_size: int, halflife: int, rampup: float | None) -> float:
    """The factor for the step that ends at `images`: 0.5 ** (batch / half-life), in images.

    The half-life is at most `rampup` times the images seen before the step (EDM, Karras et al. 2022,
    training_loop.py), so that the average forgets its random beginning.
    """
    here = float(halflife)
    if rampup is not None:
        here = min(here, rampup * (images - batch_size))
    return 0.0 if here <= 0 else 0.5 ** (batch_size / here)


def learning_rate(
    images: int, batch_size: int, total: int, peak: float, warmup: int, schedule: str, final_fraction: float
) -> float:
    """The rate of the step that begins at `images` seen: linear warm-up, then constant or a half cosine.

    The warm-up counts the step's own batch, so that the first step moves too. The cosine goes from `peak`
    at the end of the warm-up to `final_fraction * peak` at `total`.
    """
    if images + batch_size < warmup:
        return peak * (images + batch_size) / warmup
    if schedule == "constant":
        return peak
    through = min(max((images - warmup) / max(total - warmup, 1), 0.0), 1.0)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * through)))
