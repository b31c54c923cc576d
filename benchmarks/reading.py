"""How long a training waits for its data: latents from files, and from an S3 server that takes 30 ms for each answer.

    python -m benchmarks.reading [--samples 20000] [--batch 256] [--step 0.25] [--delay 0.03]

A data set as of 256 px (moments 4x32x32, tokens) is walked as one rank of a training does that takes `--step` seconds
a step, and as fast as it can be read. The server answers what a reader asks, out of memory, in a process of its own;
it shares the machine's cores with the reader. Nothing is learned: the loop only takes batches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from shards.columns import pack_columns
from shards.dataset import Dataset, commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.layout import sample_key

SHARD = 2000


def make(root: Path, samples: int) -> None:
    """Latent shards of random content, as the latents stage lays them out."""
    rng, stats = np.random.default_rng(0), []
    counts = [min(SHARD, samples - i) for i in range(0, samples, SHARD)]
    for index, n in enumerate(counts):
        arrays: dict[str, np.ndarray] = {
            "mean": rng.normal(size=(n, 4, 32, 32)).astype(np.float16),
            "logstd": rng.integers(60, 120, (n, 4, 32, 32)).astype(np.uint8),
            "tokens": rng.integers(1, 1000, (n, 77)).astype(np.uint16),
            "alive": np.ones(n, np.uint8),
            "empty_tokens": np.zeros(77, np.uint16),
        }
        keys = pa.table({"key": [sample_key(index, r, SHARD) for r in range(n)], "status": ["success"] * n})
        pq.write_table(keys, root / "keys.parquet")
        files = {
            ".safetensors": pack_columns(arrays, {"logstd_min": "-15.0", "logstd_step": "0.098"}),
            ".parquet": (root / "keys.parquet").read_bytes(),
        }
        made = Fingerprint("latents", 3, {}, index)
        stats.append(commit_shard(str(root / "latents"), index, files, {"count": n, "rows": n}, made))
    facts = {
        "vae": {"ref": "none", "digest": "v", "scaling_factor": 1.0, "config": {}},
        "text": {"ref": "none", "digest": "t", "layer": "last", "context_length": 77, "width": 8},
    }
    write_manifest(str(root / "latents"), "latents", stats, {"resolution": 256, "laid": [[n] for n in counts], **facts})


def serve(root: str, delay: float, out: Connection) -> None:
    """A process with as much of S3 as a reader needs (GET, whole or a range, and HEAD), of the files of a folder.

    moto takes tens of milliseconds of a core for a range of a large object, which would be measured here.
    """
    files = {f"/bucket/{f.parent.name}/{f.name}": f.read_bytes() for f in Path(root).rglob("*") if f.is_file()}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = line.split(" ")
                asked = dict(x.lower().split(": ", 1) for x in rest if x).get("range")
                await asyncio.sleep(delay)
                data, status = files.get(path.partition("?")[0]), "200 OK"
                head = 'ETag: "x"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
                if data is None:
                    data, status = b"", "404 Not Found"
                elif asked:
                    first, last = (int(x) for x in asked.removeprefix("bytes=").split("-"))
                    head += f"Content-Range: bytes {first}-{min(last, len(data) - 1)}/{len(data)}\r\n"
                    data, status = data[first : last + 1], "206 Partial Content"
                writer.write(f"HTTP/1.1 {status}\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode())
                if method == "GET":
                    writer.write(data)
                await writer.drain()
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        out.send(server.sockets[0].getsockname()[1])
        while os.getppid() != 1:
            await asyncio.sleep(0.5)

    asyncio.run(listen())


@contextmanager
def on_s3(root: Path, delay: float) -> Iterator[str]:
    """The data set in a bucket."""
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=serve, args=(str(root), delay, theirs), daemon=True)
    process.start()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    os.environ.update(dict.fromkeys(names, "none"), AWS_ENDPOINT_URL=f"http://127.0.0.1:{ours.recv()}")
    try:
        yield "s3://bucket/latents"
    finally:
        process.terminate()


def walk(url: str, batch: int, step: float, steps: int) -> dict[str, Any]:
    """Take `steps` batches, each `step` seconds after the one before; what was waited is of all but the first."""
    from train.config import TrainConfig
    from train.data import Prefetcher, micro_batches
    from train.latent_samples import Latents
    from train.ranks import Ranks

    config = TrainConfig(images=batch * (steps + 1), batch_size=batch)
    latents = Latents(config, [Dataset.open(url)], 0)

    class Loop:
        """What of an objective reads."""

        placement = latents.placement

        def positions(self, images: int, rank: int, world: int, micro_step: int, micro: int) -> np.ndarray:
            return images + np.arange(batch, dtype=np.int64)

        def expect(self, positions: np.ndarray) -> None:
            latents.expect(positions)

        def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
            mean, _ = latents.moments(positions)
            return {"mean": torch.from_numpy(mean), "tokens": torch.from_numpy(latents.tokens(positions))}

    ranks = Ranks(0, 1, torch.device("cpu"), False)
    began = time.perf_counter()
    with Prefetcher(micro_batches(Loop(), config, ranks, 0), config.prefetch) as prefetcher:
        next(prefetcher)
        first, prefetcher.waited = time.perf_counter() - began, 0.0
        time.sleep(step)  # the first batch's, while the second is made
        began = time.perf_counter()
        for _ in range(steps):
            next(prefetcher)
            time.sleep(step)
    seconds = time.perf_counter() - began
    latents.close()
    return {
        "first_s": round(first, 3),
        "samples_per_s": round(batch * steps / seconds),
        "waited": round(prefetcher.waited / seconds, 4),
        "streams": latents.placement.streams,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--step", type=float, default=0.25, help="seconds")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds of each answer of the server")
    given = parser.parse_args()
    steps = given.samples // given.batch - 1
    with tempfile.TemporaryDirectory(prefix="carrara-reading-") as folder:
        root = Path(folder)
        make(root, given.samples)
        found = {
            "files": walk(str(root / "latents"), given.batch, given.step, steps),
            "files, no step": walk(str(root / "latents"), given.batch, 0.0, steps),
        }
        with on_s3(root, given.delay) as url:
            found["s3"] = walk(url, given.batch, given.step, steps)
            found["s3, no step"] = walk(url, given.batch, 0.0, steps)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
