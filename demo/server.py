"""Serve the demo's corpus over HTTP on loopback, with the faults that its server.json asks for.

    python -m demo.server FOLDER --port 8090

Only the files that lie in FOLDER/pictures when the server starts are served, from a table of their names: a path is
looked up, never opened. It listens on 127.0.0.1 alone. From Python, as a process of its own that ends with the block,
and also when the process that started it dies:

    with serve(folder, port=8090) as server: ...  # server.url
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

HOST = "127.0.0.1"
TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
_READY = "serving"


class ServerError(Exception):
    """The server did not start; the message says why."""


def build_app(folder: str | Path) -> web.Application:
    """The application that serves FOLDER/pictures as FOLDER/server.json says. Raises ServerError where they are absent.

    server.json: URL path -> {"status": 410}, {"status": 302, "headers": {...}}, {"headers": {...}} or {"short": true}.
    """
    root = Path(folder)
    try:
        behaviours: dict[str, dict[str, Any]] = json.loads((root / "server.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise ServerError(f"{root} holds no corpus (server.json is missing or unreadable); draw one first") from None
    files = {
        "/" + path.relative_to(root).as_posix(): path
        for path in (root / "pictures").rglob("*")
        if path.is_file() and not path.is_symlink()
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        behaviour = behaviours.get(request.path, {})
        headers = dict(behaviour.get("headers", {}))
        status = behaviour.get("status", 200)
        if status != 200:
            return web.Response(status=status, headers=headers)
        path = files.get(request.path)
        if path is None:
            return web.Response(status=404, text="there is no such image\n")
        data = path.read_bytes()
        headers.setdefault("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
        if not behaviour.get("short"):
            return web.Response(body=data, headers=headers)
        # Announce all of it, send half and hang up.
        response = web.StreamResponse(headers=headers)
        response.content_length = len(data)
        await response.prepare(request)
        if request.method == "GET":
            await response.write(data[: len(data) // 2])
            if request.transport is not None:
                request.transport.close()
        return response

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return app


async def _run(folder: Path, port: int, ends_with_stdin: bool) -> None:
    runner = web.AppRunner(build_app(folder), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ServerError(f"cannot listen on {HOST}:{port} ({reason}); give another port") from None
        actual = runner.addresses[0][1]
        print(f"{_READY} {folder} at http://{HOST}:{actual}", flush=True)
        if ends_with_stdin:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()

            def on_input() -> None:
                if not os.read(0, 4096):
                    ended.set()

            loop.add_reader(0, on_input)
            await ended.wait()
        else:
            await asyncio.Event().wait()
    finally:
        await runner.cleanup()


class Server:
    """A server in a process of its own, which ends by itself when its standard input closes: however the process that
    started it ends, none is left behind. `url` is the base of its addresses.

    Raises ServerError where the server does not answer within `timeout` seconds.
    """

    def __init__(self, folder: str | Path, port: int = 0, timeout: float = 60.0) -> None:
        self._folder, self._timeout = Path(folder).absolute(), timeout
        self._process, self.url = self._start(port)

    def revive(self) -> bool:
        """Start the server again, at the same port, if it has died; whether it had."""
        if self._process.poll() is None:
            return False
        self.stop()
        self._process, self.url = self._start(int(self.url.rsplit(":", 1)[1]))
        return True

    def stop(self) -> None:
        """End the process."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()

    def _start(self, port: int) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "demo.server", str(self._folder), "--port", str(port), "--with-stdin"]
        home = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        assert process.stderr is not None
        ready, _, _ = select.select([process.stdout], [], [], self._timeout)
        line = process.stdout.readline() if ready else ""
        if not line.startswith(_READY):
            process.kill()
            complaint = process.communicate()[1].strip().splitlines()
            raise ServerError(
                complaint[-1] if complaint else f"the image server did not start within {self._timeout:g} s"
            )
        return process, line.split()[-1]


@contextlib.contextmanager
def serve(folder: str | Path, port: int = 0, timeout: float = 60.0) -> Iterator[Server]:
    """A Server for a corpus while the block runs; port 0 takes a free one. Raises ServerError where none starts."""
    server = Server(folder, port, timeout)
    try:
        yield server
    finally:
        server.stop()


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description="Serve the demo's corpus on loopback.")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8090, help="0 takes a free one")
    parser.add_argument("--with-stdin", action="store_true", help="end when standard input closes")
    args = parser.parse_args(arguments)
    try:
        asyncio.run(_run(Path(args.folder), args.port, args.with_stdin))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
