"""`carrara why RUN SHARD`: what became of a shard in each folder of the run that has one of its number, or of a fit's
ranks. Reads the run's folder or bucket alone."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pyarrow import ArrowInvalid

from orchestration import attempts
from orchestration.parts import FITS
from orchestration.runs import existing, shard_folders
from shards import plan, storage
from shards.dataset import MANIFEST, Dataset, read_stats
from shards.layout import RunPaths, shard_name
from shards.settings import ConfigError, StageError

SIDECAR = ".parquet"
LAST = 12  # lines of a traceback that are shown; the file has the rest


@dataclasses.dataclass(frozen=True)
class Found:
    """A shard in one folder. state: committed, begun, set aside, planned, failed. rows: by status, then by error code.
    made: host, pid and times of who made it. files: name -> (bytes that lie there, bytes that were committed)."""

    stage: str
    folder: str
    shard: str
    state: str
    rows: dict[str, dict[str, int]]
    made: dict[str, Any]
    source: str
    taken_out: int
    files: dict[str, tuple[int | None, int]]
    attempts: list[dict[str, Any]]


def show(run: str, shard: str, as_json: bool = False) -> str:
    """What became of it, as text or JSON. Raises ConfigError where the run has nothing of this number or name."""
    paths = existing(run)
    if shard in FITS:
        events = attempts.read(paths.status, shard, attempts.RANKS)
        return json.dumps(events, indent=1) if as_json else _seen(_fit_text(paths, shard, events))
    if not shard.isascii() or not shard.isdecimal():
        raise ConfigError(f"why: '{shard}' is no shard's number, such as 7 or 00007, nor one of {', '.join(FITS)}")
    found = list(look(paths, int(shard)))
    if not found:
        raise ConfigError(f"{run}: no folder has a shard {shard_name(int(shard))}, and none is planned")
    if as_json:
        return json.dumps([dataclasses.asdict(f) for f in found], indent=1)
    return _seen("\n\n".join(_text(f) for f in found))


def _seen(text: str) -> str:
    """The text without what would steer a terminal: an error may quote a URL or a caption from outside."""
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4))


def look(paths: RunPaths, index: int) -> Iterator[Found]:
    """The shard in every folder that has it, or was to have it."""
    for stage, root, _ in shard_folders(paths):
        found = _look(paths, stage, root, index)
        if found is not None:
            yield found


def _look(paths: RunPaths, stage: str, root: str, index: int) -> Found | None:
    name = shard_name(index)
    events = attempts.read(paths.status, stage, name)
    aside = storage.read_object(storage.join(paths.status, f"{stage}-failed", f"{name}.json"))
    stats = read_stats(root, index)
    line = _planned(root, index)
    # Names and not a listing of the folder, which may have a million.
    begun = stats is None and any(storage.exists(storage.join(root, name + s)) for s in (".tar", ".safetensors"))
    if stats is None and line is None and not (events or aside or begun):
        return None
    state = "committed" if stats else "set aside" if aside else "begun" if begun else "failed" if events else "planned"
    if aside and not events:  # of a version that kept the last one alone
        events = [{"at": aside.get("at"), "what": "set aside", **{k: aside.get(k, "") for k in ("error", "traceback")}}]
    stats = stats or {}
    files = {
        name + suffix: (storage.size(storage.join(root, name + suffix)), int(file["size"]))
        for suffix, file in stats.get("files", {}).items()
    }
    return Found(
        stage,
        root,
        name,
        state,
        _rows(root, name, stats),
        _made(stats),
        _source(line),
        _taken_out(root, index),
        files,
        events,
    )


def _planned(root: str, index: int) -> plan.Line | None:
    """The shard's line of the plan; None where there is none, or where the plan is damaged, as `verify` tells."""
    try:
        return plan.read(root).line(index) if storage.list_names(storage.join(root, plan.FOLDER)) else None
    except StageError:
        return None


def _rows(root: str, name: str, stats: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Rows by status, and of each status by error code, from the sidecar; where that is gone, from the stats."""
    if SIDECAR in stats.get("files", {}):
        try:
            table = storage.read_parquet(storage.join(root, name + SIDECAR))
        except (FileNotFoundError, ArrowInvalid):  # gone, or damaged: what lies there is shown beside it
            table = None
        if table is not None and "status" in table.column_names:
            errors = table["error"].to_pylist() if "error" in table.column_names else [None] * len(table)
            rows: dict[str, Counter[str]] = {}
            for status, error in zip(table["status"].to_pylist(), errors, strict=True):
                rows.setdefault(str(status), Counter())[str(error or "")] += 1
            return {status: dict(codes.most_common()) for status, codes in sorted(rows.items())}
    return {"success": {"": int(stats["count"])}} if "count" in stats else {}


def _made(stats: dict[str, Any]) -> dict[str, Any]:
    by = stats.get("made_by") if isinstance(stats.get("made_by"), dict) else {}
    seconds = stats.get("duration", stats.get("seconds"))
    return {**(by or {}), **({"seconds": round(float(seconds), 1)} if seconds is not None else {})}


def _source(line: plan.Line | None) -> str:
    if line is None:
        return ""
    if line.takes_over:
        older = ", ".join(shard_name(i) for i in line.takes_over[:8]) + (" ..." if len(line.takes_over) > 8 else "")
        return f"{line.rows:,} rows that ended with {', '.join(line.codes)} in shards {older}"
    return f"{line.file or 'a file that is gone'}, from {line.start:,} to {line.stop:,} ({line.rows:,} rows)"


def _taken_out(root: str, index: int) -> int:
    if not storage.exists(storage.join(root, MANIFEST)):
        return 0
    try:
        return len(Dataset.open(root).excluded_rows(index))
    except (StageError, FileNotFoundError):
        return 0


def _text(found: Found) -> str:
    lines = [f"{found.stage} {found.shard}: {found.state}"]

    def say(name: str, text: str) -> None:
        lines.append(f"  {name:<10}{text}")

    if found.made:
        by = f"on {found.made['host']} (process {found.made['pid']})" if "host" in found.made else ""
        seconds = f"in {found.made['seconds']:g} s" if "seconds" in found.made else ""
        say("made", " ".join(filter(None, [_when(found.made.get("at")), by, seconds])))
    for status, codes in found.rows.items():
        why = ", ".join(f"{code} {count:,}" for code, count in codes.items() if code)
        say("rows", f"{sum(codes.values()):,} {status}" + (f" ({why})" if why else ""))
    if found.taken_out:
        say("taken out", f"{found.taken_out:,} samples since")
    if found.source:
        say("from", found.source)
    for name, (there, committed) in found.files.items():
        wrong = "" if there == committed else "; MISSING" if there is None else f"; {committed:,} WERE COMMITTED"
        say("file", f"{storage.join(found.folder, name)} ({there or 0:,} bytes{wrong})")
    if not found.files:
        say("folder", found.folder)
    lines += _events(found.attempts)
    return "\n".join(lines)


def _events(events: list[dict[str, Any]]) -> list[str]:
    lines = []
    for event in events:
        lines.append(f"  {event['what']:<10}{_when(event.get('at'))}: {event.get('error', '')}".rstrip(": "))
        traceback = str(event.get("traceback") or "").strip().splitlines()
        lines += [f"            | {text}" for text in traceback[-LAST:]]
    return lines


def _fit_text(paths: RunPaths, stage: str, events: list[dict[str, Any]]) -> str:
    from train.state import stage_paths

    logs = stage_paths(stage, paths).logs
    lines = [f"{stage}: {len(events)} events of its ranks" if events else f"{stage}: nothing happened to its ranks"]
    for event in events:
        lines += _events([event])
        for rank, where in enumerate(event.get("ranks") or ()):
            lines.append(
                f"            rank {rank}: process {where['pid']} on {where['address']}; what it printed: "
                f"ray logs actor --pid {where['pid']} --ip {where['address']}"
            )
    there = [n for n in storage.list_names(logs) if n.endswith((".jsonl", ".txt", ".log"))]
    lines += [f"  file      {storage.join(logs, name)}" for name in there]
    return "\n".join(lines)


def _when(at: Any) -> str:
    if not isinstance(at, (int, float)):
        return ""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
