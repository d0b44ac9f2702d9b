"""Short videos: an object moves cell by cell, takes another colour or grows, among others that do not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..conversations import answering, sequence
from .cases import AnswerCase, VideoCase
from .edits import named_objects
from .events import STEPS, STILL, exchange, grows, moves, name_of, next_size, step, turns
from .language import located_items, place_phrase, write_caption
from .requirement import Requirement
from .scene import Object, Scene, World, choose, random_scene
from .stories import NUMBERS, random_length


FIRST_GIVEN, COUNTED = 0.4, 0.5  # shares of the videos whose first frame, and whose length, the user gives


def video_kinds(world: World) -> tuple[str, ...]:
    """What an object can do in this world."""
    return ("moves", "turns", "grows") if len(world.sizes) > 1 else ("moves", "turns")


def _path(
    rng, scene: Scene, item: Object, kind: str, world: World, num_frames: int, allow_held_out: bool
) -> tuple[str, list[Object]] | None:
    """The event and the object in every frame; `None` if its way is not free or it already is the largest."""
    if kind == "moves":
        direction = choose(rng, list(STEPS))
        path = [step(item, direction, i) for i in range(num_frames)]
        taken = {other.cell for other in scene.objects if other is not item}
        free = all(o.cell in world.cells and o.cell not in taken for o in path)
        return (moves(item, direction), path) if free else None
    if kind == "turns":
        colors = [c for shape, c in world.pairs(allow_held_out) if shape == item.shape and c != item.color]
        changed, when = replace(item, color=choose(rng, colors)), int(rng.integers(1, num_frames))
        return turns(item, changed.color), [item if frame < when else changed for frame in range(num_frames)]
    path = [item]
    while len(path) < num_frames:
        path.append(next_size(path[-1], world))
    return (grows(item), path) if path[1] != item else None


def _random_video(rng, world: World, kind: str, num_frames: int, allow_held_out: bool):
    """(event, the object in every frame, frames, transitions)."""
    while True:
        scene = random_scene(rng, world, allow_held_out=allow_held_out)
        named = named_objects(scene)
        found = named and _path(rng, scene, choose(rng, named), kind, world, num_frames, allow_held_out)
        if found:
            event, path = found
            item = path[0]
            first = next(other for other in scene.objects if other == item)
            scenes = [exchange(scene, first, o) for o in path]
            transitions = [STILL if a == b else event for a, b in zip(path, path[1:])]
            return event, path, scenes, transitions


def video_example(
    rng: np.random.Generator,
    world: World,
    num_frames: int = 4,
    *,
    kind: str | None = None,
    allow_held_out: bool = False,
) -> tuple[str, list[Scene], list[str]]:
    """A caption, the video's `num_frames` scenes, and the `num_frames - 1` texts of what happens from one to the next.

    The caption says what is where at first and what changes; only the transitions say when a colour changes. Growth
    goes through the sizes one by one. `kind` is one of `video_kinds`, by default any. Raises `ValueError` for fewer
    than 2 frames, or more than the lattice has cells a side.
    """
    if not 2 <= num_frames <= world.lattice:
        raise ValueError(f"num_frames={num_frames}: videos of this world have 2 to {world.lattice} frames.")
    kind = kind or choose(rng, video_kinds(world))
    event, _, scenes, transitions = _random_video(rng, world, kind, num_frames, allow_held_out)
    return f"{_opening(rng, scenes[0], world)}. {event}", scenes, transitions


def video_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> VideoCase:
    """A video of 2 to 4 frames from its caption, or from its first frame and what happens."""
    kind, count = choose(rng, video_kinds(world)), random_length(rng)
    event, path, scenes, transitions = _random_video(rng, world, kind, count, allow_held_out)
    given = bool(rng.random() < FIRST_GIVEN)
    text = event if given else f"{_opening(rng, scenes[0], world)}. {event}"
    if rng.random() < COUNTED:
        text += f", in {NUMBERS[count]} frames"
    return VideoCase(
        kind, *sequence(text, scenes, transitions, given), frames=tuple(scenes), path=tuple(path), first_given=given
    )  # fmt: skip


def video_question_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> AnswerCase:
    """A question on the frames of a video, all of which are given."""
    kind = choose(rng, video_kinds(world))
    event, path, scenes, transitions = _random_video(rng, world, kind, random_length(rng), allow_held_out)
    return question_on_video(rng, world, event, path, scenes, transitions)


def question_on_video(
    rng, world: World, event: str, path: list[Object], scenes: list[Scene], transitions
) -> AnswerCase:
    """A question about a video, with its answer."""
    first, last = path[0], path[-1]
    asked = [
        ("event", "what happens?", event),
        ("frames", "how many frames are there?", str(len(scenes))),
        ("end", f"where is {name_of(first)} at the end?", place_phrase(None, last.cell, world)),
        ("what", "what changes?", name_of(first)),
        ("motion", "does anything move?", "yes" if first.cell != last.cell else "no"),
    ]
    if first.cell != last.cell:
        asked.append(("direction", f"which way does {name_of(first)} move?", event.split()[-1]))
    else:
        asked.append(("when", "in which frame does it change?", str(2 + transitions.index(event))))
        asked.append(("color", f"what color does {name_of(first)} have at the end?", last.color))
    kind, question, answer = choose(rng, asked)
    return AnswerCase(kind, *answering(question, answer, scenes))


def _opening(rng: np.random.Generator, scene: Scene, world: World) -> str:
    """The first scene with every object's place."""
    items = located_items(scene.objects, world)
    return write_caption(rng, Requirement(items, background=scene.background), world)
