"""A small model checker: every interleaving of a few processes over one store, each operation one atomic step, breadth
first, so that the first way to a broken promise is the shortest. A process that dies is one that is not scheduled any
more, so deaths at every step need no steps of their own.

A process is a function that gives a generator of storage operations (orchestration/lease.py); it is run again from its
start with what it has seen so far.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any


def apply(store: Mapping[str, Any], operation: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The store after an operation, and what the operation answers."""
    kind, name, *data = operation
    if kind == "read":
        return dict(store), store.get(name)
    if kind == "list":
        return dict(store), sorted(store)
    if kind == "remove":
        return {k: v for k, v in store.items() if k != name}, None
    if kind == "put":
        return {**store, name: data[0]}, None
    assert kind == "create"
    return (dict(store), False) if name in store else ({**store, name: data[0]}, True)


def explore(
    processes: Mapping[str, Callable[[], Any]],
    look: Callable[[dict[str, Any], dict[str, Any]], str],
    start: Mapping[str, Any],
) -> tuple[int, str, list[str]]:
    """(states, what is wrong or "", the way there). look(store, {process: what it returned}) judges every state."""
    names = list(processes)
    known: dict[tuple[str, tuple[Any, ...]], tuple[Any, ...]] = {}

    def ahead(name: str, seen: tuple[Any, ...]) -> tuple[Any, ...]:
        if (name, seen) not in known:
            generator = processes[name]()
            try:
                operation = next(generator)
                for answer in seen:
                    operation = generator.send(list(answer) if isinstance(answer, tuple) else answer)
                known[name, seen] = operation
            except StopIteration as stop:
                known[name, seen] = ("end", stop.value)
        return known[name, seen]

    first = (frozenset(start.items()), tuple(() for _ in names))
    before: dict[Any, tuple[Any, str] | None] = {first: None}
    queue = collections.deque([first])
    while queue:
        state = queue.popleft()
        store, seens = dict(state[0]), state[1]
        operations = [ahead(name, seen) for name, seen in zip(names, seens, strict=True)]
        ended = {n: op[1] for n, op in zip(names, operations, strict=True) if op[0] == "end"}
        if problem := look(store, ended):
            steps: list[str] = []
            while before[state] is not None:
                state, text = before[state]
                steps.append(text)
            return len(before), problem, steps[::-1]
        for i, (name, operation) in enumerate(zip(names, operations, strict=True)):
            if operation[0] == "end":
                continue
            changed, answer = apply(store, operation)
            seen = (*seens[i], tuple(answer) if isinstance(answer, list) else answer)
            following = (frozenset(changed.items()), (*seens[:i], seen, *seens[i + 1 :]))
            if following not in before:
                before[following] = (state, f"{name}: {operation[:2]} -> {answer}")
                queue.append(following)
    return len(before), "", []
