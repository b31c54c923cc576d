"""Prompt-to-prompt: where one prompt's words look while an image is drawn, given to another's (Hertz et al. 2022).

Two images are drawn side by side from the same noise, one of each prompt. In every cross-attention of diffusers' UNet
the first image's map of a word becomes the second's map of the word in its place (arXiv:2208.01626): a word exchanged
takes over where the old one looked (section 3.1, equations for word swap), words that are added look for themselves
(refinement), and a word's map may be made stronger or weaker (re-weighting). Self-attention of small maps is taken over
as well, as in the authors' code.

The processors stand around those that the UNet has, and add what the edit changes: (edited map - own map) values. So
where nothing is edited the image is, to the bit, what the pipeline draws by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from shards.settings import ConfigError

SMALL = 32 * 32  # places of the largest self-attention that is taken over, as in the authors' code
Words = tuple[range, range]  # of one prompt, and those of the other in their place; one of them may be empty


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as a pipeline's CLIP reads it. spans: of each word, the places of its tokens; tokens: the text of each
    token, those that begin and end a prompt left out. Places count from the token that begins it, 0."""

    text: str
    words: tuple[str, ...]
    spans: tuple[range, ...]
    tokens: tuple[str, ...]

    @property
    def end(self) -> int:
        """The place of the token that ends it."""
        return 1 + len(self.tokens)


def words_of(text: str) -> list[str]:
    """The words that two prompts are compared by."""
    return text.split()


def pairs(source: str, target: str) -> list[Words]:
    """Which words of `target` stand in place of which of `source`, in order; words alone stand for none.

    Raises ConfigError where the prompts have neither a word in common nor as many words.
    """
    a, b = ([w.lower() for w in words_of(text)] for text in (source, target))
    for text, words in ((source, a), (target, b)):
        if not words:
            raise ConfigError(f"edit: the prompt '{text}' has no words; give --from and --to prompts that have")
    if len(a) != len(b) and not set(a) & set(b):
        raise ConfigError(
            f"edit: '{source}' and '{target}' have no word in common and not as many words, so that no word stands in "
            "another's place; exchange, add or leave out words of one prompt"
        )
    found: list[Words] = []
    for _, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if a1 - a0 == b1 - b0:
            found += [(range(a0 + i, a0 + i + 1), range(b0 + i, b0 + i + 1)) for i in range(a1 - a0)]
        else:
            found.append((range(a0, a1), range(b0, b1)))
    return found


def read_prompt(pipeline: Any, text: str, option: str) -> Prompt:
    """A prompt as the pipeline's tokenizer reads it; ConfigError where it is cut, or not read word by word."""
    tokenizer = pipeline.tokenizer
    longer = pipeline.maybe_convert_prompt(text, tokenizer)  # learned words of several tokens
    words = words_of(longer)
    pieces = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    whole = tokenizer(longer, add_special_tokens=False).input_ids
    if [i for piece in pieces for i in piece] != whole:
        raise ConfigError(f"{option}: the model's tokenizer does not read '{text}' word by word; write it otherwise")
    if len(whole) + 2 > tokenizer.model_max_length:
        raise ConfigError(
            f"{option}: the prompt has {len(whole)} tokens, and the model reads {tokenizer.model_max_length - 2}; "
            "shorten it"
        )
    spans, at = [], 1
    for piece in pieces:
        spans.append(range(at, at + len(piece)))
        at += len(piece)
    tokens = [str(t).removesuffix("</w>") for t in tokenizer.convert_ids_to_tokens(whole)]
    return Prompt(text, tuple(words), tuple(spans), tuple(tokens))


@dataclasses.dataclass(frozen=True)
class Edit:
    """What becomes of maps P [places of the image, tokens]: (P_source @ move + P_target * own) * weight.

    move: float32 [L,L]; own, weight: float32 [L]. cross_steps, self_steps: share of the steps, from the first on, in
    which cross-attention and self-attention are taken over; weights count in all.
    """

    move: torch.Tensor
    own: torch.Tensor
    weight: torch.Tensor
    cross_steps: float
    self_steps: float

    def to(self, device: Any) -> Edit:
        """The same on a device."""
        return dataclasses.replace(self, **{n: getattr(self, n).to(device) for n in ("move", "own", "weight")})


def edit_of(
    source: Prompt,
    target: Prompt,
    length: int,
    cross_steps: float = 0.8,
    self_steps: float = 0.4,
    weights: Mapping[str, float] | None = None,
) -> Edit:
    """The edit from one prompt to another, for texts of `length` tokens.

    A word with another number of tokens than the one in its place takes over all that it looked at, in equal parts, so
    that maps still sum to 1 where words are exchanged alone. weights: of words of `target`. Raises ConfigError as
    `pairs` does, and where a weighted word is not there.
    """
    move, own, weight = torch.zeros(length, length), torch.zeros(length), torch.ones(length)

    def put(a: range, b: range) -> None:
        if len(a) == len(b):
            move[list(a), list(b)] = 1.0
        else:
            move[a.start : a.stop, b.start : b.stop] = 1.0 / len(b)

    for there, here in pairs(" ".join(source.words), " ".join(target.words)):
        a = [i for w in there for i in source.spans[w]]
        b = [i for w in here for i in target.spans[w]]
        if a and b:
            put(range(a[0], a[-1] + 1), range(b[0], b[-1] + 1))
        elif b:
            own[b] = 1.0
    put(range(1), range(1))
    put(range(source.end, source.end + 1), range(target.end, target.end + 1))
    fill, filled = range(source.end + 1, length), range(target.end + 1, length)
    if len(fill) and len(filled):
        shared = min(len(fill), len(filled)) - 1
        put(fill[:shared], filled[:shared])
        put(fill[shared:], filled[shared:])
    elif len(filled):
        own[list(filled)] = 1.0
    elif len(fill):
        put(fill, range(target.end, target.end + 1))
    for word, factor in (weights or {}).items():
        positions = [i for w, s in zip(target.words, target.spans, strict=True) if w.lower() == word.lower() for i in s]
        if not positions:
            raise ConfigError(f"--weight: '{word}' is no word of '{target.text}'; name one of its words")
        weight[positions] = factor
    return Edit(move, own, weight, cross_steps, self_steps)


def require_attention(unet: Any) -> None:
    """Raises ConfigError where a denoiser has no cross-attention that can be edited."""
    from diffusers.models.attention_processor import Attention

    found = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    if not found:
        raise ConfigError(
            "edit: this model's UNet has no cross-attention, so that no word looks anywhere; train one with "
            "CrossAttnDownBlock2D and CrossAttnUpBlock2D among its blocks"
        )
    if any(m.added_kv_proj_dim is not None for m in found):
        raise ConfigError(
            "edit: the cross-attention of this model's UNet reads text and image at once, and is not known"
        )


class Maps:
    """Where the tokens of two images look: cross-attention averaged over steps, heads and layers.

    size: (h, w) of the latents, to which smaller maps are enlarged.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._sums: list[torch.Tensor | None] = [None, None]
        self._counts = [0, 0]

    def add(self, branch: int, probabilities: torch.Tensor) -> None:
        """probabilities [heads, places, L] of one layer at one step; branch: of which image."""
        h, w = self._shape(probabilities.shape[1])
        maps = probabilities.float().mean(0).T.reshape(1, -1, h, w)
        maps = torch.nn.functional.interpolate(maps, self.size, mode="bilinear")[0].cpu()
        before = self._sums[branch]
        self._sums[branch] = maps if before is None else before + maps
        self._counts[branch] += 1

    def _shape(self, count: int) -> tuple[int, int]:
        """The height and width of a layer, which the UNet halves, rounding up."""
        h, w = self.size
        while h * w > count:
            h, w = -(-h // 2), -(-w // 2)
        if h * w != count:
            raise ConfigError(f"edit: a cross-attention of this model has {count} places, which halving does not give")
        return h, w

    def of(self, branch: int) -> torch.Tensor:
        """float32 [L,h,w]; over the tokens they sum to 1 where nothing is added or weighted."""
        total = self._sums[branch]
        assert total is not None
        return total / self._counts[branch]


class _Processor:
    """One attention of the UNet: what its own processor does, and what the edit changes."""

    def __init__(self, name: str, inner: Any, control: Control) -> None:
        self.name, self.inner, self.control = name, inner, control

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        change = self.control.change(self.name, attn, hidden_states, encoder_hidden_states)
        return out if change is None else torch.cat([out[:-1], out[-1:] + change])


class Control:
    """The UNet of `pipeline` draws two images in one batch, the second with what the edit takes from the first.

    Use as a context, around one call of the pipeline with two prompts and one noise. maps: what was recorded.
    """

    def __init__(self, pipeline: Any, edit: Edit, size: tuple[int, int]) -> None:
        require_attention(pipeline.unet)
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.edit, self.maps = edit.to(self.unet.device), Maps(size)
        self.branch = self.step = 0
        self._kept: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Control]:
        """Processors and forward pass are the UNet's own again afterwards."""
        before, self._forward = dict(self.unet.attn_processors), self.unet.forward
        self.step, self._kept = 0, {}
        self.unet.set_attn_processor({n: _Processor(n, p, self) for n, p in before.items()})
        self.unet.forward = self.forward
        try:
            yield self
        finally:
            self.unet.forward = self._forward
            self.unet.set_attn_processor(before)

    def forward(self, sample: torch.Tensor, timestep: Any, **more: Any) -> tuple[torch.Tensor]:
        """The UNet's forward pass for one image after the other, each as a pipeline that draws it alone calls it."""
        out: torch.Tensor | None = None
        for self.branch in (0, 1):
            rows = list(range(self.branch, len(sample), 2))  # with guidance: without the prompt, and with it

            def mine(value: Any, rows: list[int] = rows) -> Any:
                whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == len(sample)
                return value[rows] if whole else value

            given = {name: mine(value) for name, value in more.items()}
            found = self._forward(mine(sample), timestep, **given)[0]
            out = found.new_empty(len(sample), *found.shape[1:]) if out is None else out
            out[rows] = found
        self.step += 1
        assert out is not None
        return (out,)

    def change(self, name: str, attn: Any, hidden: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor | None:
        """What the edit adds to an attention's output for its last row, the one with the prompt [1,places,C]."""
        cross, progress = text is not None, self.step / len(self.pipeline.scheduler.timesteps)
        taken = progress < (self.edit.cross_steps if cross else self.edit.self_steps)
        if not cross and (not taken or hidden.ndim != 3 or hidden.shape[1] > SMALL):
            return None
        looked = hidden[-1:] if text is None else text[-1:]
        query, key = (attn.head_to_batch_dim(p(x)) for p, x in ((attn.to_q, hidden[-1:]), (attn.to_k, looked)))
        own: torch.Tensor = attn.get_attention_scores(query, key)
        if self.branch == 0:
            self._kept[name] = own
            if cross:
                self.maps.add(0, own)
            return None
        edited = there = self._kept.pop(name)
        if cross:
            edit = self.edit
            edited = there @ edit.move.to(own.dtype) + own * edit.own.to(own.dtype) if taken else own
            edited = edited * edit.weight.to(own.dtype)
            self.maps.add(1, edited)
        value = attn.head_to_batch_dim(attn.to_v(looked))
        change: torch.Tensor = attn.batch_to_head_dim(torch.bmm(edited - own, value))
        project = attn.to_out[0]  # its bias is in the output already
        change = project(change) - project(torch.zeros_like(change[:, :1]))
        return change / attn.rescale_output_factor


@torch.no_grad()
def invert(
    pipeline: Any,
    latents: torch.Tensor,
    text: torch.Tensor,
    steps: int,
    iterations: int,
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """The noise [1,C,h,w] from which `steps` steps of the pipeline's scheduler draw `latents`, given `text` [1,L,D].

    DDIM inversion (Song et al. 2020, arXiv:2010.02502; Dhariwal & Nichol 2021, arXiv:2105.05233, appendix F) without
    guidance. Each step is linear in the sample and in what the UNet says of it, and what the UNet says of the noisier
    sample is approached by fixed-point iterations (Pan et al. 2023, arXiv:2309.04907), of which the first is plain DDIM
    inversion. The scheduler must be a deterministic one of first order, and clip nothing. tick: called at every step.
    """
    of_sample, of_output = (type(pipeline.scheduler).from_config(pipeline.scheduler.config) for _ in range(2))
    for scheduler in (of_sample, of_output):
        scheduler.set_timesteps(steps, device=latents.device)
    one, zero = torch.ones(1, 1, 1, 1, device=latents.device), torch.zeros(1, 1, 1, 1, device=latents.device)
    linear = []
    for t in of_sample.timesteps:
        a = of_sample.step(zero, t, one, return_dict=False)[0]
        b = of_output.step(one, t, zero, return_dict=False)[0]
        linear.append((t, a, b))
    found = latents
    for t, a, b in reversed(linear):
        after = found
        for _ in range(iterations):
            output = pipeline.unet(found, t, encoder_hidden_states=text, return_dict=False)[0]
            found = (after - b * output) / a
        tick()
    return found
