"""Questions about scenes, with answers of a few words."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from ..conversations import answering
from ..held_out import is_reserved
from .cases import AnswerCase
from .language import RELATION_TEMPLATES, name_of, plural, style_word, with_article
from .packages import STYLE_WORDS
from .requirement import RELATIONS
from .scene import Scene, World, choose, draw_share, random_scene


Question = tuple[str, str, tuple[str, ...]]


def names(concept: str, world: World) -> tuple[str, ...]:
    """All names of a concept; answers have the first one."""
    return world.art.concepts[concept].names


def _what(rng, scene: Scene, world: World) -> Question | None:
    if len(scene.concepts) > 1:
        return None
    text = choose(rng, ("what is it?", "what is this?", "what does the image show?", "name it"))
    return text, world.name(scene.concepts[0]), names(scene.concepts[0], world)


def _style(rng, scene: Scene, world: World) -> Question | None:
    if scene.style is None:
        return None
    text = choose(rng, ("which style is it?", "what style is this?", "in which style is it drawn?"))
    words = STYLE_WORDS.get(scene.style, (scene.style,))
    return text, style_word(None, scene.style), tuple(w + suffix for w in words for suffix in ("", " style"))


def _how_many(rng, scene: Scene, world: World) -> Question:
    counts = Counter(sticker.concept for sticker in scene.stickers)
    absent = choose(rng, world.concepts)
    concept = choose(rng, list(counts)) if rng.random() < 0.85 else absent
    noun = "emoji" if rng.random() < 0.2 else plural(name_of(rng, concept, world))
    number = len(scene.stickers) if noun == "emoji" else counts[concept]
    return choose(rng, ("how many {} are there?", "how many {} can you see?")).format(noun), str(number), (str(number),)


def _relation(rng, scene: Scene, world: World) -> Question | None:
    """What lies on a side of something, if only one thing does."""
    if len(scene.concepts) < max(2, len(scene.stickers)):
        return None
    relation, other = choose(rng, list(RELATIONS)), choose(rng, scene.stickers)
    holds = RELATIONS[relation]
    there = [s for s in scene.stickers if s is not other and holds(scene.center(s), scene.center(other))]
    if len(there) != 1:
        return None
    phrase = choose(rng, RELATION_TEMPLATES[relation]).strip()
    text = f"what is {phrase} the {name_of(rng, other.concept, world)}?"
    return text, world.name(there[0].concept), names(there[0].concept, world)


def _background(rng, scene: Scene, world: World) -> Question:
    text = choose(rng, ("what color is the background?", "which color is behind it?"))
    return text, scene.background, (scene.background,)


def _color(rng, scene: Scene, world: World) -> Question | None:
    sticker = choose(rng, scene.stickers)
    paint = world.drawing(sticker.concept, sticker.style).paint
    if paint is None:
        return None
    color = sticker.color or paint.name
    noun = "it" if len(scene.stickers) == 1 else f"the {name_of(rng, sticker.concept, world)}"
    if len(scene.concepts) < len(scene.stickers):
        return f"what color are the {plural(name_of(rng, sticker.concept, world))}?", color, (color,)
    return f"what color is {noun}?", color, (color,)


def _presence(rng, scene: Scene, world: World) -> Question:
    there = bool(rng.random() < 0.5)
    concept = choose(rng, scene.concepts if there else world.concepts)
    answer = "yes" if concept in scene.concepts else "no"
    name = name_of(rng, concept, world)
    text = choose(rng, ("is there {}?", "can you see {}?", "does the image show {}?"))
    return text.format(with_article(name, name)), answer, (answer,)


QUESTIONS = {
    "what": _what,
    "style": _style,
    "count": _how_many,
    "relation": _relation,
    "background": _background,
    "color": _color,
    "presence": _presence,
}
SHARES = dict(zip(QUESTIONS, (0.34, 0.12, 0.14, 0.14, 0.08, 0.08, 0.1)))


def question_about(rng: np.random.Generator, scene: Scene, world: World) -> tuple[str, Question]:
    """A kind of `QUESTIONS`, and a question of it about a given scene."""
    while True:  # the background can always be asked for
        kind = draw_share(rng, SHARES)
        question = QUESTIONS[kind](rng, scene, world)
        if question is not None:
            return kind, question


def further_question(rng: np.random.Generator, scene: Scene, world: World) -> AnswerCase:
    """A question with which a training goes on about an image that it has shown; never one that is held out."""
    while True:
        kind, (text, answer, answers) = question_about(rng, scene, world)
        case = AnswerCase(kind, *answering(text, answer, [scene]), answers=answers)
        if not is_reserved(case.key):
            return replace(case, asked=(text,))


def question_case(rng: np.random.Generator, world: World) -> AnswerCase:
    """A question on an image; each kind by its share."""
    while True:
        # Sampled anew each time, since the world may not have what a kind asks about.
        kind, scene = draw_share(rng, SHARES), random_scene(rng, world)
        question = QUESTIONS[kind](rng, scene, world)
        if question is not None:
            text, answer, answers = question
            return AnswerCase(kind, *answering(text, answer, [scene]), answers=answers)
