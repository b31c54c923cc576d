"""What reads captions for a UNet: one interface over a CLIP, two CLIPs side by side, and encoders of transformers.

Captions become columns of integers by name: `tokens`, for a second CLIP `tokens_2`, and `text_length` where a UNet is
to attend to as many places as a caption has tokens. Latents hold those columns, or what the encoder makes of them.
encoders.TextEncoder is the CLIP; the others are here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from latents.weights import SequenceWeights
from shards.fingerprint import digest_json
from shards.settings import ConfigError, StageError

if TYPE_CHECKING:
    from latents.encoders import TextEncoder


class Features(NamedTuple):
    """What a UNet is given of captions. rows: [B,L,width]; pooled: [B,P], None where it was not asked for."""

    rows: torch.Tensor
    pooled: torch.Tensor | None


class Text(Protocol):
    """An encoder of captions. called: what it is in a sentence; names: its columns; vocabulary: ids are below it."""

    called: str
    names: tuple[str, ...]
    vocabulary: int
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
        self.vocabulary = max(first.vocabulary, second.vocabulary)

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


class SequenceEncoder:
    """A text encoder of transformers: its last hidden states, of which a caption has as many as tokens.

    Captions are cut to `context_length` tokens with the tokenizer's own special ones. Places beyond a caption's tokens
    are zeros, and neither the encoder nor the UNet attends to them (`mask_of`): how long the rows are filled up to is
    of no consequence. There is no pooled embedding.

    In place of float16 the arithmetic is that of bfloat16: T5's states leave the range of float16, and transformers
    clips them there, so that what is wrong would be finite.
    """

    called = "the text encoder"
    names: tuple[str, ...] = ("tokens", "text_length")
    pooled_width = 0

    def __init__(
        self, weights: SequenceWeights, max_length: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        dtype = _own_type(dtype)
        self.weights, self.device, self.dtype = weights, device, dtype
        self.ref, self.digest = weights.ref, weights.digest
        self.context_length, self.width, self.vocabulary = max_length, weights.width, weights.vocabulary
        self.model: Any = moved(_build(weights), torch.device(device), dtype)
        if weights.digest != self.digest:
            raise StageError(f"the text encoder '{self.ref}' was exchanged while it was loaded; run the command again")
        self._exact: Any = self.model if dtype == torch.float32 else None
        self.tokenizer: Any = _tokenizer(weights)
        own = self.tokenizer.get_vocab().items() - self.tokenizer.get_added_vocab().items()
        if (most := max((i for _, i in own), default=0)) >= self.vocabulary:
            raise ConfigError(
                f"the text encoder '{self.ref}': its tokenizer has ids up to {most}, and its weights know "
                f"{self.vocabulary} of them; put the model's own tokenizer beside it"
            )
        if len(self._ids([""])[0]) == 0:
            raise ConfigError(f"the text encoder '{self.ref}' has no token for an empty caption, which guidance needs")

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        # A half of a surrogate pair, which some captions hold, is no text to a tokenizer.
        clean = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
        found = self.tokenizer(
            clean, truncation=True, max_length=self.context_length, padding=False, return_attention_mask=False
        )
        # Some tokenizers have added words beyond the model's, such as one that stands for an image.
        return [[i for i in ids if i < self.vocabulary] for ids in found["input_ids"]]

    def tokens_of(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """tokens int64 [B,context_length], zeros behind a caption's; text_length int64 [B], how many it has."""
        tokens = np.zeros((len(captions), self.context_length), np.int64)
        lengths = np.zeros(len(captions), np.int64)
        for i, ids in enumerate(self._ids(captions) if len(captions) else []):
            tokens[i, : len(ids)], lengths[i] = ids, len(ids)
        return {"tokens": tokens, "text_length": lengths}

    def encode_tokens(
        self, tokens: Mapping[str, np.ndarray], pooled: bool = False, exact: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [B,context_length,width] on the CPU, zeros behind a caption's tokens; and [B,0]."""
        model = self.model
        if exact:
            if self._exact is None:
                self._exact = moved(_build(self.weights), torch.device(self.device), torch.float32)
            model = self._exact
        lengths = np.asarray(tokens["text_length"], np.int64)
        # As long as the batch's longest caption, in steps, so that there are few shapes.
        cut = min(-(-int(lengths.max(initial=1)) // 16) * 16, self.context_length)
        ids = torch.as_tensor(np.asarray(tokens["tokens"][:, :cut], np.int64)).to(self.device)
        with torch.inference_mode():
            rows = _states(model, ids, torch.as_tensor(lengths).to(self.device)).float().cpu()
        out = torch.zeros(len(lengths), self.context_length, self.width)
        out[:, :cut] = rows
        return out, out.new_empty(len(lengths), 0)

    def features_of(self, batch: Mapping[str, torch.Tensor], dtype: torch.dtype, pooled: bool = False) -> Features:
        """[B,L,width] of tokens [B,L] where the batch lies. The encoder moves there at the first call, and stays."""
        ids, own = batch["tokens"], _own_type(dtype)
        model = self.model
        if hasattr(ids, "fake_mode"):  # memory and FLOPs are counted, and the weights stay as they are
            model = _as_fake(model, ids, own)
        elif (self.device, self.dtype) != (str(ids.device), own):
            self.model = model = moved(model, ids.device, own)
            self.device, self.dtype, self._exact = str(ids.device), own, None
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return Features(_states(model, ids, batch["text_length"]).to(dtype), None)


def _own_type(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float16 else dtype


def mask_of(length: torch.Tensor, context: int) -> torch.Tensor:
    """int64 [B,context]: 1 where a caption of `length` (int64 [B]) tokens has one, else 0."""
    return (torch.arange(context, device=length.device) < length[:, None]).long()


def _states(model: Any, ids: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The last states of ids [B,L], [B,L,width]; zeros behind a caption's tokens."""
    mask = mask_of(length, ids.shape[1])
    rows: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return rows * mask[..., None].to(rows.dtype)


def moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model's weights in another place and type, in place; what layers share stays shared. Buffers keep their type:
    those of rotary places are wrong in half precision."""
    new = {p: torch.nn.Parameter(p.detach().to(device, dtype), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = new[value]
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(device)
    return model


def _as_fake(model: Any, like: Any, dtype: torch.dtype) -> Any:
    """A copy with fake tensors of `like`'s mode and device for its own, which it never holds twice."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        found = like.fake_mode.from_tensor(tensor).to(like.device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(found.to(dtype), requires_grad=False)
        return found

    return copy.deepcopy(model, {id(t): fake(t) for t in (*model.parameters(), *model.buffers())})


def _build(weights: SequenceWeights) -> Any:
    """The encoder alone, in float32, without a gradient; ConfigError where transformers cannot open it."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # a decoder that is left out is no news
    try:
        config = AutoConfig.from_pretrained(weights.model, **how)
        kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        model, found = kind.from_pretrained(
            weights.model, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **how
        )
        model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    except Exception as e:
        line = " ".join(str(e).split())[:200]
        raise ConfigError(f"the text encoder '{weights.ref}' cannot be opened by transformers: {line}") from None
    finally:
        logging.getLogger("transformers").setLevel(level)
    if lacking := sorted(found["missing_keys"]):
        raise ConfigError(f"the text encoder '{weights.ref}': its weights lack {lacking[0]}; save it again as a whole")
    return model.eval().requires_grad_(False)


def _tokenizer(weights: SequenceWeights) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(weights.tokenizer, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        line = " ".join(str(e).split())[:200]
        raise ConfigError(
            f"the tokenizer in {weights.tokenizer} cannot be opened by transformers ({line}); load it from where it "
            "came from, and save it there with save_pretrained, which writes tokenizer.json"
        ) from None
