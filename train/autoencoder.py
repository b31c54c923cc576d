"""The VAE's objective: pictures through a KL-regularised posterior and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latents.encoders import Vae
from latents.pictures import resize_crop
from latents.weights import find_vae
from shards.dataset import Dataset
from shards.settings import ConfigError
from train import initial, segments
from train.config import AutoencoderConfig
from train.data import Batch, Pictures
from train.objective import Objective, construct, public_config
from train.randomness import Randomness
from train.segments import History


class Autoencoder(Objective):
    """Reconstruction of pictures through a KL-regularised posterior (Kingma & Welling 2013; Rombach 2022)."""

    figures = ("l1", "mse", "kl", "psnr")

    def __init__(self, config: AutoencoderConfig, dataset: Dataset, seed: int, history: History | None = None) -> None:
        placement = segments.place(config, [dataset], seed, history)
        vae = begun(config) if config.start_from else constructed(config, seed)
        super().__init__(vae, public_config(vae), placement)
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        if config.resolution % shrink:
            raise ConfigError(
                f"autoencoder.resolution is {config.resolution}, which this model cannot encode: "
                f"make it a multiple of {shrink}"
            )
        side = config.resolution // shrink
        self.config, self.random = config, Randomness(seed)
        self.latent_shape = (int(vae.config.latent_channels), side, side)
        self.pictures = Pictures(dataset, placement, lambda p: resize_crop(p, config.resolution)[0], config.cache_bytes)

    def batch(self, positions: np.ndarray) -> Batch:
        """pixels uint8 [B,R,R,3] and the posterior's noise [B,C,h,w]."""
        return {
            "pixels": torch.from_numpy(self.pictures.pixels(positions)),
            "noise": torch.from_numpy(self.random.normal("autoencoder", positions, self.latent_shape)),
        }

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read these pictures."""
        self.pictures.expect(positions)

    def close(self) -> None:
        """Let go of what reads ahead."""
        self.pictures.close()

    def keys(self, positions: np.ndarray) -> list[str]:
        """The pictures' keys."""
        return self.pictures.keys(positions)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss; mean absolute and squared error of values in -1..1, KL in nats per value, PSNR in dB."""
        x = to_unit(batch["pixels"], self.config.channels_last)
        posterior = self.model.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        output = self.model.decode(mean + torch.exp(0.5 * logvar) * batch["noise"], return_dict=False)[0].float()
        l1, mse = (output - x).abs().mean(), (output - x).square().mean(dim=(1, 2, 3))
        # KL(N(mean, var) | N(0, 1)) summed over the latent (Kingma & Welling 2013, appendix B), per picture value.
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / x.numel()
        c = self.config
        loss = c.l1_weight * l1 + c.mse_weight * mse.mean() + c.kl_weight * kl
        psnr = -10 * torch.log10(mse.detach().clamp(min=1e-10) / 4).mean()
        return loss, torch.stack([l1.detach(), mse.detach().mean(), kl.detach(), psnr])


def constructed(config: AutoencoderConfig, seed: int) -> Any:
    """A fresh AutoencoderKL; raises ConfigError where it cannot be."""
    from diffusers import AutoencoderKL

    vae = construct(AutoencoderKL, {"sample_size": config.resolution, **config.model}, "autoencoder.model", seed)
    if config.initialisation == "thumbnail":
        try:
            initial.thumbnail(vae)
        except ValueError as e:
            raise ConfigError(f"autoencoder.model: {e}") from None
    return vae


def begun(config: AutoencoderConfig) -> Any:
    """The AutoencoderKL of `start_from`, all of which learns or its decoder alone; raises ConfigError.

    With a frozen encoder, as sd-vae-ft-mse was made, whatever was trained on the latents goes on to fit.
    """
    weights = find_vae(config.start_from or "")
    if weights.kind != "AutoencoderKL":
        raise ConfigError(f"autoencoder.start_from: {weights.ref} is an {weights.kind}, and an AutoencoderKL is fitted")
    vae = Vae(weights).model.requires_grad_(True)
    if config.frozen_encoder:
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    return vae


def to_unit(pixels: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in -1..1."""
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
