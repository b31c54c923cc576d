"""The networks whose features images are measured by: the Inception of every FID, DINOv2, any CLIP, and the VAE.

    inception   TensorFlow's Inception of 2015: the file of weights that torch-fidelity and pytorch-fid publish, each by
                a name of its own, or "download"
    dinov2      a folder with a DINOv2 model, as transformers saves it, or a file of torch.hub's
    clip        as everywhere: a folder, MODEL:TAG or MODEL:/file
    vae         the model's own, for what it keeps of real images
    judge, preference, scorer   what scores images by their prompts (eval/scoring)

All of them run in float32 but the judge, whose precision is its own setting.

Weights are found and digested without being loaded, so that a fingerprint costs no network; a file is read without
running code from it (safetensors, or torch.load of tensors alone). A number that is called FID is comparable with
published ones only with the published weights, so their digest is known here and the result says where it differs.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.networks import dinov2, resize
from eval.networks.clip import Clip, truncated
from eval.networks.weights import Found, Network, Rows, check_file, digest_of, exact, tensors
from latents.weights import find_clip, find_vae
from shards.fingerprint import digest_json
from shards.settings import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Clip", "Dinov2", "Found", "Inception", "Network", "Reconstruction", "Rows", "find", "load", "truncated"]

log = logging.getLogger("carrara.eval")

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)

# network -> columns of its features in a shard
COLUMNS = {
    "inception": ("inception_tf", "inception_tf_logits", "inception_clean"),
    "dinov2": ("dinov2",),
    "clip": ("images", "captions", "truncated"),
    "vae": ("psnr",),
}
SCORING = ("judge", "preference", "scorer")  # networks whose columns are scores of an image by its prompt
PSNR_CAP = 100.0  # dB, for a reconstruction without any error, whose PSNR would be infinite


def find(name: str, ref: Any) -> Found:
    """The weights of network `name`; ConfigError with one sentence where there are none. ref: what the configuration
    names; for a judge and for preferences their whole section."""
    if name in SCORING:
        from eval import scoring

        return scoring.find(name, ref)
    if name == "clip":
        clip = find_clip(ref)
        clip.require_image_encoder()
        return Found(name, ref, None, clip.digest)
    if name == "vae":
        return Found(name, ref, None, find_vae(ref).digest)
    if name == "dinov2":
        return _find_dinov2(ref)
    path = _downloaded() if ref == "download" else Path(ref)
    check_file(path, "eval.inception", "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or say download")
    digest = digest_of(str(path), os.stat(path).st_mtime_ns)
    if digest != INCEPTION_SHA256:
        _warn(str(path), digest)
    return Found(name, ref, path, digest)


def load(found: Found, device: str = "cpu") -> Network:
    """The network, ready; ConfigError where the file does not hold its weights."""
    if found.name in SCORING:
        from eval import scoring

        return scoring.load(found, device)
    kinds: dict[str, Any] = {"clip": Clip, "vae": Reconstruction, "dinov2": Dinov2, "inception": Inception}
    network: Network = kinds[found.name](found, device)
    return network


class Inception:
    """The Inception network: features at its last pooling from any of resize's functions, and logits.

    Always in float32 without TensorFloat-32: a feature that is rounded to 10 bits moves an FID.
    """

    def __init__(self, found: Found, device: str = "cpu") -> None:
        import torch

        assert found.path is not None
        state = tensors(found.path, "eval.inception")
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
        """Images float32 [B, 3, 299, 299] in 0..255 -> float32 [B, 2048]."""
        import torch

        with torch.inference_mode(), exact():
            x = (pixels.to(self.device) - 128) / 128
            return torch.flatten(functools.reduce(lambda x, layer: layer(x), self._layers, x), 1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, 2048] -> [B, 1008], without the bias, as the Inception score has them."""
        import torch

        with torch.inference_mode(), exact():
            return features @ self._fc.weight.T

    def prepare(self, pixels: np.ndarray, rows: Rows = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """The images as torch-fidelity and as clean-fid resize them."""
        return resize.tf(pixels), resize.clean(pixels)

    def __call__(self, prepared: tuple[torch.Tensor, torch.Tensor]) -> dict[str, np.ndarray]:
        as_tf, as_clean = (self.features(p) for p in prepared)
        return {
            "inception_tf": as_tf.cpu().numpy(),
            "inception_tf_logits": self.logits(as_tf).cpu().numpy(),
            "inception_clean": as_clean.cpu().numpy(),
        }


class Reconstruction:
    """PSNR in dB of the VAE's reconstruction, from the posterior's mean. `images`: the reconstructions of the last
    batch, uint8 [B, H, W, 3]."""

    def __init__(self, found: Found, device: str) -> None:
        from latents.encoders import load_vae

        self.vae = load_vae(found.ref, device)
        self.images = np.zeros((0, 1, 1, 3), np.uint8)

    def prepare(self, pixels: np.ndarray, rows: Rows = ()) -> np.ndarray:
        return pixels

    def __call__(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
        self.images = self.vae.decode(self.vae.encode(prepared)[0])
        return {"psnr": psnr(prepared, self.images).astype(np.float32)[:, None]}


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / MSE), float64 [B], of uint8 images [B, H, W, 3], at most PSNR_CAP."""
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"PSNR compares uint8 images of one shape, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    squared = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).reshape(len(a), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(255.0**2 / squared), PSNR_CAP)


class Dinov2:
    """DINOv2 of either layout (dinov2.py), in float32 as the Inception is."""

    def __init__(self, found: Found, device: str) -> None:
        assert found.path is not None
        state = None if found.path.is_dir() else tensors(found.path, "eval.dinov2")
        self.network = dinov2.Dinov2(found.path, state, device)

    def prepare(self, pixels: np.ndarray, rows: Rows = ()) -> torch.Tensor:
        """float32 [B, 3, 224, 224], normalised as for ImageNet."""
        return self.network.prepare(pixels)

    def __call__(self, prepared: torch.Tensor) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode(), exact():
            return {"dinov2": self.network.features(prepared).cpu().numpy()}


def _find_dinov2(ref: str) -> Found:
    files = dinov2.weight_files(ref)
    for file in files:
        check_file(
            file, "eval.dinov2", "a folder with a DINOv2's config.json and model.safetensors, or a file of torch.hub's"
        )
    digests = [digest_of(str(f), os.stat(f).st_mtime_ns) for f in files]
    return Found("dinov2", ref, Path(ref), digest_json(digests))


@functools.lru_cache(maxsize=16)
def _warn(path: str, digest: str) -> None:
    log.warning(
        "eval.inception: %s is not the published file (its sha256 is %s... where %s... is expected): no published "
        "number compares with what it measures",
        path,
        digest[:12],
        INCEPTION_SHA256[:12],
    )


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
