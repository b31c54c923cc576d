"""Columns: our writer against safetensors' own reader and writer, and against damage."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from shards.columns import pack_columns, unpack_columns

DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int32, np.uint16, np.uint8, np.bool_]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
)
NAMES = st.text("abcdefg_", min_size=1, max_size=8)


@settings(max_examples=25)
@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=5), st.dictionaries(NAMES, st.text(max_size=9), max_size=3))
def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(arrays, metadata):
    ours = pack_columns(arrays, metadata)
    theirs = safetensors.numpy.save(arrays, metadata)
    for data in (ours, theirs):
        back, meta = unpack_columns(data)
        assert meta == metadata
        loaded = safetensors.numpy.load(data)
        assert back.keys() == loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert back[name].dtype == array.dtype
            np.testing.assert_array_equal(back[name], array)
            np.testing.assert_array_equal(loaded[name], array)


@settings(max_examples=25)
@given(st.dictionaries(NAMES, ARRAYS, min_size=2, max_size=5))
def test_bytes_do_not_depend_on_the_order_of_the_columns(arrays):
    turned = dict(reversed(arrays.items()))
    assert pack_columns(arrays, {"a": "1", "b": "2"}) == pack_columns(turned, {"b": "2", "a": "1"})


def test_strided_and_big_endian_arrays_keep_their_values(tmp_path):
    a = np.arange(24, dtype=">f4").reshape(4, 6)[::2, ::3]
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack_columns({"a": a}, {}))
    with safetensors.safe_open(path, "np") as f:
        np.testing.assert_array_equal(f.get_tensor("a"), a)


@pytest.mark.parametrize("keep", [0, 5, 8, 30, -1])
def test_a_truncated_file_is_an_error(keep):
    data = pack_columns({"a": np.arange(100, dtype=np.float32)}, {})
    with pytest.raises(ValueError, match=r"truncated|outside the file"):
        unpack_columns(data[:keep])
