"""Shards that are changed after they were made: failed rows fetched again, samples taken down.

Nothing is changed in place. The new shard is committed beside the old one and then put in its place
(shards/dataset.py: put_in_place), so whatever is killed, either the old shard stands or the new one does.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from shards.inventory import read_stats_of

from ingest import statistics
from ingest.errors import ERRORS, RETRYABLE
from ingest.packing import Sidecar, read_back
from ingest.stage import PENDING, VERSION, IngestStage, make_crew
from ingest.takedown import TakenDown
from ingest.work import Outcome
from shards import storage
from shards.dataset import MANIFEST, Dataset, files_digest, put_in_place, read_stats, stage_replacement, staging
from shards.fingerprint import Fingerprint
from shards.layout import shard_name
from shards.settings import ConfigError, StageError
from shards.stage import Task

log = logging.getLogger("carrara.ingest")


def codes_to_retry(text: str) -> frozenset[str]:
    """`transient`, or codes of ERRORS with commas between; raises ConfigError."""
    if text == "transient":
        return RETRYABLE
    codes = frozenset(c.strip() for c in text.split(","))
    for code in sorted(codes):
        if code not in ERRORS or not ERRORS[code].status.startswith("failed"):
            known = ", ".join(c for c, e in ERRORS.items() if e.status.startswith("failed"))
            raise ConfigError(f"--retry '{code}': write transient, or some of {known}")
    return codes


@dataclasses.dataclass(frozen=True)
class RetryStage:
    """Implements shards.stage.Stage over the finished shards that hold rows with one of `codes`.

    Its own output is the staging folder of those shards; `finish` puts it in place. The rows and captions
    are the sidecar's, so the table is not read.
    """

    ingest: IngestStage
    codes: frozenset[str] = RETRYABLE

    unit = "images"

    @property
    def name(self) -> str:
        """The ingest's own name: the two must not run at one time."""
        return self.ingest.name

    @property
    def root(self) -> str:
        """Where the new shards wait."""
        return staging(self.ingest.root)

    def prepare(self) -> None:
        """End an exchange of shards that was killed; raises ConfigError where the ingest itself is not finished."""
        finish_rewriting(self.ingest)
        self._indices()

    def tasks(self) -> Iterator[Task]:
        """One task a shard with such rows."""
        settings = self.ingest._settings()
        for stats in self._all(self._indices()):
            if not any(stats["errors"].get(code) for code in self.codes):
                continue
            made = Fingerprint("ingest", VERSION, settings, stats["fingerprint"].get("input"))
            changes = made.differs(stats["fingerprint"])
            if changes:
                raise StageError(
                    f"{self.ingest.root}: shard {shard_name(stats['shard'])} was made with other settings "
                    f"({'; '.join(changes)}); put the settings back, or run ingest with --redo"
                )
            inputs = {"replaces": files_digest(stats), "codes": sorted(self.codes)}
            yield Task(stats["shard"], Fingerprint("ingest-retry", VERSION, settings, inputs))

    def worker(self) -> Callable[[Task], dict[str, Any]]:
        """Built once a process; makes one shard a call."""
        return _RetryWorker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Put the new shards in place, look for duplicates anew, write the manifest."""
        made = list(stats)
        name = f"{self.ingest.name}: --retry"
        if not made:
            log.info("%s: no row ended with %s; nothing to do", name, " or ".join(sorted(self.codes)))
            return Dataset.open(self.ingest.root).manifest
        old = committed_stats(self.ingest.root, [s["shard"] for s in made])
        before, after = (sum(s["errors"].get(c, 0) for s in part for c in self.codes) for part in (old, made))
        gained = sum(s["count"] for s in made) - sum(s["count"] for s in old)
        log.info("%s: %d rows in %d shards, %d more pictures, %d fail still", name, before, len(made), gained, after)
        begin_rewriting(self.ingest)
        manifest = finish_rewriting(self.ingest)
        assert manifest is not None
        return manifest

    def _indices(self) -> list[int]:
        try:
            return [s.index for s in Dataset.open(self.ingest.root).shards]
        except StageError:
            raise ConfigError(
                f"{self.ingest.root}: there is no finished dataset to try again; run ingest without --retry first"
            ) from None

    def _all(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        return committed_stats(self.ingest.root, indices)


class _RetryWorker:
    """The connections of a process, and the making of one shard with them."""

    def __init__(self, stage: RetryStage) -> None:
        self.stage = stage
        self.taken_down = TakenDown.read(stage.ingest.run)
        self.crew = make_crew(stage.ingest.config, self.taken_down)

    def __call__(self, task: Task) -> dict[str, Any]:
        """Fetch the failed rows again, and stage the shard with what came of it."""
        began = time.time()
        root = self.stage.ingest.root
        stats = read_stats(root, task.index)
        if stats is None or files_digest(stats) != task.fingerprint.input["replaces"]:
            raise StageError(f"{root}: shard {shard_name(task.index)} changed meanwhile; run the same command again")
        sidecar, outcomes = read_back(root, task.index)
        urls = sidecar.columns["url"]
        todo = {i: urls[i] or "" for i, o in enumerate(outcomes) if o.error in self.stage.codes}
        gone = [i for i, url in todo.items() if self.taken_down.has_url(url)]
        for i in gone:
            outcomes[i] = Outcome.of("taken_down")
            del todo[i]
        for i, outcome in self.crew.fetch_all(todo).items():
            outcomes[i] = outcome
        return _stage(root, task.index, sidecar, outcomes, stats, began, task.fingerprint)

    def close(self) -> None:
        """Close connections and threads."""
        self.crew.close()


def begin_rewriting(ingest: IngestStage) -> None:
    """Note which shards the finished dataset consists of, since its manifest goes when the first one changes."""
    indices = [s.index for s in Dataset.open(ingest.root).shards]
    storage.write_json(storage.join(staging(ingest.root), PENDING), indices)


def finish_rewriting(ingest: IngestStage) -> dict[str, Any] | None:
    """Put what waits in place and write the manifest; None where nothing was begun. After a kill, it goes on."""
    indices = storage.read_json(storage.join(staging(ingest.root), PENDING))
    if indices is None:
        return None
    put_in_place(ingest.root)
    return ingest.conclude(committed_stats(ingest.root, indices))


def take_down(ingest: IngestStage, listed: TakenDown) -> tuple[list[int], list[str]]:
    """Take what is listed out of a dataset's shards; returns the shards rewritten and the keys gone.

    Only shards that hold such samples are rewritten. Works on an unfinished dataset too, whose manifest
    the ingest writes when it is finished.
    """
    root = ingest.root
    put_in_place(root)
    if storage.exists(storage.join(root, MANIFEST)):
        begin_rewriting(ingest)
    rewritten, keys = [], []
    for index in committed_indices(root):
        began = time.time()
        found = matches(root, index, listed)
        if not found:
            continue
        stats = read_stats(root, index)
        assert stats is not None
        sidecar, outcomes = read_back(root, index)
        for i in found:
            if outcomes[i].picture is not None:
                keys.append(sidecar.columns["key"][i])
            # As an ingest with this list would have it: what is known by its URL is never fetched.
            by_url = listed.has_url(sidecar.columns["url"][i] or "")
            outcomes[i] = Outcome.of("taken_down", sha256=None if by_url else outcomes[i].sha256)
        inputs = {"replaces": files_digest(stats), "rows": found}
        _stage(root, index, sidecar, outcomes, stats, began, Fingerprint("take-down", VERSION, {}, inputs))
        put_in_place(root)
        rewritten.append(index)
    if rewritten:
        finish_rewriting(ingest)
    return rewritten, keys


def matches(root: str, index: int, listed: TakenDown) -> list[int]:
    """The rows of a shard that are on the list and not yet marked so."""
    table = Dataset(root, {"kind": "images", "fingerprint": "", "shards": []}).sidecar(index)
    urls, digests, errors = (table[n].to_pylist() for n in ("url", "sha256", "error"))
    return [
        i
        for i, (url, digest, error) in enumerate(zip(urls, digests, errors, strict=True))
        if error != "taken_down" and (listed.has_bytes(digest) or listed.has_url(url or ""))
    ]


def committed_indices(root: str) -> list[int]:
    """The numbers of the shards that are committed in a folder, in order."""
    names = storage.list_names(root)
    return sorted(int(n.removesuffix("_stats.json")) for n in names if n.removesuffix("_stats.json").isdigit())


def committed_stats(root: str, indices: Iterable[int]) -> list[dict[str, Any]]:
    """The stats of these shards; raises StageError where one is not committed."""
    found = []
    for index, stats in read_stats_of(root, indices):
        if stats is None:
            raise StageError(f"{root}: shard {shard_name(index)} is not committed; run ingest again")
        found.append(stats)
    return found


def _stage(
    root: str,
    index: int,
    sidecar: Sidecar,
    outcomes: Sequence[Outcome],
    replaced: dict[str, Any],
    began: float,
    work: Fingerprint,
) -> dict[str, Any]:
    stats = statistics.of_shard(outcomes, sidecar.columns["url"], began, replaced)
    becomes = replaced["fingerprint"]
    return stage_replacement(root, index, sidecar.pack(outcomes), stats, replaced, becomes, work)
