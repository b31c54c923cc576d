"""What a UNet is given of a picture: what diffusers' pipelines make of it, by key, resumed, exported, drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from eval import model as models
from eval.sample import Request, SampleConfig, SampleStage
from ingest.stage import IngestStage
from latents.encoders import load_vae
from shards.blank import blank
from shards.columns import column_rows
from shards.dataset import Dataset, commit_shard, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, decode_rgb, pack_tar
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, load_sections, validate
from shards.stage import begin
from tests.ingest.conftest import make_config
from tests.ingest.conftest import run as ingest_run
from tests.latents import world
from tests.train import forked, tiny
from tests.train.test_export import save_checkpoint
from tests.train.test_tuning import make_run
from tests.train.test_zero import assert_same, step_folder, tensors
from train import folders, segments
from train.config import TrainConfig, TrainingSections
from train.denoising import Diffusion
from train.encoder_config import ClipConfig
from train.export import build_pipeline, export, fold_shift
from train.image_conditioning import WAYS, ByKey, control_image, control_net, draw_mask, low_res_scheduler, widen
from train.image_samples import ImageSamples
from train.objectives import build
from train.part_config import ControlConfig
from train.randomness import Randomness
from train.seen import Account
from train.segments import History, Taken, resume
from train.segments import begin as begun
from train.state import differences, fingerprint

pytestmark = pytest.mark.timeout(900)

SIDE, F = 32, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "inpaint": {"whole": 0.2},
    "edit": {"dropout": 0.3},
    "upscale": {},
    "control": {"dropout": 0.2},
}


def write_before(run: RunPaths, folder: str, left_out: int | None = None) -> None:
    """Beside a run, another one whose images are the same ones upside down, by key, in another order of rows."""
    source, root = ImageShard(Dataset.open(run.images), 0), RunPaths(f"{run.run}/{folder}").images
    samples, rows = [], []
    for i in reversed([i for i in range(len(source)) if i != left_out]):
        image = Image.fromarray(decode_rgb(source.image_bytes(i))[::-1])
        samples.append((source.keys[i], {"png": world.encoded(image, "png")}))
        rows.append({"key": source.keys[i], "caption": "", "status": "success", "image_ext": "png"})
    tar, extents = pack_tar(samples)
    for row, extent in zip(rows, extents, strict=True):
        row["image_offset"], row["image_size"] = extent["png"]
    files = {".tar": tar, ".parquet": tiny.parquet(tiny.pa.Table.from_pylist(rows))}
    stats = commit_shard(root, 0, files, {"count": len(rows), "rows": len(rows)}, Fingerprint("ingest", 1, {}, "0"))
    write_manifest(root, "images", [stats], {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Path]:
    """A run with a picture before for each of its samples, and the pipeline that was exported from it."""
    run = make_run(tmp_path_factory.mktemp("base") / "r")
    write_before(run, "before")
    for folder in (Path(run.run), Path(run.run) / "before"):  # as good as any to validate on
        (folder / "heldout").symlink_to(folder / "images")
    save_checkpoint(run, 10, seed=2)
    return run, Path(export(run.run))


def configured(base: tuple[RunPaths, Path], folder: Path, way: str, **train: Any) -> Path:
    """The configuration of a run on the same shards that begins with the exported pipeline."""
    folder.mkdir(exist_ok=True)
    for name in ("latents", "images", "heldout", "before", "autoencoder", "clip"):
        (folder / name).symlink_to(Path(base[0].run) / name)
    values = {"images": 32, "learning_rate": 1e-2, "ema_halflife_images": 1, way: SETTINGS[way], **train}
    data = tiny.configuration(folder, **values)
    data["train"] |= {"unet": {}, "start_from": str(base[1]), "num_train_timesteps": 100, "beta_schedule": "linear"}
    data["train"]["prediction_type"] = "v_prediction"
    return tiny.write_config(folder, data)


def objective_of(config: Path) -> Diffusion:
    sections = load_sections(str(config), (), TrainingSections)
    found = build("train", sections.train, [Dataset.open(RunPaths(sections.run).latents)], 5)
    assert isinstance(found, Diffusion)
    return found


# ---- each way does what its pipeline does ----------------------------------------------------------


def called_with(objective: Diffusion, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    assert objective.image_conditioning is not None
    text, added = objective.conditioning.condition(batch)
    xt = batch["x0"] * 0.5
    with torch.no_grad():
        return objective.image_conditioning.inputs(objective, xt, batch, text, added)


def test_inpainting_is_told_what_diffusers_inpainting_pipeline_tells(base: Any, tmp_path: Path) -> None:
    objective = objective_of(configured(base, tmp_path / "r", "inpaint"))
    batch = objective.batch(np.arange(3))
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    x, more = called_with(objective, {**batch, "masked_noise": noise})
    assert more == {}
    assert x.shape == (3, 9, 16, 16)
    torch.testing.assert_close(x[:, :4], batch["x0"] * 0.5, rtol=0, atol=0)
    again = objective.batch(np.arange(2, -1, -1))  # masks are functions of the place, so that a resume draws the same
    assert torch.equal(again["mask"].flip(0), batch["mask"])

    parts = StableDiffusionPipeline.from_pretrained(base[1], safety_checker=None).components
    theirs = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pixels, masks = batch["image"].numpy(), batch["mask"].numpy()
    image = theirs.image_processor.preprocess([Image.fromarray(p) for p in pixels], height=SIDE, width=SIDE)
    mask = theirs.mask_processor.preprocess([Image.fromarray(m[0] * 255) for m in masks], height=SIDE, width=SIDE)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    with torch.no_grad():
        small, around = theirs.prepare_mask_latents(
            mask, image * (mask < 0.5), 3, SIDE, SIDE, torch.float32, "cpu", generators, False
        )
    assert 0 < float(small.mean()) < 1
    torch.testing.assert_close(x[:, 4:5], small, rtol=0, atol=0)
    torch.testing.assert_close(x[:, 5:], around, rtol=1e-4, atol=1e-5)


def test_editing_is_told_what_diffusers_pix2pix_pipeline_tells(base: Any, tmp_path: Path) -> None:
    objective = objective_of(configured(base, tmp_path / "r", "edit"))
    batch = objective.batch(np.arange(3))
    x, more = called_with(objective, {**batch, "kept": torch.tensor([1.0, 0.0, 1.0])})
    assert more == {}
    assert x.shape == (3, 8, 16, 16)
    parts = StableDiffusionPipeline.from_pretrained(base[1], safety_checker=None).components
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    image = theirs.image_processor.preprocess([Image.fromarray(p) for p in batch["before"].numpy()])
    with torch.no_grad():
        found = theirs.prepare_image_latents(image, 3, 1, torch.float32, "cpu", True)[:3]
    found[1] = 0
    torch.testing.assert_close(x[:, 4:], found, rtol=1e-4, atol=1e-5)
    theirs.register_modules(unet=widen(parts["unet"], 4))
    with pytest.raises(StageError, match="cannot be judged by prompts alone"):
        models.from_prompts(theirs)
    # The pictures are those of the same keys, which lie upside down in another order.
    many, square = np.arange(40), 0
    keys, images = objective.keys(many), ImageShard(Dataset.open(base[0].images), 0)
    for key, pixels in zip(keys, objective.batch(many)["before"].numpy(), strict=True):
        original = decode_rgb(images.image_bytes(images.keys.index(key)))
        if original.shape[:2] == (SIDE, SIDE):
            np.testing.assert_array_equal(pixels, original[::-1])
            square += 1
    assert square > 5


def test_an_upscaler_is_told_what_diffusers_pipeline_tells(base: Any, tmp_path: Path) -> None:
    objective = objective_of(configured(base, tmp_path / "r", "upscale"))
    batch = objective.batch(np.arange(60))
    x, more = called_with(objective, batch)
    assert x.shape == (60, 7, 16, 16)
    level = more["class_labels"]
    assert 250 < int(level.max()) < 350
    assert int(level.min()) < 60
    assert objective.unet.config.num_class_embeds == 1000
    images = ImageShard(Dataset.open(base[0].images), 0)
    theirs = DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)  # of Stable Diffusion's upscaler
    noise = torch.from_numpy(objective.random.normal("low_res", np.arange(60), (3, 16, 16)))
    square = 0
    for i, key in enumerate(objective.keys(np.arange(60))):
        original = decode_rgb(images.image_bytes(images.keys.index(key)))
        if original.shape[:2] == (SIDE, SIDE):
            small = Image.fromarray(original).resize((16, 16), Image.Resampling.BICUBIC)
            pixels = VaeImageProcessor().preprocess(small)
            torch.testing.assert_close(x[i : i + 1, 4:], theirs.add_noise(pixels, noise[i : i + 1], level[i : i + 1]))
            square += 1
    assert square > 5


def test_the_upscalers_vae_does_the_same_under_diffusers_own_factor(base: Any) -> None:
    vae = load_vae(str(Path(base[0].autoencoder) / "model")).model
    x, z = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        before, drawn = vae.encode(x).latent_dist, vae.decode(z / 0.7).sample
        folded = fold_shift(vae, 0.7 / 0.08333)
        after = folded.encode(x).latent_dist
        torch.testing.assert_close(after.mean * 0.08333, before.mean * 0.7, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.std * 0.08333, before.std * 0.7, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(folded.decode(z / 0.08333).sample, drawn, rtol=1e-4, atol=1e-5)


def test_a_controlnet_is_called_as_diffusers_pipeline_calls_it(base: Any, tmp_path: Path) -> None:
    objective = objective_of(configured(base, tmp_path / "r", "control", control={"kind": "sketch"}))
    control = objective.model.control
    assert not any(p.requires_grad for p in objective.unet.parameters())
    assert all(p.requires_grad for p in control.parameters())
    with torch.no_grad():
        for p in control.parameters():  # so that the zero convolutions let something through
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    batch = objective.batch(np.arange(2))
    image = (batch["control"].permute(0, 3, 1, 2) / 255).float()
    assert 0.001 < float(image.mean()) < 0.9
    xt, t, text = batch["x0"] * 0.3, batch["t"], batch["text"]
    with torch.no_grad():
        ours = objective.predict(xt, batch)
        down, mid = control(xt, t, text, controlnet_cond=image, conditioning_scale=1.0, return_dict=False)
        theirs = objective.unet(
            xt, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        without = objective.unet(xt, t, text).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert float((ours - without).abs().max()) > 1e-3


# ---- beginnings ------------------------------------------------------------------------------------


def small_unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tiny.UNET.items()}
    return UNet2DConditionModel(**{**shape, "cross_attention_dim": 8, "sample_size": 8, **more}).eval()


def test_a_widened_unet_begins_as_it_was() -> None:
    unet = small_unet()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = unet(x, t, text).sample
        after = widen(unet, 5)(torch.cat([x, torch.randn(2, 5, 8, 8)], dim=1), t, text).sample
    assert unet.config.in_channels == 9
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_a_controlnet_begins_as_diffusers_from_unet_and_adds_nothing() -> None:
    unet = small_unet()
    ours, theirs = control_net(unet, 8), ControlNetModel.from_unet(unet)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    copied = [k for k in a if k in unet.state_dict()]
    assert len(copied) > 20
    assert all(torch.equal(a[k], unet.state_dict()[k]) for k in copied)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), torch.randn(2, 5, 8)
    with torch.no_grad():
        down, mid = ours(x, t, text, controlnet_cond=torch.rand(2, 3, 64, 64), return_dict=False)
    assert all(not d.any() for d in (*down, mid))
    # diffusers' own takes neither another VAE nor this embedding of the text, with which the demo's UNet is given it.
    other = small_unet(addition_embed_type="text", addition_embed_type_num_heads=4)
    small = control_net(other, 2)
    assert small.config.addition_embed_type_num_heads == 4
    assert small(x, t, text, controlnet_cond=torch.rand(2, 3, 16, 16)).mid_block_res_sample.shape[2:] == (4, 4)


# ---- control images and masks ----------------------------------------------------------------------


def test_control_images_show_edges_and_nothing_else() -> None:
    pixels = np.full((32, 32, 3), 220, np.uint8)
    pixels[8:24, 8:24] = (200, 30, 30)
    edges = control_image(pixels, ControlConfig())
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges[..., 0])
    assert {rows.min(), columns.min()} <= {7, 8}
    assert {rows.max(), columns.max()} <= {23, 24}
    assert not edges[10:22, 10:22].any()
    sketch = control_image(pixels, ControlConfig(kind="sketch", radius=0.1))
    assert sketch[9:23, 9].min() > 2 * sketch[16, 16].max()  # strongest along the edges of what is darker
    assert not sketch[:4].any()
    grey = control_image(pixels, ControlConfig(kind="gray"))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert len(np.unique(grey)) == 2
    blurred = control_image(pixels, ControlConfig(kind="blur", radius=0.1)).astype(int)
    assert 0 < np.abs(np.diff(blurred[16, :, 1])).max() < 100
    for kind in ("canny", "sketch"):
        assert not control_image(np.full((32, 32, 3), 90, np.uint8), ControlConfig(kind=kind)).any()


def test_masks_are_functions_of_the_place_and_differ_widely() -> None:
    positions = np.arange(300)
    masks = [draw_mask(r, 24, 32, 0.25) for r in Randomness(1).each("mask", positions)]
    again = [draw_mask(r, 24, 32, 0.25) for r in Randomness(1).each("mask", positions[::-1])][::-1]
    assert all((a == b).all() for a, b in zip(masks, again, strict=True))
    share = np.array([m.mean() for m in masks])
    assert masks[0].shape == (24, 32)
    assert 0.17 < (share == 1).mean() < 0.34
    drawn = share[share < 1]
    assert (drawn > 0).all()
    assert np.quantile(drawn, 0.1) < 0.2
    assert np.quantile(drawn, 0.9) > 0.5
    assert len({m.tobytes() for m in masks}) > 200


def test_captions_and_pictures_are_left_out_as_often_as_asked(base: Any, tmp_path: Path) -> None:
    objective = objective_of(configured(base, tmp_path / "r", "edit", caption_dropout=0.4))
    positions = np.arange(800)
    u = objective.random.uniform("caption", positions)
    assert objective.image_conditioning is not None
    blank = np.zeros((800, SIDE, SIDE, 3), np.uint8)
    kept = WAYS["edit"].batch(objective.image_conditioning, blank, positions, (u - 0.2) % 1)["kept"].numpy()
    dropped = u < 0.4
    assert abs((kept == 0).mean() - 0.3) < 0.05
    assert abs((dropped & (kept == 0)).mean() - 0.2) < 0.05  # InstructPix2Pix: some lose both
    assert abs((~dropped & (kept == 0)).mean() - 0.1) < 0.04


# ---- by key ----------------------------------------------------------------------------------------


def test_a_sample_without_its_picture_never_comes(base: Any, tmp_path: Path) -> None:
    config = configured(base, tmp_path / "r", "edit")
    (tmp_path / "r" / "before").unlink()
    shutil.copytree(base[0].images, tmp_path / "r2" / "images")
    write_before(RunPaths(str(tmp_path / "r2")), "before", left_out=2)
    (tmp_path / "r" / "before").symlink_to(tmp_path / "r2" / "before")
    gone = ImageShard(Dataset.open(base[0].images), 0).keys[2]
    seen = objective_of(config).keys(np.arange(120))
    everyone = objective_of(configured(base, tmp_path / "r3", "edit")).keys(np.arange(120))
    assert gone in everyone
    assert set(seen) == set(everyone) - {gone}


@pytest.mark.parametrize(("way", "setting"), [("edit", {"before": "before"}), ("control", {"images": "before"})])
def test_on_resume_the_pictures_are_those_it_was_told_until_now(
    base: Any, tmp_path: Path, way: str, setting: dict[str, Any]
) -> None:
    """Another run named there, and another one's images in its place; a take-down and more shards need no consent."""
    file = configured(base, tmp_path / "r", way, **{way: setting})
    config = load_sections(str(file), (), TrainingSections).train
    datasets = [Dataset.open(str(tmp_path / "r" / "latents"))]
    begun_with = fingerprint("train", config, 5, datasets).to_json()
    named = next(iter(setting))
    other = config.model_copy(update={way: getattr(config, way).model_copy(update={named: "other"})})
    what, _ = differences("train", other, fingerprint("train", other, 5, datasets), begun_with)
    assert [line.split(":")[0] for line in what] == [f"train.{way}"]

    (tmp_path / "r" / "before").unlink()
    shutil.copytree(base[0].run + "/before", tmp_path / "r" / "before", symlinks=True)
    root = str(tmp_path / "r" / "before" / "images")
    stored = json.loads(json.dumps(begun(config, datasets).to_json()))
    assert resume(stored, 16, 2, config, datasets).history == begun(config, datasets)

    def edit(sidecar: Any, stats: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = sidecar.to_pylist()
        rows[3]["status"] = "removed"
        return tiny.pa.Table.from_pylist(rows, sidecar.schema), {**stats, "count": stats["count"] - 1}

    first = blank(root, 0, [3], edit)
    more = ImageShard(Dataset.open(base[0].images), 0).image_bytes(0)
    tar, _ = pack_tar([("0000999", {"png": more})])
    files = {".tar": tar, ".parquet": (tmp_path / "r" / "before" / "images" / "00000.parquet").read_bytes()}
    second = commit_shard(root, 1, files, {"count": 1, "rows": 1}, Fingerprint("ingest", 1, {}, "1"))
    write_manifest(root, "images", [first, second], {})
    assert len(Dataset.open(root).shards) == 2
    assert resume(stored, 16, 2, config, datasets) == Taken(History.from_json(stored))

    shutil.rmtree(root)
    shutil.copytree(base[0].images, root)  # upright: the same keys and as many, others to see
    taken = resume(stored, 16, 2, config, datasets)
    assert f"the images in {root} are others" in taken.refusal
    taken = resume(stored, 16, 2, config, datasets, adopt=True)
    assert taken.refusal == ""
    assert taken.history.segments[-1].changes == (f"{root}: other images",)
    again = resume(json.loads(json.dumps(taken.history.to_json())), 24, 3, config, datasets)
    assert (again.refusal, again.history) == ("", taken.history)


def test_on_resume_each_sources_pictures_are_compared_with_its_own(tmp_path: Path) -> None:
    """Sources that change their places, or one more before them, are no other pictures; those of another source are."""
    for name, counts in (("a", (9, 14)), ("b", (5, 12))):
        tiny.make_latents(tmp_path / name / "latents", counts, text="tokens")
        tiny.make_images(tmp_path / name / "images", counts)
    a, b = (str(tmp_path / name / "latents") for name in "ab")

    def taken(stored: History, *sources: str) -> Taken:
        return resume(json.loads(json.dumps(stored.to_json())), 16, 2, of(*sources), [Dataset.open(s) for s in sources])

    def of(*sources: str) -> TrainConfig:
        return TrainConfig(inpaint={}, sources=[{"latents": s} for s in sources])

    both = begun(of(a, b), [Dataset.open(a), Dataset.open(b)])
    assert taken(both, b, a).refusal == ""
    assert taken(begun(of(b), [Dataset.open(b)]), a, b).refusal == ""
    shutil.rmtree(tmp_path / "b" / "images")
    shutil.copytree(tmp_path / "a" / "images", tmp_path / "b" / "images")
    for order in ((a, b), (b, a)):
        assert f"the images in {tmp_path / 'b' / 'images'} are others" in taken(both, *order).refusal


def test_no_sample_with_a_picture_comes_before_the_account_says(base: Any, tmp_path: Path) -> None:
    """One stands for a sample whose picture is missing, before its own turn: the account must not say it came later."""
    config = configured(base, tmp_path / "r", "edit")
    (tmp_path / "r" / "before").unlink()
    shutil.copytree(base[0].images, tmp_path / "r2" / "images")
    write_before(RunPaths(str(tmp_path / "r2")), "before", left_out=2)
    (tmp_path / "r" / "before").symlink_to(tmp_path / "r2" / "before")
    objective, dataset = objective_of(config), Dataset.open(str(tmp_path / "r" / "latents"))
    order = begun(objective.config, [dataset]).to_json()
    keys = objective.keys(np.arange(12)).copy()
    known = Account({"order": order, "seed": 5, "config": objective.config.model_dump(mode="json")}, dataset)
    stored_rows = column_rows(dataset.sidecar(0))
    stored = [k for k, n in zip(dataset.sidecar(0)["key"].to_pylist(), stored_rows, strict=True) if n >= 0]
    for key, position in zip(stored, known.first(0, stored_rows[stored_rows >= 0].tolist()), strict=True):
        assert position is not None
        assert key not in keys or position <= keys.index(key)


def test_a_picture_that_is_taken_down_while_it_is_read_comes_no_more(base: Any, tmp_path: Path) -> None:
    shutil.copytree(base[0].images, tmp_path / "images")
    dataset = Dataset.open(str(tmp_path / "images"))
    pictures, keys = ByKey(dataset), ImageShard(dataset, 0).keys
    history = segments.begin(ClipConfig(), [dataset])
    placement = history.placement(segments.tables(history, ClipConfig(), [dataset]), 0)
    clip = ImageSamples(dataset, placement, lambda pixels: pixels, 0)
    assert pictures.read(0, keys)[1].all()
    assert clip._load(0, 0, [(0, 0, len(keys))]).alive.all()

    def edit(sidecar: Any, stats: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = sidecar.to_pylist()
        rows[3]["status"] = "failed"
        return tiny.pa.Table.from_pylist(rows, sidecar.schema), stats

    blank(dataset.root, 0, [3], edit)
    found, there = pictures.read(0, keys)
    assert there.tolist() == [i != 3 for i in range(len(keys))]
    assert all(decode_rgb(data).size for data, here in zip(found, there, strict=True) if here)
    assert clip._load(0, 0, [(0, 0, len(keys))]).alive.tolist() == there.tolist()


def test_pictures_with_other_keys_are_refused(base: Any, tmp_path: Path) -> None:
    config = configured(base, tmp_path / "r", "edit")
    (tmp_path / "r" / "before").unlink()
    with pytest.raises(StageError, match="before/images: there is no finished dataset"):
        objective_of(config)
    tiny.make_images(tmp_path / "r" / "before" / "images", counts=(2,))
    root = tmp_path / "r" / "before" / "images"
    rows = tiny.pq.read_table(root / "00000.parquet").to_pylist()
    assert rows[0]["key"] == "0000000"
    for row in rows:
        row["key"] = "9" + row["key"][1:]
    table = tiny.pa.Table.from_pylist(rows)
    tiny.pq.write_table(table, root / "00000.parquet")
    with pytest.raises(StageError, match="has no image of the samples in shard 00000"):
        objective_of(config)


def test_two_runs_over_one_table_have_the_same_keys(tmp_path: Path) -> None:
    """As the documentation says it: pictures after and before from two columns, one of the befores broken."""
    pa, pq = tiny.pa, tiny.pq
    after, before = (
        [world.encoded(Image.new("RGB", (16, 16), (i, 9 * i, c)), "png") for i in range(9)] for c in (0, 90)
    )
    before[3] = before[4] = before[5]  # one picture, changed in three ways
    before[7] = b"no picture"
    captions = [f"make it {i}" for i in range(9)]
    table = pa.table({"before": pa.array(before), "after": pa.array(after), "text": captions})
    pq.write_table(table, tmp_path / "edits.parquet", row_group_size=4)
    shared = {"encode_format": "png", "image_size": 16, "samples_per_shard": 5}
    off = {"duplicates": {"url": False, "bytes": False}}
    for column, root, more in (("after", "r", {}), ("before", "r/before", off)):
        settings = {"source": {"kind": "parquet", "image_column": column}, **shared, **more}
        ingest_run(IngestStage(make_config(tmp_path / "edits.parquet", **settings), str(tmp_path / root / "images")))
    ours = Dataset.open(str(tmp_path / "r" / "images"))
    beside = ByKey(Dataset.open(str(tmp_path / "r" / "before" / "images")))
    found = {}
    for position, info in enumerate(ours.shards):
        shard = ImageShard(ours, position)
        data, there = beside.read(info.index, shard.keys)
        found |= {
            c: decode_rgb(d)[0, 0].tolist() if t else None for c, d, t in zip(shard.captions, data, there, strict=True)
        }
    expected = {c: [i, 9 * i, 90] for i, c in enumerate(captions)}
    expected |= {captions[3]: expected[captions[5]], captions[4]: expected[captions[5]], captions[7]: None}
    assert found == expected


# ---- the whole way ---------------------------------------------------------------------------------


def drawn(pipeline: Any, way: str, **more: Any) -> np.ndarray:
    rng = np.random.default_rng(3)
    side = SIDE // F if way == "upscale" else SIDE
    picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    given: dict[str, Any] = {
        "image": picture,
        **({"mask_image": Image.new("L", (SIDE, SIDE), 255)} if way == "inpaint" else {}),
    }
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    given |= {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": generator, "output_type": "np", **more}
    found: np.ndarray = pipeline("a red circle", **given).images[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_killed_resumed_exported_and_drawn(base: Any, tmp_path: Path, way: str) -> None:
    """On two ranks: kill -9 of one in the middle, the same line again, the same bytes as never killed; the export in
    plain diffusers is what is drawn here, and the EMA is what it holds."""
    more: dict[str, Any] = {"checkpoint_every_images": 8, "zero_stage": 2 if way == "control" else 1}
    more["validation"] = {"images": 4, "every_images": 16}
    forked.fit(configured(base, tmp_path / "a", way, **more), 2)
    config = configured(base, tmp_path / "b", way, **more)
    ranks = forked.start(2, forked.run_stage, str(config))
    forked.wait_for(lambda: folders.latest_complete(tmp_path / "b" / "checkpoints", contents=False) is not None)
    ranks[1].kill()
    for rank in ranks:
        with pytest.raises(forked.RankError):
            rank.result()
    assert not (tmp_path / "b" / "model").exists()
    forked.fit(config, 2)
    for name in ("weights", "ema"):
        assert_same(tensors(step_folder(tmp_path / "a", 4), name), tensors(step_folder(tmp_path / "b", 4), name))

    events = [json.loads(line) for line in (tmp_path / "a" / "train" / "events.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["kind"] == "validation"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    model = tmp_path / "b" / "model"
    pipeline = DiffusionPipeline.from_pretrained(model)
    assert type(pipeline).__name__ == WAYS[way].pipeline
    assert WAYS[way].pipeline == json.loads((model / "model_index.json").read_text())["_class_name"]
    np.testing.assert_array_equal(drawn(pipeline, way), drawn(build_pipeline(str(tmp_path / "b")), way))
    start = UNet2DConditionModel.from_pretrained(base[1] / "unet").state_dict()
    ema = tensors(step_folder(tmp_path / "b", 4), "ema")
    if way == "control":
        assert all(name.startswith("control.") for name in ema)
        assert all(torch.equal(v, start[k]) for k, v in pipeline.unet.state_dict().items())
        assert all(torch.equal(v, ema[f"control.{k}"]) for k, v in pipeline.controlnet.state_dict().items())
        assert any(bool(v.any()) for k, v in ema.items() if "controlnet_down_blocks" in k)
        # With the control off it is the model that it steers, bit for bit.
        plain = StableDiffusionPipeline.from_pretrained(base[1], safety_checker=None)
        off = drawn(pipeline, way, controlnet_conditioning_scale=0.0)
        np.testing.assert_array_equal(off, plain_drawn(plain))
        assert np.abs(off - drawn(pipeline, way)).max() > 1e-3
    else:
        assert all(torch.equal(v, ema[k]) for k, v in pipeline.unet.state_dict().items())
        assert float(ema["conv_in.weight"][:, 4:].abs().max()) > 0  # what began at zero has learned
    card = (model / "README.md").read_text()
    assert "load_image" in card
    assert "{" not in card.split("```python")[0]

    # carrara sample, and what it refuses
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    photo = str(tmp_path / "photo.png")
    given = {
        "inpaint": {"image": photo, "mask": str(tmp_path / "mask.png")},
        "edit": {"image": photo},
        "upscale": {"image": photo},
        "control": {"control_of": photo},
    }[way]
    [one] = sampled(tmp_path / "b", tmp_path / "out", **given)
    assert one.shape == ((F * SIDE, F * SIDE, 3) if way == "upscale" else (SIDE, SIDE, 3))
    if way == "upscale":
        [chained] = sampled(Path(base[0].run), tmp_path / "chained", upscale=str(tmp_path / "b"))
        assert chained.shape == (F * SIDE, F * SIDE, 3)
    if way == "inpaint":
        before = np.asarray(Image.open(photo))
        np.testing.assert_array_equal(one[:, :20], before[:, :20])
        assert np.abs(one[:, 20:].astype(int) - before[:, 20:]).mean() > 5
    if way == "control":
        [without] = sampled(tmp_path / "b", tmp_path / "out2")  # the model that it steers
        [by_base] = sampled(Path(base[0].run), tmp_path / "out3")
        np.testing.assert_array_equal(without, by_base)
        [steered] = sampled(tmp_path / "b", tmp_path / "out4", image=photo, control=photo)
        assert np.abs(steered.astype(int) - one).max() > 0
        with pytest.raises(ConfigError, match="no ControlNet"):
            sampled(Path(base[0].run), tmp_path / "out5", control=photo)
    else:
        with pytest.raises(ConfigError, match="give --image"):
            sampled(tmp_path / "b", tmp_path / "out2")
        with pytest.raises(StageError, match="cannot be judged by prompts alone"):
            models.from_prompts(build_pipeline(str(tmp_path / "b")))


def steered(base: Any) -> Any:
    """The exported pipeline with a ControlNet that says nothing yet."""
    plain = StableDiffusionPipeline.from_pretrained(base[1], safety_checker=None)
    control = control_net(plain.unet, F)
    return diffusers.StableDiffusionControlNetPipeline(**plain.components, controlnet=control)


def test_a_start_beside_a_control_image_is_drawn_at_the_size_that_is_asked_for(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = steered(base)
    monkeypatch.setattr(models, "build_pipeline", lambda run, model: pipeline)
    Image.new("RGB", (90, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    photo = str(tmp_path / "photo.png")
    [one] = sampled(Path(base[0].run), tmp_path / "out", image=photo, control=photo, width=2 * SIDE)
    assert one.shape == (SIDE, 2 * SIDE, 3)


@pytest.mark.parametrize(("side", "level", "says"), [(16, 20, "levels up to 10"), (5000, 5, "more than 8192")])
def test_what_an_upscaler_cannot_draw_is_one_sentence(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, level: int, says: str
) -> None:
    plain = StableDiffusionPipeline.from_pretrained(base[1], safety_checker=None)
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    parts["unet"] = widen(plain.unet, 3)
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        **parts, low_res_scheduler=low_res_scheduler(), max_noise_level=10
    )
    monkeypatch.setattr(models, "build_pipeline", lambda run, model: pipeline)
    Image.new("RGB", (side, 16)).save(tmp_path / "small.png")
    with pytest.raises(ConfigError, match=says):
        sampled(Path(base[0].run), tmp_path / "out", image=str(tmp_path / "small.png"), noise_level=level)


def plain_drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    found: np.ndarray = pipeline(
        "a red circle",
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).images[0]
    return found


def sampled(run: Path, out: Path, **settings: Any) -> list[np.ndarray]:
    values = {"requests": [Request(prompt="a red circle", seed=7)], "steps": 3, "device": "cpu", **settings}
    stage = SampleStage(validate(SampleConfig, values, "sample"), RunPaths(str(run)), str(out))
    begin(stage)
    work = stage.worker()
    stage.finish([work(task) for task in stage.tasks()])
    files = json.loads((out / "samples.json").read_text())["images"]
    return [np.asarray(Image.open(out / f["file"])) for f in files]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"inpaint": {}, "edit": {}}, "inpaint and edit are two ways"),
        ({"control": {}}, "control steers a model that is there"),
        ({"control": {"low": 300}, "start_from": "x"}, "low .* is above high"),
        ({"control": {}, "start_from": "x", "adapter": {}}, "control and adapter are two ways"),
        ({"inpaint": {}, "samples": {"prompts": ["x"]}}, "samples are drawn from prompts alone"),
        ({"inpaint": {"whole": 2}}, "whole"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(train: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(TrainConfig, train, "train")


def test_an_adapter_cannot_add_input_channels(base: Any, tmp_path: Path) -> None:
    config = configured(base, tmp_path / "r", "inpaint", adapter={"rank": 2})
    with pytest.raises(ConfigError, match=r"ask for 9 \(4 and 5 for train.inpaint\); an adapter cannot add them"):
        objective_of(config)
