"""The latents stage: its shards against the encoders themselves, the accounting, the same bytes however it runs."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from latents.config import LatentsConfig
from latents.encoders import load_text, load_vae
from latents.moments import dequantise_logstd
from latents.resize import resize_crop
from latents.stage import LatentsStage
from shards.columns import ColumnShard
from shards.dataset import Dataset, write_manifest
from shards.exclusions import write_exclusions
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, NodeTrouble, StageError
from shards.stage import begin, committed, is_begun
from shards.verify import verify_shard
from tests.latents import world

CONFIG = LatentsConfig(resolution=32, batch_size=4, text="embeddings", decode_threads=2, device="cpu")


def run_stage(stage: LatentsStage) -> dict:
    work = stage.worker()
    return stage.finish([work(task) for task in stage.tasks()])


@pytest.fixture
def make(tmp_path, vae_folder, clip_folder):
    """A run with image shards, and its latents stage under a config."""

    def build(name: str = "run", corrupt: dict[int, tuple[int, ...]] | None = None, **changes) -> LatentsStage:
        run = RunPaths(str(tmp_path / name))
        if not Path(run.images).exists():
            world.image_dataset(run, corrupt=corrupt)
        config = CONFIG.model_copy(update=changes)
        return LatentsStage(config, run, str(vae_folder), str(clip_folder), seed=0)

    return build


def contents(root: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(root).iterdir()) if p.suffix in (".safetensors", ".parquet")}


def test_latents_are_what_the_encoders_give(make):
    stage = make()
    manifest = run_stage(stage)
    vae, text = load_vae(stage.vae_ref), load_text(stage.text_ref, "penultimate")
    source, dataset = Dataset.open(stage.run.images), Dataset.open(stage.root)
    means, variances = [], []
    for position in range(2):
        images, latents = ImageShard(source, position), ColumnShard(dataset, position)
        assert latents.keys == images.keys
        arrays = latents.arrays
        pixels = np.stack([resize_crop(decode_rgb(images.image_bytes(i)), 32)[0] for i in range(len(images))])
        mean, logstd = (x.numpy() for x in vae.encode(pixels))
        assert arrays["mean"].dtype == np.float16
        np.testing.assert_allclose(arrays["mean"], mean, rtol=1e-3, atol=1e-4)
        minimum, step = float(latents.metadata["logstd_min"]), float(latents.metadata["logstd_step"])
        stored = minimum + step * arrays["logstd"].astype(np.float64)
        assert np.abs(stored - logstd).max() <= step / 2 + 1e-4
        tokens = text.tokenize(images.captions).numpy()
        assert (arrays["tokens"] == tokens).all()
        np.testing.assert_allclose(
            arrays["embeddings"][arrays["embedding_index"]], text.encode(tokens), rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(arrays["empty_embedding"], text.encode(text.tokenize([""]))[0], rtol=1e-3, atol=1e-3)
        assert (arrays["empty_tokens"] == text.tokenize([""]).numpy()[0]).all()
        # Once per distinct caption: "a red circle" and "A  RED circle" are the same tokens.
        assert len(arrays["embeddings"]) == len({t.tobytes() for t in tokens}) < len(images)
        means.append(arrays["mean"].astype(np.float64))
        variances.append(np.exp(2 * dequantise_logstd(arrays["logstd"]).astype(np.float64)))
    whole, variance = np.concatenate(means), np.concatenate(variances).mean(axis=(0, 2, 3))
    stated = manifest["channels"]
    np.testing.assert_allclose(stated["mean"], whole.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(stated["std"], whole.std(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(stated["sample_std"], np.sqrt(whole.var(axis=(0, 2, 3)) + variance), rtol=1e-6)
    assert stated["max"] == whole.max(axis=(0, 2, 3)).tolist()
    assert manifest["vae"]["scaling_factor"] == 0.7
    assert manifest["vae"]["digest"] == vae.digest
    assert manifest["text"] == {
        "ref": stage.text_ref,
        "digest": text.digest,
        "layer": "penultimate",
        "pad": "zero",
        "context_length": 20,
        "width": 32,
    }
    assert (manifest["rows"], manifest["count"]) == (26, 22)


def test_the_sidecar_has_every_row_and_says_how_pictures_were_cut(make):
    stage = make()
    run_stage(stage)
    source, table = Dataset.open(stage.run.images).sidecar(0), Dataset.open(stage.root).sidecar(0)
    assert table["key"].to_pylist() == source["key"].to_pylist()
    assert table["original_width"].to_pylist() == source["original_width"].to_pylist()
    assert table["status"].to_pylist() == source["status"].to_pylist()
    rows = table.to_pylist()
    assert [rows[1][c] for c in ("scaled_width", "scaled_height", "crop_left", "crop_top")] == [45, 32, 6, 0]
    assert [rows[2][c] for c in ("scaled_width", "scaled_height", "crop_left", "crop_top")] == [32, 64, 0, 16]
    assert rows[4]["status"] == "failed_to_download"
    assert rows[4]["crop_left"] is None


def test_tokens_alone_and_means_alone(make):
    full, lean = make(), make(text="tokens", moments=False)
    run_stage(full)
    lean.root = lean.run.latents + "-lean"
    run_stage(lean)
    a, b = (ColumnShard(Dataset.open(s.root), 0).arrays for s in (full, lean))
    assert set(b) == {"mean", "tokens", "empty_tokens", "micro", "alive", "text.caption", "text_end.caption"}
    assert all((a[k] == b[k]).all() for k in b)


def test_a_corrupt_picture_costs_itself_alone(make):
    whole, broken = make("whole"), make("broken", corrupt={0: (5, 7)})
    run_stage(whole)
    manifest = run_stage(broken)
    assert manifest["status"] == {"success": 20, "failed_to_download": 4, "failed_to_encode": 2}
    assert manifest["errors"] == {"decode_error": 2}
    rows = Dataset.open(broken.root).sidecar(0).to_pylist()
    assert [r["status"] for r in rows].count("failed_to_encode") == 2
    assert rows[5]["error"] == "decode_error"
    assert "decoded" in rows[5]["error_message"]
    a, b = (ColumnShard(Dataset.open(s.root), 0) for s in (whole, broken))
    kept = [i for i, key in enumerate(a.keys) if key in b.keys]
    assert [a.keys[i] for i in kept] == b.keys
    # Other batches, so the last bits may differ; the pictures and captions must not.
    np.testing.assert_allclose(a.arrays["mean"][kept].astype(float), b.arrays["mean"].astype(float), atol=2e-3)
    assert (a.arrays["tokens"][kept] == b.arrays["tokens"]).all()
    np.testing.assert_allclose(
        a.arrays["embeddings"][a.arrays["embedding_index"]][kept],
        b.arrays["embeddings"][b.arrays["embedding_index"]],
        atol=2e-3,
    )


def test_trouble_of_the_machine_is_no_fate_of_a_picture(make, monkeypatch):
    stage = make()
    worker = stage.worker()
    monkeypatch.setattr("latents.encoding.resize_crop_to", _no_threads)
    with pytest.raises(NodeTrouble, match="no further thread"):
        worker(next(iter(stage.tasks())))


def _no_threads(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_shard_of_nothing_but_broken_pictures_is_a_shard(make):
    stage = make("broken", corrupt={0: tuple(range(13))})
    manifest = run_stage(stage)
    assert [s["count"] for s in manifest["shards"]] == [0, 11]
    arrays = ColumnShard(Dataset.open(stage.root), 0).arrays
    assert arrays["mean"].shape == (0, 4, 16, 16)
    assert arrays["embeddings"].shape == (0, 20, 32)
    assert arrays["empty_embedding"].shape == (20, 32)


def test_what_is_not_finite_is_encoded_again_or_set_aside(make, monkeypatch):
    stage = make()
    work = stage.worker()
    exact, asked = type(work.vae).encode_exact, []

    moments = type(work.vae)._moments

    def spoilt(self, model, pixels):
        mean, logstd = moments(self, model, pixels)
        if len(pixels) > 1:  # the first and third picture of every batch overflow
            mean = mean.clone()
            mean[0], mean[2, 1, 0, 0] = torch.nan, 1e6
        return mean, logstd

    def encode_exact(self, pixels):
        asked.append(len(pixels))
        mean, logstd = exact(self, pixels)
        return (mean if len(asked) % 2 else mean * torch.inf), logstd  # every other one even in float32

    monkeypatch.setattr(type(work.vae), "_moments", spoilt)
    monkeypatch.setattr(type(work.vae), "encode_exact", encode_exact)
    manifest = stage.finish([work(task) for task in stage.tasks()])
    monkeypatch.undo()
    assert manifest["errors"] == {"not_finite_latent": 6}
    assert set(asked) == {1}
    rows = [r for r in Dataset.open(stage.root).sidecar(0).to_pylist() if r["status"] == "failed_to_encode"]
    assert [r["error"] for r in rows] == ["not_finite_latent"] * 3
    reference = make("reference")
    run_stage(reference)
    a, b = (ColumnShard(Dataset.open(s.root), 0) for s in (reference, stage))
    kept = [a.keys.index(k) for k in b.keys]
    assert len(kept) == 8
    np.testing.assert_allclose(a.arrays["mean"][kept].astype(float), b.arrays["mean"].astype(float), atol=2e-3)


def test_captions_that_are_not_finite_are_set_aside(make, monkeypatch):
    stage = make()
    work = stage.worker()
    target = work.text.tokenize(["a red circle"])[0]

    original = type(work.text)._encode

    def spoilt(self, tower, tokens, pooled):
        out, end = original(self, tower, tokens, pooled)
        out = out.clone()
        out[(torch.as_tensor(np.asarray(tokens, np.int64)) == target).all(dim=1)] = torch.inf
        return out, end

    monkeypatch.setattr(type(work.text), "_encode", spoilt)
    manifest = stage.finish([work(task) for task in stage.tasks()])
    captions = [c for i in range(2) for c in ImageShard(Dataset.open(stage.run.images), i).captions]
    expected = sum(c in ("a red circle", "A  RED circle") for c in captions)
    assert manifest["errors"] == {"not_finite_text": expected}
    assert expected > 0
    for i in range(2):
        arrays = ColumnShard(Dataset.open(stage.root), i).arrays
        assert np.isfinite(arrays["embeddings"]).all()


def test_bytes_do_not_depend_on_the_process_or_the_order(make, tmp_path):
    first, second = make("first"), make("second")
    run_stage(first)
    script = tmp_path / "one_worker.py"
    script.write_text(
        "import pickle, sys, torch\n"
        "torch.set_num_threads(2)\n"  # whatever the process had set
        "stage = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "work = stage.worker()\n"
        "for task in reversed(list(stage.tasks())):\n"
        "    work(task)\n"
    )
    (tmp_path / "stage.pkl").write_bytes(pickle.dumps(second))
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), str(tmp_path / "stage.pkl")]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert contents(first.root) == contents(second.root)
    assert len(contents(first.root)) == 4
    more = make("third", decode_threads=4)
    run_stage(more)
    assert contents(more.root) == contents(first.root)
    assert not any(verify_shard(more.root, i) for i in range(2))


def test_a_second_run_finds_all_done_and_other_settings_are_refused(make):
    stage = make()
    run_stage(stage)
    assert committed(stage, stage.tasks()) == [True, True]
    moved = make(decode_threads=1)
    assert is_begun(moved)
    assert committed(moved, moved.tasks()) == [True, True]
    other = make(text_layer="last")
    assert not is_begun(other)
    with pytest.raises(ConfigError, match=r"settings.text_layer: penultimate -> last"):
        begin(other)
    with pytest.raises(ConfigError, match=r"settings.text_layer"):
        other.worker()


def test_another_vae_is_refused_and_named(make, tmp_path):
    stage = make()
    run_stage(stage)
    stage.vae_ref = str(world.save_vae(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match=r"weights\.vae"):
        begin(stage)


def test_a_vae_swapped_under_a_running_stage_is_refused(make, tmp_path, vae_folder):
    stage = make()
    stage.vae_ref = str(tmp_path / "vae")
    shutil.copytree(vae_folder, stage.vae_ref)
    begin(stage)
    work, task = stage.worker(), next(stage.tasks())
    work(task)
    shutil.rmtree(stage.vae_ref)
    world.save_vae(Path(stage.vae_ref), seed=1)
    with pytest.raises(ConfigError, match=r"weights\.vae") as error:
        stage.worker()
    assert "\n" not in str(error.value)
    with pytest.raises(StageError, match=r"was made with other settings or weights.*weights\.vae"):
        stage.finish([])


def exclude(stage, lines: list[tuple[int, int, str]]) -> None:
    """(shard, row, reason) of the image shards are not to be used from now on."""
    columns = dict(zip(("shard", "row", "reason"), map(list, zip(*lines, strict=True)), strict=True)) if lines else {}
    tables = [pa.table({**columns, "winner": [-1] * len(lines)})] if lines else []
    root = stage.run.images
    write_manifest(root, "images", [_stats(root, i) for i in range(2)], None, write_exclusions(root, tables))


def finished(stage) -> dict:
    return stage.finish([_stats(stage.root, i) for i in range(2)])


def test_a_later_exclusion_is_left_out_by_the_reader_and_nothing_is_encoded_again(make):
    stage = make()
    run_stage(stage)
    assert stage.is_current()
    before, whole = contents(stage.root), ColumnShard(Dataset.open(stage.root), 1)
    row = Dataset.open(stage.run.images).sidecar(1)["key"].to_pylist().index(whole.keys[1])
    exclude(stage, [(1, row, "duplicate_url")])
    assert not stage.is_current()
    manifest = finished(stage)
    assert stage.is_current()
    assert (manifest["count"], manifest["without_latents"]) == (20 + 1, 0)
    shard = ColumnShard(Dataset.open(stage.root), 1)
    kept = [0, *range(2, len(whole))]
    assert shard.keys == [whole.keys[i] for i in kept]
    assert len(shard) == len(kept)
    for name in ("mean", "tokens", "micro"):
        np.testing.assert_array_equal(shard.arrays[name], whole.arrays[name][kept])
    assert {n: d for n, d in contents(stage.root).items() if n in before} == before
    exclude(stage, [])
    assert finished(stage)["count"] == 22
    assert ColumnShard(Dataset.open(stage.root), 1).keys == whole.keys


def test_what_was_excluded_when_the_latents_were_made_and_is_used_again_is_counted_and_said(make, caplog):
    stage = make()
    key = Dataset.open(stage.run.images).sidecar(1)["key"].to_pylist()[2]
    exclude(stage, [(1, 2, "duplicate_url")])
    run_stage(stage)
    assert Dataset.open(stage.root).manifest["without_latents"] == 0
    shard = ColumnShard(Dataset.open(stage.root), 1)
    assert key not in shard.keys
    assert shard.table["error"].to_pylist()[2] == "duplicate_url"
    exclude(stage, [])
    manifest = finished(stage)
    assert manifest["without_latents"] == 1
    assert "1 images that can be used have no latents" in caplog.text


def _stats(root: str, index: int) -> dict:
    from shards.dataset import read_stats

    found = read_stats(root, index)
    assert found is not None
    return found


def test_lost_rows_are_found(make):
    stage = make()
    work = stage.worker()
    stats = [work(task) for task in stage.tasks()]
    with pytest.raises(StageError, match="1 shards are missing, the first is 1"):
        stage.finish(stats[:1])
    short = {**stats[1], "status": {**stats[1]["status"], "success": stats[1]["count"] - 1}}
    with pytest.raises(StageError, match="rows were lost"):
        stage.finish([stats[0], short])
    moved = {**stats[1], "status": {"success": 10, "failed_to_download": 3}, "count": 10}
    with pytest.raises(StageError, match="10 latents and 0 set aside where there were 11 images"):
        stage.finish([stats[0], moved])
    odd = {**stats[1], "status": {**stats[1]["status"], "vanished": 1}}
    with pytest.raises(StageError, match="unknown status 'vanished'"):
        stage.finish([stats[0], odd])


def test_bad_settings_are_refused_before_any_work(make, tmp_path):
    stage = make(resolution=33)
    with pytest.raises(ConfigError, match=r"latents.resolution is 33.*multiple of 2"):
        stage.made_with()
    with pytest.raises(StageError, match="no finished dataset here"):
        list(LatentsStage(CONFIG, RunPaths(str(tmp_path / "none")), stage.vae_ref, stage.text_ref).tasks())
    stage = make()
    stage.text_ref = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"not a folder with open_clip_config\.json"):
        stage.made_with()


def test_a_finished_shard_is_not_written_twice(make):
    stage = make()
    work = stage.worker()
    task = next(stage.tasks())
    first = work(task)
    before = Path(stage.root, "00000.safetensors").stat().st_ino
    assert work(task) == first
    assert Path(stage.root, "00000.safetensors").stat().st_ino == before


def test_pooled_text_is_stored_once_per_caption(make):
    stage = make(text_pooled=True, text_layer="penultimate_no_norm")
    manifest = run_stage(stage)
    assert manifest["text"]["layer"] == "penultimate_no_norm"
    text = load_text(stage.text_ref, "penultimate_no_norm")
    dataset = Dataset.open(stage.root)
    for position in range(2):
        arrays = ColumnShard(dataset, position).arrays
        rows, pooled = text.encode_pooled(arrays["tokens"].astype(np.int64))
        index = arrays["embedding_index"]
        assert len(arrays["pooled"]) == len(arrays["embeddings"])
        np.testing.assert_allclose(arrays["pooled"][index], pooled, rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(arrays["embeddings"][index], rows, rtol=1e-3, atol=2e-3)
        empty = text.encode_pooled(arrays["empty_tokens"][None].astype(np.int64))[1]
        np.testing.assert_allclose(arrays["empty_pooled"], empty[0], rtol=1e-3, atol=2e-3)


def test_a_tiny_autoencoder_needs_means_alone(make, tmp_path):
    from tests.latents.test_encoders import save_tiny

    stage = make(moments=True)
    stage.vae_ref = str(save_tiny(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match=r"AutoencoderTiny, which has no posterior.*latents\.moments to false"):
        stage.made_with()
    stage.config = stage.config.model_copy(update={"moments": False})
    manifest = run_stage(stage)
    assert manifest["vae"]["kind"] == "AutoencoderTiny"
    assert "logstd" not in ColumnShard(Dataset.open(stage.root), 0).arrays
    assert manifest["channels"]["sample_std"] == manifest["channels"]["std"]


def test_memory_stays_flat_over_many_shards(make):
    """What a worker holds after many shards is what it holds after a few."""
    import gc
    import tracemalloc

    stage = make()
    work = stage.worker()
    tasks = list(stage.tasks())

    def again(times: int) -> int:
        for _ in range(times):
            for task in tasks:
                for file in Path(stage.root).glob(f"{task.index:05d}*"):
                    file.unlink()
                work(task)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few, many = again(2), again(6)
    finally:
        tracemalloc.stop()
    assert many - few < 100_000, "12 more shards of 13 pictures each"


@pytest.mark.parametrize("changes", [{}, {"more_resolutions": [16], "moments": False}])
def test_mirrored_pictures_have_moments_of_their_own(make, changes):
    """What is stored beside is the encoding of the mirrored picture, which the mirrored encoding is not."""
    stage = make(flip=True, **changes)
    run_stage(stage)
    plain = make(name="plain", **changes)
    run_stage(plain)
    vae = load_vae(stage.vae_ref)
    source, dataset = Dataset.open(stage.run.images), Dataset.open(stage.root)
    mirrored_latents = []
    for position in range(2):
        images, arrays = ImageShard(source, position), ColumnShard(dataset, position).arrays
        others = ColumnShard(Dataset.open(plain.root), position).arrays
        assert {n for n in arrays if "_flipped" not in n} == set(others)
        assert all(np.array_equal(arrays[n], others[n]) for n in others)
        for b, side in enumerate([32, *changes.get("more_resolutions", [])]):
            end = f".{b}" if len(changes) else ""
            pixels = [resize_crop(decode_rgb(images.image_bytes(i)), side)[0][:, ::-1] for i in range(len(images))]
            mean, logstd = (x.numpy() for x in vae.encode(np.stack(pixels)))
            np.testing.assert_allclose(arrays["mean_flipped" + end], mean, rtol=1e-3, atol=1e-4)
            if not changes:
                stored = dequantise_logstd(arrays["logstd_flipped"]).astype(np.float64)
                assert np.abs(stored - logstd).max() <= 25 / 255 / 2 + 1e-4
            mirrored_latents.append(float(np.abs(arrays["mean" + end][..., ::-1] - mean).max()))
        images.close()
    assert min(mirrored_latents) > 0.01
    assert "flip" not in plain.made_with().settings, "what was made before there was a choice is made as it was"


def test_a_mirrored_latent_that_is_not_finite_sets_its_sample_aside(make, monkeypatch):
    stage = make(flip=True)
    work = stage.worker()
    encode, exact = work.vae.encode_stored, work.vae.encode_exact
    calls = []

    def broken(pixels):
        result = encode(pixels)
        calls.append(len(pixels))
        if len(calls) != 2:  # the mirrored half of the first batch
            return result
        found = result()
        found.finite[0] = False
        return lambda: found

    def never(pixels):
        mean, logstd = exact(pixels)
        return mean * float("inf"), logstd

    monkeypatch.setattr(work.vae, "encode_stored", broken)
    monkeypatch.setattr(work.vae, "encode_exact", never)
    stats = [work(task) for task in stage.tasks()]
    assert stats[0]["errors"] == {"not_finite_latent": 1}
    assert not stats[1]["errors"]
