"""A small model checker: every interleaving of a few processes over one store, breadth first, so that the first way to
a broken promise is the shortest.

A process is (name, function that gives a generator of storage operations), as shards/protocol.py has them. A state is
what lies in the store and what each process has seen so far; a process is run again from its start with what it has
seen, so that it may be any Python. One that dies is one that is not scheduled any more: deaths at every step need no
steps of their own. What is looked at is up to the caller, by functions that return "" or what is wrong.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shards.protocol import Steps, TryAgain

Process = tuple[str, Callable[[], Steps]]
Store = dict[str, Any]

STALE = "not there, by an old look"  # what a process has seen; it is told None


def apply(store: Store, op: tuple[Any, ...], weak: str = "") -> tuple[Store, Any]:
    """The store (not changed) after an operation, and the operation's result. Each is one atomic step."""
    kind, name, *data = op
    if kind == "read":
        return store, store.get(name)
    if kind == "digest":
        return store, str(store[name]) if name in store else None
    if kind == "list":
        return store, tuple(sorted(n for n in store if n.startswith(name)))
    if kind == "remove":
        return {k: v for k, v in store.items() if k != name}, None
    if kind == "create" and name in store and weak != "ignores If-None-Match":
        return store, False
    return {**store, name: data[0]}, True if kind == "create" else None


def ahead(process: Process, seen: tuple[Any, ...], known: dict[Any, Any]) -> tuple[Any, ...]:
    """The next operation of a process that has seen these results, or ("end", what it returned)."""
    key = (process[0], seen)
    if key not in known:
        steps = process[1]()
        try:
            op = next(steps)
            for result in seen:
                op = steps.send(None if result == STALE else result)
            known[key] = op
        except StopIteration as stop:
            known[key] = ("end", stop.value)
        except TryAgain as e:
            known[key] = ("end", e)
    return known[key]


def run_alone(store: Store, process: Process, weak: str = "") -> tuple[Store, Any, list[tuple[Any, ...]]]:
    """What one process makes of a store in which nobody else moves: (store, what it returned, its operations)."""
    known: dict[Any, Any] = {}
    seen: tuple[Any, ...] = ()
    done: list[tuple[Any, ...]] = []
    while (op := ahead(process, seen, known))[0] != "end":
        store, result = apply(store, op, weak)
        seen, done = (*seen, result), [*done, op]
    return store, op[1], done


def explore(
    processes: Sequence[Process],
    look: Callable[[Store], str],
    step: Callable[[Store, Store], str] | None = None,
    end: Callable[[str, Any, Store], str] | None = None,
    final: Callable[[Store, dict[str, Any]], str] | None = None,
    weak: str = "",
    start: Iterable[tuple[str, Any]] = (),
    limit: int = 4_000_000,
) -> tuple[int, str, list[str]]:
    """(states, what is wrong or "", the way there).

    look(store): in every state. step(store, store after): of every operation. end(name, returned, store): when a
    process ends. final(store, {name: returned}): when all have ended. weak: "ignores If-None-Match"; "409": a create
    may say False once a process although nothing is there, as where a store's "busy" is taken for that; "stale":
    a read may say once a process that a file is not there which is, as NFS clients do that looked for it before.
    """
    known: dict[Any, Any] = {}
    looked: dict[Any, str] = {}
    first = (frozenset(start), tuple(() for _ in processes))
    before: dict[Any, Any] = {first: None}
    queue = collections.deque([first])

    def way(state: Any, last: str = "") -> list[str]:
        steps = [last] if last else []
        while before[state] is not None:
            state, text = before[state]
            steps.append(text)
        return steps[::-1]

    while queue:
        state = queue.popleft()
        store, seens = dict(state[0]), state[1]
        if state[0] not in looked:
            looked[state[0]] = look(store)
        if looked[state[0]]:
            return len(before), looked[state[0]], way(state)
        ops = [ahead(p, seen, known) for p, seen in zip(processes, seens, strict=True)]
        if final and all(op[0] == "end" for op in ops):
            problem = final(store, {p[0]: op[1] for p, op in zip(processes, ops, strict=True)})
            if problem:
                return len(before), problem, way(state)
        for i, (process, op) in enumerate(zip(processes, ops, strict=True)):
            if op[0] == "end":
                continue
            results = [apply(store, op, weak)]
            if weak == "409" and op[0] == "create" and False not in seens[i]:
                results.append((store, False))
            if weak == "stale" and op[0] in ("read", "digest") and op[1] in store and STALE not in seens[i]:
                results.append((store, STALE))
            for changed, result in results:
                seen = (*seens[i], result)
                text = f"{process[0]}: {op[0]} {op[1]}" + ("" if result is None else f" -> {result}")
                problem = step(store, changed) if step else ""
                last = ahead(process, seen, known)
                if not problem and end and last[0] == "end":
                    problem = end(process[0], last[1], changed)
                if problem:
                    return len(before), problem, way(state, text)
                following = (frozenset(changed.items()), (*seens[:i], seen, *seens[i + 1 :]))
                if following not in before:
                    before[following] = (state, text)
                    queue.append(following)
        if len(before) > limit:
            return len(before), "not ended: too many states", []
    return len(before), "", []
