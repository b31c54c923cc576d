"""One shard of latents: rows of its columns, read as ranges of bytes, and of its sidecar."""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from latents.columns import FEATURES, FLIPPED
from latents.source import texts_in
from shards import storage
from shards.columns import COLUMN_ROW, ENDS, ColumnFile, Columns, column, column_rows, members, packed_rows
from shards.dataset import Dataset
from shards.selection import Selection
from shards.settings import StageError
from train.reader import named

TOKENS = ("tokens", "tokens_2", "text_length")  # columns of what a caption's encoders read of it (latents/text.py)


class LatentFile:
    """One shard of latents, of which rows are read as ranges; its layout is read once."""

    def __init__(self, dataset: Dataset, position: int, select: Selection | None = None) -> None:
        self.dataset, self.position, self.info = dataset, position, dataset.shards[position]
        self._select = select
        with named(dataset, position):
            self._file = ColumnFile(storage.join(dataset.root, self.info.name + ".safetensors"))
        names = self._file.columns
        # Names without the number of a bucket.
        self.several = "bucket" in names
        self.kinds = {n.rpartition(".")[0] if self.several and n.rpartition(".")[2].isdigit() else n for n in names}
        self.metadata = self._file.metadata
        self.buckets = len(dataset.manifest.get("buckets") or ()) if self.several else 1
        self._lock = threading.Lock()

    @property
    def columns(self) -> Columns:
        """Type, shape and place of the columns by name."""
        return self._file.columns

    def whole(self, name: str) -> np.ndarray:
        """A column that belongs to no sample."""
        return self._file.whole(name)

    def some_bucket(self) -> int:
        """A bucket that the file has moments of."""
        return next(int(n.partition(".")[2] or 0) for n in self._file.columns if n.partition(".")[0] == "mean")

    def shape_of_mean(self) -> tuple[int, int, int]:
        """[C,h,w] of that bucket's."""
        name = column("mean", self.some_bucket(), 2 if self.several else 1)
        c, h, w = self._file.columns[name][1][1:]
        return c, h, w

    def read(self, bucket: int, first: int, end: int, wants: set[str]) -> dict[str, Any]:
        """Columns of the rows from `first` up to `end` of a bucket, by name, and `alive`, bool."""
        found: dict[str, Any] = {}
        of_images = [name + end for name in ("mean", "logstd", FEATURES) for end in ("", FLIPPED)]
        # Where crops are of the middle they are those of the mirrored images too, and stand there once.
        of_images += ["micro", *(n for n in ("micro" + FLIPPED,) if n in self.kinds)]
        wants = wants | ({"micro"} if "micro" + FLIPPED in wants else set())
        plain: list[str] = [n for n in (*of_images, *TOKENS) if n in wants]
        by_caption: list[str] = [n for n in ("embeddings", "pooled") if n in wants]
        texts = [n.removeprefix("text.") for n in wants if n.startswith("text.")]
        stored = [t for t in texts if f"text.{t}" in self.kinds]
        asked = [*plain, *(["embedding_index"] if by_caption else []), *(f"text_end.{t}" for t in stored)]
        if "micro" in wants and "micro" not in self.kinds:
            raise StageError(
                f"{self.dataset.root}: shard {self.info.name} has no column 'micro', which a UNet with "
                "addition_embed_type text_time is given; make the latents again"
            )
        got = self._rows(bucket, first, end, [*asked, *(["alive"] if "alive" in self.kinds else [])])
        for name in plain:
            found[name] = got[name]
        if "micro" in found and found["micro"].ndim == 3:  # of every resolution, as it was once stored
            found["micro"] = found["micro"][:, self._level(bucket)]
        if "micro" + FLIPPED in wants:
            found.setdefault("micro" + FLIPPED, found["micro"])
        if by_caption:
            used, index = np.unique(got["embedding_index"], return_inverse=True)
            for name in by_caption:
                if name == "embeddings" and ENDS in self._file.columns:
                    found[name] = self._packed(used, index.reshape(-1))
                else:
                    found[name] = _Rows(self._some(name, used), index.reshape(-1))
        for name in stored:
            found[f"text.{name}"] = self._texts(bucket, first, got[f"text_end.{name}"], name)
        if set(texts) - set(stored) or "key" in wants:
            samples = self._samples(bucket)[first:end]
            for name in set(texts) - set(stored):
                lines = self.sidecar_texts(name)
                found[f"text.{name}"] = [lines[n] for n in samples]
            if "key" in wants:
                found["key"] = [self.keys[n] for n in samples]
        alive = got["alive"] != 0 if "alive" in got else np.ones(end - first, bool)
        for out in (self._dead, self._unselected):
            if out is not None:
                alive = alive & ~out[self._samples(bucket)[first:end]]
        return {**found, "alive": alive}

    def _rows(self, bucket: int, first: int, end: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Rows of columns by name; those that lie sample by sample, as all once did, are picked from a longer range."""
        parts: list[tuple[str, int, int]] = []
        picks: list[np.ndarray | None] = []
        for name in names:
            own = column(name, bucket, 2 if self.several else 1)
            if own in self._file.columns:
                begin, stop = (max(first - 1, 0), end) if name.startswith("text_end.") else (first, end)
                parts.append((own, begin, stop))
                picks.append(None)
            else:
                samples = self._samples(bucket)[first:end]
                parts.append((name, int(samples[0]), int(samples[-1]) + 1))
                picks.append(samples - samples[0])
        arrays = self._file.rows(parts) if parts else []
        return {n: a if p is None else a[p] for n, a, p in zip(names, arrays, picks, strict=True)}

    def _some(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Scattered rows (ascending) of a column, neighbours in one range."""
        breaks = np.flatnonzero(np.diff(rows) > 1) + 1
        runs = np.split(rows, breaks)
        return np.concatenate(self._file.rows([(name, int(r[0]), int(r[-1]) + 1) for r in runs]))

    def _packed(self, used: np.ndarray, index: np.ndarray) -> _Packed:
        """The embeddings of these captions (ascending), and which of them is each sample's."""
        with self._lock:
            if not hasattr(self, "_ends"):
                self._ends = self._file.whole(ENDS).astype(np.int64)
        values = self._some("embeddings", packed_rows(self._ends, used))
        ends = np.cumsum(np.diff(self._ends, prepend=0)[used])
        rows = np.split(values, ends[:-1])
        return _Packed([rows[i] for i in index.tolist()])

    def _texts(self, bucket: int, first: int, ends: np.ndarray, name: str) -> list[list[str]]:
        ends = ends if first else np.concatenate([[0], ends])  # else the end of the row before comes with them
        own = column(f"text.{name}", bucket, 2 if self.several else 1)
        (data,) = self._file.rows([(own, int(ends[0]), int(ends[-1]))])
        text = data.tobytes()
        lines = [text[a - ends[0] : b - ends[0]].strip(b"\0") for a, b in itertools.pairwise(ends)]
        return [list(json.loads(line)) if line else [] for line in lines]

    def _samples(self, bucket: int) -> np.ndarray:
        """The samples, int64, that the rows of a bucket belong to."""
        if not self.several:
            return np.arange(max(self._file.columns["tokens"][1][0], self.info.count))
        with self._lock:
            if not hasattr(self, "_bucket"):
                self._bucket = self._file.whole("bucket")
        return members({"bucket": self._bucket}, bucket, len(self._bucket))

    def _level(self, bucket: int) -> int:
        """The place of a bucket's resolution among the dataset's, which was that of its row in `micro`."""
        if not self.several:
            return 0
        resolutions = list(dict.fromkeys(b["resolution"] for b in self.dataset.manifest["buckets"]))
        return resolutions.index(self.dataset.manifest["buckets"][bucket]["resolution"])

    @functools.cached_property
    def _dead(self) -> np.ndarray | None:
        """bool [samples]: what the sidecar knows to be unusable where the columns do not say; None where nothing is."""
        excluded = self.dataset.excluded_rows(self.info.index)
        laid = int(self._file.columns["bucket"][1][0]) if self.several else int(self._file.columns["tokens"][1][0])
        if len(excluded) == 0 and ("alive" in self.kinds or laid == self.info.count):
            return None
        table = self._sidecar(["status"])
        usable = np.array([s == "success" for s in table["status"].to_pylist()], bool)
        usable[excluded] = False
        rows = column_rows(table)
        dead = np.ones(laid, bool)
        dead[rows[usable & (rows >= 0)]] = False
        return dead

    @functools.cached_property
    def _unselected(self) -> np.ndarray | None:
        """bool [samples]: what the rules leave out; None where there are none."""
        if self._select is None:
            return None
        rows = column_rows(self._sidecar(["status"]))
        there = np.flatnonzero(rows >= 0)
        out = np.ones(int(rows.max(initial=-1)) + 1, bool)
        out[rows[there]] = ~self._select.passes(self.info.index, there)
        return out

    @functools.cached_property
    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the columns."""
        return [str(k) for k in self._by_sample("key")]

    @functools.cached_property
    def _read_texts(self) -> dict[str, list[list[str]]]:
        return {}

    def sidecar_texts(self, name: str) -> list[list[str]]:
        """Of each sample, the texts in a column of the sidecar: one, several, or none. Raises StageError."""
        if name not in self._read_texts:
            try:
                self._read_texts[name] = [texts_in(v) for v in self._by_sample(name)]
            except TypeError:
                raise StageError(
                    f"{self.dataset.root}: column '{name}' of shard {self.info.name} holds no text, nor lists of "
                    "text; leave it out of train.captions"
                ) from None
        return self._read_texts[name]

    def _by_sample(self, name: str) -> list[Any]:
        table = self._sidecar(["status", name])
        if name not in table.column_names:
            raise StageError(
                f"{self.dataset.root}: shard {self.info.name} has no column '{name}' in its .parquet; carry it "
                "there with ingest.keep_columns, or leave it out of train.captions"
            )
        rows = column_rows(table)
        there = np.flatnonzero(rows >= 0)
        return list(table[name].take(pa.array(there[np.argsort(rows[there], kind="stable")])).to_pylist())

    def _sidecar(self, columns: Sequence[str]) -> pa.Table:
        table = self.dataset.sidecar(self.info.index)
        return table.select([c for c in (*dict.fromkeys(columns), COLUMN_ROW) if c in table.column_names])


class _Rows:
    """Rows of a column that are kept once for several samples: [i] is that of sample i."""

    def __init__(self, values: np.ndarray, index: np.ndarray) -> None:
        self.values, self.index = values, index
        self.shape = (len(index), *values.shape[1:])

    def __getitem__(self, i: int) -> np.ndarray:
        row: np.ndarray = self.values[self.index[i]]
        return row


class _Packed:
    """Embeddings of samples that have as many rows as their captions have tokens: [i] is [length,width]."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.rows = rows

    def __getitem__(self, i: int) -> np.ndarray:
        return self.rows[i]


def joined(parts: list[Any]) -> Any:
    """The rows of several shards one after the other."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], _Packed):
        return _Packed([row for p in parts for row in p.rows])
    if isinstance(parts[0], _Rows):
        ends = np.cumsum([0, *(len(p.values) for p in parts)])
        return _Rows(
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.index + e for p, e in zip(parts, ends, strict=False)]),
        )
    return [x for p in parts for x in p] if isinstance(parts[0], list) else np.concatenate(parts)
