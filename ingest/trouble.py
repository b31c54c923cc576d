"""Whether a failure is this machine's own: then the shard is given back, and no row of it is marked.

Some failures say it themselves (shards/machine.py). Others look alike from both sides: a name that cannot be looked up,
a connection that does not come about. Where many different hosts fail so in a row, canaries decide, never the table's
rows: hosts of the configuration, and those that answered before.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import resource
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

from ingest.errors import Rejected
from shards.settings import NodeTrouble

DOUBT = 10  # different hosts that fail one after the other, and nothing in between that succeeds
EASE_S = 30.0  # for which a canary that answered is believed
WINDOW = 400  # rows whose success is compared with the run's
FAR_BELOW = 0.25  # of the run's rate of success
MANY_ANSWERED = 32

_NETWORK_CODES = frozenset(("dns_not_found", "dns_failure", "connect_timeout", "timeout", "host_unavailable"))


def no_route(address: str) -> bool:
    """Whether this machine has no way to an IPv4 address: a question to its own routing table, nothing is sent."""
    try:
        if ipaddress.ip_address(address).version != 4:
            return False  # a machine without IPv6 is a machine as any other
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
    except OSError as e:
        return e.errno in (errno.ENETUNREACH, errno.ENETDOWN)
    except ValueError:
        pass
    return False


def raise_limits() -> None:
    """As many open files as the system allows: each host that keeps a connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems have a limit below what they call the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Health:
    """What speaks for and against this machine's own network.

    look_up: addresses of a name, asked anew; raises Rejected. reach: connects to host and port; raises what
    connecting raises. run_rate: the success of the whole run's rows, 0..1, None where too few are known.
    """

    def __init__(
        self,
        canaries: tuple[str, ...],
        look_up: Callable[[str], Awaitable[object]],
        reach: Callable[[str, int], Awaitable[None]],
        run_rate: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.canaries, self.look_up, self.reach, self.run_rate = [split(c) for c in canaries], look_up, reach, run_rate
        self.answered_by: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._doubts: dict[str, set[str]] = {"dns": set(), "net": set()}
        self._eased = {"dns": -EASE_S, "net": -EASE_S}
        self._turn = asyncio.Lock()
        self._rows: deque[bool] = deque(maxlen=WINDOW)
        self._seen = 0

    def looked_up(self, host: str, found: bool) -> None:
        """A name was looked up."""
        if found:
            self._doubts["dns"].clear()
        else:
            self._doubts["dns"].add(host)

    def answered(self, host: str, port: int) -> None:
        """A server answered, whatever it said."""
        self._doubts["net"].clear()
        endpoint = (host, port)
        if endpoint not in self.answered_by:
            self.answered_by[endpoint] = None
            if len(self.answered_by) > MANY_ANSWERED:
                self.answered_by.popitem(last=False)

    def unreached(self, host: str) -> None:
        """A server did not answer in time, or no way led to it."""
        self._doubts["net"].add(host)

    async def judge(self) -> None:
        """Raises NodeTrouble where so many hosts failed in a row and no canary answers either."""
        for kind, hosts in self._doubts.items():
            if len(hosts) >= DOUBT:
                await self._ask(kind)

    async def row(self, succeeded: bool) -> None:
        """A row came to its end. Raises NodeTrouble where success is far below the run's and no canary answers."""
        self._rows.append(succeeded)
        self._seen += 1
        if len(self._rows) < WINDOW or self._seen % 32:
            return
        rate = self.run_rate()
        if rate is not None and sum(self._rows) < FAR_BELOW * rate * len(self._rows):
            await self._ask("dns")
            await self._ask("net")

    async def shard(self, codes: list[str | None]) -> None:
        """All rows of a shard have their codes (None: success). Raises NodeTrouble where nothing answered at all."""
        if codes and all(c in _NETWORK_CODES for c in codes):
            for kind, hosts in self._doubts.items():
                if hosts:
                    await self._ask(kind)

    async def _ask(self, kind: str) -> None:
        async with self._turn:
            if time.monotonic() - self._eased[kind] < EASE_S:
                return
            endpoints = [*self.canaries, *reversed(self.answered_by)]
            if kind == "dns":
                endpoints = [p for p in endpoints if not _numeric(p[0])]
            tried = []
            for host, port in endpoints[: 2 * MANY_ANSWERED]:
                try:
                    async with asyncio.timeout(10):
                        await (self.look_up(host) if kind == "dns" else self.reach(host, port))
                except (Rejected, OSError, TimeoutError):
                    tried.append(host)
                    if len(tried) >= 6:
                        break
                    continue
                self._eased[kind] = time.monotonic()
                self._doubts[kind].clear()
                return
            if not tried:
                return  # nobody to ask
            names = ", ".join(tried[:3])
            if kind == "dns":
                raise NodeTrouble(
                    f"no name can be looked up here, neither the table's nor those of fetch.canaries ({names})"
                )
            raise NodeTrouble(f"no server can be reached from here, neither the table's nor fetch.canaries ({names})")


def split(canary: str) -> tuple[str, int]:
    """Host and port of `host:port`; 443 where there is none."""
    host, colon, port = canary.rpartition(":")
    return (host.strip("[]"), int(port)) if colon and port.isdigit() else (canary.strip("[]"), 443)


def _numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
