"""What commands share: their options, and the configuration that these lead to."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from shards.settings import ConfigError

log = logging.getLogger("carrara")


def from_base(path: str | None) -> str | None:
    """A path as meant from where the command was given, which in a Ray job is not the current folder."""
    from orchestration.config import base_folder
    from shards.settings import absolute

    base, why = base_folder()
    return path if path is None or why == "the current folder" else absolute(path, base)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="settings to change, such as latents.batch_size=64"),
]
RunAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [section.key=value]...",
        help="the run's folder, whose configuration is taken where none is given; settings to change",
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="the run's folder or URL", callback=from_base)]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="the run's YAML (else CARRARA_CONFIG, else ./carrara.yaml)"),
]
Local = Annotated[bool, typer.Option("--local", help="in this process, without Ray")]
Redo = Annotated[bool, typer.Option("--redo", help="make again what was made with other settings")]
Adopt = Annotated[
    bool, typer.Option("--adopt", help="go on with what differs from the settings that a fit was begun with")
]
Seed = Annotated[int, typer.Option("--seed")]
Precision = Annotated[str, typer.Option("--precision", help="float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
BatchSize = Annotated[int, typer.Option("--batch-size")]
WEIGHTS = "ema, raw, one of train.ema_stds (ema_0.050), or posthoc:0.08"


def configured(config: str | None, rest: Sequence[str] | None, tables: bool = True) -> Any:
    """The run's configuration; `rest` is overrides, before them perhaps the run."""
    from orchestration.config import base_folder, find_config, load, load_of_run

    given = list(rest or ())
    base, why = base_folder()
    named = given.pop(0) if given and "=" not in given[0] else None
    if named is not None and config is None and (found := load_of_run(named, given, base)) is not None:
        log.info("the configuration that run %s was made with", found.run)
        return found
    path = find_config(config, base)
    found = load(path, [*([f"run={json.dumps(named)}"] if named else []), *given], base, tables)
    log.info("configuration %s; run %s (relative paths are from %s, %s)", path, found.run, base, why)
    return found


def overrides_of(rest: Sequence[str] | None) -> list[str]:
    """The overrides; a word without `=` is refused, with what it may have been meant as."""
    for word in rest or ():
        if "=" not in word:
            hint = f"; `--rows {word}` gives a number of rows" if word.isdecimal() else ""
            raise ConfigError(f"override '{word}': write it as section.key=value, such as latents.batch_size=64{hint}")
    return list(rest or ())
