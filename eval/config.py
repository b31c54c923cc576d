"""What a user sets for the evaluation."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shards.settings import Strict

# The model's own weights, its EMA, a further EMA (train.ema_stds), or one of any length put together from those.
Weights = Annotated[str, Field(pattern=r"^(raw|ema|ema_0\.\d{3}|posthoc:0?\.\d+)$")]
Sampler = Literal[
    "ddpm",
    "ddim",
    "pndm",
    "dpm-solver++",
    "dpm-solver++-karras",
    "dpm-solver++-sde-karras",
    "unipc",
    "euler",
    "euler-karras",
    "euler-a",
    "heun",
    "heun-karras",
    "flow-euler",
    "model",
]


class WatchConfig(Strict):
    """When `carrara watch` evaluates, and when it raises an alarm. Nothing here changes a number."""

    every_s: float = Field(default=30.0, ge=0.1, le=86_400, description="how often new checkpoints are looked for")
    cron: str | None = Field(default=None, description="evaluate at these moments alone, e.g. '0 */6 * * *'")
    backfill: bool = Field(default=False, description="also evaluate older checkpoints that have no result")
    alarm_rate: float = Field(
        default=0.02, gt=0, le=0.5, description="chance of any false alarm over 30 checkpoints that are equally good"
    )
    alarm_min_change: float = Field(
        default=0.02, ge=0, le=10, description="the smallest change worth an alarm, as a share of the earlier value"
    )
    alarm_bad_images: float = Field(
        default=0.01, ge=0, le=1, description="share of failed, blank or repeated images beyond the best's that alarms"
    )

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, values: Any) -> Any:
        if isinstance(values, dict) and "alarm_command" in values:
            raise ValueError("alarm_command is now notify.command, which is called for alarms too; put it there")
        return values

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
        default=25, ge=1, le=100, description="share of a cell that is generated before it may be given up; 100: never"
    )

    @field_validator("samplers", "steps", "guidance_scales", "weights")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError("a value stands there twice; each cell is generated once")
        return values


class JudgeConfig(Strict):
    """A vision-language model that answers questions about images: VQAScore and Soft-TIFA."""

    model: str = Field(description="folder or hub name of a transformers image-text-to-text model")
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_size: int = Field(default=8, ge=1, le=1024, description="questions answered at once")
    question: str = Field(
        default='Does this figure show "{prompt}"? Please answer yes or no.',
        max_length=2000,
        description="VQAScore's question; {prompt} stands for the caption",
    )
    yes: str = Field(
        default="Yes", min_length=1, max_length=40, description="the answer that VQAScore is the chance of"
    )

    @field_validator("question")
    @classmethod
    def _has_placeholder(cls, question: str) -> str:
        if question.count("{prompt}") != 1:
            raise ValueError("it must hold {prompt} once")
        return question


class PreferenceConfig(Strict):
    """Scores that learned from people's choices, by the weights of each."""

    pickscore: str | None = Field(default=None, description="folder or hub name of PickScore_v1 (transformers' CLIP)")
    hps: str | None = Field(default=None, description="file of HPSv2's weights (.pt), on open_clip's ViT-H-14")
    aesthetic: str | None = Field(default=None, description="file of LAION's aesthetic predictor (.pth, of ViT-L-14)")
    aesthetic_clip: str = Field(default="ViT-L-14:openai", description="the CLIP that the predictor reads")


class EvalConfig(Strict):
    """Settings of the evaluation of one model with one sampler."""

    checkpoint: str = Field(default="latest", description="name of a checkpoint folder, or latest")
    model: str | None = Field(
        default=None, description="folder or hub name of any diffusers text-to-image pipeline, in place of a checkpoint"
    )
    weights: Weights = Field(default="ema", description="ema, raw, one of train.ema_stds (ema_0.050), or posthoc:0.08")
    num_prompts: int = Field(
        default=256, ge=1, description="number of captions, distinct ones first; an FID wants 4 x 2048 at least"
    )
    prompts_file: str | None = Field(
        default=None, description="one prompt a line, or a suite in JSON lines, in place of held-out captions"
    )
    replicates: int = Field(default=1, ge=1, le=1000, description="images of each prompt, with different noise")
    sampler: Sampler = "ddim"
    steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = Field(
        default=3.0, ge=0.0, le=100.0, description="classifier-free guidance; up to 1 is none"
    )
    guidance_interval: tuple[float, float] | None = Field(
        default=None, description="guide only while time, from 1 (noise) to 0, is in here (Kynkaanniemi et al. 2024)"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        default=None, description="where the sampler's steps lie; None keeps what the exported scheduler says"
    )
    size: int | None = Field(default=None, ge=8, le=8192, description="side that is generated, px; None is the model's")
    resolution: int | None = Field(
        default=None,
        ge=8,
        le=8192,
        description="side that images are resized to before all metrics; None is as generated",
    )
    batch_size: int = Field(default=16, ge=1, le=4096, description="images at once; halved where memory runs out")
    shard_size: int = Field(default=128, ge=1, le=100_000, description="images a shard")
    keep_images: int | None = Field(
        default=None, ge=0, description="images that stay, the first ones of each shard; None is all; features stay"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the UNet or transformer; what decodes and what scores is always float32"
    )
    channels_last: bool = False
    compile: bool = False
    threads: int = Field(default=1, ge=1, le=256, description="CPU threads of one worker")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    clip: str | None = Field(
        default=None, description="CLIP for features and scores (folder, MODEL:TAG, MODEL:/file); None is the run's own"
    )
    inception: str | None = Field(
        default=None, description="torch-fidelity's Inception weights (a file, or download): FID, KID, Inception score"
    )
    dinov2: str | None = Field(default=None, description="folder of a DINOv2 (config.json, model.safetensors)")
    reference: str | None = Field(
        default=None, description="finished image shards that all distances are to; None is the held-out set"
    )
    reference_as_is: bool = Field(
        default=False, description="take the reference's images at their own sizes, as published FIDs do"
    )
    fid_statistics: dict[Literal["fid_tf", "fid_clean"], str] = Field(
        default={}, description="files (.npz with mu and sigma) of real statistics, by the FID that they are for"
    )
    memorisation: bool = Field(default=False, description="search the training set for each image's nearest one")
    judge: JudgeConfig | None = None
    preference: PreferenceConfig | None = None
    scorer: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$",
        description="Python module with SCORES and score(images, captions): scores of your own (docs/eval.md)",
    )
    retrieval_candidates: int = Field(default=100, ge=2, le=10_000)
    jackknife_groups: int = Field(default=20, ge=4, le=1000)
    watch: WatchConfig = WatchConfig()
    grid: GridConfig | None = None

    @field_validator("checkpoint")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ValueError("it must be the name of a folder in <run>/checkpoints, such as step-00001000, or latest")
        return name

    @field_validator("guidance_interval")
    @classmethod
    def _is_interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError("it must be two times between 0 and 1, the lower one first, such as [0.2, 0.8]")
        return interval

    @model_validator(mode="after")
    def _together(self) -> EvalConfig:
        if self.fid_statistics and self.inception is None:
            raise ValueError("fid_statistics are of the Inception's features; set inception")
        if self.judge and not self.judge.model:
            raise ValueError("judge.model names no model")
        return self

    @property
    def cell(self) -> str:
        """This sampler, step count and guidance for people: `ddim-25-3`; with `-raw` or the like where the weights
        are not the EMA."""
        other = "" if self.weights == "ema" else f"-{self.weights.replace(':', '')}"
        limited = "" if self.guidance_interval is None else "[{:g},{:g}]".format(*self.guidance_interval)
        return f"{self.sampler}-{self.steps}-{self.guidance_scale:g}{limited}{other}"
