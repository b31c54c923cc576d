"""The stages of a run, and all of them in order."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from orchestration.commands.options import Adopt, Config, Local, Overrides, Redo, configured, overrides_of
from shards.settings import ConfigError

log = logging.getLogger("carrara")


app = typer.Typer()


def _stage(
    name: str, config: str | None, overrides: list[str] | None, local: bool, redo: bool, adopt: bool = False
) -> None:
    from orchestration import stages

    stages.run(name, configured(config, overrides_of(overrides)), local, redo, adopt=adopt)


@app.command()
def ingest(
    overrides: Overrides = None,
    config: Config = None,
    local: Local = False,
    redo: Redo = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="what the filters keep and what it costs; no fetch")
    ] = False,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="with --dry-run: look at about so many rows")
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option("--retry", metavar="CODES", help="fetch failed rows again: transient, or error codes with commas"),
    ] = None,
    add_changed: Annotated[
        bool,
        typer.Option("--add-changed", help="where a file of the table changed, take its rows anew as further shards"),
    ] = False,
) -> None:
    """Fetch the table's images into image shards.

    \b
    carrara ingest --config mine.yaml --dry-run --rows 1000000
    carrara ingest --config mine.yaml --retry transient
    """
    from orchestration import stages

    overrides = overrides_of(overrides)
    if dry_run and retry is not None:
        raise ConfigError("--dry-run does not go with --retry")
    if rows is not None and not dry_run:
        raise ConfigError("--rows goes with --dry-run; the whole table is ingested otherwise")
    found = configured(config, overrides)
    if dry_run:
        print(stages.dry_run(found, rows))
    elif retry is not None:
        stages.retry_ingest(found, retry, local)
    else:
        stages.run("ingest", found, local, redo, add_changed)


FITS = ("autoencoder", "clip", "train")  # which may --adopt
# Stages whose commands have no option of their own.
PLAIN = {
    "autoencoder": "Fit a VAE on the run's images; skipped where the configuration names pretrained weights.",
    "clip": "Fit a CLIP on the run's images and captions; skipped where the configuration names pretrained weights.",
    "score": "Score the image shards: columns by key beside them, for latents.select and train.select.",
    "caption": "Write new captions of the image shards, by a local model or an OpenAI-compatible server.",
    "control": "Make control images of the image shards (depth, segmentation, pose), for train.control.images.",
    "latents": "Encode the image shards into latent shards.",
    "prior": "Generate train.prior's images with train.start_from, and encode them; `train` does so first by itself.",
    "train": "Fit the UNet on the latent shards, and export it.",
}


def _add(name: str, does: str) -> None:
    def stage(overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
        _stage(name, config, overrides, local, redo)

    def fit(
        overrides: Overrides = None,
        config: Config = None,
        local: Local = False,
        redo: Redo = False,
        adopt: Adopt = False,
    ) -> None:
        _stage(name, config, overrides, local, redo, adopt)

    app.command(name=name, help=does)(fit if name in FITS else stage)


for _name, _does in PLAIN.items():
    _add(_name, _does)


@app.command(name="eval")
def eval_(
    overrides: Overrides = None,
    config: Config = None,
    local: Local = False,
    redo: Redo = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="FOLDER", help="any diffusers pipeline, a folder or a hub name")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="with --model: where its results go")] = None,
) -> None:
    """Generate images from a checkpoint or any pipeline, measure them, and write the report.

    \b
    carrara eval --config mine.yaml
    carrara eval --model FOLDER --run runs/theirs eval.prompts_file=prompts.jsonl
    """
    if model is not None:
        from orchestration.evaluation import evaluate_model

        print(evaluate_model(model, run, overrides_of(overrides), config, local, redo))
        return
    if run is not None:
        raise ConfigError("--run goes with --model; the configuration names the run otherwise")
    _stage("eval", config, overrides, local, redo)


@app.command(name="all")
def all_(
    overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False, adopt: Adopt = False
) -> None:
    """All stages in order. What can be known to be wrong with any of them is said before the first begins."""
    from orchestration import parts, stages

    found = configured(config, overrides_of(overrides))
    stages.check_all(found)
    for name in parts.order(found):
        stages.run(name, found, local, redo, adopt=adopt)
