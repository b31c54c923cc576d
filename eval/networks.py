"""The networks whose features pictures are judged by: the Inception of every FID, DINOv2, and any CLIP.

    inception   TensorFlow's Inception of 2015: the file of weights that torch-fidelity and pytorch-fid publish, each by
                a name of its own, or "download"
    dinov2      a folder with a DINOv2 model, as transformers saves it, or a file of torch.hub's
    clip        as everywhere: a folder, MODEL:TAG or MODEL:/file

Weights are found and digested without being loaded, so that a fingerprint costs no network; a file is read without
running code from it (safetensors, or torch.load of tensors alone). A number that is called FID is comparable with
published ones only with the published weights, so their digest is known here and the result says where it differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eval import dinov2, resize
from latents.weights import find_clip
from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("carrara.eval")

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
MAX_WEIGHTS = 8_000_000_000

# network -> columns of its features in a shard
COLUMNS = {
    "inception": ("inception_tf", "inception_tf_logits", "inception_clean"),
    "dinov2": ("dinov2",),
    "clip": ("clip",),
}


class Network(Protocol):
    """Two steps, since the first is of the CPU and can be done in a thread ahead of the second."""

    def prepare(self, pixels: np.ndarray) -> Any:
        """uint8 [B, H, W, 3] as the network wants to have it, still on the CPU."""
        ...

    def __call__(self, prepared: Any) -> dict[str, np.ndarray]:
        """Features float32 [B, d] by column."""
        ...


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights that are there: network's name, the reference as given, the file or folder, sha256 of what matters."""

    name: str
    ref: str
    path: Path | None
    digest: str


def find(name: str, ref: str) -> Found:
    """The weights of network `name`; ConfigError with one sentence where there are none."""
    if name == "clip":
        return Found(name, ref, None, find_clip(ref).digest)
    if name == "dinov2":
        return _find_dinov2(ref)
    path = _downloaded() if ref == "download" else Path(ref)
    _check_file(path, "eval.inception", "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or say download")
    digest = _digest(str(path), os.stat(path).st_mtime_ns)
    if digest != INCEPTION_SHA256:
        _warn(str(path), digest)
    return Found(name, ref, path, digest)


def load(found: Found, device: str = "cpu", precision: str = "float32") -> Network:
    """The network, ready; ConfigError where the file does not hold its weights."""
    if found.name == "clip":
        return _Clip(found, device, precision)
    if found.name == "dinov2":
        return _Dinov2(found, device)
    return Inception(found, device)


class Inception:
    """The Inception network: features at its last pooling from any of resize's functions, and logits.

    Always in float32 without TensorFloat-32: a feature that is rounded to 10 bits moves an FID.
    """

    def __init__(self, found: Found, device: str = "cpu") -> None:
        import torch

        assert found.path is not None
        state = _tensors(found.path, "eval.inception")
        safe = io.BytesIO()  # the library unpickles what it is given, so it is given what we wrote
        torch.save(state, safe)
        safe.seek(0)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], safe)
        except (RuntimeError, TypeError, AttributeError) as e:
            first = " ".join(str(e).split())[:200]
            raise ConfigError(f"eval.inception: {found.path} is not torch-fidelity's Inception: {first}") from None
        self.device = device
        self.network: Any = network.to(device)
        *self._layers, self._fc = self.network.children()  # one after another, as in the library's own forward

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [B, 3, 299, 299] in 0..255 -> float32 [B, 2048]."""
        import torch

        with torch.inference_mode(), _exact():
            x = (pixels.to(self.device) - 128) / 128
            return torch.flatten(functools.reduce(lambda x, layer: layer(x), self._layers, x), 1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, 2048] -> [B, 1008], without the bias, as the Inception score has them."""
        import torch

        with torch.inference_mode(), _exact():
            return features @ self._fc.weight.T

    def prepare(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures as torch-fidelity and as clean-fid resize them."""
        return resize.tf(pixels), resize.clean(pixels)

    def __call__(self, prepared: tuple[torch.Tensor, torch.Tensor]) -> dict[str, np.ndarray]:
        as_tf, as_clean = (self.features(p) for p in prepared)
        return {
            "inception_tf": as_tf.cpu().numpy(),
            "inception_tf_logits": self.logits(as_tf).cpu().numpy(),
            "inception_clean": as_clean.cpu().numpy(),
        }


class _Clip:
    """An open_clip CLIP's image embedding of unit length; its own preprocessing is part of the encoder."""

    def __init__(self, found: Found, device: str, precision: str) -> None:
        from latents.encoders import load_text

        self.clip = load_text(found.ref, "last", device, precision)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return pixels

    def __call__(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
        return {"clip": self.clip.encode_images(prepared, len(prepared)).numpy()}


class _Dinov2:
    """DINOv2 of either layout (dinov2.py), in float32 as the Inception is."""

    def __init__(self, found: Found, device: str) -> None:
        assert found.path is not None
        state = None if found.path.is_dir() else _tensors(found.path, "eval.dinov2")
        self.network = dinov2.Dinov2(found.path, state, device)
        self.prepare = self.network.prepare

    def __call__(self, prepared: torch.Tensor) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode(), _exact():
            return {"dinov2": self.network.features(prepared).cpu().numpy()}


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _find_dinov2(ref: str) -> Found:
    files = dinov2.weight_files(ref)
    for file in files:
        _check_file(
            file, "eval.dinov2", "a folder with a DINOv2's config.json and model.safetensors, or a file of torch.hub's"
        )
    digests = [_digest(str(f), os.stat(f).st_mtime_ns) for f in files]
    return Found("dinov2", ref, Path(ref), digest_json(digests))


def _check_file(path: Path, field: str, wanted: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{field}: there is no file {path}; name {wanted}")
    if path.stat().st_size > MAX_WEIGHTS:
        raise ConfigError(f"{field}: {path} is larger than {MAX_WEIGHTS // 10**9} GB, which no such network is")


@functools.lru_cache(maxsize=16)
def _warn(path: str, digest: str) -> None:
    log.warning(
        "eval.inception: %s is not the published file (its sha256 is %s... where %s... is expected): no published "
        "number compares with what it measures", path, digest[:12], INCEPTION_SHA256[:12],
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _digest(path: str, _changed: int) -> str:
    return digest_file(path)


def _tensors(path: Path, field: str) -> dict[str, torch.Tensor]:
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
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ConfigError(f"{field}: {path} holds something other than named tensors; give the network's weights")
    return state


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _downloaded() -> Path:
    """The published weights in torch's hub cache, fetched once; the digest is checked before the file gets its name."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as e:
            raise ConfigError(
                f"eval.inception: {INCEPTION_URL} cannot be fetched ({' '.join(str(e).split())[:120]}); "
                "bring the file here and name it in eval.inception"
            ) from None
    return path
