"""`carrara serve RUN`: a live page of a run, read-only, from its folder or bucket alone; the cluster may be down.

    carrara serve runs/mine                 prints a link with a token; on another machine: ssh -L 8270:127.0.0.1:8270
    CARRARA_SERVE_TOKEN=... carrara serve s3://bucket/mine --host 0.0.0.0

Whoever has the token sees all of it, and nobody can change anything: only GET is answered. The link's token becomes a
cookie and leaves the address bar at once; it is compared in constant time. Files are served from three folders of the
run by the names that lie there, never by a path. What the page shows comes as `state.json`, as text, and is put into
the page as text; reports are shut off from the page by a sandbox. Without TLS: across a network, put it behind a proxy
that has it, or use ssh.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import http.server
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from eval.report import gather, history, page
from orchestration import status
from shards import storage
from shards.layout import RunPaths
from shards.settings import ConfigError

log = logging.getLogger("carrara.serve")

TEMPLATES = Path(__file__).parent / "templates"
EVERY_S = 3.0  # how often the page asks; a run on a slow store is looked at less often
BUSY = 4  # a look is at most a fifth of the time
CURVE_POINTS = 400
SHOWN = {"samples": 12, "failures": 40, "results": 40}
LONGEST = 4000  # characters of a traceback
TOKEN_LEAST = 16
CHUNK = 1 << 18  # bytes of an answer that are to be gone within `timeout`: a slow line gets all of a large report
SILENT = 64  # connections that have not asked for anything yet; a further one takes the place of the oldest
ASK_S = 15.0  # how long one may take to ask, in all: a byte now and then keeps every timeout of a socket waiting
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".png": "image/png",
    ".json": "application/json",
    ".csv": "text/csv",
    ".parquet": "application/octet-stream",
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A report has a policy of its own, and both hold. Sandboxed, it is a stranger to this page, whatever is in it.
REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'none'"
CURVES = (  # folder of the log, key of its lines, title, logarithmic
    *gather.CURVES,
    ("train", "samples_per_s", "UNet: images a second", False),
    ("train", "grad_norm", "UNet: gradient norm", True),
)


def serve(run: str, host: str, port: int) -> None:
    """Serve until Ctrl-C. Raises ConfigError where there is no run, or nothing can listen there."""
    status.read(run)
    token = os.environ.get("CARRARA_SERVE_TOKEN") or secrets.token_urlsafe(24)
    if len(token) < TOKEN_LEAST:
        raise ConfigError(f"CARRARA_SERVE_TOKEN has fewer than {TOKEN_LEAST} characters; take a longer one")
    try:
        server = make_server(run, host, port, token)
    except (OSError, OverflowError) as e:
        raise ConfigError(f"serve: {host}:{port} cannot be listened at: {e}; choose another --port or --host") from None
    shown = host if host not in ("0.0.0.0", "::", "") else socket.gethostname()
    at = f"[{shown}]" if ":" in shown else shown
    print(f"http://{at}:{server.server_port}/?token={urllib.parse.quote(token, safe='')}", flush=True)
    if not _is_loopback(host):
        log.warning("serve: others reach this page over an open connection; put a proxy with TLS before it, or use ssh")
    log.info("serve: %s until Ctrl-C; whoever has this link sees the run", run)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_server(run: str, host: str, port: int, token: str) -> http.server.ThreadingHTTPServer:
    """The server of a run's page, listening; port 0: a free one."""
    look = Look(run)

    class Handler(_Handler):
        pass

    Handler.look, Handler.token, Handler.page = look, token.encode(), _page(run)

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    return Server((host, port), Handler)


def _page(run: str) -> tuple[bytes, str]:
    """The page, and its content security policy: its own script, and requests to this server alone."""
    environment = page.environment()
    assert environment.loader is not None
    environment.loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(TEMPLATES), environment.loader])
    script = page.script("live.js", TEMPLATES)
    name = gather.plain(run.rstrip("/").rsplit("/", 1)[-1], 80)
    body = environment.get_template("live.html.j2").render(run=name, folder=run, every_ms=int(EVERY_S * 1000), **script)
    policy = (
        f"default-src 'none'; script-src '{script['script_hash']}'; style-src 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return body.encode(), policy


class _Server(http.server.ThreadingHTTPServer):
    """A thread for each connection; whoever opens many and says nothing keeps nobody else out."""

    daemon_threads = True
    request_queue_size = 128  # with the five of the library, some dozen at once wait for seconds

    def __init__(self, *args: Any) -> None:
        self._silent: dict[Any, float] = {}  # connections by when they came, the oldest first
        self._guard = threading.Lock()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._silent[request] = time.monotonic()
            over = list(self._silent)[:-SILENT]
        self._shut(over)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called at least twice a second: shut those that take too long to ask."""
        with self._guard:
            late = [c for c, came in self._silent.items() if time.monotonic() - came > ASK_S]
        self._shut(late)

    def heard(self, request: Any) -> None:
        """A connection has asked for something, or is at its end."""
        with self._guard:
            self._silent.pop(request, None)

    def _shut(self, connections: list[Any]) -> None:
        for connection in connections:
            self.heard(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it

    def shutdown_request(self, request: Any) -> None:
        self.heard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """One line, and none where somebody just went away."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.error("serve: a request could not be answered: %s", type(error).__name__)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request, and with it the end of its connection, so that nothing behind it is taken for a further one. The
    class attributes are set by `make_server`."""

    server: _Server
    look: Look
    token: bytes
    page: tuple[bytes, str]
    server_version, sys_version = "carrara", ""
    timeout = 30  # of a connection that says nothing

    def do_GET(self) -> None:
        """Answer; a request without the token learns nothing, not even what is there."""
        self.server.heard(self.request)
        path, _, asked = self.path.partition("?")
        cookie = f"carrara-{self.server.server_port}"  # of this port: hosts share cookies
        query = urllib.parse.parse_qs(asked)
        if path == "/" and "token" in query:
            if not self._is_token(query["token"][0]):
                return self._answer(403, b"wrong token\n")
            value = f"{cookie}={urllib.parse.quote(query['token'][0], safe='')}; HttpOnly; SameSite=Lax; Path=/"
            return self._answer(303, b"", {"Location": "/", "Set-Cookie": value})
        # By hand: http.cookies finds none at all where a page of another port has left one that it cannot read.
        parts = (part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";"))
        found = next((value for name, _, value in parts if name == cookie), None)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not self._is_token(bearer if found is None else urllib.parse.unquote(found)):
            return self._answer(403, b"this page needs the link that `carrara serve` printed\n")
        return self._authorised(path)

    do_HEAD = do_GET

    def _authorised(self, path: str) -> None:
        if path == "/":
            body, policy = self.page
            return self._answer(200, body, {"Content-Type": TYPES[".html"], "Content-Security-Policy": policy})
        if path == "/state.json":
            return self._answer(200, self.look.state(), {"Content-Type": TYPES[".json"]})
        asked = re.fullmatch(r"/files/([a-z]+)/([^/]+)", path)
        if asked and (data := self.look.file(*asked.groups())) is not None:
            suffix = os.path.splitext(path)[1]
            more = {"Content-Type": TYPES[suffix]}
            if suffix == ".html":
                more["Content-Security-Policy"] = REPORT_POLICY
            return self._answer(200, data, more)
        return self._answer(404, b"there is no such page\n")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.token)

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        given = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in {**HEADERS, "Content-Security-Policy": "default-src 'none'", **given}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(body), CHUNK):
                self.wfile.write(body[start : start + CHUNK])

    def log_message(self, *_: Any) -> None:
        """Nothing: a request's line has the token in it."""


class Look:
    """What there is to be seen of a run: looked at as often as it is asked for, but one look serves all who ask."""

    def __init__(self, run: str) -> None:
        self.paths = RunPaths(run)
        self.folders = {"reports": self.paths.reports, "samples": storage.join(self.paths.train, "samples")}
        self._lock = threading.Lock()
        self._state, self._until = b"", 0.0
        self._kept: dict[str, tuple[Any, Any]] = {}

    def state(self) -> bytes:
        """All that the page shows, as JSON."""
        with self._lock:
            began = time.monotonic()
            if began >= self._until:
                self._state = json.dumps(self._see()).encode()
                took = time.monotonic() - began
                self._until = time.monotonic() + max(EVERY_S / 2, BUSY * took)
            return self._state

    def file(self, kind: str, name: str) -> bytes | None:
        """A file of one of the folders, by its name; None where there is none, or it is not of a kind that is shown."""
        folder = self.folders.get(kind)
        if folder is None or not NAME.fullmatch(name) or os.path.splitext(name)[1] not in TYPES:
            return None
        url = storage.join(folder, name)
        if storage.is_local(folder):
            path = storage.local_path(url)
            if path.resolve().parent != storage.local_path(folder).resolve() or not path.is_file():
                return None  # a link to somewhere else
        try:
            return storage.read_bytes(url)
        except (OSError, ValueError):
            return None

    def _see(self) -> dict[str, Any]:
        now, trouble = time.time(), []
        seen: dict[str, Any] = {"at": now}
        parts: dict[str, Callable[[], Any]] = {
            "stages": lambda: [_stage(r, now) for r in status.read(self.paths.run)],
            "funnels": self._funnels,
            "curves": self._curves,
            "samples": lambda: self._newest("samples", ".png", SHOWN["samples"]),
            "reports": lambda: self._newest("reports", ".html", 200),
            "results": self._results,
            "failures": self._failures,
        }
        for name, part in parts.items():
            try:
                seen[name] = part()
            except Exception as e:  # a store that is away, a file that is just written: the rest is shown
                seen[name] = []
                trouble.append(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
        return {**seen, "trouble": trouble}

    def _newest(self, kind: str, suffix: str, most: int) -> list[str]:
        names = [n for n in storage.list_names(self.folders[kind]) if n.endswith(suffix) and NAME.fullmatch(n)]
        return names[::-1][:most]

    def _unless_changed(self, url: str, read: Callable[[], Any]) -> Any:
        """What `read` made of a file, as long as that is the same."""
        mark = storage.stamp(url)
        if mark is None:
            return None
        if self._kept.get(url, (None, None))[0] != mark:
            self._kept[url] = (mark, read())
        return self._kept[url][1]

    def _funnels(self) -> list[dict[str, Any]]:
        found = []
        for title, root in (("Training images", self.paths.images), ("Held-out images", self.paths.heldout)):
            url = storage.join(root, "dataset.json")
            steps = self._unless_changed(url, functools.partial(gather.funnel, root))
            if steps:
                found.append({"title": title, "steps": [vars(s) for s in steps]})
        return found

    def _curves(self) -> list[dict[str, Any]]:
        found = []
        for folder in dict.fromkeys(c[0] for c in CURVES):
            logs = storage.join(self.paths.run, folder)
            lines = self._unless_changed(storage.join(logs, "log.jsonl"), functools.partial(gather.log_lines, logs))
            for _, key, title, log_scale in (c for c in CURVES if c[0] == folder):
                points = [(x["images"], x[key]) for x in lines or () if gather.is_number(x, key)]
                if len(points) >= 2:
                    found.append({"title": title, "log": log_scale, "points": thinned(points, CURVE_POINTS)})
        return found

    def _results(self) -> list[dict[str, Any]]:
        found = sorted(history.read_all(self.paths), key=lambda r: (-(r["images_seen"] or 0), r["checkpoint"]))
        pages = set(storage.list_names(self.paths.reports))
        return [
            {
                "checkpoint": r["checkpoint"],
                "label": r["label"],
                "numbers": [[label, *texts] for label, texts in list(page.headline(r).items())[:6]],
                "report": f"{r['checkpoint']}.html" if f"{r['checkpoint']}.html" in pages else None,
            }
            for r in found[: SHOWN["results"]]
        ]

    def _failures(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for folder in storage.list_names(self.paths.status):
            if not folder.endswith("-failed"):
                continue
            root = storage.join(self.paths.status, folder)
            names = [n for n in storage.list_names(root) if n.endswith(".json")][: SHOWN["failures"] - len(found)]
            for name, data in zip(names, storage.read_many([storage.join(root, n) for n in names]), strict=True):
                record = json.loads(data) if data else {}
                texts = {k: str(record.get(k, ""))[-LONGEST:] for k in ("error", "host", "attempts", "traceback")}
                found.append({"stage": folder.removesuffix("-failed"), "shard": name.removesuffix(".json"), **texts})
        return found


def _stage(record: dict[str, Any], now: float) -> dict[str, Any]:
    """A stage's record as the table of `carrara status` has it, with the share that is done."""
    names = ("name", "state", "done", "failed", "rate", "left", "updated", "figures")
    shown: dict[str, Any] = dict(zip(names, status.cells(record, now), strict=True))
    share = record["done"] / record["total"] if record.get("total") else None
    return {**shown, "figures": shown["figures"].replace("  ", ", "), "share": share}


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about so many points: of each stretch the lowest and the highest, in their order, so that no spike is
    lost; the first and the last stay."""
    if len(points) <= most:
        return points
    stretch = -(-len(points) * 2 // most)
    kept = [points[0]]
    for start in range(1, len(points) - 1, stretch):
        part = points[start : min(start + stretch, len(points) - 1)]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]
