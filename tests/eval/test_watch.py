"""The watcher: newest first, late ones skipped, two on one run, alarms with a command, a checkpoint that fails."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from dateutil import tz
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from eval.config import EvalConfig
from eval.report import history
from orchestration import stages, watch
from orchestration.config import RunConfig
from orchestration.lease import Lease
from orchestration.notify import NotifyConfig
from orchestration.stopping import Stopped
from shards.fingerprint import digest_file
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, validate
from tests.eval.conftest import refs, write_checkpoint


def configured(run: RunPaths, **watching: Any) -> RunConfig:
    vae, text = refs(run)
    (Path(run.run).parent / "table.csv").write_text("url,caption\n")
    values = {
        "run": run.run,
        "ingest": {"table": str(Path(run.run).parent / "table.csv")},
        "autoencoder": {"pretrained": vae},
        "clip": {"pretrained": text},
        "eval": {
            "num_prompts": 30,
            "steps": 1,
            "batch_size": 10,
            "shard_size": 30,
            "jackknife_groups": 10,
            "weights": "raw",
            "watch": {"every_s": 0.2, **watching},
        },
    }
    return validate(RunConfig, values, "run.yaml")


def done(run: RunPaths) -> list[str]:
    return [r["checkpoint"] for r in history.read_all(run)]


def test_the_newest_comes_first_and_what_is_late_is_skipped(trained: RunPaths) -> None:
    config = configured(trained)
    assert watch.next_checkpoint(config, []) == "step-00000002"
    watch.watch(config, local=True, once=True)
    assert done(trained) == ["step-00000002"]
    assert watch.next_checkpoint(config, []) is None
    watch.watch(config, local=True, once=True)  # a second time there is nothing to do
    assert watch.next_checkpoint(configured(trained, backfill=True), []) == "step-00000001"
    assert watch.next_checkpoint(configured(trained, backfill=True), ["step-00000001"]) is None
    assert (Path(trained.reports) / "step-00000002.html").is_file()


def test_two_watchers_do_no_work_twice(trained: RunPaths) -> None:
    config = configured(trained)
    made: list[str] = []
    real = stages.run

    def counted(name: str, c: RunConfig, *rest: Any) -> None:
        real(name, c, *rest)
        made.append(c.eval.checkpoint)

    errors: list[BaseException] = []

    def one() -> None:
        try:
            watch.watch(config, local=True, once=True)
        except BaseException as e:
            errors.append(e)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run", counted)
        threads = [threading.Thread(target=one) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
    assert not errors
    assert done(trained) == ["step-00000002"]
    assert set(made) == {"step-00000002"}


def test_a_busy_run_is_waited_for(trained: RunPaths) -> None:
    config = configured(trained)
    with Lease(trained.status, "features-real-clip", trained.eval):
        assert watch._evaluate(config, "step-00000002", local=True) == "busy"
    assert watch.next_checkpoint(config, []) == "step-00000002"


def collapse(trained: RunPaths) -> None:
    """Checkpoint 3 has collapsed: its UNet's last layer says the same of every picture."""
    unet = UNet2DConditionModel.from_config(
        json.loads((Path(trained.checkpoints) / "step-00000002" / "manifest.json").read_text())["model_config"]
    )
    folder = write_checkpoint(trained, 3, unet, 256)
    weights = load_file(Path(trained.checkpoints) / "step-00000002" / "weights.safetensors")
    weights["conv_out.bias"] = weights["conv_out.bias"] + 50
    save_file(weights, folder / "weights.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "weights.safetensors"
    manifest["files"]["weights.safetensors"] = {"size": file.stat().st_size, "sha256": digest_file(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_worse_checkpoint_raises_an_alarm_and_calls_the_command(
    trained: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, also where the watcher was killed between its numbers and its alarm."""
    collapse(trained)
    config = configured(trained, backfill=True)
    notified = tmp_path / "notified.jsonl"
    code = f"import os; open({str(notified)!r}, 'a').write(os.environ['CARRARA_NOTIFICATION'] + '\\n')"
    notify = validate(NotifyConfig, {"command": [sys.executable, "-c", code], "timeout_s": 60}, "test")
    config = config.model_copy(update={"notify": notify})
    with monkeypatch.context() as patch:
        patch.setattr(watch, "raise_alarms", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            watch.watch(config, local=True, once=True)
    assert done(trained) == ["step-00000003"]
    watch.watch(config, local=True, once=True)
    assert len(done(trained)) == 3
    watch.watch(config, local=True, once=True)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("ALARM ")]
    assert lines
    assert all(
        x.startswith(("ALARM step-00000003 is worse than step-0000000", "ALARM step-00000003 has ")) for x in lines
    )
    events = [json.loads(x) for x in notified.read_text().splitlines()]
    facts = [e["alarm"] for e in events if e["event"] == "alarm"]
    assert len(facts) == len(lines)
    assert {f["checkpoint"] for f in facts} == {"step-00000003"}
    assert {f["metric"] for f in facts} & {"fd_clip_unit", "repeated", "blank"}
    assert [e["sentence"] for e in events if e["event"] == "alarm"] == lines
    reports = [e["report"] for e in events if e["event"] == "report"]
    assert [Path(r).name for r in reports] == [f"step-0000000{n}.html" for n in (3, 2, 1)]
    assert [e["report"] for e in events if e["event"] == "end"] == reports


def test_a_checkpoint_that_cannot_be_evaluated_is_left_aside(trained: RunPaths) -> None:
    weights = Path(trained.checkpoints) / "step-00000002" / "weights.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)  # the size is right, so only the reading fails
    config = configured(trained, backfill=True)
    with pytest.raises(StageError, match="the evaluation of step-00000002 failed"):
        watch.watch(config, local=True, once=True)
    assert done(trained) == ["step-00000001"]


def test_cron_decides_when() -> None:
    zone = tz.gettz("Europe/Rome")
    at = [datetime.datetime(2026, 1, 1, 11, 59, 30, tzinfo=zone)]
    due = watch.clock("0 */6 * * *", lambda: at[0])
    assert not due()
    at[0] += datetime.timedelta(minutes=1)
    assert due()
    assert not due()
    at[0] += datetime.timedelta(hours=19)  # three moments passed: one look, not three
    assert due()
    assert not due()
    with pytest.raises(ConfigError, match=r"'watch': alarm_command is now notify\.command"):
        validate(EvalConfig, {"watch": {"alarm_command": ["true"]}}, "run.yaml")
    with pytest.raises(ConfigError, match="cron expression of five fields"):
        validate(EvalConfig, {"watch": {"cron": "soon"}}, "run.yaml")


def test_cron_is_of_local_time_on_either_side_of_summer() -> None:
    """Nine in the morning is nine in the morning the day after the clocks went forward (29 March 2026 in Rome)."""
    zone = tz.gettz("Europe/Rome")
    at = [datetime.datetime(2026, 3, 28, 12, 0, tzinfo=zone)]
    due = watch.clock("0 9 * * *", lambda: at[0])
    for day in (29, 30):
        at[0] = datetime.datetime(2026, 3, day, 8, 59, tzinfo=zone)
        assert not due(), day
        at[0] = datetime.datetime(2026, 3, day, 9, 1, tzinfo=zone)
        assert due(), day
    here = watch.local_time()
    assert here.tzinfo is not None
    assert not isinstance(here.tzinfo, datetime.timezone)  # a zone with its rules, not an offset


def test_one_moment_evaluates_everything_that_is_due(trained: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    left = ["step-00000002", "step-00000001"]
    moments = iter([True])
    evaluated: list[str] = []

    def evaluate(_config: RunConfig, name: str, _local: bool) -> str:
        evaluated.append(left.pop(0))
        return "done"

    monkeypatch.setattr(watch, "next_checkpoint", lambda *_: left[0] if left else None)
    monkeypatch.setattr(watch, "clock", lambda _: lambda: next(moments, False))
    monkeypatch.setattr(watch, "_evaluate", evaluate)
    monkeypatch.setattr(watch.parts, "is_complete", lambda *_: True)
    watch.watch(configured(trained, cron="0 12 * * *", backfill=True), local=True)
    assert evaluated == ["step-00000002", "step-00000001"]


def test_a_checkpoint_is_evaluated_from_beginning_to_end(trained: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training writes another checkpoint between the stages and the report: `latest` was resolved once."""
    config = configured(trained)
    shutil.move(Path(trained.checkpoints) / "step-00000002", Path(trained.run) / "later")
    real = stages.engine.run

    def run(stage: Any, *rest: Any) -> bool:
        found = real(stage, *rest)
        if stage.name == "eval":
            shutil.move(Path(trained.run) / "later", Path(trained.checkpoints) / "step-00000002")
        return found

    monkeypatch.setattr(stages.engine, "run", run)
    stages.run("eval", config, True)
    assert done(trained) == ["step-00000001"]
    assert sorted(p.name for p in Path(trained.reports).glob("step-*.html")) == ["step-00000001.html"]


def test_a_moment_with_nothing_to_do_has_passed(trained: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that appears after a moment of the cron expression waits for the next one."""
    looks = iter([(None, True), ("step-00000002", False), ("step-00000002", True)])
    moments: list[bool] = []

    def look(*_: Any) -> str | None:
        name, moment = next(looks)
        moments.append(moment)
        return name

    def evaluate(*_: Any) -> str:
        raise Stopped("seen")

    monkeypatch.setattr(watch, "next_checkpoint", look)
    monkeypatch.setattr(watch, "clock", lambda _: lambda: moments[-1] and not due.append(True))
    monkeypatch.setattr(watch, "_evaluate", evaluate)
    due: list[bool] = []
    with pytest.raises(Stopped, match="seen"):
        watch.watch(configured(trained, cron="0 12 * * *"), local=True, forever=True)
    assert moments == [True, False, True]
    assert len(due) == 2  # the first moment, too, was taken notice of


def test_what_breaks_on_one_checkpoint_does_not_end_the_watch(
    trained: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.run

    def run(name: str, c: RunConfig, *rest: Any) -> None:
        if c.eval.checkpoint == "step-00000002":
            raise OSError(28, "No space left on device")
        real(name, c, *rest)

    monkeypatch.setattr(stages, "run", run)
    with pytest.raises(StageError, match="the evaluation of step-00000002 failed"):
        watch.watch(configured(trained, backfill=True), local=True, once=True)
    assert done(trained) == ["step-00000001"]


def test_watch_has_a_run_on_its_command_line(
    trained: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.run_stage import main

    config = configured(trained)
    data = config.model_dump(mode="json")
    data["run"] = str(tmp_path / "nowhere")
    shutil.copy(tmp_path / "table.csv", tmp_path / "t.csv")
    (tmp_path / "c.yaml").write_text(json.dumps(data))
    assert main(["watch", trained.run, "--config", str(tmp_path / "c.yaml"), "--once", "--local"]) == 0
    assert done(trained) == ["step-00000002"]
    capsys.readouterr()
    assert main(["numbers", trained.run, "--config", str(tmp_path / "c.yaml")]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("step-00000002 ")
    assert output[0].endswith(" 0 images missing")
    kept = json.loads(next(Path(trained.eval).rglob("metrics.json")).read_text())["metrics"]
    assert [line.split()[0] for line in output[1:]] == list(kept)
    assert all(f"n {metric['n']}" in line for line, metric in zip(output[1:], kept.values(), strict=True))
    assert main(["watch", "--config", str(tmp_path / "c.yaml"), "--onec"]) == 2
    assert "no such option: --onec" in capsys.readouterr().err
    assert main(["watch", "--config", str(tmp_path / "c.yaml"), "--once", "--local"]) == 2
    assert "nowhere is no run's folder" in capsys.readouterr().err
