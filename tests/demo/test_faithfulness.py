"""The detector is right on real pictures, wrong pictures are called wrong, and it does not fall over on noise."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo.corpus import FORMATS, SOURCES, encode
from demo.faithfulness import ATTRIBUTES, detect, judge
from demo.scenes import COLOURS, GROUNDS, SHAPES, Scene, Thing, draw, sample

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


@pytest.fixture(scope="module")
def files() -> list[tuple[Scene, bytes]]:
    """Corpus files of every format, more of the odd ones than the corpus has."""
    kinds = [kind for kind in FORMATS for _ in range(2 + FORMATS[kind] // 8)]
    pairs = []
    for i in range(PICTURES):
        rng = random.Random(f"faithfulness/{i}")
        kind, scene = kinds[i % len(kinds)], sample(rng)
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
        verdict = judge(as_stored(data, side, kind, blur), scene)
        assert tuple(verdict) == ATTRIBUTES
        right.update(name for name, value in verdict.items() if value)
    for name in ATTRIBUTES:
        assert right[name] / PICTURES >= 0.98, (name, right[name] / PICTURES)


@pytest.mark.parametrize("side", [32, 64])
def test_every_single_change_is_noticed(side: int) -> None:
    """A picture that differs from the caption in one attribute has that one wrong and the others right."""
    thing = Thing("green", "square", "large", "left")
    wrong = {
        "colour": Scene((replace(thing, colour="purple"),), "gray"),
        "shape": Scene((replace(thing, shape="star"),), "gray"),
        "size": Scene((replace(thing, size="small"),), "gray"),
        "place": Scene((replace(thing, place="bottom"),), "gray"),
        "ground": Scene((thing,), "beige"),
    }
    for attribute, shown in wrong.items():
        picture = np.asarray(draw(shown, random.Random(0), side, side))
        verdict = judge(picture, Scene((thing,), "gray"))
        assert verdict == {name: name != attribute for name in ATTRIBUTES}, attribute


def test_swapped_colours_are_wrong() -> None:
    red, blue = Thing("red", "circle", "small", "left"), Thing("blue", "circle", "small", "right")
    picture = np.asarray(draw(Scene((red, blue), "white"), random.Random(0), 64, 64))
    assert all(judge(picture, Scene((red, blue), "white")).values())
    swapped = Scene((replace(red, colour="blue"), replace(blue, colour="red")), "white")
    assert judge(picture, swapped) == {name: name != "colour" for name in ATTRIBUTES}
    stacked = Scene((replace(red, place="top"), replace(blue, place="bottom")), "white")
    assert not judge(picture, stacked)["place"]


def test_missing_and_surplus_things_are_counted() -> None:
    red, blue = Thing("red", "circle", "large", "left"), Thing("blue", "star", "small", "right")
    both, one = Scene((red, blue), "white"), Scene((red,), "white")
    missing = judge(np.asarray(draw(one, random.Random(0), 64, 64)), both)
    assert missing == {name: name == "ground" for name in ATTRIBUTES}
    surplus = judge(np.asarray(draw(both, random.Random(0), 64, 64)), one)
    assert surplus == {name: name != "count" for name in ATTRIBUTES}


def test_other_captions_agree_only_by_chance() -> None:
    """The floor: with a caption of another picture, colour is right about one time in eight and shape one in four."""
    rng = random.Random(0)
    scenes = [sample(rng, pair_share=0.0) for _ in range(160)]
    verdicts = [
        judge(np.asarray(draw(scene, rng, 32, 32)), other)
        for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True)
    ]
    expected = {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "ground": 1 / len(GROUNDS)}
    for name, chance in expected.items():
        share = sum(v[name] for v in verdicts) / len(verdicts)
        assert abs(share - chance) < 4 * (chance * (1 - chance) / len(verdicts)) ** 0.5, (name, share)


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (17, 31)])
def test_anything_can_be_judged(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert not all(judge(noise, sample(random.Random(0))).values())
    blank = np.full((*shape, 3), 150, np.uint8)
    assert detect(blank).things == ()
    assert detect(blank).ground == "gray"


@pytest.mark.parametrize("bad", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3)), np.zeros((8, 8, 3), np.uint8)])
def test_what_is_no_picture_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(bad)
