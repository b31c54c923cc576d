"""The detector is right on real pictures, wrong pictures are called wrong, and it does not fall over on noise."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from demo import scorer
from demo.corpus import FORMATS, SOURCES, encode
from demo.faithfulness import ATTRIBUTES, PRESENT, TIGHT, compare, detect
from demo.scenes import COLOURS, GROUNDS, SHAPES, Scene, Thing, caption, draw, outline, sample

PICTURES = 120


def as_stored(data: bytes, side: int, kind: str, blur: float = 0.0) -> np.ndarray:
    """What a training run would see: upright, on white, centre-cropped, resized, stored as PNG or as JPEG q95."""
    source = Image.open(io.BytesIO(data))
    if source.getexif().get(0x0112) == 6:
        source = source.transpose(Image.Transpose.ROTATE_270)
    if source.mode == "RGBA":
        source = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source)
    source = source.convert("RGB")
    m = min(source.size)
    left, top = (source.width - m) // 2, (source.height - m) // 2
    picture = source.crop((left, top, left + m, top + m)).resize((side, side), Image.Resampling.LANCZOS)
    if kind == "jpeg":
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=95)
        picture = Image.open(out)
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(picture)


def shown(picture: np.ndarray, scene: Scene, limits: Mapping[str, float] = PRESENT) -> dict[str, bool]:
    return compare(detect(picture), scene, limits)


@pytest.fixture(scope="module")
def files() -> list[tuple[Scene, bytes]]:
    """Corpus files of every format, more of the odd ones than the corpus has."""
    kinds = [kind for kind in FORMATS for _ in range(2 + FORMATS[kind] // 8)]
    pairs = []
    for i in range(PICTURES):
        rng = random.Random(f"faithfulness/{i}")
        kind, scene = kinds[i % len(kinds)], sample(rng, pair_share=0.5)
        if kind == "png_alpha":
            scene = replace(scene, ground="white")
        pairs.append((scene, encode(scene, rng, *rng.choice(SOURCES), kind)))
    return pairs


@pytest.mark.parametrize(
    ("side", "kind", "blur"), [(32, "png", 0), (32, "jpeg", 0), (32, "png", 0.7), (64, "png", 0), (64, "jpeg", 0)]
)
def test_right_on_real_pictures(files: list[tuple[Scene, bytes]], side: int, kind: str, blur: float) -> None:
    right: Counter[str] = Counter()
    for scene, data in files:
        verdict = shown(as_stored(data, side, kind, blur), scene)
        assert tuple(verdict) == ATTRIBUTES
        right.update(name for name, value in verdict.items() if value)
    for name in ATTRIBUTES:
        assert right[name] / PICTURES >= 0.98, (name, right[name] / PICTURES)


@pytest.mark.parametrize(("side", "kind"), [(32, "png"), (64, "jpeg")])
def test_real_pictures_are_right_by_the_tight_limits_too(
    files: list[tuple[Scene, bytes]], side: int, kind: str
) -> None:
    right = [all(shown(as_stored(data, side, kind), scene, TIGHT).values()) for scene, data in files]
    assert sum(right) / PICTURES >= 0.98


def drawn(points: list[tuple[float, float]], side: int) -> np.ndarray:
    """A red polygon, in sides of the picture, on gray; antialiased."""
    picture = Image.new("RGB", (side * 8, side * 8), GROUNDS["gray"])
    ImageDraw.Draw(picture).polygon([(x * side * 8, y * side * 8) for x, y in points], fill=COLOURS["red"])
    return np.asarray(picture.reduce(8))


def regular(corners: int) -> list[tuple[float, float]]:
    angles = 2 * np.pi * np.arange(corners) / corners
    return [(0.5 + 0.3 * float(np.cos(a)), 0.5 + 0.3 * float(np.sin(a))) for a in angles]


GOBLET = [(x, y) for x, y in outline("circle", 0.5, 0.5, 0.3) if y < 0.5 or abs(x - 0.5) < 0.15]
LEMON = [(0.5 + (x - 0.5) * 1.3, y) for x, y in outline("circle", 0.5, 0.5, 0.27)]
PINCUSHION = [
    (0.5 + 0.28 * x * (1 - 0.25 * (1 - y * y)), 0.5 + 0.28 * y * (1 - 0.25 * (1 - x * x)))
    for t in np.linspace(-1, 1, 9)[:-1]
    for x, y in [(t, -1.0)]
] + [
    (0.5 + 0.28 * x * (1 - 0.25 * (1 - y * y)), 0.5 + 0.28 * y * (1 - 0.25 * (1 - x * x)))
    for line in (
        [(1.0, t) for t in np.linspace(-1, 1, 9)[:-1]],
        [(-t, 1.0) for t in np.linspace(-1, 1, 9)[:-1]],
        [(-1.0, -t) for t in np.linspace(-1, 1, 9)[:-1]],
    )
    for x, y in line
]


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("points", [regular(5), regular(6), GOBLET, LEMON, PINCUSHION])
def test_what_is_nearly_a_shape_is_none_by_the_tight_limits(points: list[tuple[float, float]], side: int) -> None:
    (found,) = detect(drawn(points, side)).things
    assert found.fit > TIGHT[found.shape]


def test_no_random_blob_is_a_shape() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        noise = ImageFilter.GaussianBlur(3)
        field = np.asarray(Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).filter(noise), float)
        field[[0, -1]], field[:, [0, -1]] = 0, 0
        mask = field > np.quantile(field, 0.8)
        picture = np.where(mask[..., None], np.array(COLOURS["red"]), np.array(GROUNDS["gray"])).astype(np.uint8)
        found += detect(picture).things
    assert len(found) > 20
    assert sum(f.fit <= PRESENT[f.shape] for f in found) / len(found) < 0.1
    assert not any(f.fit <= TIGHT[f.shape] for f in found)


def test_the_scores_tell_both_limits_and_the_kinds_of_captions_apart() -> None:
    rng = random.Random(0)
    one = Scene((Thing("red", "circle", "large", "center"),), "gray")
    rough = drawn([(0.5 + (x - 0.5) * 1.15, y) for x, y in outline("circle", 0.5, 0.5, 0.28)], 32)
    scores = scorer.score(np.stack([np.asarray(draw(one, rng, 32, 32)), rough, rough]), [caption(one, rng)] * 2 + ["?"])
    assert set(scores) == set(scorer.SCORES)
    assert scores["shows_all"] == [1.0, 1.0, None]
    assert scores["shows_all_tight"] == scores["shows_shape_tight"] == [1.0, 0.0, None]
    two = sample(rng, pair_share=1.0)
    assert scorer.tags(caption(one, rng)) == ["one thing", "circle"]
    assert scorer.tags(caption(two, rng))[0] == "two things"
    assert scorer.tags("?") == []


@pytest.mark.parametrize("side", [32, 64])
def test_every_single_change_is_noticed(side: int) -> None:
    """A picture that differs from the caption in one attribute has that one wrong and the others right."""
    thing = Thing("green", "square", "large", "left")
    wrong = {
        "colour": Scene((replace(thing, colour="purple"),), "gray"),
        "shape": Scene((replace(thing, shape="star"),), "gray"),
        "size": Scene((replace(thing, size="small"),), "gray"),
        "position": Scene((replace(thing, position="bottom"),), "gray"),
        "ground": Scene((thing,), "beige"),
    }
    for attribute, shown in wrong.items():
        picture = np.asarray(draw(shown, random.Random(0), side, side))
        verdict = shown(picture, Scene((thing,), "gray"))
        assert verdict == {name: name != attribute for name in ATTRIBUTES}, attribute


def test_swapped_colours_are_wrong() -> None:
    red, blue = Thing("red", "circle", "small", "left"), Thing("blue", "circle", "small", "right")
    picture = np.asarray(draw(Scene((red, blue), "white"), random.Random(0), 64, 64))
    assert all(shown(picture, Scene((red, blue), "white")).values())
    swapped = Scene((replace(red, colour="blue"), replace(blue, colour="red")), "white")
    assert shown(picture, swapped) == {name: name != "colour" for name in ATTRIBUTES}
    stacked = Scene((replace(red, position="top"), replace(blue, position="bottom")), "white")
    assert not shown(picture, stacked)["position"]


def test_missing_and_surplus_things_are_counted() -> None:
    red, blue = Thing("red", "circle", "large", "left"), Thing("blue", "star", "small", "right")
    both, one = Scene((red, blue), "white"), Scene((red,), "white")
    missing = shown(np.asarray(draw(one, random.Random(0), 64, 64)), both)
    assert missing == {name: name == "ground" for name in ATTRIBUTES}
    surplus = shown(np.asarray(draw(both, random.Random(0), 64, 64)), one)
    assert surplus == {name: name != "count" for name in ATTRIBUTES}


def test_other_captions_agree_only_by_chance() -> None:
    """The floor: with a caption of another picture, colour is right about one time in eight and shape one in four."""
    rng = random.Random(0)
    scenes = [sample(rng, pair_share=0.0) for _ in range(160)]
    verdicts = [
        shown(np.asarray(draw(scene, rng, 32, 32)), other)
        for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True)
    ]
    expected = {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "ground": 1 / len(GROUNDS)}
    for name, chance in expected.items():
        share = sum(v[name] for v in verdicts) / len(verdicts)
        assert abs(share - chance) < 4 * (chance * (1 - chance) / len(verdicts)) ** 0.5, (name, share)


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (17, 31)])
def test_anything_can_be_judged(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert not all(shown(noise, sample(random.Random(0))).values())
    blank = np.full((*shape, 3), 150, np.uint8)
    assert detect(blank).things == ()
    assert detect(blank).ground == "gray"


@pytest.mark.parametrize("bad", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3)), np.zeros((8, 8, 3), np.uint8)])
def test_what_is_no_picture_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(bad)
