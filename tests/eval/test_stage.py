"""An evaluation on a tiny run: same bytes, same numbers, noise independent of batch and worker, nothing lost, nothing
overwritten."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from demo.scorer import SCORES
from eval import model as models
from eval import protocol
from eval.config import EvalConfig
from eval.evaluation import Evaluation
from eval.generate import ImageGenerator, Sample, seed_of
from eval.metrics import frechet, moments
from eval.metrics.definitions import DEFINITIONS
from eval.networks import truncated
from eval.report import history, page
from latents.encoders import load_text
from orchestration import stages
from orchestration.config import RunConfig
from shards import storage
from shards.columns import ColumnShard
from shards.dataset import Dataset, read_stats
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, validate
from shards.stage import Task, begin
from tests.eval.conftest import CONTEXT, SIDE, drive, evaluate, evaluation_of, refs, shard_bytes, start_noise
from tests.orchestration.head import ROOT


@pytest.fixture(scope="module")
def evaluated(run: RunPaths, config: EvalConfig, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A copy of the tiny run with everything done."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run.run, folder)
    own = RunPaths(str(folder))
    evaluate(own, config)
    return own


@pytest.fixture
def own(run: RunPaths, tmp_path: Path) -> RunPaths:
    shutil.copytree(run.run, tmp_path / "run")
    return RunPaths(str(tmp_path / "run"))


def everything(root: str, name: str) -> np.ndarray:
    dataset = Dataset.open(root)
    return np.concatenate([ColumnShard(dataset, p).arrays[name] for p in range(len(dataset.shards))])


def feature_root(stages: list, network: str) -> str:
    return next(s.root for s in stages if s.found.name == network)


def test_two_runs_have_the_same_bytes(evaluated: RunPaths, own: RunPaths, config: EvalConfig) -> None:
    """Another folder, stages that went through pickle, shards in the other order, shared out over two workers."""
    found = evaluation_of(own, config)
    for real in found.real():
        drive(real)
    stage = pickle.loads(pickle.dumps(found.generate))
    begin(stage)
    tasks = list(stage.tasks())
    workers = [stage.worker(), stage.worker()]
    for task in reversed(tasks):
        workers[task.index % 2](task)
    stage.finish([read_stats(stage.root, task.index) for task in tasks])
    for features in found.generate.features():
        drive(features)
    found.measure()
    first = evaluation_of(evaluated, config)
    assert shard_bytes(stage.root) == shard_bytes(first.generate.root)
    assert len(shard_bytes(stage.root)) == 2 * len(tasks) == 6
    for mine, theirs in zip(
        found.generate.features() + found.real(), first.generate.features() + first.real(), strict=True
    ):
        assert shard_bytes(mine.root) == shard_bytes(theirs.root)
    assert Path(found.folder, "metrics.json").read_bytes() == Path(first.folder, "metrics.json").read_bytes()


def test_shards_hold_what_was_drawn(evaluated: RunPaths, config: EvalConfig) -> None:
    found = evaluation_of(evaluated, config)
    dataset, features = Dataset.open(found.generate.root), Dataset.open(feature_root(found.generate.features(), "clip"))
    clip = load_text(refs(evaluated)[1], "last")
    heldout = Dataset.open(evaluated.heldout)
    assert len(dataset) == len(features) == 20
    for position in range(len(dataset.shards)):
        shard, columns = ImageShard(dataset, position), ColumnShard(features, position)
        images = np.stack([decode_rgb(shard.image_bytes(i)) for i in range(len(shard))])
        assert images.shape[1:] == (SIDE, SIDE, 3)
        np.testing.assert_allclose(columns.arrays["images"], clip.encode_images(images).numpy(), atol=1e-5)
        np.testing.assert_allclose(columns.arrays["captions"], clip.encode_captions(shard.captions).numpy(), atol=1e-5)
        assert columns.keys == shard.keys
        for row in shard.table.to_pylist():
            source = ImageShard(heldout, row["source_shard"])
            assert (source.keys[row["source_row"]], source.captions[row["source_row"]]) == (
                row["source_key"],
                row["caption"],
            )
            assert int(row["seed"], 16) == seed_of(row["prompt_id"], row["replicate"])


def test_the_metrics_are_those_of_the_files(evaluated: RunPaths, config: EvalConfig) -> None:
    """Recomputed from the shards with numpy and from the parquet, without the code under test's merging."""
    found = evaluation_of(evaluated, config)
    metrics = json.loads(Path(found.folder, "metrics.json").read_bytes())
    m = metrics["metrics"]
    clip = feature_root(found.generate.features(), "clip")
    drawn, real = everything(clip, "images"), everything(feature_root(found.real(), "clip"), "images")
    direct = frechet.distance(frechet.reference(moments.of(real)), moments.of(drawn))
    assert m["fd_clip_unit"]["value"] == pytest.approx(direct, rel=1e-9)
    assert m["fd_clip_unit"]["n"] == 20
    assert "fewer than 2,048" in m["fd_clip_unit"]["caution"]
    assert "bias_corrected" not in m["fd_clip_unit"]  # 20 images of 16 dimensions
    assert m["fd_clip_unit"]["low"] <= m["fd_clip_unit"]["value"] <= m["fd_clip_unit"]["high"]
    cosine = (drawn.astype(np.float64) * everything(clip, "captions")).sum(1)
    assert m["clip_score"]["value"] == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-6)
    assert m["clip_cosine"]["se"] == pytest.approx(cosine.std(ddof=1) / np.sqrt(20), rel=1e-6)
    shown = everything(feature_root(found.generate.features(), "scorer"), "shows_colour")[:, 0]
    assert m["shows_colour"]["value"] == pytest.approx(shown.mean())
    assert m["shows_colour"]["unit"] == "share"
    psnr = everything(feature_root(found.real(), "vae"), "psnr")
    assert m["vae_psnr"]["value"] == pytest.approx(psnr.mean(), rel=1e-6)
    # Drawn by the demo itself, the real images show what their captions say, and the detector sees it.
    assert metrics["real"]["shows_all"] >= 0.9
    assert metrics["missing"] == {"images": 0, "shards": []}
    assert metrics["protocol"] == json.loads(json.dumps(found.protocol))
    assert metrics["counts"]["images"] == 20
    assert {"one thing", "two things"} <= set(metrics["by_tag"])
    of_one = metrics["by_tag"]["one thing"]["shows_colour"]
    table = pq.read_table([str(p) for p in sorted(Path(found.generate.root).glob("*.parquet"))]).to_pydict()
    single = [" and " not in c and "beside" not in c for c in table["caption"]]
    assert of_one["n"] <= 20
    assert any(single)


def test_what_is_measured_is_no_part_of_how(own: RunPaths, config: EvalConfig) -> None:
    """Every setting that changes a number is in the protocol; batches, threads and devices are not."""
    base = evaluation_of(own, config)

    def other(**changes: object) -> Evaluation:
        return evaluation_of(own, config.model_copy(update=changes))

    for change in (
        {"steps": 3},
        {"guidance_scale": 2.5},
        {"sampler": "euler"},
        {"replicates": 2},
        {"precision": "bfloat16"},
        {"timestep_spacing": "linspace"},
        {"size": 64},
        {"guidance_interval": (0.2, 0.8)},
    ):
        assert other(**change).protocol["id"] != base.protocol["id"], change
        assert other(**change).generate.root != base.generate.root, change
    for change in ({"retrieval_candidates": 50}, {"jackknife_groups": 7}, {"num_prompts": 10}, {"resolution": 16}):
        assert other(**change).protocol["id"] != base.protocol["id"], change
        assert other(**change).generate.root == base.generate.root, change  # the same images serve
    for change in ({"batch_size": 5}, {"device": "cpu"}, {"threads": 2}, {"shard_size": 4}, {"keep_images": 3}):
        assert other(**change).protocol["id"] == base.protocol["id"], change
    assert {"code", "generated_with", "measured_with", "timestep_spacing", "training_set"} <= set(base.protocol)
    assert not {"unet", "vae", "text_encoder", "weights"} & set(base.protocol)


def test_another_way_of_measuring_touches_no_finished_one(own: RunPaths, config: EvalConfig, tmp_path: Path) -> None:
    """Another prompt list, number of prompts, resolution, precision: each has a folder of its own; more prompts of a
    list keep the shards that are there, to the byte, and add to them."""
    small = config.model_copy(update={"num_prompts": 12, "scorer": None})
    first = evaluate(own, small)
    before = {p: p.read_bytes() for p in Path(own.eval).rglob("*") if p.is_file()}
    (tmp_path / "parti.txt").write_text("a red star\na blue circle\na dog\na cat on a mat\n")
    for change in ({"prompts_file": str(tmp_path / "parti.txt")}, {"resolution": 16}, {"precision": "bfloat16"}):
        other = evaluate(own, small.model_copy(update=change))
        assert other.folder != first.folder
    more = evaluate(own, small.model_copy(update={"num_prompts": 20}))
    assert more.generate.root == first.generate.root
    assert len(Dataset.open(more.generate.root)) == 20
    assert json.loads(Path(more.folder, "metrics.json").read_bytes())["counts"]["images"] == 20
    grown = ("dataset.json", "plan.json")  # the images' list is longer; everything else is as it was
    for path, data in before.items():
        assert path.read_bytes() == data or path.name in grown, path
    assert evaluation_of(own, small).is_current()  # asked for fewer again, nothing is to be done
    assert json.loads(Path(first.folder, "metrics.json").read_bytes())["counts"]["images"] == 12
    assert len(history.read_all(own)) == 5


def test_ddim_pictures_do_not_depend_on_batch_or_neighbours(run: RunPaths) -> None:
    model = models.find(run)
    draws = [Sample(f"{i:016x}", i % 2, f"a {word} circle") for i, word in enumerate(("red", "blue", "green", "black"))]

    first, second = (models.build_pipeline(run, model) for _ in range(2))

    def pictures(groups: list[list[Sample]], sampler: str) -> np.ndarray:
        generator = ImageGenerator(first if len(groups) > 1 else second, sampler, 3, 4.0)
        return np.concatenate([generator(group)[0] for group in groups])

    for sampler in ("ddim", "ddpm"):  # ddpm draws noise at every step, too
        together = pictures([draws], sampler)
        alone = pictures([[d] for d in draws], sampler)
        reversed_ = pictures([draws[::-1]], sampler)[::-1]
        for other in (alone, reversed_):
            assert np.abs(together.astype(int) - other.astype(int)).max() <= 1
        assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 1


def test_guidance_one_step_of_ddim_is_the_formula(run: RunPaths) -> None:
    """One DDIM step by hand: x0 = (x - sqrt(1-a) eps) / sqrt(a), prev = sqrt(a') x0 + sqrt(1-a') eps, decoded by the
    VAE."""
    pipeline = models.build_pipeline(run, models.find(run))
    draw = Sample("00000000000000aa", 0, "a red circle")
    found, finite = ImageGenerator(pipeline, "ddim", 1, 5.0)([draw])
    assert finite.all()
    scheduler = pipeline.scheduler
    with torch.inference_mode():
        x = start_noise([draw], (4, 8, 8))
        words = pipeline.tokenizer(["", draw.text], padding="max_length", max_length=CONTEXT, return_tensors="pt")
        states = pipeline.text_encoder(words.input_ids)[0]
        t = int(scheduler.timesteps[0])
        empty, conditioned = pipeline.unet(torch.cat([x, x]), t, states).sample.chunk(2)
        eps = (empty + 5.0 * (conditioned - empty)).double()
        a = scheduler.alphas_cumprod[t].double()
        before = t - scheduler.config.num_train_timesteps
        b = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).double()
        x0 = (x.double() - (1 - a).sqrt() * eps) / a.sqrt()
        latent = (b.sqrt() * x0 + (1 - b).sqrt() * eps).float()
        pixels = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(found[0].astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_the_denoiser_is_rounded(run: RunPaths, precision: str) -> None:
    pipeline = models.build_pipeline(run, models.find(run))
    generator = ImageGenerator(pipeline, "ddim", 2, 2.0, precision=precision)
    kinds: dict[str, set[torch.dtype]] = {"unet": set(), "state": set(), "vae": set()}
    step, decode, forward = pipeline.scheduler.step, pipeline.vae.decode, generator._forward

    def stepped(output, t, sample, **kw):
        kinds["state"] |= {output.dtype, sample.dtype}
        return step(output, t, sample, **kw)

    def decoded(z, **kw):
        kinds["vae"] |= {z.dtype, next(pipeline.vae.parameters()).dtype}
        return decode(z, **kw)

    pipeline.scheduler.step, pipeline.vae.decode = stepped, decoded
    if precision != "float32":

        def rounded(**kw):
            kinds["unet"] |= {kw["sample"].dtype}
            return forward(**kw)

        generator._forward = rounded
    _, finite = generator([Sample("a", 0, "a red circle")])
    assert finite.all()
    assert kinds["state"] == kinds["vae"] == {torch.float32}
    assert next(pipeline.unet.parameters()).dtype == getattr(torch, precision)
    assert kinds["unet"] <= {getattr(torch, precision)}


def test_guidance_outside_its_interval_is_none(run: RunPaths) -> None:
    samples = [Sample("a", 0, "a red circle"), Sample("b", 0, "a blue star")]

    def made(scale: float, interval: tuple[float, float] | None) -> np.ndarray:
        pipeline = models.build_pipeline(run, models.find(run))
        return ImageGenerator(pipeline, "ddim", 4, scale, guidance_interval=interval)(samples)[0].astype(int)

    full, none = made(6.0, None), made(1.0, None)
    assert np.abs(made(6.0, (0.0, 1.0)) - full).max() <= 1
    assert np.abs(made(6.0, (0.999, 1.0)) - none).max() <= 1
    part = made(6.0, (0.4, 0.8))
    assert min(np.abs(part - full).max(), np.abs(part - none).max()) > 1


def test_an_interval_that_would_do_nothing_is_refused(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = models.build_pipeline(run, models.find(run))
    monkeypatch.setattr(type(pipeline), "do_classifier_free_guidance", property(lambda self: False))
    generator = ImageGenerator(pipeline, "ddim", 2, 6.0, guidance_interval=(0.2, 0.8))
    with pytest.raises(ConfigError, match="StableDiffusionPipeline's is not; leave it out"):
        generator([Sample("a", 0, "a red circle")])


def drawn_by(run: RunPaths, **how: bool) -> tuple[np.ndarray, ImageGenerator]:
    generator = ImageGenerator(models.build_pipeline(run, models.find(run)), "ddim", 4, 3.0, **how)
    return generator([Sample(f"{i}", 0, "a red circle") for i in range(3)])[0].astype(int), generator


def test_channels_last_draws_the_same_images_up_to_rounding(run: RunPaths) -> None:
    plain, _ = drawn_by(run)
    assert plain.std() > 10
    last, generator = drawn_by(run, channels_last=True)
    assert np.abs(last - plain).max() <= 1
    weights = [p for p in generator.denoiser.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_denoiser_draws_the_same_images_up_to_rounding(run: RunPaths) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    compiled, _ = drawn_by(run, compile=True)
    assert counters["stats"]["unique_graphs"] >= 1
    assert np.abs(compiled - drawn_by(run)[0]).max() <= 1


def test_compile_without_a_compiler_is_one_sentence(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"eval\.compile: .* install g\+\+, or set eval\.compile to false"):
        ImageGenerator(models.build_pipeline(run, models.find(run)), "ddim", 4, 3.0, compile=True)


def test_a_batch_that_memory_does_not_hold_is_halved(run: RunPaths) -> None:
    pipeline = models.build_pipeline(run, models.find(run))
    generator = ImageGenerator(pipeline, "ddim", 1, 2.0)
    samples = [Sample(f"{i}", 0, "a red circle") for i in range(6)]
    whole = generator(samples)[0]
    sizes: list[int] = []
    make = generator._make

    def little(part, **kw):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(part, **kw)

    generator._make = little
    assert np.abs(generator(samples)[0].astype(int) - whole.astype(int)).max() <= 1
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    generator(samples[:2])
    assert sizes[8:] == [1, 1]  # it is not tried again


def test_a_partial_result_says_what_is_missing(own: RunPaths, config: EvalConfig) -> None:
    found = evaluation_of(own, config)
    stage = found.generate
    begin(stage)
    work = stage.worker()
    tasks = list(stage.tasks())
    stats = [work(task) for task in (tasks[0], tasks[2])]
    partial = found.metrics()
    assert partial["missing"] == {"shards": [1], "images": 8}
    assert partial["counts"]["images"] == 12
    assert partial["metrics"]["clip_score"]["n"] == 12
    with pytest.raises(StageError, match="1 shards are missing, the first is 1"):
        stage.finish(stats)
    assert not storage.exists(storage.join(stage.root, "dataset.json"))
    full = stage.finish([stats[0], work(tasks[1]), stats[1]])
    assert full["count"] == 20
    assert not found.is_current()
    found.measure()
    assert found.is_current()


def test_a_shard_with_lost_rows_is_refused(evaluated: RunPaths, config: EvalConfig) -> None:
    stage = evaluation_of(evaluated, config).generate
    stats = [read_stats(stage.root, task.index) for task in stage.tasks()]
    assert all(s is not None for s in stats)
    stats[1] = {**stats[1], "rows": 7}
    with pytest.raises(StageError, match="shard 1 does not have the images of its task"):
        stage.finish(stats)


@pytest.mark.parametrize("spoil", ["edit", "tear"])
def test_numbers_that_are_not_what_was_measured_do_not_count(
    evaluated: RunPaths, config: EvalConfig, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluation_of(evaluated, config)
    file = Path(found.folder, "metrics.json")
    before = file.read_bytes()
    content = json.loads(before)
    content["metrics"]["clip_score"]["value"] += 1
    file.write_text(json.dumps(content) if spoil == "edit" else before.decode()[:-40])
    assert not found.is_current()
    assert history.read_all(evaluated) == []
    assert f"{file} is torn or was edited" in caplog.text
    found.conclude()
    assert file.read_bytes() == before
    assert len(history.read_all(evaluated)) == 1


def test_results_of_an_older_layout_stay_and_say_so(own: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    from shards.fingerprint import digest_json

    old = {"metrics": {}, "protocol": {"id": "x"}, "counts": {}}
    folder = Path(own.eval) / "step-00000004" / "ddim-25-3"
    folder.mkdir(parents=True)
    text = json.dumps({**old, "digest": digest_json(old)})
    (folder / "metrics.json").write_text(text)
    assert history.read_all(own) == []
    assert "is of an older layout: it stays as it is" in caplog.text
    assert (folder / "metrics.json").read_text() == text


def test_an_image_that_is_not_finite_is_counted_and_left_out(
    own: RunPaths, config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluation_of(own, config)
    stage = found.generate
    begin(stage)
    work = stage.worker()
    decode = work.generator.pipeline.vae.decode

    def broken(latents, **kw):
        result = decode(latents, **kw)
        result[0][1] = float("nan")
        return result

    monkeypatch.setattr(work.generator.pipeline.vae, "decode", broken)
    stats = [work(task) for task in stage.tasks()]
    assert sum(s["status"]["failed_to_generate"] for s in stats) == 5
    stage.finish(stats)
    for features in [*stage.features(), *found.real()]:
        drive(features)
    shown = Path(found.conclude()).read_text()
    metrics = json.loads(Path(found.folder, "metrics.json").read_bytes())
    assert (metrics["counts"]["images"], metrics["counts"]["failed"]) == (15, 5)
    assert metrics["metrics"]["fd_clip_unit"]["n"] == 15
    assert "5 images were not finite" in shown
    assert "has 5 failed images of 20" in shown  # an alarm, without any earlier checkpoint


def test_images_that_are_not_kept_leave_their_features(own: RunPaths, config: EvalConfig) -> None:
    few = evaluate(own, config.model_copy(update={"keep_images": 2}))
    dataset = Dataset.open(few.generate.root)
    kept = [r["image_offset"] is not None for s in dataset.shards for r in dataset.sidecar(s.index).to_pylist()]
    assert (sum(kept), len(kept)) == (6, 20)
    metrics = json.loads(Path(few.folder, "metrics.json").read_bytes())
    assert metrics["counts"]["images"] == 20
    assert metrics["metrics"]["clip_score"]["n"] == 20
    page.render(own, few.model.name)
    shutil.rmtree(storage.join(few.generate.root, "features"))
    with pytest.raises(StageError, match=r"images are not kept \(eval\.keep_images\)"):
        drive(few.generate.features()[0])


def test_a_worker_that_dies_owes_no_features_of_images_that_do_not_stay(
    own: RunPaths, config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = config.model_copy(update={"keep_images": 0, "scorer": None})
    stage = evaluation_of(own, few).generate
    begin(stage)
    work, [first, *_] = stage.worker(), stage.tasks()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work.features[0], "of_images", dies)
    with pytest.raises(KeyboardInterrupt):
        work(first)
    found = evaluate(own, few)
    assert found.result()["metrics"]["clip_score"]["n"] == 20


def test_a_metric_added_to_a_finished_evaluation_needs_no_new_images(
    workplace: tuple[Path, RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the configuration asks for, one that a later version knows, and what a later version measures anew."""
    folder, own = workplace
    settings = yaml.safe_load((folder / "run.yaml").read_text())

    def run_eval(redo: bool = False, **more: object) -> tuple[dict[Path, int], set[str]]:
        """When each shard of images was written, and what is measured in the newest result."""
        settings["eval"] |= more
        stages.run("eval", validate(RunConfig, settings, "run.yaml"), local=True, redo=redo)
        newest = max(Path(own.eval).glob("step*/*/metrics.json"), key=lambda p: p.stat().st_mtime_ns)
        tars = {p: p.stat().st_mtime_ns for p in Path(own.eval).glob("step*/images-*/*.tar")}
        return tars, set(json.loads(newest.read_bytes())["metrics"])

    images, before = run_eval(steps=1)
    again, after = run_eval(redo=True, scorer="demo.scorer")
    assert (again, len(images)) == (images, 3)
    assert after - before == set(SCORES)
    assert before < after
    [numbers] = [p for p in Path(own.eval).glob("step*/*/metrics.json") if "shows_shape" in p.read_text()]
    measured = numbers.stat().st_mtime_ns
    run_eval()
    assert numbers.stat().st_mtime_ns == measured
    monkeypatch.setitem(DEFINITIONS, "sharpness", ("higher", "Sharpness", "a metric of a later version"))
    assert run_eval()[0] == images
    assert numbers.stat().st_mtime_ns > measured
    monkeypatch.setattr(protocol, "MEASURES", protocol.MEASURES + 1)
    assert run_eval()[0] == images
    assert len(list(Path(own.eval).glob("step*/*/metrics.json"))) == 3


def test_a_network_that_comes_too_late_is_one_sentence_and_redo_generates_again(
    own: RunPaths, config: EvalConfig
) -> None:
    few = config.model_copy(update={"keep_images": 2, "scorer": None})
    first = evaluate(own, few)
    later = evaluation_of(own, few.model_copy(update={"scorer": "demo.scorer"}))
    with pytest.raises(ConfigError, match=r"scorer is to see the images .* not all of them stayed .* give --redo"):
        later.generate.begin()
    before = shard_bytes(first.generate.root)
    later.generate.begin(redo=True)
    assert shard_bytes(first.generate.root + ".replaced-1") == before
    for stage in later.stages():
        drive(stage)
    later.conclude()
    assert shard_bytes(later.generate.root) == before
    assert later.result()["metrics"]["shows_shape"]["n"] == 20
    later.generate.begin(redo=True)  # nothing is to be made again, so nothing is set aside
    assert not Path(first.generate.root + ".replaced-2").exists()


def test_seconds_are_those_of_the_work(own: RunPaths, config: EvalConfig) -> None:
    """Generation counts, and the wait for the device does not; the grid's seconds an image and the page's images/s are
    of these."""
    stage = evaluation_of(own, config.model_copy(update={"scorer": None})).generate
    begin(stage)
    work = stage.worker()
    make = work.generator._make

    def slow(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(0.5)
        return make(samples)

    work.generator._make = slow
    first, second, *_ = stage.tasks()
    assert work(first)["seconds"] >= 1  # two batches
    with ThreadPoolExecutor(1) as pool, work.lock:
        began = time.perf_counter()
        of = Task(second.index, "x")
        pixels, rows = [np.zeros((SIDE, SIDE, 3), np.uint8)], [{"caption": "a dog", "prompt_id": "x"}]
        later = pool.submit(work.features[0].of_images, of, ["00001000"], pixels, rows)
        time.sleep(1)
        work.lock.release()
        done = later.result()
        waited = time.perf_counter() - began
        work.lock.acquire()
    assert done["seconds"] <= waited - 0.9


def test_prompts_from_a_file_need_no_heldout_set(own: RunPaths, config: EvalConfig, tmp_path: Path) -> None:
    shutil.rmtree(own.heldout)
    with pytest.raises(ConfigError, match=r"eval\.prompts_file"):
        list(evaluation_of(own, config).generate.tasks())
    file = tmp_path / "prompts.txt"
    file.write_text("a small red circle on white\na big blue star on gray\na dog\n")
    chosen = config.model_copy(update={"prompts_file": str(file), "replicates": 2, "scorer": None})
    found = evaluation_of(own, chosen)
    assert [s.name for s in found.stages()] == ["eval", "features-generated-clip"]
    evaluate(own, chosen)
    metrics = json.loads(Path(found.folder, "metrics.json").read_bytes())
    assert metrics["counts"]["images"] == 6
    assert "fd_clip_unit" not in metrics["metrics"]
    assert metrics["metrics"]["clip_score"]["n"] == 6
    x = everything(feature_root(found.generate.features(), "clip"), "images").astype(np.float64)
    apart = np.mean([1 - x[i] @ x[i + 1] for i in (0, 2, 4)])
    assert metrics["metrics"]["diversity_clip"]["value"] == pytest.approx(apart, rel=1e-5)


def test_truncated_captions_are_counted(run: RunPaths) -> None:
    clip = load_text(refs(run)[1], "last")
    fits, over = " ".join(["cat"] * (CONTEXT - 2)), " ".join(["cat"] * (CONTEXT - 1))
    assert truncated(clip, ["", "a cat", fits, over, "cat " * 10_000]) == [False, False, False, True, True]


def test_long_and_empty_captions_keep_their_end_token(run: RunPaths) -> None:
    """torchmetrics cuts the end token off, where CLIP's text feature is read; ten thousand characters must not."""
    clip = load_text(refs(run)[1], "last")
    captions = ["", "a red circle", "cat " * 2500, "x" * 10_000]
    tokens = clip.tokenize(captions).numpy()
    assert (tokens.argmax(axis=1) == [1, 4, CONTEXT - 1, CONTEXT - 1]).all()
    assert (tokens.max(axis=1) == clip.tokenizer.eot_token_id).all()
    features = clip.encode_captions(captions).numpy()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_nothing_to_evaluate_is_one_sentence(run: RunPaths, config: EvalConfig, tmp_path: Path) -> None:
    empty = RunPaths(str(tmp_path / "run"))
    with pytest.raises(StageError, match="run the train stage first"):
        Evaluation(config, empty, *refs(run))
    with pytest.raises(StageError, match="step-00000009 is not a complete checkpoint"):
        evaluation_of(run, config.model_copy(update={"checkpoint": "step-00000009"}))


def test_the_real_side_is_made_once_for_all_models(own: RunPaths, config: EvalConfig) -> None:
    def roots(**changes: object) -> set[str]:
        return {s.root for s in evaluation_of(own, config.model_copy(update=changes)).real()}

    assert roots(steps=9, sampler="ddpm", num_prompts=3) == roots()
    assert roots(scorer=None) < roots()
    assert roots(resolution=16).isdisjoint(roots())


def test_a_driver_imports_none_of_the_heavy_libraries() -> None:
    """What only lists tasks and asks whether they are done: with torch it would take seconds and 700 MB."""
    code = (
        "import sys\n"
        "import eval.compare, eval.explain, eval.grid, eval.human, eval.report.page, eval.sample, eval.evaluation\n"
        "import orchestration.stages, orchestration.watch\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy', 'matplotlib', 'ray', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
