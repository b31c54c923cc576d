"""Checkpoints that are complete or absent, and belong to no ZeRO stage and no number of ranks.

    step-00001000/
        rank-00003-of-00064-<attempt>.safetensors   this rank's flat arrays: 0.weights, 0.exp_avg, 0.ema, ...
        others-<attempt>.safetensors                buffers and frozen weights by name, where there are any
        manifest.json                               written last: the commit
    posthoc/step-00001000/                          the further EMAs alone, in float16 (see posthoc.py)

Each rank writes what it owns, and nothing is gathered but records: the manifest has each file's size and sha256, where
its arrays begin, and its pieces [parameter, offset, length, flat, start]. In the loop `save` copies the flat arrays
into memory that it keeps, and does nothing else; a thread writes and hashes, the threads exchange their records over
a process group of their own, and rank 0's writes the manifest. No folder is renamed, so any fsspec URL will do.
<attempt> is drawn at each start, so that a writer that was thought dead cannot touch a committed checkpoint's files.

Loading compares the pieces of the new layout with those of the old, merges them into ranges of bytes, and reads one
state at a time. A checkpoint of format 1 (a file a state, keyed by parameter) is read as one whole piece a parameter.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise

from shards import storage
from shards.settings import StageError
from train import folders
from train.engine import Engine, Piece
from train.folders import CHUNK, FORMAT_VERSION, MANIFEST, MOMENTS, POSTHOC, Keep
from train.ranks import Ranks

GATHER = 1 << 26  # values of a state that are read at once
SEEN_AFTER_S = 5.0  # how long a shared disk may take to show a file that another machine wrote
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


# ---- save ------------------------------------------------------------------------------------------


class Saver:
    """Saves checkpoints under the URL `root`. Collective, but for `wait` and `error`. A context, whose end waits."""

    def __init__(self, root: str, engine: Engine, keep: Keep, ranks: Ranks) -> None:
        self.root, self.engine, self.keep, self.ranks = str(root), engine, keep, ranks
        # The threads' own, so that they never meet the loop's collectives.
        self._group = dist.new_group(backend="gloo")
        self.attempt: str = ranks.from_first(secrets.token_hex(4))
        self._name = f"rank-{ranks.rank:05d}-of-{ranks.world:05d}-{self.attempt}.safetensors"
        self._copies: dict[tuple[int, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self.error: str | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, step: int, facts: dict[str, Any]) -> str:
        """Copy what the checkpoint of `step` holds and begin to write it; returns its folder to be.

        facts: what is stored beside the files; waits for the checkpoint before to be written.
        """
        self.finish()
        pieces = self.engine.owned()
        used: dict[int, tuple[int, int]] = {}  # of each flat the part that this rank writes, without what pads it
        for p in pieces:
            first, end = used.get(p.flat, (p.start, 0))
            used[p.flat] = min(first, p.start), max(end, p.start + p.length)
        pinned = self.ranks.device.type == "cuda"
        for flat, state, values in self.engine.arrays():
            if flat not in used:
                continue
            first, end = used[flat]
            if (flat, state) not in self._copies:  # kept: fresh pages would cost more than the copy
                self._copies[flat, state] = torch.empty(end - first, pin_memory=pinned)
            self._copies[flat, state].copy_(values[first:end], non_blocking=True)
        others = self._others() if self.ranks.first else {}
        if pinned:
            torch.cuda.current_stream().synchronize()
        numbers = {n: i for i, (n, _) in enumerate(self.engine.parameters())}
        rows = [[numbers[p.name], p.offset, p.length, p.flat, p.start - used[p.flat][0]] for p in pieces]
        folder = storage.join(self.root, folders.folder_name(step))
        manifest = {
            **facts,
            "format_version": FORMAT_VERSION,
            "step": step,
            "parameters": [[n, list(shape)] for n, shape in self.engine.parameters()],
        }
        self._thread = threading.Thread(target=self._write, args=(folder, manifest, rows, others), name="checkpoint")
        self._thread.start()
        return folder

    def finish(self) -> None:
        """Wait until the last checkpoint is written; raises StageError, on all ranks, where it cannot be."""
        self.wait()
        if self.error is not None:
            raise StageError(self.error)

    def wait(self) -> None:
        """Wait for the writing thread, whatever became of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _others(self) -> dict[str, torch.Tensor]:
        trained = {n for n, _ in self.engine.model.named_parameters()}
        kept = {n for n in self.engine.model.state_dict(keep_vars=True) if n not in trained}
        buffers = {n: b.detach().cpu().contiguous() for n, b in self.engine.model.named_buffers() if n in kept}
        return self.engine.frozen | buffers

    def _write(self, folder: str, manifest: dict[str, Any], rows: list[Any], others: dict[str, torch.Tensor]) -> None:
        further = self.engine.averages[1:]
        aside = storage.join(self.root, POSTHOC, folders.name_of(folder))
        records: list[dict[str, Any]] = []
        try:
            records.append(self._rank_file(folder, dict(self._copies), rows))
            if further:
                halves = {k: v.half() for k, v in self._copies.items() if k[1] in further}
                records.append(self._rank_file(aside, halves, rows))
            if others:
                records += [self._others_file(where, others) for where in ((folder, aside) if further else (folder,))]
        except Exception as e:  # whatever it is, all ranks must hear of it
            records = [{"error": f"{self._name}: {e or type(e).__name__}"}]
        try:
            everyone: list[Any] = [None] * self.ranks.world
            dist.all_gather_object(everyone, records, group=self._group)
            all_records = [record for rank in everyone for record in rank]
            errors = [r["error"] for r in all_records if "error" in r]
            outcome = ["; ".join(errors)]
            if self.ranks.first and not errors:
                outcome = [self._commit(folder, aside if further else None, manifest, all_records)]
            dist.broadcast_object_list(outcome, 0, group=self._group)
            if outcome[0]:
                self.error = f"{folder}: the checkpoint cannot be written: {outcome[0]}"
        except Exception as e:
            self.error = f"{folder}: the checkpoint cannot be written: {e or type(e).__name__}"

    def _commit(self, folder: str, aside: str | None, manifest: dict[str, Any], records: list[dict[str, Any]]) -> str:
        """Write the manifests, and delete what need not be kept; returns what went wrong."""
        try:
            for where in filter(None, (aside, folder)):
                files = {r["name"]: r["file"] for r in records if r["folder"] == where}
                put_manifest(where, {**manifest, "files": files})
                folders.delete(where, but=(MANIFEST, *files))  # what a dead attempt left there
            folders.delete_old(self.root, self.keep, (manifest.get("best"),))
        except Exception as e:
            return str(e) or type(e).__name__
        return ""

    def _rank_file(self, folder: str, arrays: dict[tuple[int, str], torch.Tensor], rows: list[Any]) -> dict[str, Any]:
        header: dict[str, Any] = {}
        at = 0
        for (flat, state), values in arrays.items():
            kind = "F16" if values.dtype == torch.float16 else "F32"
            span = [at, at + values.nbytes]
            header[f"{flat}.{state}"] = {"dtype": kind, "shape": [len(values)], "data_offsets": span}
            at += values.nbytes
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        parts = (struct.pack("<Q", len(head)), head, *(v.numpy().data.cast("B") for v in arrays.values()))
        size, sha256 = put_file(storage.join(folder, self._name), parts)
        begins = {n: 8 + len(head) + h["data_offsets"][0] for n, h in header.items()}
        kinds = sorted({h["dtype"] for h in header.values()})
        file = {"size": size, "sha256": sha256, "arrays": begins, "pieces": rows}
        return {"folder": folder, "name": self._name, "file": file | ({"dtype": kinds[0]} if kinds else {})}

    def _others_file(self, folder: str, others: dict[str, torch.Tensor]) -> dict[str, Any]:
        name = f"others-{self.attempt}.safetensors"
        size, sha256 = put_file(storage.join(folder, name), (serialise(others),))
        return {"folder": folder, "name": name, "file": {"size": size, "sha256": sha256, "others": True}}


def put_file(url: str, parts: Iterable[Any]) -> tuple[int, str]:
    """Write a file of these parts, durably where it lies on a disk; its size and sha256."""
    import hashlib

    fs, path = url_to_fs(url)
    fs.makedirs(fs._parent(path), exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with fs.open(path, "wb") as f:
        for part in parts:
            for begin in range(0, len(part), CHUNK):
                chunk = part[begin : begin + CHUNK]
                digest.update(chunk)
                f.write(chunk)
                size += len(chunk)
        if storage.is_local(url):
            f.flush()
            os.fsync(f.fileno())
    return size, digest.hexdigest()


def put_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """Commit a checkpoint."""
    storage.write_atomic(storage.join(folder, MANIFEST), json.dumps(manifest, allow_nan=False).encode())


# ---- find ------------------------------------------------------------------------------------------


def newest(root: str, ranks: Ranks, sound: bool = False) -> tuple[str, dict[str, Any]] | None:
    """Folder and manifest of the newest checkpoint that is whole, or None. Collective: the ranks share the hashing.

    sound: pass over those whose last step was vetoed: going back to their weights would be going nowhere. Rank 0 says
    which there are, since the others may see an older state of a shared disk.
    """
    for folder in ranks.from_first(folders.folders(root) if ranks.first else None):
        manifest = ranks.from_first(_manifest_or_none(folder) if ranks.first else None)
        if sound and manifest is not None and folders.vetoed(manifest):
            continue
        fault = "its manifest is absent or unreadable"
        if manifest is not None:
            mine = list(manifest["files"].items())[ranks.rank :: ranks.world]
            faults = [f for f in ranks.gather(_damage_seen(folder, mine)) if f]
            fault = faults[0] if faults else ""
        if not fault:
            return folder, manifest
        if ranks.first:
            folders.log.warning("the checkpoint %s is skipped: %s", folders.name_of(folder), fault)
    return None


def _manifest_or_none(folder: str) -> dict[str, Any] | None:
    try:
        return folders.read_manifest(folder)
    except StageError:
        return None


def _damage_seen(folder: str, files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    until = time.monotonic() + SEEN_AFTER_S
    while any(storage.size(storage.join(folder, n)) is None for n, _ in files) and time.monotonic() < until:
        time.sleep(0.5)
    return folders.damage_of(folder, files)


# ---- load ------------------------------------------------------------------------------------------


class Index:
    """Which bytes of which files hold a checkpoint's values."""

    def __init__(self, folder: str, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = str(folder), manifest
        self.fs, self.path = url_to_fs(self.folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.others: dict[str, torch.Tensor] = {}
        # (state, parameter) -> [(offset, length, path, first byte, type)]
        self._found: dict[tuple[str, str], list[tuple[int, int, str, int, str]]] = {}
        if manifest["format_version"] == 1:
            self._index_first_format()
        else:
            self._index()
        for pieces in self._found.values():
            pieces.sort()

    def _index(self) -> None:
        named = [(n, tuple(shape)) for n, shape in self.manifest["parameters"]]
        self.shapes = dict(named)
        for file, entry in self.manifest["files"].items():
            if entry.get("others"):
                self.others = deserialise(self.fs.cat_file(f"{self.path}/{file}"))
                continue
            kind = entry.get("dtype", "F32")
            states: dict[int, list[tuple[str, int]]] = {}
            for array, begin in entry["arrays"].items():
                flat, _, state = array.partition(".")
                states.setdefault(int(flat), []).append((state, begin))
            width = _TYPES[kind].itemsize
            for number, offset, length, flat, start in entry["pieces"]:
                for state, begin in states.get(flat, ()):
                    piece = (offset, length, f"{self.path}/{file}", begin + width * start, kind)
                    self._found.setdefault((state, named[number][0]), []).append(piece)

    def _index_first_format(self) -> None:
        """A file a state, keyed by parameter: what the moments' files hold is trained, what else there is is not."""
        headers = {f.removesuffix(".safetensors"): self._header(f"{self.path}/{f}") for f in self.manifest["files"]}
        trained = set(headers.get(MOMENTS[0], ()))
        for state, header in headers.items():
            path = f"{self.path}/{state}.safetensors"
            for name, (kind, shape, begin) in header.items():
                if name in trained:
                    self.shapes[name] = shape
                    self._found[state, name] = [(0, math.prod(shape), path, begin, kind)]
        beside = [n for n in headers.get("weights", {}) if n not in trained]
        if beside:
            whole = deserialise(self.fs.cat_file(f"{self.path}/weights.safetensors"))
            self.others = {n: whole[n] for n in beside}

    def _header(self, path: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
        size = struct.unpack("<Q", self.fs.cat_file(path, start=0, end=8))[0]
        header = json.loads(self.fs.cat_file(path, start=8, end=8 + size))
        return {
            n: (e["dtype"], tuple(e["shape"]), 8 + size + e["data_offsets"][0])
            for n, e in header.items()
            if n != "__metadata__"
        }

    def has(self, state: str, name: str) -> bool:
        """Whether there are values of this state of a parameter."""
        return (state, name) in self._found

    def read(self, state: str, wanted: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Values for [(parameter, offset, length)]: yields (number in `wanted`, from where on, float32 array)."""
        ranges: list[tuple[str, int, int, str]] = []
        targets: list[list[tuple[int, int, int]]] = []
        pending = 0
        for number, (name, offset, length) in enumerate(wanted):
            pieces = self._found.get((state, name), [])
            i = max(0, bisect.bisect_right(pieces, (offset, 1 << 62)) - 1)
            for o, n, path, byte, kind in pieces[i:]:
                first, end = max(offset, o), min(offset + length, o + n)
                if first >= end:
                    if o >= offset + length:
                        break
                    continue
                width = _TYPES[kind].itemsize
                begin, stop = byte + width * (first - o), byte + width * (end - o)
                if ranges and ranges[-1][0] == path and ranges[-1][2] == begin:  # goes on where the last one ended
                    ranges[-1] = (path, ranges[-1][1], stop, kind)
                    targets[-1].append((number, first - offset, end - first))
                else:
                    ranges.append((path, begin, stop, kind))
                    targets.append([(number, first - offset, end - first)])
                pending += end - first
            if pending >= GATHER:
                yield from self._fetch(ranges, targets)
                ranges, targets, pending = [], [], 0
        yield from self._fetch(ranges, targets)

    def _fetch(
        self, ranges: list[tuple[str, int, int, str]], targets: list[list[tuple[int, int, int]]]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        if not ranges:
            return
        paths, begins, ends, kinds = (list(column) for column in zip(*ranges, strict=True))
        for kind, some, data in zip(kinds, targets, self.fs.cat_ranges(paths, begins, ends), strict=True):
            if isinstance(data, Exception):
                raise data
            values, at = np.frombuffer(data, _TYPES[kind]), 0
            for number, first, n in some:
                yield number, first, values[at : at + n].astype(np.float32)
                at += n


@torch.no_grad()
def load(folder: str, manifest: dict[str, Any], engine: Engine) -> None:
    """Fill this rank's flat arrays, and from there the model, whoever wrote the checkpoint. Collective.

    Raises StageError where it is another model's.
    """
    index = Index(folder, manifest)
    ours, theirs = dict(engine.parameters()), index.shapes
    if ours != theirs:
        wrong = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise StageError(
            f"{folder} holds another model: {wrong[0]} is {theirs.get(wrong[0], 'absent')} there and "
            f"{ours.get(wrong[0], 'absent')} here ({len(wrong)} parameters differ)"
        )
    for flat in range(len(engine.flats)):
        for state in ("weights", *engine.optimizer.names(engine.flats[flat])):
            _fill(index, state, [p for p in engine.pieces if p.flat == flat], engine)
    steps = int(manifest["optimizer_steps"])
    engine.optimizer.restored(steps, steps - int(manifest.get("run", {}).get("early", 0)))
    engine.load_scaling(manifest.get("loss_scale"))
    for name, buffer in engine.model.named_buffers():
        if name in index.others:
            buffer.copy_(index.others[name])
    engine.refresh()


def _fill(index: Index, state: str, pieces: Sequence[Piece], engine: Engine) -> None:
    """Fill these pieces of a state. What the checkpoint lacks of it (other averages, another optimizer's moments)
    begins anew: moments at zero, an average at the weights."""

    def put(p: Piece, first: int, values: torch.Tensor) -> None:
        flat = engine.flats[p.flat]
        if state == "weights":
            flat.data.view(-1).narrow(0, p.start + first, len(values)).copy_(values)
        else:
            engine.optimizer.restore(flat, state, p.start + first, values)

    there = [p for p in pieces if index.has(state, p.name)]
    source = {p.name: state for p in there}
    for p in pieces:
        if p.name not in source and state in MOMENTS:
            put(p, 0, torch.zeros(p.length))
    if state not in MOMENTS and len(there) < len(pieces):
        _fill_from(index, "weights", [p for p in pieces if p.name not in source], put)
    _fill_from(index, state, there, put)


def _fill_from(
    index: Index, state: str, pieces: Sequence[Piece], put: Callable[[Piece, int, torch.Tensor], None]
) -> None:
    filled = 0
    for number, first, values in index.read(state, [(p.name, p.offset, p.length) for p in pieces]):
        put(pieces[number], first, torch.from_numpy(values))
        filled += len(values)
    if filled != (wanted := sum(p.length for p in pieces)):
        raise StageError(f"{index.folder} lacks {wanted - filled} of {wanted} values of '{state}'")


def whole(folder: str, state: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The whole parameters of a state, {name: float32 tensor}: all that are trained, or those of `names`.

    Raises StageError where the checkpoint has no such state, or cannot be read.
    """
    manifest = folders.read_manifest(folder)
    there = folders.states(manifest)
    if state not in there:
        averages = ", ".join(sorted(s for s in there if s.startswith("ema")))
        raise StageError(f"{folder} has no weights '{state}'; it has raw, {averages}")
    try:
        return _whole(Index(str(folder), manifest), state, names)
    except (OSError, ValueError, KeyError, SafetensorError, struct.error) as e:
        raise StageError(f"{folder} cannot be read: {e}; the checkpoint is not complete") from None


def _whole(index: Index, state: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    wanted = [n for n in (index.shapes if names is None else names) if index.has(state, n)]
    full = [np.empty(math.prod(index.shapes[n]), np.float32) for n in wanted]
    filled = 0
    for number, first, values in index.read(state, [(n, 0, len(f)) for n, f in zip(wanted, full, strict=True)]):
        full[number][first : first + len(values)] = values
        filled += len(values)
    if filled != sum(map(len, full)):
        raise StageError(f"{index.folder} lacks values of '{state}'")
    return {n: torch.from_numpy(f).view(index.shapes[n]) for n, f in zip(wanted, full, strict=True)}


def load_weights(folder: str | os.PathLike[str], which: str = "ema") -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint's model, fp32: which = "raw", or the name of an EMA. Raises StageError.

    With it come the model's buffers and, where they were saved, its frozen weights, as they are.
    """
    folder = str(folder)
    found = whole(folder, "weights" if which == "raw" else which)
    return Index(folder, folders.read_manifest(folder)).others | found


def load_model(folder: str | os.PathLike[str], model: torch.nn.Module, which: str = "raw") -> None:
    """Copy a checkpoint's weights into a plain model; raises StageError where names or shapes are not the model's.

    Frozen parameters may be absent: a fine-tuned model has them from where it started.
    """
    weights = load_weights(folder, which)
    absent = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad and n not in weights}
    try:
        model.load_state_dict(weights | absent)
    except RuntimeError as e:
        raise StageError(f"{folder} holds another model: {' '.join(str(e).split())[:300]}") from None
