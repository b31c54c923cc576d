"""DeepSpeed around an objective: its settings, and what it does not tell by itself."""

from __future__ import annotations

import math
from typing import Any

import torch

from train.config import FitConfig, ema_name
from train.objectives import Objective
from train.optimizer import EmaAdamW, parameter_groups
from train.ranks import Ranks, import_deepspeed


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
        # In place, so that names stay as they are. Each shape of a bucket is compiled once.
        objective.model.compile(dynamic=False)
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
    if config.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
    engine = import_deepspeed().initialize(model=objective, optimizer=optimizer, config=settings)[0]
    return engine, optimizer


def clip_without_zero(engine: Any, objective: Objective, config: FitConfig) -> float | None:
    """Without ZeRO: clip the gradients, already summed over the ranks, and return their norm before; else None.

    DeepSpeed would clip too, but would not tell the norm. fp16 gradients are left to its loss scaler.
    """
    if config.zero_stage or engine.torch_autocast_z0_gradscaler is not None:
        return None
    return float(torch.nn.utils.clip_grad_norm_(objective.parameters(), config.grad_clip or math.inf))


def loss_scale(engine: Any) -> float | None:
    """The present scale of fp16's loss; None where it is not scaled, or always alike."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if engine.torch_autocast_z0_gradscaler is not None:
        return float(engine.torch_autocast_z0_gradscaler.get_scale())
    return float(scaler.cur_scale) if scaler is not None and scaler.dynamic else None


def restore_loss_scale(engine: Any, scale: float | None) -> None:
    """Go on with the scale that `loss_scale` gave."""
    if scale is None:
        return
    if engine.torch_autocast_z0_gradscaler is not None:
        state = engine.torch_autocast_z0_gradscaler.state_dict()
        engine.torch_autocast_z0_gradscaler.load_state_dict({**state, "scale": scale})
    elif getattr(getattr(engine.optimizer, "loss_scaler", None), "dynamic", False):
        engine.optimizer.loss_scaler.cur_scale = scale


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradients before clipping; None where nobody computed it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def step_norm(engine: Any) -> float | None:
    """As `gradient_norm`, within a step, while the optimizer is asked; None where DeepSpeed does not compute it."""
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    return None if norm is None else float(norm)
