"""Implicit prompts, and the thoughts that state plainly what to draw (paper, section 6.4).

Every prompt takes two or more steps: shapes by what they look like, colours by things, numbers by comparison or sums,
places by their neighbours, relations of things that are paraphrased; in one kind each step needs the one before: an
object that changes several times. The thought goes through such steps one by one, says what is asked for as an ordinary
caption, and then says what goes where, thing by thing in the order of the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..conversations import drawing, thinking
from .cases import PLAN_BEGIN, THOUGHT_STEP_END, DrawingCase
from .language import (
    NUMBERS,
    RELATION_TEMPLATES,
    corners,
    group_items,
    item_phrase,
    located_items,
    plural,
    write_caption,
)
from .requirement import RELATIONS, Item, Requirement
from .scene import Object, Scene, World, choose, random_background, random_cells, random_object


COLORED_LIKE = {
    "red": ("a tomato", "a strawberry", "blood", "a cherry"),
    "green": ("grass", "a frog", "a leaf", "a cucumber"),
    "blue": ("the sea", "the clear sky", "a sapphire", "a blueberry"),
    "yellow": ("a lemon", "the sun", "a banana", "a canary"),
    "purple": ("a plum", "a violet", "lavender", "an eggplant"),
    "orange": ("a carrot", "a pumpkin", "a tangerine", "an apricot"),
}
MIXED_OF = {"green": ("blue", "yellow"), "purple": ("red", "blue"), "orange": ("red", "yellow")}
GROUND_LIKE = {"white": ("snow", "milk", "salt"), "black": ("coal", "soot", "the night")}
SHAPED_LIKE = {
    "circle": ("round shape without a hole", "shape of a coin", "shape of the full moon"),
    "square": ("shape with four sides", "shape with four corners", "shape of a chessboard"),
    "triangle": ("shape with three sides", "shape with three corners", "shape of a tent"),
    "star": ("shape with five points", "shape that shines at night", "shape on a sheriff's badge"),
    "cross": ("shape of a plus sign", "shape of two crossing bars", "shape with twelve corners"),
    "ring": ("round shape with a hole", "shape of a doughnut", "shape of a wheel without spokes"),
}
COUNTED_LIKE = {
    1: ("a face has noses", "a snail has feet"),
    2: ("a bird has legs", "a bicycle has wheels", "a face has eyes"),
    3: ("a triangle has sides", "a tricycle has wheels", "a traffic light has lamps"),
    4: ("a square has corners", "a car has wheels", "a horse has legs"),
}
OPENINGS = ("", "draw ", "show ", "paint ")
THOUGHT_SHARE = 0.75  # of the prompts that are answered with a thought and an image; the others with only an image
COLORED, ON_BACKGROUND = 0.6, 0.3
CHANGES = (2, 3, 4, 5, 6)  # how many changes of one object a prompt tells


def color_phrase(rng: np.random.Generator, color: str) -> str:
    """'in the color of grass', 'in the color that blue and yellow make'."""
    if color in MIXED_OF and rng.random() < 0.25:
        return "in the color that {} and {} make".format(*MIXED_OF[color])
    return f"in the color of {choose(rng, COLORED_LIKE[color])}"


def shape_phrase(rng: np.random.Generator, shape: str, count: int = 1) -> str:
    """'shape with three sides', in the plural 'shapes with three sides'."""
    phrase = choose(rng, SHAPED_LIKE[shape])
    if count > 1:
        phrase = phrase.replace("shape", "shapes", 1).replace("that shines", "that shine")
    return phrase


def number_phrase(rng: np.random.Generator, number: int) -> str | None:
    """'as many … as a bird has legs', with a gap for the noun, or a sum."""
    if number in COUNTED_LIKE and rng.random() < 0.6:
        return "as many {} as " + choose(rng, COUNTED_LIKE[number])
    if number >= 2 and rng.random() < 0.5:
        first = int(rng.integers(1, number))
        return f"{_word(first)} plus {_word(number - first)} {{}}"
    taken = int(rng.integers(1, 5))
    return f"{_word(number + taken)} minus {_word(taken)} {{}}"


def comparison_phrase(rng: np.random.Generator, number: int, than: int, noun: str, other: str) -> str:
    """How many there are of one thing by how many there are of another: 'one more circle than squares'."""
    options = []
    if number == than:
        options.append(f"as many {noun} as {other}")
    elif number > than:
        options.append(f"{_word(number - than)} more {noun} than {other}")
    else:
        options.append(f"{_word(than - number)} fewer {noun} than {other}")
    options += [f"{how} as many {noun} as {other}" for factor, how in ((2, "twice"), (3, "three times"))
                if number == factor * than]  # fmt: skip
    if 2 * number == than:
        options.append(f"half as many {noun} as {other}")
    return choose(rng, options)


def place_riddle(rng: np.random.Generator, cell: tuple[int, int], world: World) -> str:
    """'in the row below row 1 and the column left of column 3', 'in the corner opposite of the top left'."""
    named = corners(world)
    if cell in named and rng.random() < 0.5:
        last = world.lattice - 1
        return f"in the corner opposite of the {named[last - cell[0], last - cell[1]]}"
    return f"in {_neighbour(rng, cell[0], 'row', ('below', 'above'), world)} and " + _neighbour(
        rng, cell[1], "column", ("right of", "left of"), world
    )


def _neighbour(rng, index: int, line: str, sides: tuple[str, str], world: World) -> str:
    after = index > 0 and (index == world.lattice - 1 or rng.random() < 0.5)
    side, other = (sides[0], index - 1) if after else (sides[1], index + 1)
    return f"the {line} {side} {line} {other + 1}"


def _word(number: int) -> str:
    return "one" if number == 1 else NUMBERS[number][0] if number in NUMBERS else str(number)


# --- Kinds of prompts ------------------------------------------------------------------------------------------------


class Riddle(NamedTuple):
    """A text, its requirement, objects that fulfil it, and the steps from the text to the requirement."""

    text: str
    items: tuple[Item, ...]
    objects: Sequence[Object]
    relation: str | None = None
    steps: tuple[str, ...] = ()


class ImplicitPrompt(NamedTuple):
    """A prompt, its requirement, a scene that fulfils it, and the steps of a thought."""

    text: str
    requirement: Requirement
    scene: Scene
    steps: tuple[str, ...]


def _riddle(rng, world: World, allow_held_out: bool):
    """One or two objects whose shapes and colours are paraphrased."""
    cells = sorted(random_cells(rng, world, int(rng.integers(1, 3))))
    objects = [random_object(rng, world, cell, allow_held_out=allow_held_out) for cell in cells]
    while len(objects) == 2 and (objects[0].shape, objects[0].color) == (objects[1].shape, objects[1].color):
        objects[1] = random_object(rng, world, cells[1], allow_held_out=allow_held_out)
    phrases = [f"the {shape_phrase(rng, item.shape)} {color_phrase(rng, item.color)}" for item in objects]
    return Riddle(" and ".join(phrases), group_items(objects, color=True, size=False), objects)


def _comparison(rng, world: World, allow_held_out: bool):
    """Two shapes, the number of one by that of the other, whose own number is said or paraphrased."""
    total = int(rng.integers(2, world.max_objects + 1))
    first = int(rng.integers(1, total))
    objects, items = _groups(rng, world, (first, total - first), allow_held_out)
    noun, other = (plural(item.shape) for item in items)
    if rng.random() < 0.5 or first > 4:
        base = item_phrase(rng, replace(items[0], color=None), world)
    else:
        base = f"as many {noun} as {choose(rng, COUNTED_LIKE[first])}"
    if items[0].color:
        base += f" {color_phrase(rng, items[0].color)}"
    more = total - first - first == 1
    compared = comparison_phrase(rng, total - first, first, items[1].shape if more else other, noun)
    if items[1].color:
        compared += f" {color_phrase(rng, items[1].color)}"
    return Riddle(f"{base} and {compared}", items, objects)


def _sum(rng, world: World, allow_held_out: bool):
    """Several of one kind: their number, shape and colour are paraphrased."""
    count = int(rng.integers(2, world.max_objects + 1))
    objects, (item,) = _groups(rng, world, (count,), allow_held_out)
    noun = shape_phrase(rng, item.shape, 2) if rng.random() < 0.5 or not item.color else plural(item.shape)
    text = number_phrase(rng, count).format(noun)
    return Riddle(text + (f", all {color_phrase(rng, item.color)}" if item.color else ""), (item,), objects)


def _changes(rng, world: World, allow_held_out: bool):
    """One object, described by several changes of another object; some changes do not apply to what it is by then."""
    allowed = world.pairs(allow_held_out)
    values = {"shape": world.shapes, "color": tuple(world.palette)}
    look = dict(zip(values, choose(rng, allowed)))
    first, told, steps = item_phrase(None, Item(**look), world), [], []
    were: dict[str, list[str]] = {"shape": [], "color": []}
    for number in range(1, choose(rng, CHANGES) + 1):
        attribute = choose(rng, list(values))
        now, others = look[attribute], [value for value in values[attribute] if value != look[attribute]]
        if rng.random() < 0.5:
            before = now
            after = choose(rng, [o for o in others if tuple((look | {attribute: o}).values()) in allowed])
            look[attribute] = after
            were[attribute].append(now)
        else:
            # Attributes that it had before mislead more than those that it never had.
            before = choose(rng, [o for o in were[attribute] if o != now] or others)
            after = choose(rng, [value for value in values[attribute] if value != before])
        told.append(f"{before} turns {after}")
        steps.append(f"{number}) {told[-1]}, now {item_phrase(None, Item(**look), world)}")
    item = random_object(rng, world, choose(rng, world.cells), **look, allow_held_out=allow_held_out)
    listed = ", ".join(f"{number}) {change}" for number, change in enumerate(told, start=1))
    return Riddle(f"{first} after {listed}", (Item(**look),), [item], steps=tuple(steps))


def _place(rng, world: World, allow_held_out: bool):
    """One object at a paraphrased place, its shape or its colour paraphrased too."""
    item = random_object(rng, world, choose(rng, world.cells), allow_held_out=allow_held_out)
    if rng.random() < 0.5:
        noun = f"the {shape_phrase(rng, item.shape)} {color_phrase(rng, item.color)}"
    else:
        noun = f"{item_phrase(rng, Item(item.shape), world)} {color_phrase(rng, item.color)}"
    items = (Item(item.shape, item.color, cell=item.cell),)
    return Riddle(f"{noun} {place_riddle(rng, item.cell, world)}", items, [item])


def _relation(rng, world: World, allow_held_out: bool):
    """Two objects, paraphrased, of which one lies on a side of the other."""
    objects, _ = _groups(rng, world, (1, 1), allow_held_out)
    items = group_items(objects, color=True, size=False)
    relation = choose(rng, list(RELATIONS))
    while not RELATIONS[relation](*objects):
        objects = [replace(o, row=r, column=c) for o, (r, c) in zip(objects, random_cells(rng, world, 2))]
    first, second = (f"the {shape_phrase(rng, item.shape)} {color_phrase(rng, item.color)}" for item in items)
    return Riddle(first + choose(rng, RELATION_TEMPLATES[relation]) + second, items, objects, relation)


def _groups(rng, world: World, counts: tuple[int, ...], allow_held_out: bool) -> tuple[list[Object], tuple[Item, ...]]:
    """Groups of equal shapes, each of another shape, some of one colour; their items in the order of `counts`.

    They follow each other in reading order, so that a plan that names them in turn never comes back to a cell.
    """
    cells = sorted(random_cells(rng, world, sum(counts)))
    objects: list[Object] = []
    items: list[Item] = []
    for count in counts:
        first = random_object(rng, world, cells[len(objects)], allow_held_out=allow_held_out)
        while first.shape in [item.shape for item in items]:
            first = random_object(rng, world, first.cell, allow_held_out=allow_held_out)
        color = first.color if rng.random() < COLORED else None
        objects.append(first)
        for _ in range(count - 1):
            cell = cells[len(objects)]
            objects.append(random_object(rng, world, cell, first.shape, color, allow_held_out=allow_held_out))
        items.append(Item(first.shape, color, count=count))
    return objects, tuple(items)


RIDDLES = {
    "riddle": _riddle,
    "comparison": _comparison,
    "sum": _sum,
    "changes": _changes,
    "place": _place,
    "relation": _relation,
}
# How often each kind is asked for: kinds with the most steps are the hardest to learn.
SHARES = dict(zip(RIDDLES, (0.14, 0.22, 0.12, 0.26, 0.13, 0.13)))


def implicit_prompt(
    rng: np.random.Generator, world: World, kind: str, *, allow_held_out: bool = False
) -> ImplicitPrompt:
    """A prompt of one kind of `RIDDLES`."""
    text, items, objects, relation, steps = RIDDLES[kind](rng, world, allow_held_out)
    scene = Scene(tuple(objects), random_background(rng, world))
    ground = scene.background if rng.random() < ON_BACKGROUND else None
    if ground:
        text += f", on a background like {choose(rng, GROUND_LIKE[ground])}"
    return ImplicitPrompt(choose(rng, OPENINGS) + text, Requirement(items, relation, ground), scene, steps)


def random_kind(rng: np.random.Generator) -> str:
    """One of `RIDDLES` by its share."""
    return str(rng.choice(list(SHARES), p=list(SHARES.values())))


def spell_out(requirement: Requirement, world: World, steps: Sequence[str] = ()) -> str:
    """The steps, and then the requirement as an ordinary caption."""
    return THOUGHT_STEP_END.join((*steps, write_caption(None, requirement, world)))


def plan_of(requirement: Requirement, scene: Scene, world: World) -> str:
    """A full caption of a scene that fulfils a requirement, its objects in the order in which they are asked for."""
    order = {o: next(i for i, item in enumerate(requirement.items) if item.matches(o)) for o in scene.objects}
    planned = Requirement(located_items(sorted(scene.objects, key=order.get), world), background=scene.background)
    return write_caption(None, planned, world)


def thinking_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> DrawingCase:
    """An implicit prompt, most often with its thought before the image."""
    kind = random_kind(rng)
    prompt = implicit_prompt(rng, world, kind, allow_held_out=allow_held_out)
    case = DrawingCase(kind, *drawing(prompt.text, prompt.scene), requirement=prompt.requirement)
    thoughtful = think_first(case, world, prompt.steps)
    return thoughtful if rng.random() < THOUGHT_SHARE else replace(thoughtful, answer=case.answer)


def think_first(case: DrawingCase, world: World, steps: Sequence[str] = ()) -> DrawingCase:
    """The same case with a thought before the image, which says plainly what is asked for and where it goes."""
    (prompt,), (scene,) = case.exchange
    plan = plan_of(case.requirement, scene, world)
    exchange = thinking(prompt, spell_out(case.requirement, world, steps) + PLAN_BEGIN + plan, scene)
    drawn_from = (spell_out(case.requirement, world), plan)
    return replace(case, asked=exchange.asked, answer=exchange.answer, drawn_from=drawn_from)
