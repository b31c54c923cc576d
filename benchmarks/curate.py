"""Semantic duplicates among a million vectors: how long, in how much memory, and how many planted ones are found.

    python -m benchmarks.curate                    a million vectors of 512 values, about ten minutes on one core
    python -m benchmarks.curate --images 100000

The vectors lie around directions of a few sizes, as embeddings of images do; one in ten is a near copy of an earlier
one, at a cosine of about 0.97. The stage is the real one, on image shards without images. `peak_gb` is the process'
resident memory at its highest; `recall` the share of planted pairs of which a rule `nearest` <= 0.95 takes one,
`false` what it takes of the images that are in no pair.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import CurateConfig
from curate.stage import ScoreStage, pack, score_root, score_stages
from shards.commit import Folder
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard
from shards.layout import RunPaths, sample_key
from shards.stage import begin

A_SHARD = 10_000
COSINE = 0.97  # of a planted copy and what it is a copy of


def write_run(run: RunPaths, images: int, width: int) -> np.ndarray:
    """Image shards without images, and a finished score of their embeddings; returns the planted pairs, int64 [N,2]."""
    folder = Folder.begin(run.images, Fingerprint("ingest", 1, {}), take_over=True)
    scores = Folder.begin(score_root(run, "clip"), Fingerprint("score", 1, {}), ".safetensors", take_over=True)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(8, images // 2000), width)).astype(np.float32)
    common = rng.standard_normal(width).astype(np.float32)  # embeddings of images lie in a cone
    planted = []
    made, committed = [], []
    for index in range(-(-images // A_SHARD)):
        rows = min(A_SHARD, images - index * A_SHARD)
        own = centres[rng.integers(0, len(centres), rows)] + common + 1.2 * rng.standard_normal((rows, width))
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        copies = rng.random(rows) < 0.1
        copies[0] = False
        to, source = np.flatnonzero(copies), rng.choice(np.flatnonzero(~copies), int(copies.sum()))
        noise = rng.standard_normal((int(copies.sum()), width))
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        spread = np.sqrt(1 / COSINE**2 - 1)
        own[to] = own[source] + spread * noise
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        planted.append(index * A_SHARD + np.stack([to, source], axis=1))
        sink = io.BytesIO()
        keys = [sample_key(index, row, A_SHARD) for row in range(rows)]
        columns = {"key": keys, "status": ["success"] * rows, "image_offset": [0] * rows, "image_size": [0] * rows}
        pq.write_table(pa.table(columns), sink)
        files = {".tar": bytes(10240), ".parquet": sink.getvalue()}
        made.append(folder.commit(index, files, {"rows": rows, "count": rows}))
        write_manifest(run.images, "images", made)
        shard = ImageShard(Dataset.open(run.images), index)
        files, stats = pack(shard, {}, {"image": own.astype(np.float16)})
        committed.append(scores.commit(index, files, stats))
    write_manifest(score_root(run, "clip"), "scores", committed, {"scored_with": "", "columns": {}})
    return np.concatenate(planted)


def duplicates(images: int, width: int, memory_gb: float) -> dict[str, Any]:
    """Find the duplicates of one run, and hold them against what was planted."""
    scores = {"clip": {"kind": "clip", "model": "none"}, "alike": {"kind": "duplicates", "memory_gb": memory_gb}}
    with tempfile.TemporaryDirectory() as folder:
        run = RunPaths(folder)
        planted = write_run(run, images, width)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stage: ScoreStage = score_stages(CurateConfig.model_validate({"scores": scores}), run, "none")[-1]
        started = time.perf_counter()
        begin(stage)
        searched = time.perf_counter() - started
        work = stage.worker()
        stage.finish([work(task) for task in stage.tasks()])
        whole = time.perf_counter() - started
        found = [Dataset.open(stage.root).sidecar(i)["nearest"] for i in range(-(-images // A_SHARD))]
        nearest = np.concatenate([c.to_numpy() for c in found])
    alike = nearest > 0.95
    paired = np.zeros(len(nearest), bool)
    paired[planted] = True
    return {
        "images": images,
        "pairs": len(planted),
        "recall": round(float(alike[planted].any(axis=1).mean()), 4),
        "false": int(alike[~paired].sum()),
        "search_s": round(searched, 1),
        "write_s": round(whole - searched, 1),
        "images_per_s": round(images / whole),
        "before_gb": round(before * 1024 / 1e9, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--memory-gb", type=float, default=2.0)
    given = parser.parse_args()
    print(json.dumps(duplicates(given.images, given.width, given.memory_gb)))


if __name__ == "__main__":
    main()
