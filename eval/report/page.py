"""One self-contained HTML page a checkpoint, an index of them, and the history: pages that open from disk with no
network.

    render(RunPaths("runs/demo"), "step-00001000")  ->  "runs/demo/reports/step-00001000.html"

A page is a function of the run's files and the date. Captions are hostile text: jinja2 escapes everything, images are
decoded and encoded anew, and a content security policy forbids every request and every script but the one that moves
the slider, which is named by its hash.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from eval import compare
from eval.config import WatchConfig
from eval.metrics.definitions import DEFINITIONS, DISTANCES
from eval.report import charts, gather, history, verdict
from shards import storage
from shards.layout import RunPaths
from shards.settings import StageError

TEMPLATES = Path(__file__).parent / "templates"
SHEET = 24  # images of the contact sheet, six by four
EXTREMES = 6
PAIRS = 12
RECONSTRUCTIONS = 12
CELLS = 20  # of a grid; the rest folded away
TAGS, PER_TAG = 8, 6
TAG_COLUMNS = 8
THUMBNAILS = 4  # of a row of the index
HEADLINE = (  # the numbers that stand first, where measured
    *compare.WATCHED,
    "cmmd",
    "kid_tf",
    "kd_dinov2_pil",
    "soft_tifa_am",
    "pickscore",
    "hps",
    "aesthetic",
    "retrieval",
    "diversity_clip",
    "near_training",
)
AROUND = ("vae_psnr", "clip_score_real", "clip_retrieval_real")  # of real images alone: the tools' own quality


def url_of(run: RunPaths, model: str) -> str:
    """Where the page of a model's results lies."""
    return storage.join(run.reports, f"{model}.html")


def render(
    run: RunPaths,
    model: str,
    folder: str | None = None,
    watch: WatchConfig | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """Write <run>/reports/<model>.html, history.parquet and index.html; returns the page's path.

    folder: which result is shown where there are several; by default a grid's knee, else its best cell, else the one
    with the most images. Raises StageError where the model was not evaluated.
    """
    every = history.write(run)
    mine = [r for r in every if r["checkpoint"] == model]
    chosen = [r for r in mine if folder is None or r["folder"] == folder]
    if not chosen:
        raise StageError(
            f"{run.eval}: there are no results of {model} {folder or ''}".rstrip() + "; run the eval stage"
        )
    result = _shown(chosen, history.read_grid(run, model) if folder is None else None)
    when = (now or datetime.datetime.now(datetime.UTC)).strftime("%-d %B %Y, %H:%M UTC")
    page = environment().get_template("report.html.j2").render(_context(run, result, mine, every, watch, when))
    storage.write_atomic(url_of(run, model), page.encode())
    index = environment().get_template("index.html.j2").render(_index(run, every, watch, when))
    storage.write_atomic(storage.join(run.reports, "index.html"), index.encode())
    return url_of(run, model)


def _whole(against: verdict.Against | None) -> list[compare.Difference]:
    """The differences that are of no tag."""
    return [d for d in against.differences if not d.tag] if against else []


def _shown(results: Sequence[dict[str, Any]], grid: dict[str, Any] | None) -> dict[str, Any]:
    if grid is not None:
        order = sorted(grid["points"], key=lambda p: (not p["knee"], not p["frontier"], p["distance"][0]))
        for point in order:
            found = next((r for r in results if r["folder"] == point.get("folder")), None)
            if found is not None:
                return found
    return max(results, key=lambda r: (r["counts"]["images"], r["folder"]))


def environment() -> jinja2.Environment:
    """The templates, with everything escaped and every name required."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": charts.count, "percent": percent, "number": lambda n: f"{n:,}"}
    environment.filters["short"] = lambda value: rounded(value, None)
    return environment


def script(name: str, folder: Path = TEMPLATES) -> dict[str, str]:
    """`script`: a script of ours as text; `script_hash`: what the content security policy knows it by."""
    text = (folder / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": text, "script_hash": f"sha256-{digest}"}


def _context(
    run: RunPaths,
    result: dict[str, Any],
    mine: list[dict[str, Any]],
    every: list[dict[str, Any]],
    watch: WatchConfig | None,
    when: str,
) -> dict[str, Any]:
    images = gather.Images(run, result)
    found = verdict.of(result, every, watch)
    before = found.before
    pairs = []
    if before is not None and storage.exists(
        storage.join(run.eval, before.other["checkpoint"], before.other["images"])
    ):
        pairs = gather.pairs(gather.Images(run, before.other), images, PAIRS)
    best, worst = images.by_score(EXTREMES)
    sheet, tried = images.in_order(SHEET), history.read_grid(run, result["checkpoint"])
    distance = _label(result, tried["distance"]) if tried else ""
    return {
        "run": _run_name(run),
        "m": result,
        "date": when,
        "verdict": found,
        "alarms": found.alarms,
        "arrows": _arrows(before),
        "sheet": sheet,
        "dotted": any(v in (0, 1) for s in sheet for v in s.scores.values()),
        "best": best,
        "worst": worst,
        "tagged": images.by_tag(result["tags"], TAGS, PER_TAG),
        "pixelated": images.resolution <= gather.SMALL,
        "numbers": [number(result, n, before) for n in _headline(result)],
        "around": [number(result, n, None) for n in AROUND if n in result["metrics"]],
        "tags": tag_table(result),
        "every_number": [(n, e, *spread(e)) for n, e in sorted(result["metrics"].items())],
        "pairs": pairs,
        "against": [(_arrow(d), d, *_difference(d)) for d in sorted(before.differences if before else [], key=_place)],
        "changed": gather.settings_diff(run, before.other["checkpoint"], result["checkpoint"]) if before else None,
        **({"script": "", "script_hash": ""} if not pairs else script("slider.js")),
        "neighbours": gather.neighbours(run, result, images),
        "tried": tried,
        "few": [p for p in tried["points"] if p["frontier"]] if tried and len(tried["points"]) > CELLS else None,
        "distance": distance,
        "pareto": charts.pareto(tried["points"], distance) if tried else None,
        "others": [(r, [text(r, n) for n in _headline(result)[:4]]) for r in mine] if len(mine) > 1 else [],
        "other_columns": [_label(result, n) for n in _headline(result)[:4]],
        "trend": trend(every, result),
        "curves": gather.curves(run),
        "decoded": gather.reconstructions(run, result, RECONSTRUCTIONS),
        "funnels": [
            (title, steps)
            for title, root in (("Training images", run.images), ("Held-out images", run.heldout))
            if (steps := gather.funnel(root))
        ],
        "scores": gather.score_charts(run, result["checkpoint"]),
        "protocol": gather.flat(result["protocol"]),
        "provenance": gather.provenance(run, result),
    }


# ---- numbers as people read them -------------------------------------------------------------------


def percent(value: float) -> str:
    """0.8533 -> 85 %; nearer the ends with a decimal, so that 99.6 % does not read as 100 %."""
    if 0 < value < 0.0005 or 0.9995 <= value < 1:
        return "< 0.1 %" if value < 0.5 else "> 99.9 %"
    if 0 < value < 0.01 or 0.99 < value < 1:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.0f} %"


def rounded(value: float, se: float | None) -> str:
    """A value to as many decimals as its standard error's second digit."""
    if not se or not math.isfinite(se):
        return f"{value:z.4g}".replace("-", "\N{MINUS SIGN}")
    return f"{value:z.{max(0, 1 - math.floor(math.log10(se)))}f}".replace("-", "\N{MINUS SIGN}")


def spread(estimate: dict[str, Any]) -> tuple[str, str]:
    """(value as published, its 95 % interval) as text; shares in per cent."""
    if estimate.get("unit") == "share" and "low" in estimate:
        return percent(estimate["value"]), f"{percent(estimate['low'])} to {percent(estimate['high'])}"
    se = estimate.get("se")
    value = rounded(estimate["value"], se)
    if "low" not in estimate:
        return value, ""
    return value, f"{rounded(estimate['low'], se)} to {rounded(estimate['high'], se)}"


def text(result: dict[str, Any], name: str) -> tuple[str, str]:
    """`spread` of a metric of a result; empty where it was not measured."""
    estimate = result["metrics"].get(name)
    return ("", "") if estimate is None else spread(estimate)


def headline(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The numbers that stand first, by their names for people: value and 95 % interval as short texts."""
    return {_label(result, n): text(result, n) for n in _headline(result)}


def _headline(result: dict[str, Any]) -> list[str]:
    """Names of the numbers that stand first: the known ones in their order, then scores of one's own."""
    metrics = result["metrics"]
    known = [n for n in HEADLINE if n in metrics]
    own = [n for n, e in metrics.items() if e["definition"] and n not in DEFINITIONS]
    # A Frechet distance of few images is mostly bias, and is no headline beside one that is not.
    cautious = [n for n in known if "caution" in metrics[n]]
    return [*(n for n in known if n not in cautious), *own, *cautious]


def number(result: dict[str, Any], name: str, before: verdict.Against | None) -> dict[str, Any]:
    """A number with its interval, how it moved, and a scale that a person knows."""
    estimate = result["metrics"][name]
    value, interval = spread(estimate)
    d = next((d for d in (before.differences if before else []) if d.metric == name and not d.tag), None)
    corrected = ""
    if "bias_corrected" in estimate:
        se = estimate.get("se")
        low, high = rounded(estimate["corrected_low"], se), rounded(estimate["corrected_high"], se)
        corrected = f"{rounded(estimate['bias_corrected'], se)} without the bias of few images ({low} to {high})"
    return {
        "name": name,
        "label": estimate["label"],
        "value": value,
        "interval": interval,
        "arrow": None if d is None else _arrow(d),
        "scale": _scale(result, name),
        "corrected": corrected,
        "caution": estimate.get("caution", ""),
        "better": estimate["better"],
        "definition": estimate["definition"],
    }


def _scale(result: dict[str, Any], name: str) -> str:
    """What the number would be for something known."""
    m, counts = result["metrics"], result["counts"]
    if name in result["real"]:
        real = result["real"][name]
        return f"real images reach {percent(real) if m[name].get('unit') == 'share' else f'{real:.3g}'}"
    if name in result["floors"]:
        return f"0 is the same; a model without any fault would come to about {result['floors'][name]:.2g}"
    if name == "clip_score" and "clip_score_real" in m:
        scale = f"real images reach {m['clip_score_real']['value']:.1f}"
        return scale + (f", other prompts {m['clip_score_control']['value']:.1f}" if "clip_score_control" in m else "")
    if name == "retrieval":
        among = counts["retrieval_candidates"]
        real = m.get("clip_retrieval_real")
        scale = f"among {among}; chance gives {percent(1 / among)}"
        return scale + (f", real images reach {percent(real['value'])}" if real else "")
    if name == "vae_psnr":
        return "what the VAE keeps of real images; generated ones cannot be sharper"
    if name == "near_training":
        return "real images that were never trained on: 1 %"
    if name in DISTANCES or name.startswith(("kid", "kd_", "cmmd")):
        return "0 is the same as the real images"
    return {"higher": "higher is better", "lower": "lower is better"}.get(m[name]["better"], "")


def _arrows(before: verdict.Against | None) -> list[dict[str, str]]:
    """How what a verdict looks at has moved; of scores of one's own those that a difference is shown in."""
    arrows = [(d.metric, _arrow(d)) for d in _whole(before) if compare.is_watched(d.metric)]
    return [a for name, a in arrows if name in compare.WATCHED or a["way"] != "same"]


def _place(d: compare.Difference) -> tuple[bool, bool]:
    """Where a difference stands among all: those of no tag first, and of either kind those that are shown."""
    return bool(d.tag), d.verdict == "no difference shown"


def _arrow(d: compare.Difference) -> dict[str, str]:
    sign, way = verdict.arrow(d)
    change, interval = _difference(d)
    label = d.label or d.metric
    return {"sign": sign, "way": way, "change": change, "interval": interval, "label": label, "metric": d.metric}


def _difference(d: compare.Difference) -> tuple[str, str]:
    """A difference and its interval as text; of shares, which are shown in per cent, in points."""
    scale, unit = (100, " points") if d.share else (1, "")
    value, low, high = (rounded(scale * x, scale * d.se) for x in (d.value, d.low, d.high))
    return ("+" if d.value > 0 and value.strip("0.") else "") + value + unit, f"{low} to {high}"


def tag_table(result: dict[str, Any]) -> dict[str, Any]:
    """Columns and rows of the numbers by tag, the worst first in the first column; empty without tags.

    Scores of one's own come first: they are what their tags are for.
    """
    tags = result["by_tag"]
    wanted = [n for n in [*_headline(result), "clip_score"] if n not in DISTANCES]
    wanted.sort(key=lambda n: n in DEFINITIONS)
    names = [n for n in dict.fromkeys(wanted) if any(n in m for m in tags.values())][:TAG_COLUMNS]
    if not names:
        return {"columns": [], "rows": []}
    first = names[0]
    sign = -1 if result["metrics"].get(first, {}).get("better") == "lower" else 1
    order = sorted(tags, key=lambda t: (first not in tags[t], sign * tags[t].get(first, {}).get("value", 0.0), t))
    rows = [
        (gather.plain(t, 60), [spread(tags[t][n]) if n in tags[t] else ("", "") for n in names], _n(tags[t]))
        for t in order
    ]
    return {"columns": [_label(result, n) for n in names], "rows": rows}


def _n(metrics: dict[str, Any]) -> int:
    return max((m["n"] for m in metrics.values()), default=0)


def _label(result: dict[str, Any], name: str) -> str:
    everywhere = [result["metrics"], *result["by_tag"].values()]
    estimate: dict[str, Any] = next((m[name] for m in everywhere if name in m), {})
    return str(estimate.get("label", name))


# ---- history ---------------------------------------------------------------------------------------


def trend(every: list[dict[str, Any]], result: dict[str, Any]) -> list[charts.Chart]:
    """The first numbers over checkpoints of this result's protocol; none for one point."""
    same = sorted((r for r in every if compare.alike(r, result) and r["images_seen"] is not None), key=compare.seen)
    figures = []
    for name in _headline(result)[:8]:
        points = [(r["images_seen"], e) for r in same if (e := r["metrics"].get(name)) and "low" in e]
        if len(points) >= 2:
            intervals = [(e["low"], e["high"]) for _, e in points]
            better = {"higher": "higher is better", "lower": "lower is better"}.get(points[-1][1]["better"], "")
            note = f"95 % intervals; {better}" if better else "95 % intervals"
            x, y = [x for x, _ in points], [e["value"] for _, e in points]
            figures.append(charts.draw(charts.Line(_label(result, name), x, y, intervals, note=note)))
    return figures


def _index(run: RunPaths, every: list[dict[str, Any]], watch: WatchConfig | None, when: str) -> dict[str, Any]:
    order = sorted(every, key=lambda r: (-compare.seen(r), r["checkpoint"], r["cell"], r["folder"]))
    pages = set(storage.list_names(run.reports))
    columns = list(dict.fromkeys(n for r in order for n in _headline(r)[:6]))[:6]
    labels = {n: next(_label(r, n) for r in order if n in r["metrics"]) for n in columns}
    rows = []
    for r in order:
        found = verdict.of(r, every, watch)
        rows.append(
            {
                "r": r,
                "texts": [text(r, n) for n in columns],
                "arrows": [next((_arrow(d) for d in _whole(found.before) if d.metric == n), None) for n in columns],
                "alarms": found.alarms,
                "way": found.before.way if found.before else "",
                "page": f"{r['checkpoint']}.html" in pages,
                "thumbnails": gather.thumbnails(run, r, THUMBNAILS),
            }
        )
    kinds = {(r["cell"], r["protocol"]["id"], r["model"]["weights"]): r for r in reversed(order)}
    return {
        "run": _run_name(run),
        "date": when,
        "columns": columns,
        "labels": labels,
        "rows": rows,
        "trends": [(r["label"], t) for r in kinds.values() if (t := trend(every, r))],
        "kinds": len(kinds),
        "protocols": len({r["protocol"]["id"] for r in every}),
    }


def _run_name(run: RunPaths) -> str:
    return gather.plain(run.run.rstrip("/").rsplit("/", 1)[-1], 80)
