"""Drawing from images: their subject in another scene, and the change that a pair of images shows applied to a
third.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..conversations import drawing
from .cases import DrawingCase, SceneCase
from .edits import restyled
from .language import NUMBER_WORDS, item_phrase, join_phrases
from .requirement import Requirement, item_of
from .scene import (
    BACKGROUNDS,
    MAX_COUNT,
    TURNS,
    Scene,
    Sticker,
    World,
    choose,
    counted,
    different,
    draw_share,
    random_sticker,
)


ONE, TWO = ("the same one", "this one", "it"), ("the first one", "the second one")
SUBJECT_KINDS = ("background", "count", "relation", "two")
ON_BACKGROUND = 0.6
SIDES = {"left": ((1, 2), (0, 0), (0, 1)), "right": ((1, 2), (0, 1), (0, 0)),
         "above": ((2, 1), (0, 0), (1, 0)), "below": ((2, 1), (1, 0), (0, 0))}  # fmt: skip


def subject_case(rng: np.random.Generator, world: World) -> DrawingCase:
    """The subject with another `background`, with a `count`, in a `relation` to another thing, or `two` of two
    images.
    """
    kind = choose(rng, SUBJECT_KINDS)
    first, second = different(rng, world, 2)
    ground = choose(rng, list(BACKGROUNDS))
    asked = ground if kind == "background" or rng.random() < ON_BACKGROUND else None
    relation = choose(rng, list(SIDES)) if kind in ("relation", "two") else None
    if relation:
        grid, *cells = SIDES[relation]
        stickers = tuple(replace(s, cell=cell) for s, cell in zip((first, second), cells))
        items = (item_of(first, world), item_of(second, world))
        other = TWO[1] if kind == "two" else item_phrase(rng, items[1], world)
        phrases = [TWO[0] if kind == "two" else choose(rng, ONE), other]
    else:
        count = int(rng.integers(2, MAX_COUNT + 1)) if kind == "count" else 1
        stickers, grid = counted(first, count)
        items = (item_of(first, world, count=count),)
        number = NUMBER_WORDS.get(count, "")
        phrases = [f"{choose(rng, (number, str(count)))} of {choose(rng, ('these', 'them'))}"]
        phrases = phrases if kind == "count" else [choose(rng, ONE)]
    shown = [_portrait(rng, sticker) for sticker in ((first, second) if kind == "two" else (first,))]
    scene = Scene(stickers, ground, grid)
    text = join_phrases(rng, phrases, relation, asked)
    return DrawingCase(kind, *drawing(text, scene, shown), requirement=Requirement(items, relation, asked))


def _portrait(rng, sticker: Sticker) -> Scene:
    return Scene((replace(sticker, cell=(0, 0)),), choose(rng, list(BACKGROUNDS)))


# --- In context ------------------------------------------------------------------------------------------------------

REQUESTS = ("do the same with the last image", "now this one", "change it in the same way", "go on like this")


def _style(rng, a: Scene, c: Scene, world: World):
    style = choose(rng, world.styles)
    return None if style == a.style else (restyled(a, style, world), restyled(c, style, world))


def _turn(rng, a: Scene, c: Scene, world: World):
    if world.plain:
        return None
    turn = choose(rng, list(TURNS))
    return tuple(replace(s, stickers=tuple(replace(x, turn=turn) for x in s.stickers)) for s in (a, c))


def _background(rng, a: Scene, c: Scene, world: World):
    ground = choose(rng, list(BACKGROUNDS))
    return replace(a, background=ground), replace(c, background=ground)


def _count(rng, a: Scene, c: Scene, world: World):
    count = int(rng.integers(2, MAX_COUNT + 1))
    grown = (counted(scene.stickers[0], count) for scene in (a, c))
    return tuple(replace(s, stickers=stickers, grid=grid) for s, (stickers, grid) in zip((a, c), grown))


def _recolor(rng, a: Scene, c: Scene, world: World):
    (first,), (second,) = a.stickers, c.stickers
    both = [
        x for x in world.colors_of(first.concept, first.style) if x in world.colors_of(second.concept, second.style)
    ]
    both = [color for color in both if color not in (first.color, second.color)]
    if not both:
        return None
    color = choose(rng, both)
    return tuple(replace(s, stickers=(replace(s.stickers[0], color=color),)) for s in (a, c))


CHANGES = {"style": _style, "turn": _turn, "background": _background, "count": _count, "recolor": _recolor}
SHARES = dict(zip(CHANGES, (0.4, 0.15, 0.15, 0.15, 0.15)))


def analogy_case(rng: np.random.Generator, world: World) -> SceneCase:
    """Images A, B, C with a short text, and D: A becomes B as C becomes D. A and C have one style and one ground."""
    while True:
        kind = draw_share(rng, SHARES)
        first, ground = random_sticker(rng, world), choose(rng, list(BACKGROUNDS))
        second = random_sticker(rng, world, style=first.style)
        a, c = (Scene((sticker,), ground) for sticker in (first, second))
        changed = None if first.concept == second.concept else CHANGES[kind](rng, a, c, world)
        if changed is None or None in changed or changed[0] == a or changed[1] == c:
            continue
        b, d = changed
        return SceneCase(kind, *drawing(choose(rng, REQUESTS), d, [a, b, c]), after=d)
