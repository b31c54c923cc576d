"""Take-downs: the list of what is never to be fetched or stored again, by URL, host, or the bytes of the image.

The list is `taken_down/00000.parquet`, `00001.parquet`, ... in the run's folder. Each part is created once, so that
nothing that was asked for can be lost; it outlives any number of ingests. It names hosts, but URLs by their sha256
alone, so that it is no directory of what somebody wanted gone. (Before there were parts it was `taken_down.parquet`,
which is read as the first.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence

import idna
import numpy as np
import pyarrow as pa
from yarl import URL

from ingest.locations import is_web
from shards import storage
from shards.settings import ConfigError

FOLDER = "taken_down"
BEFORE = "taken_down.parquet"
SCHEMA = pa.schema([("kind", pa.string()), ("value", pa.string())])

_HOST = re.compile(r"(?P<below>\*\.)?(?P<name>\[[0-9a-f:.]+\]|[^:/?#@\[\]\s]+)(:(?P<port>\d{1,5}))?\.?")
# What is its own normal form, as most URLs of tables are: nothing in it is quoted, and no part of it is a dot. To parse
# it takes twenty times as long as to see that.
_PLAIN = re.compile(
    r"https?://(?:[a-z0-9][a-z0-9-]*\.)+[a-z][a-z0-9]+(?:/[\w~-][\w.~-]*)+(?:\?[\w.~-]+=[\w.~-]*(?:&[\w.~-]+=[\w.~-]*)*)?",
    re.ASCII,
)
_PLACE = re.compile(r"/|(?:file|local|s3|s3a|gs|gcs|abfs|az)://")
# Nothing is fetched from such a host. To bring it into form takes long, and its names the square of its length.
_LONG_HOST = re.compile(r"[^/?#]*//[^/?#]{2048}")
_PATHLESS = re.compile(r"\A(https?://[^/?#]+)(?=\?|\Z)")


def normal_url(text: str) -> str:
    """One spelling for all that mean the same URL: blanks around it, quoting, the host's case, a default port, a dot
    behind the host, a fragment; an international name in the form of IDNA 2008. What is no URL stays as it is."""
    if _PLAIN.fullmatch(text):
        return text
    text = text.strip()
    if not is_web(text) or _LONG_HOST.match(text):
        return text  # a place of one's own, in which what follows a # tells members of one tar apart
    try:
        url = URL(text).with_fragment(None)
        if url.raw_host and url.raw_host.endswith("."):
            url = url.with_host(url.raw_host.rstrip("."))
        return _PATHLESS.sub(r"\1/", str(url))
    except (ValueError, UnicodeError, IndexError, TypeError):
        return text


def digest(text: str) -> str:
    """sha256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def url_digest(url: str) -> str:
    """sha256 of a URL, whichever of its spellings is given."""
    return digest(normal_url(url))


def number(hexdigest: str) -> int:
    """The first 64 bits of a digest in hex: what sidecars hold of it."""
    return int(hexdigest[:16], 16)


def url_forms(text: str) -> set[str]:
    """The digests of all URLs that a person who writes `text` may mean: by http and https, and where the host is an
    international name in the forms of IDNA 2003 and 2008; of an image of one's own, of its place. Empty where it is no
    URL."""
    if _PLACE.match(text.strip()):
        return {url_digest(text)}
    try:
        url = URL(normal_url(text))
        host = URL(text.strip()).host
    except (ValueError, UnicodeError, IndexError, TypeError):
        return set()
    if url.scheme not in ("http", "https") or not url.raw_host or not host:
        return set()
    standard = url.is_default_port()
    found = set()
    for name in {url.raw_host, *_ascii_names(host)}:
        for scheme in ("http", "https") if standard else (url.scheme,):
            form = url.with_host(name).with_scheme(scheme)
            found.add(url_digest(str(form.with_port(None) if standard else form)))
    return found


def _ascii_names(host: str) -> set[str]:
    """A host's name as it goes over the wire: itself, or of an international one the forms of IDNA 2008 and 2003."""
    host = host.lower().rstrip(".")
    if host.isascii():
        return {host}
    names = set()
    with contextlib.suppress(idna.IDNAError):
        names.add(idna.encode(host, uts46=True).decode())
    with contextlib.suppress(UnicodeError):
        names.add(host.encode("idna").decode())
    return names


def host_forms(text: str) -> set[str]:
    """How a host is listed: `example.com` (and what is below it), `.example.com` (what is below it alone), either with
    `:port`; several where an international name has several forms. Raises ConfigError where it is no host."""
    match = _HOST.fullmatch(text.strip().lower())
    names = _ascii_names(match["name"]) if match else set()
    names = {n if n[:1] != "[" else _ipv6(n) for n in names}
    names = {n for n in names if re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f:.]*:[0-9a-f:.]*", n) and n.strip(".")}
    if not match or not names or (match["port"] and not 0 < int(match["port"]) < 65536):
        raise ConfigError(
            f"--host '{text}' is not the name of a host; write it as in a URL, without //: example.com, "
            "*.example.com or example.com:8080"
        )
    port = f":{match['port']}" if match["port"] else ""
    return {("." if match["below"] else "") + _with_port(name.strip("."), port) for name in names}


def _ipv6(bracketed: str) -> str:
    """An address as URLs are compared by it; empty where it is none."""
    with contextlib.suppress(ValueError):
        return ipaddress.IPv6Address(bracketed.strip("[]")).compressed
    return ""


def _with_port(host: str, port: str) -> str:
    """port: with its colon, or empty."""
    return f"[{host}]{port}" if port and ":" in host else host + port


class Digests:
    """A set of sha256 in 40 bytes each; a set of strings takes five times that in every worker."""

    def __init__(self, hexdigests: Iterable[str] = ()) -> None:
        raw = bytes.fromhex("".join(sorted(set(hexdigests))))
        self._all = np.frombuffer(raw, np.uint8).reshape(-1, 32)
        self.numbers: np.ndarray = self._all[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)  # ascending

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, hexdigest: object) -> bool:
        if not isinstance(hexdigest, str) or not len(self):
            return False
        at = int(np.searchsorted(self.numbers, np.uint64(number(hexdigest))))
        raw = bytes.fromhex(hexdigest)
        while at < len(self) and self.numbers[at] == number(hexdigest):
            if self._all[at].tobytes() == raw:
                return True
            at += 1
        return False

    def __iter__(self) -> Iterator[str]:
        return (row.tobytes().hex() for row in self._all)

    def has_number(self, first_bits: int) -> bool:
        """Whether one of them begins with these 64 bits."""
        at = int(np.searchsorted(self.numbers, np.uint64(first_bits)))
        return at < len(self) and int(self.numbers[at]) == first_bits


@dataclasses.dataclass(frozen=True)
class TakenDown:
    """The list. urls: as `url_digest` makes them. bytes: sha256 of fetched bodies. hosts: as `host_forms` gives them.

    parts: how many parts of the list these are.
    """

    urls: Digests = dataclasses.field(default_factory=Digests)
    bytes: Digests = dataclasses.field(default_factory=Digests)
    hosts: frozenset[str] = frozenset()
    parts: int = 0

    @classmethod
    def of(
        cls, urls: Iterable[str] = (), bytes: Iterable[str] = (), hosts: Iterable[str] = (), parts: int = 0
    ) -> TakenDown:
        """From digests in hex and hosts."""
        return cls(Digests(urls), Digests(bytes), frozenset(hosts), parts)

    @classmethod
    def read(cls, run: str, after: int = 0) -> TakenDown:
        """The list of a run's folder, or its parts from number `after` on; an empty one where there is none."""
        found = _parts(run)
        by_kind: dict[str, list[str]] = {"url": [], "sha256": [], "host": []}
        for url in found[after:]:
            table = storage.read_parquet(url)
            for kind, value in zip(table["kind"].to_pylist(), table["value"].to_pylist(), strict=True):
                by_kind[kind].append(value)
        return cls.of(by_kind["url"], by_kind["sha256"], by_kind["host"], len(found))

    def create(self, run: str) -> int:
        """Write this as the next part of a run's list; returns how many parts there are then."""
        rows = [("url", v) for v in self.urls] + [("sha256", v) for v in self.bytes]
        rows += [("host", v) for v in sorted(self.hosts)]
        kinds, values = zip(*rows, strict=True) if rows else ((), ())
        data = storage.parquet_bytes(pa.table({"kind": list(kinds), "value": list(values)}, SCHEMA))
        while True:
            number = len(_numbered(run))
            if storage.create(storage.join(run, FOLDER, f"{number:05d}.parquet"), data):
                return length(run)

    def create_if_any(self, run: str) -> bool:
        """`create`, unless this is empty; whether it was not."""
        if self:
            self.create(run)
        return bool(self)

    def __bool__(self) -> bool:
        return bool(len(self.urls) or len(self.bytes) or self.hosts)

    def has_url(self, url: str) -> bool:
        """Whether a URL is on the list, by itself or by its host or a domain above that."""
        if len(self.urls):
            normal = normal_url(url)
            former = _former(url)  # how entries were made before there were parts
            if digest(normal) in self.urls or (former != normal and digest(former) in self.urls):
                return True
        return bool(self.hosts) and self.has_host(url)

    def has_host(self, url: str) -> bool:
        """Whether the host of a URL is on the list, or a domain above it."""
        return bool(self.hosts_of(url))

    def hosts_of(self, url: str) -> set[str]:
        """The listed hosts that a URL belongs to."""
        if _LONG_HOST.match(url):
            return set()
        try:
            parsed = URL(url.strip())
            host, port = (parsed.raw_host or "").lower().rstrip("."), parsed.port
        except (ValueError, UnicodeError, IndexError, TypeError):
            return set()
        labels = [host] if ":" in host else host.split(".")
        forms: set[str] = set()
        for i in range(len(labels)):
            name = ".".join(labels[i:])
            found = {name, _with_port(name, f":{port}")}
            forms |= found | ({f".{form}" for form in found} if i else set())
        return forms & self.hosts

    def has_bytes(self, sha256: str | None) -> bool:
        """Whether an image of these bytes is on the list."""
        return sha256 is not None and sha256 in self.bytes


def _former(url: str) -> str:
    if _PLAIN.fullmatch(url) or _LONG_HOST.match(url):
        return url
    try:
        return str(URL(url.strip()).with_fragment(None))
    except (ValueError, UnicodeError, IndexError, TypeError):
        return url.strip()


def _numbered(run: str) -> list[str]:
    names = {n for n in storage.list_names(storage.join(run, FOLDER)) if re.fullmatch(r"\d{5}\.parquet", n)}
    found: list[str] = []
    while (name := f"{len(found):05d}.parquet") in names:
        found.append(storage.join(run, FOLDER, name))
    return found


def _parts(run: str) -> list[str]:
    before = storage.join(run, BEFORE)
    return [*([before] if storage.exists(before) else []), *_numbered(run)]


def length(run: str) -> int:
    """How many parts the list of a run has: one small request, for whoever asks often."""
    return len(_parts(run))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a person asks to be removed. entries: each line or host as it was written, and the 64-bit digests (of URLs,
    of bytes) or hosts that it stands for."""

    listed: TakenDown
    entries: Sequence[tuple[str, frozenset[int | str]]]

    def unknown(self, found: set[int | str]) -> list[str]:
        """The entries of which nothing was found."""
        return [text for text, forms in self.entries if forms.isdisjoint(found)]


def requested(urls: str | None, sha256: str | None, host: str | None) -> Asked:
    """What a person asks for: a file of URLs or of sha256 (one a line), a host; raises ConfigError."""
    entries: list[tuple[str, frozenset[int | str]]] = []
    by_url: list[str] = []
    for line in _lines(urls) if urls else ():
        forms = url_forms(line)
        if not forms:
            raise ConfigError(
                f"{urls}: '{line[:80]}' is not a URL; write one a line, beginning with http:// or https://, or the "
                "place of an image of your own as the sidecar's column `url` has it"
            )
        by_url += forms
        entries.append((line, frozenset(map(number, forms))))
    by_bytes = [line.lower() for line in _lines(sha256)] if sha256 else []
    for line in by_bytes:
        if not re.fullmatch(r"[0-9a-f]{64}", line):
            raise ConfigError(f"{sha256}: '{line[:80]}' is not a sha256; write 64 hexadecimal digits a line")
        entries.append((line, frozenset([number(line)])))
    hosts = host_forms(host) if host and host.strip() else set()
    if host and hosts:
        entries.append((host, frozenset(hosts)))
    if not entries:
        raise ConfigError("remove needs --urls FILE, --sha256 FILE or --host NAME, with something in it")
    return Asked(TakenDown.of(by_url, by_bytes, hosts), entries)


def _lines(path: str) -> Iterable[str]:
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give one with an entry a line") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as text: {e}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
