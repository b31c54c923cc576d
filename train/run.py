"""Where a run stands, and what became of its steps on the way from the device to the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from shards.settings import StageError
from train.engine import Outcome
from train.fit_config import FitConfig, ema_name
from train.optimizer import ema_decay, learning_rate
from train.posthoc import decay


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether the step that ends at `images` passed a multiple of `every`."""
    return images // every > (images - batch) // every


@dataclasses.dataclass
class Run:
    """What a checkpoint keeps beside tensors. step, images: taken or vetoed; applied: steps that were taken.

    early: those of them in which what is beside the model waited.

    in_a_row, skipped: vetoed steps, the last ones and all; last_veto: where the last of them ended, in images.
    rollbacks: how often the weights went back. finished: ended before its images were reached.
    """

    step: int = 0
    images: int = 0
    applied: int = 0
    early: int = 0
    in_a_row: int = 0
    skipped: int = 0
    last_veto: int = 0
    rollbacks: int = 0
    finished: bool = False

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Run:
        """Where the run of a checkpoint stands, of either format."""
        if "run" in manifest:
            known = {f.name for f in dataclasses.fields(cls)}
            return cls(**{k: v for k, v in manifest["run"].items() if k in known})
        guard = manifest.get("guard") or {}
        counts = {k: guard.get(k, 0) for k in ("in_a_row", "skipped", "rollbacks")}
        at = {"step": manifest["step"], "images": manifest["images"], "applied": manifest["optimizer_steps"]}
        return cls(**at, **counts, finished=bool(manifest.get("finished")))

    def crossed(self, every: int, config: FitConfig) -> bool:
        """Whether the last step passed a multiple of `every` images."""
        return crossed(self.images, config.batch_size, every)

    def count(self, result: StepResult, beside_from: int) -> None:
        """Take in what became of a step. An overflow of fp16 is neither taken nor wrong."""
        self.applied += result.applied
        self.early += result.applied and result.images <= beside_from
        if result.applied:
            self.in_a_row = 0
        elif not result.overflow:
            self.in_a_row, self.skipped, self.last_veto = self.in_a_row + 1, self.skipped + 1, result.images

    def exhausted(self, max_skips: int) -> bool:
        """Whether the weights should go back. At the step after the last veto, whenever that one became known, so that
        a run that was stopped between the two goes on as if it had not been."""
        return self.in_a_row >= max_skips and self.last_veto < self.images

    def roll_back(
        self, stage: str, to: tuple[str, dict[str, Any]] | None, most: int, events: str
    ) -> tuple[str, dict[str, Any]]:
        """The weights go back to a checkpoint, returned. Raises StageError where that is no use any more."""
        if to is None or self.rollbacks >= most:
            why = f"it went back {self.rollbacks} times before" if to else "there is no checkpoint to go back to"
            raise StageError(
                f"{stage}: {self.in_a_row} steps in a row were skipped up to {self.last_veto} images, and {why}; lower "
                f"learning_rate, or look at the samples in {events}"
            )
        there = Run.of(to[1])
        self.in_a_row, self.rollbacks, self.applied, self.early = 0, self.rollbacks + 1, there.applied, there.early
        return to

    def rates(self, config: FitConfig, beside_from: int) -> tuple[float, dict[str, float], bool]:
        """The learning rate, the averages' factors, and whether what is beside the model waits, of the step that begins
        here."""
        rate = learning_rate(
            self.images,
            config.batch_size,
            config.images,
            config.learning_rate,
            config.warmup_images,
            config.schedule,
            config.final_fraction,
            config.cooldown,
        )
        after = self.images + config.batch_size
        decays = {ema_name(): ema_decay(after, config.batch_size, config.ema_halflife_images, config.ema_rampup)}
        decays |= {ema_name(std): decay(after, config.batch_size, std) for std in config.ema_stds}
        return rate, decays, after <= beside_from


@dataclasses.dataclass(frozen=True)
class StepResult:
    """An outcome on the host: of the step that ended at `images`. rate: its learning rate."""

    step: int
    images: int
    rate: float
    applied: bool
    overflow: bool
    norm: float
    figures: list[float]
    stop: bool
    unsaved: bool


class Late:
    """Outcomes on their way to the host. `stop`: a rank was asked to end, which all hear of at the same step."""

    def __init__(self, device: torch.device) -> None:
        self._waiting: list[tuple[tuple[int, int, float], torch.Tensor, Any]] = []
        self._cuda = device.type == "cuda"
        self._spare: list[torch.Tensor] = []
        self.stop = False

    def read(self, outcome: Outcome, run: Run, rate: float, everything: bool) -> Iterator[StepResult]:
        """Take the newest step's outcome; yields the one before, and where `everything` is asked, itself.

        flags of the outcome: whether to stop, whether a checkpoint could not be written.
        """
        known = torch.stack([outcome.norm, outcome.applied.double(), outcome.overflow.double()])
        row = torch.cat([outcome.figures, outcome.flags, known])
        event = None
        if self._cuda:
            host = self._spare.pop() if self._spare else torch.empty(len(row), dtype=row.dtype, pin_memory=True)
            row, event = host.copy_(row, non_blocking=True), torch.cuda.Event()
            event.record()
        self._waiting.append(((run.step, run.images, rate), row, event))
        while len(self._waiting) > (0 if everything or self.stop else 1):
            at, row, event = self._waiting.pop(0)
            if event is not None:
                event.synchronize()
                self._spare.append(row)
            *figures, stop, unsaved, norm, applied, overflow = row.tolist()
            self.stop = self.stop or stop > 0
            yield StepResult(*at, bool(applied), bool(overflow), norm, figures, stop > 0, unsaved > 0)

    def forget(self) -> None:
        """Drop what was taken from weights that are gone."""
        self._waiting.clear()
