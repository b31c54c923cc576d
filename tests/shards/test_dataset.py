"""Commit, folders, manifest: what a reader may rely on, also after kills and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from shards import commit, local, storage
from shards.commit import Folder
from shards.dataset import Dataset, read_stats, read_stats_of, write_manifest
from shards.exclusions import write_exclusions
from shards.fingerprint import Fingerprint
from shards.listing import listed
from shards.made_with import MADE_WITH
from shards.settings import ConfigError, StageError
from shards.stats import born, born_of
from shards.verify import discard, verify, verify_shard

FILES = {".tar": b"tar bytes" * 100, ".parquet": b"parquet bytes"}
OTHER = {".tar": b"other tar" * 100, ".parquet": b"other parquet"}
STATS = {"rows": 2, "count": 2}


def made_with(**change) -> Fingerprint:
    return Fingerprint(**{"stage": "s", "version": 1, "settings": {"size": 64}, **change})


def folder(root, **change) -> Folder:
    return Folder.begin(str(root), made_with(**change), take_over=True)


def content(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


# ---- commit -----------------------------------------------------------------------------------------------------


def test_a_committed_shard_says_what_it_holds_and_leaves_nothing_beside(tmp_path):
    made = folder(tmp_path)
    assert made.adopt(0) is None
    stats = made.commit(0, FILES, STATS, input="abc")
    assert stats == read_stats(str(tmp_path), 0) == made.adopt(0)
    assert stats["files"][".tar"]["size"] == 900
    assert (stats["input"], stats["made_with"], stats["shard"]) == ("abc", made.id, 0)
    assert stats["born"] == born(stats) == born_of(stats["files"])
    assert verify_shard(str(tmp_path), 0) == ""
    assert sorted(content(tmp_path)) == ["00000.parquet", "00000.tar", "00000_stats.json", MADE_WITH]


def test_who_comes_second_with_other_bytes_is_told_the_firsts_and_changes_nothing(tmp_path):
    made = folder(tmp_path)
    first = made.commit(0, FILES, {**STATS, "who": 1})
    before = content(tmp_path)
    assert made.commit(0, OTHER, {**STATS, "who": 2}) == first
    # The same tar, and another sidecar: other rows failed.
    assert made.commit(0, {**FILES, ".parquet": b"more failures"}, {**STATS, "who": 3}) == first
    assert content(tmp_path) == before


def _commit_in_process(root: str, who: int) -> None:
    files = FILES if who % 3 else {name: data + bytes([who]) for name, data in FILES.items()}
    Folder.begin(root, made_with()).commit(0, files, {**STATS, "who": who})


def test_many_writers_at_once_with_other_bytes_leave_one_whole_shard(tmp_path):
    folder(tmp_path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_commit_in_process, args=(str(tmp_path), who)) for who in range(8)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 8
    assert verify_shard(str(tmp_path), 0) == ""


KILLED = """
import os, sys
from shards import storage
from shards.commit import Folder
from shards.fingerprint import Fingerprint
folder = Folder.begin(sys.argv[1], Fingerprint("s", 1, {"size": 64}))
left = int(sys.argv[2])
def dying(name):
    real = getattr(storage, name)
    def call(*args, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*args, **more)
    setattr(storage, name, call)
for name in ("create", "remove", "read_bytes"):
    dying(name)
folder.commit(0, {".tar": b"tar bytes" * 100, ".parquet": b"parquet bytes"}, {"rows": 2, "count": 2})
"""


@pytest.mark.parametrize("after", range(6))
def test_killed_before_any_operation_of_a_commit_what_is_stored_is_ended_and_not_made_again(tmp_path, after):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    folder(whole).commit(0, FILES, STATS)
    made = folder(torn)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(torn), str(after)], env=env, check=False)
    assert killed.returncode == (-9 if after < 5 else 0)
    tar = (torn / "00000.tar").exists()
    assert tar == (after >= 2)
    adopted = made.adopt(0)
    assert (adopted is not None) == tar
    if adopted is None:  # another fetch, with other bytes
        made.commit(0, OTHER, STATS)
    assert verify_shard(str(torn), 0) == ""
    assert (torn / "00000.tar").read_bytes() == (FILES if tar else OTHER)[".tar"]
    assert made.sweep() == (after in (1, 4))
    assert sorted(n for n in content(torn) if n.startswith(".new")) == []


def test_a_tar_that_nobody_wrote_a_small_file_for_is_named_and_left_alone(tmp_path):
    made = folder(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"somebody else's")
    with pytest.raises(StageError, match=r"00000\.tar: a file without those that belong to it"):
        made.adopt(0)
    with pytest.raises(StageError, match=r"00000\.tar"):
        made.commit(0, FILES, STATS)
    assert (tmp_path / "00000.tar").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 1}'])
def test_a_stats_file_of_others_is_no_commit_and_is_not_overwritten(tmp_path, text):
    made = folder(tmp_path)
    (tmp_path / "00000_stats.json").write_text(text)
    assert read_stats(str(tmp_path), 0) is None
    with pytest.raises(StageError, match="cannot be read, or is not of Carrara"):
        made.adopt(0)
    with pytest.raises(StageError, match=r"00000_stats.json: is not of the 00000.tar"):
        made.commit(0, FILES, STATS)
    assert (tmp_path / "00000_stats.json").read_text() == text


def test_who_created_the_tar_and_finds_the_stats_of_another_says_so(tmp_path):
    made = folder(tmp_path)
    made.commit(0, FILES, STATS)
    (tmp_path / "00000.tar").unlink()  # by hand, while a late writer is under way
    with pytest.raises(StageError, match=r"is not of the 00000\.tar that was created now"):
        made.commit(0, OTHER, STATS)


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_made_with_one_thing_and_says_what_changed(tmp_path):
    made = folder(tmp_path)
    assert folder(tmp_path).id == made.id
    made.commit(0, FILES, STATS)
    with pytest.raises(ConfigError, match=r"settings.size: 64 -> 32.*--redo.*another folder"):
        folder(tmp_path, settings={"size": 32})
    with pytest.raises(ConfigError, match=r"weights.vae: absent -> ffff"):
        folder(tmp_path, weights={"vae": "f" * 8})
    with pytest.raises(ConfigError, match=r"version: 1 -> 2"):
        folder(tmp_path, version=2)


def test_a_folder_in_which_no_shard_was_begun_may_be_made_with_something_else(tmp_path):
    root = tmp_path / "images"
    first = folder(root)
    assert folder(root, version=2).id != first.id
    assert os.listdir(tmp_path) == ["images"]
    with pytest.raises(StageError, match="set aside"):
        first.commit(0, FILES, STATS)
    with pytest.raises(ConfigError, match="version: 2 -> 1"):
        Folder.begin(str(root), made_with())  # a worker never does this


def test_redo_sets_the_folder_aside_and_only_where_something_changed(tmp_path):
    root = tmp_path / "images"
    first = folder(root)
    first.commit(0, FILES, STATS)
    before = content(root)
    for number in (1, 2):
        again = Folder.begin(str(root), made_with(version=1 + number), redo=True, take_over=True)
        assert again.id != first.id
        again.commit(0, OTHER, STATS)
        assert (tmp_path / f"images.replaced-{number}").is_dir()
    assert content(tmp_path / "images.replaced-1") == before
    same = Folder.begin(str(root), made_with(version=3), redo=True, take_over=True)
    assert same.id == again.id
    assert not (tmp_path / "images.replaced-3").exists()


@pytest.mark.parametrize("when", range(10))
def test_a_writer_of_before_a_redo_reaches_the_new_folder_at_no_moment(tmp_path, when, monkeypatch):
    """The folder is set aside before, or in the middle of, each of the writer's operations."""
    root = tmp_path / "images"
    zombie = folder(root)
    zombie.commit(1, OTHER, STATS)
    left = [when]

    def redo(real):
        def call(*args, **more):
            left[0] -= 1
            if left[0] == -1:
                monkeypatch.undo()
                Folder.begin(str(root), made_with(version=2), redo=True, take_over=True)
            return real(*args, **more)

        return call

    for module, name in ((storage, "create"), (storage, "remove"), (storage, "read_bytes"), (os, "link")):
        monkeypatch.setattr(module, name, redo(getattr(module, name)))
    try:
        zombie.commit(0, FILES, STATS)
        outcome = "committed"
    except StageError as e:
        outcome = str(e)
        assert "set aside" in outcome
    monkeypatch.undo()
    if when > 8:
        assert outcome == "committed"
        return
    new = [n for n in content(root) if n != MADE_WITH]
    assert new == [], outcome
    assert json.loads((root / MADE_WITH).read_text())["version"] == 2


@pytest.mark.parametrize(
    "files",
    [
        {
            "00000.tar": b"x",
            "00000.parquet": b"y",
            "00000_stats.json": b'{"count": 2, "successes": 2, "status_dict": {}}',
        },
        {"notes.txt": b"mine"},
        {"mine-000001.tar": b"x"},
        {"00007.tar": b"x"},
    ],
    ids=["img2dataset", "notes", "webdataset", "a tar"],
)
def test_a_folder_with_what_others_made_is_refused_and_nothing_in_it_changes(tmp_path, files):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    before = {n: (tmp_path / n).stat() for n in os.listdir(tmp_path)}
    for redo in (False, True):
        with pytest.raises(ConfigError) as error:
            Folder.begin(str(tmp_path), made_with(), redo=redo, take_over=True)
        assert min(files) in str(error.value)
        assert "Carrara did not make" in str(error.value)
    assert {n: (tmp_path / n).stat() for n in os.listdir(tmp_path)} == before


def test_a_worker_does_not_make_the_staging_folder_anew(tmp_path):
    made = folder(tmp_path)
    os.rmdir(tmp_path / f".new-{made.id}")
    worker = Folder.begin(str(tmp_path), made_with())
    with pytest.raises(StageError, match="set aside or deleted"):
        worker.commit(0, FILES, STATS)
    folder(tmp_path)  # the driver does
    worker.commit(0, FILES, STATS)


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "images").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as a folder"):
        folder(tmp_path / "images")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_made_with_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / MADE_WITH).write_text(text)
    with pytest.raises(ConfigError, match=r"made_with\.json: cannot be read"):
        folder(tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    made = folder(tmp_path)

    def full(fd):
        raise OSError(28, "No space left on device")

    before = content(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match="disk is full"):
        made.commit(0, FILES, STATS)
    monkeypatch.undo()
    assert content(tmp_path) == before
    made.commit(0, FILES, STATS)


def test_a_writer_that_is_another_users_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal tells it, also where /proc hides other users' processes."""
    name = local.temporary_name("a")
    number = f"-{os.getpid()}-"
    dead = name.replace(number, f"-{2**22 - 1}-")  # the highest that Linux gives, which no one has here
    assert not local.of_dead_process(name)
    assert local.of_dead_process(dead)

    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not local.of_dead_process(dead)


def test_temporaries_of_dead_writers_are_swept_and_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = local._host()
    (tmp_path / f".a.tmp-{host}-{dead.pid}-00").write_bytes(b"12345")
    (tmp_path / f".b.tmp-{host}-{os.getpid()}-00").write_bytes(b"12345")
    (tmp_path / ".c.tmp-elsewhere-1-00").write_bytes(b"12345")
    assert storage.sweep_temporaries(str(tmp_path)) == 5
    assert len(list(tmp_path.iterdir())) == 2
    assert storage.sweep_temporaries(str(tmp_path), older_than_s=-1) == 10


# ---- stores -----------------------------------------------------------------------------------------------------


def test_a_folder_without_links_is_refused_in_the_words_that_help(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", denied)
    with pytest.raises(
        ConfigError, match=r"files cannot be linked here; give the store's own address \(s3://, gs://\)"
    ):
        folder(tmp_path / "images")
    assert content(tmp_path) == {}


def test_exists_is_believed_once_it_is_seen(tmp_path, monkeypatch):
    """A link that says "exists" of a file that is not there: tried again, and then an error."""
    real, said, waited = os.link, [], []

    def busy(*args):
        said.append(1)
        if len(said) <= 2:
            raise FileExistsError
        real(*args)

    monkeypatch.setattr(os, "link", busy)
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    assert storage.create(str(tmp_path / "x"), b"1")
    assert waited == [0.05, 0.2]
    said[:] = [0] * -10
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(FileExistsError()))
    with pytest.raises(StageError, match="says that this file is there, and then that it is not"):
        storage.create(str(tmp_path / "y"), b"1")
    assert storage.create(str(tmp_path / "x"), b"2") is False
    assert (tmp_path / "x").read_bytes() == b"1"


# ---- manifest ---------------------------------------------------------------------------------------------------


def three(root) -> list[dict]:
    made = folder(root)
    files = [{".tar": bytes([i]) * (100 + i), ".parquet": b"p"} for i in range(3)]
    return [made.commit(i, files[i], {"rows": 3, "count": 2}) for i in range(3)]


def test_a_manifest_counts_names_the_commit_of_each_shard_and_deletes_nothing(tmp_path):
    stats = three(tmp_path)
    write_manifest(str(tmp_path), "images", iter(stats), {"funnel": {"rows": 9}})
    dataset = Dataset.open(str(tmp_path))
    assert (len(dataset), dataset.manifest["rows"], dataset.manifest["funnel"]) == (6, 9, {"rows": 9})
    assert [s.born for s in dataset.shards] == [s["born"] for s in stats]
    before = content(tmp_path)
    write_manifest(str(tmp_path), "images", stats[:2])
    assert len(Dataset.open(str(tmp_path)).shards) == 2
    assert {n: d for n, d in content(tmp_path).items() if n != "dataset.json"} == {
        n: d for n, d in before.items() if n != "dataset.json"
    }
    other = Dataset.open(str(tmp_path)).fingerprint
    assert other != dataset.fingerprint


def test_what_a_manifest_says_over_the_whole_run_may_be_worked_out_in_the_same_pass(tmp_path):
    stats, seen = three(tmp_path), []

    def folded():
        for s in stats:
            seen.append(s["shard"])
            yield s

    write_manifest(str(tmp_path), "images", folded(), lambda: {"seen": list(seen)})
    assert Dataset.open(str(tmp_path)).manifest["seen"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["00001.tar", "00001.parquet"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_manifest_is_not_written_over_files_that_are_gone_or_cut(tmp_path, name, damage):
    stats = three(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1]) if damage == "truncate" else path.unlink()
    with pytest.raises(StageError, match=name):
        write_manifest(str(tmp_path), "images", stats)
    assert not (tmp_path / "dataset.json").exists()
    assert [(i, name in text) for i, text in verify(str(tmp_path))] == [(1, True)]


def test_verify_finds_what_is_gone_cut_or_changed_and_discard_makes_room(tmp_path):
    three(tmp_path)
    assert list(verify(str(tmp_path), contents=True)) == []
    (tmp_path / "00002.tar").write_bytes(b"\x07" * 102)
    (tmp_path / "00001_stats.json").write_text("{}")
    assert [i for i, _ in verify(str(tmp_path))] == [1]
    found = dict(verify(str(tmp_path), contents=True))
    assert sorted(found) == [1, 2]
    assert "sha256" in found[2]
    assert "sha256" in verify_shard(str(tmp_path), 2)
    discard(str(tmp_path), 2)
    folder(tmp_path).commit(2, OTHER, STATS)
    assert verify_shard(str(tmp_path), 2) == ""


def test_a_shard_of_another_folder_is_no_part_of_a_manifest(tmp_path):
    """A stray stats file counts as a commit by its name: the id in it tells it apart."""
    three(tmp_path / "here")
    other = three(tmp_path / "there")
    with pytest.raises(StageError, match="shard 00000 was made for another folder"):
        write_manifest(str(tmp_path / "here"), "images", other)


def test_exclusions_that_belong_to_no_shard_are_refused(tmp_path):
    stats = three(tmp_path)
    line = pa.table({"shard": [7], "row": [0], "reason": ["x"], "winner": [-1]})
    with pytest.raises(StageError, match="excluded of shard 7"):
        write_manifest(str(tmp_path), "images", stats, None, write_exclusions(str(tmp_path), [line]))


def test_stats_are_read_many_at_once_in_the_order_asked_for(tmp_path):
    three(tmp_path)
    found = list(read_stats_of(str(tmp_path), [2, 7, 0]))
    assert [i for i, _ in found] == [2, 7, 0]
    assert found[1][1] is None
    assert found[0][1] == read_stats(str(tmp_path), 2)


def test_no_manifest_or_another_format_is_one_sentence(tmp_path):
    with pytest.raises(StageError, match="no finished dataset"):
        Dataset.open(str(tmp_path))
    (tmp_path / "dataset.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(StageError, match="format 2"):
        Dataset.open(str(tmp_path))


def test_replace_folder_publishes_whole_folders(tmp_path):
    final = tmp_path / "model"
    for text in ("one", "two"):
        tmp = local.temporary_folder(final)
        (tmp / "a").write_text(text)
        local.replace_folder(tmp, final)
        assert (final / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_packed_small_files_come_apart_again():
    small = [("00000.parquet", b"\n\n"), ("00000.x", b"")]
    assert commit.unpack(commit.pack(small, b"{}\n")) == (small, b"{}\n")


def test_shards_beyond_99_999_stay_in_the_order_of_their_numbers(tmp_path):
    """Their names have a digit more, so as texts they would come before the others."""
    made = folder(tmp_path)
    stats = [made.commit(i, FILES, STATS) for i in (100_000, 99_999, 7)]
    write_manifest(str(tmp_path), "images", stats)
    assert [s.name for s in Dataset.open(str(tmp_path)).shards] == ["00007", "99999", "100000"]
    assert listed(str(tmp_path)).committed.tolist() == [7, 99_999, 100_000]
    assert [i for i, _ in read_stats_of(str(tmp_path), [7, 99_999, 100_000])] == [7, 99_999, 100_000]
    assert list(verify(str(tmp_path), contents=True)) == []
