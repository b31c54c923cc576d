"""Tables of every format cut into ranges: together the ranges are the table, whatever wrote and compressed it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import formats
from ingest.config import ColumnsConfig
from ingest.formats import Cursor
from ingest.stage import IngestStage
from ingest.tables import HeldoutRule, Layout, TableSource, read_layout, read_range
from shards.plan import Line
from shards.settings import ConfigError
from tests.ingest.conftest import make_config, run
from tests.ingest.site import Site, image_bytes

TEXTS = [
    "plain",
    'comma, "quoted"',
    "two\nlines",
    "",
    "é ф 画",
    '5" disk',
    "tab\there",
    "null",
    "  spaces  ",
    '"',
    '""',
]


def shard_ranges(layout: Layout, size: int) -> Iterator[Line]:
    """The table in ranges, as its first planning makes them."""
    for file in layout.files:
        for _, r in TableSource(layout, size).ranges(file, {"train": ()}):
            yield Line(0, file, r.start, r.stop, r.rows, r.digest)


def rows_of(n: int) -> dict[str, list[Any]]:
    return {
        "url": [f"http://host/{i}?a,b" for i in range(n)],
        "caption": [TEXTS[i % len(TEXTS)] + f" {i}" for i in range(n)],
        "score": [i / 7 for i in range(n)],
        "id": [2**53 + 1 + i for i in range(n)],
    }


def write(folder: Path, rows: dict[str, list[Any]], kind: str) -> Path:
    path = folder / f"table.{kind}"
    base = kind.removesuffix(".gz")
    if base == "parquet":
        pq.write_table(pa.table(rows), path, row_group_size=7)
        return path
    sink = io.StringIO(newline="")
    if base == "jsonl":
        for values in zip(*rows.values(), strict=True):
            sink.write(json.dumps(dict(zip(rows, values, strict=True)), ensure_ascii=False) + "\n")
    else:
        writer = csv.writer(
            sink, delimiter="\t" if base == "tsv" else ",", lineterminator="\r\n" if base == "tsv" else "\n"
        )
        writer.writerows([list(rows), *zip(*rows.values(), strict=True)])
    data = sink.getvalue().encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "csv.gz", "jsonl.gz"])
@pytest.mark.parametrize("block", [64, 4 << 20])
def test_ranges_read_back_as_the_table(tmp_path: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", block)
    rows = rows_of(53)
    path = write(tmp_path, rows, kind)
    layout = read_layout(str(path), ColumnsConfig(), ["score", "id"])
    ranges = list(shard_ranges(layout, 10))
    assert [r.rows for r in ranges] == [10, 10, 10, 10, 10, 3]
    cursor = Cursor()
    order = [3, 0, 5, 1, 4, 2]
    parts = {i: read_range(layout, ranges[i], cursor=cursor) for i in order}
    cursor.close()
    assert pa.concat_tables([parts[i] for i in range(6)]).to_pydict() == rows


def test_the_digest_is_of_the_rows_not_of_the_file(tmp_path: Path) -> None:
    digests = set()
    for i, kind in enumerate(["parquet", "csv", "tsv", "jsonl", "jsonl.gz"]):
        (tmp_path / str(i)).mkdir()
        layout = read_layout(str(write(tmp_path / str(i), rows_of(30), kind)), ColumnsConfig(), ["score", "id"])
        digests.add(tuple(r.digest for r in shard_ranges(layout, 8)))
    assert len(digests) == 1
    for name in ("url", "caption", "score", "id"):
        rows = rows_of(30)
        rows[name][9], rows[name][10] = rows[name][10], rows[name][9]
        layout = read_layout(str(write(tmp_path, rows, "parquet")), ColumnsConfig(), ["score", "id"])
        changed = [r.digest for r in shard_ranges(layout, 8)]
        (before,) = digests
        assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, True, True]


field = st.text(alphabet='ab",\n\r é', max_size=6)


@settings(max_examples=40)
@given(st.lists(st.tuples(field, field), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 40))
def test_csv_is_cut_where_arrow_cuts_it(rows: list[tuple[str, str]], per_shard: int, block: int) -> None:
    """Any quoted CSV, in blocks of any size, gives the rows that pyarrow reads from the whole."""
    sink = io.StringIO(newline="")
    csv.writer(sink, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("url", "caption"), *rows])
    data = sink.getvalue().encode()
    whole = pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types={"url": pa.string(), "caption": pa.string()}),
    )
    found, ends = [], []
    before, formats.BLOCK_BYTES = formats.BLOCK_BYTES, block
    try:
        header = len(b'"url","caption"\n')
        for chunk, places in formats._records(io.BytesIO(data), "x.csv", header, None, b","):
            columns = formats._parse_csv(chunk, "x.csv", ["url", "caption"], ["url", "caption"])
            found += list(zip(columns["url"].to_pylist(), columns["caption"].to_pylist(), strict=True))
            ends += places.tolist()
    finally:
        formats.BLOCK_BYTES = before
    decoded = [tuple(None if v is None else v.decode() for v in row) for row in found]
    assert [tuple(v or "" for v in row) for row in decoded] == list(
        zip(whole["url"].to_pylist(), whole["caption"].to_pylist(), strict=True)
    )
    assert len(ends) == len(rows)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(data)


def test_unquoted_quotes_and_blank_lines_are_read_as_arrow_reads_them(tmp_path: Path) -> None:
    text = 'url,caption\nhttp://a,5" disk\n\nhttp://b,"two\n\nlines ""x"""\r\nhttp://c,it"s\n\r\nhttp://d,end'
    path = tmp_path / "t.csv"
    path.write_text(text, newline="")
    layout = read_layout(str(path), ColumnsConfig(), [])
    tables = [read_range(layout, r) for r in shard_ranges(layout, 1)]
    options = pa.csv.ParseOptions(newlines_in_values=True)
    assert pa.concat_tables(tables).to_pydict() == pa.csv.read_csv(path, parse_options=options).to_pydict()
    assert len(tables) == 4


@pytest.mark.parametrize(
    ("names", "url", "caption"),
    [
        (["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"], "URL", "TEXT"),
        (["url", "caption", "width", "height", "similarity", "punsafe"], "url", "caption"),
        (["id", "url", "text", "width", "height", "image_phash"], "url", "text"),
        (["uid", "url", "text", "original_width", "original_height", "sha256"], "url", "text"),
        (["url", "top_caption", "all_captions", "all_similarities"], "url", "top_caption"),
    ],
)
def test_known_families_are_recognised(tmp_path: Path, names: list[str], url: str, caption: str) -> None:
    for change in (str, str.lower, str.upper):
        path = tmp_path / "t.parquet"
        pq.write_table(pa.table({change(n): [n] for n in names}), path)
        layout = read_layout(str(path), ColumnsConfig(), [])
        assert read_range(layout, next(iter(shard_ranges(layout, 5)))).to_pydict() == {
            "url": [url],
            "caption": [caption],
        }


def test_folders_globs_and_dirty_values(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pq.write_table(
            pa.table(
                {
                    "url": pa.array([f"{name}{i}" for i in range(5)]).dictionary_encode(),
                    "caption": pa.array(
                        [f"x{i}".encode() + (b"\xc3\xa9\xff", b"\xe9")[i % 2] * (i > 1) for i in range(5)], pa.binary()
                    ),
                    "tags": [["p", "q"], None, [], ["r"], ["s"]],
                    "width": pa.array([1, 2, None, 4, 5], pa.int32()),
                }
            ),
            tmp_path / f"{name}.parquet",
        )
    for name in ("notes.txt", "_metadata.parquet", "._a.parquet"):
        (tmp_path / name).write_text("not a table")
    for table in (str(tmp_path), str(tmp_path / "*.parquet")):
        layout = read_layout(table, ColumnsConfig(), ["tags", "WIDTH"])
        parts = [read_range(layout, r) for r in shard_ranges(layout, 3)]
        assert [p.num_rows for p in parts] == [3, 2, 3, 2]  # no shard spans two files
        assert parts[0].to_pydict() == {
            "url": ["a0", "a1", "a2"],
            "caption": ["x0", "x1", "x2é\ufffd"],
            "tags": ['["p", "q"]', None, "[]"],
            "width": [1, 2, None],
        }
        assert parts[1]["caption"].to_pylist() == ["x3é", "x4é\ufffd"]  # no UTF-8 at all: Windows-1252


def rows_read(table: Path, columns: dict[str, Any] | None = None, wanted: Any = (), **more: Any) -> list[Any]:
    layout = read_layout(str(table), ColumnsConfig.model_validate(columns or {}), wanted, **more)
    return [row for place in shard_ranges(layout, 2) for row in read_range(layout, place).to_pylist()]


def test_lists_of_urls_and_tables_without_captions(tmp_path: Path) -> None:
    urls = [f"http://host/{i} a" for i in range(5)]
    (tmp_path / "list.txt").write_text("\n".join(urls[:3]) + "\r\n\n" + "\n".join(urls[3:]))
    (tmp_path / "list.txt.gz").write_bytes(gzip.compress("\n".join(urls).encode()))
    (tmp_path / "t.csv").write_text("url\n" + "\n".join(urls))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"url": u}) + "\n" for u in urls))
    pq.write_table(pa.table({"url": urls}), tmp_path / "t.parquet")
    for name in ("list.txt", "list.txt.gz", "t.csv", "t.jsonl", "t.parquet"):
        assert rows_read(tmp_path / name, captionless=True) == [{"url": u, "caption": None} for u in urls], name


def test_odd_columns_and_names_of_files(tmp_path: Path) -> None:
    twice = pa.table([["a"], ["b"], ["c"], [1], [2]], ["url", "caption", "caption", "width", "width"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match=r"'caption', which .* has 2 times"):
        rows_read(tmp_path / "twice.parquet")
    pq.write_table(twice.select([0, 1, 3, 4]), tmp_path / "sizes.parquet")
    assert rows_read(tmp_path / "sizes.parquet", welcome=("width",)) == [{"url": "a", "caption": "b"}]
    name = tmp_path / "part [1]*.jsonl"
    name.write_text('{"url":"a","caption":"b","n":1}\n{"url":"a","caption":"b","n":99999999999999999999}\n')
    assert [r["n"] for r in rows_read(name, wanted=["n"])] == ["1", "99999999999999999999"]
    latin = tmp_path / "latin.csv"
    latin.write_bytes("url,caption,prénom\nhttp://a/1,café,x\n".encode("latin-1"))
    assert rows_read(latin, wanted=["prénom"]) == [{"url": "http://a/1", "caption": "café", "prénom": "x"}]
    folder = tmp_path / "kinds"
    folder.mkdir()
    for i, values in enumerate([[1, 2], [1.5, 2.5]]):
        pq.write_table(pa.table({"url": ["a", "b"], "caption": ["c", "d"], "n": values}), folder / f"{i}.parquet")
    with pytest.raises(ConfigError, match=r"1\.parquet: column 'n' is not int64 .* set its type"):
        rows_read(folder, wanted=["n"])
    assert [r["n"] for r in rows_read(folder, {"types": {"n": "float"}}, ["n"])] == [1.0, 2.0, 1.5, 2.5]
    with pytest.raises(ConfigError, match="cannot be opened"):
        read_layout("nosuch://bucket/t.csv", ColumnsConfig(), [])


@pytest.mark.parametrize(
    ("files", "columns", "wanted", "sentence"),
    [
        ({}, {}, [], "there is no file or folder"),
        ({"t.json": "{}"}, {}, [], "ends in none of"),
        ({"t.txt": "http://a"}, {}, [], "empty_captions to keep"),
        ({"t.csv": ""}, {}, [], "t.csv: it is empty"),
        ({"t.csv": "u\0r\0l\0,\0"}, {}, [], "in UTF-8"),
        ({"t.jsonl": "[" * 100_000}, {}, [], "not one JSON object a line"),
        (
            {"t.jsonl": '{"url":"a","caption":"b","n":1}\n' + '{"n":99999999999999999999}\n'},
            {"types": {"n": "int"}},
            ["n"],
            "not int64",
        ),
        ({"t.jsonl": '{"url":"a","caption":"b"}\n{"url":"a","capt'}, {}, [], "not one JSON object a line"),
        ({"t.csv": "link,caption\n"}, {}, [], "set ingest.columns.url to one of link, caption"),
        ({"t.csv": "url,words\n"}, {}, [], "set ingest.columns.caption to one of url, words"),
        ({"t.csv": "url,caption\n"}, {"url": "uri"}, [], "ingest.columns.url is 'uri', which .* url, caption"),
        ({"t.csv": "url,caption\n"}, {}, ["score"], "names the column 'score', which .* url, caption"),
        ({"t.csv": "url,caption\na,b,c\n"}, {}, [], "cannot be read"),
        ({"t.csv": 'url,caption\na,"b\n'}, {}, [], "never closed"),
        ({"t.csv": "url,url\n"}, {}, [], "each once"),
        ({"t.jsonl": '{"url":"a","caption":"b"}\n[1]\n'}, {}, [], "not one JSON object a line"),
        ({"t.parquet": "PAR1 no"}, {}, [], "cannot be read as a table"),
        ({"t.csv.gz": "not gzip"}, {}, [], "cannot be read"),
        ({"a.csv": "url,caption\na,b\n", "b.csv": "url,text\na,b\n"}, {}, [], "b.csv: has no column caption"),
        ({"t.csv": "url,caption,n\n" + "a,b,1\n" * 9 + "a,b,x\n"}, {"types": {"n": "int"}}, ["n"], "is not int64"),
        ({"t.csv": "url,caption\n"}, {"types": {"m": "int"}}, [], "has no column 'm'"),
    ],
)
def test_a_table_that_cannot_be_used_gives_one_sentence(
    tmp_path: Path, files: dict[str, str], columns: dict[str, Any], wanted: list[str], sentence: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    table = tmp_path if len(files) > 1 else tmp_path / next(iter(files), "none.csv")

    def every_row() -> None:
        layout = read_layout(str(table), ColumnsConfig.model_validate(columns), wanted)
        list(shard_ranges(layout, 4))

    with pytest.raises(ConfigError, match=sentence) as caught:
        every_row()
    assert "\n" not in str(caught.value)


def test_the_planner_needs_no_memory_for_the_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    n = 100_000
    table = pa.table({"url": [f"http://a/{i}" for i in range(n)], "caption": ["c" * 60] * n})
    pq.write_table(table, path, row_group_size=10_000)
    layout = read_layout(str(path), ColumnsConfig(), [])
    before = pa.total_allocated_bytes()
    peak = rows = 0
    for r in shard_ranges(layout, 1000):
        peak = max(peak, pa.total_allocated_bytes() - before)
        rows += r.rows
    assert rows == n
    assert peak < table.nbytes / 3


def test_of_a_list_of_captions_the_first_is_the_caption(site: Site, tmp_path: Path) -> None:
    """As COCO and Flickr have them on the hub; all of them go on in a column of their own."""
    captions = [["", "a dog", "a hound"], ["a cat"], [], None]
    urls = [site.add(f"/{i}.png", image_bytes(i)) for i in range(4)]
    pq.write_table(
        pa.table({"url": urls, "caption": pa.array(captions, pa.list_(pa.string()))}), tmp_path / "t.parquet"
    )
    with open(tmp_path / "t.jsonl", "w") as f:
        f.writelines(json.dumps({"url": u, "caption": c}) + "\n" for u, c in zip(urls, captions, strict=True))
    for kind in ("parquet", "jsonl"):
        stage = IngestStage(make_config(tmp_path / f"t.{kind}"), str(tmp_path / kind / "images"))
        manifest = run(stage)
        assert manifest["filtered_by"]["no caption"] == 2
        rows = pq.read_table(tmp_path / kind / "images" / "00000.parquet").to_pylist()
        assert [r["caption"] for r in rows] == ["a dog", "a cat", "", ""]
        assert [json.loads(r["captions"] or "null") for r in rows] == captions
    # One caption is on one side of the split, whether it stands alone or first in a list.
    alone = pa.record_batch({"caption": pa.array(["a dog", "a cat"])})
    lists = pa.record_batch({"caption": pa.array(['["a dog", "x"]', '[" A  cat"]'])})
    for seed in range(8):
        a, b = (HeldoutRule(0.5, seed, ("whitespace",), lists=of) for of in (False, True))
        assert a(alone).tolist() == b(lists).tolist()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_lists_of_captions_and_plain_ones_in_one_table(site: Site, tmp_path: Path, kind: str) -> None:
    """Texts beside lists are captions as they stand; lists beside texts have no place, and are refused."""

    def write(folder: Path, name: str, captions: list[Any]) -> None:
        folder.mkdir(exist_ok=True)
        rows = [{"url": site.add(f"/{name}{i}.png", image_bytes(i)), "caption": c} for i, c in enumerate(captions)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    plain = ["a cat", "1984", "null", "[" * 100_000]
    write(tmp_path / "a", "0", [["a dog", "a hound"]])
    stage = IngestStage(make_config(tmp_path / "a", captions=[]), str(tmp_path / "run" / "images"))
    run(stage)
    write(tmp_path / "a", "1", plain)
    run(stage)
    rows = pq.read_table(tmp_path / "run" / "images" / "00001.parquet").to_pylist()
    assert [(r["status"], r["caption"]) for r in rows] == [("success", c) for c in plain]

    write(tmp_path / "b", "0", plain)
    stage = IngestStage(make_config(tmp_path / "b", captions=[]), str(tmp_path / "run2" / "images"))
    run(stage)
    write(tmp_path / "b", "1", [["a dog", "a hound"]])
    with pytest.raises(ConfigError, match=rf"b/1\.{kind}: the column 'caption' holds lists of captions"):
        run(stage)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"image": pa.array([{"bytes": b"x", "path": "a"}]), "text": ["a"]},
            "'image' holds struct<bytes: binary.*ingest.source.kind: parquet",
        ),
        (
            {"jpg": pa.array([b"x"]), "txt": ["a"]},
            "'jpg' holds binary: if these are images, set ingest.source.kind: parquet",
        ),
        ({"url": pa.array([b"x"], pa.binary()), "caption": ["a"]}, "the column 'url' holds binary, not URLs"),
        (
            {"url": ["http://a/b"], "caption": pa.array([{"en": "a"}])},
            "the column 'caption' holds struct.*, not captions",
        ),
    ],
)
def test_pictures_in_a_table_are_refused_with_a_sentence(
    tmp_path: Path, columns: dict[str, Any], sentence: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=sentence):
        read_layout(str(tmp_path), ColumnsConfig(), [])


def test_a_folder_of_captions_is_no_list_of_urls(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("a red ball, on grass\n")
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"begins with 'a red ball, on grass'; give ingest.table a table of URLs"):
        read_layout(str(tmp_path), ColumnsConfig(), [], captionless=True)


@pytest.mark.parametrize("heldout", [0.0, 0.5])
def test_a_table_without_rows_is_a_configuration_that_cannot_be_used(tmp_path: Path, heldout: float) -> None:
    (tmp_path / "t.csv").write_text("url,caption\n")
    stage = IngestStage(make_config(tmp_path / "t.csv", heldout_fraction=heldout), str(tmp_path / "run" / "images"))
    with pytest.raises(ConfigError, match="the table has no rows"):
        stage.begin()


def test_yamls_no_is_a_mode() -> None:
    assert make_config("t.csv", resize_mode=False).resize_mode == "no"
