"""What the demo's pictures show: a small world of coloured shapes, drawn and described in English, and read back.

A `Scene` is one or two `Thing`s on a ground. `draw` paints it, `caption` tells the whole truth about it in one of many
wordings, `parse` is the exact inverse of `caption`, and `split` says whether the combination may be trained on:

    >>> rng = random.Random(0)
    >>> scene = sample(rng, "train")
    >>> picture, text = draw(scene, rng, 96, 64), caption(scene, rng)
    >>> parse(text) == scene
    True

`exchanged` gives captions in the same words that are wrong, from which a text encoder learns whose each word is.
All lengths are fractions of the side of the centred square, so that the truth survives a centre crop and any resize.
"""

from __future__ import annotations

import functools
import hashlib
import html
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 130, 20),
    "yellow": (245, 220, 40),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "purple": (135, 45, 170),
    "pink": (250, 140, 190),
    "black": (25, 25, 25),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (150, 150, 150),
    "beige": (230, 208, 170),
    "mint": (180, 232, 205),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
SIZES: dict[str, float] = {"small": 0.21, "large": 0.30}  # radius of a thing alone, in sides of the centred square
PAIR_SIZES: dict[str, float] = {"small": 0.18, "large": 0.26}  # of each of two, which must share the room
POSITIONS: dict[str, tuple[float, float]] = {  # centre (x, y) of a thing that stands alone
    "left": (0.345, 0.5),
    "center": (0.5, 0.5),
    "right": (0.655, 0.5),
    "top": (0.5, 0.345),
    "bottom": (0.5, 0.655),
}
PAIRS: tuple[tuple[str, str], ...] = (("left", "right"), ("top", "bottom"))  # where two things stand
PAIR_SHARE = 0.5  # of the images that `sample` draws; with fewer colours stay mixed, with more shapes stay rough
HELDOUT_SHARE = 0.12  # of the combinations

RADIUS_JITTER = 0.015
OFFSET_JITTER = 0.03
COLOUR_JITTER = 12  # of 255, each channel of a thing
GROUND_JITTER = 5
TURN_JITTER = 4.0  # degrees
PAIR_GAP = 0.04  # the least clear ground between two things


@dataclass(frozen=True)
class Thing:
    """One object: a colour, a shape, a size and a position, each a word of the vocabulary."""

    colour: str
    shape: str
    size: str
    position: str

    def __post_init__(self) -> None:
        for field, words in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("position", POSITIONS)):
            if getattr(self, field) not in words:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(words)}")


@dataclass(frozen=True)
class Scene:
    """One or two things on a ground. Two things stand left and right or top and bottom, in that order, with two
    colours, and at most one of them is large (two would not fit)."""

    things: tuple[Thing, ...]
    ground: str

    def __post_init__(self) -> None:
        if self.ground not in GROUNDS:
            raise ValueError(f"ground is {self.ground!r}; it must be one of {', '.join(GROUNDS)}")
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if len(self.things) == 2:
            a, b = self.things
            if (a.position, b.position) not in PAIRS:
                raise ValueError(
                    f"two things stand left and right or top and bottom, not {a.position} and {b.position}"
                )
            if a.colour == b.colour:
                raise ValueError(f"two things have two colours, here both are {a.colour}")
            if a.size == b.size == "large":
                raise ValueError("two large things do not fit one picture")


def pair(first: Thing, second: Thing, ground: str) -> Scene:
    """The scene of two things given in either order."""
    order = list(POSITIONS)
    a, b = sorted((first, second), key=lambda thing: order.index(thing.position))
    return Scene((a, b), ground)


@functools.lru_cache(maxsize=1 << 16)
def split(scene: Scene) -> str:
    """'train' or 'heldout': a fixed property of the whole combination (every attribute of every thing and the ground).

    By a hash, so that it needs no list, depends on no seed and is the same on every machine.
    """
    key = "|".join([scene.ground, *(f"{t.colour} {t.shape} {t.size} {t.position}" for t in scene.things)])
    lot = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "heldout" if lot < HELDOUT_SHARE else "train"


def sample(rng: random.Random, of: str | None = None, pair_share: float = PAIR_SHARE) -> Scene:
    """A random scene, of the split `of` ('train', 'heldout') or of either where it is None."""
    if of not in (None, "train", "heldout"):
        raise ValueError(f"a split is 'train' or 'heldout', not {of!r}")
    while True:
        ground = rng.choice(list(GROUNDS))
        if rng.random() < pair_share:
            colours = rng.sample(list(COLOURS), 2)
            sizes = rng.choice((("small", "small"), ("small", "large"), ("large", "small")))
            positions = rng.choice(PAIRS)
            things = tuple(
                Thing(c, rng.choice(SHAPES), s, p) for c, s, p in zip(colours, sizes, positions, strict=True)
            )
        else:
            shape, size = rng.choice(SHAPES), rng.choice(list(SIZES))
            things = (Thing(rng.choice(list(COLOURS)), shape, size, rng.choice(list(POSITIONS))),)
        scene = Scene(things, ground)
        if of is None or split(scene) == of:
            return scene


# ---------------------------------------------------------------- drawing


def outline(shape: str, x: float, y: float, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """The polygon of a shape around (x, y), in the unit of `radius`, turned by `turn` degrees (y points down).

    The four have about the same reach, so that `radius` means the same for each; (x, y) is the middle of the box.
    """
    if shape == "circle":
        points = [(math.cos(i * math.pi / 32), math.sin(i * math.pi / 32)) for i in range(64)]
    elif shape == "square":
        points = [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)]
    elif shape == "triangle":
        points = [(0.0, -0.93), (1.0, 0.83), (-1.0, 0.83)]
    elif shape == "star":
        reach = (1.06, 0.47)
        points = [
            (reach[i % 2] * math.sin(i * math.pi / 5), 0.08 - reach[i % 2] * math.cos(i * math.pi / 5))
            for i in range(10)
        ]
    else:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(SHAPES)}")
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return [(x + radius * (c * px - s * py), y + radius * (s * px + c * py)) for px, py in points]


def _spots(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each thing, in sides of the centred square."""
    sizes = SIZES if len(scene.things) == 1 else PAIR_SIZES
    radii = [sizes[thing.size] + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER) for thing in scene.things]
    if len(radii) == 1:
        x, y = POSITIONS[scene.things[0].position]
        dx, dy = (rng.uniform(-OFFSET_JITTER, OFFSET_JITTER) for _ in "xy")
        return [(x + dx, y + dy, radii[0])]
    # Two things share what room is left, so that they never touch and never leave the square.
    slack = 1 - PAIR_GAP - 2 * sum(radii)
    before, after = (rng.uniform(0.1, 0.45) * slack for _ in radii)
    along = (before + radii[0], 1 - after - radii[1])
    across = [0.5 + rng.uniform(-OFFSET_JITTER, OFFSET_JITTER) for _ in radii]
    if scene.things[0].position == "left":
        return [(a, c, r) for a, c, r in zip(along, across, radii, strict=True)]
    return [(c, a, r) for a, c, r in zip(along, across, radii, strict=True)]


def draw(scene: Scene, rng: random.Random, width: int, height: int, transparent: bool = False) -> Image.Image:
    """The scene as an RGB picture of width x height pixels, with jitter in position, size, turn and colour from `rng`.

    Everything stands inside the centred square. With `transparent`, an RGBA picture whose ground has alpha 0 (and still
    its colour): laid over the ground's colour it shows the scene.
    """
    over = 4 if min(width, height) < 256 else 2  # drawn this many times larger, then averaged: antialiasing
    side = min(width, height) * over
    left, top = (width * over - side) / 2, (height * over - side) / 2

    def shade(colour: tuple[int, int, int], jitter: int) -> tuple[int, int, int]:
        r, g, b = (max(0, min(255, v + rng.randint(-jitter, jitter))) for v in colour)
        return r, g, b

    ground = shade(GROUNDS[scene.ground], GROUND_JITTER)
    size = (width * over, height * over)
    image, mask = Image.new("RGB", size, ground), Image.new("L", size if transparent else (0, 0))
    pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for thing, (x, y, radius) in zip(scene.things, _spots(scene, rng), strict=True):
        ink = shade(COLOURS[thing.colour], COLOUR_JITTER)
        points = outline(thing.shape, x, y, radius, rng.uniform(-TURN_JITTER, TURN_JITTER))
        corners = [(left + side * px, top + side * py) for px, py in points]
        pen.polygon(corners, fill=ink)
        if transparent:
            mask_pen.polygon(corners, fill=255)
    image = image.reduce(over)
    if transparent:
        image.putalpha(mask.reduce(over))
    return image


# ---------------------------------------------------------------- captions

# The words that a slot of a template may take, by the meaning they carry.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
AT = {  # where a thing is within the picture
    "left": ("on the left", "at the left", "on the left side"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
BACK = {  # the ground, as the end of a sentence
    ground: (
        f"on a {ground} background",
        f"against a {ground} background",
        f"with a {ground} background",
        f"on {ground}",
    )
    for ground in GROUNDS
}

SINGLE = (
    "a {size} {colour} {shape} {at} {back}",
    "a {colour} {shape}, {size}, {at} {back}",
    "{size} {colour} {shape} {at} {back}",
    "{size} {colour} {shape}, {at}, {back}",
    "one {size} {colour} {shape} {back}, {at}",
    "{at} a {size} {colour} {shape} {back}",
    "there is a {size} {colour} {shape} {at} {back}",
    "a picture of a {size} {colour} {shape} {at} {back}",
    "a {ground} picture with a {size} {colour} {shape} {at}",
    "{ground} background, {size} {colour} {shape} {at}",
    "a {size} {shape} in {colour} {at} {back}",
    "the {shape} {at} is {size} and {colour}, {back}",
)
# In these, {first} and {second} are "SIZE COLOUR SHAPE"; either of the two things may come first.
DOUBLE = (
    "a {first} {at1} and a {second} {at2} {back}",
    "a {first} {at1}, a {second} {at2}, {back}",
    "{first} {at1} & {second} {at2} {back}",
    "{at1} a {first}, {at2} a {second}, {back}",
    "a {ground} picture with a {first} {at1} and a {second} {at2}",
    "there is a {first} {at1} and a {second} {at2} {back}",
    "a {first} {beside} a {second} {back}",
    "{first} {beside} {second}, {ground} background",
)
BESIDE = {  # where the first thing is, seen from the second
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under"),
}
OPPOSITE = dict(PAIRS) | {b: a for a, b in PAIRS}


def caption(scene: Scene, rng: random.Random) -> str:
    """An English caption that tells the whole truth about the scene: every attribute of every thing, and the ground."""
    words: dict[str, str] = {"ground": scene.ground, "back": rng.choice(BACK[scene.ground])}
    if len(scene.things) == 1:
        thing = scene.things[0]
        words |= {"colour": thing.colour, "shape": thing.shape}
        words |= {"size": rng.choice(SIZE_WORDS[thing.size]), "at": rng.choice(AT[thing.position])}
        return rng.choice(SINGLE).format(**words)
    first, second = rng.sample(scene.things, 2)
    for name, thing in (("first", first), ("second", second)):
        words[name] = f"{rng.choice(SIZE_WORDS[thing.size])} {thing.colour} {thing.shape}"
    words |= {"at1": rng.choice(AT[first.position]), "at2": rng.choice(AT[second.position])}
    words["beside"] = rng.choice(BESIDE[first.position])
    return rng.choice(DOUBLE).format(**words)


def _alternatives(words: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """From each wording back to its meaning."""
    return {wording: meaning for meaning, wordings in words.items() for wording in wordings}


_MEANING = {
    "size": _alternatives(SIZE_WORDS),
    "at": _alternatives(AT),
    "back": _alternatives(BACK),
    "beside": _alternatives(BESIDE),
}
_SLOTS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "ground": tuple(GROUNDS),
    "size": tuple(_MEANING["size"]),
    "at": tuple(_MEANING["at"]),
    "back": tuple(_MEANING["back"]),
    "beside": tuple(_MEANING["beside"]),
}


@functools.cache
def _grammar() -> list[tuple[re.Pattern[str], bool]]:
    """Each template as a regular expression with its slots as groups, and whether it names two things."""

    def group(name: str) -> str:
        kind = name.rstrip("12")
        return f"(?P<{name}>" + "|".join(re.escape(w) for w in sorted(_SLOTS[kind], key=len, reverse=True)) + ")"

    def pattern(template: str) -> re.Pattern[str]:
        template = template.replace("{first}", "{size1} {colour1} {shape1}")
        template = template.replace("{second}", "{size2} {colour2} {shape2}")
        parts = re.split(r"\{(\w+)\}", template)
        return re.compile("".join(group(p) if i % 2 else re.escape(p) for i, p in enumerate(parts)))

    return [(pattern(t), False) for t in SINGLE] + [(pattern(t), True) for t in DOUBLE]


def _plain(text: str) -> str:
    return " ".join(html.unescape(html.unescape(text)).lower().split())


def exchanged(text: str) -> list[str]:
    """A caption of two things with their colours, their shapes or their sizes exchanged: wrong ones in the same words.

    One for each of the three in which the things differ; none for a caption of one thing, or of no grammar of ours.
    """
    plain = _plain(text)
    wrong = []
    for found in (pattern.fullmatch(plain) for pattern, double in _grammar() if double):
        if not found:
            continue
        for kind in ("colour", "shape", "size"):
            (begin1, end1), (begin2, end2) = found.span(f"{kind}1"), found.span(f"{kind}2")
            first, second = plain[begin1:end1], plain[begin2:end2]
            known = _MEANING.get(kind, {})
            if known.get(first, first) != known.get(second, second):
                wrong.append(plain[:begin1] + second + plain[end1:begin2] + first + plain[end2:])
        break
    return wrong


def parse(text: str) -> Scene:
    """The scene that a caption describes: the exact inverse of `caption`, which also undoes HTML entities, capital
    letters and extra white space, as CLIP's tokenizer does.

    Raises ValueError where the text is not of this grammar.
    """
    plain = _plain(text)
    for pattern, double in _grammar():
        found = pattern.fullmatch(plain)
        if not found:
            continue
        slots = found.groupdict()
        ground = slots.get("ground") or _MEANING["back"][slots["back"]]
        if not double:
            size, position = _MEANING["size"][slots["size"]], _MEANING["at"][slots["at"]]
            return Scene((Thing(slots["colour"], slots["shape"], size, position),), ground)
        if "beside" in slots:
            position1 = _MEANING["beside"][slots["beside"]]
            position2 = OPPOSITE[position1]
        else:
            position1, position2 = _MEANING["at"][slots["at1"]], _MEANING["at"][slots["at2"]]
        sizes = [_MEANING["size"][slots[f"size{i}"]] for i in (1, 2)]
        return pair(
            Thing(slots["colour1"], slots["shape1"], sizes[0], position1),
            Thing(slots["colour2"], slots["shape2"], sizes[1], position2),
            ground,
        )
    raise ValueError(f"{text[:120]!r} is no caption of this world")
