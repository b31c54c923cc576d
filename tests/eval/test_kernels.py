"""KID, CMMD, Inception score, precision and the like: against torch-fidelity's code on the same features, against
their formulas written out as loops, and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.metrics import kernel, neighbours
from eval.metrics.inception_score import inception_score
from tests.eval.conftest import random_features

KID = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}


def groups(n: int, count: int = 5) -> np.ndarray:
    return np.arange(n) % count


def test_kid_is_torch_fidelitys_on_the_whole_set() -> None:
    x, y = random_features(90, 24, 1), random_features(90, 24, 2) + 0.1
    assert kernel.kid(x, y, groups(90)).value == pytest.approx(kernel_mmd(x, y, **KID), rel=1e-10)


def test_kid_of_sets_of_unlike_sizes_by_its_definition() -> None:
    x, y = random_features(13, 6, 3), random_features(9, 6, 4)
    k = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    within = [np.mean([k(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert kernel.kid(x, y, groups(13)).value == pytest.approx(sum(within) - 2 * across, rel=1e-10)


def test_equal_distributions_have_a_kid_near_zero_also_below_it() -> None:
    estimates = [
        kernel.kid(random_features(80, 16, s), random_features(80, 16, s + 1000), groups(80, 8)) for s in range(40)
    ]
    values = np.array([e.value for e in estimates])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert (values < 0).any()
    assert sum(abs(e.value) < 3 * (e.se or 0) for e in estimates) >= 34


def cmmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in a for q in b]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_its_definition_for_any_tile() -> None:
    x, y = (random_features(n, 12, s) for n, s in ((17, 5), (23, 6)))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    expected = cmmd_by_loops(x, y)
    found = [kernel.cmmd(x, y, groups(17), tile=tile) for tile in (1, 4, 5, 23, 2048)]
    for e in found:
        assert e.value == pytest.approx(expected, rel=1e-9)
        assert e.se == pytest.approx(found[0].se, rel=1e-8)
    assert kernel.cmmd(x, x, groups(17)).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", [kernel.kid, kernel.cmmd])
def test_what_is_left_without_a_group_is_measured_without_it(metric) -> None:
    x, y, groups = random_features(31, 5, 7), random_features(20, 5, 8), np.arange(31) % 4
    left_out = metric(x, y, groups).left_out
    for g in range(4):
        rest = groups != g
        assert left_out[g] == pytest.approx(metric(x[rest], y, groups[rest]).value, rel=1e-9)


def test_inception_score_is_torch_fidelitys_with_one_split() -> None:
    logits = random_features(60, 20, 9) * 3
    theirs = isc_features_to_metric(torch.tensor(logits), splits=1, shuffle=False)["inception_score_mean"]
    ours = inception_score(logits, groups(60))
    assert ours.value == pytest.approx(theirs, rel=1e-10)
    rest = groups(60) != 2
    again = inception_score(logits[rest], groups(60)[rest]).value
    assert ours.left_out is not None
    assert ours.left_out[2] == pytest.approx(again, rel=1e-10)


def test_inception_score_of_certain_and_of_blind_networks() -> None:
    certain = np.eye(10)[np.arange(50) % 10] * 100
    assert inception_score(certain, groups(50)).value == pytest.approx(10, rel=1e-9)
    assert inception_score(np.zeros((50, 10)), groups(50)).value == pytest.approx(1, rel=1e-12)


def prdc_by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radius(s: np.ndarray, i: int) -> float:
        return sorted(float(np.linalg.norm(s[i] - s[j])) for j in range(len(s)) if j != i)[k - 1]

    rr, rf = [radius(real, i) for i in range(len(real))], [radius(fake, i) for i in range(len(fake))]
    d = [[float(np.linalg.norm(r - f)) for f in fake] for r in real]
    n, m = len(real), len(fake)
    return (
        np.mean([any(d[i][j] < rr[i] for i in range(n)) for j in range(m)]),
        np.mean([any(d[i][j] < rf[j] for j in range(m)) for i in range(n)]),
        np.mean([sum(d[i][j] < rr[i] for i in range(n)) / k for j in range(m)]),
        np.mean([any(d[i][j] < rr[i] for j in range(m)) for i in range(n)]),
    )


@pytest.mark.parametrize("tile", [3, 8, 1024])
def test_prdc_is_the_naive_loop(tile: int) -> None:
    real, fake = random_features(26, 4, 10), random_features(31, 4, 11) * 1.1 + 0.2
    found = neighbours.prdc(real, fake, k=4, tile=tile)
    expected = prdc_by_loops(real, fake, 4)
    for name, value in zip(("precision", "recall", "density", "coverage"), expected, strict=True):
        assert found[name].mean() == pytest.approx(value, abs=1e-12), name


def test_precision_and_recall_are_torch_fidelitys() -> None:
    real, fake = random_features(120, 6, 12), random_features(100, 6, 13) * 0.8 + 0.3
    theirs = prc_features_to_metric(
        torch.tensor(fake), torch.tensor(real), prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=True, verbose=False
    )
    ours = neighbours.prdc(real, fake, k=3, tile=32)
    assert (ours["precision"].mean(), ours["recall"].mean()) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-6
    )


def test_a_collapsed_set_is_precise_and_covers_nothing() -> None:
    real = random_features(100, 4, 14)
    collapsed = real[:1] + 1e-4 * random_features(60, 4, 15)
    found = neighbours.prdc(real, collapsed)
    assert found["precision"].all()
    assert found["coverage"].mean() < 0.2
    assert found["recall"].mean() < 0.05


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no 5 neighbours"):
        neighbours.radii(random_features(5, 3, 16))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        kernel.kid(random_features(2, 3, 17), random_features(5, 3, 18), [0, 1])
    with pytest.raises(ValueError, match="not finite"):
        inception_score([[np.nan, 1.0], [0.0, 1.0]], [0, 1])
