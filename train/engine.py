"""DeepSpeed around an objective: its settings, and what it does not tell by itself."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import Any

import torch

from shards.settings import ConfigError
from train.config import FitConfig, ema_name
from train.objective import Objective
from train.optimizer import EmaAdamW, parameter_groups
from train.ranks import Ranks, import_deepspeed

FIRST_SCALE = 2.0**16  # as torch's scaler, and so is how often it grows


@dataclasses.dataclass
class LossScale:
    """What the loss is multiplied with so that fp16 gradients do not vanish, alike on all ranks; 1 otherwise.

    Halved when the gradients overflow, doubled after GROWTH steps without (Micikevicius et al. 2018,
    arXiv:1710.03740, section 3.2). A power of two, so that it rounds nothing. Our own, since DeepSpeed (0.19) clips
    gradients that torch's scaler has not unscaled yet, and does not tell that scaler of an overflow.
    """

    GROWTH = 2000

    value: float = 1.0
    steady: int = 0  # steps since it last changed
    dynamic: bool = False

    def update(self, overflow: bool) -> None:
        """Take in whether a step overflowed."""
        if not self.dynamic:
            return
        self.steady = 0 if overflow else self.steady + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.steady == self.GROWTH:
            self.value, self.steady = self.value * 2, 0


def loss_scale(config: FitConfig, state: Any) -> LossScale:
    """The scale of a fit: where a checkpoint kept its fields, as they were."""
    if config.precision != "fp16":
        return LossScale()
    return LossScale(**state) if isinstance(state, dict) else LossScale(FIRST_SCALE, dynamic=True)


def averages(config: FitConfig) -> tuple[str, ...]:
    """Names of the EMAs among the optimizer's states, the one by half-life first."""
    return (ema_name(), *(ema_name(std) for std in config.ema_stds))


def start(config: FitConfig, objective: Objective, ranks: Ranks, micro: int, accumulation: int) -> tuple[Any, EmaAdamW]:
    """DeepSpeed's engine around the objective, and the optimizer inside it.

    The module stays in fp32 and precision is autocast's: DeepSpeed's own bf16 mode would make its fp32
    masters from weights that were already rounded to bf16.
    """
    objective.train()
    if config.activation_checkpointing:
        objective.checkpoint_activations()
    if config.compile:
        _compile(objective)
    if config.precision == "fp16":  # bf16 is DeepSpeed's autocast, see below
        objective.forward = torch.autocast(ranks.device.type, torch.float16)(objective.forward)  # type: ignore[method-assign]
    # An optimizer on the CPU (offload) has no fused kernel on every build of torch; the plain one is everywhere.
    optimizer = EmaAdamW(
        parameter_groups(objective.model, config.weight_decay), averages(config),
        lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=config.offload == "none",
    )  # fmt: skip
    # DeepSpeed allocates its buckets in full and wants them aligned.
    bucket = -(-min(sum(p.numel() for p in objective.parameters()), 200_000_000) // 4096) * 4096
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # DeepSpeed's own maps of who owns what are wrong with it (0.19), and with them checkpoints.
        "round_robin_gradients": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # gloo has no reduce-scatter worth the name; with these two a step of the demo's UNet takes 0.85x on CPUs.
        "reduce_scatter": ranks.device.type != "cpu",
        "contiguous_gradients": ranks.device.type != "cpu",
    }
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": ranks.device.type != "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": ranks.device.type != "cpu"}
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip if config.grad_clip and config.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine = import_deepspeed().initialize(model=objective, optimizer=optimizer, config=settings)[0]
    return engine, optimizer


def _compile(objective: Objective) -> None:
    """Compile the model in place, so that names stay as they are; each shape of a bucket is compiled once."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        compiler = ""
    if not shutil.which(compiler):
        raise ConfigError(
            "compile: torch.compile builds its kernels with a C++ compiler, and there is none here; install g++, or "
            "set compile to false"
        )
    # Beyond its limit torch would go on without compiling, and say so in a log at most.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    for network in objective.networks():
        network.compile(dynamic=False)


def backward(engine: Any, loss: torch.Tensor, scale: LossScale) -> None:
    """Add the gradients of one micro-batch's loss, times the scale; DeepSpeed takes it out again under ZeRO."""
    if scale.dynamic and engine.zero_optimization_stage():
        engine.optimizer.override_loss_scale(scale.value)
    elif scale.dynamic:
        loss = loss * scale.value
    engine.backward(loss)


def clip_without_zero(engine: Any, objective: Objective, config: FitConfig, scale: LossScale) -> float | None:
    """Without ZeRO: unscale and clip the gradients, summed over the ranks already, and return their norm before the
    clipping; else None. DeepSpeed would clip too, but would not tell the norm."""
    if config.zero_stage:
        return None
    if scale.dynamic:
        torch._foreach_mul_([p.grad for p in objective.parameters() if p.grad is not None], 1.0 / scale.value)
    return float(torch.nn.utils.clip_grad_norm_(objective.parameters(), config.grad_clip or math.inf))


def overflowed(engine: Any, norm: float | None) -> bool:
    """Whether the last step's gradients, whose norm was `norm`, were too large for fp16, or not finite at all."""
    return bool(getattr(engine.optimizer, "overflow", False)) or (norm is not None and not math.isfinite(norm))


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradients before clipping; None where nobody computed it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def step_norm(engine: Any) -> float | None:
    """As `gradient_norm`, within a step, while the optimizer is asked; None where DeepSpeed does not compute it."""
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    return None if norm is None else float(norm)
