"""The CLIP's objective: images and captions of the global batch told apart by each other."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from latents.source import texts_in
from shards.dataset import Dataset
from shards.settings import ConfigError
from train import initial, segments
from train.data import Batch
from train.encoder_config import ClipConfig
from train.image_samples import ImageSamples
from train.objective import ImageObjective, construct, refuse_unknown
from train.segments import History

# 1 / 0.01, as in CLIP (Radford et al. 2021, section 2.5): keeps the logits from growing without bound.
MAX_LOGIT_SCALE = 100.0


class Clip(ImageObjective):
    """CLIP's symmetric cross-entropy over all pairs of the global batch (Radford et al. 2021, figure 3).

    With `wrong_captions` an image must also prefer its caption to its own wrong ones (NegCLIP, Yuksekgonul et al. 2023,
    arXiv:2210.01936, section 4; there to all of the batch's). The loss of each image is then of the global batch too.
    """

    figures = ("accuracy", "logit_scale")

    def __init__(self, config: ClipConfig, dataset: Dataset, seed: int, history: History | None = None) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg

        # open_clip calls a gather that this PyTorch calls deprecated; nobody here can act on that.
        warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
        check_clip_config(config.model)
        placement = segments.placement_of(config, [dataset], seed, history)
        # A logit scale of shape [1], since DeepSpeed cannot broadcast a scalar parameter.
        clip = construct(open_clip.CLIP, {**config.model, "nonscalar_logit_scale": True}, "clip.model", seed)
        if config.initialisation == "spread":
            initial.spread_words(clip)
        super().__init__(clip, config.model, placement)
        self.config = config
        self.preprocess = PreprocessCfg(size=clip.visual.image_size)
        text = config.model["text_cfg"]
        self._tokenizer: Any = open_clip.SimpleTokenizer(
            context_length=clip.context_length, **(text.get("tokenizer_kwargs") or {})
        )
        self._tokens = functools.lru_cache(maxsize=100_000)(lambda caption: self._tokenizer(caption)[0])
        if config.wrong_captions:
            require_column(dataset, config.wrong_captions)
        self.image_samples = ImageSamples(dataset, placement, self._fit(), config.cache_bytes, config.wrong_captions)
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
        """pixels uint8 [B,S,S,3] and tokens int64 [B,context].

        Where there are wrong captions, M in all and at most K of an image, tokens are [B+M,context], and `cell`, int64
        [M], says where each belongs in a table [B,K], which is of the shape of `wrong`, bool.
        """
        captions = self.image_samples.captions(positions)
        batch = {"pixels": torch.from_numpy(self.image_samples.pixels(positions))}
        if self.config.wrong_captions:
            wrong = self.image_samples.texts(self.config.wrong_captions, positions)
            most = max(map(len, wrong))
            cells = [i * most + k for i, texts in enumerate(wrong) for k in range(len(texts))]
            captions += [text for texts in wrong for text in texts]
            batch["cell"] = torch.tensor(cells, dtype=torch.int64)
            batch["wrong"] = torch.zeros(len(wrong), most, dtype=torch.bool)
            batch["wrong"].view(-1)[batch["cell"]] = True
        return {**batch, "tokens": torch.stack([self._tokens(c) for c in captions])}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of this rank's rows against all columns; its mean over ranks is that of the global batch."""
        image, text, scale = self._features(batch)
        with torch.autocast(image.device.type, enabled=False):
            image, factor = image.float(), scale.float().clamp(max=MAX_LOGIT_SCALE)
            right, wrong = text.float().split([len(image), len(text) - len(image)])
            to_text, to_image = self._logits(image, right, factor)
            if "wrong" in batch:
                to_text = torch.cat([to_text, _to_wrong(image, wrong, factor, batch)], dim=1)
            rank = dist.get_rank() if dist.is_initialized() else 0
            labels = torch.arange(len(image), device=image.device) + rank * len(image)
            loss = (nn.functional.cross_entropy(to_text, labels) + nn.functional.cross_entropy(to_image, labels)) / 2
        accuracy = (to_text.detach().argmax(dim=1) == labels).float().mean()
        return loss, torch.stack([accuracy, scale.detach().float().reshape(())])

    def checkpoint_activations(self) -> None:
        """open_clip's own name for it."""
        self.model.set_grad_checkpointing(True)

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


def require_column(dataset: Dataset, name: str) -> None:
    """Raises ConfigError where the first shard's sidecar has no such column of texts."""
    shard = dataset.shards[0]
    if name not in (table := dataset.sidecar(shard.index)).column_names:
        raise ConfigError(
            f"clip.wrong_captions: shard {shard.name} of {dataset.root} has no column '{name}' in its .parquet; carry "
            "it there with ingest.keep_columns, or leave it out"
        )
    try:
        for value in table[name].to_pylist():
            texts_in(value)
    except TypeError:
        raise ConfigError(f"clip.wrong_captions: column '{name}' of {dataset.root} holds no texts") from None


def _to_wrong(image: torch.Tensor, wrong: torch.Tensor, scale: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits of images [B,D] with their own wrong captions [M,D]: float32 [B,K], minus infinity where there is none."""
    table, cell = batch["wrong"], batch["cell"]
    own = scale * (image[cell // max(1, table.shape[1])] * wrong).sum(dim=1)
    empty = torch.full((table.numel(),), -torch.inf, device=image.device)
    return empty.scatter(0, cell, own).view(table.shape)


def check_clip_config(model: dict[str, Any]) -> None:
    """Raises ConfigError where `clip.model` is not an open_clip model_cfg of a plain CLIP."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if name not in model:
            raise ConfigError(f"clip.model.{name} is missing; clip.model is an open_clip model_cfg")
    for name, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(model[name], dict):
            raise ConfigError(f"clip.model.{name} must be a mapping of {kind.__name__}'s fields")
        refuse_unknown(model[name], [f.name for f in dataclasses.fields(kind)], f"clip.model.{name}", kind.__name__)
    if model["text_cfg"].get("hf_model_name") or model["text_cfg"].get("hf_tokenizer_name"):
        raise ConfigError("clip.model.text_cfg: a tower or tokenizer from the hub cannot be fitted here; leave it out")
