"""The mutation table's runner, on a tree of three lines: what counts as seen, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mutants.__main__ import Mutant, Outcome, Pytester, outcome

CODE = """\
def last(some):
    index = len(some)
    while index != len(some) - 1:
        index -= 1
    return some[index]
"""
TESTS = """\
from code_of_it import last

def test_the_last_is_found():
    assert last([1, 2, 3]) == 3

def test_anything_is_found():
    assert last([1, 2, 3]) in (1, 2, 3)
"""


@pytest.fixture(scope="module")
def pytester(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pytester]:
    tree = tmp_path_factory.mktemp("of") / "tree"
    tree.mkdir()
    (tree / "code_of_it.py").write_text(CODE)
    (tree / "test_it.py").write_text(TESTS)
    process = Pytester(tmp_path_factory.mktemp("mutants") / "0", of=tree, imported=["pytest"])
    yield process
    process.close()


def made_of(pytester: Pytester, text: str, replacement: str, test: str, limit_s: float = 60.0) -> Outcome:
    mutant = Mutant("the last is found", "code_of_it.py", text, replacement, (f"test_it.py::test_{test}",))
    found = outcome(mutant, pytester, limit_s)
    assert (pytester.tree / "code_of_it.py").read_text() == CODE
    return found


def test_a_mutation_is_seen_where_a_test_fails(pytester: Pytester) -> None:
    found = made_of(pytester, "return some[index]", "return some[0]", "the_last_is_found")
    assert (found.mark, found.says) == ("seen", "test_it.py::test_the_last_is_found")


def test_a_mutation_is_not_seen_where_no_test_fails(pytester: Pytester) -> None:
    found = made_of(pytester, "return some[index]", "return some[0]", "anything_is_found")
    assert (found.mark, found.says) == ("UNSEEN", "no test fails without this line")


@pytest.mark.parametrize(
    "replacement",
    ["index -= 0", "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])"],
    ids=["ended by pytest", "ended from outside"],
)
def test_a_mutation_is_not_seen_where_a_test_hangs(
    pytester: Pytester, replacement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "signal" in replacement:
        monkeypatch.setattr("tests.mutants.__main__.GRACE_S", 2.0)
    found = made_of(pytester, "index -= 1", replacement, "the_last_is_found", limit_s=1.0)
    assert found.mark == "UNSEEN"
    assert "hangs" in found.says


@pytest.mark.parametrize("text", ["index", "return some[1]"], ids=["more than once", "nowhere"])
def test_an_entry_that_does_not_fit_is_not_seen(pytester: Pytester, text: str) -> None:
    assert made_of(pytester, text, "pass", "anything_is_found").mark == "UNSEEN"


def test_a_mutation_that_breaks_off_pytest_is_not_seen(pytester: Pytester) -> None:
    found = made_of(pytester, "def last(some):", "def last(some:", "the_last_is_found")
    assert found.mark == "UNSEEN"
    assert "pytest ended with" in found.says
