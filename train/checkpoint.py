"""Checkpoints that are complete or absent, and belong to no ZeRO stage and no number of ranks.

    step-00001000/
        weights.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  ema.safetensors
        manifest.json        sizes and sha256 of these, images, step, config, fingerprint, model_config

Every file is keyed by the model's own parameter names, in fp32 (and, for weights and ema, the model's
buffers as they are), so that the same file resumes training anywhere and loads into the plain model. A
folder is built under a temporary name, fsynced, renamed, and only then does `latest` point to it.

What each rank owns of a parameter under ZeRO is a run of its flattened values (`Fragment`). To save, rank
0 collects the fragments bucket by bucket, one file at a time: no other rank ever holds more than its own.
To load, weights go into the plain model before DeepSpeed takes it over, and each rank copies its own
fragments of the optimizer's states out of the files.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shards import storage
from shards.fingerprint import digest_file
from shards.settings import StageError
from train.folders import FORMAT_VERSION, MANIFEST, STATES, delete_old, folder_name, read_manifest

BUCKET = 16 << 20  # values sent to rank 0 at once: 64 MiB


# ---- what a rank owns ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fragment:
    """`length` values of a flattened parameter from `offset` on, at `start` of the flattened `owner`.

    owner: the fp32 tensor that the optimizer updates, and the key of its state.
    """

    offset: int
    length: int
    owner: torch.Tensor
    start: int

    def read(self, values: torch.Tensor) -> torch.Tensor:
        """This fragment of `values`, a tensor shaped like the owner; flat."""
        return values.detach().reshape(-1).narrow(0, self.start, self.length)

    def write(self, values: torch.Tensor, full: torch.Tensor) -> None:
        """Copy this fragment of the flat, whole parameter `full` into `values`, shaped like the owner."""
        part = full.reshape(-1).narrow(0, self.offset, self.length)
        if values.ndim == 1:
            values.narrow(0, self.start, self.length).copy_(part)
        else:  # without ZeRO the owner is the parameter itself, in whatever memory format
            values.copy_(part.reshape(values.shape))


def fragments(engine: Any, model: torch.nn.Module) -> dict[str, Fragment]:
    """What this rank owns of each trained parameter of `model`, by name; parameters it owns nothing of are absent."""
    stage, wrapped = engine.zero_optimization_stage(), engine.optimizer
    owned: dict[str, Fragment] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if stage == 3:
            group, start, _ = wrapped.grad_position[wrapped.get_param_id(p)]
            share = p.ds_tensor.ds_numel  # of every rank, the last ones padded
            offset = share * dist.get_rank()
            length = max(0, min(share, p.ds_numel - offset))
            owner = wrapped.fp32_partitioned_groups_flat[group]
        elif stage in (1, 2):
            # _hp_mapping knows DeepSpeed's alignment padding, which summing up sizes would miss.
            mapping = p._hp_mapping
            if mapping is None:
                continue
            offset, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            owner = wrapped.single_partition_of_fp32_groups[mapping.param_group_index]
            start = mapping.hp_fragment_address.start
        else:
            owner, offset, start, length = p, 0, 0, p.numel()
        if length:
            owned[name] = Fragment(offset, length, owner, start)
    return owned


def _shape(p: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def _collect(
    owned: dict[str, Fragment], shapes: dict[str, tuple[int, ...]], values: dict[int, torch.Tensor], replicated: bool
) -> dict[str, torch.Tensor]:
    """On rank 0 the whole parameters, fp32 on the CPU; empty elsewhere. Collective.

    values: by id of the owner, the tensor to read (the owner itself, or one of its states).
    replicated: every rank has everything, so nothing needs to be sent.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    whole: dict[str, torch.Tensor] = {}
    if rank == 0:
        for name, shape in shapes.items():
            whole[name] = torch.zeros(shape, dtype=torch.float32)
        for name, f in owned.items():
            whole[name].view(-1).narrow(0, f.offset, f.length).copy_(f.read(values[id(f.owner)]))
    if world == 1 or replicated:
        return whole
    tables: list[Any] = [None] * world
    dist.all_gather_object(tables, [(n, f.offset, f.length) for n, f in owned.items()])
    device = next(iter(values.values())).device
    for sender in range(1, world):
        for bucket in _buckets(tables[sender]):
            size = sum(length for _, _, length in bucket)
            if rank == sender:
                flat = torch.cat([owned[n].read(values[id(owned[n].owner)]) for n, _, _ in bucket])
                dist.send(flat, 0)
            elif rank == 0:
                flat = torch.empty(size, dtype=torch.float32, device=device)
                dist.recv(flat, sender)
                parts = flat.cpu().split([length for _, _, length in bucket])
                for (name, offset, length), part in zip(bucket, parts, strict=True):
                    whole[name].view(-1).narrow(0, offset, length).copy_(part)
    return whole


def _buckets(table: list[tuple[str, int, int]]) -> list[list[tuple[str, int, int]]]:
    buckets: list[list[tuple[str, int, int]]] = []
    room = 0
    for entry in table:
        if entry[2] > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(entry)
        room -= entry[2]
    return buckets


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is saved beside the trained parameters: persistent buffers and frozen parameters."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    return {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n not in trained}


# ---- save ------------------------------------------------------------------------------------------


def save(
    root: Path, step: int, engine: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
    manifest: dict[str, Any], keep: int,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` and delete all but the newest `keep`; returns its folder. Collective.

    manifest: what is stored beside the files' sizes and digests. An error of rank 0 (a full disk, say)
    is raised on all ranks, as StageError.
    """
    owned = fragments(engine, model)
    shapes = {n: _shape(p) for n, p in model.named_parameters() if p.requires_grad}
    replicated = engine.zero_optimization_stage() == 0
    final = root / folder_name(step)
    tmp: Path | None = None
    error: str | None = None
    files: dict[str, dict[str, Any]] = {}
    buffers = _buffers(model) if dist.get_rank() == 0 else {}
    for name in ("weights", *STATES):
        values = {id(f.owner): f.owner if name == "weights" else optimizer.state[f.owner][name] for f in owned.values()}
        whole = _collect(owned, shapes, values, replicated)
        if dist.get_rank() == 0 and error is None:
            try:
                tmp = tmp or storage.temporary_folder(final)
                file = tmp / f"{name}.safetensors"
                save_file(whole | (buffers if name in ("weights", "ema") else {}), file)
                files[file.name] = {"size": file.stat().st_size, "sha256": digest_file(file)}
            except (OSError, SafetensorError) as e:
                error = f"{final}: the checkpoint cannot be written: {e}"
        del whole
    if dist.get_rank() == 0 and error is None and tmp is not None:
        try:
            record = {**manifest, "format_version": FORMAT_VERSION, "step": step, "files": files}
            storage.write_json(str(tmp / MANIFEST), record)
            storage.replace_folder(tmp, final)
            storage.write_atomic(str(root / "latest"), final.name.encode() + b"\n")
            delete_old(root, keep)
        except OSError as e:
            error = f"{final}: the checkpoint cannot be written: {e}"
    if error is not None and tmp is not None:
        shutil.rmtree(tmp, ignore_errors=True)
    errors = [error]
    dist.broadcast_object_list(errors, 0)
    if errors[0] is not None:
        raise StageError(errors[0])
    return final


# ---- load ------------------------------------------------------------------------------------------


def load_weights(folder: str | Path, which: str = "ema") -> dict[str, torch.Tensor]:
    """The whole state dict of a checkpoint's model, fp32: which = "ema" or "raw". Raises StageError."""
    if which not in ("ema", "raw"):
        raise ValueError(f"weights are 'ema' or 'raw', not '{which}'")
    file = Path(folder) / ("ema.safetensors" if which == "ema" else "weights.safetensors")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as e:
        raise StageError(f"{file} cannot be read: {e}; the checkpoint is not complete") from None


def load_model(folder: Path, model: torch.nn.Module, which: str = "raw") -> None:
    """Copy a checkpoint's weights into a plain model; raises StageError where names or shapes are not the model's."""
    try:
        model.load_state_dict(load_weights(folder, which))
    except RuntimeError as e:
        raise StageError(f"{folder} holds another model: {' '.join(str(e).split())[:300]}") from None


def load_optimizer(folder: Path, engine: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill in this rank's part of the moments and the EMA, whatever stage and number of ranks wrote them."""
    applied = read_manifest(folder)["optimizer_steps"]
    if applied == 0:
        return  # nothing but skipped steps: the states come into being at the first step
    owned = fragments(engine, model)
    for f in owned.values():
        if f.owner not in optimizer.state or "ema" not in optimizer.state[f.owner]:
            fused = bool(optimizer.defaults.get("fused"))
            state: dict[str, Any] = {name: torch.zeros_like(f.owner) for name in STATES}
            # Fused AdamW keeps the count beside the values, the others on the CPU.
            device = f.owner.device if fused else "cpu"
            state["step"] = torch.tensor(float(applied), dtype=torch.float32, device=device)
            optimizer.state[f.owner] = state
    for state_name in STATES:
        with safe_open(folder / f"{state_name}.safetensors", "pt") as file:
            for name, f in owned.items():
                f.write(optimizer.state[f.owner][state_name].detach(), file.get_tensor(name))
