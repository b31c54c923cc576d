"""Histograms of the scores that a training's images have: of all that were scored, and of those that it was given.

Of all images the manifest of a score knows the histogram. Which of them a training is given is decided by the latents
that there are and by the rules that its checkpoint records; those are counted shard by shard, of a large run in shards
spread evenly over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shards import storage
from shards.columns import column_rows
from shards.dataset import Dataset
from shards.layout import RunPaths, shard_name
from shards.selection import Rule, Selection
from shards.settings import ConfigError, StageError
from shards.sketch import edges, quantile

BINS = 30
SHARDS = 64  # of which the images that were trained on are counted
MOST = 12  # charts


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Shares of images by a column's value. edges: [BINS+1]; scored, given: [BINS], each sums to 1 (given: None where
    there are no latents); images: how many `given` was counted of; ends: of the rules on the column."""

    column: str
    edges: np.ndarray
    scored: np.ndarray
    given: np.ndarray | None
    images: int
    ends: tuple[float, ...]


def histograms(run: RunPaths, checkpoint: str) -> list[Histogram]:
    """One a column of numbers, those that a rule is on first; none where nothing was scored."""
    opened: dict[str, Dataset] = {}
    for name in sorted(storage.list_names(storage.join(run.run, "scores"))):
        try:
            opened[name] = Dataset.open(storage.join(run.run, "scores", name))
        except (StageError, ConfigError):
            continue  # which is not finished
    latents = _latents(run)
    rules = _rules(run, checkpoint)
    encoded = latents.manifest.get("settings", {}).get("select", ()) if latents else ()
    ends = _ends([*rules, *encoded])
    columns = [
        f"{name}.{column}"
        for name, dataset in opened.items()
        for column, settings in dataset.manifest.get("columns", {}).items()
        if settings.get("sketch")
    ]
    columns = sorted(columns, key=lambda c: c not in ends)[:MOST]
    sketches = {c: opened[c.partition(".")[0]].manifest["columns"][c.partition(".")[2]]["sketch"] for c in columns}
    cuts = {c: _cuts(sketches[c]) for c in columns}
    given = _given(run, latents, rules, cuts) if latents else {}
    return [_histogram(c, sketches[c], cuts[c], given.get(c), ends.get(c, set())) for c in columns]


def _histogram(
    column: str, sketch: Mapping[str, int], cuts: np.ndarray, given: np.ndarray | None, ends: set[float]
) -> Histogram:
    low, high, counts = edges(sketch)
    middle = np.clip((low.astype(np.float64) + high) / 2, cuts[0], cuts[-1])
    scored = np.histogram(middle, cuts, weights=counts)[0]
    images = 0 if given is None else int(given.sum())
    share = given / images if given is not None and images else None
    return Histogram(column, cuts, scored / scored.sum(), share, images, tuple(sorted(ends)))


def _latents(run: RunPaths) -> Dataset | None:
    try:
        return Dataset.open(run.latents)
    except (StageError, ConfigError):
        return None


def _rules(run: RunPaths, checkpoint: str) -> list[Mapping[str, Any]]:
    """The rules, with their thresholds, that a checkpoint of this run records of its own latents."""
    manifest = storage.read_json(storage.join(run.checkpoints, checkpoint, "manifest.json"))
    order = manifest.get("order") if isinstance(manifest, dict) else None
    segments = order.get("segments") if isinstance(order, dict) else None
    select: list[Any] = list(segments[-1].get("select", [])) if segments else []
    return list(select[0]) if len(select) == 1 else []  # of several sources each has its own


def _ends(rules: Sequence[Mapping[str, Any]]) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for rule in rules:
        known = found.setdefault(rule["column"], set())
        known.update(float(rule[end]) for end in ("low", "high") if rule.get(end) is not None)
    return found


def _cuts(sketch: Mapping[str, int]) -> np.ndarray:
    """Edges of bins from the 0.1 % to the 99.9 % quantile; what lies outside counts to the outer ones."""
    first, last = quantile(sketch, 0.001), quantile(sketch, 0.999)
    return np.linspace(first, max(last, first + 1e-6 * max(1.0, abs(first))), BINS + 1)


def _given(
    run: RunPaths, latents: Dataset, rules: Sequence[Mapping[str, Any]], cuts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """By column the counts of the images that training is given, in some shards."""
    plain = [Rule(**{k: v for k, v in r.items() if k not in ("low", "high")}) for r in rules]
    try:
        selection = Selection(run.run, plain, rules)
    except ConfigError:
        return {}
    found = {c: np.zeros(BINS, np.int64) for c in cuts}
    chosen = np.unique(np.linspace(0, len(latents.shards) - 1, min(SHARDS, len(latents.shards))).round().astype(int))
    for info in (latents.shards[i] for i in chosen):
        table = latents.sidecar(info.index)
        stored_rows = column_rows(table)
        usable = np.array([s == "success" for s in table["status"].to_pylist()], bool) & (stored_rows >= 0)
        usable[latents.excluded_rows(info.index)] = False
        rows = np.flatnonzero(usable)
        try:
            rows = rows[selection.passes(info.index, rows)]
            for name in dict.fromkeys(c.partition(".")[0] for c in cuts):
                own = [c for c in cuts if c.partition(".")[0] == name]
                url = storage.join(run.run, "scores", name, shard_name(info.index) + ".parquet")
                values = storage.read_parquet(url, [c.partition(".")[2] for c in own])
                for c in own:
                    column = values[c.partition(".")[2]].fill_null(np.nan).to_numpy()[rows].astype(np.float64)
                    inside = np.clip(column[np.isfinite(column)], cuts[c][0], cuts[c][-1])
                    found[c] += np.histogram(inside, cuts[c])[0]
        except (FileNotFoundError, StageError):
            continue  # a shard that this score has not reached
    return found
