"""What is counted: by shard in its stats, for the run in the manifest, as a line a shard in statistics.jsonl.

Everything here can be merged, so that a run of 200,000 shards is summed up from their stats alone.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ingest import tables
from ingest.filters import out_of_range
from ingest.work import Outcome
from shards import storage

COUNTED = ("success", "failed_to_download", "failed_to_resize", "filtered", "opted_out")
LOOKED_AT = ("width", "height")  # columns of the table that are compared with the pictures, where there are such
LINES = "statistics.jsonl"
HOSTS_KEPT = 50
_SIDES = (64, 128, 256, 512, 1024, 2048, 4096)


def of_shard(
    outcomes: Sequence[Outcome], urls: Sequence[str | None], began: float, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A shard's counts and times. `count` is the number of samples in its tar, `rows` that of its input rows.

    earlier: the stats of the shard that this one replaces, whose work counts too; only what was fetched
    since then has bytes_fetched and attempts in its outcome.
    """
    before: dict[str, Any] = earlier or {}
    status = Counter(o.status for o in outcomes)
    ended = time.time()
    return {
        "rows": len(outcomes),
        "count": status["success"],
        "successes": status["success"],
        **{name: status[name] for name in COUNTED},
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "filters": dict(
            Counter(
                (o.message or "") if o.error == "filtered_out" else o.error
                for o in outcomes
                if o.status == "filtered" and o.error
            )
        ),
        "status_dict": dict(Counter(o.message or "success" for o in outcomes)),
        "hosts": _worst_hosts(outcomes, urls),
        "smaller_sides": dict(_sides(outcomes)),
        "body_sizes": dict(
            sum_counts(
                [before.get("body_sizes", {}), Counter(_power(o.bytes_fetched) for o in outcomes if o.bytes_fetched)]
            )
        ),
        "bytes_fetched": before.get("bytes_fetched", 0) + sum(o.bytes_fetched for o in outcomes),
        "bytes_stored": sum(len(o.picture.data) for o in outcomes if o.picture),
        "retries": before.get("retries", 0) + sum(max(o.attempts - 1, 0) for o in outcomes),
        "checks": before.get("checks", {}),
        "rounds": before.get("rounds", 0) + 1,
        "start_time": began,
        "end_time": ended,
        "duration": ended - began,
    }


def checks(rows: pa.Table, plan: tables.Plan, outcomes: Sequence[Outcome], swapped: bool) -> dict[str, int]:
    """How often the table's claims are wrong: sizes against the pictures, similarities against their range."""
    found: Counter[str] = Counter()
    for name in rows.column_names:
        if "similarity" in name.lower():
            wrong = sum(out_of_range(name, v) for v in rows[name].to_pylist())
            found["similarity_out_of_range"] += wrong
    names = [tables.resolve(plan, n) for n in LOOKED_AT]
    if all(n is not None for n in names):
        widths, heights = (rows[n].to_pylist() for n in (reversed(names) if swapped else names))
        for width, height, o in zip(widths, heights, outcomes, strict=True):
            if o.picture is None or width is None or height is None:
                continue
            is_size = (o.picture.original_width, o.picture.original_height)
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


def of_run(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's part of the manifest that only informs: hosts, sizes, checks."""
    hosts: dict[str, Counter[str]] = {}
    for s in stats:
        for host, errors in s["hosts"].items():
            hosts.setdefault(host, Counter()).update(errors)
        if len(hosts) > 100 * HOSTS_KEPT:
            hosts = _most(hosts, 10 * HOSTS_KEPT)
    return {
        "hosts": {h: dict(sorted(c.items())) for h, c in _most(hosts, HOSTS_KEPT).items()},
        "smaller_sides": dict(sum_counts(s["smaller_sides"] for s in stats)),
        "body_sizes": dict(sum_counts(s["body_sizes"] for s in stats)),
        "checks": dict(sum_counts(s["checks"] for s in stats)),
        "bytes_stored": sum(s["bytes_stored"] for s in stats),
    }


def write_lines(root: str, stats: Iterable[dict[str, Any]]) -> None:
    """statistics.jsonl: a line a shard, for whatever draws curves."""
    lines = []
    for s in stats:
        asked = s["rows"] - s["filtered"]
        line = {n: s[n] for n in ("shard", "rows", *COUNTED, "bytes_fetched", "bytes_stored", "retries", "rounds")}
        line |= {
            "seconds": round(s["duration"], 3),
            "images_per_second": round(s["count"] / max(s["duration"], 1e-9), 3),
            "success_rate": round(s["count"] / asked, 4) if asked else None,
            "errors": s["errors"],
            "ended": s["end_time"],
        }
        lines.append(json.dumps(line))
    storage.write_atomic(storage.join(root, LINES), "".join(line + "\n" for line in lines).encode())


def sum_counts(counts: Iterable[dict[str, int]]) -> Counter[str]:
    """The sum of counts by name."""
    total: Counter[str] = Counter()
    for c in counts:
        total.update(c)
    return total


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
        if o.picture is not None:
            side = min(o.picture.original_width, o.picture.original_height)
            found[str(max((s for s in _SIDES if s <= side), default=0))] += 1
    return found


def _power(size: int) -> str:
    """The power of two at or below a size."""
    return str(1 << (size.bit_length() - 1))
