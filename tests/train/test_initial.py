"""A thumbnail VAE really shrinks and enlarges pictures before its first step; a quiet UNet predicts zero."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from train.initial import quiet_unet, spread_words, thumbnail


def vae(channels=(16, 32), latent_channels=4, groups=8) -> AutoencoderKL:
    torch.manual_seed(0)
    k = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * k,
        up_block_types=("UpDecoderBlock2D",) * k,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=groups,
    ).eval()


def blocks(side: int, block: int) -> torch.Tensor:
    """Pictures that are constant over blocks: a thumbnail keeps all there is in them."""
    small = torch.rand(4, 3, side // block, side // block, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(small, scale_factor=block, mode="nearest")


@pytest.mark.parametrize(("channels", "latent_channels"), [((16, 32), 4), ((16, 32, 48), 8)])
def test_the_latent_begins_as_a_thumbnail_up_to_a_scale_and_the_picture_comes_back(channels, latent_channels):
    model = vae(channels, latent_channels, 4)
    thumbnail(model)
    block = 2 ** (len(channels) - 1)
    x = blocks(32, block)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.mean).sample
    small = torch.nn.functional.avg_pool2d(x, block)
    for latent, colour in zip(posterior.mean[:, :3].flatten(2).unbind(1), small.flatten(2).unbind(1), strict=True):
        for a, b in zip(latent, colour, strict=True):
            assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9999
    assert posterior.logvar.mean().item() == pytest.approx(-5, abs=0.5)
    # One number for each picture and colour takes the output back to the input, which torch's own beginning has not.
    with torch.no_grad():
        plain = vae(channels, latent_channels, 4)
        before = plain.decode(plain.encode(x).latent_dist.mean).sample

    def left_over(y: torch.Tensor) -> float:
        scale = (x * y).sum(dim=(2, 3), keepdim=True) / (y * y).sum(dim=(2, 3), keepdim=True)
        return float((scale * y - x).square().mean())

    assert left_over(y) < 1e-6
    assert left_over(before) > 0.1
    assert 0.5 < float(y.std() / x.std()) < 2.0


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="at least 12 channels"):
        thumbnail(vae((8, 16)))
    with pytest.raises(ValueError, match="at least 3 channels in each group"):
        thumbnail(vae((16, 32)))


def test_a_quiet_unet_predicts_zero_and_learns():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    quiet_unet(unet)
    y = unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)).sample
    assert torch.equal(y, torch.zeros_like(y))
    (y - 1).square().mean().backward()
    assert unet.conv_out.weight.grad.abs().max() > 0


def test_spread_words_moves_nothing_but_words_and_places() -> None:
    import open_clip

    from tests.train import tiny

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return open_clip.CLIP(**tiny.CLIP)

    plain, spread = fresh(), fresh()
    spread_words(spread, std=0.5)
    words = plain.token_embedding.weight
    assert float(words.std()) == pytest.approx(0.02, rel=0.01), "what open_clip draws, on which the factor rests"
    assert float(spread.token_embedding.weight.std()) == pytest.approx(0.5, rel=0.01)
    assert torch.allclose(spread.token_embedding.weight, words * 25)
    others = {n for n, p in spread.named_parameters() if not torch.equal(p, dict(plain.named_parameters())[n])}
    assert others == {"token_embedding.weight", "positional_embedding"}
    places = spread.positional_embedding.detach()
    assert float(places.square().mean().sqrt()) == pytest.approx(0.5)
    # By the formula, a place at a time.
    width = places.shape[1]
    for p in range(len(places)):
        angles = [p / 100 ** (2 * i / width) for i in range(width // 2)]
        wave = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert places[p].tolist() == pytest.approx([0.5 * math.sqrt(2) * w for w in wave], abs=1e-6)
