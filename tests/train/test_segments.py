"""Runs that change under way: made longer, another rate, data that has grown, samples that were taken down."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards import storage
from shards.blank import blank
from shards.dataset import Dataset, read_stats, write_manifest
from shards.settings import load_sections
from tests.train import forked, tiny
from tests.train.test_guard import events
from tests.train.test_mixture import bucketed
from tests.train.test_zero import step_folder
from train import folders, segments
from train.config import TrainConfig, TrainingSections
from train.encoder_config import AutoencoderConfig, ClipConfig
from train.fit_config import FitConfig, Kind, kind_of
from train.latent_samples import Latents
from train.order import Order
from train.segments import History
from train.state import differences, fingerprint, stage_state

CONFIG = TrainConfig(images=1000, batch_size=8, streams=4, window=4)


def state_of(config: Path, *overrides: str, stage: str = "train") -> Any:
    sections = load_sections(str(config), overrides, TrainingSections)
    return stage_state(stage, sections.run, sections)


def take_down(root: str, keys: set[str]) -> None:
    """As `carrara remove` does it: the rows stay where they are and become zeros, and the manifest is written anew."""

    def edit(table: pa.Table, stats: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        status = [
            "opted_out" if k in keys else s
            for k, s in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
        ]
        table = table.set_column(table.column_names.index("status"), "status", pa.array(status))
        return table, {**stats, "count": status.count("success")}

    dataset = Dataset.open(root)
    stats = []
    for info in dataset.shards:
        rows = [i for i, k in enumerate(dataset.sidecar(info.index)["key"].to_pylist()) if k in keys]
        stats.append(blank(root, info.index, rows, edit) if rows else read_stats(root, info.index))
    known = ("kind", "format_version", "fingerprint", "rows", "count", "shards", "exclusions", "made_with")
    write_manifest(root, "latents", stats, {k: v for k, v in dataset.manifest.items() if k not in known})


# ---- kinds of settings -----------------------------------------------------------------------------------


def test_every_setting_is_of_a_kind_and_what_the_run_is_has_none() -> None:
    for config in (AutoencoderConfig, ClipConfig, TrainConfig):
        for name in ("images", "learning_rate", "schedule", "batch_size", "ema_halflife_images"):
            assert kind_of(config, name) is Kind.FROM_HERE_ON
        for name in ("zero_stage", "ranks", "micro_batch_size", "checkpoint_every_images", "compile", "prefetch"):
            assert kind_of(config, name) is Kind.OPERATIONAL
    for name in ("unet", "start_from", "adapter", "prediction_type", "beta_schedule", "learned_variance", "streams"):
        assert name in TrainConfig.model_fields
        assert kind_of(TrainConfig, name) is None


def test_differences_are_told_by_kind(run: Path) -> None:
    datasets = [Dataset.open(str(run / "latents"))]

    def changes_of(config: TrainConfig, seed: int = 5, **stored: Any) -> tuple[list[str], list[str]]:
        found = fingerprint("train", CONFIG, 5, datasets).to_json()
        found["settings"] |= stored
        return differences("train", config, fingerprint("train", config, seed, datasets), found)

    assert changes_of(CONFIG) == ([], [])
    assert changes_of(CONFIG.model_copy(update={"zero_stage": 3, "ranks": 4, "prefetch": 9})) == ([], [])
    changed = CONFIG.model_copy(update={"images": 2000, "learning_rate": 5e-5})
    assert changes_of(changed) == ([], ["train.images: 1000 -> 2000", "train.learning_rate: 0.0001 -> 5e-05"])
    other = CONFIG.model_copy(update={"prediction_type": "sample"})
    assert changes_of(other) == (["train.prediction_type: epsilon -> sample"], [])
    assert changes_of(CONFIG, seed=6)[0] == ["seed: 5 -> 6"]
    # A setting that a checkpoint does not know yet had its default, and one that is no more says nothing.
    found = fingerprint("train", CONFIG, 5, datasets).to_json()
    del found["settings"]["captions"]
    found["settings"]["shuffle_window"] = 16
    assert differences("train", CONFIG, fingerprint("train", CONFIG, 5, datasets), found) == ([], [])
    # What was left to the program is no difference, what was said is.
    open_ = CONFIG.model_copy(update={"streams": None, "precision": "auto"})
    assert changes_of(open_, precision="fp32") == ([], [])
    assert changes_of(CONFIG.model_copy(update={"streams": 8}))[0] == ["train.streams: 4 -> 8"]


# ---- histories -------------------------------------------------------------------------------------------


def given(latents: Latents, count: int) -> list[bytes]:
    """The first samples, by their moments."""
    return [m.tobytes() for m in latents.moments(np.arange(count))[0]]


def test_a_take_down_changes_one_place_and_needs_no_consent(run: Path) -> None:
    root = str(run / "latents")
    before = segments.begin(CONFIG, [Dataset.open(root)])
    latents = Latents(CONFIG, [Dataset.open(root)], 5, before)
    was = given(latents, 120)
    positions = np.arange(120)
    keys = latents.keys(positions)
    gone = {keys[3], keys[17]}
    take_down(root, gone)
    dataset = Dataset.open(root)
    assert len(dataset) == 38
    taken = segments.resume(before.to_json(), 80, 10, CONFIG, [dataset])
    assert taken == segments.Taken(History.from_json(json.loads(json.dumps(before.to_json()))))
    after = Latents(CONFIG, [dataset], 5, taken.history)
    now = given(after, 120)
    assert [i for i in range(120) if was[i] != now[i]] == [i for i in range(120) if keys[i] in gone]
    assert not any(np.frombuffer(m, np.float32).any() == 0 for m in now), "no row of zeros is ever given"
    assert not gone & set(after.keys(positions))


def test_where_a_whole_window_is_taken_down_another_sample_comes(tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "latents", counts=(40,))
    root = str(tmp_path / "latents")
    config = CONFIG.model_copy(update={"window": 1})  # a window is one row
    history = segments.begin(config, [Dataset.open(root)])
    keys = Latents(config, [Dataset.open(root)], 5, history).keys(np.arange(40))
    take_down(root, set(keys[:30]))
    latents = Latents(config, [Dataset.open(root)], 5, history)
    again = Latents(config, [Dataset.open(root)], 5, history)
    found = latents.keys(np.arange(40))
    assert set(found) <= set(keys[30:])
    assert found[30:] == keys[30:]
    assert again.keys(np.arange(20, 40)) == found[20:], "which one is a function of the place"
    assert len(set(found[:30])) > 3


def test_later_exclusions_are_left_out_as_take_downs_are(run: Path) -> None:
    from shards.exclusions import SCHEMA, write_exclusions

    root = str(run / "latents")
    history = segments.begin(CONFIG, [Dataset.open(root)])
    keys = Latents(CONFIG, [Dataset.open(root)], 5, history).keys(np.arange(40))
    out = pa.Table.from_pylist([{"shard": 1, "row": r, "reason": "duplicate", "winner": 0} for r in (2, 5)], SCHEMA)
    name = write_exclusions(root, [out])
    manifest = storage.read_json(storage.join(root, "dataset.json"))
    assert isinstance(manifest, dict)
    manifest["shards"][1]["count"] -= 2
    manifest["count"] -= 2
    storage.write_json(
        storage.join(root, "dataset.json"), {**manifest, "exclusions": name, "laid": [[9], [14], [5], [12]]}
    )
    dataset = Dataset.open(root)
    excluded = {dataset.sidecar(1)["key"].to_pylist()[r] for r in (2, 5)}
    found = Latents(CONFIG, [dataset], 5, history).keys(np.arange(40))
    assert [a == b for a, b in zip(found, keys, strict=True)] == [k not in excluded for k in keys]
    assert not excluded & set(found)


def grow(root: Path, counts: tuple[int, ...]) -> None:
    """Further shards behind those that are there."""
    more = root.parent / "more"
    tiny.make_latents(more, counts=(*[1] * len(Dataset.open(str(root)).shards), *counts))
    for file in more.glob("0*"):
        if not (root / file.name).exists():
            file.rename(root / file.name)
    old, new = Dataset.open(str(root)).manifest, Dataset.open(str(more)).manifest
    shards = old["shards"] + new["shards"][len(old["shards"]) :]
    fresh = {"shards": shards, "count": sum(s["count"] for s in shards), "rows": 0, "fingerprint": "g" * 32}
    laid = [[s["count"]] for s in shards]
    storage.write_json(str(root / "dataset.json"), {**old, **fresh, "laid": laid})


def test_data_that_has_grown_is_taken_in_by_consent_and_changes_nothing_before(run: Path) -> None:
    before = segments.begin(CONFIG, [Dataset.open(str(run / "latents"))])
    was = Latents(CONFIG, [Dataset.open(str(run / "latents"))], 5, before).keys(np.arange(80))
    grow(run / "latents", (20, 6))
    dataset = Dataset.open(str(run / "latents"))
    assert len(dataset) == 66
    plain = segments.resume(before.to_json(), 80, 10, CONFIG, [dataset])
    assert plain.history == before
    assert plain.notes == (f"{dataset.root} holds 26 samples more by now; --adopt takes them in",)
    taken = segments.resume(before.to_json(), 80, 10, CONFIG, [dataset], adopt=True)
    assert [s.images for s in taken.history.segments] == [0, 80]
    assert taken.history.segments[1].changes == (f"{dataset.root}: 26 samples more",)
    latents = Latents(CONFIG, [dataset], 5, taken.history)
    assert latents.keys(np.arange(80)) == was
    old, new = set(was), set(latents.keys(80 + np.arange(136))) - set(was)
    assert len(new) == 26
    counts = collections.Counter(latents.keys(np.arange(480)))
    seen = [counts[m] for m in new], [counts[m] for m in old]
    assert max(seen[0]) - min(seen[0]) <= 1
    assert max(seen[1]) - min(seen[1]) <= 1, "the old samples' epoch was not cut"
    # And again: a third range, in the same folder.
    grow(run / "latents", (9,))
    again = segments.resume(taken.history.to_json(), 160, 20, CONFIG, [Dataset.open(str(run / "latents"))], adopt=True)
    assert [(r.first, r.end, r.rows) for r in again.history.segments[-1].ranges] == [
        (0, 4, (40,)),
        (4, 6, (26,)),
        (6, 7, (9,)),
    ]
    assert sum(r.weight for r in again.history.segments[-1].ranges) == pytest.approx(1)


def test_other_samples_in_the_same_shards_need_consent_fewer_do_not(run: Path, tmp_path: Path) -> None:
    before = segments.begin(CONFIG, [Dataset.open(str(run / "latents"))])
    tiny.make_latents(tmp_path / "more", counts=(9, 15, 5, 12))
    more = segments.resume(before.to_json(), 80, 10, CONFIG, [Dataset.open(str(tmp_path / "more"))])
    assert "holds other samples than this training began with (41 where it had 40 in the same shards)" in more.refusal
    # What an older version's take-down leaves: shards with fewer rows.
    tiny.make_latents(tmp_path / "fewer", counts=(9, 13, 5, 12))
    fewer = segments.resume(before.to_json(), 80, 10, CONFIG, [Dataset.open(str(tmp_path / "fewer"))])
    assert fewer.refusal == ""
    assert "39 samples in place of 40, in an order of their own" in fewer.notes[0]
    assert [s.images for s in fewer.history.segments] == [0, 80]
    Latents(CONFIG, [Dataset.open(str(tmp_path / "fewer"))], 5, fewer.history).moments(np.arange(80, 160))


def test_a_moved_run_goes_on_and_another_source_is_a_segment(run: Path, tmp_path: Path) -> None:
    before = segments.begin(CONFIG, [Dataset.open(str(run / "latents"))])
    moved = tmp_path / "moved"
    (run / "latents").rename(moved)
    dataset = Dataset.open(str(moved))
    assert segments.resume(before.to_json(), 80, 10, CONFIG, [dataset]).history == before
    tiny.make_latents(tmp_path / "second", counts=(10, 10))
    values = {"sources": [{}, {"latents": str(tmp_path / "second"), "weight": 3.0}], "batch_size": 16}
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **values})
    both = segments.resume(before.to_json(), 80, 10, config, [dataset, Dataset.open(str(tmp_path / "second"))], True)
    latents = Latents(config, [dataset, Dataset.open(str(tmp_path / "second"))], 5, both.history)
    assert np.bincount(latents.source(np.arange(80, 80 + 160))).tolist() == [40, 120]
    assert both.history.segments[1].batch_size == 16
    # Dropped again, it is not needed to know what came before.
    alone = segments.resume(both.history.to_json(), 240, 20, CONFIG, [dataset], True)
    assert [s.images for s in alone.history.segments] == [0, 80, 240]
    latents = Latents(CONFIG, [dataset], 5, alone.history)
    counts = collections.Counter(latents.keys(240 + np.arange(160)))
    assert len(counts) == 40
    assert max(counts.values()) - min(counts.values()) <= 2, "four times each, the epochs at both ends being cut"


def test_sizes_of_streams_and_windows_follow_the_data(tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "small")
    history = segments.begin(TrainConfig(images=8, batch_size=8), [Dataset.open(str(tmp_path / "small"))])
    assert (history.streams, history.window) == (64, 256)
    asked = segments.begin(CONFIG, [Dataset.open(str(tmp_path / "small"))])
    assert (asked.streams, asked.window) == (4, 4)


def test_a_rare_buckets_windows_are_smaller(tmp_path: Path) -> None:
    dataset = bucketed(tmp_path / "b", counts=(60, 99, 99, 42))
    history = segments.begin(CONFIG.model_copy(update={"window": 90}), [dataset])
    placement = history.placement(segments.tables(history, CONFIG, [dataset]), 5)
    rows = segments.rows_laid(dataset).sum(axis=0)
    windows = {b: o.window for (_, b), o in placement.orders.items()}
    assert windows == {b: round(90 * n / 300) for b, n in enumerate(rows)}
    assert isinstance(next(iter(placement.orders.values())), Order)


def test_a_bucket_that_a_batch_exhausts_is_told(tmp_path: Path) -> None:
    dataset = bucketed(tmp_path / "b")
    rows = segments.rows_laid(dataset).sum(axis=0).tolist()
    sentences = segments.too_few(CONFIG.model_copy(update={"batch_size": max(rows)}), [dataset])
    assert len(sentences) == sum(n < max(rows) for n in rows)
    fewest = rows.index(min(rows))
    shape = dataset.manifest["buckets"][fewest]
    said = (
        f"there are {min(rows)} samples of {shape['width']} x {shape['height']} pixels, and a batch takes {max(rows)}"
    )
    assert any(line.startswith(said) for line in sentences)
    assert segments.too_few(CONFIG.model_copy(update={"batch_size": min(rows)}), [dataset]) == []


# ---- whole runs ------------------------------------------------------------------------------------------


def manifest_of(run: Path) -> dict[str, Any]:
    newest = folders.latest_complete(str(run / "checkpoints"), contents=False)
    assert newest is not None
    return folders.read_manifest(newest)


def test_a_finished_run_is_made_longer_and_a_take_down_between_ends_nothing(run: Path) -> None:
    """The commands of a person whose training was refused: an image taken down, then more images."""
    config = tiny.write_config(run, tiny.configuration(run, images=24, schedule="constant"))
    forked.fit(config, 1)
    assert state_of(config).state == "done"
    dataset = Dataset.open(str(run / "latents"))
    take_down(dataset.root, {dataset.sidecar(0)["key"].to_pylist()[2]})
    assert state_of(config).state == "done", "a take-down makes nothing undone"
    longer = state_of(config, "train.images=48")
    assert longer.state == "changed"
    assert "(train.images: 24 -> 48); give --adopt to go on with these from there" in longer.reason
    with pytest.raises(forked.RankError, match=r"ConfigError: .*train\.images: 24 -> 48.*--adopt"):
        forked.fit(config, 1, "train.images=48")
    forked.fit(config, 2, "train.images=48", "train.learning_rate=0.0005", adopt=True)
    manifest = manifest_of(run)
    assert manifest["images"] == 48
    assert [(s["images"], s["step"]) for s in manifest["order"]["segments"]] == [(0, 0), (24, 3)]
    assert manifest["order"]["segments"][1]["changes"] == [
        "train.images: 24 -> 48",
        "train.learning_rate: 0.001 -> 0.0005",
    ]
    lines = [json.loads(x) for x in (run / "train" / "log.jsonl").read_text().splitlines()]
    assert [x["images"] for x in lines] == [8, 16, 24, 32, 40, 48]
    assert [x["lr"] for x in lines] == [0.001] * 3 + [0.0005] * 3
    # From now on the new settings are the run's, without consent.
    assert state_of(config, "train.images=48", "train.learning_rate=0.0005").state == "done"
    stale = state_of(config, "train.images=48", "train.learning_rate=0.0005", "train.prediction_type=sample")
    assert stale.state == "stale"
    assert "--redo" in stale.reason


@pytest.mark.slow
def test_a_batch_of_another_size_goes_on_with_the_epoch(run: Path) -> None:
    config = tiny.write_config(run, tiny.configuration(run, images=24))
    forked.train(config, 2)
    overrides = ("train.images=88", "train.batch_size=16")
    forked.train(config, 1, *overrides, adopt=True)
    order = History.from_json(manifest_of(run)["order"])
    settings = load_sections(str(config), overrides, TrainingSections).train
    latents = Latents(settings, [Dataset.open(str(run / "latents"))], 5, order)
    counts = collections.Counter(latents.keys(np.arange(88)))
    assert len(counts) == 40
    assert max(counts.values()) - min(counts.values()) <= 1, "88 samples out of 40: each two or three times"
    assert events(run, "order") == []


def test_what_is_adopted_holds_from_the_checkpoint_that_is_gone_on_from(run: Path) -> None:
    """The newest is damaged, which only its hash tells: a batch of another size begins at the one before."""
    values = {"images": 24, "checkpoint_every_images": 8, "schedule": "constant"}
    config = tiny.write_config(run, tiny.configuration(run, **values))
    forked.fit(config, 1)
    (file,) = step_folder(run, 3).glob("rank-*")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    forked.fit(config, 1, "train.images=48", "train.batch_size=16", adopt=True)
    manifest = manifest_of(run)
    assert (manifest["step"], manifest["images"]) == (4, 48)
    assert [(s["images"], s["step"]) for s in manifest["order"]["segments"]] == [(0, 0), (16, 2)]


@pytest.mark.slow
def test_growth_is_said_in_the_journal_and_taken_in_by_consent(run: Path) -> None:
    config = tiny.write_config(run, tiny.configuration(run, images=24))
    forked.train(config, 1)
    grow(run / "latents", (20,))
    forked.train(config, 1, "train.images=40", adopt=True)
    assert [len(s["ranges"]) for s in manifest_of(run)["order"]["segments"]] == [1, 2]


def test_settings_of_the_other_fits_are_judged_alike(run: Path) -> None:
    config = tiny.write_config(run, tiny.configuration(run))
    sections = load_sections(str(config), (), TrainingSections)
    images = Dataset.open(str(run / "images"))
    wanted = fingerprint("clip", sections.clip, 5, [images]).to_json()
    (run / "clip" / "model").mkdir(parents=True)
    (run / "clip" / "model" / "carrara.json").write_text(json.dumps({"fingerprint": wanted}))
    assert state_of(config, stage="clip").state == "done"
    assert state_of(config, "clip.learning_rate=0.002", stage="clip").state == "changed"
    assert state_of(config, "clip.log_every_images=1", stage="clip").state == "done"
    wanted["input"] = "other pictures by now"
    (run / "clip" / "model" / "carrara.json").write_text(json.dumps({"fingerprint": wanted}))
    assert state_of(config, stage="clip").state == "done", "pictures that came or went do not undo a fit"
    assert isinstance(sections.clip, FitConfig)
