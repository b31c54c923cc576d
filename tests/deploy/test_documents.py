"""Every `carrara ...` in the documents is a command line that Carrara takes; and the site is built of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.settings import ConfigError
from tests.deploy.lines import commands_of, parse
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
