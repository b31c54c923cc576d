"""CLIP score, retrieval, PSNR: against their definitions written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from eval import networks
from eval.metrics import clip_score, retrieval


def unit(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_clip_score_clamps_each_pair_before_the_mean() -> None:
    images, texts = unit(50, 8, 0) * 3, unit(50, 8, 1) * 0.5
    cos = np.array([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(images, texts, strict=True)])
    assert (cos < 0).any()
    np.testing.assert_allclose(clip_score.cosines(images, texts), cos, atol=1e-14)
    score, raw = clip_score.clip_score(clip_score.cosines(images, texts), range(50))
    assert score.value == pytest.approx(100 * np.mean([max(c, 0) for c in cos]), rel=1e-12)
    assert raw.value == pytest.approx(cos.mean(), rel=1e-12)
    assert score.value != pytest.approx(max(100 * cos.mean(), 0), rel=0.1)  # the clamp after the mean is another number


def test_a_cosine_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        clip_score.cosines(np.zeros((1, 4)), np.ones((1, 4)))


def test_rank_one_among_all_is_the_argmax() -> None:
    images, texts = unit(40, 6, 2) + 0.5 * unit(40, 6, 3), unit(40, 6, 3)
    expected = np.mean((images @ texts.T).argmax(1) == np.arange(40))
    found = retrieval.rank_one(images, texts, range(40), 100)
    assert found is not None
    assert found.mean() == pytest.approx(expected, abs=1e-12)


def test_fewer_candidates_are_the_mean_over_all_choices_of_distractors() -> None:
    images, texts, size = unit(7, 3, 4), unit(7, 3, 5), 4
    similarity = images @ texts.T
    chances = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        draws = list(itertools.combinations(others, size - 1))
        chances.append(np.mean([all(similarity[i, j] < similarity[i, i] for j in draw) for draw in draws]))
    found = retrieval.rank_one(images, texts, range(7), size)
    assert found is not None
    assert found == pytest.approx(chances, abs=1e-12)


def test_a_model_that_cannot_tell_captions_apart_has_no_retrieval() -> None:
    same = np.repeat(unit(1, 5, 6), 10, axis=0)
    found = retrieval.rank_one(same, same, range(10), 10)
    assert found is not None
    assert not found.any()


def test_wordings_of_one_meaning_are_no_rivals() -> None:
    images = unit(4, 8, 7)
    texts = np.concatenate([images[:1], images[:1], images[2:]])  # rows 0 and 1 say the same, and row 1 fits both
    captions = ["a red circle", "one circle, red", "a star", "a square"]
    images[1] = images[0]
    meaning = {"a red circle": 1, "one circle, red": 1, "a star": 2, "a square": 3}
    apart = retrieval.of_pairs(images, texts, retrieval.meanings_of(captions), 10)
    together = retrieval.of_pairs(images, texts, retrieval.meanings_of(captions, meaning.__getitem__), 10)
    assert apart is not None
    assert together is not None
    assert (apart.tolist(), together.tolist()) == ([0, 0, 1, 1], [1, 1, 1, 1])
    assert retrieval.of_pairs(images, texts, retrieval.meanings_of(["x", "X", " x", "x "]), 10) is None


def test_psnr_by_its_definition() -> None:
    a = np.random.default_rng(8).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    b = a.copy()
    b[1] = np.where(a[1] > 127, a[1] - 10, a[1] + 10)
    b[2, 0, 0, 0] ^= 1
    found = networks.psnr(a, b)
    assert found[0] == networks.PSNR_CAP
    assert found[1] == pytest.approx(20 * np.log10(255 / 10))
    assert found[2] == pytest.approx(10 * np.log10(255**2 * 75))
