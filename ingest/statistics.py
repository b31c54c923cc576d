"""What is counted: by shard in its stats, for the run in the manifest, as a line a shard in statistics.jsonl.

Everything here can be merged, so that a run of 200,000 shards is summed up from their stats alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ingest import tables
from ingest.errors import ERRORS, RETRYABLE
from ingest.filters import out_of_range
from ingest.pool import Outcome
from shards import storage

COUNTED = ("success", "failed_to_download", "failed_to_resize", "filtered", "opted_out")
LOOKED_AT = ("width", "height")  # columns of the table that are compared with the images, where there are such
LINES = "statistics.jsonl"
HOSTS_KEPT = 50
_SIDES = (64, 128, 256, 512, 1024, 2048, 4096)


def of_shard(outcomes: Sequence[Outcome], urls: Sequence[str | None], began: float) -> dict[str, Any]:
    """A shard's counts and times. `count` is the number of samples in its tar, `rows` that of its input rows."""
    ended = time.time()
    return {
        **counts_of([o.status for o in outcomes], [o.error for o in outcomes], [o.message for o in outcomes]),
        "hosts": _worst_hosts(outcomes, urls),
        "smaller_sides": dict(_sides(outcomes)),
        "body_sizes": dict(Counter(_power(o.bytes_fetched) for o in outcomes if o.bytes_fetched)),
        "bytes_fetched": sum(o.bytes_fetched for o in outcomes),
        "bytes_stored": sum(len(o.image.data) for o in outcomes if o.image),
        "retries": sum(max(o.attempts - 1, 0) for o in outcomes),
        "start_time": began,
        "end_time": ended,
        "duration": ended - began,
    }


def counts_of(statuses: Sequence[str], errors: Sequence[str | None], messages: Sequence[str | None]) -> dict[str, Any]:
    """What is counted of a shard's rows; the same from outcomes and from a sidecar's columns."""
    status = Counter(statuses)
    filters = Counter(
        (m or "") if e == "filtered_out" else e
        for s, e, m in zip(statuses, errors, messages, strict=True)
        if s == "filtered" and e
    )
    return {
        "rows": len(statuses),
        "count": status["success"],
        "successes": status["success"],
        **{name: status[name] for name in COUNTED},
        "errors": dict(Counter(e for e in errors if e)),
        "filters": dict(filters),
        "status_dict": dict(Counter(m or "success" for m in messages)),
    }


def checks(rows: pa.Table, layout: tables.Layout, outcomes: Sequence[Outcome], swapped: bool) -> dict[str, int]:
    """How often the table's claims are wrong: sizes against the images, similarities against their range."""
    found: Counter[str] = Counter()
    for name in rows.column_names:
        if "similarity" in name.lower():
            wrong = sum(out_of_range(name, v) for v in rows[name].to_pylist())
            found["similarity_out_of_range"] += wrong
    names = [tables.resolve(layout, n) for n in LOOKED_AT]
    if all(n is not None for n in names):
        widths, heights = (rows[n].to_pylist() for n in (reversed(names) if swapped else names))
        for width, height, o in zip(widths, heights, outcomes, strict=True):
            if o.image is None or width is None or height is None:
                continue
            is_size = (o.image.original_width, o.image.original_height)
            try:
                said = (int(width), int(height))
            except (ValueError, OverflowError):  # not a number
                said = (0, 0)
            if said == is_size:
                found["size_as_said"] += 1
            elif said[::-1] == is_size:
                found["size_swapped"] += 1
            else:
                found["size_other"] += 1
    return dict(found)


class RunCounts:
    """The run's counts, folded from the stats of its shards as these are read; nothing of a shard is kept.

    A row that a later shard took over (a retry) counts where its fate was decided last.
    """

    def __init__(self) -> None:
        self.rows = self.shards = 0
        self.statuses: Counter[str] = Counter()  # as the sidecars have them, rows that were taken over included
        self.taken_over: Counter[str] = Counter()  # by code
        self.errors: Counter[str] = Counter()
        self.filters: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self._hosts: dict[str, Counter[str]] = {}
        self._sums = {name: Counter[str]() for name in ("smaller_sides", "body_sizes", "checks")}

    def add(self, s: dict[str, Any]) -> None:
        """Count a shard."""
        self.shards += 1
        self.rows += s["rows"]
        self.statuses.update({name: s[name] for name in COUNTED})
        self.taken_over.update(s.get("takes_over", {}))
        self.errors.update(s["errors"])
        self.filters.update(s["filters"])
        self.sums.update({n: s[n] for n in ("bytes_fetched", "bytes_stored", "retries")})
        for name, total in self._sums.items():
            total.update(s.get(name, {}))
        for host, errors in s["hosts"].items():
            self._hosts.setdefault(host, Counter()).update(errors)
        if len(self._hosts) > 100 * HOSTS_KEPT:
            self._hosts = _most(self._hosts, 10 * HOSTS_KEPT)

    def settled(self) -> tuple[int, Counter[str], Counter[str]]:
        """(rows that went in, these by status, these by error), each row once."""
        statuses, errors = Counter(self.statuses), Counter(self.errors)
        for code, count in self.taken_over.items():
            statuses[ERRORS[code].status] -= count
            errors[code] -= count
        return self.rows - self.taken_over.total(), statuses, +errors

    def manifest(self) -> dict[str, Any]:
        """The manifest's part that only informs: hosts, sizes, checks."""
        return {
            "hosts": {h: dict(sorted(c.items())) for h, c in _most(self._hosts, HOSTS_KEPT).items()},
            **{name: dict(total) for name, total in self._sums.items()},
            "bytes_fetched": self.sums["bytes_fetched"],
            "bytes_stored": self.sums["bytes_stored"],
        }


class Lines:
    """statistics.jsonl: a line a shard, for whatever draws curves; written beside and put in its place at the end."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # closed in write

    def add(self, s: dict[str, Any]) -> None:
        """Write a shard's line."""
        asked = s["rows"] - s["filtered"]
        line = {n: s[n] for n in ("shard", "rows", *COUNTED, "bytes_fetched", "bytes_stored", "retries")}
        line |= {
            "seconds": round(s["duration"], 3),
            "images_per_second": round(s["count"] / max(s["duration"], 1e-9), 3),
            "success_rate": round(s["count"] / asked, 4) if asked else None,
            "errors": s["errors"],
            "ended": s["end_time"],
        }
        self._file.write(json.dumps(line).encode() + b"\n")

    def write(self, root: str) -> None:
        """Put the file into a dataset's folder."""
        self._file.seek(0)
        with self._file:
            storage.write_atomic(storage.join(root, LINES), self._file.read())


# What to do about rows that ended so; for codes that `--retry transient` may help, see `summary`.
ADVICE = {
    "address_refused": "where these hosts are your own, name their network in ingest.fetch.allow_addresses",
    "url_invalid": "look at ingest.columns.url: what stands there is not a URL with http:// or https://",
    "url_missing": "look at ingest.columns.url: these rows have none",
    "scheme_refused": "look at ingest.columns.url: it must hold http:// or https:// URLs",
    "body_too_large": "raise ingest.fetch.max_bytes",
    "image_too_large": "raise ingest.max_pixels",
    "animation_refused": "set ingest.animations to first_frame",
    "tls_error": "where you trust these hosts, set ingest.fetch.verify_tls to false",
    "caption_empty": "set ingest.empty_captions to keep, to do without captions",
    "filtered_out": "look at ingest.filters",
    "http_forbidden": "these servers refuse the request; ingest.fetch.user_agent says who asks",
}


def summary(name: str, counts: dict[str, int], errors: Counter[str]) -> list[str]:
    """What became of the rows, by cause, and what can be done about it: three lines at most.

    counts: rows, success, duplicate, filtered, opted_out, failed_*. errors: rows by code.
    """
    rows = max(counts["rows"], 1)
    failed = counts["failed_to_download"] + counts["failed_to_resize"]
    parts = [f"{counts['success']:,} images ({100 * counts['success'] / rows:.1f} %)"]
    kinds = (("duplicates", "duplicate"), ("filtered", "filtered"), ("opted out", "opted_out"))
    parts += [f"{counts[key]:,} {word}" for word, key in kinds if counts[key]]
    parts += [f"{failed:,} failed"] if failed else []
    lines = [f"{name}: {counts['rows']:,} rows: {', '.join(parts)}"]
    bad = Counter({c: n for c, n in errors.items() if ERRORS[c].status.startswith("failed")})
    if bad:
        most = [f"{code} {n:,} ({ERRORS[code].meaning})" for code, n in bad.most_common(3)]
        more = f" and {len(bad) - 3} other causes" if len(bad) > 3 else ""
        lines.append(f"{name}: failed most often: {'; '.join(most)}{more}")
    advice = []
    again = sum(n for c, n in bad.items() if c in RETRYABLE)
    if again:
        advice.append(f"{again:,} rows may come now: run ingest with --retry transient")
    for code, n in errors.most_common():
        if code in ADVICE and n >= 0.01 * rows and len(advice) < 3:
            advice.append(f"{code}: {ADVICE[code]}")
    if advice:
        lines.append(f"{name}: what can be done: {'; '.join(advice)}")
    return lines


def _worst_hosts(outcomes: Sequence[Outcome], urls: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Errors by host, of the hosts with the most of them."""
    hosts: dict[str, Counter[str]] = {}
    for o, url in zip(outcomes, urls, strict=True):
        if o.error and o.status != "filtered":
            hosts.setdefault(_host(url), Counter())[o.error] += 1
    return {h: dict(c) for h, c in _most(hosts, HOSTS_KEPT).items()}


def _most(hosts: dict[str, Counter[str]], keep: int) -> dict[str, Counter[str]]:
    return dict(sorted(hosts.items(), key=lambda item: (-item[1].total(), item[0]))[:keep])


def _host(url: str | None) -> str:
    try:
        return (urlsplit(url or "").hostname or "")[:255]
    except ValueError:
        return ""


def _sides(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Successes by their smaller side as fetched: `256` counts those of 256 to 511 pixels."""
    found: Counter[str] = Counter()
    for o in outcomes:
        if o.image is not None:
            side = min(o.image.original_width, o.image.original_height)
            found[str(max((s for s in _SIDES if s <= side), default=0))] += 1
    return found


def _power(size: int) -> str:
    """The power of two at or below a size."""
    return str(1 << (size.bit_length() - 1))
