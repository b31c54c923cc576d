"""Judgement by people: blinded pairs on one HTML page, their votes, and Bradley-Terry scores with intervals.

    carrara human pack RUN step-00000600/30a96fd76c step-00000900/30a96fd76c --out pack
    carrara human pack RUN step-00000900/30a96fd76c /other/run:step-00000900/30a96fd76c --out pack
    carrara human score pack votes-*.csv

`pack` writes index.html, which opens from a USB stick and saves a CSV of votes, and key.json, which says what was what
and stays with whoever asks. A pair shows two images of one prompt from one noise; which one stands left is decided
by a hash, and nothing on the page tells them apart. Pairs are drawn evenly over the pairings.

Bradley & Terry 1952: P(i beats j) = 1 / (1 + exp(s_j - s_i)). A tie is half a win to either side. The scores are the
maximum of the likelihood with a weak prior, N(0, 3) in logits, without which one who never lost would have none; they
are centred. Their intervals count two votes as independent only where neither the prompt nor the voter is the same:
errors clustered both ways (Cameron, Gelbach & Miller 2011), and Student's t on the smaller number of clusters.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eval import measure
from eval.metrics.estimate import quantile95
from eval.report import gather
from shards import storage
from shards.fingerprint import digest_json
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError

PRIOR_SD = 3.0  # logits; 95 % of win rates against an equal between 0.3 % and 99.7 %
CHOICES = ("left", "right", "tie")
MAX_VOTES = 50_000_000  # bytes of a CSV
MAX_PAIRS = 2000


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two images (data: URIs) of one prompt; left and right: positions in the list of what is compared."""

    id: str
    prompt: str
    left: int
    right: int
    left_image: str
    right_image: str


class Vote(NamedTuple):
    """wins: of i over j, 1, 0.5 or 0."""

    i: int
    j: int
    wins: float
    prompt: str
    voter: str


@dataclasses.dataclass(frozen=True)
class Score:
    """Bradley-Terry score in logits, centred, with standard error and 95 % interval; the share of comparisons won."""

    name: str
    score: float
    se: float
    low: float
    high: float
    wins: float
    comparisons: int


def pairs(run: RunPaths, names: Sequence[str], count: int, seed: int = 0) -> list[Pair]:
    """`count` pairs of images with the same prompt and noise from results named [RUN:]MODEL/PROTOCOL, in a shuffled
    order, none twice.

    StageError where the results share too few images.
    """
    if len(names) < 2 or len(set(names)) != len(names):
        raise ConfigError("human: name at least two different results, such as step-00000600/30a96fd76c")
    if not 1 <= count <= MAX_PAIRS:
        raise ConfigError(f"human: --pairs is {count}; ask for 1 to {MAX_PAIRS} on a page")
    sets = [_Result(run, name) for name in names]
    shared = sorted(set.intersection(*(set(s.positions) for s in sets)))
    if not shared:
        raise StageError(f"human: {', '.join(names)} have no prompt in common; evaluate them with the same prompts")
    order = sorted(shared, key=lambda p: digest_json(["prompt", seed, *p]))
    pairings = list(itertools.combinations(range(len(names)), 2))
    if count > len(order) * len(pairings):
        raise ConfigError(f"human: there are {len(order) * len(pairings)} pairs, not {count}; ask for fewer")
    found = []
    for n in range(count):
        # Each prompt begins at another pairing and meets the next one at every round: all come up, none twice.
        key = order[n % len(order)]
        i, j = pairings[(n % len(order) + n // len(order)) % len(pairings)]
        identity = digest_json([seed, *key, i, j])
        if int(identity[:8], 16) % 2:
            i, j = j, i
        found.append(Pair(identity[:12], sets[i].prompt(key), i, j, sets[i].image(key), sets[j].image(key)))
    return found


class _Result:
    """Images of one evaluated result, by prompt and replicate."""

    def __init__(self, run: RunPaths, name: str) -> None:
        other, _, rest = name.rpartition(":")
        parts = rest.split("/")
        if len(parts) != 2 or any(not p or p.startswith(".") for p in parts):
            raise ConfigError(f"human: '{name}' must be [RUN:]MODEL/PROTOCOL, such as step-00000900/30a96fd76c")
        paths = RunPaths(other) if other else run
        found = measure.read(storage.join(paths.eval, *parts, "metrics.json"))
        if found is None:
            raise ConfigError(f"human: there is no result {name}; the report says which there are")
        self.images = gather.Images(paths, found)
        self.positions = self.images.by_prompt()

    def prompt(self, key: tuple[str, int]) -> str:
        return gather.plain(self.images.caption(self.positions[key]))

    def image(self, key: tuple[str, int]) -> str:
        return self.images.uri(self.positions[key])


def write_pack(out: str, names: Sequence[str], found: Sequence[Pair], run: RunPaths) -> str:
    """Write index.html and key.json into the folder `out`; returns the page's path."""
    from eval.report import page as report

    pack = digest_json([list(names), [p.id for p in found]])[:12]
    small = all("image/png" in p.left_image for p in found)
    page = (
        report.environment()
        .get_template("human.html.j2")
        .render(pack=pack, pairs=found, pixelated=small, **report.script("human.js"))
    )
    storage.write_atomic(storage.join(out, "index.html"), page.encode())
    key = {p.id: {"left": names[p.left], "right": names[p.right], "prompt": p.prompt} for p in found}
    facts = {"pack": pack, "names": list(names), "run": run.run, "pairs": key}
    storage.write_json(storage.join(out, "key.json"), facts)
    return storage.join(out, "index.html")


def read_votes(pack: str, files: Sequence[str]) -> tuple[list[str], list[Vote]]:
    """Names, and every vote; ConfigError with file and line where one cannot be used.

    A voter's second vote on a pair (by the `voter` column, or the file where it is empty) replaces the first.
    """
    key = storage.read_json(storage.join(pack, "key.json"))
    if not isinstance(key, dict) or not isinstance(key.get("pairs"), dict):
        raise ConfigError(f"human: {pack} has no key.json; name the folder that `carrara human pack` wrote")
    names = [str(n) for n in key["names"]]
    votes: dict[tuple[str, str], Vote] = {}
    for file in files:
        path = Path(file)
        if not path.is_file() or path.stat().st_size > MAX_VOTES:
            raise ConfigError(f"human: {file} is not a file of votes (or larger than {MAX_VOTES // 1_000_000} MB)")
        try:
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
        except (UnicodeDecodeError, csv.Error) as e:
            raise ConfigError(f"human: {file} cannot be read as CSV: {e}") from None
        for line, row in enumerate(rows, 2):
            where = f"human: {file}, line {line}"
            if row.get("pack") != key["pack"]:
                raise ConfigError(f"{where}: it is a vote on pack '{row.get('pack')}', not on {key['pack']}")
            pair, choice = key["pairs"].get(row.get("pair") or ""), row.get("choice")
            if pair is None or choice not in CHOICES:
                raise ConfigError(f"{where}: pair '{row.get('pair')}', choice '{choice}' is no vote of this pack")
            i, j = names.index(pair["left"]), names.index(pair["right"])
            wins = {"left": 1.0, "right": 0.0, "tie": 0.5}[choice]
            voter = row.get("voter") or ""
            if voter in ("", "anonymous"):  # as pages of before called everybody
                voter = f"file {file}"
            votes[voter, str(row["pair"])] = Vote(i, j, wins, str(pair["prompt"]), voter)
    return names, list(votes.values())


def bradley_terry(names: Sequence[str], votes: Sequence[Vote]) -> list[Score]:
    """Scores of `names` from votes, best first.

    The covariance is the sandwich H^-1 S H^-1 with S summed by prompt and by voter (Liang & Zeger 1986).
    ConfigError where there is no vote.
    """
    if not votes:
        raise ConfigError("human: there are no votes; give the CSV files that the page saved")
    size = len(names)
    i, j = (np.array([v[k] for v in votes], np.int64) for k in (0, 1))
    won = np.array([v[2] for v in votes], np.float64)
    design = np.zeros((len(votes), size))
    design[np.arange(len(votes)), i] = 1
    design[np.arange(len(votes)), j] = -1
    scores = np.zeros(size)
    for _ in range(200):  # Newton; the log likelihood is concave, and the prior makes it strictly so
        chance = 1 / (1 + np.exp(-(design @ scores)))
        gradient = design.T @ (won - chance) - scores / PRIOR_SD**2
        information = design.T @ (design * (chance * (1 - chance))[:, None]) + np.eye(size) / PRIOR_SD**2
        step = np.linalg.solve(information, gradient)
        scores = scores + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-12:
            break
    scores = scores - scores.mean()
    covariance = _covariance(design, won - chance, information, votes)
    voters = len({v.voter for v in votes})
    half = quantile95(max(2, min(len({v.prompt for v in votes}), voters if voters > 1 else len(votes))))
    result = []
    for k, name in enumerate(names):
        mine = float(won[i == k].sum() + (1 - won[j == k]).sum())
        count = int((i == k).sum() + (j == k).sum())
        se = math.sqrt(max(0.0, float(covariance[k, k])))
        score = float(scores[k])
        result.append(Score(name, score, se, score - half * se, score + half * se, mine / max(1, count), count))
    return sorted(result, key=lambda s: -s.score)


def _covariance(
    design: npt.NDArray[np.float64],
    residual: npt.NDArray[np.float64],
    information: npt.NDArray[np.float64],
    votes: Sequence[Vote],
) -> npt.NDArray[np.float64]:
    """Of the centred scores: clustered by prompt and by voter, or the model's own where that is the larger, as with few
    or one-sided votes."""
    scores = design * residual[:, None]

    def summed(clusters: Sequence[Hashable]) -> npt.NDArray[np.float64]:
        index_of = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
        sums = np.zeros((len(index_of), design.shape[1]))
        np.add.at(sums, [index_of[c] for c in clusters], scores)
        return (sums.T @ sums) * (len(index_of) / max(1, len(index_of) - 1))

    prompts, voters = [v.prompt for v in votes], [v.voter for v in votes]
    centre = np.eye(len(information)) - 1 / len(information)
    inverse = centre @ np.linalg.inv(information)
    kinds = [summed(prompts)]
    if len(set(voters)) > 1:
        kinds += [summed(voters), summed(prompts) + summed(voters) - summed(list(zip(prompts, voters, strict=True)))]
    found = [inverse @ kind @ inverse.T for kind in kinds] + [inverse @ centre]
    return max(found, key=np.trace)  # the two-way sum may come out small by chance; the cautious one counts


def table(scores: Sequence[Score]) -> str:
    """Aligned text for a terminal."""
    width = max(len(s.name) for s in scores)
    lines = [f"{'':<{width}}  score    95 % interval    won   votes"]
    lines += [
        f"{s.name:<{width}}  {s.score:+.2f}   {s.low:+.2f} to {s.high:+.2f}   {100 * s.wins:3.0f} %  {s.comparisons:>5}"
        for s in scores
    ]
    return "\n".join(lines)


def to_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Plain values."""
    return [dataclasses.asdict(s) for s in scores]
