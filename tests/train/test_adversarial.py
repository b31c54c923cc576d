"""The VAE's adversarial term: its gradients against VQGAN's formulas written out, and its life in checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from shards.dataset import Dataset
from shards.settings import ConfigError, load_sections, validate
from tests.train import forked, tiny
from train import checkpoint, folders
from train.adversarial import Discriminator
from train.autoencoder import to_unit
from train.config import TrainingSections
from train.encoder_config import AdversarialConfig, AutoencoderConfig
from train.objectives import build
from train.state import stage_state

pytestmark = pytest.mark.timeout(900)

TERM = {"channels": 16, "layers": 2, "start_images": 16}
Gradients = dict[str, torch.Tensor]


def objective(run: Path, term: dict[str, Any] | None, **more: Any) -> Any:
    config = AutoencoderConfig(**tiny.configuration(run)["autoencoder"] | {"adversarial": term} | more)
    return build("autoencoder", config, [Dataset.open(str(run / "images"))], 3)


def gradients(found: Any, positions: Any) -> Gradients:
    found.model.zero_grad(set_to_none=True)
    found(found.batch(np.asarray(positions)))[0].backward()
    return {n: p.grad.clone() for n, p in found.model.named_parameters() if p.grad is not None}


def assert_close(a: Gradients, b: Gradients, rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] - value).norm() <= rtol * value.norm() + 1e-9, name


def test_the_gradients_are_those_of_the_formulas(run: Path) -> None:
    """Of one picture: the VAE's are those of reconstruction + KL + lambda * generator's loss, with VQGAN's lambda from
    two backward passes to the last layer; the discriminator's are those of its hinge loss alone."""
    ours = objective(run, {**TERM, "start_images": 0, "weight": 0.8}, mse_weight=0.3)
    found = gradients(ours, [5])
    batch, vae = ours.batch(np.array([5])), ours.model
    disc = vae.discriminator
    vae.zero_grad(set_to_none=True)
    x = to_unit(batch["pixels"])
    posterior = vae.encode(x).latent_dist
    output = vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
    nll = (output - x).abs().mean() + 0.3 * (output - x).square().mean()
    generator = -disc(output).mean()
    last = vae.decoder.conv_out.weight
    lengths = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, generator)]
    kl = posterior.kl().sum() / x.numel()
    assert 1e-3 < lengths[0] / lengths[1] < 1e3
    (nll + 1e-6 * kl + 0.8 * lengths[0] / lengths[1] * generator).backward(inputs=list(vae.encoder.parameters()))
    wanted = {n: p.grad for n, p in vae.named_parameters() if n.startswith("encoder.")}
    assert_close({n: g for n, g in found.items() if n in wanted}, wanted)
    vae.zero_grad(set_to_none=True)
    real, fake = disc(x), disc(output.detach())
    (0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())).backward()
    wanted = {n: p.grad for n, p in vae.named_parameters() if n.startswith("discriminator.")}
    assert_close({n: g for n, g in found.items() if n in wanted}, wanted)


def test_a_constant_weight_is_what_it_says(run: Path) -> None:
    """Without `adaptive` the VAE's gradient is linear in the weight."""
    none, one, three = (
        gradients(objective(run, {**TERM, "start_images": 0, "adaptive": False, "weight": w}), [1, 2])
        for w in (1e-9, 1.0, 3.0)
    )
    name = "encoder.conv_in.weight"
    assert (one[name] - none[name]).norm() > 1e-3 * none[name].norm()
    torch.testing.assert_close(three[name] - none[name], 3 * (one[name] - none[name]), rtol=1e-3, atol=1e-7)


def test_a_batch_is_the_mean_of_its_pictures(run: Path) -> None:
    """So that neither ranks nor micro-batches change what is learned; also where the term begins within the batch."""
    ours = objective(run, TERM)
    together, parts = gradients(ours, range(14, 18)), [gradients(ours, [i]) for i in range(14, 18)]
    assert_close(together, {n: torch.stack([p[n] for p in parts]).mean(dim=0) for n in together})
    silent = [p["discriminator.last.weight"].abs().max() == 0 for p in parts]
    assert silent == [True, True, False, False]


def test_before_its_start_nothing_is_changed(run: Path) -> None:
    plain, ours = gradients(objective(run, None), range(8)), gradients(objective(run, TERM), range(8))
    assert all(g.abs().max() == 0 for n, g in ours.items() if n.startswith("discriminator."))
    assert_close({n: g for n, g in ours.items() if n in plain}, plain, 1e-6)
    after = gradients(objective(run, TERM), range(16, 24))
    assert all(g.abs().max() > 0 for n, g in after.items() if n.startswith("discriminator.") and n.endswith("weight"))


def test_the_loss_that_is_told_has_no_adversarial_part(run: Path) -> None:
    plain, ours = objective(run, None), objective(run, {**TERM, "start_images": 0})
    outputs = [o(o.batch(np.arange(4))) for o in (plain, ours)]
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[1][1][:4], outputs[0][1])
    assert ours.figures[4:] == ("discriminator", "real", "fake")


def test_the_discriminator_is_that_of_pix2pix() -> None:
    """Convolutions 64-128-256-512 and one, 4 wide; with three layers a patch is 70 pixels."""
    disc = Discriminator(AdversarialConfig(), 0)
    widths = [(m.in_channels, m.out_channels, m.stride[0]) for m in (*disc.convolutions, disc.last)]
    assert widths == [(3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    disc = Discriminator(AdversarialConfig(channels=8), 0).double()
    for norm in disc.norms:  # which see the whole picture
        norm.forward = lambda x: x
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64).requires_grad_()
    found = disc(x)
    found[0, 0, found.shape[2] // 2, found.shape[3] // 2].backward()
    assert x.grad is not None
    rows = x.grad[0].abs().sum(dim=(0, 2)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize(("side", "layers"), [(8, 1), (12, 2), (24, 3), (32, 3), (40, 3), (48, 4)])
def test_the_smallest_picture_is_taken_and_a_smaller_one_refused(side: int, layers: int) -> None:
    """What the configuration lets through gives patches; what is refused would have failed at the first step."""
    config = AutoencoderConfig(resolution=(64, side), adversarial={"layers": layers, "channels": 40})
    assert config.adversarial
    disc = Discriminator(config.adversarial, 0)
    assert disc(torch.zeros(1, 3, side, side)).numel() > 0
    less = 2 * 2**layers  # two places where three are needed
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        disc(torch.zeros(1, 3, less, less))
    given = {"resolution": [64, max(less, 8)], "adversarial": {"layers": layers + (less < 8)}}
    with pytest.raises(ConfigError, match=r"a discriminator of \d layers needs \d+ pixels, and the resolution is"):
        validate(AutoencoderConfig, given, "x.yaml")


@pytest.mark.parametrize("channels", [11, 13, 100])
def test_channels_that_norms_cannot_group_are_refused(channels: int) -> None:
    with pytest.raises(ConfigError, match=r"adversarial.channels.*multiple of 8"):
        validate(AutoencoderConfig, {"adversarial": {"channels": channels}}, "x.yaml")


# ---- in runs ---------------------------------------------------------------------------------------


def configured(run: Path, term: dict[str, Any] | None = None, **more: Any) -> Path:
    data = tiny.configuration(run)
    data["autoencoder"] |= {"adversarial": term or TERM, "grad_clip": None, **more}
    return tiny.write_config(run, data)


def step(run: Path, number: int) -> Path:
    return run / "autoencoder" / "checkpoints" / folders.folder_name(number)


def states(folder: Path) -> dict[str, Gradients]:
    return {s: checkpoint.whole(str(folder), s) for s in ("weights", "exp_avg", "exp_avg_sq", "ema")}


def another(run: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "images").symlink_to(run / "images")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks to its end, in one go."""
    run = tmp_path_factory.mktemp("fitted")
    tiny.make_images(run / "images")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = open_clip.CLIP(**tiny.CLIP).state_dict()
    tower(run).mkdir()
    save_file(weights, tower(run) / "open_clip_model.safetensors")
    (tower(run) / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}))
    forked.fit(with_all(run, run), 2, stage="autoencoder")
    return run


def tower(run: Path) -> Path:
    return run / "tower"


def with_all(run: Path, of: Path, **more: Any) -> Path:
    """The configuration of `run` with both terms; the tower is that of another run."""
    return configured(run, perceptual={"weights": str(tower(of))}, **more)


def test_a_killed_run_ends_with_the_same_bytes_and_on_other_ranks_alike(fitted: Path, tmp_path: Path) -> None:
    """Killed after the term began: all states of both networks are those of the run that was not. Gone on with by one
    rank, without ZeRO and in other micro-batches, they are the same up to rounding."""
    run = another(fitted, tmp_path / "run")
    config = with_all(run, fitted)
    ranks = forked.start(2, forked.run_stage, str(config), "autoencoder")
    forked.wait_for((step(run, 4) / "manifest.json").exists)
    ranks[0].kill()
    for rank in ranks:
        with pytest.raises(forked.RankError):
            rank.result()
    shutil.rmtree(step(run, 6), ignore_errors=True)
    other = another(fitted, tmp_path / "other")
    shutil.copytree(run / "autoencoder", other / "autoencoder")
    forked.fit(config, 2, stage="autoencoder")
    wanted, found = states(step(fitted, 6)), states(step(run, 6))
    for state, values in wanted.items():
        assert values.keys() == found[state].keys()
        assert all(torch.equal(v, found[state][n]) for n, v in values.items())
    trained = {n for n in wanted["exp_avg"] if n.startswith("discriminator.")}
    assert trained
    assert not trained & wanted["ema"].keys()  # which is the VAE's alone
    forked.fit(with_all(other, fitted, zero_stage=0, micro_batch_size=2), 1, stage="autoencoder")
    for state, values in states(step(other, 6)).items():
        for name, value in values.items():
            torch.testing.assert_close(value, wanted[state][name], rtol=2e-3, atol=2e-5)


def test_the_export_is_the_vae_alone(fitted: Path) -> None:
    from diffusers import AutoencoderKL

    vae, outputs = AutoencoderKL.from_pretrained(fitted / "autoencoder" / "model", output_loading_info=True)
    assert not outputs["unexpected_keys"]
    assert not outputs["missing_keys"]
    ema = checkpoint.whole(str(step(fitted, 6)), "ema")
    assert ema.keys() == vae.state_dict().keys()
    assert all(torch.equal(v, ema[n]) for n, v in vae.state_dict().items())


def test_the_discriminator_does_not_move_before_its_start(run: Path) -> None:
    """Nor by weight decay; and nothing of that time is in its moments."""
    forked.fit(configured(run, {**TERM, "start_images": 48}, weight_decay=0.5), 1, stage="autoencoder")
    sections = load_sections(str(run / "config.yaml"), (), TrainingSections)
    begun = Discriminator(AdversarialConfig(**TERM), sections.seed).state_dict()
    found = checkpoint.whole(str(step(run, 6)), "weights")
    assert all(torch.equal(v, found[f"discriminator.{n}"]) for n, v in begun.items())
    for name in ("exp_avg", "exp_avg_sq"):
        moments = checkpoint.whole(str(step(run, 6)), name)
        assert not any(moments[f"discriminator.{n}"].any() for n in begun)


def test_its_first_step_is_adams_first(run: Path) -> None:
    """Which moves every value by the learning rate, whatever its gradient; so does that of a run that goes on there."""
    config = configured(run, {**TERM, "start_images": 32}, schedule="constant", checkpoint_every_images=8)
    forked.fit(config, 1, stage="autoencoder")
    before, after = (checkpoint.whole(str(step(run, n)), "weights")["discriminator.last.weight"] for n in (4, 5))
    assert float((after - before).abs().median()) == pytest.approx(1e-3, rel=1e-3)
    wanted = states(step(run, 6))
    for folder in (step(run, 5), step(run, 6), run / "autoencoder" / "model"):
        shutil.rmtree(folder)
    forked.fit(config, 1, stage="autoencoder")
    found = states(step(run, 6))
    assert all(torch.equal(v, found[state][n]) for state, values in wanted.items() for n, v in values.items())
    assert json.loads((step(run, 6) / "manifest.json").read_text())["run"]["early"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])  # fitted is of stage 1
def test_all_stages_of_zero_give_the_same(stage: int, fitted: Path, tmp_path: Path) -> None:
    run = another(fitted, tmp_path / "run")
    forked.fit(with_all(run, fitted, zero_stage=stage), 2, stage="autoencoder")
    expected = checkpoint.whole(str(step(fitted, 6)), "weights")
    for name, value in checkpoint.whole(str(step(run, 6)), "weights").items():
        if not name.endswith("to_k.bias"):  # a softmax does not see what all keys share: Adam steps along rounding
            torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-5)


def test_what_cannot_go_together_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="spike_sigmas would take the start of the adversarial term for a spike"):
        validate(AutoencoderConfig, {"adversarial": {"start_images": 8}, "spike_sigmas": 6}, "x.yaml")
    config = configured(run, perceptual={"weights": str(run / "no.safetensors")})
    sections = load_sections(str(config), (), TrainingSections)
    with pytest.raises(ConfigError, match="there is no file"):
        stage_state("autoencoder", sections.run, sections)
