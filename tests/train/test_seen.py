"""Which checkpoint saw which sample, against what the order really gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.columns import column_rows
from shards.dataset import Dataset
from tests.train import tiny
from tests.train.test_mixture import bucketed
from tests.train.test_segments import grow, take_down
from train import segments
from train.config import TrainConfig
from train.latent_samples import Latents
from train.seen import Account, Unknown, first_seen


def manifest(history: segments.History, images: int, seed: int = 7) -> dict[str, Any]:
    return {"order": history.to_json(), "seed": seed, "images": images}


def came_first(latents: Latents, positions: np.ndarray) -> dict[str, int]:
    first: dict[str, int] = {}
    for p in positions:
        first.setdefault(latents.keys(np.array([p]))[0], int(p))
    return first


def where(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """(shard number, place on the columns' sample axis) by key."""
    found = {}
    for info in dataset.shards:
        table = dataset.sidecar(info.index)
        for key, row in zip(table["key"].to_pylist(), column_rows(table), strict=True):
            found[key] = (info.index, int(row))
    return found


@pytest.mark.parametrize("buckets", [False, True])
def test_the_account_is_exact_with_buckets_and_mixtures_before_and_after_take_downs(
    tmp_path: Path, buckets: bool
) -> None:
    if buckets:
        bucketed(tmp_path / "own")
        bucketed(tmp_path / "other", counts=(11, 8))
    else:
        tiny.make_latents(tmp_path / "own")
        tiny.make_latents(tmp_path / "other", counts=(11, 8))
    values = {"images": 200, "batch_size": 8, "streams": 4, "window": 4}
    sources = [{"weight": 1.0}, {"latents": str(tmp_path / "other")}]
    config = TrainConfig(sources=sources, **values)
    datasets = [Dataset.open(str(tmp_path / n)) for n in ("own", "other")]
    history = segments.begin(config, datasets)
    latents = Latents(config, datasets, 7, history)
    positions = np.arange(64)
    source = latents.source(positions)
    first = came_first(latents, positions[source == 0])
    places = where(datasets[0])
    assert 20 < len(first) < 40, "some were seen, some not"

    def check(dataset: Dataset, keys: list[str]) -> None:
        account = Account(manifest(history, 64), dataset)
        for key in keys:
            shard, row = places[key]
            (found,) = account.first(shard, [row])
            assert found is not None
            assert (found if found < 64 else None) == first.get(key)

    check(datasets[0], list(places))
    gone = list(places)[5:8]
    take_down(datasets[0].root, set(gone[:1]))
    check(Dataset.open(datasets[0].root), gone)
    take_down(datasets[0].root, set(gone[1:]))
    check(Dataset.open(datasets[0].root), list(places)[::3])


def test_grown_data_is_accounted_for_from_where_it_was_taken_in(run: Path) -> None:
    config = TrainConfig(images=200, batch_size=8, streams=4, window=4)
    begun = segments.begin(config, [Dataset.open(str(run / "latents"))])
    grow(run / "latents", (20,))
    dataset = Dataset.open(str(run / "latents"))
    history = segments.resume(begun.to_json(), 80, 10, config, [dataset], adopt=True).history
    first = came_first(Latents(config, [dataset], 7, history), np.arange(160))
    for key, (shard, row) in where(dataset).items():
        (found,) = first_seen(manifest(history, 160), dataset, shard, [row])
        assert found is not None
        assert (found if found < 160 else None) == first.get(key)
        assert shard < 4 or found >= 80
        # The checkpoint before knows nothing of what came later.
        (before,) = first_seen(manifest(begun, 80), dataset, shard, [row])
        assert before == (None if shard == 4 else found)


def test_what_cannot_be_known_is_said(run: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    with pytest.raises(Unknown, match="older order"):
        Account({"images": 8, "seed": 0}, dataset)
    config = TrainConfig(images=200, batch_size=8)
    later = segments.resume(None, 80, 10, config, [dataset]).history
    with pytest.raises(Unknown, match="its first 80 images were of an older order"):
        Account(manifest(later, 160), dataset).first(0, [0])
    tiny.make_latents(tmp_path / "more", counts=(9, 15, 5, 12))
    with pytest.raises(Unknown, match="other samples than"):
        Account(manifest(segments.begin(config, [dataset]), 8), Dataset.open(str(tmp_path / "more")))
