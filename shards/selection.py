"""Which samples of image shards pass declared rules on their scores: selection, not deletion.

    rules = [Rule(column="clip.similarity", min_quantile=0.3), Rule(column="text.language", among=["en"])]
    selection = Selection(run, rules)
    selection.passes(7, rows)      # bool [len(rows)] for rows of shard 00007

A rule names a score and its column. Quantiles are of the whole finished score, from the histograms in its manifest
(bins at most 1/128 of the value wide), so that a rule means one threshold for all shards. A sample without a value
of a column passes no rule on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_json
from shards.layout import shard_name
from shards.settings import ConfigError, StageError, Strict
from shards.sketch import quantile


class Rule(Strict):
    """A condition on one column of one score. Bounds are inclusive."""

    column: str = Field(description="SCORE.COLUMN, for example clip.similarity", pattern=r"^[a-z][a-z0-9_]*\.\w+$")
    min: float | None = None
    max: float | None = None
    min_quantile: float | None = Field(default=None, ge=0, le=1, description="0.3 leaves out the lowest 30 %")
    max_quantile: float | None = Field(default=None, ge=0, le=1)
    among: list[str] | None = Field(default=None, description="of a text column: the values that pass")
    but_not: list[str] | None = Field(default=None, description="of a text column: the values that do not")

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        bounds = (self.min, self.max, self.min_quantile, self.max_quantile)
        texts = (self.among, self.but_not)
        if all(b is None for b in (*bounds, *texts)):
            raise ValueError(f"the rule on {self.column} has no bound")
        if any(b is not None for b in bounds) and any(t is not None for t in texts):
            raise ValueError(f"the rule on {self.column} has bounds for numbers and lists of texts")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the rule on {self.column}: min is above max, so nothing passes")
        return self

    @property
    def label(self) -> str:
        """The rule in a few words, for a funnel."""
        parts = [f">= {self.min:g}" if self.min is not None else "", f"<= {self.max:g}" if self.max is not None else ""]
        if self.min_quantile is not None:
            parts.append(f"above the lowest {self.min_quantile:.3g}")
        if self.max_quantile is not None:
            parts.append(f"below the highest {1 - self.max_quantile:.3g}")
        parts += [f"in {', '.join(self.among)}" if self.among else "", f"not {', '.join(self.but_not or ())}"]
        return f"{self.column} " + " and ".join(p for p in parts if p and p != "not ")


@dataclasses.dataclass(frozen=True)
class Bound:
    """A rule whose quantiles are thresholds now. low, high: inclusive, infinite where there is none."""

    rule: Rule
    low: float
    high: float

    def passes(self, values: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """bool [N] for the values of the rule's column; a null passes nothing."""
        there = np.asarray(values.is_valid())
        if self.rule.among is not None or self.rule.but_not is not None:
            texts = values.to_pylist()
            kept = np.array([t is not None for t in texts], bool)
            if self.rule.among is not None:
                kept &= np.isin(np.array(texts, object).astype(str), self.rule.among)
            if self.rule.but_not is not None:
                kept &= ~np.isin(np.array(texts, object).astype(str), self.rule.but_not)
            return kept
        numbers = values.fill_null(np.nan).to_numpy(zero_copy_only=False).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return there & (numbers >= self.low) & (numbers <= self.high)


class Selection:
    """The rules of one run, with thresholds; opens the scores that they name.

    recorded: what `settings` were when they were first used: with the same rules these thresholds stay, so that a
    score that grows moves no quantile under what is made already. Raises ConfigError where a score or column is not
    there, or a rule is of the wrong kind for its column.
    """

    def __init__(self, run: str, rules: Sequence[Rule], recorded: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._scores: dict[str, Dataset] = {}
        self.bounds = []
        for rule in rules:
            score, _, column = rule.column.partition(".")
            root = storage.join(run, "scores", score)
            if score not in self._scores:
                try:
                    self._scores[score] = Dataset.open(root)
                except StageError:
                    raise ConfigError(
                        f"select: there is no finished score '{score}' in {root}; name it under curate.scores and run "
                        "'carrara score'"
                    ) from None
            columns = self._scores[score].manifest["columns"]
            if column not in columns:
                raise ConfigError(f"select: the score '{score}' has no column '{column}'; it has {', '.join(columns)}")
            text = "values" in columns[column]
            if text != (rule.among is not None or rule.but_not is not None):
                raise ConfigError(
                    f"select: {rule.column} holds {'text; give among or but_not' if text else 'numbers; give bounds'}"
                )
            self.bounds.append(_bound(rule, columns[column].get("sketch", {})))
        kept = [{k: v for k, v in r.items() if k not in ("low", "high")} for r in recorded or ()]
        if kept == [r.model_dump(mode="json") for r in rules]:
            ends = [(r["low"], r["high"]) for r in recorded or ()]
            self.bounds = [
                Bound(b.rule, -np.inf if low is None else low, np.inf if high is None else high)
                for b, (low, high) in zip(self.bounds, ends, strict=True)
            ]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What the selection is, with its thresholds, for fingerprints."""
        return [{**b.rule.model_dump(mode="json"), "low": _plain(b.low), "high": _plain(b.high)} for b in self.bounds]

    @property
    def digest(self) -> str:
        """32 hex digits over the settings."""
        return digest_json(self.settings)[:32]

    def passes(self, index: int, rows: np.ndarray, first: int | None = None) -> np.ndarray:
        """Whether these sidecar rows (int64) of image shard number `index` pass all rules, or the `first` ones.

        Raises StageError where a score lacks the shard.
        """
        kept = np.ones(len(rows), bool)
        for found, _ in self.by_rule(index, rows, first):
            kept &= found
        return kept

    def by_rule(
        self, index: int, rows: np.ndarray, first: int | None = None
    ) -> Iterator[tuple[np.ndarray, pa.ChunkedArray]]:
        """Of each rule which of these rows pass it, whatever the others say, and the shard's values of its column."""
        for bound in self.bounds[:first]:
            score, _, column = bound.rule.column.partition(".")
            url = storage.join(self._scores[score].root, shard_name(index) + ".parquet")
            try:
                values = storage.read_parquet(url, [column])[column]
            except FileNotFoundError:
                raise StageError(
                    f"{url} is not there: the score '{score}' was made before this shard; run 'carrara score' again"
                ) from None
            yield bound.passes(values)[rows], values


def _bound(rule: Rule, histogram: dict[str, int]) -> Bound:
    low = -np.inf if rule.min is None else rule.min
    high = np.inf if rule.max is None else rule.max
    if rule.min_quantile is not None:
        low = max(low, quantile(histogram, rule.min_quantile))
    if rule.max_quantile is not None:
        high = min(high, quantile(histogram, rule.max_quantile))
    return Bound(rule, float(low), float(high))


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None
