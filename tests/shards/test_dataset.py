"""Commit, judge, manifest: what a reader may rely on, also after kills and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards import storage
from shards.dataset import Dataset, commit_shard, read_stats, shard_state, verify_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.settings import StageError
from shards.stage import Task

FILES = {".tar": b"tar bytes" * 100, ".parquet": b"parquet bytes"}


def fingerprint(**change) -> Fingerprint:
    return Fingerprint(**{"stage": "s", "version": 1, "settings": {"size": 64}, "input": "abc", **change})


def commit(root, files=FILES, **change):
    return commit_shard(str(root), 0, files, {"rows": 2, "count": 2}, fingerprint(**change))


def state(root, **change):
    return shard_state(str(root), Task(0, fingerprint(**change)))


def test_a_committed_shard_is_done_and_says_what_it_holds(tmp_path):
    assert state(tmp_path).state == "missing"
    stats = commit(tmp_path)
    assert state(tmp_path).state == "done"
    assert stats == read_stats(str(tmp_path), 0)
    assert stats["files"][".tar"]["size"] == 900
    assert verify_shard(str(tmp_path), 0) == ""


def test_another_input_is_redone_other_settings_are_stale_and_named(tmp_path):
    commit(tmp_path)
    assert state(tmp_path, input="abd").state == "input_changed"
    changed = state(tmp_path, settings={"size": 32})
    assert changed.state == "stale"
    assert "settings.size: 64 -> 32" in changed.reason
    assert state(tmp_path, settings={"size": 32}, input="abd").state == "stale"
    assert "weights" in state(tmp_path, weights={"vae": "f" * 64}).reason


@pytest.mark.parametrize("name", ["00000.tar", "00000.parquet"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_file_is_found_by_its_size(tmp_path, name, damage):
    commit(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1]) if damage == "truncate" else path.unlink()
    found = state(tmp_path)
    assert found.state == "damaged"
    assert name in found.reason
    commit(tmp_path, files=FILES)


def test_a_damaged_shard_is_made_whole_again(tmp_path):
    commit(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"x")
    commit(tmp_path)
    assert state(tmp_path).state == "done"
    assert (tmp_path / "00000.tar").read_bytes() == FILES[".tar"]


def test_a_changed_byte_is_found_by_verify(tmp_path):
    commit(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"T" + FILES[".tar"][1:])
    assert "sha256" in verify_shard(str(tmp_path), 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 1}'])
def test_an_unreadable_stats_file_is_no_commit(tmp_path, text):
    commit(tmp_path)
    (tmp_path / "00000_stats.json").write_text(text)
    assert state(tmp_path).state == "damaged"
    commit(tmp_path)
    assert state(tmp_path).state == "done"


def test_the_first_writer_wins(tmp_path):
    first = commit_shard(str(tmp_path), 0, FILES, {"rows": 2, "count": 2, "who": 1}, fingerprint())
    second = commit_shard(str(tmp_path), 0, FILES, {"rows": 2, "count": 2, "who": 2}, fingerprint())
    assert first == second == read_stats(str(tmp_path), 0)


def _commit_in_process(root: str, who: int) -> None:
    commit_shard(root, 0, FILES, {"rows": 2, "count": 2, "who": who}, fingerprint())


def test_many_writers_at_once_leave_one_whole_shard(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_commit_in_process, args=(str(tmp_path), who)) for who in range(8)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 8
    assert state(tmp_path).state == "done"
    assert sorted(os.listdir(tmp_path)) == ["00000.parquet", "00000.tar", "00000_stats.json"]


KILLED = """
from shards.dataset import commit_shard
from shards.fingerprint import Fingerprint
import sys
commit_shard(sys.argv[1], 0, {".tar": b"tar bytes" * 100, ".parquet": b"parquet bytes"}, {"rows": 2, "count": 2},
             Fingerprint(stage="s", version=1, settings={"size": 64}, input=sys.argv[2]))
"""


@pytest.mark.parametrize("point", ["before-data", "after.tar", "after.parquet", "before-stats", "after-stats"])
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_step_of_a_commit_the_next_run_ends_with_the_same_bytes(tmp_path, point, earlier):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    commit(whole)
    if earlier:  # the shard is being made again, over one of another input
        commit(torn, files={".tar": b"older", ".parquet": b"older too"}, input="older")
    env = {**os.environ, "CARRARA_FAULT": point, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(torn), "abc"], env=env, check=False)
    assert killed.returncode == -9
    assert (state(torn).state == "done") == (point == "after-stats")
    commit(torn)
    assert state(torn).state == "done"
    for name in os.listdir(whole):
        assert (torn / name).read_bytes() == (whole / name).read_bytes()


def test_temporaries_of_dead_writers_are_swept_and_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = storage._host()
    (tmp_path / f".a.tmp-{host}-{dead.pid}-00").write_bytes(b"12345")
    (tmp_path / f".b.tmp-{host}-{os.getpid()}-00").write_bytes(b"12345")
    (tmp_path / ".c.tmp-elsewhere-1-00").write_bytes(b"12345")
    assert storage.sweep_temporaries(str(tmp_path)) == 5
    assert len(list(tmp_path.iterdir())) == 2
    assert storage.sweep_temporaries(str(tmp_path), older_than_s=-1) == 10


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match="disk is full"):
        commit(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    commit(tmp_path)
    assert state(tmp_path).state == "done"


def test_manifest_counts_and_forgets_shards_of_a_longer_table(tmp_path):
    stats = [commit_shard(str(tmp_path), i, FILES, {"rows": 3, "count": 2}, fingerprint()) for i in range(3)]
    write_manifest(str(tmp_path), "images", stats, {"funnel": {"rows": 9}})
    dataset = Dataset.open(str(tmp_path))
    assert (len(dataset), dataset.manifest["rows"], dataset.manifest["funnel"]) == (6, 9, {"rows": 9})
    write_manifest(str(tmp_path), "images", stats[:2])
    assert len(Dataset.open(str(tmp_path)).shards) == 2
    assert not list(tmp_path.glob("00002*"))


def test_no_manifest_or_another_format_is_one_sentence(tmp_path):
    with pytest.raises(StageError, match="no finished dataset"):
        Dataset.open(str(tmp_path))
    (tmp_path / "dataset.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(StageError, match="format 1"):
        Dataset.open(str(tmp_path))


def test_replace_folder_publishes_whole_folders(tmp_path):
    final = tmp_path / "model"
    for text in ("one", "two"):
        tmp = storage.temporary_folder(final)
        (tmp / "a").write_text(text)
        storage.replace_folder(tmp, final)
        assert (final / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
