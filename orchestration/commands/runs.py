"""Commands on a run's folder: its configuration, its state, its care, what it will cost."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Annotated

import typer

from orchestration.commands.options import Config, Overrides, Run, RunAndOverrides, Seed, configured, overrides_of
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")


app = typer.Typer()


@app.command()
def init(
    path: Annotated[str, typer.Argument(metavar="PATH", help="images, tars, parquet files or a table of URLs")],
    out: Annotated[str, typer.Option("--out", help="the YAML that is written; never over one that is there")] = (
        "carrara.yaml"
    ),
) -> None:
    """A commented configuration for what lies at a path."""
    from orchestration import init as module

    print(module.run(path, out))


@app.command()
def schema() -> None:
    """The JSON schema of the configuration, from which editors complete and check it."""
    from orchestration.config import RunConfig

    found = RunConfig.model_json_schema()
    del found["required"]  # which may be given on the command line
    print(json.dumps(found, indent=1))


@app.command()
def select(
    rest: RunAndOverrides = None,
    config: Config = None,
    of: Annotated[str, typer.Option("--of", help="whose rules: latents or train; by default whichever has some")] = "",
    count: Annotated[int, typer.Option("--count", min=1, max=400, help="images shown of what a rule takes")] = 24,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="what it always is: nothing changes")] = True,
) -> None:
    """The funnel of the rules in latents.select or train.select, and a contact sheet of what each takes."""
    from curate import funnel
    from shards.layout import RunPaths

    found = configured(config, rest, tables=False)
    if of not in ("", "latents", "train"):
        raise ConfigError(f"select: --of is '{of}'; it is latents or train")
    of = of or ("latents" if found.latents.select else "train")
    rules = list(getattr(found, of).select)
    if not rules:
        raise ConfigError(f"select: {of}.select has no rules")
    paths = RunPaths(found.run)
    steps = funnel.funnel(paths.images, found.run, rules, count, seed)
    print(funnel.text(steps))
    page = funnel.write(steps, paths.reports, f"{of}.select of {found.run}", f"select-{of}")
    log.info("select: the contact sheet is %s", page)


@app.command()
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="show it again every two seconds, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the records as JSON, for programs")] = False,
) -> None:
    """How far each stage is: done, failed, rate, time left. Reads the run's folder alone; the cluster may be down."""
    from orchestration import status as module

    module.show(run, watch, as_json)


@app.command()
def why(
    run: Run,
    shard: Annotated[str, typer.Argument(metavar="SHARD", help="a shard's number, or train, autoencoder or clip")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False,
) -> None:
    """What became of a shard: who made it when, its rows, its failed attempts, its files; or of a fit's ranks."""
    from orchestration.why import show

    print(show(run, shard, as_json))


@app.command()
def serve(
    run: Run,
    host: Annotated[str, typer.Option("--host", help="address to listen at; others than this machine's see it")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one")] = 8270,
) -> None:
    """A live page of a run, for whoever has the link that is printed. Reads the run's folder or bucket alone."""
    from orchestration.serve import serve as work

    work(run, host, port)


@app.command()
def verify(
    run: Run,
    contents: Annotated[
        bool, typer.Option("--deep", help="read every file and compare its sha256; else sizes alone")
    ] = False,
    discard: Annotated[
        bool,
        typer.Option("--discard", help="delete damaged shards, for their stage to make again; nothing else may run"),
    ] = False,
) -> None:
    """Check every shard and checkpoint against what was committed, and say what to run where one is damaged."""
    from orchestration.care import verify as work

    work(run, contents, discard)


@app.command()
def clean(
    run: Run, dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False
) -> None:
    """Remove what processes left when they died: temporary files and folders of Carrara's own, nothing else."""
    from orchestration.care import clean as work

    work(run, dry_run)


@app.command()
def remove(
    overrides: Overrides = None,
    config: Config = None,
    urls: Annotated[str | None, typer.Option("--urls", metavar="FILE", help="a file of URLs, one a line")] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="FILE", help="a file of sha256 of images as fetched")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="NAME", help="a host and those below it")] = None,
) -> None:
    """Take images out of a run's shards, keep them out, and name the checkpoints that saw them."""
    from orchestration import remove as module

    print(module.run(configured(config, overrides_of(overrides)), urls, sha256, host))


@app.command()
def plan(
    rest: RunAndOverrides = None,
    config: Config = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="rows of the whole table; by default what was ingested")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="how many workers; by default ray.latents.workers, or 1")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="images to measure on")] = 64,
    again: Annotated[bool, typer.Option("--again", help="measure again, rather than take what is known")] = False,
    worker_hour: Annotated[float, typer.Option("--worker-hour", help="money for an hour of one worker")] = 1.0,
    trainer_hour: Annotated[float, typer.Option("--trainer-hour", help="money for an hour of one training rank")] = 2.0,
    terabyte_month: Annotated[float, typer.Option("--terabyte-month", help="money to store a terabyte a month")] = 23.0,
    months: Annotated[float, typer.Option("--months", help="how long the latents are kept")] = 1.0,
    epochs: Annotated[float, typer.Option("--epochs", help="how often each image is trained on")] = 1.0,
    worker_speed: Annotated[float, typer.Option("--worker-speed", help="a worker's speed, times this machine's")] = 1.0,
    trainer_speed: Annotated[
        float, typer.Option("--trainer-speed", help="a training rank's speed, times this machine's")
    ] = 1.0,
) -> None:
    """What pre-encoding stores, takes and costs; encodes a few images to measure that."""
    given = dict(locals())
    for option, value in (("worker-speed", worker_speed), ("trainer-speed", trainer_speed)):
        if value <= 0:
            raise ConfigError(f"plan: --{option} is {value:g}; it must be more than 0")
    from latents import planning
    from orchestration import parts
    from orchestration.ledger import Ledger
    from shards.layout import RunPaths

    found = configured(config, rest, tables=False)
    stage = parts.latents_stage(found)
    prices = planning.Prices(**{f.name: given[f.name] for f in dataclasses.fields(planning.Prices)})
    counted = planning.image_count(stage, rows)
    rates = planning.rates_of(stage, samples, again)
    facts = planning.facts_of(stage)
    print(planning.report(found.latents, counted, workers or found.ray.latents.most_workers or 1, rates, prices, facts))
    ledger = Ledger(stage, RunPaths(found.run).status)
    print(f"of this run, {ledger.skipped:,} of {ledger.total:,} shards are made and {ledger.remaining:,} are left")


@app.command()
def inspect(
    rest: RunAndOverrides = None,
    config: Config = None,
    count: Annotated[int, typer.Option("--count", min=1, help="samples to look at")] = 32,
    seed: Seed = 0,
) -> None:
    """Latents decoded beside their originals, and encoded again; another seed draws other samples."""
    from latents import inspection
    from orchestration import parts
    from shards.layout import RunPaths

    found = configured(config, rest, tables=False)
    parts.check_inputs("latents", found)
    stage = parts.latents_stage(found)
    seen = inspection.inspect(stage, count, seed)
    print(inspection.summary(seen))
    page = inspection.write(seen, RunPaths(found.run).reports, f"Latents of {found.run}")
    log.info("inspect: the page is %s", page)
    if seen.complaint:
        raise StageError(f"inspect: {seen.complaint}")


@app.command()
def reconstruct(
    rest: RunAndOverrides = None,
    config: Config = None,
    count: Annotated[int, typer.Option("--count", min=1, help="images to look at")] = 1024,
) -> None:
    """What the VAE keeps of the held-out images: PSNR, SSIM, LPIPS, rFID, sharpness, and a page of pairs."""
    from eval import reconstruct as work
    from orchestration.parts import vae_ref
    from shards import storage
    from shards.dataset import Dataset
    from shards.layout import MANIFEST, RunPaths

    found = configured(config, rest, tables=False)
    paths, lpips = RunPaths(found.run), found.autoencoder.perceptual
    if not storage.exists(storage.join(paths.heldout, MANIFEST)):
        raise ConfigError(
            f"reconstruct: there is no held-out set in {paths.heldout}; set ingest.heldout_fraction or "
            "ingest.heldout_table, and run ingest"
        )
    seen = work.measure(
        Dataset.open(paths.heldout),
        vae_ref(found),
        found.latents.resolution,
        count,
        lpips and lpips.weights,
        found.eval.inception,
        found.latents.device,
    )
    print(work.summary(seen))
    log.info("reconstruct: the page is %s", work.write(seen, paths.reports, f"The VAE of {found.run}"))
