"""How a number was measured. A score without its protocol cannot be compared with anything.

The published distances of one and the same model differ by whole points between captions, resizes and sampler settings.
So every result carries its protocol, and comparing results of unlike protocols is an error that names the fields.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from shards.fingerprint import digest_json
from shards.settings import StageError

SEED_RULE = "sha256(prompt id, replicate, purpose), first 8 bytes; one generator a picture"
SUBJECT = ("unet", "weights")  # what is measured, rather than how


@dataclass(frozen=True)
class Protocol:
    """Everything a metric depends on. Digests are sha256 hex; `unet` and `weights` name the model under test."""

    prompts: str  # digest of the prompts' ids, in order
    prompt_count: int
    replicates: int
    seed_rule: str
    resolution: int  # side of the pictures, px
    sampler: str
    steps: int
    guidance_scale: float
    timestep_spacing: str  # "" where the exported scheduler decides
    dtype: str
    resize: str  # how real pictures come to the resolution, and pictures to the feature network
    reference: str  # fingerprint of the held-out dataset; "" without one
    vae: str
    text: str
    features: str
    unet: str
    weights: str  # ema or raw
    inception: str = ""  # "" where no Inception features are taken
    dinov2: str = ""
    distance_reference: str = ""  # fingerprint of the pictures that Inception's and DINOv2's distances are to

    @property
    def id(self) -> str:
        """Ten hex digits over all fields but the model under test: equal ids mean comparable numbers."""
        return digest_json({k: v for k, v in asdict(self).items() if k not in SUBJECT})[:10]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Protocol:
        """The inverse of `to_json`; StageError where a field is absent or unknown (written by another version)."""
        names = {f.name for f in fields(cls)}
        given = set(data) - {"id"}
        if given != names:
            odd = ", ".join(sorted(given ^ names))
            raise StageError(
                f"a stored protocol has other fields than this version's ({odd}); run the evaluation again"
            )
        return cls(**{k: v for k, v in data.items() if k != "id"})


def require_comparable(a: Protocol, b: Protocol, vary: Collection[str] = ()) -> None:
    """StageError naming the fields in which two protocols differ, other than the model under test and those in
    `vary`."""
    ours, theirs = asdict(a), asdict(b)
    unlike = [name for name in ours if ours[name] != theirs[name] and name not in SUBJECT and name not in vary]
    if unlike:
        shown = "; ".join(f"{name}: {_short(ours[name])} and {_short(theirs[name])}" for name in unlike)
        raise StageError(f"results {a.id} and {b.id} were measured differently and cannot be compared ({shown})")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
