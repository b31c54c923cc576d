"""The loss on pictures that are never trained on: the same pictures, noise and timesteps at every validation.

Its samples' timesteps are spread evenly, so that a few hundred pictures give a number that moves with the model and
not with the draw. Two validations of the same weights agree on any number of ranks up to the rounding of a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latents.encoders import load_text_of, load_vae, other_encoder, require_digest
from latents.pictures import resize_crop
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from train.config import ValidationConfig
from train.data import Batch, Latents
from train.denoising import Diffusion
from train.order import permute
from train.ranks import Ranks

# Validation's places in the order of samples, whose noise no training sample ever has.
FIRST = 1 << 62


class Validator:
    """`measure` gives the mean squared error of the UNet's prediction. Batches are made once and kept in memory."""

    def __init__(self, config: ValidationConfig, objective: Diffusion, run: RunPaths, ranks: Ranks, micro: int) -> None:
        self.every_images, self.patience = config.every_images, config.patience
        source = (
            _stored(config.latents, objective, micro)
            if config.latents
            else _held_out(config, objective, run, ranks.device.type)
        )
        count = min(config.images, source.count)
        chunks = [np.arange(i, min(i + micro, count)) for i in range(0, count, micro)]
        rounds = -(-len(chunks) // ranks.world)
        self._batches: list[tuple[int, Batch]] = []
        for r in range(rounds):
            mine = r * ranks.world + ranks.rank
            # Under ZeRO 3 all ranks must run the model equally often: who has no chunk repeats the first, uncounted.
            rows = chunks[mine] if mine < len(chunks) else chunks[0]
            weight = len(rows) if mine < len(chunks) else 0
            steps = objective.process.steps
            t = (permute(rows, count, 0) * 2 + 1) * steps // (2 * count)
            batch = objective.latent_batch(source.latents, rows, t, FIRST)
            batch |= objective.text_batch(source.latents, rows, np.zeros(len(rows), bool))
            self._batches.append((weight, batch))

    @torch.no_grad()
    def measure(self, engine: Any, ranks: Ranks) -> float:
        """The mean over the whole set, on all ranks. Collective."""
        engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for weight, batch in self._batches:
            _, details = engine({k: v.to(ranks.device, non_blocking=True) for k, v in batch.items()})
            sums += torch.stack([details[0].double() * weight, torch.tensor(float(weight)).to(details.device)])
        engine.train()
        total, count = ranks.mean(sums).tolist()
        return float(total / count)


class Patience:
    """When to stop early: `limit` validations without a new lowest loss; None is never."""

    def __init__(self, limit: int | None, state: dict[str, Any] | None = None) -> None:
        self.limit = limit
        state = state or {}
        self.best: float | None = state.get("best")
        self.since: int = state.get("since", 0)

    def over(self, loss: float) -> bool:
        """Take a validation's loss in; whether training should end."""
        if self.best is None or loss < self.best:
            self.best, self.since = loss, 0
        else:
            self.since += 1
        return self.limit is not None and self.since >= self.limit

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "since": self.since}


class HeldOut:
    """Held-out pictures in memory, with the same methods as data.Latents. Arrays are indexed by place."""

    def __init__(self, arrays: dict[str, np.ndarray | None], empty: dict[str, np.ndarray | None]) -> None:
        self._arrays = arrays
        self.empty_tokens, self.empty_embedding = empty["tokens"], empty["embedding"]
        self.empty_pooled: np.ndarray | None = None

    def moments(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log-std, float32 [B,C,h,w], unscaled."""
        mean, logstd = self._arrays["mean"], self._arrays["logstd"]
        assert mean is not None
        return mean[positions].copy(), None if logstd is None else logstd[positions]

    def tokens(self, positions: np.ndarray) -> np.ndarray:
        """Token ids, int64 [B,context]."""
        tokens = self._arrays["tokens"]
        assert tokens is not None
        return tokens[positions].copy()

    def embeddings(self, positions: np.ndarray) -> np.ndarray:
        """Token embeddings, float32 [B,context,width]."""
        embeddings = self._arrays["embeddings"]
        assert embeddings is not None
        return embeddings[positions].copy()


class _Source:
    def __init__(self, latents: Any, count: int) -> None:
        self.latents, self.count = latents, count


def _stored(root: str, objective: Diffusion, micro: int) -> _Source:
    """Latent shards of pictures that nobody trains on, of the same encoders as the training's."""
    dataset = Dataset.open(root)
    if different := other_encoder(objective.latents.dataset.manifest, dataset.manifest):
        raise StageError(
            f"train.validation.latents: {root} was made with another {different} than the latents that are trained on; "
            "make it with the same encoders"
        )
    return _Source(Latents([dataset], 0, 1, micro, resolutions=objective.config.resolutions[:1]), len(dataset))


def _held_out(config: ValidationConfig, objective: Diffusion, run: RunPaths, device: str) -> _Source:
    """The run's held-out pictures, encoded here with the encoders that the latents were made with."""
    if objective.sized:
        raise ConfigError(
            "train.validation: a UNet that is told sizes and pooled text is validated on stored latents; "
            "name a folder of them with train.validation.latents"
        )
    facts = objective.latents.dataset.manifest
    try:
        dataset = Dataset.open(run.heldout)
    except StageError:
        raise ConfigError(
            f"train.validation: {run.heldout} holds no pictures; give ingest.heldout_table, or name a folder of "
            "latents with train.validation.latents"
        ) from None
    vae = load_vae(facts["vae"]["ref"], device)
    require_digest("the VAE", vae.digest, facts["vae"]["digest"], facts["vae"]["ref"])
    text = load_text_of(facts["text"])
    pixels, captions = _pictures(dataset, config.images, objective.latents.resolution)
    encoded = [vae.encode(pixels[i : i + 16]) for i in range(0, len(pixels), 16)]
    tokens = text.tokenize(captions)
    arrays: dict[str, np.ndarray | None] = {
        "mean": torch.cat([m for m, _ in encoded]).numpy(),
        "logstd": torch.cat([s for _, s in encoded]).numpy() if objective.latents.has_spread else None,
        "tokens": tokens.numpy(),
        "embeddings": None,
    }
    if objective.latents.has_embeddings:
        arrays["embeddings"] = torch.cat([text.encode(tokens[i : i + 64]) for i in range(0, len(tokens), 64)]).numpy()
    empty = {"tokens": objective.latents.empty_tokens, "embedding": objective.latents.empty_embedding}
    return _Source(HeldOut(arrays, empty), len(pixels))


def _pictures(dataset: Dataset, count: int, resolution: int) -> tuple[np.ndarray, list[str]]:
    pixels: list[np.ndarray] = []
    captions: list[str] = []
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        for row in range(len(shard)):
            if len(pixels) == count:
                break
            pixels.append(resize_crop(decode_rgb(shard.image_bytes(row)), resolution)[0])
            captions.append(shard.captions[row])
        shard.close()
    if not pixels:
        raise StageError(f"{dataset.root}: there is not one held-out picture to validate on")
    return np.stack(pixels), captions
