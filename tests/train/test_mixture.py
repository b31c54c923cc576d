"""Data sets by weight, buckets of one shape a batch, and the UNet's objective with each of its options."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latents.config import LatentsConfig
from latents.encoders import load_text
from latents.stage import LatentsStage
from shards.columns import ColumnShard, pack_columns, value_of
from shards.dataset import Dataset, commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths, sample_key
from shards.settings import ConfigError, StageError
from tests.latents import world
from tests.train import forked, tiny
from tests.train.test_zero import assert_close, step_folder, tensors
from train import segments
from train.config import TrainConfig
from train.denoising import choose_caption, process_of
from train.fit_config import layout
from train.latent_samples import Latents
from train.objectives import build
from train.part_config import SourceConfig
from train.schedulers import scheduler

SHAPES = [(4, 4), (4, 8), (8, 4)]


def bucketed(root: Path, counts: tuple[int, ...] = (9, 14, 5, 12), layout: int = 3) -> Dataset:
    """Latent shards of three shapes as the latents stage stores them; a mean's first value is its sample's number.

    layout: 2 for that of before, when only moments lay bucket by bucket.
    """
    rng = np.random.default_rng(1)
    stats, table, number = [], [], 0
    for index, n in enumerate(counts):
        bucket = rng.integers(0, 3, n)
        numbers = np.arange(number, number + n)
        number += n
        each: dict[str, Any] = {
            "tokens": np.repeat(numbers[:, None], tiny.CONTEXT, axis=1).astype(np.uint16),
            "embedding_index": rng.integers(0, 3, n).astype(np.int32),
            "micro": np.repeat(numbers[:, None], 6, axis=1).astype(np.int32),
            "alive": np.ones(n, np.uint8),
        }
        arrays: dict[str, Any] = {
            "empty_tokens": np.zeros(tiny.CONTEXT, np.uint16),
            "embeddings": rng.normal(size=(3, tiny.CONTEXT, tiny.WIDTH)).astype(np.float16),
            "empty_embedding": np.zeros((tiny.CONTEXT, tiny.WIDTH), np.float16),
            "bucket": bucket[:, None].astype(np.uint16),
        }
        if layout == 2:
            del each["alive"]
            arrays |= {**each, "micro": each["micro"][:, None]}
        for b, (h, w) in enumerate(SHAPES):
            mine = numbers[bucket == b]
            arrays[f"mean.{b}"] = np.broadcast_to(mine[:, None, None, None], (len(mine), 4, h, w)).astype(np.float16)
            if layout == 3:
                arrays |= {f"{name}.{b}": array[bucket == b] for name, array in each.items()}
        table.append([int((bucket == b).sum()) for b in range(3)])
        keys = [sample_key(index, r, 100) for r in range(n)]
        sink = io.BytesIO()
        pq.write_table(pa.table({"key": keys, "status": ["success"] * n}), sink)
        files = {".safetensors": pack_columns(arrays, {}), ".parquet": sink.getvalue()}
        stats.append(
            commit_shard(str(root), index, files, {"count": n, "rows": n}, Fingerprint("latents", 1, {}, index))
        )
    extra = {
        "resolution": 32,
        "vae": {**tiny.encoders()["vae"], "scaling_factor": 1.0},
        "text": tiny.encoders()["text"],
        "buckets": [{"resolution": 32, "width": 8 * w, "height": 8 * h} for h, w in SHAPES],
        "laid" if layout == 3 else "bucket_counts": table,
    }
    write_manifest(str(root), "latents", stats, extra)
    return Dataset.open(str(root))


def latents_of(dataset: Dataset, batch_size: int, **values: Any) -> Latents:
    values = {"streams": 4, "window": 4, **values}
    return Latents(TrainConfig(images=10**6, batch_size=batch_size, **values), [dataset], 7)


@pytest.mark.parametrize("layout", [2, 3])
def test_a_batch_has_one_shape_and_its_own_samples(tmp_path: Path, layout: int) -> None:
    dataset = bucketed(tmp_path, layout=layout)
    latents = latents_of(dataset, 4)
    assert (latents.channels, latents.side, latents.has_spread) == (4, 4, False)
    seen: dict[tuple[int, ...], list[int]] = {}
    batches = 400
    where = {}
    shards = [ColumnShard(dataset, i) for i in range(4)]
    first = np.cumsum([0, *(len(s) for s in shards)])
    for b in range(batches):
        whole = np.arange(4 * b, 4 * b + 4)
        mean, _ = latents.moments(whole)
        numbers = mean[:, 0, 0, 0].astype(int)
        assert np.array_equal(latents.tokens(whole)[:, 0], numbers), "tokens of the same samples"
        assert np.array_equal(latents.sizes(whole)[:, 0], numbers)
        for i, n in enumerate(numbers):
            s = int(np.searchsorted(first, n, side="right")) - 1
            index = value_of(shards[s].arrays, "embedding_index", int(n - first[s]))
            stored = shards[s].arrays["embeddings"][int(index)]
            assert np.array_equal(latents.embeddings(whole)[i], stored.astype(np.float32))
            where[int(n)] = int(whole[i])
        for rank in range(2):  # what two ranks see is every other place
            half = latents.moments(whole[rank::2])[0]
            assert half.shape[1:] == mean.shape[1:]
            assert np.array_equal(half, mean[rank::2])
        seen.setdefault(mean.shape[2:], []).extend(numbers)
    table = segments.rows_laid(dataset).sum(axis=0)
    for shape, total in zip(SHAPES, table, strict=True):
        samples = seen[shape]
        assert len(samples) / (4 * batches) == pytest.approx(total / table.sum(), abs=0.03)
        for begin in range(0, len(samples) - total, total):  # each sample of a bucket once in its epoch
            assert len(set(samples[begin : begin + total])) == total
    for n, place in where.items():
        s = int(np.searchsorted(first, n, side="right")) - 1
        assert latents.keys(np.array([place])) == [sample_key(s, n - int(first[s]), 100)]


def test_buckets_train_through_the_objective(tmp_path: Path) -> None:
    dataset = bucketed(tmp_path)
    config = TrainConfig(images=8, batch_size=4, unet=tiny.UNET)
    objective = build("train", config, [dataset], 0)
    shapes = set()
    for b in range(8):
        batch = objective.batch(np.arange(4 * b, 4 * b + 4))
        loss, _ = objective(batch)
        assert torch.isfinite(loss)
        shapes.add(tuple(batch["x0"].shape[2:]))
    assert shapes == set(SHAPES)


def test_batches_by_area_are_equal_work_and_take_each_sample_equally_often(tmp_path: Path) -> None:
    dataset = bucketed(tmp_path)
    latents = latents_of(dataset, 8, batch_by_area=2)
    seen: dict[tuple[int, ...], list[int]] = {}
    for b in range(1200):
        n = latents.placement.samples(8 * b)
        mean, _ = latents.moments(np.arange(8 * b, 8 * b + n))
        assert n * mean.shape[2] * mean.shape[3] == 8 * 16  # the smallest of SHAPES has 16 places
        seen.setdefault(mean.shape[2:], []).extend(mean[:, 0, 0, 0].astype(int))
    for shape in SHAPES:
        numbers, counts = np.unique(seen[shape], return_counts=True)
        assert counts.max() - counts.min() <= 1, "in an epoch each sample comes once"
        assert np.unique(seen[shape][: len(numbers)]).size == len(numbers)
    batches = np.bincount([latents.placement.bucket(8 * b) for b in range(2**15)])
    held = segments.rows_laid(dataset).sum(axis=0)
    often = batches * np.array([8, 4, 4]) / held
    assert max(often) < 1.01 * min(often)
    with pytest.raises(ConfigError, match=r"batch_by_area is 8, but a batch_size of 8 leaves fewer images of"):
        latents_of(dataset, 8, batch_by_area=8)


def test_batches_by_area_are_the_same_whatever_the_ranks_and_accumulation(tmp_path: Path) -> None:
    dataset = bucketed(tmp_path)
    config = TrainConfig(images=64, batch_size=8, batch_by_area=4, stratified=True, unet=tiny.UNET, streams=4, window=4)
    objective = build("train", config, [dataset], 0)
    sizes = set()
    for begin in range(0, 400, 8):
        whole = objective.positions(begin, 0, 1, 0, 8)
        sizes.add(len(whole))
        one = objective.batch(whole)
        for ranks, steps in ((2, 1), (1, 2), (2, 2), (4, 1)):
            micro = 8 // ranks // steps
            parts = [objective.positions(begin, r, ranks, a, micro) for a in range(steps) for r in range(ranks)]
            assert len({len(p) for p in parts}) == 1
            together = np.concatenate(parts)
            assert np.array_equal(np.sort(together), whole)
            for name in ("x0", "noise", "t", "text"):
                assert torch.equal(torch.cat([objective.batch(p)[name] for p in parts]), one[name][together - begin])
        strata = np.sort(one["t"].numpy() * len(whole) // 1000)
        assert np.array_equal(strata, np.arange(len(whole))), "one timestep in each part, however many samples"
    assert sizes == {8, 4}
    with pytest.raises(ConfigError, match="batch_by_area is 4, which the 8 micro-batches of a step"):
        layout("train", config.model_copy(update={"micro_batch_size": 1}), 2)


@pytest.mark.slow
def test_batches_by_area_train_alike_on_any_ranks(tmp_path: Path) -> None:
    bucketed(tmp_path / "latents")
    ends = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        run.mkdir()
        (run / "latents").symlink_to(tmp_path / "latents")
        values = {"batch_by_area": 4, "micro_batch_size": 4, "eps": 1e-3, "images": 80, "precision": "fp32"}
        forked.train(tiny.write_config(run, tiny.configuration(run, **values)), ranks)
        ends.append(tensors(step_folder(run, 10), "weights"))
    assert_close(*ends)


def test_several_resolutions_are_mixed_and_each_sample_comes_at_each(tmp_path: Path) -> None:
    """The latents stage keeps a sample at every resolution; batches are of one of them."""
    dataset = bucketed(tmp_path)
    manifest = {**dataset.manifest, "buckets": [dict(b) for b in dataset.manifest["buckets"]]}
    for bucket, side in zip(manifest["buckets"], (16, 32, 32), strict=True):
        bucket["resolution"] = side
    object.__setattr__(dataset, "manifest", manifest)
    latents = latents_of(dataset, 4, resolution=(32, 16))
    seen: dict[tuple[int, ...], set[int]] = {}
    for b in range(200):
        mean, _ = latents.moments(np.arange(4 * b, 4 * b + 4))
        seen.setdefault(mean.shape[2:], set()).update(mean[:, 0, 0, 0].astype(int).tolist())
    table = segments.rows_laid(dataset).sum(axis=0)
    assert {shape: len(numbers) for shape, numbers in seen.items()} == dict(zip(SHAPES, table.tolist(), strict=True))
    small = latents_of(dataset, 4, resolution=16)
    assert {tuple(small.shape(np.array([4 * b]))) for b in range(50)} == {(4, *SHAPES[0])}
    with pytest.raises(ConfigError, match=r"resolution is 64, but .* holds latents of 16 and 32 pixels"):
        latents_of(dataset, 8, resolution=(32, 64))


# ---- several captions a picture ------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.lists(st.text("ab", min_size=1), max_size=4), st.floats(0.1, 9)), min_size=1, max_size=4),
    st.floats(0, 1, exclude_max=True),
)
def test_a_caption_is_chosen_by_its_share(columns: list[tuple[list[str], float]], u: float) -> None:
    """... against the shares laid end to end in exact fractions."""
    texts = [(t, Fraction(w) / len(c)) for c, w in columns for t in c]
    total, end, expected = sum(f for _, f in texts), Fraction(0), ""
    for text, share in texts:
        end += share
        if abs(Fraction(u) * total - end) < Fraction(1, 10**12):
            return  # where float64 may say either
        if not expected and Fraction(u) * total < end:
            expected = text
    assert choose_caption([c for c, _ in columns], [w for _, w in columns], u) == expected


def test_captions_of_several_columns_are_drawn_anew_each_epoch_and_encoded(tmp_path: Path) -> None:
    """From the image shards' columns through the latents stage, whose own columns hold the first caption alone."""
    run = RunPaths(str(tmp_path))
    vae = world.save_vae(Path(run.autoencoder) / "model")
    clip = world.save_clip(Path(run.clip) / "model")
    tiny.make_images(Path(run.images), counts=(6, 5), side=32)
    stage = LatentsStage(LatentsConfig(resolution=32, batch_size=4, device="cpu"), run, str(vae), str(clip))
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    dataset = Dataset.open(run.latents)
    values: dict[str, Any] = {"batch_size": 11, "unet": tiny.UNET, "caption_dropout": 0.25}
    config = TrainConfig(images=5500, captions={"caption": 1.0, "others": 3.0}, **values)
    objective: Any = build("train", config, [dataset], 5)
    positions = np.arange(11 * 200)
    found = objective.latents.captions(positions, ["caption", "others"])
    chosen = [
        choose_caption(c, [1.0, 3.0], u)
        for c, u in zip(found, objective.random.uniform("choice", positions), strict=True)
    ]
    assert objective.latents.captions(positions[:40], ["caption", "as_json"]) == found[:40], "as ingest carries lists"
    stored = [c[0][0] for c in found]
    others = np.array([bool(c[1]) for c in found])
    assert 0 < others.mean() < 1, "some have one caption, some several"
    first = np.array([a == b for a, b in zip(chosen, stored, strict=True)])
    assert first[~others].all()
    assert first[others].mean() == pytest.approx(0.25, abs=0.04)
    assert len({c for c, o in zip(chosen, others, strict=True) if o}) > 8
    keys = objective.keys(positions)
    one = keys[int(np.flatnonzero(others)[0])]
    assert len({c for c, k in zip(chosen, keys, strict=True) if k == one}) == 3, "over the epochs, all of them"
    # What the UNet is shown is the chosen caption as the CLIP encodes it, or the empty one.
    text = load_text(str(clip), "penultimate")
    dropped = objective.random.uniform("caption", positions[:33]) < 0.25
    shown = ["" if d else c for c, d in zip(chosen, dropped, strict=False)]
    batch = objective.batch(positions[:33])
    assert torch.equal(batch["tokens"], text.tokenize(shown)), "nothing is encoded in the loader's thread"
    assert torch.equal(objective.conditioning.condition(batch)[0], text.encode(text.tokenize(shown)))
    with pytest.raises(
        StageError, match=r"no column 'other' in its \.parquet; carry it there with ingest.keep_columns"
    ):
        build("train", TrainConfig(captions={"other": 1.0}, **values), [dataset], 5)


def test_another_resolution_that_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resolution is 64, but .* holds latents of 32 pixels"):
        latents_of(Dataset.open(str(run / "latents")), 8, resolution=64)
    with pytest.raises(ConfigError, match=r"resolution is 64, but .* holds latents of 32 pixels"):
        latents_of(bucketed(tmp_path / "b"), 8, resolution=64)


def test_sources_come_by_weight_and_must_be_of_one_kind(run: Path, tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "more", counts=(20,))
    datasets = [Dataset.open(str(run / "latents")), Dataset.open(str(tmp_path / "more"))]
    sources = [{"weight": 3.0}, {"latents": str(tmp_path / "more")}]
    config = TrainConfig(images=10**6, batch_size=8, streams=4, window=4, sources=sources)
    latents = Latents(config, datasets, 0)
    source = latents.source(np.arange(800))
    assert (source.reshape(100, 8).sum(axis=1) == 2).all()
    mean, _ = latents.moments(np.arange(160))
    second = mean[source[:160] == 1]
    stored = ColumnShard(datasets[1], 0).arrays["mean"].astype(np.float32)
    assert {m.tobytes() for m in second[:20]} == {m.tobytes() for m in stored}
    manifest = tmp_path / "more" / "dataset.json"
    original = manifest.read_text()
    for what in ("vae", "text"):
        manifest.write_text(original.replace(tiny.encoders()[what]["digest"], "w" * 64))
        name = {"vae": "VAE", "text": "CLIP"}[what]
        with pytest.raises(ConfigError, match=rf"train\.sources: .* another {name}"):
            Latents(config, [datasets[0], Dataset.open(str(tmp_path / "more"))], 0)


def unet_config(**values: Any) -> TrainConfig:
    return TrainConfig(images=64, batch_size=8, unet=tiny.UNET, **values)


@pytest.mark.parametrize("weighting", [{}, {"snr_gamma": 5.0}, {"p2_gamma": 1.0}])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_the_loss_is_written_out_in_float64(run: Path, prediction: str, weighting: dict[str, float]) -> None:
    """The objective's loss and its bins against the formulas in numpy, from the batch and the UNet's own output."""
    if prediction == "flow_prediction" and weighting:
        with pytest.raises(ValueError, match="gives the last timestep no weight under prediction_type flow_prediction"):
            unet_config(prediction_type=prediction, **weighting)
        return
    config = unet_config(prediction_type=prediction, initialisation="torch", stratified=True, **weighting)
    objective: Any = build("train", config, [Dataset.open(str(run / "latents"))], 0)
    objective.eval()
    batch = objective.batch(np.arange(64))
    p = process_of(config)
    a, s = (v[batch["t"]].numpy()[:, None, None, None] for v in (p.signal, p.noise))
    x0, noise = (batch[k].double().numpy() for k in ("x0", "noise"))
    with torch.no_grad():
        loss, details = objective(batch)
        xt = torch.from_numpy(a * x0 + s * noise).float()
        out = objective.model(xt, p.time[batch["t"]], batch["text"]).sample.double().numpy()
    targets = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0, "flow_prediction": noise - x0}
    error = ((out - targets[prediction]) ** 2).mean(axis=(1, 2, 3))
    snr = ((a / s) ** 2).reshape(-1)
    of_x0 = np.ones(64)
    if weighting:
        of_x0 = np.minimum(snr, 5.0) if "snr_gamma" in weighting else snr / (1 + snr)
        of_x0 = of_x0 * {"epsilon": 1 / snr, "sample": 1.0}.get(prediction, (s**2).reshape(-1))
    assert float(loss) == pytest.approx((error * of_x0).mean(), rel=1e-4)
    assert float(details[0]) == pytest.approx(error.mean(), rel=1e-4)
    bins = batch["t"].numpy() * 10 // 1000
    for b in range(10):
        assert float(details[1 + b]) * 64 == pytest.approx(error[bins == b].sum(), rel=1e-4, abs=1e-6)
        assert float(details[11 + b]) * 64 == pytest.approx((bins == b).sum())
    # Stratified: one timestep in each 64th, whatever the rank's share.
    whole = np.sort(np.concatenate([objective.batch(np.arange(i, i + 4))["t"].numpy() for i in range(0, 8, 4)]))
    assert np.array_equal(whole * 8 // 1000, np.arange(8))


def test_the_loss_by_timestep_is_summed_in_float32_under_autocast(run: Path) -> None:
    """Where autocast makes the network's products half precise, the sums of what it was wrong by stay exact."""
    objective: Any = build("train", unet_config(initialisation="torch"), [Dataset.open(str(run / "latents"))], 0)
    batch = objective.eval().batch(np.arange(64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        error, _ = objective.errors(batch)
        _, details = objective(batch)
    bins = batch["t"].numpy() * 10 // 1000
    for b in range(10):
        expected = error.double().numpy()[bins == b].sum() / 64
        assert float(details[1 + b]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_learned_variance_learns_and_leaves_the_mean_to_the_simple_loss(run: Path) -> None:
    config = unet_config(learned_variance=True, initialisation="torch")
    objective: Any = build("train", config, [Dataset.open(str(run / "latents"))], 0)
    assert objective.model.config.out_channels == 8
    batch = objective.batch(np.arange(16))
    loss, details = objective(batch)
    loss.backward()
    whole = objective.model.conv_out.weight.grad.clone()
    assert whole[4:].abs().max() > 0
    objective.zero_grad()
    objective.errors(batch)[0].mean().backward()
    torch.testing.assert_close(objective.model.conv_out.weight.grad[:4], whole[:4], rtol=1e-4, atol=1e-7)
    assert float(loss) == pytest.approx(float(details[0] + 0.001 * 1000 * details[1]), rel=1e-5)


OPTIONS: list[dict[str, Any]] = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    {"prediction_type": "v_prediction", "zero_terminal_snr": True, "snr_shift": 2.0},
    {"prediction_type": "sample", "beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
    {"prediction_type": "flow_prediction"},
    {"prediction_type": "flow_prediction", "snr_shift": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_exported_scheduler_undoes_what_training_did(options: dict[str, Any]) -> None:
    """With a network that knows the one picture there is, sampling ends at that picture."""
    from train import diffusion

    config = unet_config(**options)
    found = scheduler(config)
    p = process_of(config)
    if config.prediction_type != "flow_prediction":
        torch.testing.assert_close(found.alphas_cumprod.double(), p.signal**2, rtol=1e-4, atol=1e-6)
    x0 = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found.set_timesteps(50)
    for t in found.timesteps:
        change = float(found.scale_model_input(x, t).sub(x).abs().max())
        assert change == 0
        place = int((p.time.double() - float(t)).abs().argmin())  # the nearest timestep that training had
        at = torch.tensor([place])
        noise = (x - p.signal[place] * x0) / p.noise[place]
        x = found.step(diffusion.target(p, config.prediction_type, x0, noise, at), t, x).prev_sample
    # DDIM ends at the first timestep, whose little noise stays.
    left = float(p.noise[0]) if config.prediction_type != "flow_prediction" else 0.0
    assert float((x - x0).abs().max()) < 3 * left + 0.02
    assert float((x - x0).abs().mean()) < left + 0.005


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"zero_terminal_snr": True}, "zero_terminal_snr cannot go with prediction_type epsilon"),
        ({"zero_terminal_snr": True, "prediction_type": "flow_prediction"}, "ends in pure noise by itself"),
        ({"snr_gamma": 5, "p2_gamma": 1}, "two weights for the same loss"),
        (
            {"snr_gamma": 5, "zero_terminal_snr": True, "prediction_type": "v_prediction"},
            "snr_gamma gives the last timestep no weight under zero_terminal_snr",
        ),
        (
            {"p2_gamma": 1, "zero_terminal_snr": True, "prediction_type": "sample"},
            "p2_gamma gives the last timestep no weight under zero_terminal_snr",
        ),
        ({"learned_variance": True, "offset_noise": 0.1}, "learns the variance of plain noise; set offset_noise to 0"),
        ({"learned_variance": True, "prediction_type": "flow_prediction"}, "learned_variance needs the steps of DDPM"),
        ({"offload": "cpu", "zero_stage": 0}, "offload needs zero_stage 1"),
        ({"compile": True, "zero_stage": 3}, "compile cannot go with zero_stage 3"),
        ({"ema_stds": [0.05, 0.0501]}, "none may come twice"),
    ],
)
def test_options_that_exclude_one_another(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        unet_config(**values)
    assert SourceConfig().loss_weight == 1.0
