"""Decoding off the event loop: ordinary JPEGs in a thread, all else in a process that may die of it.

JPEGs go through libjpeg-turbo, which gives the interpreter free and whose memory follows from the size in the header.
For the other formats (PNG, WebP, GIF, TIFF, AVIF, BMP, odd JPEGs) a second process decodes: what a hostile file does to
a decoder in C, be it a crash, memory without end or an hour of work, ends that process and one row. It is
started with the first such image and lives as long as the worker. What passes between the two is JSON
and bytes, no pickle: who took over a decoder has gained a process, not the worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from ingest.errors import Rejected
from ingest.pixels import EncodedImage, PixelSettings, is_light, process
from shards.machine import short_of_memory
from shards.settings import NodeTrouble

START_S = 60.0
_LARGEST_ANSWER = 1 << 30
_HEAD = 4  # bytes that say how long the JSON before the image is


class Decoders:
    """`process` for images that are not quick; callable from several threads, each with a process of its own.

    memory: bytes of address space such a process may take. timeout: seconds for an image.
    """

    def __init__(self, settings: PixelSettings, memory: int, timeout: float) -> None:
        self.settings, self.memory, self.timeout = settings, memory, timeout
        self._mine = threading.local()
        self._all: set[_Process] = set()
        self._lock = threading.Lock()

    def process(self, data: bytes) -> EncodedImage:
        """As ingest.pixels.process; raises Rejected, or NodeTrouble where no process can be started."""
        if is_light(data, self.settings):
            return process(data, self.settings)
        child: _Process | None = getattr(self._mine, "child", None)
        if child is None:
            child = self._mine.child = self._start()
        try:
            return child.process(data, self.timeout)
        except TimeoutError:
            self._end(child)
            raise Rejected("image_corrupt", f"the image was not decoded within {self.timeout:g} s") from None
        except (EOFError, OSError, ValueError, TypeError):
            self._end(child)
            if short_of_memory():
                raise NodeTrouble("this machine is out of memory") from None
            raise Rejected("image_corrupt", "the process that decoded the image ended") from None

    def close(self) -> None:
        """End the processes."""
        for child in list(self._all):
            self._end(child)

    def _start(self) -> _Process:
        try:
            child = _Process(self.settings, self.memory)
        except (OSError, EOFError, TimeoutError) as e:
            raise NodeTrouble(f"no process for decoding can be started ({e or type(e).__name__})") from None
        with self._lock:
            self._all.add(child)
        return child

    def _end(self, child: _Process) -> None:
        child.end()
        self._mine.child = None
        with self._lock:
            self._all.discard(child)


class _Process:
    """One such process, from outside."""

    def __init__(self, settings: PixelSettings, memory: int) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "1",
            }
            self.child = subprocess.Popen(
                [sys.executable, "-m", "ingest.decoders", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )
            self.pipe = Connection(ours.detach())
        try:
            self.pipe.send_bytes(json.dumps({"settings": dataclasses.asdict(settings), "memory": memory}).encode())
            self._answer(START_S)
        except BaseException:
            self.end()
            raise

    def process(self, data: bytes, timeout: float) -> EncodedImage:
        """Raises Rejected; EOFError, OSError or ValueError where the process died; TimeoutError."""
        self.pipe.send_bytes(data)
        answer = self._answer(timeout)
        length = int.from_bytes(answer[:_HEAD])
        header = json.loads(answer[_HEAD : _HEAD + length])
        if "code" in header:
            raise Rejected(str(header["code"]), str(header["message"]))
        return EncodedImage(data=answer[_HEAD + length :], **header)

    def end(self) -> None:
        """Kill it."""
        with contextlib.suppress(OSError):
            self.pipe.close()
        with contextlib.suppress(OSError):
            self.child.send_signal(signal.SIGKILL)
        self.child.wait()

    def _answer(self, timeout: float) -> bytes:
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return self.pipe.recv_bytes(_LARGEST_ANSWER)


def main(descriptor: int) -> None:
    """The process: a line of settings, then image after image, until the other end is closed."""
    pipe = Connection(descriptor)
    request = json.loads(pipe.recv_bytes())
    memory = int(request["memory"])
    # With what is mapped already: the libraries, of which little is really held.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = PixelSettings(**request["settings"] | {"background": tuple(request["settings"]["background"])})
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        rest = b""
        try:
            image = process(data, settings)
        except Rejected as e:
            answer: dict[str, object] = {"code": e.code, "message": e.message}
        except MemoryError:
            answer = {"code": "image_too_large", "message": "more memory than decode_memory to decode it"}
        else:
            fields = dataclasses.asdict(image)
            rest = fields.pop("data")
            answer = fields
        text = json.dumps(answer).encode()
        del data
        pipe.send_bytes(len(text).to_bytes(_HEAD) + text + rest)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(int(sys.argv[1]))
