"""A UNet's features brought near to those of a frozen vision tower (U-REPA; Tian et al. 2025, arXiv:2503.18414).

After REPA (Yu et al. 2024, arXiv:2410.06940), for UNets: the features are those of the middle block, where no skip
passes them by; a projector brings them to the tower's width place by place, and what it gives is enlarged to the grid
of the tower. Two losses, and what is added to that of the prediction is

    weight * (-similarity + manifold_weight * manifold)

    similarity   the cosine between the two features of a place, in the mean over places
    manifold     how much the cosines between two places differ from those between the same two in the tower: the mean
                 of (sim(y_i, y_j) - sim(h_i, h_j))^2 over all i of a sample, all j of that sample and of its partner

The paper writes the second as a squared norm over pairs; here it is their mean, so that its weight means the same on
any grid. A sample's partner is the one half a global batch away, as for the contrastive term (diffusion.other_targets):
so what is learned does not depend on ranks or micro-batches.

The projector is a part of the model, so that its weights and moments are shared out, saved and gone on from like all
others; it has no averages, and what is exported is without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shards.settings import ConfigError
from train.diffusion import other_targets
from train.order import derive_key
from train.part_config import AlignmentConfig

NAME = "projector"  # the model's part


class Projector(nn.Module):
    """REPA's projector, three layers with SiLU between them, at each place by itself."""

    def __init__(self, channels: int, hidden: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_key("init", "train.alignment", seed) >> 1)
            self.layers = nn.Sequential(
                nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B,C,h,w] -> [B,width,h,w]."""
        found: torch.Tensor = self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return found


def losses(projected: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity, and the manifold loss, of each sample: float32 [B] each.

    projected: [B,D,h,w], the UNet's; features: [B,g,g,D], the tower's. A micro-batch of an odd number of samples, which
    nobody trains on with a manifold loss, has partners too, but not each other's.
    """
    with torch.autocast(projected.device.type, enabled=False):
        grid = features.shape[1:3]
        h = projected.float()
        if h.shape[-2:] != grid:
            h = functional.interpolate(h, grid, mode="bilinear", antialias=True)
        h = functional.normalize(h.flatten(2).mT, dim=2)
        y = functional.normalize(features.float().flatten(1, 2), dim=2)
        similarity = (h * y).sum(dim=2).mean(dim=1)
        cosines = [x @ torch.cat([x, other_targets(x)], dim=1).mT for x in (h, y)]
        return similarity, (cosines[0] - cosines[1]).square().mean(dim=(1, 2))


class Alignment:
    """What aligns a UNet: its projector, which becomes a part of `model`, and what a block gave last.

    model: the UNet, or what holds it. width: of the tower's features. Raises ConfigError where the UNet has no such
    block.
    """

    figures = ("similarity", "manifold")

    def __init__(self, config: AlignmentConfig, model: Any, unet: Any, width: int, seed: int) -> None:
        self.config, self.model = config, model
        blocks = {"mid_block": unet.mid_block}
        for name in ("down_blocks", "up_blocks"):
            blocks |= {f"{name}.{i}": block for i, block in enumerate(getattr(unet, name))}
        block = blocks.get(config.block)
        if block is None:
            known = ", ".join(n for n, b in blocks.items() if b is not None)
            raise ConfigError(f"train.alignment.block: the UNet has no block '{config.block}'; it has {known}")
        self._seen: list[torch.Tensor] = []  # a list, for copies share it
        channels = [m.out_channels for m in block.resnets][-1]
        model.projector = Projector(channels, config.hidden, width, seed)
        block.register_forward_hook(self._see)

    def _see(self, module: nn.Module, given: Any, output: Any) -> None:
        self._seen[:] = [output[0] if isinstance(output, tuple) else output]

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """After a forward pass of the UNet: the loss of each sample, float32 [B], with its weight, and the two figures,
        detached. Of a batch without features it is 0, and the figures are not a number."""
        if "features" not in batch:  # the projector has a gradient all the same, as ZeRO wants it, of one place
            idle = self.model.projector(self._seen.pop().detach()[:1, :, :1, :1]).float().sum()
            return 0 * idle.expand(len(batch["t"])), idle.detach().new_full((2,), float("nan"))
        similarity, manifold = losses(self.model.projector(self._seen.pop()), batch["features"])
        loss = self.config.weight * (self.config.manifold_weight * manifold - similarity)
        figures = torch.stack([similarity.mean(), manifold.mean()]).detach()
        return loss * batch["aligned"] if "aligned" in batch else loss, figures
