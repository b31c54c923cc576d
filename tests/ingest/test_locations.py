"""Places of images: which files may be read, how much of them, and their text form."""

from __future__ import annotations

import pytest

from ingest import locations
from ingest.errors import Rejected
from ingest.locations import Below, Location, Reader
from tests.ingest.test_sources import picture


def test_only_files_below_the_named_folders_are_read(tmp_path, monkeypatch) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "a.jpg").write_bytes(picture(1))
    (outside / "b.jpg").write_bytes(picture(2))
    (inside / "link.jpg").symlink_to(outside / "b.jpg")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "in2").mkdir()
    (tmp_path / "in2" / "c.jpg").write_bytes(picture(3))
    reader = Reader(Below([str(inside)]), 1 << 20)
    assert reader.read(f"{inside}/a.jpg") == reader.read(f"file://{inside}/a.jpg") == picture(1)
    for hostile in (
        f"{outside}/b.jpg",
        f"file://{outside}/b.jpg",
        f"{inside}/../out/b.jpg",
        f"{inside}/link.jpg",
        f"{inside}/folder/b.jpg",
        f"{tmp_path}/in2/c.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        f"local://{outside}/b.jpg",
        "s3://bucket/x.jpg",
        "gs://b/x",
        locations.member("/etc/passwd", "x", 0, 10),
        locations.value(f"{outside}/b.jpg", "image", 0),
        "memory://x",
        "ftp://h/x",
        f"simplecache::file://{outside}/b.jpg",
        "relative.jpg",
        "~/.ssh/id_rsa",
    ):
        with pytest.raises(Rejected) as e:
            reader.read(hostile)
        assert e.value.code == "place_refused", hostile
    # From within a folder every text is a path below it; fsspec would ask the host, or go out by a link, or to a home.
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(outside))
    reader = Reader(Below(["."]), 1 << 20)
    assert reader.read("a.jpg") == picture(1)
    for hostile in (
        "simplecache::http://127.0.0.1:9/x",
        f"simplecache::file://{outside}/b.jpg",
        f"file::{outside}/b.jpg",
        f"file:{outside}/b.jpg",
        "~/b.jpg",
        "file://~/b.jpg",
        "data:,b.jpg",
        "folder/b.jpg",
        "x://a.jpg",
        "a.jpg\0",
    ):
        with pytest.raises(Rejected) as e:
            reader.read(hostile)
        assert e.value.code == "place_refused", hostile


def test_sizes_are_bounded_before_anything_is_read(tmp_path, monkeypatch) -> None:
    (tmp_path / "big.jpg").write_bytes(b"x" * 5000)
    reader = Reader(Below([str(tmp_path)]), 4096)
    for location in (f"{tmp_path}/big.jpg", locations.member(f"{tmp_path}/big.jpg", "m", 0, 5000)):
        with pytest.raises(Rejected) as e:
            reader.read(location)
        assert e.value.code == "body_too_large"
    for location, code in (
        (locations.member(f"{tmp_path}/big.jpg", "m", 4000, 2000), "source_damaged"),
        (f"{tmp_path}/none.jpg", "source_missing"),
        (f"{tmp_path}", "source_missing"),
        ("", "source_missing"),
    ):
        with pytest.raises(Rejected) as e:
            reader.read(location)
        assert e.value.code == code


def test_places_come_back_from_text_whatever_the_names_hold() -> None:
    for tar, name in (("/a/b#c.tar", "x#&=%.jpg"), ("s3://b/k&offset=1&size=2.tar", "m"), ("/a b/ü.tar", "ü é.png")):
        found = Location.parse(locations.member(tar, name, 512, 99))
        assert (found.file, found.offset, found.size) == (tar, 512, 99)
        found = Location.parse(locations.value(tar, "im#age&row=3", 7))
        assert (found.file, found.column, found.row) == (tar, "im#age&row=3", 7)
    assert Location.parse("/x/y#z.jpg").file == "/x/y#z.jpg"
