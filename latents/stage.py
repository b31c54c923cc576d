"""The latents stage: one image shard in, one latent shard out, each sample accounted for.

    stage = LatentsStage(config, RunPaths(run), vae_ref, text_ref, seed=0)
    work = stage.worker()
    stage.finish(work(task) for task in stage.tasks())

A latent shard is a pure function of its image shard, the settings and the weights. So that a shard has
the same bytes on any worker, batches have a fixed size and are formed within the shard in row order (the
last one is filled up), and the number of threads is a setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latents.config import LatentsConfig
from latents.moments import (
    LOGSTD_MIN,
    LOGSTD_STEP,
    ChannelStats,
    dequantise_logstd,
    finite_rows,
    quantise_logstd,
    to_half,
)
from latents.pictures import Fit, ahead, resize_crop
from latents.weights import ClipWeights, VaeWeights, find_clip, find_vae
from shards import images
from shards.columns import pack_columns
from shards.dataset import Dataset, commit_shard, read_exclusions, write_manifest
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.stage import Task

if TYPE_CHECKING:
    from latents.encoders import TextEncoder, Vae

VERSION = 1  # raise it when the bytes of a shard change for the same settings

# An image shard's words for what became of a row, and ours for a picture that was there but has no latent.
STATUSES = (*images.STATUSES, "failed_to_encode")
ERRORS = ("decode_error", "not_finite_latent", "not_finite_text")

FIT_COLUMNS = ("scaled_width", "scaled_height", "crop_left", "crop_top")
_IMAGE_PLACE = ("image_offset", "image_size", "image_ext")  # of the tar; they mean nothing beside a latent


@dataclasses.dataclass
class _Sample:
    """One picture on its way: pixels uint8 [R,R,3] and how they were cut, or why there are none."""

    pixels: np.ndarray | None = None
    fit: Fit | None = None
    error: tuple[str, str] | None = None


class LatentsStage:
    """Stage over the run's image shards. Small and picklable: settings and paths."""

    name = "latents"
    unit = "images"

    def __init__(self, config: LatentsConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int = 0) -> None:
        self.config, self.run = config, run
        self.vae_ref, self.text_ref = vae_ref, text_ref
        # Nothing here is random: posterior draws happen in the trainer. The seed is taken so that all
        # stages are built alike, and kept out of the fingerprint.
        self.seed = seed
        self.root = run.latents

    def tasks(self) -> Iterator[Task]:
        """One task an image shard; raises ConfigError where weights are missing or do not fit the resolution."""
        dataset = self._images()
        vae, text = find_vae(self.vae_ref), find_clip(self.text_ref)
        if self.config.resolution % vae.downscale:
            raise ConfigError(
                f"latents.resolution is {self.config.resolution}, which this VAE cannot encode: "
                f"make it a multiple of {vae.downscale}"
            )
        weights = {"vae": vae.digest, "text": text.digest}
        for position, info in enumerate(dataset.shards):
            fingerprint = Fingerprint(self.name, VERSION, self.config.settings(), info.digest, weights)
            yield Task(info.index, fingerprint, {"position": position})

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Load the encoders once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check the accounting, merge the statistics in shard order, write the manifest and return it."""
        vae, text = find_vae(self.vae_ref), find_clip(self.text_ref)
        expected = {s.index: s for s in self._images().shards}
        total: ChannelStats | None = None
        status: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        kept = []
        for s in stats:
            _check_accounting(self.root, s, expected.pop(s["shard"], None))
            status.update(s["status"])
            errors.update(s["errors"])
            if s["channels"]:
                part = ChannelStats.from_json(s["channels"])
                total = part if total is None else total.merge(part)
            # Only what the manifest needs, so that a table of 200,000 shards stays small in memory.
            kept.append({k: s[k] for k in ("shard", "rows", "count", "files")})
        if expected:
            raise StageError(f"{self.root}: {len(expected)} shards are missing, the first is {min(expected)}")
        if total is None:
            raise StageError(f"{self.root}: not one picture could be encoded; see 'error' in the shards' .parquet")
        extra = {
            "resolution": self.config.resolution,
            "settings": self.config.settings(),
            "vae": _vae_facts(vae),
            "text": _text_facts(text, self.config.text_layer),
            "channels": total.summary(),
            "status": {k: status[k] for k in STATUSES if status[k]},
            "errors": dict(sorted(errors.items())),
        }
        return write_manifest(self.root, "latents", kept, extra)

    def _images(self) -> Dataset:
        return Dataset.open(self.run.images)


class _Worker:
    """The encoders of one process, and the making of one shard with them."""

    def __init__(self, stage: LatentsStage) -> None:
        # Here and not above: whoever only asks what there is to do should not wait for torch.
        from latents.encoders import load_text, load_vae, pick_device

        self.config, self.root = stage.config, stage.root
        self.device = pick_device(stage.config.device)
        self.dataset = stage._images()
        self.excluded = _excluded_reasons(self.dataset.root)
        with fixed_arithmetic(self.config.threads):
            self.vae: Vae = load_vae(stage.vae_ref, self.device, self.config.precision)
            self.text: TextEncoder = load_text(
                stage.text_ref, self.config.text_layer, self.device, self.config.precision
            )

    def __call__(self, task: Task) -> dict[str, Any]:
        """Encode and commit one shard; returns its committed stats."""
        from latents.encoders import require_digest

        weights = task.fingerprint.weights or {}
        require_digest("the VAE", self.vae.digest, weights["vae"], self.vae.ref)
        require_digest("the CLIP", self.text.digest, weights["text"], self.text.ref)
        shard = self._open(task)
        started = time.perf_counter()
        with fixed_arithmetic(self.config.threads):
            files, stats = self._make(shard)
        shard.close()
        seconds = time.perf_counter() - started
        stats["seconds"] = round(seconds, 3)
        stats["images_per_second"] = round(stats["count"] / seconds, 3)
        return commit_shard(self.root, task.index, files, stats, task.fingerprint)

    def _open(self, task: Task) -> images.ImageShard:
        position = task.payload["position"]
        info = self.dataset.shards[position] if position < len(self.dataset.shards) else None
        if info is None or info.digest != task.fingerprint.input:
            # The images were finished again since this worker started.
            self.dataset = Dataset.open(self.dataset.root)
            self.excluded = _excluded_reasons(self.dataset.root)
            if self.dataset.shards[position].digest != task.fingerprint.input:
                raise StageError(f"{self.dataset.root}: the images changed during the run; run the same command again")
        return images.ImageShard(self.dataset, position)

    def _make(self, shard: images.ImageShard) -> tuple[dict[str, bytes], dict[str, Any]]:
        count = len(shard)
        samples, mean, logstd = self._encode_pictures(shard)
        tokens, text_index, embeddings = self._encode_text(shard.captions)
        if embeddings is not None:
            fine = finite_rows(embeddings)
            for i in range(count):
                if samples[i].error is None and not fine[text_index[i]]:
                    samples[i].error = ("not_finite_text", "the caption's embedding is not finite in float16")
        kept = np.array([i for i in range(count) if samples[i].error is None], np.int64)
        arrays: dict[str, np.ndarray] = {"mean": mean[kept], "tokens": tokens[kept], "empty_tokens": tokens[-1]}
        metadata = {"vae": self.vae.digest, "text": self.text.digest, "text_layer": self.text.layer}
        stored_logstd = None
        if self.config.moments:
            arrays["logstd"] = logstd[kept]
            stored_logstd = dequantise_logstd(arrays["logstd"])
            metadata |= {"logstd_min": repr(LOGSTD_MIN), "logstd_step": repr(LOGSTD_STEP)}
        if embeddings is not None:
            # Captions of pictures that were set aside leave no row behind.
            used, index = np.unique(text_index[kept], return_inverse=True)
            arrays |= {"embeddings": embeddings[used], "embedding_index": index.astype(np.int32).reshape(-1)}
            arrays["empty_embedding"] = embeddings[text_index[-1]]
        table = self._sidecar(shard, samples)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        channels = ChannelStats.of(arrays["mean"], stored_logstd)
        stats = {
            "rows": table.num_rows,
            "count": len(kept),
            "status": dict(sorted(Counter(table["status"].to_pylist()).items())),
            "errors": dict(sorted(Counter(s.error[0] for s in samples if s.error).items())),
            "captions": len(arrays["embeddings"]) if embeddings is not None else None,
            "channels": channels.to_json(),
        }
        return {".safetensors": pack_columns(arrays, metadata), ".parquet": sink.getvalue()}, stats

    # ---- pictures --------------------------------------------------------------------------------

    def _encode_pictures(self, shard: images.ImageShard) -> tuple[list[_Sample], np.ndarray, np.ndarray]:
        """All pictures of a shard: their fates, mean float16 [N,C,h,w] and log-std codes uint8 [N,C,h,w].

        Rows of pictures that were set aside are zero here and are dropped by the caller.
        """
        count, size = len(shard), self.config.batch_size
        side = self.config.resolution // self.vae.downscale
        mean = np.zeros((count, self.vae.channels, side, side), np.float16)
        codes = np.zeros(mean.shape, np.uint8)
        samples: list[_Sample] = []
        batch: list[int] = []
        pixels = np.zeros((size, self.config.resolution, self.config.resolution, 3), np.uint8)
        # Two batches ahead: one that the encoder takes next and one that is being decoded.
        for i, sample in enumerate(ahead(self._loader(shard), count, self.config.decode_threads, 2 * size)):
            samples.append(sample)
            if sample.pixels is not None:
                pixels[len(batch)] = sample.pixels
                sample.pixels = None
                batch.append(i)
            if len(batch) == size:
                self._encode_batch(pixels, batch, samples, mean, codes)
                batch = []
        if batch:
            pixels[len(batch) :] = pixels[len(batch) - 1]
            self._encode_batch(pixels, batch, samples, mean, codes)
        return samples, mean, codes

    def _encode_batch(
        self, pixels: np.ndarray, batch: list[int], samples: list[_Sample], mean: np.ndarray, codes: np.ndarray
    ) -> None:
        found_mean, found_logstd = (x.numpy()[: len(batch)] for x in self.vae.encode(pixels))
        half, logstd = to_half(found_mean), found_logstd.copy()
        fine = finite_rows(half) & finite_rows(logstd)
        for j in np.flatnonzero(~fine):
            exact_mean, exact_logstd = (x.numpy() for x in self.vae.encode_exact(pixels[j : j + 1]))
            half[j], logstd[j] = to_half(exact_mean)[0], exact_logstd[0]
            if not (finite_rows(half[j : j + 1])[0] and finite_rows(logstd[j : j + 1])[0]):
                samples[batch[j]].error = ("not_finite_latent", "the latent is not finite in float16")
                half[j], logstd[j] = 0, 0
        mean[batch] = half
        codes[batch] = quantise_logstd(logstd)

    def _loader(self, shard: images.ImageShard) -> Callable[[int], _Sample]:
        side = self.config.resolution

        def load(i: int) -> _Sample:
            data = shard.image_bytes(i)  # a tar that cannot be read is the shard's fault, and is raised
            try:
                pixels, fit = resize_crop(images.decode_rgb(data), side)
            except Exception as e:  # decoders raise many things for broken data; it costs this picture alone
                return _Sample(error=("decode_error", " ".join(str(e).split())[:500]))
            return _Sample(pixels, fit)

        return load

    # ---- text ------------------------------------------------------------------------------------

    def _encode_text(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Captions and, as row N, the empty one: tokens uint16 [N+1,ctx], which row of the embeddings is each
        one's, int64 [N+1], and the embeddings float16 [U,ctx,D] or None. Captions of the same tokens share a row."""
        ids = self.text.tokenize([*captions, ""]).numpy()
        if ids.max(initial=0) > np.iinfo(np.uint16).max:
            raise StageError(f"the CLIP '{self.text.ref}' has token ids beyond 65535, which the shards cannot hold")
        tokens = ids.astype(np.uint16)
        first: dict[bytes, int] = {}
        index = np.array([first.setdefault(row.tobytes(), len(first)) for row in tokens], np.int64)
        if self.config.text == "tokens":
            return tokens, index, None
        rows = self._embed(tokens[np.unique(index, return_index=True)[1]])
        if not np.isfinite(rows[index[-1]]).all():
            raise StageError(f"the CLIP '{self.text.ref}': the empty caption's embedding is not finite in float16")
        return tokens, index, rows

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        """Token rows uint16 [U,ctx] -> float16 [U,ctx,D], by batches of a fixed size."""
        size = self.config.batch_size
        rows = np.zeros((len(tokens), self.text.context_length, self.text.width), np.float16)
        for i in range(0, len(tokens), size):
            part = tokens[i : i + size]
            full = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            rows[i : i + size] = to_half(self.text.encode(full).numpy()[: len(part)])
        for j in np.flatnonzero(~finite_rows(rows)):
            rows[j] = to_half(self.text.encode_exact(tokens[j : j + 1]).numpy())[0]
        return rows

    # ---- sidecar ---------------------------------------------------------------------------------

    def _sidecar(self, shard: images.ImageShard, samples: list[_Sample]) -> pa.Table:
        """The image shard's rows, all of them, with what became of each here and how its picture was cut."""
        table = shard.table.drop_columns([c for c in _IMAGE_PLACE if c in shard.table.column_names])
        status, errors, messages = (_texts(table, c) for c in ("status", "error", "error_message"))
        fits: dict[str, list[int | None]] = {c: [None] * table.num_rows for c in FIT_COLUMNS}
        for row, reason in self.excluded.get(shard.info.index, {}).items():
            known = reason in images.STATUSES
            status[row], errors[row] = reason if known else "filtered", None if known else reason
        for row, sample in zip(shard.rows.tolist(), samples, strict=True):
            if sample.error is not None:
                status[row], (errors[row], messages[row]) = "failed_to_encode", sample.error
            if sample.fit is not None:
                for c in FIT_COLUMNS:
                    fits[c][row] = getattr(sample.fit, c)
        for name, values in (("status", status), ("error", errors), ("error_message", messages)):
            table = _with_column(table, name, pa.array(values, pa.string()))
        for name, numbers in fits.items():
            table = _with_column(table, name, pa.array(numbers, pa.int32()))
        return table.replace_schema_metadata(None)


def _check_accounting(root: str, stats: dict[str, Any], source: Any) -> None:
    """Rows in = rows out, each with one status; raises StageError naming the shard where that does not hold."""
    shard = f"{root}: shard {stats['shard']}"
    if source is None:
        raise StageError(f"{shard} has no image shard; the images changed during the run, run the same command again")
    unknown = set(stats["status"]) - set(STATUSES)
    if unknown:
        raise StageError(f"{shard} has rows with the unknown status '{min(unknown)}'")
    if sum(stats["status"].values()) != stats["rows"] or stats["rows"] != source.rows:
        raise StageError(f"{shard} has {stats['rows']} rows where its image shard has {source.rows}; rows were lost")
    success, failed = stats["status"].get("success", 0), stats["status"].get("failed_to_encode", 0)
    if success != stats["count"] or success + failed != source.count:
        raise StageError(
            f"{shard} has {stats['count']} latents and {failed} set aside where there were {source.count} pictures"
        )


def _vae_facts(vae: VaeWeights) -> dict[str, Any]:
    return {"ref": vae.ref, "digest": vae.digest, "scaling_factor": vae.scaling_factor, "config": vae.config}


def _text_facts(text: ClipWeights, layer: str) -> dict[str, Any]:
    return {
        "ref": text.ref,
        "digest": text.digest,
        "layer": layer,
        "context_length": text.context_length,
        "width": text.width,
    }


def _excluded_reasons(root: str) -> dict[int, dict[int, str]]:
    """Why a sample is not to be used, by shard number and row."""
    reasons: dict[int, dict[int, str]] = {}
    for line in read_exclusions(root).to_pylist():
        reasons.setdefault(line["shard"], {})[line["row"]] = line["reason"]
    return reasons


def _texts(table: pa.Table, name: str) -> list[str | None]:
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.column_names.index(name) if name in table.column_names else -1
    return table.set_column(place, name, values) if place >= 0 else table.append_column(name, values)


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
