"""The same contract on an object store: moto's S3 server on loopback, conditional puts included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shards import storage
from shards.dataset import Dataset, commit_shard, read_stats, shard_state, write_manifest
from shards.fingerprint import Fingerprint
from shards.stage import Task
from tests.objects import bucket

FILES = {".tar": b"tar bytes" * 100, ".parquet": b"parquet bytes"}


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    with bucket() as url:
        yield f"{url}/run/images"


def test_create_is_first_writer_wins(root):
    url = storage.join(root, "x")
    assert not storage.exists(url)
    assert storage.create(url, b"one")
    assert not storage.create(url, b"two")
    assert storage.read_bytes(url) == b"one"
    storage.write_atomic(url, b"three")
    assert storage.read_bytes(url) == b"three"
    assert storage.list_names(root) == ["x"]
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)
    assert storage.read_json(url) is None


def test_shards_commit_and_read_back(root):
    fingerprint = Fingerprint("s", 1, {"size": 64}, input="abc")
    stats = commit_shard(root, 0, FILES, {"rows": 2, "count": 2}, fingerprint)
    assert read_stats(root, 0) == stats
    assert shard_state(root, Task(0, fingerprint)).state == "done"
    write_manifest(root, "images", [stats])
    assert len(Dataset.open(root)) == 2
    storage.write_atomic(storage.join(root, "00000.tar"), b"short")
    assert shard_state(root, Task(0, fingerprint)).state == "damaged"
    assert commit_shard(root, 0, FILES, {"rows": 2, "count": 2}, fingerprint)["files"] == stats["files"]
    assert shard_state(root, Task(0, fingerprint)).state == "done"
