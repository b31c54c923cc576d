"""Names: keys against img2dataset's own function, fingerprints against their purpose."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from img2dataset.downloader import compute_key

from shards.fingerprint import Fingerprint, digest_json
from shards.layout import RunPaths, sample_key, shard_name


@given(st.integers(0, 99_999), st.integers(2, 100_000), st.data())
def test_keys_are_those_of_img2dataset(shard, per_shard, data):
    row = data.draw(st.integers(0, per_shard - 1))
    import math

    digits = math.ceil(math.log10(per_shard))
    assert sample_key(shard, row, per_shard) == compute_key(row, shard, digits, 5)


@given(st.sampled_from([10, 100, 1000]), st.sets(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=2))
def test_keys_are_distinct_and_sorted_as_their_samples(per_shard, places):
    keys = [sample_key(s, r, per_shard) for s, r in sorted(places)]
    assert keys == sorted(set(keys))


def test_a_row_outside_its_shard_is_refused():
    with pytest.raises(ValueError, match="not within"):
        sample_key(0, 10, 10)


def test_paths_join_folders_and_urls():
    assert RunPaths("runs/demo/").images == "runs/demo/images"
    assert RunPaths("s3://bucket/run").latents == "s3://bucket/run/latents"
    assert shard_name(7) == "00007"


def test_fingerprint_says_what_changed_and_ignores_key_order():
    a = Fingerprint("s", 1, {"x": 1, "y": {"z": [1, 2]}}, input="i", weights={"vae": "aa"})
    b = Fingerprint("s", 1, {"y": {"z": [1, 2]}, "x": 1}, input="i", weights={"vae": "aa"})
    assert a.digest == b.digest
    assert not a.differs(b.to_json())
    c = Fingerprint("s", 2, {"x": 1, "y": {"z": [1, 3]}}, input="i", weights={"vae": "bb"})
    assert c.differs(a.to_json()) == ["settings.y.z: [1, 2] -> [1, 3]", "version: 1 -> 2", "weights.vae: aa -> bb"]
    assert digest_json({"b": 1, "a": 2}) == digest_json({"a": 2, "b": 1})
