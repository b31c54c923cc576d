"""The command line: `python orchestration/run_stage.py STAGE ...`, or `carrara STAGE ...` where installed.

    carrara latents --config configs/demo.yaml latents.batch_size=64     one stage
    carrara all --config configs/demo.yaml                               every stage in order
    carrara eval --model FOLDER --run runs/sd15 eval.prompts_file=FILE   any diffusers pipeline; needs no table
    carrara status runs/demo                                             how far a run is; needs no cluster
    carrara submit latents --address http://127.0.0.1:8265 ...           the same stage as a Ray job
    carrara ingest --config configs/demo.yaml --dry-run                  what the filters keep, and what it costs
    carrara ingest --config configs/demo.yaml --retry transient          fetch again what may come now
    carrara remove --config configs/demo.yaml --urls FILE                take pictures out of images and latents
    carrara plan | inspect                                               latents: what they cost, what they are worth
    carrara doctor                                                       what is here, and known traps
    carrara demo                                                         what `make demo` runs
    carrara export | sample | watch | numbers | grid | explain-fid | judge   see `carrara sample --help` and so on

As a Ray job: ray job submit --working-dir . -- python orchestration/run_stage.py latents --config configs/demo.yaml

Exit codes: 0 done, 1 the stage failed, 2 the configuration or an input is wrong (before any work),
75 stopped by SIGTERM and to be resumed by the same command, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # run as a script: its folder would hide the top-level packages, so the root takes its place
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

from orchestration.stopping import EXIT_STOPPED, Stopped
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")


def guarded(work: Callable[[], object]) -> int:
    """Run `work`; its errors for people become one sentence on stderr and an exit code. Others are bugs and pass."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("carrara").setLevel(logging.INFO)
    try:
        work()
    except ConfigError as e:
        return _say(e, 2)
    except StageError as e:
        return _say(e, 1)
    except Stopped as e:
        return _say(e, EXIT_STOPPED)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from here", 130)
    return 0


def _say(what: object, code: int) -> int:
    print(f"carrara: {what}", file=sys.stderr, flush=True)
    return code


COMMANDS = ("all", "status", "doctor", "submit", "remove", "demo")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `carrara --help` shows how it is called")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:
        from orchestration.demo import main as demo

        return demo(given[1:])
    from orchestration import commands

    if given and given[0] in commands.COMMANDS:
        return guarded(lambda: commands.run(given[0], given[1:]))
    return guarded(lambda: _command(given))


def _command(arguments: Sequence[str]) -> None:
    from orchestration import commands
    from orchestration.stages import STAGES, known

    parser = _Parser(prog="carrara", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = ", ".join((*COMMANDS, *commands.COMMANDS))
    parser.add_argument("command", help=f"a stage ({', '.join(STAGES)}) or {others}")
    parser.add_argument("rest", nargs="*", metavar="section.key=value", help="settings to change; for status, the run")
    parser.add_argument("--config", help="the run's YAML (else CARRARA_CONFIG, else ./carrara.yaml)")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--redo", action="store_true", help="make again what was made with other settings")
    parser.add_argument("--adopt", action="store_true", help="of a fit: go on with settings or data that changed")
    parser.add_argument(
        "--dry-run", nargs="?", type=int, const=0, metavar="ROWS", help="ingest: fetch nothing; look at about ROWS rows"
    )
    parser.add_argument("--retry", metavar="CODES", help="ingest: fetch failed rows again: transient, or error codes")
    parser.add_argument(
        "--add-changed",
        action="store_true",
        default=None,
        help="ingest: where a file of the table changed, take its rows anew as further shards",
    )
    parser.add_argument("--urls", metavar="FILE", help="remove: a file of URLs, one a line")
    parser.add_argument("--sha256", metavar="FILE", help="remove: a file of sha256 of pictures as fetched")
    parser.add_argument("--host", metavar="NAME", help="remove: all pictures of a host and those below it")
    parser.add_argument("--address", help="submit: the cluster's dashboard, e.g. http://127.0.0.1:8265")
    parser.add_argument("--model", metavar="FOLDER", help="eval: any diffusers pipeline, a folder or a hub name")
    parser.add_argument("--run", metavar="DIR", help="eval --model: the folder for its results")
    args = parser.parse_intermixed_args(arguments)
    known(args.command, (*COMMANDS, *commands.COMMANDS))
    _check_options(args)
    if args.command == "status":
        _status(args.rest)
    elif args.command == "doctor":
        from orchestration.doctor import examine

        examine(args.config)
    elif args.command == "submit":
        _submit(args)
    elif args.model is not None:
        from orchestration.evaluation import evaluate_model

        print(evaluate_model(args.model, args.run, args.rest, args.config, args.local, args.redo))
    else:
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from orchestration import stages
    from orchestration.config import base_folder, find_config, load

    base, why = base_folder()
    path = find_config(args.config, base)
    config = load(path, args.rest, base)
    log.info("configuration %s; run %s (relative paths are from %s, %s)", path, config.run, base, why)
    if args.command == "remove":
        from orchestration import remove

        print(remove.run(config, args.urls, args.sha256, args.host))
        return
    if args.dry_run is not None:
        print(stages.dry_run(config, args.dry_run or None))
        return
    if args.retry is not None:
        stages.retry_ingest(config, args.retry, args.local)
        return
    if args.command == "all":
        stages.check_all(config)
    for name in stages.STAGES if args.command == "all" else (args.command,):
        stages.run(name, config, args.local, args.redo, bool(args.add_changed), args.adopt)


def _check_options(args: argparse.Namespace) -> None:
    """Options that belong to one command are refused elsewhere: a mistaken --dry-run must not begin the work."""
    owners = {
        "model": "eval",
        "run": "eval",
        "dry_run": "ingest",
        "retry": "ingest",
        "add_changed": "ingest",
        "urls": "remove",
        "sha256": "remove",
        "host": "remove",
    }
    for option, owner in owners.items():
        if getattr(args, option) is not None and args.command != owner:
            raise ConfigError(f"--{option.replace('_', '-')} belongs to `carrara {owner}`")
    if args.dry_run is not None and (args.retry is not None or args.dry_run < 0):
        raise ConfigError("--dry-run takes a number of rows or nothing, and does not go with --retry")


def _status(rest: Sequence[str]) -> None:
    from orchestration import status

    if len(rest) != 1:
        raise ConfigError("status needs the run's folder: carrara status runs/demo")
    print(status.table(status.read(rest[0])))


def _submit(args: argparse.Namespace) -> None:
    """`ray job submit` of a stage from the current folder, with Ray's own command line."""
    import subprocess

    from orchestration.cluster import job_command
    from orchestration.stages import known

    if not args.rest:
        raise ConfigError("submit needs a stage: carrara submit latents --config configs/demo.yaml")
    stage, *overrides = args.rest
    known(stage, ("all", "watch", "grid"))
    options = [*(["--config", args.config] if args.config else []), *(["--redo"] if args.redo else [])]
    options += [*(["--adopt"] if args.adopt else []), *overrides]
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    code = subprocess.run(job_command(address, [stage, *options])).returncode
    if code:
        raise StageError(f"the job did not succeed (ray job submit ended with {code})")


if __name__ == "__main__":
    sys.exit(main())
