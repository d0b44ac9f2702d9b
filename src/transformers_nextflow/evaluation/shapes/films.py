"""Short films: an object that moves cell by cell, or one that takes another colour, among others that rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .edits import exchange, named_objects
from .language import group_items, write_caption
from .requirement import Requirement
from .scene import Object, Scene, World, choose, random_scene


STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
STILL = "nothing changes"


def _motion(scene: Scene, item: Object, direction: str, world: World, num_frames: int) -> list[Scene] | None:
    """The frames of an object that moves one cell a frame; None where its way is not free."""
    down, right = STEPS[direction]
    path = [(item.row + down * i, item.column + right * i) for i in range(num_frames)]
    taken = {other.cell for other in scene.objects if other is not item}
    if any(cell in taken or cell not in world.cells for cell in path):
        return None
    return [exchange(scene, item, replace(item, row=row, column=column)) for row, column in path]


def film_example(
    rng: np.random.Generator, world: World, num_frames: int = 4, *, allow_held_out: bool = False
) -> tuple[str, list[Scene], list[str]]:
    """A caption, the film's `num_frames` scenes, and the `num_frames - 1` texts of what happens from one to the next.

    The caption says what is where at first and what changes; when a colour changes is only in the transitions. Films
    have from 2 frames to as many as the lattice has cells a side; otherwise ValueError.
    """
    if not 2 <= num_frames <= world.lattice:
        raise ValueError(f"num_frames={num_frames}: films of this world have 2 to {world.lattice} frames.")
    moves = bool(rng.random() < 0.5)
    while True:
        scene = random_scene(rng, world, allow_held_out=allow_held_out)
        named = named_objects(scene)
        if not named:
            continue
        item = choose(rng, named)
        name = f"the {item.color} {item.shape}"
        if moves:
            direction = choose(rng, list(STEPS))
            scenes = _motion(scene, item, direction, world, num_frames)
            if scenes is None:
                continue
            event, transitions = f"{name} moves {direction}", [f"{name} moves {direction}"] * (num_frames - 1)
        else:
            colors = [c for shape, c in world.pairs(allow_held_out) if shape == item.shape and c != item.color]
            color, when = choose(rng, colors), int(rng.integers(1, num_frames))
            changed = exchange(scene, item, replace(item, color=color))
            scenes = [scene if frame < when else changed for frame in range(num_frames)]
            event = f"{name} turns {color}"
            transitions = [event if frame == when else STILL for frame in range(1, num_frames)]
        return f"{_opening(rng, scene, world)}. {event}", scenes, transitions


def _opening(rng: np.random.Generator, scene: Scene, world: World) -> str:
    """The first scene with every object's place."""
    sized = len(world.sizes) > 1
    items = tuple(replace(group_items([o], color=True, size=sized)[0], cell=o.cell) for o in scene.objects)
    return write_caption(rng, Requirement(items, background=scene.background), world)
