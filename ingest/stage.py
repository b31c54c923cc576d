"""The ingest stage: tables of URLs and captions into image shards in img2dataset's layout.

A task is one shard's range of the table. Its worker filters the rows, fetches the pictures, makes them
alike and commits tar, sidecar and stats. `finish` looks over the whole run: it excludes duplicates and
checks that every row of the table came to exactly one end. What is in a shard is in packing.py; shards
that are changed later, by a retry or a take-down, in rewrite.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ingest import captions, filters, statistics, tables
from ingest.config import FilterConfig, IngestConfig
from ingest.duplicates import find_duplicates
from ingest.errors import ERRORS, EXCLUSION_STATUS
from ingest.img2dataset_engine import Img2datasetCrew
from ingest.img2dataset_engine import require as require_img2dataset
from ingest.packing import kept_columns, new_sidecar
from ingest.statistics import COUNTED, sum_counts
from ingest.takedown import TakenDown
from ingest.work import Crew, Outcome
from shards import storage
from shards.dataset import MANIFEST, write_manifest
from shards.exclusions import converted, write_exclusions
from shards.fingerprint import Fingerprint, digest_json
from shards.settings import ConfigError, StageError
from shards.stage import Task, open_folder

VERSION = 4

Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True)
class IngestStage:
    """Implements shards.stage.Stage. root: the folder of the split's image shards."""

    config: IngestConfig
    root: str
    split: Split = "train"
    seed: int = 0

    unit = "images"
    data = ".tar"

    @property
    def name(self) -> str:
        """`ingest`, or `heldout` for the held-out split."""
        return "ingest" if self.split == "train" else "heldout"

    def check(self) -> None:
        """Open the table and find the columns; raises ConfigError before any work has begun."""
        if self.config.engine == "img2dataset":
            require_img2dataset()
        self._plan()

    def is_current(self) -> bool:
        """Whether the manifest, if there is one, was written with the present settings of the pass over the run."""
        try:
            manifest = storage.read_json(storage.join(self.root, MANIFEST))
        except ValueError:
            return False
        return manifest is None or manifest.get("passes") == self._passes()

    def _passes(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", include={"duplicates", "caption_repeats"})

    def tasks(self) -> Iterator[Task]:
        """One task a shard. Walks through the whole table, since a task holds the digest of its rows."""
        plan = self._plan()
        for index, place in enumerate(tables.shard_ranges(plan, self.config.samples_per_shard, self._keep())):
            yield Task(index, digest_json({"rows": place.rows, "digest": place.digest})[:32], place)

    def made_with(self) -> Fingerprint:
        """The settings that a shard's bytes depend on."""
        return Fingerprint("ingest", VERSION, self._settings())

    def worker(self) -> IngestWorker:
        """A worker with its connections and threads; `close()` ends them, as the end of the process does."""
        return IngestWorker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Exclude duplicates, check the accounts, write the manifest; raises StageError where they do not hold."""
        stats = list(stats)
        self._check_rows(stats)
        return self.conclude(stats)

    def conclude(self, stats: list[dict[str, Any]]) -> dict[str, Any]:
        """`finish` for shards that are known to be the table's."""
        rows = sum(s["rows"] for s in stats)
        totals = Counter({name: sum(s[name] for s in stats) for name in COUNTED})
        indices = [s["shard"] for s in stats]
        config = self.config
        exclusions, statuses = find_duplicates(
            self.root,
            indices,
            config.samples_per_shard,
            totals["success"],
            rules=config.duplicates,
            caption_repeats=config.caption_repeats,
        )
        if statuses != +totals:
            raise StageError(
                f"{self.root}: the sidecars count {dict(statuses)}, the stats {dict(+totals)}; run it again"
            )
        reasons = Counter(exclusions["reason"].to_pylist())
        excluded = sum_counts({EXCLUSION_STATUS[r]: n} for r, n in reasons.items())
        counts = {"rows": rows, **totals, "duplicate": excluded["duplicate"]}
        counts["filtered"] += excluded["filtered"]
        counts["success"] -= len(exclusions)
        if rows != sum(counts.values()) - rows:
            raise StageError(f"{self.root}: {rows} rows went in, but what became of them is {counts}")
        excluded_file = write_exclusions(self.root, [converted(exclusions)])
        filtered = [("caption_empty", "no caption")] + [(f.label, f.label) for f in config.filters]
        by_filter, errors = (sum_counts(s[name] for s in stats) for name in ("filters", "errors"))
        filtered_by = {label: by_filter.get(name, 0) for name, label in filtered}
        if config.caption_repeats is not None:
            filtered_by[f"more than {config.caption_repeats} of one caption"] = reasons["caption_repeated"]
        statistics.write_lines(self.root, stats)
        manifest = write_manifest(
            self.root,
            "images",
            stats,
            {
                "split": self.split,
                "samples_per_shard": config.samples_per_shard,
                "counts": counts,
                "errors": {c: n for c, n in sorted(errors.items()) if ERRORS[c].status != "filtered"},
                "passes": self._passes(),
                "filtered_by": filtered_by,
                "duplicates_by": {r: n for r, n in sorted(reasons.items()) if EXCLUSION_STATUS[r] == "duplicate"},
                "bytes_fetched": sum(s["bytes_fetched"] for s in stats),
                **statistics.of_run(stats),
            },
            excluded_file,
        )
        if not counts["success"]:
            most = errors.most_common(1)
            why = f" (most often: {most[0][0]}, {ERRORS[most[0][0]].meaning})" if most else ""
            raise StageError(
                f"{self.root}: none of {rows} rows gave a picture{why}; see the sidecars for each row's error"
            )
        return manifest

    def _check_rows(self, stats: list[dict[str, Any]]) -> None:
        """Count the table's rows anew; raises StageError unless each lies in exactly one committed shard."""
        rows = 0
        by_index = {s["shard"]: s for s in stats}
        tasks = 0
        for task in self.tasks():
            tasks += 1
            rows += task.payload.rows
            found = by_index.get(task.index, {}).get("rows")
            if found != task.payload.rows:
                raise StageError(
                    f"{self.root}: shard {task.index} holds {found} rows where the table has {task.payload.rows}; "
                    "run the same command again"
                )
        if tasks != len(stats):
            raise StageError(f"{self.root}: {len(stats)} shards are counted where the table makes {tasks}")
        if not rows:
            what = "no rows" if self.split == "train" else "no held-out rows (raise ingest.heldout_fraction?)"
            raise StageError(f"{self._table()}: the table has {what}")

    @property
    def run(self) -> str:
        """The run's folder, where the list of take-downs is."""
        return self.root.rstrip("/").rpartition("/")[0] or "."

    def _table(self) -> str:
        if self.split == "train":
            return self.config.table
        if not self.config.has_heldout:
            raise ConfigError("ingest: there is no held-out split; set heldout_table or heldout_fraction")
        return self.config.heldout_table or self.config.table

    def _plan(self) -> tables.Plan:
        wanted = [*self.config.keep_columns, *filters.needed_columns(self.config.filters)]
        captionless = self.config.empty_captions == "keep"
        plan = tables.make_plan(self._table(), self.config.columns, wanted, statistics.LOOKED_AT, captionless)
        types = {}
        for f in self.config.filters:
            if f.column not in filters.DERIVED:
                types[f.column] = plan.schema.field(tables.resolve(plan, f.column)).type
        filters.check_types(self.config.filters, types)
        kept_columns(plan, self.config.keep_columns)
        return plan

    def _keep(self) -> tables.Keep | None:
        """Which rows of a batch belong to this split: by the hash of the caption, cleaned and without case."""
        if not self.config.heldout_fraction:
            return None
        steps, salt = self.config.captions, self.seed.to_bytes(8, "little", signed=True)
        bound = int(self.config.heldout_fraction * 2**64)
        heldout = self.split == "heldout"

        def keep(batch: pa.RecordBatch) -> np.ndarray:
            chosen = np.zeros(batch.num_rows, bool)
            for i, text in enumerate(batch.column("caption").to_pylist()):
                caption = captions.clean(text or "", steps).casefold().encode("utf-8", "surrogatepass")
                digest = hashlib.blake2b(caption, digest_size=8, salt=salt).digest()
                chosen[i] = (int.from_bytes(digest, "little") < bound) == heldout
            return chosen

        return keep

    def _settings(self) -> dict[str, Any]:
        """What a shard's bytes depend on. Limits of time and concurrency are not among it, nor the table's path."""
        c = self.config
        settings = c.model_dump(
            mode="json",
            by_alias=True,
            exclude={
                "table",
                "heldout_table",
                "heldout_fraction",
                "columns",
                "fetch",
                "encode_quality",
                "decode_threads",
                "duplicates",
                "caption_repeats",
            },
        )
        settings |= {"quality": c.quality, "max_bytes": c.fetch.max_bytes, "caption_steps_version": captions.VERSION}
        if c.heldout_fraction:
            settings["split"] = {"part": self.split, "heldout_fraction": c.heldout_fraction, "seed": self.seed}
        return settings


class IngestWorker:
    """Makes shards, one at a time. Holds a process's connections, threads and open table file between shards."""

    def __init__(self, stage: IngestStage) -> None:
        self.stage = stage
        self.folder = open_folder(stage)
        self.plan = stage._plan()
        self.keep = stage._keep()
        self.cursor = tables.Cursor()
        self.taken_down = TakenDown.read(stage.run)
        self.crew = make_crew(stage.config, self.taken_down)

    def __call__(self, task: Task) -> dict[str, Any]:
        """Fetch a shard's rows and commit it; returns its committed stats."""
        if (found := self.folder.adopt(task.index)) is not None:
            return found
        began, cpu = time.time(), _cpu_seconds()
        config = self.stage.config
        rows = tables.read_range(self.plan, task.payload, self.keep, self.cursor)
        raw = rows["caption"].to_pylist()
        cleaned = [captions.clean(text or "", config.captions) for text in raw]
        outcomes = self._judge(rows, cleaned)
        urls = rows["url"].to_pylist()
        todo = {i: url or "" for i, url in enumerate(urls) if outcomes[i] is None}
        for i, outcome in self.crew.fetch_all(todo).items():
            outcomes[i] = outcome
        done = [o for o in outcomes if o is not None]
        if len(done) != rows.num_rows:
            raise StageError(f"shard {task.index}: {rows.num_rows - len(done)} rows came to no end")
        sidecar = new_sidecar(task.index, rows, self.plan, config, raw, cleaned)
        files = sidecar.pack(done)
        stats = statistics.of_shard(done, urls, began)
        stats["cpu_seconds"] = round(_cpu_seconds() - cpu, 3)
        stats["checks"] = statistics.checks(rows, self.plan, done, config.swapped_sizes)
        return self.folder.commit(task.index, files, stats, task.input)

    def close(self) -> None:
        """Close connections, threads and files."""
        self.crew.close()
        self.cursor.close()

    def _judge(self, rows: pa.Table, cleaned: list[str]) -> list[Outcome | None]:
        """What is decided before anything is fetched; None for rows that are to be fetched."""
        config = self.stage.config
        verdicts = judge_rows(config, self.plan, rows, cleaned)
        outcomes: list[Outcome | None] = []
        for caption, url, verdict in zip(cleaned, rows["url"].to_pylist(), verdicts, strict=True):
            if self.taken_down.has_url(url or ""):
                outcomes.append(Outcome.of("taken_down"))
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
    config: IngestConfig, plan: tables.Plan, rows: pa.Table | pa.RecordBatch, cleaned: list[str]
) -> list[FilterConfig | None]:
    """The first filter that each row of the table fails; None for rows that pass. cleaned: their captions."""
    other = {"width": "height", "height": "width"} if config.swapped_sizes else {}
    names = {n: tables.resolve(plan, other.get(n.lower(), n)) for n in filters.needed_columns(config.filters)}
    columns = {asked: rows.column(name).to_pylist() for asked, name in names.items() if name is not None}
    for f in config.filters:
        if f.column.lower() == "url":
            columns[f.column] = rows.column("url").to_pylist()
    return filters.judge(config.filters, columns, cleaned)


def make_crew(config: IngestConfig, taken_down: TakenDown) -> Crew | Img2datasetCrew:
    """What fetches: our own client, or img2dataset in a process of its own."""
    return Img2datasetCrew(config, taken_down) if config.engine == "img2dataset" else Crew(config, taken_down)
