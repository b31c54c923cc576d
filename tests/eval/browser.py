"""Headless Chromium, spoken to over its own debugging protocol: what a page did when it was opened."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NEEDED = "this test opens pages in Chromium, which is not installed here: apt-get install chromium"


def chromium() -> str:
    """Path of Chromium; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip(NEEDED)


class Tab:
    """One page. requests: what was asked for by id, but files, data: URIs and what the page's own policy stopped; said:
    console and policy messages."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.session = socket, ""
        self.number = 0
        self.waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.requests: dict[str, str] = {}
        self.said: list[str] = []
        self.loaded = asyncio.Event()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.waiting[self.number] = asyncio.get_running_loop().create_future()
        message = {"id": self.number, "method": method, "params": parameters}
        await self.socket.send_json(message | ({"sessionId": self.session} if self.session else {}))
        return await asyncio.wait_for(self.waiting[self.number], 30)

    async def listen(self) -> None:
        async for message in self.socket:
            data = message.json()
            parameters = data.get("params", {})
            if "id" in data and not self.waiting[data["id"]].done():
                self.waiting.pop(data["id"]).set_result(data.get("result", {"error": data.get("error")}))
            elif data.get("method") == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    self.requests[parameters["requestId"]] = url
            elif data.get("method") == "Network.loadingFailed" and parameters.get("blockedReason") == "csp":
                self.requests.pop(parameters["requestId"], None)
            elif data.get("method") == "Log.entryAdded":
                self.said.append(parameters["entry"]["text"])
            elif data.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.said.append(str(parameters.get("exceptionDetails") or parameters.get("args")))
            elif data.get("method") == "Page.loadEventFired":
                self.loaded.set()

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return done["result"].get("value")


def visit(page: Path | str, look: Callable[[Tab], Awaitable[None]]) -> None:
    """Open a file or a URL in a fresh Chromium and hand the tab to `look` once it is loaded."""
    asyncio.run(_visit(chromium(), page if isinstance(page, str) else page.resolve().as_uri(), look))


async def _visit(program: str, page: str, look: Callable[[Tab], Awaitable[None]]) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # it writes as it ends
        process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file = Path(folder) / "DevToolsActivePort"
            for _ in range(600):
                if port_file.is_file() and len(port_file.read_text().split()) == 2:
                    break
                assert process.poll() is None, f"{program} does not start"
                await asyncio.sleep(0.05)
            port, path = port_file.read_text().split()
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0) as socket:
                    tab = Tab(socket)
                    listening = asyncio.create_task(tab.listen())
                    target = await tab.call("Target.createTarget", url="about:blank")
                    attached = await tab.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
                    tab.session = attached["sessionId"]
                    for domain in ("Page", "Network", "Log", "Runtime"):
                        await tab.call(f"{domain}.enable")
                    await tab.call("Page.navigate", url=page)
                    await asyncio.wait_for(tab.loaded.wait(), 60)
                    await look(tab)
                    listening.cancel()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
