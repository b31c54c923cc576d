"""Take-downs: what is never to be fetched or stored again, by URL, host, or the bytes of the picture.

`taken_down.parquet` lies in the run's folder and outlives any number of ingests. It names hosts, but URLs
by their sha256 alone, so that the list is no directory of what somebody wanted gone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.errors import Rejected
from ingest.fetch import parse_url
from shards import storage
from shards.settings import ConfigError

FILE = "taken_down.parquet"
SCHEMA = pa.schema([("kind", pa.string()), ("value", pa.string())])


@dataclasses.dataclass(frozen=True)
class TakenDown:
    """The list. urls: as `url_digest` makes them. bytes: sha256 of fetched bodies. hosts: in lower case."""

    urls: frozenset[str] = frozenset()
    bytes: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def read(cls, run: str) -> TakenDown:
        """The list of a run's folder; an empty one where there is none."""
        url = storage.join(run, FILE)
        if not storage.exists(url):
            return cls()
        by_kind: dict[str, set[str]] = {"url": set(), "sha256": set(), "host": set()}
        for row in storage.read_parquet(url).to_pylist():
            by_kind[row["kind"]].add(row["value"])
        return cls(frozenset(by_kind["url"]), frozenset(by_kind["sha256"]), frozenset(by_kind["host"]))

    def write(self, run: str) -> None:
        """Write the list into a run's folder."""
        rows = [("url", v) for v in self.urls] + [("sha256", v) for v in self.bytes] + [("host", v) for v in self.hosts]
        kinds, values = zip(*sorted(rows), strict=True) if rows else ((), ())
        sink = io.BytesIO()
        pq.write_table(pa.table({"kind": list(kinds), "value": list(values)}, SCHEMA), sink, compression="zstd")
        storage.write_atomic(storage.join(run, FILE), sink.getvalue())

    def __or__(self, other: TakenDown) -> TakenDown:
        return TakenDown(self.urls | other.urls, self.bytes | other.bytes, self.hosts | other.hosts)

    def __bool__(self) -> bool:
        return bool(self.urls or self.bytes or self.hosts)

    def has_url(self, url: str) -> bool:
        """Whether a URL of a table is on the list, by itself or by its host or a domain above that."""
        if self.urls and url_digest(url) in self.urls:
            return True
        if not self.hosts:
            return False
        try:
            labels = (parse_url(url).raw_host or "").lower().rstrip(".").split(".")
        except Rejected:
            return False
        return any(".".join(labels[i:]) in self.hosts for i in range(len(labels)))

    def has_bytes(self, sha256: str | None) -> bool:
        """Whether a picture of these bytes is on the list."""
        return sha256 in self.bytes


def url_digest(url: str) -> str:
    """sha256 of a URL, whichever of its spellings is given (blanks around it, quoting, case of the host)."""
    try:
        url = str(parse_url(url))
    except Rejected:
        url = url.strip()
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def requested(urls: str | None, sha256: str | None, host: str | None) -> TakenDown:
    """What a person asks to be removed: a file of URLs or of sha256 (one a line), a host; raises ConfigError."""
    digests = [line.lower() for line in _lines(sha256)] if sha256 else []
    for line in digests:
        if not re.fullmatch(r"[0-9a-f]{64}", line):
            raise ConfigError(f"{sha256}: '{line[:80]}' is not a sha256; write 64 hexadecimal digits a line")
    hosts = []
    if host:
        name = host.strip().lower().strip(".")
        if not re.fullmatch(r"[a-z0-9_:.-]+", name):
            try:
                name = name.encode("idna").decode()
            except UnicodeError:
                raise ConfigError(
                    f"--host '{host}' is not the name of a host; write it as in a URL, without //"
                ) from None
        if "/" in name:
            raise ConfigError(f"--host '{host}' is not the name of a host; write it as in a URL, without //")
        hosts.append(name)
    asked = TakenDown(
        frozenset(map(url_digest, _lines(urls))) if urls else frozenset(), frozenset(digests), frozenset(hosts)
    )
    if not asked:
        raise ConfigError("remove needs --urls FILE, --sha256 FILE or --host NAME, with something in it")
    return asked


def _lines(path: str) -> Iterable[str]:
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give one with an entry a line") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as text: {e}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
