"""The emoji world: what a scene holds and how it becomes an image.

An image is a plain background with a grid of places, `GRIDS`; a sticker lies in the middle of a place of its own. Only
the fields of `World` decide what the world holds (drawings, their styles, sizes of images).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from ...scale_schedule import BASE_SIDE, ScaleSchedules
from ...utils.atomic_files import atomic_write
from ..held_out import is_reserved
from .art import Art, Drawing
from .coloring import HUES, recolor


Cell = tuple[int, int]
Color = tuple[int, int, int]

GRIDS: tuple[Cell, ...] = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3))
# Number of stickers of one kind → the grid that they fill in reading order.
GRID_OF_COUNT = {1: (1, 1), 2: (1, 2), 3: (2, 2), 4: (2, 2), 5: (2, 3), 6: (2, 3)}
MAX_COUNT = max(GRID_OF_COUNT)
MARGIN = 0.08  # of a place's side, on each side
UPRIGHT = "upright"
# Name → by how many quarters of a circle, counter-clockwise.
TURNS = {UPRIGHT: 0, "turned left": 1, "upside down": 2, "turned right": 3}
BACKGROUNDS: dict[str, Color] = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (150, 150, 150),
    "pink": (255, 196, 214),
    "blue": (150, 200, 250),
    "green": (168, 226, 168),
    "yellow": (255, 240, 150),
    "orange": (255, 200, 140),
    "purple": (205, 180, 242),
}
# Base grids (height, width) of the ratios in which images are drawn: square, two wide, two tall.
RATIOS: tuple[Cell, ...] = ((16, 16), (12, 20), (20, 12), (14, 18), (18, 14))
SQUARE = (BASE_SIDE, BASE_SIDE)
# Kinds of random scenes and their shares; see `random_scene`.
KINDS = {"single": 0.36, "small": 0.08, "count": 0.18, "pair": 0.22, "mixed": 0.16}
COLORED, TONED, TURNED, WIDE = 0.3, 0.5, 0.08, 0.25  # shares, where it can be
# The splits that may be held out of training, and the attributes of a scene that decide about each.
SPLITS = ("style", "color", "pair", "count")


@dataclass(frozen=True)
class Sticker:
    """One drawing in the place (row, column), rows counted from the top.

    Args:
        concept: key of `Art.concepts`.
        style: in which it is drawn.
        cell: its place.
        color: one of `HUES`, if the drawing is recoloured; `None` keeps its colours.
        tone: skin tone; `None` is the default one.
        turn: one of `TURNS`.
    """

    concept: str
    style: str
    cell: Cell = (0, 0)
    color: str | None = None
    tone: str | None = None
    turn: str = UPRIGHT


@dataclass(frozen=True)
class Scene:
    """Stickers on a background, kept in reading order so that equal scenes compare equal.

    Args:
        grid: of `GRIDS`, rows and columns of places.
        ratio: of `RATIOS`, the form of the image.

    Raises:
        ValueError: for two stickers in one place, or one outside of the grid.
    """

    stickers: tuple[Sticker, ...]
    background: str = "white"
    grid: Cell = (1, 1)
    ratio: Cell = SQUARE

    def __post_init__(self):
        stickers = tuple(sorted(self.stickers, key=lambda sticker: sticker.cell))
        cells = [sticker.cell for sticker in stickers]
        if len(set(cells)) < len(cells):
            raise ValueError(f"Every sticker needs a place of its own, got {cells}.")
        if any(row >= self.grid[0] or column >= self.grid[1] for row, column in cells):
            raise ValueError(f"Places {cells} do not all lie in the grid {self.grid}.")
        object.__setattr__(self, "stickers", stickers)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return cells_of(self.grid)

    @property
    def free_cells(self) -> tuple[Cell, ...]:
        taken = {sticker.cell for sticker in self.stickers}
        return tuple(cell for cell in self.cells if cell not in taken)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The keys of its concepts, each once, in reading order."""
        return tuple(dict.fromkeys(sticker.concept for sticker in self.stickers))

    @property
    def style(self) -> str | None:
        """The style of all stickers; `None` if they differ."""
        styles = {sticker.style for sticker in self.stickers}
        return styles.pop() if len(styles) == 1 else None

    def center(self, sticker: Sticker) -> tuple[float, float]:
        """The middle of a sticker, (down, right), as shares of the image's sides."""
        return (sticker.cell[0] + 0.5) / self.grid[0], (sticker.cell[1] + 0.5) / self.grid[1]


def cells_of(grid: Cell) -> tuple[Cell, ...]:
    """The places (row, column) of a grid, in reading order."""
    return tuple((row, column) for row in range(grid[0]) for column in range(grid[1]))


@dataclass(frozen=True, eq=False)
class World:
    """What scenes may hold.

    Args:
        art: the drawings.
        side: pixels of a square image's side.
        patch_size: side in pixels of a cell of the tokenizer's last grid; images of all ratios consist of such cells.
        ratios: aspect ratios of images, from `RATIOS`.
        concepts, styles: keys and names that scenes may have; default: those of all drawings.
        kinds: kinds of random scenes, with their shares.
        plain: whether drawings are neither recoloured nor turned.
    """

    art: Art
    side: int = 128
    patch_size: int = 8
    ratios: tuple[Cell, ...] = (SQUARE,)
    concepts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    kinds: dict[str, float] = field(default_factory=KINDS.copy)
    plain: bool = False

    def __post_init__(self):
        for name, known in (("concepts", self.art.concepts), ("styles", self.art.styles)):
            given = getattr(self, name) or tuple(known)
            if unknown := sorted(set(given) - set(known)):
                raise ValueError(f"There are no {name} {unknown[:5]} in {self.art.path}.")
            object.__setattr__(self, name, given)
        drawn = tuple(concept for concept in self.concepts if self.styles_of(concept))
        object.__setattr__(self, "concepts", drawn)
        if self.side % self.patch_size:
            raise ValueError(f"side {self.side} is not a multiple of patch_size {self.patch_size}.")

    def save(self, file: Path | str):
        """Write all fields but the drawings, as JSON."""
        values = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "art"}
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(values))

    @classmethod
    def load(cls, file: Path | str, art: Art) -> World:
        """A world that `save` wrote. Raises `ValueError` if there is none, or if some of its drawings are missing."""
        if not Path(file).is_file():
            raise ValueError(f"There is no world {file}; examples/emoji/train_judge.py writes one beside the judge.")
        values = json.loads(Path(file).read_text())
        ratios = tuple((height, width) for height, width in values.pop("ratios"))
        lists = {name: tuple(values.pop(name)) for name in ("concepts", "styles")}
        return cls(art, ratios=ratios, **lists, **values)

    def styles_of(self, concept: str) -> tuple[str, ...]:
        """The world's styles in which a concept is drawn."""
        return tuple(style for style in self.styles if (concept, style) in self.art.drawings)

    def drawing(self, concept: str, style: str) -> Drawing:
        return self.art.drawings[concept, style]

    def name(self, concept: str) -> str:
        return self.art.concepts[concept].name

    @cached_property
    def indices(self) -> dict[str, int]:
        """Concept → its number, from 0."""
        return {concept: index for index, concept in enumerate(self.concepts)}

    @cached_property
    def concepts_in(self) -> dict[str, tuple[str, ...]]:
        """Style → the concepts that are drawn in it."""
        return {style: tuple(c for c in self.concepts if style in self.styles_of(c)) for style in self.styles}

    @cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every (concept, style) that is drawn."""
        return tuple((concept, style) for concept in self.concepts for style in self.styles_of(concept))

    def colors_of(self, concept: str, style: str) -> tuple[str, ...]:
        """The colours in which a drawing can be recoloured; none if its name contains a colour."""
        paint = self.drawing(concept, style).paint
        if paint is None or self.plain or HUES.keys() & set(self.name(concept).split(" ")):
            return ()
        return tuple(color for color in HUES if color != paint.name)

    @lru_cache(maxsize=64)  # noqa: B019  (a handful of worlds live as long as the process)
    def size(self, ratio: Cell) -> tuple[int, int]:
        """Height and width in pixels of images of a ratio."""
        schedules = ScaleSchedules((1, self.side // self.patch_size), self.patch_size)
        return schedules.build(ratio).image_size(self.patch_size)

    # --- What is held out ------------------------------------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of `SPLITS` to which scenes of this world can belong."""
        several = {"pair": ("pair", "mixed"), "count": ("count",)}
        absent = {split for split, kinds in several.items() if not set(kinds) & set(self.kinds)}
        return tuple(split for split in SPLITS if split not in absent and not (split == "color" and self.plain))

    @lru_cache(maxsize=65536)  # noqa: B019
    def holds_out_style(self, concept: str, style: str) -> bool:
        """Whether a concept in a style is held out; no concept is held out in all of its styles."""
        reserved = [is_reserved(f"style {concept} {other}") for other in self.styles_of(concept)]
        return is_reserved(f"style {concept} {style}") and not all(reserved)

    def held_out(self, scene: Scene) -> frozenset[str]:
        """The `SPLITS` to which a scene belongs; if there are none, it may be trained on."""
        concepts, found = scene.concepts, set()
        if any(self.holds_out_style(sticker.concept, sticker.style) for sticker in scene.stickers):
            found.add("style")
        if any(is_reserved(f"color {s.concept} {s.color}") for s in scene.stickers if s.color):
            found.add("color")
        if any(is_reserved(f"pair {a} {b}") for a, b in combinations(concepts, 2)):
            found.add("pair")
        counts = Counter(sticker.concept for sticker in scene.stickers)
        if any(is_reserved(f"count {concept} {count}") for concept, count in counts.items() if count > 1):
            found.add("count")
        return frozenset(found)


# --- From scenes to images -----------------------------------------------------------------------------------------


def box(grid: Cell, cell: Cell, size: tuple[int, int]) -> tuple[int, int, int]:
    """The square in the middle of a place of an image (height, width): top, left and side in pixels."""
    height, width = size
    top, bottom = (round(height * (cell[0] + i) / grid[0]) for i in (0, 1))
    left, right = (round(width * (cell[1] + i) / grid[1]) for i in (0, 1))
    side = min(bottom - top, right - left)
    return top + (bottom - top - side) // 2, left + (right - left - side) // 2, side


@lru_cache(maxsize=4096)
def _recolored(art: Art, concept: str, style: str, color: str) -> np.ndarray:
    paint = art.drawings[concept, style].paint
    if paint is None:
        raise ValueError(f"{concept} in style {style} has no main colour, so it cannot be recoloured.")
    return recolor(art.sprite(concept, style), paint, color)


@lru_cache(maxsize=4096)
def _patch(art: Art, sticker: Sticker, side: int) -> np.ndarray:
    """A drawing of `side` pixels, (side, side, 4) uint8: colours times opacity, and opacity."""
    if sticker.color is None:
        sprite = art.sprite(sticker.concept, sticker.style, sticker.tone)
    else:
        sprite = _recolored(art, sticker.concept, sticker.style, sticker.color)
    sprite = np.rot90(sprite, TURNS[sticker.turn])
    # Premultiplied, since transparent pixels would otherwise colour the edges.
    image = Image.fromarray(np.ascontiguousarray(sprite)).convert("RGBa")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _drawn_side(place: int) -> int:
    return max(1, round(place * (1 - 2 * MARGIN)))


def placed(scene: Scene, world: World, size: tuple[int, int]) -> Iterable[tuple[Sticker, slice, slice, np.ndarray]]:
    """Each sticker of a scene with the rows and columns that it takes, and its patch, see `_patch`."""
    for sticker in scene.stickers:
        top, left, place = box(scene.grid, sticker.cell, size)
        side = _drawn_side(place)
        top, left = top + (place - side) // 2, left + (place - side) // 2
        patch = _patch(world.art, replace(sticker, cell=(0, 0)), side)
        yield sticker, slice(top, top + side), slice(left, left + side), patch


def render(scene: Scene, world: World) -> np.ndarray:
    """The scene as an image, (height, width, 3) uint8.

    Raises:
        ValueError: for a drawing that does not exist, or one without a ruling colour that is to be recoloured.
    """
    size = world.size(scene.ratio)
    image = np.empty((*size, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for _, rows, columns, patch in placed(scene, world, size):
        image[rows, columns] = image[rows, columns] * (1 - np.float32(patch[..., 3:]) / 255) + patch[..., :3]
    return np.rint(image).clip(0, 255).astype(np.uint8)


def cell_labels(scene: Scene, world: World) -> np.ndarray:
    """The concept at each cell of the tokenizer's last grid, counted from 1, and 0 for the background.

    (height / patch_size, width / patch_size) int64; a sticker counts if it covers a quarter of the cell.
    """
    size, patch = world.size(scene.ratio), world.patch_size
    labels = np.zeros((size[0] // patch, size[1] // patch), dtype=np.int64)
    for sticker, rows, columns, drawing in placed(scene, world, size):
        cover = np.zeros(size, dtype=np.float32)
        cover[rows, columns] = np.float32(drawing[..., 3]) / 255
        cover = cover.reshape(labels.shape[0], patch, labels.shape[1], patch).mean((1, 3))
        labels[cover > 0.25] = 1 + world.indices[sticker.concept]
    return labels


# --- Random scenes ---------------------------------------------------------------------------------------------------


def choose(rng: np.random.Generator, options):
    """One of a sequence, uniformly (`rng.choice` would turn tuples into arrays)."""
    return options[int(rng.integers(len(options)))]


def draw_share(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """A name by its share."""
    weights = np.array(list(shares.values()))
    return list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def random_sticker(
    rng: np.random.Generator, world: World, concept: str | None = None, style: str | None = None
) -> Sticker:
    """A sticker; concept and style are uniform if not given, and some are recoloured, toned or turned."""
    if concept is None:
        # Of a style the concepts that it has.
        concept = choose(rng, world.concepts if style is None else world.concepts_in[style])
    style = style or choose(rng, world.styles_of(concept))
    colors, tones = world.colors_of(concept, style), world.drawing(concept, style).tones
    return Sticker(
        concept,
        style,
        color=choose(rng, colors) if colors and rng.random() < COLORED else None,
        tone=choose(rng, tones) if tones and rng.random() < TONED else None,
        turn=choose(rng, list(TURNS)[1:]) if rng.random() < TURNED and not world.plain else UPRIGHT,
    )


def different(rng: np.random.Generator, world: World, count: int, style: str | None = None) -> list[Sticker]:
    """Stickers of `count` different concepts in one style."""
    style = style or choose(rng, world.styles)
    found: dict[str, Sticker] = {}
    while len(found) < count:
        sticker = random_sticker(rng, world, style=style)
        found.setdefault(sticker.concept, sticker)
    return list(found.values())


def counted(sticker: Sticker, count: int) -> tuple[tuple[Sticker, ...], Cell]:
    """`count` copies of a sticker in reading order, and their grid."""
    grid = GRID_OF_COUNT[count]
    return tuple(replace(sticker, cell=cell) for cell in cells_of(grid)[:count]), grid


def random_ratio(rng: np.random.Generator, world: World) -> Cell:
    """The aspect ratio of an image: square, or another one of the world."""
    others = [ratio for ratio in world.ratios if ratio != SQUARE]
    return choose(rng, others) if others and rng.random() < WIDE else SQUARE


def random_scene(rng: np.random.Generator, world: World, kind: str | None = None) -> Scene:
    """A scene of one of `KINDS`, default by the world's shares.

    `single`: one sticker that fills the image; `small`: one in a corner; `count`: several of one kind; `pair`: two,
    beside or above each other; `mixed`: two to four different ones in corners.
    """
    kind = kind or draw_share(rng, world.kinds)
    ground, ratio = choose(rng, list(BACKGROUNDS)), random_ratio(rng, world)
    if kind in ("single", "count"):
        count = 1 if kind == "single" else int(rng.integers(2, MAX_COUNT + 1))
        stickers, grid = counted(random_sticker(rng, world), count)
        return Scene(stickers, ground, grid, ratio)
    count = {"small": 1, "pair": 2, "mixed": int(rng.integers(2, 5))}[kind]
    grid = choose(rng, ((1, 2), (2, 1))) if kind == "pair" else (2, 2)
    cells = [cells_of(grid)[i] for i in rng.permutation(grid[0] * grid[1])[:count]]
    stickers = different(rng, world, count)
    return Scene(tuple(replace(s, cell=cell) for s, cell in zip(stickers, cells)), ground, grid, ratio)
