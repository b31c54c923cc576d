"""The images of a shard on their way to latents: how each is cut, decoded, encoded in batches, and where its crop lay.

Batches are formed within a shard, in an order that its rows and the buckets alone decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from latents.buckets import nearest
from latents.columns import FEATURES, FLIPPED
from latents.config import LatentsConfig
from latents.moments import finite_rows, quantise_logstd, to_half
from latents.resize import Fit, crop_before, crop_place, resize_crop_to
from latents.source import original_sizes, stored_sizes
from shards import images
from shards.columns import column
from shards.machine import own_fault
from shards.settings import NodeTrouble

if TYPE_CHECKING:
    from latents.encoders import Vae
    from latents.vision import VisionEncoder


@dataclasses.dataclass
class Sample:
    """One image on its way, at each resolution: pixels uint8 [H,W,3] and how they were cut, or why there are none."""

    pixels: list[np.ndarray] = dataclasses.field(default_factory=list)
    fits: list[Fit] = dataclasses.field(default_factory=list)
    error: tuple[str, str] | None = None


@dataclasses.dataclass
class Plan:
    """How the images of a shard are cut. bucket: int64 [N,R]; index: int64 [N,R], which of its bucket's images it is;
    order: int64 [N], in which they are encoded."""

    bucket: np.ndarray
    index: np.ndarray
    order: np.ndarray


class ImageEncoder:
    """A VAE, perhaps a vision tower, and the encoding of a shard's images with them.

    cropped: the images were stored as the middle of larger ones.
    """

    def __init__(self, config: LatentsConfig, vae: Vae, vision: VisionEncoder | None, cropped: bool) -> None:
        self.config, self.vae, self.vision, self.cropped = config, vae, vision, cropped
        self.buckets = config.bucket_list()

    @property
    def _ends(self) -> tuple[str, ...]:
        """What ends the names of columns that are of images as they are, and mirrored."""
        return ("", FLIPPED) if self.config.flip else ("",)

    def plan(self, shard: images.ImageShard) -> Plan:
        """Buckets from the sizes in the sidecar, so that images can be decoded in the order of their batches."""
        count = len(shard)
        sizes = np.ones((count, 2), np.int64)
        if self.config.buckets is not None:
            sizes = stored_sizes(shard)
        resolutions = self.config.resolutions
        bucket = np.zeros((count, len(resolutions)), np.int64)
        for r, resolution in enumerate(resolutions):
            mine = [i for i, b in enumerate(self.buckets) if b.resolution == resolution]
            bucket[:, r] = mine[0] + nearest([self.buckets[i] for i in mine], sizes[:, 0], sizes[:, 1])
        index = np.zeros_like(bucket)
        for b in range(len(self.buckets)):
            members = bucket == b
            index[members] = np.arange(members.sum())
        # By rising aspect ratio every bucket of every resolution is one stretch; else, in the order of the rows.
        order = np.argsort(np.log(sizes[:, 0]) - np.log(sizes[:, 1]), kind="stable")
        return Plan(bucket, index, order)

    def loader(self, shard: images.ImageShard, plan: Plan) -> Callable[[int], Sample]:
        """What decodes and cuts the k-th image in the order of the plan."""
        order, targets = plan.order.tolist(), [[self.buckets[b] for b in row] for row in plan.bucket.tolist()]
        places = [crop_place(k) if self.config.crop == "random" else None for k in shard.keys]

        def load(k: int) -> Sample:
            i = order[k]
            data = shard.image_bytes(i)  # a tar that cannot be read is the shard's fault, and is raised
            try:
                pixels = images.decode_rgb(data)
                cuts = [resize_crop_to(pixels, b.width, b.height, places[i]) for b in targets[i]]
            except Exception as e:  # decoders raise many things for broken data; it costs this image alone
                if fault := own_fault(e):
                    raise NodeTrouble(fault) from e
                return Sample(error=("decode_error", " ".join(str(e).split())[:500]))
            return Sample([p for p, _ in cuts], [f for _, f in cuts])

        return load

    def encode(self, plan: Plan, decoded: Iterator[Sample], samples: list[Sample]) -> dict[str, np.ndarray]:
        """All images of a shard: their fates, into `samples`, and the moments' columns.

        Rows of images that were set aside are zero here and are dropped by the caller.
        """
        arrays: dict[str, np.ndarray] = {}
        for b, bucket in enumerate(self.buckets):
            count = int((plan.bucket == b).sum())
            side = (bucket.height // self.vae.downscale, bucket.width // self.vae.downscale)
            for name, dtype in (("mean", np.float16), *([("logstd", np.uint8)] if self.config.moments else [])):
                for end in self._ends:
                    rows = np.zeros((count, self.vae.channels, *side), dtype)
                    arrays[column(name + end, b, len(self.buckets))] = rows
            if (vision := self.vision) is not None:
                for end in self._ends:
                    shape = (count, vision.grid, vision.grid, vision.width)
                    arrays[column(FEATURES + end, b, len(self.buckets))] = np.zeros(shape, np.float16)
        under_way: list[Callable[[], None]] = []  # at most one batch, besides the one that is being filled

        def flush(bucket: int, batch: list[tuple[int, np.ndarray]]) -> None:
            if batch:
                limit = limits[resolutions.index(self.buckets[bucket].resolution)]
                under_way.append(self._encode_batch(bucket, batch, limit, plan, samples, arrays))
            while len(under_way) > (1 if batch else 0):
                under_way.pop(0)()

        resolutions = self.config.resolutions
        limits = [max(1, round(self.config.batch_size * (resolutions[0] / r) ** 2)) for r in resolutions]
        filling: list[tuple[int, list[tuple[int, np.ndarray]]]] = [(-1, []) for _ in resolutions]
        for i, sample in zip(plan.order.tolist(), decoded, strict=True):
            samples[i] = sample
            for r, pixels in enumerate(sample.pixels):
                b, batch = filling[r]
                if b != plan.bucket[i, r] or len(batch) == limits[r]:
                    flush(b, batch)
                    b, batch = filling[r] = (int(plan.bucket[i, r]), [])
                batch.append((i, pixels))
            sample.pixels = []
        for b, batch in filling:
            flush(b, batch)
        flush(-1, [])
        return arrays

    def _encode_batch(
        self,
        bucket: int,
        batch: list[tuple[int, np.ndarray]],
        limit: int,
        plan: Plan,
        samples: list[Sample],
        arrays: dict[str, np.ndarray],
    ) -> Callable[[], None]:
        """Begin with a batch of one shape; what is returned puts its moments into their columns."""
        # Filled up to a power of two: few shapes, for whatever is tuned or compiled by shape.
        size = min(1 << (len(batch) - 1).bit_length(), max(limit, len(batch)))
        pixels = np.stack([p for _, p in batch] + [batch[-1][1]] * (size - len(batch)))
        # A VAE's convolutions are not symmetric: the mirrored latent is not the latent of the mirrored image.
        ways = [("", slice(None)), *([(FLIPPED, slice(None, None, -1))] if self.config.flip else [])]
        turned = [np.ascontiguousarray(pixels[:, :, way]) for _, way in ways]
        results = [self.vae.encode_stored(p) for p in turned]
        seen = [] if self.vision is None else [self.vision.encode_stored(p) for p in turned]
        resolution = self.config.resolutions.index(self.buckets[bucket].resolution)

        def collect() -> None:
            for (end, way), result in zip(ways, results, strict=True):
                put(end, way, result())
            for (end, way), features in zip(ways, seen, strict=self.vision is not None):
                put_features(end, way, features())

        def put(end: str, way: slice, found: Any) -> None:
            mean, logstd = (column(name + end, bucket, len(self.buckets)) for name in ("mean", "logstd"))
            for j, (i, image) in enumerate(batch):
                half, codes = found.mean[j], None if found.codes is None else found.codes[j]
                if not found.finite[j]:
                    exact = self._exact(image[:, way])
                    if exact is None:
                        samples[i].error = ("not_finite_latent", "the latent is not finite in float16")
                        continue
                    half, codes = exact
                at = plan.index[i, resolution]
                arrays[mean][at] = half
                if logstd in arrays:
                    arrays[logstd][at] = codes

        def put_features(end: str, way: slice, found: np.ndarray) -> None:
            rows = arrays[column(FEATURES + end, bucket, len(self.buckets))]
            for j, (i, image) in enumerate(batch):
                half = found[j]
                if not np.isfinite(half).all():
                    assert self.vision is not None
                    half = to_half(self.vision.encode_exact(image[None, :, way].copy()).numpy())[0]
                    if not np.isfinite(half).all():
                        samples[i].error = ("not_finite_features", "the features are not finite in float16")
                        continue
                rows[plan.index[i, resolution]] = half

        return collect

    def _exact(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """One image's moments from float32 arithmetic; None where even those are not finite in half precision."""
        mean, logstd = (x.numpy() for x in self.vae.encode_exact(image[None].copy()))
        half = to_half(mean)
        finite = finite_rows(half)[0] and (not self.vae.has_posterior or finite_rows(logstd)[0])
        return (half[0], quantise_logstd(logstd)[0]) if finite else None

    def micro(self, shard: images.ImageShard, plan: Plan, samples: list[Sample], mirrored: bool = False) -> np.ndarray:
        """SDXL's micro-conditioning, int32 [N,R,6]: original height and width, crop top and left, target size.

        Top and left count from the whole image, scaled: what ingest cropped is part of them. A border is no crop.
        mirrored: of the same crops in the mirrored images.
        """
        micro = np.zeros((len(samples), len(self.config.resolutions), 6), np.int32)
        originals, stored = original_sizes(shard), stored_sizes(shard)
        for i, sample in enumerate(samples):
            for r, fit in enumerate(sample.fits):
                b = self.buckets[plan.bucket[i, r]]
                width, height = originals[i]
                left, top = fit.crop_left, fit.crop_top
                if mirrored:
                    left = fit.scaled_width - b.width - left
                if self.cropped:
                    before = crop_before(originals[i], (int(stored[i, 0]), int(stored[i, 1])), fit)
                    left, top = left + before[0], top + before[1]
                micro[i, r] = (height, width, top, left, b.height, b.width)
        return micro
