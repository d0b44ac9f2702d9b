"""The cases on which a checkpoint is scored (prompts to draw, questions about images), and the tables of the results.

There are GenEval's six categories with its rule (`requirement.check`), and a strict rule that forbids anything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..held_out import is_reserved
from ..score_tables import metric_table
from .cases import AnswerCase
from .language import CATEGORIES, caption, draw_category, located_caption
from .questions import QUESTIONS, question_of_kind
from .requirement import CheckResult, Requirement
from .scene import World, random_scene


HELD_OUT_CATEGORIES = ("counting", "colors", "position", "color_attribution")  # those that name colours
# What is asked of a whole image, by kind, and how the right answer is written.
DESCRIPTIONS = {
    "caption": ("describe the picture.", lambda scene, world: caption(None, scene, world)),
    "located_caption": ("what is where in the picture?", located_caption),
}


@dataclass(frozen=True)
class Prompt:
    """A text to draw from and what its image must hold."""

    category: str
    text: str
    requirement: Requirement


def _distinct_prompts(world: World, category: str, n: int, seed: int, allow_held_out: bool, accept) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    prompts: dict[str, Prompt] = {}
    for _ in range(300 * n):
        text, _, asked = draw_category(rng, world, category, places=False, allow_held_out=allow_held_out)
        if accept(text, asked):
            prompts.setdefault(text, Prompt(category, text, asked))
        if len(prompts) == n:
            return list(prompts.values())
    raise ValueError(f"Found only {len(prompts)} different held-out prompts of {category!r}, not {n}: ask for fewer.")


def text_to_image_prompts(category: str, world: World, n: int = 100, seed: int = 0) -> list[Prompt]:
    """`n` different prompts of one of `CATEGORIES` whose texts never occur in training.

    A category has few contents if colours are free: 6 single objects, 15 pairs of objects, 18 counts of a shape, 32
    coloured objects. There the prompts repeat the contents, and only the wording with its prefix and background is new
    to the model; in `position` (about 3,500) and `color_attribution` (about 350) most contents differ. Raises
    `ValueError` if there are fewer than `n` prompts (`single_object` has about 180).
    """
    return _distinct_prompts(world, category, n, seed, False, lambda text, _: is_reserved(text))


def held_out_prompts(category: str, world: World, n: int = 100, seed: int = 0) -> list[Prompt]:
    """`n` different prompts of one of `HELD_OUT_CATEGORIES` that name a pair of shape and colour never trained on."""
    if category not in HELD_OUT_CATEGORIES:
        raise ValueError(f"{category!r} names no colours; held-out pairs are in {', '.join(HELD_OUT_CATEGORIES)}.")

    def names_held_out_pair(_: str, asked: Requirement) -> bool:
        return any((item.shape, item.color) in world.held_out_pairs for item in asked.items)

    return _distinct_prompts(world, category, n, seed, True, names_held_out_pair)


def text_to_image_suite(world: World, n: int = 100, seed: int = 0) -> list[Prompt]:
    """`n` prompts of each of GenEval's six categories."""
    return [prompt for category in CATEGORIES for prompt in text_to_image_prompts(category, world, n, seed)]


def held_out_combinations(world: World, n: int = 100, seed: int = 0) -> list[Prompt]:
    """`n` prompts of each category that names colours, each with a held-out pair."""
    return [prompt for category in HELD_OUT_CATEGORIES for prompt in held_out_prompts(category, world, n, seed)]


def understanding_cases(world: World, n: int = 100, seed: int = 0) -> list[AnswerCase]:
    """`n` cases of each kind of question, and `n` images for each kind of description; each asks (scene, text).

    Scenes and questions are sampled as in training, held out or not, so a training may have seen some of them: those of
    few objects above all.
    """
    rng = np.random.default_rng(seed)
    cases = []
    for kind in QUESTIONS:
        for scene, question, answer in (question_of_kind(rng, world, kind) for _ in range(n)):
            cases.append(AnswerCase(kind, (scene, question), (answer,)))
    for kind, (request, describe) in DESCRIPTIONS.items():
        for scene in (random_scene(rng, world) for _ in range(n)):
            cases.append(AnswerCase(kind, (scene, request), (describe(scene, world),)))
    return cases


def drawing_score_table(results: Iterable[tuple[str, CheckResult]]) -> dict[str, float]:
    """Means by the lenient rule, then by the strict one with every name ending in `_strict`."""
    return metric_table((category, {"right": r.lenient, "strict": r.strict}) for category, r in results)
