"""Images of one's own as listings: what is found, with which captions, what damage is told, and what is read."""

from __future__ import annotations

import codecs
import datetime
import decimal
import errno
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ingest import locations, sources
from ingest.config import ColumnsConfig, SourceConfig
from ingest.errors import Rejected
from ingest.formats import read_schema
from ingest.listing import Wanted
from ingest.locations import Below, Reader
from ingest.sources import detect, refresh
from shards import storage
from shards.settings import ConfigError, StageError
from tests.objects import bucket


def picture(number: int, kind: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), number * 7 % 256, np.uint8)).save(sink, kind)
    return sink.getvalue()


def wanted(*columns: str, caption: str | None = None, **source: Any) -> Wanted:
    return Wanted(columns, ColumnsConfig(caption=caption), SourceConfig(**source))


def rows(root: str) -> list[dict[str, Any]]:
    names = sorted(n for n in storage.list_names(root) if n.endswith(".parquet"))
    return [row for n in names for row in storage.read_parquet(storage.join(root, n)).to_pylist()]


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- folders -----------------------------------------------------------------------------------------------


def test_images_at_any_depth_with_captions_beside_them(tmp_path) -> None:
    root = tmp_path / "photos"
    (root / "holiday" / "beach").mkdir(parents=True)
    (root / ".thumbnails").mkdir()
    (root / "a.jpg").write_bytes(picture(1))
    (root / "a.txt").write_text("\ufeffa red cat\non a mat\n")
    (root / "holiday" / "b.PNG").write_bytes(picture(2, "PNG"))
    (root / "holiday" / "b.caption").write_text("a boat")
    (root / "holiday" / "beach" / "c.webp").write_bytes(picture(3, "WEBP"))
    (root / "holiday" / "beach" / "c.json").write_text(json.dumps({"captions": ["sand", "sea"], "rating": 4}))
    (root / "holiday" / "d e#f.jpg").write_bytes(picture(4))
    (root / ".thumbnails" / "a.jpg").write_bytes(picture(5))
    (root / "notes.md").write_text("no picture")
    assert detect(str(root)) == "folder"
    listing = str(tmp_path / "listing")
    (said,) = refresh(listing, str(root), "folder", wanted("rating"))
    assert "1 of 4 images have no caption" in said
    found = {Path(r["place"]).name: r for r in rows(listing)}
    assert {n: r["caption"] for n, r in found.items()} == {
        "a.jpg": ["a red cat on a mat"],
        "b.PNG": ["a boat"],
        "c.webp": ["sand", "sea"],
        "d e#f.jpg": [],
    }
    assert found["c.webp"]["rating"] == 4
    assert found["a.jpg"]["rating"] is None
    reader = Reader(Below([str(root)]), 1 << 20)
    assert reader.read(found["d e#f.jpg"]["place"]) == picture(4)


def test_captions_as_windows_writes_them(tmp_path) -> None:
    for n, (name, data) in enumerate(
        {
            "a.txt": "größe".encode("utf-16"),  # what Notepad calls Unicode
            "b.txt": codecs.BOM_UTF16_BE + "größe".encode("utf-16-be"),
            "c.txt": "größe".encode("cp1252"),
            "d.txt": "\ufeffgröße".encode(),
            "e.TXT": "größe".encode(),
        }.items()
    ):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".JPG").write_bytes(picture(n))
    listing = str(tmp_path / ".listing")
    assert refresh(listing, str(tmp_path), "folder", wanted()) == []
    assert [r["caption"] for r in rows(listing)] == [["größe"]] * 5


def test_lines_or_the_folders_name_as_captions_by_choice(tmp_path) -> None:
    folder = tmp_path / "golden_retriever"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(picture(1))
    (folder / "2.jpg").write_bytes(picture(2))
    (folder / "2.txt").write_text("one\n\n two  words \n")
    for how, expected in (("lines", [[], ["one", "two words"]]), ("folder", [["golden retriever"], ["one two words"]])):
        listing = str(tmp_path / how)
        refresh(listing, str(folder), "folder", wanted(captions=how))
        assert [r["caption"] for r in rows(listing)] == expected


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_metadata_files_of_hugging_face(tmp_path, form) -> None:
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    table = [
        {"file_name": "1.jpg", "text": "one", "score": 0.5},
        {"file_name": "sub/2.jpg", "text": "two", "score": 1.5},
    ]
    (folder / "sub").mkdir()
    for number, row in enumerate(table, 1):
        (folder / row["file_name"]).write_bytes(picture(number))
    (folder / "1.txt").write_text("not this one")
    if form == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
    elif form == "csv":
        (folder / "metadata.csv").write_text("file_name,text,score\n1.jpg,one,0.5\nsub/2.jpg,two,1.5\n")
    else:
        pq.write_table(pa.Table.from_pylist(table), folder / "metadata.parquet")
    assert detect(str(tmp_path / "data")) == "folder"
    listing = str(tmp_path / "listing")
    assert refresh(listing, str(tmp_path / "data"), "folder", wanted("score")) == []
    assert [(r["caption"], r["score"]) for r in rows(listing)] == [
        (["one"], "0.5" if form == "csv" else 0.5),
        (["two"], "1.5" if form == "csv" else 1.5),
    ]


def test_metadata_that_is_no_table_is_one_sentence(tmp_path) -> None:
    (tmp_path / "1.jpg").write_bytes(picture(1))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.jpg"}\n{broken\n')
    with pytest.raises(ConfigError, match=r"metadata\.jsonl: cannot be read as a table of captions: line 2"):
        refresh(str(tmp_path / "listing"), str(tmp_path), "folder", wanted())


def test_a_folder_grows_and_loses_files_without_a_change_to_what_is_listed(tmp_path) -> None:
    folder, listing = tmp_path / "p", str(tmp_path / "listing")
    folder.mkdir()
    for n in (2, 4):
        (folder / f"{n}.jpg").write_bytes(picture(n))
        (folder / f"{n}.txt").write_text(str(n))
    refresh(listing, str(folder), "folder", wanted())
    first = Path(listing, "00000.parquet").read_bytes()
    assert refresh(listing, str(folder), "folder", wanted()) == []
    assert os.listdir(listing) == ["00000.parquet"]
    for n in (1, 3):
        (folder / f"{n}.jpg").write_bytes(picture(n))
        (folder / f"{n}.txt").write_text(str(n))
    (folder / "2.jpg").unlink()
    (said,) = refresh(listing, str(folder), "folder", wanted())
    assert "1 images that were listed are gone; those that are stored stay" in said
    assert Path(listing, "00000.parquet").read_bytes() == first
    assert [r["caption"] for r in rows(listing)] == [["2"], ["4"], ["1"], ["3"]]


def test_what_no_table_can_hold_ends_its_own_row_alone(tmp_path) -> None:
    """Half characters in JSON and in the names of files, numbers beyond all types, values of another type later."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, facts in (
        ("a", '{"caption": "half \\ud800", "score": 1, "nsfw": true}'),
        ("b", '{"caption": "b", "score": 1' + "0" * 400 + ', "nsfw": "no"}'),
        ("c", '{"caption": "c", "score": 1' + "0" * 30 + ', "nsfw": 0.5}'),
        ("d", '{"caption": "d", "score": NaN, "nsfw": false}'),
    ):
        (folder / f"{name}.jpg").write_bytes(picture(1))
        (folder / f"{name}.json").write_text(facts)
    odd = os.fsencode(folder) + b"/e\xff"
    Path(os.fsdecode(odd + b".jpg")).write_bytes(picture(2))
    Path(os.fsdecode(odd + b".txt")).write_text("e")
    listing = str(tmp_path / "listing")
    refresh(listing, str(folder), "folder", wanted("score", "nsfw"))
    found = rows(listing)
    assert [r["caption"] for r in found] == [["half ?"], ["b"], ["c"], ["d"], ["e"]]
    assert [r["score"] for r in found] == [1, None, None, None, None]
    assert [r["nsfw"] for r in found] == ["true", "no", "0.5", "false", None]
    assert [r["fault"] for r in found] == [None] * 4 + ["source_unreadable"]
    assert sources.is_listed(listing, str(folder), "folder")
    assert refresh(listing, str(folder), "folder", wanted("score", "nsfw")) == []
    # A column whose first part had yes and no alone stays of that type.
    other = str(tmp_path / "other")
    (folder / "b.json").unlink()
    (folder / "c.json").unlink()
    refresh(other, str(folder), "folder", wanted("nsfw"))
    (folder / "f.jpg").write_bytes(picture(3))
    (folder / "f.json").write_text('{"caption": "f", "nsfw": "UNLIKELY"}')
    refresh(other, str(folder), "folder", wanted("nsfw"))
    assert rows(other)[-1]["nsfw"] is None


def test_links_that_lead_nowhere_and_pipes_are_passed_by(tmp_path, caplog) -> None:
    folder = tmp_path / "own"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "loop").symlink_to("..")
    for name in ("a", "b", "c", "d"):
        (folder / f"{name}.jpg").write_bytes(picture(1))
    (folder / "a.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "b.txt")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "c.txt").symlink_to("sub/c.txt")
    (folder / "sub" / "c.txt").write_text("c")
    (folder / "d.txt").symlink_to("../secret.txt")
    (tmp_path / "secret.txt").write_text("what lies elsewhere")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    listing = str(tmp_path / "listing")
    refresh(listing, str(folder), "folder", wanted())
    assert [(Path(r["url"]).name, r["caption"]) for r in rows(listing)] == [
        ("a.jpg", []),
        ("b.jpg", []),
        ("c.jpg", ["c"]),
        ("d.jpg", []),
        ("gone.jpg", []),
    ]
    assert "a.txt: cannot be read (FileNotFoundError)" in caplog.text


# ---- bytes in tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["struct", "binary", "arrow"])
def test_bytes_in_a_column_are_read_row_by_row_in_any_order(tmp_path, form) -> None:
    images = [picture(n) for n in range(200)]
    images[17] = None
    texts = [f"caption {n}" for n in range(200)]
    if form == "binary":
        table = pa.table({"text": texts, "jpg": pa.array(images, pa.large_binary()), "n": list(range(200))})
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {
                "image": pa.array([{"bytes": i, "path": "x.jpg"} for i in images], kind),
                "text": texts,
                "n": list(range(200)),
            }
        )
    path = tmp_path / ("train.arrow" if form == "arrow" else "train.parquet")
    if form == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            for batch in table.to_batches(70):
                writer.write_batch(batch)
    else:
        pq.write_table(table, path, row_group_size=64)
    assert detect(str(tmp_path)) == "parquet"
    listing = str(tmp_path / "listing")
    assert refresh(listing, str(path), "parquet", wanted("n")) == []
    found = rows(listing)
    assert [r["caption"] for r in found] == [[t] for t in texts]
    assert [r["n"] for r in found] == list(range(200))
    reader = Reader(Below([str(tmp_path)]), 1 << 20)
    for n in (*range(16), 199, 3, 64, 63, 128, 0):
        assert reader.read(found[n]["place"]) == images[n]
    with pytest.raises(Rejected) as e:
        reader.read(found[17]["place"])
    assert e.value.code == "source_missing"
    with pytest.raises(Rejected) as e:
        reader.read(locations.value(str(path), "jpg" if form == "binary" else "image", 200))
    assert e.value.code == "source_missing"


@pytest.mark.parametrize("largest", [1 << 20, 20_000])
def test_large_images_in_a_column_take_little_memory(tmp_path, monkeypatch, largest) -> None:
    images = [bytes([n]) * 20_000 for n in range(250)]
    pages = {"data_page_size": 20_000, "write_batch_size": 1, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", **pages)
    reader = Reader(Below([str(tmp_path)]), largest)
    if largest > 20_000:
        monkeypatch.setattr(locations, "_BATCH_BYTES", 200_000)  # else fewer of the usual batches are kept
    before, most = pa.total_allocated_bytes(), 0
    for n, image in enumerate(images):
        assert reader.read(locations.value(str(tmp_path / "t.parquet"), "image", n)) == image
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 3_000_000, "of 5 MB"


def test_a_file_that_was_half_copied_is_taken_once_it_is_whole(tmp_path) -> None:
    own, listing = tmp_path / "own", str(tmp_path / "listing")
    own.mkdir()
    for n in (1, 2):
        pq.write_table(pa.table({"image": [picture(n)], "text": [f"picture {n}"]}), own / f"{n}.parquet")
    whole = (own / "2.parquet").read_bytes()
    (own / "2.parquet").write_bytes(whole[: len(whole) // 2])
    said = refresh(listing, str(own), "parquet", wanted())
    assert "2.parquet: cannot be read" in said[0]
    assert sources.is_listed(listing, str(own), "parquet")  # there is nothing to do until it changes
    (own / "2.parquet").write_bytes(whole)
    assert not sources.is_listed(listing, str(own), "parquet")
    assert refresh(listing, str(own), "parquet", wanted()) == []
    assert [r["caption"] for r in rows(listing)] == [["picture 1"], ["picture 2"]]
    assert sources.is_listed(listing, str(own), "parquet")
    pq.write_table(pa.table({"image": [picture(3)], "text": ["another"]}), own / "2.parquet")
    (told,) = refresh(listing, str(own), "parquet", wanted())
    assert "2.parquet: written again since listed" in told
    assert len(rows(listing)) == 2


def test_damage_within_a_parquet_file_is_told_and_the_rest_goes_on(tmp_path) -> None:
    def write(path: Path, first: int, **how: Any) -> None:
        captions = [f"picture {n}" for n in range(first, first + 4)]
        table = pa.table({"image": [picture(n) for n in range(4)], "text": captions})
        pq.write_table(table, path, row_group_size=2, **how)

    own = tmp_path / "own"
    own.mkdir()
    write(own / "a.parquet", 0)
    write(own / "b.parquet", 10)
    write(own / "c.parquet", 20)
    column = pq.read_metadata(own / "b.parquet").row_group(1).column(1)
    data = bytearray((own / "b.parquet").read_bytes())
    begin = column.dictionary_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (own / "b.parquet").write_bytes(data)
    listing = str(tmp_path / "listing")
    (said,) = refresh(listing, str(own), "parquet", wanted())
    assert "b.parquet: damaged behind row 2" in said
    there = [0, 1, 2, 3, 10, 11, 20, 21, 22, 23]
    assert [r["caption"] for r in rows(listing)] == [[f"picture {n}"] for n in there]
    write(own / "b.parquet", 10)  # from a copy
    assert refresh(listing, str(own), "parquet", wanted()) == []
    assert [r["caption"] for r in rows(listing)] == [[f"picture {n}"] for n in [*there, 12, 13]]


def test_damage_among_the_images_takes_those_of_its_row_group_alone(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [picture(n) for n in range(6)]}), path, row_group_size=2, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    reader = Reader(Below([str(tmp_path)]), 1 << 20)
    ends = []
    for row in range(6):
        try:
            ends.append(reader.read(locations.value(str(path), "image", row)) == picture(row))
        except (Rejected, OSError) as e:
            ends.append(type(e).__name__ if isinstance(e, OSError) else e.code)
    assert ends == [True, True, "OSError", "OSError", True, True]


def test_an_arrow_file_that_points_beyond_its_end_ends_its_rows_and_nothing_else(tmp_path) -> None:
    """Arrow takes the offsets of texts and bytes as they stand: to follow one ends the process."""
    table = pa.table({"image": [picture(n) for n in range(4)], "text": ["a caption" * 9] * 4})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 2)
    for column, end in (("image", len(picture(0)) + len(picture(1))), ("text", 162)):
        data = sink.getvalue()
        at = data.index(end.to_bytes(4, "little"))  # where the second of a batch ends
        (tmp_path / f"{column}.arrow").write_bytes(data[:at] + (1 << 30).to_bytes(4, "little") + data[at + 4 :])
    found = subprocess.run([sys.executable, "-c", _LISTED_AND_READ, tmp_path], capture_output=True, text=True)
    assert found.returncode == 0, found.returncode
    said, ends = json.loads(found.stdout)
    assert "text.arrow: damaged behind row 0" in said[0]
    assert ends == ["image", "source_damaged", "image", "image"]


_LISTED_AND_READ = """
import json, os, sys
from tests.ingest.test_sources import Below, Reader, Rejected, refresh, rows, wanted
root, ends = sys.argv[1], []
said = refresh(root + "/listing", root, "parquet", wanted())
for row in rows(root + "/listing"):
    try:
        ends.append("image" if Reader(Below([root]), 1 << 20).read(row["place"]) else "")
    except Rejected as e:
        ends.append(e.code)
print(json.dumps([said, ends]), flush=True)
os._exit(0)  # what a library does as it is unloaded is not what is looked at here
"""


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("error", [TimeoutError("away"), OSError(errno.EIO, "away")])
def test_a_store_that_is_away_while_a_table_is_listed_costs_no_file(
    tmp_path, monkeypatch: pytest.MonkeyPatch, after: int, error: OSError
) -> None:
    """A file that is left out is never looked at again until it changes: so the store's trouble must end the run."""
    table = pa.table({"image": [picture(n) for n in range(6)], "text": [f"image {n}" for n in range(6)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)

    class Away(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            Away.reads += 1
            if Away.reads > after:
                raise error
            return super().read(size)

    with monkeypatch.context() as patch:
        patch.setattr(
            sources.fsspec, "open", lambda file, _: SimpleNamespace(open=lambda: Away(Path(file).read_bytes()))
        )
        with pytest.raises(StageError, match=r"a\.parquet: cannot be reached .*away.*; run the same command again"):
            refresh(str(tmp_path / "listing"), str(tmp_path), "parquet", wanted())
    assert Away.reads == after + 1
    assert refresh(str(tmp_path / "listing"), str(tmp_path), "parquet", wanted()) == []
    assert [r["caption"] for r in rows(str(tmp_path / "listing"))] == [[f"image {n}"] for n in range(6)]


def test_a_table_that_may_not_be_read_is_left_out(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        pq.write_table(pa.table({"image": [picture(1)], "text": [name]}), tmp_path / f"{name}.parquet")
    real = sources.fsspec.open

    def refuse(file: str, mode: str) -> Any:
        if file.endswith("b.parquet"):
            raise PermissionError(errno.EACCES, "Permission denied", file)
        return real(file, mode)

    monkeypatch.setattr(sources.fsspec, "open", refuse)
    said = refresh(str(tmp_path / "listing"), str(tmp_path), "parquet", wanted())
    assert any("b.parquet: cannot be read" in line for line in said)
    assert [r["caption"] for r in rows(str(tmp_path / "listing"))] == [["a"]]


def test_a_parquet_file_whose_column_names_are_no_text_is_left_out(tmp_path) -> None:
    for name in ("a", "b"):
        pq.write_table(
            pa.table({"image": [picture(1)], "text": ["x"]}), tmp_path / f"{name}.parquet", store_schema=False
        )
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data.replace(b"text", b"te\xfft"))
    said = refresh(str(tmp_path / "listing"), str(tmp_path), "parquet", wanted())
    assert "b.parquet: cannot be read" in said[0]
    with pytest.raises(ConfigError, match=r"b\.parquet: cannot be read as a table"):
        read_schema(str(tmp_path / "b.parquet"), {})


def test_columns_of_any_type_are_kept_as_those_of_tables(tmp_path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"caf\xe9", b"x"], pa.binary()).buffers())
    table = pa.table(
        {
            "image": [picture(n) for n in range(3)],
            "text": pa.array([b"as bytes", b"caf\xe9", None]),
            "when": pa.array([datetime.datetime(2020, 1, 2)] * 3),
            "price": pa.array([decimal.Decimal("1.5")] * 3),
            "odd": bad,
            "tags": pa.array([["x"], [], None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    listing = str(tmp_path / "listing")
    assert refresh(listing, str(tmp_path), "parquet", wanted("when", "price", "odd", "tags")) == []
    found = rows(listing)
    assert [r["caption"] for r in found] == [["as bytes"], ["caf\xe9"], []]
    assert [r["odd"] for r in found] == ["ok", "caf\xe9", "x"]
    assert (found[0]["when"][:10], found[0]["price"], found[0]["tags"]) == ("2020-01-02", "1.5", '["x"]')


def test_a_table_of_urls_is_a_table_and_a_column_can_be_named(tmp_path) -> None:
    pq.write_table(pa.table({"url": ["http://a/1.jpg"], "caption": ["a"]}), tmp_path / "urls.parquet")
    assert detect(str(tmp_path)) == "table"
    (tmp_path / "x").mkdir()
    odd = tmp_path / "x" / "odd.parquet"
    pq.write_table(pa.table({"blob": pa.array([picture(1)], pa.binary()), "text": ["a"]}), odd)
    assert detect(str(odd)) == "table"
    with pytest.raises(ConfigError, match=r"set ingest.source.image_column; its columns are 'blob' \(binary\)"):
        refresh(str(tmp_path / "l1"), str(odd), "parquet", wanted())
    refresh(str(tmp_path / "l2"), str(odd), "parquet", wanted(image_column="blob"))
    assert Reader(Below([str(tmp_path)]), 1 << 20).read(rows(str(tmp_path / "l2"))[0]["place"]) == picture(1)


@pytest.mark.parametrize(("name", "sentence"), [("a.zip", "packed archive"), ("a.tar.gz", "packed archive")])
def test_archives_that_cannot_be_read_by_place_are_refused(tmp_path, name, sentence) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=sentence):
        detect(str(tmp_path / name))


def test_an_empty_folder_is_one_sentence(tmp_path) -> None:
    (tmp_path / "e").mkdir()
    with pytest.raises(ConfigError, match="there are no images in"):
        refresh(str(tmp_path / "l"), str(tmp_path / "e"), "folder", wanted())
    with pytest.raises(ConfigError, match="there is no file or folder"):
        detect(str(tmp_path / "nowhere"))


def test_everything_on_an_object_store(tmp_path) -> None:
    with bucket() as url:
        storage.write_atomic(f"{url}/photos/a.jpg", picture(1))
        storage.write_atomic(f"{url}/photos/a.txt", b"a boat")
        tar = make_tar(tmp_path / "0.tar", [("1.jpg", picture(2)), ("1.txt", b"one")])
        storage.write_atomic(f"{url}/tars/0.tar", tar.read_bytes())
        pq.write_table(
            pa.table({"image": pa.array([picture(3)], pa.binary()), "text": ["three"]}), tmp_path / "t.parquet"
        )
        storage.write_atomic(f"{url}/tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
        for folder, kind, caption, data in (
            ("photos", "folder", "a boat", picture(1)),
            ("tars", "webdataset", "one", picture(2)),
            ("tables", "parquet", "three", picture(3)),
        ):
            assert detect(f"{url}/{folder}") == kind
            listing = f"{url}/run/listing-{folder}"
            refresh(listing, f"{url}/{folder}", kind, wanted())
            (row,) = rows(listing)
            assert row["caption"] == [caption]
            assert Reader(Below([f"{url}/{folder}"]), 1 << 20).read(row["place"]) == data
            with pytest.raises(Rejected):
                Reader(Below([f"{url}/other"]), 1 << 20).read(row["place"])
            assert refresh(listing, f"{url}/{folder}", kind, wanted()) == []
