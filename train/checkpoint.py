"""Checkpoints that are complete or absent, and belong to no ZeRO stage and no number of ranks.

    step-00001000/
        weights.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  ema.safetensors  ema_0.050.safetensors ...
        manifest.json        sizes and sha256 of these, images, step, config, fingerprint, model_config
    posthoc/
        ema_0.050-000000064000.safetensors   the further EMAs in float16, never deleted (see posthoc.py)

Every file is keyed by the model's own parameter names, in fp32 (and, for weights and the EMAs, the model's
buffers as they are), so that the same file resumes training anywhere and loads into the plain model. A
folder is built under a temporary name, fsynced, renamed, and only then does `latest` point to it. The values are
copied before the next step and written by a thread while training goes on.

What each rank owns of a parameter under ZeRO is a run of its flattened values (`Fragment`). To save, rank
0 collects the fragments bucket by bucket, one file at a time: no other rank ever holds more than its own.
To load, weights go into the plain model before DeepSpeed takes it over, and each rank copies its own
fragments of the optimizer's states out of the files.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise

from shards import storage
from shards.fingerprint import digest_file
from shards.settings import StageError
from train.folders import FORMAT_VERSION, MANIFEST, MOMENTS, POSTHOC, Keep, delete_old, folder_name, read_manifest

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
    owned: dict[str, Fragment],
    whole: dict[str, torch.Tensor],
    values: dict[int, torch.Tensor],
    replicated: bool,
) -> None:
    """On rank 0, fill `whole` with the whole parameters, fp32 on the CPU. Collective.

    values: by id of the owner, the tensor to read (the owner itself, or one of its states).
    replicated: every rank has everything, so nothing needs to be sent.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        for name, f in owned.items():
            whole[name].view(-1).narrow(0, f.offset, f.length).copy_(f.read(values[id(f.owner)]), non_blocking=True)
    if world > 1 and not replicated:
        tables: list[Any] = [None] * world
        dist.all_gather_object(tables, [(n, f.offset, f.length) for n, f in owned.items()])
        # Collectives want tensors on the accelerator, also where offloaded values lie in main memory.
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        for sender in range(1, world):
            for bucket in _buckets(tables[sender]):
                size = sum(length for _, _, length in bucket)
                if rank == sender:
                    flat = torch.cat([owned[n].read(values[id(owned[n].owner)]) for n, _, _ in bucket])
                    dist.send(flat.to(device), 0)
                elif rank == 0:
                    flat = torch.empty(size, dtype=torch.float32, device=device)
                    dist.recv(flat, sender)
                    parts = flat.cpu().split([length for _, _, length in bucket])
                    for (name, offset, length), part in zip(bucket, parts, strict=True):
                        whole[name].view(-1).narrow(0, offset, length).copy_(part)
    if rank == 0 and torch.cuda.is_available():
        torch.cuda.synchronize()


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


def _others(model: torch.nn.Module, frozen: bool) -> dict[str, torch.Tensor]:
    """What is saved beside the trained parameters: persistent buffers and, where asked for, frozen parameters."""
    left_out = {n for n, p in model.named_parameters() if p.requires_grad or not frozen}
    return {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n not in left_out}


# ---- save ------------------------------------------------------------------------------------------


class Saver:
    """Saves checkpoints under `root`. Every method is collective, and an error of rank 0 is raised on all ranks.

    averages: names of the EMAs among the optimizer's states. frozen: whether frozen weights are saved too.
    """

    def __init__(
        self, root: Path, engine: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
        averages: Sequence[str], keep: Keep, frozen: bool = True,
    ) -> None:  # fmt: skip
        self.root, self.engine, self.model, self.optimizer = root, engine, model, optimizer
        self.averages, self.keep, self.frozen = tuple(averages), keep, frozen
        self._held: dict[str, dict[str, torch.Tensor]] = {}
        self._thread: threading.Thread | None = None
        self.error: str | None = None

    def save(self, step: int, manifest: dict[str, Any]) -> Path:
        """Copy what the checkpoint of `step` holds and begin to write it; returns its folder to be.

        manifest: what is stored beside the files' sizes and digests. Waits for the one before to be written.
        """
        self.finish()
        owned = fragments(self.engine, self.model)
        replicated = self.engine.zero_optimization_stage() == 0
        final = self.root / folder_name(step)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for name in ("weights", *MOMENTS, *self.averages):
            values = {id(o): self._values(o, name) for o in _owners(owned)}
            if dist.get_rank() == 0 and name not in self._held:
                # Kept for the next time: fresh pages would cost more than the copy.
                pinned = torch.cuda.is_available()
                self._held[name] = {n: torch.empty(_shape(p), pin_memory=pinned) for n, p in trained.items()}
            _collect(owned, self._held.get(name, {}), values, replicated)
        if dist.get_rank() == 0:
            others = _others(self.model, self.frozen)
            self._thread = threading.Thread(target=self._write, args=(final, step, manifest, others), name="checkpoint")
            self._thread.start()
        return final

    def _values(self, owner: torch.Tensor, name: str) -> torch.Tensor:
        if name == "weights":
            return owner
        state = self.optimizer.state.get(owner, {})
        if name in state:
            return state[name]
        # Where every step so far was skipped: as the first step would make them.
        return torch.zeros_like(owner) if name in MOMENTS else owner

    @property
    def failed(self) -> bool:
        """Whether the last writing is known to have failed; rank 0 alone knows."""
        return self.error is not None

    def finish(self) -> None:
        """Wait until the last checkpoint is written; raises StageError on all ranks where it cannot be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        errors = [self.error]
        dist.broadcast_object_list(errors, 0)
        if errors[0] is not None:
            raise StageError(errors[0])

    def wait(self) -> None:
        """Wait for the writing thread, whatever became of it; not collective."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, final: Path, step: int, manifest: dict[str, Any], others: dict[str, torch.Tensor]) -> None:
        tmp: Path | None = None
        files: dict[str, dict[str, Any]] = {}
        try:
            tmp = storage.temporary_folder(final)
            for name, tensors in self._held.items():
                file = tmp / f"{name}.safetensors"
                save_file(tensors | (others if name not in MOMENTS else {}), file)
                files[file.name] = {"size": file.stat().st_size, "sha256": digest_file(file)}
            for name in self.averages[1:]:
                self._put_aside(name, int(manifest["images"]), others)
            record = {**manifest, "format_version": FORMAT_VERSION, "step": step, "files": files}
            storage.write_json(str(tmp / MANIFEST), record)
            storage.replace_folder(tmp, final)
            storage.write_atomic(str(self.root / "latest"), final.name.encode() + b"\n")
            delete_old(self.root, self.keep)
        except (OSError, SafetensorError) as e:
            self.error = f"{final}: the checkpoint cannot be written: {e}"
            if tmp is not None:
                shutil.rmtree(tmp, ignore_errors=True)
        except BaseException as e:  # a bug, but one that must not pass in silence in a thread
            self.error = f"{final}: the checkpoint cannot be written: {type(e).__name__}: {e}"

    def _put_aside(self, name: str, images: int, others: dict[str, torch.Tensor]) -> None:
        half = {n: t.half() for n, t in self._held[name].items()} | others
        data = serialise(half, metadata={"images": str(images), "std": name.removeprefix("ema_")})
        storage.write_atomic(str(self.root / POSTHOC / f"{name}-{images:012d}.safetensors"), data)


# ---- load ------------------------------------------------------------------------------------------


def load_weights(folder: str | Path, which: str = "ema") -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint's model, fp32: which = "raw", or the name of an EMA. Raises StageError."""
    name = "weights" if which == "raw" else which
    file = Path(folder) / f"{name}.safetensors"
    if name != "weights" and not file.is_file():
        there = sorted(p.stem for p in Path(folder).glob("ema*.safetensors"))
        if there:
            raise StageError(f"{folder} has no weights '{which}'; it has raw, {', '.join(there)}")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as e:
        raise StageError(f"{file} cannot be read: {e}; the checkpoint is not complete") from None


def load_model(folder: Path, model: torch.nn.Module, which: str = "raw") -> None:
    """Copy a checkpoint's weights into a plain model; raises StageError where names or shapes are not the model's.

    Frozen parameters may be absent: a fine-tuned model has them from where it started.
    """
    weights = load_weights(folder, which)
    absent = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad and n not in weights}
    try:
        model.load_state_dict(weights | absent)
    except RuntimeError as e:
        raise StageError(f"{folder} holds another model: {' '.join(str(e).split())[:300]}") from None


def load_optimizer(
    folder: Path, engine: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, averages: Sequence[str]
) -> None:
    """Fill in this rank's part of the moments and the EMAs, whatever stage and number of ranks wrote them."""
    applied = read_manifest(folder)["optimizer_steps"]
    if applied == 0:
        optimizer.state.clear()
        return  # nothing but skipped steps: the states come into being at the first step
    owned = fragments(engine, model)
    names = (*MOMENTS, *averages)
    for f in owned.values():
        fused = bool(optimizer.defaults.get("fused"))
        # Fused AdamW keeps the count beside the values, the others on the CPU.
        device = f.owner.device if fused else "cpu"
        state = optimizer.state[f.owner]
        for name in names:
            state.setdefault(name, torch.zeros_like(f.owner))
        state["step"] = torch.tensor(float(applied), dtype=torch.float32, device=device)
    for name in names:
        _fill(folder / f"{name}.safetensors", owned, {id(o): optimizer.state[o][name] for o in _owners(owned)})


def load_masters(folder: Path, engine: Any, model: torch.nn.Module) -> None:
    """Put a checkpoint's weights into an engine that is running: the fp32 values that this rank owns, and from
    there, as after a step of DeepSpeed's, the model. Collective."""
    owned = fragments(engine, model)
    _fill(folder / "weights.safetensors", owned, {id(o): o for o in _owners(owned)})
    stage, wrapped = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        wrapped.update_lp_params()
    elif stage == 3:
        for group in range(len(wrapped.fp16_groups)):
            wrapped._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := list(wrapped.persistent_parameters):
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _owners(owned: dict[str, Fragment]) -> list[torch.Tensor]:
    return list({id(f.owner): f.owner for f in owned.values()}.values())


def _fill(file: Path, owned: dict[str, Fragment], values: dict[int, torch.Tensor]) -> None:
    with safe_open(file, "pt") as source:
        for name, f in owned.items():
            f.write(values[id(f.owner)].detach(), source.get_tensor(name))
