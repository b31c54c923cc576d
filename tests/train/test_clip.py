"""CLIP with wrong captions: the loss against its formula, for any number of ranks; what cannot be used is refused.

VAE and CLIP under Muon: the blocks' matrices are its own, the rest is AdamW's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shards.dataset import Dataset
from shards.settings import ConfigError
from tests.train import forked, tiny
from tests.train.test_zero import objective_of
from train import checkpoint, folders
from train.objectives import build
from train.optimizer import is_hidden

ROWS = 8


def config_of(run: Path, **clip: object) -> Path:
    data = tiny.configuration(run)
    data["clip"].update({"wrong_captions": "others", **clip})
    return tiny.write_config(run, data)


def gradients(config: str) -> dict[str, torch.Tensor]:
    """Of the first global batch: the loss and its gradients, averaged over the ranks as DeepSpeed does it."""
    from train import ranks

    me = ranks.join(1)
    objective, _ = objective_of(Path(config), "clip")
    share = ROWS // me.world
    loss, _ = objective(objective.batch(np.arange(me.rank * share, (me.rank + 1) * share)))
    loss.backward()
    found = {n: me.mean(p.grad.clone()) for n, p in objective.model.named_parameters() if p.grad is not None}
    return found | {"loss": me.mean(loss.detach())}


def test_the_loss_is_that_of_the_caption_against_all_others_and_the_own_wrong_ones(run: Path) -> None:
    objective, _ = objective_of(config_of(run), "clip")
    positions = np.arange(ROWS)
    captions = objective.image_samples.captions(positions)
    wrong = objective.image_samples.texts("others", positions)
    assert {len(w) for w in wrong} == {0, 2}
    loss, _ = objective(objective.batch(positions))
    clip, tokens = objective.model, objective._tokenizer
    pixels = torch.from_numpy(objective.image_samples.pixels(positions)).permute(0, 3, 1, 2).float() / 255
    image = clip.encode_image((pixels - objective._mean) / objective._std, normalize=True)
    text = clip.encode_text(tokens(captions), normalize=True)
    scale = clip.logit_scale.exp()
    to_text, to_image = 0.0, 0.0
    for i, mine in enumerate(wrong):
        columns = torch.cat([text, clip.encode_text(tokens(mine), normalize=True)]) if mine else text
        to_text -= torch.log_softmax(scale * columns @ image[i], 0)[i] / ROWS
        to_image -= torch.log_softmax(scale * image @ text[i], 0)[i] / ROWS
    torch.testing.assert_close(loss, (to_text + to_image).reshape(()) / 2)


def test_two_ranks_have_the_gradient_of_one(run: Path) -> None:
    config = str(config_of(run))
    (whole,) = forked.on_ranks(1, gradients, config)
    assert whole["token_embedding.weight"].abs().sum() > 0
    for found in forked.on_ranks(2, gradients, config):
        for name, g in found.items():
            torch.testing.assert_close(g, whole[name], rtol=1e-4, atol=1e-6)


def test_a_batch_without_wrong_captions_is_clips_own(run: Path) -> None:
    objective, _ = objective_of(config_of(run), "clip")
    plain, _ = objective_of(config_of(run, wrong_captions=None), "clip")
    none = [p for p in range(28) if not objective.image_samples.texts("others", np.array([p]))[0]][:4]
    batch = objective.batch(np.array(none))
    assert batch["wrong"].shape == (4, 0)
    torch.testing.assert_close(objective(batch)[0], plain(plain.batch(np.array(none)))[0])


@pytest.mark.parametrize(("column", "says"), [("nowhere", "ingest.keep_columns"), ("image_offset", "holds no texts")])
def test_a_column_that_cannot_be_used_is_refused(run: Path, column: str, says: str) -> None:
    _, section = objective_of(config_of(run), "clip")
    with pytest.raises(ConfigError, match=says):
        build("clip", section.model_copy(update={"wrong_captions": column}), [Dataset.open(f"{run}/images")], 0)


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_vae_and_clip_are_fitted_by_muon_too(run: Path, stage: str) -> None:
    config = config_of(run)
    muon = ["optimizer=muon", "learning_rate=0.01", "adamw_learning_rate=0.001", "images=16"]
    forked.fit(config, 2, *(f"{stage}.{setting}" for setting in muon), stage=stage)
    found = folders.latest_complete(str(run / stage / "checkpoints"))
    assert found is not None
    squares, weights = checkpoint.whole(found, "exp_avg_sq"), checkpoint.whole(found, "weights")
    hidden = {n for n, w in weights.items() if is_hidden(n, w.shape)}
    assert hidden
    assert squares.keys() == weights.keys() - hidden
    before = {n: p.detach() for n, p in objective_of(config, stage)[0].model.named_parameters()}
    assert all(not torch.equal(before[n], weights[n]) for n in hidden)
