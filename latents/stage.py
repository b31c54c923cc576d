"""The latents stage: one image shard in, one latent shard out, each sample accounted for.

    stage = LatentsStage(config, RunPaths(run), vae_ref, text_ref, seed=0)
    work = stage.worker()
    stage.finish(work(task) for task in stage.tasks())

A latent shard is a pure function of its image shard, the settings and the weights. So that a shard has
the same bytes on any worker, batches are formed within the shard, in an order that its rows and the buckets
alone decide, and the number of threads is a setting.

A worker may be called from several threads: while the encoders are busy with one shard, the next one is opened
and its first batches are decoded, and the one before is packed and committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latents.buckets import nearest
from latents.config import LatentsConfig
from latents.moments import LOGSTD_MIN, LOGSTD_STEP, ChannelStats, finite_rows, of_columns, quantise_logstd, to_half
from latents.resize import Fit, crop_before, crop_place, prefetch, resize_crop_to
from latents.takedown import NOT_SELECTED
from latents.weights import PADS, VaeWeights, clips_of, find_vae, text_facts
from shards import images, storage
from shards.columns import COLUMN_ROW, ENDS, ColumnFile, column, members, pack_columns, packed_rows
from shards.commit import Folder
from shards.dataset import MANIFEST, Dataset, born, read_stats, read_stats_of, write_manifest
from shards.exclusions import write_exclusions
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.layout import RunPaths, shard_name
from shards.listing import listed
from shards.made_with import read_made_with
from shards.selection import Selection
from shards.settings import ConfigError, StageError
from shards.stage import Task, open_folder, persist, refuse_other_settings
from shards.takeover import is_old, old_digests, old_version

if TYPE_CHECKING:
    from latents.encoders import Vae
    from latents.text import Text
    from latents.vision import VisionEncoder

log = logging.getLogger("carrara.latents")

VERSION = 3  # raise it when the bytes of a shard change for the same settings
READABLE = (2,)  # older ones, to whose shards new ones may be added

# An image shard's words for what became of a row, and ours for a picture that was there but has no latent.
STATUSES = (*images.STATUSES, "failed_to_encode")
FLIPPED = "_flipped"  # ends the names of the columns of mirrored pictures' moments and features
FEATURES = "features"  # the column of a vision tower's features, float16 [n,grid,grid,width]
ERRORS = ("decode_error", "not_finite_latent", "not_finite_text", "not_finite_features")

FIT_COLUMNS = ("bucket_width", "bucket_height", "scaled_width", "scaled_height", "crop_left", "crop_top")
# Where an image lies, in its tar or in another; it means nothing beside a latent.
_IMAGE_LOCATION = ("image_offset", "image_size", "image_ext", "image_file", "place")


@dataclasses.dataclass
class _Sample:
    """One picture on its way, at each resolution: pixels uint8 [H,W,3] and how they were cut, or why there are none."""

    pixels: list[np.ndarray] = dataclasses.field(default_factory=list)
    fits: list[Fit] = dataclasses.field(default_factory=list)
    error: tuple[str, str] | None = None


@dataclasses.dataclass
class _Plan:
    """How the pictures of a shard are cut. sizes: int64 [N,2], width and height as they lie in the tar; bucket: int64
    [N,R]; index: int64 [N,R], which of its bucket's pictures it is; order: int64 [N], in which they are encoded."""

    sizes: np.ndarray
    bucket: np.ndarray
    index: np.ndarray
    order: np.ndarray


@dataclasses.dataclass
class _LeftOut:
    """Rows (int64) of a latent shard that are excluded by now: those with a latent, those that were set aside."""

    latents: np.ndarray
    failed: np.ndarray
    unselected: int = 0


def _rows_digest(rows: np.ndarray) -> str:
    return digest_bytes(rows.astype("<i8").tobytes())[:16]


class LatentsStage:
    """Stage over the run's image shards. Small and picklable: settings and paths."""

    name = "latents"
    unit = "images"
    data = ".safetensors"
    max_in_flight = 2  # shards a worker is given at a time

    def __init__(self, config: LatentsConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int = 0) -> None:
        self.config, self.run = config, run
        self.vae_ref, self.text_ref = vae_ref, text_ref
        # Nothing here is random: posterior draws happen in the trainer. The seed is taken so that all
        # stages are built alike, and kept out of the fingerprint.
        self.seed = seed
        self.root = run.latents
        self._opened: tuple[tuple[int, int] | None, Dataset] | None = None

    def made_with(self, redo: bool = False) -> Fingerprint:
        """Settings and weights; raises ConfigError where weights are missing or do not fit the resolution.

        redo: with thresholds of now for latents.select, whatever is recorded.
        """
        vae, text = find_vae(self.vae_ref), text_facts(self.config, self.text_ref)
        for bucket in self.config.bucket_list():
            if bucket.width % vae.downscale or bucket.height % vae.downscale:
                field, value = "resolution", bucket.width
                if self.config.buckets:
                    field, value = "buckets.step", self.config.buckets.step
                raise ConfigError(
                    f"latents.{field} is {value}, which this VAE cannot encode: make it a multiple of {vae.downscale}"
                )
        if self.config.moments and not vae.has_posterior:
            raise ConfigError(
                f"the VAE '{vae.ref}' is an {vae.kind}, which has no posterior to draw from: "
                "set latents.moments to false"
            )
        weights = {"vae": vae.digest, "text": text["digest"]}
        stored = read_made_with(self.root)
        settings = {**self.config.settings(), **self._curated(None if redo else stored)}
        if self.config.features is not None:
            from latents.vision import find_vision

            tower = find_vision(self.config.features.pretrained)
            weights["features"], settings["features"] = tower.digest, tower.settings(self.config.features)
        kept = stored is not None and stored.get("taken_over_from") and stored["version"] in READABLE
        version = stored["version"] if stored is not None and kept else VERSION
        return Fingerprint(self.name, version, settings, None, weights)

    def features(self) -> dict[str, Any] | None:
        """The facts of the vision tower whose features are stored; None where none are. Raises ConfigError."""
        if self.config.features is None:
            return None
        from latents.vision import find_vision

        return find_vision(self.config.features.pretrained).facts(self.config.features)

    def _curated(self, stored: dict[str, Any] | None) -> dict[str, Any]:
        """Settings of what comes from scores and captions: rules with their thresholds, which stay once they are
        recorded, and what made the captions. Raises ConfigError where a score or the captions are not finished."""
        found: dict[str, Any] = {}
        if self.config.select:
            known = (stored or {}).get("settings", {}).get("select")
            found["select"] = Selection(self.run.run, self.config.select, known).settings
        for name in self.config.captions:
            root = storage.join(self.run.run, "captions", name)
            made = read_made_with(root)
            if made is None or not storage.exists(storage.join(root, MANIFEST)):
                raise ConfigError(
                    f"latents.captions: there are no finished captions '{name}' in {root}; name them under "
                    "curate.captions and run 'carrara caption'"
                )
            parts = {k: made.get(k) for k in ("stage", "version", "settings", "weights")}
            found.setdefault("captions", {})[name] = digest_json(parts)[:32]
        return found

    def begin(self, redo: bool = False, each: Any = map) -> None:
        """Make the folder ready, or take one of an older version over; raises ConfigError where those latents are of
        other images than the run's."""
        made_with = self.made_with(redo)
        if is_old(self.root) and not redo:
            self._refuse_other_images()
            # What readers still understand goes on as it is; each shard says how its columns lie.
            made_with = dataclasses.replace(made_with, version=old_version(self.root, READABLE) or VERSION)
        Folder.begin(self.root, made_with, self.data, redo=redo, take_over=True)

    def _refuse_other_images(self) -> None:
        digests = old_digests(self.run.images)
        committed = listed(self.root, self.data).committed
        for index, stats in read_stats_of(self.root, (int(i) for i in committed)):
            if stats is not None and stats["fingerprint"]["input"] != digests.get(index):
                raise ConfigError(
                    f"{self.root}: shard {shard_name(index)} was made of other images than lie in {self.run.images} "
                    "now; give --redo to set this folder aside and make it anew, or set 'run' to another folder"
                )

    def tasks(self) -> Iterator[Task]:
        """One task an image shard. Its latents are done where they are committed for the shard as it was born: what is
        excluded or taken out later is left out by the reader."""
        images = self.images()
        self._refuse_void(images)
        for position, info in enumerate(images.shards):
            yield Task(info.index, info.born if images.format > 1 else None, position)

    def is_current(self) -> bool:
        """Whether the manifest was written for the image shards' present one."""
        manifest = storage.read_json(storage.join(self.root, MANIFEST))
        return isinstance(manifest, dict) and manifest.get("images") == self.images().fingerprint

    def _refuse_void(self, dataset: Dataset) -> None:
        """Raises ConfigError where the pictures have lost already what these settings are about."""
        how = image_settings(dataset)
        mode, size = how.get("resize_mode"), how.get("image_size")
        for field, asked in (("buckets", self.config.buckets is not None), ("crop", self.config.crop == "random")):
            if asked and mode in ("center_crop", "border"):
                raise ConfigError(
                    f"latents.{field}: the pictures in {dataset.root} are all square, since they were stored with "
                    f"ingest.resize_mode {mode}; ingest them with keep_ratio, or leave {field} out"
                )
        largest = max(self.config.resolutions)
        if mode != "no" and size is not None and largest > size and not self.config.enlarge:
            field = "resolution" if largest == self.config.resolution else "more_resolutions"
            raise ConfigError(
                f"latents.{field} is {largest}, but the pictures in {dataset.root} were stored with ingest.image_size "
                f"{size}: each would be enlarged; lower it, ingest larger pictures, or set latents.enlarge to true"
            )

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Load the encoders once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check the accounting, merge the statistics in shard order, write the manifest and return it."""
        vae, text, features = find_vae(self.vae_ref), text_facts(self.config, self.text_ref), self.features()
        refuse_other_settings(self)  # weights may have been exchanged during the run
        images, total = self.images(), None
        expected = {s.index: s for s in images.shards}
        status: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        buckets = self.config.bucket_list()
        laid: list[
            list[int]
        ] = []  # rows of each bucket in each shard's columns, whatever became of their samples since
        later: list[int] = []  # shards of which samples were excluded since
        without = 0

        def folded() -> Iterator[dict[str, Any]]:
            nonlocal total, without
            for s in stats:
                index = s["shard"]
                source = expected.pop(index, None)
                out = images.exclusions.rows(index)
                left_out = self._left_out(index, out) if len(out) and s.get("excluded") != _rows_digest(out) else None
                without += _check_accounting(self.root, s, source, left_out)
                if left_out is not None and len(left_out.latents):
                    later.append(index)
                status.update(s["status"])
                errors.update(s["errors"])
                if s["channels"]:
                    part = ChannelStats.from_json(s["channels"])
                    total = part if total is None else total.merge(part)
                laid.append(s.get("laid") or self._laid(index))
                yield s

        def exclusions() -> str | None:
            return write_exclusions(self.root, (self._excluded(images, index) for index in later))

        def extra() -> dict[str, Any]:
            if expected:
                raise StageError(f"{self.root}: {len(expected)} shards are missing, the first is {min(expected)}")
            if total is None:
                raise StageError(f"{self.root}: not one picture could be encoded; see 'error' in the shards' .parquet")
            if without:
                log.warning(
                    "%s: %d images that can be used have no latents: they were left out when the latents were "
                    "made; --redo makes them",
                    self.root,
                    without,
                )
            return {
                "images": images.fingerprint,
                "resolution": self.config.resolution,
                "buckets": [b.to_json() for b in buckets],
                "laid": laid,
                "settings": self.config.settings(),
                "vae": _vae_facts(vae),
                "text": text,
                **({} if features is None else {"features": features}),
                "channels": total.summary(),
                "status": {k: status[k] for k in STATUSES if status[k]},
                "errors": dict(sorted(errors.items())),
                "without_latents": without,
            }

        return write_manifest(self.root, "latents", folded(), extra, exclusions)

    def _laid(self, index: int) -> list[int]:
        """The rows of each bucket in the columns of a shard whose stats are too old to say so."""
        shapes = ColumnFile(storage.join(self.root, shard_name(index) + self.data)).columns
        count = len(self.config.bucket_list())
        return [shapes[column("mean", b, count)][1][0] for b in range(count)]

    def _left_out(self, index: int, out: np.ndarray) -> _LeftOut:
        """Of the rows that are excluded now: those that have a latent, and those that were to have one."""
        table = storage.read_parquet(storage.join(self.root, shard_name(index) + ".parquet"), ["status", "error"])
        status, error = (np.array(table[n].to_pylist(), object)[out] for n in ("status", "error"))
        unselected = int((error == NOT_SELECTED).sum())
        return _LeftOut(out[status == "success"], out[status == "failed_to_encode"], unselected)

    def _excluded(self, images: Dataset, index: int) -> pa.Table:
        table = images.exclusions.of(index)
        rows = table["row"].to_numpy()
        return table.filter(pa.array(np.isin(rows, self._left_out(index, rows.astype(np.int64)).latents)))

    def images(self) -> Dataset:
        """The image shards by their manifest as it is now, which is parsed once: 200,000 shards make it long."""
        stamp = storage.stamp(storage.join(self.run.images, MANIFEST))
        if self._opened is None or self._opened[0] != stamp:
            self._opened = (stamp, Dataset.open(self.run.images))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # workers open it themselves


class _Worker:
    """The encoders of one process, and the making of one shard with them. Safe to call from several threads."""

    def __init__(self, stage: LatentsStage) -> None:
        # Here and not above: whoever only asks what there is to do should not wait for torch.
        from latents.encoders import load_text_of, load_vae, pick_device

        self.config, self.root = stage.config, stage.root
        self.buckets = stage.config.bucket_list()
        self.device = pick_device(stage.config.device)
        self.dataset = stage.images()
        self.cropped = image_settings(self.dataset).get("resize_mode") == "center_crop"
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
            stats["excluded"] = _rows_digest(known)
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
        plan = self._plan(shard)
        samples: list[_Sample] = [_Sample() for _ in range(count)]
        # Two batches ahead: one that the encoder takes next and one that is being decoded.
        decoded = prefetch(self._loader(shard, plan), count, self.config.decode_threads, 2 * self.config.batch_size)
        first = list(itertools.islice(decoded, 1))  # decoding goes on from here, whoever has the encoders
        tokens, text_index = self._tokenise(shard.captions)
        with self._encoders, fixed_arithmetic(self.config.threads):
            busy = time.perf_counter()
            clock = _Clock()
            moments = self._encode_images(plan, clock.timed(itertools.chain(first, decoded)), samples)
            text = finite = None
            if self.config.text == "embeddings":
                text, finite = self._embed_captions(tokens, text_index)
            busy = time.perf_counter() - busy - clock.waited
        if finite is not None:
            for i in range(count):
                if samples[i].error is None and not finite[text_index[i]]:
                    samples[i].error = ("not_finite_text", "the caption's embedding is not finite in float16")
        kept = np.array([i for i in range(count) if samples[i].error is None], np.int64)
        each = {name: ids[kept] for name, ids in tokens.items()} | {"alive": np.ones(len(kept), np.uint8)}
        if text is not None:
            each["embedding_index"] = text_index[kept]
        columns = _caption_columns(shard) | self._new_captions(shard)
        texts = {name: [values[i] for i in kept] for name, values in columns.items()}
        micro = {"micro": self._micro(shard, plan, samples)[kept]}
        if self.config.flip and self.config.crop == "random":  # the middle lies in the middle of the mirrored image too
            micro["micro" + FLIPPED] = self._micro(shard, plan, samples, mirrored=True)[kept]
        arrays = self._lay_out(each, micro, texts, plan.bucket[kept])
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
            # Captions of pictures that were set aside leave no row behind.
            names = [column("embedding_index", b, len(self.buckets)) for b in range(len(self.buckets))]
            used, index = _by_first_use([arrays[name] for name in names])
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
        table = self._sidecar(shard, plan, samples, excluded)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        stats = describe(arrays, table, len(self.buckets))
        stats["encode_seconds"], stats["wait_seconds"] = round(busy, 3), round(clock.waited, 3)
        return {".safetensors": pack_columns(arrays, metadata), ".parquet": sink.getvalue()}, stats

    def _new_captions(self, shard: images.ImageShard) -> dict[str, list[list[str]]]:
        """Of each usable picture the texts of each set of new captions, by key. Raises StageError."""
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

    def _lay_out(
        self,
        each: dict[str, np.ndarray],
        micro: dict[str, np.ndarray],
        texts: dict[str, list[list[str]]],
        bucket: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The columns of the samples bucket by bucket, so that rows that are trained on together lie together.

        each: columns of one row a sample; micro: columns, int32 [N,R,6]; texts: of each sample, by column of the
        sidecar; bucket: int64 [N,R].
        """
        count = len(self.buckets)
        arrays: dict[str, np.ndarray] = {"bucket": bucket.astype(np.uint16)} if count > 1 else {}
        for b in range(count):
            rows = members(arrays, b, len(bucket))
            level = self.config.resolutions.index(self.buckets[b].resolution)
            for name, array in (each | {n: m[:, level] for n, m in micro.items()}).items():
                arrays[column(name, b, count)] = array[rows]
            for name, values in texts.items():
                lines = [json.dumps(values[i], ensure_ascii=False).encode("utf-8", "surrogatepass") for i in rows]
                ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
                arrays[column(f"text_end.{name}", b, count)] = ends
                arrays[column(f"text.{name}", b, count)] = np.frombuffer(b"".join(lines), np.uint8)
        return arrays

    # ---- pictures --------------------------------------------------------------------------------

    @property
    def _ends(self) -> tuple[str, ...]:
        """What ends the names of columns that are of images as they are, and mirrored."""
        return ("", FLIPPED) if self.config.flip else ("",)

    def _plan(self, shard: images.ImageShard) -> _Plan:
        """Buckets from the sizes in the sidecar, so that pictures can be decoded in the order of their batches."""
        count = len(shard)
        sizes = np.ones((count, 2), np.int64)
        if self.config.buckets is not None:
            sizes = _sizes(shard)
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
        return _Plan(sizes, bucket, index, order)

    def _encode_images(self, plan: _Plan, decoded: Iterator[_Sample], samples: list[_Sample]) -> dict[str, np.ndarray]:
        """All pictures of a shard: their fates, into `samples`, and the moments' columns.

        Rows of pictures that were set aside are zero here and are dropped by the caller.
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
        plan: _Plan,
        samples: list[_Sample],
        arrays: dict[str, np.ndarray],
    ) -> Callable[[], None]:
        """Begin with a batch of one shape; what is returned puts its moments into their columns."""
        # Filled up to a power of two: few shapes, for whatever is tuned or compiled by shape.
        size = min(1 << (len(batch) - 1).bit_length(), max(limit, len(batch)))
        pixels = np.stack([p for _, p in batch] + [batch[-1][1]] * (size - len(batch)))
        # A VAE's convolutions are not symmetric: the mirrored latent is not the latent of the mirrored picture.
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
        """One picture's moments from float32 arithmetic; None where even those are not finite in half precision."""
        mean, logstd = (x.numpy() for x in self.vae.encode_exact(image[None].copy()))
        half = to_half(mean)
        finite = finite_rows(half)[0] and (not self.vae.has_posterior or finite_rows(logstd)[0])
        return (half[0], quantise_logstd(logstd)[0]) if finite else None

    def _loader(self, shard: images.ImageShard, plan: _Plan) -> Callable[[int], _Sample]:
        order, targets = plan.order.tolist(), [[self.buckets[b] for b in row] for row in plan.bucket.tolist()]
        places = [crop_place(k) if self.config.crop == "random" else None for k in shard.keys]

        def load(k: int) -> _Sample:
            i = order[k]
            data = shard.image_bytes(i)  # a tar that cannot be read is the shard's fault, and is raised
            try:
                pixels = images.decode_rgb(data)
                cuts = [resize_crop_to(pixels, b.width, b.height, places[i]) for b in targets[i]]
            except Exception as e:  # decoders raise many things for broken data; it costs this picture alone
                return _Sample(error=("decode_error", " ".join(str(e).split())[:500]))
            return _Sample([p for p, _ in cuts], [f for _, f in cuts])

        return load

    def _micro(
        self, shard: images.ImageShard, plan: _Plan, samples: list[_Sample], mirrored: bool = False
    ) -> np.ndarray:
        """SDXL's micro-conditioning, int32 [N,R,6]: original height and width, crop top and left, target size.

        Top and left count from the whole picture, scaled: what ingest cropped is part of them. A border is no crop.
        mirrored: of the same crops in the mirrored images.
        """
        micro = np.zeros((len(samples), len(self.config.resolutions), 6), np.int32)
        originals, stored = _original_sizes(shard), _sizes(shard)
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

    # ---- text ------------------------------------------------------------------------------------

    def _tokenise(self, captions: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Captions and, as row N, the empty one: columns of N+1 rows of token ids, and which distinct row is each
        one's, int64 [N+1]. Captions of the same tokens share a row."""
        kind = id_type(self.text.vocabulary)
        found = self.text.tokens_of([*captions, ""])
        tokens = {n: ids.astype(np.uint16 if n == "text_length" else kind) for n, ids in found.items()}
        first: dict[bytes, int] = {}
        lines = (b"".join(row.tobytes() for row in rows) for rows in zip(*tokens.values(), strict=True))
        return tokens, np.array([first.setdefault(line, len(first)) for line in lines], np.int64)

    def _embed_captions(
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
            else {
                "embeddings": np.concatenate(rows),
                ENDS: np.cumsum(length),
            }
        )
        return arrays | ({"pooled": ends} if pooled else {}), finite

    # ---- sidecar ---------------------------------------------------------------------------------

    def _sidecar(
        self, shard: images.ImageShard, plan: _Plan, samples: list[_Sample], excluded: dict[int, str]
    ) -> pa.Table:
        """The image shard's rows, all of them, with what became of each here and how its picture was cut."""
        table = shard.table.drop_columns([c for c in _IMAGE_LOCATION if c in shard.table.column_names])
        number: list[int | None] = [None] * table.num_rows  # of each row among the columns' samples, for ever
        kept = [row for row, sample in zip(shard.rows.tolist(), samples, strict=True) if sample.error is None]
        for n, row in enumerate(kept):
            number[row] = n
        status, errors, messages = (_texts(table, c) for c in ("status", "error", "error_message"))
        suffixes = ["", *(f"_{r}" for r in self.config.more_resolutions)]
        fits: dict[str, list[int | None]] = {c + s: [None] * table.num_rows for s in suffixes for c in FIT_COLUMNS}
        for row, reason in excluded.items():
            known = reason in images.STATUSES
            status[row], errors[row] = reason if known else "filtered", None if known else reason
        for i, (row, sample) in enumerate(zip(shard.rows.tolist(), samples, strict=True)):
            if sample.error is not None:
                status[row], (errors[row], messages[row]) = "failed_to_encode", sample.error
            for r, fit in enumerate(sample.fits):
                bucket = self.buckets[plan.bucket[i, r]]
                facts = {"bucket_width": bucket.width, "bucket_height": bucket.height, **dataclasses.asdict(fit)}
                for c, value in facts.items():
                    fits[c + suffixes[r]][row] = value
        for name, values in (("status", status), ("error", errors), ("error_message", messages)):
            table = _with_column(table, name, pa.array(values, pa.string()))
        for name, numbers in fits.items():
            table = _with_column(table, name, pa.array(numbers, pa.int32()))
        table = _with_column(table, COLUMN_ROW, pa.array(number, pa.int32()))
        return table.replace_schema_metadata(None)


class _Clock:
    """How long whoever takes the items waited for them, in seconds."""

    def __init__(self) -> None:
        self.waited = 0.0

    def timed(self, items: Iterable[_Sample]) -> Iterator[_Sample]:
        items = iter(items)
        while True:
            began = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - began
            if item is None:
                return
            yield item


def describe(arrays: dict[str, np.ndarray], table: pa.Table, buckets: int = 1) -> dict[str, Any]:
    """The stats of a latent shard that follow from its columns and its sidecar."""
    rows = table.select(["status", "error"]).to_pylist()
    stats = {
        "rows": table.num_rows,
        "count": len(arrays["bucket"] if buckets > 1 else arrays["tokens"]),
        "status": dict(sorted(Counter(r["status"] for r in rows).items())),
        "errors": dict(sorted(Counter(r["error"] for r in rows if r["status"] == "failed_to_encode").items())),
        "captions": len(arrays[ENDS if ENDS in arrays else "embeddings"]) if "embeddings" in arrays else None,
        "channels": of_columns(arrays).to_json(),
    }
    stats["laid"] = [len(arrays[column("mean", b, buckets)]) for b in range(buckets)]
    return stats


def _sizes(shard: images.ImageShard) -> np.ndarray:
    """int64 [N,2]: width and height of the pictures in the tar, by the sidecar, else from their headers."""
    known = [_texts(shard.table, c) for c in ("width", "height")]
    sizes = [(known[0][row], known[1][row]) for row in shard.rows.tolist()]
    return np.array([s if all(s) else _header(shard, i) for i, s in enumerate(sizes)], np.int64).reshape(-1, 2)


def _header(shard: images.ImageShard, i: int) -> tuple[int, int]:
    try:
        return images.pixel_size(shard.image_bytes(i))
    except ValueError:
        return 1, 1  # it will not decode either, and is set aside then


def _original_sizes(shard: images.ImageShard) -> list[tuple[int, int]]:
    """Width and height of the pictures as they were fetched, else as they lie in the tar; 0 where nothing says."""
    table = shard.table
    columns = [_texts(table, c) for c in ("original_width", "original_height", "width", "height")]
    return [
        (columns[0][row] or columns[2][row] or 0, columns[1][row] or columns[3][row] or 0)
        for row in shard.rows.tolist()
    ]


def _by_first_use(parts: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct values of several arrays in the order in which they first come, and the arrays as places in it."""
    values, first, inverse = np.unique(np.concatenate(parts), return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    position = np.empty(len(order), np.int32)
    position[order] = np.arange(len(order))
    ends = np.cumsum([len(p) for p in parts])[:-1]
    return values[order], np.split(position[inverse.reshape(-1)], ends)


# What an image shard's sidecar says in words besides captions.
_NO_CAPTIONS = frozenset(
    (
        "url",
        "final_url",
        "key",
        "status",
        "error",
        "error_message",
        "exif",
        "sha256",
        "caption_raw",
        "pixel_hash",
        "phash",
        "image_ext",
        "image_file",
        "place",
        "md5",
    )
)


def _caption_columns(shard: images.ImageShard) -> dict[str, list[list[str]]]:
    """Of each usable picture the texts in `caption` and in every further column of texts, or lists of texts."""
    rows, found = pa.array(shard.rows), {}
    for field in shard.table.schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if field.name not in _NO_CAPTIONS and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            values = shard.table[field.name].take(rows).to_pylist()
            found[field.name] = [texts_in(v) for v in values]
    return found


def texts_in(value: Any) -> list[str]:
    """The texts in an entry of a column of captions: one, a list, or a list that ingest carried as JSON; no empty ones.

    Raises TypeError where it holds something else.
    """
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            if all(isinstance(v, str | None) for v in parsed):  # "[2]" may be a caption
                value = parsed
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(t, str | None) for t in texts):
        raise TypeError("neither text nor a list of texts")
    return [t for t in texts if t and t.strip()]


def image_settings(dataset: Dataset) -> dict[str, Any]:
    """The settings that a dataset's pictures were stored with; nothing where it does not say."""
    if not dataset.shards:
        return {}
    made = storage.read_json(storage.join(dataset.root, "made_with.json"))
    if made is None:
        made = (read_stats(dataset.root, dataset.shards[0].index) or {}).get("fingerprint")
    return dict((made or {}).get("settings") or {})


def _check_accounting(root: str, stats: dict[str, Any], source: Any, left_out: _LeftOut | None) -> int:
    """Rows in = rows out, each with one status; raises StageError naming the shard where that does not hold.

    Returns how many images of the shard that can be used now have no latent: they were left out when it was made.
    """
    shard = f"{root}: shard {stats['shard']}"
    if source is None:
        raise StageError(f"{shard} has no image shard; the images changed during the run, run the same command again")
    unknown = set(stats["status"]) - set(STATUSES)
    if unknown:
        raise StageError(f"{shard} has rows with the unknown status '{min(unknown)}'")
    if sum(stats["status"].values()) != stats["rows"] or stats["rows"] != source.rows:
        raise StageError(f"{shard} has {stats['rows']} rows where its image shard has {source.rows}; rows were lost")
    success, failed = stats["status"].get("success", 0), stats["status"].get("failed_to_encode", 0)
    done = success + failed + stats.get("not_selected", 0)
    if left_out is not None:
        done -= len(left_out.latents) + len(left_out.failed) + left_out.unselected
    changed = left_out is not None or "excluded" in stats  # what was left out once may be in use again
    if success != stats["count"] or done > source.count or (done < source.count and not changed):
        raise StageError(
            f"{shard} has {stats['count']} latents and {failed} set aside where there were {source.count} pictures"
        )
    return source.count - done


def id_type(vocabulary: int) -> np.dtype[Any]:
    """The type of a column of token ids below `vocabulary`."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def _vae_facts(vae: VaeWeights) -> dict[str, Any]:
    return {
        "ref": vae.ref,
        "digest": vae.digest,
        "kind": vae.kind,
        "scaling_factor": vae.scaling_factor,
        "config": vae.config,
    }


def _texts(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = table.column_names.index(name) if name in table.column_names else -1
    return table.set_column(at, name, values) if at >= 0 else table.append_column(name, values)


@contextlib.contextmanager
def fixed_arithmetic(threads: int) -> Iterator[None]:
    """Fix what a result's bits depend on besides the input (threads, cuDNN's choices), and put it back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
