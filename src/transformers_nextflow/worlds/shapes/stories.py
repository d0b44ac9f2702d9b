"""Stories: images with sentences between them that tell what happens (paper, section 5.4).

The prompt tells the whole story, which the model then shows, or only its first image: then the model invents the rest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..conversations import sequence
from .cases import StoryCase
from .edits import free_cell, named_objects
from .events import apply_event, background_turns, comes, goes_to, leaves, turns
from .language import caption, located_caption
from .scene import Scene, World, choose, random_object, random_scene


EVENTS = ("comes", "leaves", "turns", "goes_to", "background")
NUMBERS = {2: "two", 3: "three", 4: "four"}
LENGTHS = (0.3, 0.5, 0.2)  # shares of stories and videos of 2, 3 and 4 images
OPENINGS = ("a story in {number} pictures", "tell a story in {number} pictures", "show a story of {number} pictures")


def random_length(rng: np.random.Generator) -> int:
    """How many frames a story has."""
    return int(rng.choice(list(NUMBERS), p=LENGTHS))


def _event(rng, scene: Scene, world: World, allow_held_out: bool) -> str | None:
    """Something that can happen in a scene; None where the chosen kind cannot."""
    kind, named = choose(rng, EVENTS), named_objects(scene)
    if kind == "background":
        return background_turns(choose(rng, [name for name in world.background_palette if name != scene.background]))
    if kind == "comes":
        new = random_object(rng, world, free_cell(rng, scene, world), allow_held_out=allow_held_out)
        return comes(new, world) if len(scene.objects) < world.max_objects else None
    if not named or (kind == "leaves" and len(scene.objects) == 1):
        return None
    item = choose(rng, named)
    if kind == "leaves":
        return leaves(item)
    if kind == "goes_to":
        return goes_to(item, free_cell(rng, scene, world))
    colors = [color for shape, color in world.pairs(allow_held_out) if shape == item.shape and color != item.color]
    return turns(item, choose(rng, colors))


def story_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> StoryCase:
    """A story of 2 to 4 images; `told`: the prompt says what happens, `free`: it gives the beginning."""
    kind, count = choose(rng, ("told", "free")), random_length(rng)
    frames = [random_scene(rng, world, int(rng.integers(1, 4)), allow_held_out=allow_held_out)]
    frames[0] = replace(frames[0], objects=tuple(replace(item, offset=(0, 0)) for item in frames[0].objects))
    sentences: list[str] = []
    while len(frames) < count:
        sentence = _event(rng, frames[-1], world, allow_held_out)
        if sentence is not None:
            sentences.append(sentence)
            frames.append(apply_event(sentence, frames[-1], world))
    # The events of a told story name places, which may be occupied already if the prompt does not say what is where.
    located = kind == "told" or bool(rng.random() < 0.5)
    opening = located_caption(frames[0], world) if located else caption(None, frames[0], world)
    prompt = f"{choose(rng, OPENINGS).format(number=NUMBERS[count])}: {opening}"
    if kind == "told":
        prompt = ". then ".join([prompt, *sentences])
    events = tuple(sentences) if kind == "told" else None
    return StoryCase(
        kind, *sequence(prompt, frames, sentences), opening=frames[0], located=located, events=events, num_frames=count
    )  # fmt: skip
