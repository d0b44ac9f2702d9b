"""Stories of two or three images, with sentences between them that tell what happens (paper, section 5.4)."""

from __future__ import annotations

import numpy as np

from ..conversations import sequence
from .cases import StoryCase
from .edits import CORNERS, edit_kinds, edit_of
from .language import caption, write_caption
from .requirement import Requirement, item_of
from .scene import Scene, World, choose, random_scene


OPENINGS = ("a story in {} images: ", "tell a story in {} images: ", "{} images: ")
NUMBERS = {2: "two", 3: "three"}


def story_case(rng: np.random.Generator, world: World) -> StoryCase:
    """A story that the prompt tells: its first image in full, and then what is done to it."""
    count = choose(rng, list(NUMBERS))
    frames, sentences = [random_scene(rng, world)], []
    while len(frames) < count:
        edit = edit_of(rng, frames[-1], choose(rng, edit_kinds(world)), world)
        if edit is not None:
            sentences.append(edit[0])
            frames.append(edit[1])
    opening = choose(rng, OPENINGS).format(NUMBERS[count]) + _located(frames[0], world)
    prompt = ". then ".join([opening, *sentences])
    exchange = sequence(prompt, frames, sentences)
    return StoryCase(NUMBERS[count], *exchange, frames=tuple(frames), sentences=tuple(sentences))


def _located(scene: Scene, world: World) -> str:
    """A caption of a scene that gives all places: for different things in corners it names the corners."""
    if scene.grid != (2, 2) or len(scene.concepts) < len(scene.stickers):
        return caption(scene, world)
    items = tuple(item_of(sticker, world, place=CORNERS[sticker.cell]) for sticker in scene.stickers)
    return write_caption(None, Requirement(items, None, scene.background), world)
