"""Every interleaving of several writers with other bytes, with deaths at every step, a reader, a sweep and a take-down,
over the very generators that commit shards (shards/protocol.py); and mistakes made on purpose, which must be found.

The promises: (1) where there are stats, tar and sidecar are there and are those of the stats; (2) a commit never goes
or changes (but by a take-down); (3) whoever returns, returns what lies there; (4) if all die in any state, a resume
alone ends in a whole shard, keeps what was committed and fetches nothing where a tar lies; (5) a reader that opens the
files one after another never gets those of two writers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from shards import protocol
from shards.commit import pack, unpack
from shards.protocol import Codec, Names, Steps
from shards.stats import born, born_of, json_bytes, parse_stats
from tests.shards.explorer import Process, Store, explore, run_alone

TAR, PARQUET, STATS, NEW, CUT = "00000.tar", "00000.parquet", "00000_stats.json", "new/", "cut"
NAMES = Names(TAR, STATS, NEW)
# In a state a file is a tuple: kind, whose tar (and whose sidecar, of the stats), whether a picture was taken out.
CODEC = Codec(lambda packed: ([(PARQUET, packed[0])], packed[1]), lambda stats: stats[:3])


def writer(who: str, tar: str | None = None) -> Callable[[], Steps]:
    """tar: another writer's, of whose very bytes this one's tar is, while its failures are others."""
    data = ("tar", tar or who, "")
    packed = (("parquet", who, ""), ("stats", tar or who, who, ""))
    return lambda: protocol.commit(NAMES, data, str(data), packed, CODEC)


def adopt() -> Steps:
    return protocol.adopt(NAMES, CODEC)


def resume() -> Steps:
    """As a worker does it: what is there is taken over, and only then fetched."""
    found = yield from adopt()
    return found if found is not None else (yield from writer("R")())


def read() -> Steps:
    """A reader: committed or not, and then the files one after another."""
    stats = yield ("read", STATS)
    if stats is None:
        return None
    parquet = yield ("read", PARQUET)
    tar = yield ("read", TAR)
    return (tar, parquet, stats)


def cut(data: tuple[Any, ...]) -> tuple[Any, ...]:
    return data if data[-1] == CUT else (*data[:-1], CUT)


def take_down() -> Steps:
    return protocol.blank(NAMES, PARQUET, lambda tar, table, stats: (cut(tar), cut(table), cut(stats), str(cut(tar))))


def sweep() -> Steps:
    yield from protocol.sweep(NAMES)
    return None


def careless_sweep() -> Steps:
    """Of any shard, committed or not."""
    for name in (yield ("list", NEW)):
        yield ("remove", name)
    return None


READER: Process = ("read", read)
SWEEP: Process = ("sweep", sweep)
REMOVE: Process = ("take-down", take_down)


def writers(*names: str, wrapped: Callable[[Steps], Steps] = lambda s: s) -> list[Process]:
    """`B:A` is a writer B whose tar has the very bytes of A's, and whose failures are others."""
    return [(n, lambda n=n: wrapped(writer(n[0], n[2:] or None)())) for n in names]


def whole(store: Store) -> Any:
    """The stats, where tar and sidecar are those they name; else an error in words; None where there are no stats."""
    s, t, q = (store.get(n) for n in (STATS, TAR, PARQUET))
    if s is None:
        return None
    if t is None or q is None:
        return "stats over missing files"
    return s if (t[1], q[1]) == (s[1], s[2]) else f"stats of {s[1]}/{s[2]} over tar of {t[1]}, sidecar of {q[1]}"


def promises(weak: str = "") -> dict[str, Any]:
    """What `explore` is to look at."""

    def look(store: Store) -> str:
        now = whole(store)
        if isinstance(now, str):
            return now
        after, answer, done = run_alone(store, ("resume", resume), weak)
        then = whole(after)
        if not isinstance(then, tuple):
            return f"all die here, a resume leaves: {then} {answer if isinstance(answer, Exception) else ''}"
        if now is not None and then != now:
            return "all die here, a resume replaces what was committed"
        if TAR in store and any(op[-1] == ("tar", "R", "") for op in done):
            return "all die here, a resume fetches again what was stored"
        return ""

    def step(store: Store, changed: Store) -> str:
        now, then = whole(store), whole(changed)
        if not isinstance(now, tuple) or isinstance(then, str) or then == now:
            return ""
        return "" if then is not None and then == cut(now) else "a commit went or changed"

    def end(name: str, answer: Any, store: Store) -> str:
        if not isinstance(answer, tuple):
            return ""
        if name == "read":
            tar, parquet, stats = answer
            if None in answer:
                return f"a reader gets {answer}"
            return "" if (tar[1], parquet[1]) == (stats[1], stats[2]) else f"a reader gets {answer}"
        there = whole(store)
        return "" if there is not None and there[:3] == answer[:3] else f"{name} is told {answer}, there lies {there}"

    return {"look": look, "step": step, "end": end, "weak": weak}


HOLDS: list[tuple[str, Sequence[Process], str, int]] = [
    ("one writer", writers("A"), "", 5),
    ("two writers", writers("A", "B"), "", 60),
    ("two with the same tar and other failures", writers("A", "B:A"), "", 40),
    ("two that write the very same", writers("A", "A"), "", 40),
    ("two, a reader and a sweep", [*writers("A", "B:A"), READER, SWEEP], "", 5000),
    ("three", writers("A", "B", "C:A"), "", 2000),
    ("two and a resume beside them", [*writers("A", "B"), ("resume", resume)], "", 1000),
    ("two, a take-down and a reader", [*writers("A", "B"), REMOVE, READER], "", 5000),
]
SLOW: list[tuple[str, Sequence[Process], str, int]] = [
    ("three and a reader", [*writers("A", "B", "C:A"), READER], "", 10_000),
    ("three and two resumes' sweep", [*writers("A", "B", "C:A"), SWEEP], "", 10_000),
    ("four", writers("A", "B", "C:A", "D"), "", 100_000),
    ("three, each an old look once", writers("A", "B", "C:A"), "stale", 50_000),
]


@pytest.mark.parametrize(("processes", "weak", "least"), [s[1:] for s in HOLDS], ids=[s[0] for s in HOLDS])
def test_the_promises_hold_in_every_interleaving(processes, weak, least):
    states, problem, way = explore(processes, **promises(weak))
    assert not problem, "\n".join([problem, *way])
    assert states >= least, "or the scenario has become another one"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "weak", "least"), [s[1:] for s in SLOW], ids=[s[0] for s in SLOW])
def test_the_promises_hold_with_more_processes(processes, weak, least):
    test_the_promises_hold_in_every_interleaving(processes, weak, least)


# ---- mistakes made on purpose ---------------------------------------------------------------------------------------


def small_files_not_first(steps: Steps) -> Steps:
    held, result = None, None
    while True:
        try:
            op = steps.send(result)
        except StopIteration as end:
            return end.value
        if held is None and op[:2] == ("create", op[1]) and op[1].startswith(NEW):
            held, result = op, True
            continue
        result = yield op
        if op[1] == TAR and op[0] == "create":
            yield held


def changed(change: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], Any]]) -> Callable[[Steps], Steps]:
    """Operations that become others; what the process is told instead, where that is not None."""

    def wrapped(steps: Steps) -> Steps:
        result = None
        while True:
            try:
                op = steps.send(result)
            except StopIteration as end:
                return end.value
            other, answer = change(op)
            result = yield other
            result = result if answer is None else answer

    return wrapped


def put_beside(op):
    return (("replace", *op[1:]), True) if op[0] == "create" and op[1].startswith(NEW) else (op, None)


def loser_keeps_its_own(op):
    return op, True if op[:2] == ("create", TAR) else None


def small_files_overwrite(op):
    return (("replace", *op[1:]), True) if op[0] == "create" and op[1] in (PARQUET, STATS) else (op, None)


def tar_overwrites(op):
    return (("replace", *op[1:]), True) if op[:2] == ("create", TAR) else (op, None)


def stats_before_the_sidecar(steps: Steps) -> Steps:
    held, result = None, None
    while True:
        try:
            op = steps.send(result)
        except StopIteration as end:
            return end.value
        if op[:2] == ("create", PARQUET):
            held, result = op, True
            continue
        result = yield op
        if op[:2] == ("create", STATS):
            yield held


def removed_too_early(steps: Steps) -> Steps:
    ready, result = "", None
    while True:
        try:
            op = steps.send(result)
        except StopIteration as end:
            return end.value
        if op[0] == "create" and op[1].startswith(NEW):
            ready = op[1]
        result = yield op
        if op[:2] == ("create", PARQUET):
            yield ("remove", ready)


MISTAKES: dict[str, tuple[Sequence[Process], str]] = {
    "a sweep of uncommitted shards": ([*writers("A"), ("sweep", careless_sweep)], ""),
    "small files not first": (writers("A", "B", wrapped=small_files_not_first), ""),
    "put for create beside": (writers("A", "B:A", wrapped=changed(put_beside)), ""),
    "a loser brings its own small files": (writers("A", "B", wrapped=changed(loser_keeps_its_own)), ""),
    "the small file goes before the stats": (writers("A", "B", wrapped=removed_too_early), ""),
    "small files overwrite": ([*writers("A", "B", wrapped=changed(small_files_overwrite)), REMOVE], ""),
    "the tar overwrites": (writers("A", "B", wrapped=changed(tar_overwrites)), ""),
    "stats before the sidecar": (writers("A", wrapped=stats_before_the_sidecar), ""),
    "409 taken for exists": (writers("A", "B"), "409"),
    "a store that ignores If-None-Match": (writers("A", "B"), "ignores If-None-Match"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_made_on_purpose_is_found(mistake):
    processes, weak = MISTAKES[mistake]
    states, problem, way = explore(processes, **promises(weak))
    assert way, f"{mistake}: not found in {states} states ({problem})"


def test_a_take_down_that_writes_the_sidecar_first_is_found():
    """A death then leaves a picture in, of which the sidecar says that it is out."""

    def sidecar_first() -> Steps:
        steps, held, result = take_down(), [], None
        while True:
            try:
                op = steps.send(result)
            except StopIteration:
                break
            if op[0] == "replace" and op[1] != PARQUET:
                held.append(op)
                result = None
                continue
            result = str(held[-1][2]) if op[0] == "digest" and held else (yield op)
        for op in held:
            yield op

    def still_to_do(store: Store) -> str:
        done = PARQUET in store and store[PARQUET][-1] == CUT
        return "the sidecar says done, the image is there" if done and store[TAR][-1] != CUT else ""

    start = [(TAR, ("tar", "A", "")), (PARQUET, ("parquet", "A", "")), (STATS, ("stats", "A", "A", ""))]
    assert not explore([REMOVE, READER], still_to_do, start=start)[1]
    assert explore([("take-down", sidecar_first), READER], still_to_do, start=start)[1]


def test_two_take_downs_after_another_and_again_after_a_death_end_the_same():
    start = {TAR: ("tar", "A", ""), PARQUET: ("parquet", "A", ""), STATS: ("stats", "A", "A", "")}
    end, answer, done = run_alone(start, REMOVE)
    for stopped in range(len(done) + 1):
        store = start
        for op in done[:stopped]:
            store = {**store, op[1]: op[2]} if op[0] == "replace" else store
        assert run_alone(store, REMOVE)[0] == end
        assert run_alone(store, REMOVE)[1] == answer == cut(start[STATS])


def test_what_is_explored_and_what_runs_agree_on_the_bytes():
    """The codec of real files does what the model's does."""
    files = {".tar": {"size": 1, "sha256": "a"}, ".parquet": {"size": 2, "sha256": "b"}}
    stats = json_bytes({"files": files, "born": born_of(files), "made_with": "x"})
    small, back = unpack(pack([(PARQUET, b"p")], stats))
    assert (small, back) == ([(PARQUET, b"p")], stats)
    cut_files = {**files, ".tar": {"size": 1, "sha256": "c"}}
    later = json_bytes({"files": cut_files, "born": born_of(files), "made_with": "x"})
    assert born(parse_stats(later) or {}) == born(parse_stats(stats) or {}), "a take-down changes no birth"


def test_who_finds_that_the_shard_was_ended_since_its_first_look_looks_again():
    stats = ("stats", "A", "A", "")
    steps = adopt()
    assert next(steps) == ("read", STATS)
    assert steps.send(None) == ("digest", TAR)
    assert steps.send("d") == ("read", NEW + "d")
    assert steps.send(None) == ("read", STATS), "the small file went, so the stats must be there by now"
    with pytest.raises(StopIteration) as end:
        steps.send(stats)
    assert end.value.value == stats
