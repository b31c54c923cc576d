"""What editing by prompt and upscaling do to images: python -m benchmarks.systems [edit] [words] [upscale] [...]

edit       in the world of the tests (tests/train/small_world.py), where captions say a square's colour alone: a model
           with cross-attention in all its blocks is fitted, and one word of its prompts exchanged, "a red square" for
           "a blue square", by prompt-to-prompt as `carrara edit` does it. An image is right where the nearest of its
           world's has the prompt's colour and is at most LIMIT levels away (root mean square); a square of another
           size or place would be further. Of those that are right before: how many are right afterwards, where they
           stood, on the ground that was, in the new colour; beside two prompts that are drawn from one noise
words      by the demo's run (--run runs/demo), whose captions say place and size as well: the colour is exchanged in
           captions of one thing that nobody trained on, and the demo's detector judges. Of those that show all of the
           caption before: how many have place and size right afterwards, and the new colour
upscale    on a run's images (--run, whose VAE, CLIP and latents are there): an upscaler is fitted and draws the
           held-out ones from what is left of them at the size of a latent; beside bicubic enlargement, and beside the
           run's VAE, which sees the whole image and is the most that it can reach
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

EXCHANGES = {  # shares of the steps in which cross- and self-attention are taken over
    "one noise alone": (0.0, 0.0),
    "cross 0.8, self 0.4": (0.8, 0.4),
    "cross 0.8, self 0.8": (0.8, 0.8),
    "cross 1, self 1": (1.0, 1.0),
}
LIMIT = 15.0
# Stable Diffusion's in small, with cross-attention in its middle alone.
UPSCALER = {
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
NOISE_LEVELS = (0, 20, 100)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["edit", "upscale"])
    parser.add_argument("--images", type=int, default=20_000, help="to train on, in all epochs")
    parser.add_argument("--count", type=int, default=120, help="images to edit, or at most to enlarge")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="of upscale and words")
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args()
    for name in given.what:
        with tempfile.TemporaryDirectory(prefix="carrara-systems-") as folder:
            {"edit": bench_edit, "words": bench_words, "upscale": bench_upscale}[name](given, Path(folder) / "run")


# ---- editing by prompt -----------------------------------------------------------------------------


def bench_edit(given: argparse.Namespace, run: Path) -> None:
    """Fit a model in the world of the tests and exchange words."""
    from tests.train import forked, small_world

    forked.warm()
    run.mkdir()
    small_world.prepare(run)
    small_world.fit(run, given.images, given.seed, unet=small_world.ATTENTIVE)
    print(f"\n{given.images} images, {given.count} edits, {given.steps} steps of DDIM")
    for line in forked.on_ranks(1, edited, str(run / "model"), given.count, given.steps)[0]:
        print(line)


def edited(model: str, count: int, steps: int) -> list[str]:
    """A line for each of EXCHANGES."""
    from diffusers import AutoencoderKL

    from tests.train import small_world

    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    there = through(vae, small_world.clean().reshape(-1, small_world.SIDE, small_world.SIDE, 3))
    there = there.reshape(small_world.clean().shape)
    names = list(small_world.COLOURS)
    words = [(a, b) for a, b in itertools.permutations(range(len(names)), 2)]
    lines = []
    for exchange, shares in EXCHANGES.items():
        pairs = [pair for w in words for pair in drawn_pairs(model, names, w, shares, -(-count // len(words)), steps)]
        asked = np.array([w for w in words for _ in range(-(-count // len(words)))])
        before, after = (
            small_world.distances(np.stack([p[i] for p in pairs]), there).reshape(len(pairs), -1) for i in (0, 1)
        )
        shape = small_world.clean().shape[:3]
        (c0, k0, g0), (c1, k1, g1) = (np.unravel_index(d.argmin(1), shape) for d in (before, after))
        right = (c0 == asked[:, 0]) & (before.min(1) <= LIMIT)
        kept, said = (k1 == k0) & (g1 == g0) & (after.min(1) <= LIMIT), c1 == asked[:, 1]
        far = float(np.median(before.min(1)))
        judged = {"place, size and ground kept": kept, "new colour": said, "both": kept & said}
        lines.append(shares_of(exchange, right, judged) + f"; median {far:.1f} levels from the nearest before")
    return lines


def shares_of(exchange: str, right: np.ndarray, judged: dict[str, np.ndarray]) -> str:
    """A line: of those that were right before, bool [N], the share of which each of `judged` holds."""
    from eval.metrics.estimate import wilson

    n = int(right.sum())
    text = f"{exchange:20s} right before {n} of {len(right)}"
    for what, found in judged.items():
        share = float(found[right].mean()) if n else 0.0
        low, high = wilson(share, n) if n else (0.0, 1.0)
        text += f"; {what} {share:.0%} [{low:.0%}, {high:.0%}]"
    return text


def bench_words(given: argparse.Namespace, run: Path) -> None:
    """Exchange colours in captions of the demo."""
    del run
    print(f"\n{given.count} edits, {given.steps} steps of DDIM, guidance 3")
    for line in words_exchanged(str(given.run.resolve() / "model"), given.count, given.steps, given.seed):
        print(line)


def words_exchanged(model: str, count: int, steps: int, seed: int) -> list[str]:
    """A line for the noise alone, and for what is edited by default."""
    import dataclasses
    import random

    from demo import faithfulness, scenes
    from eval import model as models
    from eval.edit import DrawnPairs, PairGenerator
    from shards.layout import RunPaths

    rng, asked = random.Random(seed), []
    while len(asked) < count:
        scene = scenes.sample(rng, "heldout", pair_share=0.0)
        text, (thing,) = scenes.caption(scene, rng), scene.things
        colour = rng.choice([c for c in scenes.COLOURS if c != thing.colour])
        if text.split().count(thing.colour) == 1:
            after = dataclasses.replace(scene, things=(dataclasses.replace(thing, colour=colour),))
            other = " ".join(colour if word == thing.colour else word for word in text.split())
            asked.append((scene, text, after, other))
    lines = []
    for exchange, (cross, own) in list(EXCHANGES.items())[:2]:
        drawn = {"cross_attention": cross, "self_attention": own, "steps": steps, "device": "cpu", "seed": seed}
        generator = PairGenerator(DrawnPairs(**drawn), models.of_pipeline(model), RunPaths(model))
        found = []
        for number, (scene, text, after, other) in enumerate(asked):
            generator.ask(text, other)
            images = generator.draw(number)[0]
            seen = [
                faithfulness.compare(faithfulness.detect(i), s) for i, s in zip(images, (scene, after), strict=True)
            ]
            found.append((all(seen[0].values()), seen[1]["position"] and seen[1]["size"], seen[1]["colour"]))
        right, kept, said = np.array(found).T
        lines.append(
            shares_of(exchange, right, {"place and size right": kept, "new colour": said, "both": kept & said})
        )
    return lines


def drawn_pairs(
    model: str, names: list[str], words: tuple[int, int], shares: tuple[float, float], count: int, steps: int
) -> list[np.ndarray]:
    """Images before and after, uint8 [2,H,W,3], of one exchange of words."""
    from eval import model as models
    from eval.edit import EditRequest, PairGenerator
    from shards.layout import RunPaths

    source, target = (f"a {names[w]} square" for w in words)
    asked = {"source": source, "target": target, "steps": steps, "guidance_scale": 2.0, "device": "cpu"}
    asked |= {"cross_attention": shares[0], "self_attention": shares[1]}
    generator = PairGenerator(EditRequest(**asked), models.of_pipeline(model), RunPaths(model))
    generator.ask(source, target)
    return [generator.draw(number)[0] for number in range(count)]


def through(vae: Any, pixels: np.ndarray) -> np.ndarray:
    """What a VAE gives back of images, uint8 [N,H,W,3]."""
    import torch

    from eval.generate import to_uint8
    from train.autoencoder import to_unit

    with torch.inference_mode():
        decoded = vae.decode(vae.encode(to_unit(torch.from_numpy(pixels))).latent_dist.mode()).sample
    return to_uint8((decoded / 2 + 0.5).clamp(0, 1))


# ---- upscaling -------------------------------------------------------------------------------------


def bench_upscale(given: argparse.Namespace, run: Path) -> None:
    """Fit an upscaler on a run's images, and enlarge its held-out ones."""
    from tests.train import forked, tiny

    forked.warm()
    base = given.run.resolve()
    run.mkdir()
    for name in ("images", "latents"):
        (run / name).symlink_to(base / name)
    train = {
        "upscale": {},
        "unet": UPSCALER,
        "images": given.images,
        "batch_size": 32,
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "adamw_learning_rate": 1.5e-3,
        "warmup_images": given.images // 16,
        "ema_halflife_images": given.images // 20,
        "prediction_type": "v_prediction",
        "beta_schedule": "squaredcos_cap_v2",
        "checkpoint_every_images": given.images,
        "log_every_images": 640,
        "threads": 1,
    }
    forked.fit(tiny.write_config(run, {"run": str(run), "seed": given.seed, "train": train}), 1)
    for line in forked.on_ranks(1, enlarged, str(base), str(run / "model"), given.count, given.steps)[0]:
        print(line)


def enlarged(base: str, model: str, count: int, steps: int) -> list[str]:
    """A line for each way to enlarge: PSNR and sharpness, Frechet distance, and PSNR of the image made small again."""
    from diffusers import AutoencoderKL, StableDiffusionUpscalePipeline
    from PIL import Image

    from eval import networks
    from eval.metrics import frechet
    from eval.reconstruct import gradient_energy
    from eval.rows import images_of
    from latents.resize import resize_crop
    from shards.dataset import Dataset
    from shards.images import decode_rgb
    from shards.layout import RunPaths
    from tests.train import small_world
    from train.image_conditioning import shrink

    paths = RunPaths(base)
    side = int(Dataset.open(paths.latents).manifest["resolution"])
    rows = list(itertools.islice(images_of(Dataset.open(paths.heldout)), count))
    real = np.stack([resize_crop(decode_rgb(data), side)[0] for _, data in rows if data is not None])
    captions = [str(row["caption"] or "") for row, data in rows if data is not None]
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(model)
    small = [shrink(Image.fromarray(p), *[side // pipeline.vae_scale_factor] * 2) for p in real]
    vae = AutoencoderKL.from_pretrained(str(Path(paths.autoencoder) / "model"))
    found = {
        "bicubic": np.stack([np.asarray(s.resize((side, side), Image.Resampling.BICUBIC)) for s in small]),
        "the VAE": through(vae, real),
    }
    for level in NOISE_LEVELS:
        given = {"image": small, "noise_level": level, "num_inference_steps": steps, "guidance_scale": 1.0}
        found[f"noise_level {level}"] = small_world.draw_all(pipeline, captions, **given)
    clip = networks.load(networks.find("clip", str(Path(paths.clip) / "model")))

    def features(pixels: np.ndarray) -> np.ndarray:
        embedded: np.ndarray = clip(clip.prepare(pixels))["images"]
        return embedded

    reference = frechet.reference_of(features(real))
    given_small = np.stack([np.asarray(s) for s in small])
    lines = [f"\n{len(real)} held-out images of {side} px from {small[0].width} px, {steps} steps"]
    for name, pixels in found.items():
        again = np.stack([np.asarray(shrink(Image.fromarray(p), *small[0].size)) for p in pixels])
        psnr, faithful = networks.psnr(real, pixels), networks.psnr(given_small, again)
        sharp = gradient_energy(pixels).sum() / gradient_energy(real).sum()
        distance = frechet.distance_of(reference, features(pixels))
        lines.append(
            f"{name:16s} PSNR {psnr.mean():.2f} +- {1.96 * psnr.std(ddof=1) / len(psnr) ** 0.5:.2f} dB; "
            f"Frechet distance by the run's CLIP {distance:.4f}; gradient energy {sharp:.2f} of the originals'; "
            f"made small again {faithful.mean():.1f} dB"
        )
    return lines


if __name__ == "__main__":
    main()
