"""Renders the images and captions on which the tiny models are trained.

The images show 58 concepts (digits, letters, shapes, garments) as light strokes on dark
backgrounds, 32x32 pixels. The fonts come with matplotlib.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

# N images, S side in pixels.

SIDE = 32
CANVAS = 2 * SIDE  # images are drawn at twice the size and averaged
ROOM = 2 * CANVAS  # side of the larger canvas for ink before its transformation
CHUNK = 2000  # images per random stream
HELD_OUT = 60  # one of 60 images is held out
SEED = 2024

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = (
    "circle", "ring", "square", "triangle", "diamond", "pentagon", "hexagon", "star", "heart",
    "cross", "arrow", "crescent",
)  # fmt: skip
GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
CONCEPTS: tuple[str, ...] = (
    *(f"digit {d}" for d in DIGITS),
    *(f"letter {a}" for a in string.ascii_lowercase),
    *SHAPES,
    *GARMENTS,
)
NUM_GLYPHS = len(DIGITS) + 26

FOREGROUNDS = {
    "white": (255, 255, 255), "gray": (165, 165, 165), "red": (235, 60, 55),
    "green": (70, 205, 80), "blue": (85, 125, 255), "yellow": (250, 230, 70),
    "orange": (250, 155, 45), "pink": (250, 140, 195), "cyan": (70, 220, 230),
}  # fmt: skip
GROUNDS = {
    "black": (0, 0, 0), "dark gray": (60, 60, 60), "dark red": (80, 10, 10),
    "dark green": (10, 60, 15), "dark blue": (10, 15, 85), "dark purple": (55, 10, 75),
}  # fmt: skip
SIZES = ("", "small", "large")
STYLES = ("", "bold", "slanted", "outlined")
FRAMES = (
    "a photo of a {}", "a picture of a {}", "an image of a {}", "a drawing of a {}", "{}",
    "a photo of the {}", "this is a {}", "a {}",
)  # fmt: skip

FACES = (
    *(f"DejaVuSans{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{s}" for s in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{s}" for s in ("", "Bol", "Italic", "BolIta")),
    "cmss10",
)


@dataclass(frozen=True)
class Source:
    """Rendered images and their attributes."""

    images: NDArray[np.uint8]  # (N, S, S, 3)
    attributes: NDArray[np.int64]  # (N, 5): concept, foreground, ground, size, style

    def __len__(self) -> int:
        return len(self.images)

    @property
    def concepts(self) -> NDArray[np.int64]:
        return self.attributes[:, 0]

    def split(self) -> tuple[Source, Source]:
        """Split off the last images, one in HELD_OUT: the training images and the held-out ones."""
        n = len(self) - max(1, len(self) // HELD_OUT)
        return (
            Source(self.images[:n], self.attributes[:n]),
            Source(self.images[n:], self.attributes[n:]),
        )


def source(work: Path, n: int) -> Source:
    """The first n source images, stored in `work` for later scripts."""
    images, attributes = work / f"images-{n}.npy", work / f"attributes-{n}.npy"
    if not (images.exists() and attributes.exists()):
        work.mkdir(parents=True, exist_ok=True)
        drawn = render(n)
        np.save(images, drawn.images)
        np.save(attributes, drawn.attributes)
    return Source(np.load(images), np.load(attributes))


def render(n: int) -> Source:
    """Render the first n images. Each chunk has a separate random stream."""
    sizes = [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
    with Pool(2) as pool:
        parts = pool.starmap(chunk, enumerate(sizes), chunksize=1)
    return Source(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.attributes for part in parts]),
    )


def chunk(index: int, size: int = CHUNK) -> Source:
    """Images of one random stream; a smaller chunk is a prefix of a larger one."""
    rng = np.random.default_rng([SEED, index])
    images = np.empty((size, SIDE, SIDE, 3), dtype=np.uint8)
    attributes = np.empty((size, 5), dtype=np.int64)
    for i in range(size):
        images[i], attributes[i] = _picture(rng)
    return Source(images, attributes)


def caption(attributes: Sequence[int], rng: Generator) -> str:
    """A random caption of an image."""
    concept, foreground, ground, size, style = (int(a) for a in attributes)
    words = CONCEPTS[concept]
    if rng.random() >= 0.4:
        adjectives = [
            SIZES[size] if rng.random() < 0.5 else "",
            STYLES[style] if rng.random() < 0.5 else "",
            tuple(FOREGROUNDS)[foreground] if rng.random() < 0.7 else "",
        ]
        words = " ".join([*(a for a in adjectives if a), words])
        if rng.random() < 0.4:
            words += f" on a {tuple(GROUNDS)[ground]} background"
    return framed(words, rng)


def framed(words: str, rng: Generator) -> str:
    """Put words into a random sentence frame."""
    return FRAMES[rng.integers(len(FRAMES))].format(words)


# ---------------------------------------------------------------- one image


def _picture(rng: Generator) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    concept = int(rng.integers(len(CONCEPTS)))
    ink, styles = _glyph(concept, rng) if concept < NUM_GLYPHS else _figure(concept, rng)
    mask, size, slanted = _placed(ink, rng)
    if slanted:
        styles = (*styles, STYLES.index("slanted"))
    style = int(rng.choice(styles)) if styles else 0
    small = mask.reduce(CANVAS // SIDE)
    if rng.random() < 0.4:
        small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    foreground, ground = _colour(FOREGROUNDS, rng), _colour(GROUNDS, rng)
    pixels = _painted(
        np.asarray(small, dtype=np.float64) / 255,
        tuple(FOREGROUNDS.values())[foreground],
        tuple(GROUNDS.values())[ground],
        rng,
    )
    return pixels, (concept, foreground, ground, size, style)


def _colour(table: dict[str, tuple[int, int, int]], rng: Generator) -> int:
    index = int(rng.integers(len(table)))
    return 0 if rng.random() < 0.35 else index  # the first colour is white or black


def _painted(
    mask: NDArray[np.float64],
    foreground: tuple[int, int, int],
    ground: tuple[int, int, int],
    rng: Generator,
) -> NDArray[np.uint8]:
    light = np.asarray(foreground) + rng.normal(0, 10, 3)
    dark = np.asarray(ground) + rng.normal(0, 6, 3)
    opacity = rng.uniform(0.75, 1.0)
    pixels = dark + (mask * opacity)[:, :, None] * (light - dark)
    pixels = pixels + rng.normal(0, rng.uniform(0, 8), mask.shape)[:, :, None]
    return pixels.clip(0, 255).round().astype(np.uint8)


def _placed(ink: Image.Image, rng: Generator) -> tuple[Image.Image, int, bool]:
    """Stretch, rotate, shear and move ink into the canvas.

    The range of sizes is the most important parameter: handwritten digits fill their frame, and a
    CLIP that was trained on small glyphs does not recognise large ones.

    Returns:
        The mask, the index of its size in SIZES, and whether it is slanted.
    """
    left, top, right, bottom = ink.getbbox() or (0, 0, ROOM, ROOM)
    width, height = right - left, bottom - top
    u = rng.uniform(0.5, 1.0)
    largest = CANVAS - 2
    y_scale = u * largest / max(width, height)
    x_scale = min(y_scale * rng.uniform(0.75, 1.25), largest / width)
    angle, shear = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(-0.2, 0.2)
    slack = 0.8 * (1 - u) * SIDE
    dx, dy = rng.uniform(-1, 1, 2) * slack + rng.uniform(-2, 2, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([x_scale, y_scale])
    back = np.linalg.inv(forward)  # PIL needs the map from output to input pixels
    center_in = np.array([(left + right) / 2, (top + bottom) / 2])
    center_out = np.array([CANVAS / 2 + dx, CANVAS / 2 + dy])
    offset = center_in - back @ center_out
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    mask = ink.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    size = SIZES.index("small") if u < 0.63 else SIZES.index("large") if u > 0.87 else 0
    return mask, size, abs(shear) > 0.12


# ---------------------------------------------------------------- glyphs


def _glyph(concept: int, rng: Generator) -> tuple[Image.Image, tuple[int, ...]]:
    face = FACES[rng.integers(len(FACES))]
    upper = rng.random() < 0.7
    if concept < len(DIGITS):
        character = str(concept)
    else:
        letter = string.ascii_lowercase[concept - len(DIGITS)]
        character = letter.upper() if upper else letter
    ink = _ink(face, character)
    thick = rng.random()
    if thick < 0.3:
        ink = ink.filter(ImageFilter.MaxFilter(3 if thick < 0.2 else 5))
    styles = []
    if "Bol" in face or thick < 0.3:
        styles.append(STYLES.index("bold"))
    if "Obl" in face or "Ita" in face:
        styles.append(STYLES.index("slanted"))
    return ink, tuple(styles)


@cache
def _ink(face: str, character: str) -> Image.Image:
    ink = Image.new("L", (ROOM, ROOM))
    ImageDraw.Draw(ink).text(
        (ROOM / 2, ROOM / 2), character, fill=255, font=_font(face), anchor="mm"
    )
    return ink


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    import matplotlib  # a development dependency, for its fonts only

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{face}.ttf"), size=52)


# ---------------------------------------------------------------- shapes and garments

Points = list[tuple[float, float]]


def _figure(concept: int, rng: Generator) -> tuple[Image.Image, tuple[int, ...]]:
    name = CONCEPTS[concept]
    ink = Image.new("L", (ROOM, ROOM))
    draw = ImageDraw.Draw(ink)
    outlined = False
    if name in _ROUND:
        _ROUND[name](draw, rng)
    elif name in _POLYGONS:
        points = [(ROOM / 2 + x, ROOM / 2 + y) for x, y in _POLYGONS[name]]
        outlined = bool(rng.random() < 0.5)
        if outlined:
            draw.line([*points, points[0], points[1]], 255, int(rng.integers(4, 9)), "curve")
        else:
            draw.polygon(points, fill=255)
    else:
        ink = _garment(name, rng)
    return ink, (STYLES.index("outlined"),) if outlined else ()


def _regular(corners: int, inner: float = 1.0, turn: float = -90.0) -> Points:
    """Corners of a regular polygon with radius 26; with `inner` < 1, of a star."""
    n = corners if inner == 1.0 else 2 * corners
    angles = np.deg2rad(turn + 360 * np.arange(n) / n)
    radii = [26 * (inner if i % 2 else 1.0) for i in range(n)]
    return [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(1.6 * a, -1.6 * b) for a, b in zip(x, y, strict=True)]


_POLYGONS: dict[str, Points] = {
    "square": _regular(4, turn=45),
    "triangle": _regular(3),
    "diamond": [(0, -28), (17, 0), (0, 28), (-17, 0)],
    "pentagon": _regular(5),
    "hexagon": _regular(6, turn=0),
    "star": _regular(5, inner=0.42),
    "heart": _heart(),
    "cross": [
        (-8, -26), (8, -26), (8, -8), (26, -8), (26, 8), (8, 8), (8, 26), (-8, 26), (-8, 8),
        (-26, 8), (-26, -8), (-8, -8),
    ],
    "arrow": [(-27, -7), (4, -7), (4, -19), (27, 0), (4, 19), (4, 7), (-27, 7)],
}  # fmt: skip


def _disc(draw: ImageDraw.ImageDraw, radius: float, fill: int, x: float = 0.0) -> None:
    middle = ROOM / 2
    box = (middle + x - radius, middle - radius, middle + x + radius, middle + radius)
    draw.ellipse(box, fill=fill)


def _circle(draw: ImageDraw.ImageDraw, rng: Generator) -> None:
    _disc(draw, 26, 255)


def _ring(draw: ImageDraw.ImageDraw, rng: Generator) -> None:
    _disc(draw, 26, 255)
    _disc(draw, 26 - rng.uniform(4, 11), 0)


def _crescent(draw: ImageDraw.ImageDraw, rng: Generator) -> None:
    _disc(draw, 26, 255)
    _disc(draw, rng.uniform(20, 23), 0, x=rng.uniform(9, 13))


_ROUND: dict[str, Callable[[ImageDraw.ImageDraw, Generator], None]] = {
    "circle": _circle,
    "ring": _ring,
    "crescent": _crescent,
}

# Silhouettes on a 64-pixel grid: (polygons to fill, polygons to cut out).
_GARMENTS: dict[str, tuple[list[Points], list[Points]]] = {
    "t-shirt": (
        [
            [
                (22, 8), (42, 8), (60, 18), (54, 30), (46, 26), (46, 58), (18, 58), (18, 26),
                (10, 30), (4, 18),
            ],
        ],
        [
            [(26, 6), (38, 6), (32, 14)],
        ],
    ),
    "trouser": (
        [
            [(18, 4), (46, 4), (50, 60), (37, 60), (32, 22), (27, 60), (14, 60)],
        ],
        [],
    ),
    "pullover": (
        [
            [
                (22, 8), (42, 8), (54, 14), (62, 52), (52, 54), (46, 28), (46, 56), (18, 56),
                (18, 28), (12, 54), (2, 52), (10, 14),
            ],
        ],
        [],
    ),
    "dress": (
        [
            [(24, 4), (40, 4), (42, 14), (39, 26), (50, 60), (14, 60), (25, 26), (22, 14)],
        ],
        [
            [(28, 3), (36, 3), (32, 12)],
        ],
    ),
    "coat": (
        [
            [
                (20, 5), (44, 5), (54, 12), (60, 48), (51, 50), (47, 26), (49, 61), (15, 61),
                (17, 26), (13, 50), (4, 48), (10, 12),
            ],
        ],
        [
            [(31, 12), (33, 12), (33, 61), (31, 61)],
        ],
    ),
    "sandal": (
        [
            [(3, 46), (61, 44), (61, 52), (3, 54)],
            [(10, 46), (28, 20), (34, 22), (18, 46)],
            [(34, 46), (46, 26), (52, 29), (42, 46)],
            [(50, 46), (58, 18), (63, 20), (58, 46)],
        ],
        [],
    ),
    "shirt": (
        [
            [
                (22, 6), (42, 6), (58, 20), (52, 40), (45, 38), (46, 60), (18, 60), (19, 38),
                (12, 40), (6, 20),
            ],
        ],
        [
            [(25, 4), (39, 4), (33, 16), (31, 16)],
            [(31, 16), (33, 16), (33, 60), (31, 60)],
        ],
    ),
    "sneaker": (
        [
            [(4, 28), (22, 22), (34, 34), (56, 40), (62, 50), (4, 50)],
            [(2, 50), (63, 50), (62, 56), (3, 56)],
        ],
        [
            [(4, 48), (60, 48), (60, 50), (4, 50)],
        ],
    ),
    "bag": (
        [
            [(8, 26), (56, 26), (60, 58), (4, 58)],
            [(18, 28), (22, 8), (42, 8), (46, 28)],
        ],
        [
            [(24, 26), (27, 13), (37, 13), (40, 26)],
        ],
    ),
    "ankle boot": (
        [
            [
                (12, 6), (36, 6), (36, 32), (56, 40), (60, 52), (60, 58), (36, 58), (34, 54),
                (24, 54), (22, 60), (10, 60),
            ],
        ],
        [],
    ),
}  # fmt: skip


def _garment(name: str, rng: Generator) -> Image.Image:
    fill, cut = _GARMENTS[name]
    margin = (ROOM - CANVAS) / 2

    def drawn(polygons: list[Points]) -> Image.Image:
        layer = Image.new("L", (ROOM, ROOM))
        draw = ImageDraw.Draw(layer)
        for polygon in polygons:
            jitter = rng.uniform(-2, 2, (len(polygon), 2))
            corners = np.asarray(polygon) + margin + jitter
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=255)
        return layer

    return ImageChops.subtract(drawn(fill), drawn(cut))
