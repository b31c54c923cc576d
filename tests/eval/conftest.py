"""A tiny run: pictures of the demo's world, a VAE, a CLIP and a pipeline with random weights, all with fixed seeds."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo import scenes
from eval.config import EvalConfig
from eval.evaluation import Evaluation
from eval.generate import Sample, generators
from latents.weights import find_clip, find_vae
from shards.dataset import commit_shard, write_manifest
from shards.fingerprint import Fingerprint, digest_file
from shards.images import pack_tar
from shards.layout import RunPaths, sample_key
from shards.stage import begin
from train.config import TrainConfig
from train.text_export import write_tokenizer

SIDE, PER_SHARD = 32, 12
CONTEXT = 24


def write_heldout(root: str, count: int, hostile: str | None = None) -> None:
    """Image shards of `count` held-out scenes; the first caption can be replaced."""
    rng = random.Random(5)
    stats = []
    for index in range(-(-count // PER_SHARD)):
        rows = min(PER_SHARD, count - index * PER_SHARD)
        keys = [sample_key(index, row, PER_SHARD) for row in range(rows)]
        captions, samples = [], []
        for key in keys:
            scene = scenes.sample(rng, "heldout")
            picture = io.BytesIO()
            scenes.draw(scene, rng, SIDE, SIDE).save(picture, "PNG")
            captions.append(scenes.caption(scene, rng))
            samples.append((key, {"png": picture.getvalue()}))
        if hostile and index == 0:
            captions[0] = hostile
        tar, extents = pack_tar(samples)
        table = pa.table(
            {
                "key": keys,
                "caption": captions,
                "status": ["success"] * rows,
                "image_offset": [p["png"][0] for p in extents],
                "image_size": [p["png"][1] for p in extents],
                "image_ext": ["png"] * rows,
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        files = {".tar": tar, ".parquet": sink.getvalue()}
        stats.append(
            commit_shard(
                root, index, files, {"rows": rows, "count": rows}, Fingerprint("ingest", 1, {}, f"{rows} rows")
            )
        )
    write_manifest(root, "images", stats, {"status": {"success": count}})


def write_clip(folder: Path) -> None:
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    model = open_clip.CLIP(**model_cfg)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")


def write_vae(folder: Path) -> AutoencoderKL:
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    vae.save_pretrained(folder)
    return vae


def write_pipeline(folder: Path, vae: AutoencoderKL, scratch: Path) -> None:
    torch.manual_seed(3)
    write_tokenizer(scratch, CONTEXT)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            vocab_size=49408,
            eos_token_id=49407,
            bos_token_id=49406,
            pad_token_id=0,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(scratch),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers saves it with the pad token's id lost
    shutil.copytree(scratch, folder / "tokenizer")
    (folder / "carrara.json").write_text(json.dumps({"checkpoint": "step-00000004", "images_seen": 256}))


def build_run(folder: Path, count: int = 30, hostile: str | None = None) -> RunPaths:
    run = RunPaths(str(folder))
    write_heldout(run.heldout, count, hostile)
    write_clip(folder / "clip" / "model")
    vae = write_vae(folder / "autoencoder" / "model")
    write_pipeline(folder / "model", vae, folder / "scratch")
    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Shared by tests that do not change it; 30 held-out pictures in three shards."""
    return build_run(tmp_path_factory.mktemp("eval") / "run")


@pytest.fixture(scope="session")
def config() -> EvalConfig:
    return EvalConfig(
        num_prompts=20,
        steps=2,
        batch_size=4,
        shard_size=8,
        guidance_scale=2.0,
        scorer="demo.scorer",
        jackknife_groups=4,
    )


def start_noise(samples: Sequence[Sample], shape: tuple[int, ...]) -> torch.Tensor:
    """What the samples' generators give first: float32 [len(samples), *shape]."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators(samples)])


def refs(run: RunPaths) -> tuple[str, str]:
    return run.autoencoder + "/model", run.clip + "/model"


def drive(stage) -> dict:
    """Run a whole stage in this process."""
    begin(stage)
    work = stage.worker()
    return stage.finish([work(task) for task in stage.tasks()])


def evaluation_of(run: RunPaths, config: EvalConfig) -> Evaluation:
    return Evaluation(config, run, *refs(run))


def evaluate(run: RunPaths, config: EvalConfig) -> Evaluation:
    """Every stage in this process, then the numbers and the page."""
    evaluation = evaluation_of(run, config)
    for stage in evaluation.stages():
        drive(stage)
    evaluation.conclude()
    return evaluation


def shard_bytes(root: str) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in sorted(Path(root).iterdir()) if p.suffix in (".tar", ".parquet", ".safetensors")
    }


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity publishes it, with random weights that keep the signal's size from layer to layer."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def random_features(n: int, d: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * scale * np.arange(1, d + 1) ** -0.5


def write_checkpoint(run: RunPaths, step: int, unet: UNet2DConditionModel, images: int) -> Path:
    """A checkpoint folder as the trainer leaves it; its EMA is twice its weights, so that the two differ."""
    folder = Path(run.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    weights = {k: v.contiguous() for k, v in unet.state_dict().items()}
    for name in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        save_file({k: v * (2 if name == "ema" else 1) for k, v in weights.items()}, folder / f"{name}.safetensors")
    files = {f.name: {"size": f.stat().st_size, "sha256": digest_file(f)} for f in sorted(folder.iterdir())}
    manifest = {
        "format_version": 1,
        "step": step,
        "images": images,
        "files": files,
        "config": TrainConfig().model_dump(mode="json"),
        "model_config": json.loads(json.dumps(dict(unet.config))),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def trained(run: RunPaths, tmp_path: Path) -> RunPaths:
    """The tiny run with two checkpoints and the latents' manifest in place of the exported model."""
    folder = tmp_path / "run"
    shutil.copytree(run.run, folder)
    own = RunPaths(str(folder))
    unet = UNet2DConditionModel.from_pretrained(own.model + "/unet")
    shutil.rmtree(own.model)
    vae, clip = (find(ref) for find, ref in zip((find_vae, find_clip), refs(own), strict=True))
    text = {"ref": clip.ref, "digest": clip.digest, "layer": "penultimate", "context_length": 24, "width": 32}
    latents = {
        "kind": "latents",
        "format_version": 1,
        "fingerprint": "f",
        "rows": 1,
        "count": 1,
        "shards": [],
        "resolution": SIDE,
        "text": text,
        "vae": {"ref": vae.ref, "digest": vae.digest, "scaling_factor": 0.5, "config": vae.config},
    }
    Path(own.latents).mkdir()
    (Path(own.latents) / "dataset.json").write_text(json.dumps(latents))
    write_checkpoint(own, 1, unet, 64)
    write_checkpoint(own, 2, unet, 128)
    return own


@pytest.fixture
def workplace(run: RunPaths, tmp_path: Path) -> tuple[Path, RunPaths]:
    """A run, and its configuration with a grid of four cells in three shards each."""
    shutil.copytree(run.run, tmp_path / "run")
    own = RunPaths(str(tmp_path / "run"))
    Path(own.checkpoints).mkdir()
    vae, text = refs(own)
    (tmp_path / "table.csv").write_text("url,caption\nhttp://127.0.0.1/x.png,x\n")
    settings = {
        "run": own.run,
        "ingest": {"table": str(tmp_path / "table.csv")},
        "autoencoder": {"pretrained": vae},
        "clip": {"pretrained": text},
        "eval": {
            "num_prompts": 12,
            "batch_size": 4,
            "shard_size": 4,
            "guidance_scale": 2.0,
            "jackknife_groups": 4,
            "grid": {"samplers": ["ddim"], "steps": [1, 3], "guidance_scales": [2], "first_percent": 30},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path, own
