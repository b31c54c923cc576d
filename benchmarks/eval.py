"""Evaluation side by side with its peers: python -m benchmarks.eval [frechet] [features] [generate] [tail] ...

frechet    Frechet distance of 2048-d moments: ours against scipy's sqrtm (clean-fid, pytorch-fid) and against the
           eigenvalues of S1 S2 (torch-fidelity, torchmetrics); full rank, and fewer vectors than dimensions
features   images/s of the feature stage against the bare network on ready batches; peak memory at N and 4 N images
generate   images/s of the whole evaluation against the bare pipeline in a loop
tail       distances from finished features, for a first checkpoint and for a second one
alarms     share of runs of 30 equally good checkpoints that raise an alarm, by simulation

Peer and ours take turns in one process, the best of several turns counts. Ratios are printed, larger is better for us.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy
import scipy.linalg

from eval import compare
from eval.metrics import frechet, moments
from eval.metrics.moments import Moments

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["frechet", "features"])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--images", type=int, default=16, help="of generate")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        return peak(given.peak)
    print(f"{os.cpu_count()} CPUs, numpy {np.__version__}, scipy {scipy.__version__}")
    for name in given.what:
        {
            "frechet": lambda: bench_frechet(given.dim),
            "features": bench_features,
            "generate": lambda: bench_generate(given.images),
            "tail": bench_tail,
            "alarms": bench_alarms,
        }[name]()


def features_like(n: int, d: int, seed: int) -> np.ndarray:
    """Vectors with a power-law spectrum of trace 120, as Inception's features have."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, d + 1) ** -1.0
    scale = np.sqrt(spectrum * 120 / spectrum.sum())
    q = np.linalg.qr(np.random.default_rng(7).standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * scale) @ q + 0.05 * seed


def taken(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    value = work()
    return time.perf_counter() - began, value


def turns(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, float]]:
    """Best seconds and value of each, one after another in every round."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, work in works.items():
            seconds, value = taken(work)
            if name not in best or seconds < best[name][0]:
                best[name] = (seconds, value)
    return best


def by_sqrtm(a: Moments, b: Moments) -> float:
    """clean-fid's and pytorch-fid's formula."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    delta = a.mean - b.mean
    return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(np.real(root)))


def by_eigenvalues(a: Moments, b: Moments) -> float:
    """torch-fidelity's and torchmetrics' formula."""
    values = np.linalg.eigvals(a.covariance @ b.covariance)
    delta = a.mean - b.mean
    cross = np.sqrt(values.astype(complex)).real.sum()
    return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def bench_frechet(d: int) -> None:
    frechet_of(f"full rank, {10 * d} vectors", 10 * d, d)
    frechet_of(f"n < d, {d // 2} vectors", d // 2, d)


def frechet_of(label: str, n: int, d: int) -> None:
    x, y = features_like(n, d, 1), features_like(n, d, 2)
    a, b = moments.of(x), moments.of(y)

    def ours() -> float:
        if n <= d:
            return frechet.distance_of(frechet.reference_of(y), x)
        return frechet.distance(frechet.reference(b), a)

    found = turns({"ours": ours, "scipy sqrtm": lambda: by_sqrtm(a, b), "eigvals": lambda: by_eigenvalues(a, b)}, 2)
    exact = nuclear(x, y)
    print(f"frechet, d = {d}, {label}:")
    for name, (seconds, value) in found.items():
        error, ratio = abs(value - exact) / exact, seconds / found["ours"][0]
        print(f"  {name:<12} {seconds:8.3f} s   relative error {error:.1e}   ours is {ratio:5.1f}x as fast", flush=True)


def nuclear(x: np.ndarray, y: np.ndarray) -> float:
    """The distance through the nuclear norm of Xc Yc^T, by the triangular factors where n > d: no covariance and no
    root of an eigenvalue in it."""
    a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    ra, rb = (m if len(m) <= m.shape[1] else np.linalg.qr(m, mode="r") for m in (a, b))
    cross = np.linalg.svd(ra @ rb.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


# ---- features ---------------------------------------------------------------------------------------


def random_inception(path: Path) -> None:
    """A file of weights in torch-fidelity's layout, from torch's own initialisation: speed does not depend on them."""
    from unittest.mock import patch

    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with (
        patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None),
    ):
        torch.save(theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), path)


def image_shards(root: str, count: int, side: int, per_shard: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from shards.dataset import commit_shard, write_manifest
    from shards.fingerprint import Fingerprint
    from shards.images import pack_tar

    rng, stats = np.random.default_rng(0), []
    for index in range(count // per_shard):
        samples = []
        for i in range(per_shard):
            sink = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((side, side), Image.Resampling.BICUBIC).save(sink, "PNG", compress_level=1)
            samples.append((f"{index * per_shard + i:08d}", {"png": sink.getvalue()}))
        tar, extents = pack_tar(samples)
        table = pa.table(
            {
                "key": [k for k, _ in samples],
                "caption": [""] * per_shard,
                "status": ["success"] * per_shard,
                "image_offset": [p["png"][0] for p in extents],
                "image_size": [p["png"][1] for p in extents],
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        files = {".tar": tar, ".parquet": sink.getvalue()}
        numbers = {"rows": per_shard, "count": per_shard}
        stats.append(commit_shard(root, index, files, numbers, Fingerprint("ingest", 1, {"side": side})))
    write_manifest(root, "images", stats)


def bench_features(count: int = 24, side: int = 256, batch: int = 8) -> None:
    """The stage decodes from shards, resizes twice, runs both batches and commits; the bare side runs the network on
    batches that are ready."""
    import torch

    from eval import networks
    from eval.features import FeaturesStage, FeaturesWorker
    from shards.dataset import Dataset
    from shards.images import ImageShard, decode_rgb
    from shards.stage import begin, open_folder

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "inception.pth"
        random_inception(weights)
        image_shards(f"{folder}/images", count, side, count)
        network = networks.Inception(networks.find("inception", str(weights)))
        shard = ImageShard(Dataset.open(f"{folder}/images"), 0)
        pixels = np.stack([decode_rgb(shard.image_bytes(i)) for i in range(count)])
        ready = [network.prepare(pixels[i : i + batch]) for i in range(0, count, batch)]
        folders = iter(range(100))
        first = FeaturesStage(f"{folder}/images", f"{folder}/first", "x", "inception", str(weights), side, batch)
        begin(first)
        known = first.worker().__dict__

        def bare() -> float:
            for prepared in ready:
                network(prepared)
            return 0.0

        def staged() -> float:
            stage = FeaturesStage(
                f"{folder}/images",
                f"{folder}/{next(folders)}",
                "x",
                "inception",
                str(weights),
                side,
                batch,
                torch.get_num_threads(),
                "cpu",
            )
            begin(stage)
            work = FeaturesWorker.__new__(FeaturesWorker)
            work.__dict__ |= known | {"stage": stage, "folder": open_folder(stage)}  # the network is loaded already
            for task in stage.tasks():
                work(task)
            return 0.0

        found = turns({"bare": bare, "stage": staged}, 3)
        bare_rate, rate = (count / found[name][0] for name in ("bare", "stage"))
        print(f"features, Inception twice (fid_tf and fid_clean), {count} pictures of {side} px:")
        print(f"  bare network {bare_rate:.2f} pictures/s, stage {rate:.2f} pictures/s: {100 * rate / bare_rate:.1f} %")
    sizes = []
    for factor in (1, 4):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.eval", "--peak", str(256 * factor)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        sizes.append(float(done.stdout.split()[-1]))
    print(f"  peak memory with 256 pictures {sizes[0]:.0f} MB, with 1024 pictures {sizes[1]:.0f} MB")


def memory(what: str) -> float:
    """This process's resident memory in MB: now, without mapped files (RssAnon), or at most so far (VmHWM). getrusage
    would begin with the parent's."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{what}:")]
    return int(line.split()[1]) / 1000


def peak(count: int) -> None:
    """Peak resident memory of a process that takes 2048 numbers of each of so many images through the stage."""
    from eval import networks
    from eval.features import FeaturesStage
    from shards.stage import begin

    class Network:
        def prepare(self, pixels: np.ndarray, rows: object = ()) -> np.ndarray:
            return pixels.reshape(len(pixels), -1)[:, :2048].astype(np.float32)

        def __call__(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
            return {"inception_tf": prepared}

    with tempfile.TemporaryDirectory() as folder:
        image_shards(f"{folder}/images", count, 128, 128)
        (Path(folder) / "w.pth").write_bytes(b"x")
        networks.load = lambda *_: Network()
        stage = FeaturesStage(f"{folder}/images", f"{folder}/out", "x", "inception", f"{folder}/w.pth", 128)
        begin(stage)
        work = stage.worker()
        stage.finish([work(task) for task in stage.tasks()])
        print(memory("VmHWM"))


# ---- generation, end to end -------------------------------------------------------------------------


def bench_generate(images: int, side: int = 128, steps: int = 12, batch: int = 8) -> None:
    """Images made, encoded, judged by a CLIP and committed, two shards in hand as the engine has them, against the bare
    pipeline in a loop."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from diffusers import UNet2DConditionModel

    from eval import model as models
    from eval.config import EvalConfig
    from eval.evaluation import Evaluation
    from eval.generate import ImageGenerator, Sample
    from shards.layout import RunPaths
    from shards.stage import begin
    from tests.eval.conftest import build_run

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run: RunPaths = build_run(Path(folder) / "run", images)
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=side // 4,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        ).save_pretrained(f"{run.model}/unet")
        config = EvalConfig(num_prompts=images, steps=steps, batch_size=batch, shard_size=batch, device="cpu")
        evaluation = Evaluation(config, run, f"{run.autoencoder}/model", f"{run.clip}/model")
        stage = evaluation.generate
        begin(stage)
        work = stage.worker()
        bare_pipeline = ImageGenerator(models.build_pipeline(run, evaluation.model), "ddim", steps, 3.0)
        samples = [Sample(p.id, 0, p.text) for p in evaluation.prompts]
        ratios = []
        for turn in range(3):  # one after the other, so that a busy machine is busy for both
            began = time.perf_counter()
            for i in range(0, images, batch):
                bare_pipeline(samples[i : i + batch])
            bare = time.perf_counter() - began
            stage.root = f"{folder}/{turn}"
            work.folder, work.features = begin(stage), [f.worker() for f in stage.features()]
            for features in work.features:
                features.lock = work.lock
            began = time.perf_counter()
            with ThreadPoolExecutor(stage.max_in_flight) as pool:
                list(pool.map(work, stage.tasks()))
            took = time.perf_counter() - began
            ratios.append(bare / took)
        print(f"generate, {images} images of {side} px, {steps} steps, one thread: {images / took:.2f} images/s,")
        print(f"  {', '.join(f'{100 * r:.1f} %' for r in ratios)} of the bare pipeline's rate")


def bench_tail(n: int = 1000, real: int = 20_000, d: int = 256) -> None:
    """What the driver works out of finished features, for a first checkpoint and for a second one: the real side's
    factor, kernel sums and radii are kept, the generated side's are its own."""
    from eval.metrics import kernel, neighbours
    from eval.metrics.statistics import RealSide
    from shards.columns import pack_columns
    from shards.dataset import Dataset, commit_shard, write_manifest
    from shards.fingerprint import Fingerprint

    with tempfile.TemporaryDirectory() as folder:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.table({"key": [f"{i:06d}" for i in range(real)], "status": ["success"] * real}), sink)
        y = np.random.default_rng(0).standard_normal((real, d)).astype(np.float32)
        files = {".safetensors": pack_columns({"x": y}, {}), ".parquet": sink.getvalue()}
        stats = commit_shard(folder, 0, files, {"rows": real, "count": real}, Fingerprint("f", 1, {}))
        write_manifest(folder, "features", [stats])
        print(f"tail, {n:,} generated and {real:,} real vectors, d = {d}:")
        few = y[:40, :8]
        neighbours.prdc(few, few)  # what is loaded at its first use belongs to neither checkpoint
        kernel.kid(few, few, np.arange(40) % 2)
        frechet.estimate_of(frechet.reference_of(few), few, np.arange(40) % 2)
        whole = []
        for seed in (1, 2):
            x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
            group, side = np.arange(n) % 20, RealSide(Dataset.open(folder), "x")
            parts: dict[str, Callable[[], object]] = {
                "real side": lambda: (side.frechet, side.kernel("polynomial"), side.radii),  # noqa: B023
                "Frechet": lambda: frechet.estimate(side.frechet, {g: moments.of(x[group == g]) for g in range(20)}),  # noqa: B023
                "KID": lambda: kernel.kid(x, side.features, group, side.kernel("polynomial")),  # noqa: B023
                "neighbours": lambda: neighbours.prdc(side.features, x, side.radii),  # noqa: B023
            }
            seconds = {name: taken(work)[0] for name, work in parts.items()}
            whole.append(sum(seconds.values()))
            shown = ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items())
            print(f"  checkpoint {seed}: {whole[-1]:.2f} s ({shown})", flush=True)
        print(f"  the second takes {100 * whole[1] / whole[0]:.1f} % of the first")


# ---- alarms -----------------------------------------------------------------------------------------

KINDS = ("normal", "heavy tails", "skewed", "distances")


def equals(kind: str, runs: int, groups: int, seed: int, checkpoints: int = compare.HORIZON) -> np.ndarray:
    """Metrics of equally good checkpoints without each jackknife group, [runs, checkpoints, metrics, groups].

    The noise of a prompt is shared by all checkpoints of a run, and half of what is a checkpoint's own by its metrics.
    heavy tails: Student's t of 3; skewed: log-normal; distances: a Frechet distance of 20 images a group in 6
    dimensions to a standard normal, one metric.
    """
    rng = np.random.default_rng(seed)
    if kind == "distances":
        x = rng.standard_normal((runs, 1, groups, 20, 6)) + 0.7 * rng.standard_normal(
            (runs, checkpoints, groups, 20, 6)
        )
        x /= 1.49**0.5
        sums, squares = x.sum(3), np.einsum("rkgia,rkgib->rkgab", x, x)
        n = 20 * (groups - 1)
        mean = (sums.sum(2, keepdims=True) - sums) / n
        second = squares.sum(2, keepdims=True) - squares
        spectrum = np.linalg.eigvalsh((second - n * mean[..., None] * mean[..., None, :]) / (n - 1))
        return ((mean**2).sum(-1) + (spectrum + 1 - 2 * np.sqrt(spectrum)).sum(-1))[:, :, None]
    draw: Callable[..., np.ndarray] = {
        "normal": lambda *s: rng.standard_normal(s),
        "heavy tails": lambda *s: rng.standard_t(3, s),
        "skewed": lambda *s: rng.lognormal(0, 1, s),
    }[kind]
    own = draw(runs, checkpoints, 1, groups) + draw(runs, checkpoints, len(compare.WATCHED), groups)
    x = 10 + draw(runs, 1, len(compare.WATCHED), groups) + 0.5 * own
    return (x.sum(3, keepdims=True) - x) / (groups - 1)


def excess(left_out: np.ndarray, rate: float) -> np.ndarray:
    """By how much the worst comparison of each run passes the alarm's threshold, in standard errors, [runs]; an alarm
    where it is above 0. As compare.alarms has it, for metrics of which less is better and for groups of a size."""
    from scipy.special import stdtrit

    runs, checkpoints, metrics, groups = left_out.shape
    worst = np.full(runs, -np.inf)
    for k in range(1, checkpoints):
        apart = (left_out[:, k, None] - left_out[:, :k]) * (
            1 - groups
        )  # pseudo-values of the difference, but for means
        value = (left_out[:, k, None] - left_out[:, :k]).mean(-1)
        se = apart.std(-1, ddof=1) / groups**0.5
        limit = -stdtrit(groups - 1, rate / (compare.HORIZON * k * (metrics + len(compare.BAD))))
        worst = np.maximum(worst, (value / se).max(axis=(1, 2)) - limit)
    return worst


def spoilt(share: float, images: int, runs: int, seed: int) -> int:
    """Runs of equally good checkpoints, of whose images this share is blank by chance, that raise an alarm of that."""
    rng, alarmed = np.random.default_rng(seed), 0
    for blank in rng.binomial(images, share, (runs, compare.HORIZON)):
        results = [
            {"checkpoint": str(k), "counts": {"images": images, "failed": 0, "blank": int(b), "repeated": 0}}
            for k, b in enumerate(blank)
        ]
        least = [0.02 / (len(compare.BAD) * max(1, k) * compare.HORIZON) for k in range(len(results))]
        alarmed += any(compare._bad_images(r, results[:k], least[k], 0.01) for k, r in enumerate(results))
    return alarmed


def bench_alarms(runs: int = 10_000, batch: int = 250) -> None:
    """Any change counts (alarm_min_change 0); a comparison's p is held to alarm_rate 0.02 over 30 checkpoints."""
    for kind in KINDS:
        for groups in (4, 20):
            count = runs if kind != "distances" else runs // 10
            parts = [excess(equals(kind, batch, groups, seed), 0.02) > 0 for seed in range(count // batch)]
            found = int(np.concatenate(parts).sum())
            print(f"alarms, {kind}, {groups} groups: {found} of {count:,} runs, {100 * found / count:.2f} %")
    for share, images in ((0.005, 256), (0.01, 256), (0.01, 10_000), (0.002, 30)):
        found = spoilt(share, images, runs // 10, 0)
        print(f"alarms, {100 * share:g} % of {images:,} images blank: {found} of {runs // 10:,} runs")


if __name__ == "__main__":
    main()
