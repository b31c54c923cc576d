"""`carrara status RUN`: every stage of a run, from its folder alone; the cluster may be down."""

from __future__ import annotations

import time
from typing import Any

from orchestration.stages import STAGES
from shards import storage
from shards.layout import RunPaths
from shards.settings import ConfigError

QUIET_S = 60.0  # a running stage that has not written for so long is said to be silent


def read(run: str) -> list[dict[str, Any]]:
    """The status record of every stage, in order; {} where it has not begun. Raises ConfigError without a run."""
    paths = RunPaths(run)
    if not storage.list_names(run):
        raise ConfigError(f"{run}: there is no run here; give the folder that 'run' names in its configuration")
    records = []
    for stage in STAGES:
        try:
            found = storage.read_json(storage.join(paths.status, f"{stage}.json"))
        except ValueError:
            found = None
        record = found if isinstance(found, dict) else {}
        failed = storage.list_names(storage.join(paths.status, f"{stage}-failed"))
        records.append({**record, "stage": stage, "failed": sum(n.endswith(".json") for n in failed)})
    return records


def table(records: list[dict[str, Any]], now: float | None = None) -> str:
    """The records as aligned text."""
    now = time.time() if now is None else now
    rows = [("stage", "state", "done", "failed", "rate", "left", "updated", "")]
    for r in records:
        if "state" not in r:
            rows.append((r["stage"], "not begun", "", str(r["failed"] or ""), "", "", "", ""))
            continue
        age = now - r["updated"]
        state = "silent" if r["state"] == "running" and age > QUIET_S else r["state"]
        total = r["total"] or "?"
        share = f" ({100 * r['done'] / r['total']:.0f} %)" if r["total"] else ""
        rate = f"{r['rate']:.3g} {r['unit']}/s" if r["rate"] else ""
        left = duration(r["seconds_left"]) if r["seconds_left"] is not None and state == "running" else ""
        figures = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.get("figures", {}).items()
        )
        done = f"{r['done']}/{total} {r['unit']}{share}"
        rows.append((r["stage"], state, done, str(r["failed"] or ""), rate, left, f"{duration(age)} ago", figures))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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
