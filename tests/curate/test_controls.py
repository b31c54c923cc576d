"""Control images: models with random weights beside plain loops over them, kills, take-downs, training."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from curate.config import ControlImages, CurateConfig
from curate.controls import ControlStage, Estimator, colours, control_stages
from orchestration.run_stage import main
from orchestration.runs import curated
from orchestration.status import read, table
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError
from tests.curate.test_stage import files, score, write_images
from tests.latents import world
from train.config import TrainConfig
from train.image_conditioning import ByKey
from train.segments import image_sets

WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


def save(folder: Path, model: Any, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models, by what they are."""
    t, base = transformers, tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    small = {"size": {"height": 32, "width": 32}}
    dpt = t.DPTConfig(
        **WIDTH,
        num_hidden_layers=4,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        initializer_range=1.0,
    )
    seg = t.SegformerConfig(
        hidden_sizes=[8] * 4,
        depths=[1] * 4,
        num_attention_heads=[1] * 4,
        decoder_hidden_size=8,
        num_labels=9,
        initializer_range=1.0,
    )
    backbone = t.VitPoseBackboneConfig(
        image_size=[32, 24],
        patch_size=[8, 8],
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
        out_indices=[1],
    )
    pose = t.VitPoseConfig(
        backbone_config=backbone, num_labels=5, edges=[[0, 1], [1, 2], [3, 4]], initializer_range=1.0
    )
    yolos = t.YolosConfig(
        **WIDTH,
        num_hidden_layers=1,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=12,
        id2label={0: "cat", 1: "person"},
        label2id={"cat": 0, "person": 1},
        initializer_range=1.0,
    )
    detector = t.YolosForObjectDetection(yolos)
    detector.vit.embeddings.detection_tokens.data.normal_(std=5)  # which begin as zeros, and so alike
    return {
        "depth": save(base / "dpt", t.DPTForDepthEstimation(dpt), t.DPTImageProcessor(**small)),
        "segmentation": save(base / "seg", t.SegformerForSemanticSegmentation(seg), t.SegformerImageProcessor(**small)),
        "pose": save(
            base / "pose", t.VitPoseForPoseEstimation(pose), t.VitPoseImageProcessor(size={"height": 32, "width": 24})
        ),
        "detector": save(base / "yolos", detector, t.YolosImageProcessor(**small)),
    }


def settings(named: dict[str, str], kind: str, **more: Any) -> dict[str, Any]:
    extra = {"detector": named["detector"], "threshold": 0.0} if kind == "pose" else {}
    return {"kind": kind, "model": named[kind], "device": "cpu", **extra, **more}


def stages(run: RunPaths, **controls: Any) -> list[ControlStage]:
    return control_stages(CurateConfig.model_validate({"controls": controls}), run)


def stored(stage: ControlStage) -> dict[str, np.ndarray]:
    """The control images by key."""
    dataset, found = Dataset.open(stage.root), {}
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        found |= {key: decode_rgb(shard.image_bytes(i)) for i, key in enumerate(shard.keys)}
    return found


def pictures(dataset: Dataset) -> dict[str, np.ndarray]:
    found = {}
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        for i, key in enumerate(shard.keys):
            try:
                found[key] = decode_rgb(shard.image_bytes(i))
            except ValueError:
                continue
    return found


# ---- what is drawn -----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_depth_is_the_models_own_from_black_to_white(run: RunPaths, named: dict[str, str]) -> None:
    dataset = write_images(run, broken=(1, 0))
    near, far = (stages(run, depth=settings(named, "depth", metres=metres))[0] for metres in (False, True))
    score(near)
    found = stored(near)
    model = transformers.DPTForDepthEstimation.from_pretrained(named["depth"]).eval()
    processor = transformers.DPTImageProcessor.from_pretrained(named["depth"])
    real = pictures(dataset)
    assert found.keys() == real.keys()
    assert len(found) == 23  # the one that is cut short has none
    for key, pixels in list(real.items())[:4]:
        depth = model(**processor(images=pixels, return_tensors="pt")).predicted_depth[None]
        depth = torch.nn.functional.interpolate(depth, pixels.shape[:2], mode="bicubic", align_corners=False)[0, 0]
        wanted = (depth - depth.min()) / (depth.max() - depth.min()) * 255
        assert np.abs(found[key] - wanted[..., None].numpy()).max() <= 1  # of rounding
        assert (found[key].min(), found[key].max()) == (0, 255)
        other = Estimator(far.config)(pixels)
        assert np.abs(255 - found[key][..., 0].astype(int) - other).max() <= 1
    rows = [r for i in range(3) for r in Dataset.open(near.root).sidecar(i).to_pylist()]
    assert [r["status"] for r in rows].count("failed_to_download") == 3
    assert [r["error"] for r in rows if r["status"] == "failed_to_resize"] == ["not_decoded"]


@torch.inference_mode()
def test_each_class_has_its_colour(run: RunPaths, named: dict[str, str]) -> None:
    assert colours(np.array([[0, 1, 2, 3, 8, 255]])).tolist() == [
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [224, 224, 192]]  # of PASCAL VOC's devkit
    ]
    real = pictures(write_images(run))
    (stage,) = stages(run, parts=settings(named, "segmentation"))
    score(stage)
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(named["segmentation"]).eval()
    processor = transformers.SegformerImageProcessor.from_pretrained(named["segmentation"])
    seen = set()
    for key, image in list(stored(stage).items())[:4]:
        logits = model(**processor(images=real[key], return_tensors="pt")).logits
        size = real[key].shape[:2]
        classes = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)[0].argmax(0)
        assert np.array_equal(image, colours(classes.numpy()))
        seen |= set(classes.unique().tolist())
    assert len(seen) > 2


@torch.inference_mode()
def test_poses_are_of_the_people_that_the_detector_finds(run: RunPaths, named: dict[str, str]) -> None:
    real = pictures(write_images(run, shards=1))
    (stage,) = stages(run, pose=settings(named, "pose"))
    score(stage)
    found, estimator = stored(stage), Estimator(stage.config)
    model = transformers.VitPoseForPoseEstimation.from_pretrained(named["pose"]).eval()
    processor = transformers.VitPoseImageProcessor.from_pretrained(named["pose"])
    finder = transformers.YolosForObjectDetection.from_pretrained(named["detector"]).eval()
    looks = transformers.YolosImageProcessor.from_pretrained(named["detector"])
    counts: list[int] = []
    for key, pixels in real.items():
        out = finder(**looks(images=pixels, return_tensors="pt"))
        labels = out.logits.softmax(-1)[0, :, :-1].argmax(-1)
        middles = (out.pred_boxes[0] * torch.tensor([pixels.shape[1], pixels.shape[0]] * 2))[labels == 1]
        boxes = [[x - w / 2, y - h / 2, w, h] for x, y, w, h in middles.tolist()]
        np.testing.assert_allclose(estimator._people(pixels), boxes, rtol=1e-4, atol=1e-3)
        counts.append(len(boxes))
        assert boxes or not found[key].any()
    assert any(0 < n < 12 for n in counts), "some are cats"
    # Without a detector the image is one person: dots where the model says, and lines between those that it joins.
    whole = Estimator(ControlImages(kind="pose", model=named["pose"], threshold=0.0, device="cpu"))
    for pixels in real.values():
        height, width = pixels.shape[:2]
        boxes = [[0.0, 0.0, float(width), float(height)]]
        outputs = model(**processor(images=pixels, boxes=[boxes], return_tensors="pt"))
        (person,) = processor.post_process_pose_estimation(outputs, boxes=[boxes])[0]
        drawn, at = whole(pixels).any(-1), person["keypoints"].numpy()
        ends = [(at[a], at[b]) for a, b in model.config.edges]
        places = np.concatenate([at] + [a + (b - a) * np.linspace(0, 1, 60)[:, None] for a, b in ends])
        near = np.zeros_like(drawn)
        for x, y in places:
            near[max(0, int(y) - 2) : max(0, int(y) + 4), max(0, int(x) - 2) : max(0, int(x) + 4)] = True
        assert drawn.any()
        assert not (drawn & ~near).any()
        sure = at[person["scores"].reshape(-1).numpy() > 0]
        inside = [(round(float(x)), round(float(y))) for x, y in sure if 0 <= x < width - 1 and 0 <= y < height - 1]
        assert all(drawn[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any() for x, y in inside)  # of rounding


# ---- the stage ---------------------------------------------------------------------------------------------


def test_shards_are_the_same_in_any_order_and_not_made_twice(
    tmp_path: Path, named: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for number, (shuffle, threads) in enumerate([(None, 1), (3, 4)]):
        run = RunPaths(str(tmp_path / str(number)))
        write_images(run)
        (stage,) = stages(run, depth=settings(named, "depth", decode_threads=threads))
        score(stage, shuffle)
        made.append(files(stage.root))
    assert made[0] == made[1]
    assert len(made[0]) == 6
    monkeypatch.setattr(Estimator, "__call__", None)  # what is there is not drawn again
    score(stage)
    assert files(stage.root) == made[0]


def test_it_is_what_training_is_given_and_goes_with_its_image(run: RunPaths, named: dict[str, str]) -> None:
    write_images(run)
    images = Dataset.open(run.images)
    (stage,) = stages(run, depth=settings(named, "depth"))
    score(stage)
    config = TrainConfig(images=8, batch_size=4, start_from="a/model", control={"images": "controls/depth"})
    (given,) = image_sets(config, [Dataset.open(run.images)])
    keys = ImageShard(images, 1).keys
    data, there = ByKey(given).read(1, keys)
    assert there.all()
    assert np.array_equal(decode_rgb(data[2]), stored(stage)[keys[2]])
    held = RunPaths(str(Path(run.run) / "held"))
    write_images(held, shards=1)
    Path(held.images).rename(run.heldout)
    both = stages(run, depth=settings(named, "depth"))
    assert [s.name for s in both] == ["control-depth", "control-depth-heldout"]
    assert both[1].root == f"{run.run}/controls/depth/heldout"
    score(both[1])
    assert len(Dataset.open(both[1].root)) == 8


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("depth", {"model": "segmentation"}, "the control model '.*': .*Segformer"),
        ("pose", {"detector": "depth"}, "the detector '.*': .*"),
        ("depth", {"model": "/nowhere"}, "the control model '/nowhere' is no folder here"),
    ],
)
def test_another_kind_of_model_is_one_sentence(
    named: dict[str, str], kind: str, more: dict[str, str], says: str
) -> None:
    given = settings(named, kind) | {k: named.get(v, v) for k, v in more.items()}
    with pytest.raises(ConfigError, match=says):
        Estimator(ControlImages(**given))


def test_a_head_that_was_never_trained_is_refused_and_one_without_a_use_is_not(
    named: dict[str, str], tmp_path: Path
) -> None:
    """transformers fills both with noise, another one in each worker."""
    seg = transformers.SegformerForSemanticSegmentation.from_pretrained(named["segmentation"])
    backbone = save(
        tmp_path / "backbone",
        transformers.SegformerForImageClassification(seg.config),
        transformers.SegformerImageProcessor(size={"height": 32, "width": 32}),
    )
    with pytest.raises(ConfigError, match=r"the control model '.*backbone': it has no weights for decode_head"):
        Estimator(ControlImages(**settings(named, "segmentation", model=backbone)))
    shutil.copytree(named["depth"], tmp_path / "dpt")
    weights = load_file(tmp_path / "dpt" / "model.safetensors")
    unused = [name for name in weights if name.startswith("neck.fusion_stage.layers.0.residual_layer1")]
    assert unused
    save_file(
        {n: w for n, w in weights.items() if n not in unused}, tmp_path / "dpt" / "model.safetensors", {"format": "pt"}
    )
    less = Estimator(ControlImages(**settings(named, "depth", model=str(tmp_path / "dpt"))))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    assert np.array_equal(less(pixels), Estimator(ControlImages(**settings(named, "depth")))(pixels))


def test_a_processor_may_ask_for_the_sizes_of_its_own(named: dict[str, str]) -> None:
    estimator = Estimator(ControlImages(**settings(named, "depth")))
    estimator.processor = transformers.ZoeDepthImageProcessor(
        size={"height": 32, "width": 32}, ensure_multiple_of=8, keep_aspect_ratio=False, do_pad=False
    )
    drawn = estimator(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))
    assert drawn.shape == (40, 48)
    assert (drawn.min(), drawn.max()) == (0, 255)


def test_a_run_that_was_brought_is_none_of_its_own(run: RunPaths, named: dict[str, str]) -> None:
    write_images(run, shards=1)
    write_images(RunPaths(f"{run.run}/controls/brought"), shards=1)
    (stage,) = stages(run, depth=settings(named, "depth"))
    score(stage)
    assert list(curated(run)) == [("control-depth", stage.root)]


def test_a_detector_without_people_is_refused(named: dict[str, str], tmp_path: Path) -> None:
    model = transformers.YolosForObjectDetection.from_pretrained(named["detector"])
    model.config.id2label = {0: "cat", 1: "dog"}
    folder = save(tmp_path, model, transformers.YolosImageProcessor.from_pretrained(named["detector"]))
    with pytest.raises(ConfigError, match="has no label 'person'"):
        Estimator(ControlImages(**settings(named, "pose", detector=folder)))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path / "run"))


def test_pictures_of_any_size(named: dict[str, str]) -> None:
    draw = Estimator(ControlImages(**settings(named, "depth")))
    for size in ((1, 7), (50, 3)):
        assert draw(np.asarray(Image.new("RGB", size))).shape == size[::-1]


# ---- over a run --------------------------------------------------------------------------------------------


def test_by_its_command_and_a_take_down_reaches_both_splits(named: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(1)
    for n in range(24):
        world.draw(rng, 40, 48).save(photos / f"{n:02d}.png")
        (photos / f"{n:02d}.txt").write_text(f"number {n}")
    run = RunPaths(str(tmp_path / "run"))
    given = {
        "run": run.run,
        "ingest": {
            "table": str(photos),
            "samples_per_shard": 8,
            "image_size": 32,
            "heldout_fraction": 0.3,
        },
        "curate": {"controls": {"parts": settings(named, "segmentation")}},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(given))
    for stage in ("ingest", "control", "control"):
        assert main([stage, "--config", str(config), "--local"]) == 0
    roots = {split: f"{run.run}/controls/parts/{split}" for split in ("images", "heldout")}
    gone, kept = {}, {}
    for split, root in roots.items():
        rows = [r for s in Dataset.open(f"{run.run}/{split}").shards for r in rows_of(run, split, s.index)]
        real, made = pictures(Dataset.open(f"{run.run}/{split}")), pictures(Dataset.open(root))
        assert real.keys() == made.keys()
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in real.items()}
        stored = [(r["key"], r["sha256"]) for r in rows if r["key"] in made]
        gone[split], kept[split] = stored[0 if split == "images" else -1], made  # keys of two splits may be the same
    (tmp_path / "list").write_text("\n".join(digest for _, digest in gone.values()))
    assert main(["remove", "--config", str(config), "--sha256", str(tmp_path / "list")]) == 0
    said = capsys.readouterr().out
    for split, root in roots.items():
        assert f"controls/parts/{split} 1 shards blanked" in said
        key, dataset = gone[split][0], Dataset.open(root)
        left = pictures(dataset)
        assert left.keys() == kept[split].keys() - {key}
        assert all(np.array_equal(v, kept[split][k]) for k, v in left.items())
        assert len(dataset) == len(left)
        for tar in Path(root).glob("*.tar"):
            with tarfile.open(tar) as found:
                assert f"{key}.png" not in found.getnames()
    assert main(["verify", run.run, "--deep"]) == 0
    assert f"{roots['heldout']}: " in capsys.readouterr().out
    assert "control-parts-heldout" in table(read(run.run))


def rows_of(run: RunPaths, split: str, index: int) -> list[dict[str, Any]]:
    return list(Dataset.open(f"{run.run}/{split}").sidecar(index).to_pylist())
