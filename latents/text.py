"""What reads captions for a UNet: one interface over a CLIP, and two CLIPs side by side.

Captions become columns of token ids by name, `tokens` and for a second CLIP `tokens_2`; latents hold those columns, or
what the encoder makes of them. encoders.TextEncoder is the CLIP; what is here is made of such ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from shards.fingerprint import digest_json

if TYPE_CHECKING:
    from latents.encoders import TextEncoder


class Features(NamedTuple):
    """What a UNet is told of captions. rows: [B,L,width]; pooled: [B,P], None where it was not asked for."""

    rows: torch.Tensor
    pooled: torch.Tensor | None


class Text(Protocol):
    """An encoder of captions. called: what it is in a sentence; names: its columns of token ids."""

    called: str
    names: tuple[str, ...]
    ref: str
    digest: str
    context_length: int
    width: int

    @property
    def pooled_width(self) -> int:
        """Width of the pooled embedding."""

    def tokens_of(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions -> columns of ids, int64, one row a caption; touches no network."""

    def encode_tokens(
        self, tokens: Mapping[str, np.ndarray], pooled: bool = False, exact: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of B rows -> float32 [B,L,width] and [B,P] ([B,0] if not pooled) on the CPU. exact: in float32 from
        the weights as stored."""

    def features_of(self, batch: Mapping[str, torch.Tensor], dtype: torch.dtype, pooled: bool = False) -> Features:
        """The same where the batch lies and in arithmetic of `dtype`, without a gradient."""


class ClipPair:
    """Two CLIPs side by side, as SDXL's base model reads them (Podell et al. 2023, arXiv:2307.01952, section 2.1): the
    states of both along the width, and the text embedding of the second."""

    called = "the pair of CLIPs"
    names: tuple[str, ...] = ("tokens", "tokens_2")

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        self.first, self.second = first, second
        self.ref = f"{first.ref} and {second.ref}"
        self.digest = digest_json([first.digest, second.digest])
        self.context_length, self.width = first.context_length, first.width + second.width

    @property
    def pooled_width(self) -> int:
        """That of the second's text embedding."""
        return self.second.pooled_width

    def tokens_of(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Ids for either; they differ in what follows a caption's end."""
        return {"tokens": self.first.tokenize(captions).numpy(), "tokens_2": self.second.tokenize(captions).numpy()}

    def encode_tokens(
        self, tokens: Mapping[str, np.ndarray], pooled: bool = False, exact: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both, on the CPU."""
        one, _ = self.first.encode_tokens({"tokens": tokens["tokens"]}, False, exact)
        two, end = self.second.encode_tokens({"tokens": tokens["tokens_2"]}, pooled, exact)
        return torch.cat([one, two], dim=-1), end

    def features_of(self, batch: Mapping[str, torch.Tensor], dtype: torch.dtype, pooled: bool = False) -> Features:
        """Of both, where the batch lies."""
        one, _ = self.first.features(batch["tokens"], dtype)
        two, end = self.second.features(batch["tokens_2"], dtype, pooled)
        return Features(torch.cat([one, two], dim=-1), end)
