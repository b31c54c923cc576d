"""Tars as sources: which members are samples, and what damage, lies and half copies do."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ingest import sources
from ingest.locations import Below, Reader
from ingest.sources import detect, refresh
from shards.settings import ConfigError
from tests.ingest.test_sources import make_tar, picture, rows, wanted


def test_members_of_a_tar_are_read_by_their_places(tmp_path) -> None:
    members = [
        ("000.jpg", picture(1)),
        ("000.txt", b"a dog"),
        ("000.json", b'{"url": "http://x/1", "w": 5}'),
        ("d/001.png", picture(2, "PNG")),
        ("d/001.json", b'{"caption": "a cat", "w": 6}'),
        ("002.webp", picture(3, "WEBP")),
        ("002.cls", b"7"),
        ("003.jpeg", picture(4)),
    ]
    tar = make_tar(tmp_path / "00000.tar", members)
    assert detect(str(tmp_path)) == "webdataset"
    listing = str(tmp_path / "listing")
    assert refresh(listing, str(tar), "webdataset", wanted("w")) == []
    found = rows(listing)
    assert [r["caption"] for r in found] == [["a dog"], ["a cat"], ["7"], []]
    assert [r["w"] for r in found] == [5, 6, None, None]
    assert found[0]["url"] == "http://x/1"
    assert found[1]["url"] == found[1]["place"]
    reader = Reader(Below([str(tmp_path)]), 1 << 20)
    images = [data for name, data in members if sources.IMAGES.search(name)]
    assert [reader.read(r["place"]) for r in found] == images


def test_damaged_tars_are_told_and_the_rest_goes_on(tmp_path) -> None:
    whole = make_tar(
        tmp_path / "0.tar", [(f"{n}.{e}", picture(n) if e == "jpg" else b"x") for n in range(5) for e in ("jpg", "txt")]
    )
    data = whole.read_bytes()
    (tmp_path / "1-cut.tar").write_bytes(data[: 512 * 9 + 100])
    (tmp_path / "2-garbage.tar").write_bytes(data[: 512 * 5] + b"\xff" * 2048)
    make_tar(tmp_path / "3-missing.tar", [("a.txt", b"no image"), ("b.jpg", picture(1)), ("b.txt", b"b")])
    make_tar(tmp_path / "4-twice.tar", [("a.jpg", picture(1)), ("b.jpg", picture(2)), ("a.jpg", picture(3))])
    make_tar(tmp_path / "5-empty.tar", [])
    (tmp_path / "6-nothing.tar").write_bytes(b"")
    listing = str(tmp_path / "listing")
    said = "\n".join(refresh(listing, str(tmp_path), "webdataset", wanted()))
    assert "1-cut.tar: damaged behind member" in said
    assert "2-garbage.tar: damaged behind member" in said
    assert "3-missing.tar: 1 samples without an image" in said
    assert "4-twice.tar: 1 samples whose key came before" in said
    assert "5-empty.tar: no images" in said
    assert "6-nothing.tar: no images" in said
    by_tar: dict[str, list[dict]] = {}
    for row in rows(listing):
        by_tar.setdefault(row["url"].partition("#")[0].rpartition("/")[2], []).append(row)
    assert len(by_tar["0.tar"]) == 5
    assert 0 < len(by_tar["1-cut.tar"]) < 5
    assert [r["fault"] for r in by_tar["3-missing.tar"]] == ["source_missing", None]
    assert [r["fault"] for r in by_tar["4-twice.tar"]] == [None, None, "key_twice"]
    reader = Reader(Below([str(tmp_path)]), 1 << 20)
    for row in by_tar["1-cut.tar"] + by_tar["2-garbage.tar"]:
        if row["fault"] is None:
            assert Image.open(io.BytesIO(reader.read(row["place"]))).size == (20, 20)


def raw_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar's header with whatever size; tarfile itself writes a negative one as 256-base."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (raw_header("b.txt", -1024) + padded(b"b"), "a header that claims -1024 bytes"),  # leads back to itself
        (raw_header("x", 1 << 30, tarfile.XHDTYPE) + padded(b"9 path=x\n"), "a header that claims 1073741824 bytes"),
        (raw_header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME) + padded(b"b"), "a header that claims 1073741824 bytes"),
        (raw_header("x", 11, tarfile.XHDTYPE) + padded(b"11 size=-9\n") + raw_header("b.txt", 1) + padded(b"b"), ""),
        ((raw_header("x", 9, tarfile.XGLTYPE) + padded(b"9 path=x\n")) * 2000, ""),  # each calls for the next
    ],
)
def test_headers_that_lie_end_their_tar_and_nothing_else(tmp_path, odd: bytes, sentence: str) -> None:
    good = make_tar(tmp_path / "z.tar", [("a.jpg", picture(1)), ("a.txt", b"a")]).read_bytes()
    end = good.rindex(b"a" + bytes(511)) + 512
    (tmp_path / "0.tar").write_bytes(good[:end] + odd + good)
    listing = str(tmp_path / "listing")
    said = refresh(listing, str(tmp_path), "webdataset", wanted())
    assert "0.tar: damaged behind member 2" in said[0]
    assert sentence in said[0]
    assert [(Path(r["url"].partition("#")[0]).name, r["caption"]) for r in rows(listing)] == [
        ("0.tar", ["a"]),
        ("z.tar", ["a"]),
    ]


def test_a_sparse_member_is_no_image_and_the_rest_of_the_tar_is_taken(tmp_path) -> None:
    data = picture(1)
    head = bytearray(raw_header("b.jpg", len(data), tarfile.GNUTYPE_SPARSE))
    head[386:410] = b"%011o\0%011o\0" % (0, len(data))
    head[483:495] = b"%011o\0" % (1 << 32)  # what it would be, unpacked
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    good = make_tar(tmp_path / "0.tar", [("c.jpg", picture(3)), ("c.txt", b"c")]).read_bytes()
    (tmp_path / "0.tar").write_bytes(bytes(head) + padded(data) + raw_header("b.txt", 1) + padded(b"b") + good)
    listing = str(tmp_path / "listing")
    refresh(listing, str(tmp_path), "webdataset", wanted())
    assert [(r["caption"], r["fault"]) for r in rows(listing)] == [(["b"], "source_missing"), (["c"], None)]


def test_members_whose_names_are_not_utf_8_are_taken(tmp_path) -> None:
    make_tar(tmp_path / "0.tar", [("b\udcff.jpg", picture(2)), ("b\udcff.txt", b"b"), ("c\udcff.txt", b"c")])
    listing = str(tmp_path / "listing")
    refresh(listing, str(tmp_path), "webdataset", wanted())
    found = rows(listing)
    assert [(r["caption"], r["fault"]) for r in found] == [(["b"], None), (["c"], "source_missing")]
    assert Reader(Below([str(tmp_path)]), 1 << 20).read(found[0]["place"]) == picture(2)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_file_whose_name_is_not_utf_8_is_one_sentence(tmp_path, kind) -> None:
    suffix = ".tar" if kind == "webdataset" else ".parquet"
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + suffix.encode())).write_bytes(b"x")
    with pytest.raises(ConfigError, match="its name is not UTF-8; rename it"):
        refresh(str(tmp_path / "listing"), str(tmp_path), kind, wanted())


def test_links_and_folders_in_a_tar_are_no_samples(tmp_path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (
            ("a.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("b.jpg", tarfile.LNKTYPE, "x"),
            ("d", tarfile.DIRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    with pytest.raises(ConfigError, match=f"there are no images in '{path}'; {path}: no images in it"):
        refresh(str(tmp_path / "listing"), str(path), "webdataset", wanted())


def test_new_tars_are_added_and_one_that_was_written_again_keeps_its_rows(tmp_path) -> None:
    listing = str(tmp_path / "listing")
    make_tar(tmp_path / "b.tar", [("1.jpg", picture(1))])
    refresh(listing, str(tmp_path), "webdataset", wanted())
    make_tar(tmp_path / "a.tar", [("2.jpg", picture(2))])
    make_tar(tmp_path / "b.tar", [("3.jpg", picture(3)), ("4.jpg", picture(4))])
    (said,) = refresh(listing, str(tmp_path), "webdataset", wanted())
    assert "b.tar: written again since listed" in said
    assert [Path(r["place"].partition("#")[0]).name for r in rows(listing)] == ["b.tar", "a.tar"]
    (tmp_path / "a.tar").unlink()
    notes = refresh(listing, str(tmp_path), "webdataset", wanted())
    assert any("a.tar: gone; the images that are stored stay" in t for t in notes)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], [("txt", b"caption")]),
        ([], []),
        ([("json", b'{"width": 3}')], []),
        ([("npy", bytes(900))], []),
    ],
)
def test_a_tar_that_was_half_copied_gives_the_rest_once_it_is_whole(tmp_path, first, then) -> None:
    parts = [(f"{n}.{e}", d) for n in range(4) for e, d in [*first, ("jpg", picture(n)), *then]]
    whole = make_tar(tmp_path / "whole.tar", parts).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    refresh(str(tmp_path / "l"), str(tmp_path / "whole.tar"), "webdataset", wanted())
    expected = [(r["place"].partition("#")[2], r["caption"]) for r in rows(str(tmp_path / "l"))]
    assert len(expected) == 4
    for cut in (*range(0, end + 1, 512), 700, end - 1):
        own = tmp_path / str(cut)
        own.mkdir()
        make_tar(own / "0.tar", [("x.jpg", picture(9))])
        (own / "1.tar").write_bytes(whole[:cut])
        listing = str(own / "listing")
        refresh(listing, str(own), "webdataset", wanted())
        before = rows(listing)
        assert sources.is_listed(listing, str(own), "webdataset")
        (own / "1.tar").write_bytes(whole)
        for _ in range(2):
            assert refresh(listing, str(own), "webdataset", wanted()) == [], cut
        found = rows(listing)
        assert found[: len(before)] == before
        assert [(r["place"].partition("#")[2], r["caption"]) for r in found[1:]] == expected, cut
    # What is something else now is told of, once, and nothing of it is taken.
    (own / "2.tar").write_bytes(whole[:9000])
    refresh(listing, str(own), "webdataset", wanted())
    count = len(rows(listing))
    make_tar(own / "2.tar", [(f"new{n}.jpg", picture(n)) for n in range(9)])
    (said,) = refresh(listing, str(own), "webdataset", wanted())
    assert "2.tar: written again since listed" in said
    assert len(rows(listing)) == count
    assert sources.is_listed(listing, str(own), "webdataset")


def test_what_img2dataset_made_is_listed_with_the_urls_of_then(tmp_path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "00000.tar"), encoder=False) as tar:
        for n in range(3):
            meta = {"url": f"http://example.com/{n}.jpg", "caption": f"caption {n}", "width": 20, "similarity": 0.3 + n}
            tar.write(
                {
                    "__key__": f"{n:09d}",
                    "jpg": picture(n),
                    "txt": f"caption {n}".encode(),
                    "json": json.dumps(meta).encode(),
                }
            )
    listing = str(tmp_path / "listing")
    refresh(listing, str(tmp_path), "webdataset", wanted("similarity"))
    found = rows(listing)
    assert [r["url"] for r in found] == [f"http://example.com/{n}.jpg" for n in range(3)]
    assert [r["similarity"] for r in found] == [0.3, 1.3, 2.3]
