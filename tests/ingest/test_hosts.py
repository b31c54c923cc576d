"""Hosts for all workers of a run: limits, Retry-After, breaker and robots.txt hold for the run, not for a process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ingest.config import FetchConfig, OptOutConfig
from ingest.desk import Desk
from ingest.errors import Rejected
from ingest.fetch import Fetcher
from ingest.hosts import LAPSE_S, ROBOTS_FETCH_S, Answer, Ledger, Message, joined, parted
from tests.ingest.site import Site


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.sampled_from(["ask", "give", "tick"]))))
def test_never_more_places_than_the_limit_and_none_is_lost(steps: list[tuple[int, str, str]]) -> None:
    """Any workers, any order: at most the limit is granted, and in the end everybody had what they asked for."""
    ledger = Ledger(3, 0, 60.0, clock=Clock())
    leased = [Counter[str]() for _ in range(4)]
    asked = [Counter[str]() for _ in range(4)]
    had = [Counter[str]() for _ in range(4)]

    def say(worker: int, message: Message) -> None:
        answer = ledger.exchange(str(worker), message)
        leased[worker].update(answer.granted)
        had[worker].update(answer.granted)
        for host in "abc":
            assert sum(h[host] for h in leased) <= 3

    for worker, host, what in steps:
        if what == "ask":
            asked[worker][host] += 2
            say(worker, Message(ask={host: 2}))
        elif what == "give" and leased[worker][host]:
            leased[worker][host] -= 1
            say(worker, Message(give={host: 1}))
        else:
            say(worker, Message())
    for _ in range(2 * len(steps) + 4):
        for worker in range(4):
            back, leased[worker] = dict(leased[worker]), Counter()
            say(worker, Message(give={h: n for h, n in back.items() if n}))
    assert had == asked
    for worker in range(4):
        say(worker, Message(give={h: n for h, n in leased[worker].items() if n}))
    assert not ledger.hosts, "nothing is remembered of hosts that nobody uses and nothing bad is known of"


def test_the_places_of_a_worker_that_is_gone_are_free_again() -> None:
    clock = Clock()
    ledger = Ledger(2, 0, 60.0, clock=clock)
    assert ledger.exchange("dead", Message(ask={"h": 2})).granted == {"h": 2}
    assert ledger.exchange("b", Message(ask={"h": 1})).queued == ("h",)
    clock.now += LAPSE_S / 2
    assert not ledger.exchange("b", Message()).granted
    clock.now += LAPSE_S / 2 + 1
    ledger.exchange("b", Message())
    assert ledger.exchange("b", Message()).granted or ledger.hosts["h"].leased == {"b": 1}


def test_a_place_that_others_wait_for_is_called_back() -> None:
    ledger = Ledger(2, 0, 60.0, clock=Clock())
    assert ledger.exchange("a", Message(ask={"h": 2})).granted == {"h": 2}
    ledger.exchange("b", Message(ask={"h": 2}))
    assert ledger.exchange("a", Message()).recalled == {"h": 2}
    assert ledger.exchange("a", Message()).recalled == {}
    ledger.exchange("a", Message(give={"h": 1}))
    assert ledger.exchange("b", Message()).granted == {"h": 1}


def test_retry_after_and_the_breaker_hold_for_all_workers() -> None:
    clock = Clock()
    ledger = Ledger(4, 2, 60.0, clock=clock)
    ledger.exchange("a", Message(ask={"h": 1}))
    ledger.exchange("b", Message(ask={"h": 1}))
    ledger.exchange("a", Message(quiet={"h": 30.0}))
    assert ledger.exchange("b", Message()).quiet == {"h": 30.0}
    found = ledger.exchange("c", Message(ask={"h": 1}))
    assert (found.granted, found.queued, found.quiet) == ({}, ("h",), {"h": 30.0})
    clock.now += 30.5
    assert ledger.exchange("c", Message()).granted == {"h": 1}
    ledger.exchange("a", Message(failed=(("h", "timeout"),), give={"h": 1}))
    ledger.exchange("c", Message(failed=(("h", "timeout"),), give={"h": 1}))
    assert ledger.exchange("b", Message()).refused == {"h": (0, "host_unavailable")}, "whoever holds a place is told"
    assert ledger.exchange("d", Message(ask={"h": 3})).refused == {"h": (3, "host_unavailable")}
    clock.now += 61
    found = ledger.exchange("d", Message(ask={"h": 3}))
    assert (found.granted, found.refused) == ({"h": 1}, {"h": (2, "host_unavailable")}), "one tries"
    assert ledger.exchange("e", Message(ask={"h": 1})).refused == {"h": (1, "host_unavailable")}
    ledger.exchange("d", Message(answered=("h",)))
    assert ledger.exchange("e", Message(ask={"h": 1})).granted == {"h": 1}


def test_a_robots_txt_is_read_by_one_worker_and_by_another_if_that_one_is_gone() -> None:
    clock = Clock()
    ledger = Ledger(4, 2, 60.0, clock=clock)
    origin = "http://h"
    assert ledger.exchange("a", Message(robots_wanted=(origin,))).robots == {origin: None}
    assert ledger.exchange("b", Message(robots_wanted=(origin,))).robots == {}
    clock.now += ROBOTS_FETCH_S + 1
    ledger.exchange("b", Message())
    assert ledger.exchange("b", Message()).robots in ({origin: None}, {})
    ledger.exchange("b", Message(robots_found={origin: ("", b"rules")}))
    assert ledger.exchange("c", Message(robots_wanted=(origin,))).robots == {origin: ("", b"rules")}
    ledger.exchange("c", Message(robots_found={"http://i": ("host_unavailable", b"no")}))
    assert ledger.exchange("c", Message(robots_wanted=("http://i",))).robots == {"http://i": None}, "asked anew"


def test_a_new_ledger_is_told_what_is_held() -> None:
    old, new = Ledger(2, 0, 60.0, epoch="1"), Ledger(2, 0, 60.0, epoch="2")
    assert old.exchange("a", Message(ask={"h": 2})).epoch == "1"
    new.exchange("a", Message(leased={"h": 2}, epoch="1"))
    assert new.exchange("b", Message(ask={"h": 1})).queued == ("h",)


@given(st.lists(st.text(max_size=8), max_size=30), st.integers(1, 5))
def test_a_message_to_several_ledgers_is_the_message(hosts: list[str], parts: int) -> None:
    ask = Counter(hosts)
    message = Message(
        ask=ask, give=ask, failed=tuple((h, "timeout") for h in hosts), rows=7, leased=dict(ask), quiet={}
    )
    split = parted(message, parts)
    assert len(split) == parts
    assert sum((Counter(m.ask) for m in split), Counter()) == ask
    assert sum(m.rows for m in split) == 7
    assert Counter(f for m in split for f in m.failed) == Counter(message.failed)
    answers = [Answer(granted=m.ask, epoch=str(i)) for i, m in enumerate(split)]
    assert joined(answers).granted == ask
    assert [m.epoch for m in parted(message._replace(epoch=joined(answers).epoch), parts)] == [*map(str, range(parts))]


def workers(
    count: int, urls: list[list[str]], config: dict[str, Any], opt_out: OptOutConfig | None = None, share: bool = True
) -> list[list[str]]:
    """Several workers, each with an event loop and a client of its own in a thread, and one ledger among them."""
    settings = FetchConfig.model_validate(
        {"allow_addresses": ["127.0.0.1/32"], "retries": 0, "backoff": 0.01, **config}
    )
    ledger = Ledger(settings.host_concurrency, settings.host_failures, settings.host_pause, epoch="one")
    lock = threading.Lock()

    def exchange(worker: str, message: Message) -> Answer:
        with lock:
            return ledger.exchange(worker, message)._replace(wait=0.02)

    found: list[list[str]] = [[] for _ in range(count)]

    async def one(fetcher: Fetcher, url: str) -> str:
        try:
            async with fetcher.fetch(url):
                return "ok"
        except Rejected as e:
            return e.code

    async def all_of(i: int) -> None:
        fetcher = Fetcher(settings, opt_out or OptOutConfig(), exchange if share else None, f"worker {i}")
        try:
            found[i] = await asyncio.gather(*(one(fetcher, u) for u in urls[i]))
        finally:
            await fetcher.close()

    threads = [threading.Thread(target=lambda i=i: asyncio.run(all_of(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not ledger.hosts or all(not h.leased for h in ledger.hosts.values()), "every place came back"
    return found


def slow(body: bytes = b"x", seconds: float = 0.03) -> Callable[[web.Request], Any]:
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(seconds)
        return web.Response(body=body)

    return answer


def test_the_limit_of_a_host_holds_over_several_workers(site: Site) -> None:
    for i in range(48):
        site.pages[f"/{i}"] = slow()
    urls = [[site.url(f"/{i}") for i in range(w, 48, 4)] for w in range(4)]
    assert workers(4, urls, {"host_concurrency": 3}) == [["ok"] * 12] * 4
    assert site.most_busy <= 3
    site.most_busy = 0
    assert workers(4, urls, {"host_concurrency": 3}, share=False) == [["ok"] * 12] * 4
    assert site.most_busy > 3, "or the comparison says nothing"


def test_retry_after_keeps_the_other_workers_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker hears 429 with a second to wait; another, which heard nothing, asks nothing for that second."""
    monkeypatch.setattr("ingest.desk.QUANTUM_S", 0.1)
    asked: list[float] = []

    async def limited(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return web.Response(status=429, headers={"Retry-After": "1"})

    async def plain(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        await asyncio.sleep(0.05)
        return web.Response(body=b"x")

    site.pages["/limited"] = limited
    for i in range(60):
        site.pages[f"/{i}"] = plain
    found = workers(2, [[site.url("/limited")], [site.url(f"/{i}") for i in range(60)]], {"host_concurrency": 2})
    assert found[1] == ["ok"] * 60
    gaps = [b - a for a, b in zip(sorted(asked), sorted(asked)[1:], strict=False)]
    assert max(gaps) > 0.8


def test_the_breaker_of_one_worker_is_the_others(site: Site) -> None:
    async def broken(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    for i in range(80):
        site.raw[f"/{i}"] = broken
    urls = [[site.raw_url(f"/{i}") for i in range(w, 80, 4)] for w in range(4)]
    found = workers(4, urls, {"host_concurrency": 2, "host_failures": 3})
    codes = Counter(c for w in found for c in w)
    assert set(codes) == {"connection_lost", "host_unavailable"}
    assert codes["connection_lost"] <= 8  # three, and those that failed before the others heard of it
    found = workers(4, urls, {"host_concurrency": 2, "host_failures": 3}, share=False)
    assert Counter(c for w in found for c in w)["connection_lost"] >= 12


def test_robots_txt_is_asked_for_once_a_run(site: Site) -> None:
    site.add("/robots.txt", b"User-agent: *\nDisallow: /no\n")
    for i in range(12):
        site.add(f"/{i}", b"x")
        site.add(f"/no{i}", b"x")
    urls = [[site.url(f"/{p}{i}") for p in ("", "no") for i in range(w, 12, 3)] for w in range(3)]
    found = workers(3, urls, {}, OptOutConfig(robots_txt=True))
    assert found == [["ok"] * 4 + ["robots_txt"] * 4] * 3
    assert site.hits["/robots.txt"] == 1


def test_retry_after_keeps_other_requests_of_the_host_away_in_one_worker(site: Site) -> None:
    """E3: the pause that one answer asks for is kept by the requests for other pages of the host too."""
    asked: list[float] = []

    async def limited(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return web.Response(status=429, headers={"Retry-After": "1"})

    async def plain(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return web.Response(body=b"x")

    site.pages |= {"/limited": limited, "/a": plain, "/b": plain}
    found = workers(1, [[site.url("/limited"), site.url("/a"), site.url("/b")]], {"host_concurrency": 1}, share=False)
    assert found == [["http_rate_limited", "ok", "ok"]]
    assert asked[1] - asked[0] > 0.9


def test_a_worker_goes_on_by_itself_where_the_ledger_is_lost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.desk.LOST_S", 0.0)
    monkeypatch.setattr("ingest.desk.RETRY_S", 0.01)

    def lost(worker: str, message: Message) -> Answer:
        raise ConnectionError

    for i in range(6):
        site.pages[f"/{i}"] = slow()

    async def ask() -> None:
        config = FetchConfig.model_validate({"allow_addresses": ["127.0.0.1/32"]})
        fetcher = Fetcher(config, OptOutConfig(), lost, "w")
        try:

            async def one(url: str) -> bytes:
                async with fetcher.fetch(url) as fetched:
                    return fetched.body

            assert await asyncio.gather(*(one(site.url(f"/{i}")) for i in range(6))) == [b"x"] * 6
        finally:
            await fetcher.close()

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert site.most_busy == 1


def test_a_cancelled_request_gives_its_place_back() -> None:
    async def run() -> None:
        desk = Desk(FetchConfig(host_concurrency=1))
        assert await desk.enter("h") is False
        waiting = [asyncio.create_task(desk.enter("h")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        desk.leave("h")
        waiting[1].cancel()  # though it was just given the place
        await asyncio.sleep(0.01)
        await asyncio.wait_for(waiting[2], 1)
        desk.leave("h")
        assert not desk._seats
        await desk.close()

    asyncio.run(run())


def test_a_worker_that_is_ended_after_its_shard_leaves_no_place_taken() -> None:
    """The engine ends workers that have nothing left to do, and the last ones would wait for what they held."""

    async def run() -> None:
        ledger = Ledger(2, 0, 60.0)
        desk = Desk(FetchConfig(host_concurrency=2), "a", ledger.exchange)
        for _ in range(2):
            await asyncio.wait_for(desk.enter("h"), 5)
        desk.leave("h")
        desk.leave("h")
        await desk.rest()  # and here the process is killed
        assert ledger.exchange("b", Message(ask={"h": 2})).granted == {"h": 2}
        await desk.close()

    asyncio.run(run())


def test_a_message_that_was_never_sent_is_said_again() -> None:
    """A worker that ends while another message is under way tells the ledger of all that it did."""
    heard: list[Message] = []
    begun, go = threading.Event(), threading.Event()

    def exchange(_: str, message: Message) -> Answer:
        begun.set()
        assert go.wait(10)
        heard.append(message)
        return Answer(epoch="one")

    async def work() -> None:
        desk = Desk(FetchConfig(), "a", exchange)
        first = asyncio.create_task(desk._talk())
        while not begun.is_set():
            await asyncio.sleep(0.01)
        desk.row(True)
        desk._robots_found["http://h"] = ("", b"rules")
        second = asyncio.create_task(desk._talk())  # waits for the thread
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        go.set()
        await first
        await desk._talk(gone=True)

    asyncio.run(work())
    assert [m.rows for m in heard] == [0, 1]
    assert heard[-1].robots_found == {"http://h": ("", b"rules")}
