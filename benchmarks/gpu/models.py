"""Stable Diffusion's networks, toys in their place where there is no GPU, and an objective on random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SD2 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280, 1280],
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TOY = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_H_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}


def objective_of(
    unet_config: dict[str, Any], side: int, tower: nn.Module | None = None, seed: int = 0, device: str | None = None
) -> Any:
    """A denoising objective on random numbers, the same at every use. tower: encodes tokens within the step."""
    from diffusers import UNet2DConditionModel

    from train.objective import Objective

    class Synthetic(Objective):
        figures = ("mse",)

        def __init__(self) -> None:
            torch.manual_seed(seed)
            with torch.device(device or DEVICE):
                unet = UNet2DConditionModel(**unet_config)
            super().__init__(unet, unet_config, None)
            self.tower = [tower]  # in a list, so that it is no part of what is trained
            self.channels_last = False
            self.sized = unet_config.get("addition_embed_type") == "text_time"
            self.register_buffer("levels", torch.linspace(0.02, 0.98, 1000), persistent=False)

        def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
            n, width = len(positions), unet_config["cross_attention_dim"]
            g = torch.Generator().manual_seed(int(positions[0]) % 8)
            found = {
                "x0": torch.randn(n, 4, side, side, generator=g),
                "noise": torch.randn(n, 4, side, side, generator=g),
                "t": torch.randint(0, 1000, (n,), generator=g),
                "times": torch.ones(n),
            }
            if tower is None:
                found["text"] = torch.randn(n, 77, width, generator=g)
            else:
                found["tokens"] = torch.randint(1, 49000, (n, 77), generator=g)
            if self.sized:
                found |= {"pooled": torch.randn(n, 1280, generator=g), "sizes": torch.full((n, 6), 1024.0)}
            return found

        def keys(self, positions: np.ndarray) -> list[str]:
            return [str(p) for p in positions]

        def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            level = self.levels[batch["t"]].reshape(-1, 1, 1, 1)
            xt = (1 - level) * batch["x0"] + level * batch["noise"]
            if self.channels_last:
                xt = xt.contiguous(memory_format=torch.channels_last)
            if self.tower[0] is None:
                text = batch["text"]
            else:
                with torch.no_grad():
                    text = encode(self.tower[0], batch["tokens"])
            added_cond = {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]} if self.sized else None
            output = self.model(xt, batch["t"], text, added_cond_kwargs=added_cond, return_dict=False)[0]
            loss = (output.float() - batch["noise"]).square().mean() * batch["times"][0]
            return loss, loss.detach()[None]

    return Synthetic()


def encode(tower: Any, tokens: torch.Tensor) -> torch.Tensor:
    """open_clip's text tower up to its last block: tokens int64 [B,77] -> [B,77,width]."""
    x = tower.token_embedding(tokens) + tower.positional_embedding
    return tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))


def clip_tower() -> Any:
    """The text half of ViT-H/14, random weights, bf16 where that is fast."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
    text = CLIP_H_TEXT if CUDA else {**CLIP_H_TEXT, "width": 16, "heads": 2, "layers": 2}
    with torch.device(DEVICE):
        clip = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)
    return clip.to(torch.bfloat16) if CUDA else clip
