"""Whose fault it is that a worker does not start or a shard does not come: nodes, without a cluster."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import ActorDiedError, OutOfMemoryError, RpcError

from orchestration import actors, nodes
from orchestration.actors import Fleet, _Call, _Worker
from orchestration.config import CpuPool, Pool, RayConfig, Span
from orchestration.nodes import Nodes
from shards.fingerprint import Fingerprint
from shards.settings import ConfigError, NodeTrouble, StageError
from shards.stage import Task

NEEDS = {"CPU": 1.0}


class World:
    """Nodes as Ray would tell of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, cpus: float = 48.0) -> None:
        self.alive = {f"n{i}": True for i in range(count)}
        self.draining: dict[str, int] = {}
        self.now, self.cpus = 0.0, cpus
        self.most: dict[str, float] | None = None  # what there is once an autoscaler has made all nodes, if it tells
        self.away = False  # the control store
        self.kinds: list[str] = []  # of the nodes, by an autoscaler of version 1
        self.refused: list[dict[str, float]] | None = []  # what one of version 2 has no node for; None: there is none
        monkeypatch.setattr(ray, "nodes", self.nodes)
        monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: self.draining)
        monkeypatch.setattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: self.most)
        monkeypatch.setattr(ray._private.worker.global_worker, "gcs_client", self, raising=False)
        monkeypatch.setattr(nodes.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus * count})
        monkeypatch.setattr(ray, "kill", lambda actor: None)

    def internal_kv_get(self, key: bytes, namespace: bytes | None, timeout: float) -> bytes | None:
        assert (key, namespace) == (b"__autoscaling_status", None)
        report = {"autoscaler_report": {"active_nodes": dict.fromkeys(self.kinds, 1)}}
        return json.dumps(report).encode() if self.kinds else None

    def get_cluster_status(self, timeout_s: float) -> bytes:
        if self.away:
            raise RpcError("gone")
        reply = GetClusterStatusReply()
        if self.refused is not None:
            reply.autoscaling_state.autoscaler_state_version = 1
            for bundle in self.refused:
                reply.autoscaling_state.infeasible_resource_requests.add().resources_bundle.update(bundle)
        return bytes(reply.SerializeToString())

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "Alive": alive,
                "NodeManagerHostname": f"host-{name}",
                "NodeManagerAddress": "10.0.0.1",
                "Resources": {"CPU": self.cpus, "memory": 8e9},
            }
            for name, alive in self.alive.items()
        ]


def looked(world: World, **config: Any) -> Nodes:
    found = Nodes("toy", RayConfig(**config))
    found.look(now=True)
    return found


def test_a_bad_node_is_left_out_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 100)
    found = looked(world)
    found.started = True
    for _ in range(50):  # each worker that is tried there fails
        world.now += 60
        found.strike("n7", "a worker did not start: no driver", OSError("no driver"), NEEDS)
    assert found.left_out() == ["n7"]
    assert found.room(NEEDS) == 99 * 48
    assert found.name("n7") == "node host-n7 (10.0.0.1)"


def test_what_comes_at_one_moment_counts_once_and_a_commit_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2)
    found = looked(world)
    for _ in range(48):  # all workers of the node at once: DNS was away for a moment
        found.strike("n0", "no DNS", NodeTrouble("no DNS"), NEEDS)
    assert found.records["n0"].strikes == 1
    assert found.left_out() == ["n0"], "it rests"
    world.now += 6
    assert found.left_out() == []
    for _ in range(10):
        found.commit("n0")
        found.strike("n0", "no DNS", NodeTrouble("no DNS"), NEEDS)
        world.now += 6
    assert not found.records["n0"].out


def test_starts_that_fail_everywhere_end_the_run_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 100)
    found = looked(world)
    with pytest.raises(StageError, match="toy: workers do not start: OSError: no such weights"):  # noqa: PT012
        for turn in range(9):
            world.now += 100
            found.strike(f"n{turn % 3}", "a worker did not start: OSError: no such weights", OSError("x"), NEEDS)
    found = looked(world)
    with pytest.raises(ConfigError, match="no such CLIP"):  # noqa: PT012
        for turn in range(9):
            found.strike(f"n{turn % 3}", "a worker did not start", ConfigError("no such CLIP"), NEEDS)
    assert world.now < 1000, "a wrong configuration is not waited for"


def test_a_node_that_cannot_hold_a_worker_is_no_hope(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2)
    found = looked(world)
    found.started = True
    found.alive["n1"]["Resources"]["CPU"] = 0.0  # a head without CPUs
    with pytest.raises(StageError, match=r"no node is left to work on.*host-n0 .*disk is full"):  # noqa: PT012
        for _ in range(3):
            world.now += 100
            found.strike("n0", "the disk is full", NodeTrouble("the disk is full"), NEEDS)


class Actors:
    """In the place of an actor class: notes what its actors are asked."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def options(self, **options: Any) -> Any:
        def remote(*_: Any) -> Any:
            self.made.append(options)
            call = types.SimpleNamespace(remote=lambda *a: object())
            return types.SimpleNamespace(where=call, hello=call, process=call)

        return types.SimpleNamespace(remote=remote)


def fleet(world: World, pool: Pool | None = None, beyond: int = 0) -> tuple[Fleet, Actors]:
    stage: Any = types.SimpleNamespace(name="toy", root="/x", unit="images", max_in_flight=1)
    found = Fleet(stage, pool or CpuPool(), RayConfig())
    found.actor, found.beyond = (made := Actors()), beyond
    return found, made


def test_of_several_answers_one_that_failed_takes_none_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(refs: Any) -> Any:
        for ref in refs if isinstance(refs, list) else [refs]:
            if isinstance(ref, Exception):
                raise ref
        return refs

    monkeypatch.setattr(actors.ray, "get", get)
    died = ActorDiedError()
    assert actors._answers(["a", "b"]) == ["a", "b"]
    assert actors._answers(["a", died, "b"]) == ["a", died, "b"]


def test_starts_that_end_with_their_node_are_counted_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 100)
    found, _ = fleet(world)
    found.grow(10_000)
    assert len(found.workers) == 4800
    workers = list(found.workers)[:48]
    for worker in workers:
        worker.node = "n3"
    world.alive["n3"] = False  # a spot node goes while its 48 workers start
    for worker in workers:
        found._answer(None, _Call(worker, None, 0.0), ActorDiedError())
    for worker in list(found.workers)[:5]:  # and some that had not even said where they were
        found._answer(None, _Call(worker, None, 0.0), ActorDiedError())
    assert found.nodes.records == {}
    # On a node that lives, three count.
    for _ in range(3):
        world.now += 100
        worker = next(iter(found.workers))
        worker.node = "n5"
        found._answer(None, _Call(worker, None, 0.0), ActorDiedError())
    assert found.nodes.left_out() == ["n5"]


def test_a_worker_that_ray_ends_for_want_of_memory_is_trouble_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = fleet(World(monkeypatch, 2))
    found.grow(4)
    worker, task, given = next(iter(found.workers)), Task(5, "x"), []
    worker.node, worker.in_flight, found.busy = "n1", 1, 1
    ledger = types.SimpleNamespace(
        trouble=lambda task, error, _: given.append((task, str(error))),
        was_troubled=lambda _: bool(given),
        committed=lambda _: False,
    )
    blamed: list[Task] = []
    job: Any = types.SimpleNamespace(ledger=ledger, blame=lambda task, *_: blamed.append(task))
    found._answer(job, _Call(worker, task, 0.0), OutOfMemoryError("killed"))
    assert given == [(task, "its worker was ended by Ray, since the node is short of memory")]
    assert found.nodes.left_out() == ["n1"]
    # Where it happens to the same shard again, it is the shard that wants too much.
    worker = next(iter(found.workers))
    worker.node, worker.in_flight, found.busy = "n0", 1, 1
    found._answer(job, _Call(worker, task, 0.0), OutOfMemoryError("killed"))
    assert (blamed, len(given)) == ([task], 1)
    assert found.nodes.left_out() == ["n1"]


def test_new_workers_are_kept_off_a_node_that_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 3, cpus=1.0)
    found, made = fleet(world)
    found.grow(100)
    assert [o.get("label_selector") for o in made.made] == [None] * 3
    found.nodes.started = True
    for _ in range(3):
        world.now += 100
        found.nodes.strike("n1", "no driver", OSError("x"), NEEDS)
    world.now += 10
    for worker in list(found.workers):
        found._retire(worker)
    found.grow(100)
    assert [o["label_selector"] for o in made.made[3:]] == [{"ray.io/node-id": "!in(n1)"}] * 2


def test_downloads_are_spread_and_memory_is_claimed_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2, cpus=8.0)
    found, made = fleet(world)
    found.peak_bytes = 1_500_000_000
    found.grow(100)
    assert len(made.made) == 2 * 4, "of 8 GB a node, 1.9 GB each"
    assert all(o["scheduling_strategy"] == "SPREAD" for o in made.made)
    assert made.made[0]["memory"] == 1_900_000_000
    other, made = fleet(world, Pool())
    other.grow(1)
    assert made.made[0]["scheduling_strategy"] == "DEFAULT"


@pytest.mark.parametrize(
    ("workers", "most", "expected"),
    [
        (None, None, [24, 64]),  # some more than there is room for, for an autoscaler to see; once nodes come, many
        (None, {"CPU": 1000}, [24, 64]),
        (None, {"CPU": 20}, [20, 32]),  # an autoscaler that tells how many it may make room for
        (Span(min=0, max=24), {"CPU": 1000}, [24, 24]),
        (Span(min=0, max=18), None, [18, 18]),
        (Span(min=30, max=40), None, [30, 40]),
        (7, {"CPU": 1000}, [7, 7]),
    ],
)
def test_how_many_workers_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, workers: Any, most: Any, expected: list[int]
) -> None:
    world = World(monkeypatch, 2, cpus=8.0)
    world.most = most
    found, _ = fleet(world, CpuPool(workers=workers), actors.BEYOND_ROOM)
    found.grow(10_000)
    assert len(found.workers) == expected[0]
    world.alive |= {"n2": True, "n3": True}  # and it did
    world.now += 10
    found.grow(10_000)
    assert len(found.workers) == expected[1]


def test_where_nobody_adds_nodes_no_more_workers_are_asked_for_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_hand = [f"node_{i:056x}" for i in range(2)]
    for kinds, refused, expected in (
        ([], None, 16),  # no autoscaler has ever told anything
        (by_hand, None, 16),  # version 1 looks on
        (["head", "node_big"], None, 24),  # and adds nodes
        ([], [], 24),  # version 2
    ):
        world = World(monkeypatch, 2, cpus=8.0)
        world.kinds, world.refused = kinds, refused
        found, _ = fleet(world, beyond=actors.BEYOND_ROOM)
        found.grow(10_000)
        assert len(found.workers) == expected, (kinds, refused)


def test_what_version_2_of_the_autoscaler_has_no_node_for_is_asked_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2, cpus=8.0)
    found, _ = fleet(world, beyond=actors.BEYOND_ROOM)

    def workers() -> int:
        world.now += 10
        found.grow(10_000)
        return len(found.workers)

    world.away = True
    assert workers() == 16
    world.away = False
    assert workers() == 24
    for worker in list(found.workers)[:16]:
        worker.node = "n0"
    world.refused = [{"CPU": 1.0}] * 5 + [{"CPU": 4.0}] * 9
    assert workers() == 24, "three nodes of the eight that are wanted are on their way"
    world.refused = [{"CPU": 1.0}] * 8
    assert workers() == 16
    world.refused = []  # nobody waits any more
    assert workers() == 16
    world.alive["n1"] = False
    for worker in list(found.workers)[8:]:
        found._retire(worker)
    assert workers() == 16, "the node that went may come again"
    world.alive |= {"n1": True, "n2": True}  # and another one, by hand
    assert workers() > 24
    for worker in list(found.workers)[24:]:
        found._retire(worker)
    for worker in found.workers:
        worker.node = "n0"
    workers()
    world.refused = [{"CPU": 1.0}] * 24
    assert workers() == 24
    world.refused = []
    world.now += nodes.ASK_AGAIN_S
    assert workers() > 24, "it may be allowed more by now"


def test_from_zero_nodes_an_autoscaler_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0)
    found, _ = fleet(world, beyond=actors.BEYOND_ROOM)
    for refused in ([], [{"CPU": 1.0}] * 8, None):  # there is nothing else to do
        world.refused, world.now = refused, world.now + 10
        found.grow(10_000)
        assert len(found.workers) == 8


def test_a_drained_node_gets_no_more_and_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2, cpus=1.0)
    found, _ = fleet(world)
    found.grow(100)
    staying, leaving = found.workers
    for worker, node in ((staying, "n0"), (leaving, "n1")):
        worker.node, worker.ready = node, True
        found.free[worker] = None
    given: list[Any] = []
    ledger = types.SimpleNamespace(
        take_suspect=lambda: None,
        take=lambda: Task(len(given), Fingerprint("x", 1, {})),
        remaining=50,
        give_back=given.append,
        committed=lambda task: False,
        next_retry_s=None,
    )
    job: Any = types.SimpleNamespace(ledger=ledger, progress=types.SimpleNamespace(update=lambda *a, **k: None))
    found.feed(job)
    assert [h.in_flight for h in (staying, leaving)] == [1, 1]
    world.draining = {"n1": 0}
    world.now += 10
    found.grow(2)
    assert leaving.leaving
    assert leaving in found.workers, "it may finish what it has"
    # Its node goes before it is done: nobody is blamed.
    task = Task(1, Fingerprint("x", 1, {}))
    found._answer(job, _Call(leaving, task, 0.0), ActorDiedError())
    assert given == [task]
    assert leaving not in found.workers
    assert found.nodes.records == {}


def test_what_takes_far_longer_than_others_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 1, cpus=1.0)
    found, _ = fleet(world, CpuPool(deadline_s=None))
    found.grow(1)
    [worker] = found.workers
    worker.node, worker.ready, worker.in_flight, found.busy = "n0", True, 1, 1
    blamed: list[str] = []
    ledger = types.SimpleNamespace(committed=lambda task: False)
    job: Any = types.SimpleNamespace(ledger=ledger, blame=lambda task, error, trace: blamed.append(str(error)))
    found.calls = {"ref": _Call(worker, Task(3, Fingerprint("x", 1, {})), 0.0)}
    found._judge_ages(job, 1e6)
    assert not blamed, "nothing is known of how long one takes"
    found.seconds.extend([10.0] * 19 + [12.0])
    found._judge_ages(job, 239.0)
    assert not blamed
    found._judge_ages(job, 241.0)
    assert blamed == [
        "it was not done after 241 s, on node host-n0 (10.0.0.1), so its worker was ended "
        "(ray.toy.deadline_s and deadline_factor)"
    ]
    assert worker not in found.workers
    assert not found.calls
    assert found.busy == 0


def test_a_worker_that_hangs_as_it_starts_is_its_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2, cpus=1.0)
    found, _ = fleet(world, CpuPool(start_deadline_s=100.0))
    found.grow(1)
    [worker] = found.workers
    found.calls = {"ref": _Call(worker, None, 0.0)}
    found._judge_ages(None, 5000.0)
    assert worker in found.workers, "it waits for room"
    worker.node = "n0"
    found._judge_ages(None, 101.0)
    assert worker not in found.workers
    assert found.nodes.records["n0"].strikes == 1


def test_workers_are_equal_only_to_themselves() -> None:
    assert _Worker("a") != _Worker("a")


def test_who_waits_for_a_node_is_let_go_once_nothing_is_left_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler would bring a node for it."""
    world = World(monkeypatch, 2, cpus=1.0)
    found, _ = fleet(world, beyond=actors.BEYOND_ROOM)
    found.grow(100)
    assert len(found.workers) == 2 + actors.BEYOND_ROOM
    working = list(found.workers)[:2]
    for worker in working:
        worker.node, worker.ready, worker.in_flight = "n0", True, 1
    found.grow(5)
    assert len(found.workers) == 5
    found.grow(1)
    assert list(found.workers) == working, "those that work end by themselves"
    assert found.nodes.records == {}


def test_what_dies_for_lack_of_memory_is_not_replaced_beyond_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first workers claim no memory, so Ray would place at once those that are to wait for a node."""
    world = World(monkeypatch, 1, cpus=16.0)
    found, made = fleet(world, beyond=actors.BEYOND_ROOM)
    found.grow(10_000)
    working = list(found.workers)[:16]
    for worker in working:
        worker.node, worker.ready = "n0", True
    found.peak_bytes = 800_000_000
    world.now += 10
    found.grow(10_000)  # of 8 GB there is room for 8 that claim 1 GB each
    assert list(found.workers) == working
    for worker in working[:8]:
        found._retire(worker)
        world.now += 10
        found.grow(10_000)
    assert list(found.workers) == working[8:]
    assert len(made.made) == 16 + actors.BEYOND_ROOM
    for worker in working[8:]:
        found._retire(worker)
    world.now += 10
    found.grow(10_000)
    assert len(found.workers) == 8 + actors.BEYOND_ROOM
