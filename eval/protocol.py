"""How a number was measured. A score without its protocol cannot be compared with anything.

The published distances of one and the same model differ by whole points between captions, resizes and sampler settings.
So every result carries its protocol, its folder is named by the protocol's id, and comparing results of unlike
protocols is an error that names the fields. What is measured (UNet, VAE, text encoder, which of the weights) is the
model's record, and no part of it.
"""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.fingerprint import digest_json
from shards.settings import StageError

if TYPE_CHECKING:
    from eval.evaluation import Evaluation

CODE = 2  # raise it when the same settings come to other images
MEASURES = 2  # raise it when the same images come to other numbers, which are then measured again from their features
SEED_RULE = "128 bits of sha256([prompt id, replicate]) fill one Mersenne Twister an image"
RESIZE = "shorter side by antialiased Lanczos, centre crop; features by each network's own preprocessing"

GENERATION = (  # the fields that images depend on; the others come after
    "prompts",
    "replicates",
    "seed_rule",
    "size",
    "sampler",
    "steps",
    "guidance_scale",
    "guidance_interval",
    "timestep_spacing",
    "precision",
    "code",
    "generated_with",
)


@functools.cache
def libraries(*names: str) -> dict[str, str]:
    """Major and minor versions of libraries whose code decides about numbers."""
    from importlib.metadata import version

    return {name: ".".join(version(name).split("+")[0].split(".")[:2]) for name in names}


def identity(protocol: dict[str, Any]) -> str:
    """Ten hex digits over all fields: equal ids mean comparable numbers."""
    return digest_json({k: v for k, v in protocol.items() if k != "id"})[:10]


def require_comparable(a: dict[str, Any], b: dict[str, Any], vary: Collection[str] = ()) -> None:
    """StageError naming the fields in which two protocols differ, other than those in `vary`."""
    names = [n for n in dict.fromkeys([*a, *b]) if n not in ("id", *vary)]
    unlike = [n for n in names if a.get(n) != b.get(n)]
    if unlike:
        shown = "; ".join(f"{n}: {_short(a.get(n))} and {_short(b.get(n))}" for n in unlike)
        raise StageError(
            f"results {a.get('id')} and {b.get('id')} were measured differently and cannot be compared ({shown})"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "..."


def provenance(evaluation: Evaluation) -> dict[str, Any]:
    """Where and how: command, git commit, versions, hardware, cost. Not part of the numbers."""
    from importlib.metadata import version

    done, _ = evaluation.generate.committed()
    images, seconds = sum(s["count"] for s in done), sum(s["seconds"] for s in done)
    features = [s for f in evaluation.generate.features() for s in _stats(f)]
    found = {
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "versions": {
            n: version(n) for n in ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "scipy")
        },
        "python": platform.python_version(),
        "hardware": sorted({s.get("device", "") for s in done} - {""}),
        "seconds": round(seconds + sum(s["seconds"] for s in features), 1),
        "images_per_second": round(images / seconds, 3) if seconds else None,
    }
    return {k: v for k, v in found.items() if v not in (None, "", [], {})}


def _stats(stage: Any) -> list[dict[str, Any]]:
    from shards.dataset import read_stats

    dataset = stage.committed()
    return [s for i in (dataset.shards if dataset else ()) if (s := read_stats(stage.root, i.index))]


def _commit() -> str | None:
    """The commit of the code, `+` where the work tree differs from it; None outside git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        if head.returncode:
            return None
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=30)
        return head.stdout.strip()[:12] + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
