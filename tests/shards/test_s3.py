"""The same contract on an object store: moto's S3 server on loopback, one put at a time.

Also where the store says "busy", where answers are lost, and with tars so large that they go in parts.
"""

from __future__ import annotations

import os
import time
import types
from collections.abc import Iterator

import boto3
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from shards import storage
from shards.commit import Folder
from shards.dataset import Dataset, read_stats, write_manifest
from shards.fingerprint import Fingerprint
from shards.listing import listed
from shards.settings import ConfigError, StageError
from shards.verify import verify, verify_shard
from tests.objects import Asked, bucket
from train import reader

FILES = {".tar": b"tar bytes" * 100, ".parquet": b"parquet bytes"}
OTHER = {".tar": b"other tar" * 100, ".parquet": b"other parquet"}
STATS = {"rows": 2, "count": 2}


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    with bucket() as url:
        yield f"{url}/run/images"


def begin(root: str, **change) -> Folder:
    return Folder.begin(
        root, Fingerprint(**{"stage": "s", "version": 1, "settings": {"size": 64}, **change}), take_over=True
    )


def test_connections_are_as_many_as_a_trainings_readers(root):
    assert storage._fs(root)[0].config_kwargs["max_pool_connections"] >= reader.THREADS


def test_create_writes_only_what_is_not_there(root):
    url = storage.join(root, "x/y")
    assert not storage.exists(url)
    assert storage.create(url, b"one")
    assert not storage.create(url, b"two")
    assert storage.read_bytes(url) == b"one"
    storage.write_atomic(url, b"three")
    assert storage.read_bytes(url) == b"three"
    assert storage.list_names(storage.join(root, "x")) == ["y"]
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)
    assert storage.read_json(url) is None


def test_a_put_for_what_was_seen_is_refused_once_it_is_another(root):
    url = storage.join(root, "z")
    storage.write_atomic(url, b"one")
    seen = storage.etag(url)
    storage.replace(url, b"two", seen)
    with pytest.raises(StageError, match="changed by somebody else"):
        storage.replace(url, b"three", seen)
    assert storage.read_bytes(url) == b"two"
    storage.remove(url)


def test_shards_commit_and_read_back(root):
    folder = begin(root)
    assert begin(root).id == folder.id
    stats = folder.commit(0, FILES, STATS)
    assert folder.commit(0, OTHER, STATS) == folder.adopt(0) == stats == read_stats(root, 0)
    assert storage.list_names(folder.beside) == []
    write_manifest(root, "images", [stats])
    assert len(Dataset.open(root)) == 2
    assert listed(root).committed.tolist() == [0]
    with pytest.raises(ConfigError, match=r"settings\.size: 64 -> 32"):
        begin(root, settings={"size": 32})
    with pytest.raises(ConfigError, match="set 'run' to another prefix"):
        Folder.begin(root, Fingerprint("s", 2, {}), redo=True, take_over=True)
    storage.write_atomic(storage.join(root, "00000.tar"), b"short")
    assert "5 bytes where 900 were committed" in verify_shard(root, 0)
    assert [i for i, _ in verify(root)] == [0]


def test_a_begun_shard_is_ended_by_whoever_comes(root):
    folder = begin(storage.join(root, "begun"))
    storage_create, calls = storage.create, []

    def dying(url, data, beside=None):
        calls.append(url)
        if url.endswith(".parquet"):
            raise KeyboardInterrupt
        return storage_create(url, data, beside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "create", dying)
        with pytest.raises(KeyboardInterrupt):
            folder.commit(3, FILES, STATS)
    assert listed(folder.root).begun.tolist() == [3]
    assert folder.adopt(3) is not None
    assert verify_shard(folder.root, 3) == ""


def test_a_folder_of_others_is_refused(root):
    other = storage.join(root, "theirs")
    storage.write_atomic(storage.join(other, "00000_stats.json"), b'{"count": 1, "successes": 1}')
    with pytest.raises(ConfigError, match=r"00000_stats\.json, which Carrara did not make"):
        begin(other)
    assert storage.list_names(other) == ["00000_stats.json"]


def test_a_store_that_ignores_conditions_is_refused():
    with bucket(ignores=True) as url:
        with pytest.raises(ConfigError, match=r"overwrites a file that was to be created only if absent \(it ignores"):
            begin(f"{url}/run/images")
        assert storage.list_names(f"{url}/run/images") == []


def test_a_busy_store_is_asked_again_and_not_taken_for_exists(monkeypatch):
    said: list[str] = []
    waited: list[float] = []
    # storage's own clock alone: other threads of this process sleep too.
    monkeypatch.setattr(storage, "time", types.SimpleNamespace(sleep=waited.append, perf_counter=time.perf_counter))

    def busy(method: str, path: str) -> bool:
        said.append(path)
        return "00007_stats" in path and sum("00007_stats" in p for p in said) <= 2

    with bucket(busy=busy) as url:
        folder = begin(f"{url}/run/images")
        folder.commit(7, FILES, STATS)
        assert waited == [0.05, 0.2]
        assert verify_shard(folder.root, 7) == ""
    with bucket(busy=lambda method, path: "00007.tar" in path) as url:
        folder = begin(f"{url}/run/images")
        with pytest.raises(StageError, match="says that this file is there, and then that it is not"):
            folder.commit(7, FILES, STATS)
        assert folder.adopt(7) is None


@pytest.mark.parametrize("shard", [412, 409])
def test_a_denied_put_is_an_error_whatever_the_shards_name(shard, monkeypatch):
    with bucket() as url:
        folder = begin(f"{url}/run/images")
        fs, _ = storage._fs(url)

        def denied(path, *args, **more):
            raise PermissionError(f"Forbidden: {path}")

        monkeypatch.setattr(fs, "pipe_file", denied)
        with pytest.raises(PermissionError):
            folder.commit(shard, FILES, STATS)


def lost_once() -> tuple[list[str], Asked]:
    lost: list[str] = []

    def lose(method: str, path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        wanted = "000" in name and "uploads" not in name and "partNumber" not in name
        if wanted and name.partition("?")[0] not in lost:
            lost.append(name.partition("?")[0])
            return True
        return False

    return lost, lose


def test_every_answer_is_lost_once_and_a_shard_is_committed_all_the_same():
    lost, lose = lost_once()
    with bucket(lose=lose) as url:
        folder = begin(f"{url}/run/images")
        stats = folder.commit(1, FILES, STATS)
        assert len(lost) == 4  # the small file, the tar, the sidecar, the stats: each was its own, and said to exist
        assert stats["files"] == read_stats(folder.root, 1)["files"]
        assert verify_shard(folder.root, 1) == ""
        assert storage.list_names(folder.beside) == []


@pytest.mark.parametrize("stored", [True, False], ids=["that was done", "that was aborted"])
def test_parts_that_are_gone_are_looked_after(root, stored, monkeypatch):
    """The second try of a put in parts finds no parts where the first one's answer was lost, or a rule removed them."""
    folder, fs, asked = begin(f"{root}/gone-{stored}"), storage._fs(root)[0], []
    put = fs.pipe_file

    def once(path, value, mode="overwrite", **options):
        if mode == "create" and path.endswith(".tar") and not asked:
            asked.append(path)
            if stored:
                put(path, value, mode=mode, **options)
            raise translate_boto_error(ClientError({"Error": {"Code": "NoSuchUpload"}}, "CompleteMultipartUpload"))
        return put(path, value, mode=mode, **options)

    monkeypatch.setattr(fs, "pipe_file", once)
    stats = folder.commit(1, FILES, STATS)
    assert asked
    assert stats == read_stats(folder.root, 1)
    assert verify_shard(folder.root, 1) == ""


@pytest.mark.slow
def test_a_real_tar_goes_in_parts_with_losers_busy_answers_and_lost_ones():
    """Over 200 MB: s3fs then writes 50 MB parts, and the condition is asked at the end."""
    tar, other = os.urandom(1 << 20) * 210, os.urandom(1 << 20) * 205
    ends: list[str] = []
    parts: list[str] = []
    _, lose_once = lost_once()

    def busy(method: str, path: str) -> bool:
        ends.append(path)
        return sum(p.partition("?")[0].endswith("00002.tar") for p in ends) == 1 and "00002.tar" in path

    def lose(method: str, path: str) -> bool:
        parts.append(path)
        return lose_once(method, path)

    with bucket(lose=lose, busy=busy) as url:
        name = url.removeprefix("s3://")
        folder = begin(f"{url}/run/images")
        stats = folder.commit(2, {".tar": tar, ".parquet": b"p"}, STATS)
        assert sum("partNumber" in p for p in parts) >= 10, "in parts, and once more after the busy answer"
        assert verify_shard(folder.root, 2) == ""
        # A loser with other bytes, after and beside the winner.
        assert folder.commit(2, {".tar": other, ".parquet": b"q"}, STATS) == stats
        assert folder.commit(2, {".tar": tar, ".parquet": b"q"}, STATS) == stats
        assert verify_shard(folder.root, 2) == ""
        assert boto3.client("s3").list_multipart_uploads(Bucket=name).get("Uploads", []) == []
