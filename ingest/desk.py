"""A worker's side of the ledger of hosts (hosts.py): it asks for places ahead of their use, gives them back when they
are idle, and tells what servers said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from ingest.config import FetchConfig
from ingest.errors import ERRORS, Rejected
from ingest.hosts import Answer, Exchange, Ledger, Message, Robots

log = logging.getLogger("carrara.ingest")

QUANTUM_S = 2.0  # for which a place is used before it goes to a worker that waits for it
LOST_S = 120.0  # without an answer from the ledger, then a worker goes on alone, by one request a host
RETRY_S = 5.0  # between its questions until then


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
        """Give back at once what is idle: at the end of a shard this process may be ended before it could say so."""
        if self._ticking is not None and self._give:
            with contextlib.suppress(Exception):  # then it comes with the next message
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
                log.debug("the ledger of hosts did not hear of the end: %s", e)
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
                self._own.keep(host, self.name, seat.used)
            self._ask_more(host, seat)
        for origin, future in list(self._robots.items()):
            if not future.done():
                self._robots_wanted.append(origin)
        self._soon()
