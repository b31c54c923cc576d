"""The two stages on a tiny run: same bytes, same numbers, noise independent of batch and worker, nothing lost."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from eval import checkpoints, frechet, history, moments, report
from eval.config import EvalConfig
from eval.generate import Artist, Draw, seed_of, start_noise
from eval.reference import ReferenceStage
from eval.stage import GenerateStage, conclude, stages, truncated
from latents.encoders import load_text
from shards import storage
from shards.columns import ColumnShard
from shards.dataset import Dataset, read_stats
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.eval.conftest import CONTEXT, SIDE, drive, refs, shard_bytes
from tests.orchestration.head import ROOT


@pytest.fixture(scope="module")
def evaluated(run: RunPaths, config: EvalConfig, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A copy of the tiny run with both stages done."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run.run, folder)
    own = RunPaths(str(folder))
    for stage in stages(config, own, *refs(own)):
        drive(stage)
    return own


def generate_stage(run: RunPaths, config: EvalConfig) -> GenerateStage:
    return GenerateStage(config, run, *refs(run))


def test_two_runs_have_the_same_bytes(evaluated: RunPaths, run: RunPaths, config: EvalConfig, tmp_path: Path) -> None:
    """Another folder, a stage that went through pickle, shards in the other order, shared out over two workers."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(run.run, folder)
    other = RunPaths(str(folder))
    stage = pickle.loads(pickle.dumps(generate_stage(other, config)))
    tasks = list(stage.tasks())
    workers = [stage.worker(), stage.worker()]
    for task in reversed(tasks):
        workers[task.index % 2](task)
    stage.finish([read_stats(stage.root, task.index) for task in tasks])
    first = generate_stage(evaluated, config)
    assert shard_bytes(stage.root) == shard_bytes(first.root)
    assert len(shard_bytes(stage.root)) == 3 * len(tasks) == 9
    for name in ("metrics.json", "dataset.json"):
        assert Path(stage.root, name).read_bytes() == Path(first.root, name).read_bytes()
    reference, first_reference = stage.reference(), first.reference()
    assert shard_bytes(reference.root) == shard_bytes(first_reference.root)


def test_shards_hold_what_was_drawn(evaluated: RunPaths, config: EvalConfig) -> None:
    stage = generate_stage(evaluated, config)
    dataset = Dataset.open(stage.root)
    clip = load_text(refs(evaluated)[1], "last")
    heldout = Dataset.open(evaluated.heldout)
    assert len(dataset) == 20
    for position in range(len(dataset.shards)):
        shard, columns = ImageShard(dataset, position), ColumnShard(dataset, position)
        pictures = np.stack([decode_rgb(shard.image_bytes(i)) for i in range(len(shard))])
        assert pictures.shape[1:] == (SIDE, SIDE, 3)
        np.testing.assert_allclose(columns.arrays["images"], clip.encode_images(pictures).numpy(), atol=1e-5)
        np.testing.assert_allclose(columns.arrays["captions"], clip.encode_captions(shard.captions).numpy(), atol=1e-5)
        cosine = (columns.arrays["images"] * columns.arrays["captions"]).sum(1)
        np.testing.assert_allclose(shard.table["clip_cosine"].to_numpy(), cosine, atol=1e-6)
        for row in shard.table.to_pylist():
            source = ImageShard(heldout, row["source_shard"])
            assert (source.keys[row["source_row"]], source.captions[row["source_row"]]) == (
                row["source_key"],
                row["caption"],
            )
            assert row["seed"] == seed_of(row["prompt_id"], row["replicate"], "start")


def test_the_metrics_are_those_of_the_files(evaluated: RunPaths, config: EvalConfig) -> None:
    """Recomputed from the shards with numpy and from the parquet, without the code under test's merging."""
    stage = generate_stage(evaluated, config)
    metrics = json.loads(Path(stage.root, "metrics.json").read_bytes())
    found = metrics["metrics"]

    def everything(root: str, name: str) -> np.ndarray:
        dataset = Dataset.open(root)
        return np.concatenate([ColumnShard(dataset, p).arrays[name] for p in range(len(dataset.shards))])

    reference = stage.reference()
    drawn, real = everything(stage.root, "images"), everything(reference.root, "images")
    direct = frechet.distance(frechet.reference(moments.of(real)), moments.of(drawn))
    assert found["fd_clip_unit"]["value"] == pytest.approx(direct, rel=1e-9)
    assert found["fd_clip_unit"]["n"] == 20
    table = pq.read_table([str(p) for p in sorted(Path(stage.root).glob("*.parquet"))]).to_pydict()
    cosine = np.array(table["clip_cosine"])
    assert found["clip_score"]["value"] == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-12)
    assert found["clip_cosine"]["se"] == pytest.approx(cosine.std(ddof=1) / np.sqrt(20), rel=1e-9)
    assert found["faithful_colour"]["value"] == np.mean(table["shows_colour"])
    assert found["control_colour"]["value"] == np.mean(table["control_colour"])
    sidecar = pq.read_table([str(p) for p in sorted(Path(reference.root).glob("*.parquet"))]).to_pydict()
    assert found["vae_psnr"]["value"] == pytest.approx(np.mean(sidecar["psnr"]), rel=1e-12)
    # Drawn by the demo itself, the real pictures show what their captions say, and the detector sees it.
    assert found["real_all"]["value"] >= 0.9
    assert metrics["missing"] == {"pictures": 0, "shards": []}
    assert metrics["protocol"] == stage.protocol().to_json()
    assert metrics["counts"]["pictures"] == 20


def test_ddim_pictures_do_not_depend_on_batch_or_neighbours(run: RunPaths) -> None:
    subject = checkpoints.find(run)
    draws = [Draw(f"{i:016x}", i % 2, f"a {word} circle") for i, word in enumerate(("red", "blue", "green", "black"))]

    first, second = (checkpoints.build_pipeline(run, subject) for _ in range(2))

    def pictures(groups: list[list[Draw]], sampler: str) -> np.ndarray:
        artist = Artist(first if len(groups) > 1 else second, sampler, 3, 4.0)  # "workers" with a pipeline each
        return np.concatenate([artist(group)[0] for group in groups])

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
    pipeline = checkpoints.build_pipeline(run, checkpoints.find(run))
    draw = Draw("00000000000000aa", 0, "a red circle")
    found, finite = Artist(pipeline, "ddim", 1, 5.0)([draw])
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


def test_a_partial_result_says_what_is_missing(run: RunPaths, config: EvalConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.run, folder)
    stage = generate_stage(RunPaths(str(folder)), config)
    work = stage.worker()
    tasks = list(stage.tasks())
    stats = [work(task) for task in (tasks[0], tasks[2])]
    partial = stage.metrics()
    assert partial["missing"] == {"shards": [1], "pictures": 8}
    assert partial["counts"]["pictures"] == 12
    assert partial["metrics"]["clip_score"]["n"] == 12
    with pytest.raises(StageError, match="1 shards are missing, the first is 1"):
        stage.finish(stats)
    assert not storage.exists(storage.join(stage.root, "dataset.json"))
    full = stage.finish([stats[0], work(tasks[1]), stats[1]])
    assert full["count"] == 20
    assert stage.metrics_are_current()


def test_a_shard_with_lost_rows_is_refused(evaluated: RunPaths, config: EvalConfig) -> None:
    stage = generate_stage(evaluated, config)
    stats = [read_stats(stage.root, task.index) for task in stage.tasks()]
    assert all(s is not None for s in stats)
    stats[1] = {**stats[1], "rows": 7}  # type: ignore[dict-item]
    with pytest.raises(StageError, match="shard 1 does not have the pictures of its task"):
        stage.finish(stats)  # type: ignore[arg-type]


def test_what_the_bytes_depend_on_is_in_the_fingerprint(run: RunPaths, config: EvalConfig) -> None:
    def digest(**changes: object) -> str:
        return generate_stage(run, config.model_copy(update=changes)).made_with().digest

    base = digest()
    for change in ({"steps": 3}, {"guidance_scale": 2.5}, {"sampler": "euler"}, {"batch_size": 5}, {"replicates": 2}):
        assert digest(**change) != base
    assert digest(device="cpu", jackknife_groups=7, retrieval_candidates=50) == base


def test_changed_statistics_are_measured_again_without_new_pictures(evaluated: RunPaths, config: EvalConfig) -> None:
    changed = config.model_copy(update={"jackknife_groups": 5})
    stage = generate_stage(evaluated, changed)
    before = shard_bytes(stage.root)
    assert not stage.metrics_are_current()
    page = conclude(changed, evaluated, *refs(evaluated))
    assert stage.metrics_are_current()
    assert shard_bytes(stage.root) == before
    assert Path(page).is_file()
    conclude(config, evaluated, *refs(evaluated))


@pytest.mark.parametrize("spoil", ["edit", "tear"])
def test_numbers_that_are_not_what_was_measured_do_not_count(
    evaluated: RunPaths, config: EvalConfig, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = generate_stage(evaluated, config)
    file = Path(stage.root, "metrics.json")
    before = file.read_bytes()
    found = json.loads(before)
    found["metrics"]["clip_score"]["value"] += 1
    file.write_text(json.dumps(found) if spoil == "edit" else before.decode()[:-40])
    assert not stage.metrics_are_current()
    assert history.cells(evaluated) == []
    assert f"{file} is torn or was edited" in caplog.text
    conclude(config, evaluated, *refs(evaluated))
    assert file.read_bytes() == before
    assert len(history.cells(evaluated)) == 1


def test_a_picture_that_is_not_finite_is_counted_and_left_out(
    run: RunPaths, config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.run, folder)
    stage = generate_stage(RunPaths(str(folder)), config)
    work = stage.worker()
    decode = work.artist.pipeline.vae.decode

    def broken(latents, **kw):  # type: ignore[no-untyped-def]
        result = decode(latents, **kw)
        result[0][1] = float("nan")
        return result

    monkeypatch.setattr(work.artist.pipeline.vae, "decode", broken)
    stats = [work(task) for task in stage.tasks()]
    assert sum(s["status"]["failed_to_generate"] for s in stats) == 5
    stage.finish(stats)
    metrics = json.loads(Path(stage.root, "metrics.json").read_bytes())
    assert (metrics["counts"]["pictures"], metrics["counts"]["failed"]) == (15, 5)
    assert metrics["metrics"]["fd_clip_unit"]["n"] == 15
    assert "5 pictures were not finite" in Path(report.render(stage.run, stage.subject.name)).read_text()


def test_prompts_from_a_file_need_no_heldout_set(run: RunPaths, config: EvalConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.run, folder)
    shutil.rmtree(folder / "heldout")
    own = RunPaths(str(folder))
    with pytest.raises(ConfigError, match=r"eval\.prompt_file"):
        list(generate_stage(own, config).tasks())
    file = tmp_path / "prompts.txt"
    file.write_text("a small red circle on white\na big blue star on gray\na dog\n")
    chosen = config.model_copy(update={"prompt_file": str(file), "replicates": 2})
    made = stages(chosen, own, *refs(own))
    assert [s.name for s in made] == ["eval"]
    drive(made[0])
    metrics = json.loads(Path(made[0].root, "metrics.json").read_bytes())
    assert metrics["counts"]["pictures"] == 6
    assert "fd_clip_unit" not in metrics["metrics"]
    assert metrics["metrics"]["clip_score"]["n"] == 6
    assert Path(conclude(chosen, own, *refs(own))).is_file()


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
        GenerateStage(config, empty, *refs(run))
    with pytest.raises(StageError, match="step-00000009 is not a complete checkpoint"):
        GenerateStage(config.model_copy(update={"checkpoint": "step-00000009"}), run, *refs(run))


def test_the_reference_names_what_it_was_made_with(run: RunPaths, config: EvalConfig) -> None:
    def root(**changes: object) -> str:
        return ReferenceStage(config.model_copy(update=changes), run, *refs(run), SIDE).root

    assert root(steps=9, sampler="ddpm", checkpoint="x") == root()
    assert root(faithfulness=None) != root()


def test_a_driver_imports_none_of_the_heavy_libraries() -> None:
    """What only lists tasks and asks whether they are done: with torch it would take seconds and 700 MB."""
    code = (
        "import sys\n"
        "import eval.compare, eval.explain, eval.grid, eval.human, eval.report, eval.sample, eval.stage\n"
        "import orchestration.stages, orchestration.watch\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy', 'matplotlib', 'ray', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
