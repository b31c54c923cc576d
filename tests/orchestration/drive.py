"""Runs the toy stage from the command line, as a driver process of its own that tests can kill.

python -m tests.orchestration.drive FOLDER '{"shards": 12, ...}' [local] [redo]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from orchestration.config import Pool, RayConfig
from orchestration.engine import run
from orchestration.run_stage import guarded
from tests.orchestration.toy import ToyStage


def toy(folder: str | Path, **options: Any) -> ToyStage:
    options["misbehave"] = tuple((int(i), str(how)) for i, how in options.get("misbehave", ()))
    return ToyStage(f"{folder}/toy", f"{folder}/calls", **options)


def main() -> int:
    folder, options, *words = sys.argv[1:]
    settings = json.loads(options)
    pool = Pool(**{k: settings.pop(k) for k in list(settings) if k in Pool.model_fields})
    config = RayConfig(
        **{"back_off_s": 0.05, **{k: settings.pop(k) for k in list(settings) if k in RayConfig.model_fields}}
    )
    stage = toy(folder, **settings)
    local, redo = "local" in words, "redo" in words

    def work() -> None:
        if local:
            run(stage, f"{folder}/status", config, pool, local=True, redo=redo)
            return
        from orchestration.connection import connected

        with connected(config):
            run(stage, f"{folder}/status", config, pool, redo=redo)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
