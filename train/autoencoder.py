"""The VAE's objective: images through a KL-regularised posterior and back.

Beside the errors of values and the KL there are, where they are asked for, a perceptual term (perceptual.py) and an
adversarial one (adversarial.py), whose discriminator is a part of the model as long as it is trained.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from latents.encoders import Vae
from latents.resize import resize_crop
from latents.weights import find_vae
from shards.dataset import Dataset
from shards.settings import ConfigError
from train import initial, perceptual, segments
from train.adversarial import Balance, Discriminator, frozen, hinge
from train.data import Batch
from train.encoder_config import AdversarialConfig, AutoencoderConfig
from train.image_samples import ImageSamples
from train.objective import ImageObjective, construct, public_config
from train.randomness import Randomness
from train.segments import History


class Autoencoder(ImageObjective):
    """Reconstruction of images through a KL-regularised posterior (Kingma & Welling 2013; Rombach 2022).

    The loss that is told is that of reconstruction and KL: the adversarial term has a gradient, and no value that says
    how good a model is.
    """

    def __init__(self, config: AutoencoderConfig, dataset: Dataset, seed: int, history: History | None = None) -> None:
        placement = segments.placement_of(config, [dataset], seed, history)
        vae = begun(config) if config.start_from else constructed(config, seed)
        super().__init__(vae, public_config(vae), placement)
        self.shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        for side in config.resolutions:
            if side % self.shrink:
                raise ConfigError(
                    f"autoencoder.resolution is {side}, which this model cannot encode: "
                    f"make it a multiple of {self.shrink}"
                )
        self.config, self.random = config, Randomness(seed)
        self.channels = int(vae.config.latent_channels)
        self._fits = {side: functools.partial(_fitted, side) for side in config.resolutions}
        self.image_samples = ImageSamples(dataset, placement, self._fits[config.resolutions[0]], config.cache_bytes)
        self.perceptual = perceptual.load(config.perceptual.weights) if config.perceptual else None
        if self.perceptual:
            self.perceptual.require(config.resolutions[-1], "autoencoder.resolution")
        self._hidden: list[torch.Tensor] = []  # what went into the decoder's last layer; a list, for copies share it
        figures = ["l1", "mse", "kl", "psnr"]
        if config.perceptual:
            figures.append("perceptual")
        if config.adversarial:
            figures += ["discriminator", "real", "fake"]
            self.beside, self.beside_from = "discriminator.", config.adversarial.start_images
            vae.discriminator = Discriminator(config.adversarial, seed)
            vae.decoder.conv_out.register_forward_pre_hook(self._see)
        self.figures = tuple(figures)

    def side(self, position: int) -> int:
        """The side, in pixels, of the images of the batch that a position belongs to: they take turns."""
        sides = self.config.resolutions
        begin = int(self.placement.split(np.array([position]))[0][0])
        return sides[begin // self.placement.batch_size(position) % len(sides)]

    def batch(self, positions: np.ndarray) -> Batch:
        """pixels uint8 [B,R,R,3], the posterior's noise [B,C,h,w], and with an adversarial term whether it counts."""
        side = self.side(int(positions[0]))
        shape = (self.channels, side // self.shrink, side // self.shrink)
        found = {
            "pixels": torch.from_numpy(self.image_samples.pixels(positions, self._fits[side])),
            "noise": torch.from_numpy(self.random.normal("autoencoder", positions, shape)),
        }
        if self.config.adversarial:
            begun = np.asarray(positions) >= self.config.adversarial.start_images
            found["adversarial"] = torch.from_numpy(begun.astype(np.float32))
        return found

    def networks(self) -> list[torch.nn.Module]:
        """The two halves, which are what is called."""
        return [self.model.encoder, self.model.decoder]

    def finished(self) -> Any:
        """The VAE without what its training alone needed."""
        if self.config.adversarial:
            del self.model.discriminator
        return self.model

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss; mean absolute and squared error of values in -1..1, KL in nats per value, PSNR in dB, and of the
        further terms the distance, the discriminator's hinge loss, and what it says of images and reconstructions."""
        c, x = self.config, to_unit(batch["pixels"], self.config.channels_last)
        posterior = self.model.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        output = self.model.decode(mean + torch.exp(0.5 * logvar) * batch["noise"], return_dict=False)[0].float()
        adversarial = torch.zeros((), device=x.device)
        adversarial_figures: list[torch.Tensor] = []
        if c.adversarial:
            output, adversarial, adversarial_figures = self._adversarial(c.adversarial, x, output, batch["adversarial"])
        l1, mse = (output - x).abs().mean(), (output - x).square().mean(dim=(1, 2, 3))
        # KL(N(mean, var) | N(0, 1)) summed over the latent (Kingma & Welling 2013, appendix B), per image value.
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / x.numel()
        loss = c.l1_weight * l1 + c.mse_weight * mse.mean() + c.kl_weight * kl
        psnr = -10 * torch.log10(mse.detach().clamp(min=1e-10) / 4).mean()
        figures = [l1, mse.mean(), kl, psnr]
        if c.perceptual and self.perceptual is not None:
            distance = self.perceptual(output, x).mean()
            loss = loss + c.perceptual.weight * distance
            figures.append(distance)
        loss = loss + adversarial - adversarial.detach()
        return loss, torch.stack([f.detach().float() for f in (*figures, *adversarial_figures)])

    def _adversarial(
        self, config: AdversarialConfig, x: torch.Tensor, output: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(the output for the reconstruction's losses, the loss of both sides of the game, figures)."""
        discriminator, last = self.model.discriminator, self.model.decoder.conv_out
        hidden = self._hidden.pop()
        kernel = int(last.kernel_size[0])
        output, seen = Balance.apply(output, hidden if config.adaptive else None, kernel, config.weight * counts)
        real, fake = discriminator(torch.cat([x, output.detach()])).float().chunk(2)
        learns = hinge(real, fake)
        with frozen(discriminator):
            wanted = -discriminator(seen).float().mean(dim=(1, 2, 3))
        return output, (counts * learns + wanted).mean(), [learns.mean(), real.mean(), fake.mean()]

    def _see(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._hidden[:] = [given[0].detach()]


def _fitted(side: int, pixels: np.ndarray) -> np.ndarray:
    return resize_crop(pixels, side)[0]


def constructed(config: AutoencoderConfig, seed: int) -> Any:
    """A fresh AutoencoderKL; raises ConfigError where it cannot be."""
    from diffusers import AutoencoderKL

    vae = construct(AutoencoderKL, {"sample_size": config.resolutions[0], **config.model}, "autoencoder.model", seed)
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
