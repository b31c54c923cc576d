"""Why two FIDs of the same images differ: both sets under every protocol that people publish, in one pass.

    carrara explain-fid GENERATED REAL --inception weights-inception-2015-12-05-6726825d.pth

The network is the same in all of them (the Inception of 2015); what differs is how an image comes to 299 x 299 and
what range it is fed in. Images are decoded once. A set is a folder of images or finished shards.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval import networks
from eval.inputs import read_image
from eval.metrics import frechet
from eval.metrics.moments import Accumulator
from eval.networks import resize
from eval.rows import images_of
from latents.resize import prefetch
from shards import storage
from shards.dataset import MANIFEST, Dataset
from shards.images import decode_rgb
from shards.progress import Progress
from shards.settings import ConfigError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("carrara.eval")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
WIDTH = 2048  # of the Inception's features

# protocol -> (who measures so, what is done, resize, factor on 0..255 before the network's own (x - 128) / 128).
# pytorch-fid feeds 2 x / 255 - 1, that is (y - 128) / 128 with y = x * 256 / 255.
PROTOCOLS: dict[str, tuple[str, str, Callable[[np.ndarray], torch.Tensor], float]] = {
    "fid_tf": ("torch-fidelity", "TensorFlow 1's bilinear, no antialiasing", resize.tf, 1.0),
    "fid_clean": ("clean-fid", "Pillow's bicubic in float32, antialiased", resize.clean, 1.0),
    "fid_torchmetrics": ("torchmetrics >= 1.8", "torch's bilinear, antialiased", resize.antialias, 1.0),
    "fid_pytorch": ("pytorch-fid", "torch's bilinear, no antialiasing; 2 x / 255 - 1", resize.torch_fid, 256 / 255),
    "fid_t2i": (
        "text2image-benchmark",
        "centre crop, Pillow's bicubic rounded to uint8; 2 x / 255 - 1",
        resize.centre_uint8,
        256 / 255,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One protocol's distance, and its difference from the first's."""

    protocol: str
    library: str
    what: str
    value: float
    difference: float


def explain(generated: str, real: str, inception: str, batch_size: int = 16, device: str = "auto") -> list[Row]:
    """The distance of the two sets under each of PROTOCOLS. ConfigError where a set has fewer than two images."""
    from latents.encoders import pick_device

    network = networks.Inception(networks.find("inception", inception), pick_device(device))
    sides = [_statistics(network, source, batch_size) for source in (generated, real)]
    rows: list[Row] = []
    for name, (library, what, _, _) in PROTOCOLS.items():
        (x_all, x_moments), (y_all, y_moments) = (side[name] for side in sides)
        ref = frechet.reference_of(y_all) if y_all is not None else frechet.reference(y_moments.result())
        value = frechet.distance_of(ref, x_all) if x_all is not None else frechet.distance(ref, x_moments.result())
        rows.append(Row(name, library, what, value, value - rows[0].value if rows else 0.0))
    return rows


def table(rows: list[Row]) -> str:
    """Aligned text for a terminal."""
    width = max(len(r.library) for r in rows)
    lines = [f"{'protocol':<18}{'as in':<{width + 2}}{'distance':>12}{'difference':>12}  what it does"]
    for r in rows:
        apart = "" if r is rows[0] else f"{r.difference:+.4f}"
        lines.append(f"{r.protocol:<18}{r.library:<{width + 2}}{r.value:>12.4f}{apart:>12}  {r.what}")
    return "\n".join(lines)


def _statistics(
    network: networks.Inception, source: str, batch_size: int
) -> dict[str, tuple[np.ndarray | None, Accumulator]]:
    """By protocol: the features where there are at most 2048, and moments in any case."""
    import torch

    count, images = _images(source)
    if count < 2:
        raise ConfigError(f"explain-fid: {source} has {count} images; a distance needs at least 2 on either side")
    kept: dict[str, list[np.ndarray]] = {name: [] for name in PROTOCOLS}
    moments = {name: Accumulator(WIDTH) for name in PROTOCOLS}
    progress = Progress("explain-fid", count, "images")
    while batch := list(itertools.islice(images, batch_size)):
        for name, (_, _, resized, scale) in PROTOCOLS.items():
            planes = torch.cat([resized(p[None]) for p in batch])
            features = network.features(planes * scale).cpu().numpy()
            moments[name].add(features)
            if count <= WIDTH:
                kept[name].append(features)
        progress.update(len(batch))
    progress.close()
    return {name: (np.concatenate(parts) if parts else None, moments[name]) for name, parts in kept.items()}


def _images(source: str) -> tuple[int, Iterator[np.ndarray]]:
    """Number of images of a dataset of shards or of a folder, and the images uint8 [H, W, 3] in their order."""
    if storage.exists(storage.join(source, MANIFEST)):
        dataset = Dataset.open(source)
        return len(dataset), (decode_rgb(data) for _, data in images_of(dataset) if data is not None)
    folder = Path(source)
    if not folder.is_dir():
        raise ConfigError(f"explain-fid: {source} is neither a folder of images nor finished shards")
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = [p for p in found if p.suffix.lower() in EXTENSIONS]
    if len(files) < len(found):
        other = next(p for p in found if p.suffix.lower() not in EXTENSIONS)
        log.warning(
            "explain-fid: %s is left out, and so are all files of %s that are not PNG, JPEG or WebP (%d of %d)",
            other.name,
            source,
            len(found) - len(files),
            len(found),
        )
    return len(files), prefetch(
        lambda i: read_image(files[i], "explain-fid", "take it out of the folder"), len(files), 2, 32
    )
