"""In-context learning: a pair of images shows a change, and a third image is to be changed in the same way (section
6.5).

Every pair has only one reading: a colour or a shape that all objects take, another background, an object that appears
at the same place, or an object in both scenes that disappears.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..conversations import drawing
from .cases import EditCase
from .events import exchange
from .scene import Object, Scene, World, choose, random_background, random_cells, random_object, random_scene


REQUESTS = ("do the same with the last picture", "now this one", "change it in the same way", "go on like this")


def _random_scenes(rng, world: World, allow_held_out: bool, most: int) -> tuple[Scene, Scene]:
    counts = rng.integers(1, most + 1, 2)
    return tuple(random_scene(rng, world, int(count), allow_held_out=allow_held_out) for count in counts)


def _recolor(rng, world: World, allow_held_out: bool):
    """All objects take a colour that none of them has."""
    color, scenes = choose(rng, list(world.palette)), _random_scenes(rng, world, allow_held_out, most=2)
    return scenes, [_all(scene, color=color) for scene in scenes], [o.color != color for s in scenes for o in s.objects]


def _replace(rng, world: World, allow_held_out: bool):
    """The only object of each scene takes a shape that neither has."""
    shape, scenes = choose(rng, world.shapes), _random_scenes(rng, world, allow_held_out, most=1)
    return scenes, [_all(scene, shape=shape) for scene in scenes], [o.shape != shape for s in scenes for o in s.objects]


def _background(rng, world: World, allow_held_out: bool):
    """The two scenes have the same background and take the same other one."""
    scenes = _random_scenes(rng, world, allow_held_out, most=world.max_objects)
    old = random_background(rng, world)
    new = choose(rng, [name for name in world.background_palette if name != old])
    return [replace(s, background=old) for s in scenes], [replace(s, background=new) for s in scenes], [True]


def _add(rng, world: World, allow_held_out: bool):
    """The same object appears at the same place."""
    scenes = _random_scenes(rng, world, allow_held_out, most=2)
    taken = {item.cell for scene in scenes for item in scene.objects}
    cell = next(cell for cell in random_cells(rng, world, len(world.cells)) if cell not in taken)
    new = random_object(rng, world, cell, allow_held_out=allow_held_out)
    return scenes, [exchange(scene, None, new) for scene in scenes], [True]


def _remove(rng, world: World, allow_held_out: bool):
    """The objects of the one look that both scenes share disappear."""
    looks = random_object(rng, world, (0, 0), allow_held_out=allow_held_out)
    others = _random_scenes(rng, world, allow_held_out, most=2)
    scenes = []
    for other in others:
        taken = {item.cell for item in other.objects}
        row, column = next(cell for cell in random_cells(rng, world, len(world.cells)) if cell not in taken)
        scenes.append(exchange(other, None, replace(looks, row=row, column=column)))
    shapes = [{item.shape for item in other.objects} | {looks.shape} for other in others]
    colors = [{item.color for item in other.objects} | {looks.color} for other in others]
    # The scenes share no shapes and colours except those of the object that disappears, which each has once.
    alone = all(item.shape != looks.shape and item.color != looks.color for other in others for item in other.objects)
    return scenes, list(others), [alone, len(shapes[0] & shapes[1]) == 1, len(colors[0] & colors[1]) == 1]


CHANGES = {"recolor": _recolor, "replace": _replace, "background": _background, "add": _add, "remove": _remove}


def analogy_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> EditCase:
    """Images A, B, C with a short text, and D: A becomes B as C becomes D."""
    kind = choose(rng, list(CHANGES))
    while True:
        (a, c), (b, d), conditions = CHANGES[kind](rng, world, allow_held_out)
        pairs = {(item.shape, item.color) for scene in (b, d) for item in scene.objects}
        if all(conditions) and pairs <= set(world.pairs(allow_held_out)):
            return EditCase(kind, *drawing(choose(rng, REQUESTS), d, [a, b, c]), before=c, after=d)


def _all(scene: Scene, **looks: str) -> Scene:
    objects: tuple[Object, ...] = tuple(replace(item, **looks) for item in scene.objects)
    return replace(scene, objects=objects)
