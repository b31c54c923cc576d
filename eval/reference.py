"""The reference stage: held-out real pictures, seen once by the networks that judge generated ones.

For every held-out picture: CLIP features of the picture and of its caption, the VAE's reconstruction and its PSNR,
and the verdict of the corpus's judge. The shards are kept under <run>/eval/reference/<id>, where the id names the
networks and the resolution, so every checkpoint and every sampler is held against the same features, computed once.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from eval import clipscore, encoders, faithfulness
from eval.accounts import accounted
from eval.config import EvalConfig
from latents.pictures import resize_crop
from latents.weights import find_clip, find_vae
from shards import images, storage
from shards.columns import pack_columns
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint, digest_json
from shards.layout import RunPaths
from shards.stage import Task, open_folder

VERSION = 1
SHEET = 16  # reconstructions kept of each shard, for the report
RESIZE = "shorter side by antialiased Lanczos, centre crop; features by the CLIP's own preprocessing"


class ReferenceStage:
    """Stage over the held-out image shards. Small and picklable: settings and paths."""

    name = "reference"
    unit = "images"
    data = ".safetensors"

    def __init__(self, config: EvalConfig, run: RunPaths, vae_ref: str, text_ref: str, resolution: int) -> None:
        self.config, self.run, self.resolution = config, run, resolution
        self.vae_ref, self.features_ref = vae_ref, config.features or text_ref
        self.weights = {"vae": find_vae(vae_ref).digest, "features": find_clip(self.features_ref).digest}
        self.heldout = Dataset.open(run.heldout).fingerprint  # other pictures, another folder
        self.root = storage.join(
            run.eval, "reference", digest_json([self._settings(), self.weights, self.heldout])[:10]
        )

    def made_with(self) -> Fingerprint:
        """Settings, weights, and which pictures are measured."""
        return Fingerprint(self.name, VERSION, self._settings(), self.heldout, self.weights)

    def tasks(self) -> Iterator[Task]:
        """One task a held-out shard."""
        for position, info in enumerate(Dataset.open(self.run.heldout).shards):
            yield Task(info.index, info.born, position)

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Load the networks once; the result makes one shard a call."""
        return _Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check that every live held-out sample is accounted for and write the manifest."""
        heldout = Dataset.open(self.run.heldout)
        expected = {s.index: s.count for s in heldout.shards}
        kept, status = accounted(self.root, expected, stats)
        extra = {
            "resolution": self.resolution,
            "weights": self.weights,
            "heldout": heldout.fingerprint,
            "status": dict(sorted(status.items())),
        }
        return write_manifest(self.root, "reference", kept, extra)

    def _settings(self) -> dict[str, Any]:
        c = self.config
        return {
            "resolution": self.resolution,
            "faithfulness": c.faithfulness,
            "precision": c.precision,
            "batch_size": c.batch_size,
            "threads": c.threads,
        }


class _Worker:
    """The networks of one process, and the making of one shard with them."""

    def __init__(self, stage: ReferenceStage) -> None:
        from latents.encoders import load_text, load_vae, pick_device
        from latents.stage import fixed_arithmetic

        self.stage, self.config, self.fixed = stage, stage.config, fixed_arithmetic
        self.folder = open_folder(stage)
        device = pick_device(self.config.device)
        self.judge = faithfulness.load(self.config.faithfulness)
        with fixed_arithmetic(self.config.threads):
            self.vae = load_vae(stage.vae_ref, device, self.config.precision)
            self.clip = load_text(stage.features_ref, "last", device, self.config.precision)

    def __call__(self, task: Task) -> dict[str, Any]:
        same_weights("the VAE", self.vae.digest, self.stage.weights["vae"], self.vae.ref)
        same_weights("the CLIP", self.clip.digest, self.stage.weights["features"], self.clip.ref)
        if (found := self.folder.adopt(task.index)) is not None:
            return found
        heldout = Dataset.open(self.stage.run.heldout)
        started = time.perf_counter()
        shard = images.ImageShard(heldout, task.payload)
        with self.fixed(self.config.threads):
            files, stats = self._make(shard)
        shard.close()
        stats["seconds"] = round(time.perf_counter() - started, 3)
        return self.folder.commit(task.index, files, stats, task.input)

    def _make(self, shard: images.ImageShard) -> tuple[dict[str, bytes], dict[str, Any]]:
        keys, captions, size = shard.keys, shard.captions, self.config.batch_size
        table: dict[str, list[Any]] = {"key": keys, "caption": captions, "row": shard.rows.tolist()}
        status: list[str] = []
        errors: list[str | None] = []
        kept: list[int] = []
        verdicts: list[faithfulness.Verdict | None] = []
        psnrs: list[float | None] = []
        reconstructions: list[tuple[str, bytes]] = []
        features: list[np.ndarray] = []
        for start in range(0, len(keys), size):
            batch, fine = [], []
            for i in range(start, min(start + size, len(keys))):
                try:
                    batch.append(resize_crop(images.decode_rgb(shard.image_bytes(i)), self.stage.resolution)[0])
                    fine.append(i)
                    status.append("success")
                    errors.append(None)
                except ValueError as e:
                    status.append("failed_to_decode")
                    errors.append(" ".join(str(e).split())[:500])
                verdicts.append(
                    self.judge.judge(batch[-1], captions[i]) if self.judge and status[-1] == "success" else None
                )
                psnrs.append(None)
            if not batch:
                continue
            pixels = np.stack(batch)
            decoded = self.vae.decode(self.vae.encode(pixels)[0])
            for i, value, picture in zip(fine, encoders.psnr(pixels, decoded), decoded, strict=True):
                psnrs[i] = float(value)
                if len(reconstructions) < SHEET:
                    reconstructions.append((keys[i], png(picture)))
            features.append(self.clip.encode_images(pixels, size).numpy())
            kept += fine
        width = features[0].shape[1] if features else 0
        pictures = np.concatenate(features) if features else np.zeros((0, width), np.float32)
        texts = self.clip.encode_captions([captions[i] for i in kept], size).numpy() if kept else pictures
        cosine: list[float | None] = [None] * len(keys)
        for i, value in zip(kept, clipscore.cosines(pictures, texts) if kept else (), strict=True):
            cosine[i] = float(value)
        table |= {"status": status, "error": errors, "psnr": psnrs, "clip_cosine": cosine}
        if self.judge:
            table |= faithfulness.columns(self.judge, verdicts, "shows")
        tar, places = images.pack_tar([(key, {"png": data}) for key, data in reconstructions])
        where = {key: place["png"] for (key, _), place in zip(reconstructions, places, strict=True)}
        table["image_offset"] = [where[k][0] if k in where else None for k in keys]
        table["image_size"] = [where[k][1] if k in where else None for k in keys]
        columns = pack_columns({"images": pictures, "captions": texts}, {"features": self.clip.digest})
        files = {".tar": tar, ".safetensors": columns, ".parquet": parquet(table, _types(table))}
        stats = {"rows": len(keys), "count": len(kept), "status": dict(sorted(Counter(status).items()))}
        return files, stats


def same_weights(what: str, found: str, expected: str, ref: str) -> None:
    """StageError where weights are not those that the latents were made with; encoders.require_digest, without
    loading what the encoders need."""
    if found != expected:
        from latents.encoders import require_digest

        require_digest(what, found, expected, ref)


def _types(table: dict[str, list[Any]]) -> dict[str, pa.DataType]:
    fixed = {
        "row": pa.int64(),
        "psnr": pa.float64(),
        "clip_cosine": pa.float64(),
        "image_offset": pa.int64(),
        "image_size": pa.int64(),
    }
    return {n: fixed.get(n, pa.bool_() if n.startswith("shows_") else pa.string()) for n in table}


def png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()


def parquet(table: dict[str, list[Any]], types: dict[str, pa.DataType]) -> bytes:
    """Columns as a parquet file with exactly these types, so that a column of nulls has its type too."""
    sink = io.BytesIO()
    pq.write_table(pa.table({n: pa.array(v, types[n]) for n, v in table.items()}), sink, compression="zstd")
    return sink.getvalue()
