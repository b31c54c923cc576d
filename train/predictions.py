"""What a denoiser may be trained to predict: `train.prediction_type`, one entry each, under diffusers' name.

Everything here that trains, exports or describes a model reads PREDICTIONS. An exported pipeline samples by diffusers'
schedulers, so a name that they do not know cannot be sampled from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One prediction type, for x_t = a x_0 + s eps; a and s are shaped to multiply the others, [B,...]."""

    sentence: str  # in a model card
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (a, s, x_0, eps) -> the network's output
    solve: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (a, s, output, x_t) -> (x_0, eps)
    error_scale: Callable[[Tensor, Tensor], Tensor]  # (a, s) -> |d x_0|^2 / |d output|^2, at one x_t
    flow: bool = False  # on the straight path of a rectified flow, which has no betas
    needs_signal: bool = False  # its output says nothing of x_0 where x_t is noise alone


PREDICTIONS: dict[PredictionType, Prediction] = {
    "epsilon": Prediction(
        "The UNet predicts the noise",
        target=lambda a, s, x0, eps: eps,
        solve=lambda a, s, output, xt: ((xt - s * output) / a, output),
        error_scale=lambda a, s: (s / a) ** 2,
        needs_signal=True,
    ),
    "sample": Prediction(
        "The UNet predicts the clean latent",
        target=lambda a, s, x0, eps: x0,
        solve=lambda a, s, output, xt: (output, (xt - a * output) / s),
        error_scale=lambda a, s: a**0,
    ),
    # Salimans & Ho 2022, arXiv:2202.00512, appendix D.
    "v_prediction": Prediction(
        "The UNet predicts the velocity",
        target=lambda a, s, x0, eps: a * eps - s * x0,
        solve=lambda a, s, output, xt: (a * xt - s * output, s * xt + a * output),
        error_scale=lambda a, s: s**2,
    ),
    # The speed along the straight line: Liu et al. 2022, arXiv:2209.03003, eq. 1, from x_0 on.
    "flow_prediction": Prediction(
        "The UNet predicts the direction from the latent to the noise (rectified flow)",
        target=lambda a, s, x0, eps: eps - x0,
        solve=lambda a, s, output, xt: ((xt - s * output) / (a + s), (xt + a * output) / (a + s)),
        error_scale=lambda a, s: s**2,
        flow=True,
    ),
}
