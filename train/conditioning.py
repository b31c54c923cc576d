"""What a UNet is given beside x_t and the timestep: captions, and for SDXL their pooled embedding and sizes.

    Stored     the embeddings lie in the latent shards
    Encoded    tokens lie there, or captions are drawn; the frozen CLIP runs within the step, where the UNet runs
    Learning   as Encoded, but the text encoder learns with the UNet (adapters.py says how much of it)

and in inversion.py, where a word alone learns. Each has two halves: `batch` makes what one micro-batch needs, on the
CPU in the loader's thread, and touches no device; `condition` is called within the step and gives what the UNet is
called with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from latents.encoders import TextEncoder, kept_blocks
from latents.text import ClipPair, Text, mask_of
from shards.settings import ConfigError
from train.data import Batch

# The text [B,context,width], and for a UNet that is given sizes what else it is called with.
Condition = tuple[torch.Tensor, dict[str, torch.Tensor] | None]


class Conditioning:
    """Captions as the shards hold them, and how they reach the UNet.

    sized: the UNet is given sizes and pooled text, as SDXL's is. module: what of this learns; None where nothing does.
    stored: the embeddings lie in the shards, so that no encoder is at hand.
    """

    module: nn.Module | None = None
    stored = False

    def __init__(self, sized: bool) -> None:
        self.sized = sized

    def batch(
        self,
        latents: Any,
        positions: np.ndarray,
        dropped: np.ndarray,
        captions: Sequence[str] | None = None,
        flipped: np.ndarray | None = None,
    ) -> Batch:
        """What samples of `latents` (data.Latents) need; dropped: bool [B], who gets the empty caption.

        captions: in place of the stored ones. flipped: bool [B], who is mirrored; None: nobody.
        """
        batch = self.captions(latents, positions, dropped, captions)
        if self.sized:
            batch["sizes"] = torch.from_numpy(latents.sizes(positions, flipped))
        return batch

    def captions(
        self, latents: Any, positions: np.ndarray, dropped: np.ndarray, captions: Sequence[str] | None
    ) -> Batch:
        """The part of `batch` that stands for the captions."""
        raise NotImplementedError

    def prompts(self, prompts: Sequence[str], text: Text | None = None) -> Batch:
        """What stands for these prompts, as `captions` gives it for captions; text: the encoder, where `stored`."""
        raise NotImplementedError

    def condition(self, batch: Batch) -> Condition:
        """What the UNet is called with, where the batch lies."""
        raise NotImplementedError

    def mask(self, batch: Batch, text: torch.Tensor) -> torch.Tensor | None:
        """Which places of `condition`'s text the UNet attends to, int64 [B,context]; None for all, as of a CLIP."""
        return mask_of(batch["text_length"], text.shape[1]) if "text_length" in batch else None

    def networks(self) -> list[nn.Module]:
        """What of `module` is called by itself."""
        return [] if self.module is None else [self.module]

    def checkpoint_activations(self) -> None:
        """Keep no activations inside blocks of `module`; nothing where it is not a network."""


class Stored(Conditioning):
    """text float32 [B,context,width] from the shards; for a UNet that is given sizes, pooled [B,width] too."""

    stored = True

    def captions(
        self, latents: Any, positions: np.ndarray, dropped: np.ndarray, captions: Sequence[str] | None
    ) -> Batch:
        """The stored embeddings, a dropped caption being the stored empty one."""
        text, empty = latents.embeddings(positions), latents.empty_embedding
        text[dropped] = 0
        text[dropped, : len(empty)] = empty  # of a caption that has as many rows as tokens, those
        batch = {"text": torch.from_numpy(text)}
        if "text_length" in latents.token_names:
            length = latents.tokens(positions, "text_length")
            length[dropped] = latents.empty["text_length"]
            batch["text_length"] = torch.from_numpy(length)
        if self.sized:
            pooled = latents.pooled(positions)
            pooled[dropped] = latents.empty_pooled
            batch["pooled"] = torch.from_numpy(pooled)
        return batch

    def prompts(self, prompts: Sequence[str], text: Text | None = None) -> Batch:
        """Their embeddings, by the latents' own encoder."""
        assert text is not None
        tokens = text.tokens_of(prompts)
        rows, pooled = text.encode_tokens(tokens, self.sized)
        batch = {"text": rows, "pooled": pooled} if self.sized else {"text": rows}
        if "text_length" in tokens:
            batch["text_length"] = torch.from_numpy(tokens["text_length"])
        return batch

    def condition(self, batch: Batch) -> Condition:
        """As the batch holds them."""
        if not self.sized:
            return batch["text"], None
        return batch["text"], {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]}


class Encoded(Conditioning):
    """tokens int64 [B,context] (and tokens_2 for a second CLIP), from the shards or of drawn captions; the frozen
    encoders run within the step."""

    def __init__(self, sized: bool, text: Text) -> None:
        super().__init__(sized)
        self.text = text
        # As many captions as take about 60 MB, however long they are.
        kept = max(1000, 7_700_000 // text.context_length)
        self._tokens = functools.lru_cache(maxsize=kept)(lambda caption: text.tokens_of([caption]))

    def captions(
        self, latents: Any, positions: np.ndarray, dropped: np.ndarray, captions: Sequence[str] | None
    ) -> Batch:
        """The tokens, a dropped caption being the stored empty one."""
        found = {}
        for name in self.text.names:
            if captions is None:
                found[name] = latents.tokens(positions, name)
            else:
                found[name] = np.concatenate([self._tokens(c)[name] for c in captions])
            found[name][dropped] = latents.empty[name]
        return {name: torch.from_numpy(ids) for name, ids in found.items()}

    def prompts(self, prompts: Sequence[str], text: Text | None = None) -> Batch:
        """Their tokens."""
        return {name: torch.from_numpy(ids) for name, ids in self.text.tokens_of(prompts).items()}

    def condition(self, batch: Batch) -> Condition:
        """The frozen encoders' features, in the arithmetic that autocast has here (bf16 on a GPU), else in float32."""
        kind = batch["tokens"].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        rows, pooled = self.text.features_of(batch, dtype, pooled=self.sized)
        # Outside autocast the UNet's own type counts; within it, autocast casts.
        if not self.sized:
            return rows, None
        assert pooled is not None
        return rows, {"text_embeds": pooled, "time_ids": batch["sizes"]}


class Learning(Encoded):
    """As Encoded, but `module`, transformers' model of the same tower, or of each of a pair, learns with the UNet."""

    def __init__(self, sized: bool, text: TextEncoder | ClipPair, module: nn.Module) -> None:
        super().__init__(sized, text)
        self.module = module
        towers = [text.first, text.second] if isinstance(text, ClipPair) else [text]
        # Whether the layer that the UNet reads is the model's last one, or lies before it (SDXL).
        self.depths = [len(kept_blocks(one.tower, one.layer)) for one in towers]
        for one in towers:
            del one.model, one.tower  # the same weights a second time

    def networks(self) -> list[nn.Module]:
        """The encoders."""
        assert self.module is not None
        return list(self.module.values()) if isinstance(self.module, nn.ModuleDict) else [self.module]

    def condition(self, batch: Batch) -> Condition:
        """The learning encoders' features, with their gradient."""
        if not self.sized:
            assert self.module is not None
            return self.module(batch["tokens"]).last_hidden_state, None
        called = zip(self.networks(), self.text.names, strict=True)
        outs = [encoder(batch[name], output_hidden_states=True) for encoder, name in called]
        rows = [out.hidden_states[depth] for out, depth in zip(outs, self.depths, strict=True)]
        return torch.cat(rows, dim=-1), {"text_embeds": outs[-1].text_embeds, "time_ids": batch["sizes"]}

    def checkpoint_activations(self) -> None:
        """transformers' own name for it."""
        for encoder in self.networks():
            encoder.gradient_checkpointing_enable()


class Joint(nn.Module):
    """A UNet and what learns of its conditioning, as one model with the names `unet.` and `text.`."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text


def require_added_width(unet: dict[str, Any], pooled: int, field: str) -> None:
    """Raises ConfigError where a UNet that is given sizes expects something else beside the time than these."""
    width, one = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    if one is None or width != pooled + 6 * one:
        raise ConfigError(
            f"{field}: its projection_class_embeddings_input_dim is {width}, but {pooled} values of pooled text and "
            f"six sizes of addition_time_embed_dim {one} each are what it is given beside the time"
        )
