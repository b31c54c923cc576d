"""What VAEs can be fitted: factors, channels, several resolutions; and what is measured of their latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latents.resize import resize_crop
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import ConfigError, validate
from tests.latents import world
from tests.train import forked, tiny
from train.encoder_config import AutoencoderConfig
from train.objectives import build

pytestmark = pytest.mark.timeout(900)


def model(blocks: int, channels: int) -> dict[str, Any]:
    return {
        "block_out_channels": [8] * blocks,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 4,
    }


def pictures(run: Path) -> dict[str, np.ndarray]:
    found, dataset = {}, Dataset.open(str(run / "images"))
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        found |= {key: decode_rgb(shard.image_bytes(i)) for i, key in enumerate(shard.keys)}
        shard.close()
    return found


@pytest.mark.parametrize(
    ("blocks", "channels", "resolution"),
    [
        (4, 4, [16, 32]),
        pytest.param(5, 16, [64, 32], marks=pytest.mark.slow),
        pytest.param(6, 32, 32, marks=pytest.mark.slow),
    ],
    ids=["f8", "f16", "f32"],
)
def test_a_few_steps_of_any_kind_open_in_diffusers(blocks: int, channels: int, resolution: Any, run: Path) -> None:
    """With the adversarial term; scaling_factor and shift_factor are those of the latents as diffusers makes them."""
    from diffusers import AutoencoderKL

    data = tiny.configuration(run)
    term = {"channels": 8, "layers": 1}
    more = {"model": model(blocks, channels), "resolution": resolution, "images": 24, "batch_size": 4}
    data["autoencoder"] |= {**more, "adversarial": term, "measure_shift": True, "kl_weight": 1e-3}
    forked.fit(tiny.write_config(run, data), 1, stage="autoencoder")
    folder = run / "autoencoder" / "model"
    vae = AutoencoderKL.from_pretrained(folder).eval()
    side = max(resolution) if isinstance(resolution, list) else resolution
    assert vae.config.sample_size == side
    own = pictures(run)
    ours: Any = build("autoencoder", AutoencoderConfig(**data["autoencoder"]), [Dataset.open(str(run / "images"))], 5)
    fitted = np.stack([resize_crop(own[k], side)[0] for k in ours.keys(np.arange(len(own)))])  # the first in order
    ours.close()
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(fitted).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        assert posterior.mean.shape[1:] == (channels, side // 2 ** (blocks - 1), side // 2 ** (blocks - 1))
        assert vae.decode(posterior.mean).sample.shape == (len(fitted), 3, side, side)
    mean = posterior.mean.double().mean()
    std = (posterior.var.double() + (posterior.mean.double() - mean).square()).mean().sqrt()
    assert vae.config.shift_factor == pytest.approx(float(mean), abs=1e-6)
    assert vae.config.scaling_factor == pytest.approx(1 / float(std), rel=1e-5)
    provenance = json.loads((folder / "carrara.json").read_text())
    assert provenance["shift_factor"] == vae.config.shift_factor


def test_batches_take_turns_at_the_resolutions(run: Path) -> None:
    """Each of one shape, the same for all ranks, of the same pictures as at one resolution, the largest first."""
    images = [Dataset.open(str(run / "images"))]
    config = AutoencoderConfig(**tiny.configuration(run)["autoencoder"] | {"resolution": [16, 32, 8]})
    ours: Any = build("autoencoder", config, images, 3)
    own = pictures(run)
    for step, side in enumerate((32, 16, 8, 32)):
        places = np.concatenate([ours.positions(8 * step, rank, 2, 0, 4) for rank in range(2)])
        parts = [ours.batch(ours.positions(8 * step, rank, 2, 0, 4)) for rank in range(2)]
        found = torch.cat([p["pixels"] for p in parts]).numpy()
        assert np.array_equal(found, np.stack([resize_crop(own[k], side)[0] for k in ours.keys(places)]))
        assert {p["noise"].shape for p in parts} == {(4, 4, side // 2, side // 2)}
    ours.close()
    with pytest.raises(ConfigError, match="resolution is 9, which this model cannot encode: make it a multiple of 2"):
        build("autoencoder", config.model_copy(update={"resolution": (16, 9)}), images, 3)
    with pytest.raises(ConfigError, match="names one resolution twice"):
        validate(AutoencoderConfig, {"resolution": [16, 16]}, "x.yaml")


def test_behind_a_frozen_encoder_the_adversarial_term_moves_the_decoder_alone(run: Path, tmp_path: Path) -> None:
    given = {"start_from": str(world.save_vae(tmp_path / "vae")), "resolution": 16, "frozen_encoder": True}
    term = {"channels": 8, "layers": 1}
    images = [Dataset.open(str(run / "images"))]
    config = AutoencoderConfig(**given, adversarial=term)
    ours: Any = build("autoencoder", config, images, 0)
    ours(ours.batch(np.arange(4)))[0].backward()
    learns = {n.partition(".")[0] for n, p in ours.model.named_parameters() if p.grad is not None}
    assert learns == {"decoder", "post_quant_conv", "discriminator"}
    ours.close()
    with pytest.raises(ConfigError, match="frozen_encoder keeps the latents' scale and shift"):
        validate(AutoencoderConfig, {**given, "measure_shift": True}, "x.yaml")
