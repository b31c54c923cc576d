"""Where everything of a run lies, and how shards and samples are named (img2dataset's names)."""

from __future__ import annotations

import dataclasses
import math

from shards.storage import join

SHARD_DIGITS = 5
MANIFEST = "dataset.json"  # of a finished dataset


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """The folders of one run; `run` is a path or an fsspec URL."""

    run: str

    @property
    def images(self) -> str:
        """Image shards that are trained on."""
        return join(self.run, "images")

    @property
    def heldout(self) -> str:
        """Image shards that are never trained on: prompts and real images for the evaluation."""
        return join(self.run, "heldout")

    @property
    def autoencoder(self) -> str:
        """Root of the autoencoder stage: checkpoints/, model/, log.jsonl."""
        return join(self.run, "autoencoder")

    @property
    def clip(self) -> str:
        """Root of the clip stage: checkpoints/, model/, log.jsonl."""
        return join(self.run, "clip")

    @property
    def latents(self) -> str:
        """Latent shards."""
        return join(self.run, "latents")

    @property
    def prior(self) -> str:
        """A run of its own, images/ and latents/: the images of train.prior."""
        return join(self.run, "prior")

    @property
    def checkpoints(self) -> str:
        """Checkpoints of the train stage: step-00001000/, latest."""
        return join(self.run, "checkpoints")

    @property
    def train(self) -> str:
        """Logs of the train stage: log.jsonl, tensorboard/."""
        return join(self.run, "train")

    @property
    def model(self) -> str:
        """The exported diffusers pipeline."""
        return join(self.run, "model")

    @property
    def eval(self) -> str:
        """Generated shards, features and metrics by checkpoint and grid cell."""
        return join(self.run, "eval")

    @property
    def reports(self) -> str:
        """HTML reports and the history."""
        return join(self.run, "reports")

    @property
    def status(self) -> str:
        """Progress of every stage, read by `carrara status`."""
        return join(self.run, "status")


def shard_name(index: int) -> str:
    """`7` -> `00007`."""
    return f"{index:0{SHARD_DIGITS}d}"


def sample_key(shard_index: int, row: int, samples_per_shard: int) -> str:
    """The key of a sample, as img2dataset makes it.

    The row takes ceil(log10(samples_per_shard)) digits, the shard number stands before it, and the whole
    is zero-padded to that many digits plus five (img2dataset, downloader.py: compute_key).
    """
    if not 0 <= row < samples_per_shard:
        raise ValueError(f"row {row} is not within a shard of {samples_per_shard} samples")
    row_digits = math.ceil(math.log10(samples_per_shard)) if samples_per_shard > 1 else 0
    return f"{10**row_digits * shard_index + row:0{row_digits + SHARD_DIGITS}d}"
