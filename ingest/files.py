"""Images of one's own for the pool: what `Fetcher` is for the web, `Files` is for locations (ingest/locations.py)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence

from ingest.errors import Rejected
from ingest.fetch import Fetched
from ingest.locations import Below, Reader
from shards.machine import own_fault
from shards.settings import NodeTrouble

AT_ONCE = 8  # images that are read or held at a time, each of at most max_bytes


class Files:
    """Reads images from files, tars and tables below named folders. largest: bytes that one may have."""

    def __init__(self, below: Sequence[str], largest: int) -> None:
        self._reader = Reader(Below(below), largest)
        self._gate = asyncio.Semaphore(AT_ONCE)

    @contextlib.asynccontextmanager
    async def fetch(self, location: str) -> AsyncIterator[Fetched]:
        """The bytes at a location; raises Rejected, or NodeTrouble where this machine is at fault."""
        async with self._gate:
            try:
                body, digest = await asyncio.get_running_loop().run_in_executor(None, self._read, location)
            except OSError as e:
                if fault := own_fault(e):
                    raise NodeTrouble(fault) from None
                raise Rejected("source_unreadable", f"{type(e).__name__}") from None
            yield Fetched(body, digest, 1)

    def _read(self, location: str) -> tuple[bytes, str]:
        body = self._reader.read(location)
        return body, hashlib.sha256(body).hexdigest()  # here, since that of a large one would hold up the loop
