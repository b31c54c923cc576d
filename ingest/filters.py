"""Conditions on the table's columns, judged before anything is fetched.

Every row is judged by the filters in the order they are declared; the first one it fails is the one the
funnel counts it under. Comparisons are made in float64; NaN is a missing value, and so is a similarity
outside [-1, 1]: a cosine cannot be there, but published tables have such (6016.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from ingest.config import FilterConfig
from shards.settings import ConfigError

# Derived columns: the table's columns that each needs.
DERIVED: dict[str, tuple[str, ...]] = {
    "caption_characters": (),
    "caption_words": (),
    "aspect_ratio": ("width", "height"),
    "smaller_side": ("width", "height"),
}


def needed_columns(filters: Sequence[FilterConfig]) -> list[str]:
    """The columns of the table that the filters look at, beside URL and caption."""
    names = [n for f in filters for n in DERIVED.get(f.column, (f.column,))]
    return [n for n in dict.fromkeys(names) if n.lower() not in ("url", "caption")]


def check_types(filters: Sequence[FilterConfig], types: dict[str, pa.DataType]) -> None:
    """Raise ConfigError where a filter lists values that no value of its column can equal.

    types: the type of each filter's column, by the filter's `column`; derived ones are absent.
    """
    for f in filters:
        kind = types.get(f.column, pa.float64())
        for value in (*(f.in_ or ()), *(f.not_in or ())):
            text = isinstance(value, str)
            if pa.types.is_string(kind) and isinstance(value, bool):
                raise ConfigError(
                    f"ingest.filters: '{f.column}' holds text, and YAML reads {str(value).lower()} (also written "
                    f"{'yes or on' if value else 'no or off'}) as a truth value; put it in quotes"
                )
            if pa.types.is_string(kind) != text:
                raise ConfigError(f"ingest.filters: '{f.column}' holds {kind}, so {value!r} cannot be among its values")


def check_numbers(filters: Sequence[FilterConfig], types: dict[str, pa.DataType], first: dict[str, list[Any]]) -> None:
    """Raise ConfigError where a filter compares numbers and none of the first rows' values of its column is one.

    types: as for `check_types`. first: values of the first rows, by the filter's `column`.
    """
    for f in filters:
        bounded = f.min is not None or f.max is not None
        if not bounded or not pa.types.is_string(types.get(f.column, pa.float64())):
            continue
        values = [v for v in first.get(f.column, ()) if v is not None]
        if values and not any(_number(v) is not None for v in values):
            raise ConfigError(
                f"ingest.filters: '{f.column}' holds text such as '{str(values[0])[:40]}', so min and max would drop "
                "every row; name a column of numbers, or use in, not_in or matches"
            )


def judge(
    filters: Sequence[FilterConfig], columns: dict[str, list[Any]], captions: Sequence[str]
) -> list[FilterConfig | None]:
    """The first filter that each row fails, None for rows that pass.

    columns: the values of each table column that `needed_columns` asks for, by the name it is asked by, and
    url and caption. captions: the cleaned ones.
    """
    values = [_values(f.column, columns, captions) for f in filters]
    tests = [_test(f) for f in filters]
    verdicts: list[FilterConfig | None] = []
    for row in range(len(captions)):
        verdicts.append(next((f for f, v, test in zip(filters, values, tests, strict=True) if not test(v[row])), None))
    return verdicts


def _values(column: str, columns: dict[str, list[Any]], captions: Sequence[str]) -> list[Any]:
    if column == "caption_characters":
        return [len(c) for c in captions]
    if column == "caption_words":
        return [len(c.split()) for c in captions]
    if column in ("aspect_ratio", "smaller_side"):
        sides = zip(map(_number, columns["width"]), map(_number, columns["height"]), strict=True)
        known = [(w, h) if w and h and w > 0 and h > 0 else None for w, h in sides]
        if column == "aspect_ratio":
            return [s and max(s) / min(s) for s in known]
        return [s and min(s) for s in known]
    if column.lower() == "caption":
        return list(captions)
    if "similarity" in column.lower():
        return [None if out_of_range(column, v) else v for v in columns[column]]
    return columns[column]


def out_of_range(column: str, value: Any) -> bool:
    """Whether a value cannot be what its column says: a similarity outside [-1, 1]."""
    number = _number(value) if "similarity" in column.lower() else None
    return number is not None and not -1 <= number <= 1


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def _test(f: FilterConfig) -> Callable[[Any], bool]:
    keep_missing = f.missing == "keep"
    allowed = None if f.in_ is None else frozenset(f.in_)
    refused = frozenset(f.not_in or ())
    pattern = None if f.matches is None else re.compile(f.matches)

    def test(value: Any) -> bool:
        if value is None or value != value:
            return keep_missing
        if f.min is not None or f.max is not None:
            number = _number(value)
            if number is None:
                return keep_missing
            if (f.min is not None and number < f.min) or (f.max is not None and number > f.max):
                return False
        if allowed is not None and value not in allowed:
            return False
        return value not in refused and (pattern is None or pattern.search(str(value)) is not None)

    return test
