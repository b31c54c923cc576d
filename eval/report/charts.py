"""Line charts of the report, drawn by matplotlib as SVG in two palettes, one for light pages and one for dark ones.

Text stays text, in the reader's own system font, so a chart is small and sharp at any size.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.metrics.estimate import undominated

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
PALETTES = {
    "light": {"ink": "#57534e", "grid": "#e4e1dc", "line": "#1f5f66", "faint": "#9cc0c3"},
    "dark": {"ink": "#b3aea7", "grid": "#3a3835", "line": "#7fc4c9", "faint": "#3d6468"},
}
SMOOTH_FROM = 60  # points; fewer are shown as they are


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: x in images seen, y, 95 % intervals (low, high) where there are any; a noisy one is smoothed."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[tuple[float, float]] | None = None
    log_scale: bool = False
    noisy: bool = True
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as data: URIs for both palettes, and what it shows in words for those who do not see it."""

    title: str
    note: str
    light: str
    dark: str
    words: str


def draw(line: Line) -> Chart:
    """Draw one curve in both palettes."""
    finite = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    words = f"{line.title}: no values"
    if finite:
        low, high = min(y for _, y in finite), max(y for _, y in finite)
        words = (
            f"{line.title} over {count(finite[-1][0])} images: from {finite[0][1]:.3g} to {finite[-1][1]:.3g}, "
            f"between {low:.3g} and {high:.3g}"
        )
    return _chart(line.title, line.note, words, lambda axes, colour: _curve(axes, colour, line))


def count(value: float, _position: object = None) -> str:
    """1234567 -> 1.2M, as axis labels and headings have it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def smoothed(y: Sequence[float]) -> list[float]:
    """Gaussian moving average over about a fortieth of the curve to either side; centred, so that it does not lag."""
    width = max(1.0, len(y) / 40)
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    values = np.asarray(y, np.float64)
    weight = np.convolve(np.ones(len(values)), kernel, "same")
    return [float(v) for v in np.convolve(values, kernel, "same") / weight]


def _curve(axes: Any, colour: Mapping[str, str], line: Line) -> None:
    from matplotlib import ticker

    many = len(line.y) >= SMOOTH_FROM and line.error is None and line.noisy
    axes.plot(line.x, line.y, color=colour["faint" if many else "line"], linewidth=0.9 if many else 1.7)
    if many:
        axes.plot(line.x, smoothed(line.y), color=colour["line"], linewidth=1.7)
    if line.error is not None:
        below = [max(0.0, y - low) for y, (low, _) in zip(line.y, line.error, strict=True)]
        above = [max(0.0, high - y) for y, (_, high) in zip(line.y, line.error, strict=True)]
        axes.errorbar(
            line.x,
            line.y,
            yerr=[below, above],
            fmt="o",
            color=colour["line"],
            markersize=4,
            capsize=3,
            elinewidth=1.1,
        )
    if line.log_scale and min(line.y, default=0) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(count))
    axes.margins(x=0.01 if line.error is None else 0.06)
    axes.set_xlabel("images seen", color=colour["ink"])
    axes.set_ylabel(line.title.rpartition(": ")[2], color=colour["ink"])


def distribution(
    title: str, edges: Sequence[float], before: Sequence[float], after: Sequence[float] | None, ends: Sequence[float]
) -> Chart:
    """Shares of images by a score: of all (filled), of those that were trained on (a line), and the rules' ends."""
    words = f"{title}: most images lie at {_likeliest(edges, before):.3g}"
    if after is not None:
        words += f", most of those trained on at {_likeliest(edges, after):.3g}"
    note = "Filled: all images. Line: those that were trained on." if after is not None else "All images."
    note += " Dotted: where a rule cuts." if ends else ""

    def paint(axes: Any, colour: Mapping[str, str]) -> None:
        from matplotlib import ticker

        axes.stairs(before, edges, fill=True, color=colour["faint"])
        if after is not None:
            axes.stairs(after, edges, color=colour["line"], linewidth=1.7)
        for end in ends:
            if edges[0] <= end <= edges[-1]:
                axes.axvline(end, color=colour["ink"], linestyle=":", linewidth=1.2)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        axes.set_ylabel("share of images", color=colour["ink"])
        axes.margins(x=0.01)

    return _chart(title, note, words, paint)


def _likeliest(edges: Sequence[float], shares: Sequence[float]) -> float:
    top = int(np.argmax(shares))
    return (edges[top] + edges[top + 1]) / 2


def pareto(points: Sequence[dict[str, Any]], distance: str) -> Chart:
    """Cells of a grid: distance against CLIP score with 95 % intervals, area by seconds an image, the frontier of
    those two as a line, the knee ringed; cells on the frontier are named where there is room. points: as grid.record
    writes them."""
    knee = next((p["cell"] for p in points if p["knee"]), "")
    frontier = [p["cell"] for p in points if p["frontier"]]
    words = f"{len(points)} cells; on the frontier {', '.join(frontier)}" + (f"; the knee is {knee}" if knee else "")
    note = "Better is up and to the left. Larger dots take longer. Bars are 95 % intervals."

    def paint(axes: Any, colour: Mapping[str, str]) -> None:
        slowest = max((p["seconds"] for p in points), default=0) or 1
        for p in points:
            (x, *wide), (y, *high) = p["distance"], p["score"]
            shade = colour["line" if p["frontier"] else "faint"]
            axes.errorbar(
                [x],
                [y],
                xerr=[[max(0, x - wide[0])], [max(0, wide[1] - x)]],
                yerr=[[max(0, y - high[0])], [max(0, high[1] - y)]],
                color=shade,
                elinewidth=0.8,
                fmt="none",
            )
            axes.scatter([x], [y], s=14 + 90 * p["seconds"] / slowest, color=shade, zorder=3)
            if p["knee"]:
                axes.scatter([x], [y], s=220, facecolors="none", edgecolors=colour["ink"], linewidths=1.2, zorder=4)
        flat = undominated(points, lambda p: (p["distance"][0], -p["score"][0]))
        flat.sort(key=lambda p: float(p["distance"][0]))
        line = [(p["distance"][0], p["score"][0]) for p in flat]
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour["line"], linewidth=0.8, alpha=0.6)
        axes.set_xlabel(distance, color=colour["ink"])
        axes.set_ylabel("CLIP score", color=colour["ink"])
        axes.margins(0.12)
        others = [p for p in points if p["frontier"] and p not in flat]
        for p, left in _labelled([*(p for p in points if p["knee"]), *flat, *others], axes):
            axes.annotate(
                p["cell"],
                (p["distance"][0], p["score"][0]),
                xytext=(-7 if left else 7, -10),
                fontsize=7,
                textcoords="offset points",
                ha="right" if left else "left",
                color=colour["ink"],
            )

    return _chart("Distance against CLIP score", note, words, paint, (6.2, 3.6))


def _labelled(wanted: Sequence[dict[str, Any]], axes: Any) -> list[tuple[dict[str, Any], bool]]:
    """(cell, whether its name goes to the left) of those whose names find a free place, the first ones first."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float, float, float]] = []
    found = []
    for p in wanted:
        x, y = (p["distance"][0] - x0) / (x1 - x0), (p["score"][0] - y0) / (y1 - y0)
        wide, high = 0.0115 * len(p["cell"]) + 0.02, 0.05
        left = x + wide > 1
        box = (x - wide if left else x, y - 1.3 * high, x if left else x + wide, y - 0.3 * high)
        if all(box[0] >= b[2] or box[2] <= b[0] or box[1] >= b[3] or box[3] <= b[1] for b in taken):
            taken.append(box)
            found.append((p, left))
    return found


Paint = Callable[[Any, Mapping[str, str]], None]  # draws on axes in a palette's colours


def _chart(title: str, note: str, words: str, paint: Paint, size: tuple[float, float] = (4.3, 2.35)) -> Chart:
    light, dark = (_figure(paint, PALETTES[palette], size) for palette in ("light", "dark"))
    return Chart(title, note, light, dark, words)


def _figure(paint: Paint, colour: Mapping[str, str], size: tuple[float, float]) -> str:
    """An SVG as a data: URI: `paint` draws on the axes, the frame is the report's."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "carrara", "font.size": 8.5, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        paint(axes, colour)
        axes.grid(axis="y", color=colour["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(colour["grid"])
        axes.tick_params(colors=colour["ink"], length=0, pad=4, which="both")
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = sink.getvalue().decode().replace("'DejaVu Sans'", FONT)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
