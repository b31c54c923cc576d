"""Semantic duplicates: by brute force, in any memory, killed and resumed, with images that come later."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import duplicates
from curate.config import CurateConfig
from curate.stage import pack, score_root, score_stages
from curate.takedown import take_out
from shards.commit import Folder
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard
from shards.layout import RunPaths
from shards.selection import Rule, Selection
from shards.settings import ConfigError
from tests.curate.test_stage import files, score, write_images

WIDTH = 24
ROWS = 60  # of a shard, every fifth of which has no image


def vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors around a few directions, of which every third is close to another one, from its copy on."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((6, WIDTH))
    found = centres[rng.integers(0, 6, count)] + 0.6 * rng.standard_normal((count, WIDTH))
    for n in range(3, count, 3):
        found[n] = found[rng.integers(0, n)] + rng.choice([0, 0.02, 0.1, 0.3]) * rng.standard_normal(WIDTH)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def embed(run: RunPaths, beauty: bool = False) -> None:
    """A finished score `clip` of such embeddings, and on demand one of random numbers, `beauty`."""
    dataset = Dataset.open(run.images)
    for name in ("clip", "beauty") if beauty else ("clip",):
        root = score_root(run, name)
        folder = Folder.begin(root, Fingerprint("score", 1, {}), ".safetensors", take_over=True)
        stats = []
        for position, info in enumerate(dataset.shards):
            shard = ImageShard(dataset, position)
            made = vectors(len(shard), info.index)
            columns = {"value": np.random.default_rng(info.index).random(len(shard)).astype(np.float32)}
            packed, record = pack(shard, columns, {"image": made} if name == "clip" else {})
            stats.append(folder.adopt(info.index) or folder.commit(info.index, packed, record, info.born))
        write_manifest(root, "scores", stats, {"scored_with": name, "columns": {}})


def configuration(**more: Any) -> CurateConfig:
    clip = {"kind": "clip", "model": "none"}
    scores = {"clip": clip, "beauty": {"kind": "pixels"}, "alike": {"kind": "duplicates", "clusters": 4, **more}}
    return CurateConfig.model_validate({"scores": scores})


def find(run: RunPaths, shuffle: int | None = None, **more: Any) -> dict[tuple[int, int], tuple[float, float, int]]:
    """(shard, row) -> nearest, centroid, cluster."""
    stage = score_stages(configuration(**more), run, "none")[-1]
    assert stage.score == "alike"
    score(stage, shuffle)
    found = {}
    for info in Dataset.open(run.images).shards:
        table = Dataset.open(stage.root).sidecar(info.index).to_pylist()
        for row, line in enumerate(table):
            if line["nearest"] is not None:
                found[info.index, row] = (line["nearest"], line["centroid"], int(line["cluster"]))
    return found


def embeddings(run: RunPaths) -> dict[tuple[int, int], np.ndarray]:
    dataset = Dataset.open(run.images)
    found = {}
    for position, info in enumerate(dataset.shards):
        shard = ImageShard(dataset, position)
        made = vectors(len(shard), info.index).astype(np.float64)
        for vector, row in zip(made, shard.rows.tolist(), strict=True):
            found[info.index, row] = vector / np.linalg.norm(vector)
    return found


def brute_force(
    run: RunPaths, found: dict[tuple[int, int], tuple[float, float, int]], first: dict[tuple[int, int], Any]
) -> dict[tuple[int, int], float]:
    """The definition: of each sample the highest cosine to one of its cluster that stands before it. first: sorts."""
    unit = embeddings(run)
    assert found.keys() == unit.keys()
    highest = {}
    for one in unit:
        before = [o for o in unit if found[o][2] == found[one][2] and first[o] < first[one]]
        highest[one] = max((float(unit[one] @ unit[o]) for o in before), default=-1.0)
    return highest


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    run = RunPaths(str(tmp_path / "run"))
    write_images(run, 4, ROWS)
    embed(run, beauty=True)
    return run


@pytest.mark.parametrize("keep", ["farthest", "nearest", "beauty.value"])
@pytest.mark.parametrize("clusters", [1, 4])
def test_what_is_told_is_the_definition(run: RunPaths, keep: str, clusters: int) -> None:
    found = find(run, keep=keep, clusters=clusters)
    assert {c for _, _, c in found.values()} == set(range(clusters))
    first: dict[tuple[int, int], Any] = {}
    for shard, row in found:
        values = pq.read_table(Path(score_root(run, "beauty")) / f"{shard:05d}.parquet")["value"].to_pylist()
        sign = {"farthest": found[shard, row][1], "nearest": -found[shard, row][1], "beauty.value": -(values[row] or 0)}
        first[shard, row] = (sign[keep], shard, row)
    expected = brute_force(run, found, first)
    assert max(abs(found[one][0] - best) for one, best in expected.items()) < 2e-3  # embeddings are kept in float16
    # Clusters are by the nearest centre, whose cosine is told.
    unit = embeddings(run)
    centres, _ = duplicates.unpack_columns(
        (Path(score_root(run, "alike")) / "index/centroids.safetensors").read_bytes()
    )
    for one, (_, cosine, cluster) in found.items():
        cosines = centres["centroids"].astype(np.float64) @ unit[one]
        assert cosine == pytest.approx(cosines[cluster], abs=2e-3)
        assert cosines.max() - cosines[cluster] < 2e-3
    # Near copies are there to be found, and some images are like no other.
    assert sum(near > 0.99 for near, _, _ in found.values()) > 20
    assert sum(near < 0.9 for near, _, _ in found.values()) > 50


def test_a_rule_keeps_one_of_each_set_of_copies(run: RunPaths) -> None:
    found = find(run, clusters=1)
    kept = Selection(run.run, [Rule(column="alike.nearest", max=0.98)])
    passing = []
    for position, info in enumerate(Dataset.open(run.images).shards):
        rows = ImageShard(Dataset.open(run.images), position).rows
        passing += [(info.index, int(row)) for row in rows[kept.passes(info.index, rows)]]
    unit = embeddings(run)
    left = np.array([unit[one] for one in passing])
    cosines = left @ left.T - 2 * np.eye(len(left))
    assert cosines.max() < 0.98 + 2e-3  # no two of those that stay are that alike
    assert 0 < len(passing) < len(found)
    for one in found.keys() - set(passing):  # and each that goes is like one that is there
        assert max(float(unit[one] @ unit[o]) for o in found if o != one) > 0.98 - 2e-3


def test_memory_and_the_order_of_work_change_nothing(run: RunPaths, tmp_path: Path) -> None:
    find(run)
    root = score_root(run, "alike")
    whole = files(root)
    assert len(list(Path(root, "index/0000").glob("group-*"))) == 1
    os.rename(root, tmp_path / "first")
    find(run, shuffle=3, memory_gb=5e-6)
    assert len(list(Path(root, "index/0000").glob("group-*"))) == 4
    assert files(root) == whole


def test_images_that_come_later_stand_behind_all_and_change_nothing(run: RunPaths) -> None:
    before = find(run)
    stored = files(score_root(run, "alike"))
    write_images(run, 6, ROWS)
    embed(run)
    after = find(run)
    assert {k: v for k, v in after.items() if k in before} == before
    now = files(score_root(run, "alike"))
    assert {n: now[n] for n in stored} == stored
    first = {one: (one not in before, after[one][1], one) for one in after}
    expected = brute_force(run, after, first)
    assert max(abs(after[one][0] - expected[one]) for one in after) < 2e-3


def _search(root: str, groups: int) -> None:
    """Ends by its own kill -9 once so many groups are there."""
    create, run = duplicates.storage.create, RunPaths(root)

    def counted(url: str, data: bytes, *rest: Any) -> bool:
        made = create(url, data, *rest)
        if len(list(Path(url).parent.glob("group-*"))) >= groups:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    duplicates.storage.create = counted
    find(run, memory_gb=5e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_killed_between_groups_the_same_command_finishes_with_the_same_bytes(
    run: RunPaths, tmp_path: Path, groups: int
) -> None:
    find(run, memory_gb=5e-6)
    root = score_root(run, "alike")
    whole = files(root)
    os.rename(root, tmp_path / "first")
    child = multiprocessing.get_context("spawn").Process(target=_search, args=(run.run, groups))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not files(root)
    done = {p: p.stat().st_mtime_ns for p in Path(root, "index").rglob("*.safetensors")}
    assert len(done) == groups + 1
    find(run)  # with other memory, too: what was begun goes on as it was
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert files(root) == whole


def test_taken_down_images_are_blanked(run: RunPaths) -> None:
    find(run)
    root = score_root(run, "alike")
    gone = [int(r) for r in ImageShard(Dataset.open(run.images), 1).rows[:7]]
    for index in range(4):
        table = Dataset.open(run.images).sidecar(index)
        statuses = table["status"].to_pylist()
        errors: list[str | None] = [None] * len(statuses)
        for row in gone if index == 1 else ():
            statuses[row], errors[row] = "opted_out", "taken_down"
        at = table.schema.get_field_index("status")
        table = table.set_column(at, "status", [statuses])
        table = table.append_column("error", pa.array(errors, pa.string()))
        pq.write_table(table, Path(run.images) / f"{index:05d}.parquet")
    assert take_out(root, run.images) == [1]
    lines = Dataset.open(root).sidecar(1).to_pylist()
    assert all((line["nearest"] is None) == (row in gone or row % 5 == 4) for row, line in enumerate(lines))


def test_what_cannot_be_is_said(run: RunPaths) -> None:
    for more, words in (
        ({"embeddings": "beauty"}, "no score of kind clip"),
        ({"keep": "nothing.value"}, "no other score"),
        ({"keep": "loudest"}, "keep"),
    ):
        with pytest.raises(ValueError, match=words):
            configuration(**more)
    with pytest.raises(ConfigError, match="no column"):
        find(run, keep="beauty.volume")


def test_equal_vectors_and_a_single_one() -> None:
    same = np.tile(np.eye(4, dtype=np.float16)[:1], (2500, 1))  # more than a block
    found = duplicates.nearest(same)
    assert found[0] == -1
    assert (found[1:] == 1).all()
    assert duplicates.nearest(same[:1]).tolist() == [-1]
    assert len(duplicates.nearest(same[:0])) == 0
    assert (duplicates.nearest(same, 2400) == 1).all()


def test_a_cluster_of_any_size_is_compared_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 8)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    order = rng.permutation(700)
    cosines = vectors[order].astype(np.float32) @ vectors[order].astype(np.float32).T
    expected = np.array([cosines[i, :i].max(initial=-1) for i in range(700)])
    monkeypatch.setattr(duplicates, "BLOCK", 64)
    monkeypatch.setattr(duplicates, "WIDE", 100)
    for first in (0, 1, 333, 700):
        np.testing.assert_allclose(duplicates.nearest(vectors, first, order), expected[first:], atol=1e-6)
    # A cluster of 40 MB in its file: what is held beside it is a part of that.
    monkeypatch.undo()
    np.tile(np.eye(1, 512, dtype=np.float16), (40_000, 1)).tofile(tmp_path / "vectors")
    laid = np.memmap(tmp_path / "vectors", np.float16, "r", shape=(40_000, 512))
    monkeypatch.setattr(duplicates, "WIDE", 1024)
    tracemalloc.start()
    found = duplicates.nearest(laid, 39_000, np.arange(40_000))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found == 1).all()
    assert most < 20e6
