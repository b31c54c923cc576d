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
from eval.stage import stages
from shards.layout import RunPaths
from shards.settings import ConfigError
from tests.eval.conftest import drive, refs

NAMES = ["a", "b", "c"]


def simulated(seed: int, skill: list[float], count: int) -> list[tuple[int, int, float, str]]:
    rng = np.random.default_rng(seed)
    votes = []
    for n in range(count):
        i, j = rng.choice(3, 2, replace=False)
        won = rng.random() < 1 / (1 + np.exp(skill[j] - skill[i]))
        votes.append((int(i), int(j), float(won), str(n)))
    return votes


def test_scores_are_the_maximum_of_the_likelihood() -> None:
    votes = [*simulated(0, [0.0, 0.7, -0.4], 80), (0, 1, 0.5, "tie")]

    def loss(s: np.ndarray) -> float:
        return sum(
            w * np.logaddexp(0, s[j] - s[i]) + (1 - w) * np.logaddexp(0, s[i] - s[j]) for i, j, w, _ in votes
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
    scores = human.bradley_terry(NAMES, [(0, 1, 1.0, "1"), (0, 2, 1.0, "2"), (2, 0, 0.0, "3"), (1, 2, 0.5, "4")])
    assert scores[0].name == "a"
    assert scores[0].wins == 1.0
    assert all(np.isfinite([s.score, s.low, s.high]).all() for s in scores)
    assert sum(s.score for s in scores) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="no votes"):
        human.bradley_terry(NAMES, [])


def test_many_voters_on_few_pairs_are_no_new_pairs() -> None:
    votes = simulated(3, [0.4, 0.0, -0.4], 60)
    once, often = human.bradley_terry(NAMES, votes), human.bradley_terry(NAMES, votes * 20)
    assert often[0].se > 0.7 * once[0].se


@pytest.fixture(scope="module")
def two_cells(tmp_path_factory: pytest.TempPathFactory, run: RunPaths, config: EvalConfig) -> RunPaths:
    folder = tmp_path_factory.mktemp("human") / "run"
    shutil.copytree(run.run, folder)
    own = RunPaths(str(folder))
    for steps in (1, 2):
        for stage in stages(config.model_copy(update={"steps": steps, "prompts": 8}), own, *refs(own)):
            drive(stage)
    return own


CELLS = ["step-00000004/ddim-1-2", "step-00000004/ddim-2-2"]


def test_a_pack_is_blind_and_its_votes_come_back(two_cells: RunPaths, tmp_path: Path) -> None:
    found = human.pairs(two_cells, CELLS, 8, seed=1)
    assert human.pairs(two_cells, CELLS, 8, seed=1) == found
    assert len({p.id for p in found}) == 8
    assert {p.left for p in found} == {0, 1}  # neither stands on one side
    assert all(p.left_picture != p.right_picture for p in found)
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
        (CELLS[:1], 4, "two different cells"),
        (["../x", CELLS[0]], 4, "must be CHECKPOINT/CELL"),
        (CELLS, 99, "there are 8 pairs, not 99"),
    ):
        with pytest.raises(ConfigError, match=says):
            human.pairs(two_cells, names, count)
