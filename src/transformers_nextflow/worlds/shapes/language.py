"""The language of scenes: captions to draw from, captions to read back, questions with answers.

A caption mentions every object of its scene, so whatever else an image holds is wrong. What a caption leaves open (a
colour, a place, the background) is sampled uniformly. Every wording is a template that is both filled and parsed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np

from ..held_out import is_reserved
from .requirement import RELATIONS, Item, Requirement
from .scene import Object, Scene, World, choose, random_background, random_cells, random_object


# GenEval's six categories, and scenes of several objects, with their shares of the training captions.
CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
MIXTURE = {**dict(zip(CATEGORIES, (0.06, 0.1, 0.18, 0.06, 0.2, 0.12))), "mixed": 0.28}
PLACED, PLACEABLE = 0.5, ("single_object", "two_objects", "colors", "color_attribution", "mixed")  # 31%
COLORED, SIZED, ON_BACKGROUND = 0.7, 0.5, 0.3

NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = {number: (word, str(number)) for number, word in enumerate(NUMBER_WORDS, start=2)}
PREFIXES = (
    "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "a painting of ", "a simple picture of ",
    "a scene with ", "draw ", "show ", "paint ", "please draw ", "draw a picture of ", "make an image of ", "there is ",
)  # fmt: skip
JOINTS = (" and ", " with ", " together with ", " plus ")
BACKGROUND_TEMPLATES = (
    "{body} on a {color} background", "{body} on {color}", "{body} with a {color} background",
    "{body} against a {color} background", "{body} in front of a {color} background", "{body} on a {color} canvas",
    "{body}, {color} background", "on a {color} background, {body}", "{color} background, {body}",
)  # fmt: skip
RELATION_TEMPLATES = {
    "left": (" left of ", " to the left of ", " on the left of "),
    "right": (" right of ", " to the right of ", " on the right of "),
    "above": (" above ", " over ", " higher than "),
    "below": (" below ", " under ", " lower than "),
}
CORNER_TEMPLATES = ("in the {corner} corner", "in the {corner}")
CELL_TEMPLATES = ("in row {row} column {column}", "at row {row} column {column}")


def _wording(rng: np.random.Generator | None, options):
    """One of the wordings; without `rng` always the first."""
    return options[0] if rng is None else choose(rng, options)


# --- From requirements to texts ------------------------------------------------------------------------------------


def article(word: str) -> str:
    """ "a" or "an", as the word needs it."""
    return "an" if word[0] in "aeiou" else "a"


def plural(noun: str) -> str:
    """The plural of a noun."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def corners(world: World) -> dict[tuple[int, int], str]:
    """The cells (row, column) of the corners, with their names."""
    last = world.lattice - 1
    return {(0, 0): "top left", (0, last): "top right", (last, 0): "bottom left", (last, last): "bottom right"}


def place_phrase(rng: np.random.Generator | None, cell: tuple[int, int], world: World) -> str:
    """'in the top left corner' or 'in row 2 column 3'."""
    named = cell in corners(world) and (rng is None or rng.random() < 0.5)
    template = _wording(rng, CORNER_TEMPLATES if named else CELL_TEMPLATES)
    return template.format(corner=corners(world).get(cell), row=cell[0] + 1, column=cell[1] + 1)


def item_phrase(rng: np.random.Generator | None, item: Item, world: World) -> str:
    """'a red circle', 'three small stars', 'a cross in the top left'."""
    noun = item.shape if item.count == 1 else plural(item.shape)
    words = [word for word in (item.size, item.color, noun) if word]
    words.insert(0, article(words[0]) if item.count == 1 else _wording(rng, NUMBERS[item.count]))
    return " ".join(words) + (f" {place_phrase(rng, item.cell, world)}" if item.cell else "")


def write_caption(rng: np.random.Generator | None, requirement: Requirement, world: World) -> str:
    """A caption that asks for exactly the requirement; without `rng` in the canonical wording."""
    phrases = [item_phrase(rng, item, world) for item in requirement.items]
    return join_phrases(rng, phrases, requirement.relation, requirement.background)


def join_phrases(
    rng: np.random.Generator | None, phrases: list[str], relation: str | None = None, background: str | None = None
) -> str:
    """A caption of phrases for its items, in the order given."""
    if relation:
        joint = _wording(rng, RELATION_TEMPLATES[relation])
    else:
        joint = _wording(rng, JOINTS if len(phrases) == 2 else JOINTS[:1])
    body = ", ".join(phrases[:-1]) + joint + phrases[-1] if len(phrases) > 1 else phrases[0]
    text = _wording(rng, PREFIXES) + body
    if background:
        text = _wording(rng, BACKGROUND_TEMPLATES).format(body=text, color=background)
    return text


def group_items(objects, *, color: bool, size: bool) -> tuple[Item, ...]:
    """The objects as items that name their shapes (and colours, sizes), equal ones counted, in the order given."""
    counts = Counter((o.shape, o.color if color else None, o.size if size else None) for o in objects)
    return tuple(Item(*attributes, count=count) for attributes, count in counts.items())


def caption(rng: np.random.Generator | None, scene: Scene, world: World) -> str:
    """Describes a scene in full: every object with its colour (and size), and the background.

    `parse_caption` can recover the scene's objects, without their places, from it. Without `rng` the wording is
    canonical: always the same for a scene. Raises ValueError for an empty scene.
    """
    if not scene.objects:
        raise ValueError("An empty scene has no caption; describe scenes with at least one object.")
    items = group_items(scene.objects, color=True, size=len(world.sizes) > 1)
    return write_caption(rng, Requirement(items, background=scene.background), world)


def located_caption(scene: Scene, world: World) -> str:
    """Describes a scene in full, each object with its place, in reading order; always in the same wording.

    Raises ValueError for an empty scene.
    """
    if not scene.objects:
        raise ValueError("An empty scene has no caption; describe scenes with at least one object.")
    return write_caption(None, Requirement(located_items(scene.objects, world), background=scene.background), world)


def located_items(objects: Iterable[Object], world: World) -> tuple[Item, ...]:
    """Objects as items with all attributes and places, in the given order."""
    sized = len(world.sizes) > 1
    return tuple(Item(o.shape, o.color, o.size if sized else None, o.cell) for o in objects)


# --- From texts to requirements ------------------------------------------------------------------------------------


def _any(options) -> str:
    return "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))


def _parse_place(text: str, world: World) -> tuple[int, int]:
    match = re.fullmatch(r"(?:in|at) row (\d+) column (\d+)", text)
    if match:
        return int(match[1]) - 1, int(match[2]) - 1
    names = {name: cell for cell, name in corners(world).items()}
    match = re.fullmatch(rf"in the ({_any(names)})(?: corner)?", text)
    if not match:
        raise ValueError(f"Cannot read the place {text!r}; say 'in row 1 column 2' or 'in the top left corner'.")
    return names[match[1]]


@cache
def _items_of(world: World) -> tuple[dict[str, int], dict[str, str], re.Pattern]:
    """Numbers by their words, shapes by their nouns, and the pattern of an item."""
    counts = {word: number for number, words in NUMBERS.items() for word in words} | {"a": 1, "an": 1}
    nouns = {name: shape for shape in world.shapes for name in (shape, plural(shape))}
    pattern = (
        rf"({_any(counts)}) (?:({_any(world.palette_of_sizes)}) )?(?:({_any(world.palette)}) )?({_any(nouns)})"
        rf"(?: ((?:in|at) .*))?"
    )
    return counts, nouns, re.compile(pattern)


def parse_item(text: str, world: World) -> Item:
    """The inverse of `item_phrase`. Raises ValueError for anything else."""
    counts, nouns, pattern = _items_of(world)
    match = pattern.fullmatch(text)
    if not match:
        raise ValueError(f"Cannot read {text!r} as a number of objects, such as 'a red circle' or 'two stars'.")
    number, size, color, noun, place = match.groups()
    return Item(nouns[noun], color, size, _parse_place(place, world) if place else None, counts[number])


def is_full_caption(text: str, reference: str, world: World) -> bool:
    """Whether a text says the same as a caption of `caption` or `located_caption`, in any wording and order."""
    try:
        said, asked = parse_caption(text, world), parse_caption(reference, world)
    except ValueError:
        return False
    return said.background == asked.background and Counter(said.items) == Counter(asked.items)


def parse_caption(text: str, world: World) -> Requirement:
    """What a caption asks for: the inverse of `write_caption`. Raises ValueError for a text that is no caption."""
    background = None
    for template in BACKGROUND_TEMPLATES:
        pattern = template.format(body="(?P<body>.*)", color=f"(?P<color>{_any(world.background_palette)})")
        match = re.fullmatch(pattern, text)
        if match:
            text, background = match["body"], match["color"]
            break
    text = text.removeprefix(max((p for p in PREFIXES if text.startswith(p)), key=len))
    for relation, joints in RELATION_TEMPLATES.items():
        parts = re.split(_any(joints), text)
        if len(parts) == 2:
            return Requirement(tuple(parse_item(part, world) for part in parts), relation, background)
    parts = re.split(rf"{_any(JOINTS)}|, ", text)
    return Requirement(tuple(parse_item(part, world) for part in parts), background=background)


def parse_located_caption(text: str, world: World) -> Scene:
    """The inverse of `located_caption`. Raises `ValueError` for a text that does not describe a scene in full."""
    said = parse_caption(text, world)
    if said.background is None or any(None in (i.color, i.cell) or i.count > 1 for i in said.items):
        raise ValueError(
            f"{text!r} is not a full description: it must name the background, and colour and place of each object."
        )
    objects = [Object(i.shape, i.color, *i.cell, **({"size": i.size} if i.size else {})) for i in said.items]
    return Scene(tuple(objects), said.background)


# --- Training pairs ------------------------------------------------------------------------------------------------


def _distinct_objects(rng, world: World, count: int, allow_held_out: bool, *, colors_too: bool = False) -> list[Object]:
    """Objects of different shapes (and of different colours), in random cells."""
    while True:
        objects = [random_object(rng, world, c, allow_held_out=allow_held_out) for c in random_cells(rng, world, count)]
        shapes, colors = {o.shape for o in objects}, {o.color for o in objects}
        if len(shapes) == count and (not colors_too or len(colors) == count):
            return objects


def _objects_of(rng, world: World, category: str, allow_held_out: bool) -> tuple[list[Object], bool]:
    """The objects of a caption of this category, and whether it names their colours."""
    colored = bool(rng.random() < COLORED)
    if category in ("single_object", "colors"):
        return _distinct_objects(rng, world, 1, allow_held_out), category == "colors"
    if category == "two_objects":
        return _distinct_objects(rng, world, 2, allow_held_out), False
    if category == "color_attribution":
        return _distinct_objects(rng, world, 2, allow_held_out, colors_too=True), True
    if category == "position":
        return _distinct_objects(rng, world, 2, allow_held_out), colored
    if category == "counting":
        cells = random_cells(rng, world, int(rng.integers(2, world.max_objects + 1)))
        first = random_object(rng, world, cells[0], allow_held_out=allow_held_out)
        like = {"shape": first.shape, "color": first.color if colored else None, "allow_held_out": allow_held_out}
        return [first] + [random_object(rng, world, cell, **like) for cell in cells[1:]], colored
    if category == "mixed":
        cells = random_cells(rng, world, int(rng.integers(3, world.max_objects + 1)))
        return [random_object(rng, world, cell, allow_held_out=allow_held_out) for cell in cells], colored
    raise ValueError(f"No category {category!r}; the categories are {', '.join(MIXTURE)}.")


def draw_category(
    rng: np.random.Generator, world: World, category: str, *, places: bool = True, allow_held_out: bool = False
) -> tuple[str, Scene, Requirement]:
    """A caption of one category of `MIXTURE`, reserved or not, with a scene that fulfils it and its requirement.

    `places`: some of the captions say which cells the objects are in.
    """
    objects, colored = _objects_of(rng, world, category, allow_held_out)
    # In a plural equal objects would differ only in their sizes, so a plural names no sizes.
    sized = category != "counting" and len(world.sizes) > 1 and rng.random() < SIZED
    items, relation = group_items(objects, color=colored, size=sized), None
    if category == "position":
        relation = choose(rng, list(RELATIONS))
        while not RELATIONS[relation](*objects):
            objects = [replace(o, row=r, column=c) for o, (r, c) in zip(objects, random_cells(rng, world, 2))]
    elif places and category in PLACEABLE and rng.random() < PLACED:
        items = tuple(Item(o.shape, o.color if colored else None, o.size if sized else None, o.cell) for o in objects)
    scene = Scene(tuple(objects), random_background(rng, world))
    requirement = Requirement(items, relation, scene.background if rng.random() < ON_BACKGROUND else None)
    return write_caption(rng, requirement, world), scene, requirement


def drawing_example(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> tuple[str, Scene]:
    """A caption to draw from and a scene that fulfils it. Never a caption that `is_reserved`."""
    while True:
        text, scene, _ = draw_category(rng, world, random_category(rng), allow_held_out=allow_held_out)
        if not is_reserved(text):
            return text, scene


def random_category(rng: np.random.Generator) -> str:
    """One of `MIXTURE` by its share."""
    return list(MIXTURE)[int(rng.choice(len(MIXTURE), p=list(MIXTURE.values())))]
