"""Rewards of images: functions `reward(prompts, completions, **columns)`, as [`NextFlowGRPOTrainer`] calls them.

A reward that needs a model is made by a function that takes the model; no reward loads anything by itself.
"""

from .detected_objects import color_classifier, geneval_reward
from .image_text import similarity_reward
from .judge import judge_reward
from .reading import ask_for_caption, reading_reward
from .rendered_text import rendered_text_reward


__all__ = [
    "ask_for_caption",
    "color_classifier",
    "geneval_reward",
    "judge_reward",
    "reading_reward",
    "rendered_text_reward",
    "similarity_reward",
]
