"""This process's connection to Ray: to the cluster it was started in, or to a small one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.config import JOB_PACKAGE, RayConfig
from orchestration.ray_head import be_patient
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 100_000_000  # of a Ray of our own; shards never go through it


@contextlib.contextmanager
def connected(config: RayConfig) -> Iterator[None]:
    """Within, Ray is connected: to `ray.address`, else RAY_ADDRESS (which is set in jobs), else a Ray started here."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": "carrara"}
    if address and address.startswith("http"):
        raise ConfigError(
            f"the Ray address {address} is a dashboard's, to which jobs are submitted: "
            f"ray job submit --address {address} -- python orchestration/run_stage.py ..."
        )
    if JOB_PACKAGE not in os.getcwd() and Path.cwd() != ROOT:
        # Workers find this very code; a job's package and the current folder they know already.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    if not address:
        # Ray would otherwise write a token file into the home folder, which changes how later heads start.
        if "RAY_AUTH_MODE" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        be_patient()
        log.info("no Ray address given: starting a Ray on this machine for this command")
    else:
        options["address"] = address
    import ray  # only now: its library reads the mode of authentication once, as it is loaded

    try:
        ray.init(**options)
    except (ConnectionError, ray.exceptions.RayError, RuntimeError) as e:
        text = " ".join(str(e).split())[:300]
        if address is None:
            raise StageError(f"Ray does not start on this machine: {text}") from e
        raise StageError(
            f"no connection to the Ray at {address}: {text}; is it running, and are RAY_AUTH_MODE and the token the "
            "same here as there (`carrara doctor` looks at both)?"
        ) from e
    try:
        yield
    finally:
        ray.shutdown()
