"""Stored moments and per-channel statistics against float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latents.moments import (
    LOGSTD_MIN,
    LOGSTD_STEP,
    ChannelStats,
    dequantise_logstd,
    finite_rows,
    quantise_logstd,
    to_half,
)


@given(st.lists(st.floats(-15, 10), min_size=1, max_size=50))
def test_logstd_is_kept_within_half_a_step(values):
    x = np.array(values, np.float64)
    back = dequantise_logstd(quantise_logstd(x)).astype(np.float64)
    assert np.abs(back - x).max() <= LOGSTD_STEP / 2 + 1e-6
    # The std itself, which is what noise is multiplied by.
    assert np.abs(np.exp(back - x) - 1).max() <= 0.051


@given(st.floats(-1e6, 1e6))
def test_logstd_beyond_the_grid_goes_to_its_end(value):
    back = dequantise_logstd(quantise_logstd(np.array([value])))[0]
    assert back == pytest.approx(np.clip(value, LOGSTD_MIN, LOGSTD_MIN + 255 * LOGSTD_STEP), abs=LOGSTD_STEP / 2 + 1e-6)


def test_every_code_comes_back_as_itself():
    codes = np.arange(256, dtype=np.uint8)
    assert (quantise_logstd(dequantise_logstd(codes)) == codes).all()
    assert dequantise_logstd(codes)[[0, 255]].tolist() == [-15.0, 10.0]  # diffusers' clamp of the log-variance, halved


def test_half_overflow_is_found():
    x = np.zeros((3, 2, 2, 2), np.float32)
    x[1, 0, 0, 0], x[2, 1, 1, 1] = 70000.0, np.nan
    assert finite_rows(to_half(x)).tolist() == [True, False, False]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_statistics_of_parts_merge_to_those_of_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    # Far from zero, where sums of squares would lose their digits.
    parts = [(rng.standard_normal((n, 2, 2, 2)) * [[[3.0]], [[0.1]]] + 40).astype(np.float16) for n in sizes]
    logstds = [rng.uniform(-5, 1, p.shape).astype(np.float32) for p in parts]
    total = ChannelStats.of(parts[0][:0])
    for part, logstd in zip(parts, logstds, strict=True):
        total = total.merge(ChannelStats.of(part, logstd))
    whole = np.concatenate(parts).astype(np.float64)
    if len(whole) == 0:
        assert total.to_json() is None
        return
    found = total.summary()
    assert found["count"] == len(whole) * 4
    np.testing.assert_allclose(found["mean"], whole.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found["std"], whole.std(axis=(0, 2, 3)), rtol=1e-9, atol=1e-12)
    variance = np.exp(2 * np.concatenate(logstds).astype(np.float64)).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found["sample_std"], np.sqrt(whole.var(axis=(0, 2, 3)) + variance), rtol=1e-9)
    assert found["min"] == whole.min(axis=(0, 2, 3)).tolist()
    assert found["max"] == whole.max(axis=(0, 2, 3)).tolist()
    again = ChannelStats.from_json(json.loads(json.dumps(total.to_json())))
    assert again.to_json() == total.to_json()
