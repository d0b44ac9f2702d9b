"""The shapes world: scenes, their language, an exact checker and the scores made of it."""

from .checker import read
from .edits import edit_example
from .films import film_example
from .language import (
    CATEGORIES,
    caption,
    drawing_example,
    is_full_caption,
    is_reserved,
    located_caption,
    parse_caption,
)
from .questions import question_about, question_example
from .requirement import CheckResult, Item, Requirement, check
from .scene import HELD_OUT_PAIRS, UNKNOWN, CellLabels, Object, Scene, World, cell_labels, random_scene, render
from .suites import (
    DESCRIPTIONS,
    Prompt,
    UnderstandingCase,
    drawing_score_table,
    held_out_combinations,
    held_out_prompts,
    score_table,
    text_to_image_prompts,
    text_to_image_suite,
    understanding_cases,
)


__all__ = [
    "CATEGORIES", "DESCRIPTIONS", "HELD_OUT_PAIRS", "UNKNOWN", "CellLabels", "CheckResult", "Item", "Object",
    "Prompt", "Requirement", "Scene", "UnderstandingCase", "World", "caption", "cell_labels", "check",
    "drawing_example", "drawing_score_table", "edit_example", "film_example", "held_out_combinations",
    "held_out_prompts", "is_full_caption", "is_reserved", "located_caption", "parse_caption", "question_about",
    "question_example", "random_scene", "read", "render", "score_table", "text_to_image_prompts",
    "text_to_image_suite", "understanding_cases",
]  # fmt: skip
