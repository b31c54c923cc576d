"""A pipeline by its name on the hub: what a cache of huggingface_hub holds is the same as a folder, to the last bit."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval import model as models
from latents.encoders import load_text
from latents.weights import find_clip, find_pad, find_vae
from orchestration.run_stage import main
from shards.dataset import Dataset
from shards.layout import RunPaths
from tests.train.test_sdxl import sdxl, settings  # noqa: F401 (a fixture)
from tests.train.test_tuning import base  # noqa: F401 (a fixture)
from train import adapters, checkpoint

pytestmark = pytest.mark.timeout(900)

COMMIT = hashlib.sha1(b"tiny", usedforsecurity=False).hexdigest()


def put_into_cache(pipeline: Path, cache: Path, name: str) -> None:
    """As huggingface_hub lays out what it fetched: links in a snapshot to files that are named by their contents."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in sorted(f for f in pipeline.rglob("*") if f.is_file()):
        data, link = file.read_bytes(), root / "snapshots" / COMMIT / file.relative_to(pipeline)
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapters.find_unet.cache_clear()
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_name_is_what_its_folder_is(base: Any, sdxl: Any, kind: str, cache: Path) -> None:  # noqa: F811
    folder, name = base[1] if kind == "sd" else sdxl[1], f"tiny/{kind}"
    put_into_cache(folder, cache, name)
    assert adapters.digest(name) == adapters.digest(str(folder))
    unets = [adapters.load_unet(ref).state_dict() for ref in (name, str(folder))]
    assert all(torch.equal(v, unets[1][k]) for k, v in unets[0].items())
    assert find_vae(name).digest == find_vae(str(folder)).digest
    texts = ["text_encoder"] if kind == "sd" else ["text_encoder", "text_encoder_2"]
    for text in texts:
        found, expected = find_clip(f"hf-hub:{name}/{text}"), find_clip(str(folder / text))
        assert (found.digest, found.name) == (expected.digest, expected.name)
        load_text(f"hf-hub:{name}/{text}", "penultimate_no_norm")
    for names in (("tokenizer",), ("tokenizer_2",), ("tokenizer_2", "tokenizer")):
        assert find_pad(name, names) == find_pad(str(folder), names)
    one, other = models.of_pipeline(name), models.of_pipeline(str(folder))
    assert (one.digest, one.size) == (other.digest, other.size)
    drawn = models.build_pipeline(RunPaths("none"), one).unet.state_dict()
    assert all(torch.equal(v, drawn[k]) for k, v in unets[0].items())


@pytest.mark.slow
@pytest.mark.nightly
def test_sdxl_by_its_name_trains_to_the_same_bytes(
    sdxl: Any,  # noqa: F811
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From images to the exported model, by the command line, where the hub cannot be reached."""
    name = "tiny/sdxl"
    put_into_cache(sdxl[1], cache, name)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))  # of the processes that train
    ends, facts = [], []
    for kind, pipeline, clip in (("folder", str(sdxl[1]), str(sdxl[1])), ("name", name, f"hf-hub:{name}")):
        root = tmp_path / kind
        root.mkdir()
        (root / "images").symlink_to(Path(sdxl[0].run) / "images")
        data = settings(root, f"{clip}/text_encoder_2", text="tokens")
        data["ingest"] = {"table": str(root / "images")}  # its validation wants one that is there
        data["autoencoder"]["pretrained"], data["clip"]["pretrained"] = pipeline, f"{clip}/text_encoder"
        data["train"] |= {"start_from": pipeline, "images": 8, "text_encoder": {"kind": "lora"}, "threads": 1}
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(data))
        for stage in ("latents", "train"):
            assert main([stage, "--config", str(file), "--local"]) == 0
        run = RunPaths(str(root))
        ends.append(checkpoint.load_weights(Path(run.checkpoints) / "step-00000001", "raw"))
        facts.append(Dataset.open(run.latents).manifest["text"]["digest"])
        assert (Path(run.model) / "text_encoder_2" / "model.safetensors").exists()
    assert facts[0] == facts[1]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
