"""Questions about scenes with answers of one word.

Relations are answered in two steps: first where both things are, and then the word. `verdict` gives the word.

A kind of question is a function `(rng, world, allow_held_out, given)`: with a `given` scene it asks about that scene,
and returns `None` if no question of the kind is possible; without one it makes a scene such that all answers are
equally frequent.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from .language import CELL_TEMPLATES, article, place_phrase, plural
from .requirement import RELATIONS
from .scene import Object, Scene, World, choose, random_background, random_cells, random_object, random_scene


Example = tuple[Scene, str, str]

RELATION_PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
STEPS_END = ": "


def verdict(answer: str) -> str:
    """The final word of an answer, in small letters, without the steps before it."""
    return answer.rpartition(STEPS_END)[2].strip().lower()


def _scene_where(rng, world: World, accept, allow_held_out: bool, given: Scene | None, least: int = 1) -> Scene | None:
    """The given scene, or a random one of at least `least` objects; one that `accept` takes, None if the given is not.

    `accept` returns something true for a scene that can be asked about.
    """
    if given is not None:
        return given if accept(given) else None
    while True:
        count = int(rng.integers(least, world.max_objects + 1))
        scene = random_scene(rng, world, count, allow_held_out=allow_held_out)
        if accept(scene):
            return scene


def _unique(scene: Scene, attribute: str) -> list[Object]:
    """The objects whose shape (or colour) no other object of the scene has."""
    counts = Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, attribute)] == 1]


def how_many(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example:
    """Every number from 0 to max_objects is equally frequent where things of one shape or colour are counted."""
    attribute = choose(rng, ("shape", "color", "any"))
    if attribute == "any":
        scene = given or random_scene(rng, world, allow_held_out=allow_held_out)
        noun, number = choose(rng, ("objects", "things")), len(scene.objects)
    else:
        values = world.shapes if attribute == "shape" else list(world.palette)
        if given is not None and rng.random() < 0.7:  # otherwise most of the answers were 0
            values = [getattr(item, attribute) for item in given.objects]
        value = choose(rng, values)
        scene = given or _scene_with_number(rng, world, attribute, value, allow_held_out)
        number = sum(getattr(item, attribute) == value for item in scene.objects)
        noun = plural(value) if attribute == "shape" else f"{value} {choose(rng, ('objects', 'things'))}"
    return scene, choose(rng, ("how many {} are there?", "how many {} can you see?")).format(noun), str(number)


def _scene_with_number(rng, world: World, attribute: str, value: str, allow_held_out: bool) -> Scene:
    """A scene in which the number of objects with this value is uniform from 0 to max_objects."""
    number = int(rng.integers(world.max_objects + 1))
    total = int(rng.integers(max(number, 1), world.max_objects + 1))
    objects = []
    for i, cell in enumerate(random_cells(rng, world, total)):
        item = random_object(rng, world, cell, allow_held_out=allow_held_out, **{attribute: value})
        while (getattr(item, attribute) == value) != (i < number):
            item = random_object(rng, world, cell, allow_held_out=allow_held_out)
        objects.append(item)
    return Scene(tuple(objects), random_background(rng, world))


def what_color(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example | None:
    """A question about the colour of an object."""
    scene = _scene_where(rng, world, lambda scene: _unique(scene, "shape"), allow_held_out, given)
    if scene is None:
        return None
    item = choose(rng, _unique(scene, "shape"))
    return scene, choose(rng, ("what color is the {}?", "which color does the {} have?")).format(item.shape), item.color


def what_shape(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example | None:
    """A question about the shape of an object."""
    scene = _scene_where(rng, world, lambda scene: _unique(scene, "color"), allow_held_out, given)
    if scene is None:
        return None
    item = choose(rng, _unique(scene, "color"))
    wordings = ("what shape is the {} one?", "what shape is the {} object?", "which shape is {}?")
    return scene, choose(rng, wordings).format(item.color), item.shape


def what_is_where(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example:
    """A question about what lies at a place."""
    scene = given or random_scene(rng, world, allow_held_out=allow_held_out)
    item = choose(rng, scene.objects)
    place = place_phrase(rng, item.cell, world)
    if rng.random() < 0.5:
        return scene, f"what shape is {place}?", item.shape
    return scene, f"what color is the object {place}?", item.color


def is_there(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example | None:
    """Yes and no are equally frequent; half of the no's name a shape and a colour that the scene holds apart."""
    yes = bool(rng.random() < 0.5)
    near = not yes and rng.random() < 0.5

    def candidates(scene: Scene) -> list[tuple[str, str]]:
        present = {(item.shape, item.color) for item in scene.objects}
        shapes, colors = {shape for shape, _ in present}, {color for _, color in present}
        apart = [p for p in world.pairs(allow_held_out) if not near or (p[0] in shapes and p[1] in colors)]
        return [p for p in apart if (p in present) == yes]

    scene = _scene_where(rng, world, candidates, allow_held_out, given)
    if scene is None:
        return None
    shape, color = choose(rng, candidates(scene))
    wordings = ("is there {} {} {}?", "can you see {} {} {}?", "does the picture show {} {} {}?")
    return scene, choose(rng, wordings).format(article(color), color, shape), "yes" if yes else "no"


def is_related(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example | None:
    """Yes and no are equally frequent. Asked for only the word, a small model guesses, though it knows both places."""
    yes, relation = bool(rng.random() < 0.5), choose(rng, list(RELATIONS))

    def candidates(scene: Scene) -> list[tuple[Object, Object]]:
        unique = _unique(scene, "shape")
        return [(a, b) for a in unique for b in unique if a is not b and RELATIONS[relation](a, b) == yes]

    scene = _scene_where(rng, world, candidates, allow_held_out, given, least=2)
    if scene is None:
        return None
    a, b = choose(rng, candidates(scene))
    steps = " and ".join(
        f"the {o.color} {o.shape} " + CELL_TEMPLATES[0].format(row=o.row + 1, column=o.column + 1) for o in (a, b)
    )
    question = f"is the {a.shape} {RELATION_PHRASES[relation]} the {b.shape}?"
    return scene, question, steps + STEPS_END + ("yes" if yes else "no")


def what_background(rng, world: World, allow_held_out: bool, given: Scene | None = None) -> Example:
    """A question about the background."""
    scene = given or random_scene(rng, world, allow_held_out=allow_held_out)
    return scene, choose(rng, ("what color is the background?", "which color is behind the objects?")), scene.background


QUESTIONS = {
    "count": how_many,
    "color": what_color,
    "shape": what_shape,
    "place": what_is_where,
    "presence": is_there,
    "relation": is_related,
    "background": what_background,
}
# How often each kind is asked if it is sampled: places and relations are the hardest to learn.
SHARES = {
    "count": 0.16,
    "color": 0.1,
    "shape": 0.1,
    "place": 0.26,
    "presence": 0.1,
    "relation": 0.24,
    "background": 0.04,
}


def question_of_kind(rng: np.random.Generator, world: World, kind: str, *, allow_held_out: bool = False) -> Example:
    """A scene, a question of one kind of `QUESTIONS` about it, and its answer: at its end a word or a number from 0."""
    return QUESTIONS[kind](rng, world, allow_held_out)


def _random_kind(rng: np.random.Generator) -> str:
    shares = np.array(list(SHARES.values()))
    return list(QUESTIONS)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def question_example(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> Example:
    """A scene, a question about it, and its answer: at its end a word or a number from 0."""
    return question_of_kind(rng, world, _random_kind(rng), allow_held_out=allow_held_out)


def question_about(
    rng: np.random.Generator, world: World, scene: Scene, *, allow_held_out: bool = False
) -> tuple[str, str]:
    """A question about a given scene of at least one object, and its answer."""
    while True:  # the background can always be asked for
        example = QUESTIONS[_random_kind(rng)](rng, world, allow_held_out, scene)
        if example is not None:
            return example[1:]
