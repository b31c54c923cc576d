"""`carrara submit`: any command as a Ray job, from any folder, with the files that its arguments name.

What is sent is this Carrara and those files, in a folder of their own: nothing of the folder where the command is given
can get in the way, and nothing of it is needed. Relative paths in the configuration are meant from that folder, where
the cluster has one of that name (a shared disk), else from where its Ray was started (orchestration/config.py).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestration.cluster import ENDED, job_command
from orchestration.packages import NAMES, ROOT
from orchestration.stopping import EXIT_STOPPED, Stopped
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara")

SENT = "sent"  # the folder of the user's files in what is sent
LARGEST = 50_000_000  # bytes of such a file; Ray keeps what is sent in the head's memory
HERE = "http://127.0.0.1:8265"


ReadHere = Callable[[Sequence[str]], tuple[set[int], bool]]


def submit(command: Sequence[str], address: str | None, read_here: ReadHere) -> None:
    """Run `carrara COMMAND` as a job and follow it. Raises as the job ended: ConfigError, StageError or Stopped.

    read_here: the positions of the words of a command that name files, and whether it would look for a configuration by
    itself; these are sent with it.
    """
    arguments = list(command)
    if "--address" in arguments:  # it may stand behind the command, too
        at = arguments.index("--address")
        if at + 1 == len(arguments):
            raise ConfigError("submit: --address needs the cluster's dashboard, such as http://127.0.0.1:8265")
        address = address or arguments[at + 1]
        del arguments[at : at + 2]
    if arguments[:1] in (["submit"], ["demo"], ["status"]):
        raise ConfigError(f"submit: `carrara {arguments[0]}` is no work for a job; call it here")
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or HERE
    job = f"carrara-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory(prefix="carrara-job-") as folder:
        sent = pack(Path(folder), arguments, read_here)
        line = job_command(address, sent, Path(folder), job, {"CARRARA_SENT_FROM": os.getcwd()})
        try:
            process = subprocess.run(line)
        except KeyboardInterrupt:
            log.warning("the job %s goes on; `ray job stop --address %s %s` ends it", job, address, job)
            raise
    end(address, job, process.returncode)


def pack(folder: Path, arguments: Sequence[str], read_here: ReadHere) -> list[str]:
    """Lay Carrara's packages and the files that the arguments name into an empty folder; returns the arguments as they
    are there."""
    folder.mkdir(exist_ok=True)
    for name in (*NAMES, "orchestration"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "tests")
        shutil.copytree(Path(ROOT) / name, folder / name, ignore=ignored)
    (folder / "pyproject.toml").write_text("# so that this is known as a checkout\n")
    given = list(arguments)
    files, looks = read_here(given)
    if looks:
        found = os.environ.get("CARRARA_CONFIG") or ("carrara.yaml" if os.path.isfile("carrara.yaml") else None)
        if found:
            given += ["--config", found]
            files.add(len(given) - 1)
    return [_sent(folder, word, i) if i in files else word for i, word in enumerate(given)]


def _sent(folder: Path, word: str, number: int) -> str:
    """A file's name, or `--option=name`; one that is here goes along."""
    option, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    if not path or not os.path.isfile(path):
        return word
    if os.path.getsize(path) > LARGEST:
        raise ConfigError(f"submit: {path} has more than {LARGEST / 1e6:.0f} MB; lay it where the cluster can read it")
    (folder / SENT).mkdir(exist_ok=True)
    name = f"{SENT}/{number}-{os.path.basename(path)}"
    shutil.copyfile(path, folder / name)
    return f"{option}{equals}{name}"


def end(address: str, job: str, code: int) -> None:
    """Raise as a job ended. Ray's command line says 0 for a job that was stopped, so the job itself is asked."""
    found = _job(address, job)
    if found is None:
        raise StageError(f"the job could not be submitted to {address} (ray job submit ended with {code})")
    status, exit_code = found
    if status == "SUCCEEDED":
        return
    if status == "STOPPED" or exit_code == EXIT_STOPPED:
        raise Stopped(f"the job {job} was stopped; the same command goes on from here")
    if exit_code == 2:
        raise ConfigError(f"the job {job} found its configuration or input wrong; its last line above says what")
    raise StageError(f"the job {job} did not succeed ({status.lower()}, exit code {exit_code})")


def _job(address: str, job: str) -> tuple[str, int | None] | None:
    """(status, exit code) of a job that has ended; None where the cluster knows of none."""
    code = (
        "import json, os, sys\n"
        "from ray.job_submission import JobSubmissionClient\n"
        "headers = json.loads(os.environ.get('RAY_JOB_HEADERS') or 'null')\n"  # which `ray job submit` reads by itself
        "found = JobSubmissionClient(sys.argv[1], headers=headers).get_job_info(sys.argv[2])\n"
        "print(json.dumps([str(found.status.value), found.driver_exit_code]))"
    )
    while True:
        asked = subprocess.run([sys.executable, "-c", code, address, job], capture_output=True, text=True)
        if asked.returncode:
            return None
        found: Any = json.loads(asked.stdout.strip().splitlines()[-1])
        if found[0] in ENDED:
            return found[0], found[1]
        time.sleep(1.0)  # the log's connection broke while the job goes on
