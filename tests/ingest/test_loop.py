"""Nothing that comes from outside holds the event loop: the longest step of it that a hostile server can cause.

What counts is the CPU time of a single callback, not how long it took: other processes want the machine too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ingest.addresses import Guard
from ingest.config import FetchConfig, OptOutConfig
from ingest.errors import Rejected
from ingest.fetch import Fetcher
from ingest.names import MOST_ADDRESSES, Names
from tests.ingest import hostile

MOST_S = 0.05


pytestmark = pytest.mark.usefixtures("few_objects")


@contextlib.contextmanager
def longest_callback(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, str]]]:
    """[(seconds of CPU, what it was)] of the longest callback of any loop."""
    found = [(0.0, "")]
    real = asyncio.events.Handle._run

    def timed(self: asyncio.events.Handle) -> None:
        began = time.thread_time()
        real(self)
        spent = time.thread_time() - began
        if spent > found[0][0]:
            found[0] = spent, repr(self)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    try:
        yield found
    finally:
        monkeypatch.undo()


def ask(monkeypatch: pytest.MonkeyPatch, *urls: str, together: bool = False, **more: Any) -> list[str]:
    """What becomes of the URLs, one after another or all at once; fails where one of them held the loop."""
    limits: dict[str, Any] = {"timeout": 0.5, "retries": 0, "host_failures": 0, "allow_addresses": ["127.0.0.1/32"]}
    opt_out = OptOutConfig(robots_txt=more.pop("robots_txt", False))

    async def one(fetcher: Fetcher, url: str) -> str:
        try:
            async with fetcher.fetch(url) as fetched:
                return f"{len(fetched.body)} bytes"
        except Rejected as e:
            return e.code

    async def every() -> list[str]:
        fetcher = Fetcher(FetchConfig.model_validate(limits | more), opt_out)
        try:
            if together:
                return await asyncio.gather(*(one(fetcher, url) for url in urls))
            return [await one(fetcher, url) for url in urls]
        finally:
            await fetcher.close()

    with longest_callback(monkeypatch) as found:
        ends = asyncio.run(every())
    ((seconds, what),) = found
    print(f"{' '.join(ends):40} {1e3 * seconds:6.1f} ms {what[:100]}")
    assert seconds < MOST_S, f"{seconds:.3f} s: {what}"
    return ends


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with hostile.running() as found:
        yield found


@pytest.mark.parametrize("name", [n for n in hostile.ANSWERS if n != "plain"])
def test_no_answer_holds_the_loop(monkeypatch: pytest.MonkeyPatch, origin: str, name: str) -> None:
    assert ask(monkeypatch, f"{origin}/plain", f"{origin}/{name}", f"{origin}/plain")[::2] == ["1 bytes", "1 bytes"]


def test_pieces_that_wait_for_room_do_not_pile_up(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    """While the first body grows, the others wait for room with what they have."""
    limits = {"max_bytes": 1_000_000, "body_memory": 1_000_000, "timeout": 1.0}
    ask(monkeypatch, *[f"{origin}/tiny_chunks"] * 4, together=True, **limits)


@pytest.mark.parametrize("name", hostile.ROBOTS)
def test_no_robots_txt_holds_the_loop_or_fills_the_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with hostile.running(robots=name) as origin:
        urls = [f"{origin}/plain", f"{origin}/plain?{'a' * 30_000}"]
        ends = ask(monkeypatch, *urls, robots_txt=True, timeout=10.0)
    assert set(ends) == {hostile.ROBOTS[name][1]}


def test_a_name_of_thousands_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.0.{i >> 8}.{i & 255}", 0)) for i in range(4000)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    names = Names(FetchConfig(), Guard())
    assert len(asyncio.run(names.addresses("many.test"))) == MOST_ADDRESSES
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert ask(monkeypatch, "http://many.test/") == ["address_refused"]
