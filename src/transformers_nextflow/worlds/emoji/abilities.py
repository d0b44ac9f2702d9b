"""The abilities that the emoji world trains and scores, with a generator of cases for each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..conversations import answering, drawing
from .cases import CaptionCase, Case, DrawingCase, may_be_trained_on
from .edits import edit_case, style_case
from .language import caption, draw_category, random_category
from .questions import question_case
from .scene import SPLITS, World, random_scene
from .stories import story_case
from .subjects import analogy_case, subject_case
from .texts import text_case, thinking_case


CAPTION_REQUEST = "describe the image."
WORDING = "wording"
ATTEMPTS = 400  # for each requested case: in the rarest split, counts, one case in fifty is held out


def drawing_case(rng: np.random.Generator, world: World) -> DrawingCase:
    """A caption and its image."""
    category = random_category(rng, world)
    text, scene, requirement = draw_category(rng, world, category)
    return DrawingCase(category, *drawing(text, scene), requirement=requirement)


def caption_case(rng: np.random.Generator, world: World) -> CaptionCase:
    """An image and its caption."""
    scene = random_scene(rng, world)
    kind = "one" if len(scene.stickers) == 1 else "several"
    return CaptionCase(kind, *answering(CAPTION_REQUEST, caption(scene, world), [scene]), scene=scene)


ABILITIES: dict[str, Callable[..., Case]] = {
    "text": text_case,
    "drawing": drawing_case,
    "caption": caption_case,
    "question": question_case,
    "style": style_case,
    "editing": edit_case,
    "subject": subject_case,
    "in_context": analogy_case,
    "thinking": thinking_case,
    "story": story_case,
}


def training_case(rng: np.random.Generator, world: World, ability: str) -> Case:
    """A case of one of `ABILITIES` of which nothing is held out."""
    while True:
        case = ABILITIES[ability](rng, world)
        if may_be_trained_on(case, world):
            return case


def held_out_cases(ability: str, world: World, n: int = 200, seed: int = 0, split: str = WORDING) -> list[Case]:
    """`n` different cases of one of `ABILITIES` that are never trained on.

    Args:
        split: what is held out: "wording", the texts of cases with scenes as in training; or one of `SPLITS`, scenes
            unlike all training scenes, in any wording.

    Raises:
        ValueError: if there are fewer than `n`, or for another split.
    """
    if split not in (WORDING, *SPLITS):
        raise ValueError(f"There is no split {split!r}; there are {(WORDING, *SPLITS)}.")
    rng = np.random.default_rng((seed, list(ABILITIES).index(ability), (WORDING, *SPLITS).index(split)))
    found: dict[str, Case] = {}
    for _ in range(ATTEMPTS * n):
        case = ABILITIES[ability](rng, world)
        splits = case.held_out(world)
        if splits == {WORDING} if split == WORDING else splits - {WORDING} == {split}:
            found.setdefault(case.key, case)
        if len(found) == n:
            return list(found.values())
    raise ValueError(
        f"Found only {len(found)} different held-out cases of {ability!r} by {split!r}, not {n}: ask for fewer."
    )
