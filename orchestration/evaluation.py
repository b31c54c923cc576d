"""The evaluation's commands as plain functions: a pipeline of anybody's, numbers, comparisons, images out, scores in.

evaluate_model("org/name or folder", "runs/sd15", ["eval.prompts_file=coco.jsonl"])     carrara eval --model
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from eval import compare as comparing
from eval import measure, suites
from eval.config import EvalConfig
from eval.evaluation import METRICS, Evaluation
from eval.report import history
from eval.report.page import rounded, spread
from orchestration import notify, parts, stages
from orchestration.config import RayConfig, RunConfig, base_folder, find_config
from orchestration.connection import connected
from orchestration.notify import NotifyConfig
from shards import storage
from shards.layout import RunPaths
from shards.settings import ConfigError, Strict, apply_overrides, load_yaml, resolved, validate

log = logging.getLogger("carrara.eval")


class PipelineRun(Strict):
    """The settings of the evaluation of a pipeline: of a run's configuration these sections alone."""

    run: str
    seed: int = 0
    ray: RayConfig = RayConfig()
    eval: EvalConfig = EvalConfig()
    notify: NotifyConfig = NotifyConfig()


def evaluate_model(
    model: str,
    run: str | None,
    overrides: Sequence[str] = (),
    config: str | None = None,
    local: bool = False,
    redo: bool = False,
) -> str:
    """Evaluate a diffusers pipeline, of a folder or a hub name, into <run>/eval; returns the report's path.

    run: a folder, made where it is missing; else the configuration's. No table, no training and no other section of a
    configuration is needed; sections beside run, seed, ray and eval are not looked at.
    """
    base, _ = base_folder()
    if config:
        data = load_yaml(find_config(config, base), overrides)
    else:
        data = {}
        apply_overrides(data, overrides)
    data = {k: v for k, v in data.items() if k in PipelineRun.model_fields}
    data["run"] = run or data.get("run")
    if not data["run"]:
        raise ConfigError("eval --model needs a folder for its results; give --run DIR, or a configuration with run")
    data["eval"] = {"sampler": "model", **(data.get("eval") or {}), "model": model}
    chosen = validate(PipelineRun, resolved(data, base), config or "carrara eval --model")
    paths = RunPaths(chosen.run)
    clip = os.path.join(paths.clip, "model")
    own = clip if storage.exists(os.path.join(clip, "open_clip_config.json")) else None
    found = Evaluation(chosen.eval, paths, None, own, chosen.seed)
    log.info("eval: %s as %s: %s", model, found.model.name, found.label)
    with notify.notified(chosen.notify, chosen.run, "eval") as outcome:
        with connected(chosen.ray, local):
            outcome.report = stages.run_evaluation(found, chosen, local, redo)
        return outcome.report


def numbers(config: RunConfig) -> str:
    """Metrics of whatever images are committed now, as text; nothing is written."""
    parts.check_inputs("eval", config)
    found = parts.evaluation(config).metrics()
    missing = found["missing"]["images"]
    lines = [f"{found['checkpoint']} {found['cell']}, protocol {found['protocol']['id']}, {missing} images missing"]
    for name, metric in found["metrics"].items():
        value, interval = spread(metric)
        caution = f"   ({metric['caution']})" if "caution" in metric else ""
        lines.append(f"{name:<22}{value:>12}   {interval:<22} n {metric['n']}{caution}")
    return "\n".join(lines)


def result_of(name: str) -> tuple[str, dict[str, Any]]:
    """(folder of the model's results, content of metrics.json) of a result: its folder, or RUN:MODEL where that has
    one result alone. ConfigError that says what there is."""
    if storage.exists(storage.join(name, METRICS)):
        found = measure.read(storage.join(name, METRICS))
        if found is None:
            raise ConfigError(f"{name}/{METRICS} is torn, edited or of an older layout; run the eval stage")
        model, _, folder = name.rstrip("/").rpartition("/")  # a path or a URL
        return model or ".", {**found, "folder": folder}
    run, colon, model = name.rpartition(":")
    if not colon:
        raise ConfigError(f"{name}: there is no {METRICS} here; name RUN/eval/MODEL/PROTOCOL, or RUN:MODEL")
    paths = RunPaths(run)
    there = history.read_all(paths, model)
    if len(there) != 1:
        which = ", ".join(r["folder"] for r in there) or "none"
        raise ConfigError(f"{run} has {len(there)} results of {model} ({which}); name {run}/eval/{model}/PROTOCOL")
    return storage.join(paths.eval, model), there[0]


def compare(a: str, b: str, write_json: str | None = None) -> str:
    """The verdict in one sentence, and the paired differences of two results, of one run or of two, as text."""
    (_, x), (_, y) = result_of(a), result_of(b)
    found = comparing.differences(x, y, tags=True)
    names = [r["checkpoint"] if x["checkpoint"] != y["checkpoint"] else n for r, n in ((x, a), (y, b))]
    way, sentence = comparing.verdict(found, *names)
    lines = [sentence, ""]
    lines.append(f"{'metric':<24}{'tag':<22}{'A':>12}{'B':>12}{'B - A':>12}   95 % interval          says")
    for d in found:
        if d.better:
            interval = f"{rounded(d.low, d.se)} to {rounded(d.high, d.se)}"
            lines.append(
                f"{d.metric:<24}{d.tag[:20]:<22}{d.a:>12.4g}{d.b:>12.4g}{rounded(d.value, d.se):>12}   {interval:<22} "
                f"{d.verdict}"
            )
    for name, own, other in ((a, x, y), (b, y, x)):
        if alone := sorted(own["metrics"].keys() - other["metrics"].keys()):
            lines.append(f"not compared, since only {name} has it: {', '.join(alone)}")
    if write_json:
        import dataclasses

        rows = [{**dataclasses.asdict(d), "verdict": d.verdict} for d in found]
        storage.write_json(write_json, {"verdict": way, "sentence": sentence, "differences": rows})
    return "\n".join(lines)


def export_images(result: str, layout: str, out: str) -> str:
    """Write a result's images as a benchmark reads them; a sentence about it."""
    folder, found = result_of(result)
    count = suites.export(storage.join(folder, found["images"]), layout, out)
    return f"{count:,} images in the layout {layout} are in {out}; index.jsonl says which is which"


def import_scores(result: str, name: str, file: str, index: str | None = None) -> str:
    """Take scores made elsewhere into a result's images; a sentence about it."""
    folder, found = result_of(result)
    count = suites.bring_in(storage.join(folder, found["images"]), name, file, index)
    return f"{count:,} scores are in as '{name}'; the eval stage (or the watch) measures them at its next run"
