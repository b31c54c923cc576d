"""The feature stage on a tiny run: features are those of the images, metrics those of the features, in any order, by
any number of workers; broken images are counted; the memorisation search finds what was copied."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from demo import scorer
from eval import networks
from eval.config import EvalConfig
from eval.features import FeaturesStage
from eval.metrics import frechet, kernel, memorisation, neighbours
from eval.metrics.statistics import RealSide, floor, from_npz
from shards.columns import ColumnShard, pack_columns
from shards.dataset import Dataset, commit_shard, read_stats, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, decode_rgb, pack_tar
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.stage import begin, committed
from tests.eval.conftest import SIDE, drive, evaluate, evaluation_of, refs, shard_bytes


class Small:
    """Columns of the Inception's names."""

    matrix = np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, 12)).astype(np.float32) / 5000

    def prepare(self, pixels: np.ndarray, rows: networks.Rows = ()) -> np.ndarray:
        return pixels.reshape(len(pixels), -1).astype(np.float32)

    def __call__(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
        x = prepared @ self.matrix
        return {"inception_tf": x, "inception_tf_logits": x[:, :5], "inception_clean": x * 1.1}


@pytest.fixture(autouse=True)
def small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the Inception (tested in test_networks.py) a projection of the pixels."""

    def load(found: networks.Found, device: str = "cpu") -> networks.Network:
        return Small() if found.name == "inception" else real(found, device)

    real = networks.load
    monkeypatch.setattr(networks, "load", load)


@pytest.fixture
def own(run: RunPaths, tmp_path: Path) -> RunPaths:
    shutil.copytree(run.run, tmp_path / "run")
    shutil.copytree(run.heldout, tmp_path / "run" / "images")
    torch.save({"w": torch.zeros(1)}, tmp_path / "inception.pth")
    return RunPaths(str(tmp_path / "run"))


@pytest.fixture
def judged(config: EvalConfig, own: RunPaths) -> EvalConfig:
    return config.model_copy(
        update={"inception": str(Path(own.run).parent / "inception.pth"), "memorisation": True, "steps": 1}
    )


def columns(root: str, name: str) -> np.ndarray:
    dataset = Dataset.open(root)
    return np.concatenate([ColumnShard(dataset, p).arrays[name] for p in range(len(dataset.shards))])


def test_an_evaluation_with_every_network(own: RunPaths, judged: EvalConfig) -> None:
    found = evaluate(own, judged)
    assert [s.name for s in found.stages()] == [
        "features-real-clip",
        "features-real-inception",
        "features-real-scorer",
        "features-real-vae",
        "features-train-clip",
        "nearest-real",
        "eval",
        "features-generated-clip",
        "features-generated-inception",
        "features-generated-scorer",
        "nearest-generated",
    ]
    assert found.is_current()
    metrics = json.loads(Path(found.folder, "metrics.json").read_bytes())
    m = metrics["metrics"]
    # Features are those of the images on disk.
    dataset = Dataset.open(found.generate.root)
    pixels = np.concatenate(
        [
            np.stack([decode_rgb(shard.image_bytes(i)) for i in range(len(shard))])
            for shard in (ImageShard(dataset, p) for p in range(len(dataset.shards)))
        ]
    )
    roots = {s.name: s.root for s in found.stages()}
    x = columns(roots["features-generated-inception"], "inception_tf")
    y = columns(roots["features-real-inception"], "inception_tf")
    np.testing.assert_allclose(x, Small()(Small().prepare(pixels))["inception_tf"], rtol=1e-5, atol=1e-4)
    # Metrics are those of the features; the value is the published kind, and with so few images nothing is corrected.
    assert m["fid_tf"]["value"] == pytest.approx(frechet.distance_of(frechet.reference_of(y), x), rel=1e-9)
    assert m["fid_clean"]["value"] == pytest.approx(1.21 * m["fid_tf"]["value"], rel=1e-4)
    assert "bias_corrected" not in m["fid_tf"]
    assert m["kid_tf"]["value"] == pytest.approx(kernel.kid(x, y, np.arange(len(x)) % 2).value, rel=1e-9)
    shares = {f"{n}_inception" for n in ("precision", "recall", "density", "coverage")}
    assert {"inception_score", "cmmd", "near_training", *shares} <= set(m)
    assert "are not the published ones" in m["fid_tf"]["definition"]
    assert m["fid_tf"]["n"] == 20
    assert set(metrics["jackknife"]) >= {"fid_tf", "fid_clean", "kid_tf", "inception_score", "cmmd", "clip_score"}
    # By tag: each image as it fares among all of them, not among those of its tag.
    captions = [c for s in dataset.shards for c in dataset.sidecar(s.index)["caption"].to_pylist()]
    images, texts = (columns(roots["features-generated-clip"], c) for c in ("images", "captions"))
    cosine = images @ texts.T
    alike = np.array([[scorer.meaning(a) == scorer.meaning(b) for a in captions] for b in captions])
    found_from = np.diag(cosine) > np.where(alike, -np.inf, cosine).max(1)
    inside = cdist(y, x) < np.sort(cdist(y, y), axis=1)[:, 5:6]
    for tag in ("one thing", "two things"):
        of_tag = np.array([tag in scorer.tags(c) for c in captions])
        assert 2 < of_tag.sum() < 20
        e = metrics["by_tag"][tag]
        assert e["retrieval"]["value"] == pytest.approx(found_from[of_tag].mean())
        assert e["precision_inception"]["value"] == pytest.approx(inside.any(0)[of_tag].mean())
        assert e["density_inception"]["value"] == pytest.approx(inside.sum(0)[of_tag].mean() / 5)
        assert not {"recall_inception", "coverage_inception", "inception_score"} & set(e)
        assert {"retrieval", "precision_inception"} <= set(metrics["tag_jackknife"][tag])
    assert 0 < m["retrieval"]["value"] < 1
    # The held-out images are in this training set, so every one of them has itself for a neighbour.
    assert metrics["counts"]["training_images"] == 30
    assert metrics["counts"]["near_training"] == 0
    assert metrics["protocol"]["training_set"] == Dataset.open(own.images).fingerprint


def test_a_network_that_is_asked_for_later_needs_no_new_images(own: RunPaths, judged: EvalConfig) -> None:
    first = evaluate(own, judged.model_copy(update={"inception": None, "memorisation": False}))
    images = shard_bytes(first.generate.root)
    clip = {s.root: shard_bytes(s.root) for s in first.generate.features()}
    second = evaluate(own, judged)
    assert second.folder != first.folder
    assert shard_bytes(second.generate.root) == images
    assert all(shard_bytes(root) == data for root, data in clip.items())
    assert "fid_tf" in json.loads(Path(second.folder, "metrics.json").read_bytes())["metrics"]


def test_one_reference_for_all_distances(own: RunPaths, judged: EvalConfig, tmp_path: Path) -> None:
    """Another set of real images moves every distance; at their own sizes, where that is asked for."""
    shutil.copytree(own.heldout, tmp_path / "coco")
    chosen = judged.model_copy(update={"memorisation": False, "reference": str(tmp_path / "coco")})
    shutil.rmtree(own.heldout)
    (tmp_path / "p.txt").write_text("\n".join(f"thing {i}" for i in range(8)))
    found = evaluate(own, chosen.model_copy(update={"prompts_file": str(tmp_path / "p.txt"), "scorer": None}))
    m = json.loads(Path(found.folder, "metrics.json").read_bytes())["metrics"]
    assert {"fid_tf", "cmmd", "fd_clip_unit", "clip_score_real"} <= set(m)
    as_is = evaluation_of(
        own, chosen.model_copy(update={"prompts_file": str(tmp_path / "p.txt"), "reference_as_is": True})
    )
    assert as_is.protocol["id"] != found.protocol["id"]
    assert all(s.resolution == 0 for s in as_is.real())


def test_statistics_in_a_file_are_a_reference(own: RunPaths, judged: EvalConfig, tmp_path: Path) -> None:
    y = np.random.default_rng(3).standard_normal((90, 12))
    file = tmp_path / "coco.npz"
    np.savez(file, mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    chosen = judged.model_copy(update={"memorisation": False, "fid_statistics": {"fid_clean": str(file)}})
    found = evaluate(own, chosen)
    m = json.loads(Path(found.folder, "metrics.json").read_bytes())["metrics"]
    x = columns(next(s.root for s in found.generate.features() if s.found.name == "inception"), "inception_clean")
    assert m["fid_clean"]["value"] == pytest.approx(frechet.distance_of(frechet.reference_of(y), x), rel=1e-6)
    for content, says in ((b"x", "cannot be read as statistics"), (None, "there is no file")):
        bad = tmp_path / "bad.npz"
        bad.write_bytes(content) if content else bad.unlink()
        with pytest.raises(ConfigError, match=says):
            from_npz(str(bad), "eval.fid_statistics.fid_tf", 12)
    with pytest.raises(ConfigError, match="is of 12 features, and these have 2048"):
        from_npz(str(file), "eval.fid_statistics.fid_clean", 2048)
    np.savez(tmp_path / "o.npz", mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(ConfigError, match="cannot be read as statistics"):
        from_npz(str(tmp_path / "o.npz"), "x", 1)  # nothing is unpickled


def test_shards_are_the_same_from_any_worker_in_any_order(own: RunPaths, judged: EvalConfig, tmp_path: Path) -> None:
    def stage(folder: str, side: int = SIDE) -> FeaturesStage:
        return FeaturesStage(own.heldout, str(tmp_path / folder), "x", "clip", refs(own)[1], side, 5)

    first, second = stage("a"), stage("b")
    drive(first)
    begin(second)
    workers = [second.worker(), second.worker()]
    tasks = list(second.tasks())
    for task in reversed(tasks):
        workers[task.index % 2](task)
    second.finish(read_stats(second.root, task.index) for task in tasks)
    assert shard_bytes(first.root) == shard_bytes(second.root)
    assert stage("a", SIDE * 2).root != first.root


def test_a_metric_of_part_of_the_shards(own: RunPaths, judged: EvalConfig) -> None:
    """A partial result, distances too, at any moment while images are made; features that a dead worker still owes are
    made later from the shard, with the same bytes as from memory."""
    found = evaluation_of(own, judged.model_copy(update={"memorisation": False}))
    for stage in found.real():
        drive(stage)
    generate = found.generate
    begin(generate)
    work = generate.worker()
    values = []
    for task in generate.tasks():
        work(task)
        values.append(found.metrics()["metrics"]["fid_tf"])
    assert [v["n"] for v in values] == [8, 16, 20]
    assert all(np.isfinite(v["se"]) for v in values)
    features = next(f for f in generate.features() if f.found.name == "inception")
    expected = shard_bytes(features.root)
    for file in Path(features.root).glob("00001*"):
        file.unlink()
    assert found.metrics()["metrics"]["fid_tf"]["n"] == 12
    generate.finish(s for t in generate.tasks() if (s := read_stats(generate.root, t.index)) is not None)
    assert committed(features, features.tasks()) == [True, False, True]
    drive(features)
    assert shard_bytes(features.root) == expected


def test_the_real_side_is_worked_out_once(own: RunPaths, judged: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = judged.model_copy(update={"memorisation": False})
    first = evaluate(own, chosen)
    before = json.loads(Path(first.folder, "metrics.json").read_bytes())["metrics"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the real side was worked out again")

    for module, name in ((frechet, "reference_of"), (frechet, "reference"), (kernel, "within")):
        monkeypatch.setattr(module, name, never)
    again = first.metrics()["metrics"]
    assert {n: e["value"] for n, e in again.items()} == {n: e["value"] for n, e in before.items()}
    real = Dataset.open(next(s.root for s in first.real() if s.found.name == "inception"))
    side = RealSide(real, "inception_tf")
    kept = next(Path(real.root).glob("statistics-inception_tf-radii-*"))
    kept.write_bytes(kept.read_bytes()[:-7])  # torn: made again
    np.testing.assert_allclose(side.radii, neighbours.radii(side.features))


def test_broken_and_converted_images_are_counted(tmp_path: Path, run: RunPaths) -> None:
    def encoded(mode: str) -> bytes:
        sink = io.BytesIO()
        Image.new(mode, (20, 30), 90).save(sink, "PNG")
        return sink.getvalue()

    data = [encoded("RGB"), b"not a picture", encoded("L"), encoded("RGBA")]
    keys = [f"{i:05d}" for i in range(4)]
    tar, extents = pack_tar((k, {"png": d}) for k, d in zip(keys, data, strict=True))
    sink = io.BytesIO()
    table = {
        "key": keys,
        "caption": ["x"] * 4,
        "status": ["success"] * 4,
        "image_offset": [p["png"][0] for p in extents],
        "image_size": [p["png"][1] for p in extents],
    }
    pq.write_table(pa.table(table), sink)
    root = str(tmp_path / "images")
    stats = commit_shard(
        root, 0, {".tar": tar, ".parquet": sink.getvalue()}, {"rows": 4, "count": 4}, Fingerprint("ingest", 1, {})
    )
    write_manifest(root, "images", [stats])
    stage = FeaturesStage(root, str(tmp_path / "f"), "x", "clip", refs(run)[1], SIDE)
    manifest = drive(stage)
    assert manifest["status"] == {"failed": 1, "success": 3}
    done = read_stats(stage.root, 0)
    assert done is not None
    assert (done["converted"], done["count"], done["rows"]) == (2, 3, 4)
    rows = Dataset.open(stage.root).sidecar(0).to_pylist()
    assert [r["status"] for r in rows] == ["success", "failed", "success", "success"]
    assert "cannot be decoded" in rows[1]["error"]
    assert ColumnShard(Dataset.open(stage.root), 0).arrays["images"].shape == (3, 16)


def test_other_weights_on_the_worker_are_refused(own: RunPaths, judged: EvalConfig, tmp_path: Path) -> None:
    stage = FeaturesStage(own.heldout, str(tmp_path / "f"), "x", "inception", str(judged.inception), SIDE)
    begin(stage)
    torch.save({"w": torch.ones(1)}, str(judged.inception))
    with pytest.raises(StageError, match="the inception weights here are others"):
        stage.worker()


def test_unfinished_images_have_no_features_yet(own: RunPaths, judged: EvalConfig) -> None:
    last = evaluation_of(own, judged).generate.features()[-1]
    with pytest.raises(StageError, match="no finished dataset"):
        list(last.tasks())


def feature_shards(root: str, features: np.ndarray, name: str, sizes: list[int], prompts: bool = False) -> Dataset:
    stats, start = [], 0
    for index, size in enumerate(sizes):
        part = features[start : start + size]
        keys = [f"{start + i:06d}" for i in range(size)]
        table: dict[str, list[str]] = {"key": keys, "status": ["success"] * size}
        if prompts:
            table["prompt_id"] = keys
        sink = io.BytesIO()
        pq.write_table(pa.table(table), sink)
        files = {".safetensors": pack_columns({name: part}, {}), ".parquet": sink.getvalue()}
        stats.append(commit_shard(root, index, files, {"rows": size, "count": size}, Fingerprint("f", 1, {})))
        start += size
    write_manifest(root, "features", stats)
    return Dataset.open(root)


def test_copied_images_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of the training set's shards; the threshold's own uncertainty is in the interval."""
    rng = np.random.default_rng(1)

    def unit(n: int) -> np.ndarray:
        x = rng.standard_normal((n, 32)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    train, real, drawn = unit(500), unit(200), unit(60)
    drawn[7], drawn[30] = train[431], train[3]
    feature_shards(str(tmp_path / "train"), train, "images", [200, 200, 100])
    feature_shards(str(tmp_path / "drawn"), drawn, "images", [40, 20], prompts=True)
    feature_shards(str(tmp_path / "real"), real, "images", [200])
    monkeypatch.setattr(memorisation, "CHUNK", 2)
    stages = [memorisation.NearestStage(n, str(tmp_path / n), str(tmp_path / "train")) for n in ("drawn", "real")]
    for stage in stages:
        drive(stage)
    assert len(list(stages[0].tasks())) == 2
    found = stages[0].result()
    assert (found.key[7], found.shard[7], found.key[30], found.shard[30]) == ("000431", 2, "000003", 0)
    np.testing.assert_allclose(found.cosine, (drawn.astype(float) @ train.T.astype(float)).max(1), atol=1e-6)
    keys = [f"{i:06d}" for i in range(60)]
    estimate, counts, sheet = memorisation.measure(*stages, keys, keys, np.arange(60))
    assert counts["training_images"] == 500
    assert 2 <= counts["near_training"] <= 5  # the two copies, and 1 % of the others
    assert estimate.value == counts["near_training"] / 60
    low, value, high = memorisation.threshold(stages[1].result().cosine)
    assert low < value < high
    assert estimate.high >= (found.cosine > low).mean() >= estimate.value
    assert {(s["key"], s["shard"], s["train_key"], s["train_shard"], s["near"]) for s in sheet[:2]} == {
        ("000007", 0, "000431", 2, True),
        ("000030", 0, "000003", 0, True),
    }


def test_the_thresholds_interval_holds_the_true_quantile() -> None:
    rng = np.random.default_rng(4)
    held = sum(
        low <= 2.3263 <= high for low, _, high in (memorisation.threshold(rng.standard_normal(600)) for _ in range(300))
    )
    assert held >= 0.92 * 300


def test_the_floor_is_what_a_perfect_model_comes_to() -> None:
    """The floor is the mean distance of draws of the real images' own distribution, in the numbers compared."""
    rng = np.random.default_rng(5)
    d, real, generated = 24, 600, 256
    scale = np.arange(1, d + 1) ** -0.5
    apart, floors = [], []
    for k in range(12):
        x, y = rng.standard_normal((generated, d)) * scale, rng.standard_normal((real, d)) * scale
        apart.append(frechet.distance_of(frechet.reference_of(y), x))
        found = floor(y, [f"{k} {i}" for i in range(real)], generated)
        assert found is not None
        floors.append(found)
    assert np.mean(floors) == pytest.approx(np.mean(apart), rel=0.15)
    assert floor(y[:40], [str(i) for i in range(40)], generated) is None  # halves of 20 say nothing of 24 dimensions
