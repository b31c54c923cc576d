"""Frechet distance against closed forms, scipy's matrix square root and the nuclear norm; its error and bias by
simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from eval.metrics import frechet, moments
from eval.metrics.moments import Moments
from tests.eval.conftest import random_features


def gaussian(mean: np.ndarray, covariance: np.ndarray, n: int = 10_000) -> Moments:
    return Moments(n, np.asarray(mean, float), np.asarray(covariance, float) * (n - 1))


def distance(a: Moments, b: Moments) -> float:
    return frechet.distance(frechet.reference(a), b)


def by_scipy(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    delta = a.mean - b.mean
    return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(np.real(root)))


def by_nuclear_norm(x: np.ndarray, y: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) as the nuclear norm of Xc Yc^T: exact also with fewer vectors than dimensions."""
    a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def test_diagonal_covariances() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    m1, m2 = np.zeros(3), np.array([1.0, 2.0, 0.0])
    expected = 5.0 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance(gaussian(m1, np.diag(a)), gaussian(m2, np.diag(b))) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances() -> None:
    s = moments.of(random_features(100, 20, 0)).covariance
    zero = np.zeros(20)
    expected = (2.5 - 1) ** 2 * np.trace(s)
    assert distance(gaussian(zero, s), gaussian(zero, 2.5**2 * s)) == pytest.approx(expected, rel=1e-10)


def test_rank_one_and_zero_covariances() -> None:
    u, v = np.array([1.0, 2.0, 2.0]), np.array([0.0, 3.0, 4.0])
    expected = u @ u + v @ v - 2 * abs(u @ v)
    zero = np.zeros(3)
    a, b = gaussian(zero, np.outer(u, u)), gaussian(zero, np.outer(v, v))
    assert distance(a, b) == pytest.approx(expected, rel=1e-12)
    nothing = gaussian(zero, np.zeros((3, 3)))
    assert distance(nothing, b) == pytest.approx(v @ v)
    assert distance(nothing, nothing) == 0


def test_full_rank_agrees_with_scipy() -> None:
    a, b = moments.of(random_features(500, 64, 1)), moments.of(random_features(400, 64, 2) * 1.3 + 0.2)
    expected = by_scipy(a, b)
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_fewer_vectors_than_dimensions_is_exact() -> None:
    x, y = random_features(40, 256, 3), random_features(60, 256, 4) * 1.2 + 0.1
    expected = by_nuclear_norm(x, y)
    assert distance(moments.of(x), moments.of(y)) == pytest.approx(expected, abs=1e-10)
    assert distance(moments.of(y), moments.of(x)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("case", ["full", "few", "dead", "repeated"])
def test_a_set_is_at_no_distance_from_itself(case: str) -> None:
    x = random_features(40 if case == "few" else 400, 128, 5)
    if case == "dead":
        x[:, ::3] = 0
    if case == "repeated":
        x = np.repeat(x[:7], 50, axis=0)
    m = moments.of(x)
    assert 0 <= distance(m, m) <= 1e-6


def test_a_collapsed_set_is_far_and_finite() -> None:
    real = random_features(1000, 128, 6)
    collapsed = np.repeat(random_features(3, 128, 7), 300, axis=0)
    assert distance(moments.of(real), moments.of(collapsed)) == pytest.approx(
        by_nuclear_norm(real, collapsed), abs=1e-6
    )


def test_rotation_and_permutation_change_nothing() -> None:
    x, y = random_features(300, 32, 8), random_features(300, 32, 9) + 0.3
    q = np.linalg.qr(np.random.default_rng(10).standard_normal((32, 32)))[0]
    plain = distance(moments.of(x), moments.of(y))
    assert distance(moments.of(x @ q), moments.of(y @ q)) == pytest.approx(plain, rel=1e-10)
    order = np.random.default_rng(11).permutation(32)
    assert distance(moments.of(x[::-1, order]), moments.of(y[:, order])) == pytest.approx(plain, rel=1e-12)


def test_leaving_a_group_out_equals_measuring_without_it() -> None:
    ref = frechet.reference(moments.of(random_features(500, 16, 11)))
    groups = [random_features(30 + 5 * g, 16, 20 + g) for g in range(6)]
    parts = [moments.of(g) for g in groups]
    total = moments.merge_all(enumerate(parts))
    for g in range(6):
        direct = moments.of(np.concatenate(groups[:g] + groups[g + 1 :]))
        left = frechet.distance(ref, moments.unmerge(total, parts[g]))
        assert left == pytest.approx(frechet.distance(ref, direct), rel=1e-10)


def spectrum(d: int, power: float) -> np.ndarray:
    """Eigenvalues k^-power with the trace of Inception's features."""
    values = np.arange(1, d + 1) ** -power
    return np.asarray(120 * values / values.sum())


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_bias_is_taken_out_only_where_it_can_be(power: float) -> None:
    """A perfect model against an exact reference, at n/d from 1/8 to 16: the raw value is biased upwards everywhere;
    with fewer than 4 d images nothing is called corrected, from 4 d on the corrected one is right within its error."""
    d, runs = 48, 24
    values = spectrum(d, power)
    ref = frechet.Reference(0, np.zeros(d), np.diag(np.sqrt(values)), float(values.sum()))
    rng = np.random.default_rng(5)
    for share in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16):
        n = int(share * d)
        found = []
        for _ in range(runs):
            x = rng.standard_normal((n, d)) * np.sqrt(values)
            groups = np.arange(n) % 20
            if n <= d:
                found.append(frechet.estimate_of(ref, x, groups))
            else:
                found.append(frechet.estimate(ref, {g: moments.of(x[groups == g]) for g in range(20)}))
        assert min(e.value for e in found) > 0
        assert all((e.bias_corrected is None) == (share < frechet.CORRECTABLE) for e in found)
        if share >= frechet.CORRECTABLE:
            corrected = np.array([e.bias_corrected for e in found])
            left = abs(corrected.mean()) - 3 * corrected.std(ddof=1) / np.sqrt(runs)
            raw, se = np.mean([e.value for e in found]), np.mean([e.se for e in found])
            assert left < max(0.05 * raw, 0.5 * se), (share, corrected.mean(), raw, se)
            assert np.mean([e.se for e in found]) == pytest.approx(np.std([e.value for e in found]), rel=0.6)


@pytest.mark.parametrize("groups", [4, 10, 20])
def test_intervals_hold_what_other_images_would_give(groups: int) -> None:
    """The 95 % interval of the value as published covers its expectation over draws of as many images."""
    d, n, runs = 8, 160, 1000
    scale, shift = np.arange(1, d + 1) ** -0.5, np.full(d, 0.15)
    ref = frechet.Reference(0, np.zeros(d), np.diag(scale), float((scale**2).sum()))
    rng = np.random.default_rng(groups)
    found = []
    for _ in range(runs):
        parts = np.array_split(rng.standard_normal((n, d)) * scale + shift, groups)
        found.append(frechet.estimate(ref, dict(enumerate(map(moments.of, parts)))))
    expected = np.mean([e.value for e in found])
    covered = np.mean([(e.low or 0) <= expected <= (e.high or 0) for e in found])
    assert 0.93 <= covered <= 0.97, covered
    corrected = np.mean([(e.corrected_low or 0) <= float(shift @ shift) <= (e.corrected_high or 0) for e in found])
    assert 0.93 <= corrected <= 0.97, corrected


def test_what_has_no_distance_is_refused() -> None:
    ref = frechet.reference(moments.of(random_features(10, 3, 13)))
    with pytest.raises(ValueError, match="3 and of 4"):
        frechet.distance(ref, moments.of(random_features(10, 4, 13)))
    with pytest.raises(ValueError, match="at least 2"):
        frechet.reference(moments.of(random_features(1, 3, 13)))
