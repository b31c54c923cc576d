"""Which objective a stage has: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Sequence

from shards.dataset import Dataset
from train.autoencoder import Autoencoder
from train.clip import Clip
from train.config import TrainConfig
from train.denoising import Diffusion
from train.encoder_config import AutoencoderConfig, ClipConfig
from train.objective import Objective
from train.segments import History


def build(
    stage: str,
    config: AutoencoderConfig | ClipConfig | TrainConfig,
    datasets: Sequence[Dataset],
    seed: int,
    history: History | None = None,
) -> Objective:
    """The objective of a stage; raises ConfigError where the model cannot be built as configured.

    datasets: the one that the stage fits, or for `train` those of its sources, in their order. history: what the run
    took its samples from; None for a run that begins with these.
    """
    if isinstance(config, AutoencoderConfig):
        return Autoencoder(config, datasets[0], seed, history)
    if isinstance(config, ClipConfig):
        return Clip(config, datasets[0], seed, history)
    return Diffusion(config, datasets, seed, history)
