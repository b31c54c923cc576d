"""AdamW with moving averages over flat float32 arrays; clip, loss scale and veto are tensors on the device.

DeepSpeed hands the optimizer exactly the fp32 values that this rank owns. All state is element by element, so moments
and averages are exact under ZeRO 0 to 3, need no communication and shrink with the ranks. A step that is not to be
taken changes no bit, and nobody on the host needs to know: torch's fused AdamW takes the clip as `grad_scale` and the
veto as `found_inf`, which leave it to the device.

    adamw        AdamW (Loshchilov & Hutter 2019)
    muon         Muon for the matrices and filters of the blocks, AdamW for the rest (muon.py)
    adamw8bit    AdamW whose moments lie in 8 bits, in blocks (Dettmers et al. 2022), by bitsandbytes
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adamw import adamw

from shards.settings import ConfigError

if TYPE_CHECKING:
    from train.engine import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCKS = {"down_blocks", "mid_block", "up_blocks", "resblocks"}  # diffusers' networks, open_clip's towers
TEXT_BLOCKS = {"layers"}  # transformers' text encoders; other networks call so what is no block
CHUNK = 1 << 24  # values updated at once where an update needs room of its own


class AdamW(torch.optim.Optimizer):
    """AdamW over whatever flat arrays it is given, and after each step ema <- ema + (1 - decay) (value - ema).

    averages: their names; each begins as the value before the first step; those of a group with "beside" have none. A
    parameter group has `lr`, `weight_decay` and `decays`, for each average the factor by which it keeps its past; set
    them before each step. One with `waits` set is left as it is, and the step is none of its own.
    scale: what gradients are divided by. veto: 1 where the step must not be taken, else 0. Float32 scalars on the
    arrays' device, set before each step.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], averages: Sequence[str], betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "decays": dict.fromkeys(averages, 0.0)})
        self.averages, self.betas, self.eps = tuple(averages), betas, eps
        self.scale = torch.ones(())
        self.veto = torch.zeros(())

    def begin(self, flats: Sequence[torch.Tensor], pieces: Sequence[Piece], replicated: bool) -> None:
        """Make the states of these arrays, which DeepSpeed put in place of the parameters that this was built with.

        pieces: which values of which parameters they hold. replicated: whether every rank has all of them. Collective.
        """
        del replicated
        beside = tuple(g["beside"] for g in self.param_groups if g.get("beside"))
        self._beside = {flats[p.flat] for p in pieces if p.name.startswith(beside)}
        for flat in flats:
            state = self.state[flat] = {n: torch.zeros_like(flat.data) for n in MOMENTS}
            if flat not in self._beside:
                state |= {n: flat.data.clone() for n in self.averages}
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of the groups that DeepSpeed left in `param_groups`: all of them, or one at a time."""
        del closure
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if not live or group.get("waits"):
                continue
            self.update(group, live)
            for name, decay in group["decays"].items():
                # On the device, so that nothing moves where the step is vetoed; one by one, since torch's foreach
                # would take the weight to the host.
                weight = (1.0 - decay) * (1.0 - self.veto)
                for p in live:
                    self.state[p][name].lerp_(p.data, weight)

    def update(self, group: dict[str, Any], live: list[torch.Tensor]) -> None:
        """AdamW of these arrays, whose `grad` is there."""
        states = [self.state[p] for p in live]
        self._adamw(
            group,
            [p.data for p in live],
            [p.grad for p in live],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
        )

    def _adamw(
        self,
        group: dict[str, Any],
        values: list[Any],
        gradients: list[Any],
        first: list[Any],
        second: list[Any],
        steps: list[torch.Tensor],
    ) -> None:
        adamw(
            values,
            gradients,
            first,
            second,
            [],
            steps,
            fused=True,
            grad_scale=self.scale,
            found_inf=self.veto,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )

    # ---- what a checkpoint keeps -------------------------------------------------------------------

    def arrays(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The states of a flat array that a checkpoint keeps, as (name, float32 of the same length)."""
        for name, values in self.state[flat].items():
            if name != "step":
                yield name, values.view(-1)

    def names(self, flat: torch.Tensor) -> tuple[str, ...]:
        """Their names."""
        return tuple(n for n in self.state[flat] if n != "step")

    def restore(self, flat: torch.Tensor, name: str, start: int, values: torch.Tensor) -> None:
        """Put float32 `values` at `start` of a state."""
        self.state[flat][name].view(-1).narrow(0, start, len(values)).copy_(values)

    def restored(self, steps: int, beside: int) -> None:
        """All states are filled in; so many steps were taken to come to them, and to those of a group with "beside"."""
        for flat, state in self.state.items():
            state["step"].fill_(float(beside if flat in self._beside else steps))


class AdamW8bit(AdamW):
    """AdamW whose two moments lie in blocks of 256 values of 8 bits with a scale each (bitsandbytes' blockwise format).

    The arithmetic is float32, chunk by chunk. A checkpoint holds the moments as float32, so that it belongs to no
    layout; loading rounds them to 8 bits again.
    """

    BLOCK = 256

    def begin(self, flats: Sequence[torch.Tensor], pieces: Sequence[Piece], replicated: bool) -> None:
        """As AdamW's."""
        self._bits = _bitsandbytes()
        super().begin(flats, pieces, replicated)
        for flat in flats:
            for name in MOMENTS:
                self.state[flat][name] = [self._pack(name, part) for part in self._parts(flat.data, zeros=True)]

    def _parts(self, values: torch.Tensor, zeros: bool = False) -> Iterator[torch.Tensor]:
        for part in values.view(-1).split(CHUNK):
            yield torch.zeros_like(part) if zeros else part

    def _pack(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n] -> uint8 [n] and its blocks' scales."""
        code = self._code(name, values.device)
        packed, state = self._bits.quantize_blockwise(values, code=code, blocksize=self.BLOCK)
        return packed, state.absmax

    def _unpack(self, name: str, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        code = self._code(name, packed[0].device)
        found: torch.Tensor = self._bits.dequantize_blockwise(
            packed[0], absmax=packed[1], code=code, blocksize=self.BLOCK
        )
        return found

    def _code(self, name: str, device: torch.device) -> torch.Tensor:
        codes = self.__dict__.setdefault("_codes", {})
        if (name, device) not in codes:
            codes[name, device] = self._bits.create_dynamic_map(signed=name == "exp_avg").to(device)
        found: torch.Tensor = codes[name, device]
        return found

    def update(self, group: dict[str, Any], live: list[torch.Tensor]) -> None:
        """As AdamW's, chunk by chunk."""
        vetoed = self.veto > 0
        for p in live:
            assert p.grad is not None
            state, taken = self.state[p], self.state[p]["step"].clone()
            parts = zip(self._parts(p.data), self._parts(p.grad), strict=True)
            for i, (values, gradients) in enumerate(parts):
                moments = {n: self._unpack(n, state[n][i]) for n in MOMENTS}
                step = taken.clone()
                first, second = ([moments[n]] for n in MOMENTS)
                self._adamw(group, [values], [gradients], first, second, [step])
                for n in MOMENTS:
                    packed = self._pack(n, moments[n])
                    # Rounding a vetoed step's moments again could move them.
                    state[n][i] = tuple(
                        torch.where(vetoed, old, new) for old, new in zip(state[n][i], packed, strict=True)
                    )
            state["step"].copy_(step)

    def arrays(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """As AdamW's; the moments unpacked."""
        for name, values in self.state[flat].items():
            if name in MOMENTS:
                yield name, torch.cat([self._unpack(name, part) for part in values])
            elif name != "step":
                yield name, values.view(-1)

    def restore(self, flat: torch.Tensor, name: str, start: int, values: torch.Tensor) -> None:
        """As AdamW's; moments are packed when all are there."""
        if name not in MOMENTS:
            super().restore(flat, name, start, values)
            return
        whole = self.__dict__.setdefault("_restoring", {})
        if (flat, name) not in whole:
            whole[flat, name] = torch.zeros_like(flat.data).view(-1)
        whole[flat, name].narrow(0, start, len(values)).copy_(values)

    def restored(self, steps: int, beside: int) -> None:
        """As AdamW's."""
        for (flat, name), values in self.__dict__.pop("_restoring", {}).items():
            self.state[flat][name] = [self._pack(name, part) for part in self._parts(values)]
        super().restored(steps, beside)


def require_bitsandbytes() -> None:
    """Raises ConfigError where the library of `optimizer: adamw8bit` is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed here; pip install 'carrara[adamw8bit]', "
            "or set optimizer to adamw"
        )


def _bitsandbytes() -> Any:
    require_bitsandbytes()
    import bitsandbytes.functional

    return bitsandbytes.functional


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, optimizer: str = "adamw", beside: str = ""
) -> list[dict[str, Any]]:
    """Weights with decay; biases, norms and scalars (fewer than two dimensions) without; under muon its own first.

    beside: begins the names of parameters without decay and averages; none of them where it is empty.

    A parameter that is not to be trained must have requires_grad False: ZeRO decays whatever it is given.
    """
    every = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    live = [(n, p) for n, p in every if not (beside and n.startswith(beside))]
    muon = {n for n, p in live if optimizer == "muon" and is_hidden(n, shape_of(p))}
    groups = [
        {"params": [p for n, p in live if n in muon], "weight_decay": weight_decay, "muon": True},
        {"params": [p for n, p in live if n not in muon and len(shape_of(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for n, p in live if len(shape_of(p)) < 2], "weight_decay": 0.0},
        {"params": [p for n, p in every if beside and n.startswith(beside)], "weight_decay": 0.0, "beside": beside},
    ]
    return [g for g in groups if g["params"]]


def is_hidden(name: str, shape: Sequence[int]) -> bool:
    """Whether muon.py is for it: matrices and filters of the blocks; not the first and last layers, nor embeddings."""
    parts = name.split(".")
    return len(shape) >= 2 and not (TEXT_BLOCKS if parts[0] == "text" else BLOCKS).isdisjoint(parts)


def shape_of(p: torch.nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO 3 has shared it out."""
    return tuple(getattr(p, "ds_shape", p.shape))


def ema_decay(images: int, batch_size: int, halflife: int, rampup: float | None) -> float:
    """The factor for the step that ends at `images`: 0.5 ** (batch / half-life), in images.

    The half-life is at most `rampup` times the images seen before the step (EDM, Karras et al. 2022,
    training_loop.py), so that the average forgets its random beginning.
    """
    here = float(halflife)
    if rampup is not None:
        here = min(here, rampup * (images - batch_size))
    return 0.0 if here <= 0 else 0.5 ** (batch_size / here)


def learning_rate(
    images: int,
    batch_size: int,
    total: int,
    peak: float,
    warmup: int,
    schedule: str,
    final_fraction: float,
    cooldown: int = 0,
) -> float:
    """The rate of the step that begins at `images` seen: linear warm-up, then what the schedule says.

    The warm-up counts the step's own batch, so that the first step moves too. `cosine` goes from `peak` at the end of
    the warm-up to `final_fraction * peak` at `total`. `wsd` (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395)
    stays at `peak` until `cooldown` images before `total`, and falls from there to `final_fraction * peak` by one minus
    a square root (Haegele et al. 2024, arXiv:2405.18392): a run may be made longer from any checkpoint before that.
    """
    if images + batch_size < warmup:
        return peak * (images + batch_size) / warmup
    if schedule == "constant":
        return peak
    begin = warmup if schedule == "cosine" else total - cooldown
    through = min(max((images - begin) / max(total - begin, 1), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * through)) if schedule == "cosine" else 1 - math.sqrt(through)
    return peak * (final_fraction + (1 - final_fraction) * left)
