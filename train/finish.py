"""What a finished fit leaves: a model folder that the field's own libraries open, and a marker in it.

    autoencoder   diffusers' AutoencoderKL.from_pretrained, with the measured scaling_factor, and shift_factor if asked
    clip          open_clip.create_model("local-dir:...")
    train         a StableDiffusionPipeline (export.py)

All hold the EMA weights. A folder appears whole or not at all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from shards import storage
from shards.fingerprint import Fingerprint
from shards.layout import RunPaths
from shards.local import replace_folder, temporary_folder
from train import checkpoint, folders
from train.autoencoder import Autoencoder, to_unit
from train.clip import MAX_LOGIT_SCALE, Clip
from train.objective import Objective
from train.ranks import Ranks
from train.state import MARKER, StagePaths, to_export

# Images that the scale of the latents is measured on: its standard error is then far below 1 %.
SCALE_IMAGES = 2048
SCALE_BATCH = 16


def finish(
    stage: str, run: str, objective: Objective, last: str, wanted: Fingerprint, paths: StagePaths, ranks: Ranks
) -> None:
    """Write the model folder of a fit whose last checkpoint is `last`. Collective; rank 0 writes."""
    if stage == "train":
        if ranks.first:
            from train.export import export

            export(RunPaths(run).run, to_export(objective.config, last, folders.read_manifest(last)))
        ranks.gather(None)
        return
    if isinstance(objective, Autoencoder):
        objective.finished()
    checkpoint.load_model(last, objective.model, "ema")
    objective.to(ranks.device).eval()
    facts: dict[str, Any] = {}
    if isinstance(objective, Autoencoder):
        # Behind a frozen encoder the latents are what they were, and so is their scale.
        was = objective.model.config
        if objective.config.frozen_encoder:
            facts = {"scaling_factor": was.scaling_factor, "shift_factor": was.shift_factor}
        else:
            mean, std = measure_latents(objective, ranks)
            shifted = objective.config.measure_shift or was.shift_factor is not None  # which the images moved
            facts = {"scaling_factor": 1.0 / std, "shift_factor": mean if shifted else None}
        objective.model.register_to_config(**facts)
    if ranks.first:
        model = storage.local_path(paths.model)
        tmp = temporary_folder(model)
        if isinstance(objective, Clip):
            _save_clip(objective, tmp)
        else:
            objective.model.cpu().save_pretrained(tmp)
        manifest = folders.read_manifest(last)
        marker = {
            "stage": stage,
            "checkpoint": folders.name_of(last),
            "images": manifest["images"],
            "step": manifest["step"],
            "weights": "ema",
            "fingerprint": wanted.to_json(),
            **facts,
        }
        (tmp / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        replace_folder(tmp, model)
    ranks.gather(None)


@torch.inference_mode()
def measure_latents(objective: Autoencoder, ranks: Ranks) -> tuple[float, float]:
    """Mean and standard deviation of posterior draws over training images, all channels and places together
    (Rombach 2022, section G); a VAE's shift_factor is the one, its scaling_factor 1 over the other.

    The std is exact for the measured images, from the moments: Var = E[mean^2 + var] - E[mean]^2.
    Collective: each rank measures its share.
    """
    count = min(SCALE_IMAGES, objective.placement.size)
    first = objective.placement.segments[-1].images  # of the images that are there by now
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for begin in range(ranks.rank * SCALE_BATCH, count, ranks.world * SCALE_BATCH):
        positions = first + np.arange(begin, min(begin + SCALE_BATCH, count))
        pixels = torch.from_numpy(np.ascontiguousarray(objective.image_samples.pixels(positions))).to(ranks.device)
        posterior = objective.model.encode(to_unit(pixels)).latent_dist
        mean, var = posterior.mean.double(), posterior.var.double()
        sums += torch.stack([mean.sum(), (mean.square() + var).sum(), torch.tensor(float(mean.numel())).to(mean)])
    total, squares, n = (ranks.mean(sums) * ranks.world).tolist()
    return total / n, math.sqrt(squares / n - (total / n) ** 2)


def _save_clip(objective: Clip, folder: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors, as open_clip's own save_for_hf lays them out."""
    pre = objective.preprocess
    preprocess = {
        "mean": list(pre.mean),
        "std": list(pre.std),
        "interpolation": pre.interpolation,
        "resize_mode": pre.resize_mode,
    }
    config = {"model_cfg": objective.model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    weights = {k: v.detach().cpu().contiguous() for k, v in objective.model.state_dict().items()}
    # The loss was computed with a bounded scale: the model that is saved has the bound applied, and the
    # scale is a scalar again, as open_clip's models have it.
    weights["logit_scale"] = weights["logit_scale"].clamp(max=math.log(MAX_LOGIT_SCALE)).reshape(())
    save_file(weights, folder / "open_clip_model.safetensors")
