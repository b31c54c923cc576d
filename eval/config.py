"""What a user sets for the evaluation."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shards.settings import Strict

# The model's own weights, its EMA, a further EMA (train.ema_stds), or one of any length put together from those.
Weights = Annotated[str, Field(pattern=r"^(raw|ema|ema_0\.\d{3}|posthoc:0?\.\d+)$")]
Sampler = Literal["ddpm", "ddim", "pndm", "dpm-solver++", "unipc", "euler", "euler-a", "heun"]


class WatchConfig(Strict):
    """When `carrara watch` evaluates, and when it raises an alarm. Nothing here changes a number."""

    every_s: float = Field(default=30.0, ge=0.1, le=86_400, description="how often new checkpoints are looked for")
    cron: str | None = Field(default=None, description="evaluate at these moments alone, e.g. '0 */6 * * *'")
    backfill: bool = Field(default=False, description="also evaluate older checkpoints that have no result")
    alarm_sigmas: float = Field(
        default=3.0, gt=0, le=100, description="standard errors by which a checkpoint must be worse than the best"
    )
    alarm_command: list[str] | None = Field(
        default=None, min_length=1, description="program and arguments that an alarm calls; the alarm is added"
    )

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, expression: str | None) -> str | None:
        if expression is not None:
            from cronsim import CronSim, CronSimError

            try:
                CronSim(expression, datetime.datetime(2000, 1, 1))
            except CronSimError as e:
                raise ValueError(f"it must be a cron expression of five fields, such as '0 */6 * * *' ({e})") from None
        return expression


class GridConfig(Strict):
    """The cells of `carrara grid`: every sampler with every number of steps, guidance and kind of weights."""

    samplers: list[Sampler] = Field(default=["ddim"], min_length=1)
    steps: list[Annotated[int, Field(ge=1, le=1000)]] = Field(default=[25], min_length=1)
    guidance_scales: list[Annotated[float, Field(ge=0.0, le=100.0)]] = Field(default=[3.0], min_length=1)
    weights: list[Weights] = Field(
        default=["ema"], min_length=1, description="ema, raw, one of train.ema_stds (ema_0.050), or posthoc:0.08"
    )
    first_percent: int = Field(
        default=25, ge=1, le=100, description="share of a cell that is drawn before it may be given up; 100: never"
    )

    @field_validator("samplers", "steps", "guidance_scales", "weights")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError("a value stands there twice; each cell is drawn once")
        return values


class EvalConfig(Strict):
    """Settings of the evaluation of one checkpoint with one sampler."""

    checkpoint: str = Field(default="latest", description="name of a checkpoint folder, or latest")
    weights: Weights = Field(default="ema", description="ema, raw, one of train.ema_stds (ema_0.050), or posthoc:0.08")
    prompts: int = Field(default=256, ge=1, description="number of captions, distinct ones first")
    prompt_file: str | None = Field(
        default=None, description="text file, one prompt a line, in place of held-out captions"
    )
    replicates: int = Field(default=1, ge=1, le=1000, description="pictures of each prompt, with different noise")
    sampler: Sampler = "ddim"
    steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = Field(
        default=3.0, ge=0.0, le=100.0, description="classifier-free guidance; up to 1 is none"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        default=None, description="where the sampler's steps lie; None keeps what the exported scheduler says"
    )
    batch_size: int = Field(default=16, ge=1, le=4096, description="pictures drawn at once; part of the shards' bytes")
    shard_size: int = Field(default=128, ge=1, le=100_000, description="pictures a shard")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(default=1, ge=1, le=256, description="CPU threads of one worker; part of the shards' bytes")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    features: str | None = Field(
        default=None, description="CLIP for features and scores (folder, MODEL:TAG, MODEL:/file); None is the run's own"
    )
    inception: str | None = Field(
        default=None, description="torch-fidelity's Inception weights (a file, or download): FID, KID, Inception score"
    )
    dinov2: str | None = Field(default=None, description="folder of a DINOv2 (config.json, model.safetensors)")
    reference: str | None = Field(
        default=None, description="finished image shards that those distances are to; None is the held-out set"
    )
    memorisation: bool = Field(default=False, description="search the training set for each picture's nearest one")
    faithfulness: Literal["scenes"] | None = Field(
        default=None, description="judge of pictures for a corpus that has one: scenes is the demo's"
    )
    retrieval_candidates: int = Field(default=100, ge=2, le=10_000)
    jackknife_groups: int = Field(default=20, ge=2, le=1000)
    watch: WatchConfig = WatchConfig()
    grid: GridConfig | None = None

    @field_validator("checkpoint")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ValueError("it must be the name of a folder in <run>/checkpoints, such as step-00001000, or latest")
        return name

    @model_validator(mode="after")
    def _reference_is_used(self) -> EvalConfig:
        if self.reference is not None and self.inception is None and self.dinov2 is None:
            raise ValueError("reference is what the Inception's and DINOv2's distances are to; set inception or dinov2")
        return self

    @property
    def cell(self) -> str:
        """Folder name of this sampler, step count and guidance: `ddim-25-3`; with `-raw` or the like where the weights
        are not the EMA."""
        other = "" if self.weights == "ema" else f"-{self.weights.replace(':', '')}"
        return f"{self.sampler}-{self.steps}-{self.guidance_scale:g}{other}"
