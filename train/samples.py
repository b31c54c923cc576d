"""Grids of images while training goes on, so that a person sees how far the model is.

They are drawn by the weights that are at hand on all ranks, the average in their place (engine.using), each rank its
share of the prompts: no second UNet is built. Rank 0 decodes, one image at a time.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latents.encoders import load_text_of, load_vae, require_digest
from latents.weights import find_vae
from train.part_config import SamplesConfig
from train.ranks import Ranks
from train.schedulers import scheduler

if TYPE_CHECKING:
    from train.denoising import Diffusion

log = logging.getLogger("carrara.train")

GAP = 2  # pixels between two images


class Samples:
    """One image a prompt, with the same noise at every checkpoint: its own generator, seeded with config.seed and its
    place.

    Raises StageError where the CLIP of the latents is not there any more; what fails later, while an image is decoded,
    is a warning and no image.
    """

    def __init__(self, config: SamplesConfig, objective: Diffusion, ranks: Ranks) -> None:
        self.config, self.objective, self.ranks = config, objective, ranks
        # Each rank has as many as any other, since under ZeRO 3 all must call the UNet equally often.
        each = -(-len(config.prompts) // ranks.world)
        self.mine = [min(i * ranks.world + ranks.rank, len(config.prompts) - 1) for i in range(each)]
        vae, text = objective.facts["encoders"]["vae"], objective.facts["encoders"]["text"]
        resolution = objective.facts["resolution"]
        self.side = resolution // find_vae(vae["ref"]).downscale
        prompts = [config.prompts[i] for i in self.mine]
        encoder = load_text_of(text) if objective.conditioning.stored else None
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        # The unconditional half first, as diffusers has it.
        self.batch = objective.conditioning.prompts(["" for _ in prompts] + prompts, encoder)
        if objective.sized:
            self.batch["sizes"] = sizes.repeat(2 * len(prompts), 1)

    @torch.no_grad()
    def draw(self, precision: torch.dtype | None = None) -> np.ndarray | None:
        """A grid in rows as wide as high, uint8 [H,W,3], on rank 0; None elsewhere, and where it cannot be. Collective.

        precision: of autocast; None for none.
        """
        objective, device, config = self.objective, self.ranks.device, self.config
        training = objective.training
        objective.eval()
        kind = device.type
        cast: Any = torch.autocast(kind, precision) if precision is not None else contextlib.nullcontext()
        try:
            with cast:
                batch = {k: v.to(device) for k, v in self.batch.items()}
                text, added = objective.conditioning.condition(batch)
                latents = self._latents(text, added, objective.conditioning.mask(batch, text))
        finally:
            objective.train(training)
        parts = self.ranks.gather(latents.float().cpu().numpy())
        if not self.ranks.first:
            return None
        found: dict[int, np.ndarray] = {}
        for rank, part in enumerate(parts):
            for i, one in enumerate(part):
                found.setdefault(i * self.ranks.world + rank, one)
        try:
            return tile(self._decode([found[i] for i in range(len(config.prompts))]))
        except Exception as e:  # images are for a look; the training is not to end for want of them
            log.warning("no samples could be drawn: %s", e)
            return None

    def _latents(
        self, text: torch.Tensor, added: dict[str, torch.Tensor] | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """DDIM, or the flow's solver, under classifier-free guidance; float32 [N,C,h,w]."""
        objective, config, device = self.objective, self.config, self.ranks.device
        channels = int(objective.model_config["in_channels"])
        noise = [
            torch.randn(channels, self.side, self.side, generator=torch.Generator().manual_seed(config.seed + i))
            for i in self.mine
        ]
        steps = scheduler(objective.config)
        steps.set_timesteps(config.steps, device=device)
        x = torch.stack(noise).to(device) * steps.init_noise_sigma
        more: dict[str, Any] = {} if mask is None else {"encoder_attention_mask": mask}
        for t in steps.timesteps:
            both = steps.scale_model_input(x, t).repeat(2, 1, 1, 1)
            out = objective.unet(both, t, text, added_cond_kwargs=added, return_dict=False, **more)[0].float()
            empty, full = out[:, :channels].chunk(2)  # of a learned variance, the first half
            x = steps.step(empty + config.guidance_scale * (full - empty), t, x, return_dict=False)[0]
        return x

    def _decode(self, latents: list[np.ndarray]) -> np.ndarray:
        """Scaled latents [C,h,w] each -> uint8 [N,H,W,3]."""
        facts = self.objective.facts["encoders"]["vae"]
        vae = load_vae(facts["ref"], self.ranks.device.type)
        require_digest("the VAE", vae.digest, facts["digest"], facts["ref"])
        z = [one / np.float32(self.objective.scale) + np.float32(self.objective.shift) for one in latents]
        return np.concatenate([vae.decode(one[None]) for one in z])


def tile(images: np.ndarray) -> np.ndarray:
    """uint8 [N,h,w,3] -> one image of ceil(sqrt(N)) columns, white where there is none."""
    n, h, w, _ = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    out = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + GAP), i % columns * (w + GAP)
        out[y : y + h, x : x + w] = image
    return out
