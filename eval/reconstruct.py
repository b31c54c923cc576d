"""What a VAE keeps of images that it never saw: `carrara reconstruct` writes <run>/reports/vae.html, .png and .json.

    psnr                 of each image, dB
    ssim                 structural similarity (Wang et al. 2004), Gaussian window of 11 px
    lpips, or the distance of the tower that autoencoder.perceptual.weights names
    rfid                 Frechet distance of reconstructions and originals, on torch-fidelity's Inception features
    gradient_energy, high_frequencies    of the reconstructions over those of the originals: below 1 is blurred

Reconstructions are decoded from the posterior's mean, as eight bits, which is what everybody sees.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from eval import networks
from eval.metrics import frechet
from eval.metrics.definitions import FEW
from eval.metrics.estimate import mean_by_cluster
from eval.rows import images_of
from latents.encoders import load_vae, pick_device
from latents.inspection import figure_of, page_of, write_page
from latents.resize import resize_crop
from shards import storage
from shards.dataset import Dataset
from shards.images import decode_rgb
from shards.progress import Progress
from shards.settings import ConfigError, StageError
from train import perceptual
from train.autoencoder import to_unit

BATCH = 16
SHOWN = 32
WINDOW, SIGMA = 11, 1.5  # of SSIM, as Wang et al. have them


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image of the page, uint8 [H,W,3] both, and its figures."""

    key: str
    original: np.ndarray
    decoded: np.ndarray
    figures: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Found:
    """metrics: by name, with n, value, and where there is one a standard error and an interval. weights: digests of
    what measured."""

    metrics: dict[str, dict[str, Any]]
    shown: list[Shown]
    resolution: int
    weights: dict[str, str]
    notes: list[str]


def measure(
    dataset: Dataset,
    vae_ref: str,
    resolution: int,
    count: int = 1024,
    lpips: str | None = None,
    inception: str | None = None,
    device: str = "auto",
) -> Found:
    """Reconstruct the first `count` images of a dataset, fitted to the square `resolution`.

    lpips: what perceptual.load reads; inception: the file of its weights; without one, that figure is left out. Raises
    ConfigError where weights cannot be read, StageError where there is no image.
    """
    if resolution < WINDOW:
        raise ConfigError(f"reconstruct: latents.resolution is {resolution}, and SSIM looks at {WINDOW} pixels at once")
    device = pick_device(device)
    vae = load_vae(vae_ref, device)
    distance: perceptual.Distance | None = perceptual.load(lpips).to(device) if lpips else None
    if distance is not None:
        distance.require(resolution, "latents.resolution")
    network: Any = networks.load(networks.find("inception", inception), device) if inception else None
    weights = {"vae": vae.digest}
    if lpips:
        weights["perceptual"] = perceptual.digest(lpips)
    if inception:
        weights["inception"] = networks.find("inception", inception).digest
    total = min(count, len(dataset))
    if total == 0:
        raise StageError(f"{dataset.root}: there is not one image to reconstruct")
    name = "lpips" if isinstance(distance, perceptual.Lpips) else "perceptual"
    values: dict[str, list[np.ndarray]] = {}
    features: list[list[np.ndarray]] = [[], []]
    shown: list[Shown] = []
    progress = Progress("reconstruct", total, "images")
    for keys, pixels in _batches(dataset, resolution, total):
        decoded = vae.decode(vae.encode(pixels)[0])
        row = {"psnr": networks.psnr(pixels, decoded), "ssim": ssim(pixels, decoded)}
        if distance is not None:
            with torch.inference_mode():
                pair = [to_unit(torch.from_numpy(p).to(device)) for p in (decoded, pixels)]
                row[name] = distance(*pair).double().cpu().numpy()
        for measured, one in (("gradient_energy", gradient_energy), ("high_frequencies", high_frequencies)):
            for which, images in ((f"_{measured}", decoded), (f"_{measured}_of", pixels)):
                row[which] = one(images)
        for k, column in row.items():
            values.setdefault(k, []).append(column)
        if network is not None:
            for side, images in zip(features, (pixels, decoded), strict=True):
                side.append(network.features(networks.resize.tf(images)).cpu().numpy())
        for i in range(min(len(keys), SHOWN - len(shown))):
            shown.append(Shown(keys[i], pixels[i], decoded[i], {k: float(v[i]) for k, v in row.items() if k[0] != "_"}))
        progress.update(len(keys))
    progress.close()
    whole = {k: np.concatenate(v) for k, v in values.items()}
    n = len(whole["psnr"])
    metrics = {k: mean_by_cluster(v, range(n)).to_json() for k, v in whole.items() if k[0] != "_"}
    for measured in ("gradient_energy", "high_frequencies"):
        of = float(whole[f"_{measured}_of"].sum())
        metrics[measured] = {"n": n, "value": float(whole[f"_{measured}"].sum()) / of if of else math.nan}
    notes = []
    if network is not None and n >= 2:
        real, fake = (np.concatenate(side) for side in features)
        metrics["rfid"] = {"n": n, "value": frechet.distance_of(frechet.reference_of(real), fake)}
        if n < FEW:
            notes.append(f"rFID on {n} images is mostly bias; {FEW} at least make a number that others can read")
    return Found(metrics, shown, resolution, weights, notes)


def _batches(dataset: Dataset, resolution: int, count: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """(keys, uint8 [B,R,R,3]) of the first `count` images."""
    kept = ((row["key"], data) for row, data in images_of(dataset) if data is not None)
    first = ((k, resize_crop(decode_rgb(data), resolution)[0]) for k, data in itertools.islice(kept, count))
    while batch := list(itertools.islice(first, BATCH)):
        keys, pixels = zip(*batch, strict=True)
        yield list(keys), np.stack(pixels)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of uint8 images [B,H,W,3], float64 [B] (Wang et al. 2004, equation 13).

    Of each colour by itself, then the mean; sides of 11 pixels at least.
    """
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    g = torch.exp(-at.square() / (2 * SIGMA**2))
    g = g / g.sum()
    window = (g[:, None] * g)[None, None].expand(3, 1, WINDOW, WINDOW)
    x, y = (torch.from_numpy(p).permute(0, 3, 1, 2).double() for p in (a, b))

    def blur(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(t, window, groups=3)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    result: np.ndarray = found.mean(dim=(1, 2, 3)).numpy()
    return result


def gradient_energy(pixels: np.ndarray) -> np.ndarray:
    """Sum of the squared differences of neighbours, right and below: uint8 [B,H,W,3] -> float64 [B]."""
    x = pixels.astype(np.float64)
    found: np.ndarray = sum(np.square(np.diff(x, axis=axis)).sum(axis=(1, 2, 3)) for axis in (1, 2))
    return found


def high_frequencies(pixels: np.ndarray) -> np.ndarray:
    """Power of the spectrum at a quarter of a cycle a pixel and above: uint8 [B,H,W,3] -> float64 [B]."""
    spectrum = np.square(np.abs(np.fft.fft2(pixels.astype(np.float64), axes=(1, 2))))
    rows, columns = (np.fft.fftfreq(n) for n in pixels.shape[1:3])
    high = np.hypot(rows[:, None], columns) >= 0.25
    found: np.ndarray = spectrum[:, high].sum(axis=(1, 2))
    return found


# ---- what a person sees ----------------------------------------------------------------------------

TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "perceptual": "perceptual distance",
    "rfid": "rFID",
    "gradient_energy": "gradient energy, of the originals'",
    "high_frequencies": "high frequencies, of the originals'",
}


def summary(found: Found) -> str:
    """The figures as text."""
    lines = [f"{next(iter(found.metrics.values()))['n']:,} images at {found.resolution} px"]
    for name, title in TITLES.items():
        if (m := found.metrics.get(name)) is not None:
            interval = f"   {m['low']:.4g} to {m['high']:.4g}" if m.get("low") is not None else ""
            lines.append(f"{title:<36}{m['value']:>10.4g}{interval}")
    return "\n".join([*lines, *found.notes])


def page(found: Found, title: str) -> str:
    """The HTML page, which needs no other file; nothing on it may run."""
    figures = []
    for s in found.shown:
        scores = " &middot; ".join(f"{html.escape(TITLES[k])} {v:.3g}" for k, v in s.figures.items())
        figures.append(figure_of(s.original, s.decoded, f"{html.escape(s.key)} &middot; {scores}"))
    return page_of(
        title,
        f"<pre>{html.escape(summary(found))}</pre><p>Left: the original. Right: its reconstruction.</p>"
        f"{''.join(figures)}",
        "figure img{image-rendering:pixelated}",
    )


def write(found: Found, reports: str, title: str) -> str:
    """Write page, sheet and figures into a folder; returns where the page is."""
    figures = {"resolution": found.resolution, "weights": found.weights, "metrics": found.metrics}
    storage.write_json(storage.join(reports, "vae.json"), figures)
    return write_page(reports, "vae", page(found, title), [(s.original, s.decoded) for s in found.shown])
