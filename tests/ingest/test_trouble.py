"""Trouble of this machine's own is nobody's row's: descriptors, names, routes, memory, decoders that die."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ingest.headers
import ingest.pixels
from ingest import decoders, trouble
from ingest.addresses import AddressRefused, Guard
from ingest.bodies import Room
from ingest.config import FetchConfig
from ingest.errors import Rejected
from ingest.names import Names
from ingest.pool import FetchPool, Outcome, pixel_settings
from ingest.takedown import TakenDown
from shards import machine
from shards.settings import ConfigError, NodeTrouble, validate
from tests.ingest.conftest import make_config
from tests.ingest.site import Site, image_bytes


@pytest.fixture
def pool() -> Iterator[Any]:
    made: list[FetchPool] = []

    def make(**settings: Any) -> FetchPool:
        fetch = {"retries": 0, "allow_addresses": ["127.0.0.0/8"], **settings.pop("fetch", {})}
        made.append(FetchPool(make_config("t.csv", fetch=fetch, **settings), TakenDown()))
        return made[-1]

    yield make
    for c in made:
        c.close()


def codes(found: dict[int, Outcome]) -> list[str | None]:
    return [found[i].error for i in sorted(found)]


# ---- whose fault


def test_a_machine_without_dns_gives_the_shard_back(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (socket.EAI_AGAIN, socket.EAI_NONAME):

        def dead(*_: Any, n: int = number, **__: Any) -> Any:
            raise socket.gaierror(n, "x")

        monkeypatch.setattr(socket, "getaddrinfo", dead)
        with pytest.raises(NodeTrouble, match=r"no name can be looked up here.*fetch\.canaries"):
            pool().fetch_all({i: f"http://host{i % 40}.test/{i}.jpg" for i in range(200)})
        with pytest.raises(NodeTrouble):  # also where the shard is short
            pool().fetch_all({0: "http://one.test/", 1: "http://two.test/"})


def test_a_table_of_dead_names_is_the_tables_where_a_canary_is_found(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        if host == "canary.test":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 0))]
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = pool(fetch={"canaries": ["canary.test"]}).fetch_all({i: f"http://dead{i}.test/" for i in range(60)})
    assert codes(found) == ["dns_not_found"] * 60
    assert 1 <= asked.count("canary.test") <= 3
    assert FetchConfig().canaries


def test_out_of_descriptors_is_not_the_rows_fault(pool: Any) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", _KEEPS_CONNECTIONS], stdout=subprocess.PIPE, text=True
    )  # a process of its own, with descriptors of its own
    assert server.stdout is not None
    port = int(server.stdout.readline())
    c = pool(fetch={"concurrency": 8})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard, "a worker takes what it can get"
    try:
        assert codes(c.fetch_all({0: f"http://127.0.0.1:{port}/"})) == ["not_an_image"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
        with pytest.raises(NodeTrouble, match="out of file descriptors"):
            c.fetch_all({i: f"http://127.0.1.{i}:{port}/" for i in range(1, 201)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        server.kill()
        server.wait()
    assert codes(c.fetch_all({0: "http://127.0.0.1:1/"})) == ["connect_refused"]


_KEEPS_CONNECTIONS = """
import asyncio
async def serve(r, w):
    try:
        while True:
            await r.readuntil(b"\\r\\n\\r\\n")
            w.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1\\r\\n\\r\\nx")
            await w.drain()
    except Exception: pass
async def go():
    s = await asyncio.start_server(serve, "0.0.0.0", 0, backlog=500)
    print(s.sockets[0].getsockname()[1], flush=True)
    await s.serve_forever()
asyncio.run(go())
"""


def test_no_route_is_this_machines_and_a_router_that_says_so_is_not(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unreachable(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    c = pool()
    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", unreachable)
    # The machine's own table has a way to 127.0.0.1, so somebody else says this.
    assert codes(c.fetch_all({0: "http://127.0.0.1:1/"})) == ["connect_refused"]
    monkeypatch.setattr("ingest.fetch.no_route", lambda address: address == "127.0.0.1")
    with pytest.raises(NodeTrouble, match="no route"):
        c.fetch_all({0: "http://127.0.0.1:1/"})
    assert not trouble.no_route("127.0.0.1")
    assert not trouble.no_route("2001:db8::1")  # a machine without IPv6 is a machine as any other


def test_what_an_error_says_of_this_machine_is_found_behind_it() -> None:
    outer = RuntimeError("x")
    outer.__cause__ = OSError(errno.EMFILE, "Too many open files")
    assert "descriptors" in machine.own_fault(ExceptionGroup("g", [ValueError(), outer]))
    assert "thread" in machine.own_fault(RuntimeError("can't start new thread"))
    assert "disk is full" in machine.own_fault(OSError(errno.ENOSPC, ""))
    assert not machine.own_fault(OSError(errno.ECONNRESET, ""))
    assert not machine.own_fault(MemoryError()), "there is plenty: then it is the image's"


def health(run_rate: float | None, reachable: bool, canaries: tuple[str, ...] = ("canary.test:80",)) -> trouble.Health:
    async def look_up(host: str) -> None:
        if not reachable:
            raise Rejected("dns_failure")

    async def reach(host: str, port: int) -> None:
        if not reachable:
            raise TimeoutError

    return trouble.Health(canaries, look_up, reach, lambda: run_rate)


@pytest.mark.parametrize(
    ("rate", "own", "reachable", "stops"),
    [
        (0.8, 0.1, False, True),
        (0.8, 0.1, True, False),  # the canary answers: these rows are what they are
        (0.8, 0.5, False, False),
        (0.2, 0.1, False, False),  # the others do no better
        (None, 0.0, False, False),  # nobody knows how the others do
    ],
)
def test_a_worker_far_below_the_runs_success_asks_the_canaries(
    rate: float | None, own: float, reachable: bool, stops: bool
) -> None:
    async def run() -> None:
        h = health(rate, reachable)
        for i in range(1000):
            await h.row(i % 100 < own * 100)

    if stops:
        with pytest.raises(NodeTrouble):
            asyncio.run(run())
    else:
        asyncio.run(run())


def test_hosts_that_answered_before_are_canaries_too() -> None:
    asked: list[str] = []

    async def reach(host: str, port: int) -> None:
        asked.append(f"{host}:{port}")

    async def run() -> None:
        h = trouble.Health((), lambda host: reach(host, 0), reach)
        h.answered("good.test", 8080)
        for i in range(20):
            h.unreached(f"host{i}")
        await h.judge()
        h.unreached("one more")
        await h.judge()

    asyncio.run(run())
    assert asked == ["good.test:8080"]


def test_an_error_that_nobody_foresaw_ends_its_row(pool: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(data: bytes, settings: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("ingest.pool.process", odd)
    monkeypatch.setattr("ingest.pool.is_quick", lambda data, settings: data == b"odd")
    c = pool()
    c.fetch_all({0: "http://127.0.0.1:1/"})
    found = c.fetch_all({0: site.add("/odd", b"odd"), 1: site.add("/1.png", image_bytes(1))})
    assert codes(found) == ["unforeseen", None]
    assert found[0].message == "ZeroDivisionError"
    monkeypatch.setattr(c._fetcher, "_check_opt_out", odd)
    assert codes(c.fetch_all({0: site.url("/odd")})) == ["unforeseen"]
    monkeypatch.setattr(c._fetcher, "fetch", lambda url: odd(b"", None))  # outside of any request, too
    assert codes(c.fetch_all({0: site.url("/odd")})) == ["unforeseen"]


# ---- names


def test_names_are_remembered_for_their_ttl_in_both_families_and_boundedly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.names.SHORTEST_TTL_S", 0.0)
    monkeypatch.setattr("ingest.names.MANY_NAMES", 3)
    dns = Dns()
    dns.answers["a.test"] = (2, ["93.184.215.14"], ["2606:2800:220::1"])
    dns.answers["deep.name.test"] = (5, ["93.184.215.15"], [])
    dns.answers["inner.test"] = (60, ["10.0.0.1"], [])

    async def run() -> None:
        names = Names(FetchConfig(nameservers=(f"127.0.0.1:{dns.port}",)), Guard())
        found = await asyncio.gather(*(names.resolve("a.test", 80) for _ in range(20)))
        assert sorted(r["host"] for r in found[0]) == ["2606:2800:220::1", "93.184.215.14"]
        assert found[0][0]["port"] == 80
        assert dns.asked == {("a.test", 1): 1, ("a.test", 28): 1}, "one question for twenty that ask at once"
        await names.resolve("a.test", 443)
        assert sum(dns.asked.values()) == 2
        await asyncio.sleep(2.1)
        await names.resolve("a.test", 443)
        assert sum(dns.asked.values()) == 4
        await names.resolve("deep.name.test", 80)
        assert {n for n, _ in dns.asked} == {"a.test", "deep.name.test"}, "no search domain is tried"
        for host, code in (("gone.test", "dns_not_found"), ("inner.test", "address_refused")):
            with pytest.raises(Rejected) as caught:
                await names.resolve(host, 80)
            assert caught.value.code == code
        before = sum(dns.asked.values())
        for _ in range(2):
            with pytest.raises(Rejected, match="dns_not_found"):
                await names.resolve("gone.test", 80)
        assert sum(dns.asked.values()) == before, "also that a name is not there"
        for i in range(4):
            with pytest.raises(Rejected):
                await names.resolve(f"gone{i}.test", 80)
        assert len(names._known) == 3
        await names.close()

    asyncio.run(run())
    dns.close()


class Dns:
    """A name server of a few lines: answers A and AAAA from a table, NXDOMAIN else."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, list[str], list[str]]] = {}
        self.asked: dict[tuple[str, int], int] = {}
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.socket.close()

    def _serve(self) -> None:
        while True:
            try:
                data, peer = self.socket.recvfrom(2048)
            except OSError:
                return
            labels, at = [], 12
            while data[at]:
                labels.append(data[at + 1 : at + 1 + data[at]].decode())
                at += 1 + data[at]
            name, kind = ".".join(labels).lower(), struct.unpack(">H", data[at + 1 : at + 3])[0]
            self.asked[name, kind] = self.asked.get((name, kind), 0) + 1
            ttl, four, six = self.answers.get(name, (0, [], []))
            records = [socket.inet_aton(a) for a in four] if kind == 1 else []
            records += [socket.inet_pton(socket.AF_INET6, a) for a in six] if kind == 28 else []
            question = data[12 : at + 5]
            flags = 0x8180 if name in self.answers else 0x8183
            answer = data[:2] + struct.pack(">HHHHH", flags, 1, len(records), 0, 0) + question
            for r in records:
                answer += b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, ttl, len(r)) + r
            self.socket.sendto(answer, peer)


# ---- addresses, proxy


def test_a_port_may_be_named_with_an_allowed_address() -> None:
    guard = Guard(["127.0.0.1:8701", "[::1]:8702", "10.0.0.0/8", "[fd00::/8]:443"])
    for address, port, permitted in (
        ("127.0.0.1", 8701, True),
        ("127.0.0.1", 8265, False),
        ("127.0.0.1", None, False),
        ("::1", 8702, True),
        ("::1", 80, False),
        ("10.1.2.3", 5, True),
        ("fd00::7", 443, True),
        ("fd00::7", 80, False),
        ("::ffff:127.0.0.1", 8701, True),
        ("::ffff:127.0.0.1", 80, False),
        ("93.184.215.14", 5, True),
    ):
        assert guard.permits(address, port) == permitted, (address, port)
    with pytest.raises(AddressRefused):
        guard.socket_factory((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 8265)))
    for wrong in ("127.0.0.1:0", "127.0.0.1:70000", "localhost", "10.0.0.1/8", "[::1]x"):
        with pytest.raises(ConfigError, match="write each entry as a network"):
            validate(FetchConfig, {"allow_addresses": [wrong]}, "x")


def test_an_allowed_port_opens_no_other(site: Site) -> None:
    from tests.ingest.test_fetch import fetch

    allow = (f"127.0.0.1:{site.port}",)
    url = site.add("/x", b"x")
    assert fetch(url, allow_addresses=allow) == b"x"
    site.raw["/y"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\ny"
    assert fetch(site.raw_url("/y"), allow_addresses=allow) == "address_refused"
    assert fetch(site.add("/to", b"", 302, Location=site.raw_url("/y")), allow_addresses=allow) == "address_refused"
    hop = site.raw_url("/y").replace("127.0.0.1", "localhost")
    assert fetch(site.add("/to2", b"", 302, Location=hop), allow_addresses=allow) == "address_refused"


@pytest.mark.parametrize(
    "address",
    [
        "168.63.129.16",
        "161.26.0.10",
        "166.9.1.1",
        "192.80.8.124",
        "199.36.153.8",
        "100.100.100.200",
        "192.0.0.192",
        "169.254.169.254",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::a9fe:a9fe",
    ],
)
def test_what_clouds_answer_to_their_own_machines_is_refused(address: str) -> None:
    assert not Guard().permits(address)
    assert Guard().permits("168.63.129.17")


def test_the_socket_itself_is_judged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """E2: a resolver that says nothing of the address is not enough to get in; the real connection is refused."""
    from tests.ingest.test_fetch import fetch

    url = site.add("/in", b"x").replace("127.0.0.1", "rebound.test")

    async def everything(self: Names, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[Any]:
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            {"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 6, "flags": flags}
        ]

    monkeypatch.setattr(Names, "resolve", everything)
    assert fetch(url, allow_addresses=()) == "address_refused"
    assert site.hits["/in"] == 0
    assert fetch(url) == b"x"


def test_a_proxy_gets_every_request_and_private_addresses_are_not_asked_for(site: Site) -> None:
    from tests.ingest.test_fetch import fetch

    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nproxied")
        await writer.drain()
        writer.close()

    server = Server(serve)
    proxy = f"http://127.0.0.1:{server.port}"
    assert fetch("http://nowhere.test/a%2Cb?x", proxy=proxy, allow_addresses=()) == b"proxied"
    assert fetch("http://127.0.0.1:1/", proxy=proxy, allow_addresses=()) == "address_refused"
    assert fetch("http://169.254.169.254/", proxy=proxy, allow_addresses=()) == "address_refused"
    assert asked == ["http://nowhere.test/a%2Cb?x"]
    server.close()
    with pytest.raises(ConfigError, match="write the proxy as"):
        validate(FetchConfig, {"proxy": "socks5://x"}, "x")


class Server:
    """An asyncio server in a thread."""

    def __init__(self, serve: Any) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        made = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), self.loop).result(10)
        self.port = made.sockets[0].getsockname()[1]

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


# ---- memory and the event loop


def test_bodies_in_flight_have_a_budget(pool: Any, site: Site) -> None:
    """E4: sixty bodies of 2 MB in a room of 8 MB: never more than that is held, and all of them come through."""
    body = os.urandom(2_000_000)
    urls = {i: site.add(f"/{i}", body) for i in range(60)}
    c = pool(fetch={"max_bytes": 2_000_000, "body_memory": 8_000_000, "host_concurrency": 60, "concurrency": 60})
    c.fetch_all({0: "http://127.0.0.1:1/"})
    room = c._fetcher.room
    least = [room.free]
    take = room.take

    def watched(body: int, size: int) -> bool:
        done = take(body, size)
        least[0] = min(least[0], room.free)
        return done

    room.take = watched
    assert codes(c.fetch_all(urls)) == ["not_an_image"] * 60
    assert least[0] >= 0
    assert least[0] < 4_000_000, "or the room was never full"
    assert room.free == 8_000_000, "all of it came back"
    assert not room._taken


def test_in_a_full_room_the_first_body_grows_and_the_others_wait() -> None:
    async def run() -> None:
        room = Room(10, 6)
        first, second, third = room.begin(), room.begin(), room.begin()
        assert room.take(second, 4)
        assert not room.take(third, 1), "six are kept for the first"
        waiting = asyncio.create_task(room.wait(third, 1))
        assert room.take(first, 6)
        await asyncio.sleep(0)
        assert not waiting.done()
        room.done(first)  # it is still held
        room.end(first)
        await asyncio.wait_for(waiting, 1)
        room.end(second)
        room.end(third)
        assert room.free == 10

    asyncio.run(run())


@pytest.mark.slow
def test_slow_bodies_that_fill_the_room_do_not_end_their_neighbours(pool: Any, site: Site) -> None:
    """Hostile servers send all but the last byte of large bodies and then nothing: a small picture comes through."""

    async def all_but_one(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900001\r\n\r\n" + b"x" * 900_000)
        await writer.drain()
        await asyncio.sleep(20)

    for i in range(12):
        site.raw[f"/{i}"] = all_but_one
    urls = {i: site.raw_url(f"/{i}") for i in range(12)} | {12: site.add("/good.png", image_bytes(1))}
    limits = {"max_bytes": 1_000_000, "body_memory": 2_000_000, "timeout": 2.0, "min_speed": 0, "host_failures": 0}
    began = time.monotonic()
    found = pool(fetch=limits).fetch_all(urls)
    assert codes(found)[12] is None
    assert set(codes(found)[:12]) == {"timeout"}
    assert time.monotonic() - began < 40


def test_a_jpeg_of_many_scans_over_many_pixels_is_refused_at_once() -> None:
    """E11: what each limit alone allows, 500 scans and 64 megapixels."""
    settings = ingest.pixels.PixelSettings(256, "center_crop", False, "jpg", 95, (255, 255, 255), 64_000_000)
    # A drawn one of 64 megapixels takes seconds to make: the size in the frame of a small one does as well.
    small = scan_bomb(640, 480, 40)
    for scans in (40, 499):
        bomb = scan_bomb(640, 480, scans).replace(struct.pack(">HH", 480, 640), struct.pack(">HH", 7999, 7999), 1)
        assert ingest.headers.jpeg_header(bomb) == (7999, 7999, 3, 0xC2, small.index(b"\xff\xc2"), scans)
        assert not ingest.pixels.is_quick(bomb, settings)
        began = time.process_time()
        with pytest.raises(Rejected, match="image_too_large"):
            ingest.pixels.process(bomb, settings)
        assert time.process_time() - began < 0.2
    small = scan_bomb(640, 480, 100)
    assert not ingest.pixels.is_quick(small, settings)
    ingest.pixels.process(small, settings)
    assert ingest.pixels.is_quick(scan_bomb(640, 480, 0), settings)


def scan_bomb(width: int, height: int, more: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(sink, "JPEG", quality=50, progressive=bool(more))
    data = sink.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * max(0, more - data.count(b"\xff\xda")) + data[-2:]


def hostile() -> dict[str, bytes]:
    """Large and legal, or hostile: what could hold up the others."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (300, 300, 3), np.uint8))
    large = noise.resize((4000, 3000))

    def saved(image: Image.Image, fmt: str, **options: Any) -> bytes:
        sink = io.BytesIO()
        image.save(sink, fmt, **options)
        return sink.getvalue()

    return {
        "png": saved(large, "PNG", compress_level=1),
        "rgba": saved(large.convert("RGBA"), "PNG", compress_level=1),
        "webp": saved(large, "WEBP", method=0),
        "gif": saved(large.convert("P"), "GIF"),
        "jpeg": saved(large, "JPEG"),
        "progressive": saved(large, "JPEG", progressive=True),
        "cmyk": saved(large.convert("CMYK"), "JPEG"),
        "scans": scan_bomb(1000, 1000, 400),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("few_objects")
def test_no_picture_stops_the_event_loop(pool: Any, site: Site) -> None:
    """While they are decoded the loop turns: the longest stop is told by a clock in the loop itself."""
    urls = {i: site.add(f"/{name}", data) for i, (name, data) in enumerate(hostile().items())}
    urls |= {100 + i: site.add(f"/small{i}.jpg", image_bytes(i, 640, 480, "JPEG")) for i in range(20)}
    c = pool(encode_format="jpg", image_size=256)
    c.fetch_all({0: "http://127.0.0.1:1/"})
    stops: list[float] = []

    async def clock() -> None:
        while True:
            began, cpu = time.monotonic(), time.process_time()
            await asyncio.sleep(0.001)
            # What the machine gave to others is not the loop's: at most what this process itself has used.
            stops.append(min(time.monotonic() - began, time.process_time() - cpu))

    ticking = asyncio.run_coroutine_threadsafe(clock(), c._loop)
    found = c.fetch_all(urls)
    ticking.cancel()
    assert all(o.status == "success" for o in found.values()), codes(found)
    assert max(stops) < 0.1  # on a machine of one's own it is below 0.05


@pytest.mark.usefixtures("few_objects")
def test_a_bomb_in_a_body_is_inflated_piece_by_piece(pool: Any, site: Site) -> None:
    import zlib

    bomb = zlib.compress(b"\0" * 45_000_000, 9)
    c = pool()
    c.fetch_all({0: "http://127.0.0.1:1/"})
    stops: list[float] = []

    async def clock() -> None:
        while True:
            cpu = time.thread_time()
            await asyncio.sleep(0)
            stops.append(time.thread_time() - cpu)

    ticking = asyncio.run_coroutine_threadsafe(clock(), c._loop)
    assert codes(c.fetch_all({0: site.add("/bomb", bomb, Content_Encoding="deflate")})) == ["not_an_image"]
    ticking.cancel()
    assert max(stops) < 0.03  # the pieces put together in the loop take 0.05


# ---- decoders


def test_a_decoder_that_dies_hangs_or_wants_the_world_ends_one_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A decoder process whose `process` is replaced by one that crashes, hangs, or takes memory, as the bytes say."""
    (tmp_path / "sitecustomize.py").write_text(_CRASHING)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    settings = pixel_settings(make_config("t.csv"))
    pool = decoders.Decoders(settings, 600_000_000, 1.0)
    try:
        good = pool.process(image_bytes(1))
        assert good == ingest.pixels.process(image_bytes(1), settings)
        first = pool._mine.child
        for data, code, words in (
            (b"crash", "image_corrupt", "ended"),
            (b"hang", "image_corrupt", "within 1 s"),
            (b"memory", "image_too_large", "decode_memory"),
        ):
            with pytest.raises(Rejected) as caught:
                pool.process(data)
            assert caught.value.code == code
            assert words in caught.value.message
            assert pool.process(image_bytes(1)) == good
        assert pool._mine.child is not first
        with pytest.raises(Rejected, match="not_an_image"):
            pool.process(b"<html>")
    finally:
        pool.close()
    assert not pool._all


_CRASHING = """
import os, sys, time
if "ingest.decoders" in sys.orig_argv:
    import ingest.pixels
    real = ingest.pixels.process
    def process(data, settings):
        if data == b"crash":
            os.kill(os.getpid(), 11)
        if data == b"hang":
            time.sleep(8)
        if data == b"memory":
            bytearray(2_000_000_000)
        return real(data, settings)
    ingest.pixels.process = process
"""


def test_a_decoder_ends_with_its_worker(pool: Any, site: Site) -> None:
    c = pool()
    assert codes(c.fetch_all({0: site.add("/1.png", image_bytes(1))})) == [None]
    [child] = c._others._all
    c.close()
    assert child.child.returncode is not None


def test_a_large_transparent_picture_takes_a_stated_memory() -> None:
    """48 megapixels with transparency, in a process of its own: 4 bytes a pixel to decode, 3 of what comes out."""
    code = (
        "import io, resource, sys\nfrom PIL import Image\nfrom ingest.pixels import PixelSettings, process\n"
        "sink = io.BytesIO()\nImage.new('RGBA', (8000, 6000), (1, 2, 3, 128)).save(sink, 'PNG', compress_level=1)\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\nbefore = peak()\n"
        "process(sink.getvalue(), PixelSettings(256, 'center_crop', False, 'jpg', 95, (255, 255, 255), 64_000_000))\n"
        "print((peak() - before) / 48e6)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 12  # 20 where every step is taken over the whole picture
