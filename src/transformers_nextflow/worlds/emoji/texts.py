"""Tasks without input images: riddles of keywords, drawn after a thought or answered in words, and names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..conversations import answering, drawing, thinking
from .cases import PLAN_BEGIN, AnswerCase, DrawingCase
from .language import ON_BACKGROUND, STYLED, article, caption, grouped_items, with_article, write_caption
from .questions import names
from .requirement import Requirement
from .scene import MAX_COUNT, World, choose, random_scene


TIMES = {1: ("", "once "), 2: ("twice ", "a pair of "), 3: ("three times ",), 4: ("four times ",), 5: ("five times ",),
         6: ("six times ",)}  # fmt: skip
RIDDLES = ("something that goes with {}", "what has to do with {}", "what people call {}", "the emoji for {}")
GROUP_NAMES = {
    "faces": "a face", "people": "a person or a part of one", "animals": "an animal or a plant",
    "food": "something to eat or drink", "travel": "a place or a vehicle", "activities": "a thing for play and parties",
    "objects": "an object", "symbols": "a symbol", "flags": "a flag",
}  # fmt: skip
THOUGHT_SHARE = 0.75  # of the riddles that are drawn; the others are answered with an image only


@lru_cache(maxsize=8)
def keyword_index(world: World) -> dict[str, frozenset[str]]:
    """Keyword → the world's concepts that have it."""
    index = defaultdict(set)
    for concept in world.concepts:
        for word in world.art.concepts[concept].keywords:
            index[word].add(concept)
    return {word: frozenset(concepts) for word, concepts in index.items()}


def keyword_riddle(rng: np.random.Generator, world: World, concept: str) -> str | None:
    """At most three keywords that together only this concept has; `None` if there are none."""
    words, index = world.art.concepts[concept].keywords, keyword_index(world)
    # The words of its own name would give it away.
    own = {part for name in names(concept, world) for part in name.split(" ")}
    words = [word for word in words if not own & set(word.split(" "))]
    chosen, left = [], frozenset(world.concepts)
    for i in rng.permutation(len(words)):
        if index[words[i]] & left != left:
            chosen.append(words[i])
            left = left & index[words[i]]
        if left == {concept}:
            return " and ".join(chosen)
        if len(chosen) == 3:
            return None
    return None


def thinking_case(rng: np.random.Generator, world: World) -> DrawingCase:
    """A riddle, once or several times, most often with its thought before the image."""
    while True:
        count = 1 if rng.random() < 0.6 else int(rng.integers(2, MAX_COUNT + 1))
        scene = random_scene(rng, world, "single" if count == 1 else "count")
        concept, count = scene.concepts[0], len(scene.stickers)
        riddle = keyword_riddle(rng, world, concept)
        if riddle is None or any(s.color or s.tone or s.turn != "upright" for s in scene.stickers):
            continue
        kind = "riddle" if count == 1 else "count"
        styled = bool(rng.random() < STYLED)
        ground = scene.background if rng.random() < ON_BACKGROUND else None
        items = grouped_items(scene, world, color=None, tone=None)
        items = tuple(replace(item, style=item.style if styled else None) for item in items)
        requirement = Requirement(items, None, ground)
        text = choose(rng, ("", "draw ", "show ")) + choose(rng, TIMES[count]) + choose(rng, RIDDLES).format(riddle)
        text += f", {items[0].style} style" if styled else ""
        text += f" on {article(ground)} {ground} background" if ground else ""
        if rng.random() >= THOUGHT_SHARE:
            return DrawingCase(kind, *drawing(text, scene), requirement=requirement)
        plain = write_caption(None, requirement, world), caption(scene, world)
        exchange = thinking(text, PLAN_BEGIN.join(plain), scene)
        return DrawingCase(kind, *exchange, plain, requirement=requirement)


def text_case(rng: np.random.Generator, world: World) -> AnswerCase:
    """`riddle`: which emoji goes with keywords; `synonym`: another word; `group`: what kind of thing it is."""
    kind = choose(rng, ("riddle", "riddle", "synonym", "group"))
    while True:
        concept = choose(rng, world.concepts)
        own = names(concept, world)
        if kind == "group":
            question = f"what kind of thing is {with_article(own[0], own[0])}?"
            answer = GROUP_NAMES[world.art.concepts[concept].group]
            return AnswerCase(kind, *answering(question, answer), answers=(answer,))
        if kind == "synonym" and len(own) > 1:
            question = f"what is another word for {choose(rng, own[1:])}?"
            return AnswerCase(kind, *answering(question, own[0]), answers=own)
        riddle = keyword_riddle(rng, world, concept) if kind == "riddle" else None
        if riddle is not None:
            return AnswerCase(kind, *answering(f"which emoji goes with {riddle}?", own[0]), answers=own)
        if kind == "synonym" and all(len(names(c, world)) == 1 for c in world.concepts):
            kind = "group"
