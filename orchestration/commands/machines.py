"""Commands on this machine or a cluster."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from orchestration.commands.options import Config, Overrides, overrides_of

log = logging.getLogger("carrara")


app = typer.Typer()


@app.command()
def doctor(
    overrides: Overrides = None,
    config: Config = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="URL", help="prove a store by writing to it, without a configuration")
    ] = None,
) -> None:
    """What is installed, what the machine has, whether the run's store can be worked on, and known traps."""
    from orchestration.doctor import examine

    examine(config, overrides_of(overrides), run)


@app.command()
def demo(
    overrides: Overrides = None,
    config: Config = "configs/demo.yaml",
    images: Annotated[int, typer.Option("--pictures", help="size of the corpus, dirt apart")] = 6000,
    heldout: Annotated[int, typer.Option("--heldout", help="size of the held-out split")] = 600,
) -> None:
    """The whole pipeline on a corpus that is drawn here; what `make demo` runs."""
    from orchestration.demo import run as work

    work(str(config), overrides_of(overrides), images, heldout)
