"""Take out, one at a time, the lines that keep the promises, and see that a test fails each time.

    make test-mutants
    python -m tests.mutants --only plan --jobs 2

The table is the TOML files beside this one: a promise, the file and exact text that keep it, what stands there
instead, and the tests that must notice. Everything happens in copies of the tree; the checkout itself is never
changed. First the tests named in the table run unchanged and must pass. Exit code 1 where a mutation goes unseen or
an entry does not fit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240  # for the tests of one mutant; a mutation that makes a test hang is seen as well
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


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Pytest's exit code and output for these tests in a copy of the tree; exit code 1 where they ran out of time."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--durations=0", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "--timeout=120", *tests], cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return 1, "out of time"
    return done.returncode, done.stdout + done.stderr


def seen(mutant: Mutant, tree: Path) -> str:
    """Empty where a test of the mutant fails in this copy of the tree; else what is wrong with the entry."""
    try:
        before = mutant.apply(tree)
    except (OSError, ValueError) as e:
        return str(e)
    try:
        code, output = run_tests(tree, list(mutant.tests))
    finally:
        (tree / mutant.file).write_text(before)
    if code == 1:
        return ""
    if code == 0:
        return "no test fails without this line"
    return f"pytest ended with {code}: {output[-500:]}"


def main() -> int:
    """Run the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="entries whose file name, promise or source file holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time")
    args = parser.parse_args()
    tables = sorted(Path(__file__).parent.glob("*.toml"))
    mutants = [m for t in tables for m in Mutant.read(t) if args.only in f"{t.name} {m.file} {m.promise}"]
    if not mutants:
        print("no entry of the mutation table fits", file=sys.stderr)
        return 1
    began = time.monotonic()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(args.jobs):
            trees.put(Path(shutil.copytree(ROOT, Path(scratch) / str(job), ignore=SKIPPED, symlinks=True)))
        whole = Path(shutil.copytree(ROOT, Path(scratch) / "whole", ignore=SKIPPED, symlinks=True))
        code, output = run_tests_unchanged(whole, sorted({t for m in mutants for t in m.tests}), args.jobs)
        if code:
            print(f"the tests of the table do not pass as they are:\n{output[-4000:]}", file=sys.stderr)
            return 1

        def one(mutant: Mutant) -> str:
            tree = trees.get()
            try:
                return seen(mutant, tree)
            finally:
                trees.put(tree)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for number, (mutant, problem) in enumerate(zip(mutants, pool.map(one, mutants), strict=True), 1):
                mark = "UNSEEN" if problem else "seen"
                print(f"{number:4}/{len(mutants)} {mark:6} {mutant.file}: {mutant.promise}", flush=True)
                if problem:
                    wrong.append(f"{mutant.file}: {mutant.promise}: {problem}")
    print(f"{len(mutants) - len(wrong)} of {len(mutants)} mutations are seen, {time.monotonic() - began:.0f} s")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def run_tests_unchanged(tree: Path, tests: list[str], jobs: int) -> tuple[int, str]:
    """All tests of the table together, in the unchanged tree; pytest's exit code and output."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-n", str(jobs), "--dist", "loadfile"]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests], cwd=tree, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
