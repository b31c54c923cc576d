"""Hosts, for all workers of a run together: places for requests, Retry-After, a circuit breaker, robots.txt.

`Ledger` holds what is known of the hosts that are in use. A run has one; workers hold leases of places from it.
`Desk` is a worker's side: it asks for places ahead of their use, gives them back when they are idle, and tells
what servers said. All that goes between the two are batches (`Message`, `Answer`), one every half a second or so
however many rows there are, so that one ledger does for thousands of workers (orchestration/hosts.py puts it into
an actor; in one process it is called directly).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
import logging
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ingest.config import FetchConfig
from ingest.errors import ERRORS, Rejected

log = logging.getLogger("carrara.ingest")

LAPSE_S = 60.0  # without a word from a worker, then its places are free
MANY_BAD_HOSTS = 200_000  # remembered by a ledger though nobody uses them
ROBOTS_BYTES = 256 << 20  # of robots.txt that a ledger holds, compressed
ROBOTS_FETCH_S = 60.0  # for which others wait for the worker that reads one
TICK_S = 0.5  # between a worker's messages, at least
MESSAGES_S = 2000  # that a ledger takes a second; with more workers each writes more seldom
QUANTUM_S = 2.0  # for which a place is used before it goes to a worker that waits for it
LOST_S = 120.0  # without an answer from the ledger, then a worker goes on alone, by one request a host
RETRY_S = 5.0  # between its questions until then
PATIENCE = 10_000  # rows of the run, from which on its rate of success is told

Robots = tuple[str, bytes | None]  # ("", rules) with None where there are none, or (code of ERRORS, message)


NONE: Mapping[str, Any] = {}


class Message(NamedTuple):
    """From a worker. ask, give: places by host. leased: all places, where the ledger does not know the worker.

    gone: it is the worker's last, and all that it holds is free.
    """

    ask: Mapping[str, int] = NONE
    give: Mapping[str, int] = NONE
    answered: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()  # host, code
    quiet: Mapping[str, float] = NONE  # seconds that a host wants to be left alone
    robots_wanted: tuple[str, ...] = ()
    robots_found: Mapping[str, Robots] = NONE
    rows: int = 0
    successes: int = 0
    leased: dict[str, int] | None = None
    epoch: str = ""
    gone: bool = False


class Answer(NamedTuple):
    """To a worker. granted: places by host. refused: how many of its requests, and the code. wait: seconds."""

    granted: Mapping[str, int] = NONE
    queued: tuple[str, ...] = ()  # asked for in this message, and not to be had yet
    refused: Mapping[str, tuple[int, str]] = NONE
    recalled: Mapping[str, int] = NONE  # places that others wait for
    quiet: Mapping[str, float] = NONE
    robots: Mapping[str, Robots | None] = NONE  # None: read it, the others wait for you
    success_rate: float | None = None
    wait: float = TICK_S
    epoch: str = ""


def parted(message: Message, parts: int) -> list[Message]:
    """A message to several ledgers, each of which has its part of the hosts (and origins), by their names."""
    texts = message.epoch.split(",") if message.epoch else [""] * parts
    messages = []
    for part, epoch in enumerate(texts):

        def mine(name: str, part: int = part) -> bool:
            return zlib.crc32(name.encode("utf-8", "replace")) % parts == part

        messages.append(
            Message(
                ask={h: n for h, n in message.ask.items() if mine(h)},
                give={h: n for h, n in message.give.items() if mine(h)},
                answered=tuple(h for h in message.answered if mine(h)),
                failed=tuple(f for f in message.failed if mine(f[0])),
                quiet={h: s for h, s in message.quiet.items() if mine(h)},
                robots_wanted=tuple(o for o in message.robots_wanted if mine(o)),
                robots_found={o: r for o, r in message.robots_found.items() if mine(o)},
                rows=message.rows if part == 0 else 0,
                successes=message.successes if part == 0 else 0,
                leased=None if message.leased is None else {h: n for h, n in message.leased.items() if mine(h)},
                epoch=epoch,
                gone=message.gone,
            )
        )
    return messages


def joined(answers: Sequence[Answer]) -> Answer:
    """The answers of several ledgers as one."""
    return Answer(
        granted={h: n for a in answers for h, n in a.granted.items()},
        queued=tuple(h for a in answers for h in a.queued),
        refused={h: r for a in answers for h, r in a.refused.items()},
        recalled={h: n for a in answers for h, n in a.recalled.items()},
        quiet={h: s for a in answers for h, s in a.quiet.items()},
        robots={o: r for a in answers for o, r in a.robots.items()},
        success_rate=answers[0].success_rate,
        wait=max(a.wait for a in answers),
        epoch=",".join(a.epoch for a in answers),
    )


class _Host:
    """What a ledger knows of a host."""

    __slots__ = ("closed_until", "code", "failures", "leased", "queue", "quiet_until", "recalled", "used")

    def __init__(self) -> None:
        self.used = 0  # the sum of leased
        self.leased: dict[str, int] = {}
        self.queue: deque[str] = deque()
        self.recalled = self.failures = 0
        self.quiet_until = self.closed_until = 0.0
        self.code = ""


@dataclasses.dataclass
class _Worker:
    """What a ledger has to tell a worker, and what the worker holds."""

    seen: float
    leased: Counter[str] = dataclasses.field(default_factory=Counter)
    queued: Counter[str] = dataclasses.field(default_factory=Counter)
    granted: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    recalled: Counter[str] = dataclasses.field(default_factory=Counter)
    quiet: dict[str, float] = dataclasses.field(default_factory=dict)
    robots: dict[str, Robots | None] = dataclasses.field(default_factory=dict)


class Ledger:
    """The hosts of a run. Not safe for several threads; whoever has it calls `exchange` one at a time.

    limit: requests to one host at a time. After `failures` failures in a row nothing is asked of a host for
    `pause` seconds, then by one request at a time, until one is answered (0: never). clock: monotonic seconds.
    """

    def __init__(
        self, limit: int, failures: int, pause: float, epoch: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit, self.failures, self.pause, self.epoch, self.clock = limit, failures, pause, epoch, clock
        self.hosts: dict[str, _Host] = {}
        self.workers: dict[str, _Worker] = {}
        self.rows = self.successes = 0
        self._due: list[tuple[float, str]] = []  # hosts that may be asked again at a time
        self._bad: OrderedDict[str, None] = OrderedDict()  # hosts that are kept for what is known of them alone
        self._robots: OrderedDict[str, Robots] = OrderedDict()
        self._robots_bytes = 0
        self._reading: dict[str, tuple[float, str, set[str]]] = {}  # origin: since when, by whom, who else waits
        self._swept = clock()

    def exchange(self, name: str, message: Message) -> Answer:
        """Take in what a worker says, and tell it what there is for it."""
        now = self.clock()
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = _Worker(now)
        worker.seen = now
        if message.leased is not None and message.epoch != self.epoch:  # it knew another ledger
            for host, n in message.leased.items():
                self._hold(self._host(host), host, name, worker, n)
        self.rows += message.rows
        self.successes += message.successes
        for host in message.answered:
            found = self.hosts.get(host)
            if found is not None and found.failures:
                found.failures = 0
                self._serve(found, host, now)
        for host, code in message.failed:
            self._failed(host, code, now)
        for host, seconds in message.quiet.items():
            self._quieten(host, now + seconds)
        for host, n in message.give.items():
            self._give(host, name, worker, n, now)
        queued = [host for host, n in message.ask.items() if not self._ask(host, name, worker, n, now)]
        while self._due and self._due[0][0] <= now:
            host = heapq.heappop(self._due)[1]
            if host in self.hosts:
                self._serve(self.hosts[host], host, now)
        for origin, rules in message.robots_found.items():
            self._robots_are(origin, rules)
        for origin in message.robots_wanted:
            self._robots_for(origin, name, worker, now)
        if now - self._swept > LAPSE_S / 4:
            self._sweep(now)
        answer = Answer(
            granted=dict(worker.granted),
            queued=tuple(queued),
            refused=worker.refused,
            recalled=dict(worker.recalled),
            quiet={host: until - now for host, until in worker.quiet.items() if until > now},
            robots=worker.robots,
            success_rate=self.successes / self.rows if self.rows >= PATIENCE else None,
            wait=max(TICK_S, len(self.workers) / MESSAGES_S),
            epoch=self.epoch,
        )
        worker.granted, worker.refused, worker.recalled = Counter(), {}, Counter()
        worker.quiet, worker.robots = {}, {}
        if message.gone:
            self._forget_worker(name, now)
        return answer

    def next_due(self) -> float | None:
        """Seconds to the moment at which something changes by itself; None where nothing does."""
        return max(0.0, self._due[0][0] - self.clock()) if self._due else None

    def _host(self, name: str) -> _Host:
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = _Host()
        return host

    def _hold(self, host: _Host, name: str, by: str, worker: _Worker, n: int) -> None:
        host.leased[by] = host.leased.get(by, 0) + n
        host.used += n
        worker.leased[name] += n

    def _ask(self, name: str, by: str, worker: _Worker, n: int, now: float) -> bool:
        """Whether all of it was granted or refused at once."""
        host = self._host(name)
        if not host.queue and not host.failures and host.quiet_until <= now and host.used + n <= self.limit:
            self._hold(host, name, by, worker, n)  # as nearly always
            worker.granted[name] += n
            return True
        host.queue.extend([by] * n)
        worker.queued[name] += n
        if host.quiet_until > now:
            worker.quiet[name] = host.quiet_until
        self._serve(host, name, now)
        if worker.queued[name]:
            for _ in range(min(len(host.queue), host.used) - host.recalled):
                other = max(host.leased, key=lambda w: host.leased[w] - self.workers[w].recalled[name])
                if other == by:
                    break
                self.workers[other].recalled[name] += 1
                host.recalled += 1
        return not worker.queued[name]

    def _give(self, name: str, by: str, worker: _Worker, n: int, now: float) -> None:
        host = self.hosts.get(name)
        n = min(n, host.leased.get(by, 0)) if host is not None else 0
        if host is None or not n:
            return
        host.leased[by] -= n
        if not host.leased[by]:
            del host.leased[by]
        host.used -= n
        host.recalled = max(0, host.recalled - n)
        worker.leased[name] -= n
        if not worker.leased[name]:
            del worker.leased[name]
        self._serve(host, name, now)

    def _serve(self, host: _Host, name: str, now: float) -> None:
        """Grant or refuse what waits, as far as that can be said now; forget a host of which nothing is to be known."""
        while host.queue:
            if self.failures and host.failures >= self.failures:
                if now < host.closed_until:
                    for by in host.queue:
                        self._refuse(name, by, host.code)
                    host.queue.clear()
                    break
                host.closed_until = now + self.pause  # and this is the one that tries
            if host.quiet_until > now:
                break
            if host.used >= self.limit:
                break
            by = host.queue.popleft()
            worker = self.workers[by]
            worker.queued[name] -= 1
            if not worker.queued[name]:
                del worker.queued[name]
            self._hold(host, name, by, worker, 1)
            worker.granted[name] += 1
        if not host.queue and not host.used:
            if host.failures or host.quiet_until > now:
                self._bad[name] = None
                self._bad.move_to_end(name)
                if len(self._bad) > MANY_BAD_HOSTS:
                    gone = self._bad.popitem(last=False)[0]
                    if gone in self.hosts and not self.hosts[gone].used and not self.hosts[gone].queue:
                        del self.hosts[gone]
            else:
                self._bad.pop(name, None)
                self.hosts.pop(name, None)

    def _refuse(self, name: str, by: str, code: str) -> None:
        worker = self.workers[by]
        worker.queued[name] -= 1
        if not worker.queued[name]:
            del worker.queued[name]
        worker.refused[name] = (worker.refused.get(name, (0, code))[0] + 1, code)

    def _failed(self, name: str, code: str, now: float) -> None:
        host = self._host(name)
        host.failures += 1
        # What is final stays final for the rows that are not asked for.
        host.code = "host_unavailable" if ERRORS[code].retryable else code
        host.closed_until = now + self.pause
        if self.failures and host.failures >= self.failures:
            for by in host.leased:  # whose rows wait there for the places that it has
                self.workers[by].refused.setdefault(name, (0, host.code))
        self._serve(host, name, now)

    def _quieten(self, name: str, until: float) -> None:
        host = self._host(name)
        if until > host.quiet_until:
            host.quiet_until = until
            for by in {*host.leased, *host.queue}:
                self.workers[by].quiet[name] = until
            heapq.heappush(self._due, (until, name))

    def _robots_for(self, origin: str, by: str, worker: _Worker, now: float) -> None:
        if origin in self._robots:
            self._robots.move_to_end(origin)
            worker.robots[origin] = self._robots[origin]
            return
        since, reader, others = self._reading.get(origin, (-1e9, "", set()))
        if reader not in self.workers or now - since > ROBOTS_FETCH_S or reader == by:
            self._reading[origin] = (now, by, others)
            worker.robots[origin] = None
        else:
            others.add(by)

    def _robots_are(self, origin: str, rules: Robots) -> None:
        _, _, others = self._reading.pop(origin, (0.0, "", set()))
        for by in others:
            if by in self.workers:
                self.workers[by].robots[origin] = rules
        if rules[0]:
            return  # it could not be read: asked again by whoever comes next; the breaker bounds how often
        old = self._robots.pop(origin, None)
        self._robots_bytes -= _weight(old)
        self._robots[origin] = rules
        self._robots_bytes += _weight(rules)
        while self._robots_bytes > ROBOTS_BYTES:
            self._robots_bytes -= _weight(self._robots.popitem(last=False)[1])

    def _forget_worker(self, by: str, now: float) -> None:
        worker = self.workers[by]
        queued = list(worker.queued)
        worker.queued.clear()
        for name in queued:
            self.hosts[name].queue = deque(w for w in self.hosts[name].queue if w != by)
            self._serve(self.hosts[name], name, now)
        for name, n in list(worker.leased.items()):
            self._give(name, by, worker, n, now)
        del self.workers[by]

    def _sweep(self, now: float) -> None:
        """Free what workers hold that were not heard of for long."""
        self._swept = now
        for by in [name for name, worker in self.workers.items() if now - worker.seen > LAPSE_S]:
            self._forget_worker(by, now)
        for origin, (since, reader, others) in list(self._reading.items()):
            if now - since > ROBOTS_FETCH_S or reader not in self.workers:
                waiting = sorted(w for w in others if w in self.workers)
                if waiting:
                    self._reading[origin] = (now, waiting[0], set(waiting[1:]))
                    self.workers[waiting[0]].robots[origin] = None
                else:
                    del self._reading[origin]


def _weight(rules: Robots | None) -> int:
    return 0 if rules is None else 200 + len(rules[1] or b"")


class _Waiting:
    """A row that waits for a place. early: it is one of the few that may ask for one before its turn."""

    __slots__ = ("early", "future")

    def __init__(self, early: bool) -> None:
        self.early = early
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Seat:
    """A worker's side of a host."""

    __slots__ = ("asked", "failures", "owned", "quiet_until", "recall_at", "recalled", "used", "waiting")

    def __init__(self) -> None:
        self.owned = self.used = self.asked = self.recalled = self.failures = 0
        self.quiet_until = self.recall_at = 0.0
        self.waiting: deque[_Waiting] = deque()


Exchange = Callable[[str, Message], Answer]


class Desk:
    """A worker's places at hosts. To be used within one event loop; `await close()` at the end.

    exchange: how the run's ledger is reached, called in a thread; without it the ledger is this process's own.
    early: requests that may hold or ask for a place before they are under way.
    """

    def __init__(self, config: FetchConfig, name: str = "", exchange: Exchange | None = None, early: int = 256) -> None:
        self.config, self.name = config, name or "here"
        self.success_rate: float | None = None
        self._own: Ledger | None = None
        self._exchange = exchange
        if exchange is None:
            self._own = Ledger(config.host_concurrency, config.host_failures, config.host_pause)
        self._seats: dict[str, _Seat] = {}
        self._ask: Counter[str] = Counter()
        self._give: Counter[str] = Counter()
        self._answered: dict[str, None] = {}
        self._failed: list[tuple[str, str]] = []
        self._quiet: dict[str, float] = {}
        self._robots: dict[str, asyncio.Future[Robots | None]] = {}
        self._robots_wanted: list[str] = []
        self._robots_found: dict[str, Robots] = {}
        self._rows = self._successes = 0
        self._early = asyncio.Semaphore(early)
        self._epoch = ""
        self._ticking: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = time.monotonic()

    async def enter(self, host: str) -> bool:
        """A place for a request to a host, which `leave` gives back; raises Rejected where the host is left alone.

        What it returns is for `begun`, which is to be called when the request goes out.
        """
        seat = self._seats.get(host)
        if seat is None:
            seat = self._seats[host] = _Seat()
        early = False
        if seat.owned > seat.used and not seat.waiting:
            seat.used += 1
        else:
            early = await self._wait(host, seat)
        try:
            while (pause := seat.quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            self.begun(early)
            self.leave(host)
            raise
        return early

    def begun(self, early: bool) -> None:
        """The request goes out, so another row may ask early."""
        if early:
            self._early.release()

    def leave(self, host: str) -> None:
        """The request is over."""
        seat = self._seats[host]
        seat.used -= 1
        if seat.recalled and seat.waiting and time.monotonic() >= seat.recall_at:
            self._give_back(host, seat)
            self._ask_more(host, seat)
        else:
            self._assign(host, seat)

    def answered(self, host: str) -> None:
        """It lives."""
        self._answered[host] = None
        if host in self._seats:
            self._seats[host].failures = 0
        if self._failed:
            self._failed = [f for f in self._failed if f[0] != host]

    def failed(self, host: str, code: str) -> None:
        """It did not answer."""
        self._answered.pop(host, None)
        self._failed.append((host, code))
        seat = self._seats.get(host)
        if seat is not None and self._own is None and self.config.host_failures:
            seat.failures += 1  # until the ledger has heard of it
            if seat.failures >= self.config.host_failures:
                self._refuse(seat, "host_unavailable" if ERRORS[code].retryable else code)
        self._soon()

    def quieten(self, host: str, seconds: float) -> None:
        """It asked to be left alone for so long."""
        seat = self._seats.get(host)
        if seat is not None:
            seat.quiet_until = max(seat.quiet_until, time.monotonic() + seconds)
        self._quiet[host] = max(seconds, self._quiet.get(host, 0.0))
        self._soon()

    def row(self, succeeded: bool) -> None:
        """A row came to its end."""
        self._rows += 1
        self._successes += succeeded

    async def robots(self, origin: str, read: Callable[[], Awaitable[Robots]]) -> Robots:
        """The robots.txt of an origin: from the ledger, or read by `read`, once in a run."""
        future = self._robots.get(origin)
        if future is None:
            future = self._robots[origin] = asyncio.get_running_loop().create_future()
            self._robots_wanted.append(origin)
            self._soon()
        rules = await asyncio.shield(future)
        if rules is not None:
            return rules
        # It is ours to read. The first that comes here does it, the others wait for the next future.
        if self._robots.get(origin) is future:
            following = self._robots[origin] = asyncio.get_running_loop().create_future()
            try:
                found = await read()
            except BaseException:
                found = ("host_unavailable", b"its robots.txt could not be read")
                raise
            finally:
                self._robots_found[origin] = found
                self._robots.pop(origin, None)
                following.set_result(found)
                self._soon()
            return found
        return await self.robots(origin, read)

    async def rest(self) -> None:
        """Give back at once what is idle: at the end of a shard this process may be ended before it would be told."""
        if self._ticking is not None and self._give:
            with contextlib.suppress(Exception):  # then it is told with the next message
                await asyncio.wait_for(self._talk(), 5)

    async def close(self) -> None:
        """Give everything back."""
        if self._timer is not None:
            self._timer.cancel()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
            try:
                await asyncio.wait_for(self._talk(gone=True), 5)
            except Exception as e:
                log.debug("the ledger of hosts was not told of the end: %s", e)
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    async def _wait(self, host: str, seat: _Seat) -> bool:
        early = self._own is None and seat.asked + seat.owned < self.config.host_concurrency
        if early:
            await self._early.acquire()
        seat = self._seats.setdefault(host, seat)
        waiting = _Waiting(early)
        seat.waiting.append(waiting)
        self._ask_more(host, seat)
        try:
            await waiting.future
        except BaseException as e:
            self.begun(waiting.early)
            if isinstance(e, asyncio.CancelledError):
                if waiting in seat.waiting:
                    seat.waiting.remove(waiting)
                elif waiting.future.done() and not waiting.future.cancelled() and not waiting.future.exception():
                    seat.used -= 1
                    self._assign(host, seat)
            raise
        return waiting.early

    def _ask_more(self, host: str, seat: _Seat) -> None:
        more = min(len(seat.waiting), self.config.host_concurrency - seat.owned) - seat.asked
        if more > 0:
            seat.asked += more
            self._ask[host] += more
        if self._ask or self._give:
            self._soon()

    def _assign(self, host: str, seat: _Seat) -> None:
        """Places that are free go to those who wait here, or back."""
        while seat.owned > seat.used:
            while seat.waiting and seat.waiting[0].future.done():
                seat.waiting.popleft()
            if not seat.waiting:
                self._give_back(host, seat)
                continue
            seat.used += 1
            seat.waiting.popleft().future.set_result(None)
        self._soon()

    def _give_back(self, host: str, seat: _Seat) -> None:
        seat.owned -= 1
        seat.recalled = max(0, seat.recalled - 1)
        self._give[host] += 1
        self._forget(host, seat)

    def _forget(self, host: str, seat: _Seat) -> None:
        if not seat.owned and not seat.waiting and not seat.asked and seat.quiet_until < time.monotonic():
            self._seats.pop(host, None)

    def _refuse(self, seat: _Seat, code: str) -> None:
        """End all that wait there, since none of them would be asked for."""
        while seat.waiting:
            future = seat.waiting.popleft().future
            if not future.done():
                future.set_exception(Rejected(code))

    def _soon(self) -> None:
        if self._own is None:
            if self._ticking is None:
                self._ticking = asyncio.create_task(self._tick())
        elif self._ask or self._give or self._failed or self._quiet or self._robots_wanted or self._robots_found:
            self._flush()

    def _flush(self) -> None:
        """Talk to the ledger of this very process."""
        assert self._own is not None
        message = self._message()
        self._take(self._own.exchange(self.name, message))
        if self._own._due and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._own.next_due() or 0.0, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._own is not None:
            self._flush()

    def _message(self) -> Message:
        message = Message(
            dict(self._ask),
            dict(self._give),
            tuple(self._answered),
            tuple(self._failed),
            self._quiet,
            tuple(self._robots_wanted),
            self._robots_found,
            self._rows,
            self._successes,
        )
        self._ask, self._give, self._answered, self._failed = Counter(), Counter(), {}, []
        self._quiet, self._robots_wanted, self._robots_found = {}, [], {}
        self._rows = self._successes = 0
        return message

    def _take(self, answer: Answer) -> None:
        self.success_rate = answer.success_rate
        now = time.monotonic()
        for host, seconds in answer.quiet.items():
            if host in self._seats:
                self._seats[host].quiet_until = now + seconds
        for host in answer.queued:  # others go ahead of those who have to wait
            for waiting in self._seats[host].waiting if host in self._seats else ():
                self.begun(waiting.early)
                waiting.early = False
        for host, n in answer.granted.items():
            seat = self._seats.get(host)
            if seat is None:
                seat = self._seats[host] = _Seat()
            seat.asked = max(0, seat.asked - n)
            seat.owned += n
            seat.recall_at = now + QUANTUM_S
            self._assign(host, seat)
        for host, n in answer.recalled.items():
            if host in self._seats:
                self._seats[host].recalled += n
        for host, (n, code) in answer.refused.items():
            seat = self._seats.get(host)
            if seat is None:
                continue
            seat.asked = max(0, seat.asked - n)
            self._refuse(seat, code)
            self._forget(host, seat)
        for origin, rules in answer.robots.items():
            asked = self._robots.get(origin) if rules is None else self._robots.pop(origin, None)
            if asked is not None and not asked.done():
                asked.set_result(rules)

    async def _tick(self) -> None:
        """Talk to the run's ledger, as long as there is one."""
        wait = 0.0
        while self._own is None:
            await asyncio.sleep(wait)
            try:
                wait = await self._talk()
                self._heard = time.monotonic()
            except Exception as e:
                if time.monotonic() - self._heard > LOST_S:
                    log.warning("the ledger of hosts cannot be reached (%s); this worker asks one thing at a time", e)
                    self._alone()
                wait = RETRY_S

    async def _talk(self, gone: bool = False) -> float:
        assert self._exchange is not None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "hosts")
        message = self._message()._replace(epoch=self._epoch, gone=gone)
        said = self._thread.submit(self._exchange, self.name, message)
        try:
            answer = await asyncio.wrap_future(said)
        except BaseException:
            if said.cancelled() or (said.done() and said.exception() is not None):
                self._again(message)  # also where this was cancelled before the thread came to it
            raise
        if self._epoch and answer.epoch != self._epoch:  # a new ledger, which knows nothing of what is held
            self._epoch = answer.epoch
            again = Message(leased={h: s.owned for h, s in self._seats.items() if s.owned}, epoch="")
            for host, seat in self._seats.items():
                seat.asked = 0
                self._ask.pop(host, None)
            self._take(await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, self.name, again))
            for host, seat in list(self._seats.items()):
                self._ask_more(host, seat)
        self._epoch = answer.epoch
        self._take(answer)
        return answer.wait

    def _again(self, message: Message) -> None:
        """What was said was not heard."""
        self._ask.update(message.ask)
        self._give.update(message.give)
        self._answered = {**dict.fromkeys(message.answered), **self._answered}
        self._failed[:0] = message.failed
        self._quiet = {**message.quiet, **self._quiet}
        self._robots_wanted[:0] = message.robots_wanted
        self._robots_found = {**message.robots_found, **self._robots_found}
        self._rows, self._successes = self._rows + message.rows, self._successes + message.successes

    def _alone(self) -> None:
        """From here on without the run's ledger, and so with one request to a host at most."""
        self.config = self.config.model_copy(update={"host_concurrency": 1})
        self._own = Ledger(1, self.config.host_failures, self.config.host_pause)
        self._ask, self._give = Counter(), Counter()
        for host, seat in list(self._seats.items()):
            seat.asked = 0
            seat.owned = seat.used
            if seat.used:
                worker = self._own.workers.setdefault(self.name, _Worker(time.monotonic()))
                self._own._hold(self._own._host(host), host, self.name, worker, seat.used)
            self._ask_more(host, seat)
        for origin, future in list(self._robots.items()):
            if not future.done():
                self._robots_wanted.append(origin)
        self._soon()
