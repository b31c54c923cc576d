"""Take out, one at a time, the lines that keep the promises, and see that a test fails each time.

    make test-mutants
    python -m tests.mutants --only plan --jobs 2

The table is the TOML files beside this one: a promise, the file and exact text that keep it, what stands there
instead, and the tests that must notice. Everything happens in copies of the tree; the checkout itself is never
changed. First the tests named in the table run unchanged and must pass (--passed: they have just done so). Exit
code 1 where a mutation goes unseen or an entry does not fit.
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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240  # for the tests of one mutant; a mutation that makes a test hang is seen as well
UNCHANGED_S = 1800  # for all tests of the table in the unchanged tree
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)  # in pytest's short summary
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build"
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
    """A copy of the tree and the process that runs pytest in it (pytester.py)."""

    def __init__(self, tree: Path) -> None:
        self.tree = Path(shutil.copytree(ROOT, tree, ignore=SKIPPED, symlinks=True))
        self.output = tree.with_suffix(".txt")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.pytester"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: Sequence[str], timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
        """Pytest's exit code and output for these tests, to the first that fails; 1 where they ran out of time."""
        options = ["-q", "-x", "--no-header", "--durations=0", "-p", "no:cacheprovider", "--timeout=120"]
        job = {"arguments": [*options, *tests], "output": str(self.output), "timeout": timeout_s}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("the process that runs pytest has ended")
        return (1, "out of time") if answer == "timeout" else (int(answer), self.output.read_text(errors="replace"))

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def seen(mutant: Mutant, pytester: Pytester) -> tuple[str, str]:
    """(what is wrong with the entry, empty where a test of it fails in this copy of the tree; the test that failed)."""
    try:
        before = mutant.apply(pytester.tree)
    except (OSError, ValueError) as e:
        return str(e), ""
    try:
        code, output = pytester.run(mutant.tests)
    finally:
        (pytester.tree / mutant.file).write_text(before)
    if code == 1:
        failed = FAILED.search(output)
        return "", failed[1] if failed else output.strip().rpartition("\n")[2]
    if code == 0:
        return "no test fails without this line", ""
    return f"pytest ended with {code}: {output[-500:]}", ""


def unchanged(pytesters: Sequence[Pytester], tests: Sequence[str]) -> str:
    """Empty where these tests pass in the unchanged tree, those of a file in one process; else what pytest says."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    with concurrent.futures.ThreadPoolExecutor(len(pytesters)) as pool:
        parts = [[t for f in list(files)[n :: len(pytesters)] for t in files[f]] for n in range(len(pytesters))]
        found = [pool.submit(p.run, part, UNCHANGED_S) for p, part in zip(pytesters, parts, strict=True) if part]
    return "\n".join(output[-4000:] for code, output in (f.result() for f in found) if code)


def main() -> int:
    """Run the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="entries whose file name, promise or source file holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time")
    parser.add_argument("--passed", action="store_true", help="the tests have just passed: do not run them unchanged")
    args = parser.parse_args()
    tables = sorted(Path(__file__).parent.glob("*.toml"))
    mutants = [m for t in tables for m in Mutant.read(t) if args.only in f"{t.name} {m.file} {m.promise}"]
    if not mutants:
        print("no entry of the mutation table fits", file=sys.stderr)
        return 1
    began = time.monotonic()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, contextlib.ExitStack() as stack:
        pytesters = [Pytester(Path(scratch) / str(job)) for job in range(args.jobs)]
        free: queue.SimpleQueue[Pytester] = queue.SimpleQueue()
        for pytester in pytesters:
            stack.callback(pytester.close)
            free.put(pytester)
        if not args.passed:
            if problem := unchanged(pytesters, sorted({t for m in mutants for t in m.tests})):
                print(f"the tests of the table do not pass as they are:\n{problem}", file=sys.stderr)
                return 1
            print(f"the tests pass as they are, {time.monotonic() - began:.0f} s", flush=True)

        def one(mutant: Mutant) -> tuple[str, str, float]:
            pytester, began = free.get(), time.monotonic()
            try:
                return *seen(mutant, pytester), time.monotonic() - began
            finally:
                free.put(pytester)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            results = zip(mutants, pool.map(one, mutants), strict=True)
            for number, (mutant, (problem, by, took)) in enumerate(results, 1):
                mark = "UNSEEN" if problem else "seen"
                print(f"{number:4}/{len(mutants)} {mark:6} {took:4.0f} s {mutant.file}: {mutant.promise}", flush=True)
                if by:
                    print(f"            by {by}", flush=True)
                if problem:
                    wrong.append(f"{mutant.file}: {mutant.promise}: {problem}")
    print(f"{len(mutants) - len(wrong)} of {len(mutants)} mutations are seen, {time.monotonic() - began:.0f} s")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
