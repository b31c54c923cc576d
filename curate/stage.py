"""The score stage: one image shard in, one shard of columns by key out.

    <run>/scores/<name>/   NNNNN.safetensors   embeddings by sample, and which row of the sidecar each is
                           NNNNN.parquet       key, and a column a score, one row for each row of the image shard
                           dataset.json        what the columns are, with their histograms

A score is a dataset of its own, so that another one touches nothing of it. Rows of images that cannot be used (failed,
excluded, taken down) have no score.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curate import duplicates, shardwork
from curate.config import CurateConfig, DuplicateScore, HeadScore, Score
from curate.scorers import Columns, build, find_weights
from latents.arithmetic import fixed_arithmetic
from shards import storage
from shards.columns import pack_columns
from shards.commit import Folder
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import LOCATION, ImageShard
from shards.layout import RunPaths, shard_name
from shards.listing import listed
from shards.settings import ConfigError, StageError
from shards.sketch import Sketch, edges, merge, quantile, sketch
from shards.stage import Made, Task

VERSION = 1  # raise it when the bytes of a shard change for the same settings
SHOWN = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)  # quantiles in the manifest


def score_root(run: RunPaths, name: str) -> str:
    """The folder of a score."""
    return storage.join(run.run, "scores", name)


def score_stages(config: CurateConfig, run: RunPaths, own_clip: str) -> list[ScoreStage]:
    """A stage for each score, those first that others read."""
    stages = []
    for name in config.ordered():
        score = config.scores[name]
        kind = DuplicatesStage if isinstance(score, DuplicateScore) else ScoreStage
        stages.append(kind(score, name, run, own_clip))
    return stages


@dataclasses.dataclass(frozen=True)
class ScoreStage:
    """Stage over the run's image shards for one score. own_clip: the CLIP of a score that names none."""

    config: Score
    score: str
    run: RunPaths
    own_clip: str

    unit = "images"
    data = ".safetensors"

    @property
    def name(self) -> str:
        """`score-aesthetic`."""
        return f"score-{self.score}"

    @property
    def root(self) -> str:
        """`<run>/scores/aesthetic`."""
        return score_root(self.run, self.score)

    def made_with(self) -> Fingerprint:
        """Settings and weights; raises ConfigError where the weights are not there."""
        weights = find_weights(self.config, self.own_clip)
        found = {"score": weights.digest} if weights else {}
        if isinstance(self.config, HeadScore | DuplicateScore):
            found["embeddings"] = self._embeddings().manifest["scored_with"]
        if isinstance(self.config, DuplicateScore) and "." in self.config.keep:
            found["keep"] = self._other(self.config.keep.partition(".")[0]).manifest["scored_with"]
        return Fingerprint("score", VERSION, self.config.settings(), None, found)

    def tasks(self) -> Iterator[Task]:
        """One task an image shard."""
        for position, info in enumerate(Dataset.open(self.run.images).shards):
            yield Task(info.index, info.born, {"position": position})

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Loads the networks once; the result makes one shard a call."""
        with fixed_arithmetic(self.config.threads):
            index = self.index if isinstance(self, DuplicatesStage) else None
            scorer = build(self.config, find_weights(self.config, self.own_clip), self._embeddings, index)
        return shardwork.worker(
            self, self.run.images, self.config.threads, lambda shard, _: pack(shard, *scorer(shard))
        )

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Merge the columns' histograms and write the manifest."""
        merged = _Columns()

        def folded() -> Iterator[dict[str, Any]]:
            for one in stats:
                merged.add(one)
                yield one

        def extra() -> dict[str, Any]:
            settings = self.made_with()
            return {
                "score": self.score,
                "settings": self.config.settings(),
                "weights": settings.weights,
                "scored_with": settings.digest,
                "columns": merged.described(),
            }

        return write_manifest(self.root, "scores", folded(), extra)

    def _embeddings(self) -> Dataset:
        assert isinstance(self.config, HeadScore | DuplicateScore)
        return self._other(self.config.embeddings)

    def _other(self, score: str) -> Dataset:
        root = score_root(self.run, score)
        try:
            return Dataset.open(root)
        except StageError:
            raise ConfigError(
                f"the score '{self.score}' reads the score '{score}', which is not finished in {root}; score that one "
                "first"
            ) from None


@dataclasses.dataclass(frozen=True)
class DuplicatesStage(ScoreStage):
    """The score that looks at all images together: a pass over their embeddings before the shards are written."""

    def begin(self, redo: bool = False) -> None:
        """Look for duplicates among the images that have not been looked at; under the lease."""
        folder = Folder.begin(self.root, self.made_with(), self.data, redo=redo, take_over=True)
        images = Dataset.open(self.run.images)
        shards = [info.index for info in images.shards]
        if listed(folder.root, self.data).is_committed(shards).all():
            return
        positions = {index: n for n, index in enumerate(shards)}

        def rows(index: int) -> np.ndarray:
            return ImageShard(images, positions[index], ("status", *LOCATION)).rows

        counts = [info.count for info in images.shards]
        source = duplicates.Source(self._embeddings(), rows, shards, counts, self._rank)
        with fixed_arithmetic(self.config.threads):
            self.index.build(source)

    @property
    def index(self) -> duplicates.Index:
        """What the pass found."""
        assert isinstance(self.config, DuplicateScore)
        c = self.config
        return duplicates.Index(storage.join(self.root, "index"), c.clusters, c.memory_gb, c.threads)

    def _rank(self, index: int, rows: np.ndarray, cosines: np.ndarray) -> np.ndarray:
        assert isinstance(self.config, DuplicateScore)
        if self.config.keep in ("farthest", "nearest"):
            return -cosines if self.config.keep == "farthest" else cosines
        score, _, column = self.config.keep.partition(".")
        url = storage.join(score_root(self.run, score), shard_name(index) + ".parquet")
        try:
            values = storage.read_parquet(url, [column])[column]
        except FileNotFoundError:
            raise StageError(f"{url} is not there: score '{score}' first") from None
        except (KeyError, pa.ArrowInvalid):
            raise ConfigError(f"the score '{self.score}' keeps by {self.config.keep}, which is no column") from None
        if not pa.types.is_floating(values.type):
            raise ConfigError(f"the score '{self.score}' keeps by {self.config.keep}, which holds no numbers")
        found: np.ndarray = values.fill_null(np.nan).to_numpy()[rows]
        return found


class _Columns:
    """What the stats of shards say of the columns, merged."""

    def __init__(self) -> None:
        self.sketches: dict[str, Sketch] = {}
        self.values: dict[str, dict[str, int]] = {}
        self.missing: Counter[str] = Counter()

    def add(self, stats: Mapping[str, Any]) -> None:
        for column, found in stats["sketch"].items():
            self.sketches[column] = merge([self.sketches.get(column, {}), found])
        for column, found in stats["values"].items():
            self.values[column] = merge_counts([self.values.get(column, {}), found])
        self.missing.update(stats["missing"])

    def described(self) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for column, found in self.sketches.items():
            quantiles = {f"{q:g}": float(f"{v:.6g}") if np.isfinite(v := quantile(found, q)) else None for q in SHOWN}
            columns[column] = {"missing": self.missing[column], "quantiles": quantiles, "sketch": found}
        for column, found in self.values.items():
            columns[column] = {"missing": self.missing[column], "values": found}
        return dict(sorted(columns.items()))


def columns_of(stats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By column, what the manifest of a score says of it, from the stats of its shards."""
    merged = _Columns()
    for one in stats:
        merged.add(one)
    return merged.described()


def merge_counts(counts: Iterable[dict[str, int]], most: int = 200) -> dict[str, int]:
    """Counts of texts added up; beyond the `most` frequent ones, the rest as `other`."""
    total: dict[str, int] = {}
    for one in counts:
        for value, count in one.items():
            total[value] = total.get(value, 0) + count
    ranked = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(ranked[:most])
    if len(ranked) > most:
        kept["other"] = kept.get("other", 0) + sum(n for _, n in ranked[most:])
    return kept


def pack(shard: ImageShard, columns: Columns, embeddings: dict[str, np.ndarray]) -> Made:
    """The files of a shard of scores, and its stats. columns, embeddings: one value or row a sample of the shard."""
    rows = shard.table.num_rows
    column_row = np.full(rows, -1, np.int32)
    column_row[shard.rows] = np.arange(len(shard), dtype=np.int32)
    table = {"key": shard.table["key"].combine_chunks(), "column_row": pa.array(column_row, pa.int32())}
    stats: dict[str, Any] = {"rows": rows, "count": len(shard), "sketch": {}, "values": {}, "missing": {}}
    order = np.where(column_row >= 0, column_row, 0)
    absent = column_row < 0
    for name, values in columns.items():
        if isinstance(values, list):
            texts = [None if gone else values[i] for i, gone in zip(order.tolist(), absent.tolist(), strict=True)]
            table[name] = pa.array(texts, pa.string())
            stats["values"][name] = merge_counts({v: 1} for v in values if v)
            stats["missing"][name] = sum(not v for v in values)
            continue
        numbers = np.asarray(values, np.float32)
        spread = numbers[order] if len(numbers) else np.zeros(rows, np.float32)
        table[name] = pa.array(spread, pa.float32(), mask=absent | ~np.isfinite(spread))
        stats["sketch"][name] = sketch(numbers)
        stats["missing"][name] = int((~np.isfinite(numbers)).sum())
    arrays = {"row": shard.rows.astype(np.int32), **embeddings}
    return {".safetensors": pack_columns(arrays, {}), ".parquet": storage.parquet_bytes(pa.table(table))}, stats


def histogram(manifest: dict[str, Any], column: str, bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Edges [bins+1] and counts [bins] of a column of a finished score, between its 0.1 % and 99.9 % quantiles."""
    found = manifest["columns"][column]["sketch"]
    low, high, counts = edges(found)
    if not len(counts):
        return np.zeros(bins + 1), np.zeros(bins)
    ends = np.linspace(quantile(found, 0.001), max(quantile(found, 0.999), quantile(found, 0.001) + 1e-6), bins + 1)
    middle = (low.astype(np.float64) + high) / 2
    return ends, np.histogram(np.clip(middle, ends[0], ends[-1]), ends, weights=counts)[0]
