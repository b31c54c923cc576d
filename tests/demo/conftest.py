"""One small corpus, drawn once, and a server for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.corpus import CorpusSummary, draw_corpus
from demo.server import serve


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusSummary:
    folder: Path = tmp_path_factory.mktemp("demo") / "corpus"
    return draw_corpus(folder, "http://127.0.0.1:8090/", images=300, heldout=60, seed=1, progress=False)


@pytest.fixture(scope="session")
def server(corpus: CorpusSummary) -> Iterator[str]:
    with serve(corpus.folder) as running:
        yield running.url
