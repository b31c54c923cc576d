"""The images of a class that DreamBooth keeps in mind (Ruiz et al. 2022, arXiv:2208.12242, section 3.3): drawn by the
model that is to be fine-tuned, before it is, and made into latents beside the run's own.

Two stages over shards in <run>/prior, images/ and latents/, each killed and gone on with as any other; training mixes
the second in as one more source (train/config.py: PriorConfig).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from eval import model as models
from eval.sample import Request, SampleConfig, SampleStage
from eval.shardwork import accounted
from latents.config import LatentsConfig
from latents.stage import LatentsStage
from shards.dataset import write_manifest
from shards.layout import RunPaths
from shards.settings import ConfigError
from shards.stage import Stage
from train.adapters import find_unet
from train.config import TrainConfig

SHARD_SIZE = 32  # images: what a kill costs at the most


class PriorImages(SampleStage):
    """Stage over shards of images of one prompt, drawn by a pipeline. Captions are the prompt."""

    name = "prior"

    def __init__(self, config: SampleConfig, run: RunPaths, model: models.Model) -> None:
        super().__init__(config, run, run.prior, model)
        self.root = RunPaths(run.prior).images

    def columns(self, images: list[np.ndarray]) -> dict[str, list[Any]]:
        """What the latents are given of an image beside its caption: its width and height."""
        return {"width": [i.shape[1] for i in images], "height": [i.shape[0] for i in images]}

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Write the manifest, of image shards as ingest's are."""
        kept, status = accounted(self.root, {task.index: len(task.payload) for task in self.tasks()}, stats)
        return write_manifest(self.root, "images", kept, {"model": self.model.to_json(), "status": dict(status)})


class PriorLatents(LatentsStage):
    """The latents of these images, of the same encoders and settings as the run's own."""

    name = "prior-latents"


def require_prompt_alone(start_from: str) -> None:
    """Raises ConfigError where the pipeline's UNet is given an image too, as an inpainting model's is."""
    config = json.loads((find_unet(start_from).folder / "config.json").read_bytes())
    given, drawn = config.get("in_channels", 4), config.get("out_channels", 4)
    if given > drawn:
        raise ConfigError(
            "train.prior: its images are drawn by train.start_from from a prompt alone, and the UNet of "
            f"{start_from} is given an image too ({given} channels in, {drawn} out); leave prior out, and name "
            "latents of images of the class that you have in train.sources"
        )


def stages(
    train: TrainConfig, latents: LatentsConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int
) -> list[Stage]:
    """Both, in order. Raises ConfigError where train.start_from is no whole pipeline.

    Images have the pipeline's own size, which it draws best, or that of the largest latents where these are larger.
    """
    prior = train.prior
    assert prior is not None
    assert train.start_from is not None
    require_prompt_alone(train.start_from)
    try:
        model = models.of_pipeline(train.start_from)
    except ConfigError as e:
        why = str(e).replace("eval.model: ", "")
        raise ConfigError(f"train.prior: its images are drawn by train.start_from; {why}") from None
    side = max(model.size, *latents.resolutions)
    config = SampleConfig(
        requests=[Request(prompt=prior.prompt, seed=seed)],
        count=prior.count,
        sampler="model",
        steps=prior.num_inference_steps,
        guidance_scale=prior.guidance_scale,
        width=side,
        height=side,
        batch_size=prior.batch_size,
        shard_size=SHARD_SIZE,
        device=latents.device,
    )
    plain = latents.model_copy(update={"select": [], "captions": [], "enlarge": True})
    return [
        PriorImages(config, run, model),
        PriorLatents(plain, RunPaths(run.prior), vae_ref, text_ref, seed),
    ]
