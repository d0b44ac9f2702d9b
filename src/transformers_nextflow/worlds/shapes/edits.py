"""Instructions that turn one scene into another, each so exact that only one scene is right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from ..conversations import drawing
from .cases import EditCase, key_of, layout
from .events import exchange
from .language import item_phrase, place_phrase
from .requirement import Item
from .scene import Object, Scene, World, choose, random_object, random_scene


Edit = tuple[str, Scene]


def named_objects(scene: Scene) -> list[Object]:
    """The objects that a phrase such as 'the red circle' identifies in their scene."""
    counts = Counter((item.shape, item.color) for item in scene.objects)
    return [item for item in scene.objects if counts[item.shape, item.color] == 1]


def free_cell(rng, scene: Scene, world: World) -> tuple[int, int]:
    """An empty cell (row, column)."""
    taken = {item.cell for item in scene.objects}
    return choose(rng, [cell for cell in world.cells if cell not in taken])


def _noun_phrase(rng, item: Object, world: World, *, place: bool = False) -> str:
    size = item.size if len(world.sizes) > 1 else None
    return item_phrase(rng, Item(item.shape, item.color, size, item.cell if place else None), world)


def _add(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    new = random_object(rng, world, free_cell(rng, scene, world), allow_held_out=allow_held_out)
    verb = choose(rng, ("add", "draw", "put"))
    return f"{verb} {_noun_phrase(rng, new, world, place=True)}", exchange(scene, None, new)


def _remove(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    return f"{choose(rng, ('remove', 'delete', 'erase'))} the {item.color} {item.shape}", exchange(scene, item, None)


def _recolor(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    pairs = world.pairs(allow_held_out)
    color = choose(rng, [color for shape, color in pairs if shape == item.shape and color != item.color])
    verb = choose(rng, ("make", "paint", "color"))
    return f"{verb} the {item.color} {item.shape} {color}", exchange(scene, item, replace(item, color=color))


def _replace(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    new = replace(random_object(rng, world, item.cell, allow_held_out=allow_held_out), offset=item.offset)
    template = choose(rng, ("replace the {} {} with {}", "turn the {} {} into {}"))
    return template.format(item.color, item.shape, _noun_phrase(rng, new, world)), exchange(scene, item, new)


def _move(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    row, column = free_cell(rng, scene, world)
    text = f"{choose(rng, ('move', 'place'))} the {item.color} {item.shape} {place_phrase(rng, (row, column), world)}"
    return text, exchange(scene, item, replace(item, row=row, column=column))


def _background(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    color = choose(rng, [name for name in world.background_palette if name != scene.background])
    verb = choose(rng, ("make", "paint", "turn"))
    return f"{verb} the background {color}", Scene(scene.objects, color)


def _resize(rng, scene: Scene, item: Object, world: World, allow_held_out: bool) -> Edit:
    size = choose(rng, [name for name in world.palette_of_sizes if name != item.size])
    return f"make the {item.color} {item.shape} {size}", exchange(scene, item, replace(item, size=size))


EDITS = {
    "add": _add,
    "remove": _remove,
    "recolor": _recolor,
    "move": _move,
    "replace": _replace,
    "background": _background,
    "resize": _resize,
}


def edit_kinds(world: World) -> tuple[str, ...]:
    """The kinds of edits that are possible in this world."""
    return tuple(kind for kind in EDITS if kind != "resize" or len(world.sizes) > 1)


def edit_of(rng, before: Scene, kind: str, world: World, allow_held_out: bool = False) -> Edit | None:
    """An instruction for a given scene and the scene after it; None where the scene has nothing to edit in this way."""
    named, count = named_objects(before), len(before.objects)
    if not named or (kind == "remove" and count == 1) or (kind == "add" and count == world.max_objects):
        return None
    instruction, after = EDITS[kind](rng, before, choose(rng, named), world, allow_held_out)
    return None if after == before else (instruction, after)


def edit_example(
    rng: np.random.Generator, world: World, kind: str | None = None, *, allow_held_out: bool = False
) -> tuple[Scene, str, Scene]:
    """A scene, an instruction and the scene after it; `kind` of `EDITS`, by default any, uniformly.

    What the instruction does not name stays as it is, and a scene never becomes empty nor holds more than max_objects.
    """
    kind = kind or choose(rng, edit_kinds(world))
    while True:
        before = random_scene(rng, world, allow_held_out=allow_held_out)
        edit = edit_of(rng, before, kind, world, allow_held_out)
        if edit is not None:
            return before, *edit


def edit_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> EditCase:
    """An edit of an image."""
    kind = choose(rng, edit_kinds(world))
    before, instruction, after = edit_example(rng, world, kind, allow_held_out=allow_held_out)
    return EditCase(kind, *drawing(instruction, after, [before]), before=before, after=after)


def follow_up_edit(rng: np.random.Generator, world: World, before: Scene) -> EditCase | None:
    """An edit of the last image of a conversation, for which the user gives only the instruction."""
    kind = choose(rng, edit_kinds(world))
    edit = edit_of(rng, before, kind, world)
    if edit is None:
        return None
    key = key_of((before, edit[0]), world)
    return EditCase(kind, *drawing(*edit), drawn_from=(key,), before=before, after=edit[1])


def changed_region(before: Scene, after: Scene, world: World) -> np.ndarray:
    """The cells in which two scenes differ, as pixels: (canvas, canvas) bool; all if the background differs."""
    a, b = layout(before), layout(after)
    repainted = before.background != after.background
    cells = [[repainted or a.get((row, col)) != b.get((row, col)) for col in range(world.lattice)]
             for row in range(world.lattice)]  # fmt: skip
    return np.kron(np.array(cells), np.ones((world.cell_size, world.cell_size), dtype=bool))
