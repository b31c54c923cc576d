"""What a worker process does for the rows of a shard: fetch many at once, decode in threads, in table order.

The event loop runs in a thread of its own, so that a worker can be called from anywhere, also where
another loop is running; it lives as long as the process, and with it the pooled connections. Whatever a row brings
in ends that row alone; what is wrong with this machine ends the shard, as NodeTrouble, and marks no row.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import gc
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ingest.config import IngestConfig
from ingest.decoders import Decoders
from ingest.errors import ERRORS, Rejected
from ingest.fetch import Fetched, Fetcher
from ingest.files import Files
from ingest.hosts import Exchange
from ingest.locations import is_web
from ingest.pixels import EncodedImage, PixelSettings, is_quick, process
from ingest.takedown import TakenDown
from ingest.trouble import raise_limits
from shards.machine import own_fault
from shards.settings import NodeTrouble

DNS_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Lies:
    """An image that stays where it is: the data of a member of a tar. Sizes in pixels are None where nothing says."""

    image_file: str
    offset: int
    size: int
    extension: str
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    exif: str | None = None
    pixel_hash: str | None = None
    phash: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a row. image: for a success alone. bytes_fetched and attempts go to statistics only.

    final_url: where redirects led, None where there were none.
    """

    status: str
    error: str | None = None
    message: str | None = None
    image: EncodedImage | None = None
    sha256: str | None = None
    bytes_fetched: int = 0
    attempts: int = 0
    final_url: str | None = None
    lies: Lies | None = None  # of a success that is adopted in place, which has no image

    @classmethod
    def of(cls, code: str, message: str = "", **more: Any) -> Outcome:
        """The outcome of a row that ends with a code of ERRORS."""
        return cls(ERRORS[code].status, code, message or ERRORS[code].meaning, **more)


def pixel_settings(config: IngestConfig) -> PixelSettings:
    """How the configuration wants images stored."""
    return PixelSettings(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        only_if_bigger=config.only_if_bigger,
        encode_format=config.encode_format,
        quality=config.quality,
        background=config.background,
        max_pixels=config.max_pixels,
        animations=config.animations,
        reencode=config.reencode,
        downscale_filter=config.downscale_filter,
    )


class FetchPool:
    """A process's event loop, client and decoders.

    hosts: how the run's ledger of hosts is reached (ingest/hosts.py); without it this process keeps its own. below: the
    folders below which rows may name files of one's own.
    """

    def __init__(
        self,
        config: IngestConfig,
        taken_down: TakenDown | None = None,
        hosts: Exchange | None = None,
        below: Sequence[str] = (),
    ) -> None:
        self.config, self.hosts = config, hosts
        self._files = Files(below, config.fetch.max_bytes) if below else None
        self.taken_down = taken_down or TakenDown()
        self.pixels = pixel_settings(config)
        raise_limits()
        self._decoders = ThreadPoolExecutor(config.decode_threads, "decode")
        self._others = Decoders(self.pixels, config.fetch.decode_memory, config.fetch.decode_timeout)
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(DNS_THREADS, "dns"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._turn = asyncio.Lock()
        self._fetcher: Fetcher | None = None
        gc.collect()
        gc.freeze()  # or each full collection walks over all that was imported: a tenth of the time of small images
        atexit.register(self.close)  # or the client complains of connections left open

    def fetch_all(self, urls: dict[int, str]) -> dict[int, Outcome]:
        """The outcome of each URL, by the number it comes with; raises NodeTrouble."""
        future = asyncio.run_coroutine_threadsafe(self._fetch_all(urls), self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as group:
            own, _ = group.split(NodeTrouble)
            if own is None:
                raise
            raise _first(own) from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close the connections and end the threads."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        if self._fetcher is not None:
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._fetcher.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()
        self._decoders.shutdown(wait=False)
        self._others.close()

    async def _fetch_all(self, urls: dict[int, str]) -> dict[int, Outcome]:
        if self._fetcher is None:
            name = f"{socket.gethostname()}/{os.getpid()}/{os.urandom(4).hex()}"
            self._fetcher = Fetcher(self.config.fetch, self.config.opt_out, self.hosts, name)
        async with asyncio.TaskGroup() as group:
            tasks = {i: group.create_task(self._one(self._fetcher, url)) for i, url in urls.items()}
        outcomes = {i: task.result() for i, task in tasks.items()}
        await self._fetcher.desk.rest()
        await self._fetcher.health.shard([o.error for i, o in outcomes.items() if not self._is_own(urls[i])])
        return outcomes

    def _is_own(self, url: str) -> bool:
        return self._files is not None and not is_web(url)

    async def _one(self, fetcher: Fetcher, url: str) -> Outcome:
        """What becomes of a row. Raises NodeTrouble alone."""
        own = self._is_own(url)
        try:
            async with self._files.fetch(url) if own and self._files else fetcher.fetch(url) as fetched:
                outcome = await self._judge(fetched)
        except Rejected as e:
            outcome = Outcome.of(e.code, e.message, attempts=e.attempts)
        except NodeTrouble:
            raise
        except Exception as e:
            outcome = _unforeseen(e)
        if not own:
            fetcher.desk.row(outcome.status == "success")
            await fetcher.health.row(outcome.status == "success")
        return outcome

    async def _judge(self, fetched: Fetched) -> Outcome:
        """What becomes of a row whose body is here."""
        led_to = fetched.final_url
        known: dict[str, Any] = {"sha256": fetched.sha256, "final_url": led_to}
        known |= {"bytes_fetched": len(fetched.body), "attempts": fetched.attempts}
        try:
            if self.taken_down.has_bytes(fetched.sha256) or (led_to and self.taken_down.has_url(led_to)):
                raise Rejected("taken_down")
            if is_quick(fetched.body, self.pixels):
                # To hand an image of a few milliseconds over costs a good part of what it takes: both
                # threads want the interpreter, and a thread's own memory is given back after each
                # image. One a turn of the loop, so that requests are looked after in between.
                async with self._turn:
                    image = process(fetched.body, self.pixels)
                    await asyncio.sleep(0)
            else:
                image = await self._loop.run_in_executor(self._decoders, self._others.process, fetched.body)
        except Rejected as e:
            return Outcome.of(e.code, e.message, **known)
        except NodeTrouble:
            raise
        except Exception as e:
            return _unforeseen(e, **known)
        return Outcome("success", None, None, image, **known)


def _unforeseen(error: Exception, **known: Any) -> Outcome:
    """The outcome of a row by an error that nobody foresaw; raises NodeTrouble where it is this machine's."""
    fault = own_fault(error)
    if fault:
        raise NodeTrouble(fault) from error
    return Outcome.of("unforeseen", type(error).__name__, **known)


def _first(group: BaseExceptionGroup[NodeTrouble]) -> NodeTrouble:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
