"""The exclusions file: what was written comes back by shard, in bounded memory, and old files stay readable."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import exclusions
from shards.dataset import Dataset
from shards.exclusions import GROUP, SCHEMA, Exclusions, sample_id, shard_row, write_exclusions
from shards.settings import StageError
from tests.objects import bucket


def lines(samples: list[tuple[int, int]]) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array([s for s, _ in samples], pa.int32()),
            "row": pa.array([r for _, r in samples], pa.int32()),
            "reason": ["duplicate_url" if r % 2 else "duplicate_bytes" for _, r in samples],
            "winner": pa.array([sample_id(0, r) for _, r in samples], pa.int64()),
        }
    )


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 40))), st.integers(1, 9), st.integers(1, 50))
def test_every_shard_gets_its_rows_whatever_the_pieces(tmp_path_factory, samples, group, piece):
    root, ordered = str(tmp_path_factory.mktemp("x")), sorted(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exclusions, "GROUP", group)
        name = write_exclusions(root, (lines(ordered[i : i + piece]) for i in range(0, len(ordered), piece)))
    assert (name is None) == (not samples)
    read = Exclusions(root, name)
    assert len(read) == len(samples)
    for shard in range(14):
        mine = [r for s, r in ordered if s == shard]
        assert read.rows(shard).tolist() == mine
        assert read.rows(shard).dtype == np.int64
        assert read.reasons(shard) == {r: "duplicate_url" if r % 2 else "duplicate_bytes" for r in mine}
        assert [shard_row(w) for w in read.of(shard)["winner"].to_pylist()] == [(0, r) for r in mine]
    assert read.counts() == {s: sum(a == s for a, _ in samples) for s in {a for a, _ in samples}}
    assert [len(t) for t in read.tables()] == [min(group, len(samples) - i) for i in range(0, len(samples), group)]


def test_the_same_rows_give_the_same_name_and_others_another(tmp_path):
    names = {write_exclusions(str(tmp_path), [lines(p)]) for p in ([(0, 1)], [(0, 1)], [(0, 2)])}
    assert len(names) == 2
    assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.parametrize("samples", [[(1, 0), (0, 0)], [(0, 5), (0, 4)], [(0, 1), (0, 1)]])
def test_another_order_is_refused_within_a_piece_and_across(tmp_path, samples):
    for pieces in ([samples], [[p] for p in samples]):
        with pytest.raises(ValueError, match="in the order of shard and row"):
            write_exclusions(str(tmp_path), (lines(p) for p in pieces))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_reads_the_row_groups_of_its_shard_alone(tmp_path, monkeypatch):
    rows = [(s, r) for s in range(40) for r in range(10)]
    monkeypatch.setattr(exclusions, "GROUP", 64)
    read = Exclusions(str(tmp_path), write_exclusions(str(tmp_path), [lines(rows)]))
    read.rows(0)
    asked: list[list[int]] = []
    real = read._parquet

    class Watched:
        metadata = real.metadata

        def read_row_groups(self, groups, **more):
            asked.append(groups)
            return real.read_row_groups(groups, **more)

    read._parquet = Watched()
    for shard in (20, 20, 6, 39):
        assert read.rows(shard).tolist() == list(range(10))
    assert asked == [[3], [0, 1], [6]]


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(StageError, match="the list of what is excluded is missing"):
        Exclusions(str(tmp_path), "exclusions-0.parquet").rows(0)
    (tmp_path / "exclusions-0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(StageError, match="cannot be read"):
        Exclusions(str(tmp_path), "exclusions-0.parquet").rows(0)
    assert Exclusions(str(tmp_path), None).rows(0).tolist() == []


def test_it_travels_to_a_worker_and_reads_from_an_object_store():
    with bucket() as url:
        root = f"{url}/run/images"
        name = write_exclusions(root, [lines([(3, 1), (3, 7), (9, 2)])])
        assert write_exclusions(root, [lines([(3, 1), (3, 7), (9, 2)])]) == name
        read = Exclusions(root, name)
        assert read.rows(3).tolist() == [1, 7]
        assert pickle.loads(pickle.dumps(read)).rows(9).tolist() == [2]


def test_a_dataset_of_format_1_is_read(tmp_path):
    old = pa.table(
        {"key": ["b", "a"], "shard": [4, 2], "row": [1, 3], "reason": ["duplicate_url"] * 2, "winner": ["x", "y"]}
    )
    pq.write_table(old, tmp_path / "exclusions.parquet")
    shard = {"index": 2, "rows": 9, "count": 8, "digest": "d" * 32}
    dataset = Dataset(str(tmp_path), {"kind": "images", "format_version": 1, "fingerprint": "f", "shards": [shard]})
    assert dataset.excluded_rows(2).tolist() == [3]
    assert dataset.excluded_rows(3).tolist() == []
    assert dataset.exclusions.reasons(4) == {1: "duplicate_url"}
    assert dataset.shards[0].born == "d" * 32
    without = Dataset(str(tmp_path / "no"), {"kind": "images", "format_version": 1, "fingerprint": "f", "shards": []})
    assert without.excluded_rows(2).tolist() == []


MEASURED = """
import gc, sys
import numpy as np
from shards.exclusions import Exclusions, write_exclusions, SCHEMA
import pyarrow as pa
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
small = Exclusions(sys.argv[1], sys.argv[2])
small.rows(0)  # what is loaded once for all
gc.collect()
base = peak()
large = Exclusions(sys.argv[1], sys.argv[3])
for shard in [5, 1_999, 1_000, *range(300)]:
    assert len(large.rows(shard)) == 1000
print(peak() - base)
"""


def test_a_readers_memory_is_bounded(tmp_path):
    """2 million rows out here; benchmarks/scale.py has 200 million."""

    def pieces():
        for shard in range(2000):
            rows = np.arange(shard % 10, 10_000, 10)
            yield pa.table(
                {
                    "shard": pa.array(np.full(1000, shard), pa.int32()),
                    "row": pa.array(rows, pa.int32()),
                    "reason": pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int8)), pa.array(["x"])),
                    "winner": pa.array(np.full(1000, -1), pa.int64()),
                },
                SCHEMA,
            )

    small, large = write_exclusions(str(tmp_path), [lines([(0, 1)])]), write_exclusions(str(tmp_path), pieces())
    assert pq.ParquetFile(tmp_path / str(large)).metadata.num_row_groups == -(-2_000_000 // GROUP)
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(small), str(large)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 50
