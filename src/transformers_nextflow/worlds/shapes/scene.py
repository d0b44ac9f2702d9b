"""The shapes world: what a scene holds and how it becomes an image.

An image is a lattice of square cells on a plain background; every object lies in a cell of its own. Only the fields of
`World` decide what the world holds (canvas, shapes, colours, sizes, how far objects may be from the centres of cells).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw


Color = tuple[int, int, int]

UNKNOWN = "unknown"  # the checker's name for a blob that looks like none of the world's shapes
SUPERSAMPLING = 8
MAX_COUNT = 9  # the largest number in captions
COLORS: tuple[tuple[str, Color], ...] = (
    ("red", (220, 30, 40)),
    ("green", (30, 165, 70)),
    ("blue", (30, 80, 230)),
    ("yellow", (245, 225, 30)),
    ("purple", (150, 50, 200)),
    ("orange", (255, 135, 20)),
)
BACKGROUNDS: tuple[tuple[str, Color], ...] = (("white", (255, 255, 255)), ("black", (0, 0, 0)))
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Pairs of shape and colour that no training scene holds: each with another shape and another colour.
HELD_OUT_PAIRS = (("circle", "yellow"), ("square", "purple"), ("triangle", "orange"), ("star", "green"))


@dataclass(frozen=True)
class Object:
    """One object in the cell (row, column), rows counted from the top, `offset` (down, right) pixels off its centre."""

    shape: str
    color: str
    row: int
    column: int
    size: str = "large"
    offset: tuple[int, int] = (0, 0)

    @property
    def cell(self) -> tuple[int, int]:
        return (self.row, self.column)


@dataclass(frozen=True)
class Scene:
    """Objects on a background, kept in reading order so that equal scenes compare equal.

    Raises ValueError for two objects in one cell.
    """

    objects: tuple[Object, ...]
    background: str = "white"

    def __post_init__(self):
        objects = tuple(sorted(self.objects, key=lambda item: item.cell))
        if len({item.cell for item in objects}) < len(objects):
            raise ValueError(f"Every object needs a cell of its own, got {[item.cell for item in objects]}.")
        object.__setattr__(self, "objects", objects)


@dataclass(frozen=True)
class World:
    """What scenes may hold. `sizes` are (name, share of the cell's side), `jitter` the largest offset in pixels."""

    canvas: int = 64
    lattice: int = 4
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[tuple[str, Color], ...] = COLORS
    backgrounds: tuple[tuple[str, Color], ...] = BACKGROUNDS
    sizes: tuple[tuple[str, float], ...] = (("large", 14 / 16),)
    max_objects: int = 4
    jitter: int = 0
    held_out_pairs: tuple[tuple[str, str], ...] = HELD_OUT_PAIRS

    def __post_init__(self):
        if self.canvas % self.lattice:
            raise ValueError(f"A canvas of {self.canvas} pixels does not divide into {self.lattice} cells a side.")
        room = self.cell_size * (1 - max(self.palette_of_sizes.values())) / 2
        if self.jitter > room:
            raise ValueError(f"jitter={self.jitter} moves the largest objects out of their cells; at most {room}.")
        most = min(self.lattice**2, MAX_COUNT)
        if not 3 <= self.max_objects <= most:
            raise ValueError(f"max_objects={self.max_objects} does not lie in 3..{most}: cells, numbers in captions.")

    @property
    def cell_size(self) -> int:
        return self.canvas // self.lattice

    @cached_property
    def palette(self) -> dict[str, Color]:
        return dict(self.colors)

    @cached_property
    def background_palette(self) -> dict[str, Color]:
        return dict(self.backgrounds)

    @cached_property
    def palette_of_sizes(self) -> dict[str, float]:
        return dict(self.sizes)

    @cached_property
    def cells(self) -> tuple[tuple[int, int], ...]:
        return tuple((row, column) for row in range(self.lattice) for column in range(self.lattice))

    @cached_property
    def all_pairs(self) -> tuple[tuple[str, str], ...]:
        """Every (shape, colour)."""
        return tuple((shape, color) for shape in self.shapes for color in self.palette)

    @cached_property
    def training_pairs(self) -> tuple[tuple[str, str], ...]:
        """Every (shape, colour) that is not held out."""
        return tuple(pair for pair in self.all_pairs if pair not in self.held_out_pairs)

    def pairs(self, allow_held_out: bool = False) -> tuple[tuple[str, str], ...]:
        return self.all_pairs if allow_held_out else self.training_pairs


class CellLabels(NamedTuple):
    """What each cell holds: `shapes` and `colors` (lattice, lattice) int64, 0 = empty; `background` an index from 0."""

    shapes: np.ndarray
    colors: np.ndarray
    background: int


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, side: float, center: float) -> None:
    """Draws `shape` in white into a square of `side` pixels around (center, center)."""
    radius = side / 2

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(center + radius * x, center + radius * y) for x, y in points], fill=255)

    def box(x: float, y: float, fill: int = 255) -> None:
        draw.rectangle((center - x, center - y, center + x - 1, center + y - 1), fill=fill)

    def disc(r: float, fill: int = 255) -> None:
        draw.ellipse((center - r, center - r, center + r - 1, center + r - 1), fill=fill)

    if shape == "circle":
        disc(radius)
    elif shape == "ring":
        disc(radius)
        disc(0.55 * radius, fill=0)
    elif shape == "square":
        box(0.92 * radius, 0.92 * radius)
    elif shape == "cross":
        box(radius, radius / 3)
        box(radius / 3, radius)
    elif shape == "triangle":
        polygon([(0, -1), (1, 0.9), (-1, 0.9)])
    elif shape == "star":
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [1.05 if i % 2 == 0 else 0.44 for i in range(10)]
        polygon([(r * math.cos(a), r * math.sin(a) + 0.06) for r, a in zip(radii, angles)])
    else:
        raise ValueError(f"No shape {shape!r}; the shapes are {', '.join(SHAPES)}.")


@cache
def sprite(shape: str, size: str, world: World) -> np.ndarray:
    """Opacity of a shape in the middle of its cell: (cell, cell) float32 in [0, 1], antialiased."""
    cell = world.cell_size
    large = Image.new("L", (cell * SUPERSAMPLING,) * 2)
    side = cell * SUPERSAMPLING * world.palette_of_sizes[size]
    draw_shape(ImageDraw.Draw(large), shape, side, cell * SUPERSAMPLING / 2)
    return np.asarray(large.resize((cell, cell), Image.Resampling.BOX), dtype=np.float32) / 255


@cache
def object_patch(
    shape: str, color: str, size: str, offset: tuple[int, int], background: str, world: World
) -> np.ndarray:
    """A cell with one object in it: (cell, cell, 3) uint8."""
    alpha = np.roll(sprite(shape, size, world), offset, axis=(0, 1))[..., None]  # the margin is as wide as the jitter
    ground, paint = np.float32(world.background_palette[background]), np.float32(world.palette[color])
    return np.rint(ground + alpha * (paint - ground)).astype(np.uint8)


def render(scene: Scene, world: World) -> np.ndarray:
    """The scene as an image, (canvas, canvas, 3) uint8."""
    image = np.empty((world.canvas, world.canvas, 3), dtype=np.uint8)
    image[:] = world.background_palette[scene.background]
    cell = world.cell_size
    for item in scene.objects:
        top, left = item.row * cell, item.column * cell
        patch = object_patch(item.shape, item.color, item.size, item.offset, scene.background, world)
        image[top : top + cell, left : left + cell] = patch
    return image


def choose(rng: np.random.Generator, options):
    """One of a sequence, uniformly (`rng.choice` would turn tuples into arrays)."""
    return options[int(rng.integers(len(options)))]


def random_object(rng, world: World, cell, shape=None, color=None, *, allow_held_out: bool = False) -> Object:
    """An object in `cell`; shape and colour, where not given, uniform among the pairs that are allowed."""
    pairs = world.pairs(allow_held_out)
    if shape or color:
        pairs = [pair for pair in pairs if shape in (None, pair[0]) and color in (None, pair[1])]
    if not pairs:
        raise ValueError(f"A {color} {shape} is held out of training; pass allow_held_out=True.")
    shape, color = choose(rng, pairs)
    size = choose(rng, world.sizes)[0]
    offset = tuple(int(x) for x in rng.integers(-world.jitter, world.jitter + 1, 2)) if world.jitter else (0, 0)
    return Object(shape, color, *cell, size, offset)


def random_cells(rng: np.random.Generator, world: World, count: int) -> list[tuple[int, int]]:
    """`count` different cells in random order."""
    return [world.cells[i] for i in rng.permutation(len(world.cells))[:count]]


def random_background(rng: np.random.Generator, world: World) -> str:
    """A background of the world, each as likely as another."""
    return choose(rng, world.backgrounds)[0]


def random_scene(
    rng: np.random.Generator, world: World, num_objects: int | None = None, *, allow_held_out: bool = False
) -> Scene:
    """A scene of `num_objects` (default: 1..max_objects, uniform), every attribute uniform."""
    count = int(rng.integers(1, world.max_objects + 1)) if num_objects is None else num_objects
    cells = random_cells(rng, world, count)
    objects = tuple(random_object(rng, world, cell, allow_held_out=allow_held_out) for cell in cells)
    return Scene(objects, random_background(rng, world))


def cell_labels(scene: Scene, world: World) -> CellLabels:
    """What each cell holds, as indices into `world.shapes` and `world.colors` counted from 1, 0 for an empty cell."""
    shapes = np.zeros((world.lattice, world.lattice), dtype=np.int64)
    colors = np.zeros_like(shapes)
    for item in scene.objects:
        shapes[item.cell] = 1 + world.shapes.index(item.shape)
        colors[item.cell] = 1 + list(world.palette).index(item.color)
    return CellLabels(shapes, colors, list(world.background_palette).index(scene.background))
