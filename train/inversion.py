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

from latents.encoders import TextEncoder, has_final_norm, kept_blocks
from latents.text import Text
from shards.settings import ConfigError
from train.conditioning import Condition, Conditioning
from train.data import Batch
from train.part_config import InversionConfig
from train.randomness import Randomness


class LearnedWord(nn.Module):
    """The learned rows [vectors,width] beside the frozen text tower that they are seen through."""

    def __init__(self, tower: Any, layer: str, rows: torch.Tensor) -> None:
        super().__init__()
        self.token_embedding = tower.token_embedding.requires_grad_(False)
        self.blocks = nn.ModuleList(kept_blocks(tower, layer)).requires_grad_(False)
        self.norm = tower.ln_final.requires_grad_(False) if has_final_norm(layer) else nn.Identity()
        self.register_buffer("positions", tower.positional_embedding.detach(), persistent=False)
        self.register_buffer("mask", tower.attn_mask.detach(), persistent=False)
        self.rows = nn.Parameter(rows)

    def forward(self, tokens: torch.Tensor, learned_row: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [B,context] -> float32 [B,context,width]; learned_row [B,context]: which learned row, or -1."""
        learned = torch.nn.functional.embedding(learned_row.clamp(min=0), self.rows)
        x = torch.where((learned_row >= 0)[..., None], learned, self.token_embedding(tokens))
        x = x + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, attn_mask=self.mask.to(x.dtype))
        return self.norm(x)


class Word(Conditioning):
    """Captions are the templates', with the word in them that alone learns."""

    def __init__(self, inversion: InversionConfig, text: TextEncoder, random: Randomness) -> None:
        super().__init__(sized=False)
        self.vectors, self.token, self.random = inversion.vectors, inversion.token, random
        self.templates = [self._caption(text, *t.split("{}")) for t in inversion.templates]
        first = text.tokenize([inversion.initial])[0]
        ids = first[1 : int(first.argmax())]  # between start and end of text
        if len(ids) == 0:
            raise ConfigError(f"train.textual_inversion.initial: '{inversion.initial}' gives no token")
        rows = text.tower.token_embedding.weight.detach()[ids].float()
        rows = rows[torch.arange(self.vectors) % len(ids)].clone()
        self.module = LearnedWord(text.tower, text.layer, rows)
        self.text = text

    def _caption(self, text: TextEncoder, before: str, after: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and learned rows, int64 [context] each, of a caption with the new word in it."""
        head = text.tokenize([before])[0].numpy()
        tail = text.tokenize([after])[0].numpy()
        end = int(head.argmax())
        vectors, context = self.vectors, len(head)
        if end + vectors >= context:
            raise ConfigError(f"train.textual_inversion: '{before}{self.token}{after}' leaves no room for the token")
        rest = tail[1 : int(tail.argmax())][: context - end - vectors - 1]
        tokens = np.full(context, text.pad_id, np.int64)
        line = [*head[:end], *[head[end - 1]] * vectors, *rest, head[end]]
        tokens[: len(line)] = line
        learned_row = np.full(context, -1, np.int64)
        learned_row[end : end + vectors] = np.arange(vectors)
        return tokens, learned_row

    def captions(
        self, latents: Any, positions: np.ndarray, dropped: np.ndarray, captions: Sequence[str] | None
    ) -> Batch:
        """tokens and learned_row, int64 [B,context] each: a template by the sample's position, or the empty caption."""
        chosen = self.random.integers("template", positions, len(self.templates))
        tokens = np.stack([self.templates[i][0] for i in chosen])
        learned_row = np.stack([self.templates[i][1] for i in chosen])
        tokens[dropped], learned_row[dropped] = latents.empty_tokens, -1
        return {"tokens": torch.from_numpy(tokens), "learned_row": torch.from_numpy(learned_row)}

    def prompts(self, prompts: Sequence[str], text: Text | None = None) -> Batch:
        """Their tokens; the word is learned where a prompt names its token, once at most."""
        found = [
            self._caption(self.text, *prompt.split(self.token))
            if prompt.count(self.token) == 1
            else (self.text.tokenize([prompt])[0].numpy(), np.full(self.text.context_length, -1, np.int64))
            for prompt in prompts
        ]
        tokens, learned_row = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        return {"tokens": tokens, "learned_row": learned_row}

    def condition(self, batch: Batch) -> Condition:
        """The frozen CLIP's features of captions that hold the learned word."""
        assert self.module is not None
        return self.module(batch["tokens"], batch["learned_row"]), None
