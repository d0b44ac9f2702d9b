"""The shapes world: scenes, their language, an exact checker and scores."""

from ..conversations import Exchange, answering, drawing, images_of, message, sequence, texts_of, thinking, to_messages
from ..held_out import is_reserved
from ..score_tables import metric_table
from .abilities import ABILITIES, CAPTION_REQUEST, held_out_cases, training_case
from .cases import Case, may_be_trained_on, read_images
from .checker import read
from .edits import changed_region, edit_example, follow_up_edit
from .language import (
    CATEGORIES,
    caption,
    drawing_example,
    is_full_caption,
    located_caption,
    parse_caption,
)
from .questions import question_about, question_example
from .requirement import CheckResult, Item, Requirement, check
from .scene import HELD_OUT_PAIRS, UNKNOWN, CellLabels, Object, Scene, World, cell_labels, random_scene, render
from .suites import (
    DESCRIPTIONS,
    Prompt,
    drawing_score_table,
    held_out_combinations,
    held_out_prompts,
    text_to_image_prompts,
    text_to_image_suite,
    understanding_cases,
)
from .thoughts import think_first
from .videos import video_example


__all__ = [
    "CAPTION_REQUEST",
    "ABILITIES", "CATEGORIES", "Case", "CellLabels", "CheckResult", "DESCRIPTIONS", "Exchange", "HELD_OUT_PAIRS",
    "Item", "Object", "Prompt", "Requirement", "Scene", "UNKNOWN", "World", "answering",
    "caption", "cell_labels", "changed_region", "check", "drawing", "drawing_example", "drawing_score_table",
    "edit_example", "video_example", "follow_up_edit", "held_out_cases", "held_out_combinations",
    "held_out_prompts", "is_full_caption", "is_reserved", "located_caption", "may_be_trained_on", "message",
    "metric_table", "parse_caption", "images_of", "question_about", "question_example", "random_scene", "read",
    "read_images", "render", "sequence", "text_to_image_prompts", "text_to_image_suite",
    "texts_of", "think_first", "thinking", "to_messages", "training_case", "understanding_cases",
]  # fmt: skip
