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
from train.data import batch_slots
from train.latent_samples import Latents
from train.seen import Account
from train.segments import History
from train.validation import Chosen

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


def levels(*weights: float) -> list[dict[str, Any]]:
    """The run's latents named once a level of the score, each with a weight."""
    ends = np.linspace(0, 1, len(weights) + 1)
    return [
        {"weight": w, "select": [{"column": "quality.value", "min": float(a), "max": float(b) - 1e-6}]}
        for w, a, b in zip(weights, ends[:-1], ends[1:], strict=True)
    ]


def test_sampling_weights_by_a_column_are_met_in_every_batch_and_on_any_ranks(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    sources = levels(1, 2, 5)
    weighted = config(select=(), sources=sources)
    datasets = [dataset] * 3
    high, middle = passing(run, 2 / 3), passing(run, 1 / 3)

    def level(key: str) -> int:
        return 2 if key in high else 1 if key in middle else 0

    latents = Latents(weighted, datasets, 0)
    keys = latents.keys(np.arange(1600))
    for begin in range(0, 1600, 8):
        found = np.bincount([level(k) for k in keys[begin : begin + 8]], minlength=3)
        assert np.abs(found - [1, 2, 5]).max() <= 1
    assert np.bincount([level(k) for k in keys]).tolist() == [200, 400, 1000]
    for n, some in enumerate((passing(run, 0) - middle, middle - high, high)):
        assert {k for k in keys if level(k) == n} == some
    parts: dict[int, str] = {}
    for rank in range(4):
        one = Latents(weighted, datasets, 0)
        for begin in range(0, 160, 8):
            positions = begin + batch_slots(8, rank, 4, 0, 1)
            parts |= dict(zip(positions.tolist(), one.keys(positions), strict=True))
    assert [parts[i] for i in range(160)] == keys[:160]


def test_weights_are_recorded_and_go_on_after_a_resume(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    weighted, datasets = config(select=(), sources=levels(1, 3)), [dataset, dataset]
    begun = segments.begin(weighted, datasets)
    stored = json.loads(json.dumps(begun.to_json()))
    assert [len(rules) for rules in stored["segments"][0]["select"]] == [1, 1]
    whole = Latents(weighted, datasets, 0, begun).keys(np.arange(200))
    taken = segments.resume(stored, 96, 12, weighted, datasets)
    assert taken.history == begun
    assert Latents(weighted, datasets, 0, taken.history).keys(np.arange(96, 200)) == whole[96:]
    # Other weights are a segment of their own, and what came before it stays.
    other = config(select=(), sources=levels(1, 1))
    later = segments.resume(stored, 96, 12, other, datasets, changes=("train.sources: ...",)).history
    assert [s.images for s in later.segments] == [0, 96]
    after = Latents(other, datasets, 0, later).keys(np.arange(96, 896))
    assert abs(sum(k in passing(run) for k in after) - 400) <= 4


def test_a_source_without_rules_is_stored_as_it_was_before_there_were_any() -> None:
    assert config().model_dump(mode="json")["sources"] == [{"latents": None, "weight": 1.0, "loss_weight": 1.0}]


def test_what_is_validated_on_needs_no_scores(tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "heldout" / "latents", (20,), text="tokens")
    held_out = Dataset.open(str(tmp_path / "heldout" / "latents"))
    assert len(Chosen(config(), held_out, 8).buckets) == 8


@pytest.mark.parametrize("least", [0.5, 0.9])
def test_no_sample_comes_before_the_account_says_that_it_may_have_come(run: Path, least: float) -> None:
    dataset = Dataset.open(str(run / "latents"))
    strict = config(select=[{"column": "quality.value", "min": least}])
    begun = segments.begin(strict, [dataset])
    keys = Latents(strict, [dataset], 3, begun).keys(np.arange(sum(COUNTS)))
    account = Account({"order": begun.to_json(), "seed": 3, "images": 0}, dataset)
    said: dict[str, int | None] = {}
    for info in dataset.shards:
        rows = dataset.sidecar(info.index)["key"].to_pylist()
        said |= dict(zip(rows, account.first(info.index, range(len(rows))), strict=True))
    for key in set(keys):
        place = said[key]
        assert place is not None
        assert place <= keys.index(key)
    # Rules that are adopted later say nothing of what came before.
    plain = config(select=())
    stored = json.loads(json.dumps(segments.begin(plain, [dataset]).to_json()))
    later = segments.resume(stored, 64, 8, strict, [dataset], changes=("train.select: ...",)).history
    account = Account({"order": later.to_json(), "seed": 3, "images": 0}, dataset)
    found = [p for info in dataset.shards for p in account.first(info.index, range(COUNTS[info.index]))]
    assert sorted(p for p in found if p is not None and p < 64) == list(range(64))
    assert set(found) == set(range(65))
