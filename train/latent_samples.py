"""Posterior moments and text of latent shards, by position in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latents.columns import FEATURES, FLIPPED
from latents.encoders import other_encoder
from latents.resize import crop_place
from shards.dataset import Dataset
from shards.selection import Selection
from shards.settings import ConfigError, StageError
from train import segments
from train.config import TrainConfig
from train.latent_file import TOKENS, LatentFile, joined
from train.reader import Kept, Reader, Window, named
from train.segments import History

if TYPE_CHECKING:
    from train.image_conditioning import ByKey


class Latents:
    """Posterior moments and text of the latent shards of one or several datasets, by position in the run.

    history: what the run takes its samples from (segments.py), the last of its segments from these datasets. A batch is
    of one bucket, and so of one shape, on all ranks. beside: of each dataset the images that `pictures` gives; a
    sample without one counts as taken down.

    Raises ConfigError where datasets were made with different encoders or shapes, which no model could tell apart.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[Dataset],
        seed: int,
        history: History | None = None,
        beside: Sequence[ByKey] = (),
    ) -> None:
        history = history or segments.begin(config, datasets)
        self.datasets, self.dataset, self._beside = list(datasets), datasets[0], list(beside)
        self.placement = history.placement(segments.tables(history, config, datasets), seed)
        self.resolution = (config.resolutions or (int(self.dataset.manifest["resolution"]),))[0]
        select = history.segments[-1].select
        self._select = [
            Selection(segments.run_of(d), rules, recorded) if (rules := segments.rules_of(config, n)) else None
            for n, (d, recorded) in enumerate(zip(datasets, select or [()] * len(datasets), strict=True))
        ]
        self._file = Kept(
            lambda which, position: LatentFile(self.datasets[which], position, self._select[which]),
            2 * history.streams * len(datasets),
        )
        first = [LatentFile(d, int(np.flatnonzero(d.counts)[0])) for d in datasets]
        for dataset, file in zip(datasets[1:], first[1:], strict=True):
            _refuse_other_kind(self.dataset, first[0], dataset, file)
        self._first = first
        # By number of a source in the placement: which dataset, and the first of its shards.
        by_name = {r.key: r for r in history.segments[-1].ranges}
        names = segments.names(config)
        self._shard_of = {
            n: (names.index(by_name[x.key].source), by_name[x.key].first)
            for n, x in enumerate(self.placement.sources)
            if x.key in by_name
        }
        arrays = first[0]
        self.has_embeddings, self.has_pooled = "embeddings" in arrays.kinds, "pooled" in arrays.kinds
        self.has_spread = all("logstd" in file.kinds for file in first)
        self.token_names = tuple(n for n in TOKENS if n in arrays.kinds)
        self.empty = {n: arrays.whole(f"empty_{n}").astype(np.int64) for n in self.token_names}
        self.empty_embedding = arrays.whole("empty_embedding").astype(np.float32) if self.has_embeddings else None
        self.empty_pooled = arrays.whole("empty_pooled").astype(np.float32) if self.has_pooled else None
        self.wants = {"mean", *(("logstd",) if self.has_spread else ())}
        self.wants |= {"embeddings"} if self.has_embeddings else set(self.token_names)
        self.context_length = int(arrays.columns["empty_tokens"][1][0])
        self.wants |= {"image"} if beside else set()
        self._reader = Reader(self.placement, self._load)
        self._taken: tuple[bytes, list[tuple[Window, int]]] = (b"", [])
        self.channels, height, _ = arrays.shape_of_mean()
        self.side = self._side(height)

    def _side(self, height: int) -> int:
        """Side of a square latent of `resolution` pixels, by the height of some bucket's."""
        if len(self.dataset.manifest.get("buckets") or ()) < 2:
            return height
        bucket = self.dataset.manifest["buckets"][self._first[0].some_bucket()]
        return self.resolution * height // int(bucket["height"])

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read what these samples need."""
        self._reader.expect(positions)

    def close(self) -> None:
        """Let go of threads and memory."""
        self._reader.close()

    def source(self, positions: np.ndarray) -> np.ndarray:
        """Which of the datasets each sample comes from, int64 [B]."""
        out = np.empty(len(positions), np.int64)
        for part in self.placement.locate(positions):
            out[part.here] = self._shard_of[part.source][0]
        return out

    def shape(self, positions: np.ndarray) -> tuple[int, int, int]:
        """[C,h,w] of the batch that these samples belong to."""
        window, _ = self._rows(positions[:1])[0]
        c, h, w = window.columns["mean"].shape[1:]
        return c, h, w

    def moments(self, positions: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log-std, float32 [B,C,h,w], unscaled; the latter is None where only means are stored.

        flipped: bool [B], of which samples those of the mirrored image are given; None: of none.
        """
        mean = self._one_of("mean", positions, np.float32, flipped)
        if not self.has_spread:
            return mean, None
        codes = self._one_of("logstd", positions, np.uint8, flipped)
        minimum, step = (float(self._first[0].metadata[n]) for n in ("logstd_min", "logstd_step"))
        return mean, (minimum + step * np.arange(256)).astype(np.float32)[codes]

    def features(self, positions: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """A vision tower's features, float32 [B,g,g,D]; flipped: as for `moments`."""
        return self._one_of(FEATURES, positions, np.float32, flipped)

    def _one_of(self, name: str, positions: np.ndarray, dtype: Any, flipped: np.ndarray | None) -> np.ndarray:
        found = self._gather(name, positions, dtype)
        if flipped is not None and flipped.any():
            found[flipped] = self._gather(name + FLIPPED, positions, dtype)[flipped]
        return found

    @property
    def empty_tokens(self) -> np.ndarray:
        """The ids of the empty caption, int64 [context]."""
        return self.empty["tokens"]

    def tokens(self, positions: np.ndarray, name: str = "tokens") -> np.ndarray:
        """Token ids, int64 [B,context]; name: of `token_names`."""
        return self._gather(name, positions, np.int64)

    def embeddings(self, positions: np.ndarray) -> np.ndarray:
        """Token embeddings, float32 [B,context,width]; zeros behind those of a caption that has fewer."""
        if "text_length" not in self.token_names:
            return self._gather("embeddings", positions, np.float32)
        rows = self._rows(positions)
        found = [self._column(window, "embeddings")[at] for window, at in rows]
        out = np.zeros((len(rows), self.context_length, found[0].shape[-1]), np.float32)
        for row, values in zip(out, found, strict=True):
            row[: len(values)] = values
        return out

    def pooled(self, positions: np.ndarray) -> np.ndarray:
        """The captions' pooled embeddings, float32 [B,width]."""
        return self._gather("pooled", positions, np.float32)

    def sizes(self, positions: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2), float32 [B,6].

        Original height and width, top and left of the crop in the scaled image, and the height and width that
        were aimed at; in pixels. flipped: as for `moments`. Raises StageError where the latents lack it.
        """
        return self._one_of("micro", positions, np.float32, flipped)

    def require_captions(self, columns: Sequence[str]) -> None:
        """Raises StageError where the first shard of a dataset has no texts in one of these columns of its sidecar."""
        for file in self._first:
            for name in columns:
                if f"text.{name}" not in file.kinds:
                    file.sidecar_texts(name)

    def require_flipped(self) -> None:
        """Raises ConfigError where a dataset lacks the moments of mirrored images."""
        for file in self._first:
            if "mean" + FLIPPED not in file.kinds:
                raise ConfigError(
                    f"train.flip: {file.dataset.root} lacks the moments of mirrored images, which cannot be had from "
                    "those of the images; make the latents again with latents.flip true (carrara latents --redo)"
                )

    def require_features(self) -> dict[str, Any]:
        """The facts of the vision tower whose features lie beside the latents; raises ConfigError where a dataset has
        none, or those of another one."""
        facts: list[dict[str, Any]] = [d.manifest.get(FEATURES) or {} for d in self.datasets]
        for dataset, one in zip(self.datasets, facts, strict=True):
            if not one:
                raise ConfigError(
                    f"train.alignment: {dataset.root} has no features of a vision tower; make the latents again with "
                    "latents.features (carrara latents --redo)"
                )
            if any(one[n] != facts[0][n] for n in ("digest", "size", "grid")):
                raise ConfigError(
                    f"train.alignment: the features of {dataset.root} are of another vision tower, or of another size "
                    f"or grid, than those of {self.dataset.root}; make the latents of all sources with the same"
                )
        return facts[0]

    def require_images(self) -> None:
        """Raises StageError where beside the first shard of a dataset there is not one image of its samples."""
        for file, beside in zip(self._first, self._beside, strict=False):
            keys = file.keys
            if not beside.has_any(file.info.index, keys):
                raise StageError(
                    f"{beside.dataset.root}: its shard {file.info.name} has no image of the samples in shard "
                    f"{file.info.name} of {file.dataset.root}, such as {keys[0] if keys else 'none'}; make both from "
                    "the same table, with the same samples_per_shard"
                )

    def captions(self, positions: np.ndarray, columns: Sequence[str]) -> list[list[list[str]]]:
        """Of each sample, the captions in each of these columns of the sidecar, whose entries are texts or lists of
        texts; empty ones are left out. Raises StageError where a column is not there."""
        rows = self._rows(positions)
        found = [[self._column(window, f"text.{name}") for name in columns] for window, _ in rows]
        return [[texts[at] for texts in each] for each, (_, at) in zip(found, rows, strict=True)]

    def keys(self, positions: np.ndarray) -> list[str]:
        """The samples' keys."""
        rows = self._rows(positions)
        return [str(self._column(window, "key")[at]) for window, at in rows]

    def images(self, positions: np.ndarray) -> list[tuple[str, bytes, tuple[float, float] | None]]:
        """The samples' keys, the encoded images that lie beside their latents, and where their images were cropped
        for these (latents.resize.fit_cover)."""
        found = []
        for window, at in self._rows(positions):
            key = str(self._column(window, "key")[at])
            settings = self.datasets[self._shard_of[window.columns["runs"][0]][0]].manifest.get("settings") or {}
            place = crop_place(key) if settings.get("crop") == "random" else None
            found.append((key, self._column(window, "image")[at], place))
        return found

    def _rows(self, positions: np.ndarray) -> list[tuple[Window, int]]:
        """Where these samples lie in memory; a batch asks for the same ones several times."""
        name = np.asarray(positions, np.int64).tobytes()
        known, rows = self._taken
        if known != name:
            rows = self._reader.take(positions)
            self._taken = (name, rows)
        return rows

    def _gather(self, name: str, positions: np.ndarray, dtype: Any) -> np.ndarray:
        rows = self._rows(positions)
        first = self._column(rows[0][0], name)
        out = np.empty((len(rows), *first.shape[1:]), dtype)
        for i, (window, at) in enumerate(rows):
            out[i] = self._column(window, name)[at]
        return out

    def _column(self, window: Window, name: str) -> Any:
        """A column of a window; what nobody announced in `wants` is read now, and from now on with every window."""
        if name not in window.columns:
            self.wants.add(name)
            source, bucket, runs = window.columns["runs"]
            window.columns[name] = self._load(source, bucket, runs, {name}).columns[name]
        return window.columns[name]

    def _load(
        self, source: int, bucket: int, runs: list[tuple[int, int, int]], wants: set[str] | None = None
    ) -> Window:
        which, offset = self._shard_of[source]
        dataset, wants = self.datasets[which], set(wants or self.wants)
        wants |= {"key"} if "image" in wants else set()
        parts, shards, rows, alive = [], [], [], []
        for shard, first, end in runs:
            position = offset + shard
            with named(dataset, position):
                file = self._file(which, position)
                parts.append(file.read(bucket, first, end, wants))
            alive.append(parts[-1].pop("alive"))
            if "image" in wants:
                parts[-1]["image"], there = self._beside[which].read(file.info.index, parts[-1]["key"])
                alive[-1] = alive[-1] & there
            shards.append(np.full(end - first, position))
            rows.append(np.arange(first, end))
        columns = {name: joined([p[name] for p in parts]) for name in parts[0]}
        columns["runs"] = (source, bucket, runs)
        return Window(np.concatenate(shards), np.concatenate(rows), np.concatenate(alive), columns)


def _refuse_other_kind(one: Dataset, first: LatentFile, other: Dataset, file: LatentFile) -> None:
    if different := other_encoder(one.manifest, other.manifest):
        raise ConfigError(
            f"train.sources: {other.root} was made with another {different} than {one.root}; "
            "make the latents of all sources with the same encoders"
        )
    columns = {"mean", "logstd", *TOKENS, "embeddings", "pooled"}
    same = one.manifest["resolution"] == other.manifest["resolution"]
    same &= one.manifest.get("buckets") == other.manifest.get("buckets")
    if not same or first.kinds & columns != file.kinds & columns:
        raise ConfigError(
            f"train.sources: the latents of {other.root} have other shapes, or other text, than those of {one.root}; "
            "make them with the same settings"
        )
