"""Fetch pictures over http and https: one client a process, every hop checked, every limit kept.

Redirects are followed here rather than by the client, so that each hop is judged like the first URL:
scheme, address (ingest/addresses.py), opt-out headers (ingest/optout.py). Bodies are counted while they
come in, also while they are decompressed. Failures carry a code of ingest/errors.py with a message that
does not change from run to run, since it is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import hashlib
import ipaddress
import random
import ssl
import time
import zlib
from collections.abc import AsyncIterator

import aiohttp
from protego import Protego
from yarl import URL

from ingest.addresses import AddressRefused, Guard, GuardedResolver
from ingest.config import FetchConfig, OptOutConfig
from ingest.errors import ERRORS, Rejected
from ingest.optout import product_name, robots_refusal, robots_txt_refuses, tdm_refusal

_WITH_BODY = (200, 203)  # 203: a proxy on the way has changed something
_REDIRECTS = (301, 302, 303, 307, 308)
_COMPRESSIONS = ("gzip", "deflate", "br", "zstd", "compress", "dcb", "dcz", "lzma", "xz", "bzip", "exi", "pack200")
_FORBIDDEN = (401, 402, 403, 407, 451)
_CHUNK = 1 << 18
_MEMBERS = 4096  # of a gzip body; each costs a copy of what follows it, however little it holds
_HEADER_BYTES, _HEADERS = 1 << 15, 256  # the client's own limits, 8190 and 128, lose pictures of wordy servers

# Failures that are the host's rather than the picture's.
_HOST_FAULTS = frozenset(
    ("dns_not_found", "dns_failure", "connect_refused", "connect_timeout", "tls_error", "connection_lost", "timeout")
) | {"http_rate_limited"}
_MANY_HOSTS = 50_000  # remembered at once, then idle ones are forgotten
_ROBOTS_BYTES = 512 << 10  # RFC 9309, 2.5: at least 500 KiB are to be read
_MANY_ROBOTS = 10_000


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A body as the server means it (content encoding undone), and how many attempts it took.

    final_url: where redirects led; None where there were none.
    """

    body: bytes
    sha256: str
    attempts: int
    final_url: str | None = None


class _Host:
    """What is known of a host: its places for requests, and a circuit breaker.

    After `host_failures` failures in a row nothing is asked of it for `host_pause` seconds, then by one
    request at a time, until one is answered. So a dead host costs a few timeouts, not one for each row.
    """

    def __init__(self, config: FetchConfig) -> None:
        self.slots = asyncio.Semaphore(config.host_concurrency)
        self.users = self.answers = self._failures = 0
        self.quiet_until = 0.0  # the server asked for a pause
        self._closed_until = 0.0
        self._code = ""
        self._limit, self._pause = config.host_failures, config.host_pause

    @property
    def forgettable(self) -> bool:
        """Whether nobody uses it and nothing bad is known of it."""
        return not self.users and not self._failures and self.quiet_until < time.monotonic()

    def refusal(self) -> str | None:
        """The code with which a request ends unsent; None where it may go (and then is the one that tries)."""
        if not self._limit or self._failures < self._limit:
            return None
        now = time.monotonic()
        if now >= self._closed_until:
            self._closed_until = now + self._pause
            return None
        return self._code

    def answered(self) -> None:
        """It lives."""
        self.answers += 1
        self._failures = 0

    def failed(self, code: str) -> None:
        """It did not answer. What is final stays final for the rows that are not asked for."""
        self._failures += 1
        self._code = "host_unavailable" if ERRORS[code].retryable else code
        self._closed_until = time.monotonic() + self._pause


class Fetcher:
    """The client of one worker process. To be made and used within one event loop; `await close()` at the end."""

    def __init__(self, config: FetchConfig, opt_out: OptOutConfig) -> None:
        self.config, self.opt_out = config, opt_out
        self.guard = Guard(config.allow_addresses)
        self.agents = (product_name(config.user_agent), *opt_out.agents)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._room = asyncio.Semaphore(config.concurrency)
        self._hosts: dict[str, _Host] = {}
        self._tls: ssl.SSLContext | None = None
        self._robots: dict[str, asyncio.Task[Protego | None]] = {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the semaphores above are the limit
                resolver=GuardedResolver(self.guard),
                ttl_dns_cache=300,
                socket_factory=self.guard.socket_factory,
            ),
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

    @contextlib.asynccontextmanager
    async def fetch(self, text: str) -> AsyncIterator[Fetched]:
        """The body behind a URL of the table; raises Rejected. Transient failures are tried again.

        Bodies that are held in the context count: at most `concurrency` of them, beside as many requests.
        So memory stays bounded where pictures come in faster than they are decoded.
        """
        url = parse_url(text)
        fetched = await self._fetch(url)
        try:
            yield fetched
        finally:
            self._room.release()

    async def _fetch(self, url: URL) -> Fetched:
        """With a place in `_room` taken, which the caller gives back."""
        host = self._host(url.host or "")
        host.users += 1
        try:
            return await self._with_retries(url, host)
        finally:
            host.users -= 1
            if host.forgettable:
                self._hosts.pop(url.host or "", None)

    def _host(self, name: str) -> _Host:
        if name not in self._hosts:
            if len(self._hosts) >= _MANY_HOSTS:
                self._hosts = {n: h for n, h in self._hosts.items() if h.users}
            self._hosts[name] = _Host(self.config)
        return self._hosts[name]

    async def _with_retries(self, url: URL, host: _Host) -> Fetched:
        rejected: Rejected | None = None
        for attempt in range(1, self.config.retries + 2):
            async with host.slots:
                while (pause := host.quiet_until - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                closed = host.refusal()
                if closed is not None:
                    rejected = rejected or Rejected(closed)
                    rejected.attempts = attempt - 1
                    raise rejected
                async with self._slots:
                    answers = host.answers
                    try:
                        fetched = await self._attempt(url, attempt, host)
                    except _Failed as failed:
                        rejected, wait = failed.rejected, failed.retry_after
                        if rejected.code in _HOST_FAULTS and host.answers == answers:
                            host.failed(rejected.code)
                        if wait is not None:
                            host.quiet_until = time.monotonic() + min(wait, self.config.max_backoff)
                    else:
                        await self._room.acquire()
                        return fetched
            if not rejected.retryable or attempt > self.config.retries:
                rejected.attempts = attempt
                raise rejected
            backoff = self.config.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(max(backoff, wait or 0.0), self.config.max_backoff))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self, url: URL, attempt: int, host: _Host) -> Fetched:
        try:
            async with asyncio.timeout(self.config.timeout):
                body, final = await self._follow(url, host)
        except _Failed:
            raise
        except Rejected as e:
            raise _Failed(e) from None
        except aiohttp.ClientError as e:
            raise _Failed(_as_rejected(e)) from None
        except TimeoutError:
            raise _Failed(Rejected("timeout")) from None
        except OSError:
            raise _Failed(Rejected("connection_lost")) from None
        except ValueError as e:  # what a hostile header may make a parser raise; it must not end the other rows
            raise _Failed(Rejected("http_malformed", f"an answer that cannot be read ({type(e).__name__})")) from None
        # In the loop's own thread: hashing 100 KB takes less than a thread switch costs.
        led_to = str(final) if final != url else None
        return Fetched(body, hashlib.sha256(body).hexdigest(), attempt, led_to)

    async def _follow(self, url: URL, host: _Host | None, robots: bool = False) -> tuple[bytes, URL]:
        """The body at the end of the redirects from `url`, and where that is.

        robots: it is a robots.txt, so no opt-out is looked for.
        """
        seen = {url}
        limit = _ROBOTS_BYTES if robots else self.config.max_bytes
        for hop in range(self.config.max_redirects + 1):
            if url.host is None or not self._may_be_literal(url.host):
                raise Rejected("address_refused")
            if self.opt_out.respect and self.opt_out.robots_txt and not robots:
                await self._check_robots_txt(url)
            async with self._session.get(url, allow_redirects=False, ssl=self._tls_for(url)) as response:
                if host is not None and hop == 0 and response.status != 429:
                    host.answered()
                # Error pages are not asked: they say noindex of themselves.
                if response.status in (*_WITH_BODY, *_REDIRECTS) and not robots:
                    self._check_opt_out(response)
                if response.status not in _REDIRECTS:
                    _check_status(response)
                    return await self._read(response, limit, cut=robots), url
                url = _redirect(url, response.headers.get("Location"))
            if url in seen:
                raise Rejected("too_many_redirects", "a circle of redirects")
            seen.add(url)
        raise Rejected("too_many_redirects", f"more than {self.config.max_redirects} redirects")

    def _tls_for(self, url: URL) -> ssl.SSLContext | bool:
        """One TLS context a process, made when it is first needed: that takes longer than ten pictures."""
        if url.scheme != "https" or not self.config.verify_tls:
            return False
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _may_be_literal(self, host: str) -> bool:
        """False for a numeric host that is not permitted. Names are judged by the addresses they resolve to."""
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return True
        return self.guard.permits(host)

    def _check_opt_out(self, response: aiohttp.ClientResponse) -> None:
        if not self.opt_out.respect:
            return
        directive = robots_refusal(response.headers.getall("X-Robots-Tag", []), self.agents, self.opt_out.directives)
        if directive is not None:
            raise Rejected("x_robots_tag", directive)
        if self.opt_out.tdm_reservation and tdm_refusal(response.headers.getall("TDM-Reservation", [])):
            raise Rejected("tdm_reservation")

    async def _check_robots_txt(self, url: URL) -> None:
        """Raises Rejected where the host's robots.txt forbids the URL, or where there is one that cannot be read."""
        origin = str(url.origin())
        task = self._robots.get(origin)
        if task is None:
            if len(self._robots) >= _MANY_ROBOTS:
                self._robots = {o: t for o, t in self._robots.items() if not t.done()}
            task = self._robots[origin] = asyncio.create_task(self._read_robots_txt(url.origin()))
        try:
            # Many wait for one request, which has a deadline of its own: none of them may end it for the others.
            rules = await asyncio.shield(task)
        except Rejected:
            self._robots.pop(origin, None)  # asked again by whoever comes next; the breaker bounds how often
            raise
        if rules is not None and robots_txt_refuses(rules, str(url), self.agents):
            raise Rejected("robots_txt")

    async def _read_robots_txt(self, origin: URL) -> Protego | None:
        """The rules of a host; None where it has none. RFC 9309, 2.3.1: 4xx allows all, unreachable nothing."""
        try:
            async with asyncio.timeout(self.config.timeout):
                body, _ = await self._follow(origin / "robots.txt", None, robots=True)
        except _Failed:
            raise Rejected("host_unavailable", "its robots.txt could not be read") from None
        except Rejected as e:
            if e.retryable:
                raise Rejected(e.code) from None
            if e.code in ("dns_not_found", "tls_error", "address_refused", "http_malformed", "encoding_unsupported"):
                raise
            return None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            raise (_as_rejected(e) if isinstance(e, aiohttp.ClientError) else Rejected("timeout")) from None
        return Protego.parse(body.decode("utf-8-sig", "replace"))

    async def _read(self, response: aiohttp.ClientResponse, limit: int, cut: bool = False) -> bytes:
        """The body; raises Rejected where it is longer than limit, unless cut: then it is what lies within."""
        if not cut and response.content_length is not None and response.content_length > limit:
            raise Rejected("body_too_large", f"more than {limit} bytes")
        inflate = _inflater(response.headers.get("Content-Encoding", ""))
        pieces: list[bytes] = []
        size = received = 0
        clock = asyncio.get_running_loop().time
        began = clock()
        # A silence this long is too slow as well; without a minimum speed the deadline alone ends it.
        patience = self.config.min_speed_after if self.config.min_speed > 0 else None
        try:
            async with asyncio.timeout(patience) as silence:
                while chunk := await response.content.read(_CHUNK):
                    received += len(chunk)
                    if received > limit and not cut:
                        raise Rejected("body_too_large", f"more than {limit} bytes")
                    if inflate is not None:
                        try:
                            chunk = inflate.decompress(chunk, limit + 1 - size)
                        except zlib.error:
                            raise Rejected("http_malformed", "the compressed body is damaged") from None
                        if size + len(chunk) > limit and not cut:
                            raise Rejected("body_too_large", f"more than {limit} bytes once decompressed")
                    size += len(chunk)
                    pieces.append(chunk)
                    if cut and size >= limit:
                        return b"".join(pieces)[:limit]
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
        return b"".join(pieces)


class _Failed(Exception):
    """One attempt's end, with the wait that the server asks for in seconds."""

    def __init__(self, rejected: Rejected, retry_after: float | None = None) -> None:
        super().__init__(rejected.code)
        self.rejected, self.retry_after = rejected, retry_after


def parse_url(text: str) -> URL:
    """A table's URL, blanks and letters beyond ASCII quoted; raises Rejected (url_*, scheme_refused)."""
    if not text.strip():
        raise Rejected("url_missing")
    try:
        url = URL(text.strip())
        if url.scheme and url.scheme not in ("http", "https"):
            raise Rejected("scheme_refused", "neither http nor https")
        if not url.scheme or not url.host or url.port is None:
            raise Rejected("url_invalid")
    except (ValueError, UnicodeError):
        raise Rejected("url_invalid") from None
    return url.with_fragment(None)


def _redirect(url: URL, location: str | None) -> URL:
    if not location:
        raise Rejected("redirect_invalid")
    try:
        relative = URL(location.strip())
        if relative.scheme in ("http", "https") and not relative.host:
            raise Rejected("redirect_invalid")
        target = url.join(relative)
    except (ValueError, UnicodeError):
        raise Rejected("redirect_invalid") from None
    if target.scheme not in ("http", "https"):
        raise Rejected("scheme_refused", "a redirect to neither http nor https")
    try:
        return parse_url(str(target))
    except Rejected:
        raise Rejected("redirect_invalid") from None


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
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


class _Inflater:
    """A bounded decompressor for gzip and deflate, which some servers send though asked not to."""

    def __init__(self, encoding: str) -> None:
        # 32: gzip or zlib by its header. Deflate comes with zlib's header, as it should, or without.
        self._kinds = [zlib.MAX_WBITS | 32, *([-zlib.MAX_WBITS] if encoding == "deflate" else [])]
        self._stream = zlib.decompressobj(self._kinds.pop(0))
        self._begun = False
        self._members = 0

    def decompress(self, data: bytes, most: int) -> bytes:
        """What so many bytes more give; longer than `most` where there is more of it. Raises zlib.error."""
        found = b""
        while data and len(found) < most:
            if self._stream.eof:  # another gzip member, or padding
                data = data.lstrip(b"\0")
                if not data.startswith(b"\x1f"):
                    break
                self._members += 1
                if self._members > _MEMBERS:
                    raise zlib.error("more gzip members than anybody could mean")
                self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
            try:
                found += self._stream.decompress(data, most - len(found))
            except zlib.error:
                if self._begun or not self._kinds:
                    raise
                self._stream = zlib.decompressobj(self._kinds.pop(0))
                continue
            self._begun = True
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
        return found

    @property
    def complete(self) -> bool:
        """Whether the end of the stream was seen."""
        return self._stream.eof


def _inflater(encoding: str) -> _Inflater | None:
    encoding = encoding.strip().lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _Inflater(encoding)
    if any(name in encoding for name in _COMPRESSIONS):
        raise Rejected("encoding_unsupported", "a content encoding that was not asked for")
    return None  # identity, or what is no encoding, such as utf-8 or none


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
