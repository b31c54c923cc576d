"""Features of a vision tower, as a column of latents: against transformers' and open_clip's own models."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latents import inspection
from latents.config import FeaturesConfig, LatentsConfig
from latents.encoders import load_text
from latents.planning import Prices, Rates, facts_of, report
from latents.resize import resize_crop
from latents.stage import LatentsStage
from latents.vision import VisionEncoder, find_vision
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from tests.latents import world
from tests.latents.test_inspection import edit

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def save_tower(folder: Path, kind: str = "dinov2") -> Path:
    """A folder as transformers saves it, with a random vision transformer and its image processor's numbers."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    if kind == "dinov2":
        model: Any = Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2))
    else:
        text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "max_position_embeddings": 8}
        model = CLIPModel(CLIPConfig(vision_config={**SHAPE, "intermediate_size": 48}, text_config=text))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tower(tmp_path_factory.mktemp("tower") / "model")


@pytest.fixture
def stage_of(tmp_path: Path, vae_folder: Path, clip_folder: Path) -> Any:
    def build(features: dict[str, Any] | None, name: str = "run", **changes: Any) -> LatentsStage:
        run = RunPaths(str(tmp_path / name))
        if not Path(run.images).exists():
            world.image_dataset(run)
        config = LatentsConfig(resolution=32, batch_size=4, text="tokens", device="cpu", features=features, **changes)
        return LatentsStage(config, run, str(vae_folder), str(clip_folder))

    return build


def finished(stage: LatentsStage) -> dict[str, Any]:
    stage.begin()
    work = stage.worker()
    return stage.finish([work(task) for task in stage.tasks()])


def plain(folder: Path, pixels: np.ndarray, **more: Any) -> np.ndarray:
    """The last states of transformers' own model at each place: float32 [B,places,places,width]."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    with torch.no_grad():
        states = model(pixel_values=x, **more).last_hidden_state[:, 1:]
    side = round(states.shape[1] ** 0.5)
    return states.reshape(len(pixels), side, side, -1).numpy()


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_features_are_the_plain_models(stage_of: Any, tmp_path: Path, kind: str) -> None:
    """One row a sample by its key, of the mirrored image too, beside the columns that were there without them."""
    folder = save_tower(tmp_path / "tower", kind)
    stage, without = stage_of({"pretrained": str(folder)}, flip=True), stage_of(None, "without", flip=True)
    manifest = finished(stage)
    finished(without)
    source, dataset = Dataset.open(stage.run.images), Dataset.open(stage.root)
    facts = {"ref": str(folder), "digest": find_vision(str(folder)).digest, "size": 32, "grid": 4, "width": 24}
    assert manifest["features"] == facts
    for position in range(2):
        images, columns = ImageShard(source, position), ColumnShard(dataset, position)
        arrays, others = columns.arrays, ColumnShard(Dataset.open(without.root), position).arrays
        assert set(arrays) - set(others) == {"features", "features_flipped"}
        assert all(np.array_equal(arrays[n], others[n]) for n in others)
        assert columns.keys == images.keys
        assert columns.metadata["features"] == facts["digest"]
        pixels = np.stack([resize_crop(decode_rgb(images.image_bytes(i)), 32)[0] for i in range(len(images))])
        assert arrays["features"].dtype == np.float16
        np.testing.assert_allclose(arrays["features"], plain(folder, pixels), rtol=2e-3, atol=2e-3)
        mirrored = plain(folder, np.ascontiguousarray(pixels[:, :, ::-1]))
        np.testing.assert_allclose(arrays["features_flipped"], mirrored, rtol=2e-3, atol=2e-3)
        assert np.abs(arrays["features"][:, :, ::-1] - mirrored).max() > 0.05
    assert "features" not in without.made_with().settings


def test_a_shard_has_the_same_bytes_from_any_worker(stage_of: Any, tower: Path) -> None:
    one, other = stage_of({"pretrained": str(tower), "grid": 2}), stage_of({"pretrained": str(tower), "grid": 2}, "b")
    finished(one)
    other.begin()
    tasks = list(other.tasks())
    other.finish(sorted((other.worker()(t) for t in reversed(tasks)), key=lambda s: s["shard"]))  # a worker each
    files = [sorted(Path(s.root).glob("*.safetensors")) for s in (one, other)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_another_size_and_a_smaller_grid(tmp_path: Path, kind: str) -> None:
    """Images are brought to the size as a whole; places are means of the tower's own."""
    folder = save_tower(tmp_path / "tower", kind)
    weights = find_vision(str(folder))
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 4, 6, 3), np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(p).resize((32, 24), Image.Resampling.BICUBIC)) for p in small])
    whole = VisionEncoder(weights, weights.facts(FeaturesConfig(pretrained="x", size=48))).encode(pixels).numpy()
    coarse = VisionEncoder(weights, weights.facts(FeaturesConfig(pretrained="x", size=48, grid=3))).encode(pixels)
    large = np.stack([np.asarray(Image.fromarray(p).resize((48, 48), Image.Resampling.BICUBIC)) for p in pixels])
    more = {"interpolate_pos_encoding": True} if kind == "clip" else {}
    np.testing.assert_allclose(whole, plain(folder, large, **more), atol=0.06)  # PIL rounds to whole values
    assert whole.shape == (2, 6, 6, 24)
    np.testing.assert_allclose(coarse.numpy(), whole.reshape(2, 3, 2, 3, 2, 24).mean(axis=(2, 4)), atol=1e-5)


def test_an_open_clip_tower(clip_folder: Path) -> None:
    weights = find_vision(str(clip_folder))
    facts = weights.facts(FeaturesConfig(pretrained="x"))
    assert (facts["size"], facts["grid"], facts["width"]) == (32, 2, 32)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    visual = load_text(str(clip_folder)).model.visual
    visual.output_tokens = True
    mean, std = (torch.tensor(visual.preprocess_cfg[n])[:, None, None] for n in ("mean", "std"))
    with torch.no_grad():
        tokens = visual((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std)[1]
    found = VisionEncoder(weights, facts).encode(pixels)
    torch.testing.assert_close(found, tokens.reshape(3, 2, 2, 32), rtol=1e-4, atol=1e-5)


def test_what_half_precision_cannot_hold_is_encoded_again_else_set_aside(
    stage_of: Any, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of({"pretrained": str(tower)}, moments=False)
    work = stage.worker()
    begin, exact = work.vision.encode_stored, work.vision.encode_exact

    def broken(pixels: np.ndarray) -> Any:
        found = begin(pixels)()
        found[:2] = np.inf
        return lambda: found

    hopeless: list[bool] = []

    def again(pixels: np.ndarray) -> torch.Tensor:
        hopeless.append(not hopeless)  # the first one alone
        return exact(pixels) * (float("inf") if hopeless[-1] else 1.0)

    monkeypatch.setattr(work.vision, "encode_stored", broken)
    monkeypatch.setattr(work.vision, "encode_exact", again)
    stage.begin()
    stats = work(next(iter(stage.tasks())))
    assert stats["errors"] == {"not_finite_features": 1}
    whole = stage_of({"pretrained": str(tower)}, "whole", moments=False)
    whole.begin()
    whole.worker()(next(iter(whole.tasks())))
    sidecar = [r for r in whole_rows(stage) if r["status"] == "failed_to_encode"]
    assert [r["error"] for r in sidecar] == ["not_finite_features"]
    mine, theirs = (features_by_key(s) for s in (stage, whole))
    assert len(mine) == len(theirs) - 1
    assert all(np.allclose(mine[k], theirs[k], atol=1e-3) for k in mine)


def whole_rows(stage: LatentsStage) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return list(pq.read_table(Path(stage.root) / "00000.parquet").to_pylist())


def features_by_key(stage: LatentsStage) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    rows = [r for r in whole_rows(stage) if r["status"] == "success"]
    features = load_file(Path(stage.root) / "00000.safetensors")["features"]
    return {r["key"]: features[r["column_row"]] for r in rows}


def test_another_tower_is_another_dataset(stage_of: Any, tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower")
    stage = stage_of({"pretrained": str(folder)})
    stage.begin()
    work = stage.worker()
    work(next(iter(stage.tasks())))
    shutil.rmtree(folder)
    save_tower(folder, "clip")
    with pytest.raises(ConfigError, match="features"):
        stage.begin()
    with pytest.raises(StageError, match="vision tower"):
        VisionEncoder(find_vision(str(folder)), {**stage.features(), "digest": work.vision.digest})


def test_a_number_that_is_the_towers_own_is_no_other_setting(stage_of: Any, tower: Path) -> None:
    def settings(**features: Any) -> dict[str, Any]:
        found: dict[str, Any] = stage_of({"pretrained": str(tower), **features}).made_with().settings["features"]
        return found

    assert settings() == settings(size=32) == settings(grid=4) == settings(size=32, grid=4)
    assert settings(size=48) == settings(size=48, grid=6)
    assert len({str(settings(**s)) for s in ({}, {"size": 48}, {"grid": 2}, {"size": 48, "grid": 4})}) == 4


def test_inspection_sees_with_the_tower_again(stage_of: Any, tower: Path) -> None:
    stage = stage_of({"pretrained": str(tower), "grid": 2}, more_resolutions=[16], enlarge=True)
    finished(stage)
    found = inspection.inspect(stage, count=6)
    assert found.complaint == ""
    assert found.features_drift is not None
    assert found.features_drift < 1e-3
    assert "seen by the vision tower again: off by 0.0" in inspection.summary(found)

    def change(arrays: dict[str, np.ndarray]) -> None:
        for name in [n for n in arrays if n.startswith("features")]:
            arrays[name] = (arrays[name] * 1.1).astype(np.float16)

    edit(stage, change)
    assert "the vision tower's features are off by 10 %" in inspection.inspect(stage, count=100).complaint


def test_the_plan_counts_them(stage_of: Any, tower: Path) -> None:
    assert facts_of(stage_of({"pretrained": str(tower), "grid": 3}))["features"] == 9 * 24
    assert "features" not in facts_of(stage_of(None))


def test_the_plan_counts_the_towers_time_among_the_encoders() -> None:
    """Decoding of 4 ms keeps up with encoders of 1 and 3 ms on one thread; with the first alone it takes four."""
    rates = Rates(decode=0.004, vae=0.001, text=0.0, distinct=1.0, sidecar=0, area=16, where="here", samples=8)
    facts = {"channels": 4, "context": 8, "width": 8, "pooled": 0}
    slow = dataclasses.replace(rates, features=0.003)
    found = [report(LatentsConfig(), 100, 1, r, Prices(), facts) for r in (rates, slow)]
    assert "so 4 decoding threads can keep" in found[0]
    assert "vision tower" not in found[0]
    assert "so 1 decoding thread can keep" in found[1]
    assert "the vision tower 3 ms an image" in found[1]


@pytest.mark.parametrize(
    ("given", "change", "sentence"),
    [
        ({"size": 36}, None, "sees patches of 8 pixels; make it a multiple of 8"),
        ({"grid": 5}, None, "has 4 places along a side at 32 pixels; lower it"),
        ({}, ("preprocessor_config.json", None), "save the model's image processor there"),
        ({}, ("config.json", {"model_type": "convnextv2", "image_size": 32}), "names no image_size, patch_size and"),
        ({}, ("config.json", {"model_type": "unheard-of"}), "is of no model of transformers"),
        ({}, ("model.safetensors", None), "a pickle may run anything, and is not opened"),
    ],
)
def test_towers_that_cannot_be_used_are_refused(
    stage_of: Any, tmp_path: Path, given: dict[str, Any], change: Any, sentence: str
) -> None:
    folder = save_tower(tmp_path / "tower")
    if change is not None:
        name, content = change
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=sentence):
        stage_of({"pretrained": str(folder), **given}).made_with()


def test_a_tower_whose_own_size_is_no_multiple_of_its_patch(tmp_path: Path) -> None:
    """As that of SigLIP so400m, which sees 27 places of 14 pixels in 384: its own size is not refused."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    folder = tmp_path / "tower"
    SiglipVisionModel(SiglipVisionConfig(**{**SHAPE, "image_size": 36}, intermediate_size=32)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    weights = find_vision(str(folder))
    facts = weights.facts(FeaturesConfig(pretrained="x"))
    assert (facts["size"], facts["grid"]) == (36, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 36, 36, 3), np.uint8)
    model = SiglipVisionModel.from_pretrained(folder).eval()
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    with torch.no_grad():
        states = model(pixel_values=x).last_hidden_state
    found = VisionEncoder(weights, facts).encode(pixels)
    torch.testing.assert_close(found, states.reshape(2, 4, 4, 24), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="make it a multiple of 8"):
        weights.facts(FeaturesConfig(pretrained="x", size=44))


def test_code_beside_a_tower_is_neither_run_nor_asked_about(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tower, tmp_path / "tower"))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    ran = tmp_path / "ran"
    source = "from transformers import PretrainedConfig\nopen({!r}, 'w')\nclass Mine(PretrainedConfig):\n    pass\n"
    (folder / "mine.py").write_text(source.format(str(ran)))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(str(words)) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError, match="is of no model of transformers"):
        find_vision(str(folder))
    assert not asked
    assert not ran.exists()


def test_what_a_configuration_leaves_out_is_as_its_class_has_it(tower: Path, tmp_path: Path) -> None:
    """As SigLIP's and CLIP's on the hub do."""
    folder = Path(shutil.copytree(tower, tmp_path / "tower"))
    vision = {"model_type": "siglip_vision_model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    found = find_vision(str(folder))
    assert (found.size, found.patch, found.width) == (224, 16, 768)


def test_a_reference_that_leads_nowhere_is_one_sentence(clip_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of transformers, no hub name and no CLIP"):
        find_vision("/nowhere/at/all")
    with pytest.raises(ConfigError, match="takes 32 alone; leave it out"):
        find_vision(str(clip_folder)).facts(FeaturesConfig(pretrained="x", size=48))
