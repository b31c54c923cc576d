"""Mutations of a seed corpus against everything that reads what strangers wrote.

    python -m tests.ingest.fuzz                              every target, 2,000 cases each (as CI does)
    python -m tests.ingest.fuzz images --cases 1000000       one target
    python -m tests.ingest.fuzz urls --seed 7 --case 12345   one case again, with its traceback

A case is a function of the target, the seed and its number. It fails where anything else is raised than what the
target may raise (Rejected for what belongs to a row, ConfigError for a table), or where it takes longer than its
target may, of CPU: what is looked at within the event loop a twentieth of a second. The alphabets hold what URLs,
headers and formats are told apart by, or the mutations would hardly ever meet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import io
import json
import math
import os
import random
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpResponseParser
from multidict import CIMultiDict
from PIL import Image
from protego import Protego

from ingest import fetch, formats, listing, locations, sources
from ingest.bodies import inflater
from ingest.config import ColumnsConfig, FetchConfig, OptOutConfig, SourceConfig
from ingest.errors import Rejected
from ingest.headers import header_size
from ingest.optout import robots_txt_refuses, rules_in
from ingest.pixels import PixelSettings, is_quick, process
from ingest.takedown import TakenDown, url_digest
from ingest.urls import parse_url, redirect
from shards.settings import ConfigError
from tests.ingest.site import image_bytes

CASES = 2_000
IN_LOOP, ASIDE = 0.05, 1.0  # seconds of CPU that a case may take
TRIES = 3  # the least counts: a walk of the garbage collector is nothing that the case does
LONG = 1 << 15  # letters of a long text

URLS = [
    "http://example.com/a.jpg",
    "https://user:pw@h.example:8080/p%20q/x.png?a=b%2Cc&d=#f",
    "http://[::1]:80/x",
    "http://][@",
    "http://a@",
    "http://*[::1]0\x7f+[`@\xa0",
    "//h/x",
    "/a/../b?c",
    "../x",
    "?q",
    "#f",
    "HTTP://É.com:/",
    "http://2130706433/",
    "http://0x7f.1/",
    "file:///etc/passwd",
    "data:image/png;base64,AA",
    "http:g",
    "http://[v1.x]/",
    "http://[fe80::1%25eth0]/",
    "http://xn--a.com/",
    "http://a。b/",
    "https://i.example/736x/0a/1b/2c.jpg",
]
URL_ALPHABET = "][@:/?#\\%.-_~0x1aZé。ß１½ \t\r\n\x00\x7f\xa0\u200b\u202e\ud800\udce9<>{}|^`\"'&=+;,"
HEADERS = [
    "noai, noindex",
    "img2dataset: noai",
    "unavailable_after: 25 Jun 2010 15:00:00 PST, noai",
    "max-snippet:20, none",
    "a:b:c:d, noai;noml",
    "1",
    "0, 1",
    "120",
    "Wed, 21 Oct 2015 07:28:00 GMT",
    "-1",
    "9" * 40,
    "gzip",
    "deflate, br",
    "x-gzip",
    "http://h/x",
    "bytes",
    "",
    "*: none",
    "carrara/1.0: noimageai",
    ": ,:",
    "Wed, 99 Foo 99999 99:99:99 +9999",
]
HEADER_ALPHABET = ",:;=\"'/*- \t0123456789noaiimgnexdcrla\x00\x7fé\ud800²"
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 302 Found\r\nLocation: http://][@/x.jpg\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.0 200\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nL: x\r\n\r\nHTTP/1.1 203 OK\r\nX-Robots-Tag: noai\r\nTDM-Reservation: 1\r\n\r\n",
    b'HTTP/1.1 429 No\r\nRetry-After: Wed, 21 Oct 2015 07:28:00\r\nSet-Cookie: "\xff;;;=\r\nContent-Length: 0\r\n\r\n',
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\nContent-Length: 21\r\n\r\n\x1f\x8b\x08\0",
]
ROBOTS = [
    "User-agent: *\nDisallow: /private/*.png$\nAllow: /\nCrawl-delay: 1\n",
    "User-agent: carrara\nUser-agent: img2dataset\nDisallow: /a%2Fb\nSitemap: http://x/\n\nUser-agent: *\nDisallow:\n",
    "\ufeffUSER-AGENT:*\r\nDISALLOW:/****$$$?%%%é\r\nRequest-rate: 1/5s 0600-0845\nVisit-time: x\nHost: y\n",
]
SETTINGS = PixelSettings(32, "center_crop", False, "jpg", 90, (255, 255, 255), 100_000)


def _mutated_text(rng: random.Random, corpus: list[str], alphabet: str, most: int = 6) -> str:
    text = rng.choice(corpus)
    for _ in range(rng.randrange(most)):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(5) if rng.random() < 0.999 else 5
        if kind == 0:
            text = text[:at] + rng.choice(alphabet) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(1, 4) :]
        elif kind == 2:
            text = text[:at] + rng.choice(alphabet) * rng.randrange(1, 4) + text[at + 1 :]
        elif kind == 3:
            other = rng.choice(corpus)
            text = text[:at] + other[rng.randrange(len(other) + 1) :]
        elif kind == 4:
            text = text[:at] + "".join(rng.choices(alphabet, k=rng.randrange(8)))
        else:  # what takes the square of its length, takes too long
            some = "".join(rng.choices(alphabet, k=rng.randrange(1, 4)))
            text = text[:at] + some * rng.randrange(LONG // len(some)) + text[at:]
    return text[: LONG + 99]


_NUMBERS = [
    b"\0",
    b"\xff",
    b"\0\0",
    b"\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80\0\0\0",
    b"\xff\xd9",
    b"\xff\xda",
    b"\xff\xc0\0\x11\x08",
    b"IDAT",
    b"IEND",
    b"\x2c\xff\xff",
    b'"',
    b"\n",
    b",",
    b"\r\n",
    b"{",
    b"}",
]


def _mutated_bytes(rng: random.Random, corpus: list[bytes], most: int = 6) -> bytes:
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randrange(most)):
        # Headers are short and decide the most, so half of the hits go there.
        at = rng.randrange(min(len(data), 64) + 1) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            some = rng.choice(_NUMBERS)
            data[at : at + len(some)] = some
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = rng.choice(_NUMBERS) * rng.randrange(1, 4)
        elif kind == 4:
            other = rng.choice(corpus)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        else:
            data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


_LISTED = TakenDown.of(["00" * 32], ["11" * 32], ["example.com", ".h.example:8080"])


def urls(rng: random.Random) -> None:
    """A table's URL."""
    text = _mutated_text(rng, URLS, URL_ALPHABET)
    url_digest(text)
    _LISTED.has_url(text)
    url = parse_url(text)
    assert str(url).isascii(), url
    assert url.raw_host, url


_BASE = parse_url("https://example.com/a/b?c")


def redirects(rng: random.Random) -> None:
    """A Location header."""
    assert redirect(_BASE, _mutated_text(rng, URLS, URL_ALPHABET)).scheme in ("http", "https")


@functools.cache
def _fetcher() -> Any:
    """The parts of a fetcher that judge headers, without a client."""
    made = fetch.Fetcher.__new__(fetch.Fetcher)
    made.config, made.opt_out = FetchConfig(), OptOutConfig()
    made.agents = ("carrara", "img2dataset")
    return made


def _judge(response: Any) -> None:
    for call in (_fetcher()._check_opt_out, fetch._check_status):
        with contextlib.suppress(Rejected, fetch._Failed):
            call(response)
    inflate = inflater(response.headers.get("Content-Encoding", ""))
    if inflate is not None:
        sum(map(len, inflate.pieces(b"\x1f\x8b\x08" + response.body)))
    redirect(_BASE, response.headers.get("Location"))


def headers(rng: random.Random) -> None:
    """Headers that are looked at, whatever they say."""
    found = CIMultiDict[str]()
    for name in ("X-Robots-Tag", "TDM-Reservation", "Retry-After", "Content-Encoding", "Location", "X-Robots-Tag"):
        if rng.random() < 0.6:
            corpus, alphabet = (URLS, URL_ALPHABET) if name == "Location" else (HEADERS, HEADER_ALPHABET)
            found.add(name, _mutated_text(rng, corpus, alphabet))
    _judge(
        SimpleNamespace(headers=found, status=rng.choice([200, 203, 302, 404, 429, 503, 700]), body=rng.randbytes(8))
    )


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def answers(rng: random.Random) -> None:
    """What comes over the wire, through the client's parser and then ours."""
    protocol = SimpleNamespace(
        _reading_paused=False, transport=None, pause_reading=lambda **_: None, resume_reading=lambda **_: None
    )
    parser = HttpResponseParser(
        protocol,
        _loop(),
        1 << 17,
        max_line_size=1 << 15,
        max_field_size=1 << 15,
        max_headers=256,
        response_with_body=True,
        read_until_eof=True,
        auto_decompress=False,
    )
    data = _mutated_bytes(rng, ANSWERS)
    try:
        messages, _, _ = parser.feed_data(data)
        parser.feed_eof()
    except (
        HttpProcessingError,
        ValueError,
        Rejected,
    ):  # fetch.py takes the client's errors and ValueError for the row's
        return
    except Exception as e:
        if type(e).__module__.startswith("aiohttp"):
            return
        raise
    for message, _ in messages:
        _judge(SimpleNamespace(headers=message.headers, status=message.code, body=data[-8:]))


def robots(rng: random.Random) -> None:
    """A robots.txt, and a URL under it."""
    text = _mutated_text(rng, ROBOTS, URL_ALPHABET + "*$:\n", 10).encode("utf-8", "surrogatepass")
    rules = Protego.parse(text.decode("utf-8-sig", "replace"))
    made = sum(len(one._rules) for one in rules._user_agents.values())
    assert made <= 2 * rules_in(text.decode("utf-8-sig", "replace")), made
    robots_txt_refuses(rules, str(parse_url("http://example.com/a%2Fb/x.png?y")), ("carrara", "img2dataset"))


@functools.cache
def _pictures() -> list[bytes]:
    found = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for fmt in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        found.append(image_bytes(1, 20, 14, fmt))
    image = Image.open(io.BytesIO(image_bytes(2, 20, 14)))
    for mode, fmt, options in (
        ("RGB", "JPEG", {"progressive": True, "exif": exif}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGB", "PNG", {"exif": exif}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
        ("1", "TIFF", {"compression": "group4"}),
        ("L", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("P", "BMP", {}),
        ("P", "GIF", {"save_all": True, "append_images": [image]}),
    ):
        sink = io.BytesIO()
        image.convert(mode).save(sink, fmt, **options)
        found.append(sink.getvalue())
    raw = b"".join(b"\0" + struct.pack(">20H", *range(0, 60000, 3000)) for _ in range(14))
    head = struct.pack(">IIBBBBB", 20, 14, 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tRNS", b"\x12\x34"), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    png = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return [*found, b"\x89PNG\r\n\x1a\n" + png]


def images(rng: random.Random) -> None:
    """A picture; one PNG in two has its checksums mended, or nothing behind the first would ever be looked at."""
    data = _mutated_bytes(rng, _pictures())
    if data.startswith(b"\x89PNG\r\n\x1a\n") and rng.random() < 0.5:
        data = _mended(data)
    header_size(data)
    is_quick(data, SETTINGS)
    made = process(data, SETTINGS)
    assert (made.width, made.height) == (32, 32)
    assert made.original_width * made.original_height <= SETTINGS.max_pixels


def _mended(data: bytes) -> bytes:
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        chunk = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)))
        at += 12 + length
    return b"".join(parts) + data[at:]


COLUMNS: formats.Columns = (("url", "url", pa.string()), ("caption", "caption", pa.string()), ("n", "n", pa.int64()))


@functools.cache
def _tables() -> list[tuple[str, bytes]]:
    rows = [{"url": f"http://h/{i}.jpg", "caption": f'a "quoted", caption\nof {i} é', "n": i} for i in range(5)]
    csv = "url,caption,n\n" + "".join(
        f'{r["url"]},"{str(r["caption"]).replace(chr(34), 2 * chr(34))}",{r["n"]}\n' for r in rows
    )
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    plain = csv.replace('"', "").replace("\nof", " of")
    return [
        ("t.csv", csv.encode()),
        ("t.csv", plain.encode("latin-1")),
        ("t.tsv", plain.replace(",", "\t").encode()),
        ("t.jsonl", lines.encode()),
        ("t.parquet", sink.getvalue()),
        ("t.txt", b"http://h/1\nhttp://h/2\r\n\n"),
    ]


def tables(rng: random.Random) -> None:
    """A table, as it is read for its columns and then for its rows."""
    name, data = rng.choice(_tables())
    data = _mutated_bytes(rng, [data, *(d for n, d in _tables() if n == name)])
    columns = COLUMNS if not name.endswith("txt") else (("url", "url", pa.string()), (None, "caption", pa.string()))
    path = _written(name, data)
    if rng.random() < 0.25:
        formats.read_schema(path, {})
    last = 0
    for batch, ends in formats.batches(path, columns):
        assert batch.num_rows == len(ends)
        assert (ends[1:] > ends[:-1]).all()
        assert ends[0] > last
        last = int(ends[-1])
        batch.validate(full=True)
        batch.to_pylist()


@functools.cache
def _folder() -> str:
    made = tempfile.TemporaryDirectory(prefix="carrara-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    _KEPT.append(made)
    return made.name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends
WANTED = listing.Wanted(("score",), ColumnsConfig(), SourceConfig())
TEXTS = [
    b"a caption",
    b"\xff\xfea\0 \0c\0",
    b'{"caption": "x", "url": "http://h/1.jpg", "score": 1}',
    b'{"captions": ["a", null, "b"], "score": 0.5, "width": 9}',
    b'{"text": "\\ud800 x", "score": "many", "url": 7}',
    b"[" * 99,
]


@functools.cache
def _tars() -> list[bytes]:
    """Small ones: what is read behind a mutation is what takes the time."""
    found = []
    odd = (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE)
    for number, text in enumerate(TEXTS):
        for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            sink = io.BytesIO()
            with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
                folder = f"{'long' * 30}/é" if number == 2 and kind != tarfile.USTAR_FORMAT else "f"
                suffix = "json" if text[:1] in b"{[" else "txt"
                for name, data in ((f"1.{suffix}", text), ("1.jpg", b"image"), ("2.jpg", b""), ("2.cls", b"7")):
                    info = tarfile.TarInfo(f"{folder}/{name}")
                    info.size, info.uid = len(data), 1 << 40 if number == 3 and kind == tarfile.GNU_FORMAT else 0
                    tar.addfile(info, io.BytesIO(data))
                other = tarfile.TarInfo("other.jpg")
                other.type = odd[number % len(odd)]
                tar.addfile(other)
            # Without the zeros that fill it up to 10 KB.
            found.append(sink.getvalue()[: tar.offset])
    return found


def _with_checksums(data: bytes) -> bytes:
    """With a checksum that fits in whatever looks like a header, or nothing behind the first would be looked at."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def _written(name: str, data: bytes) -> str:
    path = os.path.join(_folder(), name)
    with open(path, "wb") as file:
        file.write(data)
    return path


def _read_all(found: Iterator[listing.Row]) -> None:
    """As the listing makes them, then each image's bytes."""
    rows: list[listing.Row] = []
    with contextlib.suppress(sources._Cut):
        for row in found:
            rows.append(row)
    listing.table_of(rows, False, WANTED).validate(full=True)
    reader = locations.Reader(_below(), 1 << 20)  # a new one, which has no table open
    for row in rows:
        _read_one(reader, row["place"])


@functools.cache
def _below() -> locations.Below:
    return locations.Below([_folder()])


def _read_one(reader: locations.Reader, location: str) -> None:
    with contextlib.suppress(Rejected, OSError):  # `Files` makes a row's end of both
        reader.read(location)


def tars(rng: random.Random) -> None:
    """A WebDataset tar, listed and read; three in four have their checksums mended."""
    data = _mutated_bytes(rng, _tars())
    path = _written("t.tar", data if rng.random() < 0.25 else _with_checksums(data))
    _read_all(sources._tar_rows(path, WANTED, []))


@functools.cache
def _packed() -> list[tuple[str, bytes]]:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([None if i == 1 else {"bytes": b"image" * i, "path": None} for i in range(4)], kind)
    table = pa.table({"image": images, "text": [*"abc", None], "score": [1, 2, None, 4]})
    lists = pa.table({"jpg": [b"x", b"", b"yy"], "captions": [["a", "b"], [], None], "score": ["1", "x", "2"]})
    found = []
    for name, one in (("p.parquet", table), ("p.parquet", lists)):
        for compression in ("none", "snappy", "zstd"):
            sink = io.BytesIO()
            pq.write_table(one, sink, row_group_size=2, compression=compression)
            found.append((name, sink.getvalue()))
    for open_ in (pa.ipc.new_file, pa.ipc.new_stream):
        arrow = io.BytesIO()
        with open_(arrow, table.schema) as writer:
            writer.write_table(table, 2)
        found.append(("p.arrow", arrow.getvalue()))
    return found


def packed(rng: random.Random) -> None:
    """A parquet or Arrow file with the images' bytes, listed and read."""
    name, data = rng.choice(_packed())
    path = _written(name, _mutated_bytes(rng, [data, *(d for n, d in _packed() if n == name)]))
    _read_all(sources._table_rows(path, WANTED, []))


PLACES = [
    "f.jpg",
    "{out}/x.jpg",
    "file://{out}/x%2Ejpg",
    "t.tar#member=a.jpg&offset=512&size=40",
    "p.parquet#column=image&row=2",
    "simplecache::http://127.0.0.1:9/x.jpg",
    "zip://a.jpg::t.zip",
    "memory://x",
    "../{name}/x.jpg",
    "file:{out}/x.jpg",
    "~/x.jpg",
]
SECRET = b"nobody's business"


@functools.cache
def _outside() -> str:
    """A folder, somebody's home, from which nothing may be read; files of the same names may be read where one is."""
    made = tempfile.TemporaryDirectory(prefix="carrara-fuzz-", dir=os.path.dirname(_folder()))
    _KEPT.append(made)
    for name in ("x.jpg", "a.jpg", "f.jpg", "t.tar"):
        with open(os.path.join(made.name, name), "wb") as file:
            file.write(SECRET * 40)
        _written(name, b"image" * 200)
    os.symlink(made.name, os.path.join(_folder(), "link"))
    return made.name


def places(rng: random.Random) -> None:
    """What a table from elsewhere may name in place of a URL, from within the one folder that may be read from."""
    made = _mutated_text(rng, PLACES, URL_ALPHABET + "#&=").encode("utf-8", "replace").decode()
    made = made.replace("{out}", _outside()).replace("{name}", os.path.basename(_outside()))
    text = f"{_folder()}/{made}" if rng.random() < 0.25 else f"link/{made}" if rng.random() < 0.1 else made
    home, os.environ["HOME"] = os.environ.get("HOME", ""), _outside()
    try:
        with contextlib.chdir(_folder()), contextlib.suppress(OSError):
            assert SECRET[:9] not in locations.Reader(_below(), 1 << 20).read(text), text
    finally:
        os.environ["HOME"] = home


# What a target may raise, and the seconds of CPU that a case of it may take.
TARGETS: dict[str, tuple[Callable[[random.Random], None], type[Exception], float]] = {
    "urls": (urls, Rejected, IN_LOOP),
    "redirects": (redirects, Rejected, IN_LOOP),
    "headers": (headers, Rejected, IN_LOOP),
    "answers": (answers, Rejected, IN_LOOP),
    "robots": (robots, Rejected, ASIDE),
    "images": (images, Rejected, ASIDE),
    "tables": (tables, ConfigError, ASIDE),
    "tars": (tars, ConfigError, ASIDE),
    "packed": (packed, ConfigError, ASIDE),
    "places": (places, Rejected, ASIDE),
}


def case(name: str, seed: int, number: int) -> str:
    """Run one case; returns what came of it: `ok` or a code."""
    target, allowed, _ = TARGETS[name]
    try:
        target(random.Random(f"{name}/{seed}/{number}"))
    except allowed as e:
        return getattr(e, "code", type(e).__name__)
    return "ok"


def run(name: str, seed: int, cases: int) -> Counter[str]:
    """So many cases; raises AssertionError that names the first that fails."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.freeze()  # or a case may wait for a walk over all that was imported
    for number in range(cases):
        seconds = math.inf
        for _ in range(TRIES):
            began = time.process_time()
            try:
                kind = case(name, seed, number)
            except Exception as e:
                raise AssertionError(f"{name}, seed {seed}, case {number}: {type(e).__name__}: {e}") from e
            if (seconds := min(seconds, time.process_time() - began)) < TARGETS[name][2]:
                break
        assert seconds < TARGETS[name][2], f"{name}, seed {seed}, case {number}: {seconds:.1f} s"
        found[kind] += 1
        if sys.stderr.isatty() and number % 10_000 == 0:
            print(f"\r{name} {number:,}", end="", file=sys.stderr)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int)
    args = parser.parse_args()
    for name in args.targets or TARGETS:
        if args.case is not None:
            print(case(name, args.seed, args.case))
            continue
        began = time.process_time()
        found = run(name, args.seed, args.cases)
        spent = time.process_time() - began
        kinds = ", ".join(f"{k} {n:,}" for k, n in found.most_common())
        print(f"{name}: {args.cases:,} cases, seed {args.seed}, {spent:.1f} CPU-s; {kinds}", flush=True)


if __name__ == "__main__":
    main()
