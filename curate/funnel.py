"""What rules on scores would take out: the funnel, and a contact sheet of what each rule takes.

Rules are asked in their order, so an image is taken by the first that it does not pass.
"""

from __future__ import annotations

import base64
import dataclasses
import heapq
import io
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from shards import storage
from shards.dataset import Dataset
from shards.images import LOCATION, ImageShard, decode_rgb
from shards.progress import Progress
from shards.selection import Rule, Selection

SIDE = 160  # of a thumbnail, in pixels


@dataclasses.dataclass(frozen=True)
class Taken:
    """An image that a rule takes. value: of the rule's column; thumbnail: a JPEG, empty where it cannot be decoded."""

    key: str
    caption: str
    value: Any
    thumbnail: bytes


@dataclasses.dataclass(frozen=True)
class Step:
    """A rule: how many images came to it, how many it leaves, and some of those that it takes."""

    label: str
    before: int
    after: int
    taken: tuple[Taken, ...]


def funnel(images: str, run: str, rules: Sequence[Rule], shown: int, seed: int = 0) -> list[Step]:
    """Ask the rules of all images. shown: how many of what a rule takes are drawn, each with the same chance.

    Raises ConfigError or StageError where a score is not there.
    """
    dataset, selection = Dataset.open(images), Selection(run, rules)
    before, after = np.zeros(len(rules), np.int64), np.zeros(len(rules), np.int64)
    sampled: list[list[tuple[float, int, int, Any]]] = [[] for _ in rules]  # (-chance, shard position, sample, value)
    bar = Progress("select", len(dataset.shards), "shards")
    for position, info in enumerate(dataset.shards):
        rows = ImageShard(dataset, position, ("key", "status", *LOCATION)).rows
        left = np.ones(len(rows), bool)
        for n, (passes, values) in enumerate(selection.by_rule(info.index, rows)):
            before[n] += left.sum()
            chances = np.random.default_rng((seed, n, info.index)).random(len(rows))
            for sample in np.flatnonzero(left & ~passes).tolist():
                entry = (-float(chances[sample]), position, sample, values[int(rows[sample])].as_py())
                (heapq.heappush if len(sampled[n]) < shown else heapq.heappushpop)(sampled[n], entry)
            left &= passes
            after[n] += left.sum()
        bar.update(1)
    bar.close()
    steps = []
    for n, bound in enumerate(selection.bounds):
        taken = [_taken(dataset, p, s, value) for _, p, s, value in sorted(sampled[n], key=lambda e: e[1:3])]
        steps.append(Step(bound.rule.label, int(before[n]), int(after[n]), tuple(taken)))
    return steps


def _taken(dataset: Dataset, position: int, sample: int, value: Any) -> Taken:
    shard = ImageShard(dataset, position)
    try:
        image = Image.fromarray(decode_rgb(shard.image_bytes(sample)))
        image.thumbnail((SIDE, SIDE))
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=85)
        thumbnail = sink.getvalue()
    except ValueError:
        thumbnail = b""
    finally:
        shard.close()
    return Taken(shard.keys[sample], shard.captions[sample], value, thumbnail)


def text(steps: Sequence[Step]) -> str:
    """The funnel as aligned lines."""
    first = steps[0].before
    width = max(len(s.label) for s in steps)
    lines = [f"{'images':{width}}  {first:>14,}"]
    for s in steps:
        share = s.after / first if first else 0.0
        lines.append(f"{s.label:{width}}  {s.after:>14,}  {share:7.1%}  takes {s.before - s.after:,}")
    return "\n".join(lines)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 1200px }
td { padding: 2px 1em 2px 0 } .n { text-align: right }
.sheet { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0; width: 160px }
img { max-width: 160px; max-height: 160px; display: block } figcaption { font-size: 11px; overflow-wrap: anywhere }
</style></head><body><h1>{{ title }}</h1>
<table><tr><td>images</td><td class="n">{{ "{:,}".format(steps[0].before) }}</td></tr>
{% for s in steps %}<tr><td>{{ s.label }}</td><td class="n">{{ "{:,}".format(s.after) }}</td>
<td>takes {{ "{:,}".format(s.before - s.after) }}</td></tr>{% endfor %}</table>
{% for s in steps %}<h2>What {{ s.label }} takes</h2><div class="sheet">
{% for t in s.taken %}<figure>{% if t.thumbnail %}<img src="data:image/jpeg;base64,{{ encoded(t) }}" alt="">{% endif %}
<figcaption>{{ value(t) }}<br>{{ t.caption[:200] }}<br>{{ t.key }}</figcaption></figure>
{% else %}<p>nothing</p>{% endfor %}</div>{% endfor %}</body></html>
"""


def write(steps: Sequence[Step], reports: str, title: str, name: str) -> str:
    """Write the contact sheet; returns its path. Captions are text from outside and are escaped."""
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    page = template.render(
        title=title,
        steps=steps,
        encoded=lambda t: base64.b64encode(t.thumbnail).decode(),
        value=lambda t: f"{t.value:.4g}" if isinstance(t.value, float) else "no value" if t.value is None else t.value,
    )
    url = storage.join(reports, f"{name}.html")
    storage.write_atomic(url, page.encode("utf-8", "replace"))
    return url
