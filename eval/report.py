"""One self-contained HTML page a checkpoint, an index of them, and the history: pages that open from disk with no
network.

    render(RunPaths("runs/demo"), "step-00001000")  ->  "runs/demo/reports/step-00001000.html"

A page is a function of the run's files and the date. Captions are hostile text: jinja2 escapes everything, pictures are
decoded and encoded anew, and a content security policy forbids every request and every script but the one that moves
the slider, which is named by its hash.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import math
from pathlib import Path
from typing import Any

import jinja2

from eval import charts, compare, gather, grid, history
from shards import storage
from shards.layout import RunPaths
from shards.settings import StageError

TEMPLATES = Path(__file__).parent / "templates"
PROMPTS_SHOWN = 24
EXTREMES_SHOWN = 6
TWINS_SHOWN = 12
RECONSTRUCTIONS_SHOWN = 12
CELLS_SHOWN = 20  # of a grid; the rest folded away


@dataclasses.dataclass(frozen=True)
class Card:
    """A headline number: value and interval as text, a sentence for people, and the metric's own name."""

    label: str
    value: str
    interval: str
    words: str
    name: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """Shares of one attribute: generated, control and real, each (value, low, high) or None."""

    attribute: str
    generated: tuple[float, float, float] | None
    control: tuple[float, float, float] | None
    real: tuple[float, float, float] | None


def render(run: RunPaths, checkpoint: str, cell: str | None = None, now: datetime.datetime | None = None) -> str:
    """Write <run>/reports/<checkpoint>.html, history.parquet and index.html; returns the page's path.

    cell: which sampler's pictures are shown where there are several (by default the one with the most pictures).
    Raises StageError where the checkpoint was not evaluated.
    """
    results = history.cells(run, checkpoint)
    chosen = [r for r in results if cell is None or r["cell"] == cell]
    if not chosen:
        raise StageError(
            f"{run.eval}: there are no results of {checkpoint} {cell or ''}; run the eval stage".replace(" ;", ";")
        )
    metrics = max(chosen, key=lambda r: (r["counts"]["pictures"], r["cell"]))
    every = history.write(run)
    when = now or datetime.datetime.now(datetime.UTC)
    page = environment().get_template("report.html.j2").render(_context(run, metrics, results, every, when))
    url = storage.join(run.reports, f"{checkpoint}.html")
    storage.write_atomic(url, page.encode())
    index = environment().get_template("index.html.j2").render(_index(run, every, when))
    storage.write_atomic(storage.join(run.reports, "index.html"), index.encode())
    return url


def environment() -> jinja2.Environment:
    """The templates, with everything escaped and every name required."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": charts.count, "percent": percent, "number": lambda n: f"{n:,}"}
    return environment


def script(name: str) -> dict[str, str]:
    """`script`: a script of ours as text; `script_hash`: what the content security policy knows it by."""
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": text, "script_hash": f"sha256-{digest}"}


def _against(
    run: RunPaths, metrics: dict[str, Any], every: list[dict[str, Any]], pictures: gather.Pictures
) -> dict[str, Any]:
    """This checkpoint beside the one before it under the same protocol: differences, twins, changed settings."""
    earlier = [
        r
        for r in every
        if r["cell"] == metrics["cell"]
        and r["protocol"]["id"] == metrics["protocol"]["id"]
        and (r["images_seen"] or 0) < (metrics["images_seen"] or 0)
        and storage.exists(storage.join(run.eval, r["checkpoint"], r["cell"], "dataset.json"))
    ]
    if not earlier:
        return {}
    before = max(earlier, key=lambda r: r["images_seen"] or 0)
    # What is measured on real pictures alone says nothing of a checkpoint.
    shown = [d for d in compare.differences(before, metrics) if d.better and not d.metric.endswith("_real")]
    shown.sort(key=lambda d: (d.metric not in HEADLINE, d.metric))
    twins = gather.twins(gather.Pictures(run, before["checkpoint"], before["cell"]), pictures, TWINS_SHOWN)
    alarms = compare.alarms(every, metrics["checkpoint"], 3.0)
    return {
        "checkpoint": before["checkpoint"],
        "differences": [(d, *_difference(d)) for d in shown],
        "twins": twins,
        "changed": gather.settings_diff(run, before["checkpoint"], metrics["checkpoint"]),
        "alarms": [str(a) for a in alarms],
        **script("slider.js"),
    }


def _difference(d: compare.Difference) -> tuple[str, str]:
    sign = "+" if d.value > 0 else ""
    return sign + rounded(d.value, d.se), f"{rounded(d.low, d.se)} to {rounded(d.high, d.se)}"


def _context(
    run: RunPaths,
    metrics: dict[str, Any],
    cells: list[dict[str, Any]],
    every: list[dict[str, Any]],
    now: datetime.datetime,
) -> dict[str, Any]:
    pictures = gather.Pictures(run, metrics["checkpoint"], metrics["cell"])
    best, worst = pictures.by_score(EXTREMES_SHOWN)
    decoded = gather.reconstructions(run, metrics, RECONSTRUCTIONS_SHOWN)
    against = _against(run, metrics, every, pictures)
    tried = grid.read_record(run, metrics["checkpoint"])
    return {
        "against": against,
        "script": against.get("script", ""),
        "script_hash": against.get("script_hash", ""),
        "tried": tried,
        "few": [p for p in tried["points"] if p["frontier"]] if tried and len(tried["points"]) > CELLS_SHOWN else None,
        "pareto": charts.pareto(tried["points"], tried["distance"]) if tried else None,
        "neighbours": gather.neighbours(run, metrics, pictures),
        "run": _run_name(run),
        "m": metrics,
        "date": now.strftime("%-d %B %Y, %H:%M UTC"),
        "cards": cards(metrics),
        "samples": pictures.in_order(PROMPTS_SHOWN),
        "best": best,
        "worst": worst,
        "pixelated": pictures.resolution <= gather.SMALL,
        "bars": bars(metrics),
        "curves": gather.curves(run),
        "trend": _trend(every, metrics["cell"]),
        "decoded": decoded,
        "funnels": [
            (title, steps)
            for title, root in (("Training pictures", run.images), ("Held-out pictures", run.heldout))
            if (steps := gather.funnel(root))
        ],
        "protocol": protocol_rows(metrics["protocol"]),
        "provenance": gather.provenance(run, metrics["checkpoint"]),
        "numbers": [(n, e, *spread(e)) for n, e in sorted(metrics["metrics"].items())],
        "cells": [(r["cell"], r["protocol"]["id"], headline(r)) for r in cells] if len(cells) > 1 else [],
        "columns": [n for n in HEADLINE if any(n in r["metrics"] for r in cells)],
        "labels": LABELS,
    }


# ---- numbers as people read them -------------------------------------------------------------------


def percent(value: float) -> str:
    """0.8533 -> 85 %; nearer the ends with a decimal, so that 99.6 % does not read as 100 %."""
    if 0 < value < 0.01 or 0.99 < value < 1:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.0f} %"


def rounded(value: float, se: float | None) -> str:
    """A value to as many decimals as its standard error's second digit."""
    if not se or not math.isfinite(se):
        return f"{value:.4g}"
    text = f"{value:.{max(0, 1 - math.floor(math.log10(se)))}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def spread(estimate: dict[str, Any]) -> tuple[str, str]:
    """(value, 95 % interval) as text; the bias-corrected value where there is one."""
    se = estimate.get("se")
    value = rounded(estimate.get("bias_corrected", estimate["value"]), se)
    if "low" not in estimate:
        return value, ""
    return value, f"{rounded(estimate['low'], se)} to {rounded(estimate['high'], se)}"


def _share(estimate: dict[str, Any]) -> tuple[str, str]:
    return percent(estimate["value"]), f"{percent(estimate['low'])} to {percent(estimate['high'])}"


def cards(metrics: dict[str, Any]) -> list[Card]:
    """The headline numbers that this evaluation has, each with its interval and what it means."""
    m, counts = metrics["metrics"], metrics["counts"]
    found = []
    for attribute in ("colour", "shape"):
        if f"faithful_{attribute}" in m:
            words = f"of the pictures show the {attribute} that the prompt names"
            if f"control_{attribute}" in m:
                words += f"; judged by another prompt it is {percent(m[f'control_{attribute}']['value'])}"
            if f"real_{attribute}" in m:
                words += f", and {percent(m[f'real_{attribute}']['value'])} in real pictures"
            name = f"faithful_{attribute}"
            found.append(Card(f"{attribute.capitalize()} as prompted", *_share(m[name]), words + ".", name))
    for name in ("fid_clean", "fid_tf", "fd_dinov2_pil"):
        if name in m:
            words = f"{m[name]['definition'].split(';')[0]}; lower is better."
            if "not the published ones" in m[name]["definition"]:
                words += " These weights are not the published ones: no published number compares."
            found.append(Card(LABELS[name], *spread(m[name]), words, name))
    if "fd_clip_unit" in m:
        words = "Fr\u00e9chet distance on CLIP features between the two sets of pictures; 0 is the same."
        if "fd_clip_unit_real" in m:
            floor = m["fd_clip_unit_real"]
            apart = rounded(max(0, floor["bias_corrected"]), floor.get("se"))
            words += f" Two halves of the real pictures are {apart} apart."
        found.append(Card("Distance from real pictures", *spread(m["fd_clip_unit"]), words, "fd_clip_unit"))
    if "clip_score" in m:
        words = "How well pictures and prompts agree in the CLIP's eyes, up to 100."
        if "clip_score_real" in m:
            words += f" Real pictures reach {m['clip_score_real']['value']:.1f}"
            words += (
                f", mismatched prompts {m['clip_score_control']['value']:.1f}." if "clip_score_control" in m else "."
            )
        found.append(Card("CLIP score", *spread(m["clip_score"]), words, "clip_score"))
    if "retrieval" in m:
        among = counts["retrieval_candidates"]
        words = f"of the pictures fit their own prompt best among {among}; luck gives {percent(1 / among)}."
        found.append(Card("Prompt found from picture", *_share(m["retrieval"]), words, "retrieval"))
    if "vae_psnr" in m:
        words = "What the VAE keeps of held-out pictures; the generated ones cannot be sharper than this."
        value, interval = spread(m["vae_psnr"])
        found.append(Card("VAE reconstruction", f"{value} dB", f"{interval} dB" if interval else "", words, "vae_psnr"))
    if "clip_retrieval_real" in m:
        among = counts["real_retrieval_candidates"]
        words = f"of held-out real pictures fit their own caption best among {among}: how far to trust the CLIP itself."
        found.append(Card("Real caption found", *_share(m["clip_retrieval_real"]), words, "clip_retrieval_real"))
    return found


def bars(metrics: dict[str, Any]) -> list[Bar]:
    """Faithfulness by attribute, in the judge's order with `all` last; empty without a judge."""
    m = metrics["metrics"]
    names = [n.removeprefix("faithful_") for n in m if n.startswith("faithful_")]
    order = ("colour", "shape", "size", "place", "ground", "count")
    names.sort(key=lambda n: (n == "all", order.index(n) if n in order else len(order), n))

    def triple(name: str) -> tuple[float, float, float] | None:
        return (m[name]["value"], m[name]["low"], m[name]["high"]) if name in m else None

    return [
        Bar("all at once" if n == "all" else n, triple(f"faithful_{n}"), triple(f"control_{n}"), triple(f"real_{n}"))
        for n in names
    ]


PROTOCOL_LABELS = {  # in the order to show
    "id": "protocol",
    "sampler": "sampler",
    "steps": "steps",
    "guidance_scale": "guidance",
    "timestep_spacing": "timestep spacing",
    "resolution": "resolution, px",
    "dtype": "precision",
    "prompt_count": "prompts",
    "replicates": "pictures a prompt",
    "seed_rule": "noise",
    "resize": "resize of real pictures",
    "prompts": "prompts, digest",
    "reference": "held-out set, digest",
    "features": "feature network, digest",
    "vae": "VAE, digest",
    "text": "text encoder, digest",
    "inception": "Inception, digest",
    "dinov2": "DINOv2, digest",
    "distance_reference": "pictures of FID's real side, digest",
    "unet": "UNet, digest",
    "weights": "weights",
}


def protocol_rows(protocol: dict[str, Any]) -> dict[str, str]:
    """The protocol with readable names; a digest by its first twelve digits."""
    digests = (
        "prompts", "reference", "vae", "text", "features", "unet", "inception", "dinov2", "distance_reference",
    )  # fmt: skip
    rows = {}
    for name in [*PROTOCOL_LABELS, *(n for n in protocol if n not in PROTOCOL_LABELS)]:
        text = str(protocol.get(name, ""))
        empty = "as exported" if name == "timestep_spacing" else "none"
        rows[PROTOCOL_LABELS.get(name, name)] = (text[:12] if name in digests else text) or empty
    return rows


# ---- history ---------------------------------------------------------------------------------------

HEADLINE = (
    *compare.WATCHED, "retrieval", "faithful_colour", "faithful_shape", "faithful_all", "vae_psnr",
)  # fmt: skip

LABELS = {
    "fid_clean": "FID, as clean-fid",
    "fid_tf": "FID, as torch-fidelity",
    "fd_dinov2_pil": "Fr\u00e9chet distance on DINOv2",
    "fd_clip_unit": "Fr\u00e9chet distance on CLIP features",
    "clip_score": "CLIP score",
    "retrieval": "Prompt found from picture",
    "faithful_colour": "Colour as prompted",
    "faithful_shape": "Shape as prompted",
    "faithful_all": "All as prompted",
    "vae_psnr": "VAE PSNR, dB",
}


def headline(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The headline metrics of a result, value and 95 % interval as short texts; empty where it was not measured."""
    texts = {}
    for name in HEADLINE:
        estimate = result["metrics"].get(name)
        if estimate is None:
            texts[name] = ("", "")
        elif name.startswith(("faithful", "retrieval")) and "low" in estimate:
            texts[name] = _share(estimate)
        else:
            texts[name] = spread(estimate)
    return texts


def _trend(every: list[dict[str, Any]], cell: str) -> list[charts.Chart]:
    """Headline metrics over checkpoints of one cell, for those measured by the newest protocol alike; none for one
    point."""
    same = [r for r in every if r["cell"] == cell and r["images_seen"] is not None]
    if not same:
        return []
    same.sort(key=lambda r: r["images_seen"])
    same = [r for r in same if r["protocol"]["id"] == same[-1]["protocol"]["id"]]
    drawn = []
    for name in (*compare.WATCHED, "faithful_colour", "faithful_shape"):
        points = [(r["images_seen"], e) for r in same if (e := r["metrics"].get(name)) and "low" in e]
        if len(points) >= 2:
            y = [e.get("bias_corrected", e["value"]) for _, e in points]
            intervals = [(e["low"], e["high"]) for _, e in points]
            line = charts.Line(LABELS[name], [x for x, _ in points], y, intervals, note="95 % intervals")
            drawn.append(charts.draw(line))
    return drawn


def _index(run: RunPaths, every: list[dict[str, Any]], now: datetime.datetime) -> dict[str, Any]:
    rows = sorted(every, key=lambda r: (-(r["images_seen"] or 0), r["checkpoint"], r["cell"]))
    pages = set(storage.list_names(run.reports))
    columns = [n for n in HEADLINE if any(n in r["metrics"] for r in every)]
    return {
        "run": _run_name(run),
        "date": now.strftime("%-d %B %Y, %H:%M UTC"),
        "columns": columns,
        "labels": LABELS,
        "rows": [(r, headline(r), f"{r['checkpoint']}.html" in pages) for r in rows],
        "trends": [(cell, t) for cell in sorted({r["cell"] for r in every}) if (t := _trend(every, cell))],
        "protocols": len({r["protocol"]["id"] for r in every}),
    }


def _run_name(run: RunPaths) -> str:
    return gather.plain(run.run.rstrip("/").rsplit("/", 1)[-1], 80)
