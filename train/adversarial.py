"""The adversarial term of a VAE: a discriminator of patches, its hinge losses, and the weight that adapts.

The discriminator is a part of the model, so that its weights and moments are shared out, saved and gone on from like
all others, and it learns in the same step: one backward pass gives the VAE the generator's gradient and the
discriminator its own. Everything is of each image by itself (the norms within the discriminator, the adaptive
weight), so that what is learned does not depend on ranks or micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import leaky_relu, relu
from torch.nn.grad import conv2d_weight

from train.encoder_config import AdversarialConfig
from train.order import derive_key

GROUP = 16  # channels of a norm's group
LARGEST = 1e4  # adaptive weight, as in VQGAN's code


class Discriminator(nn.Module):
    """pix2pix's discriminator of patches (Isola et al. 2017, arXiv:1611.07004, section 3.2), as VQGAN has it.

    With group norms in place of batch norms, whose statistics would be those of a rank's micro-batch.
    """

    def __init__(self, config: AdversarialConfig, seed: int) -> None:
        super().__init__()
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        strides = [2] * config.layers + [1]
        inputs = [3, *widths[:-1]]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride, 1) for i, o, stride in zip(inputs, widths, strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(max(w // GROUP, 1), w) for w in widths[1:])
        self.last = nn.Conv2d(widths[-1], 1, 4, 1, 1)
        generator = torch.Generator().manual_seed(derive_key("init", "autoencoder.adversarial", seed) >> 1)
        for module in (*self.convolutions, self.last):
            nn.init.normal_(module.weight, 0.0, 0.02, generator)
            nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images float [B,3,H,W] in -1..1 -> how real each patch is, float [B,1,h,w]."""
        x = leaky_relu(self.convolutions[0](x), 0.2)
        for convolution, norm in zip(list(self.convolutions)[1:], self.norms, strict=True):
            x = leaky_relu(norm(convolution(x)), 0.2)
        found: torch.Tensor = self.last(x)
        return found


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss (Lim & Ye 2017, arXiv:1705.02894) of each image: patches [B,1,h,w] -> float32 [B]."""
    found: torch.Tensor = 0.5 * (relu(1.0 - real.float()) + relu(1.0 + fake.float())).mean(dim=(1, 2, 3))
    return found


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context: what goes through the module gives its parameters no gradient, but goes on to what came in."""
    live = [p for p in module.parameters() if p.requires_grad]
    for p in live:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in live:
            p.requires_grad_(True)


class Balance(torch.autograd.Function):
    """Reconstructions [B,3,H,W] -> the same twice: for the reconstruction's losses, and for the discriminator.

    Backward, the gradient of the second counts `weight` [B] times and, where `hidden` is given, is made as long as that
    of the first: as VQGAN's lambda (Esser et al. 2021, equation 7), the lengths are those of the gradients of the last
    layer's weight, a convolution whose input was `hidden` [B,C,H,W], but of each image. They are known in the
    backward pass alone, which then needs no second one.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, hidden: torch.Tensor | None, kernel: int, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As above; kernel: the last layer's size, odd."""
        ctx.kernel = kernel
        ctx.save_for_backward(hidden, weight)
        return output.view_as(output), output.view_as(output)

    @staticmethod
    def backward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """As above."""
        hidden, weight = ctx.saved_tensors
        if hidden is not None:
            lengths = [last_layer_lengths(hidden, g, ctx.kernel) for g in (first, second)]
            # The lengths of a gradient that fp16 could not hold are not finite, and nor is then what comes of them.
            weight = weight * (lengths[0] / lengths[1].clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=LARGEST)
        return first + weight[:, None, None, None] * second, None, None, None


def last_layer_lengths(hidden: torch.Tensor, gradient: torch.Tensor, kernel: int) -> torch.Tensor:
    """Lengths, float32 [B], of each image's gradient of a convolution's weight, from its input and its output's
    gradient, [B,C,H,W] and [B,O,H,W]."""
    shape = (gradient.shape[1], hidden.shape[1], kernel, kernel)
    pairs = zip(hidden.float().split(1), gradient.float().split(1), strict=True)
    return torch.stack([conv2d_weight(h, shape, g, padding=kernel // 2).norm() for h, g in pairs])
