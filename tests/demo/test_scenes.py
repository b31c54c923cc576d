"""Captions and their inverse, the split, and what `draw` puts where."""

from __future__ import annotations

import html
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from demo import scenes
from demo.scenes import (
    COLOURS,
    GROUNDS,
    PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    draw,
    exchanged,
    parse,
    sample,
    split,
)

GROUND = st.sampled_from(sorted(GROUNDS))


@st.composite
def any_scene(draw_from: st.DrawFn) -> Scene:
    """Every valid scene, built from the vocabulary and not by `sample`."""
    pick = draw_from
    shape, colour = st.sampled_from(SHAPES), st.sampled_from(sorted(COLOURS))
    if pick(st.booleans()):
        thing = Thing(
            pick(colour), pick(shape), pick(st.sampled_from(sorted(SIZES))), pick(st.sampled_from(sorted(POSITIONS)))
        )
        return Scene((thing,), pick(GROUND))
    first, second = pick(st.lists(colour, min_size=2, max_size=2, unique=True))
    sizes = pick(st.sampled_from([("small", "small"), ("small", "large"), ("large", "small")]))
    positions = pick(st.sampled_from(PAIRS))
    return Scene(
        (Thing(first, pick(shape), sizes[0], positions[0]), Thing(second, pick(shape), sizes[1], positions[1])),
        pick(GROUND),
    )


@given(any_scene(), st.integers(0, 2**32))
def test_parse_is_the_inverse_of_caption(scene: Scene, seed: int) -> None:
    assert parse(caption(scene, random.Random(seed))) == scene


def single_scenes() -> Iterator[Scene]:
    """Every scene of one thing, in a fixed order."""
    for colour, shape, size, position, ground in itertools.product(COLOURS, SHAPES, SIZES, POSITIONS, GROUNDS):
        yield Scene((Thing(colour, shape, size, position),), ground)


def test_every_wording_of_every_template_has_one_meaning() -> None:
    """Exhaustive for one thing: each text stands for one scene alone, and parse finds it."""
    meaning: dict[str, Scene] = {}
    for scene in single_scenes():
        if scene.ground not in ("white", "mint") or scene.things[0].colour not in ("red", "black"):
            continue
        thing = scene.things[0]
        for template in scenes.SINGLE:
            for size in scenes.SIZE_WORDS[thing.size]:
                for at in scenes.AT[thing.position]:
                    for back in scenes.BACK[scene.ground]:
                        text = template.format(
                            size=size, at=at, back=back, colour=thing.colour, shape=thing.shape, ground=scene.ground
                        )
                        assert meaning.setdefault(text, scene) == scene
    assert len(meaning) > 5000
    for text in random.Random(0).sample(sorted(meaning), 800):
        assert parse(text) == meaning[text]


@given(any_scene())
def test_captions_vary_and_name_every_attribute(scene: Scene) -> None:
    texts = {caption(scene, random.Random(seed)) for seed in range(40)}
    assert len(texts) > 15
    for text in texts:
        words = text.replace(",", "").split()
        assert scene.ground in words
        for thing in scene.things:
            assert thing.colour in words
            assert thing.shape in words


def test_parse_undoes_what_tables_do_to_captions() -> None:
    scene = parse("small red circle on the left & big blue star on the right on gray")
    assert parse("  Small RED circle on the left &amp; big\tblue star on the right on gray\n") == scene
    assert [t.colour for t in scene.things] == ["red", "blue"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle on the left",
        "a small red circle on the left on a red background",
        "a small red circle on the left on a gray background and more",
        "a small red circle on the left and a small red star on the right on gray",
        "a large red circle on the left and a big blue star on the right on gray",
        "a small red circle on the left and a small blue star at the top on gray",
    ],
)
def test_parse_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse(text)


def test_captions_fit_the_context_of_a_small_clip() -> None:
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    rng = random.Random(0)
    longest = {1: 0, 2: 0}
    for _ in range(3000):
        scene = sample(rng)
        tokens = len(tokenizer.encode(caption(scene, rng))) + 2  # with the start and the end
        longest[len(scene.things)] = max(longest[len(scene.things)], tokens)
    assert 12 <= longest[1] <= 24
    assert 18 <= longest[2] <= 32


def test_split_holds_out_a_fixed_share_of_combinations() -> None:
    every = list(single_scenes())
    held = [scene for scene in every if split(scene) == "heldout"]
    # A binomial share: 4 standard deviations either way.
    deviation = (scenes.HELDOUT_SHARE * (1 - scenes.HELDOUT_SHARE) / len(every)) ** 0.5
    assert abs(len(held) / len(every) - scenes.HELDOUT_SHARE) < 4 * deviation
    # Every word is trained on in some other combination.
    train = [scene for scene in every if split(scene) == "train"]
    for field in ("colour", "shape", "size", "position"):
        words = {getattr(scene.things[0], field) for scene in every}
        assert {getattr(scene.things[0], field) for scene in held} == words
        assert {getattr(scene.things[0], field) for scene in train} == words
    # Fixed for good: a change here would let a trained model see what was held out.
    assert split(Scene((Thing("red", "circle", "small", "left"),), "white")) == "train"
    assert split(Scene((Thing("red", "circle", "small", "left"),), "beige")) == "heldout"


@given(st.sampled_from(["train", "heldout"]), st.integers(0, 2**32))
def test_sample_keeps_to_its_split(of: str, seed: int) -> None:
    assert split(sample(random.Random(seed), of)) == of


def test_sample_draws_the_stated_share_of_pairs() -> None:
    rng = random.Random(3)
    pairs = sum(len(sample(rng).things) == 2 for _ in range(2000))
    assert abs(pairs / 2000 - scenes.PAIR_SHARE) < 0.03


@given(st.integers(0, 2**32), st.booleans())
def test_exchanged_captions_differ_in_one_attribute_of_both_things(seed: int, escaped: bool) -> None:
    rng = random.Random(seed)
    scene = sample(rng, pair_share=1.0)
    text = caption(scene, rng)
    a, b = scene.things
    expected = set()
    for name in ("colour", "shape", "size"):
        of_a, of_b = getattr(a, name), getattr(b, name)
        if of_a != of_b:
            expected.add(Scene((replace(a, **{name: of_b}), replace(b, **{name: of_a})), scene.ground))
    wrong = exchanged(html.escape(text).upper() if escaped else text)
    assert {parse(w) for w in wrong} == expected
    assert len(wrong) == len(expected) >= 1
    assert all(sorted(w.split()) == sorted(text.split()) for w in wrong if "," not in text)


def test_what_is_no_caption_of_two_things_has_no_exchanged_ones() -> None:
    rng = random.Random(0)
    assert exchanged(caption(sample(rng, pair_share=0.0), rng)) == []
    assert exchanged("<script>alert(1)</script> two things") == []


@pytest.mark.parametrize(("width", "height"), [(64, 64), (120, 64), (64, 110)])
def test_a_drawn_thing_is_where_and_as_large_as_stated(width: int, height: int) -> None:
    """Against the geometry, measured without the detector: area and centroid of a circle, by its colour alone."""
    for position, (x, y) in POSITIONS.items():
        for size, radius in SIZES.items():
            scene = Scene((Thing("black", "circle", size, position),), "white")
            picture = draw(scene, random.Random(f"{position}{size}"), width, height)
            assert (picture.mode, picture.size) == ("RGB", (width, height))
            ink = np.asarray(picture.convert("L"), np.float64)
            mask = (ink.max() - ink) / (ink.max() - ink.min())
            side = min(width, height)
            row, column = ndimage.center_of_mass(mask)
            measured_x = (column + 0.5 - (width - side) / 2) / side
            measured_y = (row + 0.5 - (height - side) / 2) / side
            slop = 1 / side
            assert abs(measured_x - x) <= scenes.OFFSET_JITTER + slop
            assert abs(measured_y - y) <= scenes.OFFSET_JITTER + slop
            assert abs((mask.sum() / np.pi) ** 0.5 / side - radius) <= scenes.RADIUS_JITTER + slop


@given(any_scene(), st.integers(0, 2**32))
def test_two_things_stay_apart_and_inside(scene: Scene, seed: int) -> None:
    spots = scenes._spots(scene, random.Random(seed))
    for x, y, radius in spots:
        assert radius - 0.02 <= x <= 1 - radius + 0.02
        assert radius - 0.02 <= y <= 1 - radius + 0.02
    if len(spots) == 2:
        (ax, ay, ar), (bx, by, br) = spots
        distance = bx - ax if scene.things[0].position == "left" else by - ay
        assert distance - ar - br >= scenes.PAIR_GAP - 1e-9


def test_drawing_depends_on_the_seed_alone() -> None:
    scene = sample(random.Random(0))
    first, again, other = (draw(scene, random.Random(seed), 96, 64).tobytes() for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("things", "ground", "words"),
    [
        ((Thing("red", "circle", "small", "left"),), "red", "ground is 'red'"),
        ((), "gray", "one or two things"),
        ((Thing("red", "star", "small", "left"), Thing("red", "star", "small", "right")), "gray", "two colours"),
        ((Thing("red", "star", "large", "left"), Thing("blue", "star", "large", "right")), "gray", "two large"),
        ((Thing("red", "star", "small", "left"), Thing("blue", "star", "small", "top")), "gray", "left and right"),
    ],
)
def test_impossible_scenes_are_refused(things: tuple[Thing, ...], ground: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scene(things, ground)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="colour is 'teal'"):
        Thing("teal", "circle", "small", "left")
