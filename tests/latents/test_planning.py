"""The plan's arithmetic against numbers worked out by hand, and its bytes against shards that were made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latents import planning
from latents.planning import Prices, Rates
from latents.stage import LatentsStage
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError
from tests.latents.test_buckets import run_stage, stage_of

# Stable Diffusion 2 at 256 px: 4x32x32 latents, CLIP-H rows of 77x1024; the bytes are those of
# 4*32*32*2 = 8192 (means), 4096 (log-stds), 154 (tokens), 157,696 (a caption's rows).
RATES = Rates(decode=0.002, vae=0.01, text=0.004, distinct=1.0, sidecar=300, area=1024, where="here", samples=64)
FACTS = {"channels": 4, "context": 77, "width": 1024, "pooled": 0}


def test_bytes_of_stable_diffusion_2_at_256():
    assert planning.column_bytes("tokens", False, RATES, FACTS) == 8192 + 154 + 24
    assert planning.column_bytes("tokens", True, RATES, FACTS) == 8192 + 4096 + 154 + 24
    assert planning.column_bytes("embeddings", False, RATES, FACTS) == 8192 + 154 + 24 + 4 + 157_696


def test_two_billion_samples_fit_into_thirty_terabytes():
    found = {c.name: c for c in planning.choices(2_000_000_000, RATES, Prices(), FACTS)}
    assert 2e9 * found["tokens, moments"].bytes_a_sample < 30e12
    # The usual half-precision latents with CLIP-H rows.
    assert 2e9 * found["embeddings, means alone"].bytes_a_sample > 331e12


def test_money_and_break_even_by_hand():
    prices = Prices(
        worker_hour=1.0,
        trainer_hour=4.0,
        terabyte_month=20.0,
        months=2.0,
        epochs=3.0,
        worker_speed=2.0,
        trainer_speed=5.0,
    )
    samples = 3_600_000
    found = {c.name: c for c in planning.choices(samples, RATES, prices, FACTS)}
    # In one epoch online: 3.6e6 * 14 ms = 50,400 s of this machine, 2.8 hours of a rank 5 times as fast, at 4.
    assert found["online: nothing stored"].money == pytest.approx(3 * 2.8 * 4)
    lean = found["tokens, means alone"]
    assert lean.hours == pytest.approx(3.6e6 * 0.01 / 2 / 3600)  # 5 hours
    assert lean.once == pytest.approx(5.0)
    assert lean.storage == pytest.approx(3.6e6 * (8192 + 154 + 24 + 300) / 1e12 * 40)
    assert lean.training == pytest.approx(3 * (3.6e6 * 0.004 / 5 / 3600) * 4)  # the CLIP is left: 0.8 hours an epoch
    saved = 4 * (2.8 - 0.8)
    assert lean.break_even == pytest.approx((5.0 + lean.storage) / saved)
    full = found["embeddings, moments"]
    assert full.hours == pytest.approx(7.0)
    assert full.training == 0
    assert full.break_even == pytest.approx((7.0 + full.storage) / (4 * 2.8))
    assert full.money == pytest.approx(full.once + full.storage)


@pytest.mark.parametrize(("text", "flip"), [("tokens", False), ("tokens", True), ("embeddings", False)])
def test_planned_bytes_are_those_of_the_shards(tmp_path, vae_folder, clip_folder, text, flip):
    stage = stage_of(tmp_path, vae_folder, clip_folder, text=text, text_pooled=text == "embeddings", flip=flip)
    rates, facts = planning.rates_of(stage, samples=1000), planning.facts_of(stage)
    assert min(rates.decode, rates.vae, rates.text) > 0
    run_stage(stage)
    shard = ColumnShard(Dataset.open(stage.root), 0)  # on whose pictures it was measured
    # What belongs to no sample, and the column that buckets need, stand beside what is planned.
    arrays = {n: a for n, a in shard.arrays.items() if not n.startswith("empty_") and n != "bucket"}
    stored = sum(a.nbytes for a in arrays.values()) / len(shard)
    planned = planning.column_bytes(text, True, rates, facts, resolutions=2)
    assert planned == pytest.approx(stored, rel=0.02)


def test_rates_are_kept_until_the_weights_change(tmp_path, vae_folder, clip_folder, monkeypatch):
    stage = stage_of(tmp_path, vae_folder, clip_folder)
    rates = planning.rates_of(stage, samples=4)
    monkeypatch.setattr(LatentsStage, "worker", lambda self: pytest.fail("measured again"))
    assert planning.rates_of(stage, samples=4) == rates
    # Text and moments are what the plan chooses between, so they change no rate.
    other = stage_of(tmp_path, vae_folder, clip_folder, text="tokens", moments=False)
    assert planning.rates_of(other, samples=4) == rates
    other = stage_of(tmp_path, vae_folder, clip_folder, buckets=None)
    with pytest.raises(BaseException, match="measured again"):
        planning.rates_of(other, samples=4)


def test_without_pictures_the_plan_says_what_it_needs(tmp_path, vae_folder, clip_folder):
    stage = stage_of(tmp_path, vae_folder, clip_folder)
    stage.run = RunPaths(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="give the table's size with --rows"):
        planning.image_count(stage, None)
    assert planning.image_count(stage, 500) == 500
    with pytest.raises(ConfigError, match="no finished image shards to measure on"):
        planning.rates_of(stage)


def test_pictures_are_scaled_from_the_pilots_success(tmp_path, vae_folder, clip_folder):
    stage = stage_of(tmp_path, vae_folder, clip_folder)
    dataset = Dataset.open(stage.run.images)
    assert planning.image_count(stage, None) == len(dataset)
    assert planning.image_count(stage, 46_000) == 1000 * len(dataset)
    text = planning.report(stage.config, 1000, 8, RATES, Prices(), FACTS)
    assert "8 workers" in text
    assert len({len(line) for line in text.splitlines() if ", moments" in line}) == 1
    assert np.isfinite([float(x.replace(",", "")) for x in text.splitlines()[-6].split()[-9:]]).all()
    assert Path(stage.run.images).exists()
