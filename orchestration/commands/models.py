"""Commands on what a run has trained: images from it, exports, evaluations, comparisons."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from orchestration.commands.options import (
    WEIGHTS,
    BatchSize,
    Config,
    Device,
    Local,
    Precision,
    Redo,
    Run,
    RunAndOverrides,
    Seed,
    configured,
    from_base,
)
from shards.settings import ConfigError

log = logging.getLogger("carrara")


app = typer.Typer()

# Options of several commands that draw images.
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="a folder's name under RUN/checkpoints")]
Weights = Annotated[str, typer.Option("--weights", help=WEIGHTS)]
Model = Annotated[
    str, typer.Argument(metavar="RUN", help="the run's folder, or a diffusers pipeline's", callback=from_base)
]
CrossAttention = Annotated[
    float, typer.Option("--cross-attention", help="share of the steps in which words look where they did before")
]
SelfAttention = Annotated[float, typer.Option("--self-attention", help="the same for where places of the image look")]


@app.command()
def export(
    run: Run,
    checkpoint: Checkpoint = "latest",
    weights: Weights = "ema",
    precision: Annotated[str, typer.Option("--precision", help="float32 or float16")] = "float32",
    out: Annotated[
        str | None, typer.Option("--out", help="folder of the pipeline; by default RUN/model", callback=from_base)
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="of the weights, for the model card")] = None,
) -> None:
    """A checkpoint as a diffusers pipeline."""
    from train.export import export as work

    log.info("the pipeline is %s", work(run, checkpoint, weights, precision, out, licence))


@app.command()
def sample(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="what to generate; may be given several times")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="a prompt a line, or .jsonl with prompt, negative, seed"),
    ] = None,
    negative: Annotated[str, typer.Option("--negative", help="what not to generate")] = "",
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", help="images a prompt")] = 1,
    checkpoint: Checkpoint = "latest",
    weights: Weights = "ema",
    sampler: str = "ddim",
    steps: int = 25,
    guidance_scale: float = 3.0,
    width: int | None = None,
    height: int | None = None,
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="an image to start from")] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", metavar="FILE", help="white where that image is to be generated again")
    ] = None,
    control: Annotated[
        str | None, typer.Option("--control", metavar="FILE", help="a control image, for a ControlNet")
    ] = None,
    control_of: Annotated[
        str | None,
        typer.Option("--control-of", metavar="FILE", help="an image whose control image is made as in training"),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="how far the image may change, up to 1; 0.6, or 1 for an inpainting model"),
    ] = None,
    image_guidance_scale: Annotated[
        float, typer.Option("--image-guidance-scale", help="of a model that edits: how near to stay to the image")
    ] = 1.5,
    upscale: Annotated[
        str | None,
        typer.Option(
            "--upscale", metavar="RUN", help="enlarge the images with this run's upscaler", callback=from_base
        ),
    ] = None,
    noise_level: Annotated[
        int, typer.Option("--noise-level", help="of an upscaler: noise on the small image, of 1000")
    ] = 20,
    batch_size: BatchSize = 8,
    shard_size: int = 64,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            "--out", help="folder for the images; by default RUN/samples/<digest of the request>", callback=from_base
        ),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="on Ray, as many workers as there is room for")] = False,
    redo: Redo = False,
) -> None:
    """Images from a checkpoint."""
    given = dict(locals())
    from eval.sample import SampleConfig, SampleStage, requests_of
    from orchestration import engine
    from orchestration.config import Pool, RayConfig
    from orchestration.connection import connected
    from shards import storage
    from shards.fingerprint import digest_json
    from shards.layout import RunPaths
    from shards.settings import validate

    requests = requests_of(prompt or (), prompts, negative, seed)
    if not requests:
        raise ConfigError('sample: nothing to generate; give --prompt "..." or --prompts FILE')
    values = {k: v for k, v in given.items() if k in SampleConfig.model_fields}
    config = validate(SampleConfig, {**values, "requests": requests}, "carrara sample")
    asked = digest_json(config.model_dump(mode="json"))[:10]
    paths = RunPaths(run)
    folder = out or storage.join(run, "samples", asked)
    stage = SampleStage(config, paths, folder)

    with connected(RayConfig(), local=not ray):
        engine.run(stage, paths.status, RayConfig(), Pool(), local=not ray, redo=redo)
    log.info("%d images of %s are in %s", stage.total, stage.model.name, folder)


@app.command()
def edit(
    run: Model,
    source: Annotated[str, typer.Option("--from", metavar="PROMPT", help="of the image before")],
    target: Annotated[
        str | None, typer.Option("--to", metavar="PROMPT", help="of the image after; by default --from's")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="WORD=FACTOR", help="a word of --to whose map is made stronger or weaker"),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="an image to change, which --from describes")
    ] = None,
    cross_attention: CrossAttention = 0.8,
    self_attention: SelfAttention = 0.4,
    inversion_iterations: Annotated[
        int, typer.Option("--inversion-iterations", help="for each step of --image's inversion; 1: plain DDIM")
    ] = 3,
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", help="images, each from another noise")] = 1,
    checkpoint: Checkpoint = "latest",
    weights: Weights = "ema",
    sampler: str = "ddim",
    steps: int = 25,
    guidance_scale: float = 3.0,
    width: int | None = None,
    height: int | None = None,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            "--out", help="folder for the images; by default RUN/edits/<digest of the request>", callback=from_base
        ),
    ] = None,
    redo: Redo = False,
) -> None:
    """An image changed by changing its prompt (prompt-to-prompt), with a sheet of where each word looks."""
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


@app.command(name="edit-table")
def edit_table(
    model: Model,
    table: Annotated[str, typer.Option("--table", metavar="FILE", help="JSON lines of input, edit, output")],
    out: Annotated[str, typer.Option("--out", help="folder for parquet files of triples", callback=from_base)],
    cross_attention: CrossAttention = 0.8,
    self_attention: SelfAttention = 0.4,
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", help="triples of each line, each from another noise")] = 1,
    checkpoint: Checkpoint = "latest",
    weights: Weights = "ema",
    sampler: str = "ddim",
    steps: int = 25,
    guidance_scale: float = 3.0,
    width: int | None = None,
    height: int | None = None,
    precision: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Images before and after, generated from a table of edited captions, to train editing by instruction on."""
    given = dict(locals())
    from eval.edit import DrawnPairs
    from eval.triples import draw_table
    from shards.settings import validate

    values = {k: v for k, v in given.items() if k in DrawnPairs.model_fields}
    total, failed = draw_table(validate(DrawnPairs, values, "carrara edit-table"), model, table, out)
    log.info("%d triples are in %s%s", total - failed, out, f"; {failed} could not be generated" if failed else "")


@app.command()
def watch(
    rest: RunAndOverrides = None,
    config: Config = None,
    local: Local = False,
    once: Annotated[bool, typer.Option("--once", help="what is due now, then end")] = False,
    forever: Annotated[bool, typer.Option("--forever", help="go on after training is done")] = False,
) -> None:
    """Evaluate checkpoints as they appear, as a job beside training."""
    from orchestration.watch import watch as work

    work(configured(config, rest, tables=False), local, once, forever)


@app.command()
def numbers(rest: RunAndOverrides = None, config: Config = None) -> None:
    """Metrics of whatever images are committed now; changes nothing."""
    from orchestration.evaluation import numbers as work

    print(work(configured(config, rest, tables=False)))


Result = Annotated[
    str,
    typer.Argument(
        metavar="RESULT", help="its folder, or RUN:MODEL where that has one result alone", callback=from_base
    ),
]


@app.command()
def compare(
    a: Result,
    b: Result,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="write the differences to this file, too", callback=from_base),
    ] = None,
) -> None:
    """Two results in pairs, with a verdict."""
    from orchestration.evaluation import compare as work

    print(work(a, b, json_file))


@app.command()
def images(
    result: Result,
    out: Annotated[str, typer.Option("--out", help="a new folder", callback=from_base)],
    layout: Annotated[str, typer.Option("--layout", help="files, geneval, dpg or compbench")] = "files",
) -> None:
    """A result's images as files, as a benchmark wants to have them."""
    from orchestration.evaluation import export_images

    print(export_images(result, layout, out))


@app.command()
def scores(
    result: Result,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines: id (or file) and score (or correct)")],
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
app.add_typer(reference, name="reference")


@reference.command()
def coco(
    annotations: Annotated[str, typer.Option("--annotations", metavar="FILE", help="captions_val2014.json")],
    images: Annotated[str, typer.Option("--images", metavar="DIR", help="the folder val2014", callback=from_base)],
    out: Annotated[
        str, typer.Option("--out", help="folder for images/ (shards) and prompts.jsonl", callback=from_base)
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="captions that are sampled")] = 30_000,
    seed: Seed = 0,
    all_: Annotated[bool, typer.Option("--all", help="the reference is all images, not those of the captions")] = False,
) -> None:
    """COCO's captions file and a folder of its images."""
    from eval import coco as module

    print(module.reference(annotations, images, out, count, seed, all_))


@reference.callback()
def _reference() -> None:
    pass


@app.command()
def grid(rest: RunAndOverrides = None, config: Config = None, local: Local = False, redo: Redo = False) -> None:
    """Samplers x steps x guidance scales x weights on one checkpoint: every cell of eval.grid."""
    from orchestration import grid as module

    log.info("grid: the report is %s", module.run(configured(config, rest, tables=False), local, redo))


@app.command(name="explain-fid")
def explain_fid(
    generated: Annotated[str, typer.Argument(help="a folder of images, or of finished shards", callback=from_base)],
    real: Annotated[str, typer.Argument(help="the same of real images", callback=from_base)],
    inception: Annotated[
        str, typer.Option("--inception", metavar="FILE", help="torch-fidelity's Inception weights, or download")
    ],
    batch_size: BatchSize = 16,
    device: Device = "auto",
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="write the rows to this JSON, too", callback=from_base)
    ] = None,
) -> None:
    """The FID of two sets of images as five libraries measure it, and why they differ."""
    from eval import explain
    from shards import storage

    rows = explain.explain(generated, real, inception, batch_size, device)
    print(explain.table(rows))
    if out:
        storage.write_json(out, [vars(r) for r in rows])


human = typer.Typer(help="Blinded pairs for people, and the scores of their votes.", rich_markup_mode=None)
app.add_typer(human, name="human")


@human.command()
def pack(
    run: Run,
    results: Annotated[list[str], typer.Argument(metavar="[RUN:]MODEL/PROTOCOL...", help="what is to be compared")],
    out: Annotated[
        str,
        typer.Option("--out", help="folder for index.html (to give away) and key.json (to keep)", callback=from_base),
    ],
    pairs: int = 60,
    seed: Seed = 0,
) -> None:
    """Write a page of pairs."""
    from eval import human
    from shards.layout import RunPaths

    paths = RunPaths(run)
    found = human.pairs(paths, results, pairs, seed)
    log.info("%d pairs: %s", len(found), human.write_pack(out, results, found, paths))
    log.info("give away index.html alone; key.json says what was what")


@human.command()
def score(
    pack: Annotated[str, typer.Argument(help="the folder with key.json", callback=from_base)],
    votes: Annotated[list[str], typer.Argument(metavar="FILE...", help="CSV files that the page saved")],
) -> None:
    """Bradley-Terry scores of the votes."""
    from eval import human
    from shards import storage

    names_, read = human.read_votes(pack, votes)
    scores = human.bradley_terry(names_, read)
    print(human.table(scores))
    storage.write_json(str(Path(pack) / "scores.json"), human.to_json(scores))
