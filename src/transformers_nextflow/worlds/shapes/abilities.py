"""The abilities that the shapes world trains and scores, with a generator of cases for each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..conversations import answering, drawing, images_of
from ..held_out import is_reserved
from .analogies import analogy_case
from .cases import AnswerCase, CaptionCase, Case, DrawingCase, may_be_trained_on
from .edits import edit_case
from .language import draw_category, drawing_example, random_category
from .questions import question_example
from .scene import World
from .stories import story_case
from .subjects import subject_case
from .text_tasks import text_case
from .thoughts import thinking_case
from .videos import video_case, video_question_case


CAPTION_REQUEST = "caption the picture."
ATTEMPTS = 300  # for each requested case; one in ten is held out for evaluation


def drawing_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> DrawingCase:
    """A caption and its image."""
    category = random_category(rng)
    text, scene, requirement = draw_category(rng, world, category, allow_held_out=allow_held_out)
    return DrawingCase(category, *drawing(text, scene), requirement=requirement)


def caption_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> CaptionCase:
    """A drawing turned into a caption: the image and a caption from which it could be drawn (paper, section 3.2)."""
    text, scene = drawing_example(rng, world, allow_held_out=allow_held_out)
    return CaptionCase("caption", *answering(CAPTION_REQUEST, text, [scene]), scene=scene)


def question_case(rng: np.random.Generator, world: World, *, allow_held_out: bool = False) -> AnswerCase:
    """A question on an image."""
    scene, question, answer = question_example(rng, world, allow_held_out=allow_held_out)
    return AnswerCase("question", *answering(question, answer, [scene]))


ABILITIES: dict[str, Callable[..., Case]] = {
    "text": text_case,
    "drawing": drawing_case,
    "caption": caption_case,
    "question": question_case,
    "editing": edit_case,
    "subject": subject_case,
    "thinking": thinking_case,
    "in_context": analogy_case,
    "story": story_case,
    "video": video_case,
    "video_question": video_question_case,
}


def training_case(rng: np.random.Generator, world: World, ability: str) -> Case:
    """A case of one of `ABILITIES` that is not held out for evaluation."""
    while True:
        case = ABILITIES[ability](rng, world)
        if may_be_trained_on(case, world):
            return case


def held_out_cases(
    ability: str, world: World, n: int = 200, seed: int = 0, *, held_out_pairs: bool = False
) -> list[Case]:
    """`n` different cases of one of `ABILITIES` that are never trained on.

    The hash of what is asked (its texts and what is where in its images) decides whether a case is held out; with
    `held_out_pairs` every case has instead a pair of shape and colour that no training scene holds.

    Raises:
        ValueError: if there are fewer than `n`.
    """
    rng = np.random.default_rng((seed, list(ABILITIES).index(ability)))
    found: dict[str, Case] = {}
    for _ in range(ATTEMPTS * n):
        case = ABILITIES[ability](rng, world, allow_held_out=held_out_pairs)
        key = case.key(world)
        if _holds_held_out_pair(case, world) if held_out_pairs else is_reserved(key):
            found.setdefault(key, case)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"Found only {len(found)} different held-out cases of {ability!r}, not {n}: ask for fewer.")


def _holds_held_out_pair(case: Case, world: World) -> bool:
    scenes = images_of((*case.asked, *case.answer))
    return any((item.shape, item.color) in world.held_out_pairs for scene in scenes for item in scene.objects)
