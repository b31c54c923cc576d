"""Images and captions of image shards, by position in the run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from latents.source import texts_in
from shards.dataset import Dataset
from shards.images import LOCATION, ImageShard, decode_rgb, is_image
from shards.settings import StageError
from train.placement import Placement
from train.reader import Kept, Reader, Window, named

DECODERS = 4  # threads that decode images for one rank


class ImageSamples:
    """Images and captions of image shards, by position.

    fit: uint8 [H,W,3] -> uint8 [R,R,3], where `pixels` is given no other. cache_bytes: fitted images are kept in
    memory up to this size; there is no eviction, since an order in which each sample comes once an epoch gains nothing
    from it.
    more: a column of the sidecar that is read too, for `texts`.
    """

    def __init__(
        self,
        dataset: Dataset,
        placement: Placement,
        fit: Callable[[np.ndarray], np.ndarray],
        cache_bytes: int,
        more: str | None = None,
    ) -> None:
        self.dataset, self.placement, self._fit, self._room = dataset, placement, fit, cache_bytes
        self._texts = ("caption", "key") if more is None else ("caption", "key", more)
        self._reader = Reader(placement, self._load)
        self._cache: dict[tuple[Callable[[np.ndarray], np.ndarray], int, int], np.ndarray] = {}
        self._decoders: ThreadPoolExecutor | None = None
        # By shard what a window is cut from: small columns of the sidecar.
        self._shard = Kept(self._open, placement.streams + 16)

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read what `pixels` and `captions` of these places will ask for."""
        self._reader.expect(positions)

    def close(self) -> None:
        """Let go of threads and memory."""
        self._reader.close()
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)
            self._decoders = None

    def pixels(self, positions: np.ndarray, fit: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """uint8 [B,R,R,3] of the samples at these places, by this `fit` or the usual one."""
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), thread_name_prefix="decode")
        one = functools.partial(self._one, fit or self._fit)
        return np.stack(list(self._decoders.map(one, self._reader.take(positions))))

    def captions(self, positions: np.ndarray) -> list[str]:
        """The captions of the samples at these places."""
        return [window.columns["caption"][at] for window, at in self._reader.take(positions)]

    def texts(self, column: str, positions: np.ndarray) -> list[list[str]]:
        """Of each sample the texts in a column: one, several, or none. Raises TypeError where it holds no text."""
        return [texts_in(window.columns[column][at]) for window, at in self._reader.take(positions)]

    def keys(self, positions: np.ndarray) -> list[str]:
        """The keys of the samples at these places."""
        return [window.columns["key"][at] for window, at in self._reader.take(positions)]

    def _one(self, fit: Callable[[np.ndarray], np.ndarray], found: tuple[Window, int]) -> np.ndarray:
        window, at = found
        sample = (fit, int(window.shard[at]), int(window.row[at]))
        image = self._cache.get(sample)
        if image is None:
            try:
                image = np.ascontiguousarray(fit(decode_rgb(window.columns["image"][at])))
            except (OSError, ValueError) as e:
                shard = self.dataset.shards[sample[1]]
                raise StageError(
                    f"{self.dataset.root}: sample {window.columns['key'][at]} of shard {shard.name} cannot be read: {e}"
                ) from e
            if image.nbytes <= self._room:
                self._room -= image.nbytes
                self._cache[sample] = image
        return image

    def _open(self, position: int) -> ImageShard:
        return ImageShard(self.dataset, position, ("status", *self._texts, *LOCATION))

    def _load(self, source: int, bucket: int, runs: list[tuple[int, int, int]]) -> Window:
        columns: dict[str, list[Any]] = {"image": [], **{name: [] for name in self._texts}}
        shards: list[int] = []
        rows: list[int] = []
        alive: list[bool] = []
        for position, first, end in runs:
            with named(self.dataset, position):
                shard = self._shard(position)
                # Where samples were taken out since the run began, others of the shard come in their place.
                wanted = np.arange(first, end) % max(1, len(shard))
                there = len(shard) > 0
                images = shard.encoded_images(wanted) if there else [b""] * len(wanted)
                columns["image"] += images
                for name in self._texts:
                    columns[name] += [v or "" for v in shard.values(name, wanted)] if there else [""] * len(wanted)
            shards += [position] * len(wanted)
            rows += wanted.tolist()
            alive += map(is_image, images)  # one may have been taken down since the sidecar was read
        return Window(np.array(shards), np.array(rows), np.array(alive), dict(columns))
