"""The feature stage on a tiny run: features are those of the pictures, metrics those of the features, in any order, by
any number of workers; broken pictures are counted; the memorisation search finds what was copied."""

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

from eval import frechet, memorisation, mmd, networks, results
from eval.config import EvalConfig
from eval.features import FeaturesStage, Settings
from eval.stage import GenerateStage, conclude, stages
from shards.columns import ColumnShard, pack_columns
from shards.dataset import Dataset, commit_shard, read_stats, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, decode_rgb, pack_tar
from shards.layout import RunPaths
from shards.settings import StageError
from shards.stage import committed
from tests.eval.conftest import SIDE, drive, refs, shard_bytes


class Small:
    """Columns of the Inception's names."""

    matrix = np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, 12)).astype(np.float32) / 5000

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1).astype(np.float32)

    def __call__(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
        x = prepared @ self.matrix
        return {"inception_tf": x, "inception_tf_logits": x[:, :5], "inception_clean": x * 1.1}


@pytest.fixture(autouse=True)
def small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the Inception (tested in test_networks.py) a projection of the pixels."""

    def load(found: networks.Found, device: str = "cpu", precision: str = "float32") -> networks.Network:
        return Small() if found.name == "inception" else real(found, device, precision)

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
    made = stages(judged, own, *refs(own))
    assert [s.name for s in made] == ["reference", "features-real", "features-train", "eval", "features-generated"]
    for stage in made:
        drive(stage)
    generate = made[3]
    assert isinstance(generate, GenerateStage)
    assert generate.metrics_are_current()  # every network saw the pictures as they were drawn
    page = Path(conclude(judged, own, *refs(own))).read_text()
    assert generate.metrics_are_current()
    metrics = json.loads(Path(generate.root, "metrics.json").read_bytes())
    found = metrics["metrics"]
    # Features are those of the pictures on disk.
    dataset = Dataset.open(generate.root)
    pictures = np.concatenate(
        [
            np.stack([decode_rgb(shard.image_bytes(i)) for i in range(len(shard))])
            for shard in (ImageShard(dataset, p) for p in range(len(dataset.shards)))
        ]
    )
    x, y = columns(made[4].root, "inception_tf"), columns(made[1].root, "inception_tf")
    np.testing.assert_allclose(x, Small()(Small().prepare(pictures))["inception_tf"], rtol=1e-5, atol=1e-4)
    # Metrics are those of the features.
    assert found["fid_tf"]["value"] == pytest.approx(frechet.distance_of(frechet.reference_of(y), x), rel=1e-9)
    assert found["fid_clean"]["value"] == pytest.approx(1.21 * found["fid_tf"]["value"], rel=1e-4)
    assert found["kid_tf"]["value"] == pytest.approx(mmd.kid(x, y, np.arange(len(x)) % 2).value, rel=1e-9)
    assert {"isc_tf", "precision_tf", "recall_tf", "density_tf", "coverage_tf", "cmmd", "near_training"} <= set(found)
    assert "are not the published ones" in found["fid_tf"]["definition"]
    assert found["fid_tf"]["n"] == 20
    assert metrics["protocol"]["inception"] == made[4].weights["inception"]
    assert set(metrics["jackknife"]) >= {
        "fid_tf",
        "fid_clean",
        "kid_tf",
        "isc_tf",
        "cmmd",
        "clip_score",
        "fd_clip_unit",
    }
    # The held-out pictures are in this training set, so every one of them has itself for a neighbour.
    assert metrics["counts"]["training_pictures"] == 30
    assert metrics["counts"]["near_training"] == 0
    assert "fid_tf" in page
    real = {k: v for k, v in metrics["features"]["real"].items() if k != "fingerprint"}
    assert real == {"pictures": 30, "dropped": 0, "converted": 0}
    assert "are to 30 real pictures; 0 more could not be read" in page


def test_shards_are_the_same_from_any_worker_in_any_order(own: RunPaths, judged: EvalConfig, tmp_path: Path) -> None:
    refs_ = {"inception": str(judged.inception), "clip": refs(own)[1]}
    first = FeaturesStage(own.heldout, str(tmp_path / "a"), "x", refs_, Settings(SIDE, 5))
    drive(first)
    second = FeaturesStage(own.heldout, str(tmp_path / "b"), "x", refs_, Settings(SIDE, 5))
    workers = [second.worker(), second.worker()]
    tasks = list(second.tasks())
    for task in reversed(tasks):
        workers[task.index % 2](task)
    second.finish(read_stats(second.root, task.index) for task in tasks)  # type: ignore[misc]
    assert shard_bytes(first.root) == shard_bytes(second.root)
    other = FeaturesStage(own.heldout, str(tmp_path / "a"), "x", refs_, Settings(SIDE * 2, 5))
    assert other.root != first.root


def test_a_metric_of_part_of_the_shards(own: RunPaths, judged: EvalConfig) -> None:
    """A partial result, distances too, at any moment while pictures are drawn; a shard whose features a dead worker
    still owes has them made later, with the same bytes."""
    made = stages(judged, own, *refs(own))
    for stage in made[:3]:
        drive(stage)
    generate, features = made[3], made[4]
    assert isinstance(generate, GenerateStage)
    work = generate.worker()
    values = []
    for task in generate.tasks():
        work(task)
        values.append(generate.metrics()["metrics"]["fid_tf"])
    assert [v["n"] for v in values] == [8, 16, 20]
    assert all(np.isfinite(v["se"]) for v in values)
    expected = shard_bytes(features.root)
    for file in Path(features.root).glob("00001*"):
        file.unlink()
    assert generate.metrics()["metrics"]["fid_tf"]["n"] == 12
    generate.finish(s for t in generate.tasks() if (s := read_stats(generate.root, t.index)) is not None)
    assert committed(features, features.tasks()) == [True, False, True]
    drive(features)
    assert shard_bytes(features.root) == expected


def test_broken_and_converted_pictures_are_counted(tmp_path: Path, run: RunPaths) -> None:
    def encoded(mode: str) -> bytes:
        sink = io.BytesIO()
        Image.new(mode, (20, 30), 90).save(sink, "PNG")
        return sink.getvalue()

    data = [encoded("RGB"), b"not a picture", encoded("L"), encoded("RGBA")]
    keys = [f"{i:05d}" for i in range(4)]
    tar, places = pack_tar((k, {"png": d}) for k, d in zip(keys, data, strict=True))
    sink = io.BytesIO()
    table = {
        "key": keys, "caption": ["x"] * 4, "status": ["success"] * 4,
        "image_offset": [p["png"][0] for p in places], "image_size": [p["png"][1] for p in places],
    }  # fmt: skip
    pq.write_table(pa.table(table), sink)
    root = str(tmp_path / "images")
    stats = commit_shard(
        root, 0, {".tar": tar, ".parquet": sink.getvalue()}, {"rows": 4, "count": 4}, Fingerprint("ingest", 1, {})
    )
    write_manifest(root, "images", [stats])
    stage = FeaturesStage(root, str(tmp_path / "f"), "x", {"clip": refs(run)[1]}, Settings(SIDE))
    manifest = drive(stage)
    assert manifest["status"] == {"failed": 1, "success": 3}
    done = read_stats(stage.root, 0)
    assert done is not None
    assert (done["converted"], done["count"], done["rows"]) == (2, 3, 4)
    rows = Dataset.open(stage.root).sidecar(0).to_pylist()
    assert [r["status"] for r in rows] == ["success", "failed", "success", "success"]
    assert "cannot be decoded" in rows[1]["error"]
    assert ColumnShard(Dataset.open(stage.root), 0).arrays["clip"].shape == (3, 16)


def test_other_weights_on_the_worker_are_refused(own: RunPaths, judged: EvalConfig, tmp_path: Path) -> None:
    stage = FeaturesStage(own.heldout, str(tmp_path / "f"), "x", {"inception": str(judged.inception)}, Settings(SIDE))
    torch.save({"w": torch.ones(1)}, str(judged.inception))
    with pytest.raises(StageError, match="the inception weights here are others"):
        stage.worker()


def test_unfinished_pictures_have_no_features_yet(own: RunPaths, judged: EvalConfig) -> None:
    last = stages(judged, own, *refs(own))[-1]
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


def test_copied_pictures_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)

    def unit(n: int) -> np.ndarray:
        x = rng.standard_normal((n, 32)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    train, real, drawn = unit(500), unit(200), unit(60)
    drawn[7], drawn[30] = train[431], train[3]
    searched = feature_shards(str(tmp_path / "train"), train, "clip", [200, 200, 100])
    generated = feature_shards(str(tmp_path / "drawn"), drawn, "images", [40, 20], prompts=True)
    heldout = feature_shards(str(tmp_path / "real"), real, "images", [200])
    found = memorisation.nearest(drawn, searched)
    assert (found.key[7], found.shard[7], found.key[30], found.shard[30]) == ("000431", 2, "000003", 0)
    np.testing.assert_allclose(found.cosine, (drawn.astype(float) @ train.T.astype(float)).max(1), atol=1e-6)
    estimate, counts, sheet = memorisation.measure(generated, heldout, searched)
    assert estimate is not None
    assert counts["training_pictures"] == 500
    assert 2 <= counts["near_training"] <= 5  # the two copies, and 1 % of the others
    assert estimate.value == counts["near_training"] / 60
    assert {(s["key"], s["shard"], s["train_key"], s["train_shard"], s["near"]) for s in sheet[:2]} == {
        ("000007", 0, "000431", 2, True),
        ("000030", 0, "000003", 0, True),
    }


def test_distances_of_moments_and_of_features_agree(tmp_path: Path, config: EvalConfig) -> None:
    """More pictures than dimensions go through merged moments, fewer through the features: one number."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((90, 16)).astype(np.float32), rng.standard_normal((70, 16)).astype(np.float32) + 0.2
    generated = feature_shards(str(tmp_path / "g"), x, "f", [30, 25, 35], prompts=True)
    real = feature_shards(str(tmp_path / "r"), y, "f", [50, 20])
    found = results._distance(config, generated, real, "f")
    assert found is not None
    ref = frechet.reference_of(y)
    assert found.value == pytest.approx(frechet.distance_of(ref, x), rel=1e-9)
    owner = results._group(results._prompts(generated), config.jackknife_groups)
    by_features = frechet.estimate_of(ref, x, owner)
    assert found.se == pytest.approx(by_features.se, rel=1e-7)
    assert found.left_out == pytest.approx(by_features.left_out, rel=1e-9)
