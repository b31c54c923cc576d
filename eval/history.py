"""All results of a run in one table, as parquet, CSV and JSON, rebuilt from the metrics.json files, which alone are the
state."""

from __future__ import annotations

import csv
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval import results
from shards import storage
from shards.layout import RunPaths

FILE = "history.parquet"
SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("images_seen", pa.int64()),
        ("cell", pa.string()),
        ("protocol", pa.string()),
        ("metric", pa.string()),
        ("n", pa.int64()),
        ("value", pa.float64()),
        ("se", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("bias_corrected", pa.float64()),
        ("missing_pictures", pa.int64()),
    ]
)


def cells(run: RunPaths, checkpoint: str | None = None) -> list[dict[str, Any]]:
    """The content of every metrics.json of the run (or of one checkpoint), by checkpoint and cell name."""
    found = []
    names = [n for n in storage.list_names(run.eval) if n != "reference" and not n.startswith(".")]
    for name in names if checkpoint is None else [checkpoint]:
        for cell in storage.list_names(storage.join(run.eval, name)):
            metrics = results.read(storage.join(run.eval, name, cell, results.METRICS))
            if metrics is not None:
                found.append(metrics)
    return found


def table(found: list[dict[str, Any]]) -> pa.Table:
    """One row a checkpoint, cell and metric or count (of blank pictures, say: `count_blank`), in SCHEMA."""
    rows = []
    for r in found:
        counts = {f"count_{name}": {"value": number} for name, number in sorted(r["counts"].items())}
        for name, m in {**dict(sorted(r["metrics"].items())), **counts}.items():
            row = {
                "checkpoint": r["checkpoint"],
                "images_seen": r["images_seen"],
                "cell": r["cell"],
                "protocol": r["protocol"]["id"],
                "metric": name,
                "missing_pictures": r["missing"]["pictures"],
            }
            rows.append(row | {k: m.get(k) for k in ("n", "value", "se", "low", "high", "bias_corrected")})
    return pa.Table.from_pylist(rows, SCHEMA)


def write(run: RunPaths) -> list[dict[str, Any]]:
    """Rebuild <run>/reports/history.parquet; returns the results it was made from."""
    found = cells(run)
    sink = io.BytesIO()
    pq.write_table(table(found), sink, compression="zstd")
    storage.write_atomic(storage.join(run.reports, FILE), sink.getvalue())
    rows = table(found).to_pylist()
    storage.write_atomic(storage.join(run.reports, "history.csv"), as_csv(rows).encode())
    storage.write_json(storage.join(run.reports, "history.json"), rows)
    return found


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows in SCHEMA as CSV; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"'{v}" if isinstance(v, str) and v[:1] in "=+-@\t\r" else v for k, v in row.items()})
    return sink.getvalue()
