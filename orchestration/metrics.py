"""What a run's processes export to Prometheus, through the agent that Ray has on each node (`ray.util.metrics`).

Ray puts `ray_` before each name, and `_total` behind a counter's. deploy/grafana/carrara.json draws them. Nothing here
raises or waits: Ray's library hands a value to a thread of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

log = logging.getLogger("carrara")


@dataclasses.dataclass(frozen=True)
class Metric:
    """kind: a counter adds up over the life of a process, a gauge is what was last said. tags: beside run and stage."""

    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...] = ()

    def exported(self, name: str) -> str:
        """What it is called where Prometheus finds it."""
        return f"ray_{name}_total" if self.kind == "counter" else f"ray_{name}"


METRICS = {
    "carrara_rows": Metric("counter", "rows by what became of them: success, or the code of the error", ("code",)),
    "carrara_bytes": Metric("counter", "bytes that were fetched and stored", ("kind",)),
    "carrara_shards": Metric("counter", "shards by outcome: done, or set aside", ("outcome",)),
    "carrara_shards_left": Metric("gauge", "shards that are neither committed nor set aside"),
    "carrara_workers": Metric("gauge", "workers at work"),
    "carrara_busy_seconds": Metric("counter", "seconds that encoders were at work, over all workers"),
    "carrara_wait_seconds": Metric("counter", "seconds that encoders waited for decoded images, over all workers"),
    "carrara_images": Metric("gauge", "images that the training has seen"),
    "carrara_loss": Metric("gauge", "mean loss since the line before"),
    "carrara_images_per_second": Metric("gauge", "training speed, over all ranks"),
    "carrara_data_wait": Metric("gauge", "share of the time that the training waited for data"),
    "carrara_mfu": Metric("gauge", "model FLOPs as a share of what the devices can do"),
    "carrara_checkpoint_seconds": Metric("gauge", "how long the training stood still for the last checkpoint"),
    "carrara_eval": Metric("gauge", "metrics of the checkpoint that was evaluated last", ("metric", "protocol")),
}
OF_A_LINE = {  # of train's log
    "images": "carrara_images",
    "loss": "carrara_loss",
    "samples_per_s": "carrara_images_per_second",
    "data_wait": "carrara_data_wait",
    "mfu": "carrara_mfu",
    "checkpoint/seconds": "carrara_checkpoint_seconds",
}


@functools.cache
def _made(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    metric = METRICS[name]
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(name, metric.description, ("run", "stage", *metric.tags))


class Exporter:
    """The metrics of one stage of a run, told by a process that is connected to Ray."""

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._failed = False

    def tell(self, name: str, value: float, **tags: str) -> None:
        """Add to a counter, or set a gauge."""
        try:
            if not math.isfinite(value):
                return
            metric = _made(name)
            if METRICS[name].kind == "gauge":
                metric.set(value, tags={**self._tags, **tags})
            elif value > 0:  # Ray refuses to add nothing
                metric.inc(value, tags={**self._tags, **tags})
        except Exception as e:  # a run does not end for want of a curve
            if not self._failed:
                log.warning("metrics cannot be exported: %s: %s", type(e).__name__, e)
            self._failed = True

    def shard(self, stats: Mapping[str, Any], left: int, workers: int) -> None:
        """A committed shard. left: how many are still to be made."""
        self.tell("carrara_shards", 1, outcome="done")
        self.tell("carrara_rows", int(stats.get("count", 0)), code="success")
        for code, count in dict(stats.get("errors") or {}).items():
            self.tell("carrara_rows", int(count), code=str(code))
        for kind in ("fetched", "stored"):
            self.tell("carrara_bytes", int(stats.get(f"bytes_{kind}", 0)), kind=kind)
        self.tell("carrara_busy_seconds", float(stats.get("encode_seconds", 0.0)))
        self.tell("carrara_wait_seconds", float(stats.get("wait_seconds", 0.0)))
        self.left(left, workers)

    def left(self, shards: int, workers: int) -> None:
        """How much is still to be done, and by how many."""
        self.tell("carrara_shards_left", shards)
        self.tell("carrara_workers", workers)

    def set_aside(self) -> None:
        """A shard that failed too often."""
        self.tell("carrara_shards", 1, outcome="set_aside")

    def line(self, line: Mapping[str, Any]) -> None:
        """What the training's journal says."""
        for key, name in OF_A_LINE.items():
            if isinstance(value := line.get(key), (int, float)):
                self.tell(name, value)

    def evaluated(self, result: Mapping[str, Any]) -> None:
        """A result of the evaluation, as metrics.json has it."""
        for name, metric in result["metrics"].items():
            self.tell("carrara_eval", float(metric["value"]), metric=name, protocol=str(result["protocol"]["id"]))
