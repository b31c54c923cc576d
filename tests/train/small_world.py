"""A small world that a model learns in a minute: one large thing in a picture, its shape left out of the caption.

    prepare(run); fit(run, "train", 9600, unet=UNET)               # a model of the captions
    fit(other, "train", 6400, start_from=..., control={})          # and what is told a picture beside it
    shapes_follow_edges(other / "model")                           # by the demo's detector, on pictures never seen

Pictures are the demo's, 32 px; the VAE is fitted for a few thousand of them, the CLIP has random weights with words far
apart, which is all that a UNet needs of it.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from demo import faithfulness, scenes
from latents.config import LatentsConfig
from latents.stage import LatentsStage
from shards.dataset import commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import pack_tar
from shards.layout import RunPaths, sample_key
from shards.stage import begin
from tests.train import tiny
from train.config import ControlConfig
from train.initial import spread_words
from train.pictures import control_image

SIDE, PER_SHARD = 32, 500
COLOURS = ("red", "yellow", "green", "blue")
GROUNDS = ("white", "gray")
CONTEXT = 16

VAE = {
    "block_out_channels": [32, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
UNET = {
    "block_out_channels": [48, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 2,
    "norm_num_groups": 16,
}
PROCESS = {
    "prediction_type": "v_prediction",
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_sampling": "logit_normal",
    "logit_mean": 0.3,
    "logit_std": 1.2,
}


def scene_of(rng: random.Random, shape: str | None = None) -> scenes.Scene:
    thing = scenes.Thing(
        rng.choice(COLOURS), shape or rng.choice(scenes.SHAPES), "large", rng.choice(list(scenes.PLACES))
    )
    return scenes.Scene((thing,), rng.choice(GROUNDS))


def words(scene: scenes.Scene) -> str:
    """The caption: everything but the shape."""
    thing = scene.things[0]
    return f"a {thing.colour} thing {scenes.AT[thing.place][0]} on {scene.ground}"


def picture(scene: scenes.Scene, seed: int) -> Image.Image:
    return scenes.draw(scene, random.Random(seed), 2 * SIDE, 2 * SIDE).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def pairs(count: int, seed: int = 0) -> Iterator[tuple[scenes.Scene, scenes.Scene, int, str]]:
    """Before, after, the seed of both drawings, and the instruction: the thing gets another colour."""
    rng = random.Random(seed)
    for i in range(count):
        before = scene_of(rng)
        thing = before.things[0]
        colour = rng.choice([c for c in COLOURS if c != thing.colour])
        after = scenes.Scene((scenes.Thing(colour, thing.shape, thing.size, thing.place),), before.ground)
        yield before, after, 1_000_000 * (seed + 1) + i, f"make it {colour}"


def write_images(root: str, samples: list[tuple[Image.Image, str]]) -> None:
    stats = []
    for index in range(-(-len(samples) // PER_SHARD)):
        part = samples[index * PER_SHARD : (index + 1) * PER_SHARD]
        files, rows = [], []
        for row, (image, caption) in enumerate(part):
            sink = io.BytesIO()
            image.save(sink, "PNG")
            key = sample_key(index, row, PER_SHARD)
            files.append((key, {"png": sink.getvalue()}))
            rows.append({"key": key, "caption": caption, "status": "success", "image_ext": "png"})
        tar, places = pack_tar(files)
        for line, place in zip(rows, places, strict=True):
            line["image_offset"], line["image_size"] = place["png"]
        made = {".tar": tar, ".parquet": tiny.parquet(tiny.pa.Table.from_pylist(rows))}
        count = {"count": len(part), "rows": len(part)}
        stats.append(commit_shard(root, index, made, count, Fingerprint("ingest", 1, {}, str(index))))
    write_manifest(root, "images", stats, {})


def write_clip(folder: Path) -> None:
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    vision = {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    model_cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.CLIP(**model_cfg)
        spread_words(model)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")


def prepare(run: Path, count: int = 4000) -> None:
    """Pictures with captions, a VAE that is fitted to them, a CLIP, and the latents."""
    rng = random.Random(1)
    scenes_ = [scene_of(rng) for _ in range(count)]
    write_images(str(run / "images"), [(picture(s, i), words(s)) for i, s in enumerate(scenes_)])
    write_clip(run / "clip" / "model")
    fit(run, "autoencoder")
    write_latents(run, run / "autoencoder" / "model", run / "clip" / "model")


def prepare_edits(run: Path, base: Path, count: int = 4000) -> None:
    """Pictures after as images with instructions as captions, and by key in `before` those before."""
    found = list(pairs(count))
    write_images(str(run / "images"), [(picture(after, seed), text) for _, after, seed, text in found])
    write_images(str(run / "before" / "images"), [(picture(before, seed), text) for before, _, seed, text in found])
    write_latents(run, base / "autoencoder" / "model", base / "clip" / "model")


def share_latents(run: Path, base: Path) -> None:
    """A run on the images and latents of another one."""
    run.mkdir()
    for name in ("images", "latents"):
        (run / name).symlink_to(base / name)


def write_latents(run: Path, vae: Path, clip: Path) -> None:
    config = LatentsConfig(resolution=SIDE, batch_size=64, device="cpu", text_layer="last")
    stage = LatentsStage(config, RunPaths(str(run)), str(vae), str(clip))
    begin(stage)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])


def configuration(run: Path, images: int, **train: Any) -> dict[str, Any]:
    shared = {"threads": 1, "log_every_images": 640, "checkpoint_every_images": 1600}
    fit = {"batch_size": 32, "images": images, "optimizer": "muon", "learning_rate": 2e-3, "warmup_images": 640}
    fit |= {"ema_halflife_images": 1000, "channels_last": True, "streams": 8}
    vae = {"resolution": SIDE, "images": 3000, "batch_size": 16, "learning_rate": 3e-3, "warmup_images": 300}
    vae |= {"initialisation": "thumbnail", "ema_halflife_images": 300, "mse_weight": 1.0, "kl_weight": 1.2e-3}
    vae |= {"optimizer": "muon", "channels_last": True, "model": VAE}
    return {
        "run": str(run), "seed": 3, "autoencoder": {**shared, **vae}, "train": {**shared, **fit, **PROCESS, **train},
    }  # fmt: skip


def fit(run: Path, stage: str, images: int = 1000, **train: Any) -> str:
    """Fit a stage in a process of its own; what it said."""
    config = tiny.write_config(run, configuration(run, images, **train))
    ranks = tiny.start_ranks(["train/main.py", "--config", str(config), "--stage", stage], 1)
    return tiny.finish_ranks(ranks, timeout=1500)


def draw_all(pipeline: Any, prompts: list[str], batch: int = 50, **given: Any) -> np.ndarray:
    """uint8 [N,H,W,3]: a picture a prompt, its noise by its number; lists among `given` have one entry a prompt."""
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for at in range(0, len(prompts), batch):
        some = slice(at, at + batch)
        more = {k: v[some] if isinstance(v, list) else v for k, v in given.items()}
        generators = [torch.Generator().manual_seed(i) for i in range(at, min(at + batch, len(prompts)))]
        with torch.inference_mode():
            pixels = pipeline(prompts[some], generator=generators, output_type="np", **more).images
        found.append((pixels * 255).round().astype(np.uint8))
    return np.concatenate(found)


DRAWING = {"num_inference_steps": 12, "guidance_scale": 2.0}


def unseen(count: int) -> tuple[list[scenes.Scene], np.ndarray]:
    """Scenes in drawings that nobody was trained on, uint8 [N,H,W,3]."""
    rng = random.Random(99)
    found = [scene_of(rng) for _ in range(count)]
    return found, np.stack([np.asarray(picture(s, 50_000_000 + i)) for i, s in enumerate(found)])


def judged(pixels: np.ndarray, wanted: list[scenes.Scene]) -> dict[str, float]:
    """Shares of the pictures that show each attribute, and all of them, by the demo's detector."""
    verdicts = [faithfulness.judge(x, s) for x, s in zip(pixels, wanted, strict=True)]
    found = {name: float(np.mean([v[name] for v in verdicts])) for name in faithfulness.ATTRIBUTES}
    return {**found, "all": float(np.mean([all(v.values()) for v in verdicts]))}


def shapes_follow_edges(model: Path, count: int = 100) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
    """What pictures drawn to edges of unseen ones show, what the same do with the control off, and the former."""
    from diffusers import StableDiffusionControlNetPipeline

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(model, safety_checker=None)
    wanted, real = unseen(count)
    edges = [Image.fromarray(control_image(x, ControlConfig())) for x in real]
    prompts = [words(s) for s in wanted]
    on = draw_all(pipeline, prompts, image=edges, **DRAWING)
    off = draw_all(pipeline, prompts, image=edges, controlnet_conditioning_scale=0.0, **DRAWING)
    return judged(on, wanted), judged(off, wanted), on


def edits_do_as_told(model: Path, count: int = 100) -> tuple[dict[str, float], np.ndarray]:
    """What edited pictures show of what they should: the new colour, and all else as it was."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model, safety_checker=None)
    found = list(pairs(count, seed=7))
    given = [picture(before, seed) for before, _, seed, _ in found]
    drawn = draw_all(pipeline, [t for *_, t in found], image=given, image_guidance_scale=1.2, **DRAWING)
    return judged(drawn, [after for _, after, _, _ in found]), drawn


def paints_what_is_missing(
    model: Path, base: Path, count: int = 100
) -> tuple[float, float, dict[str, float], np.ndarray]:
    """PSNR under a mask over the lower half, dB, of an inpainting model and of its base through diffusers' blending;
    what the former's pictures show."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    wanted, real = unseen(count)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[SIDE // 2 :] = 255
    images, masks = [Image.fromarray(x) for x in real], [Image.fromarray(mask)] * count
    parts = StableDiffusionPipeline.from_pretrained(base, safety_checker=None).components
    blending = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    trained = StableDiffusionInpaintPipeline.from_pretrained(model, safety_checker=None)
    given = {"image": images, "mask_image": masks, "height": SIDE, "width": SIDE, "strength": 1.0, **DRAWING}
    prompts = [words(s) for s in wanted]
    ours, theirs = (draw_all(p, prompts, **given) for p in (trained, blending))
    under = slice(SIDE // 2, None)

    def psnr(x: np.ndarray) -> float:
        return float(10 * np.log10(255**2 / np.square(x[:, under].astype(float) - real[:, under]).mean()))

    pasted = np.where(mask[..., None] > 0, ours, real)
    return psnr(ours), psnr(theirs), judged(pasted, wanted), pasted
