"""The ingest stage: tables of URLs and captions into image shards in img2dataset's layout.

A task is one line of the dataset's plan (shards/plan.py): a range of the table's rows, or rows that older shards could
not get (a retry). Its worker filters the rows, fetches the images, makes them alike and commits tar, sidecar and
stats. `finish` looks over the whole run: it takes out what was taken down, excludes duplicates and checks that every
row of the table came to exactly one end. What is in a shard is in packing.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ingest import captions, filters, removal, sources, statistics, tables, takedown
from ingest.config import ColumnsConfig, IngestConfig, SourceKind
from ingest.digests import with_flags
from ingest.duplicates import Sidecars, find_duplicates
from ingest.errors import ERRORS, EXCLUSION_STATUS, RETRYABLE
from ingest.hosts import Exchange
from ingest.img2dataset_engine import require as require_img2dataset
from ingest.listing import FAULT, LOCATION, Wanted
from ingest.packing import kept_columns
from ingest.retries import Anew, Retry, Taken, retry_lines, taken_from
from ingest.statistics import Lines, RunCounts
from ingest.tables import HeldoutRule, Layout, TableSource
from ingest.takedown import TakenDown
from ingest.worker import ADOPTED, IngestWorker
from shards import plan, storage
from shards.commit import Folder
from shards.dataset import MANIFEST, Dataset, ShardInfo, amend_manifest, read_stats, read_stats_of, write_manifest
from shards.exclusions import Exclusions, write_exclusions
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths, shard_name
from shards.listing import listed
from shards.made_with import read_made_with
from shards.plan import Each, Line
from shards.progress import Progress
from shards.settings import ConfigError, StageError
from shards.stage import Task
from shards.takeover import is_old, take_over_as_it_is

log = logging.getLogger("carrara.ingest")

VERSION = 4
# What may lie in a dataset's folder before it is begun: the other split's walk has planned this one too.
BEFORE_ANY_SHARD = (plan.FOLDER,)


Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True)
class IngestStage:
    """Implements shards.stage.Stage. root: the folder of the split's image shards.

    add_changed: take the rows of a file that changed anew, as further shards. retry: codes of rows that are to be
    fetched again, once, in further shards.
    """

    config: IngestConfig
    root: str
    split: Split = "train"
    seed: int = 0
    add_changed: bool = False
    retry: frozenset[str] = frozenset()
    hosts: Exchange | None = None  # how the run's ledger of hosts is reached; None: each worker has its own

    unit = "images"
    data = ".tar"
    plans = True  # `begin` walks through a table, and takes what can do that elsewhere

    @property
    def name(self) -> str:
        """`ingest`, or `heldout` for the held-out split."""
        return "ingest" if self.split == "train" else "heldout"

    @property
    def run(self) -> str:
        """The run's folder, where the list of take-downs is."""
        return self.root.rstrip("/").rpartition("/")[0] or "."

    def check(self) -> None:
        """Open the table and find the columns; raises ConfigError before any work has begun."""
        if self.config.engine == "img2dataset":
            require_img2dataset()
        if self.config.source.adopt and self._kind() != "webdataset":
            raise ConfigError(
                f"ingest.source.adopt: {self._table()} is no WebDataset tar, nor a folder of them; only images in tars "
                "can be left where they lie"
            )
        if self._kind() == "table" or storage.list_names(self._listing()):
            self.layout()

    def made_with(self) -> Fingerprint:
        """The settings that a shard's bytes depend on."""
        return Fingerprint("ingest", VERSION, self._settings())

    # ---- planning ------------------------------------------------------------------------------------------

    def begin(self, redo: bool = False, each: Each = map) -> None:
        """Make the folder ready and bring its plan up to the table; under the lease. each: see shards.plan.grow."""
        if self._kind() != "table":
            for sentence in sources.refresh(
                self._listing(), self._table(), self._kind(), self._wanted(), f"{self.name}: listing"
            ):
                log.warning("%s: %s", self.name, sentence)
        self.layout()  # what does not fit is refused before a folder is set aside
        stages = [self]
        if self.config.heldout_fraction and self.split == "train":  # one walk plans both
            stages.append(dataclasses.replace(self, root=RunPaths(self.run).heldout, split="heldout"))
        for stage in stages:
            Folder.begin(stage.root, stage.made_with(), redo=redo, take_over=True, known=BEFORE_ANY_SHARD)
            stage._plan_what_is_there()
        layout = self.layout()
        roots: dict[str, str] = {stage.split: stage.root for stage in stages}
        former = any(plan.read(root).has(plan.BEFORE) for root in roots.values())
        source = TableSource(layout, self.config.samples_per_shard, self.heldout_rule(layout), former)
        said = plan.grow(
            roots,
            source,
            add_changed=self.add_changed,
            stored=lambda split, shards: _stored(roots[split], shards),
            each=each,
            progress=f"{self.name}: planning",
        )
        for sentence in said:
            log.info("%s: %s", self.name, sentence)
        if self.retry:
            self._plan_retry()
        self._refuse_nothing()

    def _plan_what_is_there(self) -> None:
        """The first part of the plan of a run that an earlier version made: what its stats say, with no file known."""
        if plan.read(self.root).parts:
            return
        lines = []
        for index, stats in read_stats_of(self.root, listed(self.root).committed.tolist()):
            made = (stats or {}).get("fingerprint", {}).get("input")
            if stats is not None and isinstance(made, dict):
                # Files are told apart by the order of their places, so each number is one.
                lines.append(Line(index, plan.BEFORE, index, index + 1, made["rows"], bytes.fromhex(made["digest"])))
        if lines:
            plan.write_part(self.root, 0, lines)

    def _refuse_nothing(self) -> None:
        """Raise ConfigError where the table has no rows for this split, and nothing is stored of it."""
        if not len(plan.read(self.root)):
            what = "no rows" if self.split == "train" else "no held-out rows (raise ingest.heldout_fraction?)"
            raise ConfigError(f"{self._table()}: the table has {what}")

    def _plan_retry(self) -> None:
        """One more part of the plan: shards that take over the rows which ended with one of the codes."""
        known = plan.read(self.root)
        missing = np.setdiff1d([t.index for t in self.tasks()], listed(self.root).committed)
        retries = {line.shard for line in known.retries()}
        if set(missing.tolist()) - retries or not storage.exists(storage.join(self.root, MANIFEST)):
            raise ConfigError(
                f"{self.root}: there is no finished dataset to try again; run ingest without --retry first"
            )
        if len(missing):
            log.info("%s: an earlier --retry goes on", self.name)
            return
        lines, rows = retry_lines(self.root, known, self.retry, self.config.samples_per_shard)
        what = " or ".join(sorted(self.retry)) if self.retry != RETRYABLE else "a transient error"
        if not lines:
            log.info("%s: no row ended with %s; nothing to do", self.name, what)
            return
        plan.write_part(self.root, known.parts, lines)
        numbers = f"{shard_name(lines[0].shard)} to {shard_name(lines[-1].shard)}"
        log.info("%s: %d rows that ended with %s are fetched again, as shards %s", self.name, rows, what, numbers)

    def tasks(self) -> Iterator[Task]:
        """One task a line of the plan, but for those whose rows are nowhere any more and which were not begun."""
        known = plan.read(self.root)
        if not len(known):
            return
        files: set[str] | None = None  # a finished dataset is looked through without its table
        there = listed(self.root)
        begun = set(there.committed.tolist()) | set(there.begun.tolist())
        taken = Taken()
        retries = {line.shard: Retry(line, taken.open_codes(line)) for line in known.retries()}
        taking = taken_from(retries)
        for line in known.lines():
            payload = retries.get(line.shard, line)
            if line.shard in begun:
                yield Task(line.shard, None, payload)
                continue
            if not line.takes_over:
                files = set(tables.list_files(self._rows())) if files is None else files
                if line.file not in files:
                    continue
            by = tuple((retries[number], codes) for number, codes in sorted(taking.get(line.shard, {}).items()))
            yield Task(line.shard, None, Anew(payload, by) if by else payload)

    def worker(self) -> IngestWorker:
        """A worker with its connections and threads; `close()` ends them, as the end of the process does."""
        return IngestWorker(self)

    # ---- the end -------------------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the plan is up to the table, and the manifest, if there is one, was written with the present settings
        of the pass over the run and knows the whole list of take-downs."""
        try:
            manifest = storage.read_json(storage.join(self.root, MANIFEST))
        except ValueError:
            return False
        if self._kind() != "table" and not sources.is_listed(self._listing(), self._table(), self._kind()):
            return False
        if not plan.is_grown(self.root, tables.list_files(self._rows())):
            return False
        return manifest is None or (manifest.get("passes") == self._passes() and not self.list_grew(manifest))

    def list_grew(self, manifest: dict[str, Any] | None = None) -> bool:
        """Whether there is a finished dataset that was not looked through for the whole list of take-downs."""
        manifest = manifest or storage.read_json(storage.join(self.root, MANIFEST))
        return manifest is not None and manifest.get("list", 0) < takedown.length(self.run)

    def _passes(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", include={"duplicates", "caption_repeats"})

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Take out what was taken down, exclude duplicates, check the accounts, write the manifest.

        Raises StageError where the accounts do not hold.
        """
        parts, changed, _ = self.apply_list()
        counts, lines = RunCounts(), Lines()
        digests: dict[int, bool] = {}
        rows = plan.read(self.root).rows()

        def folded() -> Iterator[dict[str, Any]]:
            for s in stats:
                index = s["shard"]
                if index in changed:
                    s = read_stats(self.root, index) or s
                taken = sum(s.get("takes_over", {}).values())
                if s["rows"] != (taken if "takes_over" in s else rows.get(index)):
                    raise StageError(
                        f"{self.root}: shard {shard_name(index)} holds {s['rows']} rows where the plan has "
                        f"{rows.get(index, 'none')}; run the same command again"
                    )
                counts.add(s)
                lines.add(s)
                digests[index] = bool(s.get("digests"))
                yield s

        found: dict[str, Any] = {}

        def extra() -> dict[str, Any]:
            missing = sum(t.index not in digests for t in self.tasks())
            if missing:
                raise StageError(
                    f"{self.root}: {missing} shards of the plan are not committed; run the same command again"
                )
            found["exclusions"], more = self._conclude(counts, digests)
            old = [i for i, has in digests.items() if not has]
            return more | {"list": parts, **({"without_digests": old} if old else {})}

        manifest = write_manifest(self.root, "images", folded(), extra, lambda: found["exclusions"])
        lines.write(self.root)
        errors = counts.settled()[2]
        for sentence in statistics.summary(self.name, manifest["counts"], errors):
            log.info(sentence)
        if not manifest["counts"]["success"]:
            raise StageError(self._nothing(manifest["counts"]["rows"], errors))
        return manifest

    def _nothing(self, rows: int, errors: Counter[str]) -> str:
        most = errors.most_common(1)
        why = f" (most often: {most[0][0]}, {ERRORS[most[0][0]].meaning})" if most else ""
        advice = statistics.ADVICE.get(most[0][0]) if most else None
        what = advice or "see the sidecars for each row's error"
        return f"{self.root}: none of {rows} rows gave an image{why}; {what}"

    def _conclude(self, counts: RunCounts, digests: dict[int, bool]) -> tuple[str | None, dict[str, Any]]:
        """Find duplicates; returns the name of the file of exclusions and what stands in the manifest."""
        config, written = self.config, []
        other, other_exclusions, others = self._other_split()
        progress = Progress(f"{self.name}: duplicates", len(digests) + others, "shards")
        found = find_duplicates(
            Sidecars(self.root, lambda: iter(digests.items())),
            lambda tables_: written.append(write_exclusions(self.root, tables_)),
            rules=config.duplicates,
            caption_repeats=config.caption_repeats,
            other=other,
            other_exclusions=other_exclusions,
            progress=progress.update,
        )
        progress.close()
        if +found.statuses != +counts.statuses:
            raise StageError(
                f"{self.root}: the sidecars count {dict(found.statuses)}, the stats {dict(+counts.statuses)}; "
                "run it again"
            )
        rows, statuses, errors = counts.settled()
        excluded: Counter[str] = Counter()
        for reason, n in found.reasons.items():
            excluded[EXCLUSION_STATUS[reason]] += n
        ends = {"rows": rows, **{n: statuses[n] for n in statistics.COUNTED}, "duplicate": excluded["duplicate"]}
        ends["filtered"] += excluded["filtered"]
        ends["success"] -= excluded.total()
        if rows != sum(ends.values()) - rows or min(ends.values()) < 0:
            raise StageError(f"{self.root}: {rows} rows went in, but what became of them is {ends}")
        filtered = [("caption_empty", "no caption")] + [(f.label, f.label) for f in config.filters]
        filtered_by = {label: counts.filters.get(name, 0) for name, label in filtered}
        if config.caption_repeats is not None:
            filtered_by[_repeats(config.caption_repeats)] = found.reasons["caption_repeated"]
        return written[0], {
            "split": self.split,
            "samples_per_shard": config.samples_per_shard,
            "counts": ends,
            "errors": {c: n for c, n in sorted(errors.items()) if ERRORS[c].status != "filtered"},
            "passes": self._passes(),
            "filtered_by": filtered_by,
            "duplicates_by": {r: n for r, n in sorted(found.reasons.items()) if EXCLUSION_STATUS[r] == "duplicate"},
            **counts.manifest(),
        }

    def _other_split(self) -> tuple[Sidecars | None, Any, int]:
        """The other split's sidecars and exclusions, where it is finished, and how many sidecars these are."""
        paths = RunPaths(self.run)
        root = paths.heldout if self.split == "train" else paths.images
        if not self.config.has_heldout or root == self.root:
            return None, None, 0
        try:
            dataset = Dataset.open(root)
        except StageError:
            return None, None, 0

        indices = [s.index for s in dataset.shards]
        return Sidecars(root, lambda: with_flags(root, indices)), dataset.exclusions, len(indices)

    def open_for_removal(self) -> None:
        """Take over a folder of an earlier version, so that samples can be taken out of it; under the lease."""
        take_over_as_it_is(self.root, self.data)
        self._plan_what_is_there()

    def finish_removal(self, looked: removal.Looked | None = None) -> set[int]:
        """`finish` where nothing but take-downs has happened since; under the lease. Returns the shards that changed.

        looked: what was found before the lease was had.

        No duplicates are looked for: what was excluded stays excluded. Only shards with listed rows are read, and all
        that is counted is counted from them and from the manifest, so that it can be done again after a kill.
        """
        manifest = dict(Dataset.open(self.root).manifest)
        if manifest.get("format_version") == 1:
            parts, changed, _ = self.apply_list(looked)
            self.finish(s for _, s in read_stats_of(self.root, [t.index for t in self.tasks()]) if s is not None)
            return changed
        parts, changed, touched = self.apply_list(looked)
        shards = [ShardInfo(**s) for s in manifest["shards"]]
        gone = {i: self._taken_down(i) for i in touched & {s.index for s in shards}}
        before, after = Counter[str](), Counter[str]()
        excluded = Exclusions(self.root, manifest["exclusions"])

        def left() -> Iterator[pa.Table]:
            for table in excluded.tables():
                pairs = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
                keep = [row not in gone.get(shard, ()) for shard, row in pairs]
                before.update(table["reason"].to_pylist())
                table = table.filter(pa.array(keep))
                after.update(table["reason"].to_pylist())
                yield table

        name = write_exclusions(self.root, left())
        out = Exclusions(self.root, name)
        stats = {i: s for i, s in read_stats_of(self.root, sorted(gone)) if s is not None}
        shards = [
            dataclasses.replace(s, count=stats[s.index]["count"] - len(out.rows(s.index))) if s.index in stats else s
            for s in shards
        ]
        counts = dict(manifest["counts"])
        for reason in before:
            counts[EXCLUSION_STATUS[reason]] += after[reason] - before[reason]
        counts["success"] = sum(s.count for s in shards)
        taken = counts["rows"] - sum(n for k, n in counts.items() if k not in ("rows", "opted_out"))
        errors = Counter(manifest["errors"]) + Counter(taken_down=taken - counts["opted_out"])
        counts["opted_out"] = taken
        duplicates = {r: n for r, n in sorted(after.items()) if EXCLUSION_STATUS[r] == "duplicate"}
        filtered_by = dict(manifest["filtered_by"])
        most = manifest["passes"]["caption_repeats"]
        if most is not None:
            filtered_by[_repeats(most)] = after["caption_repeated"]
        more = {
            "counts": counts,
            "errors": dict(sorted(errors.items())),
            "duplicates_by": duplicates,
            "filtered_by": filtered_by,
            "list": parts,
        }
        amend_manifest(self.root, manifest, shards, name, more)
        return changed

    def _taken_down(self, index: int) -> set[int]:
        """The rows of a shard that were taken down."""
        table = storage.read_parquet(storage.join(self.root, shard_name(index) + ".parquet"), ["error"])
        return {i for i, error in enumerate(table["error"].to_pylist()) if error == "taken_down"}

    def apply_list(self, looked: removal.Looked | None = None) -> tuple[int, set[int], set[int]]:
        """Take what is listed out of the committed shards that were not looked through for it; under the lease.

        Returns how many parts of the list that was, the shards that changed, and those with listed rows, whenever these
        were taken out. Images with the bytes of one that is listed by its URL or host are listed by these bytes
        first, in a part of their own. looked: what was found before.
        """
        hits, parts = self.listed_rows(looked)
        copies = {h.sha256 for h in hits if h.sha256 is not None}
        if copies:
            known = TakenDown.read(self.run)
            new = TakenDown.of(bytes=[s for s in copies if not known.has_bytes(s)])
            if new:
                new.create(self.run)
                hits, parts = self.listed_rows(looked)
        changed = removal.take_out(self.root, (h for h in hits if h.live), parts, self.name)
        return parts, changed, {h.shard for h in hits}

    def listed_rows(self, looked: removal.Looked | None = None) -> tuple[list[removal.Hit], int]:
        """The listed rows of shards that were not looked through for them; and how many parts the list has.

        Shards of the manifest were looked through for the parts that it knows, others for none.
        """
        parts = takedown.length(self.run)
        if not parts:
            return [], 0
        try:
            dataset = Dataset.open(self.root)
            known, through = {s.index for s in dataset.shards}, int(dataset.manifest.get("list", 0))
        except StageError:
            known, through = set(), 0
        committed = listed(self.root).committed.tolist()
        hits: list[removal.Hit] = []
        for shards, after in (
            ([i for i in committed if i in known], through),
            ([i for i in committed if i not in known], 0),
        ):
            if looked is not None and looked.covers(shards, after, parts):
                these = set(shards)
                hits += [h for h in looked.hits if h.shard in these]
            elif shards and after < parts:
                wanted = TakenDown.read(self.run, after)
                hits += removal.find(self.root, with_flags(self.root, shards), wanted, len(shards), self.name)
        return hits, parts

    # ---- the table -----------------------------------------------------------------------------------------

    def _table(self) -> str:
        if self.split == "train":
            return self.config.table
        if not self.config.has_heldout:
            raise ConfigError("ingest: there is no held-out split; set heldout_table or heldout_fraction")
        return self.config.heldout_table or self.config.table

    def _kind(self) -> SourceKind:
        """What the configuration's table is: one of URLs, or images of one's own."""
        return sources.detect(self._table(), self.config.source.kind)

    def _listing(self) -> str:
        """Where images of one's own are listed."""
        other = self.split == "heldout" and self.config.heldout_table is not None
        return storage.join(self.run, "listing-heldout" if other else "listing")

    def _rows(self) -> str:
        """Where the rows are: the configuration's table, or the listing of images of one's own."""
        return self._table() if self._kind() == "table" else self._listing()

    def _wanted(self) -> Wanted:
        named = (*self.config.keep_columns, *filters.needed_columns(self.config.filters))
        if self.config.source.adopt:
            named = (*named, *ADOPTED)
        columns = tuple(dict.fromkeys(n for n in named if n.lower() not in ("url", "caption")))
        return Wanted(columns, self.config.columns, self.config.source)

    def below(self) -> tuple[str, ...]:
        """The folders below which rows may name files."""
        if self._kind() == "table":
            return self.config.source.files_below
        return (sources.folder_of(self._table()),)

    def kept(self) -> tuple[str, ...]:
        """The columns that are carried into the sidecar; of a listing the places too, which a retry asks for."""
        return self.config.keep_columns if self._kind() == "table" else (*self.config.keep_columns, LOCATION)

    def layout(self) -> Layout:
        """The table's files and the columns that are read; raises ConfigError where they do not fit the settings."""
        wanted = [*self.kept(), *filters.needed_columns(self.config.filters)]
        given = self.config.columns
        if self._kind() != "table":
            wanted, given = [*wanted, FAULT], ColumnsConfig()
            wanted += ADOPTED if self.config.source.adopt else ()
        captionless = self.config.empty_captions == "keep"
        # One walk plans both splits, by the columns of one file that was there from the beginning.
        planned = plan.first_files(RunPaths(self.run).images if self.config.heldout_fraction else self.root)
        layout = tables.read_layout(self._rows(), given, wanted, statistics.LOOKED_AT, captionless, planned)
        types = {}
        for f in self.config.filters:
            if f.column not in filters.DERIVED:
                types[f.column] = layout.schema.field(tables.resolve(layout, f.column)).type
        filters.check_types(self.config.filters, types)
        texts = [f for f in self.config.filters if f.min is not None or f.max is not None]
        texts = [f for f in texts if pa.types.is_string(types.get(f.column, pa.float64()))]
        if texts:
            names = {f.column: str(tables.resolve(layout, f.column)) for f in texts}
            filters.check_numbers(texts, types, tables.first_values(layout, names))
        kept_columns(layout, self.kept())
        return layout

    def heldout_rule(self, layout: Layout) -> HeldoutRule | None:
        """Which rows of the table are held out; None where it is all of one split."""
        c = self.config
        if not c.heldout_fraction:
            return None
        return HeldoutRule(c.heldout_fraction, self.seed, c.captions, layout.caption_lists, self._hash())

    def _hash(self) -> str:
        """The hash by which captions are held out: that of the run where it is begun, since a number keeps its rows."""
        paths = RunPaths(self.run)
        for root in (self.root, paths.images, paths.heldout):
            split = ((read_made_with(root) or {}).get("settings") or {}).get("split")
            if split or is_old(root):
                return str((split or {}).get("hash", "blake2b"))
        return HeldoutRule.hash

    def _settings(self) -> dict[str, Any]:
        """What a shard's bytes depend on. Limits of time and concurrency are not among it, nor the table's path."""
        c = self.config
        settings = c.model_dump(
            mode="json",
            by_alias=True,
            exclude={
                "table",
                "source",
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
        if c.source.adopt:
            settings["adopt"] = True
        settings |= {"quality": c.quality, "max_bytes": c.fetch.max_bytes, "caption_steps_version": captions.VERSION}
        if c.heldout_fraction:
            settings["split"] = {"part": self.split, "heldout_fraction": c.heldout_fraction, "seed": self.seed}
            if (hash := self._hash()) != "blake2b":  # which has no name, since there was no other
                settings["split"]["hash"] = hash
        return settings


def _repeats(most: int) -> str:
    """The rule of `caption_repeats`, in `filtered_by`."""
    return f"more than {most} of one caption"


def _stored(root: str, shards: Sequence[int]) -> tuple[int, int]:
    """How many of these shards are committed or begun, and how many images they hold."""
    there = listed(root)
    begun = [i for i in shards if i in set(there.committed.tolist()) | set(there.begun.tolist())]
    return len(begun), sum(int((s or {}).get("count", 0)) for _, s in read_stats_of(root, begun))
