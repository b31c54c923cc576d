"""A web server in a thread for the tests: plain pages by aiohttp, broken ones written to the socket by hand."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

Page = tuple[int, dict[str, str], bytes]


def image_bytes(seed: int, width: int = 48, height: int = 40, fmt: str = "PNG", **options: Any) -> bytes:
    """A smooth picture of its own colours, encoded."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, fmt, **options)
    return sink.getvalue()


class Site:
    """`pages`: path -> (status, headers, body) or a function of the request. `hits`: requests by path.

    `slow`: seconds that every page of these waits before it answers.

    `raw`: path -> bytes that are written to a second, plain socket server (`raw_url`), then closed; or an
    async function of the stream.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Page | Callable[[web.Request], Any]] = {}
        self.raw: dict[str, bytes | Callable[[asyncio.StreamWriter], Any]] = {}
        self.hits: Counter[str] = Counter()
        self.busy = self.most_busy = 0
        self.slow = 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def raw_url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.raw_port}{path}"

    def add(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        self.pages[path] = (status, {k.replace("_", "-"): v for k, v in headers.items()}, body)
        return self.url(path)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        server = await asyncio.start_server(self._answer_raw, "127.0.0.1", 0)
        self.raw_port = server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        await self._runner.cleanup()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.hits[request.raw_path] += 1
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            await asyncio.sleep(self.slow)
            page = self.pages.get(request.raw_path)
            if page is None:
                return web.Response(status=404, text="no such page")
            if callable(page):
                return await page(request)
            status, headers, body = page
            return web.Response(status=status, headers=headers, body=body)
        finally:
            self.busy -= 1

    async def _answer_raw(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
            self.hits[path] += 1
            page = self.raw[path]
            if callable(page):
                await page(writer)
            else:
                writer.write(page)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
