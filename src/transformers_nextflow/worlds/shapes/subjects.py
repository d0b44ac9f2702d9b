"""Subject-driven drawing: the object of an image (or those of two) in another scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..conversations import drawing
from .cases import DrawingCase
from .language import group_items, item_phrase, join_phrases, place_phrase
from .requirement import RELATIONS, Requirement
from .scene import Object, Scene, World, choose, random_background, random_cells, random_object


ONE, TWO = ("the same object", "this object", "the object"), ("the first object", "the second object")
KINDS = ("place", "company", "relation", "two")
PLACED, ON_BACKGROUND = 0.5, 0.6


def subject_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> DrawingCase:
    """`place`: only the object, at a place; `company`: among others; `relation`: beside another; `two`: of two
    images.
    """
    kind = choose(rng, KINDS)
    count = {"place": 1, "company": int(rng.integers(2, 4))}.get(kind, 2)
    objects = _different(rng, world, count, allow_held_out)
    relation = choose(rng, list(RELATIONS)) if kind == "relation" or (kind == "two" and rng.random() < 0.5) else None
    while relation and not RELATIONS[relation](*objects):
        objects = [replace(o, row=r, column=c) for o, (r, c) in zip(objects, random_cells(rng, world, 2))]
    placed = kind == "place" or (relation is None and rng.random() < PLACED)
    names = list(TWO) if kind == "two" else [choose(rng, ONE)]
    sized = len(world.sizes) > 1
    items = [group_items([item], color=True, size=sized)[0] for item in objects]
    if placed:
        items = [
            replace(item, cell=o.cell) if i < len(names) else item for i, (item, o) in enumerate(zip(items, objects))
        ]
    phrases = [
        (f"{names[i]} {place_phrase(rng, item.cell, world)}" if placed else names[i])
        if i < len(names)
        else item_phrase(rng, item, world)
        for i, item in enumerate(items)
    ]
    scene = Scene(tuple(objects), random_background(rng, world))
    ground = scene.background if rng.random() < ON_BACKGROUND else None
    text = join_phrases(rng, phrases, relation, ground)
    shown = [_portrait(rng, item, world) for item in objects[: len(names)]]
    exchange = drawing(text, scene, shown)
    return DrawingCase(kind, *exchange, requirement=Requirement(tuple(items), relation, ground))


def _different(rng, world: World, count: int, allow_held_out: bool) -> list[Object]:
    """Objects of different looks in random cells."""
    while True:
        cells = random_cells(rng, world, count)
        objects = [random_object(rng, world, cell, allow_held_out=allow_held_out) for cell in cells]
        if len({(item.shape, item.color) for item in objects}) == count:
            return objects


def _portrait(rng, item: Object, world: World) -> Scene:
    """Only the object, somewhere."""
    row, column = choose(rng, world.cells)
    return Scene((replace(item, row=row, column=column),), random_background(rng, world))
