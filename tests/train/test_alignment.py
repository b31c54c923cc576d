"""U-REPA: its losses against plain formulas, on any ranks; what it learns, keeps and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestration.checks import check_static
from orchestration.config import RunConfig
from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.settings import ConfigError, validate
from tests.train import forked, tiny
from tests.train.test_export import save_checkpoint
from tests.train.test_resume import config_of, state_of
from tests.train.test_tuning import make_run
from tests.train.test_zero import STEPS, assert_close, assert_same, settings, step_folder, tensors
from train import folders
from train.alignment import losses
from train.config import TrainConfig
from train.data import batch_slots
from train.export import _Source, build_pipeline
from train.fit_config import layout
from train.latent_file import LatentFile
from train.objectives import build
from train.optimizer import parameter_groups

pytestmark = pytest.mark.timeout(900)

SEED = 5
AWAKE = {"initialisation": "torch"}
ALIGNMENT = {"hidden": 16, "weight": 0.7, "manifold_weight": 2.0}


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    tiny.make_latents(tmp_path / "latents", features=(3, 12))
    return tmp_path / "latents"


def objective_of(root: Path, **train: Any) -> Any:
    given = {"images": 64, "batch_size": 8, "unet": tiny.UNET, "streams": 4, "window": 4, **AWAKE, **train}
    config = validate(TrainConfig, given, "x.yaml")
    return build("train", config, [Dataset.open(str(root))], SEED)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def by_hand(projected: np.ndarray, features: np.ndarray) -> tuple[list[float], list[float]]:
    """Similarity and manifold loss of each of B samples, from [B,N,D] of the UNet and of the tower, pair by pair."""
    similarity, manifold = [], []
    count, places = projected.shape[:2]
    for b in range(count):
        similarity.append(float(np.mean([cosine(projected[b, n], features[b, n]) for n in range(places)])))
        other = (b - count // 2) % count
        found = [
            (cosine(projected[b, i], projected[k, j]) - cosine(features[b, i], features[k, j])) ** 2
            for i in range(places)
            for k in (b, other)
            for j in range(places)
        ]
        manifold.append(float(np.mean(found)))
    return similarity, manifold


# ---- the losses ----------------------------------------------------------------------------------------


def test_losses_are_the_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    projected, features = rng.normal(size=(4, 5, 3, 3)), rng.normal(size=(4, 3, 3, 5))
    found = losses(torch.from_numpy(projected), torch.from_numpy(features))
    expected = by_hand(projected.reshape(4, 5, 9).transpose(0, 2, 1), features.reshape(4, 9, 5))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-4, atol=1e-6)


def test_the_unets_features_are_enlarged_to_the_towers_grid() -> None:
    """Bilinearly, with pixel areas and not corners aligned: what torch's plain enlarging gives."""
    generator = torch.Generator().manual_seed(0)
    projected, features = torch.randn(2, 5, 2, 2, generator=generator), torch.randn(2, 4, 4, 5, generator=generator)
    large = torch.nn.functional.interpolate(projected, (4, 4), mode="bilinear", align_corners=False)
    for mine, theirs in zip(losses(projected, features), losses(large, features), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_loss_is_the_predictions_and_the_alignments(latents: Path) -> None:
    """On one rank and on several; a sample's partner is the same one."""
    objective, plain = objective_of(latents, alignment=ALIGNMENT), objective_of(latents)
    assert objective.figures == ("mse", "similarity", "manifold")
    seen = []
    objective.unet.mid_block.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    with torch.no_grad():
        batch = objective.batch(np.arange(8))
        loss, details = objective(batch)
        own, _ = plain({k: v for k, v in batch.items() if k != "features"})
        places = seen[0].flatten(2).mT
        layers = objective.model.projector.layers
        for layer in layers:
            places = layer(places)
        side = seen[0].shape[-1]
        grid = places.mT.reshape(8, 12, side, side)
        enlarged = torch.nn.functional.interpolate(grid, (3, 3), mode="bilinear", antialias=True).flatten(2).mT
        similarity, manifold = by_hand(enlarged.numpy(), batch["features"].flatten(1, 2).numpy())
        expected = float(own) + 0.7 * (2.0 * np.mean(manifold) - np.mean(similarity))
        assert float(loss) == pytest.approx(expected, rel=1e-4)
        assert float(details[1]) == pytest.approx(np.mean(similarity), abs=1e-5)
        assert float(details[2]) == pytest.approx(np.mean(manifold), rel=1e-4)
        for world, accumulation in ((1, 2), (2, 1), (4, 1)):
            slots = [batch_slots(8, r, world, m, accumulation) for r in range(world) for m in range(accumulation)]
            parts = [float(objective(objective.batch(s))[0]) for s in slots]
            assert np.mean(parts) == pytest.approx(float(loss), rel=1e-4)
        # Where nothing is learned there is the prediction alone, and no features are asked for.
        for given in (batch, {k: v for k, v in batch.items() if k != "features"}):
            loss_alone = objective.eval()(given)
            assert float(loss_alone[0]) == pytest.approx(float(own), rel=1e-6)
            assert len(loss_alone[1]) == len(details)
            assert not loss_alone[1][1:3].any(), "nothing was aligned, which is 0 and no missing number"


def test_each_sample_has_its_own_features(tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "latents", flip=True, features=(3, 12))
    objective = objective_of(tmp_path / "latents", alignment=ALIGNMENT, flip=True)
    dataset, found = Dataset.open(str(tmp_path / "latents")), {}
    for p in range(4):
        shard = ColumnShard(dataset, p)
        found |= {k: [shard.arrays[f"features{e}"][i] for e in ("", "_flipped")] for i, k in enumerate(shard.keys)}
    positions = np.arange(24)
    flipped = objective.random.uniform("flip", positions) < 0.5
    batch = objective.batch(positions)
    for i, key in enumerate(objective.keys(positions)):
        assert np.array_equal(batch["features"][i].numpy(), found[key][int(flipped[i])].astype(np.float32)), key
    assert 4 < flipped.sum() < 20


def test_it_stops_counting_where_it_should(latents: Path) -> None:
    objective = objective_of(latents, alignment={**ALIGNMENT, "until_images": 12})
    plain = objective_of(latents)
    with torch.no_grad():
        for positions, ends in ((np.arange(8), False), (np.arange(16, 24), True)):
            batch = objective.batch(positions)
            own = float(plain({k: v for k, v in batch.items() if k not in ("features", "aligned")})[0])
            assert (float(objective(batch)[0]) == pytest.approx(own, rel=1e-6)) == ends
            assert ("features" in batch, "features" in objective.latents.wants) == (not ends, not ends)
        batch = objective.batch(np.arange(8, 16))
        assert batch["aligned"].tolist() == [1.0] * 4 + [0.0] * 4
        own = float(plain({k: v for k, v in batch.items() if k not in ("features", "aligned")})[0])
        before, after, both = (
            float(objective({**batch, "aligned": a})[0])
            for a in (batch["aligned"], 1 - batch["aligned"], torch.ones(8))
        )
        assert before + after - own == pytest.approx(both, rel=1e-5)
        assert min(abs(before - both), abs(after - both)) > 1e-3


def test_beyond_its_end_no_features_are_read(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(latents, alignment={**ALIGNMENT, "until_images": 8})
    objective.batch(np.arange(8, 16))  # where that is seen
    read: list[set[str]] = []
    inner = LatentFile.read
    monkeypatch.setattr(LatentFile, "read", lambda f, b, i, j, wants: read.append(wants) or inner(f, b, i, j, wants))
    for begin in range(16, 64, 8):
        loss, details = objective(objective.batch(np.arange(begin, begin + 8)))
        assert torch.isnan(details[1:3]).all(), "there is nothing to be told of it"
    loss.backward()
    given = [p.grad for p in objective.model.projector.parameters()]
    assert all(g is not None and not g.any() for g in given), "ZeRO reduces a gradient of every parameter"
    assert read
    assert not any("features" in wants for wants in read)


@pytest.mark.parametrize("block", ["down_blocks.0", "up_blocks.1"])
def test_another_block(latents: Path, block: str) -> None:
    objective = objective_of(latents, alignment={**ALIGNMENT, "block": block})
    kind, _, number = block.partition(".")
    resnets = getattr(objective.unet, kind)[int(number)].resnets
    assert objective.model.projector.layers[0].in_features == resnets[-1].out_channels
    objective(objective.batch(np.arange(8)))[0].backward()
    assert resnets[0].conv1.weight.grad.abs().sum() > 0


# ---- training ------------------------------------------------------------------------------------------


def test_the_projector_has_neither_averages_nor_decay(latents: Path) -> None:
    """Nor is it Muon's: it is the training's alone, as a discriminator is."""
    objective = objective_of(latents, alignment=ALIGNMENT)
    groups = parameter_groups(objective.model, 0.01, "muon", objective.beside)
    (beside,) = (g for g in groups if g.get("beside"))
    own = {id(p) for p in objective.model.projector.parameters()}
    assert {id(p) for p in beside["params"]} == own
    assert beside["weight_decay"] == 0
    assert not own & {id(p) for g in groups if g is not beside for p in g["params"]}


def test_the_projector_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "r")
    unet = save_checkpoint(run, 10, seed=2)
    stored = _Source._weights
    more = {"projector.layers.0.bias": torch.zeros(3)}
    monkeypatch.setattr(_Source, "_weights", lambda self: stored(self) | more)
    found = build_pipeline(run.run, weights="raw").unet.state_dict()
    assert found.keys() == unet.state_dict().keys()


@pytest.mark.slow
def test_training_aligns_and_leaves_a_plain_unet(tmp_path: Path) -> None:
    """The similarity rises; the projector is in the checkpoint, and neither in the average nor in what is exported."""
    from diffusers import StableDiffusionPipeline

    tiny.make_latents(tmp_path / "latents", features=(2, 12))
    # Of timesteps with little noise, which hides what the tower saw.
    little = {"timestep_sampling": "logit_normal", "logit_mean": -3.0}
    length = {"images": 1200, "checkpoint_every_images": 1200, "log_every_images": 80, "learning_rate": 1e-2}
    config = config_of(tmp_path, **AWAKE, **little, **length, alignment={"hidden": 64})
    forked.fit(config, 1)
    log = [json.loads(x) for x in (tmp_path / "train" / "log.jsonl").read_text().splitlines()]
    similarity = [x["similarity"] for x in log]
    assert np.mean(similarity[-5:]) > np.mean(similarity[:5]) + 0.1
    assert np.mean([x["manifold"] for x in log[-5:]]) < np.mean([x["manifold"] for x in log[:5]])
    step = step_folder(tmp_path, 150)
    assert any(n.startswith("projector.") for n in tensors(step, "weights"))
    assert not any(n.startswith("projector.") for n in tensors(step, "ema"))
    from train.export import export

    for weights in ("ema", "raw"):
        folder = Path(export(str(tmp_path), weights=weights, out=str(tmp_path / weights)))
        names = set(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet.state_dict())
        assert names
        assert not any("projector" in n for n in names)


@pytest.mark.slow
def test_killed_and_gone_on_with_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    runs = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        tiny.make_latents(folder / "latents", flip=True, features=(3, 12))
        runs.append((folder, config_of(folder, **AWAKE, flip=True, alignment=ALIGNMENT, optimizer="muon")))
    (whole, config), (killed, other) = runs
    forked.train(config, 2)
    ranks = forked.start(2, forked.train_stage, str(other))
    log = killed / "train" / "log.jsonl"
    forked.wait_for(lambda: log.exists() and '"step": 3,' in log.read_text())
    ranks[1].kill()
    for rank in ranks:
        with pytest.raises(forked.RankError):
            rank.result()
    assert folders.latest_complete(killed / "checkpoints", contents=False)
    forked.fit(other, 2)
    assert state_of(other).state == "done"
    a, b = step_folder(whole, 6), step_folder(killed, 6)
    for name in ("weights", "ema"):
        assert_same(tensors(a, name), tensors(b, name))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by one rank with features up to its middle, eagerly."""
    folder = tmp_path_factory.mktemp("one")
    tiny.make_latents(folder / "latents", features=(3, 12))
    forked.train(settings(folder, **AWAKE, alignment={**ALIGNMENT, "until_images": 16}), 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "given", "stage"),
    [
        (2, {"zero_stage": 2}, [forked.train_stage]),
        (2, {"zero_stage": 3}, [forked.train_stage]),
        (1, {"compile": True}, [forked.traced, forked.train_stage]),
        (1, {"compile": "blocks"}, [forked.traced, forked.train_stage]),
        pytest.param(1, {"compile": True}, [forked.train_stage], marks=pytest.mark.nightly),
        pytest.param(1, {"compile": "blocks"}, [forked.train_stage], marks=pytest.mark.nightly),
    ],
    ids=["zero2", "zero3", "compiled", "blocks", "compiled, built", "blocks, built"],
)
def test_shared_out_or_compiled_it_learns_the_same(
    one_rank: Path, tmp_path: Path, ranks: int, given: dict[str, Any], stage: list[Any]
) -> None:
    (tmp_path / "latents").symlink_to(one_rank / "latents")
    config = settings(tmp_path, **AWAKE, alignment={**ALIGNMENT, "until_images": 16}, **given)
    forked.on_ranks(ranks, *stage, str(config))
    for name in ("weights", "ema"):
        assert_close(tensors(step_folder(tmp_path, STEPS), name), tensors(step_folder(one_rank, STEPS), name))
    logs = [[json.loads(x) for x in (r / "train" / "log.jsonl").read_text().splitlines()] for r in (one_rank, tmp_path)]
    for one, other in zip(*logs, strict=True):
        assert other["similarity"] == (None if one["images"] > 16 else pytest.approx(one["similarity"], rel=1e-4))


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"start_from": "x", "adapter": {}}, "all of which learns, and with adapter it does not"),
        ({"start_from": "x", "control": {}}, "all of which learns, and with control it does not"),
        ({"alignment": {"block": "mid"}}, "alignment.block"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(TrainConfig, {"alignment": {}, **given}, "x.yaml")


def test_an_odd_micro_batch_has_no_pairs() -> None:
    given = {"images": 64, "batch_size": 6, "micro_batch_size": 3}
    odd = validate(TrainConfig, {**given, "alignment": {}}, "x.yaml")
    with pytest.raises(ConfigError, match=r"alignment\.manifold_weight pairs .* make train\.micro_batch_size even"):
        layout("train", odd, 1)
    assert layout("train", validate(TrainConfig, {**given, "alignment": {"manifold_weight": 0}}, "x.yaml"), 1)


def test_latents_without_features_cannot_align(run: Path, latents: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.alignment: .* make the latents again with latents\.features"):
        objective_of(run / "latents", alignment=ALIGNMENT)
    with pytest.raises(ConfigError, match=r"no block 'down_blocks\.7'; it has mid_block, down_blocks\.0, down_"):
        objective_of(latents, alignment={**ALIGNMENT, "block": "down_blocks.7"})


@pytest.mark.parametrize(("asked", "needed"), [({"alignment": {}}, "features"), ({"flip": True}, "flip")])
def test_what_the_latents_would_lack_is_said_before_any_work(
    tmp_path: Path, asked: dict[str, Any], needed: str
) -> None:
    given = {"run": str(tmp_path / "r"), "ingest": {"table": "table.csv"}, "train": asked}
    with pytest.raises(ConfigError, match=f"train.{next(iter(asked))} needs latents.{needed}, which is not set"):
        check_static("train", validate(RunConfig, given, "x.yaml"))
    tiny.make_latents(tmp_path / "r" / "latents")  # what is there says for itself what it has
    check_static("train", validate(RunConfig, given, "x.yaml"))


def test_sources_with_features_of_two_towers_cannot_be_mixed(latents: Path, tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "other", features=(2, 12))
    given = {"images": 64, "batch_size": 8, "unet": tiny.UNET, "alignment": ALIGNMENT}
    given["sources"] = [{"latents": str(latents)}, {"latents": str(tmp_path / "other")}]
    config = validate(TrainConfig, given, "x.yaml")
    with pytest.raises(ConfigError, match="of another vision tower, or of another size or grid"):
        build("train", config, [Dataset.open(s.latents) for s in config.sources], SEED)
