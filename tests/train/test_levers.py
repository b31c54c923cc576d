"""Mirrored pictures, the nearest of several noises, the contrastive term: against plain formulas, on any ranks, and
gone on with after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.settings import ConfigError, validate
from tests.train import forked, tiny
from tests.train.test_resume import FILES, config_of, state_of
from tests.train.test_zero import assert_same, step_folder, tensors
from train import diffusion, folders
from train.config import TrainConfig
from train.data import batch_slots
from train.fit_config import layout
from train.objectives import build
from train.randomness import Randomness

pytestmark = pytest.mark.timeout(900)

SEED = 5


def objective_of(root: Path, **train: Any) -> Any:
    given = {"images": 64, "batch_size": 8, "unet": tiny.UNET, "streams": 4, "window": 4, **train}
    config = validate(TrainConfig, given, "x.yaml")
    return build("train", config, [Dataset.open(str(root))], SEED)


# ---- the nearest noise ---------------------------------------------------------------------------------


def test_the_noise_is_the_nearest_of_its_draws(run: Path) -> None:
    positions = np.array([3, 17, 0, 12, 6])
    plain = objective_of(run / "latents").batch(positions)
    batch = objective_of(run / "latents", noise_candidates=6).batch(positions)
    assert torch.equal(batch["x0"], plain["x0"])
    assert torch.equal(batch["t"], plain["t"])
    first = []
    for i, position in enumerate(positions):
        # What the draws of this one sample are, whoever else is in the batch.
        draws = Randomness(SEED).normal("noise", positions[i : i + 1], (6, 4, 4, 4))[0].astype(np.float64)
        x0 = batch["x0"][i].numpy().astype(np.float64)
        distances = [float(((x0 - e) ** 2).sum()) for e in draws]
        best = int(np.argmin(distances))
        assert np.array_equal(batch["noise"][i].numpy(), draws[best].astype(np.float32)), position
        assert np.array_equal(plain["noise"][i].numpy(), draws[0].astype(np.float32)), position
        first.append(best == 0)
    assert not all(first), "of these samples one at least has a nearer draw than the first"


def test_the_nearest_noise_is_found_on_any_ranks(run: Path) -> None:
    objective = objective_of(run / "latents", noise_candidates=3)
    whole = objective.batch(np.arange(8))["noise"]
    for rank in range(2):
        slots = batch_slots(8, rank, 2, 0, 1)
        assert torch.equal(objective.batch(slots)["noise"], whole[slots])


def test_validation_draws_plain_noise(run: Path) -> None:
    objective = objective_of(run / "latents", noise_candidates=4)
    plain = objective_of(run / "latents")
    rows, t = np.arange(5), np.full(5, 300)
    assert torch.equal(
        objective.latent_batch(objective.latents, rows, t, 1 << 62)["noise"],
        plain.latent_batch(plain.latents, rows, t, 1 << 62)["noise"],
    )


def test_nearest_noise_of_equals_is_the_first() -> None:
    candidates = np.zeros((1, 3, 1, 1, 2), np.float32)
    candidates[0, :, 0, 0] = [(5, 5), (1, 0), (0, 1)]  # the last two are as far from (0, 0)
    assert diffusion.nearest_noise(candidates, np.zeros((1, 1, 1, 2), np.float32)).tolist() == [[[[1.0, 0.0]]]]


# ---- the contrastive term ------------------------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction"}
AWAKE = {"initialisation": "torch"}  # an output of zero is as far from all targets together, whoever is whose partner


def contrasted(objective: Any, world: int, accumulation: int) -> float:
    """The loss of the first global batch, micro-batch by micro-batch."""
    losses = []
    for rank in range(world):
        for micro_step in range(accumulation):
            slots = batch_slots(8, rank, world, micro_step, accumulation)
            losses.append(float(objective(objective.batch(slots))[0]))
    return float(np.mean(losses))


def test_the_contrastive_term_is_the_papers_on_any_ranks(run: Path) -> None:
    objective = objective_of(run / "latents", **FLOW, **AWAKE, contrastive_weight=0.3)
    with torch.no_grad():
        batch = objective.batch(np.arange(8))
        x0, noise = batch["x0"].double(), batch["noise"].double()
        sigma = (batch["t"].double() + 1) / 1000
        xt = (1 - sigma)[:, None, None, None] * x0 + sigma[:, None, None, None] * noise
        output = objective.predict(xt.float(), batch).double()
        total = 0.0
        for i in range(8):
            j = (i + 4) % 8  # the sample half a batch away
            total += float(((output[i] - (noise[i] - x0[i])) ** 2).mean())
            total -= 0.3 * float(((output[i] - (noise[j] - x0[j])) ** 2).mean())
        loss, details = objective(batch)
        assert float(loss) == pytest.approx(total / 8, rel=1e-4)
        assert float(details[0]) == pytest.approx(float(objective.errors(batch)[0].mean()), rel=1e-5)
        for world, accumulation in ((1, 2), (2, 1), (2, 2), (4, 1)):
            assert contrasted(objective, world, accumulation) == pytest.approx(float(loss), rel=1e-4)
        plain = objective_of(run / "latents", **FLOW, **AWAKE)
        assert float(plain(batch)[0]) == pytest.approx(float(details[0]), rel=1e-5)
        # Where nothing is learned, the loss is the error alone.
        assert float(objective.eval()(batch)[0]) == pytest.approx(float(details[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "ranks", "sentence"),
    [
        ({"batch_size": 6, "micro_batch_size": 3}, 1, "there are 3; make train.micro_batch_size even"),
        ({"batch_size": 6}, 2, "there are 3; make train.micro_batch_size even"),
        ({"batch_size": 8, "batch_by_area": 2}, 2, "make train.batch_by_area a multiple of 4"),
    ],
)
def test_an_odd_micro_batch_has_no_pairs(given: dict[str, Any], ranks: int, sentence: str) -> None:
    config = validate(TrainConfig, {"images": 64, **FLOW, "contrastive_weight": 0.05, **given}, "x.yaml")
    with pytest.raises(ConfigError, match=sentence):
        layout("train", config, ranks)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"contrastive_weight": 0.05}, "is of flow_prediction's targets; prediction_type is epsilon"),
        ({"learned_variance": True, "noise_candidates": 4}, "plain noise; set noise_candidates to 1"),
        ({"flip": True, "inpaint": {}}, "flip cannot go with inpaint"),
        ({"noise_candidates": 0}, "noise_candidates"),
    ],
)
def test_levers_that_cannot_be_pulled_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(TrainConfig, given, "x.yaml")


# ---- mirrored pictures ---------------------------------------------------------------------------------


def test_each_samples_own_draw_says_whether_it_is_mirrored(tmp_path: Path) -> None:
    tiny.make_latents(tmp_path / "latents", flip=True)
    flips, plain = objective_of(tmp_path / "latents", flip=True), objective_of(tmp_path / "latents")
    dataset = Dataset.open(str(tmp_path / "latents"))
    moments = {k: v for p in range(4) for k, v in _moments(ColumnShard(dataset, p))}
    positions = np.arange(40)
    drawn = Randomness(SEED).uniform("flip", positions) < 0.5
    batch, as_is = flips.batch(positions), plain.batch(positions)
    posterior = Randomness(SEED).normal("posterior", positions, (4, 4, 4))
    for i, key in enumerate(flips.keys(positions)):
        mean, logstd = moments[key][int(drawn[i])]
        expected = (mean.astype(np.float64) + np.exp(-15 + 0.098 * logstd) * posterior[i]) * 0.9
        np.testing.assert_allclose(batch["x0"][i].numpy(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(batch["x0"][i], as_is["x0"][i]) != drawn[i]
    assert 10 < drawn.sum() < 30
    assert all(torch.equal(batch[k], as_is[k]) for k in batch if k != "x0")
    for rank in range(2):
        slots = batch_slots(8, rank, 2, 0, 1)
        assert torch.equal(flips.batch(slots)["x0"], batch["x0"][slots])


def _moments(shard: ColumnShard) -> list[tuple[str, list[tuple[np.ndarray, np.ndarray]]]]:
    """Of each sample its key, and the moments of its picture and of the mirrored one."""
    a, ends = shard.arrays, ("", "_flipped")
    return [
        (key, [(a["mean" + e][i], a["logstd" + e][i].astype(np.float64)) for e in ends])
        for i, key in enumerate(shard.keys)
    ]


def test_latents_without_mirrored_pictures_cannot_be_flipped(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.flip: .* make the latents again with latents\.flip true"):
        objective_of(run / "latents", flip=True)


# ---- all of them -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_levers_killed_and_gone_on_with_end_with_the_same_bytes(tmp_path: Path) -> None:
    levers = {**FLOW, "flip": True, "noise_candidates": 3, "contrastive_weight": 0.05}
    runs = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        tiny.make_latents(folder / "latents", flip=True)
        runs.append((folder, config_of(folder, **levers)))
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
    for name in FILES:
        assert_same(tensors(step_folder(whole, 6), name), tensors(step_folder(killed, 6), name))
