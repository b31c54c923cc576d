"""EMA lengths chosen after training, from snapshots of a few power-function averages (EDM2).

Karras et al. 2023, "Analyzing and improving the training dynamics of diffusion models", arXiv:2312.02696,
section 3.1 and appendix C. An average by a power function weighs the weights at time tau by tau^gamma up to its own
time t; its relative standard deviation, the width of that profile divided by t, is what a user chooses. Any other
profile is approximated by the linear combination of snapshots that is nearest to it in least squares.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards import storage
from shards.settings import StageError
from train import folders

if TYPE_CHECKING:
    import torch

_STATE = re.compile(r"ema_(0\.\d{3})")
_SNAPSHOT = re.compile(r"ema_(0\.\d{3})-(\d+)\.safetensors")


def exponent(std: float) -> float:
    """gamma of the profile tau^gamma whose standard deviation is `std` of its length (eq. 126, solved for gamma).

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): a cubic with one root above -1/2 for std below 0.289.
    """
    inverse = std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def decay(images: int, batch_size: int, std: float) -> float:
    """The factor for the step that ends at `images`: (1 - batch / images)^(gamma + 1) (eq. 127, in images)."""
    return (1.0 - batch_size / images) ** (exponent(std) + 1.0)


def inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integral over tau of the product of two profiles, each of unit area, that end at t_a and t_b; float64.

    Appendix C.2: with a the one that ends first,
    (gamma_a + 1) (gamma_b + 1) (t_a / t_b)^gamma_b / ((gamma_a + gamma_b + 1) t_b).
    """
    swap = t_a > t_b
    t_a, t_b = np.where(swap, t_b, t_a), np.where(swap, t_a, t_b)
    gamma_a, gamma_b = np.where(swap, gamma_b, gamma_a), np.where(swap, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** gamma_b / ((gamma_a + gamma_b + 1) * t_b)


def coefficients(times: Sequence[float], stds: Sequence[float], time: float, std: float) -> np.ndarray:
    """What to multiply each snapshot with, float64 [n], so that their sum is the average of `std` at `time`.

    times, stds: of the snapshots [n]. The factors sum to 1 (appendix C.3, algorithm 3).
    """
    t = np.asarray(times, np.float64) / time  # scaled: images in millions would make the system ill conditioned
    gamma = np.array([exponent(s) for s in stds])
    one, wanted = np.ones_like(t), np.full_like(t, exponent(std))
    gram = inner_product(t[:, None], gamma[:, None], t[None], gamma[None])
    solution = np.linalg.lstsq(gram, inner_product(t, gamma, one, wanted), rcond=None)[0]
    return solution / solution.sum()


def reconstruct(root: str | Path, images: int, std: float) -> dict[str, torch.Tensor]:
    """The average of relative deviation `std` at `images`, float32, from the snapshots under the URL `root`.

    Snapshots up to `images` are used. Raises StageError where there are none of two kinds at that time.
    """
    found = sorted(_snapshots(str(root)))
    used = [s for s in found if 0 < s[0] <= images]
    kinds = {std for at, std, _ in used if at == images}
    if len(kinds) < 2:
        raise StageError(
            f"{root} has snapshots of {len(kinds)} EMAs at {images} images, and two are needed to put another "
            "length together; train with ema_stds such as [0.05, 0.1]"
        )
    factors = coefficients([at for at, _, _ in used], [s for _, s, _ in used], images, std)
    total: dict[str, torch.Tensor] = {}
    for (_, _, read), factor in zip(used, factors, strict=True):
        for name, value in read().items():
            if not value.is_floating_point():
                total[name] = value
            elif name in total:
                total[name].add_(value.double(), alpha=float(factor))
            else:
                total[name] = value.double() * float(factor)
    return {n: v.float() if v.is_floating_point() else v for n, v in total.items()}


def _snapshots(root: str) -> Iterator[tuple[int, float, Callable[[], dict[str, torch.Tensor]]]]:
    """(images, relative deviation, what reads it) of each snapshot; before format 2 each was one file."""
    from train import checkpoint

    for folder in folders.folders(root):
        if folders.damage(folder, contents=False):
            continue
        manifest = folders.read_manifest(folder)
        for state in folders.states(manifest):
            if match := _STATE.fullmatch(state):
                yield manifest["images"], float(match[1]), functools.partial(checkpoint.load_weights, folder, state)
    for name in storage.list_names(root):
        if match := _SNAPSHOT.fullmatch(name):
            yield int(match[2]), float(match[1]), functools.partial(_of_file, storage.join(root, name))


def _of_file(url: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return dict(load(storage.read_bytes(url)))
