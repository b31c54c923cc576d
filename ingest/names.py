"""Names to addresses: by the system's resolver, or by name servers of the configuration's; both families, remembered.

What is found is judged by ingest/addresses.py before anybody connects, and again at the socket. Answers of
`fetch.nameservers` are kept as long as they say (their TTL), the system's, which says nothing, for a fixed
time. Names with a dot in them are asked for as they are (`fetch.ndots`), and not with each of the machine's search
domains first, which in a Kubernetes pod makes five questions of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from ingest.addresses import Guard
from ingest.config import FetchConfig
from ingest.errors import Rejected
from shards.settings import NodeTrouble

MANY_NAMES = 20_000  # remembered, each some 300 bytes; those that were asked for longest ago go first
SYSTEM_TTL_S, LONGEST_TTL_S, SHORTEST_TTL_S = 300.0, 3600.0, 5.0
GONE_TTL_S = 60.0  # for which a name counts as not there
MOST_ADDRESSES = 64  # of a name; an answer has room for thousands, and each is judged at every connection

Addresses = tuple[tuple[socket.AddressFamily, str], ...]


class Names(AbstractResolver):
    """What aiohttp asks for addresses; it connects to exactly what this returns. One a process and loop."""

    def __init__(
        self, config: FetchConfig, guard: Guard, on_lookup: Callable[[str, bool], None] = lambda host, found: None
    ):
        """on_lookup: is called with each name that was looked up, and whether there was an answer with an address."""
        self.guard, self.on_lookup = guard, on_lookup
        self._known: OrderedDict[str, tuple[float, Addresses | Rejected]] = OrderedDict()
        self._asked: dict[str, asyncio.Task[tuple[float, Addresses | Rejected]]] = {}
        self._servers: Any = None
        if config.nameservers:
            import aiodns

            self._servers = aiodns.DNSResolver(
                nameservers=[_server(n) for n in config.nameservers],
                timeout=config.connect_timeout / 4,
                tries=3,
                ndots=config.ndots,
                domains=[],
                rotate=True,
            )
        else:
            os.environ.setdefault("RES_OPTIONS", f"ndots:{config.ndots}")  # read by the C library at its first question

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises Rejected: dns_not_found, dns_failure, url_invalid, address_refused where no address is permitted."""
        addresses = await self.addresses(host)
        results = [
            ResolveResult(
                hostname=host,
                host=text,
                port=port,
                family=kind,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, text in addresses
            if family in (socket.AF_UNSPEC, kind) and self.guard.permits(text, port)
        ]
        if not results:
            raise Rejected("address_refused")
        return results

    async def addresses(self, host: str, anew: bool = False) -> Addresses:
        """All addresses of a name, none of them judged; raises Rejected. anew: what is remembered does not count."""
        known = self._known.get(host)
        if known is None or known[0] < time.monotonic() or anew:
            task = self._asked.get(host)
            if task is None:
                task = self._asked[host] = asyncio.create_task(self._ask(host))
                task.add_done_callback(lambda _: self._asked.pop(host, None))
            # Many may wait for one answer: none of them may end it for the others.
            ttl, found = await asyncio.shield(task)
            self._known[host] = known = (time.monotonic() + ttl, found)
            if len(self._known) > MANY_NAMES:
                self._known.popitem(last=False)
        self._known.move_to_end(host)
        if isinstance(known[1], Rejected):
            raise Rejected(known[1].code, known[1].message)
        return known[1]

    def remembered(self, host: str) -> list[str]:
        """The addresses of a name, as far as they are known without asking."""
        known = self._known.get(host)
        return [] if known is None or isinstance(known[1], Rejected) else [text for _, text in known[1]]

    async def close(self) -> None:
        """End what is asked for."""
        for task in list(self._asked.values()):
            task.cancel()
        if self._servers is not None:
            with contextlib.suppress(Exception):
                await self._servers.close()

    async def _ask(self, host: str) -> tuple[float, Addresses | Rejected]:
        """For how many seconds what is to be remembered."""
        try:
            ttl, found = await (self._ask_servers(host) if self._servers is not None else self._ask_system(host))
        except Rejected as e:
            self.on_lookup(host, False)
            return GONE_TTL_S if e.code == "dns_not_found" else 0.0, e
        except UnicodeError:
            return GONE_TTL_S, Rejected("url_invalid", "the host name is not valid")
        self.on_lookup(host, True)
        return ttl, found[:MOST_ADDRESSES]

    async def _ask_system(self, host: str) -> tuple[float, Addresses]:
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except socket.gaierror as e:
            if e.errno in (socket.EAI_MEMORY, socket.EAI_SYSTEM):
                raise NodeTrouble(f"no name can be looked up here ({e.strerror})") from None
            gone = e.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            raise Rejected("dns_not_found" if gone else "dns_failure") from None
        found: dict[tuple[socket.AddressFamily, str], None] = {}
        for family, _, _, _, address in infos:
            text = str(address[0])
            if len(address) > 3 and address[3]:
                text = f"{text.partition('%')[0]}%{address[3]}"
            found[family, text] = None
        if not found:
            raise Rejected("dns_not_found")
        return SYSTEM_TTL_S, tuple(found)

    async def _ask_servers(self, host: str) -> tuple[float, Addresses]:
        import aiodns
        import pycares

        try:
            ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return LONGEST_TTL_S, ((family, host),)
        try:
            answer = await self._servers.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as e:
            gone = e.args[0] in (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA, pycares.errno.ARES_EBADNAME)
            raise Rejected("dns_not_found" if gone else "dns_failure") from None
        found = tuple(
            dict.fromkeys(
                (
                    socket.AddressFamily(node.family),
                    node.addr[0].decode() if isinstance(node.addr[0], bytes) else node.addr[0],
                )
                for node in answer.nodes
            )
        )
        if not found:
            raise Rejected("dns_not_found")
        ttl = min(node.ttl for node in answer.nodes)
        return min(max(float(ttl), SHORTEST_TTL_S), LONGEST_TTL_S), found


def _server(text: str) -> str:
    """A name server as c-ares wants it: with its port, an IPv6 address in brackets."""
    return f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
