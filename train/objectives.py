"""What the loop can fit: the interface of an objective, and the VAE's and the CLIP's (the UNet's: denoising.py).

An objective is a module around its `model` with two methods: `batch(positions)` makes what one micro-batch
needs, on the CPU, ahead of the loop; `forward(batch)` gives the loss and, detached, the figures named in
`figures`. All randomness comes from the samples' positions.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from latents.pictures import resize_crop
from shards.dataset import Dataset
from shards.settings import ConfigError
from train import initial
from train.config import AutoencoderConfig, ClipConfig, TrainConfig
from train.data import Batch, Pictures
from train.order import Order, batch_positions, derive_key
from train.randomness import Randomness

# 1 / 0.01, as in CLIP (Radford et al. 2021, section 2.5): keeps the logits from growing without bound.
MAX_LOGIT_SCALE = 100.0


class Objective(nn.Module):
    """What the loop needs of an objective. model_config: what rebuilds the model, as stored in checkpoints."""

    figures: tuple[str, ...] = ()
    bins = 0  # where above 0, forward also gives loss by timestep: a sum and a share of the batch for each bin
    saves_frozen = True  # whether checkpoints hold the frozen weights too

    def __init__(self, model: nn.Module, model_config: dict[str, Any], order: Order) -> None:
        super().__init__()
        self.model, self.model_config, self.order = model, model_config, order

    def positions(self, images: int, rank: int, world: int, micro_step: int, micro: int) -> np.ndarray:
        """The places in the order, int64 [B], of one rank's micro-batch of the global batch that begins at `images`."""
        return batch_positions(images, rank, world, micro_step, micro)

    def batch(self, positions: np.ndarray) -> Batch:
        """The tensors of the samples at `positions` (int64 [B]), on the CPU."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (scalar) and figures (float32 [len(figures)], detached) of a batch on the model's device."""
        raise NotImplementedError

    def probe(self, batch: Batch) -> torch.Tensor:
        """A scalar with the model's whole graph behind it, for counting FLOPs; no collectives."""
        return self.forward(batch)[0]

    def keys(self, positions: np.ndarray) -> list[str]:
        """The keys of the samples at `positions`, for a person who wants to look at them."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Keep no activations inside blocks, and compute them again in the backward pass."""
        self.model.enable_gradient_checkpointing()  # type: ignore[operator]


class Autoencoder(Objective):
    """Reconstruction of pictures through a KL-regularised posterior (Kingma & Welling 2013; Rombach 2022)."""

    figures = ("l1", "mse", "kl", "psnr")

    def __init__(self, config: AutoencoderConfig, dataset: Dataset, seed: int) -> None:
        from diffusers import AutoencoderKL

        order = Order(dataset.counts, dataset.fingerprint, seed, config.shuffle_window)
        vae = construct(AutoencoderKL, {"sample_size": config.resolution, **config.model}, "autoencoder.model", seed)
        if config.initialisation == "thumbnail":
            try:
                initial.thumbnail(vae)
            except ValueError as e:
                raise ConfigError(f"autoencoder.model: {e}") from None
        super().__init__(vae, public_config(vae), order)
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        if config.resolution % shrink:
            raise ConfigError(
                f"autoencoder.resolution is {config.resolution}, which this model cannot encode: "
                f"make it a multiple of {shrink}"
            )
        side = config.resolution // shrink
        self.config, self.random = config, Randomness(seed)
        self.latent_shape = (int(vae.config.latent_channels), side, side)
        self.pictures = Pictures(dataset, order, lambda p: resize_crop(p, config.resolution)[0], config.cache_bytes)

    def batch(self, positions: np.ndarray) -> Batch:
        """pixels uint8 [B,R,R,3] and the posterior's noise [B,C,h,w]."""
        return {
            "pixels": torch.from_numpy(self.pictures.pixels(positions)),
            "noise": torch.from_numpy(self.random.normal("autoencoder", positions, self.latent_shape)),
        }

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


class Clip(Objective):
    """CLIP's symmetric cross-entropy over all pairs of the global batch (Radford et al. 2021, figure 3)."""

    figures = ("accuracy", "logit_scale")

    def __init__(self, config: ClipConfig, dataset: Dataset, seed: int) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg

        # open_clip calls a gather that this PyTorch calls deprecated; nobody here can act on that.
        warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
        check_clip_config(config.model)
        order = Order(dataset.counts, dataset.fingerprint, seed, config.shuffle_window)
        # A logit scale of shape [1], since DeepSpeed cannot broadcast a scalar parameter.
        clip = construct(open_clip.CLIP, {**config.model, "nonscalar_logit_scale": True}, "clip.model", seed)
        if config.initialisation == "spread":
            initial.spread_words(clip)
        super().__init__(clip, config.model, order)
        self.config = config
        self.preprocess = PreprocessCfg(size=clip.visual.image_size)
        text = config.model["text_cfg"]
        self._tokenizer: Any = open_clip.SimpleTokenizer(
            context_length=clip.context_length, **(text.get("tokenizer_kwargs") or {})
        )
        self._tokens = functools.lru_cache(maxsize=100_000)(lambda caption: self._tokenizer(caption)[0])
        self.pictures = Pictures(dataset, order, self._fit(), config.cache_bytes)
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        self._mean, self._std = mean, std

    def _fit(self) -> Any:
        """open_clip's own resize and crop, up to the uint8 pixels that it would normalise."""
        from open_clip.transform import image_transform_v2

        plain = dataclasses.replace(self.preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        transform = image_transform_v2(plain, is_train=False)

        def fit(pixels: np.ndarray) -> np.ndarray:
            values = transform(Image.fromarray(pixels))
            return (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

        return fit

    def batch(self, positions: np.ndarray) -> Batch:
        """pixels uint8 [B,S,S,3] and tokens int64 [B,context]."""
        tokens = torch.stack([self._tokens(c) for c in self.pictures.captions(positions)])
        return {"pixels": torch.from_numpy(self.pictures.pixels(positions)), "tokens": tokens}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of this rank's rows against all columns; its mean over ranks is that of the global batch."""
        image, text, scale = self._features(batch)
        with torch.autocast(image.device.type, enabled=False):
            to_text, to_image = self._logits(image.float(), text.float(), scale.float().clamp(max=MAX_LOGIT_SCALE))
            rank = dist.get_rank() if dist.is_initialized() else 0
            labels = torch.arange(len(image), device=image.device) + rank * len(image)
            loss = (nn.functional.cross_entropy(to_text, labels) + nn.functional.cross_entropy(to_image, labels)) / 2
        accuracy = (to_text.detach().argmax(dim=1) == labels).float().mean()
        return loss, torch.stack([accuracy, scale.detach().float().reshape(())])

    def keys(self, positions: np.ndarray) -> list[str]:
        """The pictures' keys."""
        return self.pictures.keys(positions)

    def checkpoint_activations(self) -> None:
        """open_clip's own name for it."""
        self.model.set_grad_checkpointing(True)  # type: ignore[operator]

    def _features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = batch["pixels"]
        x = pixels.permute(0, 3, 1, 2).float().div(255.0)
        x = (x - self._mean.to(x.device)) / self._std.to(x.device)
        image, text, scale = self.model(x.contiguous(), batch["tokens"])[:3]
        return image, text, scale

    def _logits(
        self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from open_clip import ClipLoss

        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if world > 1 else 0
        # gather_with_grad: each rank's features also get the gradient of the other ranks' rows, without
        # which the gradient is not that of the global batch.
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        to_text, to_image = loss.get_logits(image, text, scale)
        return to_text, to_image

    def probe(self, batch: Batch) -> torch.Tensor:
        """Both towers."""
        pixels = batch["pixels"].permute(0, 3, 1, 2).float()
        image, text = self.model(pixels, batch["tokens"])[:2]
        return image.float().mean() + text.float().mean()


def build(
    stage: str,
    config: AutoencoderConfig | ClipConfig | TrainConfig,
    datasets: Sequence[Dataset],
    seed: int,
    device: str,
) -> Objective:
    """The objective of a stage; raises ConfigError where the model cannot be built as configured.

    datasets: the one that the stage fits, or for `train` those of its sources, in their order.
    """
    if isinstance(config, AutoencoderConfig):
        return Autoencoder(config, datasets[0], seed)
    if isinstance(config, ClipConfig):
        return Clip(config, datasets[0], seed)
    from train.denoising import Diffusion
    from train.inversion import Inversion

    kind = Inversion if config.textual_inversion else Diffusion
    return kind(config, datasets, seed, device)


def to_unit(pixels: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in -1..1."""
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def construct(kind: Any, arguments: dict[str, Any], field: str, seed: int) -> Any:
    """`kind(**arguments)` with weights that depend on the seed alone; raises ConfigError with one sentence."""
    known = [p for p in inspect.signature(kind.__init__).parameters if p != "self"]
    _refuse_unknown(arguments, known, field, kind.__name__)
    # A fork, so that a caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key("init", field, seed) >> 1)
        try:
            return kind(**arguments)
        except Exception as e:
            raise ConfigError(f"{field}: {kind.__name__} cannot be built from this: {_line(e)}") from None


def check_clip_config(model: dict[str, Any]) -> None:
    """Raises ConfigError where `clip.model` is not an open_clip model_cfg of a plain CLIP."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if name not in model:
            raise ConfigError(f"clip.model.{name} is missing; clip.model is an open_clip model_cfg")
    for name, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(model[name], dict):
            raise ConfigError(f"clip.model.{name} must be a mapping of {kind.__name__}'s fields")
        _refuse_unknown(model[name], [f.name for f in dataclasses.fields(kind)], f"clip.model.{name}", kind.__name__)
    if model["text_cfg"].get("hf_model_name") or model["text_cfg"].get("hf_tokenizer_name"):
        raise ConfigError("clip.model.text_cfg: a tower or tokenizer from the hub cannot be fitted here; leave it out")


def _refuse_unknown(given: dict[str, Any], known: list[str], field: str, owner: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known)}"
            raise ConfigError(f"{field}: {owner} has no argument '{name}'; {hint}")


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers model's config without the library's own private entries."""
    return {k: v for k, v in dict(model.config).items() if not k.startswith("_")}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
