"""The command line: `python orchestration/run_stage.py COMMAND ...`, or `carrara COMMAND ...` where installed.

    carrara latents --config configs/demo.yaml latents.batch_size=64     one stage
    carrara all --config configs/demo.yaml                               every stage in order
    carrara eval --model FOLDER --run runs/sd15 eval.prompts_file=FILE   any diffusers pipeline; needs no table
    carrara status runs/demo                                             how far a run is; needs no cluster
    carrara --help, carrara latents --help                               all there is

As a Ray job: carrara submit latents --config configs/demo.yaml, or
ray job submit --working-dir . -- python orchestration/run_stage.py latents --config configs/demo.yaml

Exit codes: 0 done, 1 the stage failed, 2 the configuration or an input is wrong (before any work),
75 stopped by SIGTERM and to be resumed by the same command, 130 Ctrl-C.

The commands are in orchestration/commands/. What is here turns their errors into a sentence and an exit code.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # run as a script: its folder would hide the top-level packages, so the root takes its place
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import logging
from collections.abc import Callable, Sequence

from orchestration.packages import hidden
from orchestration.stopping import EXIT_STOPPED, StopFlag, Stopped, stop_on_sigterm

log = logging.getLogger("carrara")


def guarded(work: Callable[[], object]) -> int:
    """Run `work`; its errors for people become one sentence on stderr and an exit code. Others are bugs and pass."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("carrara").setLevel(logging.INFO)
    try:
        with stop_on_sigterm(StopFlag()):  # from here on; what takes time to load comes after it
            from shards.settings import ConfigError, StageError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    if (other := hidden()) is not None:
        return _say(other, 2)

    def work() -> None:
        from orchestration.commands import parser

        parser.run(list(sys.argv[1:] if arguments is None else arguments))

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
