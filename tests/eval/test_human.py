"""Blinded pairs and Bradley-Terry: against scipy's maximiser, by simulation; hostile vote files; nothing on the page
says what is what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from eval import human
from eval.config import EvalConfig
from shards.layout import RunPaths
from shards.settings import ConfigError
from tests.eval.conftest import evaluate

NAMES = ["a", "b", "c"]


def simulated(seed: int, skill: list[float], count: int) -> list[human.Vote]:
    rng = np.random.default_rng(seed)
    votes = []
    for n in range(count):
        i, j = rng.choice(3, 2, replace=False)
        won = rng.random() < 1 / (1 + np.exp(skill[j] - skill[i]))
        votes.append(human.Vote(int(i), int(j), float(won), str(n), "ann"))
    return votes


def test_scores_are_the_maximum_of_the_likelihood() -> None:
    votes = [*simulated(0, [0.0, 0.7, -0.4], 80), human.Vote(0, 1, 0.5, "tie", "ann")]

    def loss(s: np.ndarray) -> float:
        return sum(
            w * np.logaddexp(0, s[j] - s[i]) + (1 - w) * np.logaddexp(0, s[i] - s[j]) for i, j, w, *_ in votes
        ) + float((s**2).sum()) / (2 * human.PRIOR_SD**2)

    best = minimize(loss, np.zeros(3), tol=1e-10).x
    found = {s.name: s.score for s in human.bradley_terry(NAMES, votes)}
    assert [found[n] for n in NAMES] == pytest.approx(best - best.mean(), abs=1e-4)


def test_intervals_cover_the_true_scores() -> None:
    skill = np.array([0.5, 0.0, -0.5])
    covered = 0
    for seed in range(200):
        for s in human.bradley_terry(NAMES, simulated(seed, list(skill), 150)):
            covered += s.low <= skill[NAMES.index(s.name)] <= s.high
    assert 0.91 * 600 <= covered <= 0.99 * 600


def test_one_that_always_wins_has_a_finite_score_first() -> None:
    scores = human.bradley_terry(
        NAMES, [human.Vote(*v, "ann") for v in ((0, 1, 1.0, "1"), (0, 2, 1.0, "2"), (2, 0, 0.0, "3"), (1, 2, 0.5, "4"))]
    )
    assert scores[0].name == "a"
    assert scores[0].wins == 1.0
    assert all(np.isfinite([s.score, s.low, s.high]).all() for s in scores)
    assert sum(s.score for s in scores) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="no votes"):
        human.bradley_terry(NAMES, [])


def test_neither_a_prompt_nor_a_voter_is_counted_twice() -> None:
    """Twenty people on the same few prompts are no new prompts, and one person's habit is one draw: in 200 simulated
    packs with habits of voters and prompts, the interval covers no difference about as often as it should."""
    votes = simulated(3, [0.4, 0.0, -0.4], 60)
    often = [v._replace(voter=f"v{k}") for k in range(20) for v in votes]
    once, many = human.bradley_terry(NAMES, votes), human.bradley_terry(NAMES, often)
    assert many[0].se > 0.7 * once[0].se
    rng = np.random.default_rng(8)
    covered = 0
    for _ in range(200):
        habit, prompt = rng.standard_normal(12), rng.standard_normal(20)
        made = []
        for v in range(12):
            for p in rng.choice(20, 12, replace=False):
                won = rng.random() < 1 / (1 + np.exp(-(habit[v] + prompt[p])))
                made.append(human.Vote(0, 1, float(won), f"p{p}", f"v{v}"))
        a = next(s for s in human.bradley_terry(["a", "b"], made) if s.name == "a")
        covered += a.low <= 0 <= a.high
    assert covered >= 0.88 * 200, covered


@pytest.fixture(scope="module")
def two_cells(tmp_path_factory: pytest.TempPathFactory, run: RunPaths, config: EvalConfig) -> RunPaths:
    folder = tmp_path_factory.mktemp("human") / "run"
    shutil.copytree(run.run, folder)
    own = RunPaths(str(folder))
    del CELLS[:]
    for steps in (1, 2):
        found = evaluate(own, config.model_copy(update={"steps": steps, "num_prompts": 8}))
        CELLS.append("/".join(found.folder.split("/")[-2:]))
    return own


CELLS: list[str] = []


def test_no_pair_comes_twice_and_pairings_come_equally_often(
    two_cells: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 prompts and 6 pairings: the round's number and the prompt's share a factor with the number of pairings."""

    class Fake:
        def __init__(self, run: RunPaths, name: str) -> None:
            self.positions = {(f"{i:04d}", 0): (0, i) for i in range(7)}

        def prompt(self, key: tuple[str, int]) -> str:
            return key[0]

        def image(self, key: tuple[str, int]) -> str:
            return ""

    monkeypatch.setattr(human, "_Result", Fake)
    found = human.pairs(two_cells, ["a/1", "b/1", "c/1", "d/1"], 42)
    kinds = [(p.prompt, *sorted((p.left, p.right))) for p in found]
    assert len(set(kinds)) == len({p.id for p in found}) == 42
    assert len(human.pairs(two_cells, ["a/1", "b/1", "c/1", "d/1"], 21)) == 21


def test_voters_without_a_name_are_not_one_voter(two_cells: RunPaths, tmp_path: Path) -> None:
    found = human.pairs(two_cells, CELLS, 6)
    human.write_pack(str(tmp_path), CELLS, found, two_cells)
    pack = json.loads((tmp_path / "key.json").read_text())["pack"]
    files = []
    for k, voter in enumerate(("", "", "anonymous", "anonymous")):
        file = tmp_path / f"votes-{k}.csv"
        file.write_text("pack,voter,pair,choice\n" + "".join(f"{pack},{voter},{p.id},left\n" for p in found))
        files.append(str(file))
    _, votes = human.read_votes(str(tmp_path), files)
    assert len(votes) == 24
    assert 'localStorage.setItem(key + "-voter"' in (tmp_path / "index.html").read_text()  # a page names its voter


def test_a_pack_is_blind_and_its_votes_come_back(two_cells: RunPaths, tmp_path: Path) -> None:
    found = human.pairs(two_cells, CELLS, 8, seed=1)
    assert human.pairs(two_cells, CELLS, 8, seed=1) == found
    over_runs = [f"{two_cells.run}:{name}" for name in CELLS]
    assert human.pairs(RunPaths(str(tmp_path / "another")), over_runs, 8, seed=1) == found
    assert len({p.id for p in found}) == 8
    assert {p.left for p in found} == {0, 1}  # neither stands on one side
    assert all(p.left_image != p.right_image for p in found)
    page = Path(human.write_pack(str(tmp_path), CELLS, found, two_cells)).read_text()
    assert not any(word in page for word in ("ddim", "step-0", str(two_cells.run)))
    assert "script-src 'sha256-" in page
    key = json.loads((tmp_path / "key.json").read_text())
    better = CELLS[1]
    lines = ["pack,voter,pair,choice"]
    for pair, sides in key["pairs"].items():
        lines.append(f"{key['pack']},ann,{pair},{'left' if sides['left'] == better else 'right'}")
    lines.append(lines[-1])  # sent twice
    (tmp_path / "votes.csv").write_text("\n".join(lines))
    names, votes = human.read_votes(str(tmp_path), [str(tmp_path / "votes.csv")])
    assert len(votes) == 8
    assert [s.name for s in human.bradley_terry(names, votes)] == [better, CELLS[0]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("x,ann,y,left", "line 2: it is a vote on pack 'x'"),
        ("PACK,ann,y,left", "line 2: pair 'y', choice 'left' is no vote"),
        ("PACK,ann,PAIR,both", "choice 'both' is no vote"),
        ("PACK", "no vote"),
    ],
)
def test_votes_that_are_none_are_one_sentence(two_cells: RunPaths, tmp_path: Path, row: str, says: str) -> None:
    found = human.pairs(two_cells, CELLS, 2)
    human.write_pack(str(tmp_path), CELLS, found, two_cells)
    pack = json.loads((tmp_path / "key.json").read_text())["pack"]
    text = "pack,voter,pair,choice\n" + row.replace("PACK", pack).replace("PAIR", found[0].id) + "\n"
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(ConfigError, match=says):
        human.read_votes(str(tmp_path), [str(tmp_path / "v.csv")])


def test_what_cannot_be_packed_is_one_sentence(two_cells: RunPaths) -> None:
    for names, count, says in (
        (CELLS[:1], 4, "two different results"),
        (["../x", CELLS[0]], 4, r"must be \[RUN:\]MODEL/PROTOCOL"),
        (CELLS, 99, "there are 8 pairs, not 99"),
    ):
        with pytest.raises(ConfigError, match=says):
            human.pairs(two_cells, names, count)
