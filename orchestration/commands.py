"""The commands around the stages: plan and inspect for the latents; export, sample, watch, numbers, grid,
explain-fid, judge, compare, images, scores and reference for a trained model.

    carrara plan [RUN] --config C [--rows N]                           what pre-encoding stores, takes and costs
    carrara inspect [RUN] --config C                                   latents decoded beside their originals
    carrara sample runs/demo --prompt "a red circle" [--local]         pictures from a checkpoint
    carrara watch [RUN] --config C [--once | --forever]                every checkpoint, as it appears
    carrara numbers [RUN] --config C                                   what is measured so far, while it is drawn
    carrara grid [RUN] --config C eval.grid='{steps: [10, 20]}'        samplers x steps x guidance x EMA
    carrara export RUN [--checkpoint step-00001000] [--weights raw] [--dtype float16] [--out DIR]   a diffusers pipeline
    carrara explain-fid A B --inception FILE                           why two FIDs of the same pictures differ
    carrara judge pack RUN --results A B --out DIR; carrara judge score DIR VOTES.csv ...
    carrara compare A B                                                two results in pairs, of one run or of two
    carrara images RESULT --layout geneval --out DIR                   images out for a benchmark of its own
    carrara scores RESULT FILE --name geneval                          its scores in, as a metric like any other
    carrara reference coco --annotations FILE --images DIR --out DIR   COCO's images and captions as a reference

What they do is in latents/, train/ and eval/; what is here is their arguments and Ray.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shards.settings import ConfigError

log = logging.getLogger("carrara")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows how it is called")


def run(name: str, arguments: Sequence[str]) -> None:
    """Run the command `name` of COMMANDS; raises ConfigError, StageError or Stopped."""
    COMMANDS[name](list(arguments))


def _sample(arguments: list[str]) -> None:
    parser = _Parser("carrara sample", description="Pictures from a checkpoint.")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--prompts", help="a text file with one prompt a line, or .jsonl with prompt, negative, seed")
    parser.add_argument("--negative", default="", help="what not to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--checkpoint", default="latest")
    parser.add_argument("--weights", default="ema", help="ema, raw, one of train.ema_stds (ema_0.050), or posthoc:0.08")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", "--guidance", type=float, default=3.0)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--image", help="a picture to start from")
    parser.add_argument("--mask", help="white where that picture is to be drawn anew")
    parser.add_argument("--strength", type=float, default=0.6, help="how far the picture may change, up to 1")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="folder for the pictures; by default RUN/samples/<digest of what is asked for>")
    parser.add_argument("--ray", action="store_true", help="on Ray, as many workers as there is room for")
    parser.add_argument("--redo", action="store_true", help="draw again what lies in --out from other settings")
    given = parser.parse_args(arguments)

    from eval.sample import SampleConfig, SampleStage, requests_of
    from orchestration import engine
    from orchestration.config import Pool, RayConfig
    from shards import storage
    from shards.fingerprint import digest_json
    from shards.layout import RunPaths
    from shards.settings import validate

    requests = requests_of(given.prompt, given.prompts, given.negative, given.seed)
    if not requests:
        raise ConfigError('sample: nothing to draw; give --prompt "..." or --prompts FILE')
    values = {k: v for k, v in vars(given).items() if k in SampleConfig.model_fields}
    config = validate(
        SampleConfig,
        {
            **values,
            "requests": requests,
        },
        "carrara sample",
    )
    asked = digest_json(config.model_dump(mode="json"))[:10]
    run = RunPaths(given.run)
    out = given.out or storage.join(given.run, "samples", asked)
    stage = SampleStage(config, run, out)

    def drive() -> None:
        engine.run(stage, run.status, RayConfig(), Pool(), local=not given.ray, redo=given.redo)

    _maybe_on_ray(given.ray, drive)
    log.info("%d pictures of %s are in %s", stage.total, stage.model.name, out)


def _maybe_on_ray(on_ray: bool, work: Callable[[], None]) -> None:
    if not on_ray:
        return work()
    from orchestration.config import RayConfig
    from orchestration.connection import connected

    with connected(RayConfig()):
        work()


def _configured(arguments: list[str], parser: _Parser) -> tuple[argparse.Namespace, Any]:
    """The parsed arguments and the run's configuration: [RUN] and overrides, --config, --local."""
    from orchestration.config import base_folder, find_config, load

    parser.add_argument(
        "rest", nargs="*", metavar="[RUN] section.key=value", help="the run's folder, settings to change"
    )
    parser.add_argument("--config", help="the run's YAML (else CARRARA_CONFIG, else ./carrara.yaml)")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    given = parser.parse_intermixed_args(arguments)
    overrides = [f"run={json.dumps(r)}" if i == 0 and "=" not in r else r for i, r in enumerate(given.rest)]
    base, _ = base_folder()
    path = find_config(given.config, base)
    config = load(path, overrides, base, tables=False)
    log.info("configuration %s; run %s", path, config.run)
    return given, config


def _watch(arguments: list[str]) -> None:
    parser = _Parser("carrara watch", description="Evaluates checkpoints as they appear.")
    parser.add_argument("--once", action="store_true", help="what is due now, then end")
    parser.add_argument("--forever", action="store_true", help="go on after training is done")
    given, config = _configured(arguments, parser)
    from orchestration.watch import watch

    watch(config, given.local, given.once, given.forever)


def _numbers(arguments: list[str]) -> None:
    parser = _Parser("carrara numbers", description="Metrics of whatever images are committed now; changes nothing.")
    _, config = _configured(arguments, parser)
    from orchestration.evaluation import numbers

    print(numbers(config))


def _compare(arguments: list[str]) -> None:
    parser = _Parser("carrara compare", description="Two results in pairs: RUN/eval/MODEL/PROTOCOL, or RUN:MODEL.")
    parser.add_argument("a", help="a result's folder, or RUN:MODEL where it has one result alone")
    parser.add_argument("b", help="the other, of this run or of another one")
    parser.add_argument("--json", help="write the differences to this file, too")
    given = parser.parse_args(arguments)
    from orchestration.evaluation import compare

    print(compare(given.a, given.b, given.json))


def _images(arguments: list[str]) -> None:
    parser = _Parser("carrara images", description="A result's images as files, as a benchmark wants to have them.")
    parser.add_argument("result", help="a result's folder, or RUN:MODEL where it has one result alone")
    parser.add_argument("--layout", default="files", help="files, geneval, dpg or compbench")
    parser.add_argument("--out", required=True, help="a new folder")
    given = parser.parse_args(arguments)
    from orchestration.evaluation import export_images

    print(export_images(given.result, given.layout, given.out))


def _scores(arguments: list[str]) -> None:
    parser = _Parser("carrara scores", description="Scores made elsewhere as a metric like any other.")
    parser.add_argument("result", help="a result's folder, or RUN:MODEL where it has one result alone")
    parser.add_argument("file", help="JSON lines: id (or file) and score (or correct)")
    parser.add_argument("--name", required=True, help="of the metric: small letters, digits, _")
    parser.add_argument("--index", help="the export's index.jsonl, where the file names images by their files")
    given = parser.parse_args(arguments)
    from orchestration.evaluation import import_scores

    print(import_scores(given.result, given.name, given.file, given.index))


def _reference(arguments: list[str]) -> None:
    parser = _Parser("carrara reference", description="Real images and captions of a public set as shards.")
    parser.add_argument("kind", choices=["coco"], help="coco: COCO's captions file and a folder of its images")
    parser.add_argument("--annotations", required=True, help="captions_val2014.json")
    parser.add_argument("--images", required=True, help="the folder val2014")
    parser.add_argument("--out", required=True, help="folder for images/ (shards) and prompts.jsonl")
    parser.add_argument("--count", type=int, default=30_000, help="captions that are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="the reference is all images, not those of the captions")
    given = parser.parse_args(arguments)
    from eval import coco

    print(coco.reference(given.annotations, given.images, given.out, given.count, given.seed, given.all))


def _grid(arguments: list[str]) -> None:
    parser = _Parser("carrara grid", description="Every cell of eval.grid on one checkpoint.")
    parser.add_argument("--redo", action="store_true", help="make again what was made with other settings")
    given, config = _configured(arguments, parser)
    from orchestration import grid

    log.info("grid: the report is %s", grid.run(config, given.local, given.redo))


def _export(arguments: list[str]) -> None:
    parser = _Parser("carrara export", description="A checkpoint as a diffusers pipeline.")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--checkpoint", default="latest", help="a folder's name under RUN/checkpoints")
    parser.add_argument("--weights", default="ema", help="ema, raw, one of ema_stds (ema_0.050), or posthoc:0.08")
    parser.add_argument("--dtype", default="float32", help="float32 or float16")
    parser.add_argument("--out", help="folder of the pipeline; by default RUN/model")
    parser.add_argument("--licence", help="of the weights, for the model card")
    given = parser.parse_args(arguments)
    from train.export import export

    folder = export(given.run, given.checkpoint, given.weights, given.dtype, given.out, given.licence)
    log.info("the pipeline is %s", folder)


def _explain(arguments: list[str]) -> None:
    parser = _Parser("carrara explain-fid", description="The FID of two sets of pictures as five libraries measure it.")
    parser.add_argument("generated", help="a folder of pictures, or of finished shards")
    parser.add_argument("real", help="the same of real pictures")
    parser.add_argument("--inception", required=True, help="torch-fidelity's Inception weights, or download")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write the rows to this file, too")
    given = parser.parse_args(arguments)
    from eval import explain
    from shards import storage

    rows = explain.explain(given.generated, given.real, given.inception, given.batch_size, given.device)
    print(explain.table(rows))
    if given.json:
        storage.write_json(given.json, [vars(r) for r in rows])


def _judge(arguments: list[str]) -> None:
    parser = _Parser("carrara judge", description="Blinded pairs for people, and the scores of their votes.")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=_Parser)
    pack = actions.add_parser("pack", help="write a page of pairs")
    pack.add_argument("run", help="the run's folder")
    pack.add_argument("--results", nargs="+", required=True, metavar="[RUN:]MODEL/PROTOCOL")
    pack.add_argument("--pairs", type=int, default=60)
    pack.add_argument("--seed", type=int, default=0)
    pack.add_argument("--out", required=True, help="folder for index.html (to give away) and key.json (to keep)")
    score = actions.add_parser("score", help="Bradley-Terry scores of the votes")
    score.add_argument("pack", help="the folder with key.json")
    score.add_argument("votes", nargs="+", help="CSV files that the page saved")
    given = parser.parse_args(arguments)
    from eval import human
    from shards import storage
    from shards.layout import RunPaths

    if given.action == "pack":
        run = RunPaths(given.run)
        found = human.pairs(run, given.results, given.pairs, given.seed)
        log.info("%d pairs: %s", len(found), human.write_pack(given.out, given.results, found, run))
        log.info("give away index.html alone; key.json says what was what")
        return
    names, votes = human.read_votes(given.pack, given.votes)
    scores = human.bradley_terry(names, votes)
    print(human.table(scores))
    storage.write_json(str(Path(given.pack) / "scores.json"), human.to_json(scores))


def _plan(arguments: list[str]) -> None:
    parser = _Parser(
        "carrara plan", description="What pre-encoding would store, take and cost; encodes a few pictures."
    )
    parser.add_argument("--rows", type=int, help="rows of the whole table; by default what this run has ingested")
    parser.add_argument("--workers", type=int, help="how many workers; by default ray.latents.workers, or 1")
    parser.add_argument("--samples", type=int, default=64, help="pictures to measure on")
    parser.add_argument("--again", action="store_true", help="measure again, rather than take what is known")
    parser.add_argument("--worker-hour", type=float, default=1.0, help="money for an hour of one worker")
    parser.add_argument("--trainer-hour", type=float, default=2.0, help="money for an hour of one training rank")
    parser.add_argument(
        "--terabyte-month", type=float, default=23.0, help="money for a terabyte of storage and a month"
    )
    parser.add_argument("--months", type=float, default=1.0, help="how long the latents are kept")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often each picture is trained on")
    parser.add_argument("--worker-speed", type=float, default=1.0, help="a worker's speed, times this machine's")
    parser.add_argument(
        "--trainer-speed", type=float, default=1.0, help="a training rank's speed, times this machine's"
    )
    given, config = _configured(arguments, parser)
    for name in ("rows", "workers", "samples", "worker_speed", "trainer_speed"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise ConfigError(f"plan: --{name.replace('_', '-')} is {value:g}; it must be more than 0")
    from latents import planning
    from orchestration import stages
    from orchestration.ledger import Ledger
    from shards.layout import RunPaths

    paths = RunPaths(config.run)
    (stage, pool), *_ = stages.shard_stages("latents", config)
    prices = planning.Prices(**{k: v for k, v in vars(given).items() if k in planning.Prices.__dataclass_fields__})
    samples = planning.pictures_of(stage, given.rows)  # type: ignore[arg-type]
    rates = planning.rates_of(stage, given.samples, given.again)  # type: ignore[arg-type]
    facts = planning.facts_of(stage)  # type: ignore[arg-type]
    print(planning.report(config.latents, samples, given.workers or pool.workers or 1, rates, prices, facts))
    ledger = Ledger(stage, paths.status)
    print(f"of this run, {ledger.skipped:,} of {ledger.total:,} shards are made and {ledger.remaining:,} are left")


def _inspect(arguments: list[str]) -> None:
    parser = _Parser("carrara inspect", description="Latents decoded beside their originals, and encoded again.")
    parser.add_argument("--count", type=int, default=32, help="samples to look at")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other samples")
    given, config = _configured(arguments, parser)
    if given.count < 1:
        raise ConfigError(f"inspect: --count is {given.count}; it must be at least 1")
    from latents import inspection
    from orchestration import stages
    from shards.layout import RunPaths
    from shards.settings import StageError

    stages.check_inputs("latents", config)
    (stage, _), *_ = stages.shard_stages("latents", config)
    found = inspection.inspect(stage, given.count, given.seed)  # type: ignore[arg-type]
    print(inspection.summary(found))
    log.info(
        "inspect: the page is %s", inspection.write(found, RunPaths(config.run).reports, f"Latents of {config.run}")
    )
    if found.complaint:
        raise StageError(f"inspect: {found.complaint}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "plan": _plan,
    "inspect": _inspect,
    "sample": _sample,
    "watch": _watch,
    "numbers": _numbers,
    "grid": _grid,
    "compare": _compare,
    "images": _images,
    "scores": _scores,
    "reference": _reference,
    "export": _export,
    "explain-fid": _explain,
    "judge": _judge,
}
