"""What the loop needs of what it fits: the interface of an objective, and how its model is built.

An objective is a module around its `model` with two methods: `batch(positions)` makes what one micro-batch
needs, on the CPU, ahead of the loop; `forward(batch)` gives the loss and, detached, the figures named in
`figures`. All randomness comes from the samples' positions.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from shards.settings import ConfigError
from train.data import Batch, batch_slots
from train.image_samples import ImageSamples
from train.order import derive_key
from train.placement import Placement


class Objective(nn.Module):
    """What the loop needs of an objective. model_config: what rebuilds the model, as stored in checkpoints."""

    figures: tuple[str, ...] = ()
    bins = 0  # where above 0, forward also gives loss by timestep: a sum and a share of the batch for each bin
    saves_frozen = True  # whether checkpoints hold the frozen weights too
    beside = ""  # begins the names of what the training alone needs: it has no averages, and is not decayed
    beside_from = 0  # images before which that learns nothing, and its optimizer does not step
    facts: dict[str, Any] = {}  # noqa: RUF012 (what a manifest says of where the samples come from; set, never changed)

    def __init__(self, model: nn.Module, model_config: dict[str, Any], placement: Placement) -> None:
        super().__init__()
        self.model, self.model_config, self.placement = model, model_config, placement

    def positions(self, images: int, rank: int, world: int, micro_step: int, micro: int) -> np.ndarray:
        """The places in the run, int64 [B], of one rank's micro-batch of the global batch that begins at `images`.

        micro: samples of a micro-batch; where batches go by area, of one of the smallest images.
        """
        accumulation = self.placement.batch_size(images) // (world * micro)
        return images + batch_slots(self.placement.samples(images), rank, world, micro_step, accumulation)

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read what `batch` of these positions will need; returns at once."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what reads ahead."""

    def batch(self, positions: np.ndarray) -> Batch:
        """The tensors of the samples at `positions` (int64 [B]), on the CPU."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (scalar) and figures (float32 [len(figures)], detached) of a batch on the model's device."""
        raise NotImplementedError

    def probe(self, batch: Batch) -> torch.Tensor:
        """A scalar with the model's whole graph behind it, for counting FLOPs; no collectives."""
        return self.forward(batch)[0]

    def keys(self, positions: np.ndarray) -> list[str]:
        """The keys of the samples at `positions`, for a person who wants to look at them."""
        raise NotImplementedError

    def networks(self) -> list[nn.Module]:
        """What is called by itself within `forward`, each to be compiled."""
        return [self.model]

    def checkpoint_activations(self) -> None:
        """Keep no activations inside blocks, and compute them again in the backward pass."""
        self.model.enable_gradient_checkpointing()


class ImageObjective(Objective):
    """An objective on images, and their captions, as they lie in image shards."""

    image_samples: ImageSamples

    def expect(self, positions: np.ndarray) -> None:
        """See Objective."""
        self.image_samples.expect(positions)

    def close(self) -> None:
        """See Objective."""
        self.image_samples.close()

    def keys(self, positions: np.ndarray) -> list[str]:
        """See Objective."""
        return self.image_samples.keys(positions)


def construct(kind: Any, arguments: dict[str, Any], field: str, seed: int) -> Any:
    """`kind(**arguments)` with weights that depend on the seed alone; raises ConfigError with one sentence."""
    known = [p for p in inspect.signature(kind.__init__).parameters if p != "self"]
    refuse_unknown(arguments, known, field, kind.__name__)
    # A fork, so that a caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key("init", field, seed) >> 1)
        try:
            return kind(**arguments)
        except Exception as e:
            raise ConfigError(f"{field}: {kind.__name__} cannot be built from this: {_line(e)}") from None


def refuse_unknown(given: dict[str, Any], known: list[str], field: str, model: str) -> None:
    """Raises ConfigError where `given` has a name that is none of `known`, with the nearest one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known)}"
            raise ConfigError(f"{field}: {model} has no argument '{name}'; {hint}")


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers model's config without the library's own private entries."""
    return {k: v for k, v in dict(model.config).items() if not k.startswith("_")}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
