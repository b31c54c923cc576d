"""How a number was measured. A score without its protocol cannot be compared with anything.

The published distances of one and the same model differ by whole points between captions, resizes and sampler settings.
So every result carries its protocol, its folder is named by the protocol's id, and comparing results of unlike
protocols is an error that names the fields. What is measured (UNet, VAE, text encoder, which of the weights) is the
model's record, and no part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from shards.fingerprint import digest_json
from shards.settings import StageError

CODE = 2  # raise it when the same settings come to other images or numbers
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
