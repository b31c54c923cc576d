"""Every command of `carrara`, and its arguments; what they do is elsewhere.

One parser (typer) for all of them, so that an option is spelled the same everywhere: --config, --local, --redo,
--seed, --guidance-scale, --steps, --precision, --out. Settings of the run's YAML are changed by `section.key=value`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")

app = typer.Typer(
    name="carrara",
    help="From a table of image URLs and captions to a text-to-image latent diffusion model, on Ray and DeepSpeed.",
    epilog="Killed at any moment, the same command goes on from where it was. Exit codes: 0 done, 1 failed, 2 the "
    "configuration or an input cannot be used, 75 stopped and to be resumed by the same command, 130 Ctrl-C.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _from_base(path: str | None) -> str | None:
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
Run = Annotated[str, typer.Argument(metavar="RUN", help="the run's folder or URL", callback=_from_base)]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="the run's YAML (else CARRARA_CONFIG, else ./carrara.yaml)"),
]
Local = Annotated[bool, typer.Option("--local", help="in this process, without Ray")]
Redo = Annotated[bool, typer.Option("--redo", help="make again what was made with other settings")]
Adopt = Annotated[
    bool,
    typer.Option("--adopt", help="go on with what differs from the settings that a fit was begun with"),
]
Seed = Annotated[int, typer.Option("--seed")]
Precision = Annotated[str, typer.Option("--precision", help="float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
BatchSize = Annotated[int, typer.Option("--batch-size")]
# typer brings a click of its own, in which the base of all these errors has no public name.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
INTERRUPTED = 130  # what typer makes of Ctrl-C
WEIGHTS = "ema, raw, one of train.ema_stds (ema_0.050), or posthoc:0.08"


def run(arguments: Sequence[str]) -> None:
    """Run what the arguments say. Raises ConfigError where they cannot be understood, else as the command does."""
    _refuse_unknown(arguments)
    try:
        if _command().main(list(arguments), prog_name="carrara", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except USAGE_ERROR as e:
        where = e.ctx.command_path if e.ctx else "carrara"  # type: ignore[attr-defined]
        text = e.format_message().rstrip(".")  # type: ignore[attr-defined]
        raise ConfigError(f"{text[:1].lower()}{text[1:]}; `{where} --help` shows how it is called") from None
    except typer.Abort:
        raise KeyboardInterrupt from None


def names() -> list[str]:
    """The commands there are."""
    return list(_command().commands)


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def looks_for_configuration(arguments: Sequence[str]) -> bool:
    """Whether the command would look for a configuration by itself: it takes one, and names neither one nor what stands
    for it (a run, a model)."""
    name, *rest = arguments
    command = _command().commands.get(name)
    if command is None or all(p.name != "config" for p in command.params):
        return False
    given = command.make_context(name, rest, resilient_parsing=True).params
    stands_for_it = given.get("model") or any("=" not in word for word in given.get("rest") or ())
    return not given["config"] and not stands_for_it


def _refuse_unknown(arguments: Sequence[str]) -> None:
    name = next((a for a in arguments if not a.startswith("-")), None)
    if name is None or name in names():
        return
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names())}"
    raise ConfigError(f"there is no stage or command '{name}'; {hint}")


@app.callback(invoke_without_command=True)
def _carrara(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="say which version this is")] = False,
) -> None:
    if version:
        print(f"carrara {importlib.metadata.version('carrara')}")
    elif context.invoked_subcommand is None:
        raise ConfigError("name a stage or a command; `carrara --help` shows them")


# ---- the stages ----------------------------------------------------------------------------------------------


def _configured(config: str | None, rest: Sequence[str] | None, tables: bool = True) -> Any:
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


def _refuse_run(rest: Sequence[str] | None) -> list[str]:
    """The overrides; a word without `=` is refused, with what it may have been meant as."""
    for word in rest or ():
        if "=" not in word:
            hint = f"; `--rows {word}` gives a number of rows" if word.isdecimal() else ""
            raise ConfigError(f"override '{word}': write it as section.key=value, such as latents.batch_size=64{hint}")
    return list(rest or ())


def _stage(
    name: str, config: str | None, overrides: list[str] | None, local: bool, redo: bool, adopt: bool = False
) -> None:
    from orchestration import stages

    stages.run(name, _configured(config, _refuse_run(overrides)), local, redo, adopt=adopt)


@app.command(rich_help_panel="Stages")
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
    """Fetch the table's pictures into image shards.

    \b
    carrara ingest --config mine.yaml --dry-run --rows 1000000
    carrara ingest --config mine.yaml --retry transient
    """
    from orchestration import stages

    overrides = _refuse_run(overrides)
    if dry_run and retry is not None:
        raise ConfigError("--dry-run does not go with --retry")
    if rows is not None and not dry_run:
        raise ConfigError("--rows goes with --dry-run; the whole table is ingested otherwise")
    found = _configured(config, overrides)
    if dry_run:
        print(stages.dry_run(found, rows))
    elif retry is not None:
        stages.retry_ingest(found, retry, local)
    else:
        stages.run("ingest", found, local, redo, add_changed)


@app.command(rich_help_panel="Stages")
def autoencoder(
    overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False, adopt: Adopt = False
) -> None:
    """Fit a VAE on the run's pictures; skipped where the configuration names pretrained weights."""
    _stage("autoencoder", config, overrides, local, redo, adopt)


@app.command(rich_help_panel="Stages")
def clip(
    overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False, adopt: Adopt = False
) -> None:
    """Fit a CLIP on the run's pictures and captions; skipped where the configuration names pretrained weights."""
    _stage("clip", config, overrides, local, redo, adopt)


@app.command(name="score", rich_help_panel="Stages")
def score_(overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
    """Score the image shards: columns by key beside them, for latents.select and train.select."""
    _stage("score", config, overrides, local, redo)


@app.command(rich_help_panel="Stages")
def caption(overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
    """Write new captions of the image shards, by a local model or an OpenAI-compatible server."""
    _stage("caption", config, overrides, local, redo)


@app.command(rich_help_panel="A run")
def init(
    path: Annotated[str, typer.Argument(metavar="PATH", help="images, tars, parquet files or a table of URLs")],
    out: Annotated[str, typer.Option("--out", help="the YAML that is written; never over one that is there")] = (
        "carrara.yaml"
    ),
) -> None:
    """A commented configuration for what lies at a path."""
    from orchestration import init as module

    print(module.run(path, out))


@app.command(rich_help_panel="A run")
def schema() -> None:
    """The JSON schema of the configuration, from which editors complete and check it."""
    from orchestration.config import RunConfig

    found = RunConfig.model_json_schema()
    del found["required"]  # which may be given on the command line
    print(json.dumps(found, indent=1))


@app.command(rich_help_panel="A run")
def select(
    rest: RunAndOverrides = None,
    config: Config = None,
    of: Annotated[str, typer.Option("--of", help="whose rules: latents or train; by default whichever has some")] = "",
    count: Annotated[int, typer.Option("--count", min=1, max=400, help="pictures shown of what a rule takes")] = 24,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="what it always is: nothing changes")] = True,
) -> None:
    """The funnel of the rules in latents.select or train.select, and a contact sheet of what each takes."""
    from curate import funnel
    from shards.layout import RunPaths

    found = _configured(config, rest, tables=False)
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


@app.command(rich_help_panel="Stages")
def latents(overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
    """Encode the image shards into latent shards."""
    _stage("latents", config, overrides, local, redo)


@app.command(rich_help_panel="Stages")
def prior(overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
    """Draw the pictures of train.prior with train.start_from, and encode them; `train` does so first by itself."""
    _stage("prior", config, overrides, local, redo)


@app.command(rich_help_panel="Stages")
def train(
    overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False, adopt: Adopt = False
) -> None:
    """Fit the UNet on the latent shards, and export it."""
    _stage("train", config, overrides, local, redo, adopt)


@app.command(name="eval", rich_help_panel="Stages")
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

        print(evaluate_model(model, run, _refuse_run(overrides), config, local, redo))
        return
    if run is not None:
        raise ConfigError("--run goes with --model; the configuration names the run otherwise")
    _stage("eval", config, overrides, local, redo)


@app.command(name="all", rich_help_panel="Stages")
def all_(
    overrides: Overrides = None, config: Config = None, local: Local = False, redo: Redo = False, adopt: Adopt = False
) -> None:
    """All stages in order. What can be known to be wrong with any of them is said before the first begins."""
    from orchestration import stages

    found = _configured(config, _refuse_run(overrides))
    stages.check_all(found)
    for name in stages.order(found):
        stages.run(name, found, local, redo, adopt=adopt)


# ---- a run ---------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="A run")
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="show it again every two seconds, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the records as JSON, for programs")] = False,
) -> None:
    """How far each stage is: done, failed, rate, time left. Reads the run's folder alone; the cluster may be down."""
    from orchestration import status as module

    module.show(run, watch, as_json)


@app.command(rich_help_panel="A run")
def why(
    run: Run,
    shard: Annotated[str, typer.Argument(metavar="SHARD", help="a shard's number, or train, autoencoder or clip")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False,
) -> None:
    """What became of a shard: who made it when, its rows, its failed attempts, its files; or of a fit's ranks."""
    from orchestration.why import show

    print(show(run, shard, as_json))


@app.command(rich_help_panel="A run")
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


@app.command(rich_help_panel="A run")
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


@app.command(rich_help_panel="A run")
def clean(
    run: Run,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False,
) -> None:
    """Remove what processes left when they died: temporary files and folders of Carrara's own, nothing else."""
    from orchestration.care import clean as work

    work(run, dry_run)


@app.command(rich_help_panel="A run")
def remove(
    overrides: Overrides = None,
    config: Config = None,
    urls: Annotated[str | None, typer.Option("--urls", metavar="FILE", help="a file of URLs, one a line")] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="FILE", help="a file of sha256 of pictures as fetched")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="NAME", help="a host and those below it")] = None,
) -> None:
    """Take pictures out of images and latents, keep them out, and name the checkpoints that saw them."""
    from orchestration import remove as module

    print(module.run(_configured(config, _refuse_run(overrides)), urls, sha256, host))


@app.command(rich_help_panel="A run")
def plan(
    rest: RunAndOverrides = None,
    config: Config = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="rows of the whole table; by default what was ingested")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="how many workers; by default ray.latents.workers, or 1")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="pictures to measure on")] = 64,
    again: Annotated[bool, typer.Option("--again", help="measure again, rather than take what is known")] = False,
    worker_hour: Annotated[float, typer.Option("--worker-hour", help="money for an hour of one worker")] = 1.0,
    trainer_hour: Annotated[float, typer.Option("--trainer-hour", help="money for an hour of one training rank")] = 2.0,
    terabyte_month: Annotated[float, typer.Option("--terabyte-month", help="money to store a terabyte a month")] = 23.0,
    months: Annotated[float, typer.Option("--months", help="how long the latents are kept")] = 1.0,
    epochs: Annotated[float, typer.Option("--epochs", help="how often each picture is trained on")] = 1.0,
    worker_speed: Annotated[float, typer.Option("--worker-speed", help="a worker's speed, times this machine's")] = 1.0,
    trainer_speed: Annotated[
        float, typer.Option("--trainer-speed", help="a training rank's speed, times this machine's")
    ] = 1.0,
) -> None:
    """What pre-encoding stores, takes and costs; encodes a few pictures to measure that."""
    for option, value in (("worker-speed", worker_speed), ("trainer-speed", trainer_speed)):
        if value <= 0:
            raise ConfigError(f"plan: --{option} is {value:g}; it must be more than 0")
    from latents import planning
    from orchestration import stages
    from orchestration.ledger import Ledger
    from shards.layout import RunPaths

    found = _configured(config, rest, tables=False)
    (stage, pool), *_ = stages.shard_stages("latents", found)
    prices = planning.Prices(
        worker_hour=worker_hour,
        trainer_hour=trainer_hour,
        terabyte_month=terabyte_month,
        months=months,
        epochs=epochs,
        worker_speed=worker_speed,
        trainer_speed=trainer_speed,
    )
    counted = planning.image_count(stage, rows)  # type: ignore[arg-type]
    rates = planning.rates_of(stage, samples, again)  # type: ignore[arg-type]
    facts = planning.facts_of(stage)  # type: ignore[arg-type]
    print(planning.report(found.latents, counted, workers or pool.most_workers or 1, rates, prices, facts))
    ledger = Ledger(stage, RunPaths(found.run).status)
    print(f"of this run, {ledger.skipped:,} of {ledger.total:,} shards are made and {ledger.remaining:,} are left")


@app.command(rich_help_panel="A run")
def inspect(
    rest: RunAndOverrides = None,
    config: Config = None,
    count: Annotated[int, typer.Option("--count", min=1, help="samples to look at")] = 32,
    seed: Seed = 0,
) -> None:
    """Latents decoded beside their originals, and encoded again; another seed draws other samples."""
    from latents import inspection
    from orchestration import stages
    from shards.layout import RunPaths

    found = _configured(config, rest, tables=False)
    stages.check_inputs("latents", found)
    (stage, _), *_ = stages.shard_stages("latents", found)
    seen = inspection.inspect(stage, count, seed)  # type: ignore[arg-type]
    print(inspection.summary(seen))
    page = inspection.write(seen, RunPaths(found.run).reports, f"Latents of {found.run}")
    log.info("inspect: the page is %s", page)
    if seen.complaint:
        raise StageError(f"inspect: {seen.complaint}")


@app.command(rich_help_panel="A run")
def reconstruct(
    rest: RunAndOverrides = None,
    config: Config = None,
    count: Annotated[int, typer.Option("--count", min=1, help="pictures to look at")] = 1024,
) -> None:
    """What the VAE keeps of the held-out pictures: PSNR, SSIM, LPIPS, rFID, sharpness, and a page of pairs."""
    from eval import reconstruct as work
    from orchestration.parts import vae_ref
    from shards import storage
    from shards.dataset import Dataset
    from shards.layout import MANIFEST, RunPaths

    found = _configured(config, rest, tables=False)
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


# ---- a model -------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="A model")
def export(
    run: Run,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="a folder's name under RUN/checkpoints")] = "latest",
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS)] = "ema",
    precision: Annotated[str, typer.Option("--precision", help="float32 or float16")] = "float32",
    out: Annotated[
        str | None, typer.Option("--out", help="folder of the pipeline; by default RUN/model", callback=_from_base)
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="of the weights, for the model card")] = None,
) -> None:
    """A checkpoint as a diffusers pipeline."""
    from train.export import export as work

    log.info("the pipeline is %s", work(run, checkpoint, weights, precision, out, licence))


@app.command(rich_help_panel="A model")
def sample(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="what to draw; may be given several times")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="a prompt a line, or .jsonl with prompt, negative, seed"),
    ] = None,
    negative: Annotated[str, typer.Option("--negative", help="what not to draw")] = "",
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", help="pictures a prompt")] = 1,
    checkpoint: Annotated[str, typer.Option("--checkpoint")] = "latest",
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS)] = "ema",
    sampler: Annotated[str, typer.Option("--sampler")] = "ddim",
    steps: Annotated[int, typer.Option("--steps")] = 25,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale")] = 3.0,
    width: Annotated[int | None, typer.Option("--width")] = None,
    height: Annotated[int | None, typer.Option("--height")] = None,
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="a picture to start from")] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", metavar="FILE", help="white where that picture is to be drawn anew")
    ] = None,
    control: Annotated[
        str | None, typer.Option("--control", metavar="FILE", help="a control image, for a ControlNet")
    ] = None,
    control_of: Annotated[
        str | None,
        typer.Option("--control-of", metavar="FILE", help="a picture whose control image is made as in training"),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="how far the picture may change, up to 1; 0.6, or 1 for an inpainting model"),
    ] = None,
    image_guidance_scale: Annotated[
        float, typer.Option("--image-guidance-scale", help="of a model that edits: how near to stay to the picture")
    ] = 1.5,
    upscale: Annotated[
        str | None,
        typer.Option(
            "--upscale", metavar="RUN", help="draw the pictures larger with this run's upscaler", callback=_from_base
        ),
    ] = None,
    noise_level: Annotated[
        int, typer.Option("--noise-level", help="of an upscaler: noise on the small picture, of 1000")
    ] = 20,
    batch_size: BatchSize = 8,
    shard_size: Annotated[int, typer.Option("--shard-size")] = 64,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="folder for the pictures; by default RUN/samples/<digest of the request>",
            callback=_from_base,
        ),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="on Ray, as many workers as there is room for")] = False,
    redo: Redo = False,
) -> None:
    """Pictures from a checkpoint."""
    given = dict(locals())
    from eval.sample import SampleConfig, SampleStage, requests_of
    from orchestration import engine
    from orchestration.config import Pool, RayConfig
    from shards import storage
    from shards.fingerprint import digest_json
    from shards.layout import RunPaths
    from shards.settings import validate

    requests = requests_of(prompt or (), prompts, negative, seed)
    if not requests:
        raise ConfigError('sample: nothing to draw; give --prompt "..." or --prompts FILE')
    values = {k: v for k, v in given.items() if k in SampleConfig.model_fields}
    config = validate(SampleConfig, {**values, "requests": requests}, "carrara sample")
    asked = digest_json(config.model_dump(mode="json"))[:10]
    paths = RunPaths(run)
    folder = out or storage.join(run, "samples", asked)
    stage = SampleStage(config, paths, folder)

    def drive() -> None:
        engine.run(stage, paths.status, RayConfig(), Pool(), local=not ray, redo=redo)

    if ray:
        from orchestration.connection import connected

        with connected(RayConfig()):
            drive()
    else:
        drive()
    log.info("%d pictures of %s are in %s", stage.total, stage.model.name, folder)


@app.command(rich_help_panel="A model")
def edit(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="the run's folder, or a diffusers pipeline's", callback=_from_base)
    ],
    source: Annotated[str, typer.Option("--from", metavar="PROMPT", help="of the picture before")],
    target: Annotated[
        str | None, typer.Option("--to", metavar="PROMPT", help="of the picture after; by default --from's")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="WORD=FACTOR", help="a word of --to whose map is made stronger or weaker"),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="a picture to change, which --from describes")
    ] = None,
    cross_attention: Annotated[
        float, typer.Option("--cross-attention", help="share of the steps in which words look where they did before")
    ] = 0.8,
    self_attention: Annotated[
        float, typer.Option("--self-attention", help="the same for where places of the picture look")
    ] = 0.4,
    inversion_iterations: Annotated[
        int, typer.Option("--inversion-iterations", help="for each step of --image's inversion; 1: plain DDIM")
    ] = 3,
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", help="pictures, each from another noise")] = 1,
    checkpoint: Annotated[str, typer.Option("--checkpoint")] = "latest",
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS)] = "ema",
    sampler: Annotated[str, typer.Option("--sampler")] = "ddim",
    steps: Annotated[int, typer.Option("--steps")] = 25,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale")] = 3.0,
    width: Annotated[int | None, typer.Option("--width")] = None,
    height: Annotated[int | None, typer.Option("--height")] = None,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            "--out", help="folder for the pictures; by default RUN/edits/<digest of the request>", callback=_from_base
        ),
    ] = None,
    redo: Redo = False,
) -> None:
    """A picture changed by changing its prompt (prompt-to-prompt), with a sheet of where each word looks."""
    given = dict(locals())
    from eval.edit import Editor, EditRequest, weights_of
    from shards import storage
    from shards.settings import validate

    values = {k: v for k, v in given.items() if k in EditRequest.model_fields}
    values |= {"target": source if target is None else target, "weight": weights_of(weight or [])}
    editor = Editor(validate(EditRequest, values, "carrara edit"), run)
    folder = out or editor.default_folder()
    editor.draw(folder, redo)
    log.info("the edit is in %s", storage.join(folder, "sheet.html"))


@app.command(rich_help_panel="A model")
def watch(
    rest: RunAndOverrides = None,
    config: Config = None,
    local: Local = False,
    once: Annotated[bool, typer.Option("--once", help="what is due now, then end")] = False,
    forever: Annotated[bool, typer.Option("--forever", help="go on after training is done")] = False,
) -> None:
    """Evaluate checkpoints as they appear, as a job beside training."""
    from orchestration.watch import watch as work

    work(_configured(config, rest, tables=False), local, once, forever)


@app.command(rich_help_panel="A model")
def numbers(rest: RunAndOverrides = None, config: Config = None) -> None:
    """Metrics of whatever images are committed now; changes nothing."""
    from orchestration.evaluation import numbers as work

    print(work(_configured(config, rest, tables=False)))


Result = Annotated[
    str,
    typer.Argument(
        metavar="RESULT", help="its folder, or RUN:MODEL where that has one result alone", callback=_from_base
    ),
]


@app.command(rich_help_panel="A model")
def compare(
    a: Result,
    b: Result,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="write the differences to this file, too", callback=_from_base),
    ] = None,
) -> None:
    """Two results in pairs, with a verdict."""
    from orchestration.evaluation import compare as work

    print(work(a, b, json_file))


@app.command(rich_help_panel="A model")
def images(
    result: Result,
    out: Annotated[str, typer.Option("--out", help="a new folder", callback=_from_base)],
    layout: Annotated[str, typer.Option("--layout", help="files, geneval, dpg or compbench")] = "files",
) -> None:
    """A result's images as files, as a benchmark wants to have them."""
    from orchestration.evaluation import export_images

    print(export_images(result, layout, out))


@app.command(rich_help_panel="A model")
def scores(
    result: Result,
    file: Annotated[str, typer.Argument(help="JSON lines: id (or file) and score (or correct)")],
    name: Annotated[str, typer.Option("--name", help="of the metric: small letters, digits, _")],
    index: Annotated[
        str | None,
        typer.Option("--index", metavar="FILE", help="the export's index.jsonl, where files name the images"),
    ] = None,
) -> None:
    """Scores made elsewhere as a metric like any other."""
    from orchestration.evaluation import import_scores

    print(import_scores(result, name, file, index))


reference = typer.Typer(help="Real images and captions of a public set as shards.", rich_markup_mode=None)
app.add_typer(reference, name="reference", rich_help_panel="A model")


@reference.command()
def coco(
    annotations: Annotated[str, typer.Option("--annotations", metavar="FILE", help="captions_val2014.json")],
    images: Annotated[str, typer.Option("--images", metavar="DIR", help="the folder val2014", callback=_from_base)],
    out: Annotated[
        str, typer.Option("--out", help="folder for images/ (shards) and prompts.jsonl", callback=_from_base)
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="captions that are drawn")] = 30_000,
    seed: Seed = 0,
    all_: Annotated[bool, typer.Option("--all", help="the reference is all images, not those of the captions")] = False,
) -> None:
    """COCO's captions file and a folder of its images."""
    from eval import coco as module

    print(module.reference(annotations, images, out, count, seed, all_))


@reference.callback()
def _reference() -> None:
    pass


@app.command(rich_help_panel="A model")
def grid(rest: RunAndOverrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
    """Samplers x steps x guidance scales x weights on one checkpoint: every cell of eval.grid."""
    from orchestration import grid as module

    log.info("grid: the report is %s", module.run(_configured(config, rest, tables=False), local, redo))


@app.command(name="explain-fid", rich_help_panel="A model")
def explain_fid(
    generated: Annotated[str, typer.Argument(help="a folder of pictures, or of finished shards", callback=_from_base)],
    real: Annotated[str, typer.Argument(help="the same of real pictures", callback=_from_base)],
    inception: Annotated[
        str, typer.Option("--inception", metavar="FILE", help="torch-fidelity's Inception weights, or download")
    ],
    batch_size: BatchSize = 16,
    device: Device = "auto",
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="write the rows to this JSON, too", callback=_from_base),
    ] = None,
) -> None:
    """The FID of two sets of pictures as five libraries measure it, and why they differ."""
    from eval import explain
    from shards import storage

    rows = explain.explain(generated, real, inception, batch_size, device)
    print(explain.table(rows))
    if out:
        storage.write_json(out, [vars(r) for r in rows])


judge = typer.Typer(help="Blinded pairs for people, and the scores of their votes.", rich_markup_mode=None)
app.add_typer(judge, name="judge", rich_help_panel="A model")


@judge.command()
def pack(
    run: Run,
    results: Annotated[list[str], typer.Argument(metavar="[RUN:]MODEL/PROTOCOL...", help="what is to be compared")],
    out: Annotated[
        str,
        typer.Option("--out", help="folder for index.html (to give away) and key.json (to keep)", callback=_from_base),
    ],
    pairs: Annotated[int, typer.Option("--pairs")] = 60,
    seed: Seed = 0,
) -> None:
    """Write a page of pairs."""
    from eval import human
    from shards.layout import RunPaths

    paths = RunPaths(run)
    found = human.pairs(paths, results, pairs, seed)
    log.info("%d pairs: %s", len(found), human.write_pack(out, results, found, paths))
    log.info("give away index.html alone; key.json says what was what")


@judge.command()
def score(
    pack: Annotated[str, typer.Argument(help="the folder with key.json", callback=_from_base)],
    votes: Annotated[list[str], typer.Argument(help="CSV files that the page saved")],
) -> None:
    """Bradley-Terry scores of the votes."""
    from eval import human
    from shards import storage

    names_, read = human.read_votes(pack, votes)
    scores = human.bradley_terry(names_, read)
    print(human.table(scores))
    storage.write_json(str(Path(pack) / "scores.json"), human.to_json(scores))


# ---- machines ------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Machines")
def doctor(
    overrides: Overrides = None,
    config: Config = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="URL", help="prove a store by writing to it, without a configuration")
    ] = None,
) -> None:
    """What is installed, what the machine has, whether the run's store can be worked on, and known traps."""
    from orchestration.doctor import examine

    examine(config, _refuse_run(overrides), run)


@app.command(
    rich_help_panel="Machines",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    },
)
def submit(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="any command, with its arguments")],
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="URL", help="the cluster's dashboard (else RAY_API_SERVER_ADDRESS, else here)"
        ),
    ] = None,
) -> None:
    """Run any command as a Ray job, follow its log, and end as it ends.

    \b
    carrara submit --address http://127.0.0.1:8265 ingest --config mine.yaml --retry transient

    The configuration and other files that the arguments name are sent with it, and so is this Carrara.
    """
    from orchestration.submit import submit as work

    _refuse_unknown(command)
    work(command, address, looks_for_configuration)


@app.command(rich_help_panel="Machines")
def demo(
    overrides: Overrides = None,
    config: Config = "configs/demo.yaml",
    images: Annotated[int, typer.Option("--pictures", help="size of the corpus, dirt apart")] = 6000,
    heldout: Annotated[int, typer.Option("--heldout", help="size of the held-out split")] = 600,
) -> None:
    """The whole pipeline on a corpus that is drawn here; what `make demo` runs."""
    from orchestration.demo import run as work

    work(str(config), _refuse_run(overrides), images, heldout)
