"""Which shards are committed and which begun, from names alone, on a folder and on a store."""

from __future__ import annotations

import os

import pytest

from shards import storage
from shards.listing import listed, number_of
from tests.objects import bucket


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("00017.tar", (17, ".tar")),
        ("00017_stats.json", (17, "_stats.json")),
        ("123456.parquet", (123456, ".parquet")),
        ("100000_stats.json", (100000, "_stats.json")),
        ("0017.tar", None),
        ("000017.tar", None),
        ("00017", None),
        ("00017_stats.txt", None),
        ("mine-00017.tar", None),
        ("dataset.json", None),
        ("_stats.json", None),
        ("٠٠٠١٧.tar", None),
    ],
)
def test_a_name_is_a_shards_or_it_is_not(name, number):
    assert number_of(name) == number


NAMES = [
    "00000.tar",
    "00000.parquet",
    "00000_stats.json",  # committed
    "00001.tar",
    "00001.parquet",  # begun
    "00002.parquet",  # no large file: not begun
    "123456.tar",
    "123456_stats.json",
    "dataset.json",
    "notes.txt",
    "x00003.tar",
    "000003.tar",
]


@pytest.mark.parametrize("sizes", [False, True])
def test_a_folders_shards_on_a_file_system(tmp_path, sizes):
    for n, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(b"x" * n)
    os.mkdir(tmp_path / ".new-1")
    found = listed(str(tmp_path), sizes=sizes)
    assert (found.committed.tolist(), found.begun.tolist()) == ([0, 123456], [1])
    assert found.is_committed([0, 1, 2, 123456]).tolist() == [True, False, False, True]
    assert found.sizes.get(".tar", {}) == ({0: 0, 1: 3, 123456: 6} if sizes else {})
    assert listed(str(tmp_path / "none")).committed.tolist() == []


def test_the_same_on_an_object_store():
    with bucket() as url:
        root = f"{url}/run/images"
        assert listed(root).committed.tolist() == []
        for n, name in enumerate([*NAMES, ".new-1/00005-abc"]):
            storage.write_atomic(storage.join(root, name), b"x" * n)
        found = listed(root, sizes=True)
        assert (found.committed.tolist(), found.begun.tolist()) == ([0, 123456], [1])
        assert found.sizes[".tar"] == {0: 0, 1: 3, 123456: 6}
        assert 5 not in found.sizes[".tar"]
