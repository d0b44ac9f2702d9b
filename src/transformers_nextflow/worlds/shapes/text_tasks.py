"""Tasks with only text: counting, comparing and changing scenes that a text describes, and facts about things."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..conversations import answering
from .cases import AnswerCase, key_of
from .edits import edit_example
from .language import caption, located_caption, plural
from .questions import question_about
from .scene import Scene, World, choose, random_scene
from .thoughts import COLORED_LIKE, COUNTED_LIKE, SHAPED_LIKE, implicit_prompt, random_kind, spell_out


SUM_TEMPLATES = ("what is {}?", "how much is {}?", "{} is", "work out {}")
FACT_TEMPLATES = {
    "color": ("what color has {}?", "which color does {} have?", "the color of {} is", "name the color of {}"),
    "shape": ("what is the {}?", "which one is the {}?", "name the {}", "how do you call the {}?"),
    "number": ("how many {1} has {0}?", "how many {1} does {0} have?", "the number of {1} that {0} has is"),
}


def _described(rng, world: World, scene: Scene, located: bool | None = None) -> str:
    located = bool(rng.random() < 0.5) if located is None else located
    return located_caption(scene, world) if located else caption(None, scene, world)


def _question(rng, world: World, scene: Scene, allow_held_out: bool):
    """The questions that are asked of images, of a described scene."""
    question, answer = question_about(rng, world, scene, allow_held_out=allow_held_out)
    return f"{_described(rng, world, scene, located=True)}. {question}", answer


def _comparison(rng, world: World, scene: Scene, allow_held_out: bool):
    """Which of two shapes or colours there are more of."""
    attribute = choose(rng, ("shape", "color"))
    counts = Counter(getattr(item, attribute) for item in scene.objects)
    values = world.shapes if attribute == "shape" else tuple(world.palette)
    first = choose(rng, list(counts))
    second = choose(rng, [value for value in values if value != first])
    if rng.random() < 0.5:
        first, second = second, first
    nouns = [plural(value) if attribute == "shape" else f"{value} objects" for value in (first, second)]
    more = "yes" if counts[first] > counts[second] else "no"
    return f"{_described(rng, world, scene)}. are there more {nouns[0]} than {nouns[1]}?", more


def _left(rng, world: World, scene: Scene, allow_held_out: bool):
    """How many are left after some have been removed."""
    attribute = choose(rng, ("shape", "color"))
    value = getattr(choose(rng, scene.objects), attribute)
    noun = plural(value) if attribute == "shape" else f"{value} objects"
    left = sum(getattr(item, attribute) != value for item in scene.objects)
    return f"{_described(rng, world, scene)}. remove all {noun}. how many objects are left?", str(left)


def _edit(rng, world: World, scene: Scene, allow_held_out: bool):
    """What is where after an edit of a scene that the text describes."""
    before, instruction, after = edit_example(rng, world, allow_held_out=allow_held_out)
    question = f"{located_caption(before, world)}. {instruction}. what is where now?"
    return question, located_caption(after, world), key_of((before, instruction), world)


def _arithmetic(rng, world: World, scene: Scene, allow_held_out: bool):
    first, second = sorted((int(number) for number in rng.integers(0, 10, 2)), reverse=True)
    verb, result = choose(rng, (("plus", first + second), ("minus", first - second)))
    return choose(rng, SUM_TEMPLATES).format(f"{first} {verb} {second}"), str(result)


def _fact(rng, world: World, scene: Scene, allow_held_out: bool):
    """The facts that implicit prompts use."""
    kind = choose(rng, list(FACT_TEMPLATES))
    table = {"color": COLORED_LIKE, "shape": SHAPED_LIKE, "number": COUNTED_LIKE}[kind]
    answer = choose(rng, list(table))
    owner, _, things = choose(rng, table[answer]).partition(" has ")
    return choose(rng, FACT_TEMPLATES[kind]).format(owner, things), str(answer)


def _riddle(rng, world: World, scene: Scene, allow_held_out: bool):
    """An implicit prompt, answered with its plain meaning."""
    prompt = implicit_prompt(rng, world, random_kind(rng), allow_held_out=allow_held_out)
    return f"say it plainly: {prompt.text}", spell_out(prompt.requirement, world, prompt.steps), prompt.text


TASKS = {
    "question": _question,
    "comparison": _comparison,
    "left": _left,
    "edit": _edit,
    "arithmetic": _arithmetic,
    "fact": _fact,
    "riddle": _riddle,
}
SHARES = {
    "question": 0.18,
    "comparison": 0.12,
    "left": 0.12,
    "edit": 0.09,
    "arithmetic": 0.09,
    "fact": 0.05,
    "riddle": 0.35,
}


def text_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> AnswerCase:
    """A task of one kind of `TASKS`."""
    kind = list(TASKS)[int(rng.choice(len(SHARES), p=list(SHARES.values())))]
    scene = random_scene(rng, world, allow_held_out=allow_held_out)
    question, answer, *drawn_from = TASKS[kind](rng, world, scene, allow_held_out)
    return AnswerCase(kind, *answering(question, answer), drawn_from=tuple(drawn_from))
