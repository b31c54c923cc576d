"""train.select: samples that do not pass give their places to those that do, recorded and the same on any ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.columns import pack_columns
from shards.commit import Folder
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.settings import ConfigError
from shards.sketch import merge, sketch
from tests.train import tiny
from train import segments
from train.config import TrainConfig
from train.data import Latents, batch_slots
from train.segments import History

COUNTS = (40, 60, 30)


def write_scores(run: Path, values: dict[int, np.ndarray], name: str = "quality") -> None:
    """A score of one column, a row for each row of the latents' shards."""
    root = str(run / "scores" / name)
    folder, stats, sketches = Folder.begin(root, Fingerprint("score", 1, {}), ".safetensors"), [], []
    for index, column in values.items():
        sink = io.BytesIO()
        pq.write_table(
            pa.table({"key": [str(i) for i in range(len(column))], "value": column.astype(np.float32)}), sink
        )
        files = {".safetensors": pack_columns({"row": np.arange(len(column))}, {}), ".parquet": sink.getvalue()}
        stats.append(folder.commit(index, files, {"rows": len(column), "count": len(column)}))
        sketches.append(sketch(column))
    write_manifest(root, "scores", stats, {"columns": {"value": {"sketch": merge(sketches)}}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny.make_latents(tmp_path / "latents", COUNTS, text="tokens")
    rng = np.random.default_rng(5)
    write_scores(tmp_path, {i: rng.permutation(n) / n for i, n in enumerate(COUNTS)})
    return tmp_path


def config(**more: Any) -> TrainConfig:
    rules = [{"column": "quality.value", "min": 0.5}]
    return TrainConfig.model_validate(
        {"images": 10**6, "batch_size": 8, "streams": 4, "window": 12, "select": rules, **more}
    )


def passing(run: Path, least: float = 0.5) -> set[str]:
    dataset = Dataset.open(str(run / "latents"))
    found = set()
    for info in dataset.shards:
        values = pq.read_table(run / "scores" / "quality" / f"{info.name}.parquet")["value"].to_numpy()
        keys = dataset.sidecar(info.index)["key"].to_pylist()
        found |= {k for k, v in zip(keys, values, strict=True) if v >= least}
    return found


def test_only_what_passes_is_trained_on_and_all_of_it(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    latents = Latents(config(), [dataset], 0)
    keys = latents.keys(np.arange(2 * sum(COUNTS)))
    assert set(keys) == passing(run)
    assert len(passing(run)) == sum(COUNTS) // 2
    everything = Latents(config(select=()), [dataset], 0).keys(np.arange(sum(COUNTS)))
    assert len(set(everything)) == sum(COUNTS)
    # A sample that passes comes at its own place too.
    own = [i for i, k in enumerate(everything) if k in passing(run)]
    assert [keys[i] for i in own] == [everything[i] for i in own]


def test_any_number_of_ranks_sees_the_same(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    whole = Latents(config(), [dataset], 0).keys(np.arange(80))
    for world in (2, 4):
        parts: dict[int, str] = {}
        for rank in range(world):
            latents = Latents(config(), [dataset], 0)
            for begin in range(0, 80, 8):
                positions = begin + batch_slots(8, rank, world, 0, 1)
                parts |= dict(zip(positions.tolist(), latents.keys(positions), strict=True))
        assert [parts[i] for i in range(80)] == whole


def test_the_thresholds_are_recorded_and_stay_while_the_score_grows(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    quantile = config(select=[{"column": "quality.value", "min_quantile": 0.5}])
    begun = segments.begin(quantile, [dataset])
    assert begun.segments[0].select[0][0]["low"] == pytest.approx(0.5, abs=0.02)
    stored = json.loads(json.dumps(begun.to_json()))
    assert History.from_json(stored) == begun
    before = Latents(quantile, [dataset], 0, begun).keys(np.arange(64))
    rng = np.random.default_rng(5)
    values = {i: rng.permutation(n) / n for i, n in enumerate(COUNTS)}
    import shutil

    shutil.rmtree(run / "scores")
    write_scores(run, {**values, 9: np.full(500, 0.9)})
    taken = segments.resume(stored, 64, 8, quantile, [dataset])
    assert taken.history == begun
    assert Latents(quantile, [dataset], 0, taken.history).keys(np.arange(64)) == before
    other = segments.resume(stored, 64, 8, config(), [dataset], changes=("train.select: ...",)).history
    assert [s.images for s in other.segments] == [0, 64]
    assert other.segments[1].select[0][0]["min"] == 0.5


def test_a_score_that_is_not_there_is_one_sentence(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    with pytest.raises(ConfigError, match="there is no finished score 'beauty'"):
        segments.begin(config(select=[{"column": "beauty.value", "min": 1}]), [dataset])
