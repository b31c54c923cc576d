"""Every `carrara ...` in the documents is a command line that Carrara takes (`make docs` looks at links)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.settings import ConfigError
from tests.deploy.lines import commands_of, parse
from tests.deploy.test_packaging import PYPROJECT
from tests.orchestration.head import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_command_line_is_one_that_carrara_takes(document: Path) -> None:
    wrong = []
    for number, (_, *arguments), block in commands_of(document):
        try:
            parse(arguments, mentioned=not block)
        except ConfigError as e:
            wrong.append(f"{document.name}:{number}: {e}")
    assert not wrong, "\n".join(wrong)


def test_command_lines_are_found_in_blocks_and_in_sentences(tmp_path: Path) -> None:
    text = "Run `carrara ingest --config a.yaml`.\n\n```bash\ncarrara train \\\n  --config a.yaml   # why\n```\n"
    (tmp_path / "x.md").write_text(text + "\n    carrara verify RUN [--deep]      compares; `ray status` does not\n")
    assert list(commands_of(tmp_path / "x.md")) == [
        (1, ["carrara", "ingest", "--config", "a.yaml"], False),
        (5, ["carrara", "train", "--config", "a.yaml"], True),
        (8, ["carrara", "verify", "RUN", "--deep"], True),
    ]
    assert sum(1 for d in DOCUMENTS for _ in commands_of(d)) > 60


def _called(word: str) -> Iterator[tuple[str, list[str]]]:
    """(where, words behind it) of each command line of the documents that begins with a word and says more."""
    for document in DOCUMENTS:
        for number, (_, *arguments), _ in commands_of(document, word):
            if arguments:
                yield f"{document.name}:{number}: {word} {shlex.join(arguments)}", arguments


def test_targets_modules_files_and_extras_that_documents_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for where, words in _called("make"):
        assert set(words) <= targets, where
    for where, words in _called("python"):
        if words[0] == "-c":
            continue
        name = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
        assert name == "pytest" or (ROOT / f"{name}.py").is_file() or (ROOT / name / "__main__.py").is_file(), where
    extras = {e for d in DOCUMENTS for e in re.findall(r"carrara\[([a-z0-9,]+)\]", d.read_text())}
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"]), extras
    assert {"s3", "trackers"} <= extras
    assert sum(1 for word in ("make", "python") for _ in _called(word)) > 15


def test_batch_scripts_and_launchers_are_called_as_they_can_be() -> None:
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (ROOT / "train/main.py").read_text()))

    def stage(where: str, name: str, arguments: list[str]) -> None:
        if name == "train.sbatch":
            assert {a for a in arguments if a.startswith("--")} <= options, where
        else:
            parse([*filter(None, [name.removesuffix(".sbatch")]), *arguments], mentioned=True)

    for where, words in _called("sbatch"):
        at = next(i for i, w in enumerate(words) if w.endswith(".sbatch"))
        assert (ROOT / words[at]).is_file(), where
        stage(where, Path(words[at]).name, words[at + 1 :])
    for where, words in _called("deepspeed"):
        if "train/main.py" in words:
            stage(where, "train.sbatch", words[words.index("train/main.py") + 1 :])
    for where, words in _called("ray"):
        if "orchestration/run_stage.py" in words:
            stage(where, "", words[words.index("orchestration/run_stage.py") + 1 :])
    for where, words in _called("kubectl"):
        if words[:2] == ["apply", "-k"] and words[2:]:
            assert (ROOT / words[2] / "kustomization.yaml").is_file(), where
        if words[:2] == ["delete", "rayjob"]:
            assert f"name: {words[2]}\n" in (ROOT / "deploy/kubernetes/rayjob/rayjob.yaml").read_text(), where
    assert sum(1 for word in ("sbatch", "deepspeed", "kubectl") for _ in _called(word)) > 10
