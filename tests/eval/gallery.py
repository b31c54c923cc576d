"""Runs of many checkpoints in the real layout, and their pages as a person sees them: for looking at the report.

    python -m tests.eval.gallery OUT            # runs of 1, 5 and 30 checkpoints; pictures of their pages in OUT

One checkpoint is evaluated; the others are that one's folders with numbers that improve, so that thirty cost as much
as one. Pictures are taken in Chromium at 1280 and 400 px, light and dark.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from demo import scenes
from eval import measure
from eval.config import EvalConfig
from eval.evaluation import METRICS
from eval.generate import ImageGenerator, Sample
from eval.metrics.definitions import DEFINITIONS
from eval.report import page
from shards.layout import RunPaths
from tests.eval.browser import Tab, visit
from tests.eval.conftest import build_run, evaluate
from tests.train.test_select import write_scores

WIDTHS, SCHEMES = (1280, 400), ("light", "dark")
SLICE = 2400  # px of a page's height in one picture
FIRST = "step-00000004"
BROKEN = 19  # the checkpoint that is worse than those before it
# What a run with all networks measures besides: value, standard error, whether a share.
BESIDES = {
    "fid_clean": (23.4, 0.31, False),
    "fid_tf": (22.9, 0.30, False),
    "kid_tf": (0.0123, 0.0007, False),
    "fd_dinov2_pil": (312.0, 4.2, False),
    "vqa_score": (0.642, 0.011, True),
    "soft_tifa_gm": (0.318, 0.014, True),
    "pickscore": (21.34, 0.04, False),
    "precision_inception": (0.61, 0.01, True),
    "recall_inception": (0.47, 0.01, True),
}


def name_of(k: int) -> str:
    """Of the k-th checkpoint, from 0."""
    return FIRST if k == 0 else f"step-{4 + 10_000 * k:08d}"


def drawn(_: ImageGenerator, samples: list[Sample], **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the captions say, in place of what random weights draw."""
    rng = random.Random(0)
    images = [np.asarray(scenes.draw(scenes.parse(s.text), rng, 128, 128)) for s in samples]
    return np.stack(images), np.ones(len(images), bool)


def build(folder: Path, count: int) -> RunPaths:
    """A run of `count` checkpoints with everything that a page shows, and its pages."""
    run = build_run(folder / "sd2-256-laion-aesthetic", 30)
    shutil.copytree(run.heldout, run.images)
    config = EvalConfig(
        num_prompts=30,
        size=128,
        steps=1,
        batch_size=10,
        shard_size=15,
        scorer="demo.scorer",
        jackknife_groups=10,
        memorisation=True,
    )
    with patch.object(ImageGenerator, "__call__", drawn):
        evaluate(run, config)
    logs(Path(run.run), 2_000 * count)
    write_scores(Path(run.run), {0: np.random.default_rng(0).beta(4, 2, 500)}, "aesthetic")
    first = Path(run.eval, FIRST)
    [numbers] = first.glob(f"*/{METRICS}")
    known = measure.read(str(numbers))
    assert known is not None
    for k in range(count):
        own = Path(run.eval, name_of(k))
        if k:
            shutil.copytree(first, own)
        measure.write(str(own / numbers.relative_to(first)), at(known, k))
    grid(run, name_of(count - 1), known, numbers.parent.name)
    for k in {count - 1, min(BROKEN, count - 1)}:
        page.render(run, name_of(k), numbers.parent.name)
    return run


def at(known: dict[str, Any], k: int) -> dict[str, Any]:
    """The numbers of the k-th checkpoint: better with every one, but for one that is broken."""
    found = copy.deepcopy(known)
    found |= {"checkpoint": name_of(k), "images_seen": 640_000 * (k + 1)}
    for name, (value, se, share) in BESIDES.items():
        better, label, text = DEFINITIONS[name]
        found["metrics"][name] = {"n": 10_000, "value": value, "se": se, "low": value - 2.1 * se}
        found["metrics"][name] |= {"high": value + 2.1 * se, "better": better, "label": label, "definition": text}
        found["metrics"][name] |= {"unit": "share"} if share else {}
        noise = np.random.default_rng(5).standard_normal(10)
        left = [value + se / 3 * float(x) for x in noise - noise.mean()]
        found["jackknife"][name] = {"groups": list(range(10)), "sizes": [1000] * 10, "left_out": left}
    rng = np.random.default_rng(100 + k)
    progress = 1 - np.exp(-k / 6) - (0.5 if k == BROKEN else 0)
    for tag in ("", *found["by_tag"]):
        metrics = found["by_tag"][tag] if tag else found["metrics"]
        groups = found["tag_jackknife"][tag] if tag else found["jackknife"]
        for name, m in metrics.items():
            way = {"higher": 0.3, "lower": -0.5}.get(m["better"], 0)
            shift = m["value"] * (way * progress + 0.002 * rng.standard_normal())
            if m.get("unit") == "share":
                shift = min(shift, 0.99 - m["value"])
            for part in ("value", "low", "high"):
                if part in m:
                    m[part] += shift
            if "low" in m and m["better"] == "lower" and name != "kid_tf":
                m["low"] = max(0.0, m["low"])
            if "low" in m and m.get("unit") == "share":
                m["low"], m["high"] = max(0.0, m["low"]), min(1.0, m["high"])
            if name in groups:
                spread = 0.1 * (m.get("se") or 0)
                groups[name]["left_out"] = [
                    x + shift + spread * rng.standard_normal() for x in groups[name]["left_out"]
                ]
    if k == BROKEN:
        found["counts"] |= {"blank": 7, "failed": 2}
    return found


def logs(folder: Path, steps: int) -> None:
    """Curves of the fits, and what became of the rows of the table."""
    rng = np.random.default_rng(1)
    for name in ("train", "autoencoder", "clip"):
        (folder / name).mkdir(exist_ok=True)
        lines = [
            {
                "images": 640 * i,
                "loss": 0.2 + 1 / i**0.5 * (1 + 0.1 * rng.standard_normal()),
                "lr": 1e-4 * min(1, i / 100),
                "psnr": 28 - 10 / i**0.5,
                "accuracy": 1 - 1 / i**0.5,
            }
            for i in range(1, steps, 7)
        ]
        (folder / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    manifest = json.loads((folder / "images" / "dataset.json").read_text())
    counts = {"rows": 12_345_678, "success": 9_012_345, "filtered": 1_345_678, "failed_to_download": 1_500_000}
    counts |= {"failed_to_resize": 87_655, "opted_out": 50_000, "duplicate": 350_000}
    manifest |= {"rows": counts["rows"], "counts": counts, "filtered_by": {"aesthetic.value below 4.5": 1_345_678}}
    manifest |= {"errors": {"http_not_found": 1_100_000, "timeout": 400_000, "not_an_image": 87_655}}
    (folder / "images" / "dataset.json").write_text(json.dumps(manifest))


def grid(run: RunPaths, model: str, known: dict[str, Any], folder: str) -> None:
    """A grid's outcome of two samplers at three numbers of steps and four guidances."""
    points = []
    for sampler in ("ddim", "dpm-solver++-sde-karras"):
        for steps in (10, 25, 50):
            for scale in (1, 3, 5, 7.5):
                far = 20 + (scale - 3) ** 2 + 60 / steps + (sampler == "ddim")
                score = 20 + 2.2 * scale**0.5 - 6 / steps
                points.append(
                    {
                        "cell": f"{sampler}-{steps}-{scale:g}",
                        "distance": (far, far - 0.6, far + 0.6),
                        "score": (score, score - 0.1, score + 0.1),
                        "seconds": 0.01 * steps,
                        "evaluations": 2 * steps,
                        "frontier": scale >= 3 and sampler != "ddim",
                        "knee": scale == 5 and steps == 25 and sampler != "ddim",
                        "folder": folder,
                    }
                )
    gone = [{"cell": "ddim-10-1", "by": "ddim-10-3", "words": "FID 31 against 24, 12 errors", "images": 256}]
    outcome = {"distance": "fd_clip_unit", "points": points, "given_up": gone}
    Path(run.eval, model, "grid.json").write_text(json.dumps(outcome))


def photograph(html: Path, out: Path, open_all: bool = True) -> None:
    """PNGs of a page at all widths, light and dark, folded parts open, in slices of SLICE px."""

    async def look(tab: Tab) -> None:
        for width in WIDTHS:
            for scheme in SCHEMES:
                await size(tab, width, 900, scheme)
                await tab.value(
                    "document.querySelectorAll('img').forEach(i => i.loading = 'eager');"
                    + ("document.querySelectorAll('details').forEach(d => d.open = true);" if open_all else "")
                )
                await asyncio.sleep(1)
                height = int(await tab.value("document.documentElement.scrollHeight"))
                for number, top in enumerate(range(0, height, SLICE)):
                    clip = {"x": 0, "y": top, "width": width, "height": min(SLICE, height - top), "scale": 1}
                    shot = await tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
                    name = f"{html.stem}-{width}-{scheme}-{number}.png"
                    (out / name).write_bytes(base64.b64decode(shot["data"]))

    out.mkdir(parents=True, exist_ok=True)
    visit(html, look)


async def size(tab: Tab, width: int, height: int, scheme: str) -> None:
    """The window's size in px, and light or dark."""
    await tab.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
    )
    await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await asyncio.sleep(0.3)


def main(out: Path) -> None:
    for count in (1, 5, 30):
        run = build(out / f"run-{count}", count)
        for name in {name_of(count - 1), name_of(min(BROKEN, count - 1)), "index"}:
            photograph(Path(run.reports, f"{name}.html"), out / f"{count}-checkpoints")
        print(f"{out}/{count}-checkpoints")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
