"""Nobody gets in: the addresses that a URL from a stranger's table may make this machine talk to.

A check of the host name alone is worth nothing, since a name can answer otherwise the second time. So
the check stands where the socket is made: `Guard.socket_factory` sees the very address that is about to
be connected to, for every connection, also after a redirect, also for a literal address. The resolver
(ingest/names.py) filters by the same rule beforehand, which gives the better message and lets a host with one
public and one private address be reached by the public one.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

AT_ONCE = 1 << 15

# Beyond what ipaddress calls not global, by its version: shared and protocol assignments, benchmarking,
# documentation, reserved, and the IPv6 ranges that carry an IPv4 address inside (RFC 6890 and its updates).
_NEVER = [
    ipaddress.ip_network(n)
    for n in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
        "::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/9",
        "ff00::/8",
        # What clouds answer under addresses that look public, to their own machines alone: Azure's WireServer,
        # IBM's private services, Equinix' metadata, Google's private and restricted API endpoints.
        "168.63.129.16/32",
        "161.26.0.0/16",
        "166.8.0.0/14",
        "192.80.8.124/32",
        "199.36.153.4/30",
        "199.36.153.8/30",
    )
]

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


def allowed(text: str) -> tuple[Network, int | None]:
    """The network and port of an entry of `allow_addresses`: 10.0.0.0/8, 127.0.0.1:8701, [fd00::/8]:443.

    Without a port (None) all of them are meant. Raises ValueError with a sentence.
    """
    found = re.fullmatch(r"\[([0-9a-fA-F:./]+)\](?::([0-9]{1,5}))?|([0-9.]+(?:/[0-9.]+)?):([0-9]{1,5})", text)
    network, port = (found[1] or found[3], found[2] or found[4]) if found else (text, None)
    try:
        if port is not None and not 0 < int(port) < 65536:
            raise ValueError(f"there is no port {port}")
        return ipaddress.ip_network(network), None if port is None else int(port)
    except ValueError as e:
        raise ValueError(
            f"write each entry as a network such as 127.0.0.1/32, or with a port as 127.0.0.1:8701 or [::1]:8701 ({e})"
        ) from None


class BoundedSocket(socket.socket):
    """A socket that hands over AT_ONCE bytes at a time: an answer of nothing but tiny pieces (`100 Continue`, chunks of
    a byte) costs the parser alone 0.2 s a megabyte, and the event loop's transports read a quarter of one at a time."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        return super().recv(min(size, AT_ONCE), flags)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0, /) -> int:
        return super().recv_into(buffer, min(size or memoryview(buffer).nbytes, AT_ONCE), flags)


class Guard:
    """Which addresses may be connected to: public ones, and those in the networks that the config allows."""

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.allow = [allowed(entry) for entry in allow]

    def permits(self, text: str, port: int | None = None) -> bool:
        """Whether a numeric address (an IPv6 one perhaps with its zone) may be connected to.

        port: where; without one, an entry that allows a single port is no permission.
        """
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        candidates = [a for a in (address, embedded_ipv4(address)) if a is not None]
        for network, only in self.allow:
            if only in (None, port) and any(a in network for a in candidates if a.version == network.version):
                return True
        return is_public(address)

    def socket_factory(self, info: Sequence[Any]) -> socket.socket:
        """Make the socket for one getaddrinfo entry; raises AddressRefused where it is not permitted."""
        family, kind, protocol, _, address = info
        if not self.permits(str(address[0]), int(address[1])):
            raise AddressRefused(f"{address[0]} is not a public address")
        return BoundedSocket(family=family, type=kind, proto=protocol)
