"""Textual Inversion (Gal et al. 2022, arXiv:2208.01618): a new word is learned, the UNet and the CLIP are frozen.

The new word's embeddings are the only weights that train. They stand in the caption where the templates say, go
through the frozen CLIP with the other tokens, and get their gradient from the UNet's loss. What comes out is what
diffusers' `load_textual_inversion` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from latents.encoders import has_final_norm, kept_blocks, load_text, require_digest
from shards.dataset import Dataset
from shards.settings import ConfigError
from train.config import TrainConfig
from train.data import Batch
from train.denoising import Diffusion


class WordAndUnet(nn.Module):
    """The learned rows [vectors,width] beside the frozen networks that they are seen through."""

    def __init__(self, unet: Any, tower: Any, layer: str, rows: torch.Tensor) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.token_embedding = tower.token_embedding.requires_grad_(False)
        self.blocks = nn.ModuleList(kept_blocks(tower, layer)).requires_grad_(False)
        self.norm = tower.ln_final.requires_grad_(False) if has_final_norm(layer) else nn.Identity()
        self.register_buffer("places", tower.positional_embedding.detach(), persistent=False)
        self.register_buffer("mask", tower.attn_mask.detach(), persistent=False)
        self.rows = nn.Parameter(rows)

    def encode(self, tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [B,context] -> float32 [B,context,width]; place [B,context]: which learned row, or -1."""
        learned = torch.nn.functional.embedding(place.clamp(min=0), self.rows)
        x = torch.where((place >= 0)[..., None], learned, self.token_embedding(tokens))
        x = x + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, attn_mask=self.mask.to(x.dtype))
        return self.norm(x)

    def forward(self, xt: torch.Tensor, time: torch.Tensor, tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The UNet's output [B,C,h,w] under captions that hold the learned word."""
        return self.unet(xt, time, self.encode(tokens, place), return_dict=False)[0]


class Inversion(Diffusion):
    """The loss of Diffusion, of which the new word alone learns. Captions are the templates'."""

    saves_frozen = False

    def __init__(self, config: TrainConfig, datasets: Sequence[Dataset], seed: int, device: str) -> None:
        super().__init__(config, datasets, seed, device)
        if self.sized:
            raise ConfigError(
                "train.textual_inversion: this UNet is also told the captions' pooled embeddings (SDXL), through which "
                "the word cannot be learned here; choose a UNet without addition_embed_type text_time"
            )
        assert config.textual_inversion is not None
        self.inversion = config.textual_inversion
        facts = datasets[0].manifest["text"]
        text = load_text(facts["ref"], facts["layer"], "cpu")
        require_digest("the CLIP", text.digest, facts["digest"], facts["ref"])
        self.text = None  # the tower is part of the model here
        self.captions = [self._caption(text, t) for t in self.inversion.templates]
        first = text.tokenize([self.inversion.initial])[0]
        ids = first[1 : int(first.argmax())]  # between start and end of text
        if len(ids) == 0:
            raise ConfigError(f"train.textual_inversion.initial: '{self.inversion.initial}' gives no token")
        rows = text.tower.token_embedding.weight.detach()[ids].float()
        rows = rows[torch.arange(self.inversion.vectors) % len(ids)].clone()
        self.model = WordAndUnet(self.model, text.tower, facts["layer"], rows)

    def _caption(self, text: Any, template: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and places, int64 [context] each, of a template with the new word in it."""
        before, after = template.split("{}")
        head = text.tokenize([before])[0].numpy()
        tail = text.tokenize([after])[0].numpy()
        end = int(head.argmax())
        vectors, context = self.inversion.vectors, len(head)
        if end + vectors >= context:
            raise ConfigError(f"train.textual_inversion.templates: '{template}' leaves no room for the token")
        rest = tail[1 : int(tail.argmax())][: context - end - vectors - 1]
        tokens = np.zeros(context, np.int64)
        line = [*head[:end], *[head[end - 1]] * vectors, *rest, head[end]]
        tokens[: len(line)] = line
        place = np.full(context, -1, np.int64)
        place[end : end + vectors] = np.arange(vectors)
        return tokens, place

    def text_batch(
        self, latents: Any, positions: np.ndarray, dropped: np.ndarray, captions: Sequence[str] | None = None
    ) -> Batch:
        """tokens and place, int64 [B,context] each: a template by the sample's place, or the empty caption."""
        chosen = self.random.integers("template", positions, len(self.captions))
        tokens = np.stack([self.captions[i][0] for i in chosen])
        place = np.stack([self.captions[i][1] for i in chosen])
        tokens[dropped], place[dropped] = latents.empty_tokens, -1
        return {"tokens": torch.from_numpy(tokens), "place": torch.from_numpy(place)}

    def predict(self, xt: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The UNet's output at x_t under the learned word."""
        return self.model(xt, self.process.time[batch["t"]], batch["tokens"], batch["place"])

    def checkpoint_activations(self) -> None:
        """Of the UNet; its forward pass is kept for the word's gradient."""
        self.model.unet.enable_gradient_checkpointing()  # type: ignore[operator]
