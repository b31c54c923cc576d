"""The house: who may import whom, no circles, Ray in one folder, documents whose links lead somewhere, and a mutation
table that fits the code.

The imports are read from the syntax trees, those inside functions included.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.__main__ import Mutant

ROOT = Path(__file__).resolve().parents[1]

# Each folder, and the folders of the project that it may import besides itself.
ALLOWED = {
    "shards": set(),
    "ingest": {"shards"},
    "curate": {"latents", "shards"},
    "latents": {"shards"},
    "train": {"latents", "shards"},
    "eval": {"train", "latents", "shards"},
    "orchestration": {"eval", "train", "latents", "curate", "ingest", "shards", "demo"},
    "demo": {"eval", "train", "latents", "curate", "ingest", "shards"},
}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for folder in ALLOWED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _running(child)


def imports(name: str, path: Path) -> set[str]:
    """The dotted names that a module imports when it runs, also within a function of it; `from a import b` gives a and
    a.b."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in _running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {name: imports(name, path) for name, path in modules().items()}


def test_the_modules_are_found() -> None:
    assert {name.split(".")[0] for name in IMPORTS} >= {"shards", "ingest", "latents", "train", "eval", "orchestration"}
    assert "shards.layout" in IMPORTS["shards.dataset"]


def test_imports_go_downwards() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if (top := other.split(".")[0]) in ALLOWED and top != (own := name.split(".")[0]) and top not in ALLOWED[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_is_imported_in_orchestration_alone() -> None:
    wrong = [n for n, others in IMPORTS.items() if any(o.split(".")[0] == "ray" for o in others)]
    assert all(n.startswith("orchestration.") for n in wrong), wrong
    assert wrong


def test_no_module_imports_itself_by_a_detour() -> None:
    """Nor by one that a function takes when it is called."""
    graph = {name: {o for o in others if o in IMPORTS and o != name} for name, others in IMPORTS.items()}
    # A package's __init__ may name its own modules.
    graph = {n: {o for o in others if not o.startswith(n + ".")} for n, others in graph.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_every_module_says_first_what_it_is_for() -> None:
    silent = [n for n, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_the_documents_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [
        u for u in links if "://" not in u and not u.startswith("mailto:") and not (document.parent / u).exists()
    ]
    assert not missing


@pytest.mark.parametrize("table", sorted((ROOT / "tests" / "mutants").glob("*.toml")), ids=lambda p: p.stem)
def test_each_entry_of_the_mutation_table_fits_the_code(table: Path) -> None:
    """Its text occurs once, its tests are there: said here, in no time, to who moves the code."""
    wrong = []
    for mutant in Mutant.read(table):
        if (n := (ROOT / mutant.file).read_text().count(mutant.text)) != 1:
            wrong.append(f"{mutant.promise}: its text occurs {n} times in {mutant.file}")
        for test in mutant.tests:
            file, _, name = test.partition("[")[0].partition("::")
            if not re.search(rf"^def {re.escape(name)}\(", (ROOT / file).read_text(), flags=re.M):
                wrong.append(f"{mutant.promise}: there is no {test}")
    assert not wrong, "\n".join(wrong)
