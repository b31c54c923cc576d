"""The cluster's nodes as the engine sees them: which live, which are being drained, and which are left out.

A node is struck where a worker does not start on it, or names trouble that is the node's own (NodeTrouble). After a
strike it rests for a while, longer each time; after a few without a committed shard in between it is left out for the
rest of the run, and named. What ends with a node that is lost or drained is nobody's fault and is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import RayError

from orchestration.config import RayConfig
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.engine")

LOOK_EVERY_S = 5.0
LOST_LATELY_S = 60.0
REST_FACTOR = 5.0  # of ray.back_off_s: how long a node rests after its first strike; doubles with each
REST_MOST_S = 300.0
JOINED_BY_HAND = re.compile("node_[0-9a-f]{56}")  # the kind of a node that no autoscaler made: its id
ASK_AGAIN_S = 300.0  # after which an autoscaler that had no node to give is asked again
UNKNOWN = ""  # where a worker died before it could say


@dataclasses.dataclass
class _Record:
    strikes: int = 0
    rests_until: float = -math.inf
    out: bool = False
    reason: str = ""


class Nodes:
    """What is known of the nodes; asks Ray at most every few seconds. stage: for what is said."""

    def __init__(self, stage: str, config: RayConfig) -> None:
        self.stage, self.config = stage, config
        self.records: dict[str, _Record] = {}
        self.alive: dict[str, dict[str, Any]] = {}  # by node id: what Ray tells
        self.draining: set[str] = set()
        self.started = False  # whether any worker has ever started
        self._looked_at = self._lost_at = -math.inf
        self._error: BaseException | None = None

    def look(self, now: bool = False) -> None:
        """Ask Ray which nodes there are, where that was some seconds ago, or at once."""
        if not now and time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        before = set(self.alive)
        self.alive = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
        self.draining = set(ray._private.state.state.get_draining_nodes())
        self._looked_at = time.monotonic()
        if before - set(self.alive):
            self._lost_at = self._looked_at
            log.warning("%s: %d nodes are gone", self.stage, len(before - set(self.alive)))

    def is_leaving(self, node: str | None) -> bool:
        """Whether a node is gone or being drained, asked afresh; of one that is not known, whether any went lately."""
        self.look(now=True)
        if not node:
            return time.monotonic() - self._lost_at < LOST_LATELY_S
        return node not in self.alive or node in self.draining

    def room(self, needs: dict[str, float]) -> int:
        """How many workers fit on the nodes that may be used, whatever else runs there."""
        self.look()
        left_out = {*self.left_out(), *self.draining}
        return sum(fits(n, needs) for i, n in self.alive.items() if i not in left_out)

    def largest_memory(self) -> float:
        """Bytes that the node with the most memory has for workers."""
        return max((n["Resources"].get("memory", 0.0) for n in self.alive.values()), default=0.0)

    def left_out(self) -> list[str]:
        """The nodes on which no worker is to be started now: those that are out, and those that rest."""
        now = time.monotonic()
        return [i for i, r in self.records.items() if i and (r.out or r.rests_until > now)]

    def rests(self, node: str) -> bool:
        """Whether no worker is to be started there now."""
        return node in self.left_out()

    @property
    def unknown_rests(self) -> bool:
        """Whether workers died lately before they could say where, so that no more are to be started for a while."""
        record = self.records.get(UNKNOWN)
        return record is not None and record.rests_until > time.monotonic()

    def name(self, node: str | None) -> str:
        """The node for people: its host name and address."""
        found = self.alive.get(node or UNKNOWN)
        if found is None:
            return "an unknown node" if not node else f"node {node[:12]}"
        return f"node {found['NodeManagerHostname']} ({found['NodeManagerAddress']})"

    def commit(self, node: str | None) -> None:
        """A shard was committed there: what was held against the node is forgotten."""
        if (record := self.records.get(node or UNKNOWN)) is not None and not record.out:
            del self.records[node or UNKNOWN]

    def strike(self, node: str | None, reason: str, error: BaseException, needs: dict[str, float]) -> None:
        """Something went wrong that is the node's own. All that comes while it rests is the same trouble, and counts
        once. Raises what the run ends with where no node is left, or where workers start nowhere."""
        record = self.records.setdefault(node or UNKNOWN, _Record())
        now = time.monotonic()
        if record.out or now < record.rests_until:
            return
        record.strikes, record.reason, self._error = record.strikes + 1, reason, error
        if not isinstance(error, ConfigError):  # which does not pass by waiting
            rest = REST_FACTOR * self.config.back_off_s * 2.0 ** (record.strikes - 1)
            record.rests_until = now + min(rest, REST_MOST_S)
        log.warning(
            "%s: %s: %s (%d of %d)", self.stage, self.name(node), reason, record.strikes, self.config.node_strikes
        )
        if record.strikes < self.config.node_strikes:
            return
        if node:
            record.out = True
            log.error("%s: %s is left out from now on: %s", self.stage, self.name(node), reason)
        self._end_if_hopeless(needs)

    def _end_if_hopeless(self, needs: dict[str, float]) -> None:
        out = [i for i, r in self.records.items() if r.out]
        unknown = self.records.get(UNKNOWN)
        left = [i for i, n in self.alive.items() if i not in out and i not in self.draining and fits(n, needs)]
        nowhere = len(out) >= 3 or (unknown is not None and unknown.strikes >= self.config.node_strikes)
        if left and (self.started or not nowhere):
            return
        if not self.started and isinstance(self._error, ConfigError):
            raise ConfigError(str(self._error))
        reasons = "; ".join(f"{self.name(i)}: {self.records[i].reason}" for i in out[:5])
        if not self.started:
            last = self.records[out[-1]].reason if out else (unknown.reason if unknown else "")
            raise StageError(f"{self.stage}: workers do not start: {last.removeprefix('a worker did not start: ')}")
        raise StageError(f"{self.stage}: no node is left to work on, all were left out ({reasons})")


def fits(node: dict[str, Any], needs: dict[str, float]) -> int:
    """How many workers with these needs one node has room for in all."""
    have = node["Resources"]
    return min((math.floor(have.get(k, 0.0) / v + 1e-9) for k, v in needs.items()), default=1)


class Autoscaler:
    """What Ray tells of the cluster's autoscaler; one that has told nothing, as `ray status` shows it, is none.

    Where nodes were joined by hand, something reports all the same. Of version 1 the kinds of nodes tell: it has no
    names for them. Of version 2 what it refuses tells: there, and where nodes are as many as they may be, every worker
    that waits. That is kept in mind, or they would be asked for again once they wait no more.
    """

    def __init__(self) -> None:
        self._full, self._full_at = -1, -math.inf  # the room there was when no node came for who waited, and when

    def room(self, needs: dict[str, float], room: int, waiting: int) -> float:
        """How many workers there may be room for in time: infinity where that is not known, `room` where no more than
        there is now. waiting: workers with these needs that wait for a node."""
        if most := ray._private.state.state.get_max_resources_from_cluster_config():
            known = (most.get(k, 0.0) / v for k, v in needs.items() if k in most or k in ("CPU", "GPU"))
            return min(known, default=math.inf)
        if room < 1:
            return math.inf
        gcs = ray._private.worker.global_worker.gcs_client
        try:
            told = gcs.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None, timeout=LOOK_EVERY_S)
            reply = GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=LOOK_EVERY_S))
        except RayError:  # the control store is gone for a while
            return room
        if told:
            kinds = (json.loads(told).get("autoscaler_report") or {}).get("active_nodes", {})
            return room if all(map(JOINED_BY_HAND.fullmatch, kinds)) else math.inf
        if not reply.HasField("autoscaling_state"):
            return room
        refused = [_rounded(r.resources_bundle) for r in reply.autoscaling_state.infeasible_resource_requests]
        now = time.monotonic()
        if 0 < waiting <= refused.count(_rounded(needs)):
            self._full, self._full_at = room, now
        return self._full if room <= self._full and now - self._full_at < ASK_AGAIN_S else math.inf


def _rounded(resources: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in resources.items()}  # as finely as Ray counts
