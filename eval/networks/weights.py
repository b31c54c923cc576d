"""Weights that measure images: where they are, read without running code from them, and what a network is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from latents.weights import hub_folder
from shards import storage
from shards.fingerprint import digest_file
from shards.settings import ConfigError

if TYPE_CHECKING:
    import torch

MAX_WEIGHTS = 8_000_000_000  # bytes

Rows = Sequence[Mapping[str, Any]]  # of each image what its shard's sidecar says: caption, prompt_id, questions


class Network(Protocol):
    """Two steps, since the first is of the CPU and can be done in a thread ahead of the second."""

    def prepare(self, pixels: np.ndarray, rows: Rows) -> Any:
        """uint8 [B, H, W, 3] and their rows as the network wants to have them, still on the CPU."""
        ...

    def __call__(self, prepared: Any) -> dict[str, np.ndarray]:
        """Features float32 [B, d] by column; a score that does not apply is NaN."""
        ...


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights that are there: network's name, the reference as given, the file or folder, sha256 of what matters."""

    name: str
    ref: Any
    path: Path | None
    digest: str


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Without TensorFloat-32, by the algorithms that give the same bits again."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def check_file(path: Path, field: str, wanted: str) -> None:
    """ConfigError, naming the field and what to name there, where there is no such file or it is too large."""
    if not path.is_file():
        raise ConfigError(f"{field}: there is no file {path}; name {wanted}")
    if path.stat().st_size > MAX_WEIGHTS:
        raise ConfigError(f"{field}: {path} is larger than {MAX_WEIGHTS // 10**9} GB, which no such network is")


def model_folder(ref: str, field: str, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The folder of a model: as it lies here, or of a hub name those of its files that match. ConfigError, naming the
    field, where there is none."""
    path = Path(storage.local_path(ref)) if "://" not in ref else None
    if path is not None and path.is_dir():
        return path
    if ref.startswith((".", "/", "~")) or ref.count("/") != 1:
        raise ConfigError(f"{field}: there is no folder {ref}; name the model's folder or its hub name")
    return hub_folder(ref, f"{field}:", patterns, ignore)


@functools.lru_cache(maxsize=16)
def digest_of(path: str, _changed: int) -> str:
    """sha256 of a file, read once for each time of its last change."""
    return digest_file(path)


def tensors(path: Path, field: str, inner: str = "") -> dict[str, torch.Tensor]:
    """The named tensors of a file, or of its entry `inner` where it has one."""
    import torch

    if _is_program(path):
        raise ConfigError(
            f"{field}: {path} is a TorchScript program, as clean-fid has it, and is not run; give the weights that "
            "torch-fidelity or pytorch-fid publish, which are the same network's: fid_clean is measured with them too"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a hostile or torn file makes a reader raise
        why = " ".join(str(e).split()).split(". ")[0][:160]
        raise ConfigError(f"{field}: {path} cannot be read as weights: {why}") from None
    if inner and isinstance(state, dict) and isinstance(state.get(inner), dict):
        state = state[inner]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ConfigError(f"{field}: {path} holds something other than named tensors; give the network's weights")
    return state


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
