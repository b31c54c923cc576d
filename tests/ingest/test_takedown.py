"""The list of take-downs: which spellings of a URL or a host it knows, and what it holds."""

from __future__ import annotations

import hashlib
import io
import random
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from yarl import URL

from ingest import takedown
from ingest.errors import Rejected
from ingest.takedown import Digests, TakenDown, host_forms, normal_url, number, requested, url_digest
from ingest.urls import parse_url
from shards.settings import ConfigError
from tests.ingest import fuzz


def asked(folder: Path, text: str) -> TakenDown:
    (folder / "list.txt").write_text(text)
    return requested(str(folder / "list.txt"), None, None).listed


SPELLINGS = [
    ("http://example.com/a.jpg", " HTTP://EXAMPLE.com:80/a.jpg#top "),
    ("http://example.com/a.jpg", "https://example.com/a.jpg"),  # a notice has one, a table of years ago the other
    ("https://example.com/a.jpg", "http://example.com/a.jpg"),
    ("http://example.com./a.jpg", "http://example.com/a.jpg"),
    ("http://example.com/a.jpg", "http://example.com./a.jpg"),
    ("http://example.com/%7Ea%2Cb.jpg", "http://example.com/~a,b.jpg"),
    ("http://example.com/b/../a b.jpg", "http://example.com/a%20b.jpg"),
    ("http://example.com", "http://example.com/"),
    ("http://stra\u00dfe.de/a", "http://xn--strae-oqa.de/a"),  # IDNA 2008
    ("http://stra\u00dfe.de/a", "http://strasse.de/a"),  # IDNA 2003
    ("http://STRA\u00dfE.de/a", "http://stra\u00dfe.de/a"),
    ("http://example.com:8080/a", "http://EXAMPLE.com:8080/a"),
]


@pytest.mark.parametrize(("listed", "met"), SPELLINGS)
def test_a_url_is_known_in_all_its_spellings(tmp_path: Path, listed: str, met: str) -> None:
    found = asked(tmp_path, listed)
    assert found.has_url(met)
    assert number(url_digest(met)) in found.urls.numbers.tolist()  # so it is found by the digest that sidecars hold


@pytest.mark.parametrize(
    "other",
    [
        "http://example.com/b.jpg",
        "http://example.com:8080/a.jpg",
        "http://example.com/a.jpg?x",
        "http://sub.example.com/a.jpg",
    ],
)
def test_another_url_is_not(tmp_path: Path, other: str) -> None:
    assert not asked(tmp_path, "http://example.com/a.jpg").has_url(other)


@pytest.mark.parametrize(
    ("host", "hit", "missed"),
    [
        (
            "example.com",
            ["http://example.com/a", "https://a.b.EXAMPLE.com:99/", "http://example.com./x"],
            ["http://xample.com"],
        ),
        ("*.example.com", ["http://a.example.com/"], ["http://example.com/", "http://bexample.com/"]),
        ("example.com:8080", ["http://example.com:8080/a", "http://x.example.com:8080/"], ["http://example.com/a"]),
        ("example.com:443", ["https://example.com/a"], ["http://example.com/a"]),
        (
            "stra\u00dfe.de",
            ["http://stra\u00dfe.de/a", "http://xn--strae-oqa.de/", "http://strasse.de/"],
            ["http://strase.de/"],
        ),
        ("B\u00dcCHER.example.", ["http://xn--bcher-kva.example/"], ["http://bucher.example/"]),
        ("127.0.0.1:80", ["http://127.0.0.1/a"], ["http://127.0.0.1:81/a"]),
        ("[::1]", ["http://[::1]:3/a"], ["http://[::2]/a"]),
        ("[0::1]:8080", ["http://[::1]:8080/a", "http://[0:0::1]:8080/"], ["http://[::1]/a", "http://[::1:8080]/"]),
    ],
)
def test_a_host_is_known_with_ports_wildcards_and_international_names(
    host: str, hit: list[str], missed: list[str]
) -> None:
    listed = requested(None, None, host).listed
    for url in hit:
        assert listed.has_url(url), url
    for url in missed:
        assert not listed.has_url(url), url


def test_a_url_whose_host_is_longer_than_any_takes_neither_memory_nor_time() -> None:
    listed = TakenDown.of(urls=["00" * 32], hosts=["example.com"])
    url = f"http://{'a.' * 4000}example.com/"
    tracemalloc.start()
    try:
        assert not listed.has_url(url)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    for letter in ("é", "É`}"):
        began = time.process_time()
        assert not listed.has_url(f" http://{letter * 30_000}.com:/")
        assert time.process_time() - began < 0.05
    longest = f"http://{'a.' * 121}example.com/"
    assert listed.has_url(longest)
    with pytest.raises(Rejected):
        parse_url(url)


@pytest.mark.parametrize(
    "host",
    ["http://example.com", "example.com/a", "a b", "*", "*.", "x:99999", "exa*mple.com", ":80", "[1.2.3]", "[::1"],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="is not the name of a host"):
        host_forms(host)


def test_what_is_no_url_or_sha256_is_refused_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'not a url at all' is not a URL"):
        asked(tmp_path, "http://a/b\nnot a url at all\n")
    with pytest.raises(ConfigError, match="'ftp://a/b' is not a URL"):
        asked(tmp_path, "ftp://a/b\n")
    with pytest.raises(ConfigError, match="with something in it"):
        asked(tmp_path, "\n \n")
    (tmp_path / "sha").write_text("abc\n")
    with pytest.raises(ConfigError, match="'abc' is not a sha256"):
        requested(None, str(tmp_path / "sha"), None)


def test_parts_are_created_and_never_changed(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert (takedown.length(run), bool(TakenDown.read(run))) == (0, False)
    sha = hashlib.sha256(b"x").hexdigest()
    assert TakenDown.of(urls=[url_digest("http://a/1")], hosts=["b.org"]).create(run) == 1
    first = (tmp_path / "taken_down" / "00000.parquet").read_bytes()
    assert b"http://a/1" not in first
    assert TakenDown.of(bytes=[sha]).create(run) == 2
    assert (tmp_path / "taken_down" / "00000.parquet").read_bytes() == first
    whole, later = TakenDown.read(run), TakenDown.read(run, after=1)
    assert (whole.parts, later.parts) == (2, 2)
    assert whole.has_url("http://a/1")
    assert whole.has_url("http://x.b.org/")
    assert whole.has_bytes(sha)
    assert later.has_bytes(sha)
    assert not later.has_url("http://a/1")


def test_the_list_of_an_earlier_version_is_its_first_part(tmp_path: Path) -> None:
    """It was made of yarl's spelling of a URL."""
    old = hashlib.sha256(str(URL("http://a.b./1?x=%2C")).encode()).hexdigest()
    rows = {"kind": ["url", "host"], "value": [old, "c.org"]}
    pq.write_table(pa.table(rows), tmp_path / "taken_down.parquet")
    TakenDown.of(hosts=["d.org"]).create(str(tmp_path))
    found = TakenDown.read(str(tmp_path))
    assert found.parts == takedown.length(str(tmp_path)) == 2
    assert found.has_url("http://a.b./1?x=,")
    assert found.has_url("http://c.org/") and found.has_url("http://d.org/")  # noqa: PT018
    assert not TakenDown.read(str(tmp_path), after=1).has_url("http://c.org/")


def test_two_removals_at_one_moment_both_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = takedown.storage.create

    def late(url: str, data: bytes) -> bool:
        monkeypatch.undo()
        TakenDown.of(hosts=["other.org"]).create(str(tmp_path))
        return create(url, data)

    monkeypatch.setattr(takedown.storage, "create", late)
    assert TakenDown.of(hosts=["mine.org"]).create(str(tmp_path)) == 2
    assert TakenDown.read(str(tmp_path)).hosts == {"mine.org", "other.org"}


def test_what_was_asked_for_and_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("http://a/1\nhttp://a/2\n")
    ask = requested(str(tmp_path / "list"), None, "b.org")
    assert ask.unknown({number(url_digest("http://a/2"))}) == ["http://a/1", "b.org"]
    assert ask.unknown({number(url_digest("https://a/1")), number(url_digest("http://a/2")), "b.org"}) == []


def test_a_million_digests_take_forty_bytes_each() -> None:
    rng = np.random.default_rng(0)
    raw = rng.bytes(32 * 20_000)
    texts = [raw[i : i + 32].hex() for i in range(0, len(raw), 32)]
    # Two that share their first 64 bits are two.
    texts[1] = texts[0][:16] + texts[1][16:]
    found = Digests(texts[:10_000])
    assert len(found) == 10_000
    assert all(t in found for t in texts[:10_000])
    assert not any(t in found for t in texts[10_000:])
    assert texts[0][:16] + texts[5][16:] not in found
    assert found.numbers.nbytes + found._all.nbytes == 40 * 10_000
    assert sorted(found) == sorted(texts[:10_000])
    assert "" not in Digests()


def test_a_normal_form_is_its_own_normal_form() -> None:
    for _, text in SPELLINGS:
        assert normal_url(normal_url(text)) == normal_url(text)
    for text in ("", "no url", "http://[", "http://a\ud800/", "http://" + "\u2488.com", "http://[::1%]/"):
        assert normal_url(normal_url(text)) == normal_url(text)
    assert io.StringIO(normal_url(" x ")).read() == "x"


def test_what_is_taken_for_a_normal_form_without_a_look_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = takedown._PLAIN
    corpus = [
        *fuzz.URLS[:2],
        "https://cdn-12.example.org/3/12345.jpg?width=1024",
        "http://i.example.com/736x/0a/1b/..2c.jpg?a=1&b=&c=.d",
        f"http://{'x' * 70}.a-.b--c.com/~u/a_b",
        "http://xn--a.com/a/./b/../c",
    ]
    alphabet = "./-_~?=&:@abcXYZ0123 %+;,#\\xn"
    found = {fuzz._mutated_text(random.Random(n), corpus, alphabet, 4) for n in range(6000)} | {*corpus}
    found |= {text[:i] + text[i].upper() + text[i + 1 :] for text in corpus for i in range(len(text))}
    found = {text for text in found if plain.fullmatch(text)}
    assert len(found) > 300
    monkeypatch.setattr(takedown, "_PLAIN", re.compile("(?!)"))
    for text in found:
        assert takedown.normal_url(text) == takedown._former(text) == text
