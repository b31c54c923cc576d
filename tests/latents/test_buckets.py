"""Buckets: the rule against a search over every shape, and shards of several shapes against one picture at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latents.buckets import make_buckets, nearest
from latents.config import LatentsConfig
from latents.encoders import load_text, load_vae
from latents.moments import dequantise_logstd
from latents.resize import fit_cover, resize_crop_to
from latents.stage import LatentsStage
from shards.blank import blank_columns
from shards.columns import ColumnShard, column, keep_rows, pack_columns, unpack_columns, value_of
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, validate
from tests.latents import world


@given(st.sampled_from([(64, 8), (256, 32), (256, 64), (512, 64), (1024, 64)]), st.floats(1, 6))
def test_buckets_are_the_shapes_that_novelais_rule_allows(size, aspect):
    resolution, step = size
    found = make_buckets(resolution, step, aspect)
    sides = range(step, resolution * 6 + 1, step)
    expected = set()
    for long in sides:  # every pair of sides is tried, where the code computes the shorter one
        fitting = [short for short in sides if short <= long and short * long <= resolution**2]
        if long >= resolution and fitting and long / fitting[-1] <= aspect and long <= resolution * math.sqrt(aspect):
            expected |= {(long, fitting[-1]), (fitting[-1], long)}
    assert {(b.width, b.height) for b in found} == expected
    assert (resolution, resolution) in expected
    assert len(found) == len(expected)
    ratios = [b.width / b.height for b in found]
    assert ratios == sorted(ratios)


def test_sdxls_sizes_are_among_those_of_1024():
    # Podell et al. 2023, appendix I.
    ours = {(b.width, b.height) for b in make_buckets(1024, 64, 4.0)}
    for height, width in ((512, 2048), (576, 1792), (640, 1600), (768, 1344), (832, 1216), (896, 1152), (1024, 1024)):
        assert {(width, height), (height, width)} <= ours


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_goes_to_the_bucket_nearest_in_aspect_and_sideways_to_the_mirrored_one(width, height):
    buckets = make_buckets(256, 32, 3.0)
    mine, turned = nearest(buckets, np.array([width, height]), np.array([height, width]))
    distance = [abs(math.log((width / height) / (b.width / b.height))) for b in buckets]
    assert distance[mine] == pytest.approx(min(distance), abs=1e-12)
    one, other = buckets[mine], buckets[turned]
    assert one.width / one.height == pytest.approx(other.height / other.width)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(64, 64), (96, 40), (40, 96), (256, 512)]))
def test_a_cut_covers_its_bucket_and_loses_as_little_as_can_be(width, height, target):
    to_width, to_height = target
    fit = fit_cover(width, height, to_width, to_height)
    # One side fits exactly, the other stands out by what keeping the shape asks for, evenly on both sides.
    assert fit.scaled_width == to_width or fit.scaled_height == to_height
    scale = max(to_width / width, to_height / height)
    assert abs(fit.scaled_width - max(to_width, width * scale)) <= 0.5 + 1e-6
    assert abs(fit.scaled_height - max(to_height, height * scale)) <= 0.5 + 1e-6
    for scaled, crop, side in (
        (fit.scaled_width, fit.crop_left, to_width),
        (fit.scaled_height, fit.crop_top, to_height),
    ):
        assert 0 <= crop <= scaled - side
        assert abs((scaled - side - crop) - crop) <= 1


def test_a_cut_is_pillows_own_resize_and_crop(rng):
    pixels = rng.integers(0, 256, (50, 90, 3), np.uint8)
    found, fit = resize_crop_to(pixels, 48, 24)
    image = Image.fromarray(pixels).resize((fit.scaled_width, fit.scaled_height), Image.Resampling.LANCZOS)
    box = (fit.crop_left, fit.crop_top, fit.crop_left + 48, fit.crop_top + 24)
    assert (found == np.asarray(image.crop(box))).all()


CONFIG = {
    "resolution": 32,
    "more_resolutions": [64],
    "buckets": {"step": 8, "max_aspect": 2.5},
    "batch_size": 4,
    "device": "cpu",
}


def stage_of(tmp_path: Path, vae: Path, clip: Path, name: str = "run", **changes) -> LatentsStage:
    run = RunPaths(str(tmp_path / name))
    if not Path(run.images).exists():
        world.image_dataset(run, shards=2, rows=23, corrupt={1: (6,)})
    config = validate(LatentsConfig, {**CONFIG, **changes}, "test")
    return LatentsStage(config, run, str(vae), str(clip), seed=0)


def run_stage(stage: LatentsStage) -> dict:
    work = stage.worker()
    return stage.finish([work(task) for task in stage.tasks()])


@pytest.fixture(scope="module")
def made(tmp_path_factory, vae_folder, clip_folder):
    stage = stage_of(tmp_path_factory.mktemp("made"), vae_folder, clip_folder)
    return stage, run_stage(stage)


def test_every_sample_is_in_its_bucket_at_each_resolution(made):
    stage, manifest = made
    buckets = manifest["buckets"]
    assert [b["resolution"] for b in buckets] == sorted(b["resolution"] for b in buckets)
    assert len(manifest["laid"]) == 2
    text_encoder = load_text(stage.text_ref)
    vae, source, dataset = load_vae(stage.vae_ref), Dataset.open(stage.run.images), Dataset.open(stage.root)
    seen: set[int] = set()
    for position in range(2):
        images, latents = ImageShard(source, position), ColumnShard(dataset, position)
        arrays, keys = latents.arrays, latents.keys
        own = {key: i for i, key in enumerate(images.keys)}
        tokens = text_encoder.tokenize(images.captions).numpy()
        rows = {row["key"]: row for row in latents.table.to_pylist()}
        assert len(keys) == dataset.shards[position].count == len(arrays["bucket"])
        taken = [0] * len(buckets)
        for n, key in enumerate(keys):
            pixels = decode_rgb(images.image_bytes(own[key]))
            for r, suffix in enumerate(("", "_64")):
                b = int(arrays["bucket"][n, r])
                seen.add(b)
                shape = buckets[b]
                assert shape["resolution"] == (32, 64)[r]
                cut, fit = resize_crop_to(pixels, shape["width"], shape["height"])
                mean, logstd = (x.numpy()[0] for x in vae.encode(cut[None].copy()))
                name = column("mean", b, len(buckets))
                np.testing.assert_allclose(arrays[name][taken[b]].astype(float), mean, atol=4e-3, rtol=2e-3)
                codes = arrays[column("logstd", b, len(buckets))][taken[b]]
                assert np.abs(dequantise_logstd(codes) - logstd).max() <= 0.05
                row = rows[key]
                assert (row["bucket_width" + suffix], row["bucket_height" + suffix]) == (
                    shape["width"],
                    shape["height"],
                )
                assert (row["crop_left" + suffix], row["scaled_height" + suffix]) == (fit.crop_left, fit.scaled_height)
                text = arrays[column("text.caption", b, len(buckets))].tobytes()
                ends = arrays[column("text_end.caption", b, len(buckets))]
                line = text[ends[taken[b] - 1] if taken[b] else 0 : ends[taken[b]]]
                taken[b] += 1
                assert json.loads(line) == ([row["caption"]] if row["caption"] else [])
                assert (value_of(arrays, "tokens", n, r) == tokens[own[key]]).all()
                assert row["column_row"] == n
                assert value_of(arrays, "micro", n, r).tolist() == [
                    row["original_height"],
                    row["original_width"],
                    fit.crop_top,
                    fit.crop_left,
                    shape["height"],
                    shape["width"],
                ]
        assert taken == manifest["laid"][position]
    assert len(seen) >= 6, "the images of this world have several shapes"
    assert manifest["errors"] == {"decode_error": 1}


def test_channel_statistics_are_those_of_all_buckets(made):
    stage, manifest = made
    dataset = Dataset.open(stage.root)
    values = [
        np.moveaxis(a.astype(np.float64), 1, 0).reshape(4, -1)
        for position in range(2)
        for name, a in ColumnShard(dataset, position).arrays.items()
        if name.startswith("mean.")
    ]
    whole = np.concatenate(values, axis=1)
    np.testing.assert_allclose(manifest["channels"]["mean"], whole.mean(axis=1), rtol=1e-11)
    np.testing.assert_allclose(manifest["channels"]["std"], whole.std(axis=1), rtol=1e-11)
    assert manifest["channels"]["min"] == whole.min(axis=1).tolist()


def test_threads_and_turns_change_no_byte(made, tmp_path, vae_folder, clip_folder):
    """Two shards in hand of one worker at the same time, and other decoding threads."""
    import threading

    stage, _ = made
    other = stage_of(tmp_path, vae_folder, clip_folder, "other", decode_threads=5)
    work, stats = other.worker(), []
    threads = [threading.Thread(target=lambda t=t: stats.append(work(t))) for t in reversed(list(other.tasks()))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    other.finish(sorted(stats, key=lambda s: s["shard"]))
    for name in ("00000.safetensors", "00001.safetensors", "00001.parquet", "dataset.json"):
        assert Path(stage.root, name).read_bytes() == Path(other.root, name).read_bytes(), name


@settings(max_examples=20)
@given(st.sets(st.integers(0, 17)))
def test_rows_are_kept_in_every_bucket(keep):
    rng = np.random.default_rng(7)
    bucket = np.stack([rng.integers(0, 3, 18), rng.integers(3, 5, 18)], axis=1).astype(np.uint16)
    arrays = {"bucket": bucket, "tokens": np.arange(18), "empty_tokens": np.zeros(3), "pooled": np.arange(4.0)}
    arrays |= {"embeddings": np.arange(4.0), "embedding_index": rng.integers(0, 4, 18).astype(np.int32)}
    for b in range(5):  # each value says whose it is
        arrays[f"mean.{b}"] = np.flatnonzero((bucket == b).any(axis=1))
    kept = np.array(sorted(keep), np.int64)
    found = keep_rows(arrays, kept, 18)
    assert found["tokens"].tolist() == kept.tolist()
    for b in range(5):
        assert found[f"mean.{b}"].tolist() == [i for i in kept if b in bucket[i]]
    index = arrays["embedding_index"][kept]
    assert found["embeddings"][found["embedding_index"]].tolist() == index.tolist()
    assert found["pooled"].tolist() == sorted(set(index.tolist()))


def random_shard(rng: np.random.Generator, buckets: int) -> dict[str, np.ndarray]:
    """A shard as the stage lays it out: 18 samples at two resolutions where there are several buckets."""
    bucket = np.stack([rng.integers(0, 3, 18), rng.integers(3, 5, 18)], axis=1).astype(np.uint16)
    arrays = {"empty_tokens": np.zeros(3, np.uint16), "embeddings": rng.normal(size=(7, 2)).astype(np.float16)}
    if buckets > 1:
        arrays["bucket"] = bucket
    index = rng.integers(0, 7, 18).astype(np.int32)
    for b in range(buckets):
        own = np.flatnonzero((bucket == b).any(axis=1)) if buckets > 1 else np.arange(18)
        texts = [json.dumps([f"caption {i}" * (i % 3)]).encode() for i in own]
        columns = {
            "tokens": own.astype(np.uint16)[:, None] + 1,
            "mean": rng.normal(size=(len(own), 2, 2)).astype(np.float16),
            "alive": np.ones(len(own), np.uint8),
            "embedding_index": index[own],
            "text_end.caption": np.cumsum([len(t) for t in texts], dtype=np.int64),
            "text.caption": np.frombuffer(b"".join(texts), np.uint8),
        }
        arrays |= {column(name, b, buckets): array for name, array in columns.items()}
    return arrays


@settings(max_examples=20)
@given(st.sets(st.integers(0, 17)), st.sets(st.integers(0, 17)), st.sampled_from([1, 5]))
def test_what_is_taken_down_is_zero_everywhere_and_nothing_else_moves(first, second, buckets):
    arrays = random_shard(np.random.default_rng(3), buckets)
    data = pack_columns(arrays, {"a": "b"})
    gone = first | second
    living = np.array([n for n in range(18) if n not in gone], np.int64)
    once = blank_columns(
        data, np.array(sorted(first), np.int64), np.array([n for n in range(18) if n not in first], np.int64)
    )
    twice = blank_columns(once, np.array(sorted(second), np.int64), living)
    assert len(twice) == len(data)
    assert twice == blank_columns(twice, np.array(sorted(gone), np.int64), living), "done again it changes nothing"
    assert twice == blank_columns(data, np.array(sorted(gone), np.int64), living), (
        "nor does it matter in how many steps"
    )
    after, metadata = unpack_columns(twice)
    assert metadata == {"a": "b"}
    index = [int(value_of(arrays, "embedding_index", n)) for n in range(18)]
    lost = {index[n] for n in gone} - {index[n] for n in range(18) if n not in gone}
    for n in range(18):
        for r in range(2 if buckets > 1 else 1):
            for name in ("tokens", "mean", "alive"):
                stored = value_of(after, name, n, r)
                assert np.array_equal(stored, np.zeros_like(stored) if n in gone else value_of(arrays, name, n, r))
    for i in range(7):
        assert np.array_equal(after["embeddings"][i], [0, 0] if i in lost else arrays["embeddings"][i])
    for b in range(buckets):
        own = [n for n in range(18) if buckets == 1 or b in arrays["bucket"][n]]
        ends, text = after[column("text_end.caption", b, buckets)], after[column("text.caption", b, buckets)].tobytes()
        for i, n in enumerate(own):
            line = text[ends[i - 1] if i else 0 : ends[i]].decode()
            assert line.strip("\0") == "" if n in gone else json.loads(line) == [f"caption {n}" * (n % 3)]


@settings(max_examples=20)
@given(st.sets(st.integers(0, 17)), st.sampled_from([1, 5]))
def test_rows_are_kept_in_the_columns_of_a_bucket(keep, buckets):
    arrays = random_shard(np.random.default_rng(4), buckets)
    kept = sorted(keep)
    found = keep_rows(arrays, np.array(kept, np.int64), 18)
    for new, old in enumerate(kept):
        for r in range(2 if buckets > 1 else 1):
            for name in ("tokens", "mean", "alive"):
                assert np.array_equal(value_of(found, name, new, r), value_of(arrays, name, old, r))
            was, now = (int(value_of(a, "embedding_index", n, r)) for a, n in ((arrays, old), (found, new)))
            assert np.array_equal(found["embeddings"][now], arrays["embeddings"][was])
    for b in range(buckets):
        own = [n for n in kept if buckets == 1 or b in arrays["bucket"][n]]
        ends, text = found[column("text_end.caption", b, buckets)], found[column("text.caption", b, buckets)].tobytes()
        lines = [json.loads(text[ends[i - 1] if i else 0 : ends[i]]) for i in range(len(own))]
        assert lines == [[f"caption {n}" * (n % 3)] for n in own]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"more_resolutions": [32]}, "must all be different"),
        ({"buckets": {"step": 24}}, "multiple of buckets.step; 32 is not"),
        ({"more_resolutions": [68]}, "multiple of buckets.step; 68 is not"),
        ({"buckets": {"steps": 8}}, "did you mean 'step'"),
        ({"text": "tokens", "text_pooled": True}, "text_pooled needs text: embeddings"),
        ({"more_resolutions": [5000]}, "between 8 and 4096"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_in_a_sentence(changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        validate(LatentsConfig, {**CONFIG, **changes}, "mine.yaml")
    assert "mine.yaml" in str(error.value)
