"""Ray's own command line (`ray start ...`), more patient with its parts: python -m orchestration.ray_head start ...

Ray gives a node 30 seconds to register, a constant in its code. Two dozen Python processes start at that
moment, so on two busy cores, or the first time after an installation, it takes longer, and Ray gives up.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil

PATIENCE_S = 180.0


def be_patient() -> None:
    """From now on in this process, let a starting node take its time."""
    from ray._private import services

    impatient = services.get_node

    def get_node(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return impatient(*args, **kwargs)
            except RuntimeError:  # not registered yet
                if time.monotonic() > deadline or not _raylet_lives():
                    raise
                time.sleep(0.3)

    services.get_node = get_node


def keep_apart() -> None:
    """From now on in this process, start a Ray's parts in sessions of their own: a signal to our process group, as
    `timeout`, Slurm and systemd send it, is for us alone to act on. The kernel still ends them when we die."""
    from ray._private import services

    plain = services.ConsolePopen

    class Apart(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "start_new_session": True})

    if plain.__name__ != Apart.__name__:
        services.ConsolePopen = Apart


def _raylet_lives() -> bool:
    """Whether a node's own process, a child of this one, is there."""
    children = psutil.Process().children()
    return any(c.name() == "raylet" and c.status() != psutil.STATUS_ZOMBIE for c in children)


if __name__ == "__main__":
    from ray.scripts.scripts import main

    be_patient()
    sys.exit(main())
