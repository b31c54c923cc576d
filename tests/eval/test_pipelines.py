"""Any diffusers pipeline as the subject, with a UNet or a transformer; results in pairs; COCO's recipe end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval import coco
from eval import model as models
from eval.config import EvalConfig
from orchestration import evaluation as commands
from orchestration.run_stage import main
from shards.dataset import Dataset
from shards.images import ImageShard
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.eval.conftest import SIDE, refs

SETTINGS = ["eval.num_prompts=6", "eval.steps=1", "eval.batch_size=3", "eval.shard_size=6", "eval.jackknife_groups=4"]


@pytest.fixture(scope="module")
def stranger(run: RunPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that is not Carrara's: of Stable Diffusion's layout, with a safety checker in its index."""
    folder = tmp_path_factory.mktemp("stranger") / "sd tiny"
    shutil.copytree(run.model, folder)
    (folder / "carrara.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(f"a {c} {s}" for c in ("red", "blue") for s in ("star", "circle", "square")))
    return file


def test_any_pipeline_is_evaluated_without_a_run(stranger: Path, prompts: Path, run: RunPaths, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"eval.prompts_file={prompts}", f"eval.clip={refs(run)[1]}", "eval.resolution=16"]
    page = commands.evaluate_model(str(stranger), str(tmp_path / "out"), settings, local=True)
    assert "safety checker was left out" in Path(page).read_text()
    found = json.loads(next(Path(tmp_path / "out" / "eval").rglob("metrics.json")).read_bytes())
    assert found["model"]["safety_checker_removed"]
    assert found["counts"]["images"] == 6
    assert found["protocol"]["size"] == SIDE
    assert found["protocol"]["resolution"] == 16
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"eval", "reports", "status"}  # no empty folders needed
    assert found["checkpoint"].startswith("sd-tiny-")
    with pytest.raises(ConfigError, match="needs a folder for its results"):
        commands.evaluate_model(str(stranger), None, settings, local=True)
    with pytest.raises(ConfigError, match="there is no folder /nowhere"):
        commands.evaluate_model("/nowhere", str(tmp_path / "out"), settings, local=True)


def test_a_transformer_draws_too(prompts: Path, run: RunPaths, tmp_path: Path) -> None:
    """A DiT pipeline of another library's make: PixArt's, with a T5, at its own size, its own scheduler."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = Tokenizer(kinds.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL.from_pretrained(refs(run)[0])
    pipeline = PixArtAlphaPipeline(
        tokenizer=fast, text_encoder=text, vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler()
    )
    pipeline.save_pretrained(tmp_path / "dit")
    model = models.of_pipeline(str(tmp_path / "dit"))
    assert (model.size, set(model.parts) >= {"transformer", "vae", "text_encoder", "scheduler"}) == (32, True)
    for extra in (["eval.precision=bfloat16"], ["eval.guidance_interval=[0.3, 0.9]"]):
        settings = [*SETTINGS, "eval.steps=2", f"eval.prompts_file={prompts}", f"eval.clip={refs(run)[1]}", *extra]
        commands.evaluate_model(str(tmp_path / "dit"), str(tmp_path / "out"), settings, local=True)
    results = [json.loads(p.read_bytes()) for p in (tmp_path / "out").rglob("metrics.json")]
    assert [r["counts"]["images"] for r in results] == [6, 6]


def test_two_models_are_compared_in_pairs(
    stranger: Path, prompts: Path, run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over two runs: the same prompts and noise, differences by metric, a verdict in one sentence."""
    other = tmp_path / "other"
    shutil.copytree(stranger, other)
    from safetensors.torch import load_file, save_file

    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + (50 if k == "conv_out.bias" else 0) for k, v in load_file(weights).items()}, weights)
    settings = [*SETTINGS, f"eval.prompts_file={prompts}", f"eval.clip={refs(run)[1]}"]
    for name, model in (("a", stranger), ("b", other)):
        commands.evaluate_model(str(model), str(tmp_path / name), settings, local=True)
    names = [next((tmp_path / n / "eval").iterdir()).name for n in "ab"]
    capsys.readouterr()
    a, b = (f"{tmp_path / n}:{m}" for n, m in zip("ab", names, strict=True))
    assert main(["compare", a, b, "--json", str(tmp_path / "c.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "c.json").read_text())
    assert lines[0] == found["sentence"]
    assert all(n in lines[0] for n in names)
    values = {d["metric"]: d["value"] for d in found["differences"] if not d["tag"]}
    results = [json.loads(next((tmp_path / n / "eval").rglob("metrics.json")).read_bytes()) for n in "ab"]
    for metric, value in values.items():
        x, y = (r["metrics"][metric]["value"] for r in results)
        assert value == pytest.approx(y - x)
    assert main(["compare", a, str(tmp_path / "nowhere")]) == 2
    commands.evaluate_model(str(stranger), str(tmp_path / "c"), [*settings, "eval.steps=2"], local=True)
    assert main(["compare", a, f"{tmp_path / 'c'}:{names[0]}"]) == 1
    assert "measured differently and cannot be compared (steps: 1 and 2)" in capsys.readouterr().err


def coco_files(folder: Path, count: int = 12) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    (folder / "val2014").mkdir(parents=True)
    found: dict[str, list[dict]] = {"images": [], "annotations": []}
    for i in range(count):
        name = f"COCO_val2014_{i:012d}.jpg"
        side = (48 + i, 64)
        Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(folder / "val2014" / name)
        found["images"].append({"id": i, "file_name": name})
        for k in range(2):
            found["annotations"].append({"id": 2 * i + k, "image_id": i, "caption": f"caption {k}\nof {i} "})
    (folder / "captions.json").write_text(json.dumps(found))
    return str(folder / "captions.json"), str(folder / "val2014")


def test_coco_becomes_a_reference_and_its_prompts(tmp_path: Path) -> None:
    annotations, images = coco_files(tmp_path)
    said = coco.reference(annotations, images, str(tmp_path / "out"), 8, seed=3)
    assert "the reference is the drawn ones, 8" in said
    lines = [json.loads(x) for x in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert len({x["id"] for x in lines}) == 8
    assert all(x["prompt"] == f"caption 0 of {x['id']}" for x in lines)
    dataset = Dataset.open(str(tmp_path / "out/images"))
    shard = ImageShard(dataset, 0)
    assert {int(k) for k in shard.keys} == {int(x["id"]) for x in lines}
    first = Path(images, f"COCO_val2014_{int(shard.keys[0]):012d}.jpg")
    assert shard.image_bytes(0) == first.read_bytes()  # not a byte of an image changes
    before = (tmp_path / "out/images/00000.tar").stat().st_mtime_ns
    coco.reference(annotations, images, str(tmp_path / "out"), 8, seed=3)
    assert (tmp_path / "out/images/00000.tar").stat().st_mtime_ns == before
    assert "all images, 12" in coco.reference(annotations, images, str(tmp_path / "all"), 8, everything=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/prompts.jsonl").write_text('{"prompt": "of my own"}\n')
    with pytest.raises(ConfigError, match="is there with other prompts"):
        coco.reference(annotations, images, str(tmp_path / "mine"), 8, seed=3)
    assert "of my own" in (tmp_path / "mine/prompts.jsonl").read_text()
    assert not (tmp_path / "mine/images").exists()
    for bad, says in (("{}", "is no captions file of COCO's"), ("x", "is no captions file")):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ConfigError, match=says):
            coco.reference(str(tmp_path / "bad.json"), images, str(tmp_path / "o"), 1)
    with pytest.raises(ConfigError, match="has 12 images with captions"):
        coco.reference(annotations, images, str(tmp_path / "o"), 13)
    Path(images, "COCO_val2014_000000000000.jpg").unlink()
    with pytest.raises(ConfigError, match="lacks 1 of 12 images"):
        coco.reference(annotations, images, str(tmp_path / "o"), 12)


def test_every_step_of_the_coco_recipe_runs(stranger: Path, run: RunPaths, tmp_path: Path) -> None:
    """configs/coco30k.yaml as it stands, in its numbers smaller, on a pipeline of Stable Diffusion's layout."""
    annotations, images = coco_files(tmp_path)
    command = ["reference", "coco", "--annotations", annotations, "--images", images, "--out", str(tmp_path / "coco")]
    assert main([*command, "--count", "8"]) == 0
    small = {
        "prompts_file": tmp_path / "coco/prompts.jsonl",
        "reference": tmp_path / "coco/images",
        "num_prompts": 8,
        "steps": 2,
        "size": "null",
        "resolution": 16,
        "precision": "float32",
        "batch_size": 4,
        "shard_size": 4,
        "inception": "null",
        "clip": refs(run)[1],
        "keep_images": 2,
        "jackknife_groups": 4,
    }
    settings = [f"eval.{k}={v}" for k, v in small.items()]
    config = Path(__file__).parents[2] / "configs" / "coco30k.yaml"
    page = commands.evaluate_model(str(stranger), str(tmp_path / "out"), settings, str(config), local=True)
    found = json.loads(next((tmp_path / "out").rglob("metrics.json")).read_bytes())
    assert found["protocol"]["sampler"] == "pndm"
    assert found["counts"]["real_images"] == 8
    assert {"fd_clip_unit", "cmmd", "clip_score"} <= set(found["metrics"])
    assert Path(page).is_file()


def test_shipped_configurations_end_with_a_report(tmp_path: Path) -> None:
    """What would be missing after days of training is said before it begins; the shipped ones lack nothing."""
    import yaml

    from orchestration import checks
    from orchestration.config import RunConfig
    from shards.settings import validate

    folder, table = Path(__file__).parents[2] / "configs", str(tmp_path / "table.parquet")
    pq.write_table(pa.table({"url": ["http://example.org/1.png"], "caption": ["one"]}), table)
    for name in ("sd2-256.yaml", "lora.yaml", "control.yaml", "edit.yaml", "demo.yaml"):
        settings = yaml.safe_load((folder / name).read_text())
        settings["run"] = str(tmp_path / "run")  # the demo's may be there by now
        settings["ingest"]["table"] = table  # the user's own
        if settings["ingest"].get("heldout_table"):
            settings["ingest"]["heldout_table"] = table
        config = validate(RunConfig, settings, name)
        checks.check_static("eval", config)  # others look for the user's columns, and for weights on a hub
        bare = config.model_copy(
            update={"ingest": config.ingest.model_copy(update={"heldout_fraction": 0.0, "heldout_table": None})}
        )
        with pytest.raises(ConfigError, match="it would have no prompts"):
            checks.check_static("eval", bare)
    assert EvalConfig().num_prompts == 256
    broken = models.Model("x", "model", {}, 32, None, str(folder))
    with pytest.raises(StageError, match="cannot be opened as a diffusers pipeline"):
        models.build_pipeline(RunPaths("/nowhere"), broken)
