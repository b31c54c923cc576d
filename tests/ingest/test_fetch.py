"""The fetcher against a hostile server: every way in is shut, every limit holds, every failure has its code."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import time
import zlib
from typing import Any

import pytest
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from hypothesis import given
from hypothesis import strategies as st

from ingest.addresses import AT_ONCE, AddressRefused, BoundedSocket, Guard, embedded_ipv4, is_public
from ingest.config import FetchConfig, OptOutConfig
from ingest.errors import ERRORS, Rejected
from ingest.fetch import Fetcher
from ingest.names import Names
from ingest.urls import parse_url
from shards.images import STATUSES
from tests.ingest.site import Site, image_bytes

ALLOW = ("127.0.0.1/32",)


def fetch(*urls: str, opt_out: Any = None, **settings: Any) -> Any:
    """The bodies or error codes of URLs, fetched together by one client; of one URL without the list."""

    async def one(fetcher: Fetcher, url: str) -> bytes | str:
        try:
            async with fetcher.fetch(url) as fetched:
                return fetched.body
        except Rejected as e:
            return ERRORS[e.code].code

    async def every() -> list[bytes | str]:
        options = {"allow_addresses": ALLOW, "retries": 0, "backoff": 0.01, **settings}
        fetcher = Fetcher(FetchConfig.model_validate(options), opt_out or OptOutConfig())
        try:
            return await asyncio.gather(*(one(fetcher, u) for u in urls))
        finally:
            await fetcher.close()

    found = asyncio.run(every())
    return found[0] if len(urls) == 1 else found


def test_codes_name_statuses_that_exist() -> None:
    assert {e.status for e in ERRORS.values()} <= set(STATUSES)
    assert all(code == e.code for code, e in ERRORS.items())


def test_plain_pages_and_odd_urls(site: Site) -> None:
    body = image_bytes(0)
    site.add("/a%20b.png?q=%C3%A9", body)
    site.add("/%D1%84.png", body)
    assert fetch(f"  http://127.0.0.1:{site.port}/a b.png?q=é#part ") == body
    assert fetch(site.url("/ф.png")) == body
    assert fetch(site.url("/%D1%84.png")) == body
    assert fetch("") == "url_missing"
    for text in ("www.example.com/a.png", "//example.com/a.png", "http://", "http:///a.png", "http://a:99999/", "x"):
        assert fetch(text) == "url_invalid", text
    for text in ("file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://127.0.0.1/a", "gopher://127.0.0.1:70/"):
        assert fetch(text) == "scheme_refused", text


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "http_not_found"),
        (410, "http_not_found"),
        (403, "http_forbidden"),
        (451, "http_forbidden"),
        (418, "http_client_error"),
        (429, "http_rate_limited"),
        (503, "http_server_error"),
        (204, "http_unexpected"),
    ],
)
def test_http_statuses(site: Site, status: int, code: str) -> None:
    # Error pages ask not to be indexed; that is no opt-out of a picture.
    assert fetch(site.add("/x", b"" if status == 204 else b"x", status, X_Robots_Tag="noindex")) == code


def test_private_addresses_are_refused_in_every_spelling(site: Site) -> None:
    url = site.add("/in.png", image_bytes(0))
    assert fetch(url, allow_addresses=()) == "address_refused"
    port = site.port
    for host in ("localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]"):
        assert fetch(f"http://{host}:{port}/in.png", allow_addresses=()) == "address_refused", host
    for host in ("2130706433", "0x7f000001", "127.1", "0177.0.0.1", "0x7f.1"):  # what a libc takes for 127.0.0.1
        assert fetch(f"http://{host}:{port}/in.png", allow_addresses=()) in ("address_refused", "url_invalid"), host
    for host in ("169.254.169.254", "10.0.0.1", "192.168.1.1", "100.64.0.1", "[fd00:ec2::254]", "[64:ff9b::a00:1]"):
        assert fetch(f"http://{host}/", connect_timeout=2) == "address_refused", host
    assert site.hits["/in.png"] == 0


def test_every_redirect_hop_is_judged(site: Site) -> None:
    body = image_bytes(0)
    site.add("/end.png", body)
    site.add("/2", b"", 302, Location="end.png")
    assert fetch(site.add("/1", b"", 301, Location=site.url("/2"))) == body
    secret = f"http://127.0.0.2:{site.port}/end.png"  # not in the list of allowed addresses
    refused = {
        "file:///etc/passwd": "scheme_refused",
        secret: "address_refused",
        "http://localhost:1/": "connect_refused",  # resolves to the allowed 127.0.0.1, where nobody listens
        "http://169.254.169.254/latest/meta-data/": "address_refused",
        "http://[::ffff:10.0.0.1]/": "address_refused",
        "//0x7f.0.0.2/x": "address_refused",
        "http://": "redirect_invalid",
    }
    for i, (location, code) in enumerate(refused.items()):
        found = fetch(site.add(f"/to{i}", b"", 307, Location=location))
        assert found == code or (found == "url_invalid" and "0x" in location), location
    assert fetch(site.add("/nowhere", b"", 302)) == "redirect_invalid"
    site.add("/circle-a", b"", 302, Location="/circle-b")
    assert fetch(site.add("/circle-b", b"", 302, Location="/circle-a")) == "too_many_redirects"
    for i in range(7):
        site.add(f"/far{i}", b"", 302, Location=f"/far{i + 1}")
    site.add("/far7", body)
    assert fetch(site.url("/far0")) == "too_many_redirects"
    assert fetch(site.url("/far0"), max_redirects=7) == body


def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """DNS rebinding: whatever the name resolved to before, the address that is connected to is what counts."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"], ["127.0.0.1", "93.184.215.14"]])

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def resolve() -> list[str]:
        return [r["host"] for r in await Names(FetchConfig(), Guard()).resolve("rebinding.test", 80)]

    assert asyncio.run(resolve()) == ["93.184.215.14"]
    with pytest.raises(Rejected, match="address_refused"):
        asyncio.run(resolve())
    assert asyncio.run(resolve()) == ["93.184.215.14"]
    with pytest.raises(AddressRefused):
        Guard().socket_factory((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)))


@given(st.ip_addresses())
def test_an_address_inside_another_is_judged_like_itself(address: Any) -> None:
    # ipaddress calls no 6to4 or mapped address global; what counts is the address inside.
    assert is_public(address) <= (embedded_ipv4(address) or address).is_global
    if address.version == 4:
        for outer in (
            f"::ffff:{address}",
            f"64:ff9b::{address}",
            f"2002:{int(address) >> 16:x}:{int(address) & 65535:x}::1",
        ):
            mapped = ipaddress.ip_address(outer)
            assert embedded_ipv4(mapped) == address
            assert is_public(mapped) == is_public(address)
            assert Guard([f"{address}/32"]).permits(outer)


def test_an_answer_comes_to_the_parser_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """A piece of a quarter of a megabyte may be 15,000 `100 Continue` or 40,000 chunks, which hold the event loop."""
    sizes = []
    real = ResponseHandler.data_received

    def data_received(self: ResponseHandler, data: bytes) -> None:
        sizes.append(len(data))
        real(self, data)

    monkeypatch.setattr(ResponseHandler, "data_received", data_received)
    body = bytes(4 << 20)
    assert fetch(site.add("/large", body)) == body
    assert sum(sizes) > len(body)
    assert max(sizes) <= AT_ONCE
    ours, theirs = socket.socketpair()  # TLS reads into a buffer of its own
    with ours, theirs, BoundedSocket(fileno=ours.detach()) as bounded:
        theirs.sendall(bytes(2 * AT_ONCE))
        assert bounded.recv_into(bytearray(4 * AT_ONCE)) <= AT_ONCE


def test_bodies_are_bounded(site: Site) -> None:
    limits: dict[str, Any] = {"max_bytes": 10_000, "timeout": 5.0}
    assert fetch(site.add("/big", b"x" * 10_001), **limits) == "body_too_large"
    assert fetch(site.add("/fits", b"x" * 10_000), **limits) == b"x" * 10_000
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    site.raw["/endless"] = endless
    assert fetch(site.raw_url("/endless"), **limits) == "body_too_large"
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert fetch(site.add("/bomb", bomb, Content_Encoding="gzip"), max_bytes=1_000_000) == "body_too_large"
    body = image_bytes(3)
    assert fetch(site.add("/gzip", gzip.compress(body), Content_Encoding="gzip")) == body
    assert fetch(site.add("/deflate", zlib.compress(body), Content_Encoding="deflate")) == body
    assert fetch(site.add("/half", gzip.compress(body)[:-9], Content_Encoding="gzip")) == "body_truncated"
    assert fetch(site.add("/noise", b"noise", Content_Encoding="gzip")) == "http_malformed"
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert fetch(site.add("/raw", raw.compress(body) + raw.flush(), Content_Encoding="deflate")) == body
    members = gzip.compress(body[:99]) + gzip.compress(body[99:]) + bytes(64)
    assert fetch(site.add("/members", members, Content_Encoding="gzip")) == body
    assert fetch(site.url("/members"), max_bytes=len(body) - 1) == "body_too_large"
    many = gzip.compress(b"") * 5000
    assert fetch(site.add("/many", many, Content_Encoding="gzip")) == "http_malformed"
    for name in ("br", "zstd", "gzip, gzip"):
        assert fetch(site.add("/other", body, Content_Encoding=name)) == "encoding_unsupported"
    for name in ("identity", "none", "utf-8"):
        assert fetch(site.add("/none", body, Content_Encoding=name)) == body
    assert fetch(site.add("/empty", b"")) == "body_empty"


def test_wordy_and_odd_headers_lose_no_picture(site: Site) -> None:
    headers = {
        "long": b"Content-Security-Policy: " + b"a" * 30_000,
        "many": b"\r\n".join(b"X-%d: 1" % i for i in range(200)),
        "latin": b"X-Name: caf\xe9",
        "cookie": b'Set-Cookie: "\xff;;;=',
        "before": b"X: 1",
    }
    for name, header in headers.items():
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * (name == "before")
        site.raw[f"/{name}"] = (
            early + b"HTTP/1.1 203 OK\r\n" + header + b"\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
        )
    assert fetch(*(site.raw_url(f"/{n}") for n in headers)) == [b"x"] * len(headers)
    site.raw["/bomb"] = b"HTTP/1.1 200 OK\r\nX: " + b"a" * 5_000_000 + b"\r\n\r\n"
    for i, after in enumerate(("²", "soon", "-5", "0.1", "9" * 30, "Wed, 99 Foo 2015 99:99:99 GMT")):
        site.raw[f"/{i}"] = (
            f"HTTP/1.1 429 No\r\nRetry-After: {after}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
    # One that the client cannot make out does not end the others.
    found = fetch(site.raw_url("/bomb"), *(site.raw_url(f"/{i}") for i in range(6)), site.raw_url("/long"))
    assert found == ["http_malformed", *["http_rate_limited"] * 6, b"x"]


def test_broken_and_slow_servers(site: Site) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n")
        for _ in range(200):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(8)

    async def header_drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(200):
            writer.write(b"X-%d: 1\r\n" % i)
            await writer.drain()
            await asyncio.sleep(0.05)

    site.raw = {
        "/drip": drip,
        "/silent": silent,
        "/headers": header_drip,
        "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\nonly this",
        "/nothing": b"",
        "/garbage": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nx\r\n0\r\n\r\n",
    }
    expected = {
        "/drip": "too_slow",
        "/silent": "timeout",
        "/headers": "timeout",
        "/short": "body_truncated",
        "/nothing": "connection_lost",
        "/garbage": "http_malformed",
        "/chunks": "http_malformed",
    }
    began = time.monotonic()
    found = fetch(*map(site.raw_url, expected), timeout=1.5, min_speed=100.0, min_speed_after=0.5)
    assert dict(zip(expected, found, strict=True)) == expected
    assert time.monotonic() - began < 5
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/") == "connect_refused"
    assert fetch(f"https://127.0.0.1:{site.port}/x") == "tls_error"


def test_transient_failures_alone_are_tried_again(site: Site) -> None:
    body = image_bytes(0)
    waits: list[float] = []

    def failing(times: int, status: int, **headers: str) -> Any:
        left = times

        async def answer(_: web.Request) -> web.Response:
            nonlocal left
            waits.append(time.monotonic())
            left -= 1
            return web.Response(status=status, headers=headers) if left >= 0 else web.Response(body=body)

        return answer

    site.pages["/twice"] = failing(2, 503)
    assert fetch(site.url("/twice"), retries=2) == body
    site.pages["/thrice"] = failing(3, 502)
    assert fetch(site.url("/thrice"), retries=2) == "http_server_error"
    assert site.hits["/thrice"] == 3
    assert fetch(site.url("/gone"), retries=5) == "http_not_found"
    assert site.hits["/gone"] == 1
    waits.clear()
    site.pages["/limited"] = failing(1, 429, **{"Retry-After": "1"})
    assert fetch(site.url("/limited"), retries=1) == body
    assert waits[1] - waits[0] >= 1.0
    waits.clear()
    site.pages["/later"] = failing(1, 429, **{"Retry-After": "86400"})
    assert fetch(site.url("/later"), retries=1, max_backoff=0.1) == body
    assert waits[1] - waits[0] < 5


def test_limits_on_concurrency_hold(site: Site) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return web.Response(body=b"x")

    urls = []
    for i in range(30):
        site.pages[f"/{i}"] = slow
        urls.append(site.url(f"/{i}"))
    assert fetch(*urls, concurrency=20, host_concurrency=3) == [b"x"] * 30
    assert site.most_busy == 3
    site.most_busy = 0
    assert fetch(*urls, concurrency=5, host_concurrency=30) == [b"x"] * 30
    assert site.most_busy == 5


def test_a_refusal_by_the_server_is_respected_unless_switched_off(site: Site) -> None:
    body = image_bytes(0)
    url = site.add("/a", body, X_Robots_Tag="noai")
    assert fetch(url) == "x_robots_tag"
    assert fetch(url, opt_out=OptOutConfig(respect=False)) == body
    assert fetch(site.add("/b", body, TDM_Reservation="1")) == "tdm_reservation"
    assert fetch(site.add("/c", body, TDM_Reservation="0", X_Robots_Tag="otherbot: noai")) == body
    site.add("/end", body)
    assert fetch(site.add("/hop", b"", 302, Location="/end", X_Robots_Tag="none")) == "x_robots_tag"
    site.raw["/two"] = (
        b"HTTP/1.1 200 OK\r\nX-Robots-Tag: max-snippet:20\r\nx-robots-tag: carrara: NoImageAI\r\n"
        b"Content-Length: 1\r\n\r\nx"
    )
    assert fetch(site.raw_url("/two")) == "x_robots_tag"


def test_urls_are_parsed_without_raising_anything_else() -> None:
    rejected: set[str] = set()

    @given(st.text(max_size=60) | st.text(max_size=40).map(lambda t: "http://" + t))
    def check(text: str) -> None:
        try:
            url = parse_url(text)
        except Rejected as e:
            rejected.add(e.code)
        else:
            assert url.scheme in ("http", "https")
            assert url.host

    check()
    assert rejected <= {"url_missing", "url_invalid", "scheme_refused"}


def test_a_dead_host_is_left_alone_and_tried_again_later(site: Site) -> None:
    """Ten rows on a host that refuses connections, one at a time: after three failures the rest is not asked for."""
    answers: list[str] = []

    async def broken(writer: asyncio.StreamWriter) -> None:
        answers.append("reset")
        writer.transport.abort()

    for i in range(10):
        site.raw[f"/{i}"] = broken
    urls = [site.raw_url(f"/{i}") for i in range(10)]
    found = fetch(*urls, host_concurrency=1, host_failures=3, host_pause=60)
    assert found == ["connection_lost"] * 3 + ["host_unavailable"] * 7
    assert len(answers) in (3, 6)  # aiohttp itself asks once more after a reset
    assert ERRORS["host_unavailable"].retryable
    assert fetch(*urls, host_concurrency=1, host_failures=0) == ["connection_lost"] * 10

    async def in_turn() -> list[bytes | str]:
        options = {"allow_addresses": ALLOW, "retries": 0, "host_failures": 2, "host_pause": 0.4}
        fetcher = Fetcher(FetchConfig.model_validate(options), OptOutConfig())
        found: list[bytes | str] = []

        async def ask(url: str) -> None:
            try:
                async with fetcher.fetch(url) as fetched:
                    found.append(fetched.body)
            except Rejected as e:
                found.append(e.code)

        try:
            for path in ("/0", "/1", "/2"):
                await ask(site.raw_url(path))
            await asyncio.sleep(0.5)
            await ask(site.raw_url("/3"))  # the one that tries
            await ask(site.raw_url("/4"))
            await asyncio.sleep(0.5)
            site.raw["/5"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
            await ask(site.raw_url("/5"))
            await ask(site.raw_url("/5"))
        finally:
            await fetcher.close()
        return found

    lost, closed = "connection_lost", "host_unavailable"
    assert asyncio.run(in_turn()) == [lost, lost, closed, lost, closed, b"x", b"x"]


def test_a_host_that_does_not_exist_stays_final_for_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        nonlocal asked
        asked += 1
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = fetch(*(f"http://gone.test/{i}" for i in range(20)), host_concurrency=1, host_failures=4)
    assert found == ["dns_not_found"] * 20
    assert asked == 1  # and is remembered to be gone


def test_a_missing_picture_is_no_fault_of_its_host(site: Site) -> None:
    urls = [site.url(f"/none{i}") for i in range(12)] + [site.add("/there", b"x")]
    assert fetch(*urls, host_concurrency=1, host_failures=3) == ["http_not_found"] * 12 + [b"x"]
    # Nor is the dead end of a redirect the fault of the host that points to it.
    with socket.socket() as unused:
        unused.bind(("127.0.0.2", 0))
        dead = f"http://127.0.0.2:{unused.getsockname()[1]}/"
        urls = [site.add(f"/to{i}", b"", 302, Location=dead) for i in range(6)] + [site.url("/there")]
        allow = (*ALLOW, "127.0.0.2/32")
        found = fetch(*urls, host_concurrency=1, host_failures=3, allow_addresses=allow)
        assert found == ["connect_refused"] * 6 + [b"x"]


def test_one_slow_host_does_not_hold_up_the_others(site: Site) -> None:
    """Two hundred rows of a slow host before twenty of a quick one: the quick ones need not wait for them."""
    done: list[float] = []

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.Response(body=b"slow")

    async def quick(_: web.Request) -> web.Response:
        done.append(time.monotonic())
        return web.Response(body=b"quick")

    for i in range(200):
        site.pages[f"/slow{i}"] = slow
    for i in range(20):
        site.pages[f"/quick{i}"] = quick
    urls = [site.url(f"/slow{i}") for i in range(40)]
    urls += [f"http://127.0.0.2:{site.port}/quick{i}" for i in range(20)]
    began = time.monotonic()
    # The server listens on 127.0.0.1 alone; the name is what counts as a host.
    urls = [u.replace("127.0.0.2", "localhost") for u in urls]
    found = fetch(*urls, host_concurrency=4, concurrency=8)
    assert found == [b"slow"] * 40 + [b"quick"] * 20
    assert max(done) - began < 1.0  # the slow ones alone take 40 / 4 * 0.2 = 2 s


def test_robots_txt_is_respected_where_switched_on(site: Site) -> None:
    body = image_bytes(0)
    for path in ("/a.png", "/private/b.png", "/named/c.png"):
        site.add(path, body)
    urls = [site.url(p) for p in ("/a.png", "/private/b.png", "/named/c.png")]
    on = OptOutConfig(robots_txt=True)
    site.add("/robots.txt", b"User-agent: *\nDisallow: /private/*.png$\n\nUser-agent: img2dataset\nDisallow: /named\n")
    assert fetch(*urls, opt_out=on) == [body, "robots_txt", "robots_txt"]
    assert site.hits["/robots.txt"] == 1  # once for all three
    assert site.hits["/private/b.png"] == site.hits["/named/c.png"] == 0
    assert fetch(*urls) == [body] * 3
    site.add("/robots.txt", b"User-agent: carrara\nAllow: /\n\nUser-agent: *\nDisallow: /\n")
    assert fetch(*urls, opt_out=on) == [body] * 3
    del site.pages["/robots.txt"]  # 404 allows everything
    assert fetch(*urls, opt_out=on) == [body] * 3
    site.add("/robots.txt", b"", 503)  # unreachable forbids it, for now
    assert fetch(*urls, opt_out=on) == ["host_unavailable"] * 3
    # Of a long one the first 500 KiB and more are read (RFC 9309, 2.5).
    rules = b"User-agent: *\nDisallow: /private\n"
    site.add("/robots.txt", b"#" * (499 << 10) + b"\n" + rules + b"#" * (90 << 10) + b"\nDisallow: /\n")
    assert fetch(*urls, opt_out=on) == [body, "robots_txt", body]
    site.add("/robots.txt", b"\xef\xbb\xbf" + rules.replace(b"\n", b"\r\n"))
    assert fetch(*urls, opt_out=on) == [body, "robots_txt", body]
    site.add("/robots.txt", b"", 302, Location="/elsewhere")
    site.add("/elsewhere", rules)
    assert fetch(*urls, opt_out=on) == [body, "robots_txt", body]
    site.raw["/robots.txt"] = b"no HTTP at all"  # there is one, and nobody can say what it forbids
    assert fetch(site.raw_url("/a.png"), opt_out=on) == "http_malformed"
    # A redirect leads to what the other host's file forbids.
    site.add("/robots.txt", b"User-agent: *\nDisallow: /private\n")
    assert fetch(site.add("/hop", b"", 302, Location="/private/b.png"), opt_out=on) == "robots_txt"
