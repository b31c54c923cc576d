"""Pytest over and over in one tree, each time in a fork of a process that has imported the modules it was given.

The import of the large libraries takes longer than most tests do. Of the project itself nothing is imported before the
fork, but all of it is compiled. A line of standard input is a job in JSON, {arguments, output, timeout}; the answer is
pytest's exit code, or "timeout".
"""

from __future__ import annotations

import atexit
import compileall
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from py_compile import PycInvalidationMode


def main() -> None:
    """Serve the jobs of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library says as it is imported is no answer
    # By its content: a mutation may be as long as what it replaces, and be made within the same second.
    compileall.compile_dir(".", quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    sys.dont_write_bytecode = False  # whatever the environment says: pytest keeps what it makes of the tests
    for name in (*sys.argv[1:], *(plugin.module for plugin in importlib.metadata.entry_points(group="pytest11"))):
        importlib.import_module(name)
    gc.freeze()  # or each fork would walk through, and so copy, all that was imported
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            os.setsid()
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
                os.dup2(source, number)
            answers.close()
            import pytest

            sys.argv = ["pytest"]
            code = pytest.main(job["arguments"])
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the teardown of so many libraries takes longer than many a test
        until = time.monotonic() + job["timeout"]
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # what a test that broke off left running
            os.killpg(child, signal.SIGKILL)
        if ended[0] == 0:
            os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended[1]) if ended[0] else "timeout", file=answers, flush=True)


if __name__ == "__main__":
    main()
