"""A web server that answers as no server should, in a process of its own, so that none of its work is the client's.

    with running() as origin:
        fetch(f"{origin}/tiny_chunks")

The path names what is sent (ANSWERS). What never ends is sent for SECONDS, or until the client hangs up.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

SECONDS = 5.0

Answer = Callable[[socket.socket], object]

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def once(data: bytes) -> Answer:
    """The data, and the end."""
    return lambda to: to.sendall(data)


def forever(head: bytes, piece: bytes, pause: float = 0.0) -> Answer:
    """The head, then the piece again and again."""

    def send(to: socket.socket) -> None:
        to.sendall(head)
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            to.sendall(piece)
            if pause:
                time.sleep(pause)

    return send


def whole(body: bytes, *headers: bytes) -> bytes:
    """An answer with its length."""
    return b"".join([HEAD, *(h + b"\r\n" for h in headers), b"Content-Length: %d\r\n\r\n" % len(body), body])


def chunks(data: bytes, size: int) -> bytes:
    """The data as chunks of a few bytes."""
    return b"".join(b"%x\r\n%b\r\n" % (len(data[i : i + size]), data[i : i + size]) for i in range(0, len(data), size))


def led_to(location: bytes) -> Answer:
    """A redirect."""
    return once(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")


GZIP, DEFLATE = b"Content-Encoding: gzip", b"Content-Encoding: deflate"
_PART = b"\r\nTransfer-Encoding: chunked\r\n\r\n"

ANSWERS: dict[str, Answer] = {
    "plain": once(whole(b"x")),
    # Pieces of a byte.
    "tiny_chunks": forever(CHUNKED, b"1\r\na\r\n" * 10_000),
    "long_extensions": forever(CHUNKED, b"1;" + b"a" * 1000 + b"\r\na\r\n"),
    "tiny_segments": forever(HEAD + b"\r\n", b"a"),
    "slow_loris": forever(HEAD, b"X: y\r\n", 0.05),
    "slow_body": forever(HEAD + b"Content-Length: 4000\r\n\r\n", b"a", 0.05),
    # Headers.
    "continues": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 4000),
    "hints": forever(b"", b"HTTP/1.1 103 Early Hints\r\n" + b"a:\r\n" * 200 + b"\r\n"),
    "header_lines": forever(HEAD, b"a: b\r\n" * 10_000),
    "long_header": forever(HEAD + b"X: ", b"a" * 65536),
    "long_status": forever(b"HTTP/1.1 200 ", b"a" * 65536),
    "newlines": forever(b"", b"\r\n" * 30_000),
    "trailers": forever(CHUNKED + b"1\r\na\r\n0\r\n", b"a:\r\n" * 16_000),
    "robots_tags": once(whole(b"x", *[b"X-Robots-Tag: " + b"a:" * 15 + b"b," * 4] * 200)),
    "cookies": once(whole(b"x", *[b"Set-Cookie: a%b=" + b'"\\' * 50] * 200)),
    "types": once(whole(b"x", b"Content-Type: " + b'a;a="' * 6000)),
    "second_answers": forever(whole(b"x"), whole(b"x") * 1000),
    # Redirects of 30 KB, each of which is to be quoted, joined or looked at.
    "to_quoted": led_to(b"/" + b"\xc3\xa9" * 15_000),
    "to_bytes": led_to(b"/?" + b"\xff" * 30_000),
    "to_dots": led_to(b"../" * 10_000),
    "to_labels": led_to(b"http://" + b"a." * 15_000 + b"/"),
    "to_name": led_to("http://{}.com/".format("\u00fc" * 500).encode()),
    "to_names": led_to("http://{}com/".format("\u00fc\u00e9." * 200).encode()),
    "to_percents": led_to(b"http://" + b"%C3%BC" * 160 + b"/"),
    "to_user": led_to(b"http://" + b"%41:" * 7000 + b"@h/"),
    # Compressed.
    "gzip_bomb": once(whole(gzip.compress(bytes(100_000_000), 9), GZIP)),
    "deflate_bomb": once(whole(zlib.compress(bytes(100_000_000), 9), DEFLATE)),
    "gzip_members": forever(HEAD + GZIP + _PART, chunks(gzip.compress(b"") * 3000, 65_536)),
    "gzip_tiny": forever(
        HEAD + GZIP + _PART + chunks(gzip.compress(b"a" * 9)[:-8], 99), chunks(zlib.compress(bytes(50_000), 0), 1)
    ),
    "gzip_stored": forever(
        HEAD + GZIP + _PART + b"a\r\n\x1f\x8b\x08\0\0\0\0\0\0\xff\r\n", chunks(b"\0\0\0\xff\xff" * 9000, 40_000)
    ),
    # Bodies that nobody reads.
    "error_body": forever(b"HTTP/1.1 404 Not Found\r\n\r\n", b"a" * 65536),
    "redirect_body": forever(b"HTTP/1.1 302 Found\r\nLocation: /plain\r\n\r\n", b"a" * 65536),
    "upgrade": forever(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", b"a" * 65536),
}
AGENTS = b"".join(b"User-agent: a%d\n" % i for i in range(20_000))
# Each rule stands for all crawlers named above it, and is looked for in each URL. The code of a row of such a host.
ROBOTS = {
    "wide": (AGENTS[:8000] + b"Disallow: /a\n" * 600, "http_malformed"),
    "widest": (AGENTS[:260_000] + b"Disallow: /a\n" * 18_000, "http_malformed"),
    "twice": (AGENTS[:260_000] + b"Disallow: /a\n" + AGENTS[:260_000], "http_malformed"),
    "less_wide": (AGENTS[:6000] + b"Disallow: /a\n" * 300, "1 bytes"),
    "stars": (b"User-agent: *\n" + b"Disallow:*zy\n" * 1200, "1 bytes"),
    "many_stars": (b"User-agent: *\nDisallow: /" + b"*a" * 8000 + b"*b\n", "1 bytes"),
}


def serve(server: socket.socket, answers: dict[str, Answer]) -> None:
    """Answer by the path, each connection once and in a thread."""

    def one(to: socket.socket) -> None:
        with contextlib.suppress(OSError), to:
            asked = b""
            while b"\r\n\r\n" not in asked:
                more = to.recv(65536)
                if not more:
                    return
                asked += more
            path = asked.split(b" ")[1].decode().removeprefix("/").partition("?")[0]
            answers.get(path, once(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))(to)

    while True:
        to, _ = server.accept()
        threading.Thread(target=one, args=(to,), daemon=True).start()


@contextlib.contextmanager
def running(robots: str = "") -> Iterator[str]:
    """The origin of a server of a process of its own. robots: which of ROBOTS is its robots.txt."""
    with subprocess.Popen([sys.executable, "-m", "tests.ingest.hostile", robots], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def main() -> None:
    """Serve; prints the port."""
    server = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(server.getsockname()[1], flush=True)
    robots = {"robots.txt": once(whole(ROBOTS[sys.argv[1]][0]))} if sys.argv[1] else {}
    serve(server, ANSWERS | robots)


if __name__ == "__main__":
    main()
