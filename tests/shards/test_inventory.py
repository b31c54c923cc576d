"""A resume's judgement from one listing, against `shard_state`, which looks at every file of a shard."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from shards import inventory, storage
from shards.dataset import commit_shard, read_stats, shard_state
from shards.fingerprint import Fingerprint
from shards.inventory import Inventory, read_stats_of
from shards.stage import Task
from tests.objects import bucket

SHARDS = 10
GENERAL = Fingerprint("toy", 1, {"salt": "a"})


def tasks(salt: str = "a") -> list[Task]:
    common = dataclasses.replace(GENERAL, settings={"salt": salt})
    return [Task(i, common.of(f"input-{i}")) for i in range(SHARDS)]


def make(root: str, index: int) -> None:
    files = {".txt": b"x" * (100 + index), ".parquet": b"y" * 7}
    commit_shard(root, index, files, {"rows": 3, "count": 3}, tasks()[index].fingerprint)


@pytest.fixture(params=["file", "s3"])
def root(request, tmp_path):
    if request.param == "file":
        yield str(tmp_path / "data")
    else:
        with bucket() as url:
            yield f"{url}/run/data"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The stats files that are opened."""
    monkeypatch.setattr(inventory, "LARGE", 4)
    monkeypatch.setattr(inventory, "BLOCK", 5)
    monkeypatch.setattr(inventory, "PREFIXES", ["00", "01", "99"])
    opened: list[str] = []
    real = storage.read_many
    monkeypatch.setattr(storage, "read_many", lambda urls: opened.extend(urls) or real(urls))
    return opened


def states(root: str, memory: Path, salt: str = "a") -> list[str]:
    return [s.state for _, s in Inventory(root, str(memory)).states(iter(tasks(salt)))]


def test_shards_are_judged_as_one_by_one_and_opened_once(root, tmp_path, reads):
    memory = tmp_path / "status" / "memory.safetensors"
    assert states(root, memory) == ["missing"] * SHARDS
    for i in range(SHARDS - 2):
        make(root, i)
    expected = ["done"] * (SHARDS - 2) + ["missing"] * 2
    assert states(root, memory) == expected
    assert len(reads) == SHARDS - 2
    reads.clear()
    assert states(root, memory) == expected
    assert reads == [], "what was read once is remembered"

    # Whatever happens to the files afterwards is seen.
    def put(name: str, data: bytes) -> None:
        storage.write_atomic(storage.join(root, name), data)

    put("00001.txt", b"short")
    storage.remove(storage.join(root, "00002.parquet"))
    put("00003_stats.json", b"{}")
    storage.remove(storage.join(root, "00004_stats.json"))
    text = storage.read_bytes(storage.join(root, "00005_stats.json"))
    put(
        "00005_stats.json",
        text.replace(b'"input-5"', b'"input-X"').replace(tasks()[5].fingerprint.digest.encode(), b"0" * 32),
    )
    put("00099.txt", b"of a longer table")
    put("000007_stats.json", b"not a shard's name")
    put("99999999999999999999.txt", b"nor one that a table should be as long as")
    found = states(root, memory)
    assert found[:6] == ["done", "damaged", "damaged", "damaged", "missing", "input_changed"]
    assert found[6:] == expected[6:]
    assert found == [shard_state(root, t).state for t in tasks()]
    assert states(root, memory, salt="b")[6:] == ["stale"] * (SHARDS - 8) + ["missing"] * 2


def test_a_memory_of_elsewhere_or_torn_is_not_believed(root, tmp_path, reads):
    memory = tmp_path / "memory.safetensors"
    for i in range(SHARDS):
        make(root, i)
    states(root, memory)
    data = memory.read_bytes()
    for bad in (data[: len(data) // 2], b"", data.replace(root.encode(), b"!" * len(root))):
        memory.write_bytes(bad)
        reads.clear()
        assert states(root, memory) == ["done"] * SHARDS
        assert len(reads) == SHARDS


def test_what_is_committed_meanwhile_is_remembered(root, tmp_path, reads):
    memory = tmp_path / "memory.safetensors"
    watched = Inventory(root, str(memory))
    assert [s.state for _, s in watched.states(iter(tasks()))] == ["missing"] * SHARDS
    for i in range(SHARDS):
        make(root, i)
        watched.remember(i, read_stats(root, i))
    watched.save()
    assert states(root, memory) == ["done"] * SHARDS
    assert reads == []


def test_a_small_dataset_leaves_no_memory_behind(tmp_path):
    root, memory = str(tmp_path / "data"), tmp_path / "memory.safetensors"
    for i in range(SHARDS):
        make(root, i)
    assert states(root, memory) == ["done"] * SHARDS
    assert not memory.exists()


def test_stats_are_read_in_order_and_absent_ones_are_none(root, reads):
    for i in (0, 2, 3, 9):
        make(root, i)
    storage.write_atomic(storage.join(root, "00003_stats.json"), b'{"torn": ')
    asked = [9, 0, 1, 2, 3, 7, 0]
    found = list(read_stats_of(root, asked))
    assert [i for i, _ in found] == asked
    assert [s for _, s in found] == [read_stats(root, i) for i in asked]


def test_files_that_come_slowly_are_read_side_by_side(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i:03d}" for i in range(200)]
    for i, path in enumerate(paths):
        path.write_bytes(b"%d" % i)
    os.unlink(paths[150])
    urls = [str(p) for p in paths]
    expected = [b"%d" % i if i != 150 else None for i in range(200)]
    assert storage.read_many(urls) == expected
    monkeypatch.setattr(storage, "_SLOW_READ_S", 0.0)
    assert storage.read_many(urls) == expected
