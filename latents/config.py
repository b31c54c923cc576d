"""What a user sets for the latents stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shards.settings import Strict

# Where the work happens; everything else in LatentsConfig changes the bytes of a shard.
PLACEMENT = ("decode_threads", "device")


class LatentsConfig(Strict):
    """Settings of the latents stage. `resolution` is in pixels, `batch_size` in pictures."""

    resolution: int = Field(default=256, ge=8, le=4096, description="side of the square pictures that are encoded")
    batch_size: int = Field(default=32, ge=1, le=4096)
    moments: bool = Field(default=True, description="store the posterior's log-std too, so that epochs draw afresh")
    text: Literal["tokens", "embeddings"] = "embeddings"
    text_layer: Literal["last", "penultimate"] = Field(
        default="penultimate", description="the block whose output, after the final norm, conditions the UNet"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="arithmetic of the encoders; what is not finite is encoded again in float32"
    )
    # One thread a worker: a matrix product's rounding may depend on the number of threads, and a cluster's
    # parallelism comes from workers. It is part of the fingerprint.
    threads: int = Field(default=1, ge=1, le=256, description="threads of the encoders in one worker")
    decode_threads: int = Field(default=2, ge=1, le=256, description="threads that decode pictures ahead")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def settings(self) -> dict[str, Any]:
        """The settings that change the bytes of a shard, for its fingerprint."""
        return self.model_dump(exclude=set(PLACEMENT))
