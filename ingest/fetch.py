"""Fetch images over http and https: one client a process, every hop checked, every limit kept.

Redirects are followed here rather than by the client, so that each hop is judged like the first URL:
scheme, address (ingest/addresses.py), opt-out headers (ingest/optout.py). Bodies are counted while they
come in, also while they are decompressed, one by one and all together. How often a host is asked is agreed
upon by all workers of the run (ingest/hosts.py). Failures carry a code of ingest/errors.py with a message that
does not change from run to run, since it is stored; those of this machine (ingest/trouble.py) are nobody's row's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import ipaddress
import random
import socket
import ssl
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import aiohttp
from protego import Protego
from yarl import URL

from ingest.addresses import AddressRefused, Guard
from ingest.bodies import Room, inflater
from ingest.config import FetchConfig, OptOutConfig
from ingest.desk import Desk
from ingest.errors import Rejected
from ingest.hosts import Exchange, Robots
from ingest.names import Names
from ingest.optout import product_name, robots_refusal, robots_txt_refuses, rules_in, tdm_refusal
from ingest.trouble import Health, no_route, split
from ingest.urls import parse_url
from ingest.urls import redirect as _redirect
from shards.machine import own_fault
from shards.settings import NodeTrouble

_WITH_BODY = (200, 203)  # 203: a proxy on the way has changed something
_REDIRECTS = (301, 302, 303, 307, 308)
_FORBIDDEN = (401, 402, 403, 407, 451)
_CHUNK = 1 << 17  # of a connection's buffer; the client holds twice as much at most
_HEADER_BYTES, _HEADERS = 1 << 15, 256  # the client's own limits, 8190 and 128, lose images of wordy servers
_OPT_OUT_BYTES = 1 << 13  # of headers that say what may be done with an image
_LEAST_COUNTED = 1 << 14  # bytes that a body counts at least
_MOST_STALLS = 20  # attempts of a row that end since there is no room for its body, and do not count

# Failures that are the host's rather than the image's.
_HOST_FAULTS = frozenset(
    ("dns_not_found", "dns_failure", "connect_refused", "connect_timeout", "tls_error", "connection_lost", "timeout")
) | {"http_rate_limited"}
_UNREACHED = frozenset(("connect_timeout", "timeout"))
_ROBOTS_BYTES = 512 << 10  # RFC 9309, 2.5: at least 500 KiB are to be read
_MANY_ROBOTS, _ALL_ROBOTS_BYTES = 10_000, 4 << 20  # hosts whose rules are held at once, and their text's bytes
_LONG_ROBOTS = 1 << 14  # bytes of rules from which on a thread reads them
_LONG_BODY = 1 << 22  # bytes of a body from which on a thread puts its pieces together
_MOST_RULES, _RULE_BYTES = 200_000, 80  # in a robots.txt, and what each takes in memory


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A body as the server means it (content encoding undone), and how many attempts it took.

    final_url: where redirects led; None where there were none. body_number: its number in the Room.
    """

    body: bytes
    sha256: str
    attempts: int
    final_url: str | None = None
    body_number: int = 0


class Fetcher:
    """The client of one worker process. To be made and used within one event loop; `await close()` at the end.

    hosts: how the run's ledger of hosts is reached, and the name by which it knows this worker.
    """

    def __init__(
        self, config: FetchConfig, opt_out: OptOutConfig, hosts: Exchange | None = None, name: str = ""
    ) -> None:
        self.config, self.opt_out = config, opt_out
        self.guard = Guard(config.allow_addresses)
        self.agents = (product_name(config.user_agent), *opt_out.agents)
        self.desk = Desk(config, name, hosts, early=2 * config.concurrency)
        self.health = Health(config.canaries, self._look_up, self._reach, lambda: self.desk.success_rate)
        self.names = Names(config, self.guard, self.health.looked_up)
        self.room = Room(config.body_memory, config.max_bytes)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._bodies = asyncio.Semaphore(config.concurrency)
        self._tls: ssl.SSLContext | None = None
        self._robots: OrderedDict[str, tuple[Protego | None, int]] = OrderedDict()
        self._robots_bytes = 0
        through = config.proxy is not None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the semaphores above are the limit
                # Through a proxy there is nobody else to connect to, and it is the configuration's.
                resolver=aiohttp.ThreadedResolver() if through else self.names,
                socket_factory=None if through else self.guard.socket_factory,
                use_dns_cache=through,
            ),
            proxy=config.proxy,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout),
            headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_CHUNK,
            trust_env=False,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
            max_headers=_HEADERS,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
        await self.names.close()
        await self.desk.close()

    @contextlib.asynccontextmanager
    async def fetch(self, text: str) -> AsyncIterator[Fetched]:
        """The body behind a URL of the table; raises Rejected, or NodeTrouble. Transient failures are tried again.

        Bodies that are held in the context count: at most `concurrency` of them and `body_memory` bytes, those of
        requests that are under way included. So memory is bounded where images come faster than they are decoded.
        """
        fetched = await self._with_retries(parse_url(text))
        try:
            yield fetched
        finally:
            self._bodies.release()
            self.room.end(fetched.body_number)

    async def _with_retries(self, url: URL) -> Fetched:
        """With a place in `_bodies` taken, which the caller gives back."""
        rejected: Rejected | None = None
        name = url.raw_host or ""
        attempt, stalls = 1, 0
        while True:
            try:
                early = await self.desk.enter(name)
            except Rejected as closed:
                rejected = rejected or closed
                rejected.attempts = attempt - 1
                raise rejected from None
            try:
                async with self._slots:
                    self.desk.begun(early)
                    early = False
                    try:
                        fetched = await self._attempt(url, attempt, name)
                    except _Failed as failed:
                        rejected, wait, stalled = failed.rejected, failed.retry_after, failed.stalled
                        if wait is not None:
                            self.desk.quieten(name, min(wait, self.config.max_backoff))
                    else:
                        try:
                            await self._bodies.acquire()
                        except BaseException:
                            self.room.end(fetched.body_number)
                            raise
                        return fetched
            finally:
                self.desk.begun(early)
                self.desk.leave(name)
            await self.health.judge()
            if stalled and stalls < _MOST_STALLS:
                stalls += 1
                continue
            if not rejected.retryable or attempt > self.config.retries:
                rejected.attempts = attempt
                raise rejected
            backoff = self.config.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(max(backoff, wait or 0.0), self.config.max_backoff))
            attempt += 1

    async def _attempt(self, url: URL, attempt: int, name: str) -> Fetched:
        """One attempt. Raises _Failed, or NodeTrouble."""
        trip = _Trip(name)
        try:
            async with asyncio.timeout(self.config.timeout) as trip.deadline:
                data, digest = await self._follow(url, trip)
        except BaseException as e:
            if trip.body:
                self.room.end(trip.body)
            if isinstance(e, NodeTrouble) or not isinstance(e, Exception):
                raise
            failed = self._failure(e)
            if failed.rejected.code in _HOST_FAULTS and not trip.answered and not failed.stalled:
                self.desk.failed(name, failed.rejected.code)
                if failed.rejected.code in _UNREACHED:
                    self.health.unreached(name)
            raise failed from None
        return Fetched(data, digest, attempt, trip.final_url, trip.body)

    def _failure(self, error: Exception) -> _Failed:
        """What an attempt's error means for the row; raises NodeTrouble where it is this machine's own."""
        if isinstance(error, _Failed):
            return error
        if isinstance(error, Rejected):
            return _Failed(error)
        fault = own_fault(error)
        if fault:
            raise NodeTrouble(fault) from None
        if isinstance(error, aiohttp.ClientError):
            if isinstance(error, aiohttp.ClientConnectorError) and self._unrouted(error):
                raise NodeTrouble("there is no route from this machine to the internet") from None
            return _Failed(_as_rejected(error))
        if isinstance(error, TimeoutError):
            return _Failed(Rejected("timeout"))
        if isinstance(error, OSError):
            return _Failed(Rejected("connection_lost"))
        if isinstance(error, ValueError):  # what a hostile header may make a parser raise
            return _Failed(Rejected("http_malformed", f"an answer that cannot be read ({type(error).__name__})"))
        return _Failed(Rejected("unforeseen", type(error).__name__))

    def _unrouted(self, error: aiohttp.ClientConnectorError) -> bool:
        """Whether no way led to a host since this machine knows none. (A router on the way may say so as well.)"""
        if error.os_error.errno not in (errno.ENETUNREACH, errno.ENETDOWN, None):
            return False
        host = (self.config.proxy and URL(self.config.proxy).host) or error.host
        return any(no_route(address) for address in (host, *self.names.remembered(host)))

    async def _follow(self, url: URL, trip: _Trip | None) -> tuple[bytes, str]:
        """The body at the end of the redirects from `url`, and its sha256.

        trip: the row's; None: it is a robots.txt, so no opt-out is looked for, and what is too long is cut.
        """
        seen = {url}
        for hop in range(self.config.max_redirects + 1):
            if url.host is None or not self._may_be_literal(url):
                raise Rejected("address_refused")
            if self.opt_out.respect and self.opt_out.robots_txt and trip is not None:
                await self._check_robots_txt(url)
            async with self._session.get(url, allow_redirects=False, ssl=self._tls_for(url)) as response:
                if trip is not None and hop == 0:
                    self.health.answered(url.raw_host or "", url.port or 0)
                    if response.status != 429:
                        trip.answered = True
                        self.desk.answered(trip.name)
                # Error pages are not asked: they say noindex of themselves.
                if response.status in (*_WITH_BODY, *_REDIRECTS) and trip is not None:
                    self._check_opt_out(response)
                if response.status not in _REDIRECTS:
                    _check_status(response)
                    return await self._read(response, trip)
                url = _redirect(url, response.headers.get("Location"))
            if url in seen:
                raise Rejected("too_many_redirects", "a circle of redirects")
            seen.add(url)
            if trip is not None:
                trip.final_url = str(url)
        raise Rejected("too_many_redirects", f"more than {self.config.max_redirects} redirects")

    def _tls_for(self, url: URL) -> ssl.SSLContext | bool:
        """One TLS context a process, made when it is first needed: that takes longer than ten images."""
        if url.scheme != "https" or not self.config.verify_tls:
            return False
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _may_be_literal(self, url: URL) -> bool:
        """False for a numeric host that is not permitted. Names are judged by the addresses they resolve to."""
        host = url.host or ""
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return True
        return self.guard.permits(host, url.port)

    def _check_opt_out(self, response: aiohttp.ClientResponse) -> None:
        if not self.opt_out.respect:
            return
        tags = response.headers.getall("X-Robots-Tag", [])
        reservations = response.headers.getall("TDM-Reservation", []) if self.opt_out.tdm_reservation else []
        if sum(map(len, tags)) + sum(map(len, reservations)) > _OPT_OUT_BYTES:
            raise Rejected("http_malformed", "more opt-out headers than anybody could mean")
        directive = robots_refusal(tags, self.agents, self.opt_out.directives)
        if directive is not None:
            raise Rejected("x_robots_tag", directive)
        if tdm_refusal(reservations):
            raise Rejected("tdm_reservation")

    async def _check_robots_txt(self, url: URL) -> None:
        """Raises Rejected where the host's robots.txt forbids the URL, or where there is one that cannot be read."""
        origin = str(url.origin())
        known = self._robots.get(origin)
        if known is None:
            code, body = await self.desk.robots(origin, lambda: self._read_robots_txt(url.origin()))
            if code:
                raise Rejected(code, (body or b"").decode())
            rules, size = None, 0
            if body is not None:
                text = zlib.decompressobj().decompress(body, _ROBOTS_BYTES).decode("utf-8-sig", "replace")
                size = len(text) + _RULE_BYTES * await _aside(len(text), lambda: rules_in(text))
                rules = await _aside(size, lambda: Protego.parse(text))
            self._robots[origin] = known = (rules, size)
            self._robots_bytes += size
            while len(self._robots) > _MANY_ROBOTS or (
                self._robots_bytes > _ALL_ROBOTS_BYTES and len(self._robots) > 1
            ):
                self._robots_bytes -= self._robots.popitem(last=False)[1][1]
        rules, size = known
        if rules is not None:
            asked, target = rules, str(url)
            long = size * max(1, len(target) >> 8)  # each rule may be looked for in all of the URL
            if await _aside(long, lambda: robots_txt_refuses(asked, target, self.agents)):
                raise Rejected("robots_txt")

    async def _read_robots_txt(self, origin: URL) -> Robots:
        """A host's rules, compressed; None where it has none. RFC 9309, 2.3.1: 4xx allows all, unreachable nothing."""
        try:
            async with asyncio.timeout(self.config.timeout):
                body, _ = await self._follow(origin.with_path("/robots.txt"), None)
                text = body.decode("utf-8-sig", "replace")
                if await _aside(len(text), lambda: rules_in(text)) > _MOST_RULES:
                    raise Rejected("http_malformed", "a robots.txt of more rules than anybody could mean")
        except NodeTrouble:
            raise
        except Exception as e:
            failed = self._failure(e)
            code, message = failed.rejected.code, failed.rejected.message
            if isinstance(e, _Failed):
                return "host_unavailable", b"its robots.txt could not be read"
            passing = ("dns_not_found", "tls_error", "address_refused", "http_malformed", "encoding_unsupported")
            if failed.rejected.retryable or code in (*passing, "unforeseen"):
                return code, message.encode()
            return "", None
        return "", zlib.compress(body, 6)

    async def _read(self, response: aiohttp.ClientResponse, trip: _Trip | None) -> tuple[bytes, str]:
        """The body and its sha256; raises Rejected where it is longer than allowed. A robots.txt is cut instead."""
        cut = trip is None
        limit = _ROBOTS_BYTES if cut else self.config.max_bytes
        if not cut and response.content_length is not None and response.content_length > limit:
            raise Rejected("body_too_large", f"more than {limit} bytes")
        inflate = inflater(response.headers.get("Content-Encoding", ""))
        pieces: list[bytes] = []
        size = received = 0
        digest = hashlib.sha256()
        clock = asyncio.get_running_loop().time
        began = clock()
        # A silence this long is too slow as well; without a minimum speed the deadline alone ends it.
        patience = self.config.min_speed_after if self.config.min_speed > 0 else None
        try:
            async with asyncio.timeout(patience) as silence:
                while chunk := await response.content.readany():
                    received += len(chunk)
                    if received > limit and not cut:
                        raise Rejected("body_too_large", f"more than {limit} bytes")
                    for piece in (chunk,) if inflate is None else inflate.pieces(chunk):
                        size += len(piece)
                        if size > limit and not cut:
                            raise Rejected("body_too_large", f"more than {limit} bytes once decompressed")
                        if trip is not None:
                            trip.body = trip.body or self.room.begin()
                            if not self.room.take(trip.body, max(len(piece), _LEAST_COUNTED)):
                                silence.reschedule(None)
                                began += await self._wait_for_room(trip, max(len(piece), _LEAST_COUNTED))
                        digest.update(piece)
                        pieces.append(piece)
                        if cut and size >= limit:
                            return b"".join(pieces)[:limit], ""
                        if inflate is not None:
                            await asyncio.sleep(0)  # others have their turn
                    now = clock()
                    if now - began > self.config.min_speed_after and received < self.config.min_speed * (now - began):
                        raise Rejected("too_slow", f"less than {self.config.min_speed:g} bytes a second")
                    if patience is not None:
                        silence.reschedule(now + patience)
        except TimeoutError:
            if not silence.expired():
                raise
            raise Rejected("too_slow", f"less than {self.config.min_speed:g} bytes a second") from None
        if inflate is not None and not inflate.complete and received:
            raise Rejected("body_truncated")
        if not size:
            raise Rejected("body_empty")
        if trip is not None:
            self.room.done(trip.body)
        # Copying tens of megabytes takes as many milliseconds, for which a thread needs no lock of the interpreter.
        return await _aside(size, lambda: b"".join(pieces), _LONG_BODY), digest.hexdigest()

    async def _wait_for_room(self, trip: _Trip, size: int) -> float:
        """Wait until a body may grow, without its clocks; returns the seconds. Raises _Failed where it takes too long.

        Then what came in is thrown away and asked for again later, so that slow servers cannot hold all the room.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        assert trip.deadline is not None
        ends = trip.deadline.when()
        trip.deadline.reschedule(None)
        try:
            async with asyncio.timeout(self.config.timeout):
                await self.room.wait(trip.body, size)
        except TimeoutError:
            raise _Failed(Rejected("timeout", "no room for its body in this worker"), stalled=True) from None
        finally:
            if ends is not None:
                trip.deadline.reschedule(ends + clock() - began)
        return clock() - began

    async def _look_up(self, host: str) -> None:
        """For Health: the addresses of a canary, asked anew."""
        await self.names.addresses(host, anew=True)

    async def _reach(self, host: str, port: int) -> None:
        """For Health: connect to a canary, and no more; its address is judged unless it is the configuration's."""
        if self.config.proxy is not None:
            host, port = split(str(URL(self.config.proxy).authority).rpartition("@")[2])
        named = self.config.proxy is not None or any(host == split(c)[0] for c in self.config.canaries)
        error: OSError = ConnectionError("no address")
        for family, address in await self.names.addresses(host):
            if not named and not self.guard.permits(address, port):
                continue
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    await asyncio.get_running_loop().sock_connect(probe, (address, port))
                    return
                except ConnectionRefusedError:
                    return  # somebody was there to refuse it
                except OSError as e:
                    error = e
        raise error


T = TypeVar("T")


async def _aside(size: int, call: Callable[[], T], long: int = _LONG_ROBOTS) -> T:
    """The result of a call, from a thread where what it works on is so long that it would hold up the others."""
    return call() if size <= long else await asyncio.to_thread(call)


@dataclasses.dataclass
class _Trip:
    """One attempt of a row: its host, the number of its body, its deadline, what is known of it so far."""

    name: str
    body: int = 0  # none yet
    deadline: asyncio.Timeout | None = None
    answered: bool = False
    final_url: str | None = None


class _Failed(Exception):
    """One attempt's end, with the wait that the server asks for in seconds. stalled: there was no room for its body."""

    def __init__(self, rejected: Rejected, retry_after: float | None = None, stalled: bool = False) -> None:
        super().__init__(rejected.code)
        self.rejected, self.retry_after, self.stalled = rejected, retry_after, stalled


def _check_status(response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status in _WITH_BODY:
        return
    message = f"HTTP {status}"
    if status in (404, 410):
        raise Rejected("http_not_found", message)
    if status in _FORBIDDEN:
        raise Rejected("http_forbidden", message)
    if status == 429:
        raise _Failed(Rejected("http_rate_limited", message), _retry_after(response))
    if 400 <= status < 500:
        raise Rejected("http_client_error", message)
    if 500 <= status < 600:
        raise _Failed(Rejected("http_server_error", message), _retry_after(response))
    raise Rejected("http_unexpected", message)


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds that Retry-After asks for (RFC 9110, 10.2.3: seconds or a date); None where it says nothing."""
    text = response.headers.get("Retry-After", "").strip()[:100]
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _as_rejected(error: aiohttp.ClientError) -> Rejected:
    """Which code a failure of the client has. The order matters: the first classes are subclasses of the later."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Rejected("dns_failure")
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError)):
        return Rejected("tls_error")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Rejected("address_refused" if isinstance(error.os_error, AddressRefused) else "connect_refused")
    if isinstance(error, (aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError)):
        return Rejected("connect_timeout")
    if isinstance(error, aiohttp.InvalidURL):
        return Rejected("url_invalid")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Rejected("body_truncated")
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        return Rejected("connection_lost")
    if isinstance(error, aiohttp.ClientResponseError):
        return Rejected("http_malformed")
    return Rejected("connection_lost")
