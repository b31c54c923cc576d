"""The making of one latent shard: the encoders of a process, and an image shard's way through them to its columns.

A worker may be called from several threads: while the encoders are busy with one shard, the next one is opened
and its first batches are decoded, and the one before is packed and committed.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from latents.arithmetic import fixed_arithmetic
from latents.columns import FLIPPED, by_first_use, id_type, lay_out, rows_digest
from latents.encoding import ImageEncoder, Sample
from latents.moments import LOGSTD_MIN, LOGSTD_STEP, finite_rows, to_half
from latents.resize import prefetch
from latents.sidecar import describe, sidecar
from latents.source import caption_columns, image_settings
from latents.takedown import NOT_SELECTED
from latents.weights import PADS, clips_of, text_facts
from shards import images, storage
from shards.columns import ENDS, column, pack_columns, packed_rows
from shards.dataset import Dataset, born, read_stats
from shards.selection import Selection
from shards.settings import StageError
from shards.stage import Task, open_folder, persist

if TYPE_CHECKING:
    from latents.encoders import Vae
    from latents.stage import LatentsStage
    from latents.text import Text
    from latents.vision import VisionEncoder


class Worker:
    """The encoders of one process, and the making of one shard with them. Safe to call from several threads."""

    def __init__(self, stage: LatentsStage) -> None:
        # Here and not above: whoever only asks what there is to do should not wait for torch.
        from latents.encoders import load_text_of, load_vae, pick_device

        self.config, self.root = stage.config, stage.root
        self.buckets = stage.config.bucket_list()
        self.device = pick_device(stage.config.device)
        self.dataset = stage.images()
        self.made_with = stage.made_with()
        self.folder = open_folder(stage)
        self.captions = {n: storage.join(stage.run.run, "captions", n) for n in self.config.captions}
        recorded = self.made_with.settings.get("select")
        self.selection = Selection(stage.run.run, self.config.select, recorded) if self.config.select else None
        self._encoders, self._reading = threading.Lock(), threading.Lock()
        how = {"channels_last": self.config.channels_last, "compile": self.config.compile}
        with fixed_arithmetic(self.config.threads):
            self.vae: Vae = load_vae(stage.vae_ref, self.device, self.config.precision, **how)
            self.facts = text_facts(self.config, stage.text_ref)
            self.text: Text = load_text_of(self.facts, self.device, self.config.precision)
            self.vision: VisionEncoder | None = None
            if (features := stage.features()) is not None:
                from latents.vision import VisionEncoder, find_vision

                self.vision = VisionEncoder(find_vision(features["ref"]), features, self.device, self.config.precision)
        cropped = image_settings(self.dataset).get("resize_mode") == "center_crop"
        self.images = ImageEncoder(self.config, self.vae, self.vision, cropped)

    def __call__(self, task: Task) -> dict[str, Any]:
        """Encode and commit one shard; returns its committed stats."""
        from latents.encoders import require_digest

        weights = self.made_with.weights or {}
        require_digest("the VAE", self.vae.digest, weights["vae"], self.vae.ref)
        require_digest(self.text.called, self.text.digest, weights["text"], self.text.ref)
        if self.vision is not None:
            require_digest("the vision tower", self.vision.digest, weights["features"], self.vision.ref)
        if (found := self.folder.adopt(task.index)) is not None:
            return found
        started = time.perf_counter()
        try:
            shard, excluded = self._open(task)
            known = np.array(sorted(excluded), np.int64)
            unselected: list[int] = []
            try:
                if self.selection is not None:
                    passes = self.selection.passes(task.index, shard.rows)
                    unselected = shard.rows[~passes].tolist()
                    excluded = excluded | dict.fromkeys(unselected, NOT_SELECTED)
                    shard.keep(passes)
                shard.fetch()
                files, stats = self._make(shard, excluded)
            finally:
                shard.close()
        except FileNotFoundError as e:
            raise StageError(
                f"{self.dataset.root}: image shard {task.index} lacks {e.filename or e}; run ingest again, "
                "which makes such a shard anew"
            ) from None
        seconds = time.perf_counter() - started
        stats["seconds"] = round(seconds, 3)
        stats["images_per_second"] = round(stats["count"] / seconds, 3)
        if self.selection is not None:
            stats["not_selected"] = len(unselected)
        if len(known):
            stats["excluded"] = rows_digest(known)
        made_from = task.input or self._born(task.index)
        return persist(lambda: self.folder.commit(task.index, files, stats, made_from))

    def _born(self, index: int) -> str | None:
        """Which image shard it is, where the manifest is of format 1 and cannot say it."""
        stats = read_stats(self.dataset.root, index)
        return None if stats is None else born(stats)

    def _open(self, task: Task) -> tuple[images.ImageShard, dict[int, str]]:
        position = task.payload
        with self._reading:
            info = self.dataset.shards[position] if position < len(self.dataset.shards) else None
            if info is None or task.input not in (info.born, None):
                # The images were finished again since this worker started.
                self.dataset = Dataset.open(self.dataset.root)
                if task.input not in (self.dataset.shards[position].born, None):
                    raise StageError(
                        f"{self.dataset.root}: the images changed during the run; run the same command again"
                    )
            return images.ImageShard(self.dataset, position), self.dataset.exclusions.reasons(task.index)

    def _make(self, shard: images.ImageShard, excluded: dict[int, str]) -> tuple[dict[str, bytes], dict[str, Any]]:
        count = len(shard)
        plan = self.images.plan(shard)
        samples: list[Sample] = [Sample() for _ in range(count)]
        # Two batches ahead: one that the encoder takes next and one that is being decoded.
        ahead, load = 2 * self.config.batch_size, self.images.loader(shard, plan)
        decoded = prefetch(load, count, self.config.decode_threads, ahead)
        first = list(itertools.islice(decoded, 1))  # decoding goes on from here, whoever has the encoders
        tokens, text_index = self.tokenise(shard.captions)
        with self._encoders, fixed_arithmetic(self.config.threads):
            busy = time.perf_counter()
            clock = _Clock()
            moments = self.images.encode(plan, clock.timed(itertools.chain(first, decoded)), samples)
            text = finite = None
            if self.config.text == "embeddings":
                text, finite = self.embed_captions(tokens, text_index)
            busy = time.perf_counter() - busy - clock.waited
        if finite is not None:
            for i in range(count):
                if samples[i].error is None and not finite[text_index[i]]:
                    samples[i].error = ("not_finite_text", "the caption's embedding is not finite in float16")
        kept = np.array([i for i in range(count) if samples[i].error is None], np.int64)
        each = {name: ids[kept] for name, ids in tokens.items()} | {"alive": np.ones(len(kept), np.uint8)}
        if text is not None:
            each["embedding_index"] = text_index[kept]
        columns = caption_columns(shard) | self._new_captions(shard)
        texts = {name: [values[i] for i in kept] for name, values in columns.items()}
        micro = {"micro": self.images.micro(shard, plan, samples)[kept]}
        if self.config.flip and self.config.crop == "random":  # the middle lies in the middle of the mirrored image too
            micro["micro" + FLIPPED] = self.images.micro(shard, plan, samples, mirrored=True)[kept]
        arrays = lay_out(each, micro, texts, plan.bucket[kept], self.buckets)
        arrays |= {f"empty_{name}": ids[-1] for name, ids in tokens.items()}
        metadata = {"vae": self.vae.digest, "text": self.text.digest, "text_layer": self.facts["layer"]}
        for suffix, clip in zip(("", "_2"), clips_of(self.facts), strict=False):
            if clip["pad"] in PADS and clip["pad"] != "zero":
                metadata[f"text_pad{suffix}"] = clip["pad"]
        if self.vision is not None:
            metadata["features"] = self.vision.digest
        if self.config.moments:
            metadata |= {"logstd_min": repr(LOGSTD_MIN), "logstd_step": repr(LOGSTD_STEP)}
        if len(self.buckets) > 1:
            metadata["buckets"] = json.dumps([b.to_json() for b in self.buckets])
        live = np.zeros(count, bool)
        live[kept] = True
        for name, array in moments.items():
            bucket = int(name.partition(".")[2] or 0)
            arrays[name] = array[live[(plan.bucket == bucket).any(axis=1)]]
        if text is not None:
            # Captions of images that were set aside leave no row behind.
            names = [column("embedding_index", b, len(self.buckets)) for b in range(len(self.buckets))]
            used, index = by_first_use([arrays[name] for name in names])
            arrays |= dict(zip(names, index, strict=True))
            empty = text_index[-1]
            if ENDS in text:
                length = np.diff(text[ENDS], prepend=0)
                arrays |= {
                    "embeddings": text["embeddings"][packed_rows(text[ENDS], used)],
                    ENDS: np.cumsum(length[used]),
                }
                arrays["empty_embedding"] = text["embeddings"][packed_rows(text[ENDS], np.array([empty]))]
            else:
                arrays |= {"embeddings": text["embeddings"][used], "empty_embedding": text["embeddings"][empty]}
            if "pooled" in text:
                arrays |= {"pooled": text["pooled"][used], "empty_pooled": text["pooled"][empty]}
        table = sidecar(shard, plan, samples, excluded, self.buckets)
        stats = describe(arrays, table, len(self.buckets))
        stats["encode_seconds"], stats["wait_seconds"] = round(busy, 3), round(clock.waited, 3)
        return {".safetensors": pack_columns(arrays, metadata), ".parquet": storage.parquet_bytes(table)}, stats

    def _new_captions(self, shard: images.ImageShard) -> dict[str, list[list[str]]]:
        """Of each usable image the texts of each set of new captions, by key. Raises StageError."""
        found = {}
        for name, root in self.captions.items():
            if name in shard.table.column_names:
                raise StageError(f"latents.captions: the images have a column '{name}' already; name the new ones anew")
            url = storage.join(root, shard.info.name + ".parquet")
            try:
                table = storage.read_parquet(url, ["key", "captions"])
            except FileNotFoundError:
                raise StageError(f"{url} is not there; run 'carrara caption' again") from None
            said = dict(zip(table["key"].to_pylist(), table["captions"].to_pylist(), strict=True))
            found[name] = [[t for t in said.get(key) or () if t] for key in shard.keys]
        return found

    def tokenise(self, captions: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Captions and, as row N, the empty one: columns of N+1 rows of token ids, and which distinct row is each
        one's, int64 [N+1]. Captions of the same tokens share a row."""
        kind = id_type(self.text.vocabulary)
        found = self.text.tokens_of([*captions, ""])
        tokens = {n: ids.astype(np.uint16 if n == "text_length" else kind) for n, ids in found.items()}
        first: dict[bytes, int] = {}
        lines = (b"".join(row.tobytes() for row in rows) for rows in zip(*tokens.values(), strict=True))
        return tokens, np.array([first.setdefault(line, len(first)) for line in lines], np.int64)

    def embed_captions(
        self, tokens: dict[str, np.ndarray], index: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """`embeddings` float16 of the distinct rows: [U,ctx,D], or of as many rows as each has tokens one after the
        other, with `embedding_end` int64 [U]; where they are wanted, `pooled` float16 [U,P]. And which are finite,
        bool [U]."""
        some = np.unique(index, return_index=True)[1]
        size, pooled = self.config.batch_size, self.config.text_pooled
        rows: list[np.ndarray] = [np.empty(0)] * len(some)
        ends = np.zeros((len(some), self.text.pooled_width if pooled else 0), np.float16)
        order = np.arange(len(some))
        length = np.full(len(some), self.text.context_length)
        if "text_length" in tokens:
            length = tokens["text_length"][some].astype(np.int64)
            order = np.argsort(length, kind="stable")  # those of about one length together

        def encode(indices: np.ndarray, exact: bool = False) -> None:
            full = np.concatenate([indices, np.repeat(indices[-1:], (1 if exact else size) - len(indices))])
            found, end = self.text.encode_tokens({n: ids[some[full]] for n, ids in tokens.items()}, pooled, exact)
            half, end_half = to_half(found.numpy()), to_half(end.numpy())
            for k, j in enumerate(indices.tolist()):
                rows[j], ends[j] = half[k, : length[j]].copy(), end_half[k]

        for i in range(0, len(some), size):
            encode(order[i : i + size])
        finite = np.array([np.isfinite(row).all() for row in rows]) & finite_rows(ends)
        for j in np.flatnonzero(~finite):
            encode(np.array([j]), exact=True)
            finite[j] = np.isfinite(rows[j]).all() and np.isfinite(ends[j]).all()
        if not finite[index[-1]]:
            raise StageError(
                f"{self.text.called} '{self.text.ref}': the empty caption's embedding is not finite in float16"
            )
        arrays = (
            {"embeddings": np.stack(rows)}
            if "text_length" not in tokens
            else {"embeddings": np.concatenate(rows), ENDS: np.cumsum(length)}
        )
        return arrays | ({"pooled": ends} if pooled else {}), finite


class _Clock:
    """How long whoever takes the items waited for them, in seconds."""

    def __init__(self) -> None:
        self.waited = 0.0

    def timed(self, items: Iterable[Sample]) -> Iterator[Sample]:
        items = iter(items)
        while True:
            began = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - began
            if item is None:
                return
            yield item
