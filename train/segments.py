"""What a run took its samples from, recorded: segments, each with sources, weights and batch sizes from a position on.

A checkpoint's manifest keeps it as `order`. A source is a range of shards of a data set. It keeps its key for life,
so a new segment goes on with its epoch. Growth is one more range, taken in with consent; a take-down changes nothing
here, since a sample that is taken down keeps its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_json
from shards.selection import Rule, Selection
from shards.settings import ConfigError
from train.config import TrainConfig
from train.fit_config import FitConfig
from train.part_config import PRIOR, SourceConfig
from train.placement import Placement, Segment, Source

VERSION = 2  # 1 was an order by windows of shards, which kept no record

WINDOW_BYTES = 2 << 20  # of a window, where the configuration does not say how many rows it has
MOST_ROWS, FEWEST_ROWS = 256, 8
MOST_STREAMS, FEWEST_STREAMS = 1024, 64


@dataclasses.dataclass(frozen=True)
class Range:
    """Shards of a data set, by place in its manifest. given: as the configuration names the data set, None for the
    run's own; again: which of several sources of one name. rows: of each bucket."""

    given: str | None
    again: int
    root: str
    first: int
    end: int
    rows: tuple[int, ...]
    key: str
    weight: float

    @property
    def source(self) -> tuple[str | None, int]:
        """Which of the configuration's sources it belongs to."""
        return self.given, self.again


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The image shards whose images the UNet is given beside one source's latents. given, again: the source, as
    Range's. shards: how many there were; digest: of which they were, whatever was taken down in them since; empty where
    their format does not say."""

    given: str | None
    again: int
    root: str
    shards: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A segment as it is kept. images, step: where it begins. sizes: samples of a batch of each bucket. changes: what
    was adopted, in sentences."""

    images: int
    step: int
    batch_size: int
    sizes: tuple[int, ...]
    ranges: tuple[Range, ...]
    changes: tuple[str, ...] = ()
    select: tuple[tuple[dict[str, Any], ...], ...] = ()  # by source, the rules with their thresholds; none: all pass
    pictures: tuple[ImageSet, ...] = ()  # by source, where the UNet is given images; none: it is not, or no record


@dataclasses.dataclass(frozen=True)
class History:
    """All segments of a run."""

    streams: int
    window: int
    segments: tuple[Record, ...]

    def to_json(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> History:
        """The inverse of `to_json`."""
        segments = []
        for s in value["segments"]:
            ranges = tuple(Range(**{**r, "rows": tuple(r["rows"])}) for r in s["ranges"])
            segments.append(
                Record(
                    **{
                        **s,
                        "sizes": tuple(s["sizes"]),
                        "ranges": ranges,
                        "changes": tuple(s["changes"]),
                        "select": tuple(map(tuple, s.get("select", ()))),
                        "pictures": tuple(ImageSet(**p) for p in s.get("pictures", ())),
                    }
                )
            )
        return cls(value["streams"], value["window"], tuple(segments))

    def placement(self, tables: dict[str, np.ndarray], seed: int) -> Placement:
        """tables: by key of a range, its samples, int [shards, buckets]; of those that are not there the sums do, since
        nothing is to be found in them."""
        sources: dict[str, np.ndarray] = {}
        for record in self.segments:
            for r in record.ranges:
                sources.setdefault(r.key, tables.get(r.key, np.array([r.rows], np.int64)))
        segments = [
            Segment(s.images, s.batch_size, s.sizes, tuple(Source(r.key, sources[r.key], r.weight) for r in s.ranges))
            for s in self.segments
        ]
        return Placement(segments, seed, self.streams, self.window)


@dataclasses.dataclass(frozen=True)
class Taken:
    """A history to go on with. notes: what a person should know; refusal: why consent is needed, or nothing."""

    history: History
    notes: tuple[str, ...] = ()
    refusal: str = ""


def rows_laid(dataset: Dataset) -> np.ndarray:
    """The rows of each bucket in each shard, int32 [shards, buckets], whatever became of their samples since."""
    for name in ("laid", "bucket_counts"):
        if name in dataset.manifest:
            return np.asarray(dataset.manifest[name], np.int32).reshape(len(dataset.shards), -1)
    return dataset.counts.astype(np.int32)[:, None]


def tables(history: History, config: FitConfig, datasets: Sequence[Dataset]) -> dict[str, np.ndarray]:
    """By key, the samples of the ranges of the last segment, whose data sets are at hand."""
    found = {}
    by_source = dict(zip(names(config), datasets, strict=True))
    for r in history.segments[-1].ranges:
        found[r.key] = rows_laid(by_source[r.source])[r.first : r.end]
    return found


def begin(config: FitConfig, datasets: Sequence[Dataset]) -> History:
    """The history of a run that begins now, with all that its data sets hold."""
    laid = [rows_laid(d) for d in datasets]
    ranges = []
    for source, weight, dataset, key, table in zip(
        names(config), _weights(config), datasets, _keys(datasets), laid, strict=True
    ):
        ranges.append(_range(source, dataset, table, 0, key, weight))
    total = sum(int(t.sum()) for t in laid)
    beside = image_sets(config, datasets)
    row = _row_bytes(datasets[0], laid[0]) + sum(_row_bytes(d, rows_laid(d)) for d in beside[:1])
    window = config.window or int(np.clip(WINDOW_BYTES // row, FEWEST_ROWS, MOST_ROWS))
    fitting = 1 << max(0, total // window - 1).bit_length()
    most = MOST_STREAMS if datasets[0].kind == "latents" else MOST_STREAMS // 4  # a tar's sidecar is kept for each
    streams = config.streams or int(np.clip(fitting, FEWEST_STREAMS, most))
    select = selected(config, datasets)
    images = tuple(_image_set(s, d) for s, d in zip(names(config), beside, strict=False))
    sizes = batch_sizes(config, datasets)
    record = Record(0, 0, config.batch_size, sizes, tuple(ranges), select=select, pictures=images)
    return History(streams, window, (record,))


def too_few(config: FitConfig, datasets: Sequence[Dataset]) -> list[str]:
    """Of buckets with fewer samples than a batch takes, a sentence each: a sample comes several times in a batch."""
    sizes, laid = batch_sizes(config, datasets), np.sum([rows_laid(d).sum(axis=0) for d in datasets], axis=0)
    shapes = datasets[0].manifest.get("buckets") or []
    found = []
    for b in np.flatnonzero((laid > 0) & (laid < np.array(sizes))).tolist():
        of = f" of {shapes[b]['width']} x {shapes[b]['height']} pixels" if len(sizes) > 1 else ""
        found.append(f"there are {laid[b]} samples{of}, and a batch takes {sizes[b]}: each comes several times in one")
    return found


def placement_of(
    config: FitConfig, datasets: Sequence[Dataset], seed: int, history: History | None = None
) -> Placement:
    """Where the samples of a run come from; history: None for one that begins now."""
    history = history or begin(config, datasets)
    return history.placement(tables(history, config, datasets), seed)


def resume(
    stored: dict[str, Any] | None,
    images: int,
    step: int,
    config: FitConfig,
    datasets: Sequence[Dataset],
    adopt: bool = False,
    changes: Sequence[str] = (),
) -> Taken:
    """The history of a run that goes on at `images`, after `step` steps.

    stored: what its checkpoint kept; None where that was made before histories were. adopt: take in what has grown, and
    sources that are others now. changes: settings that differ and are adopted.
    """
    if stored is None or stored.get("version") != VERSION:
        fresh = begin(config, datasets)
        record = dataclasses.replace(fresh.segments[0], images=images, step=step, changes=tuple(changes))
        note = (
            f"a new order of samples begins at {images} images, since the checkpoint was made with an older one; the "
            "epoch under way ends there"
        )
        return Taken(dataclasses.replace(fresh, segments=(record,)), (note,))
    history = History.from_json(stored)
    last = history.segments[-1]
    ranges: list[Range] = []
    notes: list[str] = []
    adopted: list[str] = []
    refusal = ""
    for source, weight, dataset, key in zip(names(config), _weights(config), datasets, _keys(datasets), strict=True):
        laid = rows_laid(dataset)
        own = [r for r in last.ranges if r.source == source]
        kept = []
        for r in own:
            found = laid[r.first : r.end].sum(axis=0, dtype=np.int64)
            if tuple(found.tolist()) == r.rows:
                kept.append(r)
                continue
            if int(found.sum()) > sum(r.rows):
                refusal = refusal or (
                    f"{dataset.root} holds other samples than this training began with ({int(found.sum()):,} where it "
                    f"had {sum(r.rows):,} in the same shards); give --adopt to go on with these"
                )
            adopted.append(
                f"{dataset.root}: {int(found.sum()):,} samples in place of {sum(r.rows):,}, in an order of their own"
            )
            notes.append(adopted[-1])
            kept.append(_range(source, dataset, laid[: r.end], r.first, f"{key}:{r.first}:{images}", 0.0))
        end = max((r.end for r in own), default=0)
        more = int(laid[end:].sum())
        if more and (adopt or not own):
            kept.append(_range(source, dataset, laid, end, f"{key}:{end}" if end else key, 0.0))
            adopted.append(f"{dataset.root}: {more:,} samples more")
        elif more:
            notes.append(f"{dataset.root} holds {more:,} samples more by now; --adopt takes them in")
        total = sum(sum(r.rows) for r in kept)
        ranges += [
            dataclasses.replace(r, weight=weight * sum(r.rows) / total, root=dataset.root) for r in kept if total
        ]
    beside = image_sets(config, datasets)
    # Sources may have changed their places, and new ones have come.
    stood = {(p.given, p.again): p for p in last.pictures}
    pairs = [
        (stood[s], _image_set(s, d, stood[s].shards)) for s, d in zip(names(config), beside, strict=False) if s in stood
    ]
    others = [now.root for then, now in pairs if then.digest and now.digest and then.digest != now.digest]
    for root in others:
        refusal = refusal or (
            f"the images in {root} are others than those this training was given until now; put them back, or give "
            "--adopt to go on with these"
        )
        adopted.append(f"{root}: other images")
    select = selected(config, datasets, last.select)
    sizes = batch_sizes(config, datasets)
    pictures = tuple(_image_set(s, d) for s, d in zip(names(config), beside, strict=False))
    record = Record(images, step, config.batch_size, sizes, tuple(ranges), (*changes, *adopted), select, pictures)
    if _same(record, last) and not changes and not others:
        return Taken(history, tuple(notes), "" if adopt else refusal)
    before = history.segments if last.images < images else history.segments[:-1]
    return Taken(dataclasses.replace(history, segments=(*before, record)), tuple(notes), "" if adopt else refusal)


def _same(a: Record, b: Record) -> bool:
    def without_root(record: Record) -> list[Range]:  # a run may be moved
        return [dataclasses.replace(r, root="", weight=round(r.weight, 12)) for r in record.ranges]

    return (a.batch_size, a.sizes, a.select, without_root(a)) == (b.batch_size, b.sizes, b.select, without_root(b))


def selected(
    config: FitConfig, datasets: Sequence[Dataset], before: Sequence[Sequence[dict[str, Any]]] = ()
) -> tuple[tuple[dict[str, Any], ...], ...]:
    """By source, its rules with their thresholds, those of `before` where the rules are the same.

    A source's scores lie beside its latents. Raises ConfigError where they are not there.
    """
    if not any(rules := [rules_of(config, n) for n in range(len(datasets))]):
        return ()
    known = before if len(before) == len(datasets) else [()] * len(datasets)
    return tuple(tuple(Selection(run_of(d), r, k).settings) for d, r, k in zip(datasets, rules, known, strict=True))


def rules_of(config: FitConfig, source: int) -> tuple[Rule, ...]:
    """What a sample must pass to be taken from one of the configuration's sources."""
    if not isinstance(config, TrainConfig):
        return ()
    chosen = config.all_sources[source]
    # The prior's images have no scores.
    return () if chosen.latents == PRIOR else (*config.select, *chosen.select)


def run_of(dataset: Dataset) -> str:
    """The run that a data set's folder lies in."""
    return dataset.root.rstrip("/").rpartition("/")[0]


def image_sets(config: FitConfig, datasets: Sequence[Dataset], folder: str = "images") -> list[Dataset]:
    """Of each data set of latents, the image shards whose images the UNet is given by key; none without.

    folder: `images`, or `heldout`.
    """
    if not isinstance(config, TrainConfig) or not config.conditioned_by:
        return []
    return [Dataset.open(storage.join(run_of_images(config, run_of(d)), folder)) for d in datasets]


def run_of_images(config: TrainConfig, run: str) -> str:
    """The run that has the images which latents of `run` are given."""
    other = config.edit.before if config.edit else config.control.images if config.control else None
    if other is None:
        return run
    return other if "://" in other or other.startswith("/") else storage.join(run, other)


def _image_set(source: tuple[str | None, int], dataset: Dataset, shards: int | None = None) -> ImageSet:
    """Which images the first `shards` shards hold, or all; more may come, and some be taken down."""
    some = dataset.shards[:shards]
    lines = [f"{s.index} {s.born}" for s in some]
    return ImageSet(*source, dataset.root, len(lines), "" if dataset.format == 1 else digest_json(lines)[:32])


def _range(
    source: tuple[str | None, int], dataset: Dataset, laid: np.ndarray, first: int, key: str, weight: float
) -> Range:
    rows = tuple(laid[first:].sum(axis=0, dtype=np.int64).tolist())
    return Range(*source, dataset.root, first, len(laid), rows, digest_json([key])[:32], weight)


def _keys(datasets: Sequence[Dataset]) -> list[str]:
    """What names the data of each source for life; copies of one data set are told apart: each has its own turns."""
    prints = [d.fingerprint for d in datasets]
    copies = [prints[:i].count(p) for i, p in enumerate(prints)]
    return [f"{p}#{n}" if n else p for p, n in zip(prints, copies, strict=True)]


def _sources(config: FitConfig) -> Sequence[SourceConfig]:
    return config.all_sources if isinstance(config, TrainConfig) else (SourceConfig(),)


def _weights(config: FitConfig) -> list[float]:
    return [s.weight for s in _sources(config)]


def names(config: FitConfig) -> list[tuple[str | None, int]]:
    """The configuration's sources, and which of several of one name each is."""
    names = [s.latents for s in _sources(config)]
    return [(name, names[:i].count(name)) for i, name in enumerate(names)]


def _row_bytes(dataset: Dataset, laid: np.ndarray) -> int:
    """About how much a sample takes up, by the first shard that has some."""
    position = int(np.flatnonzero(laid.sum(axis=1))[0])
    suffix = ".safetensors" if dataset.kind == "latents" else ".tar"
    size = storage.size(storage.join(dataset.root, dataset.shards[position].name + suffix)) or 0
    return max(1, size // int(laid[position].sum()))


def batch_sizes(config: FitConfig, datasets: Sequence[Dataset]) -> tuple[int, ...]:
    """Samples of a global batch of each bucket, 0 for those that are not trained on.

    Raises ConfigError where a resolution is not there, or a bucket's images leave room for none.
    """
    laid = np.sum([rows_laid(d).sum(axis=0, dtype=np.int64) for d in datasets], axis=0)
    if not isinstance(config, TrainConfig):
        return (config.batch_size,)
    facts = datasets[0].manifest
    shapes = facts["buckets"] if len(laid) > 1 else [{"resolution": facts["resolution"]}]
    there = sorted({shape["resolution"] for shape in shapes})
    wanted = config.resolutions or (int(facts["resolution"]),)
    for resolution in wanted:
        if resolution not in there:
            raise ConfigError(
                f"train.resolution is {resolution}, but {datasets[0].root} holds latents of "
                f"{' and '.join(map(str, there))} pixels"
            )
    used = [b for b, shape in enumerate(shapes) if shape["resolution"] in wanted and laid[b]]
    sizes = dict.fromkeys(used, config.batch_size)
    if config.batch_by_area is not None and len(laid) > 1:
        areas = {b: int(shapes[b]["width"]) * int(shapes[b]["height"]) for b in used}
        unit, smallest = config.batch_by_area, min(areas.values())
        sizes = {b: config.batch_size * smallest // area // unit * unit for b, area in areas.items()}
        if 0 in sizes.values():
            largest = shapes[max(areas, key=lambda b: areas[b])]
            raise ConfigError(
                f"train.batch_by_area is {unit}, but a batch_size of {config.batch_size} leaves fewer images of "
                f"{largest['width']} x {largest['height']} pixels than that; raise batch_size, or lower it"
            )
    return tuple(sizes.get(b, 0) for b in range(len(laid)))
