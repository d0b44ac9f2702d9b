"""The statement of a model of the emoji world about its training (`trained_on` of its config)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...utils.training_domain import vocabulary_of
from ..conversations import texts_of
from .abilities import training_case
from .language import plural, style_word
from .scene import MAX_COUNT, World


# The number of cases of each ability from which the words of its wordings are taken; names are added to them.
CASES = 600


def trained_on(world: World, abilities: Iterable[str], lowest_psnr: float) -> dict:
    """The statement, as a config holds it.

    Args:
        abilities: the names of those of `ABILITIES` that the model was trained on.
        lowest_psnr: the lowest PSNR in dB of the tokenizer's reconstructions of training images.
    """
    concepts = [world.art.concepts[key] for key in world.concepts]
    names = [name for concept in concepts for name in concept.names]
    styles = ", ".join(style_word(None, style) for style in world.styles)
    return {
        "domain": f"emoji of {len(concepts)} concepts in the styles {styles}",
        "words": list(prompt_words(world, abilities)),
        "sizes": [list(world.size(ratio)) for ratio in world.ratios],
        "most": MAX_COUNT if "count" in world.kinds else 1,
        "counted": sorted({plural(name) for name in names}),
        "lowest_psnr": round(lowest_psnr, 1),
    }


def prompt_words(world: World, abilities: Iterable[str]) -> tuple[str, ...]:
    """All words of prompts and answers, numbers left out."""
    rng = np.random.default_rng(0)
    texts = []
    for key in world.concepts:
        concept = world.art.concepts[key]
        texts += [*concept.names, *map(plural, concept.names), *concept.keywords]
    for ability in abilities:
        for _ in range(CASES):
            exchange = training_case(rng, world, ability).exchange
            texts += texts_of(exchange.asked + exchange.answer)
    return vocabulary_of(texts)
