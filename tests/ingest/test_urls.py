"""URLs as they stand: legal ones go out letter for letter, in tables and redirects; nothing makes a parser raise."""

from __future__ import annotations

import urllib.parse
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ingest.errors import Rejected
from ingest.urls import parse_url, redirect
from tests.ingest.site import Site
from tests.ingest.test_fetch import fetch

EXACT = [  # of LAION's, several of them signed over the very letters
    "/SPYYIBDyykG9O8ordta_wy8xlTY=/400x225/smart/http%3A%2F%2Fprod.example%2Fa.jpg",
    "/a.jpg?resize=660%2C774",
    "/White%280%29.jpg",
    "/a%7Eb/%41.jpg",
    "/plain/../up.jpg",
    "/img.jpg?sig=ab%2Fcd%3D%3D&exp=1",
    "/plus+and%2Bplus.jpg?q=a+b%2Bc%20d",
    "/a//b/./c;x=1,2?a=b&a=c;d?e/f",
    "/100%.jpg?[]=|",
]
# Legal in paths and queries by RFC 3986, whole escapes among them.
_PIECES = st.sampled_from([*"abcXYZ019-._~!$&'()*+,;=:@/", "%41", "%2f", "%2F", "%C3%A9", "..", "./"])
# What yarl 1.25 raises IndexError for lies in this alphabet, as does whatever else URLs are told apart by.
_ODD = st.text(st.sampled_from("][@:/?#\\%.0x1aé\u3002 \t\n\x00\x7f\ud800\udce9<>{}|^`\"'½ß１"), max_size=24)


def targets(site: Site) -> list[str]:
    """Make a raw server that answers to the exact targets alone; returns their URLs."""
    for target in EXACT:
        site.raw[target] = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
    return [site.raw_url(t) for t in EXACT]


def test_a_server_that_wants_the_exact_target_gets_it(site: Site) -> None:
    urls = targets(site)
    assert fetch(*urls) == [b"x"] * len(EXACT)
    for i, (url, target) in enumerate(zip(urls, EXACT, strict=True)):
        for name, location in ((f"/absolute{i}", url), (f"/relative{i}", target)):
            # That it closes the connection it says: else a client may send its next request there, as it comes about.
            head = f"HTTP/1.1 302 F\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            site.raw[name] = head.encode()
    n = range(len(EXACT))
    assert fetch(*(site.raw_url(f"/absolute{i}") for i in n)) == [b"x"] * len(EXACT)
    assert fetch(*(site.raw_url(f"/relative{i}") for i in n)) == [b"x"] * len(EXACT)


@given(st.lists(_PIECES, max_size=12).map("".join), st.lists(_PIECES, max_size=12).map("".join))
def test_legal_targets_are_unchanged(path: str, query: str) -> None:
    target = "/" + path + (f"?{query}" if query else "")
    assert parse_url("http://example.com" + target).raw_path_qs == target
    assert redirect(parse_url("http://other.com/x"), "http://example.com" + target).raw_path_qs == target


@given(st.text(max_size=30), st.text(max_size=30))
def test_what_is_illegal_is_quoted_and_means_the_same(path: str, query: str) -> None:
    path = path.replace("?", "").replace("#", "").replace("%", "").rstrip().translate(str.maketrans("", "", "\t\r\n"))
    query = query.replace("#", "").replace("%", "").translate(str.maketrans("", "", "\t\r\n"))
    url = parse_url(f"http://example.com/{path}?{query}_")
    assert url.raw_path_qs.isascii()
    assert " " not in url.raw_path_qs
    assert urllib.parse.unquote(url.raw_path) == "/" + path.encode("utf-8", "replace").decode().replace(
        "\ud800", "\ufffd"
    )
    assert urllib.parse.unquote(url.raw_query_string) == f"{query}_"


@given(st.text(max_size=60) | _ODD | _ODD.map("http://".__add__) | _ODD.map("http://h/".__add__))
@example("http://][@")
@example("http://a@")
@example("http://[fe80::1%2１5eth0]/.")  # found by the fuzzer: a zone beyond ASCII
def test_nothing_makes_parsing_raise_anything_else(text: str) -> None:
    base, codes = parse_url("http://example.com/a/b?c"), set()
    for call in (lambda: parse_url(text), lambda: redirect(base, text)):
        try:
            url = call()
        except Rejected as e:
            codes.add(e.code)
        else:
            assert url.scheme in ("http", "https")
            assert url.raw_host
            assert str(url).isascii()
    assert codes <= {"url_missing", "url_invalid", "scheme_refused", "redirect_invalid"}


def test_hosts_are_brought_to_one_form() -> None:
    for text, host in (
        ("http://EXÄMPLE.com/", "xn--exmple-cua.com"),
        ("http://straße.de/", "xn--strae-oqa.de"),
        ("http://2130706433/", "127.0.0.1"),
        ("http://0x7f.1:80/", "127.0.0.1"),
        ("http://１２７.0.0.1/", "127.0.0.1"),
        ("http://%31.com/", "1.com"),
        ("http://[::1]:80/", "::1"),
    ):
        assert parse_url(text).raw_host == host, text
    for text in ("http://1.2.3.999/", "http://a..b/", "http://a\\b/", "http://a b/", "http://" + "a" * 64 + ".com/"):
        with pytest.raises(Rejected, match="url_invalid"):
            parse_url(text)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("d", "http://h/a/b/d"),
        ("../d?x", "http://h/a/d?x"),
        ("../../../x", "http://h/x"),
        (".", "http://h/a/b/"),
        ("?z=2", "http://h/a/b/c?z=2"),
        ("#f", "http://h/a/b/c?q=1"),
        ("//o/p", "http://o/p"),
        ("/a/../b", "http://h/a/../b"),
        ("HTTPS://X/%7e", "https://x/%7e"),
    ],
)
def test_redirects_are_joined_by_the_rules(location: str, expected: str) -> None:
    assert str(redirect(parse_url("http://h/a/b/c?q=1"), location)) == expected


@pytest.mark.parametrize("location", [b"http://][@/x.jpg", b"http://[@ x", b"http://[@\xc2\xa0", b"http://\xff\xfe/"])
def test_a_hostile_redirect_ends_its_row_alone(site: Site, location: bytes) -> None:
    site.raw["/r"] = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    found: Any = fetch(site.raw_url("/r"), site.add("/ok", b"x"))
    assert found == ["redirect_invalid", b"x"]
