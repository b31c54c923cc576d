"""A CLIP as a network: unit-length embeddings of images and of their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.networks.weights import Found, Rows, exact

if TYPE_CHECKING:
    import torch


class Clip:
    """An open_clip CLIP's embeddings, of unit length, of images and of their captions; whether a caption was cut."""

    def __init__(self, found: Found, device: str) -> None:
        from latents.encoders import load_text

        self.clip = load_text(found.ref, "last", device)
        self.device = device
        self._transform: Any = None

    def prepare(self, pixels: np.ndarray, rows: Rows = ()) -> tuple[torch.Tensor, list[str]]:
        """The images as the CLIP's own configuration says, and their captions."""
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from PIL import Image

        if self._transform is None:
            self._transform = image_transform_v2(PreprocessCfg(**self.clip.model.visual.preprocess_cfg), is_train=False)
        stacked = torch.stack([self._transform(Image.fromarray(p)) for p in pixels])
        return stacked, [str(r["caption"] or "") for r in rows]

    def __call__(self, prepared: tuple[torch.Tensor, list[str]]) -> dict[str, np.ndarray]:
        import torch

        images, captions = prepared
        with torch.inference_mode(), exact():
            x = self.clip.model.encode_image(images.to(self.device)).float()
            found = {"images": torch.nn.functional.normalize(x, dim=-1).cpu().numpy()}
        if captions:
            found["captions"] = self.clip.encode_captions(captions, len(captions)).numpy()
            found["truncated"] = np.array(truncated(self.clip, captions), np.float32)[:, None]
        return found


def truncated(clip: Any, captions: Sequence[str]) -> list[bool]:
    """Which captions have more tokens than the CLIP reads: those that fill a context one token longer to its end."""
    longer = clip.tokenizer([*captions, ""], context_length=clip.context_length + 1)
    padding = int(longer[-1, -1])
    return [bool(row[-1] != padding) for row in longer[:-1]]
