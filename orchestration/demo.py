"""`make demo`: the whole pipeline on a corpus that is drawn here, each stage a Ray job, as a user would submit it.

    carrara demo --config configs/demo.yaml

Draws the corpus, serves it over HTTP on loopback, starts a Ray head of its own and submits one stage after
another. Killed anywhere, the same command finishes the work; where everything is done, it says so without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from demo.corpus import CorpusError, draw_corpus, load_summary
from demo.server import Server, ServerError, serve
from ingest.errors import RETRYABLE
from orchestration import parts, status
from orchestration.cluster import ROOT, Cluster
from orchestration.config import RunConfig, load
from orchestration.lease import Lease
from orchestration.stopping import Stopped
from shards import storage
from shards.layout import RunPaths
from shards.settings import StageError

PORT = 8090
TAIL = 40  # lines of a failed job's log that are shown
LINE_EVERY_S = 10.0
ATTEMPTS = 3  # how often images that were missed are fetched again


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the demo was called with."""

    config: str
    overrides: list[str]
    images: int
    heldout: int


def run(config_file: str, overrides: list[str], images: int, heldout: int) -> None:
    """The demo from the first incomplete stage on. images, heldout: size of the corpus, dirt apart."""
    args = Wanted(config_file, overrides, images, heldout)
    began = time.monotonic()
    config = load(args.config, args.overrides, os.getcwd(), tables=False)
    run = storage.local_path(config.run)
    # A second one would take the first one's Ray for what a killed one left.
    with _sigterm_stops(), Lease(RunPaths(config.run).status, "demo", str(run)):
        open_stages = _incomplete(config)
        if not open_stages:
            _say(f"everything in {run} is complete, nothing to do")
        else:
            corpus = Path(config.ingest.table).parent
            needs_images = "ingest" in open_stages
            url = _base_url(corpus)
            _say(f"[0/{len(parts.STAGES)}] corpus: {args.images} images and {args.heldout} held out, in {corpus}")
            try:
                draw_corpus(corpus, url, args.images, args.heldout, config.seed)
                with contextlib.ExitStack() as stack:
                    server = stack.enter_context(serve(corpus, urlsplit(url).port or PORT)) if needs_images else None
                    _say("starting a Ray head on loopback, with token authentication")
                    cluster = stack.enter_context(Cluster(record=run / "status" / "cluster.json"))
                    for name in open_stages:
                        _stage(cluster, config, name, args, server)
            except (CorpusError, ServerError) as e:
                raise StageError(str(e)) from None
    _farewell(config, time.monotonic() - began)


def _incomplete(config: RunConfig) -> list[str]:
    """The stages from the first incomplete one on; those after it are judged when their turn comes."""
    for i, name in enumerate(parts.STAGES):
        if not parts.is_complete(name, config) or (name == "ingest" and _missed(config)):
            return list(parts.STAGES[i:])
    return []


def _missed(config: RunConfig) -> int:
    """Images that were not fetched though they were there: the server, or the network to it, had gone for a while.

    The corpus knows which of its links fail, and how.
    """
    try:
        expected = load_summary(Path(config.ingest.table).parent).expected["errors"]
    except CorpusError:
        return 0
    paths = RunPaths(config.run)
    missed = 0
    for root, known in ((paths.images, expected), (paths.heldout, {})):
        errors = storage.read_object(storage.join(root, "dataset.json")).get("errors", {})
        missed += sum(max(0, n - known.get(code, 0)) for code, n in errors.items() if code in RETRYABLE)
    return missed


def _base_url(corpus: Path) -> str:
    """Where the images are served: as the table says where it is drawn already, else at a free port."""
    with contextlib.suppress(CorpusError):
        return str(load_summary(corpus).settings["base_url"])
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", PORT))
        except OSError:
            s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def _stage(cluster: Cluster, config: RunConfig, name: str, args: Wanted, server: Server | None = None) -> None:
    """One stage as a job. A server of images that died meanwhile is started again, and what was missed is fetched."""
    if not parts.is_complete(name, config):
        _job(cluster, config, name, args, server)
    for _ in range(ATTEMPTS if name == "ingest" else 0):
        missed = _missed(config)
        if not missed:
            return
        _say(f"{missed} images were missed while their server was away: they are fetched now")
        _job(cluster, config, name, args, server, "--retry", "transient")


def _job(cluster: Cluster, config: RunConfig, name: str, args: Wanted, server: Server | None, *options: str) -> None:
    step = f"[{parts.STAGES.index(name) + 1}/{len(parts.STAGES)}] {name}"
    began = time.monotonic()
    logs = storage.local_path(RunPaths(config.run).status) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with open(logs / f"{name}.log", "a", encoding="utf-8") as log, _Follower(config, name, step) as follower:

        def on_line(line: str) -> None:
            log.write(line + "\n")
            log.flush()
            lines.append(line)
            del lines[:-TAIL]
            if re.match(r"(WARNING|ERROR|carrara:) ", line):
                follower.write(f"  {line}")

        def while_waiting() -> None:
            follower.look()
            if server is not None and server.revive():
                follower.write("  WARNING the server of the images died, and was started again")

        command = [name, *options, "--config", _config_in_job(args.config), *args.overrides]
        code = cluster.submit(command, on_line, while_waiting=while_waiting)
    if code:
        print("\n".join(f"  | {line}" for line in lines), file=sys.stderr)
        raise StageError(f"{name} failed (exit code {code}); its whole log is {logs / f'{name}.log'}")
    _say(f"{step}: done in {status.duration(time.monotonic() - began)}")


def _config_in_job(path: str) -> str:
    """The configuration's path as the job sees it: relative ones are in the copy of the working folder too."""
    return path if (ROOT / path).is_file() else os.path.abspath(path)


class _Follower:
    """A bar over the status file of the stage that is running; plain lines where there is no terminal."""

    def __init__(self, config: RunConfig, name: str, step: str) -> None:
        lines = {"ingest": ("ingest", "heldout"), "eval": ("features-real-clip", "eval")}.get(name, (name,))
        self.urls = [storage.join(RunPaths(config.run).status, f"{line}.json") for line in lines]
        self.step, self.began = step, time.time()
        self.bar: tqdm[Any] | None = None
        self.stage = ""
        self.said_at = time.monotonic()

    def __enter__(self) -> _Follower:
        _say(self.step)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def write(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def look(self) -> None:
        """Read the newest status of this job and show it."""
        records = [r for url in self.urls if (r := storage.read_object(url)).get("updated", 0) >= self.began]
        if not records:
            return
        record = max(records, key=lambda r: r["began"])
        if sys.stderr.isatty():
            self._draw(record)
        elif time.monotonic() - self.said_at >= LINE_EVERY_S:
            self.said_at = time.monotonic()
            left = record["seconds_left"]
            rest = f", {status.duration(left)} left" if left is not None else ""
            _say(f"{self.step}: {record['done']}/{record['total']} {record['unit']}{rest}  {_figures(record)}".rstrip())

    def _draw(self, record: dict[str, Any]) -> None:
        if record["stage"] != self.stage:
            if self.bar is not None:
                self.bar.close()
            self.stage = record["stage"]
            self.bar = tqdm(total=record["total"], desc=self.step, unit=f" {record['unit']}", dynamic_ncols=True)
        assert self.bar is not None
        self.bar.n = record["done"]
        self.bar.set_postfix_str(_figures(record), refresh=True)


def _figures(record: dict[str, Any]) -> str:
    figures = record.get("figures", {})
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def _farewell(config: RunConfig, seconds: float) -> None:
    """Where the results are, and the numbers that one looks at first."""
    from eval import measure
    from eval.evaluation import METRICS

    paths = RunPaths(config.run)
    found = parts.evaluation(config)
    metrics = measure.read(storage.join(found.folder, METRICS))
    _say("")
    for line in _headline(metrics):
        _say(line)
    _say(f"report  {parts.report_path(config, found.model.name)}")
    _say(f"model   {paths.model}   (diffusers: StableDiffusionPipeline.from_pretrained)")
    _say(f"total   {status.duration(seconds)}")


def _headline(metrics: dict[str, Any] | None) -> list[str]:
    """What was measured, a line a metric, with its 95 % interval; then what each kind of caption comes to."""
    from demo.scorer import KINDS
    from eval.report.page import headline, spread

    if not metrics:
        return []
    lines = [_measured(label, *figures) for label, figures in headline(metrics).items() if figures[0]]
    for kind in KINDS.values():
        found = metrics["by_tag"].get(kind, {})
        measured = [_measured(e["label"], *spread(e)) for name, e in found.items() if name.startswith("shows_all")]
        if measured:
            lines.append(f"{kind}: " + ", ".join(measured))
    return lines


def _measured(label: str, value: str, interval: str) -> str:
    return f"{label}: {value}" + (f" ({interval})" if interval else "")


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: through the contexts, which stop what they started."""

    def handler(_signum: int, _frame: FrameType | None) -> None:
        raise Stopped("the demo was stopped; the same command goes on from here")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
