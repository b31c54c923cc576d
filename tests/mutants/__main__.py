"""Take out, one at a time, the lines that keep the promises, and see that a test fails each time.

    make test-mutants
    python -m tests.mutants --only plan --jobs 2

The table is the TOML files beside this one: a promise, the file and exact text that keep it, what stands there
instead, and the tests that must notice. Everything happens in copies of the tree; the checkout itself is never
changed. First the tests named in the table run unchanged and must pass (--passed: they have just done so). How long
they take says how long they may take under a mutation. One that makes its tests hang is not seen: a test that takes
too long says nothing of what is wrong, and takes too long on a slow machine as well. Exit code 1 where a mutation goes
unseen or an entry does not fit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
UNCHANGED_S = 300.0  # for a test in the unchanged tree, or where it was not run there
LEAST_S, TIMES = 20.0, 3.0  # a test of a mutant may take so long, and so many times what it takes unchanged
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)  # in pytest's short summary
TOOK = re.compile(r"^([\d.]+)s (setup|call|teardown) +(.+)$", re.MULTILINE)  # in its list of durations
GRACE_S = 30.0  # for each test, before a process is ended whose tests end neither by themselves nor by pytest-timeout
HANGS = re.compile(r"from pytest-timeout|^\++ Timeout \++$", re.MULTILINE)  # as it says it by a signal, or a thread
T, R = TypeVar("T"), TypeVar("R")
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build"
)


# What is imported once, before the project. Ray is not among them: it reads the mode of authentication once, as it is
# loaded.
LARGE = (
    "tests.conftest",  # its environment must stand before the others are imported
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.stage3",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "peft",
    "open_clip",
    "pyarrow.parquet",
    "s3fs",
    "scipy.stats",
    "aiohttp",
    "pydantic",
    "typer",
    "pytest",
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One line of the table. text: occurs once in file. tests: pytest's node names, at least one of which must fail."""

    promise: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    @classmethod
    def read(cls, source: Path) -> list[Mutant]:
        """The entries of one TOML file; raises ValueError naming an entry that has other keys than these five."""
        wanted = {f.name for f in dataclasses.fields(cls)}
        found = []
        for number, entry in enumerate(tomllib.loads(source.read_text())["mutant"], 1):
            if set(entry) != wanted or not entry["tests"]:
                raise ValueError(f"{source.name}: entry {number} needs just {', '.join(sorted(wanted))}")
            found.append(cls(**{**entry, "tests": tuple(entry["tests"])}))
        return found

    def apply(self, tree: Path) -> str:
        """Write the mutation into a copy of the tree; returns the file's text of before.

        Raises ValueError where the text does not occur exactly once.
        """
        path = tree / self.file
        before = path.read_text()
        if before.count(self.text) != 1:
            raise ValueError(
                f"{self.file}: the text of '{self.promise}' occurs {before.count(self.text)} times, not once"
            )
        path.write_text(before.replace(self.text, self.replacement))
        return before


class Pytester:
    """A copy of a tree and the process that runs pytest in it (pytester.py), which has imported some modules."""

    def __init__(self, tree: Path, of: Path = ROOT, imported: Sequence[str] = LARGE) -> None:
        self.tree = Path(shutil.copytree(of, tree, ignore=SKIPPED, symlinks=True))
        self.output = tree.with_suffix(".txt")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("pytester.py")), *imported],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: Sequence[str], limit_s: float) -> tuple[int | None, str]:
        """Pytest's exit code, None where it was ended from outside, and its output for these tests, to the first that
        fails. limit_s: for each of them."""
        options = ["-q", "-x", "--no-header", "--durations=0", "-p", "no:cacheprovider", f"--timeout={limit_s:.0f}"]
        # A test that hangs where no signal arrives is ended from outside.
        job = {"arguments": [*options, *tests], "output": str(self.output), "timeout": (limit_s + GRACE_S) * len(tests)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("the process that runs pytest has ended")
        return None if answer == "timeout" else int(answer), self.output.read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a mutant. mark: seen or UNSEEN; says: the test that noticed, or what is wrong."""

    mark: str
    says: str
    seconds: float


def outcome(mutant: Mutant, pytester: Pytester, limit_s: float) -> Outcome:
    """Run the mutant's tests in this copy of the tree."""
    began = time.monotonic()
    try:
        before = mutant.apply(pytester.tree)
    except (OSError, ValueError) as e:
        return Outcome("UNSEEN", str(e), 0.0)
    try:
        code, output = pytester.run(mutant.tests, limit_s)
    finally:
        (pytester.tree / mutant.file).write_text(before)
    took = time.monotonic() - began
    failed = FAILED.search(output)
    if code is None or HANGS.search(output):
        return Outcome("UNSEEN", f"{failed[1] if failed else 'a test'} hangs; another must fail before it", took)
    if code == 1 and failed:
        return Outcome("seen", failed[1], took)
    says = "no test fails without this line" if code == 0 else f"pytest ended with {code}: {output[-500:]}"
    return Outcome("UNSEEN", says, took)


def in_turn(pytesters: Sequence[Pytester], work: Callable[[T, Pytester], R], items: Sequence[T]) -> Iterator[R]:
    """`work` of each item with whichever process is free, in the order of the items."""
    free: queue.SimpleQueue[Pytester] = queue.SimpleQueue()
    for pytester in pytesters:
        free.put(pytester)

    def one(item: T) -> R:
        pytester = free.get()
        try:
            return work(item, pytester)
        finally:
            free.put(pytester)

    with concurrent.futures.ThreadPoolExecutor(len(pytesters)) as pool:
        yield from pool.map(one, items)


def unchanged(pytesters: Sequence[Pytester], tests: Sequence[str]) -> tuple[str, Counter[str]]:
    """(what pytest says where one of these tests fails in the unchanged tree, else empty; how many seconds each of them
    takes, with what the tests of its file share)."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    run = in_turn(pytesters, lambda some, pytester: pytester.run(some, UNCHANGED_S), list(files.values()))
    wrong, took = "", Counter[str]()
    for some, (code, output) in zip(files.values(), run, strict=True):
        wrong += output[-4000:] if code else ""
        phases = [(float(seconds), phase, test.partition("[")[0]) for seconds, phase, test in TOOK.findall(output)]
        shared = max((seconds for seconds, phase, _ in phases if phase == "setup"), default=0.0)
        for test in some:
            mine = [seconds for seconds, phase, name in phases if phase != "setup" and name == test.partition("[")[0]]
            took[test] = shared + max(mine, default=0.0)
    return wrong, took


def main() -> int:
    """Run the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="entries whose file name, promise or source file holds this text")
    parser.add_argument("--jobs", type=int, default=3, help="mutants tested at a time")
    parser.add_argument("--passed", action="store_true", help="the tests have just passed: do not run them unchanged")
    args = parser.parse_args()
    tables = sorted(Path(__file__).parent.glob("*.toml"))
    mutants = [m for t in tables for m in Mutant.read(t) if args.only in f"{t.name} {m.file} {m.promise}"]
    if not mutants:
        print("no entry of the mutation table fits", file=sys.stderr)
        return 1
    began = time.monotonic()
    wrong, took = [], Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as scratch,
        contextlib.ExitStack() as stack,
    ):
        pytesters = [Pytester(Path(scratch) / str(job)) for job in range(args.jobs)]
        for pytester in pytesters:
            stack.callback(pytester.close)
        if not args.passed:
            problem, took = unchanged(pytesters, sorted({t for m in mutants for t in m.tests}))
            if problem:
                print(f"the tests of the table do not pass as they are:\n{problem}", file=sys.stderr)
                return 1
            print(f"the tests pass as they are, {time.monotonic() - began:.0f} s", flush=True)

        def one(mutant: Mutant, pytester: Pytester) -> Outcome:
            times = [took[test] for test in mutant.tests if test in took]
            return outcome(mutant, pytester, LEAST_S + TIMES * max(times) if times else UNCHANGED_S)

        for number, (mutant, found) in enumerate(zip(mutants, in_turn(pytesters, one, mutants), strict=True), 1):
            said = f"{number:4}/{len(mutants)} {found.mark:6} {found.seconds:4.0f} s {mutant.file}: {mutant.promise}"
            print(f"{said}\n            by {found.says}" if found.mark != "UNSEEN" else said, flush=True)
            if found.mark == "UNSEEN":
                wrong.append(f"{mutant.file}: {mutant.promise}: {found.says}")
    print(f"{len(mutants) - len(wrong)} of {len(mutants)} mutations are seen, {time.monotonic() - began:.0f} s")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
