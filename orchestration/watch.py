"""`carrara watch`: evaluates checkpoints as they appear, as a job of its own beside training.

    carrara watch --config configs/mine.yaml                    until training is done and its last checkpoint judged
    carrara watch --config configs/mine.yaml eval.watch.cron="0 */6 * * *" --forever
    carrara watch --config configs/mine.yaml --once             what is due now

The newest complete checkpoint comes first; older ones that were never evaluated are late and are skipped (unless
eval.watch.backfill). What is done is read from the output folder alone, so the watcher may be killed at any moment and
started again, and two of them do no work twice: the evaluation's own lease lets one in, the other waits. A checkpoint
that is worse than the best before it by more than its error bars allow is an ALARM line in the log and, if the user
gave one, a call of their command.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import subprocess
import sys
import zoneinfo
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from cronsim import CronSim

from eval import checkpoints, compare, history, results
from orchestration import stages
from orchestration.config import RunConfig
from orchestration.lease import Busy, Lease
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from shards import storage
from shards.fingerprint import digest_json
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.watch")

ATTEMPTS = 3  # evaluations of one checkpoint that may fail before it is left aside
COMMAND_S = 60.0  # how long the user's alarm command may take


def watch(config: RunConfig, local: bool = False, once: bool = False, forever: bool = False) -> None:
    """Evaluate until training is done (or for ever), or once. StageError where --once found something that failed."""
    paths, failures = RunPaths(config.run), Counter[str]()
    if not storage.list_names(paths.run):
        raise ConfigError(f"watch: {paths.run} is no run's folder, or an empty one; name the run that is trained")
    if not checkpoints.complete(paths):
        log.info("watch: %s has no complete checkpoint yet", paths.checkpoints)
    due = _clock(config)
    with stop_on_sigterm(StopFlag()) as stop:
        while True:
            settle(config, paths)
            checkpoint = next_checkpoint(config, [n for n, count in failures.items() if count >= ATTEMPTS])
            time_has_come = due()  # asked in any case: a moment at which there was nothing to do has passed
            if checkpoint is None:
                if once or (not forever and stages.is_complete("train", config)):
                    break
            elif once or time_has_come:
                outcome = _evaluate(config, checkpoint, local)
                if outcome == "done":
                    settle(config, paths)
                elif outcome == "failed":
                    failures[checkpoint] += 1
                    if failures[checkpoint] >= ATTEMPTS:
                        log.error("%s is left aside after %d failed evaluations", checkpoint, ATTEMPTS)
                if outcome == "done" and not stop.is_set():
                    continue
            if stop.wait(config.eval.watch.every_s):
                raise Stopped("watch: stopped on request; the same command goes on from here")
    broken = [n for n, count in failures.items() if count >= ATTEMPTS]
    if broken:
        raise StageError(f"watch: the evaluation of {', '.join(broken)} failed; its reason stands above")


def next_checkpoint(config: RunConfig, leave_out: list[str]) -> str | None:
    """The newest complete checkpoint, if it has no result yet; with backfill the newest of all that have none. Those
    in `leave_out` have failed too often."""
    for name in checkpoints.complete(RunPaths(config.run)):
        if name not in leave_out and not stages.is_complete("eval", for_checkpoint(config, name)):
            return name
        if not config.eval.watch.backfill:
            return None
    return None


def for_checkpoint(config: RunConfig, name: str) -> RunConfig:
    """The configuration that evaluates this checkpoint."""
    return config.model_copy(update={"eval": config.eval.model_copy(update={"checkpoint": name})})


def settle(config: RunConfig, paths: RunPaths) -> None:
    """Raise the alarms of every result that none were raised for, and note that beside it.

    The note comes last: a watcher that is killed in between leaves its alarm to the next one, twice rather than never.
    """
    open_ = _unsettled(config, paths)
    if not open_:
        return
    try:
        with Lease(paths.status, "alarms", paths.eval):
            raised = {alarm for name in checkpoints.complete(paths) for alarm in _note(config, paths, name)["alarms"]}
            for checkpoint, digest in _unsettled(config, paths):
                found = raise_alarms(config, paths, checkpoint, raised)
                raised |= {str(alarm) for alarm in found}
                noted = {"metrics": digest, "alarms": [str(alarm) for alarm in found]}
                storage.write_json(_note_file(config, paths, checkpoint), noted)
    except Busy:
        log.info("another watcher raises the alarms of %s", ", ".join(name for name, _ in open_))


def _unsettled(config: RunConfig, paths: RunPaths) -> list[tuple[str, str]]:
    """(checkpoint, digest of its numbers) of complete results without a note, oldest first."""
    found = []
    for name in reversed(checkpoints.complete(paths)):
        result = results.read(storage.join(paths.eval, name, config.eval.cell, results.METRICS))
        if result is not None and not result["missing"]["pictures"]:
            digest = digest_json(result)
            if _note(config, paths, name)["metrics"] != digest:
                found.append((name, digest))
    return found


def _note_file(config: RunConfig, paths: RunPaths, checkpoint: str) -> str:
    return storage.join(paths.eval, checkpoint, config.eval.cell, "alarm.json")


def _note(config: RunConfig, paths: RunPaths, checkpoint: str) -> dict[str, Any]:
    """The numbers that alarms were raised for, and the alarms; empty where there is no note, or a torn one."""
    with contextlib.suppress(ValueError):
        found = storage.read_json(_note_file(config, paths, checkpoint))
        if isinstance(found, dict) and found.keys() >= {"metrics", "alarms"}:
            return found
    return {"metrics": "", "alarms": []}


def raise_alarms(config: RunConfig, paths: RunPaths, checkpoint: str, raised: set[str]) -> list[compare.Alarm]:
    """Log what is alarming about a checkpoint and was not raised before, call the user's command for each; returns the
    alarms."""
    every, sigmas = history.cells(paths), config.eval.watch.alarm_sigmas
    found = compare.alarms(every, checkpoint, sigmas)
    # One that was evaluated late may be what newer ones are to be held against.
    newer = sorted({r["checkpoint"] for r in every} - {checkpoint})
    found += [alarm for name in newer for alarm in compare.alarms(every, name, sigmas) if alarm.best == checkpoint]
    found = [alarm for alarm in found if str(alarm) not in raised]
    for alarm in found:
        log.warning("ALARM %s", alarm)
        print(f"ALARM {alarm}", file=sys.stdout, flush=True)
        if config.eval.watch.alarm_command:
            _call(config.eval.watch.alarm_command, alarm)
    if not found:
        log.info("%s: no alarm", checkpoint)
    return found


def _evaluate(config: RunConfig, checkpoint: str, local: bool) -> Literal["done", "busy", "failed"]:
    log.info("evaluating %s", checkpoint)
    try:
        stages.run("eval", for_checkpoint(config, checkpoint), local)
    except Busy as e:
        log.info("%s", e)  # whoever is at it will finish it; should they die, it is still open at the next look
        return "busy"
    except (StageError, ConfigError) as e:  # such as a checkpoint that training has deleted meanwhile
        log.error("%s: %s", checkpoint, e)
        return "failed"
    except Stopped:
        raise
    except Exception:  # whatever goes wrong with one checkpoint, training's next one is judged
        log.exception("the evaluation of %s broke", checkpoint)
        return "failed"
    return "done"


def _call(command: list[str], alarm: compare.Alarm) -> None:
    """The user's command, with the alarm as its last argument and as JSON in CARRARA_ALARM; its failure is a line."""
    d = alarm.difference
    facts = {
        "checkpoint": alarm.checkpoint, "best": alarm.best, "metric": d.metric, "value": d.b, "best_value": d.a,
        "difference": d.value, "se": d.se, "sigmas": alarm.sigmas, "p": d.p,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [*command, str(alarm)], env={**os.environ, "CARRARA_ALARM": json.dumps(facts)}, timeout=COMMAND_S
        )
        if done.returncode:
            log.error("eval.watch.alarm_command ended with code %d", done.returncode)
    except (OSError, subprocess.TimeoutExpired) as e:
        log.error("eval.watch.alarm_command cannot be run: %s", e)


def _clock(config: RunConfig) -> Callable[[], bool]:
    """Whether it is time: always without a cron expression, else once after each of its moments (local time)."""
    expression = config.eval.watch.cron
    if expression is None:
        return lambda: True
    moments = CronSim(expression, _now())
    following = [next(moments)]

    def due() -> bool:
        now = _now()
        if now.timestamp() < following[0].timestamp():
            return False
        while (
            following[0].timestamp() <= now.timestamp()
        ):  # moments that passed during an evaluation are late, and skipped
            following[0] = next(moments)
        return True

    return due


def _now() -> datetime.datetime:
    """The time here, in the zone itself: `astimezone()` alone has today's distance from UTC, which is another one once
    the clocks change."""
    name = os.environ.get("TZ", "").lstrip(":")
    for zone in (name, os.path.realpath("/etc/localtime").partition("zoneinfo/")[2]):
        with contextlib.suppress(OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
            if zone:
                return datetime.datetime.now(zoneinfo.ZoneInfo(zone))
    return datetime.datetime.now().astimezone()
