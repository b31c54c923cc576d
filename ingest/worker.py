"""The making of one image shard: rows are judged, their images fetched or left where they lie, and all is committed."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ingest import captions, filters, statistics, tables, takedown
from ingest.config import FilterConfig, IngestConfig
from ingest.digests import as_before
from ingest.errors import Rejected
from ingest.hosts import Exchange
from ingest.img2dataset_engine import Img2datasetPool
from ingest.listing import FAULT, LOCATION
from ingest.locations import Below, Location
from ingest.packing import new_sidecar, rows_again
from ingest.pool import FetchPool, Lies, Outcome
from ingest.retries import Anew, Retry, codes_of_taken
from ingest.tables import Layout
from ingest.takedown import TakenDown
from shards import plan, storage
from shards.layout import shard_name
from shards.settings import StageError
from shards.stage import Task, open_folder, persist
from shards.verify import discarded

if TYPE_CHECKING:
    from ingest.stage import IngestStage

# What the JSON beside an image that is adopted may say of it.
ADOPTED = ("width", "height", "original_width", "original_height", "sha256")


class IngestWorker:
    """Makes shards, one at a time. Holds a process's connections, threads and open table file between shards."""

    def __init__(self, stage: IngestStage) -> None:
        self.stage = stage
        self.folder = open_folder(stage)
        self.layout = stage.layout()
        self.rule = stage.heldout_rule(self.layout)
        self.cursor = tables.Cursor()
        self.taken_down = TakenDown.read(stage.run)
        self.pool = make_pool(stage.config, self.taken_down, stage.hosts, stage.below())
        self.below = Below(stage.below())
        self._anew: Anew | None = None

    def __call__(self, task: Task) -> dict[str, Any]:
        """Fetch a shard's rows and commit it; returns its committed stats."""
        found = self.folder.adopt(task.index)
        if found is not None:
            return found
        if takedown.length(self.stage.run) != self.taken_down.parts:
            self.taken_down = self.pool.taken_down = TakenDown.read(self.stage.run)
        self._anew = task.payload if isinstance(task.payload, Anew) else None
        if self._anew is not None:
            task = dataclasses.replace(task, payload=self._anew.was)
        files, stats = self._again(task) if isinstance(task.payload, Retry) else self._first(task)
        if self.taken_down and (before := discarded(self.stage.root, task.index)) is not None:
            files[".parquet"] = as_before(files[".parquet"], before)
        stats |= {"digests": True, "list": self.taken_down.parts}
        return persist(lambda: self.folder.commit(task.index, files, stats, task.input))

    def close(self) -> None:
        """Close connections, threads and files."""
        self.pool.close()
        self.cursor.close()

    def _first(self, task: Task) -> tuple[dict[str, bytes], dict[str, Any]]:
        """A shard of the table's rows."""
        began, cpu, config = time.time(), _cpu_seconds(), self.stage.config
        if task.payload.file == plan.BEFORE:
            raise StageError(f"shard {shard_name(task.index)}: its rows are not in the table any more")
        rows = tables.read_range(self.layout, task.payload, self.rule, self.stage.split, self.cursor)
        raw = rows["caption"].to_pylist()
        firsts = [tables.first_caption(t) for t in raw] if self.layout.caption_lists else raw
        cleaned = [captions.clean(text or "", config.captions) for text in firsts]
        sidecar = new_sidecar(task.index, rows, self.layout, config, raw, cleaned, self.stage.kept())
        outcomes = self._taken_over(task, sidecar.columns["key"], self._judge(rows, cleaned))
        urls = rows["url"].to_pylist()
        locations = rows[LOCATION].to_pylist() if LOCATION in rows.column_names else urls
        if config.source.adopt:
            done = [o or a for o, a in zip(outcomes, self._adopt(rows, locations, outcomes), strict=True)]
        else:
            done = self._fetch(task, locations, outcomes)
        files = sidecar.pack(done, config.source.adopt)
        stats = statistics.of_shard(done, urls, began)
        stats["cpu_seconds"] = round(_cpu_seconds() - cpu, 3)
        stats["checks"] = statistics.checks(rows, self.layout, done, config.swapped_sizes)
        return files, stats

    def _adopt(self, rows: pa.Table, locations: Sequence[str], known: Sequence[Outcome | None]) -> Iterator[Outcome]:
        """What becomes of images that stay where they are; nothing of them is read."""
        facts = {name: rows[name].to_pylist() for name in ADOPTED if name in rows.column_names}
        inside = ""  # the file that was last found to be below the folders: many images in a row are of one
        for i, text in enumerate(locations):
            if (outcome := known[i]) is not None:
                yield outcome
                continue
            try:
                location = Location.parse(text)
                if location.file != inside:
                    self.below.require(location.file)
                    inside = location.file
            except Rejected as e:
                yield Outcome.of(e.code)
                continue
            said = {name: values[i] for name, values in facts.items()}
            sha256 = said.pop("sha256", None)
            sha256 = sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None
            extension = text.partition("&offset=")[0].rpartition(".")[2].lower()
            size = location.size or 0
            if sha256 and self.taken_down.has_bytes(sha256):
                yield Outcome.of("taken_down", sha256=sha256)
            elif location.offset is None or size == 0:
                yield Outcome.of("body_empty")
            elif size > self.stage.config.fetch.max_bytes:
                yield Outcome.of("body_too_large")
            elif extension not in ("jpg", "jpeg", "png", "webp"):
                yield Outcome.of("image_unsupported", f"a .{extension} cannot be adopted; ingest it without adopt")
            else:
                sides: dict[str, Any] = {
                    n: int(v) if isinstance(v, int) and 0 < v < 1 << 20 else None for n, v in said.items()
                }
                lies = Lies(location.file, location.offset, size, extension, **sides)
                yield Outcome("success", sha256=sha256, lies=lies)

    def _again(self, task: Task) -> tuple[dict[str, bytes], dict[str, Any]]:
        """A shard of rows that older shards could not get, under their own keys."""
        began, cpu = time.time(), _cpu_seconds()
        parts, taken = [], Counter[str]()
        for shard, codes in task.payload.of:
            table = storage.read_parquet(storage.join(self.stage.root, shard_name(shard) + ".parquet"))
            errors = table["error"].to_pylist()
            chosen = [i for i, e in enumerate(errors) if e in codes]
            taken.update(errors[i] for i in chosen)
            parts.append(table.take(pa.array(chosen, pa.int64())))
        sidecar, urls = rows_again(parts)
        outcomes: list[Outcome | None] = [
            Outcome.of("taken_down") if self.taken_down.has_url(url or "") else None for url in urls
        ]
        outcomes = self._taken_over(task, sidecar.columns["key"], outcomes)
        done = self._fetch(task, sidecar.columns.get(LOCATION, urls), outcomes)
        files = sidecar.pack(done)
        stats = statistics.of_shard(done, urls, began)
        return files, stats | {
            "cpu_seconds": round(_cpu_seconds() - cpu, 3),
            "checks": {},
            "takes_over": dict(sorted(taken.items())),
        }

    def _taken_over(self, task: Task, keys: Sequence[str], outcomes: list[Outcome | None]) -> list[Outcome | None]:
        """The outcomes of a shard's rows; those of one made anew that a retry has taken over end as they did then."""
        if self._anew is None:
            return outcomes
        known = codes_of_taken(self.stage.root, task.index, keys, self._anew)
        return [Outcome.of(known[key]) if key in known else o for key, o in zip(keys, outcomes, strict=True)]

    def _fetch(self, task: Task, urls: Sequence[str | None], outcomes: list[Outcome | None]) -> list[Outcome]:
        """Fetch what is not decided yet; raises StageError unless every row came to an end."""
        todo = {i: url or "" for i, url in enumerate(urls) if outcomes[i] is None}
        for i, outcome in self.pool.fetch_all(todo).items():
            outcomes[i] = outcome
        done = [o for o in outcomes if o is not None]
        if len(done) != len(urls):
            raise StageError(f"shard {shard_name(task.index)}: {len(urls) - len(done)} rows came to no end")
        return done

    def _judge(self, rows: pa.Table, cleaned: list[str]) -> list[Outcome | None]:
        """What is decided before anything is fetched; None for rows that are to be fetched."""
        config = self.stage.config
        verdicts = judge_rows(config, self.layout, rows, cleaned)
        outcomes: list[Outcome | None] = []
        none = [None] * rows.num_rows
        faults = rows[FAULT].to_pylist() if FAULT in rows.column_names else none
        for caption, url, verdict, fault in zip(cleaned, rows["url"].to_pylist(), verdicts, faults, strict=True):
            if self.taken_down.has_url(url or ""):
                outcomes.append(Outcome.of("taken_down"))
            elif fault is not None:
                outcomes.append(Outcome.of(fault))
            elif not caption and config.empty_captions == "drop":
                outcomes.append(Outcome.of("caption_empty"))
            elif verdict is not None:
                outcomes.append(Outcome.of("filtered_out", verdict.label))
            else:
                outcomes.append(None)
        return outcomes


def _cpu_seconds() -> float:
    """What this process and its ended children have used."""
    return sum(os.times()[:4])


def judge_rows(
    config: IngestConfig, layout: Layout, rows: pa.Table | pa.RecordBatch, cleaned: list[str]
) -> list[FilterConfig | None]:
    """The first filter that each row of the table fails; None for rows that pass. cleaned: their captions."""
    other = {"width": "height", "height": "width"} if config.swapped_sizes else {}
    names = {n: tables.resolve(layout, other.get(n.lower(), n)) for n in filters.needed_columns(config.filters)}
    columns = {asked: rows.column(name).to_pylist() for asked, name in names.items() if name is not None}
    for f in config.filters:
        if f.column.lower() == "url":
            columns[f.column] = rows.column("url").to_pylist()
    return filters.judge(config.filters, columns, cleaned)


def make_pool(
    config: IngestConfig, taken_down: TakenDown, hosts: Exchange | None = None, below: Sequence[str] = ()
) -> FetchPool | Img2datasetPool:
    """What fetches: our own client, or img2dataset in a process of its own."""
    if config.engine == "img2dataset":
        return Img2datasetPool(config, taken_down)
    return FetchPool(config, taken_down, hosts, below)
