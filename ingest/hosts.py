"""Hosts, for all workers of a run together: places for requests, Retry-After, a circuit breaker, robots.txt.

`Ledger` holds what is known of the hosts that are in use. A run has one; workers hold leases of places from it
(desk.py is their side). All that goes between the two are batches (`Message`, `Answer`), one every half a second or so
however many rows there are, so that one ledger does for thousands of workers (orchestration/hosts.py puts it into
an actor; in one process it is called directly).
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ingest.errors import ERRORS

log = logging.getLogger("carrara.ingest")

LAPSE_S = 60.0  # without a word from a worker, then its places are free
MANY_BAD_HOSTS = 200_000  # remembered by a ledger though nobody uses them
ROBOTS_BYTES = 256 << 20  # of robots.txt that a ledger holds, compressed
ROBOTS_FETCH_S = 60.0  # for which others wait for the worker that reads one
TICK_S = 0.5  # between a worker's messages, at least
MESSAGES_S = 2000  # that a ledger takes a second; with more workers each writes more seldom
PATIENCE = 10_000  # rows of the run, from which on its rate of success is reported

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


Exchange = Callable[[str, Message], Answer]  # how a worker's message reaches the ledger: its name, what it says


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

    def keep(self, name: str, by: str, n: int) -> None:
        """Places at a host that a worker has already."""
        self._hold(self._host(name), name, by, self.workers.setdefault(by, _Worker(time.monotonic())), n)

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
