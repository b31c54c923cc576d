"""What an ingest would do, without fetching anything: the funnel of the filters, and the cost at full size.

What an image costs is taken from the shards that this run has made already, where there are some (a
pilot: the same configuration on a small table), otherwise measured here on a drawn image, with assumed
sizes and an assumed success rate; the text says which.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections import Counter

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from ingest import captions, tables
from ingest.formats import batches, row_count
from ingest.pixels import process
from ingest.pool import pixel_settings
from ingest.stage import IngestStage
from ingest.takedown import TakenDown
from ingest.worker import judge_rows
from shards.dataset import read_stats_of
from shards.listing import listed

# Where no pilot says better; none of these is a measurement. 160 KB: 640x480 photographs (COCO). 0.6: what crawls
# of 2025 report. 35 KB: such a photograph at 256 px as JPEG 95, other sizes by area. 1.2: fetching and packing on
# top of decoding and encoding.
ASSUMED_BODY, ASSUMED_SUCCESS, ASSUMED_STORED_256, ASSUMED_REST = 160_000, 0.6, 35_000, 1.2


@dataclasses.dataclass(frozen=True)
class Funnel:
    """rows: of the table. looked_at: of them, those that were judged. fails: (label, rows of those looked at)."""

    rows: int
    looked_at: int
    fails: tuple[tuple[str, int], ...]

    @property
    def to_fetch(self) -> int:
        """Rows that would be asked for, at full size."""
        return round(self.scale * (self.looked_at - sum(n for _, n in self.fails)))

    @property
    def scale(self) -> float:
        """Rows of the table for each that was looked at."""
        return self.rows / self.looked_at if self.looked_at else 0.0

    def text(self) -> str:
        """The funnel as a table."""
        left = self.looked_at
        lines = [f"{'rows in the table':48}{self.rows:>16,}   100.0 %"]
        if self.looked_at != self.rows:
            lines.append(f"{'  looked at, and scaled up below':48}{self.looked_at:>16,}")
        for label, n in self.fails:
            left -= n
            lines.append(f"- {_short(label):46}{round(self.scale * n):>16,}   {_percent(left, self.looked_at)} left")
        lines.append(f"{'= to be fetched':48}{self.to_fetch:>16,}   {_percent(left, self.looked_at)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ImageCost:
    """What one row to be fetched costs on average: success rate, bytes, CPU-seconds; and where it is known from."""

    success: float
    bytes_fetched: float
    bytes_stored: float
    cpu_seconds: float
    rows_per_second: float | None  # of one worker, with its waiting; None where nothing was fetched yet
    source: str

    def text(self, to_fetch: int, workers: int) -> str:
        """The cost of fetching so many rows with so many workers, a core each."""
        cpu_hours = to_fetch * self.cpu_seconds / 3600
        hours = cpu_hours / workers
        if self.rows_per_second:
            hours = max(hours, to_fetch / self.rows_per_second / workers / 3600)
        lines = [
            f"{'images':26}{to_fetch * self.success:>16,.0f}   {100 * self.success:.0f} % of the requests",
            f"{'download':26}{_size(to_fetch * self.bytes_fetched)}",
            f"{'storage':26}{_size(to_fetch * self.bytes_stored)}",
            f"{'CPU':26}{cpu_hours:>16,.2f} hours",
            f"{f'time with {workers} workers':26}{hours:>16,.2f} hours"
            + ("" if self.rows_per_second else ", if network and servers keep up"),
            f"per image: {self.source}",
        ]
        return "\n".join(lines)


def funnel(stage: IngestStage, limit: int | None = None, progress: bool = True) -> Funnel:
    """Judge the rows of a table as the ingest would. limit: look at about so many, from the start of each file."""
    config, layout = stage.config, stage.layout()
    rule, is_heldout = stage.heldout_rule(layout), stage.split == "heldout"
    taken_down = TakenDown.read(stage.run)
    labels = ["taken down", "no caption", *(f.label for f in config.filters)]
    fails: Counter[str] = Counter()
    looked_at = mine = total = 0
    share = None if limit is None else max(1, -(-limit // len(layout.files)))
    with tqdm(desc=f"{stage.name}: dry run", unit=" rows", unit_scale=True, disable=None if progress else True) as bar:
        for file in layout.files:
            seen, end = 0, 0
            for batch, ends in batches(file, layout.columns):
                if share is not None and seen + batch.num_rows > share:
                    batch = batch.slice(0, share - seen)
                seen += batch.num_rows
                end = int(ends[batch.num_rows - 1]) if batch.num_rows else end
                bar.update(batch.num_rows)
                if rule is not None:
                    batch = tables.take(batch, np.flatnonzero(rule(batch) == is_heldout))
                texts = batch.column("caption")
                if layout.caption_lists:
                    texts = pa.array([tables.first_caption(t) for t in texts.to_pylist()], pa.string())
                cleaned = captions.clean_all(texts, config.captions).to_pylist()
                verdicts = judge_rows(config, layout, batch, cleaned)
                urls = batch.column("url").to_pylist()
                for caption, url, verdict in zip(cleaned, urls, verdicts, strict=True):
                    if taken_down.has_url(url or ""):
                        fails["taken down"] += 1
                    elif not caption and config.empty_captions == "drop":
                        fails["no caption"] += 1
                    elif verdict is not None:
                        fails[verdict.label] += 1
                mine += batch.num_rows
                if share is not None and seen >= share:
                    break
            looked_at += seen
            total += seen if share is None else row_count(file, seen, end)
    rows = round(total * mine / looked_at) if looked_at else 0
    shown = tuple((label, fails[label]) for label in labels if label != "taken down" or fails[label])
    return Funnel(rows, mine, shown)


def image_cost(stage: IngestStage) -> ImageCost:
    """From this run's own shards, or measured and assumed."""
    names = ("rows", "filtered", "count", "bytes_fetched", "bytes_stored", "cpu_seconds", "duration")
    sums = dict.fromkeys(names, 0.0)
    for _, stats in read_stats_of(stage.root, listed(stage.root).committed.tolist()):
        if stats is not None and "cpu_seconds" in stats:
            for name in names:
                sums[name] += stats[name]
    asked = round(sums["rows"] - sums["filtered"])
    if asked:
        return ImageCost(
            sums["count"] / asked,
            sums["bytes_fetched"] / asked,
            sums["bytes_stored"] / asked,
            sums["cpu_seconds"] / asked,
            asked / max(sums["duration"], 1e-9),
            f"measured on {asked:,} requests of this run",
        )
    size = stage.config.image_size
    return ImageCost(
        ASSUMED_SUCCESS,
        ASSUMED_SUCCESS * ASSUMED_BODY,
        ASSUMED_SUCCESS * ASSUMED_STORED_256 * (size / 256) ** 2,
        ASSUMED_SUCCESS * ASSUMED_REST * _seconds_an_image(stage),
        None,
        f"CPU measured here on a generated 640x480 JPEG; assumed are {ASSUMED_BODY // 1000} KB an image and "
        f"{100 * ASSUMED_SUCCESS:.0f} % success; run a pilot on a small table to have them measured",
    )


def _seconds_an_image(stage: IngestStage) -> float:
    """CPU-seconds to decode, resize and encode a 640x480 JPEG of about 160 KB, the best of a few."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth, np.int16) + rng.normal(0, 12, (480, 640, 1)).astype(np.int16), 0, 255)
    sink = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(sink, "JPEG", quality=90)
    settings, times = pixel_settings(stage.config), []
    for _ in range(12):
        began = time.thread_time()
        process(sink.getvalue(), settings)
        times.append(time.thread_time() - began)
    return min(times)


def _short(label: str) -> str:
    return label if len(label) <= 45 else label[:42] + "..."


def _size(count: float) -> str:
    """Bytes in the unit that suits them."""
    unit, power = next(((u, p) for u, p in (("TB", 12), ("GB", 9)) if count >= 0.1 * 10**p), ("MB", 6))
    return f"{count / 10**power:>16,.3f} {unit}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:5.1f} %"
