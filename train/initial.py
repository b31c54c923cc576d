"""Where a fit begins: weights that already do something sensible, so that small budgets are not spent on getting there.

diffusers builds its models with torch's default weights. A VAE then needs thousands of images to learn
to copy flat colours through its GroupNorms, and a UNet's residual branches begin as noise.
"""

from __future__ import annotations

import torch
from torch import nn

# Carry channels: (+colour, -colour, +1, -1) for each of the three colours.
_CARRY = 12


@torch.no_grad()
def thumbnail(vae: nn.Module, logvar: float = -5.0) -> None:
    """Make a fresh diffusers AutoencoderKL the map "shrink by averaging, enlarge by repetition", in place.

    The first three latent channels begin as a small copy of the image, the others as torch made them, and
    the posterior is narrow (log variance about `logvar`). The colours travel in twelve carry channels that
    every layer begins by copying: residual branches begin at zero (Goyal et al. 2017, section 5.1),
    downsamplers as averages, upsamplers and shortcuts as the identity. Through the last GroupNorm and SiLU
    they survive, up to a scale near one, because each lies beside its negative, SiLU(a) - SiLU(-a) = a, and beside
    +1 and -1, which keep a group's scale from being the image's own.

    Raises ValueError where the model has too few channels for that, or a group is too small to hold +1 or -1.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

    channels = int(vae.config.latent_channels)
    if min(vae.config.block_out_channels) < _CARRY or channels < 3:
        raise ValueError(
            f"initialisation thumbnail needs at least {_CARRY} channels in each of block_out_channels and 3 "
            f"latent_channels; it is {list(vae.config.block_out_channels)} and {channels}"
        )
    groups = int(vae.config.norm_num_groups)
    if min(vae.config.block_out_channels) < 3 * groups:
        raise ValueError(
            f"initialisation thumbnail needs at least 3 channels in each group of a norm; block_out_channels are "
            f"{list(vae.config.block_out_channels)} and norm_num_groups is {groups}"
        )
    quiet_residuals(vae)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is not None:
            _copy(module.conv_shortcut)
        elif isinstance(module, Attention):
            module.to_out[0].weight.zero_()
            module.to_out[0].bias.zero_()
        elif isinstance(module, Downsample2D):
            _average(module.conv)
        elif isinstance(module, Upsample2D):
            _copy(module.conv)
    for half in (vae.encoder, vae.decoder):
        first, last = half.conv_in, half.conv_out
        first.weight[:_CARRY], first.bias[:_CARRY] = 0.0, 0.0
        last.weight[:3], last.bias[:3] = 0.0, 0.0
        for colour in range(3):
            plus, minus, one, minus_one = range(4 * colour, 4 * colour + 4)
            first.weight[plus, colour, 1, 1], first.weight[minus, colour, 1, 1] = 1.0, -1.0
            first.bias[one], first.bias[minus_one] = 1.0, -1.0
            last.weight[colour, plus, 1, 1], last.weight[colour, minus, 1, 1] = 1.0, -1.0
    vae.encoder.conv_out.weight[channels:] *= 0.1
    vae.encoder.conv_out.bias[channels:] = logvar
    for mixing in (vae.quant_conv, vae.post_quant_conv):
        if mixing is not None:
            mixing.weight.zero_()
            mixing.weight[:, :, 0, 0].fill_diagonal_(1.0)
            mixing.bias.zero_()


@torch.no_grad()
def quiet_residuals(model: nn.Module) -> None:
    """Let every residual block of a diffusers model begin as its shortcut: its last convolution is zero."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()


@torch.no_grad()
def quiet_unet(unet: nn.Module) -> None:
    """Let a fresh UNet begin by predicting zero, with quiet residual blocks.

    As in Ho et al. 2020 (their code) and Dhariwal & Nichol 2021, whose zero modules diffusers leaves out.
    """
    quiet_residuals(unet)
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()


@torch.no_grad()
def spread_words(clip: nn.Module, std: float = 1.0, position_std: float = 0.5) -> None:
    """Let a fresh open_clip model begin with words, and places in a caption, that are far apart.

    Token embeddings get standard deviation `std` in place of 0.02. Adam moves each value by about the learning rate a
    step, whatever its size, and words of one kind (circle and square) move alike until the model tells them apart. From
    0.02 their common way soon outweighs what distinguishes them, and whoever reads the token embeddings, a UNet say,
    sees almost one word. From 0.5 they stay apart; the blocks' LayerNorms make the scale itself of no consequence.

    Positional embeddings become sines and cosines (Vaswani et al. 2017, section 3.5, here with base 100, since captions
    are short) of root mean square `position_std`: beside such words open_clip's 0.01 could not be seen, and the tower
    would not know which of two colours stands before which of two shapes.
    """
    embedding, positions = clip.token_embedding.weight, clip.positional_embedding
    embedding.mul_(std / 0.02)  # open_clip draws with 0.02 (CLIP.init_parameters)
    length, width = positions.shape
    angle = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, width, 2) / width)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
    positions.copy_(waves * position_std * 2**0.5)  # a sine's own is sqrt(1/2)


def _copy(conv: nn.Module) -> None:
    """The first carry channels pass unchanged."""
    conv.weight[:_CARRY], conv.bias[:_CARRY] = 0.0, 0.0
    middle = conv.weight.shape[2] // 2
    for c in range(_CARRY):
        conv.weight[c, c, middle, middle] = 1.0


def _average(conv: nn.Module) -> None:
    """The first carry channels are averaged over 2x2 (diffusers pads below and to the right)."""
    conv.weight[:_CARRY], conv.bias[:_CARRY] = 0.0, 0.0
    for c in range(_CARRY):
        conv.weight[c, c, :2, :2] = 0.25
