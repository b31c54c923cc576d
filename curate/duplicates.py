"""Semantic duplicates (SemDeDup; Abbas et al. 2023, arXiv:2303.09540) over the embeddings that a score has kept.

k-means deals the embeddings to clusters. Within a cluster the samples stand in an order, and each is told the highest
cosine to one that stands before it: column `nearest`, -1 for the first. `select: [{column: NAME.nearest, max: 0.95}]`
then keeps what the paper keeps at epsilon 0.05, and another epsilon needs no further pass.

    <score>/index/centroids.safetensors          unit vectors [k,D], once for all
                  0000/group-00000.safetensors   of the clusters of a group: shard, row, nearest, centroid, cluster
                  0000/generation.json           the shards that it covers; written last

A generation is a pass over everything: embeddings are read once, laid out by groups of clusters in a scratch folder on
this machine's disk, and compared group by group, from the file. Memory is bounded by the entries of a group, and by the
sample that k-means is fitted on: 524,288 embeddings at the most, 1 GB at 512 values. Images that come later are a
generation of their own and stand behind all that came before, so that nothing that was told of those changes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from curate.embeddings import read_embeddings
from shards import storage
from shards.columns import ColumnFile, pack_columns, unpack_columns
from shards.dataset import Dataset
from shards.progress import Progress
from shards.settings import StageError

A_CLUSTER = 1000  # images in a cluster, about, where the configuration does not say how many there are
MOST_CLUSTERS = 1 << 14
SAMPLED, MOST_SAMPLED = 256, 1 << 19  # embeddings that k-means is fitted on: a centroid, as faiss has it, and in all
ITERATIONS = 20
BLOCK, WIDE = 1024, 1 << 14  # rows that are compared at a time, and with how many
SHARE = 1 / 3  # of the memory that is granted, for what is held of a group
COLUMNS = ("nearest", "centroid", "cluster")

# A sample of a group in the scratch folder, beside its embedding. late: of the generation that is being made.
ENTRY = np.dtype(
    [("cluster", "<i4"), ("shard", "<i4"), ("row", "<i4"), ("centroid", "<f4"), ("first", "<f4"), ("late", "?")]
)
Rank = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is compared. rows: of each image shard by its number, those that can be used; rank: (shard, rows, cosines to
    the centroids) -> float [N], of which higher ones stand first."""

    embeddings: Dataset
    rows: Callable[[int], np.ndarray]
    shards: Sequence[int]
    counts: Sequence[int]
    rank: Rank

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a shard that have an embedding, int64 [N], and these, float16 [N,D] of length 1."""
        rows = self.rows(index)
        found = read_embeddings(self.embeddings, index, rows, "image")
        length = np.linalg.norm(found.astype(np.float32), axis=1)
        there = np.isfinite(length) & (length > 0)
        return rows[there], (found[there] / length[there, None]).astype(np.float16)


def fit_centroids(sample: np.ndarray, count: int, threads: int) -> np.ndarray:
    """Unit vectors float32 [k,D] by faiss' spherical k-means; k is `count`, or fewer where there are fewer samples."""
    import faiss

    faiss.omp_set_num_threads(threads)
    count = min(count, len(sample))
    kmeans = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=ITERATIONS,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLED,
    )
    kmeans.train(np.ascontiguousarray(sample, np.float32))
    return np.asarray(kmeans.centroids, np.float32)


def assign(vectors: np.ndarray, centroids: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """The centroid of the highest cosine, int32 [N], and that cosine, float32 [N]."""
    import faiss

    faiss.omp_set_num_threads(threads)
    if not len(vectors):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    cosine, cluster = faiss.knn(
        np.ascontiguousarray(vectors, np.float32), centroids, 1, metric=faiss.METRIC_INNER_PRODUCT
    )
    return cluster[:, 0].astype(np.int32), cosine[:, 0]


def nearest(vectors: np.ndarray, first: int = 0, order: np.ndarray | None = None) -> np.ndarray:
    """Of each vector from place `first` on the highest cosine to one before it, float32; -1 where there is none.

    vectors: [N,D] of length 1, perhaps of a file; order: their rows in order, else as they stand. Memory O(order).
    """
    order = np.arange(len(vectors)) if order is None else order
    found = np.full(len(order) - first, -1, np.float32)
    for begin in range(first, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        some = vectors[order[begin:end]].astype(np.float32)
        for left in range(0, end, WIDE):
            right = min(left + WIDE, end)
            cosines = some @ vectors[order[left:right]].astype(np.float32).T
            if right > begin:
                cosines[np.arange(left, right)[None] >= np.arange(begin, end)[:, None]] = -1
            most = found[begin - first : end - first]
            np.maximum(most, cosines.max(axis=1), out=most)
    return np.clip(found, -1, 1)


class Index:
    """The files of one score's duplicates. memory_gb: what a pass may hold of embeddings; threads: of arithmetic."""

    def __init__(self, root: str, clusters: int | None, memory_gb: float, threads: int) -> None:
        self.root, self.clusters, self.memory, self.threads = root, clusters, memory_gb * 1e9, threads

    def generations(self) -> list[tuple[str, list[int]]]:
        """The folders of the finished generations, and the shards that each covers."""
        found: list[tuple[str, list[int]]] = []
        while True:
            folder = storage.join(self.root, f"{len(found):04d}")
            manifest = storage.read_json(storage.join(folder, "generation.json"))
            if manifest is None:
                return found
            found.append((folder, list(manifest["shards"])))

    def build(self, source: Source) -> None:
        """Tell all images that no generation covers; goes on where a pass before was killed."""
        done = self.generations()
        before = {s for _, shards in done for s in shards}
        late = [s for s in source.shards if s not in before]
        if not late:
            return
        centroids = self._centroids(source)
        folder = storage.join(self.root, f"{len(done):04d}")
        total, width = sum(source.counts), centroids.shape[1]
        groups = max(1, -(-total * (2 * width + ENTRY.itemsize) // int(SHARE * self.memory)))
        groups = min(groups, len(centroids))
        plan = {"groups": groups, "shards": late}
        # What was begun goes on with as many groups, whatever memory there is now, unless images came meanwhile.
        begun = storage.join(folder, "begun.json")
        known = storage.read_json(begun)
        if known is not None and known["shards"] == late:
            plan = known
        else:
            for name in storage.list_names(folder):
                storage.remove(storage.join(folder, name))
            storage.write_json(begun, plan)
        urls = [storage.join(folder, f"group-{g:05d}.safetensors") for g in range(plan["groups"])]
        missing = [g for g, url in enumerate(urls) if not storage.exists(url)]
        if missing:
            with tempfile.TemporaryDirectory(prefix="carrara-duplicates-") as scratch:
                self._lay_out(source, centroids, set(late), plan["groups"], missing, Path(scratch))
                bar = Progress("duplicates: compare", len(missing), "groups")
                for g in missing:
                    storage.create(urls[g], _compare(Path(scratch), g, width, late))
                    bar.update(1)
                bar.close()
        storage.write_json(storage.join(folder, "generation.json"), plan)

    def _centroids(self, source: Source) -> np.ndarray:
        url = storage.join(self.root, "centroids.safetensors")
        if not storage.exists(url):
            total = sum(source.counts)
            count = self.clusters or min(max(1, round(total / A_CLUSTER)), MOST_CLUSTERS)
            share = min(SAMPLED * count, MOST_SAMPLED) / max(1, total)
            bar = Progress("duplicates: sample", len(source.shards), "shards")
            chosen: list[np.ndarray] = []
            for index in source.shards:
                rows, vectors = source.read(index)
                chosen.append(vectors[np.random.default_rng((0, index)).random(len(rows)) < share])
                bar.update(1)
            bar.close()
            sample = np.concatenate(chosen).astype(np.float32)
            if not len(sample):
                raise StageError(f"{source.embeddings.root} holds no embeddings of the run's images")
            storage.create(url, pack_columns({"centroids": fit_centroids(sample, count, self.threads)}, {}))
        arrays, _ = unpack_columns(storage.read_bytes(url))
        return np.ascontiguousarray(arrays["centroids"])

    def _lay_out(
        self, source: Source, centroids: np.ndarray, late: set[int], groups: int, wanted: Sequence[int], scratch: Path
    ) -> None:
        """Write every sample's entry and embedding to the files of its group; of the wanted groups alone."""
        bar = Progress("duplicates: clusters", len(source.shards), "shards")
        for index in source.shards:
            rows, vectors = source.read(index)
            cluster, cosine = assign(vectors, centroids, self.threads)
            entries = np.zeros(len(rows), ENTRY)
            entries["cluster"], entries["centroid"], entries["row"] = cluster, cosine, rows
            entries["shard"], entries["late"] = index, index in late
            entries["first"] = np.nan_to_num(source.rank(index, rows, cosine), nan=-np.inf, neginf=-np.inf)
            for g in wanted:
                mine = np.flatnonzero(cluster % groups == g)
                for name, data in (("entries", entries[mine]), ("vectors", vectors[mine])):
                    with open(scratch / f"{g}.{name}", "ab") as sink:
                        sink.write(data.tobytes())
            bar.update(1)
        bar.close()


def _compare(scratch: Path, group: int, width: int, late: Sequence[int]) -> bytes:
    """The file of a group: of the late samples, by shard and row, the columns; `end`: where each late shard's end."""
    entries = np.fromfile(scratch / f"{group}.entries", ENTRY)
    vectors = np.zeros((0, width), np.float16)
    if len(entries):  # left in the file: one cluster may be larger than the memory that is granted
        vectors = np.memmap(scratch / f"{group}.vectors", np.float16, "r", shape=(len(entries), width))
    order = np.lexsort((entries["row"], entries["shard"], -entries["first"], entries["late"], entries["cluster"]))
    similarity = np.full(len(entries), -1, np.float32)
    for some in np.split(order, np.flatnonzero(np.diff(entries["cluster"][order])) + 1):
        first = int((~entries["late"][some]).sum())
        similarity[some[first:]] = nearest(vectors, first, some)
    kept = np.flatnonzero(entries["late"])
    number = {shard: n for n, shard in enumerate(late)}
    shard = np.array([number[s] for s in entries["shard"][kept].tolist()], np.int64)
    kept = kept[np.lexsort((entries["row"][kept], shard))]
    end = np.cumsum(np.bincount(shard, minlength=len(late)))
    columns = {
        "row": entries["row"][kept],
        "nearest": similarity[kept],
        "centroid": entries["centroid"][kept],
        "cluster": entries["cluster"][kept],
        "end": end.astype(np.int64),
    }
    (scratch / f"{group}.vectors").unlink()
    return pack_columns(columns, {})


class FinishedIndex:
    """What a finished index says, shard by shard."""

    def __init__(self, index: Index) -> None:
        self._position: dict[int, tuple[int, int]] = {}  # shard -> generation, position in it
        self._files: list[list[tuple[ColumnFile, np.ndarray]]] = []
        for generation, (folder, shards) in enumerate(index.generations()):
            self._position |= {s: (generation, n) for n, s in enumerate(shards)}
            names = sorted(n for n in storage.list_names(folder) if n.startswith("group-"))
            files = [ColumnFile(storage.join(folder, n)) for n in names]
            self._files.append([(f, f.whole("end")) for f in files])

    def columns(self, shard: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """By name float32 [len(rows)] for rows of a shard, NaN for one without an embedding. Raises StageError."""
        if shard not in self._position:
            raise StageError(f"shard {shard} came after the duplicates were looked for; run 'carrara score' again")
        generation, position = self._position[shard]
        found = {name: np.full(int(rows.max(initial=-1)) + 1, np.nan, np.float32) for name in COLUMNS}
        for file, end in self._files[generation]:
            first, last = int(end[position - 1]) if position else 0, int(end[position])
            if last > first:
                at, *values = file.rows([(n, first, last) for n in ("row", *COLUMNS)])
                there = at < len(found["nearest"])
                for name, column in zip(COLUMNS, values, strict=True):
                    found[name][at[there]] = column[there]
        return {name: column[rows] for name, column in found.items()}
