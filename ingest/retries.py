"""Rows that are fetched again: which codes, which lines of the plan take them over, and what is still open."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ingest.errors import ERRORS, RETRYABLE
from shards import plan
from shards.dataset import read_stats_of
from shards.plan import Line
from shards.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Retry:
    """The payload of a task that fetches rows again: (older shard, codes of the rows that are taken from it)."""

    line: Line
    of: tuple[tuple[int, tuple[str, ...]], ...]


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
