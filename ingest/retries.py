"""Rows that are fetched again: which codes, which lines of the plan take them over, and what is still open."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ingest.errors import ERRORS, RETRYABLE
from shards import plan, storage
from shards.dataset import read_stats, read_stats_of
from shards.layout import shard_name
from shards.plan import Line
from shards.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Retry:
    """The payload of a task that fetches rows again: (older shard, codes of the rows that are taken from it)."""

    line: Line
    of: tuple[tuple[int, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Anew:
    """The payload of a task whose shard was there before, was damaged and is made anew: what it was, and the retries
    that have taken rows of it over, also by way of another retry, with the codes that these rows had here."""

    was: Line | Retry
    retries: tuple[tuple[Retry, tuple[str, ...]], ...]


def taken_from(retries: Mapping[int, Retry]) -> dict[int, dict[int, tuple[str, ...]]]:
    """By shard, the numbers of the retries that took rows of it, also by way of another, and the codes of these rows.

    retries: by number, ascending.
    """
    found: dict[int, dict[int, tuple[str, ...]]] = {}
    for number, retry in reversed(list(retries.items())):
        for shard, codes in retry.of:
            if codes:
                found.setdefault(shard, {}).update(dict.fromkeys((number, *found.get(number, ())), codes))
    return found


def codes_of_taken(root: str, index: int, keys: Sequence[str], payload: Anew) -> dict[str, str]:
    """By key, the code that a row of a shard made anew ends with, where its fate lies in a retry's shard.

    By how many had which code, which is all that is known of it.
    """
    known: dict[str, str] = {}
    for retry, here in payload.retries:
        stats = read_stats(root, retry.line.shard)
        if stats is None:  # it takes what it finds
            continue
        sidecar = storage.join(root, shard_name(retry.line.shard) + ".parquet")
        theirs = set(storage.read_parquet(sidecar, ["key"])["key"].to_pylist())
        left, codes = Counter(stats["takes_over"]), dict(retry.of)
        for shard in codes.keys() - {index}:
            errors = (read_stats(root, shard) or {}).get("errors", {})
            left -= Counter({code: errors.get(code, 0) for code in codes[shard]})
        ends = itertools.chain(left.elements() if index in codes else (), itertools.cycle(here))
        known |= {key: next(ends) for key in keys if key in theirs and key not in known}
    return known


class Taken:
    """Which rows have been taken over by the lines so far: by shard, the codes."""

    def __init__(self) -> None:
        self._codes: dict[int, frozenset[str]] = {}

    def open_codes(self, line: Line) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """What a line takes that no earlier one took: (shard, codes). The lines come in the order of their numbers."""
        found = []
        for shard in line.takes_over:
            found.append((shard, tuple(sorted(self.left(shard, line.codes)))))
            self._codes[shard] = self._codes.get(shard, frozenset()) | frozenset(line.codes)
        return tuple(found)

    def left(self, shard: int, codes: Iterable[str]) -> frozenset[str]:
        """Which of these codes nothing has taken of a shard yet."""
        return frozenset(codes) - self._codes.get(shard, frozenset())


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


def retry_lines(root: str, known: plan.Plan, codes: frozenset[str], full: int) -> tuple[list[Line], int]:
    """Lines for the rows with these codes that no line has taken over yet, at most `full` rows each; and how many rows.

    A line takes all such rows of some shards that follow each other, so what is open is told by the stats alone.
    """
    taken = Taken()
    for line in known.retries():
        taken.open_codes(line)
    number, total = known.next_number, 0
    lines: list[Line] = []
    shards: list[int] = []
    rows = 0

    def close() -> None:
        nonlocal shards, rows
        if shards:
            lines.append(Line(number + len(lines), "", 0, 0, rows, bytes(16), "", tuple(shards), tuple(sorted(codes))))
        shards, rows = [], 0

    for index, stats in read_stats_of(root, known.shards.tolist()):
        errors = (stats or {}).get("errors", {})
        count = sum(errors.get(c, 0) for c in taken.left(index, codes))
        if not count:
            continue
        if rows + count > full:
            close()
        shards.append(index)
        rows, total = rows + count, total + count
    close()
    return lines, total
