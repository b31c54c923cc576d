"""What the levers of training do, over seeds: python -m benchmarks.levers [levers] [optimizers] [--minutes 14]

levers        at 16 px, in the world of the tests (tests/train/small_world.py): a coloured square in one of four corners
              on one of two greys, whose caption says the colour alone. A rectified flow is fitted from scratch on few
              images of it, plainly and with each lever, and draws the same prompts from the same noise. Judged are

                  error    how far an image is from the nearest of those that its caption allows, root mean square in
                           levels of 255
                  colour   share of images in the colour that was asked for, by the nearest in which a caption is true
optimizers    on a run's latents (--run): the model of configs/emoji.yaml on a part of its images, by AdamW, at that of
              RATES which does best on a seed of its own, and by Muon, as the file has it. Judged are

                  loss       of the average of the weights on the run's held-out images
                  seconds    of the whole fit, start and export included

Fits of one seed begin with the same weights and see the same images and noise in the same order. Printed is the mean
over seeds of each, and of the difference from the first fit of the same seed with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from latents.config import FeaturesConfig

Judged = tuple[float, float]

LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise_candidates: 8": {"noise_candidates": 8},
    "contrastive_weight: 0.05": {"contrastive_weight": 0.05},
    "flip": {"flip": True},
    "alignment": {"alignment": {"hidden": 128}},
}
RATES = (1e-3, 2e-3, 4e-3)
SEED_OF_RATES = 1000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["levers"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="after which no further seed is begun")
    parser.add_argument("--images", type=int, default=4000, help="to train on, in all epochs")
    parser.add_argument("--count", type=int, default=200, help="levers: of the images that there are")
    parser.add_argument("--pictures", dest="generated", type=int, default=300, help="levers: to draw")
    parser.add_argument("--steps", type=int, default=10, help="levers: of the sampler")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="of optimizers")
    given = parser.parse_args()
    from tests.train import forked

    forked.warm()
    for name in given.what:
        with tempfile.TemporaryDirectory(prefix="carrara-levers-") as folder:
            {"levers": bench_levers, "optimizers": bench_optimizers}[name](given, Path(folder))


def compare(
    fits: Sequence[str], figures: tuple[str, str], judged: Callable[[str, int], Judged], given: argparse.Namespace
) -> None:
    """Judge each of the fits by each seed, and print their means and what they differ from the first one."""
    began = time.monotonic()
    found: dict[str, list[Judged]] = {name: [] for name in fits}
    for seed, name in itertools.product(range(given.seeds), fits):
        if name == fits[0] and time.monotonic() - began > 60 * given.minutes:
            break
        found[name].append(judged(name, seed))
        values = ", ".join(f"{f} {v:.4g}" for f, v in zip(figures, found[name][-1], strict=True))
        print(f"seed {seed}, {name}: {values}", flush=True)
    first = np.array(found[fits[0]])
    print(f"\n{len(first)} seeds, {given.images} images in all")
    for name, rows in found.items():
        each = np.array(rows)
        line = f"{name:26s}" + "".join(f" {f} {each[:, i].mean():.4g}  " for i, f in enumerate(figures))
        if name != fits[0]:
            apart = [interval(each[:, i] - first[:, i]) for i in range(2)]
            line += f" from {fits[0]}: " + ", ".join(
                f"{f} {mean:+.3g} +- {half:.2g}" for f, (mean, half) in zip(figures, apart, strict=True)
            )
        print(line)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The mean of paired differences, and half of its 95 % interval."""
    n = len(differences)
    half = scipy.stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n) if n > 1 else float("inf")
    return float(differences.mean()), float(half)


# ---- levers ----------------------------------------------------------------------------------------


def bench_levers(given: argparse.Namespace, folder: Path) -> None:
    """See above."""
    from tests.train import forked, small_world

    base = folder / "base"
    base.mkdir()
    tower = FeaturesConfig(pretrained=str(base / "clip" / "model"))  # whose weights are random, as the CLIP's are
    small_world.prepare(base, given.count, flip=True, features=tower)

    def judged(name: str, seed: int) -> Judged:
        run = folder / "run"
        small_world.share_latents(run, base)
        flow = {"prediction_type": "flow_prediction", "unet": small_world.UNET, "beta_schedule": "scaled_linear"}
        small_world.fit(run, given.images, seed, optimizer="adamw", learning_rate=2e-3, **flow, **LEVERS[name])
        found: Judged = forked.on_ranks(1, judge, str(run / "model"), given.generated, given.steps)[0]
        shutil.rmtree(run)
        return found

    compare(list(LEVERS), ("error", "colour"), judged, given)


def judge(model: str, count: int, steps: int) -> Judged:
    """Error and share of right colours of `count` images of a pipeline."""
    from diffusers import StableDiffusionPipeline

    from tests.train import small_world

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    colours = np.arange(count) % len(small_world.COLOURS)
    prompts = [f"a {list(small_world.COLOURS)[c]} square" for c in colours]
    pixels = small_world.draw_all(pipeline, prompts, num_inference_steps=steps, guidance_scale=2.0)
    far = small_world.distances(pixels, small_world.clean()).min(axis=(2, 3))  # [count, colours]
    own = far[np.arange(count), colours]
    return float(own.mean()), float((far.argmin(axis=1) == colours).mean())


# ---- optimizers ------------------------------------------------------------------------------------


def bench_optimizers(given: argparse.Namespace, folder: Path) -> None:
    """See above."""
    import yaml

    from tests.train import forked, tiny

    demo = yaml.safe_load((Path(__file__).parents[1] / "configs" / "emoji.yaml").read_text())["train"]
    part = given.images / demo["images"]
    demo |= {name: round(demo[name] * part) for name in ("images", "warmup_images", "ema_halflife_images")}
    demo |= {"ranks": 1, "threads": 1, "checkpoint_every_images": demo["images"]}
    demo["validation"] = {"images": 1000, "every_images": demo["images"]}
    base = given.run.resolve()

    def fitted(seed: int, **train: Any) -> Judged:
        run = folder / "run"
        run.mkdir()
        for name in ("images", "heldout", "latents"):
            (run / name).symlink_to(base / name)
        began = time.monotonic()
        forked.fit(tiny.write_config(run, {"run": str(run), "seed": seed, "train": {**demo, **train}}), 1)
        seconds = time.monotonic() - began
        events = map(json.loads, (run / "train" / "events.jsonl").read_text().splitlines())
        loss = [e["loss"] for e in events if e["kind"] == "validation"][-1]
        shutil.rmtree(run)
        return loss, seconds

    def adamw(rate: float) -> dict[str, Any]:
        return {"optimizer": "adamw", "learning_rate": rate, "adamw_learning_rate": None}

    losses = {rate: fitted(SEED_OF_RATES, **adamw(rate))[0] for rate in RATES}
    best = min(losses, key=lambda rate: losses[rate])
    print("AdamW by its rate: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in losses.items()), flush=True)
    fits: dict[str, dict[str, Any]] = {f"adamw at {best:g}": adamw(best), "muon": {}}
    compare(list(fits), ("loss", "seconds"), lambda name, seed: fitted(seed, **fits[name]), given)


if __name__ == "__main__":
    main()
