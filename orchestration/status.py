"""`carrara status RUN`: every stage of a run, from its folder alone; the cluster may be down."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from orchestration.parts import STAGES
from orchestration.runs import existing
from shards import storage

WATCH_EVERY_S = 2.0
BELONGS = {
    "heldout": "ingest",
    "prior": "latents",
    "prior-latents": "latents",
    "reference": "eval",
}  # lines of their own that belong to a stage
UNDER_WAY = ("planning", "running", "finishing")
QUIET_S = 60.0  # a running stage that has not written for so long is said to be silent
UNREADABLE = "unreadable"  # the state of a stage whose record was cut short, or is something else


def read(run: str) -> list[dict[str, Any]]:
    """The status record of every stage in order, {} where it has not begun, and of whatever else has one: the held-out
    split, the reference, retries. One that cannot be shown has the state UNREADABLE and its `url`. Raises ConfigError
    without a run."""
    paths = existing(run)
    names = storage.list_names(paths.status)
    there = [n.removesuffix(".json") for n in names if n.endswith(".json")]
    failures = [n.removesuffix("-failed") for n in names if n.endswith("-failed")]
    records = []
    for stage in [*STAGES, *sorted({*there, *failures} - set(STAGES))]:
        record = _record(paths.status, stage)
        if stage in STAGES or stage in failures or "state" in record:
            failed = storage.list_names(storage.join(paths.status, f"{stage}-failed")) if stage in failures else []
            records.append({**record, "stage": stage, "failed": sum(n.endswith(".json") for n in failed)})
    return sorted(records, key=lambda r: _order(r["stage"]))


def _record(folder: str, stage: str) -> dict[str, Any]:
    url = storage.join(folder, f"{stage}.json")
    try:
        found = storage.read_json(url)
        if found is None or (stage not in STAGES and isinstance(found, dict) and "state" not in found):
            return {}  # or a file of another kind
        cells({**found, "stage": stage, "failed": 0}, 0.0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return {"state": UNREADABLE, "url": url}
    return dict(found)


def _order(stage: str) -> tuple[int, str]:
    """Where a line stands: what belongs to a stage behind it, and what belongs to none at the end."""
    first = BELONGS.get(stage.removesuffix("-retry"), stage.removesuffix("-retry"))
    if first.startswith(("score-", "caption-", "control-")):
        return (STAGES.index("clip"), stage)
    return (STAGES.index(first) if first in STAGES else len(STAGES), "" if stage == first else stage)


def show(run: str, watch: bool = False, as_json: bool = False) -> None:
    """Print it; with watch again and again, until Ctrl-C."""
    while True:
        records = read(run)
        text = json.dumps(records, indent=1) if as_json else table(records)
        if watch and not as_json and sys.stdout.isatty():
            text = f"\033[H\033[2J{text}"
        print(text, flush=True)
        if not watch:
            return
        time.sleep(WATCH_EVERY_S)


def table(records: list[dict[str, Any]], now: float | None = None) -> str:
    """The records as aligned text."""
    now = time.time() if now is None else now
    titles: tuple[str, ...] = ("stage", "state", "done", "failed", "rate", "left", "updated", "")
    rows = [titles, *(cells(r, now) for r in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def cells(record: dict[str, Any], now: float) -> tuple[str, ...]:
    """A record as texts: stage, state, done, failed, rate, time left, when it was updated, figures."""
    r = record
    aside = str(r["failed"] or "")
    if "state" not in r:
        return (r["stage"], "not begun", "", aside, "", "", "", "")
    if r["state"] == UNREADABLE:
        why = f"{r['url']} is damaged or cut short; the stage's next command writes it anew"
        return (r["stage"], UNREADABLE, "", aside, "", "", "", why)
    age = now - r["updated"]
    state = f"silent ({r['state']})" if r["state"] in UNDER_WAY and age > QUIET_S else r["state"]
    total = r["total"] or "?"
    share = f" ({100 * r['done'] / r['total']:.0f} %)" if r["total"] else ""
    rate = f"{r['rate']:.3g} {r['unit']}/s" if r["rate"] else ""
    left = duration(r["seconds_left"]) if r["seconds_left"] is not None and state in UNDER_WAY else ""
    figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.get("figures", {}).items())
    done = f"{r['done']}/{total} {r['unit']}{share}"
    return (r["stage"], state, done, aside, rate, left, f"{duration(age)} ago", figures)


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days"
