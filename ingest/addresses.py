"""Nobody gets in: the addresses that a URL from a stranger's table may make this machine talk to.

A check of the host name alone is worth nothing, since a name can answer otherwise the second time. So
the check stands where the socket is made: `Guard.socket_factory` sees the very address that is about to
be connected to, for every connection, also after a redirect, also for a literal address. The resolver
filters by the same rule beforehand, which gives the better message and lets a host with one public and
one private address be reached by the public one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from ingest.errors import Rejected

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Beyond what ipaddress calls not global, by its version: shared and protocol assignments, benchmarking,
# documentation, reserved, and the IPv6 ranges that carry an IPv4 address inside (RFC 6890 and its updates).
_NEVER = [
    ipaddress.ip_network(n)
    for n in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/3", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16",
        "fc00::/7", "fe80::/9", "ff00::/8",
    )
]  # fmt: skip

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052
_6TO4 = ipaddress.ip_network("2002::/16")  # RFC 3056


def embedded_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to: mapped (::ffff:a.b.c.d), NAT64 or 6to4; None for others."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _6TO4:
        return ipaddress.IPv4Address((int(address) >> 80) & 0xFFFFFFFF)
    return None


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, with everything special-purpose refused."""
    inner = embedded_ipv4(address)
    if inner is not None:
        return is_public(inner)
    if any(address in n for n in _NEVER if n.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class AddressRefused(OSError):
    """The socket was not made, since its address is not permitted (an OSError, as connecting code expects)."""


class Guard:
    """Which addresses may be connected to: public ones, and those in the networks that the config allows."""

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.allow: list[Network] = [ipaddress.ip_network(n) for n in allow]

    def permits(self, text: str) -> bool:
        """Whether a numeric address (an IPv6 one perhaps with its zone) may be connected to."""
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        candidates = [a for a in (address, embedded_ipv4(address)) if a is not None]
        if any(a in n for a in candidates for n in self.allow if n.version == a.version):
            return True
        return is_public(address)

    def socket_factory(self, info: Sequence[Any]) -> socket.socket:
        """Make the socket for one getaddrinfo entry; raises AddressRefused where it is not permitted."""
        family, kind, protocol, _, address = info
        if not self.permits(str(address[0])):
            raise AddressRefused(f"{address[0]} is not a public address")
        return socket.socket(family=family, type=kind, proto=protocol)


class GuardedResolver(AbstractResolver):
    """Names to permitted addresses by the system's resolver; aiohttp connects to exactly what this returns."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises Rejected: dns_not_found, dns_failure, or address_refused where no address is permitted."""
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        except socket.gaierror as e:
            gone = e.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            raise Rejected("dns_not_found" if gone else "dns_failure") from None
        except UnicodeError:
            raise Rejected("url_invalid", "the host name is not valid") from None
        results: list[ResolveResult] = []
        for found, _, protocol, _, address in infos:
            text = str(address[0])
            if len(address) > 3 and address[3]:
                text = f"{text.partition('%')[0]}%{address[3]}"
            if self.guard.permits(text):
                results.append(
                    ResolveResult(
                        hostname=host,
                        host=text,
                        port=port,
                        family=found,
                        proto=protocol,
                        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                    )
                )
        if not results:
            raise Rejected("address_refused" if infos else "dns_not_found")
        return results

    async def close(self) -> None:
        """Nothing is held."""
