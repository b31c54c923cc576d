"""What the levers of training do at 16 px: python -m benchmarks.levers [--seeds 8] [--images 4000] [--minutes 14]

The world of the tests (tests/train/small_world.py): a coloured square in one of four corners on one of two greys, whose
caption says the colour alone. A rectified flow is fitted from scratch on few images of it, once plainly and once with
each lever, by the same seeds; each model draws the same prompts from the same noise. Judged are

    error    how far an image is from the nearest of those that its caption allows, root mean square in levels of 255
    colour   share of images in the colour that was asked for, by the nearest of the eight in which a caption is true

and printed is the mean over seeds of each, and of the difference from the plain fit of the same seed with its 95 %
interval (Student's t).
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from latents.config import FeaturesConfig

LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise_candidates: 8": {"noise_candidates": 8},
    "contrastive_weight: 0.05": {"contrastive_weight": 0.05},
    "flip": {"flip": True},
    "alignment": {"alignment": {"hidden": 128}},
}


def main() -> None:
    from tests.train import forked, small_world

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=60, help="after which no further seed is begun")
    parser.add_argument("--images", type=int, default=4000, help="to train on, in all epochs")
    parser.add_argument("--count", type=int, default=200, help="of the images that there are")
    parser.add_argument("--pictures", dest="generated", type=int, default=300, help="to draw")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    given = parser.parse_args()
    began = time.monotonic()
    forked.warm()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LEVERS}
    with tempfile.TemporaryDirectory(prefix="carrara-levers-") as folder:
        base = Path(folder) / "base"
        base.mkdir()
        tower = FeaturesConfig(pretrained=str(base / "clip" / "model"))  # whose weights are random, as the CLIP's are
        small_world.prepare(base, given.count, flip=True, features=tower)
        for seed, (name, lever) in itertools.product(range(given.seeds), LEVERS.items()):
            if name == "plain" and time.monotonic() - began > 60 * given.minutes:
                break
            run = Path(folder) / "run"
            small_world.share_latents(run, base)
            flow = {"prediction_type": "flow_prediction", "unet": small_world.UNET, "beta_schedule": "scaled_linear"}
            small_world.fit(run, given.images, seed, optimizer="adamw", learning_rate=2e-3, **flow, **lever)
            (judged,) = forked.on_ranks(1, judge, str(run / "model"), given.generated, given.steps)
            found[name].append(judged)
            print(f"seed {seed}, {name}: error {judged[0]:.2f}, colour {judged[1]:.1%}", flush=True)
            shutil.rmtree(run)
    print(f"{len(found['plain'])} seeds, {given.images} images in all, of {given.count} images")
    plain = np.array(found["plain"])
    for name, values in found.items():
        each = np.array(values)
        line = f"{name:26s} error {each[:, 0].mean():6.2f}   colour {each[:, 1].mean():6.1%}"
        if name != "plain":
            (e, e_half), (c, c_half) = (interval(each[:, i] - plain[:, i]) for i in range(2))
            line += f"   from plain: error {e:+.2f} +- {e_half:.2f}, colour {100 * c:+.1f} +- {100 * c_half:.1f} points"
        print(line)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The mean of paired differences, and half of its 95 % interval."""
    n = len(differences)
    half = scipy.stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n) if n > 1 else float("inf")
    return float(differences.mean()), float(half)


def judge(model: str, count: int, steps: int) -> tuple[float, float]:
    """Error and share of right colours of `count` images of a pipeline."""
    from diffusers import StableDiffusionPipeline

    from tests.train import small_world

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    colours = np.arange(count) % len(small_world.COLOURS)
    prompts = [f"a {list(small_world.COLOURS)[c]} square" for c in colours]
    pixels = small_world.draw_all(pipeline, prompts, num_inference_steps=steps, guidance_scale=2.0).astype(np.float64)
    # Every image there is without its noise, [colour, corner x grey, 16, 16, 3].
    clean = np.empty((len(small_world.COLOURS), 8, small_world.SIDE, small_world.SIDE, 3))
    for c, value in enumerate(small_world.COLOURS.values()):
        for k, ((y, x), grey) in enumerate(itertools.product(small_world.CORNERS, small_world.GREYS)):
            clean[c, k] = grey
            clean[c, k, y : y + small_world.SQUARE, x : x + small_world.SQUARE] = value
    far = np.square(pixels[:, None, None] - clean[None]).mean(axis=(3, 4, 5)).min(axis=2)  # [count, colours]
    own = far[np.arange(count), colours]
    return float(np.sqrt(own).mean()), float((far.argmin(axis=1) == colours).mean())


if __name__ == "__main__":
    main()
