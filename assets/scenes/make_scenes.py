"""Draw the embedded data set: captioned cartoon scenes, laid out like Flickr8k.

The notebook trains on Flickr8k. For a first run with no network, and for the tests, it trains on
this set instead, through the very same data path, so it comes as two archives with the names, the
layout and the formats of Flickr8k's. Every picture shows one main object (a red dog, a white boat,
...) doing one thing in one place; what was drawn is in ``scenes.json``, which the tests read.

    python assets/scenes/make_scenes.py            # draw the set again, over what is there
    python assets/scenes/make_scenes.py --check    # draw it in memory, compare with what is there

Everything follows from ``SEED``. The same Pillow version gives the same bytes. Each picture has a
random stream of its own, so a change to how one object is drawn leaves the others as they were.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import random
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageOps
from PIL import __version__ as PILLOW_VERSION

SEED = 8
SPLITS = {"train": 1200, "dev": 200, "test": 200}
SHAPES = ((120, 90), (90, 120), (112, 84), (84, 112), (115, 92), (92, 115), (124, 93))
SUPERSAMPLE = 3  # pictures are drawn this many times larger, then reduced
JPEG_QUALITY = 80
GRID = 4  # the coverage in scenes.json is counted on a GRID x GRID grid
CAPTIONS_PER_PICTURE = 5
CAPTION_WORDS = range(6, 19)  # words in a caption, the full stop not counted

Point = tuple[float, float]
RGB = tuple[int, int, int]


# --------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------

COLOURS: dict[str, RGB] = {
    "red": (216, 34, 38),
    "blue": (34, 80, 216),
    "green": (16, 134, 62),
    "yellow": (252, 208, 24),
    "pink": (252, 118, 184),
    "brown": (124, 72, 32),
    "black": (36, 36, 42),
    "white": (250, 250, 250),
}
INK: RGB = (30, 30, 36)  # eyes, tyres, noses
CREAM: RGB = (250, 240, 214)
WOOD: RGB = (176, 150, 122)
GLASS: RGB = (205, 226, 236)
SKINS: tuple[RGB, ...] = ((246, 208, 176), (222, 172, 130), (150, 102, 74))
HAIRS: tuple[RGB, ...] = ((52, 38, 32), (104, 66, 40), (206, 166, 96))

# Each kind of object has one thing in a colour that is not among COLOURS and the same in every
# picture: a network of three convolutions sees 15 x 15 pixels at a time, too few for a shape.
TROUSERS: RGB = (146, 146, 84)  # man
GINGER: RGB = (206, 92, 36)  # woman's hair
TEAL: RGB = (40, 206, 200)  # dog's coat
LIME: RGB = (190, 232, 60)  # cat's scarf and eyes
VIOLET: RGB = (150, 96, 206)  # horse's blanket
ORANGE: RGB = (250, 142, 30)  # bird's beak and feet, ball's star
MAGENTA: RGB = (208, 30, 176)  # kite's tail


def mix(one: RGB, two: RGB, share: float) -> RGB:
    """The colour `share` of the way from `one` to `two`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, two, strict=True))


@dataclass(frozen=True)
class Ink:
    """The shades one object is drawn in."""

    main: RGB
    dark: RGB  # far legs, ears, manes: set off from `main`
    light: RGB  # highlights and stripes
    outline: RGB
    eye: RGB = INK

    @classmethod
    def of(cls, colour: str) -> Ink:
        main = COLOURS[colour]
        if colour == "black":
            return cls(main, (74, 74, 84), (112, 112, 124), (8, 8, 12), eye=(250, 250, 250))
        if colour == "white":
            return cls(main, (206, 211, 220), (226, 230, 236), (74, 80, 96))
        return cls(
            main, mix(main, (0, 0, 0), 0.3), mix(main, (255, 255, 255), 0.4), mix(main, INK, 0.7)
        )


# --------------------------------------------------------------------------------------------
# Pens
# --------------------------------------------------------------------------------------------


def path(points: str | Sequence[Point]) -> Sequence[Point]:
    """Points written as in SVG, "x,y x,y", as pairs of numbers; pairs stay as they are."""
    if not isinstance(points, str):
        return points
    pairs = (pair.split(",") for pair in points.split())
    return [(float(x), float(y)) for x, y in pairs]


def smooth(points: Sequence[Point], steps: int = 8) -> list[Point]:
    """A closed Catmull-Rom curve through `points`, as a polygon."""
    curve = []
    for i in range(len(points)):
        before, start, end, after = (points[(i + k) % len(points)] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            weights = (
                -t / 2 + t**2 - t**3 / 2,
                1 - 5 * t**2 / 2 + 3 * t**3 / 2,
                t / 2 + 2 * t**2 - 3 * t**3 / 2,
                (t**3 - t**2) / 2,
            )
            corners = zip(weights, (before, start, end, after), strict=True)
            x = y = 0.0
            for weight, corner in corners:
                x, y = x + weight * corner[0], y + weight * corner[1]
            curve.append((x, y))
    return curve


class Pen:
    """Draws filled shapes on an image, in units of `scale` pixels about the point `origin`."""

    def __init__(self, image: Image.Image, scale: float, origin: Point = (0.0, 0.0)) -> None:
        self._image = image
        self._draw = ImageDraw.Draw(image)
        self._scale = scale
        self._origin = origin

    def at(self, x: float, y: float, unit: float) -> Pen:
        """A pen on the same image that counts from (x, y) in units of `unit`."""
        origin = self._origin[0] + x * self._scale, self._origin[1] + y * self._scale
        return Pen(self._image, self._scale * unit, origin)

    def poly(self, points: str | Sequence[Point], fill: RGB) -> None:
        (left, top), scale = self._origin, self._scale
        corners = [(left + x * scale, top + y * scale) for x, y in path(points)]
        self._draw.polygon(corners, fill=fill)

    def blob(self, points: str | Sequence[Point], fill: RGB) -> None:
        """A rounded shape whose edge goes through `points`."""
        self.poly(smooth(path(points)), fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: RGB, turn: float = 0) -> None:
        """An ellipse about (x, y), turned clockwise by `turn` degrees."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        circle = around(0, 0, 1)
        self.poly(
            [(x + a * rx * cos - b * ry * sin, y + a * rx * sin + b * ry * cos) for a, b in circle],
            fill,
        )

    def dot(self, x: float, y: float, radius: float, fill: RGB) -> None:
        self.poly(around(x, y, radius), fill)

    def ring(self, x: float, y: float, radius: float, width: float, fill: RGB) -> None:
        circle = around(x, y, radius)
        self.limb([*circle, circle[0]], width, fill)

    def limb(self, points: str | Sequence[Point], width: float, fill: RGB) -> None:
        """A line through `points` with round joints and ends."""
        points = path(points)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            dx, dy = (x1 - x0) / length * width / 2, (y1 - y0) / length * width / 2
            near, far = (
                [(x0 + dy, y0 - dx), (x0 - dy, y0 + dx)],
                [(x1 - dy, y1 + dx), (x1 + dy, y1 - dx)],
            )
            self.poly(near + far, fill)
        for x, y in points:
            self.dot(x, y, width / 2, fill)


def around(x: float, y: float, radius: float, count: int = 48) -> list[Point]:
    """`count` points on a circle."""
    turns = (math.tau * i / count for i in range(count))
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


# --------------------------------------------------------------------------------------------
# Objects: each function draws one object, facing right, on a canvas of 100 x 100 units
# --------------------------------------------------------------------------------------------

SPRITE_SCALE = 4  # pixels in a unit of the sprite's canvas

# Joints of a person's limbs by pose: two arms (shoulder, elbow, hand), two legs (hip, knee, foot).
ARMS_DOWN = ("36,36 28,48 27,60", "64,36 72,48 73,60")
LEGS_STRAIGHT = ("43,60 42,77 40,95", "57,60 58,77 60,95")
PERSON_POSES: dict[str, tuple[str, ...]] = {
    "stand": (*ARMS_DOWN, *LEGS_STRAIGHT),
    "wave": (ARMS_DOWN[0], "64,36 78,28 82,10", *LEGS_STRAIGHT),
    "run": ("38,37 24,46 14,38", "62,37 74,48 86,40", "45,60 32,74 12,78", "56,60 74,68 78,88"),
    "jump": ("36,36 22,26 16,8", "64,36 78,26 84,8", "43,60 26,68 18,84", "57,60 74,68 82,84"),
    "sit": ("37,36 26,50 22,66", "61,36 68,48 80,54", "44,62 64,58 84,70", "50,66 70,64 92,70"),
    "dance": ("36,36 20,30 26,12", "64,36 80,42 92,30", "45,60 44,78 43,95", "57,60 72,70 86,82"),
}


def limbs_of(pose: str) -> tuple[list[Sequence[Point]], list[Sequence[Point]]]:
    """The arms and the legs of a person in this pose."""
    limbs = [path(limb) for limb in PERSON_POSES[pose]]
    return limbs[:2], limbs[2:]


def draw_head(pen: Pen, rng: random.Random) -> RGB:
    """A person's face; gives back the colour of the skin."""
    skin = rng.choice(SKINS)
    pen.dot(50, 18, 12.5, skin)
    pen.dot(47, 18, 1.5, INK)
    pen.dot(56, 18, 1.5, INK)
    pen.limb("47,23 51,25 56,23", 1.2, INK)
    return skin


def draw_man(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    arms, legs = limbs_of(pose)
    for leg in legs:
        pen.limb(leg, 11, TROUSERS)
        x, y = leg[-1]
        pen.oval(x + 3, y + 1, 7, 4, INK)
    skin = draw_head(pen, rng)
    hair = rng.choice(HAIRS)
    pen.blob("38,18 38,9 46,4 57,4 63,10 62,18 57,14 46,14", hair)
    pen.blob("37,12 40,3 50,0 60,3 63,12 50,13", ink.main)
    pen.limb("60,12 71,13", 4, ink.dark)
    pen.blob("34,34 42,29 58,29 66,34 63,50 63,64 37,64 37,50", ink.main)
    for arm in arms:
        pen.limb(arm, 9.5, ink.main)
        pen.dot(*arm[-1], 5, skin)
    pen.limb("45,30 50,35 55,30", 2, ink.dark)
    pen.limb("37.5,62 62.5,62", 2.5, ink.dark)


def draw_woman(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    arms, legs = limbs_of(pose)
    pen.blob("36,14 42,4 58,4 65,14 67,34 70,46 58,40 42,40 30,46 33,34", GINGER)
    skin = draw_head(pen, rng)
    pen.blob("38,18 38,8 46,4 57,4 64,10 63,18 56,10 46,11", GINGER)
    for leg in legs:
        pen.limb(leg, 7, skin)
        x, y = leg[-1]
        pen.oval(x + 3, y + 1, 6, 3.5, ink.dark)
    for arm in arms:
        pen.limb(arm, 7, skin)
        pen.limb(arm[:2], 8, ink.main)
    if pose == "sit":
        skirt = "41,48 59,48 74,54 80,70 34,74"
    else:
        skirt = "41,48 59,48 68,62 78,80 50,83 22,80 32,62"
    pen.poly(skirt, ink.main)
    for x, y in path(
        "38,66 50,58 62,66" if pose == "sit" else "38,66 50,58 62,66 30,77 50,76 70,77"
    ):
        pen.dot(x, y, 3.6, CREAM if ink.main != COLOURS["white"] else ink.dark)
    pen.blob("36,34 43,29 57,29 64,34 60,50 40,50", ink.main)
    pen.limb("41,50 59,50", 3.5, ink.dark)


def draw_dog_head(pen: Pen, ink: Ink, x: float, y: float) -> None:
    pen.oval(x, y, 13, 12.5, ink.main)
    pen.oval(x + 13, y + 6, 11, 7, ink.main)
    pen.limb([(x + 12, y + 12), (x + 13, y + 17)], 4.5, (240, 130, 140))
    pen.limb([(x + 6, y + 11), (x + 20, y + 10)], 1.6, ink.dark)
    pen.dot(x + 22, y + 2, 3.6, ink.eye)
    pen.dot(x + 4, y - 3, 3.2, (255, 255, 255))
    pen.dot(x + 5, y - 3, 2, INK)
    pen.blob(
        [(x - 4, y - 11), (x - 13, y - 8), (x - 16, y + 6), (x - 10, y + 14), (x - 4, y + 4)],
        ink.dark,
    )


def draw_dog(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    if pose == "sit":
        pen.limb("28,86 14,84 7,72", 6, ink.main)
        pen.limb("56,62 58,91", 8, ink.dark)
        pen.blob("24,92 24,74 40,52 56,40 68,52 66,78 60,92", ink.main)
        pen.oval(36, 80, 15, 13, ink.main)
        pen.limb("36,91 48,91", 7, ink.dark)
        pen.limb("63,60 65,91 69,91", 8, ink.main)
        pen.blob("42,54 54,42 68,52 68,72 50,74", TEAL)
        pen.limb("41,56 50,75 68,73", 3, CREAM)
        draw_dog_head(pen, ink, 64, 30)
        return
    if pose == "stand":
        far, near = ("32,62 34,91", "60,62 58,91"), ("24,62 23,91", "68,62 69,91")
    else:  # runs or jumps
        far = ("30,62 24,78 12,84", "60,62 72,74 82,84")
        near = ("24,60 12,70 -1,70", "66,60 82,66 95,68")
    pen.limb("20,52 9,42 6,28", 6, ink.main)
    for leg in far:
        pen.limb(leg, 8, ink.dark)
    pen.blob("18,50 40,46 60,44 74,44 76,58 64,69 44,68 24,69 15,60", ink.main)
    for leg in near:
        pen.limb(leg, 9, ink.main)
    pen.blob("32,46 48,44 64,44 66,68 48,69 32,69", TEAL)
    pen.limb("31,47 31,68", 3, CREAM)
    pen.limb("65,45 66,68", 3, CREAM)
    draw_dog_head(pen, ink, 74, 34)


def draw_cat_head(pen: Pen, ink: Ink, x: float, y: float, awake: bool = True) -> None:
    for side in (-1, 1):
        pen.poly(
            [(x + side * 17, y - 24), (x + side * 2, y - 11), (x + side * 17, y - 2)], ink.main
        )
        pen.poly(
            [(x + side * 14, y - 18), (x + side * 6, y - 10), (x + side * 14, y - 6)], ink.dark
        )
    pen.oval(x, y + 13, 16, 10, LIME)
    pen.oval(x, y, 18, 15, ink.main)
    pen.oval(x, y + 7, 10, 7, CREAM)
    for stripe in (-4, 0, 4):
        pen.limb([(x + stripe, y - 14), (x + stripe, y - 8)], 2.2, ink.dark)
    for side in (-1, 1):
        if awake:
            pen.oval(x + side * 8, y - 2, 6, 5.4, LIME)
            pen.oval(x + side * 8, y - 2, 1.8, 4.6, INK)
        else:
            pen.limb(
                [(x + side * 4, y - 2), (x + side * 7, y), (x + side * 10, y - 2)], 1.5, ink.outline
            )
        for tilt in (-2, 3):
            pen.limb([(x + side * 9, y + 5), (x + side * 24, y + 5 + tilt)], 1.1, ink.outline)
    pen.poly([(x - 3, y + 3), (x + 3, y + 3), (x, y + 7)], (235, 140, 150))


def draw_cat(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    if pose == "sleep":
        pen.oval(48, 76, 38, 19, ink.main)
        for x in (20, 30, 40, 50):
            pen.limb([(x, 60 - (x - 20) / 10), (x - 4, 74)], 4, ink.dark)
        draw_cat_head(pen, ink, 72, 72, awake=False)
        pen.limb("12,80 20,93 44,95 64,92", 8, ink.dark)
    elif pose == "sit":
        pen.limb("62,88 82,86 88,70 80,58", 7, ink.main)
        pen.blob("50,40 64,52 70,78 66,93 34,93 30,78 36,52", ink.main)
        for y in (58, 68, 78):
            pen.limb([(33, y), (43, y + 2)], 3.5, ink.dark)
            pen.limb([(67, y), (57, y + 2)], 3.5, ink.dark)
        for side in (-1, 1):
            pen.oval(50 + side * 9, 91, 7, 5, ink.dark)
        draw_cat_head(pen, ink, 50, 30)
    else:
        pen.limb("20,62 8,50 10,32 18,24", 6.5, ink.main)
        for leg in ("30,70 36,92", "60,70 54,92"):
            pen.limb(leg, 7.5, ink.dark)
        pen.blob("16,60 36,56 60,56 74,60 70,76 44,77 20,77", ink.main)
        for leg in ("22,70 16,92", "68,68 74,92"):
            pen.limb(leg, 8, ink.main)
        for x in (26, 36, 46, 56):
            pen.limb([(x, 58), (x - 2, 69)], 4, ink.dark)
        draw_cat_head(pen, ink, 74, 46)


def draw_horse(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    if pose == "run":
        far = ("28,54 16,66 6,82", "60,54 80,62 84,78")
        near = ("22,52 8,58 -2,72", "64,52 86,52 98,62")
    elif pose == "walk":
        far = ("30,52 36,72 32,94", "60,52 54,72 58,94")
        near = ("22,52 18,74 12,94", "64,52 72,72 76,94")
    else:
        far, near = ("30,52 31,94", "58,52 57,94"), ("21,52 20,94", "66,52 67,94")
    pen.blob("18,42 8,44 0,62 6,74 11,60 18,52", ink.dark)
    for leg in far:
        pen.limb(leg, 6, ink.dark)
    pen.blob("14,44 30,38 52,40 68,38 74,50 62,62 40,60 20,62", ink.main)
    pen.blob("28,35 55,37 58,60 28,59", VIOLET)
    pen.limb("28,59 58,60", 3.5, CREAM)
    for leg in near:
        pen.limb(leg, 6.5, ink.main)
        pen.dot(*path(leg)[-1], 4, ink.outline)
    if pose == "graze":
        pen.blob("56,42 70,38 84,58 88,74 80,76 70,60", ink.main)
        pen.blob("64,38 74,38 90,60 84,64 72,50", ink.dark)
        pen.oval(86, 82, 7, 12.5, ink.main, -18)
        pen.poly("80,70 82,62 86,70", ink.main)
        pen.dot(85, 78, 1.8, ink.eye)
        pen.oval(89, 92, 4, 3, ink.dark)
        return
    pen.blob("54,44 62,26 70,12 82,12 80,28 74,52", ink.main)
    pen.blob("72,2 62,8 52,28 46,40 56,40 66,24 76,10", ink.dark)
    pen.oval(84, 19, 14, 7, ink.main, 32)
    pen.poly("72,10 74,-2 80,8", ink.main)
    pen.dot(82, 14, 1.9, ink.eye)
    pen.oval(93, 25, 4, 4.5, ink.dark)


def draw_bird(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    if pose == "fly":
        pen.blob("46,50 30,34 26,8 42,16 56,34 60,48", ink.dark)
        pen.poly("28,54 2,48 8,58 2,68 28,62", ORANGE)
        pen.blob("24,56 44,46 66,46 76,56 64,66 42,66", ink.main)
        pen.poly("81,39 106,53 81,60", ORANGE)
        pen.dot(77, 48, 11, ink.main)
        pen.blob("42,56 40,36 50,8 66,2 66,24 62,48 56,58", ink.main)
        pen.poly("45,30 51,6 67,0 67,16", ORANGE)
        for feather in ("47,52 49,28", "53,52 57,25", "58,50 62,24"):
            pen.limb(feather, 2.6, ink.light)
        eye = (80, 45)
    else:
        for x in (46, 56):
            pen.limb([(x, 74), (x, 94), (x + 7, 94)], 4.5, ORANGE)
        pen.poly("24,60 2,70 8,84 32,76", ORANGE)
        pen.blob("22,64 30,46 52,40 72,50 72,68 56,80 34,78", ink.main)
        pen.poly("75,23 106,38 75,48", ORANGE)
        pen.dot(66, 34, 16, ink.main)
        pen.blob("26,58 42,50 58,54 50,68 34,72 20,74", ink.dark)
        for feather in ("30,60 26,70", "38,57 34,68", "46,56 43,66"):
            pen.limb(feather, 2.6, ink.light)
        eye = (70, 30)
    pen.dot(*eye, 3.8, (255, 255, 255))
    pen.dot(eye[0] + 0.8, eye[1], 2.2, INK)


def draw_ball(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    pen.dot(50, 50, 44, ink.main)
    pen.dot(50, 50, 28, CREAM)
    pen.ring(50, 50, 28, 3, ink.dark)
    tips, notches = around(50, 50, 27, 5), around(50, 50, 11, 10)[1::2]
    star = [point for pair in zip(tips, notches, strict=True) for point in pair]
    pen.poly(star, ORANGE)
    pen.oval(33, 26, 9, 6, ink.light, -40)


def draw_kite(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    pen.limb("38,66 30,76 36,84 26,92 30,99", 2.2, ink.outline)
    for x, y in ((31, 76), (34, 87), (27, 98)):
        pen.poly([(x - 12, y - 6), (x + 12, y + 6), (x + 12, y - 6), (x - 12, y + 6)], MAGENTA)
    top, left, right, bottom, middle = (62, 2), (22, 24), (86, 40), (38, 68), (55, 32)
    pen.poly([top, right, bottom, left], ink.main)
    pen.poly([top, right, middle], ink.light)
    pen.poly([bottom, left, middle], ink.dark)
    pen.limb([top, bottom], 4, MAGENTA)
    pen.limb([left, right], 4, MAGENTA)


def draw_boat(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    pen.limb("48,6 48,76", 3.5, WOOD)
    pen.blob("51,8 74,34 86,64 68,66 51,66", ink.main)
    pen.poly("45,12 45,66 10,66", CREAM)
    for stripe in ("36,27 45,27", "27,40 45,40", "19,53 45,53"):
        pen.limb(stripe, 2.4, INK)
    pen.poly("49,8 49,-6 66,1", ink.main)
    pen.poly("4,72 98,72 82,94 20,94", ink.main)
    pen.poly("4,72 98,72 95,77 8,77", ink.dark)
    for x in (30, 50, 70):
        pen.dot(x, 85, 4.5, GLASS)


def draw_car(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    pen.blob("16,56 26,34 38,26 60,26 72,34 84,56 50,60", ink.main)
    pen.blob("23,54 30,39 38,32 47,32 47,54", GLASS)
    pen.blob("52,54 52,32 60,32 68,39 77,54", GLASS)
    pen.blob("2,62 8,54 40,53 80,53 96,58 99,70 92,77 8,77 2,72", ink.main)
    pen.limb("6,74 94,74", 4, ink.dark)
    for i in range(8):
        x, y = 20 + 7 * i, 58 + 5 * (i % 2)
        pen.rect(20 + 7 * i, 58, 27 + 7 * i, 68, CREAM)
        pen.rect(x, y, x + 7, y + 5, INK)
    pen.oval(95, 62, 3.5, 4, (255, 244, 190))
    for x in (24, 76):
        pen.dot(x, 76, 14.5, INK)
        pen.dot(x, 76, 7.5, (200, 204, 210))


def draw_bicycle(pen: Pen, ink: Ink, pose: str, rng: random.Random) -> None:
    back, front, crank, seat, head = (22, 70), (78, 70), (46, 70), (38, 42), (68, 38)
    for x, y in (back, front):
        pen.dot(x, y, 18, CREAM)
        for dx, dy in around(0, 0, 17, 12)[:6]:
            pen.limb([(x - dx, y - dy), (x + dx, y + dy)], 1.5, INK)
        pen.ring(x, y, 19, 3.5, INK)
        pen.ring(x, y, 15.5, 4, ink.main)
    for tube in ([back, crank, head, seat, back], [crank, seat], [head, front]):
        pen.limb(tube, 6.5, ink.main)
    pen.limb([head, (65, 24), (76, 20)], 4.5, INK)
    pen.limb([seat, (36, 34)], 4, ink.main)
    pen.limb("28,32 44,32", 6, INK)
    pen.dot(*crank, 5.5, INK)
    pen.poly("70,28 94,28 90,46 74,46", WOOD)
    pen.limb("71,34 92,34", 1.6, CREAM)
    pen.limb("73,40 90,40", 1.6, CREAM)


# --------------------------------------------------------------------------------------------
# What there is to draw: kinds of objects, places, and what is kept out of the training split
# --------------------------------------------------------------------------------------------

Draw = Callable[[Pen, Ink, str, random.Random], None]


@dataclass(frozen=True)
class Kind:
    """A kind of object: how it is drawn, where it may be and what it may do there."""

    draw: Draw
    words: tuple[str, ...]
    actions: dict[str, tuple[str, ...]]  # place -> actions
    bulk: float = 1.0  # its largest extent, in the box that a size allows


def on_land(*actions: str, **others: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """`actions` in every place on land, except where `others` says otherwise."""
    return {place: actions for place in ("grass", "beach", "snow", "street")} | others


KINDS: dict[str, Kind] = {
    "man": Kind(draw_man, ("man", "guy"), on_land("stand", "wave", "run", "jump", "sit")),
    "woman": Kind(draw_woman, ("woman", "lady"), on_land("stand", "wave", "run", "dance", "sit")),
    "dog": Kind(draw_dog, ("dog", "puppy"), on_land("stand", "run", "jump", "sit")),
    "cat": Kind(draw_cat, ("cat", "kitten"), on_land("walk", "sit", "sleep")),
    "horse": Kind(
        draw_horse,
        ("horse", "pony"),
        on_land("stand", "walk", "run", grass=("stand", "walk", "run", "graze")),
    ),
    "bird": Kind(draw_bird, ("bird",), on_land("fly", "stand", water=("fly",)), 0.9),
    "ball": Kind(draw_ball, ("ball",), on_land("lie", "roll", "bounce", water=("float",)), 0.8),
    "kite": Kind(draw_kite, ("kite",), on_land("fly", water=("fly",))),
    "boat": Kind(draw_boat, ("boat", "sailboat"), {"water": ("sail", "float"), "beach": ("lie",)}),
    "car": Kind(draw_car, ("car", "automobile"), on_land("drive", "park")),
    "bicycle": Kind(draw_bicycle, ("bicycle", "bike"), on_land("park", "lean")),
}
PEOPLE = ("man", "woman")
SIZES = {"small": (0.50, 0.58), "big": (0.66, 0.78)}  # a box, as shares of width and height
SIDES = {"left": (0.20, 0.29), "middle": (0.46, 0.54), "right": (0.71, 0.80)}  # of its centre
SKIES = ("clear", "sunny", "cloudy", "evening")
ITEMS = {  # a second, smaller thing in the picture
    "grass": ("tree", "house", "bush"),
    "beach": ("palm tree", "umbrella", "rock"),
    "snow": ("pine tree", "mountain", "cabin"),
    "street": ("house", "street lamp", "tree"),
    "water": ("island", "mountain", "lighthouse"),
}

# Combinations that dev and test have and train has not.
HELD_OUT_COLOURS = frozenset(
    {("dog", "red"), ("cat", "blue"), ("horse", "yellow"), ("ball", "green"), ("woman", "black")}
)
HELD_OUT_PLACES = frozenset(
    {
        ("dog", "snow"),
        ("horse", "beach"),
        ("woman", "street"),
        ("bicycle", "grass"),
        ("cat", "beach"),
        ("man", "snow"),
    }
)


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    name: str
    width: int
    height: int
    kind: str
    colour: str
    size: str
    action: str
    place: str
    side: str
    sky: str
    item: str | None
    faces_left: bool

    @property
    def novel(self) -> int:
        """1 for an object in a colour that train never shows it in, 2 for a place, 3 for both."""
        return ((self.kind, self.colour) in HELD_OUT_COLOURS) + 2 * (
            (self.kind, self.place) in HELD_OUT_PLACES
        )


# --------------------------------------------------------------------------------------------
# Backgrounds
# --------------------------------------------------------------------------------------------

SKY_COLOURS: dict[str, tuple[RGB, RGB]] = {  # at the top, at the horizon
    "clear": ((150, 205, 240), (222, 240, 250)),
    "sunny": ((140, 208, 248), (236, 246, 246)),
    "cloudy": ((184, 200, 212), (226, 232, 236)),
    "evening": ((206, 190, 220), (252, 222, 196)),
    "snowfall": ((186, 200, 218), (216, 226, 238)),
}
GROUND_COLOURS: dict[str, RGB] = {
    "grass": (158, 206, 112),
    "beach": (238, 220, 176),
    "snow": (226, 236, 246),
    "street": (176, 178, 184),
    "water": (130, 200, 218),
}
SEA: RGB = (112, 190, 208)
LEAVES: RGB = (122, 172, 104)
PINE: RGB = (132, 166, 148)
STONE: RGB = (168, 164, 162)
SLATE: RGB = (176, 160, 158)
PLASTER: RGB = (232, 222, 206)
LAMPLIGHT: RGB = (255, 244, 206)


def draw_sky(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    top, low = SKY_COLOURS[scene.sky]
    bands = 24
    for i in range(bands):
        y0, y1 = horizon * i / bands, horizon * (i + 1) / bands + 1
        pen.rect(0, y0, scene.width, y1, mix(top, low, i / (bands - 1)))
    away = -1 if scene.side == "right" else 1
    if scene.sky in ("sunny", "evening"):
        low_sun = scene.sky == "evening"
        x = scene.width * (0.5 + away * rng.uniform(0.28, 0.42))
        y = horizon * (0.9 if low_sun else rng.uniform(0.25, 0.45))
        radius = 0.07 * min(scene.width, scene.height)
        halo = mix(low, (255, 236, 190), 0.5)
        pen.dot(x, y, radius * 1.5, halo)
        pen.dot(x, y, radius, (255, 226, 180) if low_sun else (255, 244, 196))
    for _ in range({"clear": 0, "sunny": 1, "cloudy": 4, "evening": 1, "snowfall": 0}[scene.sky]):
        x, y = rng.uniform(0.05, 0.95) * scene.width, rng.uniform(0.15, 0.6) * horizon
        draw_cloud(pen, x, y, rng.uniform(0.07, 0.12) * scene.width)


def draw_cloud(pen: Pen, x: float, y: float, radius: float) -> None:
    white = (244, 247, 250)
    for dx, dy, share in ((-1.0, 0.15, 0.6), (0.0, -0.1, 0.85), (1.0, 0.15, 0.65)):
        pen.oval(
            x + dx * radius, y + dy * radius, share * radius * 1.2, share * radius * 0.7, white
        )


def draw_grass(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    w, h = scene.width, scene.height
    ground = GROUND_COLOURS["grass"]
    hill = rng.uniform(0.1, 0.9) * w
    pen.oval(hill, horizon + 0.08 * h, 0.6 * w, 0.2 * h, mix(ground, (190, 220, 190), 0.5))
    pen.rect(0, horizon, w, h, ground)
    for _ in range(26):
        x, y = rng.uniform(0, w), rng.uniform(horizon + 0.04 * h, h)
        blade = 0.012 * h + 0.02 * (y - horizon)
        pen.poly([(x - 2, y), (x - 1.5, y - 2 * blade), (x, y)], mix(ground, (60, 120, 50), 0.4))
        pen.poly(
            [(x - 0.5, y), (x + 1.5, y - 2 * blade), (x + 1.5, y)], mix(ground, (60, 120, 50), 0.4)
        )
    for _ in range(rng.choice((0, 0, 6))):
        x, y = rng.uniform(0, w), rng.uniform(horizon + 0.1 * h, h)
        pen.dot(x, y, 1.1, (252, 250, 232))


def draw_beach(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    w, h = scene.width, scene.height
    ground = GROUND_COLOURS["beach"]
    shore = horizon + 0.13 * h
    pen.rect(0, horizon, w, h, SEA)
    draw_ripples(pen, scene, horizon, shore, rng, count=6)
    edge = [(w * i / 8, shore + rng.uniform(-0.01, 0.02) * h) for i in range(9)]
    pen.poly([(x, y - 1.6) for x, y in edge] + [(w, h), (0, h)], (246, 250, 250))
    pen.poly([*edge, (w, h), (0, h)], ground)
    for _ in range(30):
        x, y = rng.uniform(0, w), rng.uniform(shore + 3, h)
        pen.dot(x, y, 0.6, mix(ground, (140, 110, 70), 0.4))


def draw_snow(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    w, h = scene.width, scene.height
    ground = GROUND_COLOURS["snow"]
    shade = mix(ground, (150, 178, 210), 0.35)
    pen.oval(rng.uniform(0, 0.4) * w, horizon + 0.1 * h, 0.5 * w, 0.17 * h, shade)
    pen.rect(0, horizon, w, h, ground)
    pen.oval(rng.uniform(0.5, 1) * w, horizon + 0.07 * h, 0.5 * w, 0.07 * h, ground)
    for _ in range(5):
        x, y = rng.uniform(0, w), rng.uniform(horizon + 0.12 * h, h)
        pen.limb([(x, y), (x + 0.08 * w, y - 1), (x + 0.16 * w, y)], 1.0, shade)


def draw_snowfall(pen: Pen, scene: Scene, rng: random.Random) -> None:
    for _ in range(40):
        x, y = rng.uniform(0, scene.width), rng.uniform(0, scene.height)
        pen.dot(x, y, rng.uniform(0.7, 1.3), (255, 255, 255))


def draw_street(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    w, h = scene.width, scene.height
    ground = GROUND_COLOURS["street"]
    x = 0.0
    while x < w:  # a skyline
        wide, tall = rng.uniform(0.1, 0.2) * w, rng.uniform(0.08, 0.24) * h
        wall = mix((206, 204, 214), (190, 200, 214), rng.random())
        pen.rect(x, horizon - tall, x + wide, horizon, wall)
        for wx in range(3, int(wide) - 4, 6):
            for wy in range(4, int(tall) - 3, 7):
                pen.rect(
                    x + wx,
                    horizon - tall + wy,
                    x + wx + 2.5,
                    horizon - tall + wy + 3,
                    mix(wall, GLASS, 0.8),
                )
        x += wide
    pen.rect(0, horizon, w, h, (214, 210, 204))
    curb = horizon + 0.07 * h
    pen.rect(0, curb, w, h, ground)
    pen.rect(0, curb, w, curb + 1.2, (150, 150, 154))
    lane, start = curb + 0.45 * (h - curb), rng.uniform(-0.2, 0) * w
    for i in range(6):
        x = start + 0.24 * w * i
        pen.poly(
            [
                (x, lane),
                (x + 0.12 * w, lane),
                (x + 0.11 * w, lane + 2.6),
                (x - 0.01 * w, lane + 2.6),
            ],
            (236, 236, 232),
        )


def draw_water(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    ground = GROUND_COLOURS["water"]
    bands = 8
    for i in range(bands):
        y = horizon + (scene.height - horizon) * i / bands
        pen.rect(
            0,
            y,
            scene.width,
            scene.height,
            mix(mix(ground, (255, 255, 255), 0.25), ground, i / (bands - 1)),
        )
    draw_ripples(pen, scene, horizon, scene.height, rng, count=16)


def draw_ripples(
    pen: Pen, scene: Scene, top: float, bottom: float, rng: random.Random, count: int
) -> None:
    for _ in range(count):
        x, y = rng.uniform(0, scene.width), rng.uniform(top + 2, bottom - 2)
        d = rng.uniform(0.03, 0.05) * scene.width
        pen.limb(
            [(x - 2 * d, y), (x - d, y - 1.2), (x, y), (x + d, y - 1.2), (x + 2 * d, y)],
            0.9,
            (214, 238, 242),
        )


PLACES: dict[str, Callable[[Pen, Scene, float, random.Random], None]] = {
    "grass": draw_grass,
    "beach": draw_beach,
    "snow": draw_snow,
    "street": draw_street,
    "water": draw_water,
}


# Second things stand on (0, 0) and are up to 100 units high.


def draw_tree(pen: Pen) -> None:
    pen.limb("0,0 0,-50", 10, WOOD)
    for x, y, radius in ((-18, -60, 22), (18, -60, 22), (0, -80, 25)):
        pen.dot(x, y, radius, LEAVES)


def draw_bush(pen: Pen) -> None:
    for x, radius in ((-25, 18), (25, 18), (0, 25)):
        pen.dot(x, -15, radius, LEAVES)


def draw_pine(pen: Pen) -> None:
    pen.limb("0,0 0,-20", 10, WOOD)
    for triangle in ("-30,-15 30,-15 0,-53", "-24,-40 24,-40 0,-78", "-17,-65 17,-65 0,-103"):
        pen.poly(triangle, PINE)


def draw_palm(pen: Pen) -> None:
    pen.limb("0,0 4,-40 14,-75", 8, WOOD)
    for leaf in ("-10,-83 -26,-71", "-4,-106 -16,-96", "32,-106 44,-96", "37,-81 52,-68"):
        pen.limb(f"14,-76 {leaf}", 7, LEAVES)


def draw_house(pen: Pen) -> None:
    pen.rect(-34, -45, 34, 0, PLASTER)
    pen.poly("-44,-43 44,-43 0,-85", SLATE)
    pen.rect(-8, -28, 10, 0, WOOD)
    pen.rect(-28, -34, -14, -20, GLASS)


def draw_cabin(pen: Pen) -> None:
    pen.rect(-36, -40, 36, 0, WOOD)
    for y in (-10, -20, -30):
        pen.rect(-36, y, 36, y + 2, mix(WOOD, INK, 0.25))
    pen.poly("-46,-38 46,-38 0,-75", (244, 248, 252))
    pen.rect(-9, -26, 9, 0, mix(WOOD, INK, 0.4))


def draw_umbrella(pen: Pen) -> None:
    pen.limb("0,0 10,-60", 5, WOOD)
    rim = around(10, -50, 42)[22:48:4]
    for i, (one, two) in enumerate(itertools.pairwise(rim)):
        pen.poly([(10, -60), one, two], ((238, 232, 222), (170, 206, 204))[i % 2])


def draw_rock(pen: Pen) -> None:
    pen.blob("-35,0 -25,-22 0,-35 30,-20 38,0", STONE)
    pen.limb("-10,-22 0,-10", 3, mix(STONE, INK, 0.3))


def draw_mountain(pen: Pen) -> None:
    pen.poly("-75,0 75,0 5,-85", (170, 180, 196))
    pen.poly("-20,-59 5,-85 26,-60 10,-66 0,-56", (246, 249, 252))


def draw_lamp(pen: Pen) -> None:
    pen.limb("0,0 0,-85 14,-92 24,-88", 5, (128, 130, 138))
    pen.oval(24, -85, 9, 5, LAMPLIGHT)


def draw_island(pen: Pen) -> None:
    pen.oval(0, 2, 60, 10, GROUND_COLOURS["beach"])
    draw_palm(pen.at(0, 0, 0.7))


def draw_lighthouse(pen: Pen) -> None:
    pen.oval(0, 0, 35, 8, STONE)
    pen.poly("-12,0 -7,-70 7,-70 12,0", (240, 238, 232))
    pen.rect(-10, -45, 10, -30, SLATE)
    pen.rect(-6, -82, 6, -70, LAMPLIGHT)
    pen.poly("-9,-82 9,-82 0,-93", SLATE)


ITEM_DRAWERS: dict[str, Callable[[Pen], None]] = {
    "tree": draw_tree,
    "bush": draw_bush,
    "house": draw_house,
    "palm tree": draw_palm,
    "umbrella": draw_umbrella,
    "rock": draw_rock,
    "pine tree": draw_pine,
    "mountain": draw_mountain,
    "cabin": draw_cabin,
    "street lamp": draw_lamp,
    "island": draw_island,
    "lighthouse": draw_lighthouse,
}


def draw_item(pen: Pen, scene: Scene, horizon: float, rng: random.Random) -> None:
    """The second thing, in the distance, on the side where the object is not."""
    lean = {"left": 1, "right": -1, "middle": rng.choice((-1, 1))}[scene.side]
    x = scene.width * (0.5 + lean * rng.uniform(0.27, 0.36))
    depth = {"beach": 0.17, "street": 0.06, "grass": 0.05, "snow": 0.05}.get(scene.place, 0.0)
    if scene.item == "mountain":
        depth = 0.0
    tall = rng.uniform(0.3, 0.36) * min(scene.width, scene.height)
    ITEM_DRAWERS[scene.item](pen.at(x, horizon + depth * scene.height, tall / 100))


# --------------------------------------------------------------------------------------------
# A picture
# --------------------------------------------------------------------------------------------

IN_AIR = {"fly": 0.0, "jump": 0.12, "bounce": 0.2}  # height over the ground, as a share
TILT = {"jump": 16.0, "sail": 5.0, "lie": -8.0}  # degrees, nose up, for objects that tilt
TILTING = frozenset({("dog", "jump"), ("boat", "sail"), ("boat", "lie")})
AFLOAT = frozenset({"float", "sail"})


@dataclass
class Drawing:
    """A finished picture and where its object is."""

    jpeg: bytes
    box: list[float]  # x0, y0, x1, y1, as shares of width and height
    grid: list[float]  # the share of each cell that the object covers, row by row
    height: str  # top, middle or bottom


def draw_sprite(scene: Scene, rng: random.Random) -> Image.Image:
    """The main object alone on a transparent ground, at its size in the enlarged picture."""
    margin = 12  # units about the canvas, for what sticks out
    side = (100 + 2 * margin) * SPRITE_SCALE
    kind, ink = KINDS[scene.kind], Ink.of(scene.colour)
    sprite = Image.new("RGBA", (side, side))
    corner = (margin * SPRITE_SCALE, margin * SPRITE_SCALE)
    kind.draw(Pen(sprite, SPRITE_SCALE, corner), ink, scene.action, rng)
    if (scene.kind, scene.action) in TILTING:
        sprite = sprite.rotate(TILT[scene.action], Image.Resampling.BICUBIC)
    sprite = sprite.crop(sprite.getchannel("A").getbbox())
    if scene.action in AFLOAT:  # the lowest part is under water
        sprite = sprite.crop((0, 0, sprite.width, round(sprite.height * 0.92)))
    if scene.faces_left:
        sprite = ImageOps.mirror(sprite)
    wide, high = (share * kind.bulk * rng.uniform(0.94, 1.0) for share in SIZES[scene.size])
    scale = SUPERSAMPLE * min(
        wide * scene.width / sprite.width, high * scene.height / sprite.height
    )
    sprite = sprite.resize(
        (round(sprite.width * scale), round(sprite.height * scale)), Image.Resampling.BOX
    )
    return outline(sprite, ink.outline)


def outline(sprite: Image.Image, colour: RGB) -> Image.Image:
    """`sprite` with a line of `colour` around it, about one pixel of the finished picture."""
    width = SUPERSAMPLE
    sprite = ImageOps.expand(sprite, 2 * width, (*colour, 0))
    solid = sprite.getchannel("A").point(lambda level: 255 if level > 127 else 0)
    edge = Image.new("RGBA", sprite.size, (*colour, 0))
    edge.putalpha(solid.filter(ImageFilter.MaxFilter(2 * width + 1)))
    edge.alpha_composite(sprite)
    return edge.crop(edge.getchannel("A").getbbox())


def place_sprite(
    scene: Scene, wide: float, high: float, horizon: float, rng: random.Random
) -> tuple[float, float, float]:
    """Where an object of this size goes: its left, its top and the ground below it."""
    w, h = scene.width, scene.height
    left = w * rng.uniform(*SIDES[scene.side]) - wide / 2
    left = min(max(left, 0.015 * w), 0.985 * w - wide)
    if scene.action == "fly":
        top = rng.uniform(0.03, max(0.06, 0.7 - high / h)) * h
        return left, top, h * rng.uniform(0.88, 0.95)
    nearest = (0.96 if scene.size == "big" else 0.9) * h
    farthest = min(max(horizon + 0.2 * h, high + 0.03 * h), nearest)
    ground = rng.uniform(farthest, nearest)
    lift = min(IN_AIR.get(scene.action, 0.0) * h, ground - high - 0.02 * h)
    return left, ground - high - max(lift, 0.0), ground


def draw_traces(
    pen: Pen, scene: Scene, box: tuple[float, float, float, float], ground: float
) -> None:
    """What an object leaves around it: its shadow, lines of speed, a wake, a string."""
    x0, y0, x1, y1 = box
    wide, high, middle = x1 - x0, y1 - y0, (x0 + x1) / 2
    back, away = (x1, 1) if scene.faces_left else (x0, -1)
    dusk = mix(GROUND_COLOURS[scene.place], (60, 60, 80), 0.32)
    foam = (244, 250, 252)
    if scene.action in AFLOAT:
        pen.oval(middle, y1, 0.56 * wide, 0.05 * high + 1.5, foam)
        pen.oval(middle, y1 + 0.8, 0.5 * wide, 0.04 * high + 1, dusk)
        if scene.action == "sail":
            for dy in (0, 4):
                pen.limb(
                    [(back, y1 + dy), (back + away * (0.3 * wide - dy), y1 + dy + 1)], 1.4, foam
                )
    elif scene.action != "fly":
        share = 0.35 if scene.action in IN_AIR else 0.48
        pen.oval(middle, ground - 0.8, share * wide, 0.02 * scene.height + 1, dusk)
    if scene.kind == "kite":
        tail = x0 + (0.88 if scene.faces_left else 0.12) * wide
        hand = scene.width * (0.5 if scene.side != "middle" else 0.5 + 0.25 * away)
        line = [
            (tail, y1 - 1),
            ((tail + hand) / 2 + 3, (y1 + scene.height) / 2),
            (hand, scene.height),
        ]
        pen.limb(line, 0.7, (110, 110, 118))
    if scene.action in ("run", "drive", "roll"):
        for share, length in ((0.35, 0.2), (0.55, 0.28), (0.75, 0.18)):
            y, start = y0 + share * high, back + away * 2
            pen.limb([(start, y), (start + away * length * wide, y)], 1.2, (250, 250, 250))
    if scene.action == "bounce":
        for dy in (2.5, 6):
            pen.limb(
                [
                    (middle - 0.2 * wide, y1 + dy),
                    (middle, y1 + dy + 1.5),
                    (middle + 0.2 * wide, y1 + dy),
                ],
                1.1,
                dusk,
            )
    if scene.action == "sleep":
        head = x0 + (0.28 if scene.faces_left else 0.72) * wide
        for i, side in enumerate((3.0, 4.5)):
            letter = pen.at(head + away * 5 * i, y0 - 3 - 7 * i, side)
            letter.limb("-.5,-1 .5,-1 -.5,0 .5,0", 0.3, (90, 96, 120))
    if scene.action == "lean":
        draw_fence(pen, x0 - 0.12 * wide, x1 + 0.12 * wide, ground - 2, 0.75 * high)


def draw_fence(pen: Pen, x0: float, x1: float, y: float, tall: float) -> None:
    plank, line = mix(WOOD, (255, 255, 255), 0.35), mix(WOOD, INK, 0.1)
    count = 6
    step = (x1 - x0) / count
    for share in (0.35, 0.7):
        pen.rect(x0, y - share * tall, x1, y - (share - 0.1) * tall, line)
    for i in range(count):
        left = x0 + (i + 0.15) * step
        right = left + 0.7 * step
        top = y - tall
        pen.poly(
            [(left, y), (left, top), ((left + right) / 2, top - 3), (right, top), (right, y)], plank
        )


def draw_scene(scene: Scene) -> Drawing:
    """Draw `scene` from its own random stream."""
    rng = random.Random(f"{SEED} {scene.name}")
    sprite = draw_sprite(scene, rng)
    wide, high = (side / SUPERSAMPLE for side in sprite.size)
    horizon = scene.height * rng.uniform(0.4, 0.5)
    left, top, ground = place_sprite(scene, wide, high, horizon, rng)

    size = (scene.width * SUPERSAMPLE, scene.height * SUPERSAMPLE)
    picture = Image.new("RGB", size)
    pen = Pen(picture, SUPERSAMPLE)
    draw_sky(pen, scene, horizon, rng)
    if scene.item == "mountain":
        draw_item(pen, scene, horizon, rng)
    PLACES[scene.place](pen, scene, horizon, rng)
    if scene.item not in (None, "mountain"):
        draw_item(pen, scene, horizon, rng)
    if scene.sky == "snowfall":
        draw_snowfall(pen, scene, rng)
    draw_traces(pen, scene, (left, top, left + wide, top + high), ground)

    corner = (round(left * SUPERSAMPLE), round(top * SUPERSAMPLE))
    picture.paste(sprite, corner, sprite)
    mask = Image.new("L", size)
    mask.paste(sprite.getchannel("A").point(lambda level: 255 if level > 127 else 0), corner)

    file = io.BytesIO()
    picture.reduce(SUPERSAMPLE).save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Drawing(file.getvalue(), *measure(mask))


def measure(mask: Image.Image) -> tuple[list[float], list[float], str]:
    """The box of a mask, its share of each cell of the grid, and its height in the picture."""
    x0, y0, x1, y1 = mask.getbbox()
    box = [x0 / mask.width, y0 / mask.height, x1 / mask.width, y1 / mask.height]
    cells = mask.convert("F").resize((GRID, GRID), Image.Resampling.BOX)
    shares = [cells.getpixel((i % GRID, i // GRID)) / 255 for i in range(GRID * GRID)]
    height = ("top", "middle", "bottom")[int(3 * (box[1] + box[3]) / 2)]
    return box, shares, height


# --------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------

VERBS: dict[str, tuple[tuple[str, str], ...]] = {  # "runs", "is running"
    "stand": (("stands", "standing"), ("stands still", "standing still"), ("waits", "waiting")),
    "wave": (
        ("waves", "waving"),
        ("waves one hand", "waving one hand"),
        ("says hello", "saying hello"),
    ),
    "run": (("runs", "running"), ("runs fast", "running fast"), ("races", "racing")),
    "jump": (("jumps", "jumping"), ("leaps", "leaping"), ("jumps up high", "jumping up high")),
    "sit": (("sits", "sitting"), ("sits down", "sitting down"), ("rests", "resting")),
    "dance": (
        ("dances", "dancing"),
        ("dances happily", "dancing happily"),
        ("swings her arms", "swinging her arms"),
    ),
    "walk": (("walks", "walking"), ("walks slowly", "walking slowly"), ("strolls", "strolling")),
    "sleep": (("sleeps", "sleeping"), ("takes a nap", "taking a nap"), ("is asleep", "asleep")),
    "graze": (("grazes", "grazing"), ("eats", "eating"), ("lowers its head", "lowering its head")),
    "fly": (("flies", "flying"), ("soars", "soaring"), ("glides", "gliding")),
    "lie": (("lies", "lying"), ("rests", "resting"), ("lies still", "lying still")),
    "roll": (
        ("rolls", "rolling"),
        ("rolls fast", "rolling fast"),
        ("rolls along", "rolling along"),
    ),
    "bounce": (
        ("bounces", "bouncing"),
        ("bounces up", "bouncing up"),
        ("bounces high", "bouncing high"),
    ),
    "float": (
        ("floats", "floating"),
        ("drifts", "drifting"),
        ("floats quietly", "floating quietly"),
    ),
    "sail": (("sails", "sailing"), ("sails along", "sailing along"), ("moves", "moving")),
    "drive": (("drives", "driving"), ("speeds", "speeding"), ("drives fast", "driving fast")),
    "park": (("is parked", "parked"), ("stands", "standing"), ("waits", "waiting")),
    "lean": (
        ("leans against a fence", "leaning against a fence"),
        ("is parked by a fence", "parked by a fence"),
    ),
}
BRIGHT = frozenset({"red", "blue", "green", "yellow", "pink"})
MOVING = frozenset({"run", "walk", "roll", "drive", "sail"})

# Where something is, where it goes along, what it is above.
WHERE: dict[str, dict[str, tuple[str, ...]]] = {
    "grass": {
        "on": ("on the grass", "in the grass", "in a field", "on the lawn", "in a grassy field"),
        "along": ("through the grass", "across the grass", "through a field", "across the lawn"),
        "over": ("over the grass", "above a field", "over a grassy field"),
    },
    "beach": {
        "on": ("on the beach", "on the sand", "at the beach", "by the sea", "on a sandy beach"),
        "along": ("along the beach", "across the sand", "on the beach", "by the ocean"),
        "over": ("over the beach", "above the sand", "over a sandy beach", "by the sea"),
    },
    "snow": {
        "on": ("in the snow", "on the snow", "on the snowy ground", "in a snowy field"),
        "along": ("through the snow", "across the snow", "through a snowy field", "in the snow"),
        "over": ("over the snow", "above the snowy ground", "over a snowy field"),
    },
    "street": {
        "on": ("on the street", "in the street", "on the road", "on a city street"),
        "along": ("down the street", "along the road", "down a city street", "on the road"),
        "over": ("over the street", "above the road", "over a city street"),
    },
    "water": {
        "on": ("on the water", "in the water", "on the lake", "on a calm lake"),
        "along": ("across the water", "over the lake", "on the water", "across a calm lake"),
        "over": ("over the water", "above the lake", "over a calm lake"),
    },
}
SETTINGS = {
    "grass": ("field", "meadow", "lawn", "grassy field"),
    "beach": ("beach", "sandy beach", "shore"),
    "snow": ("snowy field", "winter scene", "snowy place"),
    "street": ("street", "road", "city street"),
    "water": ("lake", "wide lake"),
}
SIDE_WORDS = {
    "left": (
        "on the left",
        "on the left",
        "on the left side",
        "to the left",
        "on the left of the picture",
    ),
    "middle": ("in the middle", "in the middle", "in the middle of the picture", "in the center"),
    "right": (
        "on the right",
        "on the right",
        "on the right side",
        "to the right",
        "on the right of the picture",
    ),
}
WEATHER = {
    "clear": ("under a clear sky", "on a clear day", "in the daytime"),
    "sunny": ("on a sunny day", "in the sunshine", "under the sun", "on a bright day"),
    "cloudy": ("on a cloudy day", "under the clouds", "under a cloudy sky"),
    "evening": ("in the evening", "at sunset", "as the sun goes down"),
    "snowfall": ("while it snows", "as snow falls", "on a snowy day"),
}
SKY_ADJECTIVES = {
    "clear": ("quiet", "open"),
    "sunny": ("sunny", "bright"),
    "cloudy": ("cloudy", "quiet"),
    "evening": ("quiet", "peaceful"),
    "snowfall": ("cold", "quiet"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
DISTANCES = {"small": ("in the distance", "far away"), "big": ("close to the camera", "up close")}
ADJECTIVES = {  # true of every drawing of the kind
    "man": ("happy", "smiling"),
    "woman": ("happy", "smiling", "long-haired"),
    "dog": ("friendly", "cute"),
    "cat": ("cute", "pretty"),
    "horse": ("beautiful", "strong"),
    "bird": ("pretty", "cute"),
    "ball": ("round", "shiny"),
    "kite": ("pretty", "toy"),
    "boat": ("wooden", "pretty"),
    "car": ("shiny", "fast"),
    "bicycle": ("shiny", "nice"),
}
CLOTHES = {"man": ("shirt", "shirt", "sweater", "jacket"), "woman": ("dress", "dress", "outfit")}


def article(words: str) -> str:
    """`words` with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class Captioner:
    """Writes true captions of one scene."""

    def __init__(self, scene: Scene, height: str, rng: random.Random) -> None:
        self.scene = scene
        self.height = height
        self.rng = rng

    # Parts of a sentence.

    def noun(self) -> str:
        first, *others = KINDS[self.scene.kind].words
        if self.rng.random() < 0.7 or not others:
            return first
        return self.rng.choice(others)

    def bare(self) -> str:
        """The object without its colour: "a big dog", "a smiling man"."""
        if self.scene.kind in PEOPLE:
            return article(f"{self.rng.choice(ADJECTIVES[self.scene.kind])} {self.noun()}")
        return article(f"{self.rng.choice(SIZE_WORDS[self.scene.size])} {self.noun()}")

    def thing(self) -> str:
        """The object in its colour: "a small red dog", "a man in a red shirt"."""
        scene, rng = self.scene, self.rng
        chance = rng.random()
        words = [self.noun()]
        if scene.kind in PEOPLE:
            if chance < 0.2:
                words.insert(0, rng.choice(ADJECTIVES[scene.kind]))
            return f"{article(' '.join(words))} {self.clothes()}"
        words.insert(0, scene.colour)
        if chance < 0.35:
            words.insert(0, rng.choice(SIZE_WORDS[scene.size]))
        elif chance < 0.5:
            words.insert(0, rng.choice(ADJECTIVES[scene.kind]))
        return article(" ".join(words))

    def clothes(self) -> str:
        piece, colour = self.rng.choice(CLOTHES[self.scene.kind]), self.scene.colour
        ways = (
            f"in a {colour} {piece}",
            f"in {colour}",
            f"wearing a {colour} {piece}",
            f"dressed in {colour}",
        )
        return self.rng.choice(ways[:1] + ways)

    def participle(self) -> str:
        """As in "running"."""
        return self.rng.choice(VERBS[self.scene.action])[1]

    def finite_verb(self) -> str:
        """As in "runs" or "is running"."""
        simple, participle = self.rng.choice(VERBS[self.scene.action])
        return self.rng.choice((simple, f"is {participle}"))

    def verb_in_any_form(self) -> str:
        """As in "a dog runs", "a dog is running" or "a dog running"."""
        return self.rng.choice((self.finite_verb(), self.finite_verb(), self.participle()))

    def where(self) -> str:
        action = self.scene.action
        way = "over" if action == "fly" else "along" if action in MOVING else "on"
        return self.rng.choice(WHERE[self.scene.place][way])

    def side(self) -> str:
        return self.rng.choice(SIDE_WORDS[self.scene.side])

    def extra(self) -> str:
        """Something about the weather, the second thing or the distance; sometimes nothing."""
        scene, rng = self.scene, self.rng
        choices = [rng.choice(WEATHER[scene.sky]), rng.choice(DISTANCES[scene.size]), ""]
        if scene.item:
            choices.append(f"with {article(scene.item)} in the background")
            choices.append(f"with {article(scene.item)} far behind")
        if scene.action == "fly" and self.height == "top":
            choices.append("high in the sky")
        if scene.kind == "kite":
            choices.append("on a long string")
        return rng.choice(choices)

    # Whole sentences. Each names the object; `colourless` is the only one without its colour.

    def plain(self) -> str:
        return f"{self.thing()} {self.verb_in_any_form()} {self.where()} {self.extra()}"

    def there_is(self) -> str:
        return f"there is {self.thing()} {self.participle()} {self.where()}"

    def weather_first(self) -> str:
        weather = self.rng.choice(WEATHER[self.scene.sky])
        return f"{weather} , {self.thing()} {self.finite_verb()} {self.where()}"

    def colour_last(self) -> str:
        scene, rng = self.scene, self.rng
        start = f"the {self.noun()} {self.participle()} {self.where()} is"
        if scene.kind in PEOPLE:
            piece = rng.choice(CLOTHES[scene.kind])
            worn = rng.choice((scene.colour, f"a {scene.colour} {piece}"))
            return f"{start} wearing {worn}"
        degrees = ("", "all", "bright") if scene.colour in BRIGHT else ("", "all")
        return f"{start} {rng.choice(degrees)} {scene.colour}"

    def side_last(self) -> str:
        return f"{self.thing()} {self.verb_in_any_form()} {self.where()} {self.side()}"

    def side_first(self) -> str:
        return f"{self.side()} , {self.thing()} {self.finite_verb()} {self.where()}"

    def side_within(self) -> str:
        return f"{self.thing()} {self.side()} {self.finite_verb()} {self.where()}"

    def side_there_is(self) -> str:
        return f"{self.side()} there is {self.thing()} {self.participle()} {self.where()}"

    def side_in_setting(self) -> str:
        setting = self.rng.choice(SETTINGS[self.scene.place])
        if self.rng.random() < 0.6:
            setting = f"{self.rng.choice(SKY_ADJECTIVES[self.scene.sky])} {setting}"
        return f"{article(setting)} with {self.thing()} {self.participle()} {self.side()}"

    def colourless(self) -> str:
        end = self.rng.choice((self.extra(), self.side()))
        return f"{self.bare()} {self.verb_in_any_form()} {self.where()} {end}"

    def write(self) -> list[str]:
        """Five different captions: two or three name the side, four or five the colour."""
        sided = [
            self.side_last,
            self.side_first,
            self.side_within,
            self.side_there_is,
            self.side_in_setting,
        ]
        others = [self.plain, self.plain, self.there_is, self.weather_first, self.colour_last]
        count = self.rng.choice((2, 3))
        makers = self.rng.sample(sided, count) + self.rng.sample(others, 4 - count)
        makers.append(self.rng.choice((self.colourless, self.colourless, self.plain)))
        self.rng.shuffle(makers)
        captions: list[str] = []
        while len(captions) < CAPTIONS_PER_PICTURE:
            sentence = " ".join(makers[len(captions)]().split())
            sentence = f"{sentence[0].upper()}{sentence[1:]} ."
            if len(sentence.split()) - 1 in CAPTION_WORDS and sentence not in captions:
                captions.append(sentence)
        return captions


# --------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------


def plan_split(split: str, count: int, rng: random.Random) -> Iterator[Scene]:
    """Scenes in which all objects and all colours are equally frequent."""
    train = split == "train"
    pairs = [
        (kind, colour)
        for kind in KINDS
        for colour in COLOURS
        if not (train and (kind, colour) in HELD_OUT_COLOURS)
    ]
    deck: list[tuple[str, str]] = []
    for _ in range(count):
        if not deck:
            deck = rng.sample(pairs, len(pairs))
        kind, colour = deck.pop()
        actions = KINDS[kind].actions
        place = rng.choice(
            [place for place in actions if not (train and (kind, place) in HELD_OUT_PLACES)]
        )
        width, height = rng.choice(SHAPES)
        yield Scene(
            name=f"{rng.randrange(10**8, 4 * 10**9)}_{rng.getrandbits(40):010x}.jpg",
            width=width,
            height=height,
            kind=kind,
            colour=colour,
            size=rng.choice(tuple(SIZES)),
            action=rng.choice(actions[place]),
            place=place,
            side=rng.choice(tuple(SIDES)),
            sky=rng.choice((*SKIES, "snowfall", "snowfall") if place == "snow" else SKIES),
            item=rng.choice((None, *ITEMS[place])),
            faces_left=rng.random() < 0.5,
        )


def describe(scene: Scene, drawing: Drawing) -> dict[str, object]:
    """A scene's entry in scenes.json; README.md says what the keys mean."""
    return {
        "o": scene.kind,
        "c": scene.colour,
        "s": scene.size,
        "a": scene.action,
        "p": scene.place,
        "h": scene.side,
        "v": drawing.height,
        "k": scene.sky,
        "i": scene.item,
        "f": "left" if scene.faces_left else "right",
        "n": scene.novel,
        "b": [round(share, 3) for share in drawing.box],
        "g": [round(share, 2) or 0 for share in drawing.grid],
    }


def make_files() -> Iterator[tuple[str, bytes]]:
    """The files of the data set, name and bytes: the two archives and the truth."""
    truth, tokens, pictures = {}, [], {}
    texts: dict[str, bytes] = {}
    for split, count in SPLITS.items():
        names = []
        for scene in plan_split(split, count, random.Random(f"{SEED} {split}")):
            drawing = draw_scene(scene)
            pictures[f"Flicker8k_Dataset/{scene.name}"] = drawing.jpeg
            captions = Captioner(scene, drawing.height, random.Random(f"{SEED} say {scene.name}"))
            tokens += [f"{scene.name}#{k}\t{text}" for k, text in enumerate(captions.write())]
            truth[scene.name] = describe(scene, drawing)
            names.append(scene.name)
        texts[f"Flickr_8k.{split}Images.txt"] = as_text(names)
    texts["Flickr8k.token.txt"] = as_text(sorted(tokens))
    yield "Flickr8k_Dataset.zip", as_zip(pictures)
    yield "Flickr8k_text.zip", as_zip(texts)
    yield "scenes.json", as_text(truth_lines(truth))


def as_zip(files: dict[str, bytes]) -> bytes:
    """An archive of `files` that depends on nothing else: not on the time, the system or zlib."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # of 1 January 1980
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, rw-r--r--
            archive.writestr(entry, data)
    return buffer.getvalue()


def truth_lines(truth: dict[str, dict[str, object]]) -> list[str]:
    """scenes.json, one scene a line."""
    head = {
        "pillow": PILLOW_VERSION,
        "objects": {name: kind.words for name, kind in KINDS.items()},
        "colours": {name: [name] for name in COLOURS},
        "held_out": {
            "object_colour": sorted(HELD_OUT_COLOURS),
            "object_place": sorted(HELD_OUT_PLACES),
        },
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    scenes = [
        f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}"
        for name, entry in truth.items()
    ]
    return ["{", *lines, '"scenes": {', ",\n".join(scenes), "}", "}"]


def as_text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--check", action="store_true", help="draw in memory and compare")
    args, wrong = parser.parse_args(), []
    for name, data in make_files():
        file = args.out / name
        if not args.check:
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            print(f"{file}: {len(data):,} bytes")
        elif not file.is_file() or file.read_bytes() != data:
            wrong.append(name)
    if args.check:
        print(f"differs from what Pillow {PILLOW_VERSION} draws: {', '.join(wrong) or 'nothing'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
