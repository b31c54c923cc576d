"""Bodies as they come in: the bytes that all of a worker's may take together, and what undoes their compression."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator

from ingest.errors import Rejected

_COMPRESSIONS = ("gzip", "deflate", "br", "zstd", "compress", "dcb", "dcz", "lzma", "xz", "bzip", "exi", "pack200")
_INFLATED, _DEFLATED = 1 << 20, 1 << 14  # bytes out of and into the decompressor in one go: a few milliseconds
_MEMBERS = 4096  # of a gzip body; each costs a copy of what follows it, however little it holds


class Room:
    """The bytes that bodies may take in a worker, all together.

    The body that came first of those still coming in may always grow to `largest`, so much is kept free for it;
    the others wait where there is no more. So there is always one that comes to its end and makes room.
    """

    def __init__(self, size: int, largest: int) -> None:
        self.free, self.largest = max(size, largest), largest
        self._taken: dict[int, int] = {}
        self._growing: dict[int, None] = {}  # those that are still coming in, in the order in which they began
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._next = 0

    def begin(self) -> int:
        """A new body's number."""
        self._next += 1
        self._taken[self._next] = 0
        self._growing[self._next] = None
        return self._next

    def take(self, body: int, size: int) -> bool:
        """Whether a body may take so many bytes more, and then it has them."""
        first = next(iter(self._growing))
        kept = 0 if body == first else max(0, self.largest - self._taken[first])
        if self.free - size < kept:
            return False
        self.free -= size
        self._taken[body] += size
        return True

    async def wait(self, body: int, size: int) -> None:
        """As `take`, once there is room."""
        waiting = (body, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            await waiting[2]
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def done(self, body: int) -> None:
        """All of the body is here."""
        del self._growing[body]
        self._serve()

    def end(self, body: int) -> None:
        """The body is no more."""
        self.free += self._taken.pop(body)
        self._growing.pop(body, None)
        self._serve()

    def _serve(self) -> None:
        for waiting in list(self._waiting):
            body, size, future = waiting
            if body in self._growing and not future.done() and self.take(body, size):
                self._waiting.remove(waiting)
                future.set_result(None)


class Inflater:
    """A bounded decompressor for gzip and deflate, which some servers send though asked not to."""

    def __init__(self, encoding: str) -> None:
        # 32: gzip or zlib by its header. Deflate comes with zlib's header, as it should, or without.
        self._kinds = [zlib.MAX_WBITS | 32, *([-zlib.MAX_WBITS] if encoding == "deflate" else [])]
        self._stream = zlib.decompressobj(self._kinds.pop(0))
        self._begun = False
        self._members = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What so many bytes more give, in pieces of a bounded size. Raises Rejected where they are damaged."""
        for at in range(0, len(data), _DEFLATED):
            some = data[at : at + _DEFLATED]
            while some:
                try:
                    if self._stream.eof and not self._next_member(some := some.lstrip(b"\0")):
                        return
                    piece, some = self._one(some)
                except zlib.error:
                    raise Rejected("http_malformed", "the compressed body is damaged") from None
                if piece:
                    yield piece

    def _next_member(self, data: bytes) -> bool:
        """Whether another gzip member begins there, rather than padding or what is none of it."""
        if not data.startswith(b"\x1f"):
            return False
        self._members += 1
        if self._members > _MEMBERS:
            raise zlib.error("more gzip members than anybody could mean")
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
        return True

    def _one(self, data: bytes) -> tuple[bytes, bytes]:
        """A piece, and what is left of the data."""
        while True:
            try:
                piece = self._stream.decompress(data, _INFLATED)
                break
            except zlib.error:
                if self._begun or not self._kinds:
                    raise
                self._stream = zlib.decompressobj(self._kinds.pop(0))
        self._begun = True
        return piece, self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    @property
    def complete(self) -> bool:
        """Whether the end of the stream was seen."""
        return self._stream.eof


def inflater(encoding: str) -> Inflater | None:
    """What undoes a content encoding; None where there is none. Raises Rejected for one that is not known."""
    encoding = encoding.strip().lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        return Inflater(encoding)
    if any(name in encoding for name in _COMPRESSIONS):
        raise Rejected("encoding_unsupported", "a content encoding that was not asked for")
    return None  # identity, or what is no encoding, such as utf-8 or none
