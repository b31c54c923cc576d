"""All results of a run in one table, as parquet, CSV and JSON, rebuilt from the metrics.json files, which alone are the
state."""

from __future__ import annotations

import csv
import io
from typing import Any

import pyarrow as pa

from eval import measure
from shards import storage
from shards.layout import RunPaths

FILE = "history.parquet"
SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("images_seen", pa.int64()),
        ("cell", pa.string()),
        ("weights", pa.string()),
        ("protocol", pa.string()),
        ("metric", pa.string()),
        ("tag", pa.string()),
        ("n", pa.int64()),
        ("value", pa.float64()),
        ("se", pa.float64()),
        ("low", pa.float64()),  # the 95 % interval of value
        ("high", pa.float64()),
        ("bias_corrected", pa.float64()),
        ("corrected_low", pa.float64()),  # the 95 % interval of bias_corrected
        ("corrected_high", pa.float64()),
        ("missing_images", pa.int64()),
    ]
)
NUMBERS = ("n", "value", "se", "low", "high", "bias_corrected", "corrected_low", "corrected_high")


def read_all(run: RunPaths, model: str | None = None) -> list[dict[str, Any]]:
    """The content of every metrics.json of the run (or of one model), by model and folder, which is added as
    `folder`."""
    found = []
    # Features of real images lie beside the models, in folders without a metrics.json: a model may be called anything.
    names = [n for n in storage.list_names(run.eval) if not n.startswith(".")]
    for name in names if model is None else [model]:
        for folder in storage.list_names(storage.join(run.eval, name)):
            if folder.startswith("images-"):
                continue
            metrics = measure.read(storage.join(run.eval, name, folder, "metrics.json"))
            if metrics is not None:
                found.append({**metrics, "folder": folder})
    return found


def read_grid(run: RunPaths, model: str) -> dict[str, Any] | None:
    """What `carrara grid` wrote for a model; None where there is none, or a torn one."""
    try:
        found = storage.read_json(storage.join(run.eval, model, "grid.json"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("points") else None


def table(found: list[dict[str, Any]]) -> pa.Table:
    """One row a result and metric, whole and by tag, or count (of blank images, say: `count_blank`), in SCHEMA."""
    rows = []
    for r in found:
        shared = {
            "checkpoint": r["checkpoint"],
            "images_seen": r["images_seen"],
            "cell": r["cell"],
            "weights": r["model"]["weights"],
            "protocol": r["protocol"]["id"],
            "missing_images": r["missing"]["images"],
        }
        counts = {f"count_{name}": {"value": number} for name, number in sorted(r["counts"].items())}
        parts = [("", {**r["metrics"], **counts}), *r["by_tag"].items()]
        rows += [
            {**shared, "tag": tag, "metric": name, **{k: m.get(k) for k in NUMBERS}}
            for tag, metrics in parts
            for name, m in metrics.items()
        ]
    return pa.Table.from_pylist(rows, SCHEMA)


def write(run: RunPaths) -> list[dict[str, Any]]:
    """Rebuild <run>/reports/history.parquet; returns the results it was made from."""
    found = read_all(run)
    storage.write_atomic(storage.join(run.reports, FILE), storage.parquet_bytes(table(found)))
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
