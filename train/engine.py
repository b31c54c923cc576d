"""DeepSpeed around an objective, behind a few verbs: backward, step(judge) -> Outcome, rates, using, pieces.

DeepSpeed reduces gradients, shares out and gathers. Clipping, loss scale, veto, moments and averages are the
optimizer's (optimizer.py), which DeepSpeed calls with this rank's flat fp32 values. All that a step decides stays on
the device: norm, judgement and clip are tensors, and whoever wants the figures reads them a step later. Under ZeRO 0
to 2 no step makes the host wait for the device.

What a rank owns is a list of pieces: runs of values of flattened parameters, and where they lie in its flat arrays.
Optimizers, checkpoints and loading know nothing else of how a model is shared out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from shards.settings import ConfigError
from train.data import Batch
from train.fit_config import FitConfig, ema_name
from train.objective import Objective
from train.optimizer import AdamW, AdamW8bit, parameter_groups, shape_of
from train.ranks import Ranks, import_deepspeed

log = logging.getLogger("carrara.train")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**16  # as torch's scaler, and so is how often it grows
GROWTH_INTERVAL = 2000
NORM_PART = 1 << 20  # values whose squares are summed up in fp32 at once

Judge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Piece:
    """`length` values of the flattened parameter `name` from `offset` on, at `start` of this rank's array `flat`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: int
    start: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a step, as tensors on the device, alike on all ranks.

    applied: bool; whether it was taken. norm: of the gradients, before clipping. figures: float64, means over the
    global batch, the loss first. flags: float64, of each flag on how many ranks it was set. overflow: bool; whether
    it was fp16 that could not hold the gradients, so that the scale comes down and nothing is wrong.
    """

    applied: torch.Tensor
    norm: torch.Tensor
    figures: torch.Tensor
    flags: torch.Tensor
    overflow: torch.Tensor


class Engine:
    """The objective, shared out over the ranks as `config.zero_stage` says, and its optimizer. A context.

    micro: samples of one micro-batch of a rank. accumulation: micro-batches of a step.
    """

    def __init__(self, config: FitConfig, objective: Objective, ranks: Ranks, micro: int, accumulation: int) -> None:
        self.config, self.objective, self.ranks, self.stage = config, objective, ranks, config.zero_stage
        self.accumulation, self.clip = accumulation, config.grad_clip
        self.precision = resolve_precision(config.precision, ranks.device)
        self.cast = DTYPES.get(self.precision)  # autocast's type, None without
        self.averages = (ema_name(), *(ema_name(std) for std in config.ema_stds))
        self._names = [n for n, p in objective.model.named_parameters() if p.requires_grad]
        self.frozen = _frozen(objective) if objective.saves_frozen and ranks.first else {}
        _prepare(objective, config, self.precision, ranks.device)
        groups = parameter_groups(objective.model, config.weight_decay, config.optimizer, objective.beside)
        self.optimizer = _optimizer(config)(groups, self.averages, config.betas, config.eps)
        settings = _settings(config, objective, ranks, micro, accumulation)
        self.engine = import_deepspeed().initialize(model=objective, optimizer=self.optimizer, config=settings)[0]
        if self.stage == 3:
            # It has no setting for that, and would ask the device whether the norm is finite.
            self.engine.optimizer._get_norm_groups = lambda: [torch.zeros(())]
        elif self.stage:
            # The parameters are views of the flat weights since the set-up. DeepSpeed makes each anew after every step,
            # three operators a parameter on the host.
            self.engine.optimizer._update_model_bit16_weights = lambda group: None
        elif ranks.world == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients to and fro for a sum of one
        self.flats = self._flats()
        self.pieces = self._pieces()
        self.optimizer.begin(self.flats, self.pieces, replicated=self.stage == 0)
        fp16 = self.precision == "fp16"
        self.scale = torch.full((), FIRST_SCALE if fp16 else 1.0, dtype=torch.float32, device=ranks.device)
        self.steady = torch.zeros((), dtype=torch.int32, device=ranks.device)  # steps since the scale last changed
        self.rate = config.learning_rate  # of the step to come
        self._totals: torch.Tensor | None = None

    # ---- a step ------------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and figures of a batch on the device. Collective under ZeRO 3, and where the loss is."""
        result: tuple[torch.Tensor, torch.Tensor] = self.engine(batch)
        return result

    def backward(self, batch: Batch) -> None:
        """Add the gradients of one micro-batch, and its figures."""
        loss, details = self({k: v.to(self.ranks.device, non_blocking=True) for k, v in batch.items()})
        figures = torch.cat([loss.detach().double()[None], details.double()]) / self.accumulation
        self._totals = figures if self._totals is None else self._totals + figures
        self.engine.backward(loss * self.scale if self.precision == "fp16" else loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def rates(self, learning_rate: float, decays: dict[str, float], waits: bool = False) -> None:
        """Set the learning rate of the step to come, by what factor each average keeps its past in it, and whether what
        is beside the model waits.

        Beside Muon, AdamW's rate keeps its ratio to it.
        """
        self.rate, config = learning_rate, self.config
        beside = learning_rate * (config.adamw_learning_rate or config.learning_rate) / config.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate if group.get("muon") else beside
            group["decays"] = {} if group.get("beside") else decays
            group["waits"] = waits and bool(group.get("beside"))

    def step(self, judge: Judge, *flags: bool) -> Outcome:
        """Take the step, or not: judge(figures, norm) -> bool, on the device, called once, alike on all ranks.

        flags: what all ranks are to hear of. Collective.
        """
        assert self._totals is not None, "a step needs gradients"
        device, world = self.ranks.device, self.ranks.world
        parts = [
            part
            for g in self._gradients()
            for part in (g.reshape(-1).split(NORM_PART) if g.numel() > NORM_PART else (g,) if g.numel() else ())
        ]
        square = torch.stack(torch._foreach_norm(parts)).double().square().sum().to(device)
        # Filled, not copied: a copy from the host would be waited for.
        extra = [torch.full((1,), float(f), dtype=torch.float64, device=device) for f in flags]
        # Under ZeRO each rank has its share of the gradients, without it all of them.
        square = square if self.stage else square / world
        totals = torch.cat([self._totals / world, square[None], *extra])
        if world > 1:
            dist.all_reduce(totals)
        n = len(self._totals)
        figures, norm = totals[:n], totals[n].sqrt() / self.scale
        applied = judge(figures, norm) & norm.isfinite()
        clip = (norm / self.clip).clamp(min=1.0) if self.clip else torch.ones_like(norm)
        # Where the norm is not finite the step is vetoed, and nothing must be divided by it.
        self.optimizer.scale = self._beside(torch.where(applied, clip * self.scale, 1.0).float())
        self.optimizer.veto = self._beside((~applied).float())
        self.engine.step()
        self._totals = None
        overflow = self._rescale(figures[0], norm)
        return Outcome(applied, norm, figures, totals[n + 1 :], overflow)

    def _beside(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar where the optimizer's arrays lie."""
        return value.to(self.flats[0].device)

    def _rescale(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Halve fp16's loss scale after an overflow, double it after GROWTH_INTERVAL steps without.

        Micikevicius et al. 2018, arXiv:1710.03740, section 3.2. A power of two, so that it rounds nothing. Our own
        scale, since DeepSpeed clips gradients that torch's scaler has not unscaled yet, and does not tell it of an
        overflow.
        """
        if self.precision != "fp16":
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        overflow = ~norm.isfinite() & loss.isfinite() & (self.scale > 1.0)
        torch._amp_update_scale_(self.scale, self.steady, overflow.float(), 2.0, 0.5, GROWTH_INTERVAL)
        return overflow

    # ---- the model and its averages ----------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """The model that is trained; under ZeRO 3 its weights are gathered while it is called, by all ranks alike."""
        return self.objective.model

    def train(self, mode: bool = True) -> None:
        """Set the objective's mode."""
        self.engine.train(mode)

    def eval(self) -> None:
        """As torch's."""
        self.engine.train(False)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Engine]:
        """Context: an average in place of the weights, which come back to the bit. Collective."""
        self._swap(name)
        try:
            yield self
        finally:
            self._swap(name)

    @torch.no_grad()
    def _swap(self, name: str) -> None:
        for flat in self.flats:
            if (average := self.optimizer.state[flat].get(name)) is None:
                continue
            for a, b in zip(flat.data.view(-1).split(NORM_PART), average.view(-1).split(NORM_PART), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
        self.refresh()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def destroy(self) -> None:
        """Let go of what DeepSpeed holds."""
        self.engine.destroy()

    # ---- what a checkpoint keeps -------------------------------------------------------------------

    def values(self, name: str) -> list[torch.Tensor]:
        """The flat arrays of an average, or of `weights`."""
        return [(f.data if name == "weights" else self.optimizer.state[f][name]).view(-1) for f in self.flats]

    def arrays(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(flat, state, values) of all that this rank has."""
        for i, flat in enumerate(self.flats):
            yield i, "weights", flat.data.view(-1)
            for name, values in self.optimizer.arrays(flat):
                yield i, name, values

    def owned(self) -> list[Piece]:
        """The pieces that this rank saves: without ZeRO all have all, and each saves its share of every parameter."""
        if self.stage:
            return list(self.pieces)
        found, rank, world = [], self.ranks.rank, self.ranks.world
        for p in self.pieces:
            first, end = p.length * rank // world, p.length * (rank + 1) // world
            if end > first:
                found.append(dataclasses.replace(p, offset=p.offset + first, length=end - first, start=p.start + first))
        return found

    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what is trained, in the model's order."""
        shapes = {n: shape_of(p) for n, p in self.model.named_parameters()}
        return [(n, shapes[n]) for n in self._names]

    def scaling(self) -> dict[str, float]:
        """fp16's loss scale, for a checkpoint; waits for the device."""
        return {"value": float(self.scale), "steady": int(self.steady)}

    def load_scaling(self, state: dict[str, Any] | None) -> None:
        """Go on with the loss scale that a checkpoint kept."""
        if self.precision == "fp16" and state and state.get("value", 1.0) > 1.0:
            self.scale.fill_(float(state["value"]))
            self.steady.fill_(int(state["steady"]))

    # ---- what of DeepSpeed's is not public: where values lie ---------------------------------------

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _flats(self) -> list[torch.Tensor]:
        if self.stage == 0:
            return [p for _, p in self._trained()]
        zero = self.engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _gradients(self) -> list[torch.Tensor]:
        if self.stage == 0 or self.config.offload == "cpu":
            return [p.grad for p in self.flats if p.grad is not None]
        return [g for group in self.engine.optimizer.averaged_gradients.values() for g in group]

    def _pieces(self) -> list[Piece]:
        zero, found = self.engine.optimizer, []
        for i, (name, p) in enumerate(self._trained()):
            offset, length, flat, start = 0, p.numel(), i, 0
            if self.stage == 3:
                flat, start, share = zero.grad_position[zero.get_param_id(p)]
                offset = share * self.ranks.rank
                length = max(0, min(share, p.ds_numel - offset))
            elif self.stage:
                # _hp_mapping knows DeepSpeed's alignment padding, which summing up sizes would miss.
                if (mapping := p._hp_mapping) is None:
                    continue
                flat, start = mapping.param_group_index, mapping.hp_fragment_address.start
                offset, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            if length:
                found.append(Piece(name, shape_of(p), offset, length, flat, start))
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model what was written into the flat weights. Collective."""
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := list(zero.persistent_parameters):
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


# ---- how it is set up ------------------------------------------------------------------------------


def resolve_precision(precision: str, device: torch.device) -> str:
    """The arithmetic of a fit: `auto` is bf16 where the device has it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp32"


def _frozen(objective: Objective) -> dict[str, torch.Tensor]:
    """The weights that are not trained, on the CPU: taken now, since ZeRO 3 will share them out."""
    return {n: p.detach().cpu().clone() for n, p in objective.model.named_parameters() if not p.requires_grad}


def _prepare(objective: Objective, config: FitConfig, precision: str, device: torch.device) -> None:
    objective.train()
    if config.activation_checkpointing:
        objective.checkpoint_activations()
    if config.compile:
        _compile(objective, config.compile)
    if device.type == "cuda":
        # What autocast leaves in fp32, and all of an fp32 run, may use the tensor cores: 10 bits of mantissa.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        if precision == "fp32" and dist.get_rank() == 0:
            log.info("precision fp32: matrix products and convolutions use TF32")
    if precision in DTYPES:
        # Inside the module, since DeepSpeed switches off one around it. Its own would also sum up gradients over the
        # ranks in 16 bits.
        cast = torch.autocast(device.type, DTYPES[precision])
        objective.forward = cast(objective.forward)  # type: ignore[method-assign]


def _optimizer(config: FitConfig) -> type[AdamW]:
    from train.muon import Muon

    return {"adamw": AdamW, "muon": Muon, "adamw8bit": AdamW8bit}[config.optimizer]


def _settings(config: FitConfig, objective: Objective, ranks: Ranks, micro: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's. The module stays in fp32 and precision is autocast's: DeepSpeed's own bf16 mode would make its
    fp32 masters from weights that were already rounded to bf16."""
    accelerated = ranks.device.type != "cpu"
    # DeepSpeed allocates its buckets in full and wants them aligned.
    bucket = -(-min(sum(p.numel() for p in objective.parameters()), 200_000_000) // 4096) * 4096
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # DeepSpeed's own maps of who owns what are wrong with it (0.19), and with them checkpoints.
        "round_robin_gradients": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "sub_group_size": 1 << 40,  # one flat array a group of parameters
        # gloo has no reduce-scatter worth the name; with these two a step of the demo's UNet takes 0.85x on CPUs.
        "reduce_scatter": accelerated,
        "contiguous_gradients": accelerated,
    }
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": accelerated}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": accelerated}
    elif config.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # so that nothing waits for the device
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # which would wait for the device twice a step
    }


def require_compiler(option: str) -> None:
    """Raise ConfigError where torch.compile would find no C++ compiler; option: the setting that asks for it."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        compiler = ""
    if not shutil.which(compiler):
        raise ConfigError(
            f"{option}: torch.compile builds its kernels with a C++ compiler, and there is none here; install g++, or "
            f"set {option} to false"
        )


def _compile(objective: Objective, how: bool | str) -> None:
    """Compile the model in place, so that names stay as they are: as a whole, or its repeated blocks one by one.

    Whole: each shape of a bucket is compiled once. Blocks: each kind of block once, for any size of batch and picture.
    """
    require_compiler("compile")
    # Beyond its limit torch would go on without compiling, and say so in a log at most.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    networks = objective.networks()
    if how != "blocks":
        for network in networks:
            network.compile(dynamic=False)
        return
    blocks = [m for network in networks for m in network.modules() if type(m).__name__ in REPEATED]
    if not blocks:
        raise ConfigError("compile: this model has no blocks that are known to repeat; set compile to true or false")
    for block in blocks:
        block.compile(dynamic=True)


# Modules that UNets, VAEs and CLIPs are made of, each many times.
REPEATED = ("ResnetBlock2D", "BasicTransformerBlock", "ResidualAttentionBlock")
