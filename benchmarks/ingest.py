"""Ingest beside img2dataset: the same local server, images and cores, in turn.

    python -m benchmarks.ingest                 everything, about ten minutes
    python -m benchmarks.ingest --only http     one of http, https, large, bare, memory
    python -m benchmarks.ingest --images 400 --rounds 2

Two clients fetch, resize and pack the same URLs from a server on another core: `ours`, the worker of the
ingest stage, and `img2dataset`, its own Downloader with the resizer and writer that its download() builds,
64 threads. Each is a process that imports and warms up first; what is counted is the CPU time of that process
from the first request to the finished shard, on one core. The two take turns, and the best round of each
counts. `bare` is a loop over decode, resize and encode as ours does them, without anything around.
`memory` walks through tables of ten thousand and ten million rows and plans their shards.
The images are drawn, with a photograph's spectrum (amplitude 1/f) and grain, at about the size of COCO's.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import certifi
import numpy as np
import psutil
from PIL import Image

DISTINCT = 40
SIZES = {"http": (640, 480), "https": (640, 480), "large": (1920, 1440), "bare": (640, 480)}


def draw(seed: int, width: int, height: int) -> bytes:
    """A JPEG of noise with a photograph's 1/f spectrum, some edges and a little grain.

    Quality 86 gives it the 160 KB that COCO's images of 640x480 have on average.
    """
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    weight = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    planes = []
    shared = rng.standard_normal((height, width))
    for _ in range(3):
        noise = 0.8 * shared + 0.2 * rng.standard_normal((height, width))
        plane = np.fft.irfft2(np.fft.rfft2(noise) * weight, (height, width))
        planes.append((plane - plane.mean()) / plane.std())
    pixels = 128 + 50 * np.stack(planes, -1)
    for _ in range(12):
        left, top = rng.integers(0, width), rng.integers(0, height)
        pixels[top : top + height // 5, left : left + width // 5] += rng.normal(0, 40, 3)
    pixels += rng.normal(0, 3, pixels.shape)
    sink = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=86)
    return sink.getvalue()


def serve(bodies: list[bytes], tls: tuple[str, str] | None, port: Any, core: int) -> None:
    """Serve bodies[i % len] at /i.jpg, keeping connections open; in a process of its own."""
    if core >= 0:
        os.sched_setaffinity(0, {core})

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                number = int(head.split(" ", 2)[1].strip("/").partition(".")[0] or 0)
                keep = b"close" not in head.lower().encode()
                body = bodies[number % len(bodies)]
                length = str(len(body)).encode()
                connection = b"keep-alive" if keep else b"close"
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: "
                    + length
                    + b"\r\nConnection: "
                    + connection
                    + b"\r\n\r\n"
                    + body
                )
                await writer.drain()
                if not keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context, backlog=1024)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(run())


def certificate(folder: Path) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1, by the openssl command."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        [
            *["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"],
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            key,
            "-out",
            cert,
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


WARM_UP = 32


def table(folder: Path, url: str, rows: int) -> Path:
    """A folder of two tables, the first of them to warm up on; a shard never spans two."""
    target = folder / f"rows-{rows}"
    target.mkdir()
    for name, count in (("a", WARM_UP), ("b", rows)):
        lines = "".join(f"{url}/{i}.jpg,image number {i}\n" for i in range(count))
        (target / f"{name}.csv").write_text("url,caption\n" + lines)
    return target


def own_memory() -> float:
    """MB of this process that no other shares: what a further worker on a machine costs."""
    return float(psutil.Process().memory_full_info().uss) / 1e6


def client_ours(base: str, out: Path, images: int, kernel: str) -> tuple[float, float]:
    """CPU-seconds for one shard of so many images, after a small one, and MB of its own after that small one."""
    from ingest.config import IngestConfig
    from ingest.stage import IngestStage

    config = IngestConfig.model_validate(
        {
            "table": str(table(out, base, images)),
            "samples_per_shard": images,
            "image_size": 256,
            "encode_format": "jpg",
            "downscale_filter": kernel,
            "fetch": {"allow_addresses": ["127.0.0.1/32"], "concurrency": 64, "host_concurrency": 64},
        }
    )
    stage = IngestStage(config, str(out / "shards"))
    stage.begin()
    worker, tasks = stage.worker(), list(stage.tasks())
    worker(tasks[0])
    memory = own_memory()
    began = time.process_time()
    stats = worker(tasks[1])
    spent = time.process_time() - began
    assert stats["count"] == images, stats["errors"]
    worker.close()
    return spent, memory


def client_img2dataset(base: str, out: Path, images: int) -> float:
    """As `client_ours`, by img2dataset's own parts."""
    from img2dataset.downloader import Downloader
    from img2dataset.reader import Reader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    folder = out / "shards"
    (folder / "_tmp").mkdir(parents=True)
    rows = str(table(out, base, images))
    reader = Reader(rows, "csv", "url", "caption", None, None, [], images, set(), str(folder / "_tmp"))
    download = Downloader(
        WebDatasetSampleWriter,
        Resizer(256, "center_crop", False),
        64,
        True,
        True,
        str(folder),
        reader.column_list,
        10,
        images,
        5,
        "sha256",
        None,
        "jpg",
        0,
        "img2dataset",
        ["noai", "noimageai", "noindex"],
        None,
    )
    first, second = reader
    download(first)
    began = time.process_time()
    done, _ = download(second)
    spent = time.process_time() - began
    stats = json.loads((folder / "00001_stats.json").read_text())
    assert done
    assert stats["successes"] == images, stats["status_dict"]
    return spent


def client_bare(bodies: list[bytes], images: int, kernel: Any) -> float:
    """CPU-seconds to decode, resize and encode so many, with nothing around."""
    from ingest.pixels import PixelSettings, decode, encode, resize

    settings = PixelSettings(256, "center_crop", False, "jpg", 95, (255, 255, 255), 64_000_000, downscale_filter=kernel)
    for body in bodies[:4]:
        encode(resize(decode(body, settings).pixels, settings), settings)
    began = time.process_time()
    for i in range(images):
        encode(resize(decode(bodies[i % len(bodies)], settings).pixels, settings), settings)
    return time.process_time() - began


def child(spec: str) -> None:
    """One client in this process; prints its CPU-seconds."""
    s = json.loads(spec)
    if s["core"] >= 0:
        os.sched_setaffinity(0, {s["core"]})
    out = Path(s["out"])
    out.mkdir()
    if s["who"] == "memory":
        print(json.dumps(client_memory(s["path"], out)))
        return
    if s["who"] == "bare":
        bodies = [p.read_bytes() for p in sorted(Path(s["bodies"]).glob("*.jpg"))]
        print(json.dumps(client_bare(bodies, s["images"], s["filter"])))
        return
    if s["who"] == "ours":
        bare = own_memory()  # Python, and this file's numpy and Pillow
        seconds, memory = client_ours(s["base"], out, s["images"], s["filter"])
        print(f"  own memory: {memory:.0f} MB, {memory - bare:.0f} MB of them beyond Python, numpy and Pillow")
        print(json.dumps(seconds))
    else:
        print(json.dumps(client_img2dataset(s["base"], out, s["images"])))


def psnr_of_stored(out: Path, bodies: list[bytes]) -> float:
    """PSNR in dB of a client's stored images against a full decode, Lanczos to 256 px, centre crop."""
    import pyarrow.parquet as pq
    import webdataset

    keys = {
        k: int(u.rpartition("/")[2].partition(".")[0])
        for k, u in zip(
            *(pq.read_table(out / "00001.parquet", columns=[c])[c].to_pylist() for c in ("key", "url")), strict=True
        )
    }
    errors: dict[int, float] = {}
    for sample in webdataset.WebDataset(str(out / "00001.tar"), shardshuffle=False):
        number = keys[sample["__key__"]] % len(bodies)
        if number in errors:
            continue
        image = Image.open(io.BytesIO(bodies[number]))
        scale = 256 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        left, top = (size[0] - 256) // 2, (size[1] - 256) // 2
        whole = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + 256, top + 256))
        stored = Image.open(io.BytesIO(sample["jpg"]))
        errors[number] = float(np.mean((np.asarray(stored, float) - np.asarray(whole, float)) ** 2))
    return float(10 * np.log10(255**2 / np.mean(list(errors.values()))))


def compare(name: str, images: int, rounds: int, kernel: str, folder: Path) -> None:
    """One comparison, printed as a table."""
    width, height = SIZES[name]
    source = folder / f"{width}"
    if not source.exists():
        source.mkdir()
        for i in range(DISTINCT):
            (source / f"{i:03}.jpg").write_bytes(draw(i, width, height))
    bodies = [p.read_bytes() for p in sorted(source.glob("*.jpg"))]
    images = images if name != "large" else max(images // 4, 100)
    tls = certificate(folder) if name == "https" else None
    cores = sorted(os.sched_getaffinity(0))
    client_core, server_core = (cores[0], cores[-1]) if len(cores) > 1 else (-1, -1)
    port = multiprocessing.Value("i", 0)
    server = multiprocessing.Process(target=serve, args=(bodies, tls, port, server_core), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.02)
    base = f"{'https' if tls else 'http'}://127.0.0.1:{port.value}"
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    if tls:
        # Both verify, by the default context: the machine's own certificates, and the server's among them.
        bundle = folder / "bundle.pem"
        paths = (ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt", certifi.where())
        system = next(Path(p) for p in paths if p and Path(p).is_file())
        bundle.write_bytes(system.read_bytes() + b"\n" + Path(tls[0]).read_bytes())
        environment["SSL_CERT_FILE"] = str(bundle)
    clients = ("ours", "img2dataset")
    everybody = ("bare",) if name == "bare" else (*clients, "bare")
    best: dict[str, float] = {}
    try:
        for r in range(rounds):
            for who in everybody:
                out = folder / f"{name}-{who}-{r}"
                spec = {"who": who, "base": base, "out": str(out), "images": images, "core": client_core}
                spec |= {"bodies": str(source), "filter": kernel}
                found = subprocess.run(
                    [sys.executable, "-m", "benchmarks.ingest", "--child", json.dumps(spec)],
                    env=environment,
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                *said, last = found.stdout.strip().splitlines()
                seconds = float(last)
                print("".join(f"{line}\n" for line in said if "memory" in line), end="")
                best[who] = min(best.get(who, 1e9), seconds)
                print(f"{name:6} round {r + 1}  {who:12} {images / seconds:8.1f} images/CPU-s", flush=True)
    finally:
        server.terminate()
        server.join()
    size = sum(map(len, bodies)) / len(bodies) / 1000
    print(f"\n{name}: {width}x{height}, {size:.0f} KB, to 256 px; {images} images, best of {rounds}; ours by {kernel}")
    for who in everybody:
        print(f"  {who:12} {images / best[who]:8.1f} images/CPU-s")
    if "ours" in best:
        print(f"  ours / img2dataset  {best['img2dataset'] / best['ours']:.2f}x")
        print(f"  ours / bare         {best['bare'] / best['ours']:.0%}")
        psnr = {w: psnr_of_stored(folder / f"{name}-{w}-0" / "shards", bodies) for w in clients}
        print("  PSNR against a full decode and Lanczos: " + ", ".join(f"{w} {p:.2f} dB" for w, p in psnr.items()))
    print(flush=True)


def client_memory(path: str, out: Path) -> tuple[int, float, float]:
    """Shards planned, their rows read once, and the peak of this process's memory in MB, with the seconds it took."""
    from ingest import tables
    from ingest.config import IngestConfig
    from ingest.stage import IngestStage

    config = IngestConfig.model_validate({"table": path, "filters": [{"column": "similarity", "min": 0.28}]})
    stage = IngestStage(config, str(out / "images"))
    began, rows = time.monotonic(), 0
    stage.begin()
    last = None
    for task in stage.tasks():
        last = task
        rows += task.payload.rows
    assert last is not None
    assert tables.read_range(stage.layout(), last.payload).num_rows == last.payload.rows
    seconds = time.monotonic() - began
    # Not getrusage's, which begins with that of the process that started this one.
    [peak] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")]
    return rows, int(peak.split()[1]) / 1000, seconds


def memory(folder: Path) -> None:
    """Peak memory of the planner and the reader over a small table and one a thousand times as long."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    print("memory: planner and reader")
    for rows in (10_000, 10_000_000):
        path = folder / f"{rows}.parquet"
        schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string()), ("similarity", pa.float64())])
        n = range(10_000)  # a row group; the table is as many of them as it takes, since nothing here looks for repeats
        columns = {
            "URL": [f"https://host{i % 4479}.example/images/{i:012d}.jpg" for i in n],
            "TEXT": [f"an image of number {i}, with some words about what it shows" for i in n],
            "similarity": [0.2 + i % 100 / 500 for i in n],
        }
        group = pa.table(columns, schema)
        with pq.ParquetWriter(path, schema) as writer:
            for _ in range(rows // len(n)):
                writer.write_table(group)
        spec = json.dumps({"who": "memory", "path": str(path), "core": -1, "out": str(folder / f"m{rows}")})
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.ingest", "--child", spec], check=True, stdout=subprocess.PIPE, text=True
        )
        count, peak, seconds = json.loads(found.stdout.strip().splitlines()[-1])
        print(f"  {count:>12,} rows  peak {peak:6.0f} MB  {count / seconds:>12,.0f} rows/s", flush=True)


def adopt(images: int, rounds: int, folder: Path) -> None:
    """WebDataset tars adopted in place beside the same tars encoded again, in turn; a process of one worker."""
    import tarfile

    from ingest.config import IngestConfig
    from ingest.stage import IngestStage
    from shards.dataset import read_stats

    bodies = [draw(seed, 640, 480) for seed in range(DISTINCT)]

    def make(theirs: Path, count: int) -> Path:
        """As img2dataset makes them: image, facts and caption of each sample."""
        theirs.mkdir()
        with tarfile.open(theirs / "0.tar", "w") as tar:
            for n in range(count):
                facts = {"caption": f"photo {n}", "url": f"https://h.example/{n}.jpg", "width": 640, "height": 480}
                for suffix, data in (
                    ("jpg", bodies[n % DISTINCT]),
                    ("json", json.dumps({**facts, "sha256": f"{n:064x}"}).encode()),
                    ("txt", f"photo {n}".encode()),
                ):
                    info = tarfile.TarInfo(f"{n:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return theirs

    def once(name: str, theirs: Path, how: dict[str, Any]) -> tuple[float, float]:
        config = IngestConfig.model_validate({"table": str(theirs), "samples_per_shard": 1000, **how})
        stage = IngestStage(config, str(folder / name / "images"))
        begin, cpu = time.perf_counter(), time.process_time()
        stage.begin()
        tasks = list(stage.tasks())
        worker = stage.worker()
        for task in tasks:
            worker(task)
        worker.close()
        stage.finish([read_stats(stage.root, t.index) or {} for t in tasks])
        return time.perf_counter() - begin, time.process_time() - cpu

    # What an ingest costs however few images there are is to count in neither, so the quick one gets more of them.
    few = max(1, images // 10)
    sets = {"adopted": (make(folder / "many", images), images), "encoded again": (make(folder / "few", few), few)}
    how = {"adopted": {"source": {"adopt": True}}, "encoded again": {"image_size": 256}}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sets}
    for n in range(rounds):
        for name, (theirs, count) in sets.items():
            seconds, cpu = once(f"{name}-{n}", theirs, how[name])
            took[name].append((seconds / count, cpu / count))
    best = {name: tuple(map(min, zip(*times, strict=True))) for name, times in took.items()}
    for name, (seconds, cpu) in best.items():
        print(f"{name:14} {1 / seconds:10,.0f} images/s  {1e6 * cpu:8,.0f} CPU-us an image")
    by = [b / a for a, b in zip(best["adopted"], best["encoded again"], strict=True)]
    print(f"adopting is {by[0]:.1f} times as quick, by CPU time {by[1]:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SIZES, "memory", "adopt"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--filter", default="bicubic", help="ingest.downscale_filter of ours")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory(prefix="carrara-benchmark-") as folder:
        for name in [args.only] if args.only else ["http", "https", "large", "memory"]:
            if name == "adopt":
                adopt(args.images, args.rounds, Path(folder))
                continue
            if name == "memory":
                memory(Path(folder))
                continue
            compare(name, args.images, args.rounds, args.filter, Path(folder))


if __name__ == "__main__":
    main()
