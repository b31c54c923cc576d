"""The walk through the files of a table on Ray: one task a file, their results in order (shards/plan.py: Each)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

TASKS_A_CPU = 4  # tasks under way for each CPU of the cluster: the driver takes their results in order


def _call(function: Callable[[Any], Any], unit: Any) -> Any:
    return function(unit)


def on_ray(function: Callable[[Any], Any], units: Iterable[Any]) -> Iterator[Any]:
    """Like the built-in map, on the cluster's CPUs; a bounded number is under way. `ray.init` was called before."""
    import ray

    remote = ray.remote(num_cpus=1, max_retries=3)(_call)
    shared = ray.put(function)
    at_once = max(TASKS_A_CPU, TASKS_A_CPU * int(ray.cluster_resources().get("CPU", 1)))
    under_way: deque[Any] = deque()
    try:
        for unit in units:
            if len(under_way) == at_once:
                yield ray.get(under_way.popleft())
            under_way.append(remote.remote(shared, unit))
        while under_way:
            yield ray.get(under_way.popleft())
    finally:
        for reference in under_way:
            ray.cancel(reference)
