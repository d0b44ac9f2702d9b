"""The emoji world: scenes of emoji drawings in several styles, their language, a judge and scores."""

from .abilities import ABILITIES, CAPTION_REQUEST, held_out_cases, training_case
from .art import Art, make_art
from .cases import Case, may_be_trained_on
from .language import caption, draw_category, understand, write_caption
from .packages import fetch
from .requirement import Item, Requirement, check
from .scene import RATIOS, SPLITS, Scene, Sticker, World, cell_labels, random_scene, render


__all__ = [
    "ABILITIES", "Art", "CAPTION_REQUEST", "Case", "Item", "RATIOS", "Requirement", "SPLITS", "Scene", "Sticker",
    "World", "caption", "cell_labels", "check", "draw_category", "fetch", "held_out_cases", "make_art",
    "may_be_trained_on", "random_scene", "render", "training_case", "understand", "write_caption",
]  # fmt: skip
