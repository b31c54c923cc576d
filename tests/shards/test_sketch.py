"""Histograms that merge exactly: quantiles against numpy's, over values of every range."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from shards.sketch import edges, merge, quantile, sketch

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
VALUES = hnp.arrays(np.float32, st.integers(1, 300), elements=FLOATS)


@given(VALUES, st.integers(0, 300))
def test_parts_add_up_to_the_whole_in_any_order(values, cut):
    parts = [sketch(values[:cut]), sketch(values[cut:])]
    assert merge(parts) == merge(parts[::-1]) == merge([sketch(values)])


@given(VALUES, st.floats(0, 1))
def test_quantiles_are_numpys_to_the_width_of_a_bin(values, q):
    found = quantile(sketch(values), q)
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert found == pytest.approx(exact, rel=1 / 128, abs=1e-37)


@given(VALUES)
def test_every_value_lies_within_its_bin(values):
    for value in values:
        (low,), (high,), (count,) = edges(sketch(np.array([value])))
        assert low <= value <= high
        assert count == 1


def test_what_is_not_finite_is_left_out():
    assert sum(sketch(np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)).values()) == 1
    assert np.isnan(quantile({}, 0.5))
    assert sketch(np.array([-0.0, 0.0], np.float32)) == sketch(np.array([0.0, 0.0], np.float32))
