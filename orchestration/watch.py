"""`carrara watch`: evaluates checkpoints as they appear, as a job of its own beside training.

    carrara watch --config configs/mine.yaml                    until training is done and its last checkpoint judged
    carrara watch --config configs/mine.yaml eval.watch.cron="0 */6 * * *" --forever
    carrara watch --config configs/mine.yaml --once             what is due now

The newest complete checkpoint comes first; older ones that were never evaluated are late and are skipped (unless
eval.watch.backfill). What is done is read from the output folder alone, so the watcher may be killed at any moment and
started again, and two of them do no work twice: the evaluation's own lease lets one in, the other waits. A checkpoint
that is worse than one before it by more than chance allows (eval/compare.py) is an ALARM line in the log and a
notification (orchestration/notify.py). A cron expression is of local time, whatever the clock does in spring; at each
of its moments everything that is due is evaluated.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from cronsim import CronSim

from eval import compare, model
from eval.report import history
from orchestration import notify, parts, stages
from orchestration.config import RunConfig
from orchestration.lease import Busy, Lease
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from shards import storage
from shards.fingerprint import digest_json
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.watch")

ATTEMPTS = 3  # evaluations of one checkpoint that may fail before it is left aside


def watch(config: RunConfig, local: bool = False, once: bool = False, forever: bool = False) -> None:
    """Evaluate until training is done (or for ever), or once. StageError where --once found something that failed."""
    paths, failures = RunPaths(config.run), Counter[str]()
    if not storage.list_names(paths.run):
        raise ConfigError(f"watch: {paths.run} is no run's folder, or an empty one; name the run that is trained")
    if not model.complete(paths):
        log.info("watch: %s has no complete checkpoint yet", paths.checkpoints)
    notify.check(config.notify)
    due, open_ = clock(config.eval.watch.cron), False  # open_: a moment has come, and not all that is due is done
    with stop_on_sigterm(StopFlag()) as stop:
        while True:
            settle(config, paths)
            checkpoint = next_checkpoint(config, [n for n, count in failures.items() if count >= ATTEMPTS])
            open_ = due() or open_  # asked in any case: a moment at which there was nothing to do has passed
            if checkpoint is None:
                open_ = False
                if once or (not forever and parts.is_complete("train", config)):
                    break
            elif once or open_:
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
    for name in model.complete(RunPaths(config.run)):
        if name not in leave_out and not parts.is_complete("eval", for_checkpoint(config, name)):
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
    if not _unsettled(paths):
        return
    try:
        with Lease(paths.status, "alarms", paths.eval):
            every = history.read_all(paths)
            raised = {alarm for result in every for alarm in _note(paths, result)["alarms"]}
            for result in _unsettled(paths):
                found = raise_alarms(config, every, result, raised)
                raised |= {str(alarm) for alarm in found}
                noted = {"metrics": digest_json(_plain(result)), "alarms": [str(alarm) for alarm in found]}
                storage.write_json(_note_file(paths, result), noted)
    except Busy:
        log.info("another watcher raises the alarms of %s", paths.eval)


def _unsettled(paths: RunPaths) -> list[dict[str, Any]]:
    """Complete results without a note on just these numbers, oldest first; read once, whatever their number."""
    every = sorted(history.read_all(paths), key=lambda r: (r["images_seen"] or 0, r["checkpoint"]))
    whole = [r for r in every if not r["missing"]["images"]]
    return [r for r in whole if _note(paths, r)["metrics"] != digest_json(_plain(r))]


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != "folder"}


def _note_file(paths: RunPaths, result: dict[str, Any]) -> str:
    return storage.join(paths.eval, result["checkpoint"], result["folder"], "alarm.json")


def _note(paths: RunPaths, result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that alarms were raised for, and the alarms; empty where there is no note, or a torn one."""
    found = storage.read_object(_note_file(paths, result))
    return found if found.keys() >= {"metrics", "alarms"} else {"metrics": "", "alarms": []}


def raise_alarms(
    config: RunConfig, every: list[dict[str, Any]], result: dict[str, Any], raised: set[str]
) -> list[compare.Alarm]:
    """Log what is alarming about a result and was not raised before, and tell of it; returns the alarms."""
    watch, checkpoint = config.eval.watch, result["checkpoint"]
    like = [r for r in every if compare.alike(r, result)]
    limits = (watch.alarm_rate, watch.alarm_min_change, watch.alarm_bad_images)
    found = compare.alarms(like, checkpoint, *limits)
    # One that was evaluated late may be what newer ones are to be held against.
    newer = sorted({r["checkpoint"] for r in like if (r["images_seen"] or 0) > (result["images_seen"] or 0)})
    found += [alarm for name in newer for alarm in compare.alarms(like, name, *limits) if alarm.best == checkpoint]
    found = [alarm for alarm in found if str(alarm) not in raised]
    report = parts.report_path(config, checkpoint)
    for alarm in found:
        log.warning("ALARM %s", alarm)
        print(f"ALARM {alarm}", file=sys.stdout, flush=True)
        facts = dataclasses.asdict(alarm)
        notify.send(config.notify, "alarm", config.run, "eval", f"ALARM {alarm}", report=report, alarm=facts)
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


def clock(expression: str | None, now: Callable[[], datetime.datetime] | None = None) -> Callable[[], bool]:
    """Whether it is time: always without a cron expression, else once after each of its moments, in local time with its
    changes in spring and autumn (an offset that was right in winter is an hour off in summer)."""
    if expression is None:
        return lambda: True
    now = now or local_time
    moments = CronSim(expression, now())
    following = [next(moments)]

    def due() -> bool:
        # By the time itself: moments of one zone are else compared by what the clock on the wall shows.
        moment = now().timestamp()
        if moment < following[0].timestamp():
            return False
        while following[0].timestamp() <= moment:  # moments that passed during an evaluation are late, and skipped
            following[0] = next(moments)
        return True

    return due


def local_time() -> datetime.datetime:
    """Now, in the zone of TZ or of this machine; with the zone's rules, not today's offset."""
    from dateutil import tz

    return datetime.datetime.now(tz.gettz())
