"""The fits on Ray: a gang of ranks runs train/main.py's loop, and checkpoints carry it over deaths.

Whether to start again is decided here, since it must be known what the ranks died of: an error that says
what to change ends the run; any other death goes on from the last checkpoint, also with fewer ranks where
the configuration allows it, and is forgotten once a newer checkpoint has been reached, so that a fault that
comes back at one place does not loop for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import Any

from orchestration import attempts
from orchestration.config import Ranks, RayConfig, RunConfig
from orchestration.lease import Lease
from orchestration.stopping import StopFlag, Stopped, stop_on_sigterm
from shards import storage
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from train.config import TrainingSections
from train.fit_config import FitConfig, layout

log = logging.getLogger("carrara")

FEWER_AFTER_S = 60.0  # how long all the ranks' room is waited for where fewer would do
FEWER_YET_S = 5.0  # and then that of each smaller number: they may be many
LOOK_EVERY_S = 5.0  # how often it is asked whether a node of the ranks is about to go
GROW_AFTER_S = 300.0  # how long fewer ranks than configured train before there may be a stop to take in more


def run(stage: str, config: RunConfig, local: bool = False, redo: bool = False, adopt: bool = False) -> None:
    """Fit `stage` to its end. adopt: go on with what differs from the settings it was begun with.

    Raises ConfigError, StageError, or Stopped after SIGTERM.
    """
    paths = RunPaths(config.run)
    root = paths.checkpoints if stage == "train" else getattr(paths, stage)
    sections = TrainingSections(
        run=config.run, seed=config.seed, autoencoder=config.autoencoder, clip=config.clip, train=config.train
    )
    with Lease(paths.status, stage, root) as lease, _status_ends(paths, stage):
        if local:
            _without_ray(stage, sections, redo, adopt)
        else:
            _on_ray(stage, sections, config, redo, adopt, lease)


def _without_ray(stage: str, sections: TrainingSections, redo: bool, adopt: bool) -> None:
    """One rank in a fresh process of its own: DeepSpeed cannot fit a second model after the first in one."""
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    asked = False
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        fit = pool.submit(_rank, {"stage": stage, "sections": sections.model_dump(), "redo": redo, "adopt": adopt})

        def pass_on(_signum: int, _frame: FrameType | None) -> None:
            nonlocal asked
            asked = True
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # that is SIGTERM

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            if stopped := fit.result():
                raise Stopped(stopped)
        except BrokenProcessPool:
            if asked:  # before it could obey
                raise _stopped(stage) from None
            raise StageError(f"{stage}: the process that was fitting it died; run the same command again") from None
        finally:
            signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """A fit must not go on unseen, and write, after the process that holds its lock was killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux's PR_SET_PDEATHSIG


def _rank(request: dict[str, Any]) -> str | None:
    """What each rank's process runs; returns where it stopped, if it was asked to."""
    from train.main import run as fit
    from train.ranks import Stopped as FitStopped

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("carrara").setLevel(logging.INFO)
    try:
        tell = None
        if request.get("on_ray"):
            from orchestration.metrics import Exporter

            tell = Exporter(request["sections"]["run"], request["stage"]).line
        sections = TrainingSections(**request["sections"])
        fit(request["stage"], sections, redo=request["redo"], adopt=request["adopt"], tell=tell)
    except FitStopped as e:
        return str(e)
    return None


def _on_ray(stage: str, sections: TrainingSections, config: RunConfig, redo: bool, adopt: bool, lease: Lease) -> None:
    from orchestration.gang import RankDied

    ranks: Ranks = getattr(config.ray, stage)
    paths = RunPaths(config.run)
    failures, reached = 0, _images(stage, paths)
    with stop_on_sigterm(StopFlag(stage)) as asked, asked.waits():
        while True:
            request = {"stage": stage, "sections": sections.model_dump(), "redo": redo, "adopt": adopt, "on_ray": True}
            try:
                if _fit_once(stage, request, getattr(sections, stage), ranks, config.ray, asked, lease):
                    return
                redo = False  # saved, to go on with other ranks; the next round begins with all that there is room for
            except RankDied as e:
                now = _images(stage, paths)
                attempts.note(paths.status, stage, attempts.RANKS, "died", str(e), images=now)
                failures = 1 if now > reached else failures + 1
                reached = max(reached, now)
                if asked.is_set():
                    raise _stopped(stage) from None
                if 0 <= ranks.max_failures < failures:
                    raise StageError(
                        f"{stage}: the ranks died {failures} times without reaching a newer checkpoint than the one "
                        f"at {reached} images; the last time: {e}"
                    ) from e
                log.warning("%s: a rank died (%s); going on from the checkpoint at %d images", stage, e, now)
                redo = redo and _to_redo(stage, sections)  # the old fit may still lie there; the new one is kept


def _fit_once(
    stage: str, request: dict[str, Any], fit: FitConfig, ranks: Ranks, config: RayConfig, asked: StopFlag, lease: Lease
) -> bool:
    """One gang of ranks to its end; with fewer ranks than configured where that is allowed and no room for more.

    False: it saved and stopped before its end, since a node of its ranks is about to go, or since there is room for
    more ranks again.
    """
    from orchestration.gang import Gang, NoRoom

    passed_on = math.inf  # when the request to stop was passed on to the ranks
    gang: Gang | None = None
    regroup, looked = "", time.monotonic()

    def check() -> None:
        nonlocal passed_on, regroup, looked
        lease.check()
        if gang is not None and gang.processes and not regroup and time.monotonic() - looked > LOOK_EVERY_S:
            looked = time.monotonic()
            more = gang.began is not None and looked - gang.began > GROW_AFTER_S
            larger = min((n for n in counts if n > gang.count), default=gang.count)  # step by step, not all or none
            regroup = gang.leaving() or (gang.room_for(larger - gang.count) if more else "")
            if regroup:
                log.warning("%s: %s; saving, to go on with other ranks", stage, regroup)
                gang.signal(signal.SIGTERM)
        if asked.is_set():
            if gang is None or not gang.processes or time.monotonic() - passed_on > config.grace_s:
                raise _stopped(stage)
            if passed_on == math.inf:
                gang.signal(signal.SIGTERM)
                passed_on = time.monotonic()  # only now: on a busy node the signal itself may take its time

    status = RunPaths(request["sections"]["run"]).status
    counts = _counts(stage, fit, ranks)
    for count in counts:
        last = count == counts[-1]
        most = config.wait_for_nodes_s
        patience = most if last else min(FEWER_AFTER_S if gang is None else FEWER_YET_S, most)
        gang = Gang(stage, count, ranks, patience, check)
        try:
            with gang:
                where = [{"address": p.address, "pid": p.pid} for p in gang.processes]
                attempts.note(status, stage, attempts.RANKS, "started", f"{len(where)} ranks", ranks=where)
                stopped = [s for s in gang.run(_rank, request) if s]
        except NoRoom as e:
            if last:
                raise
            log.warning("%s; going on with fewer", e)
            continue
        if stopped and regroup and not asked.is_set():
            return False
        if stopped:
            raise Stopped(stopped[0])
        return True
    return True


def _counts(stage: str, fit: FitConfig, ranks: Ranks) -> list[int]:
    """Numbers of ranks to try, from the configured one down to `min_ranks`, that can share the batch evenly."""
    layout(stage, fit, fit.ranks)
    counts = [fit.ranks]
    for count in range(fit.ranks - 1, (ranks.min_ranks or fit.ranks) - 1, -1):
        with contextlib.suppress(ConfigError):
            layout(stage, fit, count)
            counts.append(count)
    return counts


def _to_redo(stage: str, sections: TrainingSections) -> bool:
    from train.state import stage_state

    found = stage_state(stage, sections.run, sections)
    return found.state == "stale" or (found.state == "done" and bool(found.reason))


def _stopped(stage: str) -> Stopped:
    return Stopped(f"{stage}: stopped on request; the same command goes on from the last checkpoint")


def _images(stage: str, paths: RunPaths) -> int:
    """How many images the newest complete checkpoint has seen."""
    from train.folders import latest_complete, read_manifest
    from train.state import stage_paths

    newest = latest_complete(stage_paths(stage, paths).checkpoints, contents=False)
    return int(read_manifest(newest)["images"]) if newest else 0


@contextlib.contextmanager
def _status_ends(paths: RunPaths, stage: str) -> Iterator[None]:
    """On an exception, have the stage's status file say so: the ranks that write it may be dead. A finished fit stays
    finished where this try wrote nothing."""
    url = storage.join(paths.status, f"{stage}.json")
    before = storage.read_object(url)
    try:
        yield
    except BaseException as e:
        with contextlib.suppress(Exception):
            record = storage.read_object(url)
            if record and not (record == before and record.get("state") == "done"):
                state = "stopped" if isinstance(e, Stopped | KeyboardInterrupt) else "failed"
                storage.write_json(url, {**record, "state": state, "seconds_left": None})
        raise
