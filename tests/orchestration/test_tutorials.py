"""The first hour of docs/own-data.md, word for word, with random weights in place of those on the hub."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from orchestration.run_stage import main
from shards import storage
from shards.dataset import Dataset
from tests.ingest import test_own_images as own
from tests.objects import bucket
from tests.orchestration.head import ROOT
from tests.train.test_export import save_checkpoint
from tests.train.test_tuning import make_run
from train.export import export

# What a test has no time for; every other word is the page's.
SHORTER = [
    "train.images=32",
    "train.checkpoint_every_images=32",
    "eval.num_prompts=2",
    "eval.steps=2",
    "eval.keep_images=2",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def commands(heading: str) -> list[str]:
    """The lines of a section's first block, continued ones joined."""
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    section = page.split(f"\n### {heading}\n", 1)[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block
    whole = block[1].replace("\\\n", " ")
    return re.findall(r"carrara (?:[^\n\"]|\"[^\"]*\")+", whole)


def follow(heading: str, names: dict[str, str], more: dict[str, list[str]]) -> float:
    """Run a section; returns the seconds that it took. more: words added to a command, by its name."""
    started = time.monotonic()
    lines = commands(heading)
    assert len(lines) >= 2
    for line in lines:
        for name, value in names.items():
            line = line.replace(f"${name}", value)
        assert "$" not in line
        words = shlex.split(line)[1:]
        assert main([*words, *more.get(words[0], [])]) == 0, line
    return time.monotonic() - started


@pytest.fixture(scope="module")
def names(tmp_path_factory: Any) -> dict[str, str]:
    """VAE, CLIP and MODEL: folders of a tiny pipeline in Stable Diffusion's layout."""
    run = make_run(tmp_path_factory.mktemp("weights") / "run")
    save_checkpoint(run, 10, seed=2)
    return {
        "VAE": str(Path(run.autoencoder) / "model"),
        "CLIP": str(Path(run.clip) / "model"),
        "MODEL": str(export(run.run)),
    }


def test_twenty_images_to_a_lora(names: dict[str, str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own.folder(tmp_path / "photos", 0, 20)
    seconds = follow("Twenty images to a LoRA", names, {"all": SHORTER, "sample": ["--steps", "2"]})
    assert Path("runs/mine/model/lora/pytorch_lora_weights.safetensors").exists()
    pipeline = StableDiffusionPipeline.from_pretrained("runs/mine/model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert np.asarray(pipeline("picture 7", num_inference_steps=1, height=32, width=32).images[0]).shape == (32, 32, 3)
    assert list(Path("samples").iterdir())
    assert list(Path("runs/mine/reports").glob("*.html"))
    print(f"from 20 images to the first sampled image: {seconds:.0f} s")


def test_a_folder_to_a_model(names: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own.folder(tmp_path / "photos", 0, 20)
    follow("A folder to a model of your own", names, {"all": SHORTER})
    pipeline = StableDiffusionPipeline.from_pretrained("runs/scratch/model", safety_checker=None)
    assert list(pipeline.unet.config.block_out_channels) == [16, 32]


def test_shards_on_s3_to_latents(names: dict[str, str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    local = own.webdataset(tmp_path / "laion", 0, 12)
    own.webdataset(local, 100, 8)
    with bucket() as url:
        fsspec.filesystem("s3").put(str(local) + "/", url.removeprefix("s3://") + "/laion/", recursive=True)
        before = {n: storage.read_bytes(f"{url}/laion/{n}") for n in storage.list_names(f"{url}/laion")}
        assert sum(n.endswith(".tar") for n in before) == 2
        follow("img2dataset's shards on S3 to latents", {**names, "BUCKET": url}, {})
        images = [Dataset.open(f"{url}/runs/laion/{name}") for name in ("images", "heldout")]
        assert sum(map(len, images)) == 20
        assert len(Dataset.open(f"{url}/runs/laion/latents")) == len(images[0])
        assert {n: storage.read_bytes(f"{url}/laion/{n}") for n in storage.list_names(f"{url}/laion")} == before
        sizes = [storage.size(f"{url}/runs/laion/images/{s.name}.tar") or 0 for s in images[0].shards]
        assert max(sizes) < 20_000  # an index, and no image
