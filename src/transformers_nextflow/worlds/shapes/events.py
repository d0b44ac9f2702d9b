"""Events from one image to the next, as sentences that are both written and read.

Stories and videos consist of them; `apply_event` computes the next scene, so that a sentence can be compared with the
image after it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .language import CELL_TEMPLATES, group_items, item_phrase, parse_item
from .scene import Object, Scene, World


STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
STILL = "nothing changes"


def name_of(item: Object) -> str:
    """How a sentence names an object."""
    return f"the {item.color} {item.shape}"


def moves(item: Object, direction: str) -> str:
    """The sentence of an object that moves by a cell."""
    return f"{name_of(item)} moves {direction}"


def turns(item: Object, color: str) -> str:
    """The sentence of an object that takes another colour."""
    return f"{name_of(item)} turns {color}"


def grows(item: Object) -> str:
    """The sentence of an object that becomes large."""
    return f"{name_of(item)} grows"


def leaves(item: Object) -> str:
    """The sentence of an object that disappears."""
    return f"{name_of(item)} goes away"


def goes_to(item: Object, cell: tuple[int, int]) -> str:
    """The sentence of an object that moves to a cell (row, column)."""
    return f"{name_of(item)} goes to row {cell[0] + 1} column {cell[1] + 1}"


def comes(item: Object, world: World) -> str:
    """The sentence of an object that appears."""
    phrase = item_phrase(None, group_items([item], color=True, size=len(world.sizes) > 1)[0], world)
    return f"{phrase} comes {CELL_TEMPLATES[0].format(row=item.row + 1, column=item.column + 1)}"


def background_turns(color: str) -> str:
    """The sentence of a background that takes another colour."""
    return f"the background turns {color}"


def exchange(scene: Scene, old: Object | None, new: Object | None) -> Scene:
    """The scene with `new` in place of `old`; None = no object."""
    kept = tuple(item for item in scene.objects if item is not old)
    return Scene(kept + ((new,) if new else ()), scene.background)


def step(item: Object, direction: str, count: int = 1) -> Object:
    """The object `count` cells further."""
    down, right = STEPS[direction]
    return replace(item, row=item.row + count * down, column=item.column + count * right)


def next_size(item: Object, world: World) -> Object:
    """The object in the world's next larger size; the largest stays."""
    larger = [name for name, share in world.sizes if share > world.palette_of_sizes[item.size]]
    return replace(item, size=min(larger, key=world.palette_of_sizes.get)) if larger else item


def apply_event(sentence: str, scene: Scene, world: World) -> Scene:
    """The scene after what a sentence tells.

    Raises `ValueError` for any other sentence, and for one that cannot be true of the scene: its object is missing or
    there twice, or the place is occupied or outside of the lattice.
    """
    if sentence == STILL:
        return scene
    if match := re.fullmatch(r"the background turns (\w+)", sentence):
        if match[1] not in world.background_palette:
            raise ValueError(f"There is no background {match[1]!r}.")
        return Scene(scene.objects, match[1])
    if match := re.fullmatch(r"(an? [\w ]+) comes (in row \d+ column \d+)", sentence):
        asked = parse_item(f"{match[1]} {match[2]}", world)
        new = Object(asked.shape, asked.color, *asked.cell, asked.size or world.sizes[0][0])
        return _placed(scene, None, new, world)
    match = re.fullmatch(r"the (\w+) (\w+) (moves|turns|grows|goes away|goes to)(?: (.+))?", sentence)
    named = [item for item in scene.objects if match and (item.color, item.shape) == match.groups()[:2]]
    if len(named) != 1:
        raise ValueError(f"{sentence!r} does not tell of exactly one of the objects {scene.objects}.")
    item, verb, detail = named[0], match[3], match[4]
    if verb == "goes away" and detail is None:
        return exchange(scene, item, None)
    if verb == "grows" and detail is None:
        return exchange(scene, item, next_size(item, world))
    if verb == "turns" and detail in world.palette:
        return exchange(scene, item, replace(item, color=detail))
    if verb == "moves" and detail in STEPS:
        return _placed(scene, item, step(item, detail), world)
    if verb == "goes to" and (place := re.fullmatch(r"row (\d+) column (\d+)", detail or "")):
        return _placed(scene, item, replace(item, row=int(place[1]) - 1, column=int(place[2]) - 1), world)
    raise ValueError(f"Cannot read what happens in {sentence!r}.")


def _placed(scene: Scene, old: Object | None, new: Object, world: World) -> Scene:
    if new.cell not in world.cells:
        raise ValueError(f"{new.cell} is off the lattice.")
    return exchange(scene, old, new)  # a `Scene` refuses two objects in one cell
