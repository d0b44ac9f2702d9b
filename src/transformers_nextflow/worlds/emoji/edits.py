"""Instructions that turn one scene into another, each so exact that only one scene is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..conversations import drawing
from .cases import SceneCase
from .language import NUMBER_WORDS, item_phrase, name_of, plural, style_word
from .requirement import item_of
from .scene import (
    BACKGROUNDS,
    MAX_COUNT,
    TURNS,
    Scene,
    Sticker,
    World,
    choose,
    counted,
    random_scene,
    random_sticker,
)


Edit = tuple[str, Scene]
# Of a scene of two, where the second goes as seen from the first: grid, and the places of both.
BESIDE = {
    "on the left": ((1, 2), (0, 1), (0, 0)),
    "on the right": ((1, 2), (0, 0), (0, 1)),
    "at the top": ((2, 1), (1, 0), (0, 0)),
    "at the bottom": ((2, 1), (0, 0), (1, 0)),
}
CORNERS = {
    (0, 0): "in the top left corner",
    (0, 1): "in the top right corner",
    (1, 0): "in the bottom left corner",
    (1, 1): "in the bottom right corner",
}


def the(rng, scene: Scene, concept: str, world: World) -> str:
    """'the cat', 'the three cats'; 'it' or 'them' if there is nothing else."""
    count = sum(sticker.concept == concept for sticker in scene.stickers)
    if len(scene.concepts) == 1 and rng.random() < 0.3:
        return "it" if count == 1 else "them"
    name = name_of(rng, concept, world)
    return f"the {name if count == 1 else plural(name)}"


def with_all(scene: Scene, concept: str, change: Callable[[Sticker], Sticker | None]) -> Scene:
    """The scene with all stickers of a concept changed, or taken away by `None`."""
    changed = (change(sticker) if sticker.concept == concept else sticker for sticker in scene.stickers)
    return replace(scene, stickers=tuple(sticker for sticker in changed if sticker is not None))


def _add(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    new = random_sticker(rng, world, style=scene.style)
    if new.concept in scene.concepts:
        return None
    verb = choose(rng, ("add", "put", "draw"))
    if scene.grid == (1, 1):
        place = choose(rng, list(BESIDE))
        grid, old_cell, cell = BESIDE[place]
        after = replace(scene, grid=grid, stickers=(replace(scene.stickers[0], cell=old_cell), replace(new, cell=cell)))
    elif scene.grid == (2, 2) and scene.free_cells:
        cell = choose(rng, scene.free_cells)
        place, after = CORNERS[cell], replace(scene, stickers=(*scene.stickers, replace(new, cell=cell)))
    else:
        return None
    phrase = item_phrase(rng, item_of(new, world), world)
    return f"{verb} {phrase} {place}", after


def _remove(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    if len(scene.concepts) == 1:
        return None
    after = with_all(scene, concept, lambda sticker: None)
    if scene.grid in ((1, 2), (2, 1)):
        after = Scene((replace(after.stickers[0], cell=(0, 0)),), scene.background, (1, 1), scene.ratio)
    return f"{choose(rng, ('remove', 'delete', 'take away'))} {the(rng, scene, concept, world)}", after


def _replace(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    new = random_sticker(rng, world, style=scene.style)
    if new.concept in scene.concepts:
        return None
    after = with_all(scene, concept, lambda sticker: replace(new, cell=sticker.cell))
    count = sum(sticker.concept == concept for sticker in scene.stickers)
    phrase = item_phrase(rng, item_of(new, world, count=count), world)
    template = choose(rng, ("replace {} with {}", "turn {} into {}", "make {} {}"))
    return template.format(the(rng, scene, concept, world), phrase), after


def _move(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    if scene.grid != (2, 2) or not scene.free_cells or len(scene.concepts) < len(scene.stickers):
        return None
    cell = choose(rng, scene.free_cells)
    after = with_all(scene, concept, lambda sticker: replace(sticker, cell=cell))
    place = CORNERS[cell].removeprefix("in ")
    return f"move {the(rng, scene, concept, world)} to {place}", after


def _recolor(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    sticker = next(s for s in scene.stickers if s.concept == concept)
    colors = [color for color in world.colors_of(concept, sticker.style) if color != sticker.color]
    if not colors:
        return None
    color = choose(rng, colors)
    after = with_all(scene, concept, lambda sticker: replace(sticker, color=color))
    verb = choose(rng, ("make", "paint", "color"))
    return f"{verb} {the(rng, scene, concept, world)} {color}", after


def _tone(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    sticker = next(s for s in scene.stickers if s.concept == concept)
    tones = [tone for tone in world.drawing(concept, sticker.style).tones if tone != sticker.tone]
    if not tones:
        return None
    tone = choose(rng, tones)
    after = with_all(scene, concept, lambda sticker: replace(sticker, tone=tone))
    return f"give {the(rng, scene, concept, world)} {tone.replace('medium ', 'medium-')} skin", after


def _turn(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    sticker = next(s for s in scene.stickers if s.concept == concept)
    turn = choose(rng, [name for name in TURNS if name != sticker.turn])
    after = with_all(scene, concept, lambda sticker: replace(sticker, turn=turn))
    words = {"turned left": "turn {} left", "turned right": "turn {} right", "upside down": "turn {} upside down",
             "upright": "turn {} upright"}  # fmt: skip
    return words[turn].format(the(rng, scene, concept, world)), after


def _count(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    if len(scene.concepts) > 1 or len(scene.free_cells) > 2:
        return None
    count = choose(rng, [n for n in range(1, MAX_COUNT + 1) if n != len(scene.stickers)])
    stickers, grid = counted(scene.stickers[0], count)
    word = "one" if count == 1 else choose(rng, (NUMBER_WORDS[count], str(count)))
    text = choose(rng, ("make it {}", "{} of them", "show {}")).format(word)
    return text, replace(scene, stickers=stickers, grid=grid)


def _background(rng, scene: Scene, concept: str, world: World) -> Edit | None:
    color = choose(rng, [name for name in BACKGROUNDS if name != scene.background])
    text = choose(rng, ("make the background {}", "put it on {}", "{} background", "paint the ground {}"))
    return text.format(color), replace(scene, background=color)


EDITS = {
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "recolor": _recolor,
    "tone": _tone,
    "turn": _turn,
    "count": _count,
    "background": _background,
}


# For some edits the kinds of scenes of which one can be made; the others can be made of any.
SCENES = {
    "add": {"single", "small", "count", "mixed"},
    "remove": {"pair", "mixed"},
    "move": {"small", "mixed"},
    "count": {"single", "count"},
}


def edit_kinds(world: World) -> tuple[str, ...]:
    """The kinds of edits that are possible in this world."""
    without = {kind for kind, scenes in SCENES.items() if not scenes & world.kinds.keys()}
    without |= {"turn"} if world.plain else set()
    without |= set() if any(world.drawing(*pair).tones for pair in world.pairs) else {"tone"}
    without |= set() if any(world.colors_of(*pair) for pair in world.pairs) else {"recolor"}
    return tuple(kind for kind in EDITS if kind not in without)


def edit_of(rng: np.random.Generator, scene: Scene, kind: str, world: World) -> Edit | None:
    """An instruction for a given scene and the scene after it; `None` where it has nothing to edit in this way."""
    edit = EDITS[kind](rng, scene, choose(rng, scene.concepts), world)
    return None if edit is None or edit[1] == scene else edit


def edit_example(rng: np.random.Generator, world: World, kind: str) -> tuple[Scene, str, Scene]:
    """A scene, an instruction of a kind of `EDITS`, and the scene after it."""
    while True:
        scene = random_scene(rng, world, choose(rng, tuple(world.kinds)))
        edit = edit_of(rng, scene, kind, world)
        if edit is not None:
            return scene, *edit


def edit_case(rng: np.random.Generator, world: World) -> SceneCase:
    """An edit of an image."""
    kind = choose(rng, edit_kinds(world))
    before, instruction, after = edit_example(rng, world, kind)
    return SceneCase(kind, *drawing(instruction, after, [before]), after=after)


# --- Styles --------------------------------------------------------------------------------------------------------

STYLE_REQUESTS = ("the same in {}", "make it {} style", "in {} style", "turn it into {} style", "{} style")


def restyled(scene: Scene, style: str, world: World) -> Scene | None:
    """The scene in another style; `None` if the style lacks one of its drawings."""
    stickers = []
    for sticker in scene.stickers:
        if style not in world.styles_of(sticker.concept):
            return None
        if sticker.color and sticker.color not in world.colors_of(sticker.concept, style):
            return None
        if sticker.tone and sticker.tone not in world.drawing(sticker.concept, style).tones:
            return None
        stickers.append(replace(sticker, style=style))
    return replace(scene, stickers=tuple(stickers))


def style_case(rng: np.random.Generator, world: World) -> SceneCase:
    """`word`: the same in a style that is named; `example`: in the style of a second image."""
    kind = choose(rng, ("word", "word", "example"))
    while True:
        before = random_scene(rng, world)
        style = choose(rng, world.styles)
        after = restyled(before, style, world)
        if after is None or style == before.style:
            continue
        if kind == "word":
            text = choose(rng, STYLE_REQUESTS).format(style_word(rng, style))
            return SceneCase(kind, *drawing(text, after, [before]), after=after)
        example = Scene((random_sticker(rng, world, style=style),), choose(rng, list(BACKGROUNDS)))
        if example.concepts[0] not in before.concepts:
            text = choose(rng, ("the first in the style of the second", "draw the first like the second"))
            return SceneCase(kind, *drawing(text, after, [before, example]), after=after)
